"""A run's life under the real launcher: start, watch, stop, die, start again; real processes on the CPU."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import (
    LAUNCHER,
    LONG_RUN,
    Place,
    Terminal,
    assert_in_order,
    cleaned,
    list_tree,
    process_is_alive,
    write_program,
)
from samples import documents, read_metrics, write_corpus
from test_readme import code_blocks, comparable, section, tables, tree, without_numbers

MODEL_FILES = {"pytorch_model.bin", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
# A test that only a signal ends: what it leaves may be replaced by the next one.
ENDLESS_TEST = (
    "--test --num-gpus 1 --max-steps 100000 --save-steps 100000 --max-seq-length 64 --batch-size 2 --dummy-data"
)


@contextlib.contextmanager
def new_place(factory: pytest.TempPathFactory, name: str, cache: Path | None = None) -> Iterator[Place]:
    """A place for a fixture that several tests share."""
    yield from cleaned(Place(factory.mktemp("run") / name, cache=cache))


def notifying(place: Place) -> list[str]:
    return ["--notify", f"echo >>'{place.folder}/notified'"]


def notified(place: Place) -> str:
    path = place.folder / "notified"
    place.wait("the --notify command", path.exists, timeout=20)
    return path.read_text().strip()


def status(place: Place) -> tuple[int, dict]:
    answer = place.run("--status", "--json")
    return answer.code, json.loads(answer.out)


def assert_whole_checkpoint(place: Place, step: int) -> None:
    """Assert that the newest checkpoint is that of ``step``, with all its files and nothing half-written."""
    assert place.checkpoints()[-1].name == f"checkpoint-{step}"
    found = {path.name for path in place.checkpoints()[-1].iterdir()}
    assert found >= MODEL_FILES | {"training_info.json", "training_state"}
    info = json.loads((place.checkpoints()[-1] / "training_info.json").read_text(encoding="utf-8"))
    assert info["step"] == step
    assert not list(place.outputs.glob(".*.tmp"))


def last_step(place: Place) -> int:
    """The step that the detail log of rank 0 speaks of last."""
    text = (place.logs / "training_detail_rank_0.log").read_text(encoding="utf-8")
    return int(re.findall(r"step (\d+): loss", text)[-1])


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The plain command, in the background, with all its defaults; looked at while it runs and afterwards."""
    with new_place(tmp_path_factory, "place") as place:
        place.environment["PYTHONPATH"] = ""  # it draws its curves
        launcher = place.start(*notifying(place))
        seen = SimpleNamespace(place=place, pid=place.pid())
        seen.alive = process_is_alive(seen.pid)
        seen.second = place.run("--test")
        place.wait("the output's lock", lambda: (place.outputs / "run_info.json").exists())
        seen.other_logs = place.outputs.parent / "other logs"
        command = place.command("--test")
        command["args"] += ["--logs-dir", str(seen.other_logs)]
        seen.third = place.execute(command)
        seen.status = status(place)
        seen.console = place.finish(launcher)[0]
        seen.code = launcher.returncode
        place.wait_for_end(120)
        seen.status_afterwards = status(place)
        seen.status_text = place.run("--status").out
        yield seen


