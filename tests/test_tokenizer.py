"""The tokenizer that is trained, the fast engine, and tokenizers that are brought along."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import tempfile
import unicodedata
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import KINDS, TEXTS, byte_level_bpe, sentences, surrounded, unigram, wrap
from samples import WILD_TEXTS, config, tiny_run, write_corpus
from tokenizers import Tokenizer
from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedTokenizerFast

import train_h100_dual as t


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    lines = t.write_dummy_data(folder).read_text(encoding="utf-8").splitlines()[:1000]
    t.save_tokenizer(t.train_tokenizer([json.loads(line)["text"] for line in lines] + WILD_TEXTS * 5, 768), folder)
    return t.load_tokenizer(folder)


def test_the_vocabulary_is_a_multiple_of_128_and_no_larger_than_the_corpus_supports(tokenizer):
    assert len(tokenizer) == 768
    small = t.train_tokenizer(["아주 작은 말뭉치", "a very small corpus"] * 3, 65536)
    assert len(small) % 128 == 0
    assert len(small) < 512


def own_ids(backend: Tokenizer, text: str) -> list[int]:
    """What ``tokenizers`` gives, with special tokens' names as text."""
    backend.encode_special_tokens = True
    return backend.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("run", [" ", "\u00a0", "\n", " \n", "ㅋ"])
def test_a_long_run_of_one_character_is_no_end_of_the_run(tokenizer, run):
    text = run * 300_000 + "끝"
    encode, engine = t.make_encoder(tokenizer)
    assert engine == "tiktoken"
    ((ids, lost),) = encode([text])
    assert (ids.tolist(), lost) == (own_ids(tokenizer.backend_tokenizer, text), "")


@functools.cache
def one_of(kind: str) -> tuple[Tokenizer, Callable, str]:
    """A tokenizer as ``tokenizers`` opens it, and the script's encoder for it with its name."""
    with tempfile.TemporaryDirectory() as folder:
        wrap(KINDS[kind]()).save_pretrained(folder)
        return Tokenizer.from_file(f"{folder}/tokenizer.json"), *t.make_encoder(t.load_tokenizer(folder))


PIECES = ["<|endoftext|>", "<unk>", "<think>", "<0xEA>", "▁", "한국어", "학생이", " 책을", "12345", "isn't", "'LL"]
PIECES += ["\r\n", " ", "  ", "\t", "\u00a0", "ㅋㅋㅋㅋ"]
PIECES += ["👩‍👩‍👧‍👦", "e\u0301\u0323", "ſ", "hello", " world", "\U0001f1f0\U0001f1f7"]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(parts=st.lists(st.sampled_from(PIECES) | st.text(max_size=8), max_size=12))
def test_any_text_gets_the_ids_of_the_tokenizer_itself(kind, parts):
    own, encode, engine = one_of(kind)
    text = unicodedata.normalize("NFC", "".join(parts))
    assert engine == ("tiktoken" if kind in ("our own", "byte-level", "merges lacking") else "tokenizers")
    ((ids, lost),) = encode([text])
    assert ids.tolist() == own_ids(own, text)
    assert kind == "unigram" or not lost


