"""From files to rows: readers, bad input, the held-out part, the token cache, the order of rows."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import multiprocessing
import os
import random
import shutil
import tempfile
import time
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import wait_for
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import WILD_TEXTS, config, write_corpus
from test_layouts import PACK, read

import train_h100_dual as t

GOOD = b'{"text": "good line"}'


@pytest.mark.parametrize(("line", "reason"), [
    (b'{"text": "cut', "JSON"), (b"not json", "JSON"), (b'{"text": "a\x00b"}', "JSON"), (b"\x00\x00", "JSON"),
    (b"[" * 100_000, "JSON"), (b'["text"]', "객체"), (b'"text"', "객체"), (b'{"body": "x"}', "문자열이 없습니다"),
    (b'{"text": 3}', "문자열"), (b'{"text": "\xff\xfe"}', "UTF-8"), (b'{"text": "\\ud800"}', "UTF-8"),
])  # fmt: skip
def test_a_bad_line_is_located_and_no_good_one_is_lost(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([GOOD, b"", line, GOOD, GOOD]))
    found = read("--dataset-path", str(path))
    assert found.texts == ["good line"] * 3
    assert [(bad["line"], bad["file"]) for bad in found.bad] == [(3, str(path))]
    assert reason in found.bad[0]["reason"]


def test_line_numbers_hold_across_chunks_and_long_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(t, "CHUNK_BYTES", 1000)
    long_text = "가" * 7_000_000  # a line of 20 MB
    lines = [GOOD] * 500 + [json.dumps({"text": long_text}).encode()] + [b"bad"] + [GOOD] * 500 + [b"bad"]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    found = read("--dataset-path", str(path))
    assert [bad["line"] for bad in found.bad] == [502, 1003]
    assert Counter(found.texts) == {"good line": 1000, long_text: 1}


def test_bom_crlf_and_blank_lines_are_read_as_a_person_expects(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n   \n" + GOOD + b"\r\n")
    found = read("--dataset-path", str(path))
    assert (found.texts, found.bad, found.counts["records"]) == (["good line"] * 2, [], 2)


@pytest.fixture
def hub(monkeypatch) -> dict[str, list]:
    """A hub with one data set, whose commits and rows a test sets; what was asked of it is kept."""
    import datasets
    import huggingface_hub

    state = {"sha": "first", "rows": [], "asked": []}

    def load(name: str, config: str | None, **more):
        state["asked"].append((name, config, more["split"], more["revision"]))
        assert more["streaming"]
        return datasets.Dataset.from_list(state["rows"]).to_iterable_dataset()

    def info(name: str, revision: str | None = None):
        if name != "org/name":
            raise ConnectionError("no route to the hub")
        return huggingface_hub.hf_api.DatasetInfo(id=name, sha=revision or state["sha"], private=False, tags=[])

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub, "dataset_info", info)
    return state


def test_rows_of_a_hub_data_set_are_documents_of_one_pinned_commit(tmp_path, hub):
    hub["rows"] = [{"text": "하나", "lang": "ko"}, {"text": None, "lang": "ko"}, {"text": "three", "lang": None}] * 600
    name = t.pinned_dataset(config(tmp_path, "--dataset-path", "hf:org/name:wiki:test"))
    chunks = list(t.read_chunks(config(tmp_path, "--dataset-path", name), []))
    found = [t.parse_chunk(chunk, "text") for chunk in chunks]
    assert [number for *_, records in chunks for number, _ in records] == [1, 1025]
    assert [text for part in found for text in part.texts] == ["하나", "three"] * 600
    assert sum(part.counts["empty"] for part in found) == 600
    assert hub["asked"] == [("org/name", "wiki", "test", "first")]
    next(t.read_chunks(config(tmp_path, "--dataset-path", "hf:org/name"), []))
    assert hub["asked"][1:] == [("org/name", None, "train", None)]


def test_another_hub_data_set_or_commit_makes_another_cache(tmp_path, hub):
    hub["rows"] = [{"text": text} for text in wild_documents(100)]

    def path(name: str) -> Path:
        cfg = config(tmp_path, "--dataset-path", name)
        cfg.logs_dir.mkdir(exist_ok=True)
        return t.prepare_corpus(cfg).path

    first = path("hf:org/name")
    assert path("hf:org/name") == first == path("hf:org/name@first")
    hub["sha"] = "second"
    assert len({first, path("hf:org/name"), path("hf:org/name:wiki")}) == 3


def test_a_run_that_goes_on_reads_the_commit_it_began_with_also_without_the_hub(tmp_path, hub, monkeypatch):
    cfg = config(tmp_path, "--dataset-path", "hf:org/name")
    for path in (cfg.logs_dir, cfg.output_dir):
        path.mkdir()
    hub["rows"] = [{"text": text} for text in wild_documents(100)]
    first = t.prepare_corpus(cfg)
    pinned = {"asked": "hf:org/name", "pinned": first.report["dataset"]}
    (cfg.output_dir / "run_info.json").write_text(json.dumps({"dataset": pinned, "mode": "train"}))
    hub["sha"] = "second"
    assert t.prepare_corpus(cfg).path != first.path  # a new run takes the newest
    monkeypatch.setattr("huggingface_hub.dataset_info", None)  # a call would fail
    resumed = t.replace(cfg, resume="auto")
    assert t.prepare_corpus(resumed).path == first.path
    assert t.make_launch_plan(t.replace(resumed, max_steps=None), 1).exact, "the plan knows its tokens"
    checkpoint = tmp_path / "elsewhere" / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    info = {"options": {"dataset_path": "hf:org/name"}, "corpus": first.report}
    (checkpoint / "training_info.json").write_text(json.dumps(info))
    resumed = t.replace(cfg, resume=checkpoint, output_dir=tmp_path / "new")
    assert t.prepare_corpus(resumed).path == first.path
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # also on a machine whose run_id is another than rank 0's
    assert t.prepare_corpus(cfg).path == first.path


def test_a_hub_that_can_not_be_reached_is_named(tmp_path, hub):
    with pytest.raises(RuntimeError, match=r"org/other \(no route to the hub\)"):
        t.pinned_dataset(config(tmp_path, "--dataset-path", "hf:org/other"))


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz", ".bz2"])
def test_a_damaged_archive_is_an_error_that_names_it(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(PACK[suffix](os.urandom(100_000))[:-50_000])
    with pytest.raises(RuntimeError, match="손상"):
        read("--dataset-path", str(path))


def test_a_file_that_can_not_be_opened_is_not_called_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a\.jsonl\.gz"):
        list(t.read_chunks(config(tmp_path), [tmp_path / "a.jsonl.gz"]))


def test_languages_are_taken_from_the_line_or_told_from_hangul(tmp_path):
    lines = [{"text": "anything", "lang": "KO"}, "한글 문장 with English", "English 한", "1"]
    path = write_corpus(tmp_path / "a.jsonl", lines)
    assert read("--dataset-path", str(path)).languages == ["ko", "ko", "en", "en"]


@pytest.mark.parametrize("make", ["nothing", "empty file", "empty directory", "other kind"])
def test_missing_and_empty_data_is_refused_by_name(tmp_path, make):
    path = tmp_path / ("a.pdf" if make == "other kind" else "a.jsonl")
    if make == "empty directory":
        path.mkdir()
    elif make != "nothing":
        path.write_bytes(b"x" if make == "other kind" else b"")
    with pytest.raises(FileNotFoundError, match=str(path)):
        t.corpus_files(config(tmp_path, "--dataset-path", str(path)))


# --- the cache ---


def prepared(folder: Path, documents: list, *more: str) -> t.Corpus:
    path = write_corpus(folder / "corpus.jsonl", documents)
    os.utime(path, (0, len(documents)))  # the same file each time it is written
    return prepare(folder, *more)


def prepare(folder: Path, *more: str) -> t.Corpus:
    cfg = config(folder, "--dataset-path", str(folder / "corpus.jsonl"), *more)
    cfg.logs_dir.mkdir(exist_ok=True)
    return t.prepare_corpus(cfg)


def list_documents(documents: t.DocumentList, end_of_text: int) -> list[tuple[int, ...]]:
    if len(documents) == 0:
        return []
    tokens = documents.read(0, len(documents))
    ends = np.flatnonzero(tokens == end_of_text)
    assert (ends[0], ends[-1]) == (0, len(documents))
    return [tuple(tokens[start + 1 : end].tolist()) for start, end in itertools.pairwise(ends)]


def both_sides(corpus: t.Corpus) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Token ids of the documents of a corpus without --mix, of training and held out."""
    return tuple(list_documents(part, corpus.tokenizer.eos_token_id) for part in (corpus.domains[0], corpus.val))


