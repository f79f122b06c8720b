"""The optimizer, the learning rate, and the training step."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from samples import NeverStop, config, options, tiny_run
from torch.utils._python_dispatch import TorchDispatchMode

import train_h100_dual as t


def rates(cfg: t.TrainConfig, total: int = 200) -> list[float]:
    run = SimpleNamespace(cfg=cfg, total_steps=total, warmup_steps=math.ceil(cfg.warmup_ratio * total), peak_rate=1.0)
    return [t.learning_rate_at(run, step) for step in range(total)]


@pytest.mark.parametrize(
    ("schedule", "at_half", "at_end"), [("cosine", 0.5, 0), ("linear", 0.5, 0.005), ("constant", 1, 1), (None, 1, 0.03)]
)
def test_the_rate_warms_up_and_follows_its_schedule(tmp_path, schedule, at_half, at_end):
    cfg = config(tmp_path, *(() if schedule is None else ("--lr-schedule", schedule)))
    found = rates(cfg)
    assert found[0] == pytest.approx(0.1)
    assert found[4] == pytest.approx(0.5)
    assert found[9] == found[10] == pytest.approx(1.0)  # 10 steps of warm-up
    assert found[105] == pytest.approx(at_half, abs=0.01)
    assert 0 < found[-1] == pytest.approx(at_end, abs=0.01)
    assert all(a >= b for a, b in itertools.pairwise(found[10:]))
    assert rates(dataclasses.replace(cfg, warmup_ratio=0.0))[0] == 1.0
    if schedule is None:  # wsd
        assert set(found[10:162]) == {1.0}  # four fifths of 190
        assert found[181] == pytest.approx(0.5)
        longer = rates(dataclasses.replace(cfg, decay_ratio=0.5))
        assert set(longer[10:106]) == {1.0}
        assert longer[152] == pytest.approx(0.5, abs=0.01)


def batches(run: t.Run, count: int = 4) -> list[torch.Tensor]:
    positions = t.rank_positions(run.cfg, 0, 1, range(count))
    return list(t.make_loader(run.cfg, run.corpus, positions))


def weights(run: t.Run) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in run.model.parameters()]


def test_a_step_on_a_gpu_is_read_one_step_late_and_counts_to_its_end_there(tmp_path, monkeypatch):
    run, clock, told = tiny_run(tmp_path), [0.0], []

    class Event:
        ends = iter((10.0, 20.0))  # of two steps on the device, long after the host launched them

        def record(self) -> None:
            self.end = next(self.ends)

        def synchronize(self) -> None:
            clock[0] = self.end

    monkeypatch.setattr(t.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(t.torch.cuda, "Event", Event)
    log = t.StepLog(run, t.TrainState())
    log.handle = lambda *figures: told.append(figures)
    log.pinned = [torch.zeros(4) for _ in range(2)]
    assert not log.push(1, torch.tensor([7.0, 1.0, 0.0, 1.0]))
    assert log.push(2, torch.tensor([6.0, 2.0, 0.0, 0.0])), "the first step's ranks were asked to stop"
    assert told == [(1, 10.0, 7.0, 1.0)]
    assert not log.pop()
    assert told[1:] == [(2, 20.0, 6.0, 2.0)]


class NoHostRead(TorchDispatchMode):
    """Fails where the host would have to wait for a value of the device, whatever the device is."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        reads = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "aten.equal")
        by_mask = "aten.index" in str(func) and any(part is not None and part.dtype == torch.bool for part in args[1])
        assert not by_mask and not any(read in str(func) for read in reads), f"{func} reads a value of the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("more", [(), ("--gradient-accumulation-steps", "3"), ("--optimizer", "muon")])
def test_a_step_reads_no_value_of_the_device(tmp_path, more):
    run = tiny_run(tmp_path, *more)
    for read in (torch.Tensor.item, bool, torch.nonzero, lambda value: value[value > 0]):
        with pytest.raises(AssertionError, match="reads a value"), NoHostRead():
            read(torch.ones(1))
    rows = iter(batches(run))
    usual_steps(run, 1.0, 1.0)  # beside which the first of these is a spike
    with NoHostRead():
        stats = t.train_step(run, rows, 1e-3)
    assert stats.isfinite().all()
    assert stats[2] == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", ["--compile", "--no-compile"])
