#!/usr/bin/env python3
"""Compare training speed and start-up with Hugging Face's Trainer and a bare DDP loop.

``run.sh`` starts it.  All contestants train the same model on the same rows, and their blocks of steps take turns
in one run.  See README.md beside this file.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import select
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import corpus_file, median_and_range, provenance, ratios, record, table, take_turns

import train_h100_dual as t

HERE = Path(__file__).resolve().parent
SPARE_ROWS = 64  # held out of the stream, and more
MOST_TOKENS = 20_000_000  # of the stream; a longer run reads it again
ENOUGH_STEPS = "10000000"
BLOCK_SECONDS = 2  # or one step
MUON = "ours, Muon"


@dataclass(frozen=True)
class Setting:
    """What is trained: a model and its batch a rank; compiled in bf16 on a GPU, eager in fp32 on the CPU."""

    model: str
    vocab_size: int
    batch_size: int
    max_seq_length: int
    device: str
    ranks: int
    accumulation: int = 1

    @property
    def step_tokens(self) -> int:
        """Tokens of a step over all ranks."""
        return self.batch_size * self.max_seq_length * self.ranks * self.accumulation

    def describe(self) -> str:
        """One line for the table's head."""
        kind = "bf16, compiled" if self.device == "cuda" else "fp32, eager"
        times = f" x {self.accumulation}" if self.accumulation > 1 else ""
        return f"{self.model}, {self.ranks} x {self.batch_size} x {self.max_seq_length}{times} tokens a step, {kind}"

    def options(self) -> list[str]:
        """The options of train_h100_dual.py that stand for it."""
        batch = f"--batch-size {self.batch_size} --gradient-accumulation-steps {self.accumulation}"
        rows = f"--vocab-size {self.vocab_size} --max-seq-length {self.max_seq_length}"
        return f"--train --device {self.device} --model-size {self.model} {rows} {batch}".split()


