"""A run on several machines, as torchrun gives it: two launchers on one machine, each with files of its own."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

import pytest
from conftest import Place, assert_in_order, cleaned
from faults import SMALL, assert_same_run

ONE_EACH = [*SMALL, "--num-gpus", "1"]  # two ranks on two machines, as the undisturbed run has on one


def test_a_dry_run_shows_the_machines_and_a_command_with_their_meeting_place(place: Place) -> None:
    nodes = ["--nnodes", "2", "--node-rank", "1", "--rdzv-endpoint", "127.0.0.1:29511"]
    answer = place.run(*ONE_EACH, *nodes, "--dry-run")
    assert answer.code == 0, answer.text
    phrases = ["스텝당 토큰: 128$", r"CPU 프로세스 수: 2 \(머신 2대 x 1개, 이 머신은 1번\)$", "분산 학습: DDP"]
    phrases += ["--nnodes 2 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:29511 .*is_host=0"]
    assert_in_order(answer.out, phrases)
    assert "--standalone" not in answer.out
    assert not list(place.folder.iterdir())


@pytest.mark.slow
def test_two_machines_train_stop_together_and_go_on(tmp_path: Path, warm_cache: Path, undisturbed: Place) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    with contextlib.ExitStack() as stack:
        places = [Place(tmp_path / f"machine-{rank}", cache=warm_cache) for rank in (0, 1)]
        for place in places:
            stack.enter_context(contextlib.contextmanager(cleaned)(place))

        def start_both(*more: str) -> list:
            nodes = ["--nnodes", "2", "--rdzv-endpoint", endpoint, "--node-rank"]
            # The number counts, not who comes first.
            return [places[rank].start(*ONE_EACH, *nodes, str(rank), *more) for rank in (1, 0)][::-1]

        launchers = start_both("--max-steps", "100000", "--save-steps", "100000")
        places[0].wait_for_step()
        answer = places[0].run("--stop")
        assert answer.code == 0, answer.text
        shown = [place.finish(launcher)[0] for place, launcher in zip(places, launchers, strict=True)]
        assert [launcher.returncode for launcher in launchers] == [130, 0], "\n".join(shown)
        assert places[0].info()["state"] == "stopped"
        assert len(places[0].checkpoints()) == 1
        assert not places[1].checkpoints()
        names = {path.name for path in places[1].logs.iterdir()}
        assert names >= {"training_console_node_1.log", "training_rank_1.log"}
        for place in places:
            place.outputs = place.folder / "again" / "outputs"
        launchers = start_both()
        shown = [place.finish(launcher)[0] for place, launcher in zip(places, launchers, strict=True)]
        assert [launcher.returncode for launcher in launchers] == [0, 0], "\n".join(shown)
        assert_same_run(places[0].outputs.parent, undisturbed.folder, 12)
