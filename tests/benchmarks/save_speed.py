"""What a save costs the steps around it: written beside training, against waiting for it.

    python tests/benchmarks/save_speed.py FOLDER [--layers 16] [--rounds 5]

FOLDER is where the checkpoints go; it has to hold two of them, and it is left empty.  The model is
the 125m preset with more layers, as the generated text supports but a small vocabulary.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
from pathlib import Path

from common import ROOT, median_and_range, provenance, table

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from samples import tiny_run  # noqa: E402

import train_h100_dual as t  # noqa: E402


class Trainer:
    """A run whose steps are timed one by one."""

    def __init__(self, folder: Path, layers: int, tokens: int):
        folder.mkdir(parents=True)
        preset = t.PRESETS["125m"]
        shape = {
            "model_type": "llama",
            "num_hidden_layers": layers,
            "hidden_size": preset.hidden,
            "intermediate_size": preset.mlp,
            "num_attention_heads": preset.hidden // preset.head,
            "tie_word_embeddings": True,
        }
        (folder / "config.json").write_text(t.json.dumps(shape))
        size = ["--model-config", str(folder / "config.json"), "--max-seq-length", str(tokens)]
        self.run = tiny_run(folder, *size, "--batch-size", "1", "--max-steps", "1000000", "--save-total-limit", "1")
        t.torch.set_num_threads(len(t.os.sched_getaffinity(0)))
        positions = t.rank_positions(self.run.cfg, 0, 1, range(1_000_000))
        self.batches = t.make_loader(self.run.cfg, self.run.corpus, positions)
        self.state = t.TrainState()

    def step(self) -> float:
        """Seconds of one step."""
        begun = time.perf_counter()
        t.train_step(self.run, self.batches, 1e-4)
        self.state.step += 1
        return time.perf_counter() - begun

    def save(self) -> float:
        """Seconds until training may go on."""
        begun = time.perf_counter()
        t.save_checkpoint(self.run, self.state)
        return time.perf_counter() - begun


def measure(trainer: Trainer) -> dict[str, float]:
    """One round: quiet steps, a save that is waited for, quiet steps, a save beside training."""
    quiet = [trainer.step() for _ in range(8)]
    foreground = trainer.save()
    begun = time.perf_counter()
    t.report_save(trainer.run, wait=True)
    foreground += time.perf_counter() - begun
    quiet += [trainer.step() for _ in range(8)]
    normal = statistics.median(quiet)
    copied, during = trainer.save(), []
    while trainer.run.saver.busy:
        during.append(trainer.step())
    t.report_save(trainer.run, wait=True)
    after = [trainer.step() for _ in range(2)]
    extra = copied + sum(during) + sum(after) - normal * (len(during) + len(after))
    return {
        "foreground": foreground,
        "copy": copied,
        "extra": extra,
        "ratio": extra / foreground,
        "slowdown": statistics.mean(during) / normal if during else 1.0,
        "writing": trainer.run.save_seconds,
        "step": normal,
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    trainer = Trainer(options.folder / "save_speed", options.layers, options.tokens)
    parameters = sum(weight.numel() for weight in trainer.run.model.parameters())
    trainer.step()
    trainer.save()  # allocates the buffers
    t.report_save(trainer.run, wait=True)
    rounds = [measure(trainer) for _ in range(options.rounds)]
    names = {
        "step": "a step without a save, s",
        "foreground": "a save that is waited for, s",
        "copy": "copy to host memory, s",
        "extra": "extra time of the steps around a save, s",
        "ratio": "the extra time to the save that is waited for",
        "writing": "the writing beside training, s",
        "slowdown": "a step while the writer works, to one without",
    }
    print(
        f"{parameters / 1e6:.1f} M parameters, {t.checkpoint_bytes(trainer.run) / 1e9:.2f} GB a checkpoint, "
        f"median and range of {len(rounds)} rounds:\n"
    )
    print(
        table(["", "figure"], [[text, median_and_range([one[name] for one in rounds])] for name, text in names.items()])
    )
    print("\n" + provenance("torch", "transformers", "accelerate"))
    shutil.rmtree(options.folder / "save_speed")


if __name__ == "__main__":
    main()
