"""Loss and bits per byte on the held-out documents."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from kinds import TEXTS, surrounded
from samples import rolling_nats, tiny_run, write_corpus

import train_h100_dual as t


def held_out(corpus: t.Corpus) -> list[tuple[str, int, list[int]]]:
    """Language, bytes and tokens of each held-out document, in the order in which an evaluation takes them."""
    names, offsets = corpus.report["languages"], corpus.documents["offset"]
    opening = len({*t.document_start(corpus.tokenizer), corpus.tokenizer.eos_token_id})  # before each in the stream
    documents = []
    for number in corpus.val_documents:
        record = corpus.documents[number]
        tokens = corpus.val.tokens[offsets[number] + opening : offsets[number + 1]].tolist()
        documents.append((names[record["language"]], int(record["bytes"]), tokens))
    return documents


def reference(run: t.Run, documents: list[tuple[str, int, list[int]]]) -> dict[str, float]:
    """The same figures from the definition: each document by itself, from its start on, a row's length at a time."""
    start, scored = t.document_start(run.corpus.tokenizer), []
    for language, size, tokens in documents:
        nats = rolling_nats(run.model, [*start, *tokens], run.cfg.max_seq_length)
        scored.append((language, size, len(tokens), nats))
    figures = {}
    for suffix, wanted in (("", {language for language, *_ in scored}), ("_ko", {"ko"}), ("_en", {"en"})):
        size, count, nats = np.sum([row[1:] for row in scored if row[0] in wanted], axis=0)
        figures |= {f"val_loss{suffix}": nats / count, f"val_bits_per_byte{suffix}": nats / math.log(2) / size}
    return figures


def test_figures_equal_a_plain_reference_also_where_only_some_documents_are_read(tmp_path, monkeypatch):
    run, limit = tiny_run(tmp_path, "--batch-size", "7"), 1000
    documents = held_out(run.corpus)
    assert t.evaluate(run) == pytest.approx(reference(run, documents), rel=1e-5)
    assert run.loss_module.training
    count = int((np.cumsum([1 + len(tokens) for _, _, tokens in documents]) <= limit).sum())
    assert 0 < count < len(documents)
    monkeypatch.setattr(t, "MOST_EVALUATION_TOKENS", limit)
    assert t.evaluate(run) == pytest.approx(reference(run, documents[:count]), rel=1e-5)


@pytest.mark.parametrize("template", ["$A", "<s> $A"])
def test_a_run_scores_its_held_out_documents_as_its_checkpoint_scores_them_in_a_file(tmp_path, template):
    surrounded(template).save_pretrained(tmp_path / "mine")
    corpus = write_corpus(tmp_path / "corpus.jsonl", TEXTS[:300])
    more = ("--dataset-path", str(corpus), "--tokenizer", str(tmp_path / "mine"), "--validation-split", "0.1")
    run, state = tiny_run(tmp_path, *more, "--max-steps", "20"), t.TrainState()
    assert t.train(run, state) == "finished"
    t.report_save(run, is_last=True)
    texts = [run.corpus.tokenizer.decode(tokens) for _, _, tokens in held_out(run.corpus)]
    assert [len(text.encode()) for text in texts] == [size for _, size, _ in held_out(run.corpus)]
    held = write_corpus(tmp_path / "held.jsonl", texts)
    checkpoint = run.cfg.output_dir / "checkpoint-20"
    cfg = t.parse_args(["--evaluate", str(checkpoint), "--dataset-path", str(held)])
    totals = t.score_corpus(t.load_model(checkpoint).eval(), t.load_tokenizer(checkpoint), cfg)
    _, tokens, size, nats = sum(totals.values())[:4]
    assert nats / tokens == pytest.approx(state.evaluation["val_loss"], rel=1e-5)
    assert nats / math.log(2) / size == pytest.approx(state.evaluation["val_bits_per_byte"], rel=1e-5)
    saved = json.loads((checkpoint / "generation_config.json").read_text())
    assert saved["bos_token_id"] == t.document_start(run.corpus.tokenizer)[-1]
