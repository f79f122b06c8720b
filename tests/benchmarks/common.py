"""What the measuring scripts share: where figures come from, tables, and the corpus without its tokens."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def cpu_model() -> str:
    """Name of the processor as the kernel tells it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def git_commit() -> str:
    """The commit that was measured, and whether the script was edited since."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    edited = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "train_h100_dual.py"], capture_output=True)
    return (commit.stdout.strip() or "no commit") + (" with uncommitted edits" if edited.returncode else "")


def gpu_names() -> list[str]:
    """The visible GPUs as nvidia-smi names them, with the driver's version."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []


def provenance(*packages: str, command: str | None = None) -> str:
    """The line under a table: machine, versions, commit and command (by default this process's)."""
    command = command or f"python {shlex.join([os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]])}"
    gpus = "".join(f"{name}; " for name in gpu_names())
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    cores = len(os.sched_getaffinity(0))
    return (
        f"{gpus}{cores} cores of {cpu_model()}, load average {os.getloadavg()[0]:.1f} at the end; "
        f"Python {platform.python_version()}, {versions}; commit {git_commit()}; "
        f"`{command}`"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def median_and_range(values: Sequence[float], places: int = 2) -> str:
    """The median with the least and the largest value behind it."""
    return f"{statistics.median(values):.{places}f} ({min(values):.{places}f} to {max(values):.{places}f})"


def corpus_file(word: str) -> Path:
    """Type of the argument CORPUS: a JSONL file, which every measured reader takes."""
    path = Path(word).expanduser().resolve()
    if not path.name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")) or not path.is_file():
        raise argparse.ArgumentTypeError(
            f"{word!r} is no JSONL file: give a .jsonl, .jsonl.gz or .jsonl.zst that exists"
        )
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
    for chunk in t.read_chunks(cfg, t.corpus_files(cfg)):
        yield t.parse_chunk(chunk, cfg.text_column)


class Words:
    """As much of a tokenizer as a run takes that saves nothing."""

    bos_token_id = eos_token_id = 0

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size
