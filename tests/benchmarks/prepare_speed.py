#!/usr/bin/env python3
"""Time our preparation of a corpus against the usual one with Hugging Face's ``datasets``, and check its token ids.

    .venv/bin/python tests/benchmarks/prepare_speed.py ../shared/data/mixed_pretraining.jsonl.gz

Every timing is taken in a fresh process, after the imports and with all earlier writes on the disk; the rounds
alternate which side goes first.  See README.md beside this file for what is shared.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import chain
from pathlib import Path
from typing import Any

from common import ROOT, config, corpus_file, document_batches, median_and_range, provenance, table

SEQUENCE_LENGTH = 2048
STAGES = ("load_dataset", "map", "group_texts")


def load_ours() -> Any:
    """Import the training script: only children do, so that a second start is a first import."""
    sys.path.insert(0, str(ROOT))
    import train_h100_dual

    return train_h100_dual


def processor_seconds() -> float:
    """Of this process and of its helpers that have ended: on a shared machine it says what the clock can't."""
    return sum(os.times()[:4])


# --- parts: each runs in a process of its own and returns figures ---


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Ours, whole: reading, tokenising, writing and fsync; it trains a tokenizer where none is given."""
    t = load_ours()
    given = [f"--tokenizer={args.tokenizer}"] if args.tokenizer else [f"--vocab-size={args.vocab_size}"]
    cfg = config(t, args.corpus, args.folder, *given)
    if args.corpus.stat().st_size < t.SMALL_CORPUS_BYTES:
        sys.exit(
            f"{args.corpus} is so small that ours would use one process only: give a file of 16 MB of text or more"
        )
    import transformers

    assert transformers.AutoTokenizer  # imported only when it is asked for; the recipe does so before its clock starts
    os.sync()
    start, cpu = time.perf_counter(), processor_seconds()
    corpus = t.prepare_corpus(cfg)
    seconds, cpu = time.perf_counter() - start, processor_seconds() - cpu
    report = {name: corpus.report[name] for name in ("documents", "bytes", "tokens", "engine")}
    return {"whole": seconds, "cpu": cpu, "path": str(corpus.path), **report}


def recipe(args: argparse.Namespace) -> dict[str, Any]:
    """The usual recipe: load_dataset, map with the tokenizer, map with group_texts."""
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    end = tokenizer.eos_token_id

    def tokenize(batch: dict[str, list]) -> dict[str, list]:
        found = tokenizer(batch["text"], return_attention_mask=False)["input_ids"]
        return {"input_ids": [[*ids, end] for ids in found]}

    def group_texts(batch: dict[str, list]) -> dict[str, list]:
        ids = list(chain.from_iterable(batch["input_ids"]))
        starts = range(0, len(ids) - SEQUENCE_LENGTH + 1, SEQUENCE_LENGTH)
        return {"input_ids": [ids[start : start + SEQUENCE_LENGTH] for start in starts]}

    os.sync()
    times = [time.perf_counter()]
    raw = datasets.load_dataset("json", data_files=str(args.corpus), split="train", cache_dir=str(args.folder))
    times.append(time.perf_counter())
    cpu = processor_seconds()
    encoded = raw.map(tokenize, batched=True, num_proc=args.processes, remove_columns=raw.column_names)
    times.append(time.perf_counter())
    rows = encoded.map(group_texts, batched=True, num_proc=args.processes)
    times.append(time.perf_counter())
    cpu = processor_seconds() - cpu
    stages = {name: after - before for name, before, after in zip(STAGES, times, times[1:], strict=False)}
    tokens = sum(len(column.flatten()) for column in encoded.data.column("input_ids").chunks)
    return {**stages, "cpu": cpu, "documents": len(raw), "tokens": tokens - len(raw), "rows": len(rows)}


def compare_ids(args: argparse.Namespace) -> dict[str, Any]:
    """Encode every document with our engine and with the tokenizer's own, a thousand at a time."""
    t = load_ours()
    cfg = config(t, args.corpus, args.folder, f"--tokenizer={args.tokenizer}")
    reference = t.load_tokenizer(args.tokenizer).backend_tokenizer
    reference.encode_special_tokens = True  # ours takes the names of special tokens in a text for text
    tokenizer = t.load_tokenizer(args.tokenizer)
    encode, engine = None, ""
    documents = tokens = 0
    different = 0
    for batch in document_batches(t, cfg):
        if encode is None:
            encode, engine = t.make_encoder(tokenizer)
        for first in range(0, len(batch.texts), 1000):
            texts = batch.texts[first : first + 1000]
            own = reference.encode_batch_fast(texts, add_special_tokens=False)
            for (ids, _), theirs in zip(encode(texts), own, strict=True):
                documents, tokens = documents + 1, tokens + len(ids)
                different += ids.tolist() != theirs.ids
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "engine": engine,
        "documents": documents,
        "tokens": tokens,
        "different": different,
        "peak_mib": peak,
    }


PARTS = {"prepare": prepare, "recipe": recipe, "ids": compare_ids}


# --- the whole ---


