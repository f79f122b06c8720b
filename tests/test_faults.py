"""Hung ranks, killed ranks, and the restarts after them; real processes on the CPU."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import Place, assert_in_order, cleaned
from faults import FIRST_TIME, KILL, SECOND_TIME, SMALL, assert_same_run, at_steps, broken_place
from samples import config

import train_h100_dual as t


@pytest.fixture(scope="module")
def hung_run(tmp_path_factory: pytest.TempPathFactory, warm_cache: Path) -> Iterator[SimpleNamespace]:
    """Rank 1 falls asleep at step 3, once and again after a restart, and rank 0 waits for it in a collective."""
    folder = tmp_path_factory.mktemp("hung")
    for place in cleaned(broken_place(folder, at_steps((3, 1, "time.sleep(1e6)")), warm_cache)):
        options = ["--hang-timeout", "0.25", "--max-restarts", "1", "--notify", f"echo >>'{folder}/notified'"]
        answer = place.run(*SMALL, *options, timeout=200)
        yield SimpleNamespace(place=place, answer=answer, folder=folder)


def test_a_hung_run_is_restarted_while_restarts_are_left_and_then_fails_with_one_line(
    hung_run: SimpleNamespace,
) -> None:
    answer = hung_run.answer
    assert answer.code == 1
    assert answer.out.count("다시 시작했습니다 (1/1번째)") == 1, answer.text
    assert answer.text.count("0.25분 동안 진행이 없어 학습을 끝냈습니다 (--hang-timeout)") == 1, answer.text
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


def test_a_hang_is_told_whichever_rank_it_was_in_and_whoever_spoke_first(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("H100_DUAL_RUN_ID", "1-1")
    (tmp_path / ".lock").touch()
    logs = [tmp_path / f"training_detail_rank_{rank}.log" for rank in (0, 1)]
    logs[0].write_text("2026-11-26 08:00:00,000 ERROR traceback: run failed\n")
    hang = "2026-11-26 08:00:00,000 DEBUG h100_dual: step 3\nTimeout (0:15:00)!\nThread 0x1:\n"
    info = {"run_id": "1-1", "options": {"hang_timeout": 15}, "state": "failed", "error": t.LOST_PEER}
    for text, expected in ((hang + "2026-11-26 08:01:00,000 INFO again\n", "다른 랭크의"), (hang, "15분 동안")):
        t.write_json(tmp_path / "run_info.json", info)
        logs[1].write_text(text)
        t.finalize_state(str(tmp_path), "failed", "1", str(logs[0]))
        assert expected in t.read_json(tmp_path / "run_info.json")["error"]
    assert capsys.readouterr().out == "failed\n" * 2


@pytest.mark.slow
def test_a_rank_that_keeps_the_interpreter_to_itself_is_found_too(broken) -> None:
    hold = "re.match('(a+)+$', 'a' * 60 + 'b')"  # C code that lets no other thread run
    place = broken(at_steps((3, 0, hold)))
    answer = place.run(*SMALL, "--hang-timeout", "0.2", "--max-restarts", "0", timeout=90)
    assert answer.code == 1, answer.text
    assert place.info()["state"] == "failed"
    place.wait_for_end(5)
    assert_in_order((place.logs / "training_detail_rank_0.log").read_text(encoding="utf-8"), ["in match", "in main"])


@pytest.mark.slow
def test_a_long_preparation_of_the_data_is_no_hang(broken) -> None:
    slow = """
real_prepare = write_cache
def write_cache(*arguments):
    time.sleep(8)
    return real_prepare(*arguments)
"""
    place = broken(slow)
    place.cache = place.folder / "cache"
    answer = place.run(*SMALL, "--max-steps", "2", "--hang-timeout", "0.08")
    assert answer.code == 0, answer.text


def test_killed_workers_are_started_again_and_the_losses_are_as_undisturbed(broken, undisturbed: Place) -> None:
    """Once before the run's first checkpoint, where a --test has been, and once behind it, where its memory did fit."""
    full = f"""while {SECOND_TIME}True:
            if list_checkpoints(run.cfg.output_dir):  # it is written beside the steps
                raise torch.OutOfMemoryError"""
    place = broken(at_steps((3, 0, f"{FIRST_TIME}{KILL}"), (7, 1, full)))
    shutil.copytree(undisturbed.outputs, place.outputs, symlinks=True)
    t.update_run_info(place.outputs, mode="test")
    answer = place.run(*SMALL, "--max-restarts", "2")
    assert answer.code == 0, answer.text + place.report()
    first, second = (rf"⚠️  학습 프로세스가 죽어 .*\({number}/2번째\)" for number in (1, 2))
    again = ["스텝 1/12", "스텝 5/12", "GPU 메모리가 부족합니다"]
    assert_in_order(answer.out, ["스텝 1/12", first, *again, second, "스텝 4부터", "✅ 학습 완료!"])
    assert "Traceback" not in answer.text
    assert "❌" not in answer.text
    assert_same_run(place.folder, undisturbed.folder, 12)
    assert place.info()["state"] == "finished"
    assert Path(place.info()["lists"], "lists.json").exists()  # which the next restart would take
    place.wait_for_end(5)


@pytest.mark.parametrize(("error", "own"), [("ncclSystemError: no room in /dev/shm", True), ("ncclRemoteError", False)])
def test_a_fault_of_nccl_itself_is_told_and_not_another_ranks_death(tmp_path, monkeypatch, capsys, error, own) -> None:
    cfg = config(tmp_path)
    cfg.output_dir.mkdir()
    t.update_run_info(cfg.output_dir, run_id=t.run_id(), state="running")
    t.report_failure(cfg, torch.distributed.DistBackendError(f"NCCL error: unhandled, {error}"))
    assert (error in capsys.readouterr().out) is own
    assert (t.read_json(cfg.output_dir / "run_info.json")["error"] == t.LOST_PEER) is not own


def test_an_error_whose_cause_is_known_is_not_repeated(broken) -> None:
    place = broken(at_steps((3, 1, "raise torch.OutOfMemoryError")))
    answer = place.run(*SMALL, "--max-restarts", "3")
    assert answer.code == 1
    assert answer.out.count("GPU 메모리가 부족합니다") == 1, answer.text
    assert "다시 시작했습니다" not in answer.out
    assert answer.out.count("스텝 1/12") == 1
    assert place.info()["state"] == "failed"
    place.wait_for_end(5)
