"""A stop at any moment and from whomever, a killed torchrun, Ctrl-C; real processes on the CPU."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import LAUNCHER, SCRIPT, Place, Terminal, write_program
from faults import FIRST_TIME, KILL, SLEEP_EARLY, SMALL, assert_checkpoints_open, at_steps
from samples import SMALL_MODEL, TINY

ALONE = [*SMALL, "--num-gpus", "1"]  # where a second rank would prove nothing more


def test_a_stop_during_a_restart_stops(broken) -> None:
    place = broken(at_steps((7, 0, f"{FIRST_TIME}{KILL}")))
    launcher = place.start(*ALONE, "--max-steps", "100000", "--save-total-limit", "2")
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
    launcher = place.start(*SMALL, "--max-restarts", "60")
    place.wait("rank 0 at the rendezvous", (place.outputs / "run_info.json").exists)
    time.sleep(1)  # into the store's wait, from which no Python handler runs
    begun = time.monotonic()
    answer = place.run("--stop", timeout=60)
    assert time.monotonic() - begun < 15, "torchrun starts no rank again"
    assert answer.code == 0, answer.text
    assert place.info()["state"] == "stopped"
    place.finish(launcher)
    place.wait_for_end(5)


def test_ranks_whose_torchrun_dies_before_they_know_it_leave_too(broken) -> None:
    place = broken(SLEEP_EARLY.format(condition="True", seconds=5))
    launcher = place.start(*ALONE, "--max-restarts", "0")
    place.wait("a worker", place.workers)
    os.kill(place.agents()[0], signal.SIGKILL)
    place.wait_for_end(30)
    shown = place.finish(launcher)[0]
    assert launcher.returncode == 1, shown


def begun_loops(place: Place) -> int:
    """How many times a run has come to its loop here."""
    return sum(path.read_text().count("최대 스텝") for path in place.logs.glob("training_detail_rank_0.log"))


@pytest.mark.parametrize("rounds", [1, pytest.param(50, marks=pytest.mark.slow)])
def test_sigterm_to_every_process_at_once_saves_the_step(broken, rounds: int) -> None:
    place, resume = broken(""), []
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
        assert int(place.checkpoints()[-1].name[11:]) == place.info()["step"] > 0, shown
        assert "Traceback" not in shown
        place.wait_for_end(5)
        resume = ["--resume", "--save-total-limit", "2"]
    assert_checkpoints_open(place)


def test_sigterm_to_every_process_saves_without_the_launcher_too(place: Place, warm: None) -> None:
    options = [*" ".join(TINY).split(), *SMALL_MODEL, "--dummy-data"]
    command = place.command(*options, "--max-steps", "100000", "--save-steps", "100000")
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    command["args"] = [*agent, "--shutdown-timeout", "86400", str(SCRIPT), *command["args"][1:]]
    process = subprocess.Popen(**command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")
    place.wait_for_step()
    for pid in [*place.agents(), *place.workers()]:
        os.kill(pid, signal.SIGTERM)
    shown = place.finish(process)[0]
    place.wait_for_end(5)
    assert place.info()["state"] == "stopped", shown
    assert int(place.checkpoints()[-1].name[11:]) == place.info()["step"] > 0
    assert_checkpoints_open(place)


def test_a_restarted_run_that_was_asked_to_stop_is_not_repeated(broken) -> None:
    wait = "while not read_json(cfg.output_dir / 'run_info.json').get('stop_requested'): time.sleep(0.1)"
    place = broken(at_steps((3, 0, f"{wait}\n        {KILL}")))
    launcher = place.start(*ALONE)
    place.wait_for_step()
    os.kill(place.pid(), signal.SIGTERM)
    shown = place.finish(launcher)[0]
    assert launcher.returncode == 130, shown
    assert "다시 시작했습니다" not in shown
    place.wait_for_end(5)


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


@pytest.mark.usefixtures("with_cuda")
@pytest.mark.parametrize("who", ["nvidia-smi", "PyTorch"])
def test_ctrl_c_while_somebody_is_asked_for_gpus_ends_cleanly(place: Place, with_gpus, tmp_path: Path, who) -> None:
    with_gpus(2)
    asked = tmp_path / "asked"
    if who == "nvidia-smi":
        write_program(tmp_path / "stubs" / "nvidia-smi", f"touch '{asked}'; sleep 300")
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
    bare_place, bare_folder, tmp_path, stage
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
            old = write_program(tmp_path / "old" / "python3", "exit 1")  # then the half one comes before python3.12
            place.environment["PATH"] = f"{old.parent}:{place.environment['PATH']}"
            terminal = Terminal(place, "--test", "--foreground")
            place.wait("pip", lambda: any(" install " in text for text in place.processes().values()))
            assert_ended_by_ctrl_c(terminal)


def test_a_stop_while_rank_0_trains_the_tokenizer_or_tokenises_is_clean_and_the_next_run_does_it(broken) -> None:
    slow = """
real_train, real_write = train_tokenizer, write_stream
def dawdle(stage):
    if os.environ.get("SLOW") == stage:
        Path(stage).touch()
        time.sleep(300)
def train_tokenizer(*arguments):
    dawdle("tokenizer")
    return real_train(*arguments)
def write_stream(*arguments):
    dawdle("stream")
    return real_write(*arguments)
"""
    place = broken(slow)
    place.cache = place.folder / "cache"
    for stage, options in (("tokenizer", SMALL), ("stream", ALONE)):  # the other rank waits alike
        place.environment["SLOW"] = stage
        terminal = Terminal(place, *options)
        place.wait(stage, (place.folder / stage).exists)
        assert_ended_by_ctrl_c(terminal)
        assert place.info()["state"] == "stopped"
        assert not place.pid_file.exists()
    del place.environment["SLOW"]
    answer = place.run(*ALONE, "--max-steps", "2", "--resume")
    assert answer.code == 0, answer.text
    assert "처음부터 시작합니다" in answer.out


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
    terminal = Terminal(place, *ALONE, "--compile")
    place.wait("the first step", (place.logs / "compiling").exists)
    time.sleep(1)
    assert "스텝 1/12" not in terminal.text
    assert_ended_by_ctrl_c(terminal, 600)
    assert place.info()["state"] == "stopped"
    assert [path.name for path in place.checkpoints()] == ["checkpoint-1"]  # whose flag is waited for
