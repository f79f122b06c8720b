"""The recipe by measurement: Step Law's rate against grids, Muon against AdamW, the decay, the batch.

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
from dataclasses import asdict, astuple, dataclass, replace
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
STAGES = ("grid", "share", "decay", "batch")
AUTO = {"muon": 1.0, "adamw": 0.71}  # what --learning-rate auto takes of Step Law's rate


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

    def options(self) -> t.TrainConfig:
        return replace(plain_config(), model_size=self.size, seed=self.seed, optimizer=self.optimizer)

    def rates(self) -> list[float]:
        """Learning rate of each step, by the product's own schedule."""
        cfg = replace(self.options(), lr_schedule=self.schedule, decay_ratio=self.decay)
        run = SimpleNamespace(cfg=cfg, total_steps=self.steps, peak_rate=self.rate)
        run.warmup_steps = math.ceil(cfg.warmup_ratio * self.steps)
        return [t.learning_rate_at(run, step) for step in range(self.steps)]


FIELDS = Trial.__dataclass_fields__


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
    """Every run, in the order of importance."""
    trials: list[Trial] = []
    first, rates = SEEDS[:1], (0.25, 0.5, 0.71, 1.0, 1.41, 2.0)
    decays: list[dict[str, Any]] = [{"decay": 0.1}, {"decay": 0.45}, {"decay": 0.65}, {"schedule": "linear"}]

    def add(stage: str, sizes: str, optimizer: str, factors: Iterable, seeds: Iterable = SEEDS, **more: Any) -> None:
        for size, factor, seed in product(sizes, factors, seeds):
            trials.append(make_trial(stage, size, optimizer, factor, seed, scale, **more))

    # The law against a grid; the documents' recipe.
    for size, more in (("s", {}), ("m", {}), ("s", {"share": 2.0, "rows": 6}), ("l", {})):
        for optimizer in AUTO:
            add("grid", size, optimizer, rates, first, **more)
            add("grid", size, optimizer, (0.71, 1.0), **more)
        add("grid", size, "adamw", (0.0,), **more)
    # How few of Muon's steps reach the last loss of the documents' recipe and of AdamW at ``auto``.
    for share in (0.15, 0.2, 0.4):
        add("share", "sm", "muon", (1.0,), share=share)
    for (optimizer, factor), kind in product(AUTO.items(), decays):
        add("decay", "sm", optimizer, (factor,), **kind)
    for (optimizer, factor), rows in product(AUTO.items(), (1, 16)):
        add("batch", "sm", optimizer, (factor / 2, factor, 2 * factor), first, rows=rows)
    return list(dict.fromkeys(trials))