def write_tokens(path: Path, setting: Setting) -> None:
    """Write a stream in which each token hangs on the one before it, so that a model has something to learn."""
    draw, length = np.random.default_rng(0), setting.max_seq_length
    rows = min(MOST_TOKENS // length, 2000 * setting.step_tokens // length) + SPARE_ROWS
    tokens = np.empty((rows, length), np.uint16)
    token = draw.integers(0, setting.vocab_size, rows)
    for column in range(length):
        token = (31 * token + np.minimum(draw.zipf(1.5, rows), 1000)) % setting.vocab_size
        tokens[:, column] = token
    tokens.tofile(path)


# --- contestants as processes ---


class Gone(RuntimeError):
    """A process ended before its time; the message is the end of its log."""

    def __init__(self, log: Path):
        super().__init__(log.read_text(encoding="utf-8", errors="replace")[-3000:])


class Contestant:
    """All ranks of one way to train, started as torchrun would with a pipe to each, and what was measured of them."""

    def __init__(self, name: str, setting: Setting, folder: Path):
        self.name, self.setting, self.log, self.place = name, setting, folder / f"{name}.log", folder / name
        optimizer, rate = "muon" if name == MUON else "adamw", 1e-3 if setting.device == "cpu" else 3e-4
        run = f"--dummy-data --report-to none --optimizer {optimizer} --learning-rate {rate} --lr-schedule constant"
        run += " --warmup-ratio 0" + "".join(f" --{kind}-steps {ENOUGH_STEPS}" for kind in ("max", "eval", "save"))
        words = [name, str(folder / "tokens.bin"), str(self.place), *setting.options(), *run.split()]
        self.command = [sys.executable, str(HERE / "bench_worker.py"), *words]
        self.blocks: list[dict[str, float]] = []
        self.first_steps: list[float] = []
        self.processes: list[subprocess.Popen] = []
        self.loss = self.problem = None

    def start(self) -> None:
        """Start the ranks and wait for their first step."""
        setting = self.setting
        shutil.rmtree(self.place, ignore_errors=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        ranks, threads = str(setting.ranks), str(max(1, len(os.sched_getaffinity(0)) // setting.ranks))
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        if setting.device == "cpu":
            environment |= {"OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}
        self.orders, self.processes, begun = [], [], time.perf_counter()
        answer_in, answer_out = os.pipe()
        with open(self.log, "wb") as log:
            for rank in map(str, range(setting.ranks)):
                order_in, order_out = os.pipe()
                environment |= {"RANK": rank, "LOCAL_RANK": rank}
                environment |= {"BENCH_IN": str(order_in), "BENCH_OUT": str(answer_out)}
                given = {"env": environment, "pass_fds": (order_in, answer_out), "stdout": log, "stderr": log}
                self.processes.append(subprocess.Popen(self.command, **given))
                os.close(order_in)
                self.orders.append(open(order_out, "w", encoding="utf-8"))  # noqa: SIM115  (end() closes it)
        os.close(answer_out)
        self.answers = open(answer_in, encoding="utf-8")  # noqa: SIM115
        self.answer()
        self.first_steps.append(time.perf_counter() - begun)
        self.trained = 1

    def answer(self) -> dict[str, Any]:
        """Wait for rank 0's next line; a rank that failed alone would leave it waiting in a collective."""
        while not select.select([self.answers], [], [], 1)[0]:
            if any(process.poll() for process in self.processes):
                self.kill()
        line = self.answers.readline()
        if not line:
            raise Gone(self.log)
        return json.loads(line)

    def train(self, steps: int) -> dict[str, float]:
        """Let it train: seconds that the steps took, seconds that rank 0 computed, and peak memory."""
        for order in self.orders:
            print(steps, file=order, flush=True)
        self.trained, self.last_steps = self.trained + steps, steps
        return self.answer()

    def measure(self, steps: int) -> None:
        """A block that counts."""
        self.blocks.append(self.train(steps))

    def end(self) -> None:
        """Tell it to stop, and keep its loss on the held-out rows."""
        for order in self.orders:
            order.close()
        self.loss = self.answer()["loss"]

    def kill(self) -> None:
        """End whatever is left of it."""
        for process in self.processes:
            process.kill()
            process.wait()

    def attempt(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """What the call returns; None once the contestant has failed, which is noted and said."""
        try:
            return None if self.problem else call(*arguments)
        except (Gone, BrokenPipeError) as error:
            full = "OutOfMemoryError" in str(error) or "out of memory" in str(error)
            self.problem = "out of memory" if full else "failed"
            print(self.name, self.problem, "" if full else error, file=sys.stderr)

    def column(self, name: str) -> list[float]:
        """One figure of all blocks, in the order of the run."""
        return [block[name] for block in self.blocks]


def play(contestants: Sequence[Contestant], blocks: int, steps: int) -> int:
    """Let these live at the same time and take turns; returns the steps of a block, which the first decides if 0."""
    try:
        for one in contestants:
            one.attempt(one.start)
            warm = one.attempt(one.train, 2)
            steps = steps or (max(1, round(2 * BLOCK_SECONDS / warm["seconds"])) if warm else 0)
        take_turns({one.name: functools.partial(one.attempt, one.measure, steps) for one in contestants}, blocks)
        for one in contestants:
            one.attempt(one.end)
    finally:
        for one in contestants:
            one.kill()
    return steps


def compete(setting: Setting, folder: Path, names: Sequence[str], blocks: int, rounds: int) -> list[Contestant]:
    """All resident at once on the CPU; on a GPU, which holds only one such model, one at a time anew in each round."""
    write_tokens(folder / "tokens.bin", setting)
    contestants, steps = [Contestant(name, setting, folder) for name in names], 0
    if setting.device == "cpu":
        play(contestants, blocks, steps)
        return contestants
    for one in contestants * rounds:
        steps = play([one], -(-blocks // rounds), steps)
    return contestants


def speed_table(contestants: list[Contestant]) -> str:
    """The table of one setting."""
    ours, setting = contestants[0], contestants[0].setting
    preset, length = t.PRESETS[setting.model], setting.max_seq_length
    flops = t.training_flops(preset.parameter_count(setting.vocab_size), preset.layers, preset.hidden, length)
    peak = t.named_peak_flops(torch.cuda.get_device_name()) if setting.device == "cuda" else None
    steps, rows = ours.last_steps, []
    for one in contestants:
        if one.problem or not one.blocks:
            rows.append([one.name, one.problem or "-", *["-"] * 7])
            continue
        speeds = sorted(steps * setting.step_tokens / seconds for seconds in one.column("seconds"))
        quarter, middle = len(speeds) // 4, statistics.median(speeds)
        compared = (ratios(one.column(kind), ours.column(kind)) for kind in ("seconds", "cpu_seconds"))
        rows.append(
            [
                one.name,
                f"{middle:,.0f}",
                f"{speeds[quarter]:,.0f} to {speeds[-1 - quarter]:,.0f}",
                *(["-"] * 2 if one is ours else compared),
                f"{middle * flops / (peak * setting.ranks):.1%}" if peak else "-",
                f"{max(one.column('memory_mib')):,.0f}",
                f"{statistics.median(one.first_steps):.1f}",
                f"{one.loss:.4f}",
            ]
        )
    head = ["", "tokens/s, median", "middle half", "ours / it (95 %)", "the same by processor time", "MFU"]
    head += ["peak memory a rank, MiB", "process start to first step, s"]
    head += [f"loss after {ours.trained * setting.step_tokens:,} tokens"]
    return f"{setting.describe()}; {len(ours.blocks)} blocks of {steps} steps each:\n\n{table(head, rows)}"


def best_batch(setting: Setting, folder: Path) -> Setting:
    """The batch, doubled while it helps by more than 1 %, at which ours is fastest on this machine."""
    best, speed = setting, 0.0
    while True:
        trial = replace(setting, batch_size=2 * best.batch_size if speed else setting.batch_size)
        (ours,) = compete(trial, folder, ["ours"], 3, 1)
        now = 0 if ours.problem else ours.last_steps * trial.step_tokens / statistics.median(ours.column("seconds"))
        print(f"{setting.model}: batch {trial.batch_size}, {now:,.0f} tokens/s", file=sys.stderr)
        if now < 1.01 * speed or ours.problem:
            return best
        best, speed = trial, now


# --- start-up ---


def seconds_to(marker: Path, command: Sequence[str]) -> float:
    """Seconds from starting a command to ``marker`` having content; then it is left to end by itself."""
    shutil.rmtree(marker.parent.parent, ignore_errors=True)
    marker.parent.mkdir(parents=True)
    log, begun = marker.parent.parent / "log", time.perf_counter()
    with open(log, "wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True)
    try:
        while not (marker.exists() and marker.stat().st_size):
            if process.poll() is not None:
                raise Gone(log)
            time.sleep(0.005)
        seconds = time.perf_counter() - begun
        process.wait()
        return seconds
    except BaseException:
        process.terminate()
        raise


def start_commands(setting: Setting, folder: Path, corpus: Path) -> dict[str, Callable[[Path], float]]:
    """For each side how to measure a start with the caches in a folder; both are given one tokenizer."""
    ranks, place = str(setting.ranks), folder / "start" / "out"
    ours = [*setting.options(), "--max-steps=1", "--no-save-initial", f"--dataset-path={corpus}"]
    cfg, _ = t.resolve_config(t.parse_args([*ours, f"--cache-dir={folder}", f"--logs-dir={folder}"]), setting.device)
    tokenizer = str(t.prepare_corpus(cfg).path / "tokenizer")
    t.model_settings(cfg).save_pretrained(folder)
    words = f"--num-gpus {ranks} --foreground --output-dir {place} --logs-dir {folder / 'start' / 'logs'}"
    launcher = [str(HERE.parents[1] / "run_h100_dual.sh"), *ours, f"--tokenizer={tokenizer}", *words.split()]
    first = place / "first"
    given = {**asdict(setting), "data": str(corpus), "tokenizer": tokenizer, "config": str(folder), "first": str(first)}
    threads = max(1, len(os.sched_getaffinity(0)) // setting.ranks)
    torchrun = f"OMP_NUM_THREADS={threads} HF_HUB_OFFLINE=1 {sys.executable} -m torch.distributed.run --standalone"
    recipe = [*torchrun.split(), "--nproc-per-node", ranks, str(HERE / "trainer_recipe.py"), json.dumps(given)]
    return {
        "ours": lambda cache: seconds_to(place / "metrics.jsonl", [*launcher, f"--cache-dir={cache}"]),
        "trainer": lambda cache: seconds_to(first, ["env", f"HF_DATASETS_CACHE={cache}", *recipe]),
    }


def measure_start(setting: Setting, folder: Path, corpus: Path | None, rounds: int) -> str:
    """Table of the time from the command to the first step, on a corpus nobody has prepared and on a prepared one."""
    corpus = corpus or t.write_dummy_data(folder)
    starts = start_commands(setting, folder, corpus)

    def start(name: str) -> tuple[float, float]:
        caches = folder / f"{name} caches"
        shutil.rmtree(caches, ignore_errors=True)
        return starts[name](caches), starts[name](caches)

    # The uncounted turn warms up the disk's cache.
    results = take_turns({name: lambda name=name: start(name) for name in starts}, rounds, warm_up=1)
    columns = zip(("not prepared", "prepared"), *(zip(*results[name], strict=True) for name in starts), strict=True)
    rows = [[state, *map(median_and_range, pair), ratios(*pair, 2)] for state, *pair in columns]
    head = f"Command to the end of the first step, {setting.describe()}; {rounds} rounds"
    text = table(["corpus", "ours, s", "HF Trainer, s", "ours / Trainer (95 %)"], rows)
    return f"{head}; {corpus.name} ({corpus.stat().st_size / 1e6:.1f} MB):\n\n{text}"


# --- the whole ---


def parse_arguments() -> argparse.Namespace:
    """Read and check the options."""
    parser = argparse.ArgumentParser(prog="run.sh", description=__doc__, allow_abbrev=False)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--quick", action="store_true", help="tiny on the CPU, under 15 minutes (the default)")
    kind.add_argument("--gpu", action="store_true", help="125m, 350m and 1.3b on the GPUs that are visible")
    kind.add_argument("--muon", action="store_true", help="ours alone on the CPU: AdamW and Muon, accumulation 8 and 1")
    parser.add_argument("--models", nargs="+", choices=t.PRESETS, help="others than these")
    parser.add_argument("--blocks", type=int, default=24, metavar="N", help="of each, 0 for none (default 24)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="processes of each on a GPU (default 3)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="on a GPU: this one alone, without 4 and the best")
    parser.add_argument("--starts", type=int, default=5, metavar="N", help="rounds of start-up, 0 for none (default 5)")
    parser.add_argument("--corpus", type=corpus_file, metavar="JSONL", help="for start-up (default: generated text)")
    parser.add_argument("--no-record", action="store_true", help="append nothing to RESULTS.md")
    args, gpus = parser.parse_args(), torch.cuda.device_count()
    if args.gpu and not gpus:
        parser.error("--gpu: PyTorch sees no GPU here; without --gpu the CPU is measured")
    if args.gpu:
        names = args.models or ["125m", "350m", "1.3b"]
        args.settings = [Setting(name, 65536, args.batch_size or 4, 2048, "cuda", gpus) for name in names]
    else:
        args.settings = [Setting(name, 8192, 4, 256, "cpu", 2) for name in args.models or ["tiny"]]
    if args.muon:
        args.settings = [replace(setting, accumulation=count) for setting in args.settings for count in (8, 1)]
    return args


def main() -> None:
    """Measure what the options ask for; print, and record."""
    args = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no worker is left with the GPUs
    names = ("ours", MUON) if args.muon else ("ours", "HF Trainer", "bare DDP")
    parts = []
    with tempfile.TemporaryDirectory(prefix="bench_") as name:
        folder = Path(name)
        for setting in args.settings if args.blocks else ():
            best = best_batch(setting, folder) if args.gpu and not args.batch_size else setting
            for variant in dict.fromkeys((setting, best)):
                contestants = compete(variant, folder, names, args.blocks, args.rounds)
                if contestants[0].problem:
                    sys.exit("ours failed: nothing to compare with")
                parts.append(speed_table(contestants))
                print(f"\n{parts[-1]}", flush=True)
        if args.starts and not args.muon:
            parts.append(measure_start(args.settings[-1 if args.gpu else 0], folder, args.corpus, args.starts))
            print(f"\n{parts[-1]}", flush=True)
    command = shlex.join(["tests/benchmarks/run.sh", *sys.argv[1:]])
    source = provenance("torch", "transformers", "accelerate", "datasets", command=command)
    print(f"\n{source}")
    if not args.no_record:
        record(f"Training speed and start-up, {'GPU' if args.gpu else 'CPU'}", "\n\n".join([source, *parts]))


if __name__ == "__main__":
    main()