def wild_documents(count: int) -> list[str]:
    return [f"{WILD_TEXTS[index % len(WILD_TEXTS)]} 문서 {index} document" for index in range(count)]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    t.save_tokenizer(t.train_tokenizer(wild_documents(300), 512), folder)
    return folder


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.text(max_size=40), min_size=1, max_size=80), chunk=st.integers(1, 300), more=st.booleans())
def test_any_list_of_documents_comes_back_from_the_cache_token_for_token(tokenizer_folder, texts, chunk, more):
    texts = [*texts, *texts[:3], "하나는 있는 문서"]  # equal ones are on one side
    good = [unicodedata.normalize("NFC", text) for text in texts if text.strip()]
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(t, "CHUNK_BYTES", chunk)
        if more:
            texts = [item for text in texts for item in (text, "")]  # blank ones are no documents
        corpus = prepared(Path(name), texts, "--tokenizer", str(tokenizer_folder))
        train, val = both_sides(corpus)
        backend = corpus.tokenizer.backend_tokenizer
        backend.encode_special_tokens = True
        ids = [tuple(backend.encode(text, add_special_tokens=False).ids) for text in good]
        assert Counter(train + val) == Counter(ids)
        assert train == [item for item in ids if item not in set(val)]  # in the corpus's order


def test_equal_documents_are_never_on_both_sides(tmp_path):
    corpus = prepared(tmp_path, [f"같은 문서 {index % 50}" for index in range(200)], "--validation-split", "0.2")
    train, val = map(set, both_sides(corpus))
    assert train
    assert val
    assert not train & val


