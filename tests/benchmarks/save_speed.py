"""What a save costs the steps around it: written beside training, against waiting for it.

    python tests/benchmarks/save_speed.py FOLDER [--layers 16] [--rounds 5] [--device cuda]

FOLDER is where the checkpoints go; it has to hold two of them, and it is left empty.  The model is
the 125m preset with more layers, as the generated text supports but a small vocabulary.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import median_and_range, provenance, seconds, table
from samples import NeverStop, options

import train_h100_dual as t

SHARE = "the extra time to the save that is waited for"


def build(folder: Path, layers: int, tokens: int, device: str) -> t.Run:
    """A run of one row a step that saves only where it is told to."""
    t.PRESETS["125m"] = replace(t.PRESETS["125m"], layers=layers)  # of this process alone
    words = f"--max-seq-length {tokens} --batch-size 1 --max-steps 1000000 --save-total-limit 1 --dummy-data"
    words = options(folder, *words.split(), "--model-size", "125m", "--device", device)
    cfg = t.resolve_config(t.parse_args(words), device)[0]
    cfg.output_dir.mkdir(parents=True)
    return t.build_run(cfg, t.prepare_corpus(cfg), NeverStop(), t.build_accelerator(cfg))


def measure(run: t.Run, state: t.TrainState, batches: Any) -> dict[str, float]:
    """One round: quiet steps, a save that is waited for, quiet steps, a save beside training."""

    def step() -> float:
        state.step += 1
        return seconds(lambda: t.train_step(run, batches, 1e-4).tolist())  # until a GPU is done with it

    def save() -> float:
        return seconds(t.save_checkpoint, run, state)

    quiet = [step() for _ in range(8)]
    foreground = save() + seconds(t.wait_for_saver, run)
    normal = statistics.median(quiet + [step() for _ in range(8)])
    copied, during = save(), []
    while run.saver.busy():
        during.append(step())
    t.wait_for_saver(run)
    after = [step() for _ in range(2)]
    extra = copied + sum(during) + sum(after) - normal * (len(during) + len(after))
    return {
        "a step without a save, s": normal,
        "a save that is waited for, s": foreground,
        "copy to host memory, s": copied,
        "extra time of the steps around a save, s": extra,
        SHARE: extra / foreground,
        "the writing beside training, s": run.save_seconds,
        "a step while the writer works, to one without": statistics.mean(during) / normal if during else 1.0,
    }


def measure_rounds(
    folder: Path, layers: int, tokens: int, rounds: int, device: str
) -> tuple[list[dict[str, float]], str]:
    """What each round measured, and a line about the checkpoint."""
    run, state = build(folder, layers, tokens, device), t.TrainState()
    batches = t.make_loader(run.cfg, run.corpus, t.rank_positions(run.cfg, 0, 1, range(1_000_000)))
    measure(run, state, batches)  # allocates the buffers
    measured = [measure(run, state, batches) for _ in range(rounds)]
    parameters = sum(weight.numel() for weight in run.model.parameters())
    written = sum(buffer.nbytes for buffer in run.saver.buffers.values())
    return measured, f"{parameters / 1e6:.1f} M parameters, {written / 1e9:.2f} GB a checkpoint"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    folder = args.folder / "save_speed"
    rounds, size = measure_rounds(folder, args.layers, args.tokens, args.rounds, args.device)
    rows = [[name, median_and_range([one[name] for one in rounds])] for name in rounds[0]]
    print(f"{size}, median and range of {len(rounds)} rounds:\n\n{table(['', 'figure'], rows)}\n")
    print(provenance("torch", "transformers", "accelerate"))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
