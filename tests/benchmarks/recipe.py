"""The recipe by measurement: Step Law's rate against grids, AdamW against Muon, the decay, the batch, cheap gains.

    nice -n 10 python tests/benchmarks/recipe.py CORPUS RESULTS.jsonl [--budget SECONDS] [--stages grid,share]
    python tests/benchmarks/recipe.py CORPUS RESULTS.jsonl --analyse

Runs of one shape, batch and optimizer train side by side as one model with a dimension more (on a GPU a small model
alone leaves it idle); each has its own rate, schedule, seed, weights and rows, and none hears of the others.  Initial
weights, learning rates, Newton-Schulz, corpus and order of rows are the product's; ``--check`` holds the rest against
the product's own steps.  A run that has ended is a line of RESULTS.jsonl and isn't run again.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Iterable, Iterator
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
    "m": (t.Preset(4, 192, 576, 32), 1_200_000, 6),
    "l": (t.Preset(4, 256, 768, 64), 2_000_000, 8),
    "xl": (t.Preset(6, 384, 1024, 64), 6_000_000, 16),
    "xxl": (t.Preset(8, 512, 1408, 64), 12_000_000, 24),
}
t.PRESETS |= {name: shape for name, (shape, _, _) in SIZES.items()}
TWO, SEEDS, OPTIMIZERS, DOCUMENTS_RATE = ("s", "l"), (42, 43, 44), ("muon", "adamw"), 1e-4
CANDIDATES: dict[str, dict[str, Any]] = {
    "cautious decay": {"cautious": True},
    "decay falls with the rate": {"falling": True},
    "MLP output starts at 0": {"mlp_init": 0.0},
    "MLP output starts at 1/4": {"mlp_init": 0.25},
    "EMA over the decay": {"ema": 0.2},
    "QK-norm": {"qk_norm": True},
    "NorMuon": {"normuon": True},
}


@dataclass(frozen=True)
class Trial:
    """One run; ``factor``: its peak rate against Step Law's for its parameters and tokens."""

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
    cautious: bool = False
    falling: bool = False
    mlp_init: float = 1.0
    ema: float = 0.0  # how far the average reaches back, in decay phases
    qk_norm: bool = False
    normuon: bool = False

    def options(self) -> t.TrainConfig:
        return replace(plain_config(), model_size=self.size, seed=self.seed, optimizer=self.optimizer)

    def rates(self) -> list[float]:
        """Learning rate of each step, by the product's own schedule."""
        cfg = replace(self.options(), lr_schedule=self.schedule, decay_ratio=self.decay)
        run = SimpleNamespace(cfg=cfg, total_steps=self.steps, peak_rate=self.rate)
        run.warmup_steps = math.ceil(cfg.warmup_ratio * self.steps)
        return [t.learning_rate_at(run, step) for step in range(self.steps)]


@cache
def plain_config() -> t.TrainConfig:
    """The options that all runs share."""
    words = f"--train --device cpu --vocab-size {VOCABULARY} --max-seq-length {LENGTH} --report-to none"
    return t.resolve_config(t.parse_args(words.split()), "cpu")[0]


def step_law(size: str, tokens: float) -> float:
    return 1.79 * SIZES[size][0].matrix_parameters() ** -0.713 * tokens**0.307


# --- what is run ---


