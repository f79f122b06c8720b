#!/usr/bin/env python3
"""Memory of preparing a large corpus, over all processes, and how fast its cache opens.

Makes a corpus of the wanted size from the sentences of a smaller one, lets a new process prepare it
with its own tokenizer, and meanwhile adds up the memory of that process and its helpers::

    python tests/benchmarks/prepare_memory.py ../shared/data/mixed_pretraining.jsonl.gz --gigabytes 5
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path

import numpy as np
import psutil
from common import config, corpus_file, document_batches, provenance, seconds, table

import train_h100_dual as t


def make_corpus(source: Path, target: Path, size: int) -> None:
    """Write about ``size`` bytes of documents in which one word in ten is made of halves of others.

    So the vocabulary grows with the corpus as a real one's does.
    """
    draw, written = random.Random(0), 0
    temporary = target.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8") as stream:
        while written < size:
            for documents in document_batches(t, config(t, source, target.parent)):
                for text, language in zip(documents.texts, documents.languages, strict=True):
                    line = json.dumps({"text": vary(text, draw), "lang": language}, ensure_ascii=False)
                    stream.write(line + "\n")
                    written += len(line.encode())
    os.replace(temporary, target)


def vary(text: str, draw: random.Random) -> str:
    """A text with about one word in ten made of the halves of two of its words."""
    words = text.split(" ")
    for index in draw.sample(range(len(words)), len(words) // 10):
        first, second = words[index], draw.choice(words)
        words[index] = first[: (len(first) + 1) // 2] + second[len(second) // 2 :]
    return " ".join(words)


def prepare(cfg: t.TrainConfig) -> None:
    """In a process of its own: prepare the corpus as a run's first rank does."""
    t.set_up_logging(cfg, 0)
    t.log_report(cfg, t.prepare_corpus(cfg))


def tree_memory(pid: int) -> int:
    """Bytes that a process and its descendants hold; a page that several share counts once, with others in part."""
    held, root = 0, psutil.Process(pid)
    for process in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            held += process.memory_full_info().pss
    return held


def watch(cfg: t.TrainConfig) -> int:
    """Prepare the corpus in a new process, and return the memory of its tree when that was most."""
    process, peak = multiprocessing.get_context("spawn").Process(target=prepare, args=(cfg,)), 0
    process.start()
    while process.is_alive():
        peak = max(peak, tree_memory(process.pid))
        time.sleep(0.1)
    if process.exitcode:
        raise RuntimeError(f"preparing failed ({process.exitcode}): its message stands above")
    return peak


def time_opening(cfg: t.TrainConfig) -> dict[str, str]:
    """How long it takes to open the prepared cache, and to read its first and its last row."""
    found = {"opening the cache": f"{seconds(t.prepare_corpus, cfg):.2f} s"}
    corpus, length = t.prepare_corpus(cfg), cfg.max_seq_length
    for name, row in (("first", 0), ("last", corpus.rows(length) - 1)):
        spent = seconds(t.read_rows, corpus, np.array([0]), np.array([row]), length)
        found[f"reading the {name} row"] = f"{1000 * spent:.2f} ms"
    return found


def main() -> None:
    """Make the corpus, prepare it, open it, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", metavar="CORPUS", type=corpus_file, help="what the large corpus is made of")
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/prepare_memory"))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    big = args.folder / f"{args.gigabytes:g}.jsonl"
    if not big.exists():
        make_corpus(args.corpus, big, int(args.gigabytes * 1e9))
    shutil.rmtree(args.folder / "cache", ignore_errors=True)
    size, cfg, begun = big.stat().st_size, config(t, big, args.folder, "--vocab-size=65536"), time.monotonic()
    peak = watch(cfg)
    spent = time.monotonic() - begun
    rows = {
        "corpus": f"{size / 1e9:.2f} GB",
        "preparing it, tokenizer included": f"{spent:.0f} s ({size / 1e6 / spent:.1f} MB/s)",
        "peak memory over all processes": f"{peak / 1e9:.2f} GB",
        **time_opening(cfg),
    }
    print(table(("what", "figure"), rows.items()))
    print(f"\n{provenance('torch', 'tokenizers', 'tiktoken')}")


if __name__ == "__main__":
    main()
