"""What a model learns from the same tokens: optimizers, learning rates, schedules, QK-norm, tied embeddings.

    nice -n 10 python tests/benchmarks/learning.py CORPUS RESULTS.jsonl [--processes 2] [--time]

Each run appends one line with its curve to RESULTS.jsonl; runs that are there already are not
repeated, so the command may be interrupted and goes on.  The runs of later stages depend on
the best learning rates of the first.  The tables are printed at the end, or with ``--report`` at
once.  ``--time`` measures instead what a step of each optimizer takes, by turns.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from common import ROOT, config, corpus_file, median_and_range, provenance, table

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

EVALUATE_EVERY = 20
SEEDS = (42, 43, 44)
RATES = {"adamw": (5e-3, 2e-3, 1e-2, 1e-4, 2e-2, 1e-3), "muon": (1e-2, 5e-3, 1e-4, 2e-2, 1e-3, 2e-3)}
SCHEDULES = ("cosine", "wsd")
DEFAULT_RATE = 1e-4
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}


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


def build(corpus: Path, cache: Path, folder: Path, trial: Trial) -> Any:
    """A run of the script's own, with the model that the trial asks for."""
    from samples import NeverStop

    import train_h100_dual as t

    t.torch.set_num_threads(1)
    architecture = "qwen3" if trial.qk_norm else "llama"
    shape = {"model_type": architecture, "tie_word_embeddings": trial.tied, **SHAPE}
    (folder / "config.json").write_text(json.dumps(shape))
    cfg = config(
        t,
        corpus,
        folder,
        *f"--cache-dir {cache} --vocab-size {trial.vocab_size} --model-config {folder / 'config.json'}".split(),
        *f"--max-seq-length 256 --batch-size {trial.batch_size} --max-steps {trial.steps}".split(),
        "--gradient-accumulation-steps=1",
        *f"--validation-split 0.002 --seed {trial.seed} --lr-schedule {trial.schedule}".split(),
        *f"--optimizer {trial.optimizer} --learning-rate {trial.learning_rate}".split(),
    )
    run = t.build_run(cfg, t.prepare_corpus(cfg), NeverStop(), t.build_accelerator(cfg))
    t.shrink_residual_projections(run.model)  # as a preset's are; --model-config leaves the model's own
    return run


def thin_out(corpus: Any, every: int) -> Any:
    """The same corpus with one in ``every`` of its held-out documents, for the points of a curve."""
    import numpy as np

    ends = corpus.val_offsets
    kept = range(0, len(ends) - 1, every)
    parts = [np.asarray(corpus.val[ends[index] : ends[index + 1]]) for index in kept]
    return replace(
        corpus,
        val=np.concatenate([corpus.val[: ends[0]], *parts]),
        val_offsets=np.cumsum([ends[0], *map(len, parts)]),
        val_languages=corpus.val_languages[::every],
        val_bytes=corpus.val_bytes[::every],
    )


def learn(corpus: Path, cache: Path, trial: Trial) -> dict[str, Any]:
    """Train once; returns the trial, and validation and training loss every EVALUATE_EVERY steps."""
    import train_h100_dual as t

    with tempfile.TemporaryDirectory() as folder:
        run = build(corpus, cache, Path(folder), trial)
        positions = t.rank_positions(run.cfg, 0, 1, range(trial.steps))
        batches = iter(t.make_loader(run.cfg, run.corpus, positions))
        whole, run.corpus = run.corpus, thin_out(run.corpus, 8)
        curve, losses, skipped = [], [], 0.0
        for step in range(trial.steps):
            loss, _, skip, _ = t.train_step(run, batches, t.learning_rate_at(step, trial.steps, run.cfg)).tolist()
            losses.append(loss)
            skipped += skip
            if (step + 1) % EVALUATE_EVERY == 0:
                curve.append([step + 1, round(t.evaluate(run)["val_loss"], 4), round(statistics.mean(losses), 4)])
                losses = []
                if (step + 1) % 100 == 0:
                    print(f"{time.strftime('%H:%M:%S')} {trial}, seed {trial.seed}: {curve[-1]}", flush=True)
        run.corpus = whole
        figures = t.evaluate(run)
    weights = sum(weight.numel() for weight in run.model.parameters())
    return {**asdict(trial), **figures, "parameters": weights, "skipped": skipped, "curve": curve}


