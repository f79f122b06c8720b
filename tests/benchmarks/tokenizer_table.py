#!/usr/bin/env python3
"""Compare tokenizers trained with our SPLIT_PATTERN and with plain ByteLevel splitting, on documents kept out of both.

    .venv/bin/python tests/benchmarks/tokenizer_table.py ../shared/data/mixed_pretraining.jsonl.gz

Training sample, vocabulary sizes, trainer and held-out documents are the same; only the splitting differs.  See
README.md beside this file.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import tokenizers
from common import ROOT, config, corpus_file, document_batches, provenance, table

sys.path.insert(0, str(ROOT))
import train_h100_dual as t

HELD_OUT_CHARACTERS = 8 << 20  # a language: the most that is measured on
LANGUAGES = {"ko": "Korean", "en": "English"}


def split_corpus(cfg: t.TrainConfig, share: float) -> tuple[list[str], dict[str, list[str]]]:
    """The training sample, in the order of their hashes, and a language's held-out texts."""
    sample: list[tuple[int, str]] = []
    held: dict[str, list[str]] = {name: [] for name in LANGUAGES}
    bound = int(share * 2**64)
    for batch in document_batches(t, cfg):
        for text, language in zip(batch.texts, batch.languages, strict=True):
            key = t.content_hash(text.encode())  # equal texts have equal ones, and so fall on one side
            if key >= bound:
                sample.append((key, text[: t.LONGEST_SAMPLE_TEXT]))
            elif language in held and sum(map(len, held[language])) < HELD_OUT_CHARACTERS:
                held[language].append(text)
    sample.sort()
    kept = itertools.accumulate(len(text) for _, text in sample)
    return [text for (_, text), size in zip(sample, kept, strict=True) if size < t.TOKENIZER_SAMPLE_CHARACTERS], held


def plain_splitting() -> Any:
    """While it lasts, train_tokenizer splits as ByteLevel does by itself (GPT-2's pattern)."""
    from tokenizers import pre_tokenizers

    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return mock.patch.object(tokenizers.pre_tokenizers, "Sequence", lambda steps: plain)


SPLITTINGS: dict[str, Callable[[], Any]] = {"ours": nullcontext, "plain ByteLevel": plain_splitting}


def measure(
    splitting: str, size: int, sample: list[str], held: dict[str, list[str]]
) -> tuple[dict[str, int], list[str]]:
    """Train one tokenizer; return a language's tokens, and the first cells of its line."""
    start = time.perf_counter()
    with SPLITTINGS[splitting]():
        tokenizer = t.train_tokenizer(sample, size)
    seconds = time.perf_counter() - start
    encode, engine = t.make_encoder(tokenizer)
    print(f"{splitting}, {size:,}: {seconds:.0f} s to train", file=sys.stderr)
    tokens = {name: sum(len(ids) for ids, _ in encode(texts)) for name, texts in held.items()}
    return tokens, [f"{len(tokenizer):,}", splitting, engine]


def result_rows(args: argparse.Namespace, sample: list[str], held: dict[str, list[str]]) -> list[list[str]]:
    """One line a vocabulary and splitting: bytes a token and tokens an eojeol of each language."""
    sizes = {name: sum(len(text.encode()) for text in texts) for name, texts in held.items()}
    words = {name: sum(len(text.split()) for text in texts) for name, texts in held.items()}
    rows = []
    for size in args.sizes:
        found = {splitting: measure(splitting, size, sample, held) for splitting in SPLITTINGS}
        reference = found["plain ByteLevel"][0]
        for tokens, cells in found.values():
            for name in held:
                cells += [f"{sizes[name] / tokens[name]:.3f}", f"{tokens[name] / words[name]:.3f}"]
                cells += [f"{tokens[name] / reference[name]:.3f}"]
            rows.append(cells)
    return rows


def parse_arguments() -> argparse.Namespace:
    """Read and check the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", metavar="CORPUS", type=corpus_file, help=".jsonl, .jsonl.gz or .jsonl.zst with text")
    parser.add_argument("--sizes", type=int, nargs="+", default=[16384, 32768, 65536], help="of the vocabularies")
    parser.add_argument("--held-out", type=float, default=0.1, help="share of documents to measure on (default 0.1)")
    return parser.parse_args()


def main() -> None:
    """Print the table."""
    args = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="tokenizer_table_") as folder:
        sample, held = split_corpus(config(t, args.corpus, Path(folder)), args.held_out)
    held = {name: texts for name, texts in held.items() if texts}
    if not sample or not held:
        sys.exit(f"{args.corpus}: too few Korean and English documents; give a larger corpus or another --held-out")
    parts = [
        f"{LANGUAGES[name]} {len(texts):,} documents, {sum(len(text.encode()) for text in texts) / 1e6:.2f} MB, "
        f"{sum(len(text.split()) for text in texts):,} eojeols"
        for name, texts in held.items()
    ]
    size = sum(map(len, sample)) / 1e6
    print(f"Trained on {len(sample):,} documents ({size:.1f} M characters). Measured on: {'; '.join(parts)}.\n")
    columns = ("bytes a token", "tokens an eojeol", "tokens to plain")
    head = ["vocabulary", "splitting", "engine", *(f"{LANGUAGES[name]}, {what}" for name in held for what in columns)]
    print(table(head, result_rows(args, sample, held)))
    print(f"\n{provenance('tokenizers', 'transformers', 'tiktoken')}")


if __name__ == "__main__":
    main()
