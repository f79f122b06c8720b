#!/usr/bin/env python3
"""Compare training speed and start-up with Hugging Face's Trainer, a bare DDP loop and, with --peers, litgpt.

``run.sh`` starts it.  All contestants train the same model on the same rows, and their blocks of steps take turns
in one run.  See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, corpus_file, provenance, table

sys.path.insert(0, str(ROOT))
import train_h100_dual as t

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "RESULTS.md"
NAMES = {"ours": "ours", "trainer": "HF Trainer", "bare": "bare DDP", "litgpt": "litgpt"}
SPARE_ROWS = 64  # held out of the stream, and more
MOST_TOKENS = 20_000_000  # of the stream; a longer run reads it again
ENOUGH_STEPS = 10_000_000
# 30.9 M parameters with a vocabulary of 16,384: no preset is that small.
MODEL_30M = {"num_hidden_layers": 8, "hidden_size": 512, "intermediate_size": 1152, "num_attention_heads": 8}


@dataclass(frozen=True)
class Setting:
    """What is trained: a model, its batch a rank, and how."""

    model: str
    vocab_size: int
    batch_size: int
    max_seq_length: int
    precision: str
    compile: bool
    device: str
    ranks: int

    @property
    def step_tokens(self) -> int:
        """Tokens of a step over all ranks."""
        return self.batch_size * self.max_seq_length * self.ranks

    def describe(self) -> str:
        """One line for the table's head."""
        how = f"{self.precision}, {'compiled' if self.compile else 'eager'}"
        return f"{self.model}, {self.ranks} x {self.batch_size} x {self.max_seq_length} tokens a step, {how}"

    def words(self, folder: Path) -> list[str]:
        """The options of train_h100_dual.py that stand for it."""
        model = ["--model-size", self.model]
        if self.model == "30m":
            path = folder / "30m.json"
            shape = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True}
            path.write_text(json.dumps({**shape, **MODEL_30M}), encoding="utf-8")
            model = ["--model-config", str(path)]
        return [
            *("--train", "--dummy-data", "--device", self.device, *model, "--vocab-size", str(self.vocab_size)),
            *("--batch-size", str(self.batch_size), "--max-seq-length", str(self.max_seq_length)),
            *(f"--{self.precision}", "--compile" if self.compile else "--no-compile"),
            *(
                "--gradient-accumulation-steps",
                "1",
                "--max-steps",
                str(ENOUGH_STEPS),
                "--eval-steps",
                str(ENOUGH_STEPS),
            ),
            *("--save-steps", str(ENOUGH_STEPS), "--lr-schedule", "constant", "--warmup-ratio", "0"),
            *("--learning-rate", "1e-3" if self.device == "cpu" else "3e-4"),
        ]