CHANGES = {
    "dropout": lambda spec: spec["model"].update(dropout=0.1),
    "normalizer": lambda spec: spec.update(normalizer={"type": "Lowercase"}),
    "behavior": lambda spec: spec["pre_tokenizer"]["pretokenizers"][0].update(behavior="MergedWithNext"),
    "pattern": lambda spec: spec["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": r"\w+|\W+"}),
    "prefix space": lambda spec: spec["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
    "order of ids": lambda spec: spec["model"]["vocab"].update({"".join(spec["model"]["merges"][0]): 70_000}),
    "a byte lacking": lambda spec: spec["model"]["vocab"].pop("ÿ"),  # 0xFF
    "no merge": lambda spec: spec["model"].update(ignore_merges=True, merges=spec["model"]["merges"][:-1]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_fast_engine_is_not_used_where_it_may_give_other_ids(change):
    spec = json.loads(byte_level_bpe(()).to_str())
    assert t.tiktoken_ranks(spec) is not None
    change(spec)
    assert t.tiktoken_ranks(spec) is None


def test_an_older_tiktoken_or_none_leaves_it_to_the_tokenizers_own_engine(tokenizer, monkeypatch):
    def lacking(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    for version in (lambda name: "0.9.0", lacking):
        monkeypatch.setattr("importlib.metadata.version", version)
        assert t.make_encoder(tokenizer)[1] == "tokenizers"


def prepare(folder, texts: list[str], *more: str) -> t.Corpus:
    """A corpus of these texts, with all of them in training."""
    path = write_corpus(folder / "corpus.jsonl", texts)
    cfg = config(folder, "--dataset-path", str(path), "--validation-split", "0", *more)
    cfg.logs_dir.mkdir(exist_ok=True)
    return t.prepare_corpus(cfg)


def stream_of(corpus: t.Corpus) -> list[int]:
    return corpus.domains[0].read(0, len(corpus.domains[0])).tolist()


def test_truncation_and_padding_of_a_saved_tokenizer_are_switched_off_and_said(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(t.logger, "propagate", True)
    tokenizer, texts = surrounded("$A </s>"), [*TEXTS[:100], "긴 글 " * 200]
    ids = [own_ids(tokenizer.backend_tokenizer, unicodedata.normalize("NFC", text)) for text in texts]
    tokenizer.save_pretrained(tmp_path / "mine")
    path = tmp_path / "mine" / "tokenizer.json"
    saved = Tokenizer.from_file(str(path))
    saved.enable_truncation(8)
    saved.enable_padding(length=8)
    saved.save(str(path))
    with caplog.at_level("INFO", "h100_dual"):
        corpus = prepare(tmp_path, texts, "--tokenizer", str(tmp_path / "mine"))
    end = tokenizer.eos_token_id
    assert stream_of(corpus) == [end, *(number for document in ids for number in (*document, end))]
    assert caplog.text.count("자르기(truncation)와 채우기(padding)를 끄고") == 1
    assert AutoTokenizer.from_pretrained(corpus.path / "tokenizer")(texts[-1]).input_ids[:-1] == ids[-1]


@pytest.mark.parametrize("highest", [900, 70_001])
def test_the_largest_id_decides_the_vocabulary_and_the_type_of_the_stream(tmp_path, highest):
    spec = json.loads(byte_level_bpe().to_str())
    word = max(spec["model"]["vocab"], key=len)
    spec["model"]["vocab"][word] = highest
    tokenizer = wrap(Tokenizer.from_str(json.dumps(spec)))
    tokenizer.save_pretrained(tmp_path / "mine")
    assert t.tokenizer_size(tmp_path / "mine") == highest + 1
    corpus = prepare(tmp_path, TEXTS, "--tokenizer", str(tmp_path / "mine"))
    assert corpus.report["vocab_size"] == highest + 1
    assert corpus.domains[0].tokens.max() == highest
    model = t.build_model(config(tmp_path, "--tokenizer", str(tmp_path / "mine")), corpus.tokenizer)
    assert len(model.get_input_embeddings().weight) == -(-(highest + 1) // 128) * 128


@pytest.mark.parametrize(("template", "start", "opening"), [
    ("$A", ["</s>"], ["</s>"]), ("$A </s>", ["</s>"], ["</s>"]), ("</s> $A", ["</s>"], ["</s>"]),
    ("<s> $A", ["<s>"], ["</s>", "<s>"]), ("<s> $A </s>", ["<s>"], ["</s>", "<s>"]),
])  # fmt: skip
def test_a_document_begins_with_what_the_tokenizer_puts_before_a_text_and_ends_with_eos(
    tmp_path, template, start, opening
):
    tokenizer = surrounded(template)
    tokenizer.save_pretrained(tmp_path / "mine")
    corpus = prepare(tmp_path, TEXTS[:20], "--tokenizer", str(tmp_path / "mine"))
    opened = corpus.tokenizer
    assert opened.convert_ids_to_tokens(t.document_start(opened)) == start
    assert (opened.bos_token, opened.eos_token) == (start[-1], "</s>")
    ids = [own_ids(tokenizer.backend_tokenizer, text) for text in TEXTS[:20]]
    before = tokenizer.convert_tokens_to_ids(opening)
    stream = [number for document in ids for number in (*before, *document)]
    assert stream_of(corpus) == [*stream, tokenizer.eos_token_id]
    assert corpus.report["tokens"] == sum(map(len, ids))


@pytest.fixture
def english(tmp_path) -> t.Path:
    """A tokenizer that knows a few English words and nothing else, as T5's knows no Korean."""
    wrap(unigram(["the model read a small book"] * 50), unk_token="<unk>").save_pretrained(tmp_path / "english")
    return tmp_path / "english"


# The third has too little Korean to count for the whole, but its own share of the bytes is above 5 %.
@pytest.mark.parametrize(("korean", "told", "refused"), [(0, False, False), (2, True, False), (4, True, True)])
def test_text_that_the_tokenizer_can_not_write_is_told_and_in_train_refused(
    tmp_path, english, caplog, monkeypatch, korean, told, refused
):
    monkeypatch.setattr(t.logger, "propagate", True)
    texts = [*["오늘 학생이 the book"] * korean, *["the model read a book"] * 50]
    corpus = prepare(tmp_path, texts, "--tokenizer", str(english))
    report = corpus.report
    assert (report["lost"], report["characters"]) == (5 * korean, 12 * korean + 17 * 50)
    assert report["by_language"]["en"]["lost"] == 0
    cfg = config(tmp_path)
    if refused:
        with pytest.raises(RuntimeError, match=r"쓰지 못하는 글자가 최대 .*--tokenizer"):
            t.log_report(cfg, corpus)
    else:
        t.log_report(cfg, corpus)
    caplog.clear()
    caplog.set_level("INFO", "h100_dual")
    t.log_report(t.replace(cfg, mode="test"), corpus)
    assert ("쓰지 못한 글자" in caplog.text) is bool(korean)
    assert ("쓰지 못하는 글자가 최대" in caplog.text) is told


def test_text_that_was_not_encoded_gets_no_bits_per_byte(tmp_path, english, caplog, monkeypatch):
    monkeypatch.setattr(t.logger, "propagate", True)
    path = write_corpus(tmp_path / "data.jsonl", ["오늘 학생이", *["the model read a book"] * 50])
    tokenizer = t.load_tokenizer(english)
    cfg = config(tmp_path, "--dataset-path", str(path))
    lines = t.evaluation_table(t.score_corpus(t.build_model(cfg, tokenizer).eval(), tokenizer, cfg))
    assert {line.split()[0]: line.split()[-1] == "-" for line in lines[1:]} == {"전체": False, "ko": True, "en": False}
    assert "ko: 글자의 100.0%를 토크나이저가 쓰지 못해" in caplog.text


MODELS = "llama qwen2 qwen3 gemma3_text mistral gpt2 gpt_neox olmo2 exaone4 mixtral"


@pytest.mark.parametrize("kind", MODELS.split())
def test_a_checkpoint_gives_the_ids_of_the_training_to_all_who_open_it(tmp_path, kind):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    CONFIG_MAPPING[kind](**sizes, num_key_value_heads=2, head_dim=16).save_pretrained(tmp_path / "model")
    texts = sentences(1000)
    corpus = write_corpus(tmp_path / "corpus.jsonl", texts)
    more = ("--dataset-path", str(corpus), "--model-config", str(tmp_path / "model"), "--validation-split", "0")
    run = tiny_run(tmp_path, *more, "--vocab-size", "640")
    t.save_initial_model(run)
    opened = AutoTokenizer.from_pretrained(run.cfg.output_dir / "initial_model")
    assert run.corpus.report["engine"] == "tiktoken"
    end = opened.eos_token_id
    assert stream_of(run.corpus) == [end, *(number for text in texts for number in (*opened(text).input_ids, end))]


def test_a_tokenizer_that_a_model_type_would_rebuild_is_refused_before_anything_is_tokenised(tmp_path, tokenizer):
    CONFIG_MAPPING["qwen2"]().save_pretrained(tmp_path / "model")
    t.save_tokenizer(tokenizer, tmp_path / "mine")
    more = ("--model-config", str(tmp_path / "model"), "--tokenizer", str(tmp_path / "mine"))
    with pytest.raises(RuntimeError, match=r"'qwen2' 체크포인트에서는(.|\n)*--tokenizer 를 빼고"):
        prepare(tmp_path, ["전화번호 01012345678"] * 10, *more)
    wrap(byte_level_bpe()).save_pretrained(tmp_path / "mine")  # which splits as Qwen2's does
    assert prepare(tmp_path, TEXTS, *more).report["documents"] == len(TEXTS)


def test_a_tokenizer_that_is_not_there_is_named_and_one_without_an_end_of_text_refused(tmp_path):
    with pytest.raises(RuntimeError, match="없는것"):
        t.load_tokenizer(tmp_path / "없는것")
    PreTrainedTokenizerFast(tokenizer_object=byte_level_bpe()).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="eos_token"):
        t.load_tokenizer(tmp_path)
