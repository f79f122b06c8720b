"""What the measuring scripts share: taking turns, tables, where figures come from, a corpus's configuration.

Standard library only, so that a process that times other code imports no more than that code does.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "tests" / "benchmarks" / "RESULTS.md"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # train_h100_dual, samples


# --- tables ---


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def median_and_range(values: Sequence[float], places: int = 2) -> str:
    """The median with the least and the largest value behind it."""
    return f"{statistics.median(values):.{places}f} ({min(values):.{places}f} to {max(values):.{places}f})"


def ratios(values: Sequence[float], others: Sequence[float], places: int = 3) -> str:
    """Median of values / others, turn by turn, and its 95 % interval by bootstrap (10,000 resamples, percentiles)."""
    quotients, draw = [one / other for one, other in zip(values, others, strict=False)], random.Random(0)
    if not quotients:
        return "-"
    medians = sorted(statistics.median(draw.choices(quotients, k=len(quotients))) for _ in range(10_000))
    return f"{statistics.median(quotients):.{places}f} ({medians[249]:.{places}f} to {medians[9749]:.{places}f})"


def git_commit() -> str:
    """The commit that was measured, and whether the script was edited since."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    edited = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "train_h100_dual.py"], capture_output=True)
    return (commit.stdout.strip() or "no commit") + (" with uncommitted edits" if edited.returncode else "")


def provenance(*packages: str, command: str | None = None) -> str:
    """The line under a table: machine, versions, commit and command (by default this process's)."""
    command = command or f"python {shlex.join([os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]])}"
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        gpus = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().splitlines()
    except (OSError, subprocess.CalledProcessError):
        gpus = []
    processors = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.partition(":")[2].strip() for line in processors if line.startswith("model name")), "CPU")
    return (
        f"{''.join(f'{name}; ' for name in gpus)}{len(os.sched_getaffinity(0))} cores of {model}, "
        f"load average {os.getloadavg()[0]:.1f} at the end; Python {platform.python_version()}, "
        f"{', '.join(f'{name} {version(name)}' for name in packages)}; commit {git_commit()}; `{command}`"
    )


def record(title: str, text: str) -> None:
    """Append a section to RESULTS.md."""
    with open(RESULTS, "a", encoding="utf-8") as stream:
        stream.write(f"\n## {title} ({time.strftime('%Y-%m-%d')})\n\n{text}\n")
    print(f"appended to {os.path.relpath(RESULTS)}")


# --- taking turns ---


def seconds(call: Callable[..., Any], *arguments: Any, **more: Any) -> float:
    """How long a call takes."""
    begun = time.perf_counter()
    call(*arguments, **more)
    return time.perf_counter() - begun


def take_turns(calls: dict[str, Callable[[], Any]], turns: int, warm_up: int = 0) -> dict[str, list[Any]]:
    """What each call returned in each turn, ``warm_up`` turns not counted; who begins changes from turn to turn."""
    names, results = list(calls), {name: [] for name in calls}
    for turn in range(-warm_up, turns):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            result = calls[name]()
            if turn >= 0:
                results[name].append(result)
        line_end = "" if sys.stderr.isatty() else "\n"
        print(f"\rturn {max(0, turn + 1)} of {turns}\033[K", end=line_end, file=sys.stderr, flush=True)
    return results


# --- runs ---


def corpus_file(word: str) -> Path:
    """Type of the argument CORPUS: a JSONL file, which every measured reader takes."""
    path = Path(word).expanduser().resolve()
    if not path.name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")) or not path.is_file():
        raise argparse.ArgumentTypeError(f"{word!r}: give a .jsonl, .jsonl.gz or .jsonl.zst that exists")
    return path


def config(t: Any, corpus: Path, folder: Path, *more: str) -> Any:
    """The complete configuration of a CPU run over ``corpus`` that keeps everything below ``folder``."""
    places = [f"--{name}-dir={folder / name}" for name in ("cache", "output", "logs")]
    words = ["--train", "--device=cpu", f"--dataset-path={corpus}", *places, *more]
    cfg, _ = t.resolve_config(t.parse_args(words), "cpu")
    cfg.logs_dir.mkdir(parents=True, exist_ok=True)
    return cfg


def document_batches(t: Any, cfg: Any) -> Iterator[Any]:
    """The documents of a corpus (``texts``, ``languages``) a few MB at a time, as the preparation reads them."""
    for chunk in t.read_chunks(cfg, t.corpus_files(cfg)[0]):
        yield t.parse_chunk(chunk, cfg.text_column)


class Words:
    """As much of a tokenizer as a run takes that saves nothing."""

    bos_token_id = eos_token_id = 0

    def __init__(self, size: int):
        self.size = size

    def get_vocab(self) -> dict[str, int]:
        return {"": self.size - 1}