def read_results(path: Path) -> dict[Trial, dict[str, Any]]:
    """The runs that a file of results holds."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = Trial.__dataclass_fields__
    return {Trial(**{name: line[name] for name in names}): line for line in map(json.loads, lines)}


def final_loss(result: dict[str, Any]) -> float:
    """Validation loss after the last step, of all held-out documents; infinite if it came to nothing."""
    return result["val_loss"] if result["val_loss"] == result["val_loss"] else float("inf")


def grids(options: argparse.Namespace) -> list[list[Trial]]:
    """Each optimizer and schedule with each of its learning rates."""
    size = {name: getattr(options, name) for name in ("steps", "batch_size", "vocab_size")}
    return [
        [Trial(optimizer, rate, schedule, **size) for rate in RATES[optimizer]]
        for schedule, optimizer in itertools.product(SCHEDULES, RATES)
    ]


def best(results: dict[Trial, dict[str, Any]], options: argparse.Namespace) -> list[Trial]:
    """Of each grid the trial with the lowest final loss."""
    tried = [[trial for trial in trials if trial in results] for trials in grids(options)]
    return [min(trials, key=lambda trial: final_loss(results[trial])) for trials in tried if trials]


def over_seeds(trial: Trial) -> list[Trial]:
    """The same with each seed."""
    return [replace(trial, seed=seed) for seed in SEEDS]


def compared(chosen: list[Trial]) -> list[Trial]:
    """What is run with each seed: the best of each grid, the default rate, and at the best rates what else differs."""
    cosine = [trial for trial in chosen if trial.schedule == "cosine"]
    return [
        *chosen,
        *(replace(trial, learning_rate=DEFAULT_RATE) for trial in chosen),
        *(replace(trial, qk_norm=True) for trial in cosine),
        *(replace(trial, tied=False) for trial in cosine),
    ]


def run_missing(trials: Iterable[Trial], results: dict[Trial, dict[str, Any]], options: argparse.Namespace) -> None:
    """Run what the results lack, and keep each run as soon as it has ended."""
    left = [trial for trial in trials if trial not in results]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, mp_context=context) as pool:
        running = {pool.submit(learn, options.corpus, options.cache, trial): trial for trial in left}
        for done in as_completed(running):
            trial, result = running[done], done.result()
            results[trial] = result
            with open(options.results, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(result) + "\n")
            print(f"{time.strftime('%H:%M:%S')} {trial}, seed {trial.seed}: {final_loss(result):.4f}", flush=True)


def run_stages(results: dict[Trial, dict[str, Any]], options: argparse.Namespace) -> None:
    """The grids, then what is compared over the seeds."""
    run_missing(itertools.chain(*zip(*grids(options), strict=True)), results, options)
    run_missing(itertools.chain(*map(over_seeds, compared(best(results, options)))), results, options)


def steps_to(curve: list[list[float]], target: float) -> int | None:
    """The first step at which a curve was evaluated at or below a loss."""
    return next((step for step, loss, _ in curve if loss <= target), None)


def report(results: dict[Trial, dict[str, Any]], options: argparse.Namespace) -> None:
    """Print what the results show, as far as they go."""
    chosen = best(results, options)
    print(f"\nFinal validation loss by learning rate, seed {SEEDS[0]}:\n\n{rate_table(results, options)}")
    rows = []
    for trial in compared(chosen):
        found = [results[one] for one in over_seeds(trial) if one in results]
        if found:
            losses, bits = [final_loss(one) for one in found], [one["val_bits_per_byte"] for one in found]
            size = f"{found[0]['parameters'] / 1e6:.2f} M"
            rows.append([str(trial), size, len(found), median_and_range(losses, 4), median_and_range(bits, 4)])
    head = ["", "parameters", "seeds", "validation loss", "bits/byte"]
    print(f"\nOver the seeds, median and range:\n\n{table(head, rows)}")
    adamw, muon = ([trial for trial in chosen if trial.optimizer == name] for name in RATES)
    print("\nSteps to the best AdamW's final loss, on the held-out documents of the curves:\n")
    head = ["", "seed", "its last loss", "", "there at step", "share", "last loss"]
    pairs = [zip(over_seeds(one), over_seeds(other), strict=True) for one, other in itertools.product(adamw, muon)]
    rows = [steps_row(results, *pair) for pair in itertools.chain(*pairs)]
    print(table(head, [row for row in rows if row]))


def rate_table(results: dict[Trial, dict[str, Any]], options: argparse.Namespace) -> str:
    """The final losses of the grids, a row for each learning rate."""
    rates = sorted({rate for rates in RATES.values() for rate in rates})
    rows = []
    for rate in rates:
        trials = [next(trial for trial in trials if trial.learning_rate == rate) for trials in grids(options)]
        rows.append([f"{rate:g}", *(f"{final_loss(results[one]):.4f}" if one in results else "-" for one in trials)])
    return table(["learning rate", *(f"{one.optimizer} {one.schedule}" for one, *_ in grids(options))], rows)


def steps_row(results: dict[Trial, dict[str, Any]], adamw: Trial, muon: Trial) -> list[Any]:
    """When Muon was at AdamW's last loss, with one seed; nothing if one of them was not run."""
    if adamw not in results or muon not in results:
        return []
    target = results[adamw]["curve"][-1][1]
    steps = steps_to(results[muon]["curve"], target)
    share = f"{steps / muon.steps:.2f}" if steps else "-"
    return [adamw, adamw.seed, f"{target:.4f}", muon, steps or "-", share, f"{results[muon]['curve'][-1][1]:.4f}"]


