"""Runs that something goes wrong with: killed workers, hung ranks, lost nodes; real processes on the CPU."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import LAUNCHER, SCRIPT, Place, Terminal, assert_in_order, cleaned, write_program

import train_h100_dual as t

SMALL = [
    "--train",
    "--device",
    "cpu",
    "--model-size",
    "tiny",
    "--vocab-size",
    "512",
    "--max-seq-length",
    "32",
    "--batch-size",
    "2",
    "--gradient-accumulation-steps",
    "1",
    "--max-steps",
    "12",
    "--save-steps",
    "4",
    "--eval-steps",
    "6",
    "--logging-steps",
    "1",
    "--learning-rate",
    "1e-3",
    "--dummy-data",
    "--num-gpus",
    "2",
    "--no-save-initial",
    "--foreground",
]


def broken_launcher(folder: Path, fault: str) -> Path:
    """A copy of the launcher whose script has ``fault`` just before it starts; if ``EARLY``, before it imports."""
    folder.mkdir(parents=True)
    shutil.copy(LAUNCHER, folder)
    text, mark = SCRIPT.read_text(encoding="utf-8"), 'if __name__ == "__main__":\n'
    place = text.index(f"{mark}    typed_config") if fault.startswith(EARLY) else text.rindex(mark)
    (folder / SCRIPT.name).write_text(f"{text[:place]}{fault}\n\n{text[place:]}", encoding="utf-8")
    return folder / LAUNCHER.name


def at_step(step: int, action: str, rank: int = 1) -> str:
    """A fault: one rank does ``action`` when it is about to train ``step``, counted from 1."""
    return f"""
real_rate = learning_rate_at
def learning_rate_at(done, total, cfg):
    inside = sys._getframe(1).f_code.co_name == "train"
    if inside and done + 1 == {step} and rank_and_world()[0] == {rank}:
        {action}
    return real_rate(done, total, cfg)
"""


EARLY = "\n# before anything is heard or imported\n"
SLEEP_EARLY = (
    EARLY
    + """
if "RANK" in os.environ and {condition}:
    time.sleep({seconds})
"""
)
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
FIRST_TIME = 'os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and '


@pytest.fixture
def broken(tmp_path: Path, warm_cache: Path) -> Iterator:
    """Return a function that gives a place whose runs have a fault."""
    places = []

    def build(fault: str) -> Place:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        launcher = broken_launcher(tmp_path / f"scripts-{len(places)}", fault)
        places.append(Place(tmp_path / f"place-{len(places)}", launcher, warm_cache, {"PATH": path}))
        return places[-1]

    yield build
    for one in places:
        one.kill_all()


def timeless(place: Place) -> list[dict]:
    """The metrics without what a clock or the machine's memory decides."""
    lines = (place.outputs / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    changing = ("tokens_per_second", "memory_gb", "seconds")
    return [{name: value for name, value in json.loads(line).items() if name not in changing} for line in lines]


def weights(place: Place, step: int) -> dict[str, torch.Tensor]:
    return torch.load(place.outputs / f"checkpoint-{step}" / "pytorch_model.bin", weights_only=True)


def assert_same_run(ours: Place, theirs: Place, step: int) -> None:
    """Assert that two runs logged the same figures and ended with the same weights, bit for bit."""
    assert timeless(ours) == timeless(theirs)
    mine, other = weights(ours, step), weights(theirs, step)
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in other)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, warm_cache: Path) -> Iterator[Place]:
    """A run of SMALL to its end."""
    for place in cleaned(Place(tmp_path_factory.mktemp("undisturbed") / "place", cache=warm_cache)):
        answer = place.run(*SMALL)
        assert answer.code == 0, answer.text
        place.seconds = answer.seconds
        yield place


# --- hangs ---


