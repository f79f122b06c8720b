"""Options, their defaults and the plan of a run."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
from samples import ROOT, SHAPE, config, options

import train_h100_dual as t


def problems_of(*argv: str) -> list[str]:
    with pytest.raises(t.UsageProblem) as caught:
        t.parse_args(list(argv))
    return caught.value.problems


def test_the_documents_defaults_hold():
    cfg, _ = t.resolve_config(t.parse_args(["--train"]), "cuda")
    assert (cfg.batch_size, cfg.learning_rate, cfg.max_seq_length, cfg.save_steps) == (4, 1e-4, 2048, 500)
    assert (cfg.precision, cfg.compile, cfg.model_size, cfg.vocab_size) == ("bf16", True, "1.3b", 65536)
    assert (cfg.gradient_accumulation_steps, cfg.max_steps, cfg.max_epochs) == (8, None, 1)


def test_a_test_on_a_cpu_adapts_only_what_was_left_open():
    cfg, notes = t.resolve_config(t.parse_args(["--test", "--max-seq-length", "64"]), "cpu")
    assert (cfg.model_size, cfg.max_seq_length, cfg.vocab_size, cfg.precision) == ("tiny", 64, 2048, "fp32")
    assert (cfg.max_steps, cfg.gradient_accumulation_steps, cfg.compile) == (10, 1, False)
    assert "tiny" in notes[0]
    assert "64" not in notes[0]


def test_a_training_run_on_a_cpu_keeps_the_model_that_was_asked_for():
    cfg, _ = t.resolve_config(t.parse_args(["--train", "--device", "cpu"]), "cpu")
    assert (cfg.model_size, cfg.max_seq_length, cfg.precision) == ("1.3b", 2048, "fp32")


CP949 = b"\xbf\xc0\xb4\xc3".decode(errors="surrogateescape")  # as it comes from a terminal in another encoding


@pytest.mark.parametrize(("argv", "named"), [
    ("--learning-rate nan", "--learning-rate"), ("--learning-rate abc", "숫자"), ("--model-size 1b", "1.3b"),
    ("--lr-schedule cosin", "cosine"), ("--max-steps=x", "--max-steps"), ("--test=1", "--test"), ("stray", "stray"),
    ("--dataset-path=", "--dataset-path"), ("--dataset-path hf:a@b@c", "hf:ORG/NAME[@REVISION]"),
    ("--report-to tensorbord", "tensorboard"), (f"--dataset-path a.jsonl {__file__}", "따옴표"),
    ("--vocab-size 2000000", "가장 가까운 값: 1048576"), ("--seed 3000000000", "가장 가까운 값: 2147483647"),
    (f"--prompt {CP949}", "UTF-8"),
])  # fmt: skip
def test_a_wrong_value_is_named_with_what_to_type(argv, named):
    assert named in problems_of(*argv.split(" "))[0]


def test_resume_stands_alone_or_takes_a_path():
    assert t.parse_args(["--resume", "--train"]).resume == "auto"
    path = Path.cwd() / "outputs" / "checkpoint-5"
    assert t.parse_args(["--train", "--resume=outputs/checkpoint-5/pytorch_model.bin"]).resume == path


@pytest.mark.parametrize("attention", ["cudnn", "flash"])
def test_kernels_for_half_precision_are_refused_in_fp32_on_a_gpu(attention):
    with pytest.raises(t.UsageProblem, match=f"^--attention {attention}"):
        t.resolve_config(t.parse_args(["--fp32", "--attention", attention]), "cuda")
    assert t.resolve_config(t.parse_args(["--attention", attention]), "cuda")[0].attention == attention


@pytest.mark.parametrize("argv", [
    "--device cpu --fp16", "--device cpu --attention cudnn", "--device cpu --bf16-allreduce", "--test --resume",
    "--vocab-size 1000", "--dummy-data --dataset-path x", "--model-config a --init-from b", "--test --train",
    "--compile --no-compile", "--generate a --train --prompt x",
])  # fmt: skip
def test_combinations_that_cannot_be_meant_are_refused(argv):
    words = argv.split()
    (problem,) = problems_of(*words)
    assert words[-1] in problem or words[0] in problem


def test_typed_paths_are_the_callers_and_default_paths_the_scripts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = t.parse_args(["--output-dir", "여기 out"])
    assert cfg.output_dir == tmp_path / "여기 out"
    assert cfg.logs_dir == ROOT / "logs"
    assert t.parse_args(["--cache-dir", "~nobody-here/x"]).cache_dir == tmp_path / "~nobody-here/x"
    (tmp_path / "mine").mkdir()
    cfg = t.parse_args(["--init-from", "mine", "--tokenizer", "org/name"])
    assert (cfg.init_from, cfg.tokenizer) == (tmp_path / "mine", "org/name")


def test_steps_are_whole_epochs_unless_told_otherwise(tmp_path):
    cfg = dataclasses.replace(config(tmp_path), max_steps=None, max_epochs=2)
    assert t.total_steps(cfg, rows=101, step_tokens=cfg.tokens_per_step(2)) == 2 * 101 // 4
    assert t.total_steps(dataclasses.replace(cfg, max_steps=3), 101, 128) == 3
    assert t.total_steps(dataclasses.replace(cfg, max_tokens=10 * 128), 101, 128) == 10


def test_the_peak_of_a_gpu_is_known_by_its_name():
    assert t.named_peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    for unknown in ("", "NVIDIA GB10", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"):
        assert t.named_peak_flops(unknown) is None


def test_a_checkpoint_of_another_run_is_not_gone_on_from_in_a_directory_with_results(tmp_path):
    other = tmp_path / "other" / "checkpoint-4"
    own = config(tmp_path).output_dir / "checkpoint-5"
    assert t.output_problems(config(tmp_path, "--resume", str(other))) == []
    own.mkdir(parents=True)
    assert t.output_problems(config(tmp_path, "--resume", str(own / "pytorch_model.bin"))) == []
    for mode in ("train", "test"):
        (own.parent / "run_info.json").write_text(json.dumps({"mode": mode}))
        (problem,) = t.output_problems(config(tmp_path, "--resume", str(other)))
        assert "이전 학습의 결과가 있습니다" in problem


NO_CONFIG = "쓸 수 있는 config.json이 없습니다"


@pytest.mark.parametrize(("words", "told"), [
    ("--init-from outputs/checkpoint-2", "--init-from: 새 학습이 지울 출력 디렉토리 안에 있습니다"),
    ("--tokenizer outputs/checkpoint-2/pytorch_model.bin", "--tokenizer: 새 학습이 지울 출력 디렉토리"),
    ("--model-config outputs/checkpoint-2/config.json", "--model-config: 새 학습이 지울 출력 디렉토리"),
    ("--model-config list.json", NO_CONFIG), ("--model-config words.txt", NO_CONFIG),
    ("--model-config empty", NO_CONFIG), ("--init-from words.txt", f"--init-from: ./words.txt 에 {NO_CONFIG}"),
    ("--init-from ./empty", f"--init-from: ./empty 에 {NO_CONFIG}"),
    ("--tokenizer list.json", "--tokenizer: ./list.json 에 쓸 수 있는 tokenizer.json이 없습니다"),
    ("--init-from model --max-seq-length 128", "모델의 최대 길이 64보다 깁니다. --max-seq-length 64"),
    ("--init-from model --tokenizer large", "--tokenizer의 어휘 200개가 --init-from 모델의 128개보다"),
    ("--model-config outputs/my_own.json", None),
    ("--max-tokens 63", "--max-tokens 63: 한 스텝의 토큰 수 64보다 작습니다"),
])  # fmt: skip
def test_what_a_run_begins_with_is_looked_at_before_the_start(tmp_path, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    kept = tmp_path / "outputs" / "checkpoint-2"
    for folder in (kept, tmp_path / "model", tmp_path / "large", tmp_path / "empty"):
        folder.mkdir(parents=True)
    (kept / "config.json").write_text('{"model_type": "llama"}')
    (kept / "tokenizer.json").write_text("{}")
    (tmp_path / "outputs" / "run_info.json").write_text('{"mode": "test"}')
    (tmp_path / "model" / "config.json").write_text('{"vocab_size": 128, "max_position_embeddings": 64}')
    vocabulary = {str(number): number for number in range(200)}
    (tmp_path / "large" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    (tmp_path / "outputs" / "my_own.json").write_text('{"model_type": "llama"}')
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "words.txt").write_text("words")
    typed = t.parse_args(options(tmp_path, "--dummy-data", *words.split()))
    if told is None:
        t.make_launch_plan(typed, 1)
        return
    with pytest.raises(t.EnvironmentProblem) as refused:
        t.make_launch_plan(typed, 1)
    assert len(refused.value.problems) == 1
    assert told in refused.value.problems[0]


@pytest.mark.parametrize(("typed", "shares"), [
    ("ko=0.7,en=0.3", "en=0.3,ko=0.7"), (" ko = 7 , en = 3 ", "en=0.3,ko=0.7"), ("ko=1", "ko=1"),
    ("a=1,b=1,c=1", "a=0.333,b=0.334,c=0.333"), ("위키=0.5,a=b=0.5", "a=b=0.5,위키=0.5"),
])  # fmt: skip
def test_the_shares_of_a_mix_are_thousandths_that_sum_up_to_one(typed, shares):
    cfg = t.parse_args(["--mix", typed])
    assert cfg.mix == shares
    assert sum(cfg.mix_counts.values()) == 1000


@pytest.mark.parametrize("typed", ["ko", "ko=", "=1", "ko=x", "ko=-1", "ko=0", "ko=1,ko=2", "ko=1,en=0.0001", "ko=1,"])
def test_a_mix_that_can_not_be_meant_is_refused(typed):
    with pytest.raises(t.UsageProblem, match="--mix"):
        t.parse_args(["--mix", typed])


def test_checkpoints_that_can_not_fit_are_refused_in_train_and_told_in_a_test(tmp_path, monkeypatch, capsys):
    free = []
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(t.shutil, "disk_usage", lambda path: usage._replace(free=free[0]))
    places = [f"--{name}-dir={tmp_path / name}" for name in ("output", "logs", "cache")]
    argv = ["--train", "--device=cpu", "--model-size=tiny", "--dummy-data", "--max-steps=1000", *places]
    weights = 4 * t.PRESETS["tiny"].parameter_count(65536)
    free.append((2 + 2 + 2 * 3) * weights - 1)  # the initial model, two checkpoints and one being written, moments
    with pytest.raises(t.EnvironmentProblem, match=r"디스크 공간이 부족합니다.*--save-total-limit 2"):
        t.make_launch_plan(t.parse_args(argv), 1)
    free[0] += 1
    assert t.make_launch_plan(t.parse_args(argv), 1).steps == 1000
    free[0] = 0
    notes = t.make_launch_plan(t.parse_args(["--test", "--device=cpu", "--dummy-data", *places]), 1).notes
    assert "디스크 공간이 부족합니다" in notes[-1]
    t.print_launch_plan(argv, "always", False)
    assert re.search(r"^code=1\n\n❌ 디스크 공간이 부족합니다", capsys.readouterr().out)
    assert not list(tmp_path.iterdir())


def test_an_error_in_the_plan_that_nobody_expects_starts_nothing(monkeypatch, capsys):
    monkeypatch.setattr(t, "info_lines", None)
    with pytest.raises(TypeError):
        t.print_launch_plan(["--test", "--device=cpu"], "always", False)
    assert capsys.readouterr().out.startswith("code=1\n")


def test_a_resumed_run_needs_room_only_for_what_is_not_there_yet(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    cfg = config(tmp_path, "--resume", "--save-steps", "10")
    weights = 4 * t.PRESETS["tiny"].parameter_count(cfg.vocab_size)
    for step in range(10, 100, 10):
        (cfg.output_dir / f"checkpoint-{step}").mkdir(parents=True)

    def lacks(room: int, *more: str) -> bool:
        monkeypatch.setattr(t.shutil, "disk_usage", lambda path: usage._replace(free=room))
        return t.room_problems(config(tmp_path, "--resume", "--save-steps", "10", *more), [], 1, 20) != []

    assert lacks(5 * weights - 1)  # two more and one being written; the training state of one more, two times a model
    assert not lacks(5 * weights)
    assert lacks(3 * weights - 1, "--save-total-limit", "9")
    assert not lacks(3 * weights, "--save-total-limit", "9")


def test_a_run_does_not_end_before_the_step_of_its_checkpoint(tmp_path):
    cfg = config(tmp_path, "--max-steps", "8")
    assert t.total_steps(cfg, 100, 128, done=8) == 8
    with pytest.raises(t.EnvironmentProblem, match=r"스텝 9인데 전체 스텝이 8.*--max-steps"):
        t.total_steps(cfg, 100, 128, done=9)


@pytest.mark.parametrize(("began", "goes_on", "told"), [
    ("--init-from a", "", "--init-from: .*쓸 값: --init-from a"),
    ("", "--init-from a", "--init-from: .*--init-from 없이"),
    ("--tokenizer a", "", "--tokenizer: .*쓸 값: --tokenizer a"),
    ("", "--vocab-size 1024", "--vocab-size: .*쓸 값: --vocab-size 512"),
    ("--model-config /a", "", "--model-config: .*쓸 값: --model-config /a"),
    ("--init-from a", "--init-from b", None),
])  # fmt: skip
def test_a_resumed_run_takes_its_model_and_tokenizer_from_where_it_began(tmp_path, began, goes_on, told):
    cfg = config(tmp_path, *began.split())
    info = {"layout_version": t.LAYOUT_VERSION, "mode": "train", "options": t.options_of(cfg), "data_fingerprint": ""}
    problems = t.resume_problems(config(tmp_path, *goes_on.split()), tmp_path, info, "")
    assert len(problems) == (told is not None), problems
    assert told is None or re.search(told, problems[0])


def test_the_token_cache_is_another_for_another_end_of_text(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    cfg = config(tmp_path, "--tokenizer", str(tmp_path))
    keys = [t.corpus_folders(cfg, [])]
    for end in ("<a>", "<b>"):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
        keys.append(t.corpus_folders(cfg, []))
    assert len(set(keys)) == 3


@pytest.mark.parametrize(("more", "tied"), [({}, False), ({"tie_word_embeddings": True}, True)])
def test_embeddings_count_as_tied_only_where_transformers_ties_them(tmp_path, more, tied):
    path = tmp_path / "config.json"
    for kind, expected in (("llama", tied), ("gemma", True)):
        path.write_text(json.dumps({"model_type": kind, **SHAPE, **more}))
        assert t.model_shape(config(tmp_path, "--model-config", str(path))).tied == expected
    path.write_text(json.dumps({"model_type": "llama", **SHAPE, "num_attention_heads": 0}))
    assert t.model_shape(config(tmp_path, "--model-config", str(path))) is None


def test_the_table_of_contents_names_the_sections_in_their_order():
    contents = re.findall(r"(?m)^    ([A-Z][\w ]*?)  +\S", t.__doc__)
    banners = re.findall(r"(?m)^# ==== ([\w ]+?)(?::| =)", (ROOT / "train_h100_dual.py").read_text(encoding="utf-8"))
    assert banners == contents