def test_the_tokenizer_of_a_small_corpus_sees_all_but_what_is_held_out(tmp_path, monkeypatch):
    train = t.train_tokenizer

    def train_and_tell(texts: list[str], size: int, config=None):
        (tmp_path / "seen.json").write_text(json.dumps(texts))  # the training has a process of its own
        return train(texts, size)

    monkeypatch.setattr(t, "train_tokenizer", train_and_tell)
    texts = [f"한국어 문서 번호 {index}" for index in range(700)] + [f"English text {index}" for index in range(640)]
    corpus = prepared(tmp_path, texts)
    held = {corpus.tokenizer.decode(ids) for ids in both_sides(corpus)[1]}
    assert corpus.report["val_by_language"] == {"ko": 30, "en": 30}
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert sorted(seen) == sorted(set(texts) - held)
    more = config(tmp_path, "--dataset-path", str(tmp_path / "corpus.jsonl"), "--validation-split", "0.1")
    assert t.draw_sample(more, list(more.dataset_path)) == seen, "a cache that is made again holds the same tokenizer"


def test_a_sample_of_a_large_corpus_is_even_over_a_file_sorted_by_language_and_meets_nothing_held_out(
    tmp_path, monkeypatch
):
    for name, value in {"SMALL_CORPUS_BYTES": 0, "SAMPLE_BYTES": 60_000, "SAMPLE_CHUNK_BYTES": 4096}.items():
        monkeypatch.setattr(t, name, value)
    draw = random.Random(0)
    texts = [f"{word} {draw.randbytes(200).hex()}" for word in ("한국어", "English", "français") for _ in range(400)]
    path = write_corpus(tmp_path / "corpus.jsonl", texts)
    packed = tmp_path / "corpus.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    for corpus in (path, packed):
        cfg = config(tmp_path, "--dataset-path", str(corpus), "--validation-split", "0.1")
        sample = t.draw_sample(cfg, [corpus])
        assert t.draw_sample(t.replace(cfg, validation_split=0.5), [corpus]) == sample
        assert Counter(text.split()[0] for text in sample).keys() == {"한국어", "English", "français"}
        assert sum(len(text.encode()) for text in sample) < 120_000
        hashes = {text: t.content_hash(text.encode()) for text in texts}
        sizes = np.array([len(text.encode()) for text in texts])
        bound = t.held_out_bound(np.array(list(hashes.values()), np.uint64), sizes, 0.15)
        assert all(hashes[text] > bound for text in sample)


def test_a_tokenizer_training_that_dies_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(t, "train_tokenizer", lambda *_: os.kill(os.getpid(), 9))
    with pytest.raises(RuntimeError, match="하위 프로세스가 죽었습니다"):
        prepared(tmp_path, wild_documents(100))


