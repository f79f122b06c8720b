"""The machine is tried before the corpus is read: what is wrong with it is told in a sentence."""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, Place
from samples import NeverStop, config, torchrun

import train_h100_dual as t

BODY = """
import sys, time
sys.path[:0] = [{tests!r}, {root!r}]
from pathlib import Path
from samples import config
import train_h100_dual as t
rank = t.rank_and_world()[0]
{fault}
if __name__ == "__main__":
    cfg = config(Path({folder!r}))
    cfg.output_dir.mkdir(exist_ok=True)
    t.set_up_logging(cfg, rank)
    try:
        everything = t.self_test(cfg)
    except t.EnvironmentProblem as error:
        sys.exit(f"problem of rank {{rank}}: {{error}}")
    if rank == 0:
        t.report_self_test(cfg, everything)
"""


def examine(folder: Path, fault: str) -> str:
    """What the self-test of two ranks says, on the CPU, where something is wrong with the machine."""
    script = folder / "examine.py"
    values = {"tests": f"{ROOT}/tests", "root": str(ROOT), "folder": str(folder)}
    script.write_text(BODY.format(fault=fault, **values), encoding="utf-8")
    answer = torchrun(script, [])
    return answer.stdout + answer.stderr


def test_a_healthy_machine_hears_what_it_can_do_and_a_slow_rank_is_named(tmp_path: Path) -> None:
    text = examine(tmp_path, "t.measure_tflops = lambda device: 2.0 - rank")
    lines = [line for line in text.splitlines() if line.startswith("✅")]
    assert lines, text
    assert lines[0] == "✅ 계산: 2, 1 TFLOP/s (BF16 행렬곱)"
    assert lines[1] == "✅ 어텐션: auto (fp32와 비교)"
    assert lines[2].startswith("✅ 통신: ") and lines[2].endswith("GB/s (all-reduce, gloo)")
    assert "⚠️  랭크 1의 GPU가 10% 넘게 느려" in text
    assert "--bf16-allreduce" in text
    kept = (tmp_path / "outputs" / "run_info.json").read_text(encoding="utf-8")
    assert '"self_test"' in kept


@pytest.mark.slow
def test_ranks_that_never_meet_end_in_its_time(tmp_path: Path) -> None:
    fault = "t.SELF_TEST_SECONDS = 25\nif rank: t.measure_reduce = lambda device: time.sleep(60)"
    text = examine(tmp_path, fault)
    assert "GPU 사이의 통신이 되지 않습니다" in text
    assert "NCCL_P2P_DISABLE=1" in text


plain_attention = t.causal_attention


def nan_backward(module: torch.nn.Module, query: torch.Tensor, *more: Any) -> tuple:
    output, weights = plain_attention(module, query, *more)
    if query.dtype == torch.bfloat16:
        output.register_hook(lambda gradient: gradient * float("nan"))
    return output, weights


def die(device: torch.device) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang(device: torch.device) -> None:
    time.sleep(60)


def try_with(name: str, function: Callable, *arguments: Any) -> Any:
    """In the self-test's process: try a part where a function of the script does something else."""
    setattr(t, name, function)
    return t.try_part(*arguments)


@pytest.mark.parametrize(("fault", "option", "sentence"), [
    (("causal_attention", nan_backward), "--bf16", "어텐션 커널을 쓸 수 없습니다. --attention math"),
    (("measure_tflops", die), "--fp32", "프로세스가 죽었습니다"),
    (("measure_tflops", hang), "--fp32", "3초 안에 끝나지 않았습니다"),
    ((), "--compile", "torch.compile을 쓸 수 없습니다. --no-compile"),
], ids=["NaN backward", "dead", "hanging", "compiler"])  # fmt: skip
def test_what_is_wrong_is_named_with_what_to_try(tmp_path: Path, monkeypatch, fault, option, sentence) -> None:
    monkeypatch.setenv("CXX", "/bin/false")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    if "hang" in str(fault):
        monkeypatch.setattr(t, "SELF_TEST_SECONDS", 3)
    if fault:
        monkeypatch.setattr(t, "try_part", functools.partial(try_with, *fault))
    with pytest.raises(t.EnvironmentProblem) as problem:
        t.self_test(config(tmp_path, option))
    assert sentence in str(problem.value)
    assert "--no-self-test" in str(problem.value)


