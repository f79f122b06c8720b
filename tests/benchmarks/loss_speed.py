"""A training step and its memory with the loss of this script, against all logits and ``F.cross_entropy``.

Same weights, rows and optimizer in one process, taking turns; a step is forward, backward, clipping and AdamW.
The gain in memory is counted without computing: every tensor's storage, from its making to its end.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from common import ROOT, Words, median_and_range, provenance, table
from torch._subclasses import FakeTensorMode

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_memory import LiveTensors  # noqa: E402

import train_h100_dual as t  # noqa: E402

SHAPES = {
    "tiny": (t.PRESETS["tiny"], 2048, 256),
    "tiny, vocabulary 16,384": (t.PRESETS["tiny"], 16384, 256),
    "30M": (t.Preset(8, 384, 1152, 64), 16384, 256),
}


class PlainLoss(torch.nn.Module):
    """The loss as it was: all logits, then their cross entropy."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        logits = self.model(input_ids=rows[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def settings(preset: t.Preset, vocabulary: int, length: int) -> Any:
    """A CPU run of this shape with a batch of 4."""
    t.PRESETS["tiny"] = preset
    words = f"--train --device cpu --model-size tiny --vocab-size {vocabulary} --max-seq-length {length}"
    return t.resolve_config(t.parse_args(words.split()), "cpu")[0]


def step(loss: torch.nn.Module, optimizer: Any, rows: torch.Tensor) -> float:
    """One step; returns its seconds of computing, over both threads, which a busy machine doesn't stretch."""
    begun = time.process_time()
    loss(rows).backward()
    torch.nn.utils.clip_grad_norm_(loss.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return time.process_time() - begun


def peak(cfg: Any, kind: type) -> int:
    """Peak of the second step in bytes, without computing anything."""
    with FakeTensorMode(), LiveTensors() as live:
        model = t.build_model(cfg, Words(cfg.vocab_size))
        optimizer = t.build_optimizer(model, cfg)
        loss = kind(model)
        for _ in range(2):
            live.peak = 0
            step(loss, optimizer, torch.zeros(cfg.batch_size, cfg.max_seq_length + 1, dtype=torch.int64))
        return live.peak


def main() -> None:
    """Print a Markdown table and where it comes from."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=20, help="turns of each")
    parser.add_argument("--steps", type=int, default=3, help="steps a turn")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES), help="which of them")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    lines = []
    for name in arguments.models:
        cfg = settings(*SHAPES[name])
        rows = torch.randint(0, cfg.vocab_size, (cfg.batch_size, cfg.max_seq_length + 1))
        sides = []
        for kind in (PlainLoss, t.LMWithLoss):
            model = t.build_model(cfg, Words(cfg.vocab_size))
            sides.append((kind(model), t.build_optimizer(model, cfg), []))
        for block in range(arguments.blocks + 1):
            for loss, optimizer, times in sides if block % 2 else reversed(sides):
                taken = statistics.mean(step(loss, optimizer, rows) for _ in range(arguments.steps))
                if block:  # the first warms up
                    times.append(1e3 * taken)
        plain, ours = (times for _, _, times in sides)
        ratio = [before / after for before, after in zip(plain, ours, strict=True)]
        t.has_plain_head = lambda model: True  # tensors without values can't be looked at
        sizes = [f"{peak(replace(cfg), kind) / 1e6:,.0f}" for kind in (PlainLoss, t.LMWithLoss)]
        lines.append([name, median_and_range(plain, 0), median_and_range(ours, 0), median_and_range(ratio), *sizes])
    print(
        table(["model", "before, CPU ms a step", "now, CPU ms a step", "before / now", "before, MB", "now, MB"], lines)
    )
    print("\n" + provenance("torch", "transformers"))


if __name__ == "__main__":
    main()
