"""What a model learns from the same tokens: optimizers, learning rates, schedules, QK-norm, tied embeddings.

    nice -n 10 python tests/benchmarks/learning.py CORPUS RESULTS.jsonl [--processes 2] [--time]

Each run appends one line with its curve to RESULTS.jsonl; runs that are there already are not
repeated, so the command may be interrupted and goes on.  The runs of later stages depend on
the best learning rates of the first.  The tables are printed at the end, or with ``--report`` at
once.  ``--time`` measures instead what a step of each optimizer takes, by turns.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
from common import config, corpus_file, median_and_range, model_options, provenance, ratios, seconds, table, take_turns
from samples import NeverStop

import train_h100_dual as t

EVALUATE_EVERY = 20
SEEDS = (42, 43, 44)
RATES = {"adamw": (5e-3, 2e-3, 1e-2, 1e-4, 2e-2, 1e-3), "muon": (1e-2, 5e-3, 1e-4, 2e-2, 1e-3, 2e-3)}
SCHEDULES = ("cosine", "wsd")
DEFAULT_RATE = 1e-4
CACHE = Path(tempfile.gettempdir()) / "learning_cache"
SHAPE = {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 256, "rms_norm_eps": 1e-5}


@dataclass(frozen=True)
class Trial:
    """What one run differs in from the others."""

    optimizer: str
    learning_rate: float
    schedule: str = "cosine"
    qk_norm: bool = False
    tied: bool = True
    seed: int = SEEDS[0]
    steps: int = 600
    batch_size: int = 8
    vocab_size: int = 4096

    def __str__(self) -> str:
        extra = [self.schedule] if self.schedule != "cosine" else []
        extra += ["QK-norm"] if self.qk_norm else []
        extra += [] if self.tied else ["untied"]
        return " ".join([self.optimizer, f"{self.learning_rate:g}", *extra])

    def over_seeds(self) -> list[Trial]:
        """The same with each seed."""
        return [replace(self, seed=seed) for seed in SEEDS]


class Results(dict[Trial, dict[str, Any]]):
    """The runs that a file holds: final figures, and the curve with step, validation and mean training loss."""

    def __init__(self, path: Path, size: dict[str, int]):
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        names = Trial.__dataclass_fields__
        super().__init__({Trial(**{name: line[name] for name in names}): line for line in map(json.loads, lines)})
        self.path = path
        self.grids = [  # each optimizer and schedule with each of its learning rates
            [Trial(optimizer, rate, schedule, **size) for rate in RATES[optimizer]]
            for schedule, optimizer in product(SCHEDULES, RATES)
        ]

    def add(self, trial: Trial, result: dict[str, Any]) -> None:
        """Keep a run as soon as it has ended."""
        self[trial] = result
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(result) + "\n")
        print(f"{time.strftime('%H:%M:%S')} {trial}, seed {trial.seed}: {self.loss(trial):.4f}", flush=True)

    def loss(self, trial: Trial) -> float:
        """Validation loss after the last step; infinite if it came to nothing."""
        loss = self[trial]["val_loss"]
        return loss if loss == loss else float("inf")

    def best(self) -> list[Trial]:
        """Of each grid the trial with the lowest final loss, as far as it was run."""
        tried = [[trial for trial in trials if trial in self] for trials in self.grids]
        return [min(trials, key=self.loss) for trials in tried if trials]

    def compared(self) -> list[Trial]:
        """What is run with each seed: the best of each grid, the default rate, at the best rates what else differs."""
        chosen = self.best()
        cosine = [trial for trial in chosen if trial.schedule == "cosine"]
        return [
            *chosen,
            *(replace(trial, learning_rate=DEFAULT_RATE) for trial in chosen),
            *(replace(trial, qk_norm=True) for trial in cosine),
            *(replace(trial, tied=False) for trial in cosine),
        ]


def build(corpus: Path, folder: Path, trial: Trial) -> tuple[t.Run, Iterator[Any]]:
    """A run of the script's own with the model that the trial asks for, and its batches."""
    torch.set_num_threads(1)
    kind = "qwen3" if trial.qk_norm else "llama"
    words = (
        f"--cache-dir {CACHE} --validation-split 0.002 --vocab-size {trial.vocab_size} --seed {trial.seed} "
        f"--max-seq-length 256 --batch-size {trial.batch_size} --gradient-accumulation-steps 1 "
        f"--max-steps {trial.steps} --lr-schedule {trial.schedule} --optimizer {trial.optimizer} "
        f"--learning-rate {trial.learning_rate}"
    )
    model = model_options(folder, model_type=kind, **{**SHAPE, "tie_word_embeddings": trial.tied})
    cfg = config(t, corpus, folder, *words.split(), *model)
    run = t.build_run(cfg, t.prepare_corpus(cfg), NeverStop(), t.build_accelerator(cfg))
    t.shrink_residual_projections(run.model)  # as a preset's are; --model-config leaves the model's own
    positions = t.rank_positions(run.cfg, 0, 1, range(trial.steps))
    return run, iter(t.make_loader(run.cfg, run.corpus, positions))