@pytest.fixture(scope="module")
def hung_run(tmp_path_factory: pytest.TempPathFactory, warm_cache: Path) -> Iterator[SimpleNamespace]:
    """Rank 1 falls asleep at step 3, once and again after a restart, and rank 0 waits for it in a collective."""
    folder = tmp_path_factory.mktemp("hung")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    launcher = broken_launcher(folder / "scripts", at_step(3, "time.sleep(1e6)"))
    for place in cleaned(Place(folder / "place", launcher, warm_cache, {"PATH": path})):
        options = ["--hang-timeout", "0.2", "--max-restarts", "1", "--notify", f"echo >>'{folder}/notified'"]
        answer = place.run(*SMALL, *options, timeout=200)
        yield SimpleNamespace(place=place, answer=answer, folder=folder)


def test_a_hung_run_is_restarted_while_restarts_are_left_and_then_fails_with_one_line(
    hung_run: SimpleNamespace,
) -> None:
    answer = hung_run.answer
    assert answer.code == 1
    assert answer.out.count("다시 시작했습니다 (1/1번째)") == 1, answer.text
    assert answer.text.count("0.2분 동안 진행이 없어 학습을 끝냈습니다 (--hang-timeout)") == 1, answer.text
    assert hung_run.place.info()["state"] == "failed"
    assert "진행이 없어" in hung_run.place.info()["error"]
    assert (hung_run.folder / "notified").read_text().strip() == "failed"
    hung_run.place.wait_for_end(5)
    assert not hung_run.place.pid_file.exists()


def test_the_stacks_of_every_rank_are_in_its_detail_log(hung_run: SimpleNamespace) -> None:
    logs = [hung_run.place.logs / f"training_detail_rank_{rank}.log" for rank in (0, 1)]
    waiting, sleeping = (path.read_text(encoding="utf-8").partition("Timeout (")[2] for path in logs)
    assert_in_order(waiting, [r"\(most recent call first\)", r"in (wait|pop|backward|train_step)", r"in main$"])
    assert_in_order(sleeping, [r"\(most recent call first\)", "in learning_rate_at$", "in train$", "in main$"])


@pytest.mark.slow
def test_a_rank_that_keeps_the_interpreter_to_itself_is_found_too(broken) -> None:
    hold = "re.match('(a+)+$', 'a' * 60 + 'b')"  # C code that lets no other thread run
    place = broken(at_step(3, hold, rank=0))
    answer = place.run(*SMALL, "--hang-timeout", "0.2", "--max-restarts", "0", timeout=90)
    assert answer.code == 1, answer.text
    assert place.info()["state"] == "failed"
    place.wait_for_end(5)
    assert_in_order((place.logs / "training_detail_rank_0.log").read_text(encoding="utf-8"), ["in match", "in main"])


@pytest.mark.slow
def test_a_long_preparation_of_the_data_is_no_hang(broken) -> None:
    slow = """
real_prepare = build_cache
def build_cache(*arguments):
    time.sleep(8)
    return real_prepare(*arguments)
"""
    place = broken(slow)
    place.cache = place.folder / "cache"
    answer = place.run(*SMALL, "--max-steps", "2", "--hang-timeout", "0.08")
    assert answer.code == 0, answer.text


# --- restarts ---


def test_a_killed_worker_is_started_again_and_the_losses_are_as_undisturbed(broken, undisturbed: Place) -> None:
    place = broken(at_step(7, f"{FIRST_TIME}{KILL}"))
    answer = place.run(*SMALL, "--max-restarts", "2")
    assert answer.code == 0, answer.text + place.report()
    assert_in_order(answer.out, ["스텝 5/12", r"⚠️  학습 프로세스가 죽어 .*\(1/2번째\): 스텝 4부터", "✅ 학습 완료!"])
    assert "Traceback" not in answer.text
    assert "❌" not in answer.text
    assert_same_run(place, undisturbed, 12)
    assert place.info()["state"] == "finished"
    place.wait_for_end(5)


def test_a_worker_killed_before_the_first_checkpoint_starts_over_where_a_test_has_been(
    broken, undisturbed: Place
) -> None:
    place = broken(at_step(3, f"{FIRST_TIME}{KILL}", rank=0))
    answer = place.run(*SMALL, "--test", "--max-steps", "2")
    assert answer.code == 0, answer.text
    answer = place.run(*SMALL)
    assert answer.code == 0, answer.text + place.report()
    assert_in_order(answer.out, [r"\(1/3번째\): 스텝 0부터", "✅ 학습 완료!"])
    assert_same_run(place, undisturbed, 12)


