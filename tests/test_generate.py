"""A checkpoint in use: --generate and --evaluate, which start no run."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import list_tree
from hypothesis import given
from hypothesis import strategies as st
from kinds import surrounded
from samples import WILD_TEXTS, Bomb, config, rolling_nats, write_corpus
from test_layouts import PACK, parquet

import train_h100_dual as t


@pytest.fixture(scope="module")
def checkpoint(trained) -> Path:
    return trained[2] / "checkpoint-4"


@pytest.fixture(scope="module")
def opened(checkpoint):
    torch.set_num_threads(1)
    return t.load_model(checkpoint).eval(), t.load_tokenizer(checkpoint)


def use(*options: str) -> t.TrainConfig:
    """The options of a command as ``use_checkpoint`` completes them on a CPU."""
    cfg = t.parse_args(list(options))
    return t.replace(t.resolve_config(cfg, "cpu")[0], max_seq_length=cfg.max_seq_length)


def greedy(model, ids: list[int], count: int) -> list[int]:
    """The likeliest tokens one after another, each from a whole forward pass."""
    for _ in range(count):
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids


def test_at_temperature_zero_the_likeliest_tokens_follow_the_start_of_a_document(opened):
    model, tokenizer = opened
    prompt = "오늘 학생이 서울에서"
    cfg = use("--generate", "x", "--prompt", prompt, "--temperature", "0", "--max-new-tokens", "12")
    expected = greedy(model, [tokenizer.eos_token_id, *tokenizer(prompt).input_ids], 12)
    text = t.generate_text(model, tokenizer, cfg)
    assert text == tokenizer.decode(expected[-12:], skip_special_tokens=True)
    assert t.generate_text(model, tokenizer, t.replace(cfg, seed=1, top_p=0.5)) == text


@pytest.mark.parametrize("template", ["$A </s>", "<s> $A", "<s> $A </s>"])
def test_a_prompt_goes_on_whatever_the_tokenizer_puts_around_a_text(tmp_path, template):
    surrounded(template).save_pretrained(tmp_path)
    tokenizer, prompt = t.load_tokenizer(tmp_path), "오늘 서울에서"
    model = t.build_model(config(tmp_path, "--tokenizer", str(tmp_path)), tokenizer).eval()
    ids = tokenizer.backend_tokenizer.encode(prompt, add_special_tokens=False).ids
    start = tokenizer.convert_tokens_to_ids("<s>" if template.startswith("<s>") else "</s>")
    expected = greedy(model, [start, *ids], 12)[-12:]
    cfg = use("--generate", "x", "--prompt", prompt, "--temperature", "0", "--max-new-tokens", "12")
    assert t.generate_text(model, tokenizer, cfg) == tokenizer.decode(expected, skip_special_tokens=True)


def test_a_seed_gives_its_text_and_another_one_another(opened):
    cfg = use("--generate", "x", "--prompt", "오늘", "--max-new-tokens", "20", "--temperature", "1.5")
    before, ticks = torch.get_rng_state(), []
    streamer = SimpleNamespace(put=ticks.append, end=lambda: None)
    texts = [t.generate_text(*opened, t.replace(cfg, seed=seed), streamer) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert len(ticks) >= 3 * 20, "the timer for hangs hears of every token"
    assert torch.equal(torch.get_rng_state(), before), "a run's own draws stay as they were"
    # Of so few tokens only the likeliest remains.
    narrow = [t.generate_text(*opened, t.replace(cfg, seed=seed, top_p=0.01, temperature=0.5)) for seed in (1, 2)]
    assert narrow[0] == narrow[1]


def test_what_does_not_fit_into_the_models_context_is_said(opened, caplog):
    assert t.context_length(opened[0]) == 32
    cfg = use("--generate", "x", "--prompt", "abc", "--temperature", "0")
    with caplog.at_level("WARNING", "h100_dual"):
        text = t.generate_text(*opened, cfg)
    assert "최대 길이가 32 토큰이라" in caplog.text
    assert len(opened[1]("abc" + text).input_ids) <= 31
    with pytest.raises(ValueError, match=r"--prompt: \d+ 토큰은 모델의 최대 길이\(32 토큰\)"):
        t.generate_text(*opened, t.replace(cfg, prompt="abc " * 100))


def reference(model, tokenizer, documents: list[dict[str, str]], length: int) -> dict[str, list[float]]:
    """Documents, tokens, bytes and nats by language: one document at a time, after the start token."""
    found: dict[str, list[float]] = {}
    for document in documents:
        ids = tokenizer(document["text"], split_special_tokens=True, add_special_tokens=False).input_ids
        nats = rolling_nats(model, [tokenizer.eos_token_id, *ids], length)
        row = found.setdefault(document["lang"], [0, 0, 0, 0.0])
        for index, value in enumerate((1, len(ids), len(document["text"].encode()), nats)):
            row[index] += value
    return found


@pytest.mark.parametrize("length", [None, 9])
def test_bits_per_byte_equal_a_hand_written_reference(opened, tmp_path, length):
    model, tokenizer = opened
    texts = ["가", "a", *WILD_TEXTS[:4], WILD_TEXTS[5], "오늘 학생이 서울에서 책을 읽었다. " * 9, "x" * 33]
    documents = [{"text": text, "lang": ("ko", "en", "ja")[index % 3]} for index, text in enumerate(texts)]
    path = write_corpus(tmp_path / "data.jsonl", documents)
    typed = [] if length is None else ["--max-seq-length", str(length)]
    cfg = use("--evaluate", "x", "--dataset-path", str(path), "--batch-size", "3", *typed)
    found, expected = t.score_corpus(model, tokenizer, cfg), reference(model, tokenizer, documents, length or 32)
    assert found.keys() == expected.keys()
    for language, row in expected.items():
        assert found[language][:3].tolist() == row[:3]
        bits = [nats / math.log(2) / row[2] for nats in (found[language][3], row[3])]
        assert bits[0] == pytest.approx(bits[1], abs=1e-6), language


def test_every_kind_of_file_gives_the_same_figures(opened, tmp_path):
    texts = ["오늘 학생이 서울에서 책을 읽었다.", "Today the student read a book.", "어제 기자가 편지를 보냈다."]
    plain = write_corpus(tmp_path / "data.jsonl", texts).read_bytes()
    files = {"data.jsonl": plain, "data.parquet": parquet(texts), "data.txt": "\n\n".join(texts).encode()}
    files |= {f"packed.jsonl{suffix}": PACK[suffix](plain) for suffix in (".gz", ".zst")}
    figures = []
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        found = t.score_corpus(*opened, use("--evaluate", "x", "--dataset-path", str(tmp_path / name)))
        figures.append({language: row.tolist() for language, row in found.items()})
    assert set(figures[0]) == {"ko", "en"}
    assert all(found == figures[0] for found in figures)


@given(count=st.integers(1, 200), length=st.integers(1, 40), start=st.integers(1, 3))
def test_each_token_is_scored_once_with_as_much_before_it_as_fits(count, length, start):
    tokens = np.arange(start + count)
    scored = []
    for row, last in t.rolling_windows(tokens, length, start):
        assert len(row) <= length + 1
        assert np.array_equal(row, np.arange(row[0], row[-1] + 1))
        assert len(row) == length + 1 or row[0] == 0
        scored += row[-last:].tolist()
    assert scored == tokens[start:].tolist()


def test_lines_that_cannot_be_read_are_counted_and_too_many_refused(opened, tmp_path, caplog):
    good = [json.dumps({"text": "오늘"}, ensure_ascii=False)] * 120
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join([*good, "{"]))
    cfg = use("--evaluate", "x", "--dataset-path", str(path))
    with caplog.at_level("WARNING", "h100_dual"):
        assert t.score_corpus(*opened, cfg)["ko"][0] == 120
    assert f"읽지 못한 줄 1개를 건너뛰었습니다 (처음: {path}:121)" in caplog.text
    path.write_text("\n".join([*good, "{", "{"]))
    with pytest.raises(RuntimeError, match=r"122줄 가운데 2줄을 읽지 못했습니다(.|\n)*JSON 객체가 아닙니다"):
        t.score_corpus(*opened, cfg)
    path.write_text('{"text": ""}\n')
    with pytest.raises(RuntimeError, match="문서가 하나도 없습니다"):
        t.score_corpus(*opened, cfg)
    with pytest.raises(ValueError, match="--max-seq-length 64: 이 모델의 최대 길이는 32 토큰"):
        t.score_corpus(*opened, t.replace(cfg, max_seq_length=64))


def test_the_table_is_aligned_and_its_figures_are_those_of_the_sums():
    totals = {"ko": np.array([2, 1000, 4000, 3000.0, 99, 0]), "en": np.array([1, 100, 500, 100.0, 99, 4])}
    lines = t.evaluation_table(totals)
    assert len({t.display_width(line) for line in lines}) == 1
    assert lines[1].split() == ["전체", "3", "1,100", "4,500", "2.8182", "16.75", "0.9939"]
    assert lines[2].split() == ["ko", "2", "1,000", "4,000", "3.0000", "20.09", "1.0820"]
    assert lines[3].split()[4:] == ["1.0000", f"{math.e:.2f}", "0.2885"]


def test_the_launcher_generates_in_the_foreground_and_writes_nothing(place, checkpoint):
    place.environment |= {"LC_ALL": "C"}
    before = list_tree(checkpoint.parent)
    typed = ["--generate", str(checkpoint / "pytorch_model.bin"), "--prompt", "오늘 학생이"]
    answer = place.run(*typed, "--max-new-tokens", "5", "--seed", "3")
    assert answer.code == 0, answer.text
    assert answer.out.startswith("오늘 학생이")
    assert answer.out.count("\n") == 1
    assert answer.err == ""
    assert list_tree(place.folder) == {}
    assert list_tree(checkpoint.parent) == before


def test_the_launcher_evaluates_in_the_foreground_and_writes_nothing(place, checkpoint, tmp_path):
    path = write_corpus(tmp_path / "data.jsonl", [{"text": "오늘 학생이"}, {"text": "Today the student"}])
    answer = place.run("--evaluate", str(checkpoint), "--dataset-path", str(path))
    assert answer.code == 0, answer.text
    assert answer.out.startswith("📈 평가: ")
    assert "구간 32 토큰, CPU fp32" in answer.out
    assert [line.split()[:2] for line in answer.out.splitlines()[2:]] == [["전체", "2"], ["ko", "1"], ["en", "1"]]
    assert list_tree(place.folder) == {}


def test_what_cannot_be_used_is_refused_in_one_line_before_anything_is_installed(bare_place, checkpoint, tmp_path):
    (tmp_path / "folder").mkdir()
    good = ("--generate", str(checkpoint))
    for arguments, code, text in (
        ([*good], 2, '--generate: 이어 쓸 글이 없습니다. 예: --prompt "오늘 아침"'),
        ([*good, "--prompt"], 2, "--prompt: 값이 없습니다"),
        ([*good, "--prompt", "x", "--train"], 2, "함께 쓸 수 없는 옵션입니다: --generate, --train"),
        ([*good, "--prompt", "x", "--top-p", "2"], 2, "--top-p: '2' 값은 범위를 벗어났습니다"),
        (["--generate", "nothing", "--prompt", "x"], 1, "체크포인트가 없습니다: .*nothing"),
        (["--generate", str(tmp_path / "folder"), "--prompt", "x"], 1, r"체크포인트가 없습니다: .*config\.json"),
        (["--generate", str(checkpoint.parent), "--prompt", "x"], 1, "예: .*checkpoint-4"),
        (["--evaluate", str(checkpoint)], 2, "--evaluate: 평가할 데이터가 없습니다"),
        (["--evaluate", str(checkpoint), "--dataset-path", "nothing"], 1, "데이터셋이 없습니다"),
    ):
        answer = bare_place.run(*arguments)
        assert answer.code == code, answer.text
        (line,) = answer.err.splitlines()
        assert line.startswith("❌ ")
        assert t.re.search(text, line), line
        assert answer.out == ""
    assert list_tree(bare_place.folder) == {}


def test_a_dry_run_shows_the_command_alone(place, checkpoint):
    answer = place.run("--dry-run", "--generate", str(checkpoint), "--prompt", "오늘 학생이")
    assert answer.code == 0
    assert "train_h100_dual.py --generate" in answer.out.splitlines()[-1]
    assert "torch.distributed" not in answer.out


def test_nothing_of_a_checkpoint_is_executed(checkpoint, tmp_path):
    mark = tmp_path / "was here"
    folder = tmp_path / "checkpoint-4"
    shutil.copytree(checkpoint, folder)
    code = f"import os\nos.mkdir({str(mark)!r})\n"
    (folder / "custom_generate").mkdir()
    for name in ("modeling_own.py", "tokenization_own.py", "custom_generate/generate.py", "__init__.py"):
        (folder / name).write_text(code)
    model, tokenizer = t.load_model(folder), t.load_tokenizer(folder)
    t.generate_text(model, tokenizer, use("--generate", "x", "--prompt", "a", "--max-new-tokens", "2"))
    config = json.loads((folder / "config.json").read_text())
    maps = {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": maps}))
    with pytest.raises(RuntimeError, match="모델을 열 수 없습니다"):
        t.load_model(folder)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({"weight": torch.zeros(2), "more": Bomb(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(RuntimeError, match="모델을 열 수 없습니다"):
        t.load_model(folder)
    assert not mark.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)  # the bomb is a real one
    assert mark.exists()


def test_weights_that_are_torn_or_lacking_are_refused_and_not_made_up(checkpoint, tmp_path):
    folder = tmp_path / "checkpoint-4"
    shutil.copytree(checkpoint, folder)
    path = folder / "pytorch_model.bin"
    weights = torch.load(path, weights_only=True)
    torch.save({f"_orig_mod.{name}": value for name, value in weights.items()}, path)
    with pytest.raises(RuntimeError, match=r"모델의 가중치 \d+개가 없습니다: .*checkpoint-4 \(예: "):
        t.load_model(folder)
    for content in (path.read_bytes()[:1000], b"", b"PK\x03\x04", b"[]", b"version https://git-lfs.github.com/spec/v1"):
        path.write_bytes(content)
        with pytest.raises(RuntimeError, match="모델을 열 수 없습니다"):
            t.load_model(folder)
    path.unlink()
    with pytest.raises(RuntimeError, match="모델을 열 수 없습니다"):
        t.load_model(folder)
