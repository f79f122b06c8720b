"""Checkpoints: whole or not there, and complete Hugging Face models."""

from __future__ import annotations

import json
import unicodedata

import pytest
import torch
from samples import WILD_TEXTS, tiny_run
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import train_h100_dual as t


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that trained to its end in this process, and where it wrote."""
    run = tiny_run(tmp_path_factory.mktemp("trained"))
    state = t.TrainState()
    t.save_initial_model(run)
    assert t.train(run, state) == "finished"
    return run, state, run.cfg.output_dir


def test_the_tree_is_what_the_documents_promise(trained):
    _, _, output = trained
    model = {"pytorch_model.bin", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (output / "initial_model").iterdir()} == model | {"model_info.json"}
    found = {path.name for path in (output / "checkpoint-4").iterdir()}
    assert found == model | {"training_info.json", "training_state"}
    assert [path.name for path in t.list_checkpoints(output)] == ["checkpoint-4"]


def test_it_opens_in_transformers_with_every_weight_bit_for_bit(trained):
    run, _, output = trained
    model, info = AutoModelForCausalLM.from_pretrained(output / "checkpoint-4", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ours, theirs = run.decoder.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(theirs[name].dtype == torch.float32 and torch.equal(ours[name], theirs[name]) for name in ours)
    tokens = torch.randint(0, 500, (2, 16))
    with torch.no_grad():
        run.decoder.eval()
        logits = [item(input_ids=tokens).logits for item in (run.decoder, model)]
        run.decoder.train()
    assert torch.allclose(*logits, atol=1e-5)


def test_no_name_of_a_weight_carries_a_wrappers_prefix_and_tied_weights_are_written_once(trained):
    _, _, output = trained
    path = output / "checkpoint-4" / "pytorch_model.bin"
    weights = torch.load(path, weights_only=True)
    assert not [name for name in weights if "module." in name or "_orig_mod." in name]
    size = sum(value.numel() * 4 for name, value in weights.items() if name != "lm_head.weight")
    assert path.stat().st_size < 1.05 * size + 50_000


def test_the_configuration_names_what_other_tools_need(trained):
    run, _, output = trained
    config = json.loads((output / "checkpoint-4" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["use_cache"] is True
    assert config["dtype"] == "float32"
    assert (config["bos_token_id"], config["eos_token_id"]) == (run.corpus.tokenizer.bos_token_id,) * 2
    assert "packed_causal" not in json.dumps(config)


@pytest.mark.parametrize("text", WILD_TEXTS)
def test_its_tokenizer_reads_text_back(trained, text):
    tokenizer = AutoTokenizer.from_pretrained(trained[2] / "checkpoint-4")
    for source in (text, unicodedata.normalize("NFD", text)):
        ids = tokenizer(source, split_special_tokens=True).input_ids
        assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


def test_a_pipeline_generates_from_it(trained):
    generate = pipeline("text-generation", model=str(trained[2] / "checkpoint-4"))
    text = generate("오늘 학생이", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    assert text.startswith("오늘 학생이")
    assert len(text) > len("오늘 학생이")


def test_the_initial_model_is_the_untrained_one(trained):
    run, _, output = trained
    model = AutoModelForCausalLM.from_pretrained(output / "initial_model")
    fresh = t.build_model(run.cfg, run.corpus.tokenizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))
    info = json.loads((output / "initial_model" / "model_info.json").read_text())
    assert info["parameters"]["total"] == sum(weight.numel() for weight in model.parameters())
    assert info["parameters"]["embedding"] == model.get_input_embeddings().weight.numel()
    assert {"architecture", "dtype", "vocab_size", "tokenizer_fingerprint", "created", "versions"} <= info.keys()


def test_training_info_tells_the_whole_story(trained):
    run, _, output = trained
    info = json.loads((output / "checkpoint-4" / "training_info.json").read_text())
    assert (info["step"], info["total_steps"], info["world_size"]) == (4, 4, 1)
    assert info["tokens_seen"] == 4 * run.step_tokens
    assert info["val_bits_per_byte"] > 0
    assert info["val_loss_ko"] > 0
    assert info["val_loss_en"] > 0
    assert info["options"]["batch_size"] == 2
    for name in (
        "epoch",
        "loss",
        "learning_rate",
        "elapsed_seconds",
        "tokens_per_second",
        "data_fingerprint",
        "corpus",
    ):
        assert info[name] is not None, name
    assert {"torch", "transformers"} <= info["versions"].keys()


def test_metrics_carry_the_fields_that_are_promised(trained):
    lines = [json.loads(line) for line in (trained[2] / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    fields = {"step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu", "memory_gb", "seconds"}
    assert all(line.keys() == fields and line["mfu"] is None for line in steps)
    evaluation = next(line for line in lines if "val_loss" in line)
    names = {f"{name}{suffix}" for name in ("val_loss", "val_bits_per_byte") for suffix in ("", "_ko", "_en")}
    assert evaluation.keys() == names | {"step"}


def test_a_save_that_fails_leaves_what_was_there_and_no_directory_of_its_name(tmp_path):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "old").touch()
    with pytest.raises(OSError, match="full"), t.whole_directory(folder) as temporary:
        (temporary / "new").touch()
        raise OSError("disk full")
    assert [path.name for path in folder.iterdir()] == ["old"]
    assert t.list_checkpoints(tmp_path) == [folder]
    with t.whole_directory(folder) as temporary:
        (temporary / "new").touch()
    assert [path.name for path in folder.iterdir()] == ["new"]


def test_the_newest_two_keep_their_training_state_and_a_limit_removes_older_ones(tmp_path):
    cfg = t.TrainConfig(output_dir=tmp_path)
    for step in (5, 10, 100, 20):
        (tmp_path / f"checkpoint-{step}" / "training_state").mkdir(parents=True)
    t.remove_old_checkpoints(cfg)
    kept = [t.checkpoint_step(path.parent) for path in tmp_path.glob("checkpoint-*/training_state")]
    assert sorted(kept) == [20, 100]
    assert len(t.list_checkpoints(tmp_path)) == 4
    t.remove_old_checkpoints(t.TrainConfig(output_dir=tmp_path, save_total_limit=1))
    assert [path.name for path in t.list_checkpoints(tmp_path)] == ["checkpoint-100"]


def test_what_would_change_the_rows_is_refused_on_resume(trained):
    run, _, output = trained
    info = json.loads((output / "checkpoint-4" / "training_info.json").read_text())
    known = run.corpus.report["fingerprint"]
    assert t.resume_problems(run.cfg, 1, info, known) == []
    assert t.resume_problems(run.cfg, 1, info, None) == []
    for change, world_size, named in (
        ({"options": {**info["options"], "seed": 1}}, 1, "--seed 1"),
        ({"options": {**info["options"], "max_seq_length": 16}}, 1, "--max-seq-length 16"),
        ({"data_fingerprint": "other"}, 1, "데이터"),
        ({}, 2, "스텝당 토큰"),
    ):
        problems = t.resume_problems(run.cfg, world_size, {**info, **change}, known)
        assert len(problems) == 1
        assert named in problems[0]


def test_what_json_has_no_word_for_becomes_null(tmp_path):
    t.write_json(tmp_path / "a.json", {"loss": float("nan"), "more": {"norm": float("inf"), "step": 3}})
    assert json.loads((tmp_path / "a.json").read_text()) == {"loss": None, "more": {"norm": None, "step": 3}}


def test_changed_options_are_listed():
    before, after = (
        {"learning_rate": 1e-4, "verbose": False, "seed": 1},
        {"learning_rate": 2e-4, "verbose": True, "seed": 1},
    )
    assert t.changed_options(before, after) == ["learning_rate 0.0001 → 0.0002"]


def test_nothing_is_lost_when_metrics_are_cut_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "val_loss": 1}\n{"step": 3}\n{"st')
    t.cut_metrics(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 2, "val_loss": 1}\n'