def test_the_console_shows_the_blocks_of_the_documents_example(finished_run: SimpleNamespace) -> None:
    assert finished_run.code == 0, finished_run.console
    pid = finished_run.pid
    phrases = [  # README's example, which the next test looks at, has other numbers and leaves some lines out
        r"^✅ PyTorch.* 확인 완료", r"CPU 프로세스 2개", r"더미", r"^✅ 모든 요구사항 충족\n\n", r"^📋 학습 정보\n=+\n",
        r"^🎯 모드: 테스트 모드 \(10스텝\)$", r"^🔧 하이퍼파라미터:$", r"^   • 배치 크기: 4$", r"^   • 학습률: 1e-4$",
        r"^   • 최대 시퀀스 길이: 256$", r"^   • Mixed Precision: fp32$", r"^   • 모델 컴파일: false$",
        r"^   • 모델 파라미터: 3\.9M", r"^   • 스텝당 토큰: 2,048$", r"^   • 전체 학습: 10 스텝, 20,480 토큰",
        r"^📁 경로:$", r"^   • 데이터셋: ", r"^   • 출력: \./outputs$", r"^   • 로그: \./logs$", r"^💾 저장 설정:$",
        r"^   • 저장 간격: 500 스텝$", r"^   • 초기 모델 저장: true$", r"^   • 백그라운드 실행: true$",
        r"^🚀 .*설정.*:$", r"^   • .*수: 2$", r"^   • 분산 학습: DDP$", r"^   • 최적화: FP32$", r"예상 메모리: .*GiB",
        r"^🎯 학습 시작!$", rf"^🔢 프로세스 ID: {pid}$", rf"^  ps -p {pid} +# ", rf"^  kill {pid} +# 학습 중단\n\n",
        r"^📋 초기 로그 출력 \(5초간\):\n-{40}\n(?!-).+\n", r"^-{40}$",
    ]  # fmt: skip
    assert_in_order(finished_run.console, phrases)


def test_the_example_of_readme_shows_what_a_test_run_prints(finished_run: SimpleNamespace) -> None:
    printed = map(comparable, (finished_run.console + finished_run.place.console()).splitlines())
    examples = code_blocks(section("기본 테스트 (10스텝, 백그라운드)"), "")
    lines = [line for line in "".join(examples).splitlines() if line != "(…)"]
    assert len(lines) > 40
    assert [line for line in lines if comparable(line) not in printed] == []  # one after the other


def test_the_console_log_tells_the_run(finished_run: SimpleNamespace) -> None:
    phrases = [r"^🚀 초기 모델 저장 중\.\.\.$", r"^✅ 초기 모델 저장 완료: \./outputs/initial_model$"]
    phrases += [r"^🚀 학습 시작!\n테스트 모드: True\n최대 스텝: 10$"]
    phrases += [rf"^스텝 {step}/10 \| 손실 \d" for step in range(1, 11)]
    phrases += [r"^✅ 체크포인트 저장 완료: \./outputs/checkpoint-10 ", r"^✅ 학습 완료!"]
    assert_in_order(finished_run.place.console(), phrases)
    assert "Traceback" not in finished_run.place.console()


def test_a_finished_run_leaves_the_files_of_the_documents(finished_run: SimpleNamespace) -> None:
    place = finished_run.place
    found = {str(path.relative_to(place.folder)) for path in place.folder.rglob("*") if path.is_file()}
    expected = {f"outputs/initial_model/{name}" for name in MODEL_FILES | {"model_info.json"}}
    expected |= {f"outputs/checkpoint-10/{name}" for name in MODEL_FILES | {"training_info.json"}}
    expected |= {f"logs/training{kind}_rank_{rank}.log" for kind in ("", "_detail") for rank in (0, 1)}
    expected |= {"logs/training_console.log", "outputs/metrics.jsonl", "outputs/run_info.json"}
    assert expected <= found
    assert (place.outputs / "training.log").resolve() == place.console_log.resolve()
    assert (place.outputs / "training.log").read_text(encoding="utf-8") == place.console()
    assert [path.name for path in place.checkpoints()] == ["checkpoint-10"]


def test_the_tree_of_readme_shows_every_file_that_a_run_leaves(finished_run: SimpleNamespace) -> None:
    place, told = finished_run.place, without_numbers(section("파일 구조"))
    left = [path.relative_to(place.folder) for path in place.folder.rglob("*")]
    always = {path.rstrip("/") for path, always in tree() if always and path.startswith(("outputs/", "logs/"))}
    assert {*map(without_numbers, always)} <= {without_numbers(str(path)) for path in left}
    for path in left:
        if path.parts[0] in ("outputs", "logs") and path.name[0] != "." and "tensorboard" not in path.parent.parts:
            assert without_numbers(path.name) in told, path


