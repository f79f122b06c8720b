"""The recipe by measurement: Step Law's rate against grids, Muon against AdamW, the decay, the batch, cheap gains.

    nice -n 19 python tests/benchmarks/recipe.py CORPUS RESULTS.jsonl [--stages grid,share]
    python tests/benchmarks/recipe.py CORPUS RESULTS.jsonl --analyse

The most important runs come first; one that has ended is a line of RESULTS.jsonl and isn't run again, so the command
may be cut off and goes on when it is given again.  Initial weights, learning rates, Newton-Schulz, corpus and order of
rows are the product's; ``--check`` holds the rest against the product's own steps.  On a GPU, which a small model
alone leaves idle, runs of one kind train side by side as one model with a dimension more.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import Words, config, corpus_file, median_and_range, provenance, table

import train_h100_dual as t

LENGTH, VOCABULARY, ROWS, HELD_OUT_ROWS = 256, 4096, 50_000, 128
# Shape, tokens of a run, rows of a step: about Step Law's 0.58 * D^0.571 tokens.
SIZES = {
    "s": (t.Preset(4, 128, 384, 32), 600_000, 4),
    "m": (t.Preset(4, 192, 576, 32), 600_000, 4),
    "l": (t.Preset(4, 256, 768, 64), 2_000_000, 8),
}
t.PRESETS |= {name: shape for name, (shape, _, _) in SIZES.items()}
SEEDS, DOCUMENTS_RATE = (42, 43, 44), 1e-4
STAGES = ("grid", "share", "decay", "candidates", "outer", "batch")
CANDIDATES: list[dict[str, Any]] = [{"cautious": True}, {"falling": True}, {"mlp_init": 0.0}, {"mlp_init": 0.25}]
CANDIDATES += [{"ema": 0.2}, {"qk_norm": True}, {"normuon": True}]


@dataclass(frozen=True)
class Trial:
    """One run; ``factor``: its peak rate against Step Law's for its parameters and tokens, 0 for the documents'."""

    stage: str
    size: str
    optimizer: str
    factor: float
    rate: float
    seed: int
    rows: int
    steps: int
    share: float = 1.0  # of the size's tokens
    schedule: str = "wsd"
    decay: float = 0.2
    outer: float = 1.0  # the rate of embeddings and head against the hidden matrices'
    beta1: float = 0.9
    beta2: float = 0.95
    cautious: bool = False  # a weight decays only where it and its update agree in sign
    falling: bool = False  # the weight decay falls with the rate
    mlp_init: float = 1.0  # of the MLP's output matrices
    ema: float = 0.0  # how far the average of the weights reaches back, in decay phases
    qk_norm: bool = False  # as Qwen3's
    normuon: bool = False  # Li et al., 2025

    def options(self) -> t.TrainConfig:
        return replace(plain_config(), model_size=self.size, seed=self.seed, optimizer=self.optimizer)

    def rates(self) -> list[float]:
        """Learning rate of each step, by the product's own schedule."""
        cfg = replace(self.options(), lr_schedule=self.schedule, decay_ratio=self.decay)
        run = SimpleNamespace(cfg=cfg, total_steps=self.steps, peak_rate=self.rate)
        run.warmup_steps = math.ceil(cfg.warmup_ratio * self.steps)
        return [t.learning_rate_at(run, step) for step in range(self.steps)]


FIELDS = Trial.__dataclass_fields__
PLAIN = {name: FIELDS[name].default for name in list(FIELDS)[9:]}  # what a change alone is compared with


@cache
def plain_config() -> t.TrainConfig:
    """The options that all runs share."""
    words = f"--train --device cpu --vocab-size {VOCABULARY} --max-seq-length {LENGTH} --report-to none"
    return t.resolve_config(t.parse_args(words.split()), "cpu")[0]


# --- what is run ---


def step_law(size: str, tokens: float) -> float:
    return 1.79 * SIZES[size][0].matrix_parameters() ** -0.713 * tokens**0.307