def test_a_step_on_a_gpu_never_waits_for_it(tmp_path, compiled):
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    words = options(tmp_path, "--device", "cuda", "--bf16", "--dummy-data", compiled)
    cfg = t.resolve_config(t.parse_args(words), "cuda")[0]
    for folder in (cfg.output_dir, cfg.logs_dir):
        folder.mkdir(parents=True)
    with t.attention_kernels(cfg.attention):
        run = t.build_run(cfg, t.prepare_corpus(cfg), NeverStop(), t.build_accelerator(cfg))
        rows = t.make_loader(cfg, run.corpus, t.rank_positions(cfg, 0, 1, range(8)))
        for step in range(8):
            if step == 4:  # compiled, and every buffer is there
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            stats = t.train_step(run, rows, 1e-3)
        torch.cuda.set_sync_debug_mode("default")
    assert stats.isfinite().all()


def test_two_graphs_serve_every_step_and_an_evaluation_and_samples_make_none(tmp_path):
    run, graphs = tiny_run(tmp_path, "--batch-size", "3"), []
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run.loss_module.compile_parts(backend=lambda graph, inputs: graphs.append(graph) or graph)
    rows = iter(batches(run, 8))
    for step in range(6):
        t.train_step(run, rows, 1e-3 / (step + 1))
        if step == 2:
            t.evaluate(run)  # documents of every length
            t.generate_samples(run, t.TrainState(step=3))
    assert len(graphs) == 2  # of a layer, and of the head with its loss
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


@pytest.mark.parametrize("optimizer", t.OPTIMIZERS)
def test_an_overflowing_step_is_skipped_under_a_scaler(tmp_path, optimizer):
    run = tiny_run(tmp_path, "--optimizer", optimizer)
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


def moments(run: t.Run) -> list[torch.Tensor]:
    states = (run.optimizer.state[weight] for weight in run.model.parameters())
    return [value.clone() for state in states for value in state.values()]


@pytest.mark.parametrize("optimizer", t.OPTIMIZERS)
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_gradient_that_is_not_finite_changes_nothing_but_is_counted(tmp_path, optimizer, value):
    run = tiny_run(tmp_path, "--optimizer", optimizer)
    batch = batches(run, 1)[0]
    t.train_step(run, iter([batch]), 1e-3)
    before, state = weights(run), moments(run)
    changed = [run.model.model.norm.weight, run.model.model.layers[1].mlp.up_proj.weight]
    hooks = [weight.register_hook(lambda gradient: gradient * float(value)) for weight in changed]
    assert t.train_step(run, iter([batch]), 1e-3)[2].item() == 1
    for hook in hooks:
        hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(run), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(state, moments(run), strict=True))
    assert t.train_step(run, iter([batch]), 1e-3)[2].item() == 0
    assert not torch.equal(before[0], weights(run)[0])


def test_five_such_steps_in_a_row_end_the_run(tmp_path):
    run, state = tiny_run(tmp_path), t.TrainState()
    log = t.StepLog(run, state)
    for step in range(1, 10):
        log.judge(step, 7.0, 1.0, float(step != 5))
    with pytest.raises(RuntimeError, match="다섯 스텝 연속으로 손실이나 기울기가 NaN/Inf"):
        log.judge(10, 7.0, 1.0, 1.0)
    assert state.skipped_steps == 9


def test_more_than_one_in_a_hundred_of_the_last_thousand_ends_the_run(tmp_path):
    run, state = tiny_run(tmp_path, "--logging-steps", "100000", "--max-steps", "100000"), t.TrainState()
    log = t.StepLog(run, state)
    for step in range(1, 4000):  # ten in every thousand may be
        log.judge(step, 7.0, 1.0, float(step % 100 == 0))
    assert state.skipped_steps == 39
    assert len(state.skipped_recently) == 10
    with pytest.raises(RuntimeError, match="최근 1,000스텝 가운데 11스텝"):
        for step in (4001, 4002):
            log.judge(step, 7.0, 1.0, 1.0)


