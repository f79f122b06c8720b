"""The optimizer, the learning rate, and the training step."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from samples import ROOT, config, tiny_run, torchrun

import train_h100_dual as t


def rates(cfg: t.TrainConfig, total: int = 200) -> list[float]:
    return [t.learning_rate_at(step, total, cfg) / cfg.learning_rate for step in range(total)]


def test_the_rate_warms_up_and_falls_along_a_cosine_to_zero(tmp_path):
    found = rates(config(tmp_path))
    assert found[0] == pytest.approx(0.1)
    assert found[9] == found[10] == pytest.approx(1.0)
    assert found[105] == pytest.approx(0.5, abs=0.01)
    assert 0 < found[-1] < 1e-3
    assert all(a >= b for a, b in itertools.pairwise(found[10:]))


@pytest.mark.parametrize(
    ("schedule", "at_half", "at_end"), [("linear", 0.5, 0.005), ("constant", 1, 1), ("wsd", 1, 0.03)]
)
def test_other_schedules(tmp_path, schedule, at_half, at_end):
    found = rates(dataclasses.replace(config(tmp_path), lr_schedule=schedule))
    assert found[105] == pytest.approx(at_half, abs=0.01)
    assert found[-1] == pytest.approx(at_end, abs=0.01)


def test_no_warm_up_starts_at_the_full_rate(tmp_path):
    assert rates(dataclasses.replace(config(tmp_path), warmup_ratio=0.0))[0] == 1.0


def test_only_matrices_decay():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    groups = t.build_optimizer(model, dataclasses.replace(t.TrainConfig(), weight_decay=0.3)).param_groups
    assert [(group["weight_decay"], [weight.dim() for weight in group["params"]]) for group in groups] == [
        (0.3, [2]),
        (0.0, [1, 1, 1]),
    ]


def batches(run: t.Run, count: int = 4) -> list[torch.Tensor]:
    positions = t.RankPositions(run.cfg, 0, 1, range(count))
    return list(t.make_loader(run.cfg, run.corpus, positions))


def weights(run: t.Run) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in run.decoder.parameters()]


def test_a_step_lowers_the_loss_of_its_own_batch(tmp_path):
    run = tiny_run(tmp_path)
    batch = batches(run, 1)[0]
    losses = [t.train_step(run, iter([batch]), 1e-3)[0].item() for _ in range(8)]
    assert losses[-1] < losses[0] - 0.5


def test_an_overflowing_step_is_skipped_under_a_scaler(tmp_path):
    run = tiny_run(tmp_path)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
    run.accelerator.scaler, run.optimizer = scaler, AcceleratedOptimizer(run.optimizer.optimizer, scaler=scaler)
    before, batch = weights(run), batches(run, 1)[0]
    skipped = t.train_step(run, iter([batch]), 1e-3)[2].item()
    assert skipped == 1
    assert all(torch.equal(a, b) for a, b in zip(before, weights(run), strict=True))
    assert scaler.get_scale() == 2.0**126
    scaler.update(1024.0)
    stats = t.train_step(run, iter([batch]), 1e-3)
    assert stats[2].item() == 0
    assert not torch.equal(before[0], weights(run)[0])


def test_a_gradient_that_is_not_finite_changes_nothing_but_is_counted(tmp_path):
    run = tiny_run(tmp_path)
    batch = batches(run, 1)[0]
    t.train_step(run, iter([batch]), 1e-3)
    before, moments = weights(run), [dict(state) for state in run.optimizer.optimizer.state.values()]
    steps = [state["step"].item() for state in moments]
    hook = run.decoder.model.norm.weight.register_hook(lambda gradient: gradient * float("nan"))
    assert t.train_step(run, iter([batch]), 1e-3)[2].item() == 1
    hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(run), strict=True))
    assert [state["step"].item() for state in run.optimizer.optimizer.state.values()] == steps
    assert t.train_step(run, iter([batch]), 1e-3)[2].item() == 0
    assert not torch.equal(before[0], weights(run)[0])


def test_five_such_steps_in_a_row_end_the_run(tmp_path):
    run, state = tiny_run(tmp_path), t.TrainState()
    log = t.StepLog(run, state)
    bad = [7.0, float("nan"), 1.0, 0.0]
    for step in range(1, 5):
        assert t.note_step(run, state, log, (step, float(step), bad)) is False
    assert t.note_step(run, state, log, (5, 5.0, [7.0, 1.0, 0.0, 0.0])) is False
    for step in range(6, 10):
        t.note_step(run, state, log, (step, float(step), bad))
    with pytest.raises(RuntimeError, match="유한하지"):
        t.note_step(run, state, log, (10, 10.0, bad))
    assert state.skipped_steps == 9


def test_the_gradient_norm_is_clipped(tmp_path):
    run = tiny_run(tmp_path, "--max-grad-norm", "0.01")
    seen = []
    step = run.optimizer.step
    run.optimizer.step = lambda: (
        seen.append(torch.nn.utils.get_total_norm([weight.grad for weight in run.decoder.parameters()]).item()),
        step(),
    )
    reported = t.train_step(run, iter(batches(run, 1)), 1e-3)[1].item()
    assert reported > 1
    assert seen[0] == pytest.approx(0.01, rel=1e-3)


def gradients(folder, name: str, processes: int, *more: str) -> dict[str, torch.Tensor]:
    """Gradients of one training step of a real run under torchrun, as rank 0 has them before the update."""
    path = folder / f"{name}.pt"
    done = torchrun(ROOT / "tests" / "gradients_worker.py", [str(path), str(folder), *more], processes)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(path, weights_only=True)


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    largest = max(value.abs().max().item() for value in theirs.values())
    assert largest > 0.01
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name] - value).abs().max().item() <= 1e-5 * largest, name


def test_two_ranks_and_micro_steps_give_the_gradients_of_one_large_batch(tmp_path):
    whole = gradients(tmp_path, "whole", 1, "--batch-size", "8")
    assert_close(gradients(tmp_path, "ranks", 2, "--batch-size", "4"), whole)
    assert_close(gradients(tmp_path, "both", 2, "--batch-size", "1", "--gradient-accumulation-steps", "4"), whole)
    assert_close(gradients(tmp_path, "micro", 1, "--batch-size", "2", "--gradient-accumulation-steps", "4"), whole)