def ensembles(trials: list[Trial]) -> list[list[Trial]]:
    """Runs that train side by side on a GPU: as many of one kind as 18 GB hold."""
    alike = defaultdict(list)
    for trial in trials:
        kind = trial.stage, trial.size, trial.optimizer, trial.rows, trial.steps
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
        "down": stacked("mlp.down_proj"),
    }
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
        self.rates = torch.tensor([trial.rates() for trial in trials]).T.to(self.device)  # (steps, trials)
        self.orders = torch.stack([self.order(trial.seed) for trial in trials]).to(self.device)
        positions = torch.arange(LENGTH)[:, None] / 10_000 ** (torch.arange(0, self.shape.head, 2) / self.shape.head)
        self.cos, self.sin = (f(positions).repeat(1, 2).to(self.device, self.dtype) for f in (torch.cos, torch.sin))
        self.ones = torch.ones(self.shape.hidden, device=self.device)
        self.offsets = VOCABULARY * torch.arange(len(trials), device=self.device)[:, None]

    def order(self, seed: int) -> torch.Tensor:
        count = self.rows * self.steps
        return torch.from_numpy(t.RowOrder([len(self.data.rows)], [t.MIX_WINDOW], seed)(np.arange(count))[1])

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (F.rms_norm(x, x.shape[-1:], self.ones, 1e-5) * weight[:, None]).to(self.dtype)

    def attention(self, h: torch.Tensor, qkv: torch.Tensor) -> torch.Tensor:
        count, tokens, width = h.shape
        heads = torch.bmm(h, qkv.flatten(1, 2).mT).view(-1, LENGTH, 3, width // self.shape.head, self.shape.head)
        qk, v = heads[:, :, :2], heads[:, :, 2]
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
        for qkv, o, gate_up, down, attention_norm, mlp_norm in zip(*layers, strict=True):
            x = x + torch.bmm(self.attention(self.norm(x, attention_norm), qkv), o.mT)
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
        return losses.detach()

    def update(self, name: str, weight: torch.Tensor, gradient: torch.Tensor, number: int) -> None:
        """One step of AdamW or Muon."""
        (first, second), rate = self.state[name], spread(self.rates[number], weight.dim())
        if name in HIDDEN and self.trials[0].optimizer == "muon":
            update = self.orthogonal(first.lerp_(gradient, 0.05), gradient)
        else:
            first.lerp_(gradient, 0.1)
            second.lerp_(gradient.square(), 0.05)
            root = (second / (1 - 0.95 ** (number + 1))).sqrt_().add_(1e-8)
            update = (first / (1 - 0.9 ** (number + 1))).div_(root)
        if name in (*HIDDEN, "embed"):
            weight.mul_(1 - 0.1 * rate)
        weight.sub_(update.mul_(rate))

    def orthogonal(self, momentum: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        scratch = gradient.lerp(momentum, 0.95).to(self.dtype).flatten(0, -3)
        out = torch.empty_like(scratch)
        t.newton_schulz(scratch, out)
        return out.view(gradient.shape).float() * (0.2 * max(gradient.shape[-2:]) ** 0.5)

    @torch.no_grad()
    def held_out_losses(self) -> torch.Tensor:
        """Loss (trials,) on all held-out rows."""
        total = torch.zeros(len(self.trials), device=self.device)
        for rows in self.data.held_out.split(max(1, 512 // len(self.trials))):
            total += len(rows) * self.loss(self.weights, rows.long().expand(len(self.trials), -1, -1))
        return total / len(self.data.held_out)

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
    return {Trial(**{name: line[name] for name in FIELDS}): line for line in lines if line["stage"] in STAGES}


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


def print_tables(results: dict[Trial, dict[str, Any]]) -> None:
    """Losses of each setting over its seeds, and how far ``auto``'s rate is above the best of each grid."""
    settings: dict[Trial, dict[int, float]] = defaultdict(dict)
    grids: dict[tuple, dict[float, dict[int, float]]] = defaultdict(dict)
    for trial, line in sorted(results.items(), key=lambda item: astuple(item[0])):
        loss = line["val_loss"]
        settings[replace(trial, seed=SEEDS[0])][trial.seed] = loss if math.isfinite(loss) else math.inf
    rows = []
    for key, losses in settings.items():
        about = key.size, f"{SIZES[key.size][1] * key.share:,.0f}", key.optimizer, key.rows * LENGTH
        change = f"{key.schedule} {key.decay}" if key.stage == "decay" else ""
        rows.append(
            [key.stage, *about, change, key.factor, key.rate, len(losses), median_and_range(losses.values(), 4)]
        )
        if key.stage == "grid" and key.factor:
            grids[about][key.factor] = losses
    head = ["size", "tokens", "optimizer", "tokens a step"]
    print(table(["", *head, "schedule", "rate / law's", "rate", "seeds", "held-out loss"], rows))
    rows = []
    for about, losses in grids.items():
        # One seed may lie lower than another at every rate: the best is looked for among those that have most.
        most = max(map(len, losses.values()))
        medians = {factor: statistics.median(of.values()) for factor, of in losses.items() if len(of) == most}
        auto, best = AUTO[about[2]], min(medians, key=medians.__getitem__)
        if auto not in medians:  # not run yet, or with fewer seeds
            continue
        spread_here = max(max(losses[factor].values()) - min(losses[factor].values()) for factor in (auto, best))
        above = medians[auto] - medians[best]
        holds = "yes" if above <= max(0.03, spread_here) else "no"
        rows.append([*about, auto, best, f"{above:.4f}", f"{spread_here:.4f}", most, holds])
    print("\nauto holds where its median is at most 0.03 nats or the spread over the seeds above the best's:\n")
    print(table([*head, "auto / law's", "best / law's", "auto above", "spread", "seeds", "holds"], rows))


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
    print_tables(read_results(options.results))
    print("\n" + provenance("torch", "transformers"))


if __name__ == "__main__":
    main()
