"""Steps that are not finite, slow saves, full disks, and kill -9 at any time; real processes on the CPU."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import LAUNCHER, Place, cleaned
from faults import SMALL, assert_checkpoints_open, assert_same_run, slow_save

import train_h100_dual as t


def spoiled(steps: str, how: str) -> str:
    """A fault: rank 1's loss is spoiled at some steps (a condition on their number ``n``); all log their state."""
    return f"""
real_poison, real_step = propagate_nonfinite, train_step
done = [0]
def propagate_nonfinite(loss):
    n = done[0] + 1
    return real_poison(loss {how} if {steps} and rank_and_world()[0] == 1 else loss)
def train_step(run, batches, rate):
    stats = real_step(run, batches, rate)
    done[0] += 1
    moments = [value for state in run.optimizer.state.values() for value in state.values()]
    content = b"".join(value.detach().numpy().tobytes() for value in [*run.model.parameters(), *moments])
    with open(run.cfg.logs_dir / f"digests-{{rank_and_world()[0]}}", "a") as stream:
        stream.write(hashlib.sha256(content).hexdigest() + "\\n")
    return stats
"""


@pytest.mark.parametrize("how", ["* float('nan')", pytest.param("+ float('inf')", marks=pytest.mark.slow)])
def test_losses_that_are_not_finite_on_one_rank_skip_steps_on_both_and_five_in_a_row_fail(broken, how: str) -> None:
    place = broken(spoiled("n == 3 or 6 <= n <= 10", how))
    answer = place.run(*SMALL, "--verbose")
    assert answer.code == 1, answer.text
    first, second = ((place.logs / f"digests-{rank}").read_text().split() for rank in (0, 1))
    assert first[:10] == second[:10]
    assert [n + 1 for n in range(1, 10) if first[n] == first[n - 1]] == [3, 6, 7, 8, 9, 10]
    line = next(line for line in answer.out.splitlines() if "건너뜁니다" in line)
    assert "스텝 3:" in line
    assert "데이터 행 위치 8–11" in line  # four rows a step
    info = json.loads((place.outputs / "checkpoint-4" / "training_info.json").read_text(encoding="utf-8"))
    assert info["skipped_steps"] == 1
    assert answer.out.count("다섯 스텝 연속으로") == 1
    assert re.search(r"마지막 체크포인트: \S*checkpoint-8$", answer.out, re.MULTILINE), answer.out
    assert place.info()["state"] == "failed"
    assert "다시 시작했습니다" not in answer.out
    assert t.checkpoint_damage(place.outputs / "checkpoint-8", thorough=True) is None
    place.wait_for_end(5)


@pytest.mark.parametrize("seconds", [6, pytest.param(150, marks=pytest.mark.slow)])
def test_a_stop_while_a_save_takes_long_waits_for_it(broken, seconds: float) -> None:
    place = broken(slow_save(4, seconds))
    launcher = place.start(*SMALL, "--max-steps", "100000", "--save-total-limit", "2")
    place.wait("the save", lambda: (place.outputs / ".checkpoint-4.tmp" / t.MANIFEST).exists())
    os.kill(place.pid(), signal.SIGTERM)
    begun = time.monotonic()
    place.wait("the stop", lambda: "🛑 중단 요청" in place.console())
    again = place.run("--stop", timeout=60 + seconds)  # of somebody who left the first one, or doesn't know of it
    assert again.code == 0, again.text
    assert "이미 멈추는 중입니다" in again.out
    shown = place.finish(launcher, 60 + seconds)[0]
    assert launcher.returncode == 130, shown
    assert time.monotonic() - begun > seconds / 2
    assert place.info()["state"] == "stopped"
    assert "Traceback" not in shown
    assert "✅ 체크포인트 저장 완료: ./outputs/checkpoint-4" in shown
    assert int(place.checkpoints()[-1].name[11:]) == place.info()["step"]
    for path in place.checkpoints():
        assert t.checkpoint_damage(path, thorough=True) is None
    place.wait_for_end(5)


def test_a_stop_while_a_checkpoint_is_loaded_ends_at_once_and_leaves_it_whole(broken, undisturbed: Place) -> None:
    slow = """
real_load = load_checkpoint
def load_checkpoint(run, folder):
    if run.is_main:  # and rank 1 waits for it in a collective
        Path("loading").touch()
        time.sleep(300)
    return real_load(run, folder)
"""
    place = broken(slow)
    shutil.copytree(undisturbed.outputs, place.outputs, symlinks=True)
    shutil.rmtree(place.outputs / "checkpoint-12")
    launcher = place.start(*SMALL, "--resume")
    place.wait("the checkpoint", (place.folder / "loading").exists)
    answer = place.run("--stop", timeout=60)
    assert answer.code == 0, answer.text
    assert "Traceback" not in place.finish(launcher)[0]
    assert place.info()["state"] == "stopped"
    assert [path.name for path in place.checkpoints()] == ["checkpoint-4", "checkpoint-8"]
    assert_checkpoints_open(place)
    place.wait_for_end(5)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 300 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300m", "none", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def full_disk(early: set[int], late: set[int]) -> str:
    """A fault: the disk is full at some saves, from their beginning or after the model; then it has room again."""
    return f"""
real_save, real_write = save_checkpoint, write_tensors
def fill(folder):
    with open(folder / "filler", "ab", buffering=0) as stream:
        for size in (1 << 20, 4096, 1):
            with suppress(OSError):
                while stream.write(bytes(size)) == size:
                    pass
def save_checkpoint(run, state):
    if run.is_main:
        run.saver.busy(None)
        (run.cfg.output_dir / "filler").unlink(missing_ok=True)
        step[0] = state.step
        if state.step in {early or "()"}:
            fill(run.cfg.output_dir)
    real_save(run, state)
step = [0]
def write_tensors(path, content):
    if step[0] in {late or "()"} and path.name == "state.pt":
        fill(path.parents[2])
    return real_write(path, content)
"""


