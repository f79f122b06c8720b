"""Every layout in which corpora are published comes back document for document, whatever else lies beside it."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import re
import tempfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import config
from test_readme import section

import train_h100_dual as t

PACK = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}


def read(*options: str, size: int | None = None) -> t.Documents:
    """Everything that a run with these options would read."""
    cfg, found = config(Path("/nowhere"), *options), t.Documents()
    for chunk in t.read_chunks(cfg, t.corpus_files(cfg)[0], size):
        part = t.parse_chunk(chunk, cfg.text_column)
        for name in ("texts", "languages", "sources", "bad"):
            getattr(found, name).extend(getattr(part, name))
        found.counts += part.counts
    return found


def to_json(record: Any, ascii: bool = False) -> bytes:
    return json.dumps(record, ensure_ascii=ascii).encode()


def json_lines(texts: list[str]) -> bytes:
    return b"".join(to_json({"text": text, "id": n}, n % 2 == 0) + b"\n" for n, text in enumerate(texts))


def pretty_array(texts: list[str]) -> bytes:
    """As namuwiki comes."""
    items = [{"title": "]", "text": text, "contributors": ["a", {"b": "}"}], "score": float("nan")} for text in texts]
    return json.dumps(items, ensure_ascii=False, indent=2).encode()


def modu_written(texts: list[str], indent: int | None = 4) -> bytes:
    """As the written corpus of Modu comes: a document's paragraphs, two lines of it here."""
    documents = []
    for n, text in enumerate(texts):
        paragraphs = [{"id": f"{n}.1", "form": line} for line in text.split("\n")]
        documents.append({"id": f"W{n}", "metadata": {"title": '"document": ['}, "paragraph": paragraphs})
    corpus = {"id": "WB1", "metadata": {"title": "국립국어원 신문 말뭉치", "keys": ["a", "]"]}, "document": documents}
    return json.dumps(corpus, ensure_ascii=False, indent=indent).encode()


def table(texts: list[str], delimiter: str) -> bytes:
    stream = io.StringIO(newline="")
    rows = csv.writer(stream, delimiter=delimiter)
    rows.writerows([["id", "text", "label"], *([n, text, 1] for n, text in enumerate(texts))])
    return stream.getvalue().encode()


def parquet(texts: list[str]) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table({"id": range(len(texts)), "text": pa.array(texts, pa.string())}), stream)
    return stream.getvalue()


def arrow(texts: list[str]) -> bytes:
    stream = io.BytesIO()
    rows = pa.table({"text": pa.array(texts, pa.string()), "id": range(len(texts))})
    with pa.ipc.new_stream(stream, rows.schema) as writer:
        writer.write_table(rows, 10)
    return stream.getvalue()


def articles(texts: list[str]) -> bytes:
    return "".join(f" = 제목 {n} = \n \n = = 소제목 = = \n{text}\n \n" for n, text in enumerate(texts)).encode()


MODU = ["--text-column", "document[].paragraph[].form"]
SPOKEN = ["--text-column", "document[].utterance[].form"]
SJML = ["--text-column", "SJML.text[].content"]
PATHS = {"modu.json": MODU, "spoken.json": SPOKEN, "sjml.json": SJML}
LAYOUTS: dict[str, tuple[str, Callable[[list[str]], bytes], list[str]]] = {  # a name, what writes it, options
    "JSON lines": ("a.jsonl", json_lines, []), "ndjson": ("a.NDJSON", json_lines, []),
    "JSON lines called .json": ("c4-ko.tfrecord-00000-of-01024.json", json_lines, []),
    "no suffix": ("wiki_00", json_lines, []), "a split's name": ("corpus.train", json_lines, []),
    "array": ("namuwiki.json", pretty_array, []), "object": ("modu.json", modu_written, MODU),
    "array on a line": ("a.json", lambda texts: to_json([{"text": text} for text in texts]), []),
    "object on a line": ("modu.json", lambda texts: modu_written(texts, None), MODU),
    "csv": ("a.csv", lambda texts: table(texts, ","), []), "parquet": ("a.parquet", parquet, []),
    "arrow": ("data-00000-of-00001.arrow", arrow, []),
}  # fmt: skip
WILD = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)


