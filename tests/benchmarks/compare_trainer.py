#!/usr/bin/env python3
"""Train the run that the options describe with Hugging Face's Trainer and compare its held-out losses with ours.

Corpus, tokenizer, initial weights, tokens per step, optimizer, schedule and evaluation are those of
``train_h100_dual.py``; the loop, the order of rows and the loss are Trainer's.  See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_h100_dual as ours

FIGURES = [f"{name}{suffix}" for name in ("val_loss", "val_bits_per_byte") for suffix in ("", "_ko", "_en")]
SCHEDULES = {
    "wsd": "warmup_stable_decay",
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant_with_warmup",
}


class Rows(torch.utils.data.Dataset):
    """The packed rows of the training stream as Trainer reads them: labels are the row itself."""

    def __init__(self, corpus: ours.Corpus, max_seq_length: int):
        self.stream, self.length, self.count = corpus.streams[0], max_seq_length, corpus.rows(max_seq_length)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return one token more than ``max_seq_length``: Trainer's shift leaves as many targets as ours has."""
        start = index * self.length
        row = torch.from_numpy(self.stream[start : start + self.length + 1].astype("int64"))
        return {"input_ids": row, "labels": row}


class Recorder(transformers.TrainerCallback):
    """Writes Trainer's logs and, every ``eval_steps`` and at the end, our evaluation of its model."""

    def __init__(self, cfg: ours.TrainConfig, corpus: ours.Corpus, decoder: torch.nn.Module, path: Path):
        self.cfg, self.corpus, self.path = cfg, corpus, path
        self.loss_module = ours.LMWithLoss(decoder)  # Trainer trains these very weights
        self.evaluations: dict[int, dict[str, float]] = {}

    def write(self, record: dict[str, Any]) -> None:
        """Append a line to the results; rank 0 only."""
        if ours.rank_and_world()[0] == 0:
            with open(self.path, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(record) + "\n")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **more: Any) -> None:
        """Keep the training loss, the learning rate and the gradient norm."""
        if logs and "loss" in logs:
            self.write(
                {"step": state.global_step, **{name: logs.get(name) for name in ("loss", "learning_rate", "grad_norm")}}
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Evaluate with the script's own function, on all ranks."""
        if state.global_step % self.cfg.eval_steps and state.global_step != state.max_steps:
            return
        # What evaluate() asks of a Run; the accelerator's process state is one for the whole process.
        run = SimpleNamespace(
            cfg=self.cfg,
            corpus=self.corpus,
            loss_module=self.loss_module,
            stop=SimpleNamespace(mark=lambda: None),
            accelerator=SimpleNamespace(
                num_processes=args.world_size, process_index=args.process_index, device=args.device
            ),
        )
        figures = ours.evaluate(cast(ours.Run, run))
        self.evaluations[state.global_step] = figures
        self.write({"step": state.global_step, **figures})


def training_arguments(cfg: ours.TrainConfig, steps: int) -> transformers.TrainingArguments:
    """Translate our options; whatever has no counterpart there keeps Trainer's default."""
    if cfg.optimizer != "adamw":
        sys.exit(f"--optimizer {cfg.optimizer}: give --optimizer adamw, which Trainer has too")
    decay = round((steps - math.ceil(cfg.warmup_ratio * steps)) * ours.WSD_DECAY)
    return transformers.TrainingArguments(
        output_dir=str(cfg.output_dir),
        max_steps=steps,
        per_device_train_batch_size=cfg.batch_size,
        gradient_accumulation_steps=cfg.gradient_accumulation_steps,
        learning_rate=cfg.learning_rate,
        lr_scheduler_type=SCHEDULES[cfg.lr_schedule],
        lr_scheduler_kwargs={"num_decay_steps": decay, "decay_type": "linear"} if cfg.lr_schedule == "wsd" else None,
        warmup_steps=cfg.warmup_ratio,  # below 1 it is a share of all steps
        weight_decay=cfg.weight_decay,
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_epsilon=1e-8,
        max_grad_norm=cfg.max_grad_norm,
        bf16=cfg.precision == "bf16",
        fp16=cfg.precision == "fp16",
        torch_compile=cfg.compile,
        use_cpu=cfg.device == "cpu",
        ddp_find_unused_parameters=False,  # as ours; it changes no figure and quiets a warning
        dataloader_num_workers=cfg.num_workers,
        seed=cfg.seed,
        logging_steps=cfg.logging_steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def read_evaluations(path: Path) -> dict[int, dict[str, float]]:
    """The evaluations in a run's metrics.jsonl, by step."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {record["step"]: record for record in records if "val_loss" in record}


def print_table(runs: dict[str, dict[int, dict[str, float]]]) -> None:
    """Print the evaluations of each run side by side, and the ratio of the last losses where there are two."""
    print(f"{'step':>6}  {'run':<8}" + "".join(f"{name.removeprefix('val_'):>18}" for name in FIGURES))
    for step in sorted(set.intersection(*(set(found) for found in runs.values()))):
        for name, found in runs.items():
            values = (found[step].get(figure) for figure in FIGURES)
            print(f"{step:>6}  {name:<8}" + "".join(f"{'-' if v is None else format(v, '.4f'):>18}" for v in values))
    if "ours" in runs:
        last = {name: found[max(found)]["val_loss"] for name, found in runs.items()}
        steps = {name: max(found) for name, found in runs.items()}
        if len(set(steps.values())) > 1:
            print(f"the runs end at different steps: {steps}")
        print(f"final val_loss, ours / Trainer: {last['ours'] / last['Trainer']:.4f}")


def main() -> None:
    """Train one rank's share and, on rank 0, print and keep the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, epilog="All other options are train_h100_dual.py's."
    )
    parser.add_argument("--ours", type=Path, metavar="METRICS_JSONL", help="our run's metrics.jsonl, to print beside")
    own, rest = parser.parse_known_args()
    if len(sys.argv) == 1:
        parser.error("give the options of the run to compare with; README.md has the whole command")
    rank, world_size = ours.rank_and_world()
    try:
        cfg, _ = ours.set_up_config(rest)
        if world_size == 1:  # as many rows a step as the two processes have
            cfg = replace(cfg, batch_size=2 * cfg.batch_size)
        corpus = ours.prepare_corpus(cfg)
    except (ours.UsageProblem, ours.EnvironmentProblem, FileNotFoundError) as error:
        sys.exit(str(error))
    transformers.utils.logging.set_verbosity_error()
    steps = ours.total_steps(cfg, corpus.rows(cfg.max_seq_length), cfg.tokens_per_step(world_size))
    args = training_arguments(cfg, steps)
    decoder = ours.build_model(cfg, corpus.tokenizer)
    cfg.output_dir.mkdir(parents=True, exist_ok=True)
    path = cfg.output_dir / "trainer_metrics.jsonl"
    recorder = Recorder(cfg, corpus, decoder, path)
    recorder.write({"transformers": transformers.__version__, "world_size": world_size, **ours.options_of(cfg)})
    trainer = transformers.Trainer(
        model=decoder, args=args, train_dataset=Rows(corpus, cfg.max_seq_length), callbacks=[recorder]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    if rank == 0:
        runs = {"Trainer": recorder.evaluations}
        if own.ours:
            runs = {"ours": read_evaluations(own.ours), **runs}
        print_table(runs)
        print(f"Trainer's figures: {os.path.relpath(path)}")


if __name__ == "__main__":
    main()