class Stages:
    """The trials of each stage, in the order of their importance."""

    def __init__(self, scale: float):
        self.scale = scale  # of all runs' lengths, to try things out

    def trial(self, stage: str, size: str, optimizer: str, factor: float, seed: int, **more: Any) -> Trial:
        tokens, rows = self.scale * SIZES[size][1] * more.get("share", 1.0), more.pop("rows", SIZES[size][2])
        rate = more.pop("rate", factor * step_law(size, tokens / self.scale))
        steps = max(4, round(tokens / rows / LENGTH))
        return Trial(stage, size, optimizer, factor, float(f"{rate:.3g}"), seed, rows, steps, **more)

    def over(self, stage: str, sizes: Iterable, factors: Iterable, seeds: Iterable = SEEDS, **more: Any) -> list[Trial]:
        optimizers = more.pop("optimizers", OPTIMIZERS)
        return [self.trial(stage, *four, **more) for four in product(sizes, optimizers, factors, seeds)]

    def grid(self) -> list[Trial]:
        trials = self.over("grid", ("l", "m", "s"), (0.25, 0.5, 0.71, 1.0, 1.41, 2.0))
        documents = {"rate": DOCUMENTS_RATE, "optimizers": ["adamw"]}
        return trials + self.over("grid", ("l", "m", "s"), (0.0,), **documents)

    def share(self) -> list[Trial]:
        """Muon over a part of the tokens, with a schedule of that length."""
        shares, factors = (0.1, 0.15, 0.2, 0.3, 0.4, 0.6), (0.5, 0.71, 1.0, 1.41)
        parts = (self.over("share", TWO, factors, optimizers=["muon"], share=share) for share in shares)
        return [trial for part in parts for trial in part]

    def outer(self) -> list[Trial]:
        """Rates and betas of what AdamW trains beside Muon."""
        kinds = [({"outer": factor}, (0.5, 1.0)) for factor in (0.25, 0.5, 2.0)]
        kinds += [({"beta1": 0.8}, (1.0,)), ({"beta2": 0.98}, (1.0,))]
        parts = (self.over("outer", TWO, factors, optimizers=["muon"], **kind) for kind, factors in kinds)
        return [trial for part in parts for trial in part]

    def decay(self) -> list[Trial]:
        kinds = [{"decay": decay} for decay in (0.1, 0.45, 0.65)] + [{"schedule": "linear"}]
        return [trial for kind in kinds for trial in self.over("decay", TWO, (1.0,), **kind)]

    def batch(self) -> list[Trial]:
        parts = []
        for size, factors in product(TWO, ((0.25, 0.25, 0.5, 0.71, 1.0), (4, 0.71, 1.0, 1.41, 2.0))):
            rows, seeds = round(factors[0] * SIZES[size][2]), SEEDS[: 2 if size == "s" else 1]
            parts += self.over("batch", [size], factors[1:], seeds, rows=rows)
        return parts

    def larger(self) -> list[Trial]:
        return self.over("larger", ("xl",), (0.35, 0.5, 0.71, 1.0, 1.41), SEEDS[:1])

    def candidates(self) -> list[Trial]:
        trials = [trial for kind in CANDIDATES.values() for trial in self.over("candidates", TWO, (1.0,), **kind)]
        return [trial for trial in trials if not trial.normuon or trial.optimizer == "muon"]

    def largest(self) -> list[Trial]:
        return self.over("largest", ("xxl",), (0.25, 0.5, 0.71, 1.0, 1.41), SEEDS[:1])


VARIED = (
    "outer",
    "beta1",
    "beta2",
    "decay",
    "schedule",
    "cautious",
    "falling",
    "mlp_init",
    "ema",
    "qk_norm",
    "normuon",
)
STAGES = ("grid", "share", "decay", "outer", "larger", "batch", "candidates", "largest")


