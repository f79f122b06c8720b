#!/usr/bin/env python3
"""Measure the data loader alone: tokens per second a process, memory over an epoch, and the first and last row.

    .venv/bin/python tests/benchmarks/loader_speed.py

Writes a stream of random tokens (1 GB, removed afterwards) unless ``--cache`` names a prepared one.  The blocks of
the compared settings take turns in one run.  See README.md beside this file.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import torch
from common import ROOT, median_and_range, provenance, table

sys.path.insert(0, str(ROOT))
import train_h100_dual as t

RANK, WORLD_SIZE = 0, 2  # as on two GPUs: this process reads every other micro-batch
ACCESSES = 5
PLAIN = "plain slices in order"
MEMORY_FIELDS = ("VmRSS", "RssAnon", "RssFile", "RssShmem")


def write_stream(path: Path, tokens: int) -> None:
    """Write random uint16 tokens, some at a time, and flush them to the disk."""
    draw = np.random.default_rng(0)
    with open(path, "wb") as stream:
        for first in range(0, tokens, 1 << 24):
            stream.write(draw.integers(0, 2**16, min(1 << 24, tokens - first), np.uint16).tobytes())
        stream.flush()
        os.fsync(stream.fileno())


def open_stream(path: Path) -> np.ndarray:
    """Map a file of uint16 tokens, or the first stream of a prepared cache."""
    return t.open_corpus(path).streams[0] if path.is_dir() else np.memmap(path, np.uint16, "r")


def loader_of(cfg: t.TrainConfig, stream: np.ndarray, steps: range) -> Iterator[torch.Tensor]:
    """The training loop's loader over ``stream``, which is all that it asks of a corpus."""
    corpus = SimpleNamespace(streams=(stream,))
    return t.make_loader(cfg, cast(t.Corpus, corpus), t.rank_positions(cfg, RANK, WORLD_SIZE, steps))


def epoch_steps(cfg: t.TrainConfig, stream: np.ndarray) -> int:
    """Whole steps in an epoch, one micro-batch a rank each."""
    return sum(t.stream_rows((stream,), cfg.max_seq_length)) // (cfg.batch_size * WORLD_SIZE)


# --- speed ---


def plain_slices(cfg: t.TrainConfig, stream: np.ndarray, steps: range) -> Iterator[torch.Tensor]:
    """What no loader can beat by much: this rank's rows in the order of the file, without DataLoader."""
    size = cfg.max_seq_length
    for step in steps:
        batch = np.empty((cfg.batch_size, size + 1), np.int64)
        for index in range(cfg.batch_size):
            start = (WORLD_SIZE * step * cfg.batch_size + index) * size
            batch[index] = stream[start : start + size + 1]
        yield torch.from_numpy(batch)


def tokens_per_second(batches: Iterator[torch.Tensor], warm_up: float, seconds: float) -> float:
    """Read for ``warm_up`` seconds uncounted and then for ``seconds`` counted."""
    tokens, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < warm_up:
        next(batches)
    begin = time.perf_counter()
    while (spent := time.perf_counter() - begin) < seconds:
        batch = next(batches)
        tokens += batch.shape[0] * (batch.shape[1] - 1)
    return tokens / spent


