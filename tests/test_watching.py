"""What a person looks at: status, the followed log, curves, trackers, samples, the time a run will take."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.utils import LoggerType
from conftest import LONG_RUN, SCRIPT, Place, Terminal, assert_in_order, cleaned
from samples import config, read_metrics, tiny_run

import train_h100_dual as t

RECORD = {"step": 100, "loss": 3.25, "learning_rate": 1e-3, "grad_norm": 0.5}
RECORD |= {"tokens_per_second": 98_512.0, "mfu": 0.45, "memory_gb": 61.2, "seconds": 50.0}
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


def records(*steps: int) -> list[dict]:
    """Logged steps of a run that takes half a second a step."""
    return [{**RECORD, "step": step, "seconds": step / 2} for step in steps]


def write_run(folder: Path, lines: list[dict], **info: object) -> t.TrainConfig:
    """The files that a run of this state leaves, and its options."""
    cfg = config(folder)
    cfg.output_dir.mkdir(parents=True)
    cfg.logs_dir.mkdir(parents=True)
    add_lines(cfg.output_dir / "metrics.jsonl", *map(json.dumps, lines))
    known = {"state": "running", "total_steps": 1000, "first_step": 0, "run_id": "77-1", "world_size": 1}
    (cfg.output_dir / "run_info.json").write_text(json.dumps({**known, "machine": {}, **info}))
    (cfg.logs_dir / "training.pid").write_text("77\n")
    return cfg


def add_lines(path: Path, *lines: str) -> None:
    with open(path, "a", encoding="utf-8") as stream:
        stream.write("".join(line + "\n" for line in lines))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> SimpleNamespace:
    """A tiny run in this process that samples and evaluates at every step, with its curves in TensorBoard."""
    folder = tmp_path_factory.mktemp("trained")
    run = tiny_run(folder, "--sample-steps", "2", "--eval-steps", "2", "--save-steps", "100")
    t.set_up_logging(run.cfg, 0)
    state = t.TrainState()
    t.start_trackers(run, state)
    t.train(run, state)
    run.accelerator.end_training()
    run.accelerator.trackers.clear()
    run.saver.busy(None)
    return SimpleNamespace(folder=folder, run=run, log=(folder / "logs/training_rank_0.log").read_text())


def test_the_lines_of_a_step_fit_80_columns_also_with_large_numbers(trained, monkeypatch, caplog, tmp_path):
    caplog.set_level("INFO")
    monkeypatch.setattr(trained.run, "total_steps", 1_234_567)
    monkeypatch.setattr(trained.run, "cfg", config(tmp_path))
    trained.run.cfg.output_dir.mkdir()
    log = t.StepLog(trained.run, t.TrainState(step=1_199_990))
    log.peak = 1e3
    log.recent.append({**RECORD, "step": 1, "seconds": -9e6})
    log.handle(1_200_000, time.monotonic() + 1e-3, 12.3456, 1234.5)
    assert len(caplog.messages) == 2
    assert re.search(r"남은 시간 [\d,]+일 ", caplog.messages[1])
    assert all(t.display_width(line) <= 80 for line in caplog.messages)


def test_what_a_full_disk_does_not_take_is_written_with_the_next_line(trained, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(trained.run, "cfg", config(tmp_path))
    path = tmp_path / "outputs" / "metrics.jsonl"
    path.parent.mkdir()
    path.symlink_to("/dev/full")
    log = t.StepLog(trained.run, t.TrainState())
    log.write({"step": 1, "loss": 3.0})
    assert "다음에 다시 씁니다" in caplog.text
    path.unlink()
    log.write({"step": 2, "loss": float("nan")})
    log.write({"step": 3, "loss": 1.0})
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(1, 3.0), (2, None), (3, 1.0)]


def test_every_line_of_a_run_fits_80_columns(trained):
    lines = [re.sub(r"^\S+ \S+ [A-Z]+ h100_dual: ", "", line) for line in trained.log.splitlines()]
    lines = [line for line in lines if not line.startswith("     ")]  # samples
    assert len(lines) > 10
    assert [line for line in lines if t.display_width(line) > 80] == []


@pytest.fixture
def alive(monkeypatch):
    """Let the supervisor of the PID file live."""
    monkeypatch.setattr(t, "find_supervisor", lambda cfg: (cfg.logs_dir / "training.pid").read_text().strip())


def test_only_the_end_of_long_metrics_is_read(tmp_path):
    cfg = write_run(tmp_path, records(*range(1, 1001)))
    found = t.read_metrics(cfg.output_dir, 10_000)
    assert 20 < len(found) < 100
    assert found[-1]["step"] == 1000


def test_a_status_tells_everything_that_is_known(tmp_path, alive, capsys):
    validation = {"step": 100, "val_bits_per_byte": 1.2, "val_bits_per_byte_ko": 0.9, "val_bits_per_byte_en": 1.5}
    counts = {"restarts": 1, "skipped_steps": 3, "failed_saves": 2}
    cfg = write_run(tmp_path, [*records(90, 100), validation], **counts)
    (cfg.output_dir / "checkpoint-90").mkdir()
    status = t.run_status(cfg)
    assert (status["state"], status["pid"], status["step"], status["total_steps"]) == ("running", 77, 100, 1000)
    assert (status["loss"], status["mfu"], status["val_bits_per_byte_ko"]) == (3.25, 0.45, 0.9)
    assert status["seconds_left"] == pytest.approx(450)
    assert [status[name] for name in ("skipped_steps", "restarts", "failed_saves")] == [3, 1, 2]
    assert t.print_status(cfg, as_json=False) == 0
    shown = capsys.readouterr().out
    phrases = [r"실행 중 \(PID 77\)", "100 / 1,000", "0:07:30", "3.2500", "1.2000", "98,512 토큰/s", "45.0%", "61.2 GB"]
    phrases += ["재시작: +1번", "저장: +2번", "스텝: +3번", "체크포인트: +checkpoint-90$"]
    assert_in_order(shown, phrases)
    values = [re.match(r"   • [^:]+: +", line)[0] for line in shown.splitlines()[1:]]
    assert len({t.display_width(head) for head in values}) == 1, "the values stand below each other"
    assert max(map(t.display_width, shown.splitlines())) <= 80


def test_a_stop_that_is_under_way_is_told(tmp_path, alive, monkeypatch, capsys):
    cfg = write_run(tmp_path, records(10), stop_requested="2026-01-01T00:00:00+0900")
    assert t.print_status(cfg, as_json=False) == 0
    assert "상태: 멈추는 중 (PID 77)" in capsys.readouterr().out
    monkeypatch.undo()
    assert not t.run_status(cfg)["stopping"], "it died of it"


def test_a_status_does_not_tell_of_an_earlier_run_while_the_new_one_starts(tmp_path, alive):
    cfg = write_run(tmp_path, records(90, 100), run_id="66-1", state="finished")
    (cfg.output_dir / "checkpoint-100").mkdir()
    status = t.run_status(cfg)
    assert [status[name] for name in ("state", "step", "loss", "last_checkpoint")] == ["running", None, None, None]
    (cfg.output_dir / "run_info.json").unlink()
    (cfg.logs_dir / "training.pid").write_text("")
    assert t.run_status(cfg)["last_checkpoint"].endswith("checkpoint-100"), "nothing runs, and this is what there is"


def test_a_run_that_died_without_a_word_is_told_as_failed_and_one_without_a_launcher_as_running(tmp_path):
    cfg = write_run(tmp_path, records(10), run_id="none-54")
    with t.lock_output(cfg.output_dir, "w") as lock:  # as rank 0 does under torchrun
        print(os.getpid(), end="", file=lock, flush=True)
        assert [t.run_status(cfg)[name] for name in ("state", "pid", "step")] == ["running", os.getpid(), 10]
        assert t.print_status(cfg) == 0
        with subprocess.Popen("true") as dead:
            os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)  # and it stays a zombie
            lock.truncate(0)
            os.pwrite(lock.fileno(), str(dead.pid).encode(), 0)
            assert t.run_status(cfg)["state"] == "failed", "a supervisor that was killed: its ranks are about to go"
    assert [t.run_status(cfg)[name] for name in ("state", "pid")] == ["failed", None]


@pytest.fixture
def supervised(place: Place) -> Iterator[SimpleNamespace]:
    """What a run at step 100 leaves, with a process that holds the logs' lock in its supervisor's place."""
    place.environment["TERM"] = "xterm"
    place.logs.mkdir()
    lock, heard = place.logs / ".training.lock", place.folder / "signals"
    body = 'trap "echo TERM >>\'$1\'" TERM; exec 9>>"$0"; while echo ready; do read -rt 60; done'
    command = ["bash", "-c", body, str(lock), str(heard)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        cfg = write_run(place.folder / "run", records(90, 100), run_id=f"{process.pid}-1")
        shutil.copytree(cfg.output_dir, place.outputs)
        place.pid_file.write_text(f"{process.pid}\n")
        add_lines(place.console_log, "first", *map(str, range(9)), "스텝 100/1,000 | 손실 3.2500")
        yield SimpleNamespace(place=place, process=process, heard=heard, info=place.info())
        process.kill()


def test_a_terminal_shows_the_log_with_a_bar_below_it(supervised):
    place = supervised.place
    terminal = Terminal(place, "--follow")
    terminal.wait_for_text("]  10.0% 100/1,000  손실 3.2500  98,512 토큰/s  0:07:30 남음")
    assert "first" not in terminal.text, "ten lines are enough to know where it is"
    add_lines(place.outputs / "metrics.jsonl", json.dumps({**RECORD, "loss": None, "step": 200, "seconds": 100}))
    with open(place.console_log, "a") as log:
        log.write("half a ")
        log.flush()
        time.sleep(0.5)
        assert "half" not in terminal.text
        log.write("line\n")
    terminal.wait_for_text("]  20.0% 200/1,000  손실 -  98,512 토큰/s  0:06:40 남음")
    t.update_run_info(place.outputs, stop_requested="now")
    add_lines(place.console_log, "🛑 중단 요청")
    terminal.wait_for_text("멈추는 중")
    t.update_run_info(place.outputs, state="stopped")
    supervised.process.kill()
    supervised.process.wait()
    assert terminal.wait_for_exit(20) == 130
    assert re.search(r"남음 *\r +\rhalf a line\n\r\[=", terminal.text)
    assert re.search(r"\r +\r$", terminal.text), "the bar goes"
    assert max(map(t.display_width, re.split(r"[\n\r]", terminal.text))) <= 80


@pytest.mark.parametrize("told", ["its state", "the log"])
def test_stop_typed_twice_waits_for_the_save_instead_of_ending_it(supervised, told):
    place = supervised.place
    if told == "the log":  # as where only --logs-dir is typed
        add_lines(place.console_log, "🛑 중단 요청: 현재 스텝을 마치고 저장합니다")
    else:
        t.update_run_info(place.outputs, stop_requested="now")
    stop = place.start("--stop")
    place.wait("the message", lambda: "이미 멈추는 중입니다" in stop.stdout.readline())
    t.update_run_info(place.outputs, state="stopped")
    supervised.process.kill()
    supervised.process.wait()
    assert "중단됨" in place.finish(stop, 20)[0]
    assert stop.returncode == 0
    assert not supervised.heard.exists()


@pytest.mark.parametrize("machine", [0, 1])
def test_a_stop_before_the_run_has_begun_is_a_stop_and_not_the_state_of_an_earlier_run(supervised, machine):
    place = supervised.place
    t.update_run_info(place.outputs, run_id="66-1", state="stopped" if machine else "failed")
    for path in [*place.logs.iterdir()] if machine else []:
        path.rename(path.with_stem(f"{path.stem}_node_{machine}"))
    several = ["--nnodes", "2", "--node-rank", str(machine), "--rdzv-endpoint", "127.0.0.1:29500"]
    stop = place.start("--stop", *several)
    place.wait("the signal", supervised.heard.exists)
    supervised.process.kill()
    supervised.process.wait()
    shown = place.finish(stop, 20)[0]
    # The run's files are the first machine's: what another one finds there is this run's, of another supervisor.
    assert ("시작되기 전에 중단했습니다" in shown, "상태: 중단됨" in shown) == (machine == 0, machine == 1)
    assert (stop.returncode, "실패" in shown) == (0, False)


def test_a_bar_stands_at_its_beginning_until_the_run_has_logged_a_step(supervised):
    place = supervised.place
    t.update_run_info(place.outputs, run_id="66-1")  # the files are still an earlier run's
    terminal = Terminal(place, "--follow")
    terminal.wait_for_text("]   0.0% 시작하는 중")
    assert "100/1,000  손실" not in terminal.text


def test_a_run_whose_log_was_removed_is_watched_and_stopped(supervised):
    place = supervised.place
    place.console_log.unlink()
    stop = place.start("--stop")
    place.wait("the signal", supervised.heard.exists)
    t.update_run_info(place.outputs, state="stopped")
    supervised.process.kill()
    supervised.process.wait()
    assert_in_order(place.finish(stop, 20)[0], ["🛑 중단 요청", "상태: 중단됨"])
    assert stop.returncode == 0


def test_a_status_is_told_whatever_encoding_the_environment_asks_for(place):
    place.environment |= {"PYTHONIOENCODING": "ascii:strict", "LC_ALL": "C"}
    answer = place.run("--status")
    assert answer.code == 3
    assert "📊 상태: 기록 없음" in answer.out
    assert not list(place.folder.iterdir())


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory, warm_cache: Path) -> Iterator[SimpleNamespace]:
    """A background run, followed on a terminal and without one, left by Ctrl-C, and stopped."""
    for place in cleaned(Place(tmp_path_factory.mktemp("session") / "place", cache=warm_cache)):
        seen = SimpleNamespace(place=place, before=place.run("--follow"))
        place.environment["TERM"] = "xterm"
        seen.start = place.run(*LONG_RUN.split())
        piped = place.start("--follow")
        terminal = Terminal(place, "--follow")
        terminal.wait_for_text("남음")
        terminal.press("\x03")
        seen.left = terminal.wait_for_exit(20)
        seen.shown = terminal.text
        seen.alive = place.run("--status", "--json")
        elsewhere = place.command("--status", "--json")
        elsewhere["args"] += ["--logs-dir", str(place.folder / "other logs")]
        seen.elsewhere = place.execute(elsewhere)
        watching = Terminal(place, "--follow")
        watching.wait_for_text("남음")
        stopping = place.run("--stop")
        seen.stop, seen.watched = stopping, watching.wait_for_exit(20)
        seen.watched_text = watching.text
        seen.piped_text, seen.piped = place.finish(piped, 20)[0], piped.returncode
        yield seen


def test_following_where_nothing_runs_says_so(session):
    assert session.before.code == 3
    assert re.search(r"로 실행 중인 학습이 없습니다: .*logs$", session.before.out, re.M)


def test_ctrl_c_leaves_the_followed_run_alone_which_is_told_also_to_whoever_names_other_logs(session):
    assert session.left == 0
    assert re.search(r"학습은 계속됩니다 \(PID \d+\)", session.shown)
    assert "Traceback" not in session.shown
    assert session.alive.code == 0
    here, there = json.loads(session.alive.out), json.loads(session.elsewhere.out)
    assert (here["state"], session.elsewhere.code) == ("running", 0)
    assert [there[name] for name in ("state", "pid", "started")] == [here[name] for name in ("state", "pid", "started")]


def test_stop_waits_and_shows_the_save(session):
    assert session.stop.code == 0
    phrases = ["🛑 중단 요청", "💾 체크포인트 저장 중", "✅ 체크포인트 저장 완료", "상태: 중단됨"]
    assert_in_order(session.stop.out, phrases)
    assert session.place.checkpoints()
    saved, shown = (re.search(text, session.stop.out)[1] for text in (r"outputs/checkpoint-(\d+)", r"스텝: +([\d,]+)"))
    assert saved == shown.replace(",", "")


def test_following_ends_with_the_run_and_its_exit_code_and_no_log_holds_a_control_character(session):
    assert session.watched == session.piped == 130
    for text in (session.watched_text, session.piped_text):
        assert "🛑 학습을 중단했습니다" in text
    assert session.place.console().endswith(session.piped_text[-500:]), "without a terminal it is shown as it is"
    assert not CONTROL.search(session.piped_text)
    texts = [path.read_text(encoding="utf-8") for path in session.place.logs.glob("*.log")]
    assert len(texts) >= 3
    assert [CONTROL.findall(text) for text in texts] == [[]] * len(texts)


def test_the_foreground_draws_a_bar_on_the_terminal_and_none_in_the_log(place: Place, warm_cache: Path) -> None:
    place.cache = warm_cache
    place.environment["TERM"] = "xterm"
    terminal = Terminal(place, *LONG_RUN.split(), "--foreground", "--max-steps", "60")
    assert terminal.wait_for_exit(120) == 0, terminal.text + place.report()
    assert re.search(r"\r\[=*-*\] +[\d.]+% [\d,]+/60  손실 \d", terminal.text)
    assert not CONTROL.search(place.console())
    shown = re.sub(r"\r[^\n\r]*(?=\r)", "", terminal.text).replace("\r", "")
    assert shown[shown.index("🎯 학습 시작!\n") :].removeprefix("🎯 학습 시작!\n") == place.console()


def draw(folder: Path) -> bytes:
    command = [sys.executable, "-W", "error", str(SCRIPT), "internal:curves", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return (folder / "training_curves.png").read_bytes()


def test_curves_are_drawn_of_whatever_is_known(tmp_path):
    pictures = []
    unknown = {"loss": None, "mfu": None, "grad_norm": None}
    validation = {"step": 50, "val_bits_per_byte": 1.2, "val_bits_per_byte_ko": 0.9, "val_bits_per_byte_en": None}
    for number, lines in enumerate(([RECORD], [{**RECORD, **unknown}], [*records(*range(1, 200)), validation])):
        cfg = write_run(tmp_path / str(number), lines, options={"model_size": "tiny"})
        pictures.append(draw(cfg.output_dir))
    assert len(set(pictures)) == 3
    size = [int.from_bytes(pictures[0][at : at + 4], "big") for at in (16, 20)]
    assert size == [1600, 1200]


def test_the_run_draws_its_curves_without_waiting(tmp_path):
    cfg = write_run(tmp_path, records(*range(1, 50)))
    run = SimpleNamespace(cfg=cfg, painter=None)
    t.draw_curves_beside(run)
    first = run.painter
    t.draw_curves_beside(run)
    assert run.painter is first, "one at a time"
    assert first.poll() is None
    t.draw_curves_beside(run, wait=True)
    assert run.painter is not first
    assert (cfg.output_dir / "training_curves.png").stat().st_size > 10_000


def test_a_drawing_that_fails_is_said_and_training_goes_on(tmp_path, caplog):
    cfg = write_run(tmp_path, [])
    (cfg.output_dir / "training_curves.png").mkdir()
    t.draw_curves_beside(SimpleNamespace(cfg=cfg, painter=None), wait=True)
    assert "학습 곡선을 그리지 못했습니다" in caplog.text
    assert "training_curves.png" in (cfg.logs_dir / "training_detail_rank_0.log").read_text()


def tensorboard_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard would show: values by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(item.step, item.value) for item in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_holds_the_figures_of_the_metrics(trained):
    found = tensorboard_events(trained.folder / "logs/tensorboard/h100_dual")
    lines = read_metrics(trained.folder)
    for name in ("loss", "learning_rate", "grad_norm", "tokens_per_second"):
        expected = [(line["step"], pytest.approx(line[name], rel=1e-5)) for line in lines if name in line]
        assert found[f"train/{name}"] == expected
    expected = [(line["step"], line["val_bits_per_byte_ko"]) for line in lines if "val_loss" in line]
    assert found["validation/bits_per_byte_ko"] == [(step, pytest.approx(value)) for step, value in expected]


# A run that is killed after step 6 and goes on from step 3, and one that takes the place of another.
@pytest.mark.parametrize(("first", "last", "kept"), [(4, 8, 3), (1, 2, 0)])
def test_a_resumed_run_writes_no_point_twice_and_a_new_one_begins_anew(tmp_path, first, last, kept):
    run = tiny_run(tmp_path)
    for loss, begin, end in ((1.0, 1, 6), (2.0, first, last)):
        t.start_trackers(run, t.TrainState(step=begin - 1))
        for step in range(begin, end + 1):
            run.accelerator.log({"train/loss": loss}, step)
        run.accelerator.end_training()
        run.accelerator.trackers.clear()
    (values,) = tensorboard_events(tmp_path / "logs/tensorboard/h100_dual").values()
    assert values == [(step, 1.0 if step <= kept else 2.0) for step in range(1, last + 1)]


@pytest.mark.parametrize("broken", ["start", "log"])
def test_a_tracker_that_fails_ends_tracking_and_is_said_once(tmp_path, caplog, monkeypatch, broken):
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    run = tiny_run(tmp_path)
    if broken == "start":
        monkeypatch.setattr(run.accelerator, "init_trackers", fail)
    t.start_trackers(run, t.TrainState())
    if broken == "log":
        run.accelerator.trackers[0].log = fail
    log = t.StepLog(run, t.TrainState())
    for step in (1, 2):
        log.write({"step": step, "loss": 1.0})
    assert len(read_metrics(tmp_path)) == 2
    assert caplog.text.count("--report-to 기록에 실패해") == 1


def test_what_is_not_installed_is_left_out_and_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    caplog.set_level("INFO")
    cfg = config(tmp_path, "--device", "cpu", "--report-to", "tensorboard,wandb")
    assert [str(name) for name in t.build_accelerator(cfg).log_with] == ["tensorboard"]
    assert re.search(r"wandb 패키지가 없어 .*pip install wandb", caplog.text)


def test_sampling_changes_nothing_in_training(tmp_path):
    figures = []
    for interval in ("1", "1000"):
        run = tiny_run(tmp_path / interval, "--sample-steps", interval, "--save-steps", "100")
        t.train(run, t.TrainState())
        run.saver.busy(None)
        figures.append([line["loss"] for line in read_metrics(tmp_path / interval) if "loss" in line])
        assert run.loss_module.training
    assert figures[0] == figures[1]


def test_samples_are_kept_by_step_and_prompt_and_shown_in_the_log(trained):
    text = (trained.folder / "outputs/samples.md").read_text(encoding="utf-8")
    parts = re.findall(r"^## 스텝 (\d+)$|^\*\*(.+)\*\*$|^> ", text, re.M)
    headings = [first or second for first, second in parts if first or second]
    assert headings == ["2", *t.SAMPLE_PROMPTS, "4", *t.SAMPLE_PROMPTS]
    assert not CONTROL.search(text)
    assert_in_order(trained.log, [r"📝 샘플 \(스텝 2,", r"\[오늘 아침 서울에서\]", r"📝 샘플 \(스텝 4,"])


def test_samples_of_later_steps_are_cut_when_a_run_goes_back(tmp_path):
    path = tmp_path / "samples.md"
    sections = [f"## 스텝 {step:,}\n\n**p**\n\n> ## 스텝 9\n\n" for step in (1000, 2000, 3000)]
    path.write_text("".join(sections), encoding="utf-8")
    t.cut_file(path, 2500)
    assert path.read_text(encoding="utf-8") == "".join(sections[:2])
    t.cut_file(path, 0)
    assert path.read_text(encoding="utf-8") == ""


def test_a_prompt_of_ones_own_takes_the_place_of_the_fixed_ones_and_one_without_room_is_said(
    tmp_path, monkeypatch, caplog
):
    run = tiny_run(tmp_path, "--prompt", "철수는")
    t.generate_samples(run, t.TrainState(step=5))
    text = (tmp_path / "outputs/samples.md").read_text(encoding="utf-8")
    assert re.findall(r"^\*\*(.+)\*\*$", text, re.M) == ["철수는"]
    run.cfg = t.replace(run.cfg, prompt="가나다라마바사" * 50)
    monkeypatch.setattr(run.model, "generate", None)
    t.generate_samples(run, t.TrainState(step=5))
    assert "샘플을 만들지 못했습니다" in caplog.text
    assert "--prompt" in caplog.text


def test_the_plan_and_the_steps_count_the_same_operations(trained):
    cfg, preset = trained.run.cfg, t.PRESETS["tiny"]
    vocabulary = trained.run.model.config.vocab_size
    counted = preset.parameter_count(vocabulary) - (0 if preset.tied else vocabulary * preset.hidden)
    planned = t.training_flops(counted, preset.layers, preset.hidden, cfg.max_seq_length)
    assert t.StepLog(trained.run, t.TrainState()).flops == planned