@pytest.mark.parametrize(("early", "late"), [({4}, {12}), pytest.param({8, 12}, {4}, marks=pytest.mark.slow)])
def test_a_full_disk_costs_the_checkpoint_but_only_at_the_last_save_the_run_which_can_be_resumed(
    broken, undisturbed: Place, small_disk: Path, early: set[int], late: set[int]
) -> None:
    place = broken(full_disk(early, late))
    place.outputs = small_disk / "outputs"
    answer = place.run(*SMALL)
    assert answer.code == 1, answer.text + place.report()
    lines = [line for line in answer.out.splitlines() if "체크포인트를 저장하지 못했습니다" in line]
    assert len(lines) == len(early | late) - 1, answer.out
    assert all("디스크 공간이 부족합니다" in line for line in lines)
    assert answer.out.count("마지막 스텝(12)을 저장하지 못했습니다: 디스크 공간이 부족합니다") == 1, answer.out
    kept = [step for step in (4, 8) if step not in early | late]
    last = re.findall(r"마지막 체크포인트: (.*)$", answer.out, re.MULTILINE)[-1]
    assert last.endswith(f"checkpoint-{kept[-1]}" if kept else "없음")
    assert place.info()["state"] == "failed"
    assert "Traceback" not in answer.text
    assert [int(path.name[11:]) for path in place.checkpoints()] == kept
    assert_checkpoints_open(place)
    assert not list(place.outputs.glob(".*.tmp"))
    (place.outputs / "filler").unlink()
    place.launcher = LAUNCHER
    answer = place.run(*SMALL, "--resume")
    assert answer.code == 0, answer.text
    assert_same_run(place.outputs.parent, undisturbed.folder, 12)


def test_ranks_save_after_kill_9_of_torchrun_and_no_other_run_starts_meanwhile(broken) -> None:
    place = broken(slow_save(4, 8))
    launcher = place.start(*SMALL, "--max-restarts", "3", "--notify", f"echo >>'{place.folder}/notified'")
    place.wait("the save", lambda: (place.outputs / ".checkpoint-4.tmp" / t.MANIFEST).exists())
    os.kill(place.agents()[0], signal.SIGKILL)
    second = place.run(*SMALL)
    assert second.code == 1
    assert "다른 학습이 실행 중입니다" in second.err, second.text
    assert not (place.folder / "notified").exists(), "told before the ranks had left"
    assert place.pid_file.exists()
    shown = place.finish(launcher)[0]
    assert launcher.returncode == 1, shown
    assert place.info()["state"] == "failed"
    assert (place.folder / "notified").read_text().strip() == "failed"
    assert_checkpoints_open(place)
    assert int(place.checkpoints()[-1].name[11:]) >= 4
    place.wait_for_end(5)


def kill_at_random(place: Place, chance: random.Random) -> str:
    """Kill a worker, the agent, or all of it; returns what."""
    agents, workers = place.agents(), place.workers()
    what, chosen = chance.choice([("worker", workers), ("agent", agents), ("all", list(place.processes()))])
    for pid in chosen if what == "all" else chance.sample(chosen, min(1, len(chosen))):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return what


def campaign(tmp_path: Path, undisturbed: Place, kills: int, seed: int) -> dict[str, int]:
    """Kill runs at random moments until ``kills`` is reached, resume each; returns what happened how often."""
    chance, counts = random.Random(seed), {"worker": 0, "agent": 0, "all": 0, "finished": 0}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    while counts["worker"] + counts["agent"] + counts["all"] < kills:
        for place in cleaned(Place(tmp_path / f"run-{counts['finished']}", environment={"PATH": path})):
            while not (place.outputs / "checkpoint-12").exists() or place.info()["state"] != "finished":
                resume = ["--resume", "auto"] if (place.outputs / "run_info.json").exists() else []
                launcher = place.start(*SMALL, "--max-restarts", "0", *resume)
                if sum(counts.values()) - counts["finished"] < kills:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        launcher.wait(undisturbed.seconds * chance.uniform(0.2, 1.2))
                    if launcher.poll() is None:
                        counts[kill_at_random(place, chance)] += 1
                shown = place.finish(launcher)[0]
                place.wait_for_end(40)
                assert_checkpoints_open(place)
                assert "Traceback" not in shown, shown
            assert_same_run(place.outputs.parent, undisturbed.folder, 12)
            counts["finished"] += 1
    return counts


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_as_if_undisturbed(tmp_path: Path, undisturbed: Place) -> None:
    print(f"\nkilled and resumed: {campaign(tmp_path, undisturbed, kills=100, seed=100)}")