def make_trial(stage: str, size: str, optimizer: str, factor: float, seed: int, scale: float, **more: Any) -> Trial:
    """A run whose rate and steps follow from its tokens; ``scale`` shortens it without changing the rate."""
    _, whole, usual_rows = SIZES[size]
    rows, tokens = more.pop("rows", usual_rows), scale * whole * more.get("share", 1.0)
    rate = factor * step_law(size, tokens / scale) or DOCUMENTS_RATE
    steps = max(4, round(tokens / rows / LENGTH))
    return Trial(stage, size, optimizer, factor, float(f"{rate:.3g}"), seed, rows, steps, **more)


def all_trials(scale: float) -> list[Trial]:
    """Every run, in the order of importance; a stage names the table that it is for."""
    trials: list[Trial] = []
    first, others = SEEDS[:1], SEEDS[1:]
    shares = (("muon", 0.2), ("muon", 0.15), ("adamw", 0.4), ("adamw", 0.3))
    decays = [{"decay": 0.1}, {"decay": 0.45}, {"decay": 0.65}, {"schedule": "linear"}]

    def add(stage: str, sizes: str, optimizer: str, factors: Iterable, seeds: Iterable = SEEDS, **more: Any) -> None:
        for size, factor, seed in product(sizes, factors, seeds):
            trials.append(make_trial(stage, size, optimizer, factor, seed, scale, **more))

    # The law against a grid and the documents' recipe, at two sizes of 600,000 tokens.
    add("grid", "s", "muon", (1.0, 0.25, 0.5, 0.71, 1.41, 2.0))
    add("grid", "s", "adamw", (1.0, 0.25, 0.5, 0.71, 1.41, 2.0, 0.0))
    add("grid", "m", "muon", (1.0, 0.5, 0.71, 1.41, 2.0), first)
    add("grid", "m", "adamw", (1.0, 0.5, 0.25, 0.71, 0.0), first)
    # How few steps reach the documents' recipe; then the other seeds of the grid.
    for optimizer, share in shares:
        add("share", "s", optimizer, (1.0,), share=share)
    add("grid", "m", "muon", (1.0, 0.71), others)
    add("grid", "m", "adamw", (1.0, 0.5, 0.71, 0.25, 0.0), others)
    for optimizer, share in shares:
        add("share", "m", optimizer, (1.0,), share=share)
    add("grid", "m", "adamw", (1.41,), first)
    # The law's third point: twice the tokens.
    twice: dict[str, Any] = {"share": 2.0, "rows": 6}
    add("share", "s", "muon", (1.0, 0.71, 0.5, 1.41, 2.0), first, **twice)
    add("share", "s", "adamw", (1.0, 0.5, 0.25, 0.71, 1.41), first, **twice)
    add("share", "s", "muon", (1.0, 0.71), others, **twice)
    add("share", "s", "adamw", (1.0, 0.5, 0.71), others, **twice)
    # What may become the recipe, each alone.
    for size, kind in product("sm", decays):
        add("decay", size, "muon", (1.0,), **kind)
    for kind in CANDIDATES:
        add("candidates", "sm", "muon", (1.0,), **kind)
    for kind in decays:
        add("decay", "sm", "adamw", (1.0,), **kind)
    # How few of Muon's steps reach AdamW's last loss at the law's rate.
    for share in (0.4, 0.3):
        add("share", "sm", "muon", (1.0,), share=share)
    # What AdamW trains beside Muon, other batches, a larger model with more tokens.
    for kind in ({"outer": 0.25}, {"outer": 0.5}, {"outer": 2.0}, {"beta1": 0.8}, {"beta2": 0.98}):
        add("outer", "sm", "muon", (1.0,), **kind)
    for optimizer in ("muon", "adamw"):
        add("batch", "sm", optimizer, (0.25, 0.5, 0.71, 1.0), first, rows=1)
        add("batch", "sm", optimizer, (0.71, 1.0, 1.41, 2.0), first, rows=16)
        add("grid", "l", optimizer, (0.25, 0.5, 0.71, 1.0, 1.41, 2.0))
    add("grid", "l", "adamw", (0.0,))
    return list(dict.fromkeys(trials))  # a short run's shares may be the same


