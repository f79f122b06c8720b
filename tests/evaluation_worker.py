"""Run under torchrun by test_evaluation.py: evaluates the untrained model on two ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from samples import tiny_run

import train_h100_dual as t


def main() -> None:
    folder = Path(sys.argv[1])
    if t.rank_and_world()[0]:
        t.corpus_key = None  # a call would fail: the first rank says which corpus it is, whatever files this one sees
    run = tiny_run(folder)
    figures = t.evaluate(run)
    if run.is_main:
        torch.save(figures, folder / "figures.pt")
    run.accelerator.end_training()


if __name__ == "__main__":
    main()
    t.hard_exit(0)
