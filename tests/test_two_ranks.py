"""Two gloo ranks under a real torchrun find what one does: figures, gradients, Muon's weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from samples import ROOT, tiny_run, torchrun
from two_ranks_worker import muon_steps, step_gradients

import train_h100_dual as t

CLIP_NOTHING = ("--max-grad-norm", "1e6")


def find_together(folder: Path, *more: str) -> dict:
    """What the worker found in one start; a row and four micro-steps on each rank."""
    options = ["--batch-size", "1", "--gradient-accumulation-steps", "4", *CLIP_NOTHING, *more]
    done = torchrun(ROOT / "tests" / "two_ranks_worker.py", [str(folder), *options])
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "together.pt", weights_only=True)


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> dict:
    return find_together(tmp_path_factory.mktemp("together"))


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    largest = max(value.abs().max().item() for value in theirs.values())
    assert largest > 0.01
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name] - value).abs().max().item() <= tolerance * largest, name


def test_two_ranks_and_micro_steps_give_the_gradients_of_one_large_batch(together, tmp_path):
    whole = step_gradients(tiny_run(tmp_path, "--batch-size", "8", *CLIP_NOTHING))
    micro_steps = ("--batch-size", "2", "--gradient-accumulation-steps", "4", *CLIP_NOTHING)
    assert_close(step_gradients(tiny_run(tmp_path, *micro_steps)), whole)
    assert_close(together["gradients"], whole)


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is None, reason="DDP's hook asks for a build of PyTorch with CUDA")
def test_gradients_that_cross_in_bf16_are_rounded_and_no_more(together, tmp_path):
    rounded = find_together(tmp_path, "--bf16-allreduce")["gradients"]
    assert_close(rounded, together["gradients"], 2**-7)
    assert any(not torch.equal(rounded[name], value) for name, value in together["gradients"].items())


def test_two_compiled_graphs_serve_ddp_no_sync_and_checkpointing(together):
    assert together["graphs"] == (2, 0)  # of a layer, and of the head with its loss; none is cut
    assert_close(together["compiled"], together["gradients"])


def test_an_evaluation_by_two_ranks_finds_what_one_does(together, tmp_path):
    assert together["figures"] == pytest.approx(t.evaluate(tiny_run(tmp_path)), rel=1e-6)


def test_an_outlier_on_one_rank_is_skipped_on_both_as_if_by_hand(together):
    first, second = together["outlier"]
    assert first == second, "each rank says the same of each step and ends with the same weights"
    assert first[:2] == ([0, 2, 0, 0, 0], True)


def test_muon_shared_among_two_ranks_gives_the_weights_of_one(together, monkeypatch):
    monkeypatch.setattr(t, "MUON_BATCH", t.MUON_BATCH)  # which the steps change
    alone = muon_steps()
    assert together["muon"].keys() == alone.keys()
    assert all(torch.allclose(together["muon"][name], alone[name], rtol=0, atol=1e-5) for name in alone)
