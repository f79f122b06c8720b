"""One rank of one contestant of ``bench.py``, which starts it: ours, Hugging Face's Trainer, or a bare DDP loop.

Usage: bench_worker.py ours|trainer|bare TOKENS FOLDER OPTION...   (options of train_h100_dual.py)
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from common import ROOT, Words
from turns import Turns

sys.path.insert(0, str(ROOT))
import train_h100_dual as t

HELD_OUT_ROWS = 16


def open_tokens(path: Path, cfg: t.TrainConfig) -> t.Corpus:
    """The driver's stream of tokens as a corpus; without held-out documents a run evaluates nothing."""
    stream = np.memmap(path, np.uint16, "r")
    held = HELD_OUT_ROWS * cfg.max_seq_length + 1
    report = {"train_tokens": len(stream) - held, "languages": [], "fingerprint": ""}
    none = np.zeros(1, np.int64)
    words = Words(cfg.vocab_size)
    return t.Corpus(path.parent, words, (stream[:-held],), stream[-held:], none, none[:0], none[:0], report)


@torch.no_grad()
def held_out_loss(cfg: t.TrainConfig, corpus: t.Corpus, decoder: torch.nn.Module) -> float:
    """Loss on the end of the stream, which nobody trains on; the same function for every contestant."""
    loss, rows = t.LMWithLoss(decoder), t.PackedRows((corpus.val,), cfg.max_seq_length)
    device = next(decoder.parameters()).device
    losses = []
    with torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16"):
        for row in range(HELD_OUT_ROWS):
            losses.append(loss(rows.read([(0, row)]).to(device)).item())
    return sum(losses) / len(losses)


def make_turns(cfg: t.TrainConfig, corpus: t.Corpus, decoder: torch.nn.Module) -> Turns:
    """The conversation with the driver, for the device of a run."""

    def final_loss() -> float:
        return held_out_loss(cfg, corpus, decoder)

    if cfg.device == "cpu":
        return Turns(final_loss)
    return Turns(final_loss, torch.cuda.synchronize, lambda: torch.cuda.max_memory_allocated() / 2**20)


class RowsInOrder(torch.utils.data.Dataset):
    """The rows of our run, in its order, as the others read them: labels are the row itself."""

    def __init__(self, cfg: t.TrainConfig, corpus: t.Corpus):
        self.rows, self.order = t.PackedRows(corpus.streams, cfg.max_seq_length), t.row_order(cfg, corpus)
        self.count = cfg.max_steps * cfg.batch_size * cfg.gradient_accumulation_steps * t.rank_and_world()[1]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """The row at a position, one token longer than its targets: Trainer shifts the labels itself."""
        place = next(zip(*self.order(np.array([index])), strict=True))
        row = self.rows.read([place])[0]
        return {"input_ids": row, "labels": row}


# --- ours ---


class TurnTaking(t.StopFlag):
    """The real stop flag, which hears of every step and is never set."""

    turns: Turns

    def heartbeat(self, step: int | None = None) -> None:
        """Note the progress as in a run; a step that has ended is counted."""
        super().heartbeat(step)
        if step is not None:
            self.turns.end_step()


def train_ours(cfg: t.TrainConfig, corpus: t.Corpus) -> None:
    """The script's own ``train``, with all that runs beside it."""
    rank, _ = t.rank_and_world()
    stop = TurnTaking()
    t.set_up_logging(cfg, rank)
    t.Watchdog(cfg, stop, rank).start()
    cfg.output_dir.mkdir(parents=True, exist_ok=True)
    with t.attention_kernels(cfg):
        run = t.build_run(cfg, corpus, stop, t.build_accelerator(cfg))
        stop.defer()
        stop.keep_progress(cfg.output_dir / f".progress-{rank}", 0)
        gc.collect()
        gc.freeze()
        gc.disable()
        stop.turns = make_turns(cfg, corpus, run.model)
        t.train(run, t.TrainState())


# --- Trainer ---


class OrderedTrainer(transformers.Trainer):
    """Trainer without its shuffling, so that every contestant reads the same rows."""

    def _get_train_sampler(self, *arguments: Any, **more: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(cast(Any, self.train_dataset))


class StepCounter(transformers.TrainerCallback):
    """Counts Trainer's steps."""

    def __init__(self, turns: Turns):
        self.turns = turns

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.turns.end_step()


def train_trainer(cfg: t.TrainConfig, corpus: t.Corpus) -> None:
    """The same model with Trainer: attention through SDPA and the loss through labels, as it comes."""
    from compare_trainer import training_arguments

    decoder = t.build_model(cfg, corpus.tokenizer)
    decoder.set_attn_implementation("sdpa")
    transformers.utils.logging.set_verbosity_error()
    args = training_arguments(cfg, cfg.max_steps)
    trainer = OrderedTrainer(model=decoder, args=args, train_dataset=RowsInOrder(cfg, corpus))
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(StepCounter(make_turns(cfg, corpus, decoder)))
    trainer.train()


# --- bare DDP ---


def plain_batches(cfg: t.TrainConfig, corpus: t.Corpus, device: torch.device) -> Iterator[torch.Tensor]:
    """This rank's rows through a plain DataLoader."""
    positions = t.rank_positions(cfg, *t.rank_and_world(), range(cfg.max_steps))
    pinned = device.type == "cuda"
    loader = torch.utils.data.DataLoader(RowsInOrder(cfg, corpus), batch_sampler=positions, pin_memory=pinned)
    for batch in loader:
        yield batch["input_ids"].to(device, non_blocking=True)


def train_bare(cfg: t.TrainConfig, corpus: t.Corpus) -> None:
    """The shortest loop that trains the same model with the same loss on several ranks; no log but the loss."""
    rank = t.rank_and_world()[0]
    device = torch.device(f"cuda:{rank}" if cfg.device == "cuda" else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    model = t.LMWithLoss(t.build_model(cfg, corpus.tokenizer, device))
    optimizer = t.build_optimizer(model, cfg)
    parameters = list(model.parameters())
    if cfg.compile:
        model.compile()
    ddp = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
    half = torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16")
    batches, turns = plain_batches(cfg, corpus, device), make_turns(cfg, corpus, model.model)
    for step in range(1, cfg.max_steps + 1):
        for micro in range(1, cfg.gradient_accumulation_steps + 1):
            ddp.require_backward_grad_sync = micro == cfg.gradient_accumulation_steps
            with half:
                loss = ddp(next(batches)) / cfg.gradient_accumulation_steps
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if step % cfg.logging_steps == 0:
            print(f"step {step}: loss {loss.item() * cfg.gradient_accumulation_steps:.4f}", flush=True)
        turns.end_step()


CONTESTANTS: dict[str, Callable[[t.TrainConfig, t.Corpus], None]] = {
    "ours": train_ours,
    "trainer": train_trainer,
    "bare": train_bare,
}


def main() -> None:
    """Train until the driver has seen enough."""
    name, tokens, folder, *words = sys.argv[1:]
    places = [f"--{kind}-dir={Path(folder) / kind}" for kind in ("cache", "output", "logs")]
    cfg, _ = t.set_up_config([*words, *places])
    CONTESTANTS[name](cfg, open_tokens(Path(tokens), cfg))


if __name__ == "__main__":
    main()
