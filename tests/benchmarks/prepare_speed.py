#!/usr/bin/env python3
"""Time our preparation of a corpus against the usual one with Hugging Face's ``datasets``, and check its token ids.

    .venv/bin/python tests/benchmarks/prepare_speed.py ../shared/data/mixed_pretraining.jsonl.gz

Every timing is taken in a fresh process, after the imports and with all earlier writes on the disk; the rounds
alternate which side goes first.  See README.md beside this file for what is shared.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from common import config, corpus_file, document_batches, median_and_range, provenance, ratios, table, take_turns

SEQUENCE_LENGTH, VOCABULARY = 2048, 16_384
STAGES = ("load_dataset", "map", "group_texts")


def processor_seconds() -> float:
    """Of this process and of its helpers that have ended: on a shared machine it says what the clock can't."""
    return sum(os.times()[:4])


# --- parts: each runs in a process of its own, which alone imports what it needs, and returns figures ---


def prepare(corpus: Path, folder: Path, tokenizer: str) -> dict[str, Any]:
    """Ours, whole: reading, tokenising, writing and fsync; it trains a tokenizer where none is given."""
    import transformers

    import train_h100_dual as t

    assert transformers.AutoTokenizer  # imported only when it is asked for; the recipe does so before its clock starts
    if corpus.stat().st_size < t.SMALL_CORPUS_BYTES:
        raise ValueError(f"{corpus} is so small that ours would use one process only: give 16 MB or more")
    cfg = config(t, corpus, folder, f"--tokenizer={tokenizer}" if tokenizer else f"--vocab-size={VOCABULARY}")
    os.sync()
    start, cpu = time.perf_counter(), processor_seconds()
    prepared = t.prepare_corpus(cfg)
    seconds, cpu = time.perf_counter() - start, processor_seconds() - cpu
    report = {name: prepared.report[name] for name in ("documents", "bytes", "tokens", "engine")}
    return {"whole": seconds, "cpu": cpu, "path": str(prepared.path), **report}


def recipe(corpus: Path, folder: Path, source: str) -> dict[str, Any]:
    """The usual recipe: load_dataset, map with the tokenizer, map with group_texts."""
    import datasets
    from transformers import AutoTokenizer

    tokenizer, processes = AutoTokenizer.from_pretrained(source), len(os.sched_getaffinity(0))
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
    raw = datasets.load_dataset("json", data_files=str(corpus), split="train", cache_dir=str(folder))
    times.append(time.perf_counter())
    cpu = processor_seconds()
    encoded = raw.map(tokenize, batched=True, num_proc=processes, remove_columns=raw.column_names)
    times.append(time.perf_counter())
    rows = encoded.map(group_texts, batched=True, num_proc=processes)
    times.append(time.perf_counter())
    cpu = processor_seconds() - cpu
    stages = {name: after - before for name, before, after in zip(STAGES, times, times[1:], strict=False)}
    tokens = sum(len(column.flatten()) for column in encoded.data.column("input_ids").chunks)
    return {**stages, "cpu": cpu, "documents": len(raw), "tokens": tokens - len(raw), "rows": len(rows)}


def compare_ids(corpus: Path, folder: Path, source: str) -> dict[str, Any]:
    """Encode every document with our engine and with the tokenizer's own, a thousand at a time."""
    import train_h100_dual as t

    cfg = config(t, corpus, folder, f"--tokenizer={source}")
    reference, tokenizer = t.load_tokenizer(source).backend_tokenizer, t.load_tokenizer(source)
    reference.encode_special_tokens = True  # ours takes the names of special tokens in a text for text
    encode, engine = t.make_encoder(tokenizer)
    documents = tokens = different = 0
    for batch in document_batches(t, cfg):
        for first in range(0, len(batch.texts), 1000):
            texts = batch.texts[first : first + 1000]
            own = reference.encode_batch_fast(texts, add_special_tokens=False)
            for (ids, _), theirs in zip(encode(texts), own, strict=True):
                documents, tokens = documents + 1, tokens + len(ids)
                different += ids.tolist() != theirs.ids
    return {"engine": engine, "documents": documents, "tokens": tokens, "different": different}


# --- the whole ---


def run_part(part: Callable[..., dict[str, Any]], corpus: Path, folder: Path, tokenizer: str) -> dict[str, Any]:
    """Run a part in a fresh process and an empty folder and return its figures."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    os.environ["HF_DATASETS_CACHE"] = str(folder)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as worker:
        return worker.submit(part, corpus, folder, tokenizer).result()


def report(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> str:
    """Both sides' seconds and the ratio that counts: the recipe without its reading over ours with it."""
    whole, mapping = [one["whole"] for one in ours], [one["map"] + one["group_texts"] for one in theirs]
    rows = [["ours, whole", median_and_range(whole), ratios(mapping, whole, 2)]]
    rows += [[f"recipe, {name}", median_and_range([one[name] for one in theirs]), ""] for name in STAGES]
    cpu = ratios([one["cpu"] for one in theirs], [one["cpu"] for one in ours], 2)
    last, other, seconds = ours[-1], theirs[-1], statistics.median(whole)
    same = (last["documents"], last["tokens"]) == (other["documents"], other["tokens"])
    verdict = "the same" if same else f"NOT the same ({other['documents']:,} and {other['tokens']:,})"
    head = [f"{len(ours)} rounds", "s, median and range", "(map + group_texts) / ours (95 %)"]
    processes = len(os.sched_getaffinity(0))
    return (
        f"{table(head, rows)}\n\nBy processor time (map + group_texts) / ours is {cpu}. {processes} processes each. "
        f"Ours: {last['bytes'] / 1e6 / seconds:.1f} MB/s, {last['tokens'] / 1e6 / seconds:.2f} M tokens/s with engine "
        f"{last['engine']}. {last['documents']:,} documents, {last['tokens']:,} tokens without ends of text; in the "
        f"recipe {verdict}."
    )


def main() -> None:
    """Run all parts and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", metavar="CORPUS", type=corpus_file, help=".jsonl, .jsonl.gz or .jsonl.zst with text")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default 3)")
    parser.add_argument("--tokenizer", metavar="DIR", default="", help="use this tokenizer instead of training one")
    args = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    with tempfile.TemporaryDirectory(prefix="prepare_speed_") as name:
        run, work = partial(run_part, corpus=args.corpus), Path(name)
        tokenizer = args.tokenizer or run(prepare, folder=work / "first", tokenizer="")["path"] + "/tokenizer"
        sides = {
            name: partial(run, part, folder=work / name, tokenizer=tokenizer)
            for name, part in (("ours", prepare), ("recipe", recipe))
        }
        rounds = take_turns(sides, args.rounds)
        ids = run(compare_ids, folder=work / "ids", tokenizer=tokenizer)
    print(report(rounds["ours"], rounds["recipe"]))
    compared = f"{ids['documents']:,} documents, {ids['tokens']:,} tokens"
    print(f"\nIds of the engine {ids['engine']} against encode_batch_fast: {compared}, {ids['different']:,} differ.\n")
    print(provenance("torch", "transformers", "datasets", "tokenizers", "tiktoken"))
    if ids["different"]:
        sys.exit(f"{ids['different']} documents differ: the fast engine must not be used for this tokenizer")


if __name__ == "__main__":
    main()
