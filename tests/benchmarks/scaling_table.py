#!/usr/bin/env python3
"""Compute, not measure, what a second H100 brings: gradients, all-reduce over each link, what of it is hidden.

    .venv/bin/python tests/benchmarks/scaling_table.py [--record]

The model of a step is in README.md beside this file, and its assumptions are printed with the table.
"""

from __future__ import annotations

import argparse
import sys
import time

from common import ROOT, git_commit, table

sys.path.insert(0, str(ROOT))
import train_h100_dual as t

VOCAB, BATCH, LENGTH, GPUS = 65_536, 4, 2048, 2
PEAK = 989e12  # dense bf16 FLOP/s of an H100 SXM
MEMORY = 3.35e12  # bytes/s of its memory
EFFICIENCY = 0.8  # of a link's or the memory's nominal speed
LINKS = {"NVLink 4": 450e9, "PCIe 5 x16": 63e9, "PCIe 4 x16": 31.5e9}  # bytes/s in one direction
MFU = {"tiny": 0.10, "125m": 0.42, "350m": 0.46, "760m": 0.48, "1.3b": 0.50, "3b": 0.50}  # the goals, not measured
ADAM_BYTES = 28  # a parameter: reads weight, gradient, two moments; writes weight and moments
CLIP_BYTES = 12  # a parameter: reads the gradient for its norm, reads and writes it to scale it


def micro_seconds(preset: t.Preset, mfu: float) -> float:
    """Forward and backward of one micro-batch on one GPU."""
    flops = 6 * preset.parameter_count(VOCAB) + 12 * preset.layers * preset.hidden * LENGTH
    return flops * BATCH * LENGTH / (PEAK * mfu)


def update_seconds(preset: t.Preset) -> float:
    """Clipping and AdamW, which memory bounds."""
    return preset.parameter_count(VOCAB) * (ADAM_BYTES + CLIP_BYTES) / (MEMORY * EFFICIENCY)


def reduce_seconds(size: float, link: float) -> float:
    """Ring all-reduce of ``size`` bytes: each GPU sends 2 (n - 1) / n of them."""
    return 2 * (GPUS - 1) / GPUS * size / (link * EFFICIENCY)


def exposed_seconds(preset: t.Preset, mfu: float, link: float) -> float:
    """What of a step's reduction no computing hides.

    Layers are reduced while the backward pass goes on to earlier ones; the tied embedding's gradient is
    whole only at its very end, so that all of its reduction is waited for.
    """
    embedding = 4 * VOCAB * preset.hidden
    layers = 4 * preset.parameter_count(VOCAB) - embedding
    backward = micro_seconds(preset, mfu) * 2 / 3
    return max(0.0, reduce_seconds(layers, link) - backward) + reduce_seconds(embedding, link)


def scaling(preset: t.Preset, mfu: float, link: float, accumulation: int) -> float:
    """Tokens/s of two GPUs to those of one."""
    alone = accumulation * micro_seconds(preset, mfu) + update_seconds(preset)
    return GPUS * alone / (alone + exposed_seconds(preset, mfu, link))


def rows() -> list[list[str]]:
    """A line for each preset and link."""
    lines = []
    for name, preset in t.PRESETS.items():
        mfu, size = MFU[name], 4 * preset.parameter_count(VOCAB)
        for index, (link_name, link) in enumerate(LINKS.items()):
            own = [name, f"{size / 1e9:.2f}", f"{4 * VOCAB * preset.hidden / size:.0%}"]
            own += [f"{1000 * micro_seconds(preset, mfu):.1f}", f"{1000 * update_seconds(preset):.1f}"]
            lines.append(
                [
                    *(own if index == 0 else [""] * len(own)),
                    link_name,
                    f"{1000 * reduce_seconds(size, link):.1f}",
                    f"{1000 * exposed_seconds(preset, mfu, link):.1f}",
                    *(f"{scaling(preset, mfu, link, count):.2f}" for count in (1, 8)),
                ]
            )
    return lines


def text() -> str:
    """The table with its assumptions."""
    head = ["preset", "gradients, GB", "embedding's share", "micro-batch, ms", "clip + AdamW, ms", "link"]
    head += ["all-reduce, ms", "not hidden, ms", "scaling, accumulation 1", "scaling, accumulation 8"]
    mfu = ", ".join(f"{name} {value:.0%}" for name, value in MFU.items())
    links = ", ".join(f"{name} {speed / 1e9:g} GB/s" for name, speed in LINKS.items())
    return (
        f"Computed, not measured; commit {git_commit()}; `python tests/benchmarks/scaling_table.py --record`. "
        f"Two H100 SXM, vocabulary {VOCAB:,}, batch {BATCH} x {LENGTH}, fp32 gradients, plain DDP.\n\n"
        f"{table(head, rows())}\n\n"
        f"Assumed: links in one direction {links}, of which {EFFICIENCY:.0%} is reached, as of the memory's "
        f"{MEMORY / 1e12:g} TB/s; MFU on one GPU {mfu} of {PEAK / 1e12:g} TFLOP/s (goals); the backward pass is two "
        "thirds of a micro-batch; layers are reduced during the backward pass of the last micro-step, the tied "
        "embedding after it; kernels of NCCL take nothing from computing. Scaling is tokens/s of two GPUs to one's.\n"
    )


def main() -> None:
    """Print the table, and append it where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="append it to RESULTS.md")
    args = parser.parse_args()
    print(text())
    if args.record:
        with open(ROOT / "tests" / "benchmarks" / "RESULTS.md", "a", encoding="utf-8") as stream:
            stream.write(f"\n## Two GPUs, computed ({time.strftime('%Y-%m-%d')})\n\n{text()}")


if __name__ == "__main__":
    main()
