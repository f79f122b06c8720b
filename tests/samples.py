"""What several test files share: small corpora, tiny runs in this process, and torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import train_h100_dual as t

ROOT = Path(__file__).resolve().parent.parent
SMALL_MODEL = ["--model-config", str(ROOT / "tests" / "fixtures" / "small-model.json")]
TINY = [
    "--train --device cpu --model-size tiny --vocab-size 512 --max-seq-length 32 --batch-size 2",
    "--gradient-accumulation-steps 1 --max-steps 4 --logging-steps 1 --learning-rate 1e-3 --seed 7",
]
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
# Text as it is found in the wild: emoji, lone jamo, decomposed Hangul, mixed scripts, spacing.
WILD_TEXTS = [
    "한국어 모델을 만듭니다. ㅋㅋㅋㅋ ㅠㅠ 진짜?!",
    "Pretraining a small model on 2 GPUs isn't easy: 12,345 tokens/s at 3.14e-4.",
    "이모지 👩‍👩‍👧‍👦🇰🇷🎉 와 mixed 한글English日本語 텍스트 1234567890",
    "줄바꿈\n\n\t탭과   여러 칸  \r\n끝",
    "각하 값 (NFD)",
    "<|endoftext|> 라는 글자도 그냥 글자입니다",
]


class NeverStop:
    """Stands in for StopFlag, which would take over this process's signals."""

    requested = False
    log = None

    def arm(self, minutes: float, log: Any = None) -> None:
        pass

    def heartbeat(self, step: int | None = None) -> None:
        pass


class Bomb:
    """What a pickle may hold: something to call when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Words:
    """As much of a tokenizer as building a model takes."""

    bos_token_id = eos_token_id = 0

    def __init__(self, size: int = 500):
        self.size = size

    def get_vocab(self) -> dict[str, int]:
        return {"": self.size - 1}


def options(folder: Path, *more: str) -> list[str]:
    """Options of a tiny CPU run that keeps everything below ``folder``."""
    words = " ".join(TINY).split()
    return [
        *words,
        *("--output-dir", str(folder / "outputs"), "--logs-dir", str(folder / "logs")),
        *("--cache-dir", str(folder / "cache"), *more),
    ]


def config(folder: Path, *more: str) -> t.TrainConfig:
    """The complete configuration of such a run; later options win."""
    return t.resolve_config(t.parse_args(options(folder, *more)), "cpu")[0]


def tiny_run(folder: Path, *more: str) -> t.Run:
    """Build a run in this process, ready to train; all of them share one token cache."""
    reset_accelerate()
    data = [] if "--dataset-path" in more else ["--dummy-data"]
    cfg = config(folder, *data, "--cache-dir", os.environ["TINY_RUNS_CACHE"], *more)
    cfg.output_dir.mkdir(parents=True, exist_ok=True)
    cfg.logs_dir.mkdir(parents=True, exist_ok=True)
    return t.build_run(cfg, t.prepare_corpus(cfg), NeverStop(), t.build_accelerator(cfg))


def reset_accelerate() -> None:
    from accelerate.state import AcceleratorState, PartialState

    torch.set_num_threads(1)  # threads that wait for each other are slow beside other processes
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def forked_run(folder: Path, *more: str) -> str:
    """A whole run in a child of this process, in which everything is imported already; returns what it showed."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    folder.mkdir(exist_ok=True)
    if (child := os.fork()) == 0:
        try:
            sys.stdout = sys.stderr = open(folder / "console", "w", encoding="utf-8")  # noqa: SIM115
            reset_accelerate()
            t.draw_curves_beside = lambda *_, **__: None
            t.hard_exit(t.main(t.set_up_config(t.parse_args(options(folder, *more))), t.StopFlag()))
        finally:
            os._exit(99)
    _, status = os.waitpid(child, 0)
    shown = (folder / "console").read_text(encoding="utf-8")
    assert status == 0, shown
    return shown


def rolling_nats(model: torch.nn.Module, ids: list[int], length: int) -> float:
    """What all but the first token cost, from the definition: in blocks of ``length``, each of which is predicted
    from the ``length`` tokens that end right before its last one, or from all there are.
    """
    nats = 0.0
    for first in range(1, len(ids), length):
        last = min(first + length, len(ids)) - 1
        context = ids[max(0, last - length) : last]
        with torch.no_grad():
            chances = model(torch.tensor([context])).logits[0].double().log_softmax(-1)
        nats -= sum(float(chances[place - 1 - last, ids[place]]) for place in range(first, last + 1))
    return nats


def write_corpus(path: Path, documents: list[Any]) -> Path:
    """Write documents (texts or whole objects) as JSON lines."""
    lines = (item if isinstance(item, dict) else {"text": item} for item in documents)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def documents(count: int) -> list[dict[str, str]]:
    """Distinct documents, one half Korean and one half English, enough of them for a few tiny steps."""
    korean = "{0}번째 기록입니다. 학생 {1}명이 도서관에서 책을 읽고 서울에 있는 친구에게 편지를 보냈습니다. "
    english = "Record {0}: the engineers repaired {1} machines and sent a letter to a friend in Seoul. "
    return [{"text": (korean, english)[n % 2].format(n, n * 7) * 4} for n in range(count)]


def torchrun(script: Path, arguments: list[str], processes: int = 2, **more: Any) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return subprocess.run(
        [*command, str(script), *arguments], env=environment, capture_output=True, text=True, timeout=300, **more
    )


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "outputs" / "metrics.jsonl").read_text().splitlines()]