def ensembles(trials: list[Trial]) -> list[list[Trial]]:
    """Runs that train side by side: the same stage, shape, batch and optimizer, as many as 18 GB hold."""
    alike = defaultdict(list)
    for trial in trials:
        kind = trial.stage, trial.size, trial.rows, trial.optimizer, trial.qk_norm
        alike[(*kind, trial.steps if trial.stage == "share" else 0)].append(trial)
    parts = []
    for group in alike.values():
        shape = SIZES[group[0].size][0]
        size = group[0].rows * LENGTH * (90 * shape.hidden * shape.layers + 15 * VOCABULARY)
        most = max(1, int(18e9 / size))
        count = -(-len(group) // most)
        parts += [group[start::count] for start in range(count)]
    order = {stage: number for number, stage in enumerate(STAGES)}
    cost = {id(part): len(part) * part[0].steps * part[0].rows * SIZES[part[0].size][0].hidden for part in parts}
    return sorted(parts, key=lambda part: (order[part[0].stage], -cost[id(part)]))  # the longest first


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
        corpus = t.prepare_corpus(cfg)
        domain, count = corpus.domains[0], corpus.domains[0].rows(LENGTH)
        order = t.RowOrder([count], [t.MIX_WINDOW], 0)
        rows = t.read_rows(corpus, *order(np.arange(min(ROWS, count))), LENGTH).numpy()
        starts = np.linspace(0, len(corpus.val) - LENGTH - 1, HELD_OUT_ROWS).astype(int)
        held_out = np.stack([corpus.val.read(start, LENGTH) for start in starts.tolist()])
        text = "".join(corpus.tokenizer.batch_decode(held_out[:, 1:].tolist(), skip_special_tokens=True))
    arrays = {"rows": rows.astype(np.uint16), "held_out": held_out.astype(np.uint16), "bytes": len(text.encode())}
    temporary = path.with_suffix(".tmp.npz")
    np.savez(temporary, **arrays)
    temporary.replace(path)
    print(f"{path}: {len(rows):,} rows of {domain.rows(LENGTH):,}", flush=True)


@cache
def initial_weights(size: str, seed: int) -> dict[str, torch.Tensor]:
    """A new model's weights as the product makes them, those of a kind stacked over the layers (layers, ...)."""
    cfg = replace(plain_config(), model_size=size, seed=seed)
    state, layers = t.build_model(cfg, Words(VOCABULARY)).state_dict(), range(SIZES[size][0].layers)

    def stacked(*names: str) -> torch.Tensor:
        return torch.stack(
            [torch.stack([state[f"model.layers.{n}.{name}.weight"] for name in names]).squeeze(0) for n in layers]
        )

    attention, mlp = [f"self_attn.{name}_proj" for name in "qkvo"], [f"mlp.{name}_proj" for name in ("gate", "up")]
    return {
        "embed": state["model.embed_tokens.weight"][None],
        "final": state["model.norm.weight"][None],
        "attention_norm": stacked("input_layernorm"),
        "mlp_norm": stacked("post_attention_layernorm"),
        "qkv": stacked(*attention[:3]),
        "o": stacked(attention[3]),
        "gate_up": stacked(*mlp),
        "down": stacked("mlp.down_proj"),
    }


HIDDEN = ("qkv", "o", "gate_up", "down")


def spread(values: torch.Tensor, dims: int) -> torch.Tensor:
    """A value for each trial, as it is multiplied with a tensor of so many dimensions."""
    return values.view(1, -1, *[1] * (dims - 2))


class Ensemble:
    """Trials of one shape side by side; every tensor has the dimensions (layers or 1, trials, ...)."""

    def __init__(self, trials: list[Trial], data: Data):
        self.trials, self.data, self.device = trials, data, data.rows.device
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.shape, self.rows, self.steps = (
            SIZES[trials[0].size][0],
            trials[0].rows,
            max(trial.steps for trial in trials),
        )
        starts = []
        for trial in trials:
            start = dict(initial_weights(trial.size, trial.seed))
            start["down"] = start["down"] * trial.mlp_init
            if trial.qk_norm:  # as Qwen3's
                start["qk_norm"] = torch.ones(self.shape.layers, 2, self.shape.head)
            starts.append(start)
        self.weights = {
            name: torch.stack([start[name] for start in starts], 1).to(self.device).requires_grad_()
            for name in starts[0]
        }
        self.state = {name: [torch.zeros_like(w), torch.zeros_like(w)] for name, w in self.weights.items()}
        self.average = {name: w.detach().clone() for name, w in self.weights.items()} if self.any("ema") else None
        self.values = {
            name: torch.tensor([float(getattr(trial, name)) for trial in trials], device=self.device)
            for name in ("rate", "beta1", "beta2", "outer", "cautious", "falling", "ema", "normuon")
        }
        rates, paces = torch.zeros(self.steps, len(trials)), torch.ones(self.steps, len(trials))
        for number, trial in enumerate(trials):
            rates[: trial.steps, number] = torch.tensor(trial.rates())
            phase = round(0.95 * trial.decay * trial.steps)  # from where on the average lags behind the weights
            if trial.ema:
                paces[trial.steps - phase : trial.steps, number] = min(1.0, 1 / (trial.ema * phase))
        self.rates, self.paces = rates.to(self.device), paces.to(self.device)
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
            each = F.rms_norm(qk.float(), qk.shape[-1:], self.ones[: qk.shape[-1]], 1e-6).reshape(
                count, -1, *qk.shape[2:]
            )
            qk = (each * qk_norm[:, None, :, None]).to(self.dtype).reshape(qk.shape)
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
            if self.average is not None:
                self.follow(number)
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
            shrink = 0.1 * rate
            if self.any("falling"):
                share = spread(self.rates[number], dims) / self.setting("rate", dims)
                shrink = torch.where(self.setting("falling", dims) > 0, shrink * share, shrink)
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

    def follow(self, number: int) -> None:
        """Keep the averages of the weights from the start of the decay on."""
        for name, average in self.average.items():
            average.lerp_(self.weights[name], spread(self.paces[number], average.dim()))

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
        return torch.where(self.setting("ema", 2)[0] > 0, results[-1], results[0])

    def train(self, deadline: float) -> Iterator[dict[str, Any]]:
        """Train to the end; yields a trial's result as soon as it is known.  TimeoutError: the deadline is too near."""
        begun, history = time.time(), torch.zeros(self.steps, len(self.trials), device=self.device)
        evaluated: dict[int, list[float]] = {}
        ends = {trial.steps for trial in self.trials}
        wanted = ends | {self.steps * quarter // 4 for quarter in (1, 2, 3)}
        for number in range(self.steps):
            history[number] = self.step(number)
            if number and number % 50 == 0:
                history[number].sum().item()  # which waits for the device, so that the clock knows
                left = (self.steps - number) * (time.time() - begun) / number
                if time.time() + 0.8 * left > deadline:
                    raise TimeoutError(f"{left:.0f} s more don't fit any more")
            if number + 1 in wanted:
                evaluated[number + 1] = self.held_out_losses().tolist()
            if number + 1 in ends:
                ended = [n for n, trial in enumerate(self.trials) if trial.steps == number + 1]
                curves = history.cpu().numpy()
                for n in ended:
                    yield self.result(n, curves[: number + 1, n], evaluated, time.time() - begun)

    def result(self, n: int, curve: np.ndarray, evaluated: dict[int, list[float]], seconds: float) -> dict[str, Any]:
        trial, loss = self.trials[n], evaluated[self.trials[n].steps][n]
        train = [round(float(part.mean()), 4) for part in np.array_split(curve, min(20, len(curve)))]
        bits = loss * HELD_OUT_ROWS * LENGTH / math.log(2) / self.data.bytes
        held_out = {step: round(losses[n], 4) for step, losses in evaluated.items()}
        figures = {"val_loss": round(loss, 5), "val_bits_per_byte": round(bits, 5), "train": train, "val": held_out}
        figures["ensemble"], figures["ensemble_seconds"] = len(self.trials), round(seconds, 1)
        return asdict(trial) | figures


# --- the campaign ---


def append(path: Path, line: dict[str, Any]) -> None:
    """Add a line at once, whoever else adds some."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, (json.dumps(line) + "\n").encode())
    os.close(descriptor)


def run_ensemble(trials: list[Trial], data: Data, results: Path, deadline: float) -> None:
    """Train and note what has ended; what is short of memory is tried in halves."""
    begun = time.time()
    try:
        for line in Ensemble(trials, data).train(deadline):
            append(results, line)
        outcome = f"{time.time() - begun:.1f} s"
    except torch.OutOfMemoryError:
        outcome = "out of memory"
    except TimeoutError as error:
        outcome = str(error)
    except Exception:
        outcome = "failed"
        append(results, {"error": traceback.format_exc(), "trial": asdict(trials[0])})
    first = trials[0]
    name = f"{first.stage} {first.size} {first.optimizer} {first.rows} rows"
    print(f"{time.strftime('%H:%M:%S')} {name}: {len(trials)} runs, {outcome}", flush=True)
    if data.rows.is_cuda:
        torch.cuda.empty_cache()
    if outcome == "out of memory" and len(trials) > 1:
        for half in (trials[::2], trials[1::2]):
            run_ensemble(half, data, results, deadline)


def work(parts: list[list[Trial]], counter: Any, tokens: Path, results: Path, device: str, deadline: float) -> None:
    """One worker: takes the next ensemble until all are taken or the time is over."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // counter["workers"]))
    data = Data.load(tokens, torch.device(device))
    while time.time() < deadline:
        with counter["lock"]:
            number = counter["next"].value
            counter["next"].value += 1
        if number >= len(parts):
            break
        run_ensemble(parts[number], data, results, deadline)


def read_results(path: Path) -> dict[Trial, dict[str, Any]]:
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines() if path.exists() else [])
    names = Trial.__dataclass_fields__
    return {Trial(**{name: line[name] for name in names}): line for line in lines if "error" not in line}


def run_campaign(options: argparse.Namespace, tokens: Path, begun: float) -> None:
    """Run what is missing, stage by stage."""
    have, stages = read_results(options.results), Stages(options.scale)
    chosen = options.stages.split(",") if options.stages else STAGES
    trials = [trial for stage in STAGES if stage in chosen for trial in getattr(stages, stage)()]
    parts = ensembles([trial for trial in dict.fromkeys(trials) if trial not in have])
    # Not forked: on a machine with a GPU importing the libraries is enough for CUDA to refuse a forked process.
    context, count = multiprocessing.get_context("spawn"), options.workers
    counter = {"lock": context.Lock(), "next": context.Value("i", 0), "workers": count}
    work_arguments = parts, counter, tokens, options.results, options.device, begun + options.budget
    print(f"{sum(map(len, parts))} runs in {len(parts)} ensembles, {count} workers, {options.device}", flush=True)
    workers = [context.Process(target=work, args=work_arguments) for _ in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    print(f"{len(read_results(options.results))} runs are there, {time.time() - begun:.0f} s", flush=True)


def check(steps: int = 6) -> None:
    """Print the largest difference between an ensemble's losses and those of the product's model and optimizer."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, VOCABULARY, (40, LENGTH + 1), generator=generator, dtype=torch.int32)
    for optimizer in OPTIMIZERS:
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


def by_setting(results: dict[Trial, dict[str, Any]], *stages: str) -> dict[Trial, list[float]]:
    """Losses over the seeds of what else is the same; the key has the first seed."""
    losses = defaultdict(list)
    for trial in sorted(results, key=lambda trial: trial.seed):
        if trial.stage in stages:
            loss = results[trial]["val_loss"]
            losses[replace(trial, seed=SEEDS[0])].append(loss if math.isfinite(loss) else math.inf)
    return losses


def rate_tables(results: dict[Trial, dict[str, Any]]) -> None:
    """Losses by rate, and how much Step Law's rate is above the best one's."""
    groups: dict[tuple, dict[float, list[float]]] = defaultdict(dict)
    for trial, losses in by_setting(results, "grid", "batch", "larger", "largest").items():
        groups[trial.size, trial.optimizer, trial.rows][trial.factor] = losses
    factors = sorted({factor for group in groups.values() for factor in group})
    rows, verdicts = [], []
    for (size, optimizer, count), group in groups.items():
        medians = {factor: statistics.median(losses) for factor, losses in group.items()}
        cells = [f"{medians[factor]:.4f}" if factor in medians else "" for factor in factors]
        rows.append([size, optimizer, count * LENGTH, *cells])
        if 1.0 in group and (tried := {factor: loss for factor, loss in medians.items() if factor}):
            best = min(tried, key=tried.get)
            spread_here = max(max(group[factor]) - min(group[factor]) for factor in (best, 1.0))
            above = f"{medians[1.0] - medians[best]:.4f}"
            rate = f"{step_law(size, SIZES[size][1]):.3g}"
            verdicts.append(
                [size, optimizer, count * LENGTH, rate, best, above, f"{spread_here:.4f}", len(group[best])]
            )
    print("\nMedian held-out loss by the rate, in Step Law's; 0: 1e-4.\n")
    print(table(["size", "optimizer", "tokens a step", *factors], rows))
    head = ["size", "optimizer", "tokens a step", "law's rate", "best factor", "law above best", "spread", "seeds"]
    print("\nThe law's rate against the grid's best:\n\n" + table(head, verdicts))


def share_table(results: dict[Trial, dict[str, Any]]) -> None:
    """Muon over a part of the steps against whole runs with AdamW."""
    whole, rows = by_setting(results, "grid"), []
    for trial, losses in by_setting(results, "share").items():
        adamw = {
            t.factor: statistics.median(x) for t, x in whole.items() if (t.size, t.optimizer) == (trial.size, "adamw")
        }
        marks = [
            "yes" if statistics.median(losses) <= adamw.get(factor, -math.inf) else "" for factor in (0.0, 0.71, 1.0)
        ]
        rows.append([trial.size, trial.share, trial.factor, median_and_range(losses, 4), *marks])
    head = ["size", "share of the steps", "factor", "Muon's loss", "below AdamW 1e-4", "AdamW 0.71", "AdamW 1"]
    print("\nMuon with a schedule of its own length against whole runs with AdamW:\n\n" + table(head, rows))


def gain_table(results: dict[Trial, dict[str, Any]]) -> None:
    """What each change alone gains over the same run without it, seed by seed."""
    rows, plain = [], {name: field.default for name, field in Trial.__dataclass_fields__.items() if name in VARIED}
    for key in by_setting(results, "outer", "decay", "candidates"):
        pairs = [(replace(key, seed=seed), replace(key, seed=seed, stage="grid", **plain)) for seed in SEEDS]
        pairs = [pair for pair in pairs if pair[0] in results and pair[1] in results]
        if pairs:
            gains = [results[base]["val_loss"] - results[changed]["val_loss"] for changed, base in pairs]
            bases = [results[base]["val_loss"] for _, base in pairs]
            change = ", ".join(f"{name} {getattr(key, name)}" for name in VARIED if getattr(key, name) != plain[name])
            spread_here = f"{max(bases) - min(bases):.4f}"
            rows.append(
                [key.stage, change, key.size, key.optimizer, key.factor, median_and_range(gains, 4), spread_here]
            )
    head = ["", "change", "size", "optimizer", "factor", "gain in nats", "spread of the plain runs"]
    print("\nWhat a change alone gains (positive: it is better):\n\n" + table(head, sorted(rows)))


def analyse(results: dict[Trial, dict[str, Any]]) -> None:
    rate_tables(results)
    share_table(results)
    gain_table(results)


def main() -> None:
    begun = time.time()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=corpus_file)
    parser.add_argument("results", type=Path)
    parser.add_argument("--tokens", type=Path, help="the prepared rows (.npz); made where they aren't there")
    parser.add_argument("--stages", help=f"some of {','.join(STAGES)}")
    parser.add_argument(
        "--budget", type=float, default=1e6, metavar="SECONDS", help="begin nothing that can't end by it"
    )
    parser.add_argument("--device", default="cuda" if Path("/dev/nvidiactl").exists() else "cpu")
    parser.add_argument("--workers", type=int, help="processes (a GPU: 3, a CPU: 2)")
    parser.add_argument("--scale", type=float, default=1.0, help="of all runs' lengths, to try things out")
    parser.add_argument("--analyse", action="store_true", help="only print the tables of what is there")
    parser.add_argument("--check", action="store_true", help="only compare steps with the product's")
    options = parser.parse_args()
    options.workers = options.workers or (3 if options.device == "cuda" else 2)
    tokens = options.tokens or options.results.with_suffix(".npz")
    if options.check:
        check()
    elif options.analyse:
        analyse(read_results(options.results))
    else:
        if not tokens.exists():
            preparing = multiprocessing.get_context("fork").Process(target=prepare, args=(options.corpus, tokens))
            preparing.start()  # in a process of its own: what forks later must have no threads
            preparing.join()
        run_campaign(options, tokens, begun)
    print("\n" + provenance("torch", "transformers"))


if __name__ == "__main__":
    main()