def clean(text: str) -> bool:
    return bool(text.strip()) and unicodedata.is_normalized("NFC", text)


@settings(max_examples=60, deadline=None)
@given(st.lists(WILD.filter(clean), min_size=1, max_size=30), st.sampled_from(list(LAYOUTS)), st.data())
def test_any_list_of_documents_comes_back_the_same_from_any_layout(texts, layout, data):
    name, write, options = LAYOUTS[layout]
    pack = data.draw(st.sampled_from(list(PACK)))
    size, head = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 300))
    unpacked = (".parquet", ".arrow", "wiki_00", ".train")
    pack = "" if name.endswith(unpacked) else pack
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder, name + pack)
        path.write_bytes(PACK[pack](write(texts)))
        if "line" not in layout and not name.endswith(unpacked[2:]):  # a first line is told from the head
            patch.setattr(t, "HEAD_BYTES", head)
        found = read("--dataset-path", str(path), *options, size=size)
    assert (found.texts, found.bad) == (texts, [])


LINES = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=40).filter(clean)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(LINES, min_size=1, max_size=4).map("\n".join), min_size=1, max_size=20), st.integers(1, 80))
def test_any_paragraphs_articles_and_rows_without_quoting_come_back_the_same(texts, size):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.txt")
        for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le"):
            bom = "\ufeff" * (encoding == "utf-16-le")
            lines = "\r\n\r\n".join(text.replace("\n", "\r\n") for text in texts)
            path.write_bytes((bom + lines).encode(encoding))
            assert read("--dataset-path", str(path), size=size).texts == texts, encoding
        rows = [text.replace("\n", " ") for text in texts]
        tsv = Path(folder, "a.tsv")
        tsv.write_text("id\ttext\n" + "".join(f"{number}\t{row}\n" for number, row in enumerate(rows)), "utf-8")
        assert read("--dataset-path", str(tsv), size=size).texts == rows
        path.write_bytes(articles(texts))
        expected = [f" = 제목 {n} = \n \n = = 소제목 = = \n{text}" for n, text in enumerate(texts)]
        assert read("--dataset-path", str(path), size=size).texts == expected


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


TEXTS = ["첫 글입니다.\n둘째 줄.", "second text", "ㅋㅋ 셋째 😀 글"]


def modu_spoken(texts: list[str]) -> bytes:
    documents = [
        {"id": f"S{n}", "utterance": [{"form": line} for line in text.split("\n")]} for n, text in enumerate(texts)
    ]
    return to_json({"id": "SD1", "metadata": {"title": "일상 대화"}, "document": documents})


def aihub(texts: list[str]) -> bytes:
    """A file of AI-Hub: with a BOM, names and texts escaped in one half of them."""
    items = [{"content": text, "subject": "본문"} for text in texts]
    return b"\xef\xbb\xbf" + json.dumps({"SJML": {"header": {"name": "x"}, "text": items}}, indent=1).encode()


