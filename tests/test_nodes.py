"""A run on several machines: as processes on one, and as two with networks, names and processes of their own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import LAUNCHER, Place, assert_in_order, cleaned, wait_for
from test_faults import FIRST_TIME, KILL, SMALL, assert_same_run, at_step, broken_launcher, undisturbed  # noqa: F401

import train_h100_dual as t

ONE_EACH = [*SMALL, "--num-gpus", "1"]  # two ranks on two machines, as the undisturbed run has on one
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


@dataclass
class Node(Place):
    """One machine of a run on two; commands run there through ``entry``."""

    rank: int = 0
    endpoint: str = ""
    entry: list[str] = field(default_factory=list)

    def command(self, *arguments: str) -> dict[str, Any]:
        nodes = ["--nnodes", "2", "--node-rank", str(self.rank), "--rdzv-endpoint", self.endpoint]
        command = super().command(*nodes, *arguments)
        return {**command, "args": [*self.entry, *command["args"]]}

    def kill_all(self) -> None:
        for pid, text in self.processes().items():  # nsenter forks: what it started has to go first
            if "nsenter" not in text:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        super().kill_all()

    def state(self) -> str | None:
        """The state that this machine's own file tells."""
        name = f"run_info_node_{self.rank}.json" if self.rank else "run_info.json"
        return t.read_json(self.outputs / name).get("state")


def console(node: Node) -> str:
    """The console log of this machine, so far."""
    name = f"training_console_node_{node.rank}.log" if node.rank else "training_console.log"
    return t.read_text(node.logs / name)


def start_both(nodes: list[Node], *arguments: str) -> list[subprocess.Popen]:
    return [node.start(*arguments) for node in nodes]


def finish_both(nodes: list[Node], launchers: list[subprocess.Popen], timeout: float = 120) -> list[str]:
    """Wait for both ends; returns what each console showed."""
    return [node.finish(launcher, timeout)[0] for node, launcher in zip(nodes, launchers, strict=True)]


# --- options ---


def test_a_dry_run_shows_the_machines_and_a_command_with_their_meeting_place(place: Place) -> None:
    nodes = ["--nnodes", "2", "--node-rank", "1", "--rdzv-endpoint", "127.0.0.1:29511"]
    answer = place.run(*ONE_EACH, *nodes, "--dry-run")
    assert answer.code == 0, answer.text
    assert_in_order(
        answer.out,
        [
            "스텝당 토큰: 128$",
            r"CPU 프로세스 수: 2 \(머신 2대 x 1개, 이 머신은 1번\)$",
            "분산 학습: DDP",
            "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:29511 .*is_host=0",
        ],
    )
    assert "--standalone" not in answer.out
    assert not list(place.folder.iterdir())


# --- two machines as processes on one, which share their directories ---


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_two_machines_that_share_their_directories_train_together(tmp_path: Path, warm_cache: Path) -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    with contextlib.ExitStack() as stack:
        nodes = []
        for rank in (1, 0):  # the number counts, not who comes first
            node = Node(tmp_path / "place", LAUNCHER, warm_cache, {"PATH": PATH}, rank=rank, endpoint=endpoint)
            nodes.append(stack.enter_context(contextlib.contextmanager(cleaned)(node)))
        launchers = start_both(nodes, *ONE_EACH, "--max-steps", "2")
        shown = finish_both(nodes, launchers)
        assert [launcher.returncode for launcher in launchers] == [0, 0], "\n".join(shown) + nodes[0].report()
    assert all("스텝 2/2" in text and "✅ 학습 완료!" in text for text in shown)
    assert "💾 체크포인트 저장 중" in shown[1]
    assert "💾 체크포인트 저장 중" not in shown[0]
    assert [node.state() for node in nodes] == ["finished", "finished"]
    assert nodes[0].info()["world_size"] == 2
    assert [path.name for path in nodes[0].checkpoints()] == ["checkpoint-2"]
    logs = {path.name for path in nodes[0].logs.iterdir()}
    assert logs >= {"training_console.log", "training_console_node_1.log", "training_rank_0.log", "training_rank_1.log"}


@pytest.mark.slow
def test_a_machine_waits_for_the_others_tokenisation_however_long(tmp_path: Path, warm_cache: Path) -> None:
    slow = """
real_prepare = build_cache
def build_cache(*arguments):
    time.sleep(25)
    return real_prepare(*arguments)
"""
    launcher, endpoint = broken_launcher(tmp_path / "scripts", slow), f"127.0.0.1:{free_port()}"
    with contextlib.ExitStack() as stack:
        nodes = []
        for rank, (path, cache) in enumerate(((LAUNCHER, warm_cache), (launcher, None))):
            node = Node(tmp_path / f"own-{rank}", path, cache, {"PATH": PATH}, rank=rank, endpoint=endpoint)
            nodes.append(stack.enter_context(contextlib.contextmanager(cleaned)(node)))
        launchers = start_both(nodes, *ONE_EACH, "--max-steps", "2", "--hang-timeout", "0.3")
        shown = finish_both(nodes, launchers)
    assert [launcher.returncode for launcher in launchers] == [0, 0], "\n".join(shown)


