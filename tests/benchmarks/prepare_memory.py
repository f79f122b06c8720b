#!/usr/bin/env python3
"""Memory of preparing a large corpus, over all processes, and how fast its cache opens.

Makes a corpus of the wanted size from the sentences of a smaller one, lets a new process prepare it
with its own tokenizer, and meanwhile adds up the memory of that process and its helpers::

    python tests/benchmarks/prepare_memory.py ../shared/data/mixed_pretraining.jsonl.gz --gigabytes 5
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import train_h100_dual as ours  # noqa: E402

SAMPLE_SECONDS = 0.1


def make_corpus(source: Path, target: Path, size: int) -> None:
    """Write ``size`` bytes of JSON lines: each document's words, in order, but for one in ten drawn anew.

    New words are two halves of old ones, so that the vocabulary grows with the corpus as a real one's does.
    """
    draw, written = random.Random(0), 0
    temporary = target.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8") as stream:
        while written < size:
            for text, language in read_documents(source):
                line = json.dumps({"text": vary(text, draw), "lang": language}, ensure_ascii=False) + "\n"
                stream.write(line)
                written += len(line.encode())
                if written >= size:
                    break
    os.replace(temporary, target)


def read_documents(source: Path) -> Iterator[tuple[str, str]]:
    """Texts and languages of a corpus."""
    for chunk in ours.read_line_chunks(source):
        documents = ours.parse_chunk(chunk, "text")
        yield from zip(documents.texts, documents.languages, strict=True)


def vary(text: str, draw: random.Random) -> str:
    """A text with about one word in ten made of the halves of two of its words."""
    words = text.split(" ")
    for index in draw.sample(range(len(words)), len(words) // 10):
        first, second = words[index], draw.choice(words)
        words[index] = first[: (len(first) + 1) // 2] + second[len(second) // 2 :]
    return " ".join(words)


def tree_memory(root: int) -> tuple[int, int]:
    """Bytes that a process and its descendants hold together: with shared pages counted once, and private ones."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(parent, []).append(int(folder.name))
    pending, total, anonymous = [root], 0, 0
    while pending:
        pid = pending.pop()
        pending += children.get(pid, [])
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        fields = {line.split(":")[0]: int(line.split()[1]) for line in lines[1:]}
        total += fields["Pss"] * 1024
        anonymous += fields["Pss_Anon"] * 1024
    return total, anonymous


def watch(command: list[str], log: Path) -> tuple[float, int, int]:
    """Run a command; return its seconds, peak memory and peak anonymous memory over its tree."""
    start, peak, anonymous = time.monotonic(), 0, 0
    with open(log, "w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        while process.poll() is None:
            now, private = tree_memory(process.pid)
            if now > peak:
                last = log.read_text().splitlines()[-1:] or [""]
                print(f"{time.monotonic() - start:7.1f} s  {now / 1e9:.2f} GB  {last[0]}", flush=True)
            peak, anonymous = max(peak, now), max(anonymous, private)
            time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        raise RuntimeError(f"preparing failed ({process.returncode}); see {log}")
    return time.monotonic() - start, peak, anonymous


def options(corpus: Path, folder: Path, vocab_size: int) -> list[str]:
    """Options of a run that keeps everything below ``folder``."""
    paths = ["--output-dir", str(folder / "outputs"), "--logs-dir", str(folder / "logs")]
    cache = ["--cache-dir", str(folder / "cache"), "--vocab-size", str(vocab_size)]
    return ["--train", "--device", "cpu", "--dataset-path", str(corpus), *paths, *cache]


def prepare(arguments: list[str]) -> None:
    """In a process of its own: prepare the corpus as a run's first rank does."""
    cfg = ours.resolve_config(ours.parse_args(arguments), "cpu")[0]
    cfg.logs_dir.mkdir(parents=True, exist_ok=True)
    ours.set_up_logging(cfg, 0)
    ours.log_report((corpus := ours.prepare_corpus(cfg)).report, corpus.path)


def time_opening(arguments: list[str]) -> dict[str, float]:
    """Seconds to open the prepared cache, and milliseconds to read its first and its last row."""
    cfg = ours.resolve_config(ours.parse_args(arguments), "cpu")[0]
    import transformers  # noqa: F401  (a run imports it in any case)

    start = time.perf_counter()
    corpus = ours.prepare_corpus(cfg)
    opening = time.perf_counter() - start
    last = ours.stream_rows(corpus.streams, 2048)[0] - 1
    rows = ours.PackedRows(corpus.streams, 2048)
    found = {"opening_s": opening}
    for name, row in (("first_row_ms", 0), ("last_row_ms", last)):
        start = time.perf_counter()
        rows.__getitems__([(0, row)])
        found[name] = 1000 * (time.perf_counter() - start)
    return found


def flat_memory(arguments: list[str]) -> list[tuple[int, int]]:
    """Bytes of (anonymous, file-backed) memory of this process, eleven times while it reads one epoch."""
    cfg = ours.resolve_config(ours.parse_args(arguments), "cpu")[0]
    corpus = ours.prepare_corpus(cfg)
    steps = corpus.rows(cfg.max_seq_length) // (cfg.batch_size * cfg.gradient_accumulation_steps)
    loader = ours.make_loader(cfg, corpus, ours.RankPositions(cfg, 0, 1, range(steps)))
    found, every = [resident()], max(1, len(loader) // 10)
    for number, _ in enumerate(loader, 1):
        if number % every == 0:
            found.append(resident())
    return found


def resident() -> tuple[int, int]:
    """Bytes of this process's anonymous and file-backed pages in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
    return int(fields["RssAnon"]) * 1024, int(fields["RssFile"]) * 1024


def main() -> None:
    """Make the corpus, prepare it, open it, read an epoch of it, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="a .jsonl(.gz) file whose text the large corpus is made of")
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--vocab-size", type=int, default=65536)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/prepare_memory"))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    big = args.folder / f"big-{args.gigabytes:g}.jsonl"
    if not big.exists():
        make_corpus(args.corpus, big, int(args.gigabytes * 1e9))
    shutil.rmtree(args.folder / "cache", ignore_errors=True)
    arguments = options(big, args.folder, args.vocab_size)
    call = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import prepare_memory as p; "
    command = [sys.executable, "-c", call + f"p.prepare({arguments!r})"]
    seconds, peak, anonymous = watch(command, args.folder / "prepare.log")
    print((args.folder / "prepare.log").read_text())
    size = big.stat().st_size
    print(f"| corpus | {size / 1e9:.2f} GB |\n| preparing | {seconds:.0f} s ({size / 1e6 / seconds:.1f} MB/s) |")
    print(f"| peak memory over all processes | {peak / 1e9:.2f} GB ({anonymous / 1e9:.2f} GB anonymous) |")
    for name, value in time_opening(arguments).items():
        print(f"| {name} | {value:.3f} |")
    kept = np.array(flat_memory(arguments)) / 1e6
    print("| memory while reading an epoch (MB, anonymous) | " + ", ".join(f"{value:.0f}" for value in kept[:, 0]), "|")
    print("| the same, mapped pages of the cache | " + ", ".join(f"{value:.0f}" for value in kept[:, 1]), "|")


if __name__ == "__main__":
    main()