def test_gpus_that_pytorch_can_not_use_are_refused_by_hand_too(place: Place, with_gpus: Callable[..., None]) -> None:
    with_gpus(2)
    command = place.command("--train", "--dummy-data")
    command["args"] = [sys.executable, f"{ROOT}/train_h100_dual.py", *command["args"][1:]]
    answer = place.execute(command)
    assert answer.code == 1
    assert "맞는 PyTorch를 설치하세요" in answer.text
    assert f"PyTorch {torch.__version__} (" in answer.text, "and the reason in its own words"


@pytest.mark.parametrize(
    ("compilers", "header", "sentence"),
    [(True, False, r"Python\.h 파일이 없습니다 \(apt install python3-dev\)"), (False, True, r"C 컴파일러가 없습니다")],
)
def test_what_triton_lacks_is_named(tmp_path: Path, monkeypatch, compilers: bool, header: bool, sentence: str) -> None:
    def broken(function: Callable) -> None:
        raise ValueError("whatever Triton says")

    (tmp_path / "Python.h").touch() if header else None
    monkeypatch.setattr(t.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(t.shutil, "which", lambda name: compilers)
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(RuntimeError, match=sentence):
        t.check_compiler(torch.device("cpu"))


@pytest.fixture
def report(tmp_path: Path, monkeypatch, caplog) -> Callable[..., list[str]]:
    """What two GPUs are told of their figures, where nvidia-smi shows this matrix and /dev/shm has so many MiB."""

    def tell(matrix: str, shared: int = 1024, **slow: float) -> list[str]:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{matrix}'\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setattr(t.shutil, "disk_usage", lambda path: SimpleNamespace(free=shared << 20))
        cfg = t.replace(config(tmp_path), device="cuda")
        cfg.output_dir.mkdir()
        found = {"compile": 4.0, "compute": 700.0, "attention": ["flash_fwd", "flash_bwd"], "reduce": 350.0, **slow}
        with caplog.at_level("INFO", "h100_dual"):
            t.report_self_test(cfg, [found, {**found, "compute": 690.0}])
        return caplog.messages[1:]

    return tell


def test_a_healthy_machine_hears_four_lines(report: Callable) -> None:
    assert report("GPU0  X  NV18") == [
        "✅ 컴파일: 4.0초",
        "✅ 계산: 700, 690 TFLOP/s (BF16 행렬곱)",
        "✅ 어텐션: flash_fwd, flash_bwd (fp32와 비교)",
        "✅ 통신: 350.0 GB/s (all-reduce, NVLink)",
    ]


def test_a_slow_card_slow_links_and_little_shared_memory_are_told_with_what_to_do(report: Callable) -> None:
    lines = report("GPU0  X  PHB", shared=64, compute=620.0, reduce=20.0)
    assert "✅ 통신: 20.0 GB/s (all-reduce, PCIe)" in lines
    warnings = "\n".join(line for line in lines if line.startswith("⚠️"))
    for sentence in ("랭크 0의 GPU가 10% 넘게 느려", "--bf16-allreduce", "/dev/shm에 64 MiB만", "--ipc=host"):
        assert sentence in warnings


@pytest.mark.parametrize(("kind", "stays"), [("ext4", True), ("nfs4", False)])
def test_kernels_are_kept_on_a_disk_of_this_machine(tmp_path: Path, monkeypatch, kind: str, stays: bool) -> None:
    disks = [SimpleNamespace(mountpoint="/", fstype="ext4"), SimpleNamespace(mountpoint=str(tmp_path), fstype=kind)]
    monkeypatch.setattr(t.psutil, "disk_partitions", lambda all: disks)
    monkeypatch.setattr(os, "environ", {name: os.environ[name] for name in ("PATH", "HOME")})
    for name in ("require_cuda", "set_up_logging", "run_training"):
        monkeypatch.setattr(t, name, lambda *_: None)
    t.main(t.replace(config(tmp_path), device="cuda"), NeverStop())
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"].startswith(str(tmp_path / "cache")) is stays
