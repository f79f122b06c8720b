#!/usr/bin/env python3
"""Compare training speed and start-up with Hugging Face's Trainer, a bare DDP loop and, with --peers, litgpt.

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
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import corpus_file, median_and_range, provenance, ratio_and_interval, record, table, take_turns

import train_h100_dual as t

HERE = Path(__file__).resolve().parent
NAMES = {"ours": "ours", "trainer": "HF Trainer", "bare": "bare DDP", "litgpt": "litgpt"}
SPARE_ROWS = 64  # held out of the stream, and more
MOST_TOKENS = 20_000_000  # of the stream; a longer run reads it again
ENOUGH_STEPS = "10000000"
# 30.9 M parameters with a vocabulary of 16,384: no preset is that small.
PRESETS = {**t.PRESETS, "30m": t.Preset(8, 512, 1152, 64)}


@dataclass(frozen=True)
class Setting:
    """What is trained: a model and its batch a rank; compiled in bf16 on a GPU, eager in fp32 on the CPU."""

    model: str
    vocab_size: int
    batch_size: int
    max_seq_length: int
    device: str
    ranks: int

    @property
    def step_tokens(self) -> int:
        """Tokens of a step over all ranks."""
        return self.batch_size * self.max_seq_length * self.ranks

    @property
    def learning_rate(self) -> float:
        return 1e-3 if self.device == "cpu" else 3e-4

    def describe(self) -> str:
        """One line for the table's head."""
        kind = "bf16, compiled" if self.device == "cuda" else "fp32, eager"
        return f"{self.model}, {self.ranks} x {self.batch_size} x {self.max_seq_length} tokens a step, {kind}"

    def plain(self) -> dict[str, Any]:
        """What a script needs that doesn't know ours; ``shape`` is layers, hidden, MLP and heads."""
        preset = PRESETS[self.model]
        shape = (preset.layers, preset.hidden, preset.mlp, preset.hidden // preset.head)
        return {**asdict(self), "shape": shape, "learning_rate": self.learning_rate}

    def options(self, folder: Path) -> list[str]:
        """The options of train_h100_dual.py that stand for it; ``folder`` takes the config of what is no preset."""
        model = ["--model-size", self.model]
        if self.model not in t.PRESETS:
            layers, hidden, mlp, heads = self.plain()["shape"]
            shape = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": mlp}
            shape |= {"num_attention_heads": heads, "model_type": "llama", "tie_word_embeddings": True}
            (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **shape}))
            model = ["--model-config", str(folder / "config.json")]
        batch = f"--batch-size {self.batch_size} --max-seq-length {self.max_seq_length} --gradient-accumulation-steps 1"
        return [*f"--train --device {self.device} --vocab-size {self.vocab_size} {batch}".split(), *model]


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
    """All ranks of one contestant, started as torchrun would start them, with a pipe to each."""

    def __init__(self, name: str, setting: Setting, folder: Path, python: str):
        self.log, tokens, place = folder / f"{name}.log", folder / "tokens.bin", folder / name
        shutil.rmtree(place, ignore_errors=True)
        if name == "litgpt":
            command = [python, str(HERE / "bench_litgpt.py"), str(tokens), json.dumps(setting.plain())]
        else:
            run = f"--dummy-data --lr-schedule constant --warmup-ratio 0 --learning-rate {setting.learning_rate}"
            run += "".join(f" --{kind}-steps {ENOUGH_STEPS}" for kind in ("max", "eval", "save"))
            command = [python, str(HERE / "bench_worker.py"), name, str(tokens), str(place)]
            command += [*setting.options(folder), *run.split()]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        ranks, threads = str(setting.ranks), str(max(1, len(os.sched_getaffinity(0)) // setting.ranks))
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        if setting.device == "cpu":
            environment |= {"OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}
        self.orders, self.processes, self.begun = [], [], time.perf_counter()
        answer_in, answer_out = os.pipe()
        with open(self.log, "wb") as log:
            for rank in map(str, range(setting.ranks)):
                order_in, order_out = os.pipe()
                environment |= {"RANK": rank, "LOCAL_RANK": rank}
                environment |= {"BENCH_IN": str(order_in), "BENCH_OUT": str(answer_out)}
                fds = (order_in, answer_out)
                self.processes.append(subprocess.Popen(command, env=environment, pass_fds=fds, stdout=log, stderr=log))
                os.close(order_in)
                self.orders.append(open(order_out, "w", encoding="utf-8"))  # noqa: SIM115  (end() closes it)
        os.close(answer_out)
        self.answers = open(answer_in, encoding="utf-8")  # noqa: SIM115

    def answer(self) -> dict[str, Any]:
        """Wait for rank 0's next line; a rank that failed alone would leave it waiting in a collective."""
        while not select.select([self.answers], [], [], 1)[0]:
            if any(process.poll() for process in self.processes):
                self.kill()
        line = self.answers.readline()
        if not line:
            raise Gone(self.log)
        return json.loads(line)

    def first_step(self) -> float:
        """Seconds from the start of the processes to the end of the first step."""
        self.answer()
        return time.perf_counter() - self.begun

    def block(self, steps: int) -> dict[str, float]:
        """Let it train for some steps: seconds that they took, seconds that rank 0 computed, and peak memory."""
        for order in self.orders:
            print(steps, file=order, flush=True)
        return self.answer()

    def end(self) -> float:
        """Tell it to stop; returns its loss on the held-out rows."""
        for order in self.orders:
            order.close()
        return self.answer()["loss"]

    def kill(self) -> None:
        """End whatever is left of it."""
        for process in self.processes:
            process.kill()
            process.wait()


@dataclass
class Figures:
    """What was measured of one contestant."""

    blocks: list[dict[str, float]] = field(default_factory=list)
    first_step: list[float] = field(default_factory=list)
    loss: float | None = None
    problem: str | None = None

    def column(self, name: str) -> list[float]:
        """One figure of all blocks, in the order of the run."""
        return [block[name] for block in self.blocks]

    def attempt(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """What the call returns; None once the contestant has failed, which is noted and said."""
        try:
            return None if self.problem else call(*arguments)
        except (Gone, BrokenPipeError) as error:
            full = "OutOfMemoryError" in str(error) or "out of memory" in str(error)
            self.problem = "out of memory" if full else "failed"
            print(self.problem, "" if full else error, file=sys.stderr)


class Match:
    """Contestants that train one setting, measured in blocks that take turns."""

    def __init__(self, setting: Setting, folder: Path, pythons: dict[str, str], seconds: float):
        self.setting, self.folder, self.pythons, self.seconds = setting, folder, pythons, seconds
        self.figures = {name: Figures() for name in pythons}
        self.steps = self.blocks = 0  # steps a block, blocks a life
        write_tokens(folder / "tokens.bin", setting)

    def warm_up(self, contestant: Contestant, figures: Figures) -> None:
        """The first step and an uncounted block; the first one to come here decides how long a block is."""
        figures.first_step.append(contestant.first_step())
        seconds = contestant.block(2)["seconds"]
        self.steps = self.steps or max(1, round(self.seconds / (seconds / 2)))

    def play(self, names: Sequence[str]) -> None:
        """Let these live at the same time and take turns."""
        with ExitStack() as stack:
            living: dict[str, Contestant] = {}
            for name in names:
                contestant = living[name] = Contestant(name, self.setting, self.folder, self.pythons[name])
                stack.callback(contestant.kill)
                self.figures[name].attempt(self.warm_up, contestant, self.figures[name])
            turns = {
                name: functools.partial(self.figures[name].attempt, contestant.block, self.steps)
                for name, contestant in living.items()
            }
            for name, blocks in take_turns(turns, self.blocks).items():
                self.figures[name].blocks += filter(None, blocks)
                self.figures[name].loss = self.figures[name].attempt(living[name].end)

    def run(self, blocks: int, rounds: int) -> None:
        """All resident at once or, with several rounds, one at a time anew in each: a GPU holds only one such model."""
        self.blocks = -(-blocks // rounds)
        if rounds == 1:
            self.play(list(self.pythons))
            return
        for name in list(self.pythons) * rounds:
            if not self.figures[name].problem:
                self.play([name])


def speed_table(match: Match) -> str:
    """The table of one setting."""
    setting, ours = match.setting, match.figures["ours"]
    preset, length = PRESETS[setting.model], setting.max_seq_length
    flops = t.training_flops(preset.parameter_count(setting.vocab_size), preset.layers, preset.hidden, length)
    peak = t.named_peak_flops(torch.cuda.get_device_name()) if setting.device == "cuda" else None
    rows = []
    for name, figures in match.figures.items():
        if figures.problem or not figures.blocks:
            rows.append([NAMES[name], figures.problem or "-", *["-"] * 7])
            continue
        speeds = sorted(match.steps * setting.step_tokens / seconds for seconds in figures.column("seconds"))
        quarter, middle = len(speeds) // 4, statistics.median(speeds)
        ratios = (ratio_and_interval(figures.column(kind), ours.column(kind)) for kind in ("seconds", "cpu_seconds"))
        rows.append(
            [
                NAMES[name],
                f"{middle:,.0f}",
                f"{speeds[quarter]:,.0f} to {speeds[-1 - quarter]:,.0f}",
                *(["-"] * 2 if name == "ours" else ratios),
                f"{middle * flops / (peak * setting.ranks):.1%}" if peak else "-",
                f"{max(figures.column('memory_mib')):,.0f}",
                f"{statistics.median(figures.first_step):.1f}",
                f"{figures.loss:.4f}",
            ]
        )
    head = ["", "tokens/s, median", "middle half", "ours / it (95 %)", "the same by processor time", "MFU"]
    head += ["peak memory a rank, MiB", "process start to first step, s"]
    head += [f"loss after {(3 + match.blocks * match.steps) * setting.step_tokens:,} tokens"]
    return f"{setting.describe()}; {len(ours.blocks)} blocks of {match.steps} steps each:\n\n{table(head, rows)}"


def best_batch(setting: Setting, folder: Path, seconds: float) -> Setting:
    """The batch, doubled while it helps by more than 1 %, at which ours is fastest on this machine."""
    best, speed = setting, 0.0
    while True:
        trial = replace(setting, batch_size=2 * best.batch_size if speed else setting.batch_size)
        match = Match(trial, folder, {"ours": sys.executable}, seconds)
        match.run(blocks=3, rounds=1)
        ours = match.figures["ours"]
        now = 0 if ours.problem else match.steps * trial.step_tokens / statistics.median(ours.column("seconds"))
        print(f"{setting.model}: batch {trial.batch_size}, {now:,.0f} tokens/s", file=sys.stderr)
        if now < 1.01 * speed or ours.problem:
            return best
        best, speed = trial, now


# --- start-up ---


def seconds_to(marker: Path, command: Sequence[str], environment: dict[str, str]) -> float:
    """Seconds from starting a command to ``marker`` having content; then it is left to end by itself."""
    shutil.rmtree(marker.parent.parent, ignore_errors=True)
    marker.parent.mkdir(parents=True)
    log, begun = marker.parent.parent / "log", time.perf_counter()
    with open(log, "wb") as stream:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=stream, stderr=stream, start_new_session=True
        )
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
    ours = [*setting.options(folder), "--max-steps=1", "--no-save-initial", f"--dataset-path={corpus}"]
    cfg, _ = t.resolve_config(t.parse_args([*ours, f"--cache-dir={folder}", f"--logs-dir={folder}"]), setting.device)
    tokenizer = str(t.prepare_corpus(cfg).path / "tokenizer")
    words = f"--num-gpus {ranks} --foreground --output-dir {place} --logs-dir {folder / 'start' / 'logs'}"
    launcher = [str(HERE.parents[1] / "run_h100_dual.sh"), *ours, f"--tokenizer={tokenizer}", *words.split()]
    first = place / "first"
    given = {**setting.plain(), "data": str(corpus), "tokenizer": tokenizer, "first_step": str(first)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    torchrun += [str(HERE / "trainer_recipe.py"), json.dumps(given)]
    threads = str(max(1, len(os.sched_getaffinity(0)) // setting.ranks))
    environment = {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    return {
        "ours": lambda cache: seconds_to(place / "metrics.jsonl", [*launcher, "--cache-dir", str(cache)], {}),
        "trainer": lambda cache: seconds_to(first, torchrun, {**environment, "HF_DATASETS_CACHE": str(cache)}),
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
    rows = []
    states = ("not prepared", "prepared")
    for state, *pair in zip(states, *(zip(*results[name], strict=True) for name in starts), strict=True):
        rows.append([state, *map(median_and_range, pair), ratio_and_interval(*pair, 2)])
    head = f"Command to the end of the first step, {setting.describe()}; {rounds} rounds"
    text = table(["corpus", "ours, s", "HF Trainer, s", "ours / Trainer (95 %)"], rows)
    return f"{head}; {corpus.name} ({corpus.stat().st_size / 1e6:.1f} MB):\n\n{text}"


# --- the whole ---


def parse_arguments() -> argparse.Namespace:
    """Read and check the options."""
    parser = argparse.ArgumentParser(
        prog="run.sh", description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--quick", action="store_true", help="the tiny model only, on the CPU: under 15 minutes")
    kind.add_argument("--gpu", action="store_true", help="125m, 350m and 1.3b on the GPUs that are visible")
    parser.add_argument("--peers", action="store_true", help="litgpt too, in an environment of its own")
    parser.add_argument("--models", nargs="+", choices=PRESETS, help="others than these")
    parser.add_argument("--blocks", type=int, default=24, metavar="N", help="of each, 0 for none (default 24)")
    parser.add_argument("--seconds", type=float, default=2.0, metavar="S", help="a block lasts about (default 2)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="with --gpu (default 3)")
    parser.add_argument("--starts", type=int, default=5, metavar="N", help="rounds of start-up, 0 for none (default 5)")
    parser.add_argument("--corpus", type=corpus_file, metavar="JSONL", help="for start-up (default: generated text)")
    parser.add_argument("--no-record", action="store_true", help="append nothing to RESULTS.md")
    args = parser.parse_args()
    if args.gpu and not torch.cuda.is_available():
        parser.error("--gpu: PyTorch sees no GPU here; without --gpu the CPU is measured")
    if args.gpu:
        batch, device = {}, (2048, "cuda", torch.cuda.device_count())
        names = args.models or ["125m", "350m", "1.3b"]
    else:
        batch, device = {"tiny": (8192, 4)}, (256, "cpu", 2)
        names = args.models or (["tiny"] if args.quick else ["tiny", "30m"])
    usual = (65536, 4) if args.gpu else (16384, 2)
    args.settings = [Setting(name, *batch.get(name, usual), *device) for name in names]
    return args


def main() -> None:
    """Measure what the options ask for; print, and record."""
    args = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no worker is left with the GPUs
    pythons = dict.fromkeys(("ours", "trainer", "bare"), sys.executable)
    if args.peers:
        pythons["litgpt"] = os.environ["LITGPT_PYTHON"]
    parts = []
    with tempfile.TemporaryDirectory(prefix="bench_") as name:
        folder = Path(name)
        for setting in args.settings if args.blocks else ():
            best = best_batch(setting, folder, args.seconds) if args.gpu else setting
            for variant in dict.fromkeys((setting, best)):
                match = Match(variant, folder, pythons, args.seconds)
                match.run(args.blocks, args.rounds if args.gpu else 1)
                if match.figures["ours"].problem:
                    sys.exit("ours failed: nothing to compare with")
                parts.append(speed_table(match))
                print(f"\n{parts[-1]}", flush=True)
        if args.starts:
            parts.append(measure_start(args.settings[-1 if args.gpu else 0], folder, args.corpus, args.starts))
            print(f"\n{parts[-1]}", flush=True)
    command = shlex.join(["tests/benchmarks/run.sh", *sys.argv[1:]])
    source = provenance("torch", "transformers", "accelerate", "datasets", command=command)
    print(f"\n{source}")
    if not args.no_record:
        record(f"Training speed and start-up, {'GPU' if args.gpu else 'CPU'}", "\n\n".join([source, *parts]))


if __name__ == "__main__":
    main()