def ensembles(trials: list[Trial]) -> list[list[Trial]]:
    """Runs that train side by side on a GPU: as many of one kind as 18 GB hold."""
    alike = defaultdict(list)
    for trial in trials:
        kind = trial.stage, trial.size, trial.optimizer, trial.rows, trial.steps, trial.qk_norm
        alike[kind].append(trial)
    parts = []
    for group in alike.values():
        shape = SIZES[group[0].size][0]
        size = group[0].rows * LENGTH * (90 * shape.hidden * shape.layers + 15 * VOCABULARY)
        count = math.ceil(len(group) / max(1, int(18e9 / size)))
        parts += [group[start::count] for start in range(count)]
    return parts


# --- training side by side ---


@dataclass
class Data:
    """Rows (n, LENGTH + 1) to train on and held out, on the device, and the bytes of the held-out targets."""

    rows: torch.Tensor
    held_out: torch.Tensor
    bytes: int

    @classmethod
    def load(cls, path: Path, device: torch.device) -> Data:
        content = np.load(path)
        rows, held_out = (torch.from_numpy(content[name].astype(np.int32)).to(device) for name in ("rows", "held_out"))
        return cls(rows, held_out, int(content["bytes"]))


def prepare(corpus: Path, path: Path) -> None:
    """Tokenise the corpus as the product does, and keep as many rows as the longest run reads."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = config(t, corpus, Path(folder), "--vocab-size", str(VOCABULARY), "--max-seq-length", str(LENGTH))
        prepared = t.prepare_corpus(cfg)
        count = prepared.domains[0].rows(LENGTH)
        order = t.RowOrder([count], [t.MIX_WINDOW], 0)
        rows = t.read_rows(prepared, *order(np.arange(min(ROWS, count))), LENGTH).numpy()
        starts = np.linspace(0, len(prepared.val) - LENGTH - 1, HELD_OUT_ROWS).astype(int)
        held_out = np.stack([prepared.val.read(start, LENGTH) for start in starts.tolist()])
        text = "".join(prepared.tokenizer.batch_decode(held_out[:, 1:].tolist(), skip_special_tokens=True))
    arrays = {"rows": rows.astype(np.uint16), "held_out": held_out.astype(np.uint16), "bytes": len(text.encode())}
    temporary = path.with_suffix(".tmp.npz")
    np.savez(temporary, **arrays)
    temporary.replace(path)
    print(f"{path}: {len(rows):,} rows of {count:,}", flush=True)


def initial_weights(trial: Trial) -> dict[str, torch.Tensor]:
    """A new model's weights as the product makes them, those of a kind stacked over the layers (layers, ...)."""
    state, shape = t.build_model(trial.options(), Words(VOCABULARY)).state_dict(), SIZES[trial.size][0]

    def stacked(*names: str) -> torch.Tensor:
        layers = [[state[f"model.layers.{n}.{name}.weight"] for name in names] for n in range(shape.layers)]
        return torch.stack([torch.stack(weights).squeeze(0) for weights in layers])

    weights = {
        "embed": state["model.embed_tokens.weight"][None],
        "final": state["model.norm.weight"][None],
        "attention_norm": stacked("input_layernorm"),
        "mlp_norm": stacked("post_attention_layernorm"),
        "qkv": stacked(*(f"self_attn.{name}_proj" for name in "qkv")),
        "o": stacked("self_attn.o_proj"),
        "gate_up": stacked("mlp.gate_proj", "mlp.up_proj"),
        "down": stacked("mlp.down_proj") * trial.mlp_init,
    }
    if trial.qk_norm:
        weights["qk_norm"] = torch.ones(shape.layers, 2, shape.head)
    return weights