NSMC = 'id\tdocument\tlabel\n1\t"따옴표로 시작해 닫지 않은 글\t1\n2\t그는 "좋다"고 했다\t0\n'
PUBLISHED: dict[str, tuple[dict[str, bytes | str], list[str]]] = {  # TEXTS as files, and how they are named
    "Modu, written": ({"NXRW1.json": modu_written(TEXTS)}, MODU),
    "Modu, spoken": ({"SDRW1.json": modu_spoken(TEXTS)}, SPOKEN),
    "AI-Hub": ({"라벨링데이터/a.json": aihub(TEXTS)}, SJML),
    "AI-Hub, a file a document": (
        {f"{n % 2}/{n}.json": json.dumps({"data": {"body": text}}, indent=2) for n, text in enumerate(TEXTS)},
        ["--text-column", "data.body"],
    ),
    "namuwiki": ({"namuwiki_20210301.json": pretty_array(TEXTS)}, []),
    "WikiExtractor": ({"AA/wiki_00": json_lines(TEXTS[:2]), "AB/wiki_00": json_lines(TEXTS[2:])}, []),
    "C4": ({"c4-ko.tfrecord-00000-of-01024.json.gz": gzip.compress(json_lines(TEXTS))}, []),
    "FineWeb-2": ({"train/0.parquet": parquet(TEXTS), "test/0.parquet": parquet(["held out"])}, []),
    "HPLT": ({"1.jsonl.zst": PACK[".zst"](json_lines(TEXTS))}, []),
    "save_to_disk": ({}, []),
    "NSMC": ({"ratings.tsv": NSMC}, ["--text-column", "document"]),
    "kowikitext": (
        {"kowikitext_20200920.train": articles(TEXTS), "kowikitext_20200920.dev": articles(["held out"])},
        [],
    ),
    "CP949": ({"소설.txt": "\r\n\r\n".join(TEXTS[:2]).replace("\n둘", "\r\n둘").encode("cp949")}, []),
}


def publish(folder: Path, kind: str) -> list[str]:
    """Write TEXTS as a corpus of this kind is published; returns the options that read it."""
    files, options = PUBLISHED[kind]
    for name, content in files.items():
        put(folder / name, content)
    if kind == "save_to_disk":
        import datasets

        datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": TEXTS})}).save_to_disk(folder)
    return ["--dataset-path", str(folder), *options]


@pytest.mark.parametrize(("row", "kinds"), [
    ("모두의 말뭉치", ["Modu, written", "Modu, spoken"]), ("AI-Hub", ["AI-Hub", "AI-Hub, a file a document"]),
    ("NSMC", ["NSMC"]), ("나무위키, WikiExtractor, kowikitext, FineWeb-2, HPLT, C4", ["namuwiki", "C4", "HPLT"]),
])  # fmt: skip
def test_the_readme_tells_with_which_options_a_published_corpus_is_read(row, kinds):
    (shown,) = (line for line in section("데이터").splitlines() if line.startswith(f"| {row} |"))
    assert "--dataset-path " in shown
    for kind in kinds:
        column = PUBLISHED[kind][1][1:]
        assert ("--text-column" in shown) == bool(column)
        assert all(name in re.findall(r"[\w.\[\]]+", shown) for name in column)


