"""Going on where a run ended, fp32, bit for bit: two gloo ranks under a real torchrun, and one process."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from faults import assert_same_run, timeless, weights
from samples import ROOT, SMALL_MODEL, config, forked_run, options, read_metrics, tiny_run, torchrun
from test_hosts import BOOKS, DAMAGE, STATES, damage

import train_h100_dual as t

SCRIPT = ROOT / "train_h100_dual.py"
TWENTY = ["--max-steps", "20", "--save-steps", "10", "--eval-steps", "10", "--report-to", "none", "--dummy-data"]
TWENTY += SMALL_MODEL


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


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    train(folder)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    forked_run(folder, *TWENTY)
    return folder


def test_a_killed_run_goes_on_bit_for_bit_from_its_newest_whole_checkpoint(undisturbed, tmp_path):
    kill_after(tmp_path, "checkpoint-10")
    outputs = tmp_path / "outputs"
    assert not (outputs / "checkpoint-20").exists()
    (outputs / ".checkpoint-16.tmp").mkdir()
    (outputs / ".checkpoint-16.tmp" / "pytorch_model.bin").write_bytes(b"half of it")
    shutil.copytree(outputs / "checkpoint-10", outputs / "checkpoint-15")
    path = outputs / "checkpoint-15/training_state/state.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # one bit
    path.write_bytes(content)
    shown = train(tmp_path, "--resume")
    assert "쓸 수 없는 체크포인트를 건너뜁니다" in shown
    assert "checkpoint-15 (training_state/state.pt 파일의 내용이 저장한 것과 다릅니다)" in shown
    assert "스텝 10부터" in shown
    assert not list(outputs.glob(".*.tmp"))
    (aside,) = outputs.glob("checkpoint-15.before-*")
    assert (aside / "training_state/state.pt").read_bytes() == content
    assert_same_run(tmp_path, undisturbed, 20)


@pytest.mark.slow
def test_the_other_optimizer_goes_on_bit_for_bit_too_and_is_not_exchanged(undisturbed, tmp_path):
    default = t.TrainConfig().optimizer
    (other,) = set(t.OPTIMIZERS) - {default}
    shutil.copytree(undisturbed / "cache", tmp_path / "cache")
    train(tmp_path, "--optimizer", other)
    metrics, trained = timeless(tmp_path), weights(tmp_path, 20)
    assert metrics != timeless(undisturbed)
    shutil.rmtree(tmp_path / "outputs" / "checkpoint-20")
    assert "스텝 10부터" in train(tmp_path, "--optimizer", other, "--resume")
    assert timeless(tmp_path) == metrics
    assert all(torch.equal(value, trained[name]) for name, value in weights(tmp_path, 20).items())
    done = torchrun(SCRIPT, options(tmp_path, *TWENTY, "--optimizer", default, "--resume"))
    assert done.returncode != 0
    assert f"쓸 값: --optimizer {other}" in done.stderr


def test_a_checkpoint_whose_state_was_removed_for_newer_ones_is_no_damaged_one(alone, tmp_path):
    shutil.copytree(alone, tmp_path, symlinks=True, dirs_exist_ok=True)
    checkpoint = tmp_path / "outputs" / "checkpoint-10"
    shutil.rmtree(checkpoint / "training_state")
    with pytest.raises(t.EnvironmentProblem, match="최근 2개에만") as problem:
        t.find_resume_point(config(tmp_path, "--train", "--resume", str(checkpoint)), 1)
    assert "손상" not in str(problem.value)


def test_without_its_cache_a_run_goes_on_with_the_tokenizer_of_its_checkpoint(alone, tmp_path):
    shutil.copytree(alone, tmp_path, symlinks=True, dirs_exist_ok=True)
    checkpoint = tmp_path / "outputs" / "checkpoint-20"
    resumed = options(tmp_path, *TWENTY, "--train", "--resume", "--cache-dir", str(tmp_path / "new"))
    cfg = t.parse_args([*resumed, "--tokenizer", str(checkpoint)])
    with pytest.raises(t.EnvironmentProblem, match=f"--tokenizer {checkpoint}"):
        t.find_resume_point(t.resolve_config(cfg, "cpu")[0], 1, "another")
    assert "20 → 22" in forked_run(tmp_path, *resumed, "--tokenizer", str(checkpoint), "--max-steps", "22")


def test_a_finished_run_goes_on_to_a_larger_number_of_steps_and_says_how(alone, tmp_path):
    shutil.copytree(alone, tmp_path, symlinks=True, dirs_exist_ok=True)
    shown = forked_run(tmp_path, *TWENTY, "--resume", "--max-steps", "24")
    assert "20 → 24" in shown
    rates = re.search(r"학습률: 마지막 스텝 (\S+) → 다음 스텝 (\S+)", shown)
    assert 0 < float(rates[1]) < float(rates[2]) <= 1e-3
    lines = [line for line in read_metrics(tmp_path) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 25))
    assert lines[20]["learning_rate"] > 0
    assert (tmp_path / "outputs" / "checkpoint-24").exists()


@pytest.fixture(scope="module")
def longer(alone, tmp_path_factory):
    """What it comes to with two steps more, by the step of the checkpoint from which it goes on."""
    folders = {}
    for step in (10, 20):
        folders[step] = tmp_path_factory.mktemp("longer")
        shutil.copytree(alone, folders[step], dirs_exist_ok=True)
        checkpoint = folders[step] / "outputs" / f"checkpoint-{step}"
        forked_run(folders[step], *TWENTY, "--max-steps", "22", "--resume", str(checkpoint))
    return folders


@pytest.mark.slow  # test_hosts.py looks at the same through the functions that decide
@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", [*BOOKS, *STATES])
def test_whatever_is_torn_the_run_goes_on_from_the_newest_whole_checkpoint(alone, longer, tmp_path, name, kind):
    shutil.copytree(alone, tmp_path, dirs_exist_ok=True)
    outputs, step = tmp_path / "outputs", 20 if name in BOOKS else 10
    damage(outputs / (name if name in BOOKS else f"checkpoint-20/{name}"), kind)
    shown = forked_run(tmp_path, *TWENTY, "--max-steps", "22", "--resume")
    assert f"(스텝 {step}부터)" in shown, shown
    assert "예상하지 못한" not in shown and "Traceback" not in shown, shown
    assert "쓸 수 없는 체크포인트를 건너뜁니다" in shown or name in BOOKS, shown
    mine, other = (weights(folder, 22) for folder in (tmp_path, longer[step]))
    assert all(torch.equal(mine[weight], other[weight]) for weight in other)
    assert read_metrics(tmp_path)[-1]["step"] == 22
    assert t.read_json(outputs / "run_info.json")["state"] == "finished"


def test_a_finished_run_with_nothing_left_to_do_says_so_and_changes_nothing(alone, tmp_path):
    shutil.copytree(alone, tmp_path, symlinks=True, dirs_exist_ok=True)
    before = timeless(tmp_path)
    typed = str(tmp_path / "outputs/checkpoint-20/pytorch_model.bin")
    assert "이미 끝난 학습" in forked_run(tmp_path, *TWENTY, "--resume", typed)
    assert timeless(tmp_path) == before


def test_going_back_to_an_older_checkpoint_sets_the_later_one_aside(alone, tmp_path):
    shutil.copytree(alone, tmp_path, symlinks=True, dirs_exist_ok=True)
    later = weights(tmp_path, 20)
    typed = ("--resume", str(tmp_path / "outputs/checkpoint-10"), "--weight-decay", "0.3")
    assert "weight_decay 0.1 → 0.3" in forked_run(tmp_path, *TWENTY, *typed)
    (aside,) = (tmp_path / "outputs").glob("checkpoint-20.before-*")
    kept = torch.load(aside / "pytorch_model.bin", weights_only=True)
    assert all(torch.equal(kept[name], later[name]) for name in later)


def test_a_run_killed_before_its_first_checkpoint_starts_over_and_says_so(alone, tmp_path):
    shutil.copytree(alone / "cache", tmp_path / "cache")
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    for name in ("run_info.json", "metrics.jsonl"):
        shutil.copy(alone / "outputs" / name, outputs)
    assert "아직 체크포인트가 없어 처음부터 시작합니다" in forked_run(tmp_path, *TWENTY, "--resume")
    assert_same_run(tmp_path, alone, 20)


@pytest.mark.parametrize("before", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_another_number_of_ranks_reads_the_same_global_batches(undisturbed, tmp_path, before):
    """From two ranks to one, and from one, with a larger accumulation, to two."""
    after, accumulation = (1, 1) if before == 2 else (2, 2)
    if before == 2:
        shutil.copytree(undisturbed, tmp_path, symlinks=True, dirs_exist_ok=True)
    else:
        forked_run(tmp_path, *TWENTY, "--gradient-accumulation-steps", str(accumulation))
    first = read_metrics(tmp_path)
    shutil.rmtree(tmp_path / "outputs" / "checkpoint-20")
    typed = [*TWENTY, "--gradient-accumulation-steps", str(accumulation), "--resume"]
    shown = forked_run(tmp_path, *typed) if after == 1 else train(tmp_path, *typed)
    assert f"기울기 누적을 {accumulation} → {accumulation * before // after} 로 맞춥니다" in shown
    second = read_metrics(tmp_path)
    assert [line["step"] for line in first] == [line["step"] for line in second]
    names = ("loss", "grad_norm", "val_loss", "val_loss_ko", "val_bits_per_byte")
    for ours, theirs in zip(second, first, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() & set(names):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)
    assert second[10:] != first[10:]  # a sum in another order: it was not the same run


def test_what_dropout_draws_comes_back_too(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2}')
    trained = []
    for folder in ("whole", "resumed"):
        run, state = tiny_run(tmp_path / folder, "--model-config", str(tmp_path), "--save-steps", "2"), t.TrainState()
        if folder == "resumed":
            state = t.load_checkpoint(run, tmp_path / "whole" / "outputs" / "checkpoint-2")
            assert run.model.config.resid_pdrop == 0.1
        t.train(run, state)
        t.report_save(run, is_last=True)
        trained.append(run.model.state_dict())
    assert state.step == 4
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())


def test_a_run_ends_with_a_checkpoint_at_its_number_of_tokens(tmp_path):
    run, state = tiny_run(tmp_path, "--max-tokens", "200"), t.TrainState()  # 64 a step
    assert t.train(run, state) == "finished"
    t.report_save(run, is_last=True)
    (checkpoint,) = t.list_checkpoints(run.cfg.output_dir)
    info = t.read_json(checkpoint / "training_info.json")
    assert (info["step"], info["total_steps"], info["tokens_seen"]) == (3, 3, 192)


def began_before(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Have whoever began the run have done so that long ago."""
    began = time.time() - seconds
    monkeypatch.setattr(t.psutil, "Process", lambda pid: SimpleNamespace(create_time=lambda: began))