def time_steps(options: argparse.Namespace, rounds: int = 20, block: int = 5) -> None:
    """Print what a step of each optimizer takes, in blocks by turns."""
    import train_h100_dual as t

    steppers, seconds = {}, {name: [] for name in RATES}
    size = {"batch_size": options.batch_size, "vocab_size": options.vocab_size, "steps": (rounds + 1) * block}
    with tempfile.TemporaryDirectory() as folder:
        for name in RATES:
            (Path(folder) / name).mkdir()
            run = build(options.corpus, options.cache, Path(folder) / name, Trial(name, 1e-3, **size))
            positions = t.rank_positions(run.cfg, 0, 1, range(run.cfg.max_steps))
            steppers[name] = (run, iter(t.make_loader(run.cfg, run.corpus, positions)))
        for turn in range(rounds + 1):
            for name, (run, batches) in steppers.items():
                begun = time.perf_counter()
                for _ in range(block):
                    t.train_step(run, batches, 1e-3)
                if turn:  # the first block warms up
                    seconds[name].append((time.perf_counter() - begun) / block)
    ratios = [muon / adamw for adamw, muon in zip(*seconds.values(), strict=True)]
    rows = [[name, median_and_range([1e3 * value for value in values], 1)] for name, values in seconds.items()]
    print(table(["", "step, ms"], [*rows, ["muon / adamw", median_and_range(ratios, 3)]]))


def main() -> None:
    """Run what is missing, or time steps, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=corpus_file)
    parser.add_argument("results", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "learning_cache")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=8, help="rows of 256 tokens a step")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--report", action="store_true", help="only print the tables of what is there")
    parser.add_argument("--time", action="store_true", help="only measure the time of a step")
    options = parser.parse_args()
    if options.time:
        time_steps(options)
    else:
        results = read_results(options.results)
        if not options.report:
            run_stages(results, options)
        report(results, options)
    print("\n" + provenance("torch", "transformers", "accelerate"))


if __name__ == "__main__":
    main()