@pytest.mark.slow  # the hung run shows it by default
def test_a_fault_that_comes_again_and_again_ends_the_run_after_its_restarts(broken) -> None:
    place = broken(at_step(7, KILL))
    answer = place.run(*SMALL, "--max-restarts", "1", "--notify", f"echo >>'{place.folder}/notified'")
    assert answer.code == 1, answer.text
    assert answer.out.count("자동으로 다시 시작했습니다") == 1
    assert place.info()["state"] == "failed"
    assert place.info()["error"]
    assert "Traceback" not in answer.text
    assert (place.folder / "notified").read_text().strip() == "failed"
    assert [path.name for path in place.checkpoints()] == ["checkpoint-4"]
    assert not place.pid_file.exists()
    place.wait_for_end(5)


def test_an_error_whose_cause_is_known_is_not_repeated(broken) -> None:
    place = broken(at_step(3, "raise torch.OutOfMemoryError"))
    answer = place.run(*SMALL, "--max-restarts", "3")
    assert answer.code == 1
    assert answer.out.count("GPU 메모리가 부족합니다") == 1, answer.text
    assert "다시 시작했습니다" not in answer.out
    assert answer.out.count("스텝 1/12") == 1
    assert place.info()["state"] == "failed"
    place.wait_for_end(5)


def test_a_stop_during_a_restart_stops(broken) -> None:
    place = broken(at_step(7, f"{FIRST_TIME}{KILL}"))
    launcher = place.start(*SMALL, "--max-steps", "100000", "--save-total-limit", "2")
    info = place.outputs / "run_info.json"
    place.wait("the restart", lambda: info.exists() and "restarts" in info.read_text(encoding="utf-8"))
    begun = time.monotonic()
    answer = place.run("--stop")
    assert answer.code == 0, answer.text
    assert time.monotonic() - begun < 30
    assert place.info()["state"] == "stopped"
    shown = place.finish(launcher)[0]
    assert launcher.returncode == 130, shown
    assert "Traceback" not in shown
    place.wait_for_end(5)


def test_a_stop_that_finds_one_rank_without_a_handler_yet_stops(broken) -> None:
    place = broken(SLEEP_EARLY.format(condition="rank_and_world()[0] == 1", seconds=1000))
    launcher = place.start(*SMALL)
    log = place.logs / "training_detail_rank_0.log"
    place.wait("rank 0 at the rendezvous", lambda: log.exists() and "token cache" in log.read_text(encoding="utf-8"))
    time.sleep(1)  # into the store's wait, from which no Python handler runs
    answer = place.run("--stop", timeout=60)
    assert answer.code == 0, answer.text
    assert place.info()["state"] == "stopped"
    place.finish(launcher)
    place.wait_for_end(5)


def test_ranks_whose_torchrun_dies_before_they_know_it_leave_too(broken) -> None:
    place = broken(SLEEP_EARLY.format(condition="True", seconds=5))
    launcher = place.start(*SMALL, "--max-restarts", "0")
    place.wait("two workers", lambda: len(place.workers()) == 2)
    os.kill(place.agents()[0], signal.SIGKILL)
    place.wait_for_end(30)
    shown = place.finish(launcher)[0]
    assert launcher.returncode == 1, shown


def test_ranks_save_after_kill_9_of_torchrun_and_no_other_run_starts_meanwhile(broken, undisturbed: Place) -> None:
    place = broken(slow_save(4, 8))
    place.folder.joinpath("notified").unlink(missing_ok=True)
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
    assert t.checkpoint_step(place.checkpoints()[-1]) >= 4
    place.wait_for_end(5)
    answer = place.run(*SMALL, "--resume")
    assert answer.code == 0, answer.text
    assert_same_run(place, undisturbed, 12)


def begun_loops(place: Place) -> int:
    """How many times a run has come to its loop here."""
    return t.read_text(place.logs / "training_detail_rank_0.log").count("최대 스텝")


