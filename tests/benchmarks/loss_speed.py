"""A training step with the loss of this script, against all logits and ``F.cross_entropy``.

Same weights, rows and optimizer in one process, taking turns; a step is forward, backward, clipping and AdamW.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from common import Words, median_and_range, provenance, ratios, table, take_turns

import train_h100_dual as t

SHAPES = {
    "tiny": (t.PRESETS["tiny"], 2048),
    "tiny, vocabulary 16,384": (t.PRESETS["tiny"], 16384),
    "30M": (t.Preset(8, 384, 1152, 64), 16384),
}


class PlainLoss(torch.nn.Module):
    """The loss as it was: all logits, then their cross entropy."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        logits = self.model(input_ids=rows[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def step(loss: torch.nn.Module, optimizer: torch.optim.Optimizer, rows: torch.Tensor) -> float:
    """One step; returns its ms of computing, over both threads, which a busy machine doesn't stretch."""
    begun = time.process_time()
    loss(rows).backward()
    torch.nn.utils.clip_grad_norm_(loss.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return 1e3 * (time.process_time() - begun)


def compare(name: str, blocks: int, steps: int) -> list[Any]:
    """One model's line: both losses by turns."""
    t.PRESETS["tiny"], vocabulary = SHAPES[name]
    words = f"--train --device cpu --model-size tiny --vocab-size {vocabulary} --max-seq-length 256"
    cfg = t.resolve_config(t.parse_args(words.split()), "cpu")[0]
    rows = torch.randint(0, cfg.vocab_size, (cfg.batch_size, cfg.max_seq_length + 1))
    calls = {}
    for kind in (PlainLoss, t.LMWithLoss):
        model = t.build_model(cfg, Words(cfg.vocab_size))
        side = (kind(model), t.build_optimizer(model, cfg), rows)
        calls[kind] = lambda side=side: statistics.mean(step(*side) for _ in range(steps))
    before, now = take_turns(calls, blocks, warm_up=1).values()
    return [name, median_and_range(before, 0), median_and_range(now, 0), ratios(before, now, 2)]


def main() -> None:
    """Print a Markdown table and where it comes from."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=20, help="turns of each")
    parser.add_argument("--steps", type=int, default=3, help="steps a turn")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES), help="which of them")
    options = parser.parse_args()
    torch.set_num_threads(2)
    rows = [compare(name, options.blocks, options.steps) for name in options.models]
    head = ["model", "before, CPU ms a step", "now, CPU ms a step", "before / now (95 %)"]
    print(table(head, rows), provenance("torch", "transformers"), sep="\n\n")


if __name__ == "__main__":
    main()