HIDDEN = ("qkv", "o", "gate_up", "down")


def spread(values: torch.Tensor, dims: int) -> torch.Tensor:
    """A value for each trial, as it is multiplied with a tensor of so many dimensions."""
    return values.view(1, -1, *[1] * (dims - 2))


class Ensemble:
    """Trials of one kind side by side; every tensor has the dimensions (layers or 1, trials, ...)."""

    def __init__(self, trials: list[Trial], data: Data):
        self.trials, self.data, self.device = trials, data, data.rows.device
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.shape, self.rows, self.steps = SIZES[trials[0].size][0], trials[0].rows, trials[0].steps
        starts = [initial_weights(trial) for trial in trials]
        self.weights = {
            name: torch.stack([start[name] for start in starts], 1).to(self.device).requires_grad_()
            for name in starts[0]
        }
        self.state = {name: [torch.zeros_like(w), torch.zeros_like(w)] for name, w in self.weights.items()}
        self.average = {name: w.detach().clone() for name, w in self.weights.items()} if self.any("ema") else {}
        self.values = {
            name: torch.tensor([float(getattr(trial, name)) for trial in trials], device=self.device)
            for name in ("rate", "beta1", "beta2", "outer", "cautious", "falling", "ema", "normuon")
        }
        self.rates = torch.tensor([trial.rates() for trial in trials]).T.to(self.device)  # (steps, trials)
        self.paces = torch.ones_like(self.rates)  # by which the average follows the weights
        for number, trial in enumerate(trials):
            phase = round(0.95 * trial.decay * trial.steps)  # from where on it lags behind them
            if trial.ema:
                self.paces[trial.steps - phase :, number] = min(1.0, 1 / (trial.ema * phase))
        self.orders = torch.stack([self.order(trial.seed) for trial in trials]).to(self.device)
        positions = torch.arange(LENGTH)[:, None] / 10_000 ** (torch.arange(0, self.shape.head, 2) / self.shape.head)
        self.cos, self.sin = (f(positions).repeat(1, 2).to(self.device, self.dtype) for f in (torch.cos, torch.sin))
        self.ones = torch.ones(self.shape.hidden, device=self.device)
        self.offsets = VOCABULARY * torch.arange(len(trials), device=self.device)[:, None]

    def any(self, name: str) -> bool:
        return any(getattr(trial, name) for trial in self.trials)

    def order(self, seed: int) -> torch.Tensor:
        count = self.rows * self.steps
        return torch.from_numpy(t.RowOrder([len(self.data.rows)], [t.MIX_WINDOW], seed)(np.arange(count))[1])

    def setting(self, name: str, dims: int) -> torch.Tensor:
        """Each trial's setting, as it is multiplied with a tensor of so many dimensions."""
        return spread(self.values[name], dims)

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (F.rms_norm(x, x.shape[-1:], self.ones, 1e-5) * weight[:, None]).to(self.dtype)

    def attention(self, h: torch.Tensor, qkv: torch.Tensor, qk_norm: torch.Tensor | None) -> torch.Tensor:
        count, tokens, width = h.shape
        heads = torch.bmm(h, qkv.flatten(1, 2).mT).view(-1, LENGTH, 3, width // self.shape.head, self.shape.head)
        qk, v = heads[:, :, :2], heads[:, :, 2]
        if qk_norm is not None:
            each = F.rms_norm(qk.float(), qk.shape[-1:], self.ones[: qk.shape[-1]], 1e-6)
            each = each.reshape(count, -1, *qk.shape[2:]) * qk_norm[:, None, :, None]
            qk = each.to(self.dtype).reshape(qk.shape)
        one, other = qk.chunk(2, -1)
        cos, sin = self.cos[:, None, None], self.sin[:, None, None]
        qk = qk * cos + torch.cat([-other, one], -1) * sin
        q, k = qk.transpose(1, 3).unbind(2)  # (rows, heads, tokens, size)
        out = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True)
        return out.transpose(1, 2).reshape(count, tokens, width)

    def loss(self, weights: dict[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy of each trial (trials,) on its rows (trials, rows, LENGTH + 1)."""
        inputs, targets = rows[..., :-1].flatten(1), rows[..., 1:].flatten()
        embed = weights["embed"].squeeze(0)
        x = F.embedding(inputs + self.offsets, embed.flatten(0, 1))
        layers = [weights[name].to(self.dtype).unbind(0) for name in HIDDEN]
        layers += [weights[name].unbind(0) for name in ("attention_norm", "mlp_norm")]
        layers += [weights["qk_norm"].unbind(0) if "qk_norm" in weights else [None] * self.shape.layers]
        for qkv, o, gate_up, down, attention_norm, mlp_norm, qk_norm in zip(*layers, strict=True):
            x = x + torch.bmm(self.attention(self.norm(x, attention_norm), qkv, qk_norm), o.mT)
            gate, up = torch.bmm(self.norm(x, mlp_norm), gate_up.flatten(1, 2).mT).chunk(2, -1)
            x = x + torch.bmm(F.silu(gate) * up, down.mT)
        logits = torch.bmm(self.norm(x, weights["final"].squeeze(0)), embed.to(self.dtype).mT)
        losses = F.cross_entropy(logits.float().flatten(0, 1), targets, reduction="none")
        return losses.view(len(self.trials), -1).mean(1)

    def step(self, number: int) -> torch.Tensor:
        """Train one step of each; returns the losses (trials,)."""
        chosen = self.orders[:, number * self.rows : (number + 1) * self.rows]
        losses = self.loss(self.weights, self.data.rows[chosen].long())
        losses.sum().backward()
        with torch.no_grad():
            gradients = {name: weight.grad for name, weight in self.weights.items()}
            squares = [g.square().sum(dim=(0, *range(2, g.dim()))) for g in gradients.values()]
            clip = (1 / (torch.stack(squares).sum(0).sqrt() + 1e-6)).clamp(max=1)
            for name, weight in self.weights.items():
                self.update(name, weight, gradients[name].mul_(spread(clip, weight.dim())), number)
                weight.grad = None
            for name, average in self.average.items():
                average.lerp_(self.weights[name], spread(self.paces[number], average.dim()))
        return losses.detach()

    def update(self, name: str, weight: torch.Tensor, gradient: torch.Tensor, number: int) -> None:
        """One step of AdamW or Muon."""
        dims, (first, second) = weight.dim(), self.state[name]
        rate = spread(self.rates[number], dims)
        if name in HIDDEN and self.trials[0].optimizer == "muon":
            update = self.orthogonal(first.lerp_(gradient, 0.05), gradient, second)
        else:
            beta1, beta2 = self.setting("beta1", dims), self.setting("beta2", dims)
            first.lerp_(gradient, 1 - beta1)
            second.lerp_(gradient.square(), 1 - beta2)
            root = (second / (1 - beta2 ** (number + 1))).sqrt_().add_(1e-8)
            update = (first / (1 - beta1 ** (number + 1))).div_(root)
            if name == "embed":
                rate = rate * self.setting("outer", dims)
        if name in (*HIDDEN, "embed"):
            of_peak = spread(self.rates[number], dims) / self.setting("rate", dims)
            shrink = 0.1 * rate * of_peak ** self.setting("falling", dims)  # to the power of 0 or 1
            if self.any("cautious"):
                shrink = shrink * ((update * weight > 0) | (self.setting("cautious", dims) == 0))
            weight.mul_(1 - shrink)
        weight.sub_(update.mul_(rate))

    def orthogonal(self, momentum: torch.Tensor, gradient: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        scratch = gradient.lerp(momentum, 0.95).to(self.dtype).flatten(0, -3)
        out = torch.empty_like(scratch)
        t.newton_schulz(scratch, out)
        rows, columns = gradient.shape[-2:]
        update = out.view(gradient.shape).float() * (0.2 * max(rows, columns) ** 0.5)
        if self.any("normuon"):  # Li et al., 2025: each row by its own second moment, the matrix's norm as before
            mean = second[..., :1].lerp_(update.square().mean(-1, keepdim=True), 0.05)
            even = update / (mean.sqrt() + 1e-8)
            even *= 0.2 * (rows * columns) ** 0.5 / even.square().sum((-2, -1), keepdim=True).sqrt()
            update = torch.where(self.setting("normuon", update.dim()) > 0, even, update)
        return update

    @torch.no_grad()
    def held_out_losses(self) -> torch.Tensor:
        """Loss (trials,) on all held-out rows; of a trial with averages, theirs."""
        size = max(1, 512 // len(self.trials))
        results = []
        for weights in (self.weights, self.average) if self.average else (self.weights,):
            total = 0.0
            for rows in self.data.held_out.split(size):
                total = total + len(rows) * self.loss(weights, rows.long().expand(len(self.trials), -1, -1))
            results.append(total / len(self.data.held_out))
        return torch.where(self.values["ema"] > 0, results[-1], results[0])

    def train(self) -> list[dict[str, Any]]:
        """Train to the end; returns each trial's fields and figures."""
        begun, held_out = time.time(), {}
        history = torch.zeros(self.steps, len(self.trials), device=self.device)
        for number in range(self.steps):
            history[number] = self.step(number)
            if number + 1 in {self.steps * quarter // 4 for quarter in (1, 2, 3, 4)}:
                held_out[number + 1] = self.held_out_losses().tolist()
        curves, seconds, lines = history.cpu().numpy(), round(time.time() - begun, 1), []
        for n, trial in enumerate(self.trials):
            loss = held_out[self.steps][n]
            bits = loss * HELD_OUT_ROWS * LENGTH / math.log(2) / self.data.bytes
            parts = np.array_split(curves[:, n], min(20, self.steps))
            figures: dict[str, Any] = {"val_loss": round(loss, 5), "val_bits_per_byte": round(bits, 5)}
            figures["train"] = [round(float(part.mean()), 4) for part in parts]
            figures["val"] = {step: round(losses[n], 4) for step, losses in held_out.items()}
            lines.append(asdict(trial) | figures | {"ensemble": len(self.trials), "ensemble_seconds": seconds})
        return lines


# --- the campaign ---


def work(parts: list[list[Trial]], lock: Any, following: Any, tokens: Path, results: Path, device: str) -> None:
    """One worker: trains the next ensemble until all are taken, or the campaign was ended."""
    torch.set_num_threads(1)
    data, campaign = Data.load(tokens, torch.device(device)), multiprocessing.parent_process()
    while campaign.is_alive():
        with lock:
            number, following.value = following.value, following.value + 1
        if number >= len(parts):
            return
        lines = Ensemble(parts[number], data).train()
        with lock, open(results, "a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(line) + "\n" for line in lines)
        one, losses = parts[number][0], ", ".join(f"{line['val_loss']:.4f}" for line in lines)
        about = f"{one.stage} {one.size} {one.optimizer} x {one.factor}, {one.steps} x {one.rows} rows, seed {one.seed}"
        print(f"{time.strftime('%H:%M:%S')} {number + 1} of {len(parts)}: {about}: {losses}", flush=True)


def read_results(path: Path) -> dict[Trial, dict[str, Any]]:
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines() if path.exists() else [])
    return {Trial(**{name: line[name] for name in FIELDS}): line for line in lines if "val_loss" in line}


def run_campaign(options: argparse.Namespace, tokens: Path) -> None:
    """Run what is missing: on a CPU one run a worker, on a GPU many side by side."""
    have, stages = read_results(options.results), options.stages.split(",")
    trials = [trial for trial in all_trials(options.scale) if trial.stage in stages and trial not in have]
    parts = ensembles(trials) if options.device == "cuda" else [[trial] for trial in trials]
    # Not forked: on a machine with a GPU importing the libraries is enough for CUDA to refuse a forked process.
    context = multiprocessing.get_context("spawn")
    shared = parts, context.Lock(), context.Value("i", 0), tokens, options.results, options.device
    workers = [context.Process(target=work, args=shared) for _ in range(options.workers)]
    print(f"{len(trials)} runs in {len(parts)} parts, {len(workers)} workers, {options.device}", flush=True)
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        sys.exit("a worker failed: its message stands above; what has ended is kept")


def check(steps: int = 6) -> None:
    """Print the largest difference between an ensemble's losses and those of the product's model and optimizer."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, VOCABULARY, (40, LENGTH + 1), generator=generator, dtype=torch.int32)
    for optimizer in ("muon", "adamw"):
        trials = [Trial("check", "s", optimizer, 1.0, rate, seed, 2, steps) for rate, seed in ((5e-3, 42), (1e-2, 43))]
        ensemble = Ensemble(trials, Data(rows, rows, 1))
        losses = torch.stack([ensemble.step(number) for number in range(steps)])
        for n, trial in enumerate(trials):
            module, mine = t.LMWithLoss(t.build_model(trial.options(), Words(VOCABULARY))), []
            own, rates = t.build_optimizer(module.model, trial.options()), trial.rates()
            for number in range(steps):
                loss = module(rows[ensemble.order(trial.seed)[2 * number : 2 * number + 2]].long())
                loss.backward()
                torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
                for group in own.param_groups:
                    group["lr"] = rates[number]
                own.step()
                own.zero_grad()
                mine.append(loss.item())
            print(optimizer, trial.rate, (losses[:, n] - torch.tensor(mine)).abs().max().item(), mine[0], mine[-1])


# --- tables ---


def by_setting(results: dict[Trial, dict[str, Any]], *stages: str) -> dict[Trial, dict[int, float]]:
    """Losses by seed of what else is the same; the key has the first seed."""
    losses: dict[Trial, dict[int, float]] = defaultdict(dict)
    for trial, line in results.items():
        if trial.stage in stages:
            loss = line["val_loss"]
            losses[replace(trial, seed=SEEDS[0])][trial.seed] = loss if math.isfinite(loss) else math.inf
    return losses


def rate_tables(results: dict[Trial, dict[str, Any]]) -> None:
    """Losses by rate, and how far Step Law's rate is above the best one."""
    groups: dict[tuple, dict[float, dict[int, float]]] = defaultdict(dict)
    for key, losses in by_setting(results, "grid", "share", "batch").items():
        groups[key.size, key.share, key.optimizer, key.rows][key.factor] = losses
    factors, rows, verdicts = (0.0, 0.25, 0.5, 0.71, 1.0, 1.41, 2.0), [], []
    for (size, share, optimizer, count), group in sorted(groups.items()):
        # One seed may lie lower than another at every rate: rates are compared over the seeds that all of them have.
        common = set.intersection(*map(set, group.values()))
        if not common or not group.keys() - {0.0, 1.0}:
            continue
        medians = {factor: statistics.median(losses[seed] for seed in common) for factor, losses in group.items()}
        about = [size, f"{SIZES[size][1] * share:,.0f}", optimizer, count * LENGTH]
        cells = (f"{medians[factor]:.4f}" if factor in medians else "" for factor in factors)
        rows.append([*about, len(common), *cells])
        if 1.0 in group:
            best = min(medians.keys() - {0.0}, key=medians.__getitem__)
            seeds = group[1.0].keys() & group[best].keys()
            law, least = ([group[factor][seed] for seed in seeds] for factor in (1.0, best))
            spread_here = max(max(losses) - min(losses) for losses in (law, least))
            above = statistics.median(law) - statistics.median(least)
            holds = "yes" if above <= max(0.03, spread_here) else "no"
            rate = f"{step_law(size, SIZES[size][1] * share):.3g}"
            figures = [f"{statistics.median(law):.4f}", best, f"{statistics.median(least):.4f}", f"{above:.4f}"]
            verdicts.append([*about, rate, *figures, f"{spread_here:.4f}", len(seeds), holds])
    about = ["size", "tokens", "optimizer", "tokens a step"]
    print("\nMedian held-out loss by the rate, in Step Law's; 0: 1e-4.\n")
    print(table([*about, "seeds", *factors], rows))
    head = [*about, "law's rate", "its loss", "best factor", "its loss", "law above", "spread", "seeds", "holds"]
    print("\nThe law holds where its median is at most 0.03 nats or the spread over the seeds above the best's:\n")
    print(table(head, verdicts))


def share_table(results: dict[Trial, dict[str, Any]]) -> None:
    """Runs over a part of the steps, with a schedule of that length, against whole runs with AdamW."""
    whole = {(key.size, key.optimizer, key.factor): losses for key, losses in by_setting(results, "grid").items()}
    rows = []
    for key, losses in by_setting(results, "share").items():
        if key.share < 1 and key.factor == 1:
            cells = [key.size, key.optimizer, key.share, len(losses), median_and_range(losses.values(), 4)]
            for factor in (0.0, 1.0):
                if wanted := list(whole.get((key.size, "adamw", factor), {}).values()):
                    reached = statistics.median(losses.values()) <= statistics.median(wanted)
                    cells += [median_and_range(wanted, 4), "yes" if reached else "no"]
                else:
                    cells += ["-", "-"]
            rows.append(cells)
    head = ["size", "optimizer", "share of the steps", "seeds", "loss"]
    head += ["AdamW at 1e-4, all steps", "reached", "AdamW at the law's rate, all steps", "reached"]
    print("\nAt the law's rate with a schedule of its own length, against whole runs:\n\n" + table(head, sorted(rows)))


def gain_table(results: dict[Trial, dict[str, Any]]) -> None:
    """What each change alone gains over the same run without it, seed by seed."""
    plain, rows = by_setting(results, "grid"), []
    for key, losses in by_setting(results, "outer", "decay", "candidates").items():
        bases = plain.get(replace(key, stage="grid", **PLAIN), {})
        if seeds := losses.keys() & bases.keys():
            change = ", ".join(f"{name} {getattr(key, name)}" for name in PLAIN if getattr(key, name) != PLAIN[name])
            gains = median_and_range([bases[seed] - losses[seed] for seed in seeds], 4)
            spread_here = f"{max(bases.values()) - min(bases.values()):.4f}"
            rows.append([key.stage, change, key.size, key.optimizer, len(seeds), gains, spread_here])
    head = ["", "change", "size", "optimizer", "seeds", "gain in nats", "spread of the plain runs"]
    print("\nWhat a change alone gains (positive: it is better):\n\n" + table(head, sorted(rows)))


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=corpus_file)
    parser.add_argument("results", type=Path, help="its rows are kept beside it, as .npz")
    parser.add_argument("--stages", default=",".join(STAGES), help="some of %(default)s")
    parser.add_argument("--device", default="cuda" if Path("/dev/nvidiactl").exists() else "cpu")
    parser.add_argument("--workers", type=int, help="processes (a GPU: 3, a CPU: 2, each with one thread)")
    parser.add_argument("--scale", type=float, default=1.0, help="of all runs' lengths, to try things out")
    parser.add_argument("--analyse", action="store_true", help="only print the tables of what is there")
    parser.add_argument("--check", action="store_true", help="only compare steps with the product's")
    options = parser.parse_args()
    options.workers = options.workers or (3 if options.device == "cuda" else 2)
    if options.check:
        check()
        return
    if not options.analyse:
        tokens = options.results.with_suffix(".npz")
        if not tokens.exists():
            prepare(options.corpus, tokens)
        run_campaign(options, tokens)
    results = read_results(options.results)
    rate_tables(results)
    share_table(results)
    gain_table(results)
    print("\n" + provenance("torch", "transformers"))


if __name__ == "__main__":
    main()
