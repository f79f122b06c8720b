"""Going on from models that were made with transformers: Llama, Qwen3, Gemma."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from samples import tiny_run
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    Qwen3Config,
)

import train_h100_dual as t

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "vocab_size": 640, "max_position_embeddings": 64, "head_dim": 16}
# What each kind does beside plain causal attention, turned up so far that leaving it out shows at 32 tokens.
KINDS = {
    "llama": LlamaConfig(**SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 100.0}),
    "qwen3": Qwen3Config(**SHAPE, tie_word_embeddings=False),
    "qwen3-sliding": Qwen3Config(**SHAPE, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "gemma": GemmaConfig(**SHAPE),
    "gemma2": Gemma2Config(
        **SHAPE, sliding_window=5, attn_logit_softcapping=0.5, final_logit_softcapping=0.5, query_pre_attn_scalar=16
    ),
    "gemma3": Gemma3TextConfig(**SHAPE, sliding_window=5, layer_types=["sliding_attention", "full_attention"]),
}


@pytest.fixture(scope="module")
def tokenizer():
    """One of another project: with a token for the beginning that isn't the one for the end."""
    texts = ["오늘 학생이 서울에서 책을 읽었다. Today the student read a book in Seoul."] * 50
    tokenizer = t.train_tokenizer(texts, 512)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    return tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_transformers_trains_saves_and_reopens(tmp_path, tokenizer, kind):
    torch.manual_seed(0)
    start = tmp_path / "start"
    made = AutoModelForCausalLM.from_config(KINDS[kind], attn_implementation="eager")  # all of it by the book
    with torch.no_grad():
        for weight in made.parameters():  # so large that each part of the attention matters
            weight.add_(torch.randn_like(weight), alpha=0.1)
    made.save_pretrained(start)
    tokenizer.save_pretrained(start)

    more = ("--init-from", str(start), "--max-steps", "8", "--learning-rate", "3e-3", "--save-steps", "8")
    run, state = tiny_run(tmp_path, *more), t.TrainState()
    rows = t.read_rows(run.corpus, np.zeros(8, int), np.arange(8), 32)
    with torch.no_grad():
        expected = F.cross_entropy(made.eval()(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())
        assert run.loss_module(rows).item() == pytest.approx(expected.item(), abs=1e-5)  # every part of it is kept

    assert (run.backend in ("sdpa", "eager")) == (kind in ("qwen3-sliding", "gemma2", "gemma3"))
    before = t.evaluate(run)["val_loss"]
    assert t.train(run, state) == "finished"
    t.report_save(run, is_last=True)
    assert state.evaluation["val_loss"] < before - 0.1

    checkpoint = run.cfg.output_dir / "checkpoint-8"
    assert json.loads((checkpoint / "config.json").read_text())["model_type"] == made.config.model_type
    model, info = AutoModelForCausalLM.from_pretrained(
        checkpoint, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ours = run.model.state_dict()
    assert all(torch.equal(ours[name], weight) for name, weight in model.state_dict().items())
    with torch.no_grad():
        logits = [item.eval()(rows[:, :-1]).logits for item in (run.model, model, t.load_model(checkpoint))]
    assert torch.allclose(logits[0], logits[1], atol=1e-4)
    assert torch.allclose(logits[2], logits[1], atol=1e-4)
    again = AutoTokenizer.from_pretrained(checkpoint)
    assert again.bos_token == again.eos_token  # with which a document began in training: it puts nothing before a text
    for saved in (model.config, model.generation_config):
        assert saved.bos_token_id == saved.eos_token_id == tokenizer.eos_token_id
    if kind == "llama":  # transformers 4 knows it under this name only
        assert json.loads((checkpoint / "config.json").read_text())["rope_theta"] == 100.0
    text = model.generate(**again("오늘 학생이", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert again.decode(text[0]).startswith("오늘 학생이")


OPT = OPTConfig(**SHAPE, ffn_dim=96, word_embed_proj_dim=64, pad_token_id=1, dropout=0.0)
MAMBA = MambaConfig(hidden_size=64, state_size=8, num_hidden_layers=2, vocab_size=640)


@pytest.mark.parametrize("kind", [OPT, MAMBA], ids=["opt", "mamba"])
def test_any_causal_model_that_transformers_makes_is_trained(tmp_path, kind):
    kind.save_pretrained(tmp_path)
    run = tiny_run(tmp_path, "--model-config", str(tmp_path / "config.json"), "--max-steps", "2")
    rows = t.read_rows(run.corpus, np.zeros(4, int), np.arange(4), 32)
    with torch.no_grad():
        logits = run.model.eval()(rows[:, :-1]).logits
        expected = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        assert run.loss_module(rows).item() == pytest.approx(expected.item(), abs=1e-5)
        changed = rows[:, :-1].clone()
        changed[:, -1] = 5
        assert torch.allclose(run.model(changed).logits[:, :-1], logits[:, :-1], atol=1e-5), "it looks ahead"
    assert t.train(run, t.TrainState()) == "finished"


def test_the_end_of_text_learns_although_it_was_the_padding(tmp_path, tokenizer):
    torch.manual_seed(0)
    kind = LlamaConfig(**SHAPE, pad_token_id=tokenizer.eos_token_id, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(kind).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    run = tiny_run(tmp_path, "--init-from", str(tmp_path / "start"))
    rows = torch.full((1, 33), tokenizer.eos_token_id)
    run.loss_module(rows).backward()
    assert run.model.get_input_embeddings().weight.grad[tokenizer.eos_token_id].abs().sum() > 0


def test_weights_that_the_configuration_does_not_name_are_told(tmp_path, trained, caplog):
    shutil.copytree(trained[2] / "checkpoint-4", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "num_hidden_layers": values["num_hidden_layers"] - 1}))
    t.load_model(tmp_path / "model")
    assert "모델 설정에 없는 가중치 9개를 읽지 않았습니다" in caplog.text


def test_a_checkpoint_is_a_start_like_any_other(tmp_path, trained):
    checkpoint = trained[2] / "checkpoint-4"
    run = tiny_run(tmp_path, "--init-from", str(checkpoint / "pytorch_model.bin"), "--save-steps", "100")
    ours, theirs = run.model.state_dict(), trained[0].model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert run.corpus.tokenizer.get_vocab() == trained[0].corpus.tokenizer.get_vocab()


def test_rows_longer_than_the_model_was_made_for_are_refused(tmp_path, tokenizer):
    start = tmp_path / "start"
    AutoModelForCausalLM.from_config(KINDS["llama"]).save_pretrained(start)
    tokenizer.save_pretrained(start)
    with pytest.raises(ValueError, match=r"--max-seq-length 128.*최대 길이 64.*--max-seq-length 64"):
        tiny_run(tmp_path, "--init-from", str(start), "--max-seq-length", "128")
