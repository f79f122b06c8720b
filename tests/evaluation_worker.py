"""Run under torchrun by test_evaluation.py: evaluates the untrained model on two ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from samples import tiny_run

import train_h100_dual as t


def main() -> None:
    folder = Path(sys.argv[1])
    run = tiny_run(folder)
    figures = t.evaluate(run)
    if run.is_main:
        torch.save(figures, folder / "figures.pt")
    run.accelerator.end_training()


if __name__ == "__main__":
    main()
    t.hard_exit(0)