def test_the_time_kept_for_the_end_is_taken_from_what_evaluations_and_saves_took(tmp_path, monkeypatch):
    run = tiny_run(tmp_path, "--max-hours", "1")
    run.save_seconds, run.evaluation_seconds = 20.0, 8.0
    for left, stops in ((3 * 3 + 8 + 1.5 * 20 + 5 + 2, False), (3 * 3 + 8 + 1.5 * 20 + 5 - 2, True)):
        began_before(monkeypatch, 3600 - left)
        t.keep_to_hours(run, step_seconds=3.0)
        assert run.stop.requested == stops
    info = t.training_info(run, t.TrainState())
    again = t.build_run(run.cfg, run.corpus, run.stop, run.accelerator, t.ResumePoint(1, None, info))
    assert again.save_seconds == 20.0, "also of the first save after a resume"
    new = t.build_run(run.cfg, run.corpus, run.stop, run.accelerator)
    assert new.save_seconds == 12 * new.model.num_parameters() / 200e6, "or without an initial model"


def test_a_passed_deadline_ends_a_run_with_a_checkpoint(tmp_path, monkeypatch):
    run, state = tiny_run(tmp_path, "--max-steps", "100000", "--max-hours", "1"), t.TrainState()
    began_before(monkeypatch, 3600 - 7.0)
    assert t.train(run, state) == "stopped"
    t.report_save(run, is_last=True)
    assert [path.name for path in t.list_checkpoints(run.cfg.output_dir)] == [f"checkpoint-{state.step}"]
    assert 0 < state.step < 100000
