"""Run under torchrun by test_optimizer.py: steps of Muon on the same gradients on every rank, written by rank 0.

Usage: torchrun ... optimizer_worker.py RESULT
"""

from __future__ import annotations

import os
import sys

import torch

import train_h100_dual as t

SHAPES = [(16, 48)] * 3 + [(48, 16)] * 2 + [(32, 32)] * 3 + [(40, 8)]


def muon_steps(steps: int = 4) -> dict[str, torch.Tensor]:
    """Weights and state after a few steps, one of which isn't finite."""
    generator = torch.Generator().manual_seed(0)
    hidden = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    rest = [torch.nn.Parameter(torch.randn(64, 8, generator=generator))]
    groups = [{"params": hidden, "weight_decay": 0.1}, {"params": rest}]
    optimizer = t.Muon(groups, lr=0.02, weight_decay=0.0, fused=True)
    for step in range(steps):
        for weight in hidden + rest:
            weight.grad = torch.randn(weight.shape, generator=generator)
        bad = step == 2
        hidden[1].grad[0, 0] = float("nan") if bad else 1.0
        optimizer.found_inf = torch.tensor(float(bad))
        optimizer.step()
    state = [value for values in optimizer.state.values() for value in values.values()]
    return {str(index): tensor.detach() for index, tensor in enumerate([*hidden, *rest, *state])}


def main() -> None:
    t.MUON_BATCH = 2 * 16 * 48  # so that a shape has several batches and the last one is not full
    torch.set_num_threads(1)
    t.dist.init_process_group("gloo")
    found = muon_steps()
    if os.environ["RANK"] == "0":
        torch.save(found, sys.argv[1])
    t.dist.barrier()
    t.dist.destroy_process_group()


if __name__ == "__main__":
    main()
    t.hard_exit(0)  # as the script does: gloo's threads may outlive the interpreter
