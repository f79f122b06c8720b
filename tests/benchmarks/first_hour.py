#!/usr/bin/env python3
"""What ``first_hour.sh`` reads of its runs and measures of the machine.

    python tests/benchmarks/first_hour.py FOLDER DEVICE QUESTION [WORD...]

FOLDER holds the runs, each with its ``outputs`` and ``logs``.  A question prints what was seen in one line, and ends
with 1 where that isn't what is expected.
"""

from __future__ import annotations

import gzip
import importlib.util
import itertools
import json
import math
import random
import re
import statistics
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.utils.benchmark
from common import provenance, record, table

import train_h100_dual as t

Answer = tuple[str, bool]  # what was seen, and whether it is what is expected


# --- of runs ---


class Result:
    """What a run left."""

    def __init__(self, folder: Path):
        self.outputs, logs = folder / "outputs", folder / "logs"
        self.console = (logs / "training_console.log").read_text(encoding="utf-8")
        self.info = t.read_json(self.outputs / "run_info.json")
        self.steps = [line for line in t.read_metrics(self.outputs) if "loss" in line]

    def last(self, name: str) -> Any:
        """A figure of the last step."""
        return self.steps[-1][name]

    def speed(self, name: str = "tokens_per_second") -> float:
        """The median of a figure over the second half of the steps, behind the compiling and the profile."""
        return statistics.median(line[name] for line in self.steps[len(self.steps) // 2 :])


def learns(run: Result) -> Answer:
    """Whether the loss falls."""
    losses = [line["loss"] for line in run.steps]
    seen = f"loss {losses[0]:.4f} to {losses[-1]:.4f} in {len(losses)} steps, {run.speed():,.0f} tokens/s"
    return seen, losses[-1] < losses[0] - 0.1


def alike(run: Result, other: Result, tolerance: str) -> Answer:
    """Whether two runs end with the same loss, as a share of it."""
    one, two = run.last("loss"), other.last("loss")
    ratio = run.speed() / other.speed()
    return f"loss {one:.4f} and {two:.4f}, tokens/s x {ratio:.2f}", abs(one / two - 1) <= float(tolerance)


def faster(run: Result, other: Result, tolerance: str) -> Answer:
    """The same, where the first one has to be faster too."""
    seen, same = alike(run, other, tolerance)
    return f"{run.speed():,.0f} tokens/s; {seen}", same and run.speed() > other.speed()


def utilisation(run: Result, least: str, most_lost: str) -> Answer:
    """Tokens/s, MFU and memory, and which share of the profiled steps went to communication alone and to waiting."""
    per_gpu, mfu, memory = run.speed() / run.info["world_size"], run.speed("mfu"), run.last("memory_gb")
    with gzip.open(run.outputs / "profile_trace.json.gz") as stream:
        exposed, waiting = lost_shares(json.load(stream)["traceEvents"])
    seen = f"{per_gpu:,.0f} tokens/s a GPU, MFU {mfu:.1%}, {memory:.1f} GB; "
    seen += f"communication alone {exposed:.1%}, waiting {waiting:.1%} of the profiled steps"
    return seen, mfu >= float(least) and max(exposed, waiting) <= float(most_lost)


def lost_shares(events: Iterable[dict[str, Any]]) -> tuple[float, float]:
    """Shares of a trace's time on the GPU in which only NCCL works, and in which nothing does."""
    busy = [item for item in events if item.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    spans = [(item["ts"], item["ts"] + item["dur"], "nccl" in item["name"].lower()) for item in busy]
    whole = max(end for _, end, _ in spans) - min(begin for begin, _, _ in spans)
    anything = covered((begin, end) for begin, end, _ in spans)
    computing = covered((begin, end) for begin, end, is_nccl in spans if not is_nccl)
    return (anything - computing) / whole, 1 - anything / whole


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of what these spans cover together."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def evaluations(run: Result) -> Answer:
    """Whether the second evaluation is no slower than the first, which compiles."""
    first, second = map(float, re.findall(r"📈 검증 \(스텝 [\d,]+, ([\d.]+)초\)", run.console)[:2])
    return f"{first:.1f} s, then {second:.1f} s", second <= first


def resumed(run: Result, code: str) -> Answer:
    """Whether a run that was stopped, with this exit code, went on at the next step, and its checkpoints are whole."""
    checkpoints = t.list_checkpoints(run.outputs)
    kept = [path for path in checkpoints if (path / "training_state").is_dir()]  # with it went an older one's manifest
    damaged = [path.name for path in kept if t.checkpoint_damage(path, thorough=True)]
    numbers = [line["step"] for line in run.steps]
    seen = f"ended with {code} at step {t.checkpoint_step(checkpoints[-2])}, then went on to step {numbers[-1]}; "
    seen += f"checkpoints: {len(checkpoints)}, damaged: {', '.join(damaged) or 'none'}"
    return seen, code == str(t.STOPPED) and not damaged and numbers == [*range(1, numbers[-1] + 1)]


def restarted(run: Result) -> Answer:
    """Whether a run was started again once and came to its end."""
    restarts, state = run.info.get("restarts", 0), run.info["state"]
    return f"{restarts} restarts, {state} at step {run.last('step')}", restarts == 1 and state == "finished"


def room_left(run: Result) -> Answer:
    """The batch that a search found, and the memory of the run with it."""
    size = re.search(r"✅ 배치 크기 (\d+)", run.console)[1]
    peak, reserved, left = re.findall(r"([\d.]+) GB", re.search("GPU 메모리: .*", run.console)[0])
    seen = f"batch {size}: peak {peak} GB, reserved {reserved} GB, {left} GB left; {run.speed():,.0f} tokens/s"
    return seen, run.info["state"] == "finished" and float(left) > 0


# --- of the machine ---


def machine_config(device: str) -> t.TrainConfig:
    """Options for what is tried without a run: small on a CPU."""
    words = ["--train", "--device", device, "--bf16", "--compile", "--dummy-data"]
    words += ["--model-size", "tiny", "--max-seq-length", "256"] if device == "cpu" else []
    return t.resolve_config(t.parse_args(words), device)[0]


def self_test(device: str) -> Answer:
    """A run's own test of the machine, on each rank."""
    try:
        found = t.self_test(machine_config(device))
    except t.EnvironmentProblem as error:
        return str(error), False
    seconds, speeds = found[0]["compile"], [rank["compute"] for rank in found]
    link = found[0].get("reduce", math.inf)
    seen = f"compiled in {seconds:.1f} s; {', '.join(f'{speed:,.3g}' for speed in speeds)} TFLOP/s; "
    seen += f"all-reduce {link:,.1f} GB/s" if len(found) > 1 else "one GPU, no all-reduce"
    is_fast = min(speeds) > max(600, 0.9 * max(speeds)) and link > t.SLOW_LINK
    return seen, seconds < 60 and (is_fast or device == "cpu")


def attention(device: str) -> Answer:
    """Each kernel forward and backward against fp32, and its time."""
    kernels = ["flash", "math"] if device == "cpu" else ["flash", "cudnn", "efficient", "math"]
    if importlib.util.find_spec("flash_attn_interface"):  # the last one, as it stays in flash's place
        kernels.append("fa3")
    cfg, seen, problems = machine_config(device), [], 0
    for kernel in kernels:
        chosen = replace(cfg, attention=kernel)
        try:
            t.check_attention(chosen, torch.device(device))
            seen.append(f"{kernel} {time_attention(chosen, device):.2f} ms")
        except RuntimeError as error:
            seen.append(f"{kernel}: {t.describe_error(error)[0]}")
            problems += 1
    return ", ".join(seen), not problems


def time_attention(cfg: t.TrainConfig, device: str) -> float:
    """ms of one layer's attention forward and backward, for a batch of 4."""
    shape = t.PRESETS[cfg.model_size]
    size = (4, 4, cfg.max_seq_length, shape.hidden // shape.head, shape.head)
    *inputs, gradient = torch.randn(size, device=device, dtype=torch.bfloat16).transpose(2, 3)
    inputs = [one.detach().requires_grad_() for one in inputs]

    def step() -> None:
        torch.autograd.grad(t.causal_attention(None, *inputs, None)[0], inputs, gradient.transpose(1, 2))

    with t.attention_kernels(cfg.attention):
        return 1e3 * torch.utils.benchmark.Timer("step()", globals={"step": step}).blocked_autorange().median


# --- the whole ---


def write_words(path: Path) -> None:
    """Write a corpus of made-up words, enough of them for a vocabulary of 65,536."""
    draw = random.Random(0)
    syllables = [chr(0xAC00 + 28 * number) for number in range(399)]
    words = ["".join(draw.choices(syllables, k=draw.randint(2, 4))) for _ in range(150_000)]
    shares = [*itertools.accumulate(1 / math.sqrt(rank) for rank in range(1, 1 + len(words)))]
    with open(path, "w", encoding="utf-8") as stream:
        for _ in range(8000):
            text = " ".join(draw.choices(words, cum_weights=shares, k=300))
            stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def write_table(rows: Path, command: str, to_results: bool) -> None:
    """Print the table, and record it."""
    lines = [line.split("\t") for line in rows.read_text(encoding="utf-8").splitlines()]
    text = table(["item", "expected", "seen", "", "s"], lines)
    source = provenance("torch", "transformers", "accelerate", "datasets", command=command)
    print(f"\n{text}\n\n{source}")
    if to_results:
        record("The first hour", f"{source}\n\n{text}")


def ask(folder: Path, device: str, question: str, words: list[str]) -> Answer:
    """Answer a question; a word that names a run stands for it."""
    of_machine = {"self-test": self_test, "attention": attention}
    of_runs = {"learns": learns, "alike": alike, "faster": faster, "utilisation": utilisation}
    of_runs |= {"evaluations": evaluations, "resumed": resumed, "restarted": restarted, "room-left": room_left}
    if question in of_machine:
        return of_machine[question](device)
    return of_runs[question](*(Result(folder / word) if (folder / word).is_dir() else word for word in words))


def main() -> None:
    """Answer the question of the command line."""
    folder, device, question, *words = sys.argv[1:]
    if question == "words":
        write_words(Path(folder, "words.jsonl"))
    elif question == "table":
        write_table(Path(folder, "rows"), words[0], words[1] == "true")
    else:
        seen, is_expected = ask(Path(folder), device, question, words)
        if t.rank_and_world()[0] == 0 or not is_expected:
            print(seen)
        sys.exit(not is_expected)


if __name__ == "__main__":
    main()