def measure_speed(args: argparse.Namespace, cfg: t.TrainConfig, stream: np.ndarray) -> str:
    """Table of the speed with each number of workers, blocks interleaved."""
    epoch = epoch_steps(cfg, stream)
    starts: dict[str, Callable[[range], Iterable]] = {PLAIN: lambda steps: plain_slices(cfg, stream, steps)}
    for workers in args.num_workers:
        own = replace(cfg, num_workers=workers)
        starts[f"make_loader, num_workers {workers}"] = lambda steps, own=own: loader_of(own, stream, steps)
    found: dict[str, list[float]] = {name: [] for name in starts}
    for block in range(args.blocks):
        first = epoch * block // (2 * args.blocks)  # what follows lasts half an epoch, then begins again
        for name, start in starts.items():
            batches = chain.from_iterable(start(range(first, first + epoch // 2)) for _ in count())
            found[name].append(tokens_per_second(batches, args.warm_up, args.seconds) / 1e6)
            del batches
    rows = []
    for name, values in found.items():
        ratios = [value / other for value, other in zip(values, found[PLAIN], strict=True)]
        rows.append([name, median_and_range(values, 1), f"{statistics.median(ratios):.2f}"])
    return table(["", "M tokens/s, median and range", "to plain slices"], rows)


# --- memory ---


def memory_of(process: int) -> dict[str, float]:
    """Resident memory of a process in MiB, apart by what backs it."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) / 1024 for name in MEMORY_FIELDS}


def memory_row(label: str) -> list[str]:
    """This process's memory, which is all that a loader with threads has."""
    own = memory_of(os.getpid())
    return [label, *(f"{own[name]:.0f}" for name in MEMORY_FIELDS)]


def measure_memory(cfg: t.TrainConfig, path: Path) -> str:
    """Table of the memory before, during and at the end of an epoch, on a mapping that nothing touched yet."""
    stream = open_stream(path)
    steps = epoch_steps(cfg, stream)
    points = {max(1, steps * share // 100): f"{share} %" for share in (1, 10, 25, 50, 75, 100)}
    rows = [memory_row("before")]
    batches = loader_of(cfg, stream, range(steps))
    for step in range(1, steps + 1):
        next(batches)
        if step in points:
            rows.append(memory_row(points[step]))
    return table(["of the epoch", *MEMORY_FIELDS], rows)


# --- access ---


def drop_pages(file: Path) -> None:
    """Ask the kernel to forget the pages of the stream, so that the next access reads the disk."""
    with open(file, "rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def milliseconds_for_row(file: Path, dtype: np.dtype, length: int, row: int) -> float:
    """Map a stream and read one row of it."""
    start = time.perf_counter()
    t.PackedRows((np.memmap(file, dtype, "r"),), length).read([(0, row)])
    return 1000 * (time.perf_counter() - start)


def measure_access(path: Path, length: int) -> str:
    """Table of the time until the first and the last row of a stream that is mapped for it."""
    stream = open_stream(path)
    file, dtype, rows = Path(stream.filename), stream.dtype, t.stream_rows((stream,), length)[0]
    del stream  # pages that are mapped can't be forgotten
    lines = []
    for state in ("cold", "warm"):
        cells = []
        for row in (0, rows - 1):
            times = []
            for _ in range(ACCESSES):
                if state == "cold":
                    drop_pages(file)
                times.append(milliseconds_for_row(file, dtype, length, row))
            cells.append(median_and_range(times))
        lines.append([state, *cells])
    return table(["page cache", "row 0, ms", f"row {rows - 1:,} (the last), ms"], lines)


# --- the whole ---


def parse_arguments() -> argparse.Namespace:
    """Read and check the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=4, help="rows of a micro-batch (default 4)")
    parser.add_argument("--max-seq-length", type=int, default=2048, help="targets of a row (default 2048)")
    parser.add_argument(
        "--num-workers", type=int, nargs="+", default=[0, 1, 2], help="threads, each setting (default 0 1 2)"
    )
    parser.add_argument("--tokens", type=int, default=500_000_000, help="of the synthetic stream (default 500 million)")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="a prepared cache to read instead")
    parser.add_argument("--blocks", type=int, default=5, help="interleaved blocks a setting (default 5)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of a block (default 3)")
    parser.add_argument("--warm-up", type=float, default=1.0, help="seconds before each block (default 1)")
    args = parser.parse_args()
    if args.cache and not (args.cache / "corpus.json").is_file():
        parser.error(f"--cache {args.cache}: no corpus.json in it; give the folder of one prepared corpus")
    least = 1000 * args.batch_size * args.max_seq_length
    if not args.cache and args.tokens < least:
        parser.error(f"--tokens {args.tokens}: too few to measure with; give {least} or more")
    return args


def main() -> None:
    """Print the three tables."""
    args = parse_arguments()
    words = ["--train", "--device=cpu", f"--batch-size={args.batch_size}", f"--max-seq-length={args.max_seq_length}"]
    cfg, _ = t.resolve_config(t.parse_args([*words, "--gradient-accumulation-steps=1"]), "cpu")
    with tempfile.TemporaryDirectory(prefix="loader_speed_") as folder:
        path = args.cache or Path(folder) / "stream.bin"
        if not args.cache:
            write_stream(path, args.tokens)
        stream = open_stream(path)
        shape = f"{args.batch_size} x {args.max_seq_length} tokens a micro-batch"
        print(f"{shape}, stream of {len(stream):,} {stream.dtype} tokens ({stream.nbytes / 2**20:.0f} MiB)\n")
        print(measure_speed(args, cfg, stream))
        del stream
        for workers in args.num_workers:
            print(f"\nResident memory in MiB over an epoch, num_workers {workers}:\n")
            print(measure_memory(replace(cfg, num_workers=workers), path), flush=True)
        print("\nRssFile are pages of the mapped file, which the kernel takes back when it needs memory.")
        print(f"\nMapping the stream and reading one row:\n\n{measure_access(path, args.max_seq_length)}\n")
    print(provenance("torch", "numpy"))


if __name__ == "__main__":
    main()