# --- two machines as name spaces, joined by a cable ---


@dataclass
class Cable:
    """What joins two machines, and can be cut."""

    namespaces: list[str]

    def set(self, state: str) -> None:
        from pyroute2 import NetNS

        with NetNS(self.namespaces[1]) as network:
            network.link("set", index=network.link_lookup(ifname="cable1")[0], state=state)


def start_machine(name: str) -> tuple[subprocess.Popen, int]:
    """A network, a host name and process numbers of its own; returns its holder and its first process."""
    body = f"hostname {name}; sleep infinity & wait"
    spaces = ["unshare", "--net", "--uts", "--pid", "--mount-proc", "--fork", "--kill-child"]
    holder = subprocess.Popen([*spaces, "bash", "-c", body], stderr=subprocess.PIPE, text=True)
    children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children")
    wait_for("a machine", lambda: holder.poll() is not None or t.read_text(children).strip(), 10)
    if holder.poll() is not None:
        pytest.skip(f"this test needs the right to make name spaces (root): {holder.stderr.read().strip()}")
    return holder, int(children.read_text())


def connect(machines: list[int]) -> Cable:
    """Join two machines, given by a process there, by a cable; they get 10.77.0.1 and 10.77.0.2."""
    from pyroute2 import IPRoute, NetNS

    cable = Cable([f"/proc/{pid}/ns/net" for pid in machines])
    with IPRoute() as host:
        host.link("add", ifname="cable0", kind="veth", peer={"ifname": "cable1"})
        for number, pid in enumerate(machines):
            host.link("set", index=host.link_lookup(ifname=f"cable{number}")[0], net_ns_pid=pid)
    for number, name in enumerate(cable.namespaces):
        with NetNS(name) as network:
            index = network.link_lookup(ifname=f"cable{number}")[0]
            network.addr("add", index=index, address=f"10.77.0.{number + 1}", prefixlen=24)
            for each in (index, network.link_lookup(ifname="lo")[0]):
                network.link("set", index=each, state="up")
    return cable


@pytest.fixture
def machines(tmp_path: Path, warm_cache: Path) -> Iterator[Callable[..., tuple[list[Node], Cable]]]:
    """Return a function that gives two machines with a fault in their script, on one file system or on two."""
    with contextlib.ExitStack() as stack:
        started = []
        for number in (0, 1):
            holder, pid = start_machine(f"machine{number}")
            stack.callback(holder.wait)
            stack.callback(holder.kill)
            started.append(pid)
        cable = connect(started)

        def build(shared: bool, fault: str, **environment: str) -> tuple[list[Node], Cable]:
            launcher = broken_launcher(tmp_path / "scripts", fault)
            nodes = []
            for rank, pid in enumerate(started):
                folder = tmp_path / ("shared" if shared else f"own-{rank}")
                enter = ["nsenter", "--target", str(pid), "--net", "--uts", "--pid", "--mount", "--", "bash", "-c"]
                entry = [*enter, 'cd "$0" && exec "$@"', str(folder)]
                environment["PATH"] = PATH
                place = Node(
                    folder, launcher, warm_cache, environment, rank=rank, endpoint="10.77.0.1:29500", entry=entry
                )
                if not shared and rank == 1:
                    place.cache = folder / "cache"
                nodes.append(stack.enter_context(contextlib.contextmanager(cleaned)(place)))
            return nodes, cable

        yield build


# No rank begins a step after the one that the file HOLD names, while it is there.
HELD = """
real_pace = learning_rate_at
def learning_rate_at(done, total, cfg):
    while sys._getframe(1).f_code.co_name == "train" and done >= int(read_text(Path(os.environ["HOLD"])) or 1e9):
        time.sleep(0.1)
    return real_pace(done, total, cfg)
"""


@pytest.fixture
def hold(tmp_path: Path) -> Path:
    """The file that holds the runs at a step."""
    return tmp_path / "hold"


