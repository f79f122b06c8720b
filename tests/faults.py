"""What the tests of faults share: a small run, copies of the script with a fault, comparisons of runs."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import LAUNCHER, SCRIPT, Place, cleaned
from samples import SMALL_MODEL, read_metrics

import train_h100_dual as t

TYPED = [
    "--train --device cpu --vocab-size 512 --max-seq-length 32 --batch-size 2 --gradient-accumulation-steps 1",
    "--max-steps 12 --save-steps 4 --eval-steps 6 --logging-steps 1 --learning-rate 1e-3 --seed 7",
    "--report-to none --dummy-data --num-gpus 2 --no-save-initial --foreground",
]
SMALL = [*" ".join(TYPED).split(), *SMALL_MODEL]
NO_CURVES = "draw_curves_beside = lambda *_, **__: None  # two seconds of computing each, and no part of a fault"


def broken_launcher(folder: Path, fault: str) -> Path:
    """A copy of the launcher whose script has ``fault`` just before it starts; if ``EARLY``, before it imports."""
    folder.mkdir(parents=True)
    shutil.copy(LAUNCHER, folder)
    text, mark = SCRIPT.read_text(encoding="utf-8"), 'if __name__ == "__main__":\n'
    early, end = text.index(mark), text.rindex(mark)  # it stands before the imports that take time, and at the end
    place = early if fault.startswith(EARLY) else end
    text = f"{text[:place]}{fault}\n\n{text[place:end]}{NO_CURVES}\n\n{text[end:]}"
    (folder / SCRIPT.name).write_text(text, encoding="utf-8")
    return folder / LAUNCHER.name


def at_steps(*faults: tuple[int, int, str]) -> str:
    """A fault: at some steps, counted from 1, a rank does something before it trains: (step, rank, action)."""
    cases = "\n".join(
        f"    if inside and (done + 1, rank_and_world()[0]) == {(step, rank)}:\n        {action}"
        for step, rank, action in faults
    )
    return f"""
real_rate = learning_rate_at
def learning_rate_at(run, done):
    inside = sys._getframe(1).f_code.co_name == "train"
{cases}
    return real_rate(run, done)
"""


EARLY = "\n# before anything is heard or imported\n"
SLEEP_EARLY = EARLY + 'if "RANK" in os.environ and {condition}:\n    time.sleep({seconds})\n'
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
FIRST_TIME = 'os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and '
SECOND_TIME = FIRST_TIME.replace('"0"', '"1"')


def broken_place(folder: Path, fault: str, cache: Path) -> Place:
    """A place whose runs have a fault."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return Place(folder / "place", broken_launcher(folder / "scripts", fault), cache, {"PATH": path})


@pytest.fixture
def broken(tmp_path: Path, warm_cache: Path) -> Iterator:
    """Return a function that gives a place whose runs have a fault."""
    places = []

    def build(fault: str) -> Place:
        places.append(broken_place(tmp_path / f"broken-{len(places)}", fault, warm_cache))
        return places[-1]

    yield build
    for one in places:
        one.kill_all()


def timeless(folder: Path) -> list[dict]:
    """The metrics of a run below ``folder`` without what a clock or the machine's memory decides."""
    changing = ("tokens_per_second", "memory_gb", "seconds")
    return [{name: value for name, value in line.items() if name not in changing} for line in read_metrics(folder)]


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return torch.load(folder / "outputs" / f"checkpoint-{step}" / "pytorch_model.bin", weights_only=True)


def assert_same_run(ours: Path, theirs: Path, step: int) -> None:
    """Assert that two runs logged the same figures and ended with the same weights, bit for bit."""
    assert timeless(ours) == timeless(theirs)
    mine, other = weights(ours, step), weights(theirs, step)
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in other)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, warm_cache: Path) -> Iterator[Place]:
    for place in cleaned(broken_place(tmp_path_factory.mktemp("undisturbed"), "", warm_cache)):
        answer = place.run(*SMALL)
        assert answer.code == 0, answer.text
        place.seconds = answer.seconds
        yield place


def slow_save(step: int, seconds: float) -> str:
    """A fault: flushing ``checkpoint-STEP`` takes some time."""
    return f"""
real_flush = flush_to_disk
def flush_to_disk(paths):
    if paths[-1].name == ".checkpoint-{step}.tmp":
        time.sleep({seconds})
    real_flush(paths)
"""


def assert_checkpoints_open(place: Place) -> None:
    for path in place.checkpoints():
        torch.load(path / "pytorch_model.bin", weights_only=True)
        assert not (path / "training_state").is_dir() or t.checkpoint_damage(path, thorough=True) is None
