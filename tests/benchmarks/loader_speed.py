#!/usr/bin/env python3
"""Measure the data loader alone: tokens per second a process, its memory, and the time to the first and last row.

    .venv/bin/python tests/benchmarks/loader_speed.py

Random tokens (1 GB in $TMPDIR) stand for a corpus of documents of one length, of which one in a hundred is held out;
"every other" is one of two domains whose documents alternate.  See README.md beside this file.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from common import median_and_range, provenance, table, take_turns

import train_h100_dual as t

WORLD_SIZE = 2  # as on two GPUs: this process reads every other micro-batch
PLAIN = "plain slices in order"


def corpus_of(stream: np.ndarray, length: int, every_other: bool = False) -> Any:
    """As much of a corpus as the loader asks of: the training documents of ``length`` tokens each."""
    offsets = np.arange(0, len(stream), length + 1)
    kept = np.random.default_rng(1).random(len(offsets) - 1) > 0.01
    kept[1::2] &= not every_other
    return SimpleNamespace(domains=(t.DocumentList(stream, t.list_pieces(offsets, np.flatnonzero(kept))),))


def load(cfg: t.TrainConfig, corpus: Any) -> Iterator[torch.Tensor]:
    """The training loop's loader, of rank 0, without end."""
    yield from t.make_loader(cfg, cast(t.Corpus, corpus), t.rank_positions(cfg, 0, WORLD_SIZE, range(10**9)))


def plain_slices(cfg: t.TrainConfig, stream: np.ndarray) -> Iterator[torch.Tensor]:
    """What no loader can beat by much: rows as they lie in the file."""
    size = cfg.max_seq_length
    for first in itertools.cycle(range(0, len(stream) - cfg.batch_size * size - 1, cfg.batch_size * size)):
        rows = [stream[first + row * size : first + (row + 1) * size + 1] for row in range(cfg.batch_size)]
        yield torch.from_numpy(np.stack(rows).astype(np.int64))


def tokens_per_second(batches: Iterator[torch.Tensor], seconds: float) -> float:
    """Millions a second, over ``seconds``."""
    tokens, begin = 0, time.perf_counter()
    while (spent := time.perf_counter() - begin) < seconds:
        batch = next(batches)
        tokens += batch.shape[0] * (batch.shape[1] - 1)
    return tokens / spent / 1e6


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=500_000_000, help="of the stream (default 500 million)")
    parser.add_argument("--blocks", type=int, default=5, help="of each setting, by turns (default 5)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of a block (default 3)")
    args = parser.parse_args()
    words = "--train --device=cpu --batch-size=4 --max-seq-length=2048 --gradient-accumulation-steps=1"
    cfg, _ = t.resolve_config(t.parse_args(words.split()), "cpu")
    with tempfile.TemporaryDirectory(prefix="loader_speed_") as folder:
        path = Path(folder) / "stream.bin"
        np.random.default_rng(0).integers(0, 2**16, args.tokens, np.uint16).tofile(path)
        os.sync()
        stream = np.memmap(path, np.uint16, "r")
        corpora = {f"documents of {length:,}": corpus_of(stream, length) for length in (30, 30_000)}
        corpora["documents of 30, every other"] = corpus_of(stream, 30, every_other=True)
        loaders = {PLAIN: plain_slices(cfg, stream), **{name: load(cfg, part) for name, part in corpora.items()}}
        calls = {name: partial(tokens_per_second, batches, args.seconds) for name, batches in loaders.items()}
        speeds = take_turns(calls, args.blocks, warm_up=1)
        rows = [[name, median_and_range(figures, 1)] for name, figures in speeds.items()]
        print(table(["", "M tokens/s, median and range"], rows))
        lines = []
        for name, corpus in corpora.items():
            documents, times = corpus.domains[0], []
            for row in (0, documents.rows(cfg.max_seq_length) - 1):
                start = time.perf_counter()
                t.read_rows(corpus, np.array([0]), np.array([row]), cfg.max_seq_length)
                times.append(f"{1000 * (time.perf_counter() - start):.2f}")
            lines.append([name, f"{documents.pieces.nbytes / 2**20:.0f}", *times])
        print(f"\n{table(['', 'list, MiB', 'first row, ms', 'last row, ms'], lines)}")
    print(f"\n{provenance('torch', 'numpy')}")


if __name__ == "__main__":
    main()
