"""The tokenizer that is trained, the fast engine, and tokenizers that are brought along."""

from __future__ import annotations

import json
import random
import unicodedata

import numpy as np
import pytest
from samples import WILD_TEXTS, config, write_corpus
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import train_h100_dual as t


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    lines = t.write_dummy_data(folder).read_text(encoding="utf-8").splitlines()[:1000]
    return t.train_tokenizer([json.loads(line)["text"] for line in lines] + WILD_TEXTS * 5, 768)


def test_the_vocabulary_is_a_multiple_of_128_and_no_larger_than_the_corpus_supports(tokenizer):
    assert len(tokenizer) == 768
    small = t.train_tokenizer(["아주 작은 말뭉치", "a very small corpus"] * 3, 65536)
    assert len(small) % 128 == 0
    assert len(small) < 512


@pytest.mark.parametrize("text", WILD_TEXTS)
def test_text_comes_back_up_to_nfc_also_after_saving(tokenizer, tmp_path, text):
    tokenizer.save_pretrained(tmp_path)
    opened = AutoTokenizer.from_pretrained(tmp_path)
    assert type(opened).__name__ in ("PreTrainedTokenizerFast", "TokenizersBackend")
    for source in (text, unicodedata.normalize("NFD", text)):
        ids = opened(source, split_special_tokens=True).input_ids
        assert opened.decode(ids) == unicodedata.normalize("NFC", text)


def ids_of(tokenizer, encoded: bytes) -> list[int]:
    return np.frombuffer(encoded, np.min_scalar_type(len(tokenizer) - 1)).tolist()


def random_text(draw: random.Random) -> str:
    """Some characters from anywhere in Unicode, half of them from ranges that matter here."""
    ranges = [(0, 0x7F), (0xAC00, 0xD7A3), (0x1100, 0x11FF), (0x3130, 0x318F), (0x1F300, 0x1FAFF), (0x2000, 0x206F)]
    characters = []
    for _ in range(draw.randint(0, 60)):
        low, high = draw.choice([*ranges, *[(0, 0xD7FF), (0xE000, 0x10FFFF)] * 3])
        characters.append(chr(draw.randint(low, high)) * draw.choice((1, 1, 1, 4)))
    return "".join(characters)


def test_the_fast_engine_gives_the_same_ids_on_10000_random_strings(tokenizer):
    draw = random.Random(0)
    texts = [*WILD_TEXTS, "한글 각 \U0001f1f0\U0001f1f7 'LL 12345\r\n\n x", *(random_text(draw) for _ in range(10_000))]
    texts = [unicodedata.normalize("NFC", text) for text in texts]
    encode, engine = t.make_encoder(tokenizer, WILD_TEXTS)
    assert engine == "tiktoken"
    ordinary = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    pairs = zip(texts, encode(texts), ordinary, strict=True)
    different = [text for text, fast, slow in pairs if ids_of(tokenizer, fast) != slow.ids]
    assert different == []


@pytest.mark.parametrize("blank", [" ", "\u00a0", "\n", " \n"])
def test_a_text_of_blanks_alone_is_no_end_of_the_run(tokenizer, blank):
    text = blank * 300_000 + "끝"
    encode, engine = t.make_encoder(tokenizer, WILD_TEXTS)
    assert engine == "tiktoken"
    assert (
        ids_of(tokenizer, encode([text])[0]) == tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    )


def other_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that is no byte-level BPE."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.train_from_iterator(
        ["한국어 문서 English document"], trainers.WordLevelTrainer(special_tokens=["</s>", "<unk>"])
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def test_any_other_tokenizer_takes_the_ordinary_path():
    tokenizer = other_tokenizer()
    encode, engine = t.make_encoder(tokenizer, ["한국어"])
    assert engine == "tokenizers"
    assert ids_of(tokenizer, encode(["한국어 문서"])[0]) == tokenizer("한국어 문서").input_ids


def test_an_engine_that_disagrees_is_not_used(tokenizer, monkeypatch, caplog):
    class Wrong:
        def __init__(self, name: str, **more):
            pass

        def encode_to_numpy(self, text: str, disallowed_special: tuple) -> np.ndarray:
            return np.array([1, 2, 3], np.uint32)

    monkeypatch.setattr("tiktoken.Encoding", Wrong)
    assert t.make_encoder(tokenizer, ["한국어"])[1] == "tokenizers"


def test_a_tokenizer_can_be_brought_along(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "mine")
    path = write_corpus(tmp_path / "corpus.jsonl", [f"문서 {index}" for index in range(100)])
    cfg = config(tmp_path, "--dataset-path", str(path), "--tokenizer", str(tmp_path / "mine"))
    cfg.logs_dir.mkdir()
    corpus = t.prepare_corpus(cfg)
    assert t.tokenizer_fingerprint(corpus.tokenizer) == t.tokenizer_fingerprint(tokenizer)


def test_a_tokenizer_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RuntimeError, match="없는것"):
        t.load_tokenizer(tmp_path / "없는것")


def test_a_tokenizer_without_an_end_of_text_token_is_refused(tmp_path):
    tokenizer = other_tokenizer()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="eos_token"):
        t.load_tokenizer(tmp_path)
