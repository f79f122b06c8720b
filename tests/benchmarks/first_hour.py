#!/usr/bin/env python3
"""The first hour on a machine, started by ``first_hour.sh``: what has to be seen there, expected beside seen.

Each item of ``ITEMS`` is answered in a process of its own, and one that fails keeps none of the others from it.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench
import numpy as np
import psutil
import save_speed
import torch
import torch.utils.benchmark
from common import ROOT, median_and_range, provenance, ratios, record, table
from torch.cuda import device_count

import train_h100_dual as t

Answer = tuple[str, bool]  # what was seen, and whether it is what is expected
COMMON = "--train --foreground --model-size tiny --gradient-accumulation-steps 1 --learning-rate 1e-3 --max-steps 20"
COMMON += " --logging-steps 1 --eval-steps 9999 --save-steps 9999 --no-save-initial --report-to none --max-restarts 0"
ON_CPU = "--device cpu --model-size tiny --dummy-data --vocab-size 2048 --max-seq-length 64"
BIG = "--model-size 1.3b --gradient-accumulation-steps 8 --max-steps 16"  # 4 x 8 rows a GPU
HURT = "--no-compile --max-restarts 1 --batch-size 1 --max-steps 150 --save-steps 50"
RUNS = {  # what each has beside COMMON
    "self-test": "--max-steps 1",
    "eager": "--no-compile",
    "compiled": "--compile",
    "fp16": "--no-compile --fp16",
    "muon": "--no-compile --optimizer muon",
    "one-rank": "--no-compile --num-gpus 1 --batch-size 4",
    "two-ranks": "--no-compile --num-gpus 2 --batch-size 2",
    "125m": "--model-size 125m --batch-size 16 --gradient-accumulation-steps 2 --max-steps 32 --profile",
    "350m": "--model-size 350m --batch-size 16 --gradient-accumulation-steps 2 --max-steps 32 --profile",
    "1.3b-4x8": f"{BIG} --profile",
    "1.3b-8x4": f"{BIG} --profile --batch-size 8 --gradient-accumulation-steps 4",
    "cudnn": f"{BIG} --attention cudnn",
    "fp8": f"{BIG} --fp8",
    "batch-size": f"{BIG} --find-batch-size --max-steps 6",
    "evaluation": "--compile --eval-steps 10",
    "stop": "--no-compile --max-steps 100000",
    "stop-in-save": "--no-compile --max-steps 100000 --save-steps 5 --save-total-limit 3",
    "kill": HURT,
    "hang": f"{HURT} --num-gpus 2 --hang-timeout 0.5",
}


def launch(name: str, *more: str) -> subprocess.Popen:
    """Start a run in a directory of its name, on two GPUs at most."""
    words = f"{COMMON} --output-dir {name}/output --logs-dir {name}/logs --cache-dir cache "
    words += "--dataset-path words.jsonl" if device_count() else ON_CPU
    words += f" --num-gpus {min(2, device_count()) or 1} {RUNS[name]}"
    words += "" if name == "self-test" else " --no-self-test"
    return subprocess.Popen([ROOT / "run_h100_dual.sh", "--python", sys.executable, *words.split(), *more])


def launch_until(name: str, pattern: str) -> tuple[subprocess.Popen, int]:
    """Start a run, and wait for a path in its output; its process here, and its supervisor's number."""
    process = launch(name)
    while not any(Path(name, "output").glob(pattern)):
        if process.poll() is not None:
            raise RuntimeError(f"the run {name} ended with {process.returncode} before there was {pattern}")
        time.sleep(0.02)
    return process, int(Path(name, "logs", "training.pid").read_text())