def test_the_fields_of_metrics_in_readme_are_those_of_a_run(finished_run: SimpleNamespace) -> None:
    records = read_metrics(finished_run.place.folder)
    step, evaluation = (re.findall(r"`(\w+)`", row[1]) for row in tables(section("metrics.jsonl"))[0][1:])
    assert step == list(records[0])
    figures = [name for name in evaluation if name.startswith("val_")]
    languages = [name for name in evaluation if name.startswith("_")]
    assert {*records[-1]} == {"step", *figures, *(figure + language for figure in figures for language in languages)}


def test_the_pid_file_and_the_status_tell_a_living_and_a_finished_run(finished_run: SimpleNamespace) -> None:
    assert finished_run.alive
    assert not finished_run.place.pid_file.exists()
    code, content = finished_run.status
    assert (code, content["state"]) == (0, "running")
    code, content = finished_run.status_afterwards
    assert code == 3
    assert (content["state"], content["step"], content["total_steps"]) == ("finished", 10, 10)
    assert content["last_checkpoint"] == str(finished_run.place.outputs / "checkpoint-10")
    assert isinstance(content["loss"], float)
    assert_in_order(finished_run.status_text, ["완료", "10 / 10", "손실", "checkpoint-10"])
    assert finished_run.place.info()["state"] == "finished"
    assert notified(finished_run.place) == "finished"


@pytest.mark.parametrize("which", ["second", "third"])
def test_a_second_start_in_the_same_logs_or_outputs_is_refused_naming_the_pid(finished_run, which: str) -> None:
    answer = getattr(finished_run, which)
    assert answer.code == 1
    (complaint,) = answer.complaints
    assert f"PID {finished_run.pid}" in complaint
    assert not finished_run.other_logs.exists()


@pytest.fixture(scope="module")
def killed_run(tmp_path_factory: pytest.TempPathFactory, warm_cache: Path) -> Iterator[SimpleNamespace]:
    """A run started on a terminal that hangs up, then asked to end by ``kill $(cat training.pid)``."""
    with new_place(tmp_path_factory, "place", warm_cache) as place:
        terminal = Terminal(place, *LONG_RUN.split(), *notifying(place))
        terminal.wait_for_text("초기 로그 출력")
        place.wait("the first log", lambda: place.console_log.stat().st_size)
        terminal.hang_up()
        seen = SimpleNamespace(place=place, pid=place.pid())
        place.wait("the launcher's end", lambda: terminal.process.poll() is not None, 20)
        place.wait_for_step()
        for pid in place.processes():  # a hang-up may also be sent to all of them
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGHUP)
        step = last_step(place)
        place.wait("ten more steps", lambda: last_step(place) > step + 10)
        seen.alive, seen.status = process_is_alive(seen.pid), status(place)
        # The launcher's five seconds of log may outlast its terminal; only the run itself is meant below.
        place.wait(
            "the end of the log's display", lambda: not any("tail" in text for text in place.processes().values()), 20
        )
        seen.before = set(place.processes())
        seen.second = place.run(*LONG_RUN.split())
        seen.after = set(place.processes())
        begun = time.monotonic()
        os.kill(int(place.pid_file.read_text()), signal.SIGTERM)
        place.wait_for_end(90)
        seen.seconds = time.monotonic() - begun
        seen.status_afterwards = status(place)
        yield seen


def test_a_hang_up_of_the_terminal_and_a_second_start_do_not_disturb_a_run(killed_run: SimpleNamespace) -> None:
    assert killed_run.alive
    code, content = killed_run.status
    assert (code, content["state"]) == (0, "running")
    assert content["step"] >= 1
    assert f"PID {killed_run.pid}" in killed_run.second.complaints[0]
    assert killed_run.after == killed_run.before
    assert not list(killed_run.place.logs.glob("training_console.log.*")), "its console log was rotated away"