def test_at_least_thirty_documents_of_each_language_are_held_out_and_evaluated_first(tmp_path):
    texts = [f"한국어 문서 번호 {index}" for index in range(2000)] + [f"English text {index}" for index in range(640)]
    corpus = prepared(tmp_path, texts, "--validation-split", "0.02")
    assert corpus.report["val_by_language"] == {"ko": 40, "en": 30}
    language = corpus.documents["language"][corpus.val_documents]
    assert np.bincount(language[:60]).tolist() == [30, 30]


@pytest.mark.parametrize(("share", "most"), [("0", 0), ("0.005", 0.05), ("0.2", 0.2)])
def test_a_few_long_documents_are_not_held_out_for_the_sake_of_thirty(tmp_path, share, most):
    books = [f"제{index}권 " + "오늘 서울에서 책을 " * (50 + 30 * (index % 5)) for index in range(40)]
    texts = [*books, *(f"English text {index}" for index in range(700))]
    corpus = prepared(tmp_path, texts, "--validation-split", share)
    sizes, korean = corpus.documents["bytes"], corpus.documents["language"] == 0
    held = sizes[corpus.val_documents][korean[corpus.val_documents]].sum()
    assert held <= max(most, float(share)) * sizes[:-1][korean[:-1]].sum() + sizes.max() * (share == "0.2")
    assert (corpus.report["val_by_language"]["en"] >= 30) is (share != "0")


def test_a_second_run_opens_the_cache_and_a_changed_file_makes_a_new_one(tmp_path, monkeypatch):
    first = prepared(tmp_path, wild_documents(100))
    monkeypatch.setattr(t, "write_cache", None)  # a call would fail
    cfg = config(tmp_path, "--dataset-path", str(tmp_path / "corpus.jsonl"))
    assert t.prepare_corpus(cfg).path == first.path
    monkeypatch.undo()
    assert prepared(tmp_path, wild_documents(101)).path != first.path


def test_a_restart_keeps_the_corpus_that_it_began_with_whatever_became_of_the_files(tmp_path, monkeypatch):
    first = prepared(tmp_path, wild_documents(100))
    cfg = config(tmp_path)
    cfg.output_dir.mkdir()
    t.update_run_info(cfg.output_dir, run_id=t.run_id(), lists=first.report["lists"])
    (tmp_path / "corpus.jsonl").unlink()
    with pytest.raises(FileNotFoundError):
        prepare(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert prepare(tmp_path).report == first.report


def test_several_processes_prepare_what_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr(t, "CHUNK_BYTES", 2000)
    texts = wild_documents(400)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one = prepared(tmp_path / "one", texts)
    monkeypatch.setattr(t, "SMALL_CORPUS_BYTES", 0)
    monkeypatch.setattr(t, "SAMPLE_BYTES", 1 << 40)
    two = prepared(tmp_path / "two", texts, "--tokenizer", str(one.path / "tokenizer"))
    assert np.array_equal(one.domains[0].tokens, two.domains[0].tokens)
    assert np.array_equal(one.documents, two.documents)
    assert both_sides(one) == both_sides(two)
    assert one.report | {"lists": ""} == two.report | {"lists": ""}


def test_too_many_bad_lines_stop_the_run_and_show_the_first_five(tmp_path, caplog):
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b"\n".join([GOOD] * 90 + [b"bad"] * 10))
    cfg = config(tmp_path, "--dataset-path", str(path))
    cfg.logs_dir.mkdir()
    with pytest.raises(RuntimeError, match="1%") as caught:
        t.prepare_corpus(cfg)
    assert [f"{path}:{line}:" in str(caught.value) for line in range(91, 97)] == [True] * 5 + [False]
    lines = [json.loads(line) for line in (cfg.logs_dir / "bad_lines.jsonl").read_text().splitlines()]
    assert [line["line"] for line in lines] == list(range(91, 101))
    assert list(cfg.cache_dir.glob(".*.tmp")) == []


def test_what_was_skipped_is_told_again_by_a_run_that_finds_the_corpus_prepared(tmp_path, caplog):
    (tmp_path / "corpus.jsonl").write_bytes(b"\n".join([GOOD] * 200 + [b"bad"]))
    told = tmp_path / "logs" / "bad_lines.jsonl"
    for _ in range(2):
        caplog.clear()
        prepare(tmp_path)
        assert f"읽지 못한 줄 1개를 건너뛰었습니다: {t.display_path(told)}\n" in caplog.text
        assert json.loads(told.read_text())["line"] == 201
        told.unlink()


