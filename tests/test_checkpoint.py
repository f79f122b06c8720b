"""Checkpoints: whole or not there, and complete Hugging Face models."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import LAUNCHER, SCRIPT, wait_for
from samples import ROOT, WILD_TEXTS, Bomb, config, options, tiny_run
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import train_h100_dual as t

OLD = ROOT / "tests" / "fixtures" / "checkpoint-4-of-f50eeef"
(OTHER_OPTIMIZER,) = set(t.OPTIMIZERS) - {t.TrainConfig().optimizer}


def test_everything_that_a_run_knows_of_itself_comes_back(trained, tmp_path):
    run, state, output = trained
    fresh = tiny_run(tmp_path)
    found = t.load_checkpoint(fresh, output / "checkpoint-4")
    assert found == state
    assert found.evaluation.keys() >= {"val_loss", "val_bits_per_byte", "val_loss_ko"}
    assert torch.equal(fresh.spike_window[:, -4:], run.spike_window[:, -4:])
    assert fresh.spike_window[:, -4:].isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(fresh.model.parameters(), run.model.parameters(), strict=True))


def test_it_opens_in_transformers_with_every_weight_bit_for_bit(trained):
    run, _, output = trained
    model, info = AutoModelForCausalLM.from_pretrained(output / "checkpoint-4", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ours, theirs = run.model.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(theirs[name].dtype == torch.float32 and torch.equal(ours[name], theirs[name]) for name in ours)
    tokens = torch.randint(0, 500, (2, 16))
    with torch.no_grad():
        run.model.eval()
        logits = [item(input_ids=tokens).logits for item in (run.model, model)]
        run.model.train()
    assert torch.allclose(*logits, atol=1e-5)
    path = output / "checkpoint-4" / "pytorch_model.bin"
    saved = torch.load(path, weights_only=True)
    assert saved.keys() == theirs.keys(), "no wrapper's prefix"
    size = sum(value.numel() * 4 for name, value in saved.items() if name != "lm_head.weight")
    assert path.stat().st_size < 1.05 * size + 50_000, "tied weights are written once"


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
    assert min(info["val_loss_ko"], info["val_loss_en"]) > 0
    assert info["options"]["batch_size"] == 2
    promised = {"epoch", "loss", "learning_rate", "elapsed_seconds", "tokens_per_second", "data_fingerprint", "corpus"}
    assert not {name for name in promised if info[name] is None}
    assert {"torch", "transformers"} <= info["versions"].keys()


def test_a_save_that_fails_leaves_what_was_there_and_no_directory_of_its_name(tmp_path):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "old").touch()
    with pytest.raises(OSError, match="full"), t.atomic_dir(folder) as temporary:
        (temporary / "new").touch()
        raise OSError("disk full")
    assert [path.name for path in folder.iterdir()] == ["old"]
    assert t.list_checkpoints(tmp_path) == [folder]
    with t.atomic_dir(folder) as temporary:
        (temporary / "new").touch()
    assert [path.name for path in folder.iterdir()] == ["new"]


def test_the_newest_two_keep_their_training_state_and_a_limit_removes_older_ones(tmp_path):
    run, state = tiny_run(tmp_path, "--max-steps", "1000"), t.TrainState(step=100)
    output = run.cfg.output_dir
    for step in (5, 10, 20):
        (output / f"checkpoint-{step}" / "training_state").mkdir(parents=True)
        (output / f"checkpoint-{step}" / "training_state" / "state.pt").touch()
    t.save_checkpoint(run, state)
    t.report_save(run, is_last=True)
    assert {path.parent.name for path in output.glob("*/training_state")} == {"checkpoint-20", "checkpoint-100"}
    assert len(t.list_checkpoints(output)) == 4
    run.cfg = t.replace(run.cfg, save_total_limit=1)
    t.save_checkpoint(run, state)
    t.report_save(run, is_last=True)
    assert [path.name for path in output.iterdir() if path.is_dir()] == ["checkpoint-100"]


def test_the_manifest_is_what_sha256sum_says_of_every_file(trained):
    checkpoint = trained[2] / "checkpoint-4"
    files = json.loads((checkpoint / "training_state" / "manifest.json").read_text())["files"]
    there = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    assert files.keys() == there - {"training_state/manifest.json"}
    for name, entry in files.items():
        assert entry["bytes"] == (checkpoint / name).stat().st_size
        said = subprocess.run(["sha256sum", checkpoint / name], capture_output=True, text=True, check=True).stdout
        assert entry["sha256"] == said.split()[0]


def sign(folder: Path) -> None:
    """Make the manifest fit a checkpoint that was changed."""
    files = t.read_json(folder / t.MANIFEST)["files"]
    for name in files:
        files[name] = {"bytes": (folder / name).stat().st_size, "sha256": t.file_checksum(folder / name)}
    t.write_json(folder / t.MANIFEST, {"files": files})


@pytest.mark.parametrize("name", ["pytorch_model.bin", "training_state/state.pt", t.MANIFEST, "config.json"])
@pytest.mark.parametrize("place", [0.02, 0.3, 0.5, 0.9])
def test_any_flipped_bit_is_damage(trained, tmp_path, name, place):
    shutil.copytree(trained[2] / "checkpoint-4", tmp_path / "checkpoint-4")
    assert t.checkpoint_damage(tmp_path / "checkpoint-4", thorough=True) is None
    path = tmp_path / "checkpoint-4" / name
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 4
    path.write_bytes(content)
    assert t.checkpoint_damage(tmp_path / "checkpoint-4", thorough=True)


def save_and_die(run, state, boundary: int) -> bool:
    """Save in a child that is killed at one of its calls to the disk, a file half written; whether it got that far."""
    written, count = [], itertools.count(1)
    run.saver.executor = SimpleNamespace(submit=lambda _, *arguments: written.extend(arguments))
    t.save_checkpoint(run, state)

    def deadly(name, real):
        def call(*arguments, **more):
            if next(count) == boundary:
                if name == "fsync" and Path(path := f"/proc/self/fd/{arguments[0]}").is_file():
                    os.truncate(path, os.stat(path).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **more)

        return call

    if (child := os.fork()) == 0:
        for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync"):
            setattr(os, name, deadly(name, getattr(os, name)))
        try:
            t.write_checkpoint(*written)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_killed_at_any_write_of_a_save_every_checkpoint_is_whole(tmp_path):
    shape = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64}
    shape |= {"num_attention_heads": 1, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    small = ("--model-config", str(tmp_path / "config.json"))
    run, state = tiny_run(tmp_path, "--save-total-limit", "3", *small), t.TrainState()
    t.train(run, state)
    t.report_save(run, is_last=True)
    output = run.cfg.output_dir
    state.loss_window = []
    boundary, seen = 0, set()
    while True:
        boundary += 1
        kept = t.list_checkpoints(output)
        state.step = int(kept[-1].name[11:]) + 1
        if not save_and_die(run, state, boundary):
            break
        found = t.list_checkpoints(output)
        assert [path.name for path in kept[-2:]] == [path.name for path in found if path in kept[-2:]]
        for path in found:
            torch.load(path / "pytorch_model.bin", weights_only=True)
            if (path / "training_state").is_dir():
                assert t.checkpoint_damage(path, thorough=True) is None
        whole = [path for path in found if (path / "training_state").is_dir()]
        assert len(whole) >= 1
        seen.add(f"checkpoint-{state.step}" in [path.name for path in found])
        for torn in output.glob(".*.tmp"):  # as the next start does
            shutil.rmtree(torn)
        if len(found) < 3:
            state.step += 1
            assert not save_and_die(run, state, 10**9)
    assert boundary > 20
    assert seen == {True, False}
    assert t.checkpoint_damage(t.list_checkpoints(output)[-1], thorough=True) is None


@pytest.mark.parametrize("name", ["pytorch_model.bin", "training_state/state.pt"])
def test_a_checkpoint_whose_pickle_would_run_code_is_refused(trained, tmp_path, name):
    run, _, output = trained
    folder = tmp_path / "checkpoint-4"
    shutil.copytree(output / "checkpoint-4", folder)
    torch.save({"weight": torch.zeros(2), "more": Bomb(tmp_path / "was here")}, folder / name)
    sign(folder)
    assert t.checkpoint_damage(folder, thorough=True) is None
    with pytest.raises(RuntimeError, match="코드가 실행될 수 있어"):
        t.load_checkpoint(run, folder)
    assert not (tmp_path / "was here").exists()
    torch.load(folder / name, weights_only=False)  # the bomb is a real one
    assert (tmp_path / "was here").exists()


def test_a_checkpoint_holds_its_step_and_a_failed_one_is_told_while_training_goes_on(tmp_path, monkeypatch, caplog):
    run = tiny_run(tmp_path, "--max-steps", "12", "--save-steps", "4", "--eval-steps", "100")
    state, at_four, buffers, write = t.TrainState(), {}, [], t.write_checkpoint

    def slowly(run, weights, content, info):
        moments = [item for values in content["optimizer"].values() for item in values.values()]
        buffers.append({tensor.data_ptr() for tensor in (*weights.values(), *moments)})
        if info["step"] == 4:
            at_four.update({name: value.clone() for name, value in weights.items()})
            wait_for("the next step", lambda: state.step > 5)
        if info["step"] == 8:
            raise OSError(errno.EIO, "Input/output error")
        write(run, weights, content, info)

    monkeypatch.setattr(t, "write_checkpoint", slowly)
    assert t.train(run, state) == "finished"
    t.report_save(run, is_last=True)
    (line,) = [text for text in caplog.messages if "저장하지 못했습니다" in text]
    assert "(스텝 8)" in line and "Input/output error" in line and line.endswith("checkpoint-4")
    assert [path.name for path in t.list_checkpoints(run.cfg.output_dir)] == ["checkpoint-4", "checkpoint-12"]
    assert buffers[0] == buffers[1] == buffers[2], "they are allocated once"
    saved = torch.load(run.cfg.output_dir / "checkpoint-4" / "pytorch_model.bin", weights_only=True)
    assert all(torch.equal(saved[name], value) for name, value in at_four.items())
    now = run.model.state_dict()
    assert not all(torch.equal(saved[name], now[name]) for name in now)


def refusal(cfg, world_size=1, fingerprint=""):
    """What keeps a run from going on."""
    with pytest.raises(t.EnvironmentProblem) as refused:
        t.find_resume_point(cfg, world_size, fingerprint)
    return refused.value.problems


def test_what_would_change_the_rows_is_refused_on_resume(trained):
    run, _, output = trained
    cfg, known = t.replace(run.cfg, resume=output / "checkpoint-4"), run.corpus.report["fingerprint"]
    point = t.find_resume_point(cfg, 1, known)
    assert (point.checkpoint, point.info["step"], point.notes) == (output / "checkpoint-4", 4, ())
    changes = {"seed": (1, "--seed 7"), "max_seq_length": (16, "--max-seq-length 32"), "mix": ("ko=1", "--mix 없이")}
    changes |= {
        "optimizer": (OTHER_OPTIMIZER, f"--optimizer {run.cfg.optimizer}"),
        "batch_size": (3, "스텝당 토큰(64)"),
    }
    for name, (value, told) in changes.items():
        (problem,) = refusal(t.replace(cfg, **{name: value}), 1, known)
        assert told in problem
    assert "토크나이저의 내용이 다릅니다" in refusal(cfg, 1, "other")[0]
    assert len(refusal(t.replace(cfg, seed=1, max_seq_length=16), 1, "other")) == 3
    (problem,) = t.resume_problems(cfg, point.checkpoint, {**point.info, "mode": "test"}, known)
    assert "테스트 모드의 체크포인트" in problem


def test_the_accumulation_is_adapted_to_the_ranks_or_the_reason_is_given(trained, tmp_path):
    run, _, output = trained
    folder = tmp_path / "checkpoint-10"
    shutil.copytree(output / "checkpoint-4", folder)
    info = t.read_json(folder / "training_info.json")
    tokens = 10 * 48 * run.cfg.max_seq_length
    (folder / "training_info.json").write_text(json.dumps({**info, "step": 10, "tokens_seen": tokens, "world_size": 2}))
    sign(folder)
    cfg = t.replace(run.cfg, resume=folder, gradient_accumulation_steps=6)
    for world_size, batch_size, expected in ((1, 4, 12), (3, 4, 4), (4, 4, 3), (1, 16, 3), (2, 4, 6)):
        point = t.find_resume_point(t.replace(cfg, batch_size=batch_size), world_size)
        assert point.step_tokens == 48 * cfg.max_seq_length
        assert [f"6 → {expected}" in note for note in point.notes] == [True] * (expected != 6)
    for world_size, batch_size in ((5, 4), (1, 96)):
        assert "스텝당 토큰(1,536)" in refusal(t.replace(cfg, batch_size=batch_size), world_size)[0]


def test_a_checkpoint_of_the_layout_before_is_refused_and_begins_a_new_run(place, tmp_path):
    """The fixture is whole as f50eeef wrote it: 1 layer of 16, 384 tokens, 4 steps of dummy data on one CPU process."""
    command = place.command(*options(tmp_path, "--dummy-data", "--vocab-size", "384", "--resume", str(OLD)))
    for program in ([str(LAUNCHER)], [sys.executable, str(SCRIPT)]):  # the plan, and a rank started by hand
        answer = place.execute({**command, "args": [*program, *command["args"][1:]]})
        assert answer.code == 1
        assert "다른 버전이 쓴 체크포인트라 이어서 학습할 수 없습니다" in answer.err
        assert f"--init-from {OLD}" in answer.err
        assert "Traceback" not in answer.text
        assert not place.outputs.exists()
    run = tiny_run(tmp_path, "--init-from", str(OLD), "--max-steps", "1")
    old = torch.load(OLD / "pytorch_model.bin", weights_only=True)
    assert all(torch.equal(value, old[name]) for name, value in run.model.state_dict().items())
    assert run.corpus.tokenizer("오늘 학생이").input_ids == AutoTokenizer.from_pretrained(OLD)("오늘 학생이").input_ids
    assert t.train(run, t.TrainState()) == "finished"


def test_what_a_training_run_left_is_not_removed_even_if_a_launcher_seems_to_have_made_the_plan(tmp_path, monkeypatch):
    monkeypatch.setenv("H100_DUAL_RUN_ID", "1-1")
    cfg = config(tmp_path)
    (cfg.output_dir / "checkpoint-5").mkdir(parents=True)
    t.write_json(cfg.output_dir / "run_info.json", {"mode": "test"})
    t.claim_output(cfg, 1).close()
    assert not t.list_checkpoints(cfg.output_dir)
    (cfg.output_dir / "checkpoint-5").mkdir()
    with pytest.raises(RuntimeError, match="이전 학습의 결과가 있습니다"):
        t.claim_output(cfg, 1)
    assert t.list_checkpoints(cfg.output_dir)