def run_part(name: str, args: argparse.Namespace, folder: Path, tokenizer: str | None) -> dict[str, Any]:
    """Run a part in a fresh process and return its figures."""
    command = [sys.executable, __file__, str(args.corpus), "--part", name, "--folder", str(folder)]
    command += ["--processes", str(args.processes), "--vocab-size", str(args.vocab_size)]
    command += ["--tokenizer", tokenizer] if tokenizer else []
    own = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(command, env={**os.environ, **own}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"the part {name!r} ended with {done.returncode}: its message stands above")
    return json.loads(done.stdout.splitlines()[-1])


def run_rounds(args: argparse.Namespace, work: Path, tokenizer: str) -> list[tuple[dict, dict]]:
    """Time both sides in turn, each with a cache of its own that is removed after it; our last cache stays."""
    rounds = []
    for number in range(args.rounds):
        order = ("prepare", "recipe") if number % 2 == 0 else ("recipe", "prepare")
        found = {}
        for name in order:
            shutil.rmtree(work / name, ignore_errors=True)
            (work / name).mkdir()
            found[name] = run_part(name, args, work / name, tokenizer)
        shutil.rmtree(work / "recipe")
        rounds.append((found["prepare"], found["recipe"]))
        print(f"round {number + 1} of {args.rounds} done", file=sys.stderr)
    return rounds


def speed_table(rounds: list[tuple[dict, dict]]) -> str:
    """Each round's seconds, and the ratio that counts: the recipe without its reading over ours with it."""
    rows, ratios = [], []
    for number, (ours, theirs) in enumerate(rounds, 1):
        ratios.append((theirs["map"] + theirs["group_texts"]) / ours["whole"])
        rows.append([number, f"{ours['whole']:.2f}", *(f"{theirs[name]:.2f}" for name in STAGES), f"{ratios[-1]:.2f}"])
    columns = [[float(row[index]) for row in rows] for index in range(1, 5)]
    rows.append(["median", *(f"{statistics.median(column):.2f}" for column in columns), median_and_range(ratios)])
    head = ["round", "ours, whole, s", *(f"{name}, s" for name in STAGES), "(map + group_texts) / ours"]
    return table(head, rows)


def speed_notes(rounds: list[tuple[dict, dict]], processes: int) -> str:
    """What both sides did, and whether they found the same tokens."""
    ours, theirs = rounds[-1]
    seconds = statistics.median(found["whole"] for found, _ in rounds)
    same = (ours["documents"], ours["tokens"]) == (theirs["documents"], theirs["tokens"])
    verdict = "the same" if same else f"NOT the same ({theirs['documents']:,} and {theirs['tokens']:,})"
    ratios = [theirs["cpu"] / ours["cpu"] for ours, theirs in rounds]
    return (
        f"By processor time (map + group_texts) / ours is {median_and_range(ratios)}. {processes} processes each. "
        f"Ours: {ours['bytes'] / 1e6 / seconds:.1f} MB/s, "
        f"{ours['tokens'] / 1e6 / seconds:.2f} M tokens/s with engine {ours['engine']}. "
        f"{ours['documents']:,} documents, {ours['tokens']:,} tokens without ends of text; in the recipe {verdict}."
    )


def ids_table(found: dict[str, Any]) -> str:
    """How many ids were compared and how many documents differ."""
    numbers = [f"{found[name]:,}" for name in ("documents", "tokens", "different")]
    head = ["engine", "documents", "tokens", "documents that differ", "peak memory, MiB"]
    return table(head, [[found["engine"], *numbers, f"{found['peak_mib']:.0f}"]])


def parse_arguments() -> argparse.Namespace:
    """Read and check the options."""
    available = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", metavar="CORPUS", type=corpus_file, help=".jsonl, .jsonl.gz or .jsonl.zst with text")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default 3)")
    parser.add_argument("--vocab-size", type=int, default=16384, help="of the tokenizer trained first (default 16384)")
    parser.add_argument("--tokenizer", metavar="DIR", help="use this tokenizer instead of training one")
    parser.add_argument("--processes", type=int, default=available, help="of both sides (default: all cores)")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not 1 <= args.processes <= available:
        parser.error(f"--processes {args.processes}: this process may use {available} cores; give 1 to {available}")
    return args


def main() -> None:
    """Run all parts and print their tables, or run one part for the parent."""
    args = parse_arguments()
    if args.part:
        print(json.dumps(PARTS[args.part](args)))
        return
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.processes])  # ours takes as many as it may
    with tempfile.TemporaryDirectory(prefix="prepare_speed_") as name:
        work = Path(name)
        tokenizer = args.tokenizer
        if not tokenizer:
            tokenizer = run_part("prepare", args, work / "first", None)["path"] + "/tokenizer"
        rounds = run_rounds(args, work, tokenizer)
        ids = run_part("ids", args, work / "ids", tokenizer)
    print(speed_table(rounds), speed_notes(rounds, args.processes), sep="\n\n")
    print(f"\nIds, our engine against the tokenizer's own encode_batch_fast:\n\n{ids_table(ids)}\n")
    print(provenance("torch", "transformers", "datasets", "tokenizers", "tiktoken"))
    if ids["different"]:
        sys.exit(f"{ids['different']} documents differ: the fast engine must not be used for this tokenizer")


if __name__ == "__main__":
    main()