class Result:
    """What a run left; one that isn't there is run to its end."""

    def __init__(self, name: str):
        if not Path(name).exists() and (code := launch(name).wait()):
            raise RuntimeError(f"the run {name} ended with {code}")
        self.output = Path(name, "output")
        self.console = Path(name, "logs", "training_console.log").read_text(encoding="utf-8")
        self.info = t.read_json(self.output / "run_info.json")
        self.steps = [line for line in t.read_metrics(self.output) if "loss" in line]

    def speed(self, figure: str = "tokens_per_second") -> float:
        """The median of a figure over the second half of the steps, behind the compiling and the profile."""
        return statistics.median(line[figure] for line in self.steps[len(self.steps) // 2 :])


# --- questions to runs ---


def learns(name: str) -> Answer:
    """Whether the loss falls."""
    run = Result(name)
    first, last = run.steps[0]["loss"], run.steps[-1]["loss"]
    return f"loss {first:.4f} to {last:.4f} in {len(run.steps)} steps, {run.speed():,.0f} tokens/s", last < first - 0.1


def alike(name: str, other_name: str, tolerance: float, least_speed: float = 0.0) -> Answer:
    """Whether two runs end with the same loss, and the first is faster than this share of the other's speed."""
    run, other = Result(name), Result(other_name)
    one, two, ratio = run.steps[-1]["loss"], other.steps[-1]["loss"], run.speed() / other.speed()
    seen = f"loss {one:.4f} and {two:.4f}, {run.speed():,.0f} tokens/s, x {ratio:.2f}"
    return seen, abs(one / two - 1) <= tolerance and ratio > least_speed


def utilisation(name: str, least: float, most_lost: float = 1.0) -> Answer:
    """Tokens/s, MFU and memory, and which share of the profiled steps went to communication alone and to waiting."""
    run = Result(name)
    per_gpu, mfu, memory = run.speed() / run.info["world_size"], run.speed("mfu"), run.steps[-1]["memory_gb"]
    with gzip.open(run.output / "profile_trace.json.gz") as stream:
        exposed, waiting = lost_shares(json.load(stream)["traceEvents"])
    seen = f"{per_gpu:,.0f} tokens/s a GPU, MFU {mfu:.1%}, {memory:.1f} GB; "
    seen += f"communication alone {exposed:.1%}, waiting {waiting:.1%} of the profiled steps"
    return seen, mfu >= least and max(exposed, waiting) <= most_lost


def lost_shares(events: list[dict[str, Any]]) -> tuple[float, float]:
    """Shares of a trace's time on the GPU in which only NCCL works, and in which nothing does."""
    edges = []
    for item in events:
        if item.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            is_nccl = "nccl" in item["name"].lower()
            edges += [(item["ts"], 1, is_nccl), (item["ts"] + item["dur"], -1, is_nccl)]
    moments, changes, is_nccl = map(np.array, zip(*sorted(edges), strict=True))
    lengths = np.diff(moments)
    computes, communicates = (np.cumsum(changes * of_kind)[:-1] > 0 for of_kind in (~is_nccl, is_nccl))
    alone, idle = ~computes & communicates, ~computes & ~communicates
    return lengths[alone].sum() / lengths.sum(), lengths[idle].sum() / lengths.sum()


def evaluations(name: str) -> Answer:
    """How long the first evaluation takes and the second, neither of which compiles anything."""
    first, second = map(float, re.findall(r"📈 검증 \(스텝 [\d,]+, ([\d.]+)초\)", Result(name).console)[:2])
    return f"{first:.1f} s, then {second:.1f} s", max(first, second) <= 2 * min(first, second) + 0.5


def stop(name: str, pattern: str) -> Answer:
    """Stop a run by SIGTERM once a path is there, resume it for three steps, and look at its checkpoints."""
    process, supervisor = launch_until(name, pattern)
    os.kill(supervisor, signal.SIGTERM)
    code, output = process.wait(), Path(name, "output")
    stopped = int(t.list_checkpoints(output)[-1].name.rpartition("-")[2])
    launch(name, "--max-steps", str(stopped + 3), "--resume").wait()
    checkpoints = t.list_checkpoints(output)
    kept = [path for path in checkpoints if (path / "training_state").is_dir()]  # with it went an older one's manifest
    damaged = [path.name for path in kept if t.checkpoint_damage(path, thorough=True)]
    steps = [line["step"] for line in Result(name).steps]
    seen = f"ended with {code} at step {stopped}, then went on to step {steps[-1]}; "
    seen += f"checkpoints: {len(checkpoints)}, damaged: {', '.join(damaged) or 'none'}"
    return seen, code == t.STOPPED and not damaged and steps == [*range(1, stopped + 4)]


def hurt(name: str, number: int) -> Answer:
    """Send a signal to a run's last rank once there is a checkpoint, and see the run end."""
    process, supervisor = launch_until(name, "checkpoint-*")
    agent = next(child for child in psutil.Process(supervisor).children() if child.children())  # torchrun
    agent.children()[-1].send_signal(number)
    process.wait()
    run = Result(name)
    restarts, state = run.info.get("restarts", 0), run.info["state"]
    return f"{restarts} restarts, {state} at step {run.steps[-1]['step']}", restarts == 1 and state == "finished"


def room_left(name: str) -> Answer:
    """The batch that a search found, and the memory of the run with it."""
    run = Result(name)
    figures = r"✅ 배치 크기 (\d+).*GPU 메모리: 최대 할당 ([\d.]+) GB, 예약 ([\d.]+) GB, 남음 ([\d.]+) GB"
    size, peak, reserved, left = re.search(figures, run.console, re.DOTALL).groups()
    seen = f"batch {size}: peak {peak} GB, reserved {reserved} GB, {left} GB left; {run.speed():,.0f} tokens/s"
    return seen, run.info["state"] == "finished" and float(left) > 0


# --- questions to the machine ---


def topology(name: str) -> Answer:
    """How the GPUs are linked."""
    matrix = subprocess.run(["nvidia-smi", "topo", "-m"], stdout=subprocess.PIPE, text=True, check=True).stdout
    print(matrix)
    links = sorted({*re.findall(r"\bNV\d+\b", matrix)})
    return ", ".join(links) or "no NVLink", bool(links)


def self_test(name: str) -> Answer:
    """A run's own test of the machine, which on a CPU no run makes."""
    cfg = t.resolve_config(t.parse_args(["--bf16", "--compile", *ON_CPU.split()]), "cpu")[0]
    ranks = Result(name).info["self_test"] if device_count() else t.self_test(cfg)
    seconds, speeds, link = ranks[0]["compile"], [rank["compute"] for rank in ranks], ranks[0].get("reduce")
    seen = f"compiled in {seconds:.1f} s; {', '.join(f'{speed:,.3g}' for speed in speeds)} TFLOP/s; "
    seen += "one rank, no all-reduce" if link is None else f"all-reduce {link:,.1f} GB/s"
    is_fast = min(speeds) > max(600, 0.9 * max(speeds)) and (link is None or link > 100)
    return seen, seconds < 60 and (is_fast or not device_count())


def attention(name: str) -> Answer:
    """Each kernel forward and backward against fp32, and its time for one layer and a batch of 4."""
    kernels = ["flash", "cudnn", "efficient", "math"] if device_count() else ["flash", "math"]
    kernels += ["fa3"] if importlib.util.find_spec("flash_attn_interface") else []  # last: it stays in flash's place
    device, words = ("cuda", []) if device_count() else ("cpu", ON_CPU.split())
    cfg = t.resolve_config(t.parse_args(["--train", "--bf16", *words]), device)[0]
    shape, seen, problems = t.PRESETS[cfg.model_size], [], 0
    size = (4, 4, cfg.max_seq_length, shape.hidden // shape.head, shape.head)
    *inputs, gradient = torch.randn(size, device=device, dtype=torch.bfloat16).transpose(2, 3)
    inputs = [one.detach().requires_grad_() for one in inputs]
    names = {"attention": t.causal_attention, "inputs": inputs, "gradient": gradient.transpose(1, 2)}
    timer = torch.utils.benchmark.Timer("attention(None, *inputs, None)[0].backward(gradient)", globals=names)
    for kernel in kernels:
        try:
            t.check_attention(replace(cfg, attention=kernel), torch.device(device))
            with t.attention_kernels(kernel):
                seen.append(f"{kernel} {1e3 * timer.blocked_autorange().median:.2f} ms")
        except RuntimeError as error:
            seen.append(f"{kernel}: {t.describe_error(error)[0]}")
            problems += 1
    return ", ".join(seen), not problems


def save(name: str) -> Answer:
    """What a save costs the steps around it, as a share of one that is waited for; a CPU's cores are the writer's."""
    layers, device = (16, "cuda") if device_count() else (2, "cpu")
    rounds, _ = save_speed.measure_rounds(Path(name).resolve(), layers, 256, 3, device)
    shares = [one[save_speed.SHARE] for one in rounds]
    return f"{median_and_range(shares)}, of 3 rounds", device == "cpu" or statistics.median(shares) <= 0.15


def trainer(name: str) -> Answer:
    """Our speed to that of Hugging Face's Trainer and of a bare loop, their blocks taking turns."""
    gpus, names = device_count(), ("ours", "HF Trainer", "bare DDP")
    shape = ("125m", 65536, 16, 2048, "cuda", gpus) if gpus else ("tiny", 8192, 4, 256, "cpu", 2)
    contestants = bench.compete(bench.Setting(*shape), Path.cwd(), names, blocks=6 if gpus else 4, rounds=1)
    print(bench.speed_table(contestants))
    ours, theirs, bare = (one.column("seconds") for one in contestants)
    seen = f"ours to Trainer {ratios(theirs, ours)}, to a bare loop {ratios(bare, ours)}"
    to_theirs, to_bare = map(float, re.findall(r"([\d.]+) \(", seen))
    return seen, to_theirs >= 1 and to_bare >= 0.95


# --- items: name, limit in seconds, what it needs, what is expected, the question and its words ---
ITEMS = [
    ("topology", 20, "two GPUs", "NVLink between the GPUs", topology),
    ("self-test", 300, "", "compiled in 60 s; H100: 600 TFLOP/s and 100 GB/s or more, none 10 % behind", self_test),
    ("attention", 120, "", "each kernel within 2 % of fp32 (H200: flash 1.06 ms a layer, cuDNN 0.60 ms)", attention),
    ("eager", 240, "", "tiny learns", learns),
    ("compiled", 420, "", "the loss of eager within 1 %", alike, "eager", 0.01),
    ("fp16", 240, "a GPU", "the loss of eager within 2 %", alike, "eager", 0.02),
    ("muon", 240, "", "tiny learns", learns),
    ("two-ranks", 300, "two GPUs or none", "one rank's loss on the same rows within 1 %", alike, "one-rank", 0.01),
    ("125m", 400, "a GPU", "MFU 35 % or more (H200: 394,000 tokens/s, 41 %)", utilisation, 0.35),
    ("350m", 400, "a GPU", "MFU 35 % or more", utilisation, 0.35),
    ("1.3b-4x8", 600, "a GPU", "45,000 to 51,000 tokens/s a GPU, MFU 40 % or more, 3 % lost", utilisation, 0.40, 0.03),
    ("1.3b-8x4", 600, "a GPU", "the same, MFU 2 points more", utilisation, 0.42, 0.03),
    ("cudnn", 900, "a GPU", "faster than flash (H200: by 7 %), the loss within 1 %", alike, "1.3b-4x8", 0.01, 1.0),
    ("save", 400, "", "steps around it lose 0.15 of a save that is waited for at most (CPU: only told)", save),
    ("evaluation", 420, "", "the second takes as long as the first: nothing is compiled", evaluations),
    ("stop", 300, "", "130; checkpoints are whole, a resumed run goes on at the next step", stop, "metrics.jsonl"),
    ("stop-in-save", 300, "", "the same, also of the save that was under way", stop, ".checkpoint-*.tmp"),
    ("kill", 300, "", "after kill -9 of a rank started again once, and finished", hurt, signal.SIGKILL),
    ("hang", 400, "two GPUs or none", "as kill, after kill -STOP of a rank", hurt, signal.SIGSTOP),
    ("batch-size", 600, "a GPU", "a batch is found, and the run with it has memory left", room_left),
    ("fp8", 900, "a GPU", "faster than bf16 (others: 17 to 28 %), the loss within 3 %", alike, "1.3b-4x8", 0.03, 1.0),
    ("trainer", 900, "", "at least the speed of Hugging Face's Trainer, and 0.95 of a bare loop's", trainer),
]


def write_words() -> None:
    """Write a corpus of made-up words, enough of them for a vocabulary of 65,536."""
    draw = np.random.default_rng(0)
    words = ["".join(map(chr, word)) for word in 0xAC00 + 28 * draw.integers(399, size=(150_000, 3))]
    with open("words.jsonl", "w", encoding="utf-8") as stream:
        for numbers in draw.zipf(1.1, (8000, 300)) % len(words):
            stream.write(json.dumps({"text": " ".join(words[number] for number in numbers)}, ensure_ascii=False) + "\n")


def show_in(log: Path) -> None:
    """Let this process, and all that it starts, show what it shows in a file."""
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(stream, 1)
    os.dup2(stream, 2)


def try_item(log: Path, limit: int, question: Callable[..., Answer], *words: Any) -> Answer:
    """Ask a question in a process of its own; whatever that started and left is ended."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork"), show_in, (log,)) as worker:
        try:
            return worker.submit(question, *words).result(limit)
        except TimeoutError:
            return f"not done after {limit} s", False
        except Exception as error:  # whatever keeps an item from its answer
            told = [line for line in log.read_text(encoding="utf-8").splitlines() if line.startswith("❌")]
            with open(log, "a", encoding="utf-8") as stream:
                stream.write(f"{error.__cause__ or error}\n")  # a traceback of that process
            return (told or [t.describe_error(error)[0]])[0], False
        finally:
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def main() -> None:
    """Go through the items, print the table, and record it."""
    names = [name for name, *_ in ITEMS]
    parser = argparse.ArgumentParser(prog="first_hour.sh", description=__doc__, allow_abbrev=False)
    parser.add_argument("items", nargs="*", metavar="ITEM", help=f"by default all: {' '.join(names)}")
    parser.add_argument("--no-record", action="store_true", help="append nothing to RESULTS.md")
    args = parser.parse_args()
    if unknown := {*args.items} - {*names}:
        parser.error(f"{' '.join(unknown)}: no such item; there are {' '.join(names)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no run is left
    logs, rows, gpus = Path(tempfile.mkdtemp(prefix="first_hour.")), [], device_count()
    lacks = {"": False, "a GPU": gpus < 1, "two GPUs": gpus < 2, "two GPUs or none": gpus == 1}
    with tempfile.TemporaryDirectory(dir=logs) as runs, contextlib.chdir(runs):
        if gpus:
            write_words()
        for name, limit, needs, expected, question, *words in ITEMS:
            if name not in (args.items or names):
                continue
            begun, verdict, seen = time.monotonic(), "not run", f"needs {needs}"
            if not lacks[needs]:
                seen, is_expected = try_item(logs / f"{name}.log", limit, question, name, *words)
                verdict = "as expected" if is_expected else "NOT as expected"
            rows.append([name, expected, seen.replace("|", " "), verdict, f"{time.monotonic() - begun:.0f}"])
            print("{0}: {3} ({4} s)\n   expected: {1}\n   seen: {2}".format(*rows[-1]), flush=True)
            for path in Path().glob("*/output/checkpoint-*"):
                shutil.rmtree(path)
    text = table(["item", "expected", "seen", "", "s"], rows)
    source = provenance("torch", "transformers", "accelerate", "datasets")
    print(f"\n{text}\n\n{source}\nlogs: {logs}")
    if not args.no_record:
        record("The first hour", f"{source}\n\n{text}")
    sys.exit(any(verdict == "NOT as expected" for *_, verdict, _ in rows))


if __name__ == "__main__":
    main()