def learn(corpus: Path, trial: Trial) -> dict[str, Any]:
    """Train once; returns the trial, and validation and training loss every EVALUATE_EVERY steps."""
    with tempfile.TemporaryDirectory() as folder:
        run, batches = build(corpus, Path(folder), trial)
        curve, losses, figures = [], [], {}
        for step in range(1, trial.steps + 1):
            rate = t.learning_rate_at(step - 1, trial.steps, run.cfg, run.warmup_steps)
            losses.append(t.train_step(run, batches, rate)[0].item())
            if step % EVALUATE_EVERY == 0 or step == trial.steps:
                figures = t.evaluate(run)
                curve.append([step, round(figures["val_loss"], 4), round(statistics.mean(losses), 4)])
                losses = []
    weights = sum(weight.numel() for weight in run.model.parameters())
    return {**asdict(trial), **figures, "parameters": weights, "curve": curve}


def run_missing(trials: Iterable[Trial], results: Results, options: argparse.Namespace) -> None:
    """Run what the results lack."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, mp_context=context) as pool:
        left = [trial for trial in trials if trial not in results]
        running = {pool.submit(learn, options.corpus, trial): trial for trial in left}
        for done in as_completed(running):
            results.add(running[done], done.result())


def report(results: Results) -> None:
    """Print what the results show, as far as they go."""
    rows = []
    for rate in sorted(RATES["adamw"]):
        trials = [next(trial for trial in trials if trial.learning_rate == rate) for trials in results.grids]
        rows.append([f"{rate:g}", *(f"{results.loss(one):.4f}" if one in results else "-" for one in trials)])
    head = ["learning rate", *(f"{one.optimizer} {one.schedule}" for one, *_ in results.grids)]
    print(f"\nFinal validation loss by learning rate, seed {SEEDS[0]}:\n\n{table(head, rows)}")
    rows = []
    for trial in results.compared():
        if seeds := [one for one in trial.over_seeds() if one in results]:
            figures = ([results[one][name] for one in seeds] for name in ("val_loss", "val_bits_per_byte"))
            size = f"{results[seeds[0]]['parameters'] / 1e6:.2f} M"
            rows.append([trial, size, len(seeds), *(median_and_range(values, 4) for values in figures)])
    head = ["", "parameters", "seeds", "validation loss", "bits/byte"]
    print(f"\nOver the seeds, median and range:\n\n{table(head, rows)}")
    adamw, muon = ([trial for trial in results.best() if trial.optimizer == name] for name in RATES)
    rows = []
    for pair in product(adamw, muon):
        for one, other in zip(*(trial.over_seeds() for trial in pair), strict=True):
            if one in results and other in results:
                target, curve = results[one]["curve"][-1][1], results[other]["curve"]
                steps = next((step for step, loss, _ in curve if loss <= target), None)
                share = f"{steps / other.steps:.2f}" if steps else "-"
                rows.append([one, one.seed, f"{target:.4f}", other, steps or "-", share, f"{curve[-1][1]:.4f}"])
    head = ["", "seed", "its last loss", "", "there at step", "share", "last loss"]
    print(f"\nSteps to the best AdamW's final loss:\n\n{table(head, rows)}")


def time_steps(options: argparse.Namespace, size: dict[str, int], turns: int = 20, block: int = 5) -> None:
    """Print what a step of each optimizer takes, in blocks by turns."""

    def steps(run: t.Run, batches: Iterator[Any]) -> None:
        for _ in range(block):
            t.train_step(run, batches, 1e-3)

    with tempfile.TemporaryDirectory() as folder:
        calls = {}
        for name in RATES:
            trial = Trial(name, 1e-3, **{**size, "steps": (turns + 1) * block})
            pair = build(options.corpus, Path(folder) / name, trial)
            calls[name] = lambda pair=pair: 1e3 / block * seconds(steps, *pair)
        values = take_turns(calls, turns, warm_up=1)
    rows = [[name, median_and_range(values[name], 1)] for name in RATES]
    rows.append(["muon / adamw (95 %)", ratios(values["muon"], values["adamw"])])
    print(table(["", "step, ms"], rows))


def main() -> None:
    """Run what is missing, or time steps, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=corpus_file)
    parser.add_argument("results", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=8, help="rows of 256 tokens a step")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--report", action="store_true", help="only print the tables of what is there")
    parser.add_argument("--time", action="store_true", help="only measure the time of a step")
    options = parser.parse_args()
    size = {name: getattr(options, name) for name in ("steps", "batch_size", "vocab_size")}
    if options.time:
        time_steps(options, size)
    else:
        results = Results(options.results, size)
        if not options.report:
            run_missing(chain(*zip(*results.grids, strict=True)), results, options)
            run_missing(chain(*(trial.over_seeds() for trial in results.compared())), results, options)
        report(results)
    print("\n" + provenance("torch", "transformers", "accelerate"))


if __name__ == "__main__":
    main()
