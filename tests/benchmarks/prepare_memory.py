#!/usr/bin/env python3
"""Memory of preparing a large corpus, over all processes, and how fast its cache opens.

Makes a corpus of the wanted size from the sentences of a smaller one, lets a new process prepare it
with its own tokenizer, and meanwhile adds up the memory of that process and its helpers::

    python tests/benchmarks/prepare_memory.py ../shared/data/mixed_pretraining.jsonl.gz --gigabytes 5
    python tests/benchmarks/prepare_memory.py ../shared/data/mixed_pretraining.jsonl.gz --gigabytes 2 --layout modu
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
from pathlib import Path

import numpy as np
from common import config, corpus_file, document_batches, provenance, table

import train_h100_dual as ours

# A file's name, what stands before, between and behind its documents, and the column: JSON lines; an array, as namuwiki
# comes; one object, as the written corpus of Modu comes.
LAYOUTS = {
    "lines": ("jsonl", "", "\n", "\n", "text"),
    "array": ("json", "[", ",\n", "]\n", "text"),
    "modu": ("json", '{"id": "WB1", "document": [', ",\n", "]}\n", "document[].paragraph[].form"),
}


def make_corpus(source: Path, target: Path, size: int, layout: str) -> None:
    """Write about ``size`` bytes of documents in which one word in ten is made of halves of others.

    So the vocabulary grows with the corpus as a real one's does.
    """
    draw, written = random.Random(0), 0
    _, before, between, behind, _ = LAYOUTS[layout]
    temporary = target.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8") as stream:
        while written < size:
            for documents in document_batches(ours, config(ours, source, target.parent)):
                for text, language in zip(documents.texts, documents.languages, strict=True):
                    content = {"text": vary(text, draw)}
                    if layout == "modu":
                        content = {"paragraph": [{"form": line} for line in content["text"].split("\n")]}
                    line = json.dumps({**content, "lang": language}, ensure_ascii=False)
                    stream.write((between if written else before) + line)
                    written += len(line.encode())
        stream.write(behind)
    os.replace(temporary, target)


def vary(text: str, draw: random.Random) -> str:
    """A text with about one word in ten made of the halves of two of its words."""
    words = text.split(" ")
    for index in draw.sample(range(len(words)), len(words) // 10):
        first, second = words[index], draw.choice(words)
        words[index] = first[: (len(first) + 1) // 2] + second[len(second) // 2 :]
    return " ".join(words)


def tree_memory(root: int) -> tuple[int, int]:
    """Bytes of anonymous memory that a process and its descendants hold, and of files that they map.

    A page that several share counts once; of mapped files (the libraries) the process with most counts.
    """
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        children.setdefault(parent, []).append(int(folder.name))
    pending, anonymous, mapped = [root], 0, 0
    while pending:
        pid = pending.pop()
        pending += children.get(pid, [])
        try:
            anonymous += 1024 * kilobytes(Path(f"/proc/{pid}/smaps_rollup"), "Pss_Anon")
            mapped = max(mapped, 1024 * kilobytes(Path(f"/proc/{pid}/status"), "RssFile"))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return anonymous, mapped


def kilobytes(path: Path, name: str) -> int:
    """A figure that the kernel tells about a process; 0 where it has none."""
    lines = (line.split() for line in path.read_text().splitlines())
    return next((int(words[1]) for words in lines if words[0] == f"{name}:"), 0)


def watch(command: list[str], log: Path) -> tuple[float, tuple[int, int]]:
    """Run a command; return its seconds, and the (anonymous, mapped) memory of its tree when that was most."""
    start, peak = time.monotonic(), (0, 0)
    with open(log, "w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak = max(peak, tree_memory(process.pid), key=sum)
            time.sleep(0.1)
    if process.returncode:
        raise RuntimeError(f"preparing failed ({process.returncode}); see {log}")
    return time.monotonic() - start, peak


def prepare(corpus: str, folder: str, *options: str) -> None:
    """In a process of its own: prepare the corpus as a run's first rank does."""
    cfg = config(ours, Path(corpus), Path(folder), *options)
    ours.set_up_logging(cfg, 0)
    prepared = ours.prepare_corpus(cfg)
    ours.log_report(cfg, prepared)


def time_opening(cfg: ours.TrainConfig) -> dict[str, str]:
    """How long it takes to open the prepared cache, and to read its first and its last row."""
    start = time.perf_counter()
    corpus = ours.prepare_corpus(cfg)
    found = {"opening the cache": f"{time.perf_counter() - start:.2f} s"}
    for name, row in (("first", 0), ("last", corpus.rows(cfg.max_seq_length) - 1)):
        start = time.perf_counter()
        ours.read_rows(corpus, np.array([0]), np.array([row]), cfg.max_seq_length)
        found[f"reading the {name} row"] = f"{1000 * (time.perf_counter() - start):.2f} ms"
    return found


def read_an_epoch(cfg: ours.TrainConfig) -> list[tuple[int, int]]:
    """MB of (anonymous, file-backed) memory of this process, before and ten times while it reads one epoch."""
    corpus = ours.prepare_corpus(cfg)
    micro_steps = cfg.gradient_accumulation_steps
    steps = corpus.rows(cfg.max_seq_length) // (cfg.batch_size * micro_steps)
    loader = ours.make_loader(cfg, corpus, ours.rank_positions(cfg, 0, 1, range(steps)))
    found, every = [resident()], max(1, steps * micro_steps // 10)
    for number, _ in enumerate(loader, 1):
        if number % every == 0:
            found.append(resident())
    return found


def resident() -> tuple[int, int]:
    """MB of this process's anonymous and file-backed pages in memory."""
    return tuple(kilobytes(Path("/proc/self/status"), name) // 1024 for name in ("RssAnon", "RssFile"))


def main() -> None:
    """Make the corpus, prepare it, open it, read an epoch of it, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", metavar="CORPUS", type=corpus_file, help="what the large corpus is made of")
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--vocab-size", type=int, default=65536)
    parser.add_argument("--layout", choices=LAYOUTS, default="lines")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/prepare_memory"))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    suffix, *_, column = LAYOUTS[args.layout]
    big, log = args.folder / f"{args.layout}-{args.gigabytes:g}.{suffix}", args.folder / "prepare.log"
    if not big.exists():
        make_corpus(args.corpus, big, int(args.gigabytes * 1e9), args.layout)
    shutil.rmtree(args.folder / "cache", ignore_errors=True)
    call = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import prepare_memory; "
    options = f"--vocab-size={args.vocab_size}", f"--text-column={column}"
    call += f"prepare_memory.prepare(*{(str(big), str(args.folder), *options)!r})"
    seconds, peak = watch([sys.executable, "-c", call], log)
    print(log.read_text(), flush=True)
    size, cfg = big.stat().st_size, config(ours, big, args.folder, *options)
    rows = {
        "corpus": f"{size / 1e9:.2f} GB",
        "preparing it, tokenizer included": f"{seconds:.0f} s ({size / 1e6 / seconds:.1f} MB/s)",
        "peak memory over all processes": f"{sum(peak) / 1e9:.2f} GB ({peak[0] / 1e9:.2f} GB of it anonymous)",
        **time_opening(cfg),
    }
    kept = list(zip(*read_an_epoch(cfg), strict=True))
    rows["anonymous memory while reading an epoch, MB"] = ", ".join(map(str, kept[0]))
    rows["file-backed memory (the cache's pages), MB"] = ", ".join(map(str, kept[1]))
    print(table(("what", "figure"), rows.items()))
    print(f"\n{provenance('torch', 'tokenizers', 'tiktoken')}")


if __name__ == "__main__":
    main()
