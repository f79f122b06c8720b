"""One rank of litgpt as a contestant of ``bench.py``: its own model, loss and ``fit``, through Lightning Fabric.

Runs in litgpt's own environment, so nothing of this project is imported but ``common``, which needs no package.
Usage: bench_litgpt.py TOKENS SETTINGS   (JSON: shape, vocab_size, batch_size, max_seq_length, device, learning_rate)
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from common import HELD_OUT_ROWS, Turns
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.fabric.strategies import DDPStrategy
from litgpt import pretrain
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.utils import chunked_cross_entropy


class CountedBatches:
    """The batches of ``fit``; asking for the next one ends a step."""

    def __init__(self, batches: Any, turns: Turns):
        self.batches, self.turns = batches, turns

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[torch.Tensor]:
        for batch in self.batches:
            yield batch
            self.turns.end_step()


def build(fabric: Fabric, setting: Any) -> tuple[GPT, Any, Any]:
    """The model of the setting as litgpt describes and initialises it: bare, wrapped, and its AdamW."""
    shape = dict(zip(("n_layer", "n_embd", "intermediate_size", "n_head"), setting.shape, strict=True))
    sizes = {"block_size": setting.max_seq_length, "vocab_size": setting.vocab_size}
    llama = {"rotary_percentage": 1.0, "parallel_residual": False, "bias": False, "mlp_class_name": "LLaMAMLP"}
    norm = {"norm_class_name": "RMSNorm", "norm_eps": 1e-5}
    config = Config(name="bench", padded_vocab_size=setting.vocab_size, **shape, **sizes, **llama, **norm)
    fabric.seed_everything(42)
    with fabric.init_module(empty_init=True):
        model = GPT(config)
    pretrain.initialize_weights(fabric, model, config.n_layer, config.n_embd)
    model.transformer.wte.weight = model.lm_head.weight
    model.max_seq_length = setting.max_seq_length
    wrapped = fabric.setup(torch.compile(model))
    rate, fused = setting.learning_rate, setting.device == "cuda"
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=rate, weight_decay=0.1, betas=(0.9, 0.95), fused=fused)
    return model, wrapped, fabric.setup_optimizers(optimizer)


def main() -> None:
    """Train until the driver has seen enough."""
    tokens, setting = Path(sys.argv[1]), SimpleNamespace(**json.loads(sys.argv[2]))
    on_gpu, world_size = setting.device == "cuda", int(os.environ["WORLD_SIZE"])
    if not on_gpu:
        torch.compiler.set_stance("force_eager")  # fit's caller always compiles
    torch.set_float32_matmul_precision("high")
    strategy: Any = "auto" if world_size == 1 else DDPStrategy(cluster_environment=TorchElasticEnvironment())
    precision = "bf16-mixed" if on_gpu else "32-true"
    fabric = Fabric(accelerator=setting.device, devices=world_size, strategy=strategy, precision=precision)
    fabric.launch()
    model, wrapped, optimizer = build(fabric, setting)
    length = setting.max_seq_length
    stream = np.memmap(tokens, np.uint16, "r")
    count = (len(stream) - 1) // length

    def read_rows(numbers: Sequence[int]) -> torch.Tensor:
        rows = (stream[length * number : length * (number + 1) + 1] for number in numbers)
        return torch.from_numpy(np.stack([*rows]).astype(np.int64))

    trained, held = range(count - HELD_OUT_ROWS), read_rows(range(count - HELD_OUT_ROWS, count)).to(fabric.device)
    loader = torch.utils.data.DataLoader(trained, setting.batch_size, drop_last=True, collate_fn=read_rows)

    @torch.no_grad()
    def final_loss() -> float:
        losses = [chunked_cross_entropy(model(row[None, :-1]), row[None, 1:]).item() for row in held]
        return sum(losses) / len(losses)

    turns = Turns(final_loss, torch.cuda if on_gpu else None)
    rows_a_step = setting.batch_size * world_size  # one micro-step a step, and no end but the driver's
    batch = {"global_batch_size": rows_a_step, "micro_batch_size": setting.batch_size, "max_seq_length": length}
    steps = {"max_tokens": 10**12, "save_interval": None, "log_interval": 10, "lr_warmup_steps": 0}
    pretrain.fit(
        fabric=fabric,
        devices=world_size,
        state={"model": wrapped, "optimizer": optimizer, "iter_num": 0, "step_count": 0},
        train_dataloader=CountedBatches(fabric.setup_dataloaders(loader), turns),
        val_dataloader=[held[: setting.batch_size]],  # fit tries it once before it trains
        out_dir=tokens.parent,
        tokenizer_dir=None,
        train=TrainArgs(**batch, **steps, max_norm=1.0, min_lr=setting.learning_rate, tie_embeddings=True),
        eval=EvalArgs(interval=10**9, max_iters=1),
    )


if __name__ == "__main__":
    main()
