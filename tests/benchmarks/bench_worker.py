"""One rank of one contestant of ``bench.py``, which starts it: ours, Hugging Face's Trainer, or a bare DDP loop.

Usage: bench_worker.py CONTESTANT TOKENS FOLDER OPTION...   (options of train_h100_dual.py)
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compare_trainer import RowsInOrder, build_trainer
from samples import Words

import train_h100_dual as t

ENOUGH_ROWS = 1 << 30  # the driver ends it earlier
HELD_OUT_ROWS = 16  # at the end of the stream


def open_tokens(path: Path, cfg: t.TrainConfig) -> t.Corpus:
    """The driver's stream of tokens as a corpus; without held-out documents a run evaluates nothing."""
    stream = np.memmap(path, np.uint16, "r")
    held = HELD_OUT_ROWS * cfg.max_seq_length + 1
    report = {"train_tokens": len(stream) - held, "languages": [], "fingerprint": ""}
    train, none = (t.DocumentList(stream, np.array([[0, size], [0, 0]])) for size in (len(stream) - held, 0))
    documents = np.zeros(1, t.DOCUMENT)
    return t.Corpus(path.parent, Words(cfg.vocab_size), documents, (train,), none, np.zeros(0, np.int64), report)


class Turns:
    """One rank's side of the conversation with ``bench.py``: counts its steps, and waits between blocks.

    For each block the driver writes the number of steps to the pipe ``BENCH_IN`` of every rank; rank 0 answers on
    ``BENCH_OUT`` with a line of JSON.  The first step is a block of its own: whatever happens once happens there.
    When the orders end, rank 0 tells the loss on the rows that nobody trained on, and the process ends.
    """

    def __init__(self, cfg: t.TrainConfig, corpus: t.Corpus, model: torch.nn.Module):
        self.cfg, self.model, self.tokens = cfg, model, corpus.domains[0].tokens
        self.orders = open(int(os.environ["BENCH_IN"]), encoding="utf-8")  # noqa: SIM115  (until the process ends)
        self.answers = open(int(os.environ["BENCH_OUT"]), "w", encoding="utf-8")  # noqa: SIM115
        self.begin_block(1)

    def begin_block(self, steps: int) -> None:
        self.left, self.begun, self.cpu_begun = steps, time.perf_counter(), time.process_time()

    def tell(self, **figures: float) -> None:
        """Answer the driver; rank 0 only."""
        if t.rank_and_world()[0] == 0:
            print(json.dumps(figures), file=self.answers, flush=True)

    def peak_memory(self) -> float:
        """The most MiB that this process ever held, on the GPU if it uses one."""
        if self.cfg.device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

    @torch.no_grad()
    def final_loss(self) -> float:
        length, device = self.cfg.max_seq_length, next(self.model.parameters()).device
        tokens = torch.from_numpy(self.tokens[-HELD_OUT_ROWS * length - 1 :].astype(np.int64))
        rows, loss = tokens.unfold(0, length + 1, length).to(device), t.LMWithLoss(self.model)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.cfg.precision == "bf16"):
            return sum(loss(row[None]).item() for row in rows) / len(rows)

    def end_step(self) -> None:
        """Count a step; after a block's last one report it and wait for the next turn."""
        self.left -= 1
        if self.left:
            return
        if self.cfg.device == "cuda":
            torch.cuda.synchronize()
        seconds, cpu_seconds = time.perf_counter() - self.begun, time.process_time() - self.cpu_begun
        self.tell(seconds=seconds, cpu_seconds=cpu_seconds, memory_mib=self.peak_memory())
        order = self.orders.readline()
        if not order:  # the driver has seen enough, or is gone
            if t.rank_and_world()[0] == 0:
                self.tell(loss=self.final_loss())
            os._exit(0)
        self.begin_block(int(order))


def train_ours(cfg: t.TrainConfig, corpus: t.Corpus) -> None:
    """The script's own loop, with all that runs beside it; a call of ``train_step`` ends a step."""
    stop = t.StopFlag()
    t.set_up_logging(cfg, t.rank_and_world()[0])
    cfg.output_dir.mkdir(parents=True, exist_ok=True)
    with t.attention_kernels(cfg.attention):
        run = t.build_run(cfg, corpus, stop, t.build_accelerator(cfg))
        stop.arm(cfg.hang_timeout, sys.stderr)
        stop.listen()
        turns, train_step = Turns(cfg, corpus, run.model), t.train_step

        def counted_step(*arguments: Any) -> torch.Tensor:
            stats = train_step(*arguments)
            turns.end_step()
            return stats

        t.train_step = counted_step
        t.train_quietly(run, t.TrainState())


def train_trainer(cfg: t.TrainConfig, corpus: t.Corpus) -> None:
    """The same model and rows with Trainer: attention through SDPA and the loss through labels, as it comes."""
    model = t.build_model(cfg, corpus.tokenizer)
    model.set_attn_implementation("sdpa")
    rows, turns = RowsInOrder(cfg, corpus, ENOUGH_ROWS), Turns(cfg, corpus, model)
    build_trainer(cfg, cfg.max_steps, model, rows, lambda args, state: turns.end_step(), "sequential").train()


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
    turns = Turns(cfg, corpus, model.model)
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