@pytest.mark.parametrize("rounds", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_sigterm_to_every_process_at_once_saves_the_step(place: Place, warm_cache: Path, rounds: int) -> None:
    place.cache, resume = warm_cache, []
    for number in range(rounds):
        launcher = place.start(*SMALL, "--max-steps", "100000", "--save-steps", "100000", *resume)
        place.wait("the loop", lambda n=number: begun_loops(place) > n)
        time.sleep(1 + random.Random(number).random())
        for pid in [place.pid(), *place.agents(), *place.workers()]:  # as Slurm, systemd and a reboot do
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        shown = place.finish(launcher)[0]
        assert launcher.returncode == 130, shown
        assert place.info()["state"] == "stopped"
        assert t.checkpoint_step(place.checkpoints()[-1]) == place.info()["step"] > 0, shown
        assert "Traceback" not in shown
        place.wait_for_end(5)
        resume = ["--resume", "--save-total-limit", "2"]
    assert_checkpoints_open(place)


def test_sigterm_to_every_process_saves_without_the_launcher_too(place: Place, warm_cache: Path) -> None:
    place.cache = warm_cache
    options = [word for word in SMALL if word not in ("--num-gpus", "2", "--foreground")]
    options[options.index("--batch-size") + 1 : options.index("--batch-size") + 1] = ["2"]
    command = place.command(*options, "--max-steps", "100000", "--save-steps", "100000")
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command["args"] = [*agent, "--shutdown-timeout", "86400", str(SCRIPT), *command["args"][1:]]
    process = subprocess.Popen(**command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")
    place.wait_for_step()
    for pid in [*place.agents(), *place.workers()]:
        os.kill(pid, signal.SIGTERM)
    shown = place.finish(process)[0]
    place.wait_for_end(5)
    assert place.info()["state"] == "stopped", shown
    assert t.checkpoint_step(place.checkpoints()[-1]) == place.info()["step"] > 0
    assert_checkpoints_open(place)


def test_a_restarted_run_that_was_asked_to_stop_is_not_repeated(broken) -> None:
    place = broken(
        at_step(
            3,
            f"while not read_json(cfg.output_dir / 'run_info.json').get('stop_requested'): "
            f"time.sleep(0.1)\n        {KILL}",
        )
    )
    launcher = place.start(*SMALL)
    place.wait_for_step()
    os.kill(place.pid(), signal.SIGTERM)
    shown = place.finish(launcher)[0]
    assert launcher.returncode == 130, shown
    assert "다시 시작했습니다" not in shown
    place.wait_for_end(5)


# --- numbers going wrong ---


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
def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_both(broken, how: str) -> None:
    place = broken(spoiled("n == 5", how))
    answer = place.run(*SMALL, "--verbose")
    assert answer.code == 0, answer.text + place.report()
    first, second = ((place.logs / f"digests-{rank}").read_text().split() for rank in (0, 1))
    assert first == second
    assert [n + 1 for n in range(1, 12) if first[n] == first[n - 1]] == [5]
    (line,) = [line for line in answer.out.splitlines() if "건너뜁니다" in line]
    assert "스텝 5:" in line
    assert "데이터 행 위치 16–19" in line  # four rows a step
    info = json.loads((place.outputs / "checkpoint-12" / "training_info.json").read_text(encoding="utf-8"))
    assert info["skipped_steps"] == 1


def test_five_losses_in_a_row_that_are_not_finite_fail_the_run_and_name_the_last_checkpoint(broken) -> None:
    place = broken(spoiled("6 <= n <= 10", "* float('nan')"))
    answer = place.run(*SMALL)
    assert answer.code == 1, answer.text
    assert answer.out.count("다섯 스텝 연속으로") == 1
    assert re.search(r"마지막 체크포인트: \S*checkpoint-8$", answer.out, re.MULTILINE), answer.out
    assert place.info()["state"] == "failed"
    assert "다시 시작했습니다" not in answer.out
    first, second = ((place.logs / f"digests-{rank}").read_text().split() for rank in (0, 1))
    assert first[:10] == second[:10]
    assert len(set(first[4:10])) == 1
    assert t.checkpoint_damage(place.outputs / "checkpoint-8", thorough=True) is None
    place.wait_for_end(5)


# --- saves that take long, and disks that fill ---


def slow_save(step: int, seconds: float) -> str:
    """A fault: flushing ``checkpoint-STEP`` takes some time."""
    return f"""
real_sync = sync_tree
def sync_tree(folder):
    if folder.name == ".checkpoint-{step}.tmp":
        time.sleep({seconds})
    real_sync(folder)
"""


@pytest.mark.parametrize("seconds", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_a_stop_while_a_save_takes_long_waits_for_it(broken, seconds: float) -> None:
    place = broken(slow_save(4, seconds))
    launcher = place.start(*SMALL, "--max-steps", "100000", "--save-total-limit", "2")
    place.wait("the save", lambda: (place.outputs / ".checkpoint-4.tmp" / t.MANIFEST).exists())
    os.kill(place.pid(), signal.SIGTERM)
    begun = time.monotonic()
    place.wait("the stop", lambda: "🛑 중단 요청" in place.console())
    again = place.run("--stop")  # of somebody who left the first one, or doesn't know of it
    assert again.code == 0, again.text
    assert "이미 멈추는 중입니다" in again.out
    shown = place.finish(launcher)[0]
    assert launcher.returncode == 130, shown
    assert time.monotonic() - begun > seconds / 2
    assert place.info()["state"] == "stopped"
    assert "Traceback" not in shown
    assert "✅ 체크포인트 저장 완료: ./outputs/checkpoint-4" in shown
    assert t.checkpoint_step(place.checkpoints()[-1]) == place.info()["step"]
    for path in place.checkpoints():
        assert t.checkpoint_damage(path, thorough=True) is None
    place.wait_for_end(5)


def test_a_second_signal_while_a_save_takes_long_ends_the_run_at_once(broken) -> None:
    place = broken(slow_save(8, 1e6))
    launcher = place.start(*SMALL, "--max-steps", "100000", "--save-total-limit", "2")
    place.wait("the save", lambda: (place.outputs / ".checkpoint-8.tmp" / t.MANIFEST).exists())
    os.kill(place.pid(), signal.SIGTERM)
    time.sleep(2)
    assert launcher.poll() is None
    os.kill(place.pid(), signal.SIGTERM)
    begun = time.monotonic()
    shown = place.finish(launcher, 30)[0]
    assert time.monotonic() - begun < 10
    assert launcher.returncode == 130, shown
    place.wait_for_end(5)
    assert [path.name for path in place.checkpoints()] == ["checkpoint-4"]
    assert t.checkpoint_damage(place.checkpoints()[0], thorough=True) is None
    answer = place.run(*SMALL[:-1], "--foreground", "--resume", "--max-steps", "5")
    assert "스텝 4부터" in answer.out, answer.text


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 300 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300m", "none", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def full_disk(steps: str, early: bool) -> str:
    """A fault: the disk is full at some saves, before they look for room or just after; then it has room again."""
    return f"""
real_save, real_room = save_checkpoint, check_room
def fill(folder):
    with open(folder / "filler", "ab", buffering=0) as stream:
        for size in (1 << 20, 4096, 1):
            with suppress(OSError):
                while stream.write(bytes(size)) == size:
                    pass
def save_checkpoint(run, state):
    if run.is_main:
        run.saver.wait()
        (run.cfg.output_dir / "filler").unlink(missing_ok=True)
        full[0] = state.step in {steps}
        if full[0] and {early}:
            fill(run.cfg.output_dir)
    real_save(run, state)
full = [False]
def check_room(run):
    real_room(run)
    if full[0]:
        fill(run.cfg.output_dir)
"""


@pytest.mark.parametrize(
    ("steps", "early"), [({4}, True), ({8}, False), pytest.param({4, 8}, True, marks=pytest.mark.slow)]
)
def test_a_full_disk_costs_the_checkpoint_but_not_the_run(
    broken, undisturbed: Place, small_disk: Path, steps: set[int], early: bool
) -> None:
    place = broken(full_disk(str(steps), early))
    place.outputs = small_disk / "outputs"
    answer = place.run(*SMALL)
    assert answer.code == 0, answer.text + place.report()
    lines = [line for line in answer.out.splitlines() if "체크포인트를 저장하지 못했습니다" in line]
    assert len(lines) == len(steps), answer.out
    assert all("디스크 공간이 부족합니다" in line for line in lines)
    kept = [step for step in (4, 8, 12) if step not in steps]
    assert [t.checkpoint_step(path) for path in place.checkpoints()] == kept
    assert all(t.checkpoint_damage(path, thorough=True) is None for path in place.checkpoints()[-2:])
    assert not list(place.outputs.glob(".*.tmp"))
    assert "Traceback" not in answer.text
    assert_same_run(place, undisturbed, 12)


@pytest.mark.parametrize("early", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_full_disk_at_the_last_save_fails_the_run_which_can_be_resumed(
    broken, undisturbed: Place, small_disk: Path, early: bool
) -> None:
    place = broken(full_disk("{12}", early))
    place.outputs = small_disk / "outputs"
    answer = place.run(*SMALL)
    assert answer.code == 1, answer.text
    assert answer.out.count("마지막 스텝(12)을 저장하지 못했습니다: 디스크 공간이 부족합니다") == 1, answer.out
    assert re.search(r"마지막 체크포인트: \S*checkpoint-8$", answer.out, re.MULTILINE), answer.out
    assert "Traceback" not in answer.text
    assert place.info()["state"] == "failed"
    assert [path.name for path in place.checkpoints()] == ["checkpoint-4", "checkpoint-8"]
    (place.outputs / "filler").unlink()
    place.launcher = LAUNCHER
    answer = place.run(*SMALL, "--resume")
    assert answer.code == 0, answer.text
    assert_same_run(place, undisturbed, 12)


# --- kill -9 at any time ---


def kill_at_random(place: Place, chance: random.Random) -> str:
    """Kill a worker, the agent, or all of it; returns what."""
    agents, workers = place.agents(), place.workers()
    what, chosen = chance.choice([("worker", workers), ("agent", agents), ("all", list(place.processes()))])
    for pid in chosen if what == "all" else chance.sample(chosen, min(1, len(chosen))):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return what


def assert_checkpoints_open(place: Place) -> None:
    for path in place.checkpoints():
        torch.load(path / "pytorch_model.bin", weights_only=True)
        assert not (path / "training_state").is_dir() or t.checkpoint_damage(path, thorough=True) is None


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
            assert_same_run(place, undisturbed, 12)
            counts["finished"] += 1
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("kills", [3, 100])
def test_runs_killed_at_random_moments_end_as_if_undisturbed(tmp_path: Path, undisturbed: Place, kills: int) -> None:
    counts = campaign(tmp_path, undisturbed, kills, seed=kills)
    print(f"\nkilled and resumed: {counts}")
    assert sum(counts.values()) - counts["finished"] >= kills


# --- Ctrl-C, whatever the run is at ---


def assert_ended_by_ctrl_c(terminal: Terminal, timeout: float = 60) -> None:
    """Press Ctrl-C; assert a clean end without a traceback and with nothing left running."""
    before = len(terminal.text)
    terminal.press("\x03")
    assert terminal.wait_for_exit(timeout) == 130, terminal.text
    assert "Traceback" not in terminal.text
    assert "KeyboardInterrupt" not in terminal.text
    assert "❌" not in terminal.text
    assert "🛑" in terminal.text[before:]
    terminal.place.wait_for_end(10)


def test_ctrl_c_while_the_gpus_are_asked_for_ends_cleanly(place: Place, tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    write_program(tmp_path / "bin" / "nvidia-smi", f"touch '{asked}'; sleep 300")
    place.environment["PATH"] = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    terminal = Terminal(place, "--test", "--foreground")
    place.wait("the question", asked.exists)
    assert_ended_by_ctrl_c(terminal)
    assert not list(place.folder.iterdir())


@pytest.mark.usefixtures("with_cuda")
def test_ctrl_c_while_pytorch_is_asked_ends_cleanly(place: Place, with_gpus, tmp_path: Path) -> None:
    with_gpus(2)
    asked = tmp_path / "asked"
    package = Path(place.environment["PYTHONPATH"]) / "torch" / "__init__.py"
    package.write_text(f"import pathlib, time\npathlib.Path({str(asked)!r}).touch()\ntime.sleep(300)\n")
    terminal = Terminal(place, "--test", "--foreground")
    place.wait("the question", asked.exists)
    assert_ended_by_ctrl_c(terminal)
    assert not list(place.folder.iterdir())


@contextlib.contextmanager
def silent_server() -> Iterator[int]:
    """A package index that takes connections and never answers; gives its port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("stage", ["venv", pytest.param("pip", marks=pytest.mark.slow)])
def test_ctrl_c_during_the_set_up_ends_cleanly_and_the_next_start_begins_it_anew(
    bare_place: Place, bare_folder: Path, tmp_path: Path, stage: str
) -> None:
    place, checkout = bare_place, tmp_path / "checkout"
    shutil.copytree(bare_folder / "checkout", checkout)
    place.launcher = checkout / LAUNCHER.name
    venv = checkout / ".venv"
    with silent_server() as port:
        index = f"http://127.0.0.1:{port}/simple"
        place.environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": index, "PIP_RETRIES": "0"}
        terminal = Terminal(place, "--test", "--foreground")
        if stage == "venv":
            place.wait("the environment", (venv / "bin" / "python3").exists)
        else:
            place.wait("pip", lambda: any(" install " in text for text in place.processes().values()))
            time.sleep(1)
        assert_ended_by_ctrl_c(terminal)
        assert not list(place.folder.iterdir())
        assert (venv / ".installing").exists()
        if stage == "venv":
            terminal = Terminal(place, "--test", "--foreground")
            place.wait("pip", lambda: any(" install " in text for text in place.processes().values()))
            assert_ended_by_ctrl_c(terminal)


def test_ctrl_c_while_the_data_is_prepared_ends_cleanly_and_the_next_run_prepares_it(broken) -> None:
    slow = """
real_encode = write_held_out
def write_held_out(*arguments):
    if os.environ.get("SLOW"):
        time.sleep(300)
    real_encode(*arguments)
"""
    place = broken(slow)
    place.cache, place.environment["SLOW"] = place.folder / "cache", "yes"
    terminal = Terminal(place, *SMALL, "--max-steps", "2")
    place.wait("the cache", lambda: list(place.cache.glob("*.tmp-*/*.bin")))
    assert_ended_by_ctrl_c(terminal)
    assert place.info()["state"] == "stopped"
    assert not place.pid_file.exists()
    del place.environment["SLOW"]
    answer = place.run(*SMALL, "--max-steps", "2", "--resume")
    assert answer.code == 0, answer.text
    assert "처음부터 시작합니다" in answer.out


@pytest.mark.slow  # the default suite sends the signal by hand
def test_ctrl_c_during_a_save_waits_for_it_and_ends_cleanly(broken) -> None:
    place = broken(slow_save(4, 5))
    terminal = Terminal(place, *SMALL, "--max-steps", "100000", "--save-total-limit", "2")
    place.wait("the save", lambda: (place.outputs / ".checkpoint-4.tmp" / t.MANIFEST).exists())
    assert_ended_by_ctrl_c(terminal)
    assert place.info()["state"] == "stopped"
    assert "✅ 체크포인트 저장 완료: ./outputs/checkpoint-4" in terminal.text
    for path in place.checkpoints():
        assert t.checkpoint_damage(path, thorough=True) is None


@pytest.mark.slow
def test_ctrl_c_while_the_model_is_compiled_ends_cleanly_with_a_checkpoint(broken) -> None:
    mark = """
real_step = train_step
def train_step(run, batches, rate):
    (run.cfg.logs_dir / "compiling").touch()
    return real_step(run, batches, rate)
"""
    place = broken(mark)
    place.environment["TORCHINDUCTOR_CACHE_DIR"] = str(place.folder / "inductor")
    terminal = Terminal(place, *SMALL, "--compile", "--num-gpus", "1")
    place.wait("the first step", (place.logs / "compiling").exists)
    time.sleep(1)
    assert "스텝 1/12" not in terminal.text
    assert_ended_by_ctrl_c(terminal, 600)
    assert place.info()["state"] == "stopped"
    assert [path.name for path in place.checkpoints()] == ["checkpoint-2"]  # the flag is read a step late