READ_OTHERWISE = {
    "AI-Hub, a file a document": [TEXTS[0], TEXTS[2], TEXTS[1]],  # in the order of paths
    "NSMC": ['"따옴표로 시작해 닫지 않은 글', '그는 "좋다"고 했다'],
    "CP949": TEXTS[:2],
    "kowikitext": [f" = 제목 {n} = \n \n = = 소제목 = = \n{text}" for n, text in enumerate(TEXTS)],
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_a_published_corpus_is_read_as_it_comes(folder, kind):
    found = read(*publish(folder, kind))
    assert (found.texts, found.bad) == (READ_OTHERWISE.get(kind, TEXTS), [])


def test_a_language_beside_the_text_or_in_the_record_or_the_row_is_used(folder):
    pq.write_table(pa.table({"data": [{"body": "abc"}], "lang": ["ko"]}), folder / "c.parquet")
    put(folder / "a.json", json.dumps({"lang": "ko", "data": {"body": "abc"}}, indent=1))
    put(folder / "b.jsonl", to_json({"lang": "fr", "data": {"body": "abc"}, "source": {"no": "name"}}))
    assert read("--dataset-path", str(folder), "--text-column", "data.body").languages == ["ko", "fr", "ko"]


def test_a_zst_file_of_several_frames_is_read_whole_and_one_of_too_long_a_window_is_told_how(folder):
    frames = [PACK[".zst"](json_lines([text])) for text in TEXTS]
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00skip"  # as pzstd and seekable files have them
    path = put(folder / "multi.jsonl.zst", skippable.join([*frames, PACK[".zst"](b"")]))
    assert read("--dataset-path", str(path)).texts == TEXTS
    block = json_lines(["1"])
    header = b"\x28\xb5\x2f\xfd\x00\xa8" + (len(block) << 3 | 1).to_bytes(3, "little")  # a window of 2 GiB
    path = put(folder / "long31.jsonl.zst", header + block)
    with pytest.raises(RuntimeError, match=rf"{path} .*zstd -d --long=31"):
        read("--dataset-path", str(path))


def test_a_column_of_lists_is_refused_with_the_path_that_reads_it(folder):
    path = folder / "list_text.parquet"
    pq.write_table(pa.table({"text": [["1", "2"], ["3"]], "id": [1, 2]}), path)
    with pytest.raises(RuntimeError, match=r"글이 든 열: text\[\]"):
        prepare(config(folder.parent, "--dataset-path", str(path)))
    assert read("--dataset-path", str(path), "--text-column", "text[]").texts == ["1", "2", "3"]


def bad_table(kind: str) -> bytes:
    """Three rows, the second no UTF-8."""
    stream, column = io.BytesIO(), pa.array([b"1", "깨진 글".encode("cp949"), b"3"])
    rows = pa.table({"text": column if kind == "binary" else column.view(pa.string())})
    if kind == "arrow":
        with pa.ipc.new_stream(stream, rows.schema) as writer:
            writer.write_table(rows)
    else:
        pq.write_table(rows, stream)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.jsonl", b'{"text": "1"}\n{"text": "2", "lang": "\\ud800"}\n{"text": "3"}', 2),
        ("a.json", b'[{"text": "1"}, {"text": "\\ud800A"}, {"text": "3"}]', 2),
        ("a.json", b'[{"text": "1"}, {"text": "\xff\xfe"}, {"text": "3"}]', 2),
        ("a.json", b'[{"text": "1"}, {"body": "2"}, {"text": "3"}]', 2),
        ("a.csv", b"id,text\n1,1\n2,\xb1\xfa\xff\n3,3\n", 3),  # the header is line 1, as an editor shows it
        ("a.csv", b"id,text\n1,1\n2,2,more\n3,3\n", 3),
        ("a.tsv", b"id\ttext\n1\t1\n2\n3\t3\n", 3),
        ("a.parquet", bad_table("string"), 2),
        ("a.parquet", bad_table("binary"), 2),
        ("a.arrow", bad_table("arrow"), 2),
        ("wiki_00", b'{"text": "1"}\n{"text": 2}\n{"text": "3"}', 2),
        ("modu.json", modu_written(["1", "2", "3"]).replace(b'"2"', b"2"), 2),
        ("modu.json", modu_written(["1", "2", "3"]).replace(b'"2"', b'"\\ud800"'), 2),
        ("a.txt", b"1\n\n\xff\xff\xff\n\n3", 3),
        ("wiki.train.txt", articles(["1", "2", "3"]).replace(b"\n2", b"\n\xff\xfe"), 6),
        ("c4-ko.json.gz", gzip.compress(b'{"text": "1"}\n{"text": 2}\n{"text": "3"}\n'), 2),
        ("1.jsonl.zst", PACK[".zst"](b'{"text": "1"}\n{"text": "\xff"}\n{"text": "3"}\n'), 2),
        ("sjml.json", aihub(["1", "2", "3"]).replace(b'"2"', b"2"), 2),
        ("spoken.json", modu_spoken(["1", "2", "3"]).replace(b'"form": "2"', b'"form": 2'), 2),
        ("a.txt", "1\n\n".encode("utf-16") + b"\x00\xd8" + "\n\n3".encode("utf-16-le"), 3),
    ],
    ids=itertools.count(),  # a packed file holds the time, and workers have to collect the same names
)
def test_a_bad_record_of_any_layout_is_located_and_costs_no_other(folder, name, content, line):
    path = put(folder / name, content)
    found = read("--dataset-path", str(path), *PATHS.get(name, []))
    assert [text.rpartition("\n")[2] for text in found.texts] == ["1", "3"]
    assert [(bad["file"], bad["line"]) for bad in found.bad] == [(str(path), line)]


