"""Loss and bits per byte on the held-out documents."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from samples import tiny_run

import train_h100_dual as t


def held_out_stream(corpus: t.Corpus) -> np.ndarray:
    """The held-out documents' tokens one after the other, with an end of text before, between and behind them."""
    return corpus.val.read(np.zeros(1, np.int64), len(corpus.val))[0].astype(np.int64)


def held_out_ends(corpus: t.Corpus) -> np.ndarray:
    """Where in that stream each document begins, and the last ends."""
    offsets, numbers = corpus.documents["offset"], corpus.val_documents
    return np.cumsum([1, *(offsets[numbers + 1] - offsets[numbers])])


def reference(run: t.Run) -> dict[str, float]:
    """The same figures, one row and one document at a time."""
    corpus, length = run.corpus, run.cfg.max_seq_length
    stream = torch.from_numpy(held_out_stream(corpus))
    nll = []
    for start in range(0, len(stream) - 1, length):
        row = stream[start : start + length + 1]
        with torch.no_grad():
            logits = run.model(input_ids=row[None, :-1], use_cache=False).logits[0]
        nll += F.cross_entropy(logits, row[1:], reduction="none").double().tolist()
    names, held = corpus.report["languages"], corpus.documents[corpus.val_documents]
    offsets = held_out_ends(corpus) - 1  # targets begin at the second token
    figures = {}
    for suffix, wanted in (("", names), ("_ko", ["ko"]), ("_en", ["en"])):
        chosen = [index for index, name in enumerate(held["language"]) if names[name] in wanted]
        losses = [nll[offsets[index] : offsets[index + 1]] for index in chosen]
        size = sum(int(held["bytes"][index]) for index in chosen)
        figures[f"val_loss{suffix}"] = sum(map(sum, losses)) / sum(map(len, losses))
        figures[f"val_bits_per_byte{suffix}"] = sum(sum(loss[:-1]) for loss in losses) / math.log(2) / size
    return figures


def test_figures_equal_a_plain_reference(tmp_path):
    run = tiny_run(tmp_path, "--batch-size", "7")
    figures, expected = t.evaluate(run), reference(run)
    assert figures.keys() == expected.keys()
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value, rel=1e-5), name
    assert run.loss_module.training


def test_the_bytes_are_those_of_the_documents(tmp_path):
    corpus = tiny_run(tmp_path).corpus
    stream = held_out_stream(corpus)
    texts = [corpus.tokenizer.decode(stream[a : b - 1]) for a, b in itertools.pairwise(held_out_ends(corpus))]
    assert [len(text.encode()) for text in texts] == corpus.documents["bytes"][corpus.val_documents].tolist()


def test_an_evaluation_reads_whole_documents_up_to_its_limit(tmp_path, monkeypatch):
    run = tiny_run(tmp_path)
    corpus, limit = run.corpus, 1000
    count = int(np.searchsorted(held_out_ends(corpus), limit, "right")) - 1
    numbers = corpus.val_documents[:count]
    assert 0 < count < len(corpus.val_documents)
    val = t.DocumentList(corpus.val.tokens, t.list_pieces(corpus.documents["offset"], numbers))
    run.corpus = t.replace(corpus, val=val, val_documents=numbers)
    expected = reference(run)
    run.corpus = corpus
    monkeypatch.setattr(t, "MOST_EVALUATION_TOKENS", limit)
    assert t.evaluate(run) == pytest.approx(expected, rel=1e-5)
