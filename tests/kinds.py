"""Tokenizers as other projects make them: byte-level BPE, Unigram, SentencePiece's BPE, and what surrounds them."""

from __future__ import annotations

import json
import random
from typing import Any

from samples import WILD_TEXTS
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import train_h100_dual as t

WORDS = [
    "오늘",
    "서울에서",
    "학생이",
    "책을",
    "아침",
    "바다",
    "the",
    "model",
    "data",
    "world",
    "2024",
    "12,345",
    "isn't",
]


def sentences(count: int) -> list[str]:
    """Texts with Hangul, digits, emoji and line breaks."""
    draw = random.Random(0)
    ends = [".", "?!", " 👩‍👩‍👧‍👦", "\n\n- ", "\r\n", "  ㅋㅋㅋ", "10000원"]
    return ["".join(f"{draw.choice(WORDS)}{draw.choice([' ', ' ', *ends])}" for _ in range(12)) for _ in range(count)]


TEXTS = [*sentences(300), *WILD_TEXTS * 5]


def byte_level_bpe(special: tuple[str, ...] = ("<|endoftext|>",)) -> Tokenizer:
    """As Qwen's: merges of bytes within what a pattern splits off."""
    backend = Tokenizer(models.BPE())
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(t.FAST_PATTERNS[1]), "isolated")
    backend.normalizer, backend.decoder = normalizers.NFC(), decoders.ByteLevel()
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    options = {"initial_alphabet": to_bytes.alphabet(), "special_tokens": list(special), "show_progress": False}
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=600, **options))
    return backend


def without_some_merges() -> Tokenizer:
    """Tokens stay that nothing makes any more, also those that only they would have made."""
    spec = json.loads(byte_level_bpe().to_str())
    spec["model"]["merges"] = [pair for place, pair in enumerate(spec["model"]["merges"]) if place % 9]
    return Tokenizer.from_str(json.dumps(spec))


def with_added_tokens() -> Tokenizer:
    """Names that are no special tokens: they are one token wherever they stand in a text."""
    backend = byte_level_bpe()
    backend.add_tokens([AddedToken(name, special=False, normalized=False) for name in ("<think>", "</think>")])
    return backend


def unigram(texts: list[str] = TEXTS) -> Tokenizer:
    """As T5's or KoBERT's: what it doesn't know is ``<unk>``."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    options = {"special_tokens": ["<|endoftext|>", "<unk>"], "unk_token": "<unk>", "show_progress": False}
    backend.train_from_iterator(texts, trainers.UnigramTrainer(vocab_size=400, **options))
    return backend


def sentencepiece_bpe() -> Tokenizer:
    """As Llama 2's: characters, and bytes for those that it doesn't know."""
    backend = Tokenizer(models.BPE())
    blanks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(blanks)
    names = ["<|endoftext|>", "<unk>"]
    options = {"special_tokens": [*names, *(f"<0x{byte:02X}>" for byte in range(256))], "show_progress": False}
    backend.train_from_iterator(TEXTS[:50], trainers.BpeTrainer(vocab_size=600, **options))
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = spec["added_tokens"][: len(names)]
    spec["model"] |= {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
    return Tokenizer.from_str(json.dumps(spec))


KINDS = {
    "our own": lambda: t.train_tokenizer(TEXTS, 640).backend_tokenizer,
    "byte-level": byte_level_bpe,
    "merges lacking": without_some_merges,
    "added tokens": with_added_tokens,
    "unigram": unigram,
    "byte fallback": sentencepiece_bpe,
}


def wrap(backend: Tokenizer, **names: Any) -> PreTrainedTokenizerFast:
    """As transformers saves it."""
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{"eos_token": "<|endoftext|>", **names})


def surrounded(template: str) -> PreTrainedTokenizerFast:
    """One with ``<s>`` and ``</s>``, which puts around a text what ``template`` says: "<s> $A", for instance."""
    backend = byte_level_bpe(("<unk>", "<s>", "</s>"))
    special = [(name, backend.token_to_id(name)) for name in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return wrap(backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