def test_a_bad_paragraph_of_a_cp949_file_is_located_and_costs_no_other(folder, monkeypatch):
    monkeypatch.setattr(t, "HEAD_BYTES", 40)  # by which the encoding is told
    texts = ["첫 글입니다. 학교에서 읽었다.", "둘째 글입니다. 서울에서 만났다.", "셋째 글입니다."]
    paragraphs = [text.encode("cp949") for text in texts]
    paragraphs.insert(2, b"\xb1\xff\xff")
    path = put(folder / "소설.txt", b"\r\n\r\n".join(paragraphs))
    found = read("--dataset-path", str(path))
    assert found.texts == texts
    assert [(bad["file"], bad["line"]) for bad in found.bad] == [(str(path), 5)]


@pytest.mark.parametrize("null", ["null", '""', '"  \\n "', "a row"])
def test_null_and_blank_texts_are_counted_apart_and_are_not_bad(folder, null):
    lines = f'{{"text": {null}}}\n' * 5 + '{"text": "글"}\n'
    row = null == "a row"
    path = put(folder / "a.parquet", parquet([None] * 5 + ["글"])) if row else put(folder / "a.jsonl", lines)
    found = read("--dataset-path", str(path))
    assert (found.texts, found.bad, found.counts["empty"], found.counts["records"]) == (["글"], [], 5, 6)


def prepare(cfg: t.TrainConfig) -> t.Corpus:
    cfg.logs_dir.mkdir(exist_ok=True)
    return t.prepare_corpus(cfg)


MODU_COLUMNS = r"id, metadata.title, metadata.keys\[\], document\[\].id, .*paragraph\[\].form"


@pytest.mark.parametrize(("name", "content", "columns"), [
    ("b.jsonl", b'{"body": "x", "meta": {"title": "y"}}\n' * 3, "body, meta.title"),
    ("b.parquet", parquet(["x"] * 3).replace(b"text", b"tekt"), "tekt"),
    ("b.csv", b"id,content\n1,x\n", "id, content"), ("b.json", modu_written(["x"]), MODU_COLUMNS),
])  # fmt: skip
def test_a_file_of_which_half_is_bad_is_refused_with_the_columns_that_hold_text(folder, name, content, columns):
    put(folder / "a.jsonl", json_lines([f"글 {number}" for number in range(5000)]))
    path = put(folder / name, content)
    cfg = config(folder.parent, "--dataset-path", str(folder))
    with pytest.raises(RuntimeError, match=rf"(?s){path}: .*읽지 못했습니다.*{path}:\d+: .*글이 든 열: .*{columns}"):
        prepare(cfg)
    assert str(path) in (cfg.logs_dir / "bad_lines.jsonl").read_text()


def test_all_files_that_are_refused_are_named_at_once(folder):
    put(folder / "a.jsonl", json_lines(TEXTS))
    for name in ("about.json", "meta.json"):
        put(folder / name, '{"license": "CC"}')
    cfg = config(folder.parent, "--dataset-path", str(folder))
    with pytest.raises(RuntimeError, match=r"(?s)about\.json: .*그 밖에 .*meta\.json\n.*bad_lines\.jsonl"):
        prepare(cfg)


def test_names_that_differ_in_case_are_two_files(folder):
    put(folder / "A.jsonl", '{"text": "하나"}')
    put(folder / "a.jsonl", '{"text": "둘"}')
    assert read("--dataset-path", str(folder)).texts == ["하나", "둘"]


def test_a_broken_json_file_and_one_without_end_are_named_with_what_to_do(folder, monkeypatch):
    for rest in (b'[{"text": "1"}, {"text": "2"', b'[{"text": "1"}] {"text": "2"}'):
        path = put(folder / "a.json", rest)
        with pytest.raises(RuntimeError, match=rf"{path} \(JSON이 끝나지 않았습니다; 1번째 줄까지 읽음\)"):
            read("--dataset-path", str(path))
    monkeypatch.setattr(t, "LONGEST_RECORD", 1000)
    monkeypatch.setattr(t, "HEAD_BYTES", 100)
    put(path, b'{"text":\n "' + b"x" * 3000 + b'"}')
    with pytest.raises(RuntimeError, match="--text-column"):
        read("--dataset-path", str(path))


