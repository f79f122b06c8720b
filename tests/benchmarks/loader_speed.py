#!/usr/bin/env python3
"""Measure the data loader alone: tokens per second a process, with short and with long documents.

    .venv/bin/python tests/benchmarks/loader_speed.py

Random tokens (1 GB in $TMPDIR) stand for a corpus of documents of one length, of which one in a hundred is held out;
"every other" is one of two domains whose documents alternate.  See README.md beside this file.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from common import median_and_range, provenance, table, take_turns

import train_h100_dual as t

WORLD_SIZE = 2  # as on two GPUs: this process reads every other micro-batch
BLOCKS, BLOCK_SECONDS = 5, 3.0


def corpus_of(stream: np.ndarray, length: int, every_other: bool) -> Any:
    """As much of a corpus as the loader asks of: the training documents of ``length`` tokens each."""
    offsets = np.arange(0, len(stream), length + 1)
    kept = np.random.default_rng(1).random(len(offsets) - 1) > 0.01
    kept[1::2] &= not every_other
    return SimpleNamespace(domains=(t.DocumentList(stream, t.list_pieces(offsets, np.flatnonzero(kept))),))


def tokens_per_second(batches: Iterator[torch.Tensor]) -> float:
    """Millions a second, over a block."""
    tokens, begin = 0, time.perf_counter()
    while (spent := time.perf_counter() - begin) < BLOCK_SECONDS:
        batch = next(batches)
        tokens += batch.shape[0] * (batch.shape[1] - 1)
    return tokens / spent / 1e6


def main() -> None:
    """Let the loaders of rank 0 take turns, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=500_000_000, help="of the stream (default 500 million)")
    args = parser.parse_args()
    words = "--train --device=cpu --batch-size=4 --max-seq-length=2048 --gradient-accumulation-steps=1"
    cfg, _ = t.resolve_config(t.parse_args(words.split()), "cpu")
    with tempfile.TemporaryDirectory(prefix="loader_speed_") as folder:
        path, calls = Path(folder) / "stream.bin", {}
        np.random.default_rng(0).integers(0, 2**16, args.tokens, np.uint16).tofile(path)
        os.sync()
        stream = np.memmap(path, np.uint16, "r")
        for length, every_other in ((30, False), (30_000, False), (30, True)):
            positions = t.rank_positions(cfg, 0, WORLD_SIZE, range(10**9))  # without end
            batches = t.make_loader(cfg, corpus_of(stream, length, every_other), positions)
            name = f"documents of {length:,}{', every other' if every_other else ''}"
            calls[name] = partial(tokens_per_second, batches)
        speeds = take_turns(calls, BLOCKS, warm_up=1)
    print(table(["", "M tokens/s, median and range"], [[name, median_and_range(speeds[name], 1)] for name in speeds]))
    print(f"\n{provenance('torch', 'numpy')}")


if __name__ == "__main__":
    main()
