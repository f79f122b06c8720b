"""One rank of one contestant of ``bench.py``, which starts it: ours, Hugging Face's Trainer, or a bare DDP loop.

Usage: bench_worker.py CONTESTANT TOKENS FOLDER OPTION...   (options of train_h100_dual.py)
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from common import HELD_OUT_ROWS, Turns, Words
from compare_trainer import RowsInOrder, build_trainer

import train_h100_dual as t

ENOUGH_ROWS = 1 << 30  # the driver ends it earlier


def open_tokens(path: Path, cfg: t.TrainConfig) -> t.Corpus:
    """The driver's stream of tokens as a corpus; without held-out documents a run evaluates nothing."""
    stream = np.memmap(path, np.uint16, "r")
    held = HELD_OUT_ROWS * cfg.max_seq_length + 1
    report = {"train_tokens": len(stream) - held, "languages": [], "fingerprint": ""}
    train, none = (t.DocumentList(stream, np.array([[0, size], [0, 0]])) for size in (len(stream) - held, 0))
    documents = np.zeros(1, t.DOCUMENT)
    return t.Corpus(path.parent, Words(cfg.vocab_size), documents, (train,), none, np.zeros(0, np.int64), report)


def make_turns(cfg: t.TrainConfig, corpus: t.Corpus, model: torch.nn.Module) -> Turns:
    """The conversation with the driver; its last word is the loss on the rows that nobody trained on."""
    stream, size = corpus.domains[0].tokens, HELD_OUT_ROWS * cfg.max_seq_length
    windows = np.lib.stride_tricks.sliding_window_view(stream[-size - 1 :], cfg.max_seq_length + 1)
    rows = torch.from_numpy(windows[:: cfg.max_seq_length].astype(np.int64))

    @torch.no_grad()
    def final_loss() -> float:
        loss, device = t.LMWithLoss(model), next(model.parameters()).device
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16"):
            return sum(loss(row[None].to(device)).item() for row in rows) / len(rows)

    return Turns(final_loss, torch.cuda if cfg.device == "cuda" else None)


def train_ours(cfg: t.TrainConfig, corpus: t.Corpus) -> None:
    """The script's own ``train``, with all that runs beside it; a call of ``train_step`` ends a step."""
    stop = t.StopFlag()
    t.set_up_logging(cfg, t.rank_and_world()[0])
    cfg.output_dir.mkdir(parents=True, exist_ok=True)
    with t.attention_kernels(cfg.attention):
        run = t.build_run(cfg, corpus, stop, t.build_accelerator(cfg))
        stop.arm(cfg.hang_timeout, sys.stderr)
        stop.listen()
        gc.collect()
        gc.freeze()
        gc.disable()
        turns, train_step = make_turns(cfg, corpus, run.model), t.train_step

        def counted_step(*arguments: Any) -> torch.Tensor:
            stats = train_step(*arguments)
            turns.end_step()
            return stats

        t.train_step = counted_step
        t.train(run, t.TrainState())


class OrderedTrainer(transformers.Trainer):
    """Trainer without its shuffling, so that every contestant reads the same rows."""

    def _get_train_sampler(self, *arguments: Any, **more: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(cast(Any, self.train_dataset))


def train_trainer(cfg: t.TrainConfig, corpus: t.Corpus) -> None:
    """The same model with Trainer: attention through SDPA and the loss through labels, as it comes."""
    model = t.build_model(cfg, corpus.tokenizer)
    model.set_attn_implementation("sdpa")
    rows, turns = RowsInOrder(cfg, corpus, ENOUGH_ROWS), make_turns(cfg, corpus, model)
    build_trainer(OrderedTrainer, cfg, cfg.max_steps, model, rows, lambda args, state: turns.end_step()).train()


def train_bare(cfg: t.TrainConfig, corpus: t.Corpus) -> None:
    """The shortest loop that trains the same model with the same loss on several ranks; no log but the loss."""
    rank, world_size = t.rank_and_world()
    on_gpu = cfg.device == "cuda"
    device = torch.device(f"cuda:{rank}" if on_gpu else "cpu")
    if on_gpu:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
    model = t.LMWithLoss(t.build_model(cfg, corpus.tokenizer, device))
    optimizer = t.build_optimizer(model.model, cfg)
    if cfg.compile:
        model.compile()
    ddp = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
    positions = t.rank_positions(cfg, rank, world_size, range(cfg.max_steps))
    rows = RowsInOrder(cfg, corpus, ENOUGH_ROWS)
    loader = torch.utils.data.DataLoader(rows, batch_sampler=positions, pin_memory=on_gpu)
    turns = make_turns(cfg, corpus, model.model)
    for step, batch in enumerate(loader, 1):
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16"):
            loss = ddp(batch["input_ids"].to(device, non_blocking=True))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if step % cfg.logging_steps == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
        turns.end_step()


def main() -> None:
    """Train until the driver has seen enough."""
    name, tokens, folder, *words = sys.argv[1:]
    places = [f"--{kind}-dir={Path(folder) / kind}" for kind in ("cache", "output", "logs")]
    typed = t.parse_args([*words, *places])
    cfg, _ = t.resolve_config(typed, typed.device)
    train = {"HF Trainer": train_trainer, "bare DDP": train_bare}.get(name, train_ours)
    train(cfg, open_tokens(Path(tokens), cfg))


if __name__ == "__main__":
    main()
