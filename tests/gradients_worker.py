"""One real training step and its gradients; run under torchrun by test_optimizer.py, rank 0 writes them.

Usage: torchrun ... gradients_worker.py RESULT FOLDER [OPTION...]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from samples import tiny_run

import train_h100_dual as t


def step_gradients(folder: Path, *more: str) -> dict[str, torch.Tensor]:
    """The gradients as the optimizer gets them."""
    run = tiny_run(folder, "--max-grad-norm", "1e6", *more)
    rank, world_size = run.accelerator.process_index, run.accelerator.num_processes
    batches = t.make_loader(run.cfg, run.corpus, t.rank_positions(run.cfg, rank, world_size, range(1)))
    found = {}

    def keep_gradients() -> None:
        found.update({name: weight.grad.clone() for name, weight in run.model.named_parameters()})

    run.optimizer.step = keep_gradients
    t.train_step(run, batches, 1e-3)
    # DDP's buckets stay: cut off from them, the next step's first micro-steps would take the memory a second time.
    assert (run.model.get_input_embeddings().weight.grad is None) == (world_size == 1)
    return found


if __name__ == "__main__":
    gradients = step_gradients(Path(sys.argv[2]), *sys.argv[3:])
    if t.dist.get_rank() == 0:
        torch.save(gradients, sys.argv[1])
    t.dist.barrier()
    t.dist.destroy_process_group()
    t.hard_exit(0)