@pytest.mark.parametrize("write", [pretty_array, modu_written, lambda texts: modu_written(texts, None)])
@pytest.mark.parametrize("head", [300, 1 << 20])
def test_json_files_that_were_put_together_lose_no_document(folder, monkeypatch, write, head):
    monkeypatch.setattr(t, "HEAD_BYTES", head)  # lines that are longer, as real ones of Modu are
    rest = json.dumps({"document": [{"paragraph": "is none"}], "keys": ["a"] * 500}).encode()
    content = write(TEXTS[:2])
    content = content if write is pretty_array else content[:-1] + b', "more": ' + rest + b"}"
    path = put(folder / "all.json", content + b"\n" + write(TEXTS[2:]))
    found = read("--dataset-path", str(path), *([] if write is pretty_array else MODU))
    assert (found.texts, found.bad) == (TEXTS, [])


def test_a_quote_that_stays_open_does_not_swallow_the_rest_of_a_table(folder):
    path = put(folder / "a.csv", 'id,text\n1,"하나"\n2,"둘\n3,셋\n4,넷\n')
    with pytest.raises(RuntimeError, match=rf"{path} \(unexpected end of data; 2번째 줄까지 읽음\)"):
        read("--dataset-path", str(path))


def test_a_carriage_return_in_a_row_is_no_end_of_the_table(folder):
    path = put(folder / "a.tsv", b"id\ttext\tlabel\n1\t1\t0\n2\tx\ry\t0\n3\t3\t0\n")
    found = read("--dataset-path", str(path))
    assert (found.texts, [bad["line"] for bad in found.bad]) == (["1", "3"], [3, 4])


def listed(folder: Path, *options: str) -> tuple[list[str], dict[str, list[str]]]:
    """What would be read of a directory and what not, by the reason."""
    files, left_out = t.corpus_files(config(folder.parent, "--dataset-path", str(folder), *options))
    names = {reason: sorted(str(path.relative_to(folder)) for path in paths) for reason, paths in left_out.items()}
    return [str(path.relative_to(folder)) for path in files], names


def test_everything_that_can_be_read_is_in_the_order_of_paths_and_the_rest_is_told(folder):
    read_too = ["a.jsonl", "b/c/d.JSON.GZ", "b/x.txt", "dev-forum.jsonl", "part-0.csv", "test_prep.jsonl"]
    reasons = {
        "숨은 파일": [".cache", "._a.jsonl"],
        "안내문": ["LICENSE", "README.md", "Readme.txt", "b/requirements-dev.txt"],
        "도구가 남긴 파일": ["config.json", "dataset_info.json", "state.json", "tokenizer.json", "vocab.json"],
        "읽지 않는 형식": ["a.pdf", "b.parquet.gz", "notes"],
        "이미 읽는 것": ["a.jsonl.gz"],
        "이 프로젝트의 출력, 로그, 캐시": ["old", "run2"],
    }
    for name in (*read_too, *(name for names in reasons.values() for name in names)):
        if name not in (".cache", "old", "run2"):
            put(folder / name, '{"text": "x"}' if name != "notes" else "not JSON")
    put(folder / ".cache" / "a.jsonl", "x")
    put(folder / "old" / "run_info.json", "{}")
    put(folder / "old" / "metrics.jsonl", "{}")
    put(folder / "run2" / "a.jsonl", "x")
    files, left_out = listed(folder, "--output-dir", str(folder / "run2"))
    assert files == read_too
    assert left_out == {reason: sorted(names) for reason, names in reasons.items()}
    put(folder / "mixed_pretraining.jsonl", '{"text": "x"}')
    assert listed(folder)[0] == ["mixed_pretraining.jsonl"]


