"""The machine is tried before the corpus is read: what is wrong with it is told in a sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, Place
from samples import torchrun

BODY = """
import os, sys, time
sys.path[:0] = [{tests!r}, {root!r}]
from pathlib import Path
from samples import config
import train_h100_dual as t
rank = t.rank_and_world()[0]
{fault}
if __name__ == "__main__":
    cfg = config(Path({folder!r}), *{options!r})
    cfg.output_dir.mkdir(exist_ok=True)
    t.set_up_logging(cfg, rank)
    try:
        everything = t.self_test(cfg)
    except t.EnvironmentProblem as error:
        sys.exit(f"problem of rank {{rank}}: {{error}}")
    if rank == 0:
        t.report_self_test(cfg, everything)
"""


def examine(folder: Path, fault: str = "", *options: str, ranks: int = 1, **environment: str) -> str:
    """What the self-test of these ranks says, on the CPU, where something is wrong with the machine."""
    script = folder / "examine.py"
    values = {"tests": f"{ROOT}/tests", "root": str(ROOT), "folder": str(folder), "options": options}
    script.write_text(BODY.format(fault=fault, **values), encoding="utf-8")
    if ranks > 1:
        answer = torchrun(script, [], ranks)
    else:
        command = [sys.executable, str(script)]
        answer = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)
    return answer.stdout + answer.stderr


def test_a_healthy_machine_hears_what_it_can_do_and_a_slow_rank_is_named(tmp_path: Path) -> None:
    text = examine(tmp_path, "t.measure_tflops = lambda device: 2.0 - rank", ranks=2)
    lines = [line for line in text.splitlines() if line.startswith("✅")]
    assert lines, text
    assert lines[0] == "✅ 계산: 2, 1 TFLOP/s (BF16 행렬곱)"
    assert lines[1] == "✅ 어텐션: auto (fp32와 비교)"
    assert lines[2].startswith("✅ 통신: ") and lines[2].endswith("GB/s (all-reduce, gloo)")
    assert "⚠️  랭크 1의 GPU가 10% 넘게 느려" in text
    assert "--bf16-allreduce" in text
    kept = (tmp_path / "outputs" / "run_info.json").read_text(encoding="utf-8")
    assert '"self_test"' in kept


def test_ranks_that_never_meet_end_in_its_time(tmp_path: Path) -> None:
    fault = "t.SELF_TEST_SECONDS = 25\nif rank: t.measure_reduce = lambda device: time.sleep(60)"
    text = examine(tmp_path, fault, ranks=2)
    assert "GPU 사이의 통신이 되지 않습니다" in text
    assert "NCCL_P2P_DISABLE=1" in text


NAN = """
plain = t.causal_attention
def broken(module, query, *more):
    output, weights = plain(module, query, *more)
    if query.dtype == t.torch.bfloat16:
        output.register_hook(lambda gradient: gradient * float("nan"))
    return output, weights
t.causal_attention = broken
"""


@pytest.mark.parametrize(
    ("fault", "options", "environment", "sentence"),
    [
        (NAN, ("--bf16",), {}, "어텐션 커널을 쓸 수 없습니다. --attention math"),
        ("t.measure_tflops = lambda device: os.kill(os.getpid(), 9)", (), {}, "프로세스가 죽었습니다"),
        (
            "t.measure_tflops = lambda device: time.sleep(60)\nt.SELF_TEST_SECONDS = 15",
            (),
            {},
            "15초 안에 끝나지 않았습니다",
        ),
        ("", ("--compile",), {"CXX": "/bin/false"}, "torch.compile을 쓸 수 없습니다. --no-compile"),
    ],
    ids=["NaN backward", "dead", "hanging", "compiler"],
)
def test_what_is_wrong_is_named_with_what_to_try(
    tmp_path: Path, fault: str, options: tuple, environment: dict, sentence: str
) -> None:
    text = examine(tmp_path, fault, *options, **environment, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "compiled"))
    assert sentence in text
    assert "--no-self-test" in text


def test_a_run_by_hand_refuses_gpus_that_pytorch_can_not_use(place: Place, with_gpus: Callable[..., None]) -> None:
    with_gpus(1)
    command = place.command("--train", "--dummy-data")
    answer = place.execute({**command, "args": [sys.executable, f"{ROOT}/train_h100_dual.py", *command["args"][1:]]})
    assert answer.code == 1
    assert "nvidia-smi의 GPU를 PyTorch" in answer.text
