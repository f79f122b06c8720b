"""Run under torchrun by test_two_ranks.py: what two ranks find together, written by rank 0.

Usage: torchrun ... two_ranks_worker.py FOLDER [OPTION...]
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from accelerate.utils import gather_object
from samples import tiny_run
from torch._dynamo.utils import counters

import train_h100_dual as t

SHAPES = [(16, 48)] * 3 + [(48, 16)] * 2 + [(32, 32)] * 3 + [(40, 8)]


def step_gradients(run: t.Run) -> dict[str, torch.Tensor]:
    """The gradients of one real step as the optimizer gets them."""
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


def muon_steps(steps: int = 4) -> dict[str, torch.Tensor]:
    """Weights and state after a few steps of Muon on the same gradients on every rank; one of them isn't finite."""
    t.MUON_BATCH = 2 * 16 * 48  # so that a shape has several batches and the last one is not full
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


def steps_beside_an_outlier(run: t.Run) -> list[tuple[list[float], bool, float]]:
    """Three steps, the second an outlier on rank 1, then the first and third alone: by rank, what was said of each
    step, whether both ends are the same bit for bit, and the weights' sum.
    """
    del run.optimizer.step  # which kept the gradients
    rank, ranks, optimizer = run.accelerator.process_index, run.accelerator.num_processes, run.optimizer.optimizer
    micro_steps = run.gradient_accumulation_steps
    rows = list(t.make_loader(run.cfg, run.corpus, t.rank_positions(run.cfg, rank, ranks, range(3))))
    start, fresh, real = copy.deepcopy(run.model.state_dict()), optimizer.state_dict(), t.propagate_nonfinite
    verdicts, ends = [], []
    for steps in ((0, 1, 2), (0, 2)):
        run.model.load_state_dict(start)
        optimizer.load_state_dict(copy.deepcopy(fresh))
        run.spike_window.fill_(torch.nan)
        for step in steps:
            t.propagate_nonfinite = (lambda loss: real(loss) * 10) if (step, rank) == (1, 1) else real
            stats = t.train_step(run, iter(rows[step * micro_steps : (step + 1) * micro_steps]), 1e-3)
            verdicts.append(stats[2].item())
            if step == 0:  # steps about these figures, a tenth up and down
                wave = torch.tensor([0.9, 1.1]).repeat(t.SPIKE_WINDOW // 2)
                run.spike_window.copy_(torch.stack([stats[0] * wave, stats[1] * wave, 0 * wave]))
        ends.append([weight.detach().clone() for weight in run.model.parameters()])
    same = all(torch.equal(one, other) for one, other in zip(*ends, strict=True))
    return gather_object([(verdicts, same, sum(weight.double().sum().item() for weight in ends[0]))])


if __name__ == "__main__":
    words = [Path(sys.argv[1]), *sys.argv[2:]]
    run = tiny_run(*words)
    together = {"figures": t.evaluate(run), "gradients": step_gradients(run), "muon": muon_steps()}
    together["outlier"] = steps_beside_an_outlier(run)
    compile_parts = t.LMWithLoss.compile_parts
    t.LMWithLoss.compile_parts = lambda module: compile_parts(module, backend="aot_eager")  # and no minutes of kernels
    together["compiled"] = step_gradients(tiny_run(*words, "--compile", "--gradient-checkpointing"))
    together["graphs"] = counters["stats"]["unique_graphs"], len(counters["graph_break"])
    if run.is_main:
        torch.save(together, Path(sys.argv[1]) / "together.pt")
    run.accelerator.end_training()
    t.hard_exit(0)  # as the script does: gloo's threads may outlive the interpreter
