"""One rank of litgpt as a contestant of ``bench.py``: its own model, loss and ``fit``, through Lightning Fabric.

Runs in litgpt's own environment, so nothing of this project is imported but ``turns``, which needs no package.
Usage: bench_litgpt.py TOKENS SETTINGS   (settings as JSON: shape, vocab_size, batch_size, max_seq_length, ...)
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.fabric.strategies import DDPStrategy
from litgpt import pretrain
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.utils import chunked_cross_entropy
from turns import Turns, peak_memory_mib

HELD_OUT_ROWS = 16


class Rows(torch.utils.data.Dataset):
    """Rows of ``max_seq_length + 1`` tokens of the driver's stream, without what is held out."""

    def __init__(self, tokens: Path, length: int):
        self.stream, self.length = np.memmap(tokens, np.uint16, "r"), length
        self.count = (len(self.stream) - 1) // length - HELD_OUT_ROWS

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        start = index * self.length
        return torch.from_numpy(self.stream[start : start + self.length + 1].astype(np.int64))


class CountedBatches:
    """The batches of ``fit``; asking for the next one ends a step."""

    def __init__(self, batches: Any, turns: Turns):
        self.batches, self.turns, self.begun = batches, turns, False

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[torch.Tensor]:
        for batch in self.batches:
            if self.begun:
                self.turns.end_step()
            self.begun = True
            yield batch


def model_shape(settings: dict[str, Any]) -> Config:
    """The model of the settings, as litgpt describes it."""
    return Config(
        name="bench",
        block_size=settings["max_seq_length"],
        vocab_size=settings["vocab_size"],
        padded_vocab_size=settings["vocab_size"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=1e-5,
        mlp_class_name="LLaMAMLP",
        **settings["shape"],
    )


def train_arguments(settings: dict[str, Any], world_size: int) -> TrainArgs:
    """One micro-step a step, and no end but the driver's."""
    return TrainArgs(
        global_batch_size=settings["batch_size"] * world_size,
        micro_batch_size=settings["batch_size"],
        max_tokens=10**12,
        max_norm=1.0,
        save_interval=None,
        log_interval=10,
        lr_warmup_steps=0,
        min_lr=settings["learning_rate"],
        max_seq_length=settings["max_seq_length"],
        tie_embeddings=True,
    )


def main() -> None:
    """Train until the driver has seen enough."""
    tokens, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    on_gpu, world_size = settings["device"] == "cuda", int(os.environ["WORLD_SIZE"])
    if not settings["compile"]:
        torch.compiler.set_stance("force_eager")  # fit's caller always compiles
    precision = "bf16-mixed" if settings["precision"] == "bf16" else "32-true"
    torch.set_float32_matmul_precision("high")
    strategy: Any = "auto" if world_size == 1 else DDPStrategy(cluster_environment=TorchElasticEnvironment())
    accelerator = "cuda" if on_gpu else "cpu"
    fabric = Fabric(accelerator=accelerator, devices=world_size, strategy=strategy, precision=precision)
    fabric.launch()
    length, batch_size = settings["max_seq_length"], settings["batch_size"]
    config = model_shape(settings)
    fabric.seed_everything(42)
    with fabric.init_module(empty_init=True):
        model = GPT(config)
    pretrain.initialize_weights(fabric, model, config.n_layer, config.n_embd)
    model.transformer.wte.weight = model.lm_head.weight
    model.max_seq_length = length
    bare = model
    model = fabric.setup(torch.compile(model))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings["learning_rate"], weight_decay=0.1, betas=(0.9, 0.95), fused=on_gpu
    )
    optimizer = fabric.setup_optimizers(optimizer)
    rows = Rows(tokens, length)
    loader = fabric.setup_dataloaders(torch.utils.data.DataLoader(rows, batch_size=batch_size, drop_last=True))

    held = torch.stack([rows[rows.count + index] for index in range(HELD_OUT_ROWS)]).to(fabric.device)

    @torch.no_grad()
    def final_loss() -> float:
        losses = [chunked_cross_entropy(bare(row[None, :-1]), row[None, 1:]).item() for row in held]
        return sum(losses) / len(losses)

    def memory() -> float:
        return torch.cuda.max_memory_allocated() / 2**20 if on_gpu else peak_memory_mib()

    turns = Turns(final_loss, torch.cuda.synchronize if on_gpu else lambda: None, memory)
    pretrain.fit(
        fabric=fabric,
        devices=world_size,
        state={"model": model, "optimizer": optimizer, "iter_num": 0, "step_count": 0},
        train_dataloader=CountedBatches(loader, turns),
        val_dataloader=[held[:batch_size]],  # fit tries it once before it trains
        out_dir=tokens.parent,
        tokenizer_dir=None,
        train=train_arguments(settings, world_size),
        eval=EvalArgs(interval=10**9, max_iters=1, initial_validation=False, final_validation=False),
    )


if __name__ == "__main__":
    main()
