"""Going on where a run ended: two gloo ranks under a real torchrun, fp32, bit for bit."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from samples import ROOT, options, read_metrics, torchrun

SCRIPT = ROOT / "train_h100_dual.py"
TWENTY = ["--dummy-data", "--max-steps", "20", "--save-steps", "10", "--eval-steps", "10"]


def train(folder: Path, *more: str) -> str:
    """Train two ranks to the end; returns what the console showed."""
    done = torchrun(SCRIPT, options(folder, *TWENTY, *more))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


def kill_after(folder: Path, checkpoint: str, *more: str) -> None:
    """Start the same run and kill every process of it as soon as a checkpoint is there."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(folder / "killed.log", "wb") as log:
        agent = subprocess.Popen([*command, *options(folder, *TWENTY, *more)], env=environment, stdout=log, stderr=log)
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children")
    deadline = time.monotonic() + 120
    while not (folder / "outputs" / checkpoint).exists():
        assert agent.poll() is None, (folder / "killed.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    for process in [*children.read_text().split(), str(agent.pid)]:
        os.kill(int(process), signal.SIGKILL)
    agent.wait()


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return torch.load(folder / "outputs" / f"checkpoint-{step}" / "pytorch_model.bin", weights_only=True)


def timeless(folder: Path) -> list[dict]:
    """The metrics without what a clock or the machine's memory decides."""
    changing = ("tokens_per_second", "memory_gb", "seconds")
    return [{name: value for name, value in line.items() if name not in changing} for line in read_metrics(folder)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    train(folder)
    return folder


def test_a_killed_run_goes_on_bit_for_bit(undisturbed, tmp_path):
    kill_after(tmp_path, "checkpoint-10")
    assert not (tmp_path / "outputs" / "checkpoint-20").exists()
    shown = train(tmp_path, "--resume")
    assert "스텝 10부터" in shown
    assert timeless(tmp_path) == timeless(undisturbed)
    ours, theirs = weights(tmp_path, 20), weights(undisturbed, 20)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_finished_run_goes_on_to_a_larger_number_of_steps_and_says_how(undisturbed, tmp_path):
    shutil.copytree(undisturbed / "outputs", tmp_path / "outputs", symlinks=True)
    shutil.copytree(undisturbed / "cache", tmp_path / "cache")
    shown = train(tmp_path, "--resume", "--max-steps", "24")
    assert "20 → 24" in shown
    assert "학습률을 새 길이에 맞춰" in shown
    lines = [line for line in read_metrics(tmp_path) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 25))
    assert lines[20]["learning_rate"] > 0
    assert (tmp_path / "outputs" / "checkpoint-24").exists()


def test_a_finished_run_with_nothing_left_to_do_says_so_and_changes_nothing(undisturbed, tmp_path):
    shutil.copytree(undisturbed / "outputs", tmp_path / "outputs", symlinks=True)
    shutil.copytree(undisturbed / "cache", tmp_path / "cache")
    before = timeless(tmp_path)
    assert "이미 끝난 학습" in train(tmp_path, "--resume", str(tmp_path / "outputs/checkpoint-20/pytorch_model.bin"))
    assert timeless(tmp_path) == before


def test_going_back_to_an_older_checkpoint_sets_the_later_one_aside(undisturbed, tmp_path):
    shutil.copytree(undisturbed / "outputs", tmp_path / "outputs", symlinks=True)
    shutil.copytree(undisturbed / "cache", tmp_path / "cache")
    later = weights(tmp_path, 20)
    shown = train(tmp_path, "--resume", str(tmp_path / "outputs/checkpoint-10"), "--weight-decay", "0.3")
    assert "weight_decay 0.1 → 0.3" in shown
    (aside,) = (tmp_path / "outputs").glob("checkpoint-20.before-*")
    kept = torch.load(aside / "pytorch_model.bin", weights_only=True)
    assert all(torch.equal(kept[name], later[name]) for name in later)
    state = torch.load(tmp_path / "outputs/checkpoint-20/training_state/state.pt", weights_only=True)
    assert state["optimizer"]["param_groups"][0]["weight_decay"] == 0.3


def test_a_checkpoint_of_a_test_is_not_resumed_from(undisturbed, tmp_path):
    shutil.copytree(undisturbed / "outputs", tmp_path / "outputs", symlinks=True)
    path = tmp_path / "outputs/checkpoint-20/training_info.json"
    path.write_text(path.read_text().replace('"mode": "train"', '"mode": "test"'))
    done = torchrun(SCRIPT, options(tmp_path, *TWENTY, "--resume"))
    assert done.returncode != 0
    assert "테스트 모드의 체크포인트" in done.stdout
