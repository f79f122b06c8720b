"""tests/benchmarks/first_hour.sh: rows that are right, also after a failure, and the figures that only a GPU gives."""

from __future__ import annotations

import gzip
import importlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import LAUNCHER, ROOT, SCRIPT

BENCHMARKS = "tests/benchmarks"
BROKEN = "이 머신은 고장 났습니다"


def first_hour(root: Path, *words: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(root)}
    command = [str(root / BENCHMARKS / "first_hour.sh"), *words]
    return subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=120)


def test_an_item_that_fails_keeps_none_of_the_others_and_the_table_is_recorded(tmp_path: Path) -> None:
    shutil.copytree(ROOT / BENCHMARKS, tmp_path / BENCHMARKS)
    shutil.copy(ROOT / "tests" / "samples.py", tmp_path / "tests")
    shutil.copy(SCRIPT, tmp_path)
    text = LAUNCHER.read_text(encoding="utf-8").replace("\nmain() {\n", f"\nmain() {{\n  die '{BROKEN}'\n")
    (tmp_path / LAUNCHER.name).write_text(text, encoding="utf-8")
    (tmp_path / LAUNCHER.name).chmod(0o755)
    answer = first_hour(tmp_path, "muon", "fp16", "eager", "attention")
    assert answer.returncode == 1, answer.stderr
    _, _, results = (tmp_path / BENCHMARKS / "RESULTS.md").read_text(encoding="utf-8").rpartition("\n## ")
    assert results.startswith("The first hour")
    rows = [line.strip("| ").split(" | ") for line in results.splitlines() if line.startswith("| ")][2:]
    assert [(row[0], row[3]) for row in rows] == [
        ("attention", "as expected"),
        ("eager", "NOT as expected"),
        ("fp16", "not run"),
        ("muon", "NOT as expected"),
    ]
    assert "flash" in rows[0][2] and "needs a GPU" in rows[2][2]
    assert all(BROKEN in rows[number][2] for number in (1, 3))
    logs = Path(re.search(r"^logs: (.+)$", answer.stdout, re.M)[1])
    assert BROKEN in (logs / "eager.log").read_text(encoding="utf-8")
    assert not [path for path in logs.iterdir() if path.is_dir()]


def test_an_item_that_is_not_there_is_refused_with_the_names_of_those_that_are() -> None:
    answer = first_hour(ROOT, "lunch")
    assert answer.returncode == 2
    assert "self-test attention eager" in answer.stderr


@pytest.fixture
def hour(tmp_path: Path, monkeypatch) -> Any:
    """The module, and what a run named 1.3b on two GPUs left: NCCL works alone for a sixth, and nothing for a sixth."""
    monkeypatch.syspath_prepend(ROOT / BENCHMARKS)
    monkeypatch.chdir(tmp_path)
    output, logs = tmp_path / "1.3b" / "output", tmp_path / "1.3b" / "logs"
    output.mkdir(parents=True)
    logs.mkdir()
    figures = [{"step": step, "loss": 8.0, "tokens_per_second": 1e5, "mfu": 0.45, "memory_gb": 42.0} for step in (1, 2)]
    (output / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in figures))
    (output / "run_info.json").write_text('{"state": "finished", "world_size": 2}')
    lines = "✅ 배치 크기 16, 기울기 누적 2\n   GPU 메모리: 최대 할당 60.1 GB, 예약 66.0 GB, 남음 13.2 GB\n"
    (logs / "training_console.log").write_text(lines, encoding="utf-8")
    spans = [("gemm", 0, 10), ("ncclDevKernel_AllReduce", 5, 10), ("gemm", 20, 10), ("gemm", 22, 4)]
    events = [{"cat": "kernel", "name": name, "ts": begin, "dur": length} for name, begin, length in spans]
    with gzip.open(output / "profile_trace.json.gz", "wt") as stream:
        json.dump({"traceEvents": [*events, {"name": "a step", "ts": 0, "dur": 90}]}, stream)
    return importlib.import_module("first_hour")


@pytest.mark.parametrize(
    ("question", "words", "seen", "is_expected"),
    [
        ("utilisation", [0.40, 0.2], "50,000 tokens/s a GPU, MFU 45.0%, 42.0 GB; communication alone 16.7%", True),
        ("utilisation", [0.40, 0.03], "waiting 16.7%", False),
        ("utilisation", [0.50, 0.2], "MFU 45.0%", False),
        ("room_left", [], "batch 16: peak 60.1 GB, reserved 66.0 GB, 13.2 GB left", True),
        ("alike", ["1.3b", 0.01, 1.0], "tokens/s, x 1.00", False),
        ("alike", ["1.3b", 0.01], "loss 8.0000 and 8.0000", True),
    ],
)
def test_figures_of_a_gpu_are_read_and_judged(hour, question, words, seen, is_expected) -> None:
    answer = getattr(hour, question)("1.3b", *words)
    assert seen in answer[0]
    assert bool(answer[1]) is is_expected


def test_an_item_that_takes_too_long_is_ended_with_all_that_it_started(hour: Any, tmp_path: Path) -> None:
    command = ["sleep", "98765"]
    answer = hour.try_item(tmp_path / "log", 1, subprocess.run, ["setsid", *command])
    assert answer == ("not done after 1 s", False)
    assert command not in [process.info["cmdline"] for process in psutil.process_iter(["cmdline"])]
