#!/usr/bin/env python3
"""Train the run that the options describe with Hugging Face's Trainer and compare its held-out losses with ours.

Corpus, tokenizer, initial weights, tokens per step, optimizer, schedule and evaluation are those of
``train_h100_dual.py``; the loop, the order of rows and the loss are Trainer's.  See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
import transformers
from common import provenance, table
from samples import NeverStop

import train_h100_dual as t

FIGURES = [f"{name}{suffix}" for name in ("val_loss", "val_bits_per_byte") for suffix in ("", "_ko", "_en")]
SCHEDULES = {"wsd": "warmup_stable_decay", "constant": "constant_with_warmup"}  # the others have our names


class RowsInOrder(torch.utils.data.Dataset):
    """The first ``count`` rows of our run, in its order, as others read them: labels are the row itself."""

    def __init__(self, cfg: t.TrainConfig, corpus: t.Corpus, count: int):
        self.corpus, self.length, self.count = corpus, cfg.max_seq_length, count
        self.order = t.RowOrder([corpus.domains[0].rows(self.length)], [t.MIX_WINDOW], cfg.seed)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """The row at a position, one token longer than its targets: Trainer shifts the labels itself."""
        row = t.read_rows(self.corpus, *self.order(np.array([index])), self.length)[0]
        return {"input_ids": row, "labels": row}


class AfterStep(transformers.TrainerCallback):
    """Calls a function with Trainer's arguments and state after each step."""

    def __init__(self, call: Callable[[Any, Any], None]):
        self.call = call

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.call(args, state)


def build_trainer(
    cfg: t.TrainConfig, steps: int, model: torch.nn.Module, rows: Any, call: Callable, order: str = "random"
) -> transformers.Trainer:
    """A Trainer with our options, which prints nothing; whatever has no counterpart there keeps its default."""
    if cfg.optimizer != "adamw":
        sys.exit(f"--optimizer {cfg.optimizer}: give --optimizer adamw, which Trainer has too")
    transformers.utils.logging.set_verbosity_error()
    decay = round((steps - math.ceil(cfg.warmup_ratio * steps)) * cfg.decay_ratio)
    args = transformers.TrainingArguments(
        output_dir=str(cfg.output_dir),
        max_steps=steps,
        per_device_train_batch_size=cfg.batch_size,
        gradient_accumulation_steps=cfg.gradient_accumulation_steps,
        learning_rate=cfg.learning_rate,
        lr_scheduler_type=SCHEDULES.get(cfg.lr_schedule, cfg.lr_schedule),
        lr_scheduler_kwargs={"num_decay_steps": decay, "decay_type": "linear"} if cfg.lr_schedule == "wsd" else None,
        warmup_steps=cfg.warmup_ratio,  # below 1 it is a share of all steps
        weight_decay=cfg.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=cfg.max_grad_norm,
        bf16=cfg.precision == "bf16",
        torch_compile=cfg.compile,
        use_cpu=cfg.device == "cpu",
        ddp_find_unused_parameters=False,  # as ours; it changes no figure and quiets a warning
        seed=cfg.seed,
        train_sampling_strategy=order,
        logging_steps=cfg.logging_steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model=model, args=args, train_dataset=rows, callbacks=[AfterStep(call)])
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def comparison(ours: dict[int, dict[str, float]], trainer: dict[int, dict[str, float]]) -> str:
    """The evaluations side by side, and the ratio of the last losses."""
    rows = []
    for step in sorted(set(ours) & set(trainer)):
        for name, run in (("ours", ours), ("Trainer", trainer)):
            figures = [run[step].get(figure) for figure in FIGURES]  # None for a language that wasn't held out
            rows.append([step, name, *("-" if figure is None else f"{figure:.4f}" for figure in figures)])
    last, end = max(ours), max(trainer)
    verdict = "" if last == end else f" (at steps {last} and {end}: NOT the same)"
    ratio = f"final val_loss, ours / Trainer: {ours[last]['val_loss'] / trainer[end]['val_loss']:.4f}{verdict}"
    return f"{table(['step', 'run', *(name.removeprefix('val_') for name in FIGURES)], rows)}\n\n{ratio}"


def reached(records: list[dict[str, Any]], loss: float, step_tokens: int) -> tuple[int, float] | None:
    """Our first evaluation that isn't above ``loss``: its step, and the seconds of training until then."""
    step = next((record["step"] for record in records if record.get("val_loss", math.inf) <= loss), None)
    if step is None:
        return None
    seconds, before = 0.0, 0
    for record in records:
        if "tokens_per_second" in record and record["step"] <= step:
            seconds += (record["step"] - before) * step_tokens / record["tokens_per_second"]
            before = record["step"]
    return step, seconds


def main() -> None:
    """Train one rank's share and, on rank 0, print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, epilog="All other options are train_h100_dual.py's."
    )
    parser.add_argument("--ours", type=Path, required=True, metavar="METRICS_JSONL", help="our run's metrics.jsonl")
    own, rest = parser.parse_known_args()
    rank, world_size = t.rank_and_world()
    records = [json.loads(line) for line in own.ours.read_text(encoding="utf-8").splitlines()]
    ours = {record["step"]: record for record in records if "val_loss" in record}
    typed = t.parse_args(rest)
    cfg, _ = t.resolve_config(typed, "cuda" if typed.device != "cpu" and torch.cuda.is_available() else "cpu")
    corpus = t.prepare_corpus(cfg)
    model = t.build_model(cfg, corpus.tokenizer)
    # What evaluate() asks of a Run; Trainer trains these very weights.
    run = SimpleNamespace(cfg=cfg, corpus=corpus, loss_module=t.LMWithLoss(model), stop=NeverStop())
    run.batch_size, evaluations, apart = cfg.batch_size, {}, 0.0  # seconds

    def evaluate(args: Any, state: Any) -> None:
        nonlocal apart
        if state.global_step % cfg.eval_steps == 0 or state.global_step == state.max_steps:
            run.accelerator, evaluating = trainer.accelerator, time.perf_counter()
            evaluations[state.global_step] = t.evaluate(cast(t.Run, run))
            apart += time.perf_counter() - evaluating

    step_tokens = cfg.tokens_per_step(world_size)
    steps = t.total_steps(cfg, corpus.rows(cfg.max_seq_length), step_tokens)
    rows = RowsInOrder(cfg, corpus, corpus.rows(cfg.max_seq_length))  # an epoch, which Trainer shuffles
    trainer = build_trainer(cfg, steps, model, rows, evaluate)
    begun = time.perf_counter()
    trainer.train()
    seconds, loss = time.perf_counter() - begun - apart, evaluations[steps]["val_loss"]
    if rank == 0:
        first = reached(records, loss, step_tokens)
        ours_first = f"at step {first[0]} ({first[0] / steps:.2f}), {first[1]:.0f} s" if first else "never"
        goal = f"Trainer's last val_loss, {loss:.4f}: {steps} steps, {seconds:.0f} s of training; ours: {ours_first}"
        print(comparison(ours, evaluations), goal, provenance("torch", "transformers"), sep="\n\n")


if __name__ == "__main__":
    main()
