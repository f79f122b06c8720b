"""Helpers for the tests that drive the real launcher: places to run in, terminals, stubs, processes."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = ROOT / "run_h100_dual.sh"
SCRIPT = ROOT / "train_h100_dual.py"
# A training run long enough to be stopped, on a model small enough for two cores.
LONG_RUN = (
    "--train --device cpu --model-size tiny --vocab-size 1024 --max-seq-length 64 --batch-size 2 "
    "--gradient-accumulation-steps 1 --max-steps 100000 --save-steps 100000 --dummy-data --num-gpus 1"
)
TOOLS = (  # what the launcher may take for granted on a machine where nothing is installed
    "bash cat date dirname env flock grep ls mkdir mktemp mv nohup paste rm sed setsid sleep stat tail tee timeout"
    " touch tr"
)
H100 = "NVIDIA H100 PCIe"
pytest_plugins = ["faults"]  # its fixtures: broken, undisturbed

# Files in the order in which their tests take long: the longest begins first, so that no worker is left with it alone.
LONGEST = ["test_hosts", "test_saves", "test_launcher_lifecycle", "test_stops", "test_faults", "test_watching"]
LONGEST += ["test_resume", "test_checkpoint", "test_memory", "test_optimizer", "test_launcher_options", "test_data"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def wait_for(what: str, check: Callable[[], Any], timeout: float = 60.0, explain: Callable[[], str] = str) -> Any:
    """Poll ``check`` until it is true and return what it returned; fail saying what was waited for."""
    deadline = time.monotonic() + timeout
    while not (found := check()):
        if time.monotonic() > deadline:
            pytest.fail(f"waited {timeout:.0f} s in vain for: {what}\n{explain()}")
        time.sleep(0.1)
    return found


def process_is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def marked_processes(mark: str) -> dict[int, str]:
    """Living processes that were started with ``mark`` in their environment, with their command lines.

    The environment stays with a process whatever session or parent it moves to.
    """
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's
            if mark.encode() in (folder / "environ").read_bytes() and process_is_alive(int(folder.name)):
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(folder.name)] = command.decode(errors="replace").strip()
    return found


def parent_of(pid: int) -> int:
    """A process's parent; 0 if it is gone."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def list_tree(folder: Path) -> dict[str, str]:
    """Every path below ``folder``, with a hash of each file's content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


@dataclass
class Place:
    """A folder to run the launcher in, with the environment it gets; knows every process started there."""

    folder: Path
    launcher: Path = LAUNCHER
    cache: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)
    mark: str = field(default_factory=lambda: f"LAUNCHER_TEST_MARK={uuid.uuid4().hex}")
    seconds: float = 0.0  # that a whole run takes here, once one was timed

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.outputs, self.logs = self.folder / "outputs", self.folder / "logs"
        self.cache = self.cache or self.folder / "cache"
        self.console_log, self.pid_file = self.logs / "training_console.log", self.logs / "training.pid"

    @property
    def directories(self) -> list[str]:
        """The options that keep a run's files in this place."""
        return ["--output-dir", str(self.outputs), "--logs-dir", str(self.logs), "--cache-dir", str(self.cache)]

    def command(self, *arguments: str) -> dict[str, Any]:
        """The launcher with its directories and arguments, as keyword arguments of ``Popen``."""
        name, _, value = self.mark.partition("=")
        base = {key: text for key, text in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LAUNCHER_OPTIONS")}
        # No GPU unless a test brings a stub, so that the tests are the same on every machine.
        base |= {"CUDA_VISIBLE_DEVICES": "", "XDG_CACHE_HOME": str(self.folder / "xdg")}
        base["OMP_WAIT_POLICY"] = "passive"  # threads that spin take seconds a step on a loaded machine
        base["PYTHONPATH"] = str(ROOT / "tests" / "fixtures" / "no-curves")
        return {
            "args": [str(self.launcher), *arguments, *self.directories],
            "cwd": self.folder,
            "env": {**base, **self.environment, name: value},
        }

    def run(self, *arguments: str, timeout: float = 120.0) -> Answer:
        return self.execute(self.command(*arguments), timeout)

    def execute(self, command: dict[str, Any], timeout: float = 120.0) -> Answer:
        before, begun = os.times(), time.monotonic()
        process = subprocess.Popen(**command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
        out, err = self.finish(process, timeout)
        after, seconds = os.times(), time.monotonic() - begun
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        return Answer(process.returncode, out, err or "", seconds, cpu)

    def start(self, *arguments: str) -> subprocess.Popen:
        """Start the launcher with its output in a pipe."""
        command = self.command(*arguments)
        return subprocess.Popen(**command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")

    def finish(self, process: subprocess.Popen, timeout: float = 120.0) -> tuple[str, str]:
        try:
            return process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            report = self.report()
            self.kill_all()  # whoever holds the pipe
            shown = "\n".join(text or "" for text in process.communicate())
            pytest.fail(f"it did not end within {timeout:.0f} s: {process.args}\n{shown}\n{report}")

    def processes(self) -> dict[int, str]:
        """What runs of this place's processes."""
        return marked_processes(self.mark)

    def agents(self) -> list[int]:
        """The processes of torchrun itself."""
        found = self.processes().items()  # the supervisor has torchrun's command among its arguments
        return [pid for pid, text in found if "torch.distributed.run" in text and "internal:supervise" not in text]

    def workers(self) -> list[int]:
        agents = self.agents()
        return [pid for pid in self.processes() if parent_of(pid) in agents]

    def kill_all(self) -> None:
        for _ in range(50):
            left = self.processes()
            if not left:
                return
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)

    def report(self) -> str:
        """What helps to understand a run that did not do what it should."""
        lines = [f"processes: {self.processes()}", f"files: {sorted(list_tree(self.folder))[:60]}"]
        for path in (self.console_log, self.logs / "training_detail_rank_0.log", self.outputs / "run_info.json"):
            if path.exists():
                text = path.read_text(encoding="utf-8", errors="replace")
                lines.append(f"--- {path.name} ---\n{text[-2000:] if path.suffix == '.log' else text[-300:]}")
        return "\n".join(lines)

    def wait(self, what: str, check: Callable[[], Any], timeout: float = 90.0) -> Any:
        """Poll until ``check`` is true; a failure shows logs and processes."""
        return wait_for(what, check, timeout, self.report)

    def wait_for_end(self, timeout: float = 90.0) -> None:
        self.wait("the end of all processes", lambda: not self.processes(), timeout)

    def wait_for_step(self, timeout: float = 90.0) -> None:
        path = self.outputs / "metrics.jsonl"
        self.wait("the first logged step", lambda: path.exists() and path.stat().st_size, timeout)

    def pid(self) -> int:
        return int(self.wait("the PID file", lambda: self.pid_file.exists() and self.pid_file.read_text().strip()))

    def info(self) -> dict[str, Any]:
        return json.loads((self.outputs / "run_info.json").read_text(encoding="utf-8"))

    def console(self) -> str:
        return self.console_log.read_text(encoding="utf-8")

    def checkpoints(self) -> list[Path]:
        """The checkpoints, oldest first."""
        return sorted(self.outputs.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


@dataclass
class Answer:
    """How a command ended: exit code, what it wrote, how long it took and how much of that computing."""

    code: int
    out: str
    err: str
    seconds: float
    cpu_seconds: float

    @property
    def text(self) -> str:
        return self.out + self.err

    @property
    def complaints(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("❌")]


class Terminal:
    """A command as the session of a pseudo-terminal of its own, as in an SSH session."""

    def __init__(self, place: Place, *arguments: str, pipe: str = "", afterwards: str = 'exit "$code"'):
        self.master, slave = pty.openpty()
        command = place.command(*arguments)
        # A shell that stays in front of the launcher, so that the launcher isn't the session's leader.
        command["args"] = ["bash", "-c", f'"$@" {pipe}; code=$?; {afterwards}', "terminal", *command["args"]]
        take_terminal = functools.partial(fcntl.ioctl, slave, termios.TIOCSCTTY, 0)
        self.process = subprocess.Popen(
            **command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, preexec_fn=take_terminal
        )
        os.close(slave)
        self.place, self.shown = place, b""

    @property
    def text(self) -> str:
        """What the terminal has shown so far."""
        with contextlib.suppress(OSError):  # the other side is closed
            while select.select([self.master], [], [], 0)[0] and (block := os.read(self.master, 65536)):
                self.shown += block
        return self.shown.decode(errors="replace").replace("\r\n", "\n")

    def wait_for_text(self, text: str, timeout: float = 60.0) -> None:
        wait_for(
            f"{text!r} on the terminal", lambda: text in self.text, timeout, lambda: self.text + self.place.report()
        )

    def press(self, keys: str) -> None:
        """Type something: "\\x03" is Ctrl-C."""
        os.write(self.master, keys.encode())

    def hang_up(self) -> None:
        """Close the terminal: the kernel sends SIGHUP to its session."""
        if self.master is not None:
            os.close(self.master)
            self.master = None
            with contextlib.suppress(ProcessLookupError):  # and so does a shell that ends, whoever else has it open
                os.killpg(self.process.pid, signal.SIGHUP)

    def wait_for_exit(self, timeout: float = 60.0) -> int:
        """Wait for the command's end, reading all the while; returns the exit code."""
        wait_for(
            "the launcher's end", lambda: (self.text, self.process.poll() is not None)[1], timeout, self.place.report
        )
        return self.process.returncode


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """An empty place of one's own, without any process afterwards."""
    yield from cleaned(Place(tmp_path / "place"))


def cleaned(place: Place) -> Iterator[Place]:
    """Give a place and end what was started there, whatever happened."""
    try:
        yield place
    finally:
        place.kill_all()


@pytest.fixture(scope="session", autouse=True)
def warm_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One token cache for the runs that may share it: the dummy text is tokenised once."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["TINY_RUNS_CACHE"] = str(folder)
    return folder


@pytest.fixture
def warm(place: Place, warm_cache: Path) -> None:
    """Let runs in ``place`` share the token cache."""
    place.cache = warm_cache


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """A run that trained to its end in this process, its state, and where it wrote: for looking at only."""
    from samples import tiny_run

    import train_h100_dual as t

    run, state = tiny_run(tmp_path_factory.mktemp("trained")), t.TrainState()
    t.save_initial_model(run)
    assert t.train(run, state) == "finished"
    t.report_save(run, is_last=True)
    return run, state, run.cfg.output_dir


@pytest.fixture(scope="session")
def bare_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A machine where nothing is installed: a Python without packages, a few tools, a copy of the scripts."""
    folder = tmp_path_factory.mktemp("bare machine")
    command = [sys.executable, "-m", "venv", "--without-pip", str(folder / "python")]
    subprocess.run(command, check=True)
    (folder / "bin").mkdir()
    for name in TOOLS.split():
        (folder / "bin" / name).symlink_to(shutil.which(name))
    (folder / "checkout").mkdir()
    for path in (LAUNCHER, SCRIPT, ROOT / "requirements.txt"):
        shutil.copy(path, folder / "checkout")
    return folder


@pytest.fixture
def bare_place(tmp_path: Path, bare_folder: Path) -> Iterator[Place]:
    """A place whose launcher finds a Python without any package."""
    environment = {"PATH": f"{bare_folder / 'python' / 'bin'}:{bare_folder / 'bin'}"}
    yield from cleaned(Place(tmp_path / "place", bare_folder / "checkout" / LAUNCHER.name, environment=environment))


@pytest.fixture
def with_gpus(place: Place, tmp_path: Path) -> Callable[..., None]:
    """Return a function that makes nvidia-smi report GPUs in ``place``, which PyTorch does not see."""

    def stub(count: int, used: int = 4, name: str = H100, total: int = 81559) -> None:
        lines = [f"{index}, GPU-1{index}1f5c2b-stub, {name}, {total}, {used}" for index in range(count)]
        write_program(tmp_path / "stubs" / "nvidia-smi", "printf '%s\\n' " + " ".join(f"'{line}'" for line in lines))
        visible = ",".join(f"GPU-1{index}1f5c2b-stub" for index in range(count))
        path = f"{tmp_path / 'stubs'}:{os.environ['PATH']}"
        place.environment |= {"PATH": path, "CUDA_VISIBLE_DEVICES": visible}

    return stub


@pytest.fixture
def with_cuda(place: Place, tmp_path: Path) -> None:
    """Make the launcher's question to PyTorch in ``place`` answer as if it saw the GPUs."""
    package = tmp_path / "fake" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "class cuda:\n    is_available = staticmethod(lambda: True)\n    device_count = staticmethod(lambda: 2)\n"
        "    get_device_capability = staticmethod(lambda: (8, 0))\n"
        "class version:\n    cuda = '12.8'\n__version__ = '2.13.0+cu128'\n"
    )
    place.environment["PYTHONPATH"] = str(package.parent)


def write_program(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def assert_in_order(text: str, phrases: list[str]) -> None:
    """Assert that each phrase, a regular expression, is found after the one before it."""
    position = 0
    for phrase in phrases:
        found = re.compile(phrase, re.MULTILINE).search(text, position)
        assert found, f"{phrase!r} does not come after {text[:position][-200:]!r} in\n{text}"
        position = found.end()