@pytest.mark.parametrize(("names", "held_out"), [
    ("train.jsonl test.jsonl validation.jsonl.gz", "test.jsonl validation.jsonl.gz"),
    ("train-00000-of-00009.parquet test-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
    ("kor/train/0.parquet kor/test/0.parquet kor/dev/0.parquet", "kor/dev kor/test"),
    ("c4-train.00000-of-01024.json.gz c4-valid.0-of-8.json", "c4-valid.0-of-8.json"),
    ("test.jsonl dev-forum.jsonl latest.jsonl train.py", ""),
])  # fmt: skip
def test_a_held_out_split_is_left_out_only_beside_its_train(folder, names, held_out):
    names, held_out = names.split(), held_out.split()
    for name in names:
        put(folder / name, b'{"text": "x"}')
    files, left_out = listed(folder)
    assert [path for reason, paths in left_out.items() if "train" in reason for path in paths] == held_out
    assert len(files) + len(held_out) + names.count("train.py") == len(names)


def test_links_are_followed_once_by_real_path_and_a_dangling_one_is_an_error(folder):
    blob = put(folder.parent / "blobs" / "sha", b'{"text": "x"}')
    (folder / "a.jsonl").symlink_to(blob)
    (folder / "b.jsonl").symlink_to(blob)
    (folder / "loop").symlink_to(folder)
    (folder / "outside").symlink_to(blob.parent)
    assert listed(folder) == (["a.jsonl"], {"이미 읽는 것": ["b.jsonl", "loop", "outside/sha"]})
    (folder / "z.jsonl.zst").symlink_to("/nonexistent/1234")
    with pytest.raises(FileNotFoundError, match=r"링크.*z\.jsonl\.zst"):
        listed(folder)


def test_what_is_named_itself_or_by_a_pattern_is_read_whatever_it_is_called(folder):
    for name in ("train.jsonl", "test.jsonl", "README.txt", "x/.hidden.jsonl", "x/a [1].jsonl"):
        put(folder / name, b'{"text": "x"}')
    names = ["test.jsonl", "README.txt", "x/.hidden.jsonl", "x/a [1].jsonl"]
    typed = [word for name in names for word in ("--dataset-path", str(folder / name))]
    files, left_out = t.corpus_files(config(folder.parent, *typed))
    assert (files, left_out) == ([folder / name for name in names], {})
    files, _ = t.corpus_files(config(folder.parent, "--dataset-path", str(folder / "*.jsonl")))
    assert [path.name for path in files] == ["test.jsonl", "train.jsonl"]
    with pytest.raises(FileNotFoundError, match=r"데이터셋이 없습니다: .*\*\.csv"):
        t.corpus_files(config(folder.parent, "--dataset-path", str(folder / "*.csv")))
    with pytest.raises(ValueError, match="허브 데이터셋은 하나만"):
        config(folder.parent, "--dataset-path", "hf:org/name", *typed)


def test_what_was_read_is_told_by_file_also_where_it_was_prepared_before(folder, caplog):
    for number in range(12):
        lines = json_lines([f"글 {number} {line}" for line in range(20)])
        put(folder / f"{number:02}.jsonl", lines + b'{"text": null}\n')
    put(folder / "00.txt", "한글 문단입니다".encode("cp949"))
    t.logger.propagate = True
    for _ in range(2):
        caplog.clear()
        with caplog.at_level("INFO", "h100_dual"):
            cfg = config(folder.parent, "--dataset-path", str(folder))
            t.log_report(cfg, prepare(cfg))
        told = [line for line in caplog.messages if line.startswith("   • ")]
        assert "00.jsonl: 0.0 MB, 문서 20개, 빈 글 1개, 읽지 못한 줄 0개, utf-8" in told[0]
        assert "00.txt: 0.0 MB, 문서 1개, 빈 글 0개, 읽지 못한 줄 0개, cp949" in told[1]
        assert "외 3개 파일" in told[10]
