"""--learning-rate auto: one rate wherever it is told, and the schedule's; what the plan recommends."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import samples
from samples import SMALL_MODEL, documents, forked_run, options, read_metrics, tiny_run, write_corpus

import train_h100_dual as t

AUTO = ["--learning-rate", "auto", "--lr-schedule", "constant", "--warmup-ratio", "0", "--report-to", "none"]
AUTO += SMALL_MODEL


@pytest.fixture
def corpus(tmp_path, monkeypatch) -> list[str]:
    """Options of a run over a corpus that nobody has tokenised yet, for as long as it is."""
    monkeypatch.setattr(samples, "TINY", [words.replace("--max-steps 4", "") for words in samples.TINY])
    return ["--dataset-path", str(write_corpus(tmp_path / "data.jsonl", documents(60))), *AUTO]


def planned(folder: Path, *more: str) -> str:
    """What the plan says of the training."""
    return "\n".join(t.info_lines(t.make_launch_plan(t.parse_args(options(folder, *more)), 1), False))


def told(text: str) -> tuple[str, str]:
    """The one rate that a text tells without a mark that it is estimated, and what it comes from."""
    ((rate, basis),) = set(re.findall(r"학습률: (\S+) \(auto: ([^)]*)\)(?! \(추정\))", text))
    return rate, basis


def trained_rates(folder: Path) -> set[float]:
    return {line["learning_rate"] for line in read_metrics(folder) if "loss" in line}


def by_law(run: t.Run) -> float:
    shape, tokens = t.model_shape(run.cfg), run.total_steps * run.step_tokens
    return float(f"{t.RATE_LAW[run.cfg.optimizer] * shape.matrix_parameters() ** -0.713 * tokens**0.307:.1e}")


def test_a_number_of_tokens_beyond_the_epochs_is_told(tmp_path, corpus):
    for tokens, source, told in (("9" * 9, corpus, True), ("2000", corpus, False), ("9" * 9, ["--dummy-data"], False)):
        plan = t.make_launch_plan(t.parse_args(options(tmp_path, *source, "--max-tokens", tokens)), 1)
        assert any("--max-tokens 전에 끝납니다" in note for note in plan.notes) is told, (tokens, source)


def test_auto_is_estimated_then_one_rate_in_plan_run_and_resume(tmp_path, corpus):
    assert re.search(r"학습률: \S+ \(auto: .*\) \(추정\)$", planned(tmp_path, *corpus), re.M)
    shown = forked_run(tmp_path, *corpus, "--save-steps", "1000")
    rate, basis = told(shown)
    assert trained_rates(tmp_path) == {float(rate)}
    exact = planned(tmp_path, *corpus, "--output-dir", str(tmp_path / "new"))  # it is tokenised now
    assert told(exact) == (rate, basis)
    assert "추정" not in next(line for line in exact.splitlines() if "학습률" in line)
    longer = [*corpus, "--resume", "--max-epochs", "2"]
    for cache, told_again in (("new", True), ("cache", False)):
        words = options(tmp_path, *longer, "--cache-dir", str(tmp_path / cache))
        notes = t.make_launch_plan(t.parse_args(words), 1).notes
        assert any("다시 토큰화합니다" in note for note in notes) is told_again
    plan = planned(tmp_path, *longer)
    assert told(plan)[0] == rate
    fresh = re.search("체크포인트의 값, 새로 시작하면 (.*)", told(plan)[1])[1]
    assert float(fresh) > float(rate)
    assert told(forked_run(tmp_path, *longer)) == told(plan)
    assert trained_rates(tmp_path) == {float(rate)}
    saved = t.read_json(t.list_checkpoints(tmp_path / "outputs")[-1] / "training_info.json")
    assert saved["options"]["learning_rate"] == float(rate)


@pytest.mark.parametrize("optimizer", t.OPTIMIZERS)
@pytest.mark.parametrize("more", [("--max-steps", "40"), ("--max-steps", "40", "--max-tokens", "1280")])
def test_auto_goes_by_the_tokens_of_the_whole_run_and_the_optimizers_law(tmp_path, optimizer, more):
    words = [*AUTO, "--optimizer", optimizer, *more]
    run = tiny_run(tmp_path / "run", *words)
    assert run.total_steps == (20 if "--max-tokens" in more else 40)
    assert t.learning_rate_at(run, 0) == by_law(run)
    assert float(told(planned(tmp_path, "--dummy-data", *words))[0]) == by_law(run)


def test_auto_tells_that_the_hours_may_end_before_it_and_is_refused_for_weights_that_exist(tmp_path):
    words = options(tmp_path, "--dummy-data", *AUTO, "--max-hours", "2")
    assert [note for note in t.make_launch_plan(t.parse_args(words), 1).notes if "--max-hours" in note]
    with pytest.raises(t.UsageProblem, match=r"--learning-rate auto.*--init-from|--init-from.*--learning-rate auto"):
        t.parse_args(["--train", "--learning-rate", "auto", "--init-from", "x"])


@pytest.mark.parametrize(("rate", "is_told"), [("1e-4", True), ("1", True), ("near", False), ("auto", False)])
def test_a_rate_that_was_not_chosen_or_is_far_off_gets_a_recommendation(tmp_path, rate, is_told):
    muon = told(planned(tmp_path, "--dummy-data", *AUTO, "--optimizer", "muon"))[0]
    words = ["--dummy-data", "--learning-rate", str(2 * float(muon)) if rate == "near" else rate]
    text = planned(tmp_path, *AUTO, *words)
    assert (f"권장: --optimizer muon --learning-rate auto ({muon})" in text) == is_told
