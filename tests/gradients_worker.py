"""Run under torchrun by test_optimizer.py: one real training step, its gradients written by rank 0.

Usage: torchrun ... gradients_worker.py RESULT FOLDER [OPTION...]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from samples import tiny_run

import train_h100_dual as t


def main() -> None:
    run = tiny_run(Path(sys.argv[2]), "--max-grad-norm", "1e6", *sys.argv[3:])
    rank, world_size = run.accelerator.process_index, run.accelerator.num_processes
    batches = t.make_loader(run.cfg, run.corpus, t.rank_positions(run.cfg, rank, world_size, range(1)))
    found = {}

    def keep_gradients() -> None:
        found.update({name: weight.grad.clone() for name, weight in run.model.named_parameters()})

    run.optimizer.step = keep_gradients
    t.train_step(run, batches, 1e-3)
    # DDP's buckets stay: cut off from them, the next step's first micro-steps would take the memory a second time.
    assert (run.model.get_input_embeddings().weight.grad is None) == (world_size == 1)
    if rank == 0:
        torch.save(found, sys.argv[1])
    run.accelerator.end_training()


if __name__ == "__main__":
    main()
    t.hard_exit(0)