def in_a_process(function, *arguments) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


def test_kill_9_at_any_moment_of_the_preparation_leaves_nothing_that_a_run_would_open(tmp_path, monkeypatch):
    monkeypatch.setattr(t, "SMALL_CORPUS_BYTES", 0)  # helper processes, as for a large corpus
    monkeypatch.setattr(t, "CHUNK_BYTES", 20_000)
    texts = wild_documents(3000)
    for name in ("whole", "timed", "killed"):
        (tmp_path / name).mkdir()
    whole = prepared(tmp_path / "whole", texts)  # with everything imported that a preparation imports
    shutil.copy(tmp_path / "whole" / "corpus.jsonl", tmp_path / "timed")
    start = time.monotonic()
    in_a_process(prepare, tmp_path / "timed").join()
    seconds = time.monotonic() - start
    interrupted = 0
    for share in np.linspace(0.05, 1.0, 12):
        process = in_a_process(prepared, tmp_path / "killed", texts)
        process.join(seconds * share)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        helpers = children.read_text().split() if process.is_alive() else []
        process.kill()
        process.join()
        interrupted += process.exitcode == -9
        for path in (tmp_path / "killed" / "cache").glob("*/corpus.json"):
            if path.parent.suffix != ".tmp":  # it is there: then it is whole
                assert (path.parent / "documents.bin").read_bytes() == (whole.path / "documents.bin").read_bytes()
                shutil.rmtree(path.parent)
        wait_for("the helpers' end", lambda left=helpers: not any(Path(f"/proc/{pid}").exists() for pid in left))
    assert interrupted >= 6
    again = prepared(tmp_path / "killed", texts)
    assert both_sides(again) == both_sides(whole)
    assert list(again.path.parent.glob(".*.tmp")) == []


def test_two_runs_started_at_once_prepare_a_corpus_once(tmp_path, monkeypatch):
    write = t.write_cache

    def write_and_tell(*arguments) -> None:
        with open(tmp_path / "written", "a") as log:
            log.write(f"{os.getpid()}\n")
        write(*arguments)

    monkeypatch.setattr(t, "write_cache", write_and_tell)
    write_corpus(tmp_path / "corpus.jsonl", wild_documents(2000))
    runs = [in_a_process(prepare, tmp_path) for _ in range(3)]
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0, 0, 0]
    assert len((tmp_path / "written").read_text().splitlines()) == 1


# --- rows ---


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 2**31 - 1), st.integers(0, 3))
def test_each_epoch_is_a_permutation_of_its_own_and_one_position_tells_its_row(rows, seed, epoch):
    order = t.RowOrder([rows], [1000], seed)
    domain, found = order(np.arange(epoch * rows, (epoch + 2) * rows))
    assert not domain.any()
    assert sorted(found[:rows].tolist()) == sorted(found[rows:].tolist()) == list(range(rows))
    assert rows < 20 or found[:rows].tolist() != found[rows:].tolist()
    expected = np.random.default_rng([seed, 0, epoch]).permutation(np.arange(rows, dtype=np.uint32))
    assert np.array_equal(found[:rows], expected)
    assert t.RowOrder([rows], [1000], seed)(np.array([epoch * rows]))[1][0] == found[0]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 5))
def test_global_batches_do_not_depend_on_the_number_of_ranks(batch_size, accumulation, start):
    def batches(world_size: int, size: int) -> list[list[int]]:
        cfg = t.TrainConfig(batch_size=size, gradient_accumulation_steps=accumulation, max_seq_length=8)
        ranks = [list(t.rank_positions(cfg, rank, world_size, range(start, start + 3))) for rank in range(world_size)]
        assert all(len(rank) == 3 * accumulation for rank in ranks)
        return [sorted(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)]

    whole = batches(1, 4 * batch_size)
    assert whole == batches(2, 2 * batch_size) == batches(4, batch_size)
    first = start * accumulation * 4 * batch_size
    assert sorted(itertools.chain(*whole)) == list(range(first, first + 3 * accumulation * 4 * batch_size))


DOCUMENTS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2)), min_size=1, max_size=60)