def test_kill_ends_every_process_with_a_whole_checkpoint_of_the_last_step(killed_run: SimpleNamespace) -> None:
    place = killed_run.place
    assert killed_run.seconds < 60
    assert not place.pid_file.exists()
    assert_whole_checkpoint(place, last_step(place))
    assert place.info()["state"] == "stopped"
    code, content = killed_run.status_afterwards
    assert (code, content["state"]) == (3, "stopped")
    assert content["last_checkpoint"] == str(place.checkpoints()[-1])
    assert notified(place) == "stopped"
    assert "Traceback" not in place.console()
    assert "❌" not in place.console()
    assert_in_order(place.console(), ["🛑 중단 요청", "💾 체크포인트", "✅ 체크포인트", "🛑 학습을 중단"])


def test_ctrl_c_in_the_foreground_saves_and_ends_with_130(place: Place, warm: None) -> None:
    terminal = Terminal(place, *LONG_RUN.split(), "--foreground")
    place.wait_for_step()
    assert process_is_alive(place.pid())
    terminal.press("\x03")
    assert terminal.wait_for_exit() == 130, terminal.text
    place.wait_for_end(10)
    assert "Traceback" not in terminal.text
    assert "스텝 1/" in terminal.text
    assert place.info()["state"] == "stopped"
    assert_whole_checkpoint(place, last_step(place))
    assert not place.pid_file.exists()


def test_kill_in_the_first_second_is_a_stop_too(place: Place, warm: None) -> None:
    launcher = place.start(*LONG_RUN.split(), *notifying(place))
    pid = place.pid()
    os.kill(pid, signal.SIGTERM)
    console = place.finish(launcher)[0]
    place.wait_for_end(60)
    assert notified(place) == "stopped"
    assert launcher.returncode == 0, console
    assert "❌" not in console
    assert not place.pid_file.exists()


def test_a_stop_in_the_last_step_is_a_finish(place: Place, warm: None) -> None:
    # torchrun ends with an error after any signal: the run itself has to be believed.
    options = [*LONG_RUN.split(), "--max-steps", "1", "--gradient-accumulation-steps", "60", "--no-save-initial"]
    launcher = place.start(*options, "--foreground", *notifying(place))
    place.wait("the training loop", lambda: place.console_log.exists() and "최대 스텝" in place.console())
    os.kill(place.pid(), signal.SIGTERM)
    console = place.finish(launcher)[0]
    assert "🛑 중단 요청" in console
    assert_whole_checkpoint(place, 1)
    assert place.info()["state"] == "finished"
    assert notified(place) == "finished"
    assert launcher.returncode == 0
    assert "❌" not in console


def test_a_foreground_run_outlives_its_terminal_and_a_second_signal_ends_it_at_once(place, warm) -> None:
    # A step that takes minutes, so that the second signal comes before its end.
    options = [*LONG_RUN.split(), "--gradient-accumulation-steps", "20000", *notifying(place)]
    terminal = Terminal(place, *options, "--foreground")
    place.wait("the training loop", lambda: place.console_log.exists() and "최대 스텝" in place.console())
    terminal.hang_up()
    place.wait("the shell's end", lambda: terminal.process.poll() is not None, 10)
    pid, agents = place.pid(), place.agents()
    assert process_is_alive(pid)
    assert len(agents) == 1
    os.kill(pid, signal.SIGTERM)
    place.wait("the answer to the first signal", lambda: "🛑 중단 요청" in place.console(), 10)
    assert place.agents() == agents, "a first signal waits for the step's end"
    os.kill(pid, signal.SIGTERM)
    place.wait_for_end(10)
    assert notified(place) == "stopped"
    assert place.info()["state"] == "stopped"
    assert not place.checkpoints()
    assert not place.pid_file.exists()


def assert_saves_and_ends(place: Place, *killed: int) -> None:
    """Kill -9 these processes of a run after its first step; its ranks save and leave."""
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    assert status(place)[0] == 1, "a dead run with a PID file"
    place.wait_for_end(60)
    code, content = status(place)
    assert code == 1
    assert content["state"] in ("stopped", "failed")
    assert_whole_checkpoint(place, last_step(place))