@pytest.mark.slow
def test_two_machines_train_stop_lose_each_other_and_go_on(machines, hold: Path, undisturbed: Place) -> None:  # noqa: F811
    nodes, cable = machines(shared=False, fault=HELD, HOLD=str(hold))
    first, second = nodes

    hold.write_text("5")
    launchers = start_both(nodes, *ONE_EACH)
    first.wait("a checkpoint", (first.outputs / "checkpoint-4").exists)
    stop = second.start("--stop")  # where the checkpoints are not
    second.wait("the request", lambda: "🛑 중단 요청" in console(second))
    hold.unlink()
    begun = time.monotonic()
    shown = finish_both(nodes, launchers)
    assert time.monotonic() - begun < 60
    assert [launcher.returncode for launcher in launchers] == [130, 130], "\n".join(shown)
    assert [node.state() for node in nodes] == ["stopped", "stopped"]
    assert all("🛑 학습을 중단했습니다" in text and "Traceback" not in text and "❌" not in text for text in shown)
    assert "중단됨" in second.finish(stop)[0]
    stopped_at = t.checkpoint_step(first.checkpoints()[-1])
    assert stopped_at in (6, 7)
    assert not second.checkpoints()

    hold.write_text("9")
    launchers = start_both(nodes, *ONE_EACH, "--resume", "--hang-timeout", "0.4")
    first.wait("a checkpoint", (first.outputs / "checkpoint-8").exists)
    cable.set("down")
    hold.unlink()
    begun = time.monotonic()
    shown = finish_both(nodes[:1], launchers[:1])
    assert time.monotonic() - begun < 60
    assert f"스텝 {stopped_at}부터" in shown[0]
    assert "0.4분 동안 진행이 없어 학습을 끝냅니다" in shown[0]
    shown += finish_both(nodes[1:], launchers[1:], 200)
    assert [launcher.returncode for launcher in launchers] == [1, 1], "\n".join(shown)
    assert [node.state() for node in nodes] == ["failed", "failed"]
    assert all("Traceback" not in text for text in shown)
    for node in nodes:
        node.wait_for_end(10)

    cable.set("up")
    launchers = start_both(nodes, *ONE_EACH, "--resume")
    shown = finish_both(nodes, launchers)
    assert [launcher.returncode for launcher in launchers] == [0, 0], "\n".join(shown)
    assert "스텝 8부터" in shown[0]
    assert [node.state() for node in nodes] == ["finished", "finished"]
    assert_same_run(first, undisturbed, 12)


@pytest.mark.slow
def test_two_machines_with_one_file_system_are_told_apart_and_restart_together(
    machines,
    hold: Path,
    undisturbed: Place,  # noqa: F811
) -> None:
    nodes, _ = machines(shared=True, fault=HELD + at_step(7, f"{FIRST_TIME}{KILL}"), HOLD=str(hold))
    first, second = nodes
    hold.write_text("5")
    launchers = start_both(nodes, *ONE_EACH)
    first.wait_for_step()
    assert all(node.run("--status").code == 0 for node in nodes)
    assert second.run("--status", "--node-rank", "0").code == 0  # alive, though not here
    answer = second.run("--stop", "--node-rank", "0")
    assert answer.code == 1
    assert "다른 머신에서 실행 중입니다" in answer.complaints[0]
    answer = second.run(*ONE_EACH)
    assert answer.code == 1
    assert "이미 실행 중인 학습이 있습니다" in answer.complaints[0]
    hold.unlink()
    shown = finish_both(nodes, launchers)
    assert [launcher.returncode for launcher in launchers] == [0, 0], "\n".join(shown) + first.report()
    assert_in_order(shown[0], [r"⚠️  학습 프로세스가 죽어 .*: 스텝 4부터", "✅ 학습 완료!"])
    assert [node.state() for node in nodes] == ["finished", "finished"]
    assert_same_run(first, undisturbed, 12)


def test_a_first_machine_that_does_not_answer_is_told_before_anything_is_written(tmp_path: Path) -> None:
    launcher = broken_launcher(tmp_path / "scripts", "")
    launcher.write_text(launcher.read_text(encoding="utf-8").replace("NODES_WAIT=600", "NODES_WAIT=2"))
    node = Node(tmp_path / "place", launcher, None, {"PATH": PATH}, rank=1, endpoint=f"127.0.0.1:{free_port()}")
    answer = node.run(*ONE_EACH)
    assert answer.code == 1, answer.text
    assert answer.complaints == [line for line in answer.complaints if f"응답하지 않습니다: {node.endpoint}" in line]
    assert len(answer.complaints) == 1
    assert not list(node.folder.iterdir())


@pytest.mark.slow
def test_other_machines_that_never_come_are_told(tmp_path: Path) -> None:
    launcher = broken_launcher(tmp_path / "scripts", "")
    launcher.write_text(launcher.read_text(encoding="utf-8").replace("NODES_WAIT=600", "NODES_WAIT=5"))
    node = Node(tmp_path / "place", launcher, None, {"PATH": PATH}, rank=0, endpoint=f"127.0.0.1:{free_port()}")
    answer = node.run(*ONE_EACH)
    assert answer.code == 1, answer.text
    assert answer.out.count("❌ 다른 머신과 연결하지 못했거나") == 1, answer.text
    assert "Traceback" not in answer.text
    assert node.state() is None
    node.wait_for_end(10)
