#!/usr/bin/env python3
"""Compute, not measure, what a second H100 brings: gradients, all-reduce over each link, what of it is hidden.

    .venv/bin/python tests/benchmarks/scaling_table.py [--record]

The model of a step is in README.md beside this file, and its assumptions are printed with the table.
"""

from __future__ import annotations

import sys

from common import git_commit, record, table

import train_h100_dual as t

VOCAB, BATCH, LENGTH = 65_536, 4, 2048
PEAK = 989e12  # dense bf16 FLOP/s of an H100 SXM
MEMORY = 3.35e12  # bytes/s of its memory
EFFICIENCY = 0.8  # of a link's or the memory's nominal speed
LINKS = {"NVLink 4": 450e9, "PCIe 5 x16": 63e9, "PCIe 4 x16": 31.5e9}  # bytes/s in one direction
MFU = {"tiny": 0.10, "125m": 0.42, "350m": 0.46, "760m": 0.48, "1.3b": 0.50, "3b": 0.50}  # the goals, not measured
# A parameter's bytes: AdamW reads weight, gradient, two moments and writes weight and moments; clipping reads the
# gradient for its norm, reads and writes it to scale it.
UPDATE_BYTES = 28 + 12


def rows_of(name: str, preset: t.Preset) -> list[list[str]]:
    """A line for each link; times in seconds are printed in ms.

    Layers are reduced while the backward pass goes on to earlier ones; the tied embedding's gradient is whole only at
    its very end, so that all of its reduction is waited for.  In a ring of two each GPU sends all bytes once.
    """
    parameters, embedding = preset.parameter_count(VOCAB), 4 * VOCAB * preset.hidden
    gradients = 4 * parameters
    flops = t.training_flops(parameters, preset.layers, preset.hidden, LENGTH) * BATCH * LENGTH
    micro, update = flops / (PEAK * MFU[name]), parameters * UPDATE_BYTES / (MEMORY * EFFICIENCY)
    own = [name, f"{gradients / 1e9:.2f}", f"{embedding / gradients:.0%}", f"{1e3 * micro:.1f}", f"{1e3 * update:.1f}"]
    lines = []
    for link, nominal in LINKS.items():
        speed = nominal * EFFICIENCY
        exposed = max(0.0, (gradients - embedding) / speed - micro * 2 / 3) + embedding / speed
        alone = [count * micro + update for count in (1, 8)]
        scaling = [f"{2 * one / (one + exposed):.2f}" for one in alone]
        lines.append([*own, link, f"{1e3 * gradients / speed:.1f}", f"{1e3 * exposed:.1f}", *scaling])
        own = [""] * len(own)
    return lines


def main() -> None:
    """Print the table, and append it to RESULTS.md where asked to."""
    head = ["preset", "gradients, GB", "embedding's share", "micro-batch, ms", "clip + AdamW, ms", "link"]
    head += ["all-reduce, ms", "not hidden, ms", "scaling, accumulation 1", "scaling, accumulation 8"]
    mfu = ", ".join(f"{name} {value:.0%}" for name, value in MFU.items())
    links = ", ".join(f"{name} {speed / 1e9:g} GB/s" for name, speed in LINKS.items())
    text = (
        f"Computed, not measured; commit {git_commit()}; `python tests/benchmarks/scaling_table.py --record`. "
        f"Two H100 SXM, vocabulary {VOCAB:,}, batch {BATCH} x {LENGTH}, fp32 gradients, plain DDP.\n\n"
        f"{table(head, [line for item in t.PRESETS.items() for line in rows_of(*item)])}\n\n"
        f"Assumed: links in one direction {links}, of which {EFFICIENCY:.0%} is reached, as of the memory's "
        f"{MEMORY / 1e12:g} TB/s; MFU on one GPU {mfu} of {PEAK / 1e12:g} TFLOP/s (goals); the backward pass is two "
        "thirds of a micro-batch; layers are reduced during the backward pass of the last micro-step, the tied "
        "embedding after it; kernels of NCCL take nothing from computing. Scaling is tokens/s of two GPUs to one's."
    )
    print(text)
    if sys.argv[1:] == ["--record"]:
        record("Two GPUs, computed", text)


if __name__ == "__main__":
    main()