def write_tokens(path: Path, setting: Setting) -> None:
    """Write a stream in which each token hangs on the one before it, so that a model has something to learn."""
    draw, length = np.random.default_rng(0), setting.max_seq_length
    rows = min(MOST_TOKENS // length, 2000 * setting.step_tokens // length) + SPARE_ROWS
    found = np.empty((rows, length), np.int64)
    token = draw.integers(0, setting.vocab_size, rows)
    for column in range(length):
        token = (31 * token + np.minimum(draw.zipf(1.5, rows), 1000)) % setting.vocab_size
        found[:, column] = token
    found.astype(np.uint16).tofile(path)


# --- contestants as processes ---


class Gone(RuntimeError):
    """A contestant ended before its time; the message is the end of its log."""


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Contestant:
    """All ranks of one contestant, started as torchrun would start them, with a pipe to each."""

    def __init__(self, name: str, setting: Setting, folder: Path, tokens: Path, python: str):
        self.name, self.log = name, folder / f"{name}.log"
        place = folder / name
        shutil.rmtree(place, ignore_errors=True)
        script = HERE / ("bench_litgpt.py" if name == "litgpt" else "bench_worker.py")
        command = [python, str(script), name, str(tokens), str(place), *setting.words(folder)]
        if name == "litgpt":
            command = [python, str(script), str(tokens), json.dumps(litgpt_settings(setting))]
        threads = str(max(1, len(os.sched_getaffinity(0)) // setting.ranks))
        common = {"WORLD_SIZE": str(setting.ranks), "LOCAL_WORLD_SIZE": str(setting.ranks), "MASTER_ADDR": "127.0.0.1"}
        common |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
        if setting.device == "cpu":
            common |= {"OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}
        self.orders, self.processes = [], []
        answer_in, answer_out = os.pipe()
        self.begun = time.perf_counter()
        with open(self.log, "wb") as log:
            for rank in range(setting.ranks):
                order_in, order_out = os.pipe()
                own = {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "BENCH_IN": str(order_in),
                    "BENCH_OUT": str(answer_out),
                }
                self.processes.append(
                    subprocess.Popen(
                        command,
                        env={**os.environ, **common, **own},
                        pass_fds=(order_in, answer_out),
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                    )
                )
                os.close(order_in)
                self.orders.append(open(order_out, "w", encoding="utf-8"))  # noqa: SIM115  (end() closes it)
        os.close(answer_out)
        self.answers = open(answer_in, encoding="utf-8")  # noqa: SIM115
        self.memory = 0.0

    def answer(self) -> dict[str, Any]:
        """Wait for rank 0's next line; a rank that failed alone would leave it waiting in a collective."""
        while not select.select([self.answers], [], [], 1)[0]:
            if any(process.poll() for process in self.processes):
                self.kill()
        line = self.answers.readline()
        if not line:
            raise Gone(self.log.read_text(encoding="utf-8", errors="replace")[-3000:])
        return json.loads(line)

    def first_step(self) -> float:
        """Seconds from the start of the processes to the end of the first step."""
        self.answer()
        return time.perf_counter() - self.begun

    def block(self, steps: int) -> tuple[float, float]:
        """Let it train for some steps; returns the seconds that they took, and those that rank 0 computed."""
        for order in self.orders:
            print(steps, file=order, flush=True)
        answer = self.answer()
        self.memory = answer["memory_mib"]
        return answer["seconds"], answer["cpu_seconds"]

    def end(self) -> float:
        """Tell it to stop; returns its loss on the held-out rows."""
        for order in self.orders:
            order.close()
        return self.answer()["loss"]

    def kill(self) -> None:
        """End whatever is left of it."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()


@dataclass
class Figures:
    """What was measured of one contestant."""

    blocks: list[tuple[float, float]] = field(default_factory=list)  # seconds, and those of rank 0's processor
    first_step: list[float] = field(default_factory=list)
    memory: float = 0.0
    loss: float | None = None
    steps: int = 0
    problem: str | None = None

    @property
    def seconds(self) -> list[float]:
        """Of each block, in the order of the run."""
        return [block[0] for block in self.blocks]

    @property
    def cpu_seconds(self) -> list[float]:
        """Of each block: what rank 0 computed, whatever else the machine did."""
        return [block[1] for block in self.blocks]


class Match:
    """Contestants that train one setting, measured in blocks that take turns."""

    def __init__(self, args: argparse.Namespace, setting: Setting, folder: Path, names: Sequence[str]):
        self.args, self.setting, self.folder, self.names = args, setting, folder, names
        self.tokens, self.steps = folder / "tokens.bin", 1
        write_tokens(self.tokens, setting)
        self.found = {name: Figures() for name in names}

    def start(self, name: str) -> Contestant:
        """Start one and let it take its first step and an uncounted block."""
        contestant = Contestant(name, self.setting, self.folder, self.tokens, self.args.pythons[name])
        try:
            self.found[name].first_step.append(contestant.first_step())
            warm, _ = contestant.block(2)
            if name == self.names[0] and not self.found[name].blocks:
                self.steps = max(1, round(self.args.seconds / (warm / 2)))
        except BaseException:
            contestant.kill()
            raise
        return contestant

    def finish(self, contestant: Contestant) -> None:
        """End one and keep what it knows at its end."""
        figures = self.found[contestant.name]
        figures.memory = max(figures.memory, contestant.memory)
        figures.loss = contestant.end()
        contestant.kill()

    def fail(self, name: str, error: Gone) -> None:
        """Note that a contestant can't go on."""
        text = str(error)
        memory = "OutOfMemoryError" in text or "out of memory" in text
        self.found[name].problem = "out of memory" if memory else "failed"
        print(f"{NAMES[name]} {self.found[name].problem}" + ("" if memory else f":\n{text}"), file=sys.stderr)

    def resident(self) -> None:
        """All live at the same time and wait while one trains: what a machine has room for."""
        alive: dict[str, Contestant] = {}
        try:
            for name in self.names:
                try:
                    alive[name] = self.start(name)
                except Gone as error:
                    self.fail(name, error)
            for block in range(self.args.blocks):
                order = [name for name in self.names if name in alive]
                for name in order[block % len(order) :] + order[: block % len(order)]:
                    self.found[name].blocks.append(alive[name].block(self.steps))
                show_progress(f"{self.setting.model}: block {block + 1} of {self.args.blocks}")
            for contestant in alive.values():
                self.finish(contestant)
        finally:
            for contestant in alive.values():
                contestant.kill()
        for figures in self.found.values():
            figures.steps = 3 + self.args.blocks * self.steps

    def fresh(self) -> None:
        """One at a time has the machine, anew in each round, since a GPU holds only one such model."""
        per_round = -(-self.args.blocks // self.args.rounds)
        for round_ in range(self.args.rounds):
            for name in self.names:
                if self.found[name].problem:
                    continue
                contestant = None
                try:
                    contestant = self.start(name)
                    blocks = [contestant.block(self.steps) for _ in range(per_round)]
                    self.finish(contestant)
                    self.found[name].blocks += blocks
                    self.found[name].steps = 3 + per_round * self.steps
                except Gone as error:
                    self.fail(name, error)
                finally:
                    if contestant is not None:
                        contestant.kill()
                show_progress(f"{self.setting.model}: round {round_ + 1} of {self.args.rounds}, {name}")

    def run(self) -> dict[str, Figures]:
        """Measure."""
        self.fresh() if self.args.fresh else self.resident()
        return self.found


def show_progress(text: str) -> None:
    """Say how far it is, to whoever watches."""
    print(f"\r{text}\033[K", end="" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)


# --- figures ---


def median_with_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, and the 95 % interval of it by bootstrap (10,000 resamples, percentiles)."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(10_000))
    return statistics.median(values), medians[249], medians[9749]


def ratio_text(ours: Sequence[float], other: Sequence[float]) -> str:
    """Our speed over another's, block by block, where both have one."""
    ratios = [theirs / own for own, theirs in zip(ours, other, strict=False)]
    if not ratios:
        return "-"
    middle, low, high = median_with_interval(ratios)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def flops_per_token(setting: Setting, folder: Path) -> float:
    """As the script's MFU has it."""
    import torch

    words = [word for word in setting.words(folder) if word != "--dummy-data"]
    cfg, _ = t.resolve_config(t.parse_args(words), setting.device)

    class Words:
        bos_token_id = eos_token_id = 0

        def __len__(self) -> int:
            return setting.vocab_size

    with torch.device("meta"):
        return t.flops_per_token(t.build_model(cfg, Words(), "meta"), setting.max_seq_length)


def speed_table(setting: Setting, found: dict[str, Figures], steps: int, folder: Path) -> str:
    """The table of one setting."""
    import torch

    peak = t.peak_flops(torch.device(setting.device))
    flops = flops_per_token(setting, folder)
    rows = []
    for name, figures in found.items():
        if figures.problem or not figures.blocks:
            rows.append([NAMES[name], figures.problem or "-", *["-"] * 7])
            continue
        speeds = sorted(steps * setting.step_tokens / seconds for seconds in figures.seconds)
        quarter = len(speeds) // 4
        middle = statistics.median(speeds)
        own = found["ours"]
        pairs = ((own.seconds, figures.seconds), (own.cpu_seconds, figures.cpu_seconds))
        mfu = f"{middle * flops / (peak * setting.ranks):.1%}" if peak else "-"
        rows.append(
            [
                NAMES[name],
                f"{middle:,.0f}",
                f"{speeds[quarter]:,.0f} to {speeds[-1 - quarter]:,.0f}",
                *["-" if name == "ours" else ratio_text(*pair) for pair in pairs],
                mfu,
                f"{figures.memory:,.0f}",
                f"{statistics.median(figures.first_step):.1f}",
                f"{figures.loss:.4f}",
            ]
        )
    head = ["", "tokens/s, median", "middle half", "ours / it (95 %)", "the same by processor time"]
    head += ["MFU", "peak memory a rank, MiB"]
    blocks = len(found["ours"].blocks)
    loss = f"loss after {found['ours'].steps * setting.step_tokens:,} tokens"
    text = table([*head, "process start to first step, s", loss], rows)
    return f"{setting.describe()}; {blocks} blocks of {steps} steps each:\n\n{text}"


def best_batch(args: argparse.Namespace, setting: Setting, folder: Path) -> Setting:
    """The batch, doubled while it helps by more than 1 %, at which ours is fastest on this machine."""
    best, speed = setting, 0.0
    quick = argparse.Namespace(**{**vars(args), "blocks": 3, "rounds": 1, "fresh": True})
    while True:
        trial = replace(setting, batch_size=2 * best.batch_size if speed else setting.batch_size)
        match = Match(quick, trial, folder, ["ours"])
        figures = match.run()["ours"]
        if figures.problem:
            return best
        now = match.steps * trial.step_tokens / statistics.median(figures.seconds)
        show_progress(f"{setting.model}: batch {trial.batch_size}, {now:,.0f} tokens/s")
        if now < 1.01 * speed:
            return best
        best, speed = trial, now


# --- start-up ---


@contextmanager
def ended(command: Sequence[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen]:
    """Start a command in a session of its own; whatever is left of it is ended."""
    with open(log, "wb") as stream:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=stream, stderr=stream, start_new_session=True
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def seconds_to(marker: Path, command: Sequence[str], environment: dict[str, str], log: Path) -> float:
    """Seconds from starting a command to ``marker`` having content; then it is left to end by itself."""
    begun = time.perf_counter()
    with ended(command, environment, log) as process:
        while not (marker.exists() and marker.stat().st_size):
            if process.poll() is not None:
                raise Gone(log.read_text(encoding="utf-8", errors="replace")[-3000:])
            time.sleep(0.005)
        seconds = time.perf_counter() - begun
        process.wait()
    return seconds


def start_ours(folder: Path, options: list[str], cache: Path, ranks: int) -> float:
    """The launcher, in the foreground, until the first step is in the metrics."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    places = ["--output-dir", str(folder / "out"), "--logs-dir", str(folder / "logs"), "--cache-dir", str(cache)]
    command = [str(ROOT / "run_h100_dual.sh"), *options, *places, "--num-gpus", str(ranks), "--foreground"]
    return seconds_to(folder / "out" / "metrics.jsonl", command, {}, folder / "log")


def start_trainer(folder: Path, options: list[str], cache: Path, ranks: int) -> float:
    """The usual script under torchrun, until its first step has ended."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    environment = {"HF_DATASETS_CACHE": str(cache), "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    command = [*run, str(HERE / "trainer_recipe.py"), *options, "--first-step", str(folder / "first"), str(folder)]
    return seconds_to(folder / "first", command, environment, folder / "log")


def start_options(args: argparse.Namespace, setting: Setting, folder: Path) -> tuple[list[str], list[str], Path]:
    """Our options, those of ``trainer_recipe.py``, and the corpus; both are given one tokenizer."""
    cache = folder / "tokenizer cache"
    cache.mkdir()
    corpus = args.corpus or t.write_dummy_data(cache)
    ours = ["--train", f"--device={setting.device}", "--max-steps=1", f"--vocab-size={setting.vocab_size}"]
    ours += [f"--model-size={setting.model}", f"--batch-size={setting.batch_size}", "--gradient-accumulation-steps=1"]
    ours += [f"--max-seq-length={setting.max_seq_length}", "--no-save-initial", f"--dataset-path={corpus}"]
    cfg, _ = t.resolve_config(t.parse_args([*ours, f"--cache-dir={cache}", f"--logs-dir={folder}"]), setting.device)
    show_progress("start-up: training the tokenizer that both are given")
    tokenizer = str(t.prepare_corpus(cfg).path / "tokenizer")
    preset = t.PRESETS[setting.model]
    theirs = ["--data", str(corpus), "--tokenizer", tokenizer, "--batch-size", str(setting.batch_size)]
    theirs += ["--length", str(setting.max_seq_length), "--device", setting.device]
    theirs += ["--shape", *map(str, (preset.layers, preset.hidden, preset.mlp, preset.head))]
    return [*ours, "--tokenizer", tokenizer], theirs, corpus


def measure_start(args: argparse.Namespace, setting: Setting, folder: Path) -> str:
    """Table of the time from the command to the first step, on a corpus nobody has prepared and on a prepared one."""
    ours, theirs, corpus = start_options(args, setting, folder)
    starts: dict[str, tuple[Callable, list[str]]] = {"ours": (start_ours, ours), "trainer": (start_trainer, theirs)}
    found: dict[tuple[str, str], list[float]] = {}
    for round_ in range(args.starts + 1):  # the first one warms up the disk's cache and counts for nothing
        for state in ("not prepared", "prepared"):
            for name, (start, options) in starts.items():
                caches = folder / f"{name} caches"
                if state == "not prepared":
                    shutil.rmtree(caches, ignore_errors=True)
                seconds = start(folder / "start", options, caches, setting.ranks)
                if round_:
                    found.setdefault((state, name), []).append(seconds)
        show_progress(f"start-up: round {round_} of {args.starts}")
    rows = []
    for state in ("not prepared", "prepared"):
        pair = found[state, "ours"], found[state, "trainer"]
        middle, low, high = median_with_interval([own / other for own, other in zip(*pair, strict=True)])
        cells = [f"{statistics.median(part):.2f} ({min(part):.2f} to {max(part):.2f})" for part in pair]
        rows.append([state, *cells, f"{middle:.2f} ({low:.2f} to {high:.2f})"])
    size = corpus.stat().st_size / 1e6
    head = f"Command to the end of the first step, {setting.describe()}; {args.starts} rounds"
    text = table(["corpus", "ours, s", "HF Trainer, s", "ours / Trainer (95 %)"], rows)
    return f"{head}; {corpus.name} ({size:.1f} MB):\n\n{text}"


# --- the whole ---


def litgpt_settings(setting: Setting) -> dict[str, Any]:
    """What litgpt has to know of a setting."""
    if setting.model == "30m":
        layers, hidden, mlp, heads = MODEL_30M.values()
    else:
        preset = t.PRESETS[setting.model]
        layers, hidden, mlp, heads = preset.layers, preset.hidden, preset.mlp, preset.hidden // preset.head
    shape = {"n_layer": layers, "n_embd": hidden, "intermediate_size": mlp, "n_head": heads}
    own = {name: getattr(setting, name) for name in ("vocab_size", "batch_size", "max_seq_length", "precision")}
    rate = 1e-3 if setting.device == "cpu" else 3e-4
    return {"shape": shape, **own, "compile": setting.compile, "device": setting.device, "learning_rate": rate}


def settings(args: argparse.Namespace) -> list[Setting]:
    """The settings that the options stand for."""
    if args.gpu:
        import torch

        count = torch.cuda.device_count()
        names = args.models or ["125m", "350m", "1.3b"]
        return [Setting(name, 65536, 4, 2048, "bf16", True, "cuda", count) for name in names]
    how = ("bf16" if args.bf16 else "fp32", args.compile, "cpu", args.ranks)
    known = {"tiny": Setting("tiny", 8192, 4, 256, *how), "30m": Setting("30m", 16384, 2, 256, *how)}
    names = args.models or (["tiny"] if args.quick else ["tiny", "30m"])
    return [known[name] for name in names]


def parse_arguments() -> argparse.Namespace:
    """Read and check the options."""
    parser = argparse.ArgumentParser(
        prog="run.sh", description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the tiny model only, on the CPU: under 15 minutes")
    parser.add_argument("--gpu", action="store_true", help="125m, 350m and 1.3b on the GPUs that are visible")
    parser.add_argument("--peers", action="store_true", help="litgpt too, in an environment of its own")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="tiny, 30m; with --gpu presets")
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="processes on the CPU (default 2)")
    parser.add_argument("--blocks", type=int, default=24, metavar="N", help="of each, 0 for none (default 24)")
    parser.add_argument("--seconds", type=float, default=2.0, metavar="S", help="a block lasts about (default 2)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="with --gpu or --fresh (default 3)")
    parser.add_argument("--fresh", action="store_true", help="start everyone anew in each round, as --gpu does")
    parser.add_argument("--compile", action="store_true", help="compile on the CPU too")
    parser.add_argument("--bf16", action="store_true", help="bf16 on the CPU too")
    parser.add_argument("--starts", type=int, default=5, metavar="N", help="rounds of start-up, 0 for none (default 5)")
    parser.add_argument("--corpus", type=corpus_file, metavar="JSONL", help="for start-up (default: generated text)")
    parser.add_argument("--no-record", action="store_true", help="append nothing to RESULTS.md")
    args = parser.parse_args()
    if args.gpu and args.quick:
        parser.error("--quick is for the CPU; leave --gpu or --quick out")
    known = list(t.PRESETS) if args.gpu else ["tiny", "30m"]
    if unknown := [name for name in args.models or () if name not in known]:
        parser.error(f"--models {' '.join(unknown)}: choose from {', '.join(known)}")
    if args.gpu:
        import torch

        if not torch.cuda.is_available():
            parser.error("--gpu: PyTorch sees no GPU here; without --gpu the CPU is measured")
    args.fresh = args.fresh or args.gpu
    args.pythons = dict.fromkeys(("ours", "trainer", "bare"), sys.executable)
    if args.peers:
        args.pythons["litgpt"] = os.environ["LITGPT_PYTHON"]
    return args


def record(text: str) -> None:
    """Append to RESULTS.md."""
    with open(RESULTS, "a", encoding="utf-8") as stream:
        stream.write(text)


def main() -> None:
    """Measure what the options ask for; print, and record."""
    args = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no worker is left with the GPUs
    parts = []
    for setting in settings(args) if args.blocks else ():
        with tempfile.TemporaryDirectory(prefix="bench_") as name:
            folder = Path(name)
            variants = [setting]
            if args.gpu:
                best = best_batch(args, setting, folder)
                variants += [best] if best.batch_size != setting.batch_size else []
            for variant in variants:
                match = Match(args, variant, folder, list(args.pythons))
                parts.append(speed_table(variant, match.run(), match.steps, folder))
                print(f"\n{parts[-1]}", flush=True)
    if args.starts:
        with tempfile.TemporaryDirectory(prefix="bench_") as name:
            first = settings(args)[-1 if args.gpu else 0]
            parts.append(measure_start(args, first, Path(name)))
            print(f"\n{parts[-1]}", flush=True)
    command = shlex.join(["tests/benchmarks/run.sh", *sys.argv[1:]])
    source = provenance("torch", "transformers", "accelerate", "datasets", command=command)
    print(f"\n{source}")
    if not args.no_record:
        what = "GPU" if args.gpu else "CPU"
        record(
            f"\n## Training speed and start-up, {what} ({time.strftime('%Y-%m-%d')})\n\n{source}\n\n"
            + "\n\n".join(parts)
            + "\n"
        )
        print(f"appended to {os.path.relpath(RESULTS)}")


if __name__ == "__main__":
    main()