def test_a_run_that_ctrl_c_left_at_its_first_log_ends_after_kill_9_and_of_two_next_starts_one_runs(place, warm) -> None:
    terminal = Terminal(place, *ENDLESS_TEST.split())
    terminal.wait_for_text("초기 로그 출력")
    place.wait("the first log", lambda: place.console_log.stat().st_size)
    terminal.press("\x03")
    assert terminal.wait_for_exit(3) == 0, "before the five seconds are over"
    assert "백그라운드에서 계속 실행 중" in terminal.text
    place.wait("a step", lambda: "스텝 1/" in place.console())
    assert_saves_and_ends(place, place.pid(), *place.agents())

    command = place.command(*ENDLESS_TEST.split())
    one_shell = '"$@" >first 2>&1 & one=$!; "$@" >second 2>&1 & two=$!; wait $one; echo $?; wait $two; echo $?'
    command["args"] = ["bash", "-c", one_shell, "bash", *command["args"]]
    answer = place.execute(command)
    shown = [(place.folder / name).read_text(encoding="utf-8") for name in ("first", "second")]
    assert sorted(answer.out.split()) == ["0", "1"], "\n".join(shown)
    if answer.out.split() == ["1", "0"]:
        shown.reverse()
    running, refused = shown
    assert f"🔢 프로세스 ID: {place.pid()}" in running
    assert f"❌ 이미 실행 중인 학습이 있습니다 (PID {place.pid()})" in refused
    assert len(place.agents()) == 1
    place.wait("a step of this run", lambda: "스텝 1/" in place.console())
    assert status(place)[0] == 0
    assert_saves_and_ends(place, place.pid())  # without its supervisor alone


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A test run among what an earlier run left: its console log, and a PID file that names a foreign process."""
    with new_place(tmp_path_factory, "한글 폴더 (1)") as place:
        place.environment["LC_ALL"] = "C"
        write_corpus(place.folder / "데이터 셋" / "말뭉치 1.jsonl", documents(300))
        place.logs.mkdir()
        place.console_log.write_text("이전 학습의 로그\n", encoding="utf-8")
        bystander = subprocess.Popen(["sleep", "300"])
        place.pid_file.write_text(f"{bystander.pid}\n")
        seen = SimpleNamespace(place=place, bystander=bystander, status=status(place))
        try:
            options = "--test --num-gpus 1 --max-steps 2 --vocab-size 512 --max-seq-length 64"
            seen.arguments = [*options.split(), "--dataset-path", "데이터 셋/말뭉치 1.jsonl"]
            seen.answer = place.run(*seen.arguments)
            place.wait_for_end()
            seen.info = place.info()
            seen.bystander_lives = bystander.poll() is None
            yield seen
        finally:
            bystander.kill()
            bystander.wait()


@pytest.fixture(scope="module")
def second_run(first_run: SimpleNamespace) -> SimpleNamespace:
    """A training run in the same directories as the test before it."""
    place = first_run.place
    first_run.console = place.console()
    options = "--train --device cpu --model-size tiny --vocab-size 512 --max-seq-length 64 --max-steps 3"
    arguments = [*options.split(), "--num-gpus", "1", "--gradient-accumulation-steps", "1", *first_run.arguments[-2:]]
    answer = place.run(*arguments, "--foreground", *notifying(place))
    return SimpleNamespace(place=place, answer=answer, arguments=arguments, files=list_tree(place.folder))


def test_a_run_works_with_hangul_in_the_c_locale_and_hurts_no_process_of_a_stale_pid_file(first_run) -> None:
    assert first_run.status[0] == 1
    assert first_run.answer.code == 0, first_run.answer.text
    assert "✅ 데이터셋 확인 완료: 1개 파일" in first_run.answer.out
    assert "✅ 학습 완료!" in (first_run.place.logs / "training_rank_0.log").read_text(encoding="utf-8")
    assert first_run.bystander_lives
    assert not first_run.place.pid_file.exists()


def test_the_command_that_run_info_keeps_can_be_pasted_anywhere(first_run: SimpleNamespace, tmp_path: Path) -> None:
    place, line = first_run.place, first_run.info["command"]
    typed = place.command(*first_run.arguments)
    assert shlex.split(line) == ["cd", str(place.folder), "&&", *typed["args"]]
    again = {"args": ["bash", "-c", f"{line} --dry-run"], "cwd": tmp_path, "env": typed["env"]}
    answer = place.execute(again)
    assert answer.code == 0, answer.text
    assert "✅ 데이터셋 확인 완료: 1개 파일" in answer.out


def test_a_training_run_replaces_what_a_test_left(second_run: SimpleNamespace) -> None:
    assert second_run.answer.code == 0, second_run.answer.text
    assert [path.name for path in second_run.place.checkpoints()] == ["checkpoint-3"]
    info = second_run.place.info()
    assert (info["mode"], info["state"]) == ("train", "finished")
    assert notified(second_run.place) == "finished"


def test_the_console_logs_of_earlier_runs_are_kept(first_run: SimpleNamespace, second_run: SimpleNamespace) -> None:
    logs = sorted(second_run.place.logs.glob("training_console.log.*"))
    assert [path.read_text(encoding="utf-8") for path in logs] == ["이전 학습의 로그\n", first_run.console]
    assert "최대 스텝: 3" in second_run.place.console()


@pytest.mark.parametrize("mode", ["--train", "--test"])
def test_a_start_over_a_training_run_is_refused_and_loses_nothing(second_run: SimpleNamespace, mode: str) -> None:
    arguments = [item for item in second_run.arguments if item not in ("--train", "--test")]
    answer = second_run.place.run(*arguments, mode)
    assert answer.code == 1, answer.text
    assert "--train --resume 이나 다른 --output-dir" in answer.complaints[0]
    assert list_tree(second_run.place.folder) == second_run.files


def test_a_run_that_fails_at_its_start_is_reported_with_its_error(place: Place) -> None:
    data = write_corpus(place.folder / "bad.jsonl", documents(60))
    data.write_text("\n{no json\n".join([*data.read_text(encoding="utf-8").splitlines(), ""]), encoding="utf-8")
    answer = place.run("--test", "--num-gpus", "1", "--dataset-path", str(data), *notifying(place))
    assert answer.code == 1, answer.text
    assert "시작하자마자 실패" in answer.complaints[-1]
    assert_in_order(answer.out, ["초기 로그 출력", r"❌ .*120줄.*60줄.*1%", r"bad\.jsonl:2: ", r"bad\.jsonl:4: "])
    assert "Traceback" not in answer.text
    place.wait_for_end(10)
    assert notified(place) == "failed"
    assert place.info()["state"] == "failed"
    assert not place.pid_file.exists()
    code, content = status(place)
    assert (code, content["state"]) == (3, "failed")
    assert "1%" in content["error"]


def test_a_run_that_dies_before_its_first_line_is_reported_with_its_error(place: Place, tmp_path: Path) -> None:
    body = f"""
if [[ "$*" == *torch.distributed.run* ]]; then
  echo 'ImportError: libcudart.so.12: cannot open shared object file' >&2
  exit 1
fi
exec '{sys.executable}' "$@"
"""
    python = write_program(tmp_path / "bin" / "python3", body)
    answer = place.run("--test", "--python", str(python), *notifying(place))
    assert answer.code == 1, answer.text
    assert "시작하자마자 실패" in answer.complaints[-1]
    assert "libcudart.so.12" in answer.text
    assert notified(place) == "failed"
    assert not place.pid_file.exists()
    place.wait_for_end(10)


def test_a_full_disk_of_the_logs_does_not_end_the_supervisor() -> None:
    text = f"source '{LAUNCHER}'; log 1 >/dev/full; warn 2 2>/dev/full; echo alive"
    assert subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=False).stdout == "alive\n"