@settings(max_examples=200, deadline=None)
@given(DOCUMENTS, st.integers(1, 40), st.permutations(range(60)))
def test_rows_of_a_list_are_those_of_its_documents_one_after_the_other(documents, length, shuffled):
    offsets = np.cumsum([0, *(size + 1 for size, _ in documents)])
    tokens = np.arange(1, offsets[-1] + 2, dtype=np.uint16)
    tokens[offsets] = 0  # the end of text before each document and behind the last
    chosen = [number for number in range(len(documents)) if documents[number][1]]
    for order in (chosen, [number for number in shuffled if number in chosen]):
        part = t.DocumentList(tokens, t.list_pieces(offsets, np.array(order, np.int64)))
        plain = np.concatenate([*(tokens[offsets[number] : offsets[number + 1]] for number in order), [0]])
        assert len(part) == len(plain) - 1
        for first in range(0, part.rows(length) * length, length):
            assert part.read(first, length).tolist() == plain[first : first + length + 1].tolist()


def test_two_epochs_read_every_row_twice_but_for_less_than_a_global_batch_at_the_end(tmp_path):
    rows, world_size = 101, 2
    cfg = dataclasses.replace(config(tmp_path), max_steps=None, max_epochs=2)
    steps = range(t.total_steps(cfg, rows, cfg.tokens_per_step(world_size)))
    batches = [batch for rank in range(world_size) for batch in t.rank_positions(cfg, rank, world_size, steps)]
    seen = Counter(t.RowOrder([rows], [1000], cfg.seed)(np.sort(np.concatenate(batches)))[1].tolist())
    missing = 2 * rows - sum(seen.values())
    assert set(seen) == set(range(rows))
    assert set(seen.values()) <= {1, 2}
    assert 0 < missing < cfg.batch_size * world_size
    assert sum(count == 1 for count in seen.values()) == missing


@pytest.fixture(params=["on the CPU", "with threads"])
def loader_kind(request, monkeypatch):
    """The loader as a CPU has it, and with a GPU's threads, whose pinning alone needs a GPU."""
    if request.param == "with threads":
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *size, pin_memory, **more: empty(*size, **more))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    return {"device": "cpu" if request.param == "on the CPU" else "cuda"}


def test_the_loader_gives_a_restarted_run_the_rows_it_would_have_read(tmp_path, loader_kind):
    corpus = prepared(tmp_path, wild_documents(200))
    cfg = dataclasses.replace(config(tmp_path), **loader_kind)
    whole = list(t.make_loader(cfg, corpus, t.rank_positions(cfg, 1, 2, range(0, 6))))
    rest = list(t.make_loader(cfg, corpus, t.rank_positions(cfg, 1, 2, range(4, 6))))
    assert len(whole) == 6
    assert whole[0].dtype == torch.int64
    assert [batch.tolist() for batch in whole[4:]] == [batch.tolist() for batch in rest]


@pytest.mark.parametrize("loader_kind", ["with threads"], indirect=True)
def test_the_loader_reads_ahead_of_the_step_but_not_without_end(tmp_path, monkeypatch, loader_kind):
    corpus, begun, devices = prepared(tmp_path, wild_documents(200)), [], []
    read = t.read_rows
    monkeypatch.setattr(t, "read_rows", lambda *places, **more: (begun.append(places), read(*places, **more))[1])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    cfg = dataclasses.replace(config(tmp_path), **loader_kind)
    batches = t.make_loader(cfg, corpus, t.rank_positions(cfg, 0, 1, range(1000)))
    next(batches)
    ahead = 1 + t.BATCHES_AHEAD * t.LOADER_THREADS  # while this step works
    wait_for("the threads", lambda: len(begun) >= ahead)
    time.sleep(0.2)
    assert len(begun) == ahead
    assert devices == [1] * t.LOADER_THREADS  # each thread's own device, before it pins


# --- --mix ---