def usual_steps(run: t.Run, loss: float, grad_norm: float) -> None:
    """Fill the window with steps about these figures, a hundredth up and down."""
    wave = torch.tensor([0.99, 1.01]).repeat(t.SPIKE_WINDOW // 2)
    run.spike_window.copy_(torch.stack([loss * wave, grad_norm * wave, 0 * wave]))


@pytest.mark.parametrize("optimizer", t.OPTIMIZERS)
def test_a_spike_is_skipped_and_changes_nothing_but_the_window(tmp_path, optimizer, caplog):
    run = tiny_run(tmp_path, "--optimizer", optimizer)
    batch, log = batches(run, 1)[0], t.StepLog(run, t.TrainState())
    loss, grad_norm, verdict, _ = t.train_step(run, iter([batch]), 1e-3).tolist()
    assert verdict == 0
    usual_steps(run, loss, grad_norm)
    before, state = weights(run), moments(run)
    hook = run.model.model.norm.weight.register_hook(lambda gradient: gradient * 1e4)
    for step in range(3):
        stats = t.train_step(run, iter([batch]), 1e-3).tolist()
        assert stats[2] == 2
        log.judge(step + 2, *stats[:3])
        assert all(torch.equal(a, b) for a, b in zip(before, weights(run), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(state, moments(run), strict=True))
    assert "스텝 2:" in caplog.text
    assert "2–3" in caplog.text  # its rows, two a step
    assert log.state.skipped_steps == 3
    assert not log.state.skipped_recently, "it never ends a run"
    assert t.train_step(run, iter([batch]), 1e-3)[2].item() == 0, "after three in a row it isn't chance any more"
    assert not torch.equal(before[0], weights(run)[0])
    hook.remove()


def test_a_spike_is_only_told_where_the_person_wants_it_taken(tmp_path, caplog):
    run = tiny_run(tmp_path, "--no-skip-spikes")
    usual_steps(run, 1.0, 100.0)  # this loss is a spike beside it
    before, log = weights(run), t.StepLog(run, t.TrainState())
    for step in range(5):
        stats = t.train_step(run, iter(batches(run, 1)), 1e-3).tolist()
        log.judge(step + 1, *stats[:3])
    assert "스텝 1: 손실" in caplog.text
    assert "건너뜁니다" not in caplog.text
    assert log.state.skipped_steps == 0
    assert not torch.equal(before[0], weights(run)[0])


def test_a_lasting_jump_of_the_loss_trains_on_and_what_is_not_finite_never_enters_the_window(tmp_path):
    run, generator, skipped = tiny_run(tmp_path), torch.Generator().manual_seed(0), []
    for step in range(400):
        loss = torch.randn((), generator=generator) * 0.02 + (3 if step < 200 else 6)
        if step in (20, 150):
            loss = torch.full((), torch.nan)
        skipped += [step] * t.find_spike(run, loss, 1 + 0.1 * torch.rand((), generator=generator)).item()
        assert (step < 128) == run.spike_window.isnan().any().item()
    assert skipped[:3] == [200, 201, 202]
    assert 203 not in skipped
    assert len(skipped) <= 6


def test_a_loss_that_is_not_finite_poisons_its_gradients_and_any_other_is_untouched():
    for value in (3.25, float("inf"), float("nan")):
        weight = torch.tensor([2.0, 3.0], requires_grad=True)
        loss = t.propagate_nonfinite(weight.sum() * 0.7 + (value - 3.25))
        loss.backward()
        assert torch.isfinite(loss) == torch.isfinite(weight.grad).all()
        if value == 3.25:
            assert torch.equal(loss, weight.sum() * 0.7)
            assert torch.equal(weight.grad, torch.tensor([0.7, 0.7]))


def test_the_gradient_norm_is_clipped(tmp_path):
    run = tiny_run(tmp_path, "--max-grad-norm", "0.01")
    seen = []
    step = run.optimizer.step
    run.optimizer.step = lambda: (
        seen.append(torch.nn.utils.get_total_norm([weight.grad for weight in run.model.parameters()]).item()),
        step(),
    )
    reported = t.train_step(run, iter(batches(run, 1)), 1e-3)[1].item()
    assert reported > 1
    assert seen[0] == pytest.approx(0.01, rel=1e-3)


def reference_optimizers(model: torch.nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
    """What PyTorch offers for the same: its Muon for the projections of the layers, its AdamW for the rest."""
    hidden = [weight for name, weight in model.named_parameters() if name.endswith("_proj.weight")]
    embedding, norms = [model.get_input_embeddings().weight], [w for w in model.parameters() if w.dim() == 1]
    groups = [{"params": embedding, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(hidden, lr=learning_rate, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95)),
    ]


def test_muon_takes_the_steps_of_pytorchs_muon_and_adamw(tmp_path, monkeypatch):
    monkeypatch.setattr(t, "MUON_BATCH", 5 * 256 * 256)  # several batches, not all of them full
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)  # PyTorch's iterates as precisely then
    run = tiny_run(tmp_path, "--optimizer", "muon")
    reference = copy.deepcopy(run.model)
    start, optimizers = weights(run), reference_optimizers(reference, 5e-3)
    generator = torch.Generator().manual_seed(3)
    for group in run.optimizer.param_groups:
        group["lr"] = 5e-3
    for _ in range(5):
        for ours, theirs in zip(run.model.parameters(), reference.parameters(), strict=True):
            ours.grad = torch.randn(ours.shape, generator=generator)
            theirs.grad = ours.grad.clone()
        for optimizer in (run.optimizer, *optimizers):
            optimizer.step()
    for before, ours, theirs in zip(start, run.model.parameters(), reference.parameters(), strict=True):
        moved = (theirs - before).abs().mean().item()
        assert moved > 1e-3
        assert (ours - theirs).abs().mean().item() < 1e-4 * moved


def test_muon_leaves_embeddings_head_and_norms_to_adamw_and_only_matrices_decay(tmp_path):
    model = t.build_model(config(tmp_path), tiny_run(tmp_path).corpus.tokenizer)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    names = {id(weight): name for name, weight in model.named_parameters()}
    hidden = {name for name in names.values() if name.endswith("_proj.weight")}
    outer = {"model.embed_tokens.weight", "lm_head.weight"}
    norms = set(names.values()) - hidden - outer
    for optimizer, expected in (
        ("adamw", [(0.3, hidden | outer), (0.0, norms)]),
        ("muon", [(0.3, hidden), (0.3, outer), (0.0, norms)]),
    ):
        cfg = config(tmp_path, "--optimizer", optimizer, "--weight-decay", "0.3")
        groups = t.build_optimizer(model, cfg).param_groups
        found = [(group["weight_decay"], {names[id(weight)] for weight in group["params"]}) for group in groups]
        assert found == expected
    shape = t.PRESETS["tiny"]
    assert (
        sum(weight.numel() for weight in model.parameters() if names[id(weight)] in hidden) == shape.matrix_parameters()
    )


def test_what_the_optimizer_keeps_has_the_size_that_is_reckoned_with(tmp_path):
    sizes = {}
    for name in t.OPTIMIZERS:
        run = tiny_run(tmp_path, "--optimizer", name)
        t.train_step(run, iter(batches(run, 1)), 1e-3)
        sizes[name] = sum(value.numel() * 4 for value in moments(run) if value.dim())
        assert sizes[name] == t.estimate_memory(run.cfg, t.PRESETS["tiny"], 1)["옵티마이저"]
    assert sizes["muon"] < 0.6 * sizes["adamw"]


@pytest.mark.parametrize("optimizer", t.OPTIMIZERS)
def test_a_saved_and_loaded_optimizer_takes_the_same_next_step(tmp_path, optimizer):
    typed = ("--optimizer", optimizer)
    run = tiny_run(tmp_path, *typed)
    rows = batches(run, 5)
    t.train_step(run, iter(rows[:1]), 1e-3)
    usual_steps(run, 1.0, 1.0)  # beside which all the others are spikes
    assert [t.train_step(run, iter([batch]), 1e-3)[2].item() for batch in rows[1:3]] == [2, 2]
    t.save_checkpoint(run, t.TrainState(step=3, tokens_seen=3 * run.step_tokens))
    t.wait_for_saver(run)
    other = tiny_run(tmp_path, *typed)
    t.load_checkpoint(other, run.cfg.output_dir / "checkpoint-3")
    for going_on in (run, other):  # the third in a row is skipped too, the fourth is taken
        assert [t.train_step(going_on, iter([batch]), 1e-3)[2].item() for batch in rows[3:]] == [2, 0]
    assert all(torch.equal(a, b) for a, b in zip(weights(run), weights(other), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(moments(run), moments(other), strict=True))
    assert torch.equal(run.spike_window, other.spike_window)