MIXES = st.lists(st.tuples(st.integers(10, 700), st.integers(1, 60)), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(MIXES, st.integers(0, 2**31 - 1), st.integers(0, 5000))
def test_every_window_has_the_mixs_proportions_and_each_domains_epoch_is_a_permutation(streams, seed, start):
    text = ",".join(f"s{index}={share}" for index, (share, _) in enumerate(streams))
    counts = list(dataclasses.replace(t.TrainConfig(), mix=t.parse_mix(text)).mix_counts.values())
    rows = [size for _, size in streams]
    order = t.RowOrder(rows, counts, seed)
    stream, _ = order(np.arange(start, start + 1000))
    assert np.bincount(stream, minlength=len(counts)).tolist() == counts
    longest = max(-(-size * 1000 // count) for size, count in zip(rows, counts, strict=True))
    stream, row = order(np.arange(longest + 1000))
    for index, size in enumerate(rows):
        assert sorted(row[stream == index][:size].tolist()) == list(range(size))
    one_by_one = [tuple(part.item() for part in order(np.array([start + offset]))) for offset in range(3)]
    block = order(np.arange(start, start + 3))
    assert one_by_one == [tuple(pair) for pair in zip(*(part.tolist() for part in block), strict=True)]


def test_a_batch_is_mixed_about_as_the_whole_is():
    stream, _ = t.RowOrder([1000, 1000], [700, 300], seed=0)(np.arange(1000))
    for size in (10, 64):
        parts = np.convolve(stream, np.ones(size), "valid")
        assert abs(parts - 0.3 * size).max() <= 1


def labelled_documents() -> list[dict[str, str]]:
    korean = [{"text": f"한국어 기사 {index} " * 9, "lang": "ko", "source": "news"} for index in range(120)]
    chat = [{"text": f"한국어 대화 {index} " * 9, "lang": "ko", "source": "chat"} for index in range(120)]
    return [*korean, *chat, *({"text": f"English words {index} " * 9, "lang": "en"} for index in range(120))]


@pytest.mark.parametrize(("mix", "streams"), [
    ("en=0.3,ko=0.7", {"en": {"English words"}, "ko": {"한국어 기사", "한국어 대화"}}),
    ("chat=0.2,ko=0.4,en=0.4", {"chat": {"한국어 대화"}, "en": {"English words"}, "ko": {"한국어 기사"}}),
])  # fmt: skip
def test_a_mix_goes_by_language_and_by_source_where_that_is_named(tmp_path, mix, streams):
    corpus = prepared(tmp_path, labelled_documents(), "--mix", mix)
    assert list(corpus.report["domains"]) == list(streams)
    end = corpus.tokenizer.eos_token_id
    for domain, (name, openings) in zip(corpus.domains, streams.items(), strict=True):
        texts = [corpus.tokenizer.decode(ids) for ids in list_documents(domain, end)]
        assert {" ".join(text.split()[:2]) for text in texts} == openings
        assert corpus.report["domains"][name] == len(domain)
    assert sum(len(list_documents(part, end)) for part in (*corpus.domains, corpus.val)) == 360


def test_documents_that_a_mix_does_not_name_are_left_out_and_said(tmp_path, caplog):
    t.logger.propagate = True
    with caplog.at_level("INFO", "h100_dual"):
        corpus = prepared(tmp_path, labelled_documents(), "--mix", "ko=1")
        t.log_report(config(tmp_path), corpus)
    assert "문서 120개는 학습에 쓰지 않습니다" in caplog.text
    assert {corpus.tokenizer.decode(ids)[:3] for ids in list_documents(corpus.domains[0], 0)} == {"한국어"}


def test_a_mix_of_what_the_corpus_has_not_is_refused_with_what_it_has(tmp_path):
    with pytest.raises(t.UsageProblem, match=r"'fr'.*이름: ko, en, news, chat\)"):
        prepared(tmp_path, labelled_documents(), "--mix", "ko=0.5,fr=0.5")


def test_another_mix_or_validation_split_tokenises_and_copies_nothing(tmp_path, monkeypatch):
    first = prepared(tmp_path, labelled_documents())
    stream = first.path / "tokens.bin"
    before, fingerprint = (stream.stat(), sorted(first.path.iterdir())), first.report["fingerprint"]
    monkeypatch.setattr(t, "write_cache", None)  # a call would fail
    for more in ("--mix ko=0.5,en=0.5", "--validation-split 0.3", "--mix chat=1 --validation-split 0"):
        corpus = prepare(tmp_path, *more.split())
        assert corpus.report["fingerprint"] == fingerprint
        assert corpus.path == first.path
        assert {Path(part.tokens.filename) for part in (*corpus.domains, corpus.val)} == {stream}
    lists = [path for path in first.path.iterdir() if path.name.startswith("lists-")]
    assert (stream.stat(), len(lists)) == (before[0], 4)
    assert sum(path.stat().st_size for folder in lists for path in folder.iterdir()) < 40_000
    other_shares = prepare(tmp_path, "--mix", "en=9,ko=1")
    assert len(list(first.path.glob("lists-*"))) == 4
    assert list(other_shares.report["domains"]) == ["en", "ko"]
