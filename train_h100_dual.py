#!/usr/bin/env python3
"""Pretrain a Korean/English decoder (0.1B to 3B parameters) on one or two H100s, or try it on a CPU.

``run_h100_dual.sh`` is the usual way in: it sets up the environment, starts this script under torchrun in the
background and watches it.  By itself, on a CPU (a tiny model, ten steps), on one GPU, on two::

    python3 train_h100_dual.py --test --device cpu --dummy-data
    torchrun --standalone --nproc-per-node 1 train_h100_dual.py --train --dataset-path corpus.jsonl
    torchrun --standalone --nproc-per-node 2 train_h100_dual.py --train --dataset-path corpus.jsonl

The file reads in the order in which a run happens:

    Options                   what can be typed, --help
    Plan                      what is told or refused before torch is imported: GPUs, files, memory, disk
    Stops and restarts        run_info.json, the stop flag, the hang timer
    Watching                  --status, --follow, training_curves.png
    Runtime                   logs, accelerate
    Data                      readers, tokenizer, token cache, order of rows, loader
    Model and optimizer       decoder, loss, attention; AdamW, Muon, schedule
    The run and its state     Run, TrainState; checkpoints
    Metrics                   step lines, trackers, profile
    Evaluation                bits per byte, samples, --generate, --evaluate
    Loop and main             train_step, train, main
"""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":  # until the run has a handler, Ctrl-C ends it without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import ctypes
import difflib
import errno
import faulthandler
import fcntl
import gc
import glob
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import threading
import time
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any, NamedTuple, NoReturn

# ==== Options: by the standard library alone, so that any Python answers --help and a mistake within a second ====

SCRIPT_DIR = Path(__file__).resolve().parent
MINIMUM_PYTHON = (3, 11)  # the least versions stand here only; requirements.txt pins what is installed
if sys.version_info < MINIMUM_PYTHON:  # before anything below that an older one can't do
    sys.exit(f"❌ Python {MINIMUM_PYTHON[0]}.{MINIMUM_PYTHON[1]} 이상이 필요합니다 (지금 {sys.version.split()[0]})")
MINIMUM_VERSIONS = {"torch": "2.11", "transformers": "5.17", "datasets": "4.0", "accelerate": "1.10", "numpy": "2.0"}
USAGE_ERROR, ENVIRONMENT_ERROR, NOT_RUNNING, STOPPED = 2, 1, 3, 130

SMALL_CORPUS_BYTES = 16 << 20
HEAD_BYTES = 1 << 20  # of a file, by which its encoding and format are told
TITLE = r" ?= (?!= ).*\S =\s*$"  # of a wikitext article; "= =" stands around a section's
MOST_SHOWN = 10  # files that are listed on the console
CACHE_VERSION = 10  # of the token cache's format and of how texts are read and split
FORMATS = {".jsonl": "lines", ".ndjson": "lines", ".json": "json", ".csv": ",", ".tsv": "\t", ".txt": "text"}
FORMATS |= {".parquet": "table", ".arrow": "table"}
PACKED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}  # behind any of them but a table's
LEFT_OUT = {  # what isn't read of a directory unless it is named: the reason, and names in lower case
    "숨은 파일": r"\..*",
    "안내문": r"(readme|licen[cs]e).*|requirements.*\.txt",
    "도구가 남긴 파일": r"(state|dataset_(dict|info.*)|(generation_)?config|tokenizer.*|special_tokens_map|vocab)\.json"
    r"|merges\.txt|cache-.*\.arrow|(run|model|training)_info\.json|(metrics|bad_lines)\.jsonl",
}
OWN_FILES = ("run_info.json", "training_info.json", "model_info.json", "training_console.log", "documents.bin")
HELD_OUT = ("test", "eval", "val", "valid", "validation", "dev", "heldout")  # splits beside one of "train"
HUB_NAME = re.compile(r"hf:([\w.-]+(?:/[\w.-]+)?)(?:@([^@:]+))?(?::([^:]*))?(?::(.*))?")  # revision, config, split
MIX_WINDOW = 1000  # rows in which --mix keeps its proportions exactly
# Model types whose input and output embeddings are one unless their config.json says otherwise.
TIED_BY_DEFAULT = {"cohere", "cohere2", "ernie4_5", "gemma", "gemma2", "gemma3_text", "smollm3", "starcoder2"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TOKENIZER_FILES += ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model")
MANIFEST = "training_state/manifest.json"  # of a checkpoint: what its files have to be
LAYOUT_VERSION = 2  # of checkpoints: which rows a step reads, how a document begins, the names in the training state
SYSTEM_ERRORS = {errno.ENOSPC: "디스크 공간이 부족합니다", errno.EDQUOT: "디스크 할당량(quota)이 부족합니다"}
SYSTEM_ERRORS |= {errno.EROFS: "읽기 전용 파일 시스템입니다", errno.EACCES: "접근 권한이 없습니다"}  # to be mended
DECIDED_BY = {"model_size": ("model_config", "init_from"), "vocab_size": ("tokenizer", "init_from")}  # if given
# What has to stay at a resume, and what may change but is told, as it has an effect on what is learnt.
FIXED_OPTIONS = (*DECIDED_BY, "model_config", "init_from", "tokenizer", "seed", "max_seq_length")
FIXED_OPTIONS += ("validation_split", "mix", "optimizer")
LEARNING_OPTIONS = ("learning_rate", "lr_schedule", "warmup_ratio", "decay_ratio", "weight_decay", "max_grad_norm")
LEARNING_OPTIONS += ("precision",)
RATE_LAW = {"adamw": 1.27, "muon": 1.79}  # of --learning-rate auto: Step Law, and what was measured of AdamW


@dataclass(frozen=True)
class Preset:
    """Shape of a decoder with SwiGLU, RMSNorm and rotary positions; widths of 0 are as wide as the stream."""

    layers: int
    hidden: int
    mlp: int
    head: int
    query: int = 0  # width of all heads' queries
    key: int = 0  # and of their keys, and of their values
    tied: bool = True  # input and output embeddings are one

    def matrix_parameters(self) -> int:
        query = self.query or self.hidden
        return self.layers * self.hidden * (2 * query + 2 * (self.key or query) + 3 * self.mlp)

    def parameter_count(self, vocab_size: int) -> int:
        norms = (2 * self.layers + 1) * self.hidden
        return vocab_size * self.hidden * (1 if self.tied else 2) + self.matrix_parameters() + norms


PRESETS = {
    "tiny": Preset(4, 256, 768, 64),
    "125m": Preset(12, 768, 2048, 64),
    "350m": Preset(24, 1024, 2816, 64),
    "760m": Preset(24, 1536, 4096, 128),
    "1.3b": Preset(24, 2048, 5504, 128),
    "3b": Preset(28, 3072, 8192, 128),
}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's memory was too small; NVML, which PyTorch asks before it says so, may not know the GPU."""
    words = "OutOfMemory|out of memory|ALLOC_FAILED|NVML_SUCCESS"
    return isinstance(error, RuntimeError) and re.search(words, repr(error)) is not None


def describe_error(error: Exception) -> tuple[str, bool]:
    """A Korean sentence for an error, and whether its cause is known, so that to try again would not help."""
    text = str(error).strip()
    if match := re.search(r"\(os error (\d+)\)", text):  # of tokenizers, which are written in Rust
        error = OSError(int(match[1]), text)
    if isinstance(error, OSError) and error.errno is not None:  # the system's, whose text may name a Korean path
        path, reason = f" ({error.filename})" if error.filename else "", f"{type(error).__name__}: {error.strerror}"
        return SYSTEM_ERRORS.get(error.errno, reason) + path, error.errno in SYSTEM_ERRORS
    if is_out_of_memory(error):
        smaller = "--batch-size 나 --max-seq-length 를 줄이거나, 학습에는 --gradient-checkpointing"
        return f"GPU 메모리가 부족합니다. {smaller}, 체크포인트 사용에는 --device cpu 를 쓰세요", True
    if isinstance(error, (ValueError, FileNotFoundError, RuntimeError)) and re.search("[가-힣]", text):
        return text, True
    return f"예상하지 못한 오류: {type(error).__name__}: {text[:300]}", False


def complain(error: Exception) -> None:
    print("\n".join(f"❌ {problem}" for problem in describe_error(error)[0].split("\n")), file=sys.stderr)


class Refusal(Exception):
    """Why a run can't start: ``problems`` holds one Korean sentence each, that says what to type instead."""

    def __init__(self, problems: list[str] | str):
        self.problems = [problems] if isinstance(problems, str) else problems
        self.exit_code = USAGE_ERROR if isinstance(self, ValueError) else ENVIRONMENT_ERROR
        super().__init__("\n".join(self.problems))


class UsageProblem(Refusal, ValueError): ...


class EnvironmentProblem(Refusal, RuntimeError): ...


class MissingPath(Refusal, FileNotFoundError): ...


@contextmanager
def refusing(problem: str, source: Any) -> Iterator[None]:
    """Say that a library can't use ``source``, with the first line of its reason: each of its checks has an error."""
    try:
        yield
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise EnvironmentProblem(f"{problem}: {source} ({reason})") from error


def parse_value(kind: Any, text: str) -> Any:
    """Read a value by its kind: a function, choices, or a number's type and limits; ValueError names the nearest."""
    if callable(kind):
        return kind(text)
    if not kind:
        raise ValueError("값을 받지 않는 옵션입니다. 값 없이 쓰세요")
    if isinstance(kind[0], str):
        if text in kind:
            return text
        nearest = difflib.get_close_matches(text, kind, 1, 0.0)[0]
        raise ValueError(f"'{text}' 값은 쓸 수 없습니다 ({' | '.join(kind)}). 가장 가까운 값: {nearest}")
    convert, low, high = (*kind, math.inf)[:3]
    try:
        value = convert(text)
    except ValueError:
        raise ValueError(f"'{text}' 값은 {'정수' if convert is int else '숫자'}가 아닙니다") from None
    if low <= value <= high:  # never nan
        return value
    raise ValueError(f"'{text}' 값은 범위를 벗어났습니다. 가장 가까운 값: {format_value(min(high, max(low, value)))}")


def parse_text(text: str) -> str:
    if not text or any("\ud800" <= char <= "\udfff" for char in text):  # how Python keeps bytes that it can't decode
        raise ValueError("비었거나 UTF-8이 아닌 값입니다. 값과 터미널의 인코딩을 확인하세요")
    return text


def parse_path(text: str) -> Path:
    """A typed path is relative to the caller; a checkpoint named by its weights is their directory."""
    path = Path(os.path.abspath(os.path.expanduser(parse_text(text))))
    return path.parent if path.name == "pytorch_model.bin" else path


def parse_source(text: str) -> Path | str:
    """A directory, or a name on the hub where there is no such path."""
    path = parse_path(text)
    return text if re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", text) and not os.path.exists(path) else path


def parse_dataset(text: str) -> tuple[Path, ...]:
    """One path, a pattern of paths, or a name on the hub; an option that is typed again adds its own."""
    if text.startswith("hf:") and not HUB_NAME.fullmatch(text):
        raise ValueError(f"'{text}' 값을 읽을 수 없습니다. hf:ORG/NAME[@REVISION][:CONFIG[:SPLIT]] 처럼 쓰세요")
    return (Path(text) if text.startswith("hf:") else parse_path(text),)


def parse_mix(text: str) -> str:
    """Return shares by name, as ``en=0.3,ko=0.7``, in whole rows of ``MIX_WINDOW`` that sum up to it."""
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = (word.strip() for word in part.rpartition("="))
        if not name or name in shares:
            raise ValueError(f"'{part}' 부분을 읽을 수 없습니다. 이름=비율을 이름마다 한 번 쓰세요 (예: ko=0.7,en=0.3)")
        shares[name] = parse_value((float, 0, 1e6), number)
    names, total = sorted(shares), sum(shares.values()) or 1.0
    # The rounded ends, so that the parts are whole and so is their sum.
    ends = [int(MIX_WINDOW * end / total + 0.5) for end in itertools.accumulate(map(shares.get, names), initial=0)]
    rows = [high - low for low, high in itertools.pairwise(ends)]
    if 0 in rows:
        raise ValueError(f"'{names[rows.index(0)]}' 비율이 합계의 {1 / MIX_WINDOW:g}보다 작습니다. 빼거나 늘리세요")
    return ",".join(f"{name}={count / MIX_WINDOW:g}" for name, count in zip(names, rows, strict=True))


def option(metavar: str, kind: Any, help_text: str, default: Any = None, **more: Any) -> Any:
    """Declare an option; ``default`` may go by "base", "test" (mode), "cpu", "cpu_test": the last to apply counts."""
    defaults = default if isinstance(default, dict) else {"base": default}
    details = {"metavar": metavar or "|".join(kind), "kind": kind, "help": help_text, "defaults": defaults}
    if default and kind in (parse_path, parse_dataset):  # relative to the script, where a typed one is to the caller
        home = os.path.expanduser(default).removeprefix("~/")  # which stays where nobody knows a home directory
        default = kind(os.path.join(SCRIPT_DIR, home))
    value = None if isinstance(default, dict) else default  # None: resolve_config fills it in
    # group: the title over it and those below in --help; bare: its value where none is typed.
    return field(default=value, metadata={"group": "", "bare": None, "flags": {}, **details, **more})


def switch(flags: dict[str, tuple[Any, str]], default: Any = False, **more: Any) -> Any:
    """Declare options without a value: ``flags`` maps each to what it stands for and its help text."""
    return option("", (), "", default, flags=flags, **more)


POSITIVE, RATE = (int, 1), (float, 1e-9, 1)
OPTIMIZERS = ("adamw", "muon")
TRACKERS = ("tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio", "none")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Every option of a run and its default, one a line or two; None means that the person did not set it."""

    # fmt: off
    mode: str = switch({
        "--test": ("test", "테스트 모드: 짧게 돌려 전체 과정을 확인 (기본)"),
        "--train": ("train", "실제 학습 모드: 전체 에포크")}, "test", group="실행 모드")
    max_steps: int | None = option("N", POSITIVE, "최대 스텝", {"base": None, "test": 10})
    max_epochs: int = option("N", POSITIVE, "최대 에포크 (--max-steps가 없을 때)", default=1)
    max_tokens: int | None = option("N", POSITIVE, "최대 학습 토큰 수")
    max_hours: float | None = option("H", (float, 0.01), "최대 시간 (데이터 준비부터 마지막 저장까지)")
    resume: Path | str | None = option("[auto|PATH]", lambda text: text if text == "auto" else parse_path(text),
        "이어서 학습 (값이 없으면 최신 체크포인트)", bare="auto")
    device: str = option("", ("auto", "cuda", "cpu"), "연산 장치", default="auto")
    seed: int = option("N", (int, 0, 2**31 - 1), "난수 시드", default=42)
    logging_steps: int | None = option("N", POSITIVE, "로그 간격 (스텝)", {"base": 10, "test": 1})
    dataset_path: tuple[Path, ...] = option("PATH", parse_dataset,
        "데이터셋: 디렉토리, 파일, '*.jsonl' (여러 번 쓸 수 있음), 또는 hf:ORG/NAME[@REVISION][:CONFIG[:SPLIT]]",
        default="../../../../datasets", group="데이터")
    tokenizer: Path | str | None = option("PATH|ID", parse_source, "사용할 토크나이저 (없으면 말뭉치로 학습)")
    vocab_size: int | None = option("N", (int, 384, 1_048_576), "학습할 어휘 크기", {"base": 65536, "cpu_test": 2048})
    text_column: str = option("NAME|PATH", parse_text, "본문의 열 이름이나 경로, 예: data.body", default="text")
    validation_split: float = option("F", (float, 0, 0.5), "검증용으로 떼어 둘 문서의 비율", default=0.005)
    mix: str | None = option("ko=F,en=F", parse_mix, "lang(또는 source)별 학습 비율, 예: ko=0.7,en=0.3")
    dummy_data: bool = switch({"--dummy-data": (True, "더미 한국어/영어 데이터로 실행")})
    cache_dir: Path = option("PATH", parse_path, "토큰 캐시 위치",
        default=f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/h100_dual")
    output_dir: Path = option("PATH", parse_path, "출력 디렉토리", default="./outputs", group="출력")
    logs_dir: Path = option("PATH", parse_path, "로그 디렉토리", default="./logs")
    model_size: str | None = option("", tuple(PRESETS), "모델 크기", {"base": "1.3b", "cpu_test": "tiny"}, group="모델")
    model_config: Path | None = option("PATH", parse_path, "Hugging Face config.json (또는 그 디렉토리)")
    init_from: Path | str | None = option("PATH|ID", parse_source, "기존 가중치에서 이어서 사전학습")
    batch_size: int = option("N", POSITIVE, "GPU당 배치 크기", default=4, group="학습 하이퍼파라미터")
    learning_rate: float | str = option("LR|auto", lambda text: text if text == "auto" else parse_value(RATE, text),
        "학습률 (auto: 모델과 데이터의 크기로)", default=1e-4)
    max_seq_length: int | None = option("N", (int, 8, 131072), "최대 시퀀스 길이", {"base": 2048, "cpu_test": 256})
    gradient_accumulation_steps: int | None = option("N", POSITIVE, "기울기 누적 횟수", {"base": 8, "test": 1})
    optimizer: str = option("", OPTIMIZERS, "옵티마이저 (muon: 은닉 행렬은 Muon, 나머지는 AdamW)", default="adamw")
    lr_schedule: str = option("", ("wsd", "cosine", "linear", "constant"), "학습률 스케줄", default="wsd")
    warmup_ratio: float = option("F", (float, 0, 1), "워밍업 비율", default=0.05)
    decay_ratio: float = option("F", (float, 0.01, 1), "wsd가 끝에서 내려가는 구간의 비율", default=0.2)
    weight_decay: float = option("F", (float, 0, 10), "가중치 감쇠 (행렬에만)", default=0.1)
    max_grad_norm: float = option("F", (float, 1e-6), "기울기 클리핑 최대 노름", default=1.0)
    precision: str | None = switch({
        "--bf16": ("bf16", "BF16 mixed precision (GPU 기본)"),
        "--fp16": ("fp16", "FP16 mixed precision (GPU 전용)"),
        "--fp8": ("fp8", "FP8 행렬곱 + BF16 (실험 기능, Hopper 전용, torchao 필요)"),
        "--fp32": ("fp32", "FP32 precision (CPU 기본)")}, {"base": "bf16", "cpu": "fp32"}, group="H100 최적화")
    compile: bool | None = switch({
        "--no-compile": (False, "torch.compile 비활성화 (CPU 기본)"),
        "--compile": (True, "torch.compile 사용 (GPU 기본)")}, {"base": True, "cpu": False})
    num_gpus: int = option("N", (int, 1, 64), "사용할 GPU 수", default=2)
    attention: str = option("", ("auto", "cudnn", "flash", "fa3", "efficient", "math"), "어텐션 커널", default="auto")
    bf16_allreduce: bool = switch({"--bf16-allreduce": (True, "기울기를 BF16으로 주고받음 (GPU 사이가 느릴 때)")})
    self_test: bool = switch({"--no-self-test": (False, "시작할 때의 머신 점검을 건너뜀 (GPU)")}, True)
    gradient_checkpointing: bool = switch({"--gradient-checkpointing": (True, "활성값을 다시 계산해 메모리 절약")})
    find_batch_size: bool = switch({"--find-batch-size": (True, "GPU 메모리에 들어갈 때까지 배치 크기를 절반씩 줄임")})
    profile: bool = switch({"--profile": (True, "몇 스텝을 프로파일해 시간이 어디에 쓰였는지 보여 줌")})
    save_steps: int = option("N", POSITIVE, "모델 저장 간격 (스텝)", default=500, group="저장과 평가")
    save_initial: bool = switch({"--no-save-initial": (False, "초기 모델 저장 비활성화")}, True)
    save_total_limit: int | None = option("N", POSITIVE, "남겨 둘 체크포인트 수 (기본: 전부)")
    eval_steps: int = option("N", POSITIVE, "평가 간격 (스텝)", default=500)
    sample_steps: int = option("N", POSITIVE, "샘플 생성 간격 (스텝)", default=1000)
    prompt: str | None = option("TEXT", parse_text, "샘플을 생성하거나 --generate로 이어 쓸 글")
    report_to: str = option("NAMES",
        lambda text: ",".join(dict.fromkeys(parse_value(TRACKERS, name.strip()) for name in text.split(","))),
        "지표를 보낼 곳, 예: tensorboard,wandb", default="tensorboard")
    max_restarts: int | None = option("N", (int, 0, 100), "재시작 횟수", {"base": 3, "test": 0}, group="장애 대응")
    skip_spikes: bool = switch({"--no-skip-spikes": (False, "손실이나 기울기가 튄 스텝도 건너뛰지 않음")}, True)
    hang_timeout: float = option("MIN", (float, 0.05, 10_000), "진행이 없으면 끝낼 때까지의 시간 (분)", default=30)
    generate: Path | None = option("CHECKPOINT", parse_path, "--prompt 를 이어 쓰고 끝냄", group="체크포인트 사용")
    evaluate: Path | None = option("CHECKPOINT", parse_path, "체크포인트를 --dataset-path 로 평가하고 끝냄")
    max_new_tokens: int = option("N", POSITIVE, "이어 쓸 최대 토큰 수", default=200)
    temperature: float = option("F", (float, 0, 10), "표본 추출 온도 (0: 가장 유력한 토큰)", default=0.8)
    top_p: float = option("F", (float, 0.01, 1), "확률의 합이 이 값인 상위 토큰만 씀", default=0.95)
    nnodes: int | None = option("N", (int, 1, 999), "머신 수. 머신마다 한 번씩 실행 (기본: 1)", group="여러 머신")
    node_rank: int | None = option("N", (int, 0, 998), "이 머신의 번호 (0번이 저장)")
    rdzv_endpoint: str | None = option("HOST:PORT", parse_text, "0번 머신의 주소와 빈 포트")
    verbose: bool = switch({"--verbose": (True, "상세 로그 출력")}, group="실행 제어")
    # fmt: on

    @property
    def mix_counts(self) -> dict[str, int]:
        """Rows of each name among every ``MIX_WINDOW`` rows; empty without ``--mix``."""
        pairs = (part.rpartition("=") for part in (self.mix or "").split(",") if part)
        return {name: round(float(share) * MIX_WINDOW) for name, _, share in pairs}

    def tokens_per_step(self, world_size: int) -> int:
        return self.batch_size * self.gradient_accumulation_steps * world_size * self.max_seq_length


def as_typed(name: str) -> str:
    return "--" + name.replace("_", "-")


OPTIONS = {name: item for item in fields(TrainConfig) for name in item.metadata["flags"] or [as_typed(item.name)]}


def parse_args(argv: Iterable[str]) -> TrainConfig:
    """Read the command line; UsageProblem holds all mistakes, so that they can be mended in one go."""
    problems, values = [], {}
    # It only splits the line into options and texts: it would stop at the first mistake, in English.
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in OPTIONS:
        pair = {"type": lambda text, name=name: (name, text), "const": (name, None)}
        parser.add_argument(name, dest="typed", default=[], action="append", nargs="?", **pair)
    line, unknown = parser.parse_known_args(list(argv))
    known = [*OPTIONS, *os.environ.get("LAUNCHER_OPTIONS", "").split()]
    for word in [word for word in unknown if word.startswith("-")] or unknown[:1]:  # other words may be its value
        close = difflib.get_close_matches(word.partition("=")[0], known, 1, 0.65)
        advice = f"가장 가까운 옵션: {close[0]}" if close else "전체 옵션: --help"
        advice = "--dataset-path 의 패턴은 따옴표로 묶으세요: '*.jsonl'" if os.path.exists(word) else advice
        problems.append(f"알 수 없는 {'옵션' if word.startswith('-') else '인자'}: {word} ({advice})")
    for name, text in line.typed:
        details, field_name = OPTIONS[name].metadata, OPTIONS[name].name
        value = details["flags"][name][0] if details["flags"] else details["bare"]
        try:
            if text is None and value is None:
                raise ValueError(f"값이 없습니다. 이렇게 쓰세요: {name} {details['metavar']}")
            value = value if text is None else parse_value(details["kind"], text)
            values[field_name] = values.get(field_name, ()) + value if isinstance(value, tuple) else value
        except ValueError as error:
            problems.append(f"{name}: {error}")
    exclusive = [{"--dummy-data", "--dataset-path"}, {"--model-config", "--init-from"}]
    exclusive += [{"--generate", "--evaluate", "--train"}, *(item.metadata["flags"] for item in fields(TrainConfig))]
    for group in exclusive:
        together = sorted({name for name, _ in line.typed}.intersection(group))
        if len(together) > 1:
            problems.append(f"함께 쓸 수 없는 옵션입니다: {', '.join(together)}. 하나만 쓰세요")
    if problems:
        raise UsageProblem(problems)
    return validate_config(TrainConfig(**values))


def resolve_config(cfg: TrainConfig, device: str) -> tuple[TrainConfig, list[str]]:
    """Fill in what the person left open, for ``device`` ("cuda" or "cpu"), and say what was adapted to a CPU."""
    situations, chosen, adapted = {"base", cfg.mode, device, f"{device}_{cfg.mode}"}, {"device": device}, []
    for item in [item for item in fields(TrainConfig) if getattr(cfg, item.name) is None]:
        situation, value = [pair for pair in item.metadata["defaults"].items() if pair[0] in situations][-1]
        chosen[item.name] = value
        if situation.startswith("cpu") and not any(getattr(cfg, name) for name in DECIDED_BY.get(item.name, ())):
            switches = [name for name, (meaning, _) in item.metadata["flags"].items() if meaning == value]
            adapted += switches or [f"{as_typed(item.name)} {value}"]
    cfg, notes = replace(cfg, **chosen), [f"CPU에 맞춰 바꾼 설정: {' '.join(adapted)}"] if adapted else []
    told = read_config(cfg.init_from).get("vocab_size") or -(-tokenizer_size(cfg.tokenizer) // 128) * 128
    return validate_config(replace(cfg, vocab_size=told or cfg.vocab_size)), notes  # as far as the files tell it


def validate_config(cfg: TrainConfig) -> TrainConfig:
    """Return the options, or raise UsageProblem: some can't be meant, or not on ``cfg.device`` once that is known."""
    problems, size = [], cfg.vocab_size or 0
    if cfg.resume and cfg.mode == "test":
        problems.append("--resume: 테스트 모드에서는 이어서 학습하지 않습니다. --train --resume 을 쓰세요")
    if size % 128 and not (cfg.tokenizer or cfg.init_from):
        problems.append(f"--vocab-size {size}: 128의 배수여야 합니다. 가장 가까운 값: {round(size / 128) * 128}")
    if cfg.learning_rate == "auto" and cfg.init_from:
        problems.append("--learning-rate auto: --init-from 에는 쓸 수 없습니다. 원래 학습률의 1/5~1/2을 주세요")
    if cfg.generate and not cfg.prompt:
        problems.append('--generate: 이어 쓸 글이 없습니다. 예: --prompt "오늘 아침"')
    if cfg.evaluate and uses_dummy_data(cfg):
        problems.append("--evaluate: 평가할 데이터가 없습니다. 예: --dataset-path corpus.jsonl")
    if len(cfg.dataset_path) > 1 and any(str(path).startswith("hf:") for path in cfg.dataset_path):
        problems.append("--dataset-path: 허브 데이터셋은 하나만, 파일 없이 쓸 수 있습니다")
    machines = [cfg.nnodes, cfg.node_rank, cfg.rdzv_endpoint]
    complete = None not in machines and cfg.node_rank < cfg.nnodes and re.fullmatch(r".+:\d+", cfg.rdzv_endpoint)
    if not complete and machines not in ([None, None, None], [1, None, None]):
        problems.append("셋을 함께 쓰세요 (번호는 0부터): --nnodes 2 --node-rank 0 --rdzv-endpoint 10.0.0.1:29500")
    if cfg.device == "cpu" and cfg.precision in ("fp16", "fp8"):  # where accelerate would silently run fp32
        problems.append(f"--{cfg.precision}: CPU에서는 쓸 수 없습니다. --fp32 또는 --bf16 을 쓰세요")
    for name in ("find_batch_size", "bf16_allreduce"):  # DDP's hook for the latter asks for NCCL
        if cfg.device == "cpu" and getattr(cfg, name):
            problems.append(f"{as_typed(name)}: CPU에서는 쓸 수 없습니다. 빼고 실행하세요")
    unusable = ("cudnn", "efficient", "fa3") if cfg.device == "cpu" else ("cudnn", "flash", "fa3")  # in fp32
    if cfg.attention in unusable and (cfg.device == "cpu" or (cfg.device == "cuda" and cfg.precision == "fp32")):
        problems.append(f"--attention {cfg.attention}: 이 설정에서는 쓸 수 없습니다. --attention auto 를 쓰세요")
    if problems:
        raise UsageProblem(problems)
    return cfg


def format_value(value: Any) -> str:
    """Write a value as a person would type it: 1e-4 rather than 0.0001."""
    if isinstance(value, float) and 0 < value < 1e-3:
        return re.sub(r"\.?0*e-0?", "e-", f"{value:.6e}")
    return f"{value:g}" if isinstance(value, float) else str(value)


def format_duration(seconds: float) -> str:
    """Days, hours, minutes and seconds as 3일 1:02:03."""
    return re.sub(r" days?, ", "일 ", str(timedelta(seconds=round(seconds))))


def help_text() -> str:
    lines, situations = [], {"base": "기본", "test": "테스트", "cpu": "CPU", "cpu_test": "CPU 테스트"}
    for item in fields(TrainConfig):
        details, defaults = item.metadata, item.metadata["defaults"].items()
        lines += ["", f"{details['group']}:"] if details["group"] else []
        notes = ", ".join(f"{situations[name]}: {format_value(value)}" for name, value in defaults if value is not None)
        rows = {name: text for name, (_, text) in details["flags"].items()}
        if not rows:
            rows[f"{as_typed(item.name)} {details['metavar']}"] = details["help"] + (f" ({notes})" if notes else "")
        for left, text in rows.items():
            lines.append(f"  {left:<31} {text}" if len(left) < 32 else f"  {left}\n{'':34}{text}")
    return "\n".join(lines[1:])


def display_width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


# ==== Plan: what can be told, and refused, before anything heavy is imported ==========


class Gpu(NamedTuple):
    name: str
    total: int  # MiB of memory
    used: int


def query_gpus(visible: str | None) -> list[Gpu]:
    """Ask nvidia-smi for the GPUs that a CUDA_VISIBLE_DEVICES leaves visible, in its order."""
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total,memory.used", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise EnvironmentProblem(f"nvidia-smi가 답하지 않습니다 ({error}). 드라이버를 확인하세요") from error
    gpus = {}
    for line in answer.strip().splitlines():
        index, uuid, name, *numbers = (part.strip() for part in line.split(","))
        gpus[index, uuid] = Gpu(name, *(int(number) if number.isdigit() else 0 for number in numbers))
    visible = visible and re.sub(r"(^|,)\s*(-1|NoDevFiles)\b.*", "", visible)  # for CUDA and Slurm: none from here on
    wanted = [index for index, _ in gpus] if visible is None else re.findall(r"[^,\s]+", visible)
    fits = [[name for name in gpus if key == name[0] or name[1].startswith(key)] for key in wanted]  # a UUID's start
    if any(len(names) != 1 for names in fits) or len({names[0] for names in fits}) < len(fits):
        reason = "MIG 장치로는 학습할 수 없습니다" if "MIG-" in visible else "없거나 두 번 고른 GPU가 있습니다"
        raise EnvironmentProblem(f"CUDA_VISIBLE_DEVICES={visible}: {reason}. nvidia-smi -L 의 번호나 UUID를 쓰세요")
    return [gpus[names[0]] for names in fits]


def usable_cpus() -> int:
    """CPUs that this process may use: those of its affinity, and of these what a container's quota gives time on."""
    count = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):  # a kernel without cgroups; no limit
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        count = min(count, max(1, quota // period))
    return count


def plan_device(cfg: TrainConfig, num_gpus: int) -> tuple[str, list[Gpu], list[str], list[str]]:
    """Device, its GPUs, notes and problems: a test goes on with what is there, training only with what was asked."""
    if cfg.device == "cpu":
        return "cpu", [], [], []
    gpus, lacking = query_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))[:num_gpus], []
    if not gpus and cfg.device == "auto" and cfg.mode == "test":
        return "cpu", [], [f"GPU가 없어 CPU 프로세스 {num_gpus}개(gloo)로 실행합니다"], []
    if not gpus:
        return "cuda", [], [], ["GPU를 찾을 수 없습니다. CPU로 학습하려면 --device cpu 를 쓰세요"]
    if len(gpus) < num_gpus:
        lacking.append(f"GPU {num_gpus}개를 요청했지만 {len(gpus)}개만 있습니다 (--num-gpus {len(gpus)})")
    for index, gpu in enumerate(gpus):
        if gpu.used > 1024:  # a driver and a display take less
            used = f"GPU {index} ({gpu.name})의 메모리 {gpu.used:,} MiB를 다른 프로세스가 씁니다"
            lacking.append(f"{used}. 비우거나 CUDA_VISIBLE_DEVICES 로 다른 GPU를 고르세요")
    return ("cuda", gpus, lacking, []) if cfg.mode == "test" else ("cuda", gpus, [], lacking)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; a missing or torn file is an empty one, and so is one with something else in it."""
    with suppress(FileNotFoundError, NotADirectoryError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    return {}


def known_numbers(content: dict[str, Any]) -> dict[str, Any]:
    """Replace what JSON has no word for, NaN and infinities, by null."""
    return json.loads(json.dumps(content), parse_constant=lambda word: None)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object so that a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    text = json.dumps(known_numbers(content), ensure_ascii=False, indent=2) + "\n"
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        if not path.exists():
            raise
        with open(path, "r+b") as stream:  # on a full disk: better a state that a kill may tear than none
            stream.write(text.encode())
            stream.truncate()


def file_checksum(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def display_path(path: Path) -> str:
    """A path as the person at the prompt can use it: relative where that is shorter."""
    relative = os.path.relpath(path)
    return min(str(path), relative if relative.startswith("..") else f"./{relative}", key=len)


def list_checkpoints(output_dir: Path, after: int = -1) -> list[Path]:
    """The directories called ``checkpoint-N`` of a run, oldest first, where N is a step ``after`` this one."""
    steps = {path: int(path.name[11:]) for path in output_dir.glob("checkpoint-*") if path.name[11:].isdecimal()}
    return sorted((path for path, step in steps.items() if step > after), key=steps.get)


def checkpoint_damage(checkpoint: Path, thorough: bool) -> str | None:
    """What is not as the manifest says, as a Korean phrase: sizes and, of small files or if ``thorough``, checksums."""
    try:
        files = read_json(checkpoint / MANIFEST).get("files") or {}
        if "training_state/state.pt" not in files:
            return f"{MANIFEST} 파일이 없거나 깨졌습니다. 학습 상태는 최근 2개에만 남습니다"
        for name, entry in files.items():
            path, size = checkpoint / name, entry.get("bytes")
            if not path.is_file() or path.stat().st_size != size:
                return f"{name} 파일이 없거나 크기가 다릅니다"
            if (thorough or size < 1 << 20) and file_checksum(path) != entry.get("sha256"):
                return f"{name} 파일의 내용이 저장한 것과 다릅니다"
    except OSError as error:
        return f"읽을 수 없습니다: {error}"
    return None


def newest_whole(checkpoints: list[Path], thorough: bool = False) -> tuple[Path | None, list[str]]:
    """The last whole one of ``checkpoints`` and a sentence on each damaged later one."""
    damaged = []
    for path in reversed(checkpoints[-3:]):  # the older ones' training state was removed
        if (damage := checkpoint_damage(path, thorough)) is None:
            return path, damaged
        damaged.append(f"쓸 수 없는 체크포인트를 건너뜁니다: {display_path(path)} ({damage})")
    return None, damaged


def options_of(cfg: TrainConfig) -> dict[str, Any]:
    values = asdict(cfg) | {"dataset_path": corpus_name(cfg)}
    if cfg.model_config or cfg.init_from:
        values["model_size"] = None  # the preset that would have been taken
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


@dataclass(frozen=True)
class ResumePoint:
    step_tokens: int  # that all ranks together read a step
    checkpoint: Path | None = None  # None: at its first step
    info: dict[str, Any] = field(default_factory=dict)  # the checkpoint's training_info.json
    notes: tuple[str, ...] = ()  # Korean, to be told


def find_resume_point(cfg: TrainConfig, world_size: int, fingerprint: str = "", thorough: bool = False) -> ResumePoint:
    """Decide where a run begins; each step of a resumed one reads as many tokens as it did."""
    typed = cfg.tokens_per_step(world_size)
    if cfg.resume is None or node_rank(cfg):  # other machines may not have the checkpoints
        return ResumePoint(typed)
    place = cfg.output_dir if cfg.resume == "auto" else cfg.resume
    checkpoints = list_checkpoints(place) if cfg.resume == "auto" else [place]
    if not checkpoints and read_json(place / "run_info.json").get("mode") == "train":
        return ResumePoint(typed, notes=("아직 체크포인트가 없어 처음부터 시작합니다",))
    checkpoint, notes = newest_whole(checkpoints, thorough)
    if checkpoint is None:
        advice = "가중치 파일이 온전한 것이 있으면 --init-from 과 새 --output-dir 로 이어받을 수 있습니다"
        raise EnvironmentProblem([f"이어서 학습할 온전한 체크포인트가 없습니다: {place} ({advice})", *notes])
    info = read_json(checkpoint / "training_info.json")
    if problems := resume_problems(cfg, checkpoint, info, fingerprint):
        raise EnvironmentProblem(problems)
    tokens, accumulation = info["tokens_seen"] // info["step"], cfg.gradient_accumulation_steps
    batch = typed // accumulation
    if tokens % batch:
        text = f"체크포인트의 스텝당 토큰({tokens:,})이 한 번에 읽는 {batch:,}개의 배수가 아닙니다"
        raise EnvironmentProblem(f"{text}. --batch-size 나 GPU 수를 바꾸세요")
    if tokens != typed:
        notes.append(f"스텝당 토큰({tokens:,})이 같도록 기울기 누적을 {accumulation} → {tokens // batch} 로 맞춥니다")
    before, after = info["options"], options_of(cfg)
    for name in LEARNING_OPTIONS:
        if after[name] not in (before.get(name, after[name]), "auto"):  # an older version knew fewer
            notes.append(f"바뀐 옵션: {name} {before[name]} → {after[name]}")
    return ResumePoint(tokens, checkpoint, info, tuple(notes))


def resume_problems(cfg: TrainConfig, checkpoint: Path, info: dict[str, Any], fingerprint: str) -> list[str]:
    """What keeps a run from reading on where a checkpoint with this ``training_info.json`` is, a sentence each."""
    if info.get("layout_version") != LAYOUT_VERSION:
        advice = f"가중치만 이어받으려면 --init-from {checkpoint} 와 새 --output-dir 를 쓰세요"
        return [f"다른 버전이 쓴 체크포인트라 이어서 학습할 수 없습니다 ({advice})"]
    if info["mode"] == "test":
        return ["테스트 모드의 체크포인트에서는 이어서 학습하지 않습니다. --resume 없이 시작하세요"]
    problems, before, after = [], info["options"], options_of(cfg)
    for name in FIXED_OPTIONS:
        moved = after[name] and (name == "tokenizer" or (name == "init_from" and before[name]))  # the fingerprint tells
        others = any(before[other] or after[other] for other in DECIDED_BY.get(name, ()))
        if before[name] == after[name] or moved or others:
            continue
        typed, value = as_typed(name), before[name]
        instead = f"{typed} 없이 실행하세요" if value is None else f"쓸 값: {typed} {format_value(value)}"
        problems.append(f"{typed}: 체크포인트와 다른 값으로는 이어서 학습할 수 없습니다 ({instead})")
    if fingerprint and fingerprint != info["data_fingerprint"]:
        text = "체크포인트와 데이터나 토크나이저의 내용이 다릅니다. 같은 데이터면 --tokenizer"
        problems.append(f"{text} {checkpoint} 를 덧붙이고, 새 데이터로는 --init-from 을 쓰세요")
    return problems


def lock_output(output_dir: Path, mode: str, patience: float = 0.0) -> Any:
    """Open the lock of a run's outputs and take it; EnvironmentProblem: another run has it ``patience`` seconds on."""
    lock = open(output_dir / ".lock", mode, encoding="utf-8")  # noqa: SIM115 - it may be held to the process's end
    for _ in range(1 + round(5 * patience)):
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        time.sleep(0.2)
    lock.seek(0)
    text = f"이 출력 디렉토리에서 다른 학습이 실행 중입니다 (PID {lock.read()}): {output_dir}"
    raise EnvironmentProblem(f"{text}. 다른 --output-dir 와 --logs-dir 를 쓰거나 --stop 으로 멈추세요")


def output_problems(cfg: TrainConfig) -> list[str]:
    problems = []
    for name in ("output_dir", "logs_dir", "cache_dir"):
        path = getattr(cfg, name)
        nearest = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
        try:  # permission bits don't tell all
            TemporaryFile(dir=nearest).close()
        except OSError as error:
            reason = describe_error(error)[0] if os.path.exists(nearest) else f"{nearest} 은(는) 대상이 없는 링크"
            problems.append(f"쓸 수 없는 디렉토리입니다: {path} ({reason}). 다른 경로를 {as_typed(name)} 로 주세요")
    info = read_json(cfg.output_dir / "run_info.json")
    # In a shared directory the first machine, which judges it, may be at work already.
    if problems or node_rank(cfg) or is_restart(info):
        return problems
    if (cfg.output_dir / ".lock").exists():
        lock_output(cfg.output_dir, "r+").close()  # writable, as NFS's flock wants it
    return results_problems(cfg, info)


def results_problems(cfg: TrainConfig, info: dict[str, Any]) -> list[str]:
    """A sentence if a run, which may be started anew, would remove what a training run of this ``info`` left."""
    goes_on = cfg.resume == "auto" or (cfg.resume and cfg.resume.resolve().parent == cfg.output_dir.resolve())
    earlier = list_checkpoints(cfg.output_dir) or (cfg.output_dir / "metrics.jsonl").exists()
    if not earlier or goes_on or is_restart(info) or (cfg.resume is None and info.get("mode") == "test"):
        return []
    return [f"이전 학습의 결과가 있습니다: {cfg.output_dir} (--train --resume 이나 다른 --output-dir 를 쓰세요)"]


def node_rank(cfg: TrainConfig) -> int:
    return int(os.environ.get("GROUP_RANK", "0")) if cfg.node_rank is None else cfg.node_rank


def log_path(cfg: TrainConfig, name: str) -> Path:
    """One of the launcher's files on this machine, which the other machines' may lie beside."""
    return cfg.logs_dir / (name.replace(".", f"_node_{node_rank(cfg)}.") if node_rank(cfg) else name)


def corpus_name(cfg: TrainConfig) -> str:
    return ", ".join(map(str, cfg.dataset_path))


def known_pin(cfg: TrainConfig) -> str | None:
    """The hub's data set with the commit that a run which goes on (restarted, --resume) began with."""
    info = read_json(cfg.output_dir / "run_info.json")
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0  # of this run or, on other machines, theirs
    goes_on, known = cfg.resume is not None or restarted, info.get("dataset", {})
    if isinstance(cfg.resume, Path) and (info := read_json(cfg.resume / "training_info.json")):  # in any directory
        known = {"asked": info["options"]["dataset_path"], "pinned": info["corpus"].get("dataset")}
    return known["pinned"] if goes_on and known.get("asked") == corpus_name(cfg) else None


def uses_dummy_data(cfg: TrainConfig) -> bool:
    """Whether generated text stands in for a corpus: asked for, or a test without any at the default path."""
    default = cfg.dataset_path == TrainConfig.dataset_path and not cfg.dataset_path[0].exists()
    return cfg.dummy_data or (cfg.mode == "test" and default)


def split_name(path: Path) -> tuple[str, str, str]:
    """Of a file's name in lower case the stem, the suffix that tells the format, and that of a packed file."""
    name = path.name.lower()
    packed = next((suffix for suffix in PACKED if name.endswith(suffix)), "")
    stem, suffix = os.path.splitext(name.removesuffix(packed))
    is_split = suffix[1:] in ("train", *HELD_OUT)  # which tells no format: kowikitext_20200920.train
    return (stem + suffix, "", packed) if is_split else (stem, suffix, packed)


def is_json_object(line: bytes | str) -> bool:
    with suppress(ValueError, RecursionError):
        return isinstance(json.loads(line), dict)
    return False


def file_format(path: Path) -> str:
    """How a file is read, by its name, or where that has no suffix by its first line; "" if it isn't."""
    _, suffix, packed = split_name(path)
    kind = FORMATS.get(suffix, "")
    if not suffix and not packed and path.is_file():
        with open(path, "rb") as file:
            line = file.readline(HEAD_BYTES)
        kind = "lines" if is_json_object(line) else "text" if re.match(TITLE, line.decode(errors="replace")) else ""
    return "" if packed and kind == "table" else kind


def why_left_out(path: Path, own: set[str]) -> str:
    """Why what lies in a directory is no part of the corpus, in Korean; "" for a file or directory to be read."""
    for reason, names in LEFT_OUT.items():
        if re.fullmatch(names, path.name.lower()):
            return reason
    if path.exists() and not os.access(path, os.R_OK):
        return "읽을 권한이 없음"
    if path.is_dir():
        ours = os.path.realpath(path) in own or any((path / name).exists() for name in OWN_FILES)
        return "이 프로젝트의 출력, 로그, 캐시" if ours else ""
    if not file_format(path):
        return "읽지 않는 형식"
    if not path.exists():
        raise MissingPath(f"링크가 가리키는 파일이 없습니다: {path} (다시 받거나 링크를 지우세요)")
    return ""


def list_directory(folder: Path, own: set[str]) -> dict[Path, str]:
    """What lies in a directory, in order, each with why it is left out, by itself or for what lies beside it."""
    paths, mixed = sorted(folder.iterdir()), folder / "mixed_pretraining.jsonl"
    if mixed in paths:  # it stands for all that lies beside and below it
        return {path: "" if path == mixed else f"{mixed.name}만 읽음" for path in paths}
    reasons = {path: why_left_out(path, own) for path in paths}
    # Splits are told apart without the numbers of their shards, as in test-00000-of-00012.parquet.
    stems = {path: re.sub(r"[-_.]?\d+(-of-\d+)?", "", split_name(path)[0]) for path in paths if not reasons[path]}
    held_out = {stem.replace("train", word) for stem in stems.values() if "train" in stem for word in HELD_OUT}
    unpacked: dict[str, Path] = {}
    for path, stem in stems.items():
        if stem in held_out:
            reasons[path] = "train과 나란히 있는 검증·시험 데이터"
        elif unpacked.setdefault(path.name[: -len(split_name(path)[2]) or None], path) != path and path.is_file():
            reasons[path] = "이미 읽는 것"
    return reasons


def corpus_files(cfg: TrainConfig) -> tuple[list[Path], dict[str, list[Path]]]:
    """The corpus's files in a stable order, none of dummy text or a hub's data set; what is left out, by reason."""
    files, left_out, seen = [], {}, set()
    own = {os.path.realpath(path) for path in (cfg.output_dir, cfg.logs_dir, cfg.cache_dir)}

    def add(path: Path, reason: str = "") -> None:
        place = reason or path.stat()[1:3]  # inode and device, as links may lead to the same
        reason = reason or "이미 읽는 것" * (place in seen)
        seen.add(place)
        if reason:
            left_out.setdefault(reason, []).append(path)
        elif path.is_dir():
            for item in list_directory(path, own).items():
                add(*item)
        else:
            files.append(path)

    if uses_dummy_data(cfg) or corpus_name(cfg).startswith("hf:"):
        return files, left_out
    for typed in cfg.dataset_path:
        paths = [typed] if typed.exists() else map(Path, sorted(glob.glob(str(typed), recursive=True)))
        if not (paths := [path for path in paths if path.exists()]):
            raise MissingPath(f"데이터셋이 없습니다: {typed} (--dataset-path 로 주거나 --dummy-data 를 쓰세요)")
        for path in paths:  # read whatever they are called
            if not path.is_dir() and not file_format(path):
                raise MissingPath(f"읽는 형식이 아닙니다: {path} (읽는 것: {', '.join(FORMATS)})")
            add(path)
    if not any(path.stat().st_size for path in files):
        others = "".join(f"; {reason} {len(paths):,}개" for reason, paths in left_out.items())
        raise MissingPath(f"데이터가 든 파일이 없습니다: {corpus_name(cfg)} (읽는 것: {', '.join(FORMATS)}{others})")
    return files, left_out


def corpus_folders(cfg: TrainConfig, files: list[Path]) -> tuple[Path, Path]:
    """Where the token cache keeps a corpus, by all that decides its tokens, and there its lists of documents."""
    parts: list[Any] = [CACHE_VERSION, cfg.text_column, None if files else known_pin(cfg) or corpus_name(cfg)]
    parts.append(read_config(cfg.model_config or cfg.init_from).get("model_type"))  # see ``write_cache``
    parts += [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    source = cfg.tokenizer or cfg.init_from
    if isinstance(source, Path):
        parts += [[name, file_checksum(source / name)] for name in TOKENIZER_FILES if (source / name).is_file()]
    else:
        parts.append(f"hub:{source}" if source else f"trained:{cfg.vocab_size}")
    lists = [list(cfg.mix_counts), cfg.validation_split]  # whatever the shares
    keys = [hashlib.blake2b(json.dumps(key).encode(), digest_size=12).hexdigest() for key in (parts, lists)]
    return cfg.cache_dir / keys[0], cfg.cache_dir / keys[0] / f"lists-{keys[1]}"


def estimated_bytes(files: list[Path]) -> int:
    """Bytes of text in the files, roughly: compressed ones hold 2.5 times their size, as measured."""
    packed = (*PACKED, ".parquet")
    return int(sum(path.stat().st_size * (2.5 if path.suffix.lower() in packed else 1) for path in files))


def total_steps(cfg: TrainConfig, rows: int, step_tokens: int, done: int = 0) -> int:
    """Optimizer steps of a run over ``rows`` rows, of which a checkpoint has ``done``; a rest of a batch isn't read."""
    steps = cfg.max_steps or cfg.max_epochs * rows * cfg.max_seq_length // step_tokens
    steps = min(steps, max(1, (cfg.max_tokens or steps * step_tokens) // step_tokens))
    if steps < done:
        text = f"체크포인트는 스텝 {done:,}인데 전체 스텝이 {steps:,}입니다"
        raise EnvironmentProblem(f"{text}. --max-steps, --max-tokens, --max-epochs 를 늘리세요")
    return steps


def peak_rate(cfg: TrainConfig, parameters: int, tokens: int, info: dict[str, Any]) -> tuple[float | None, str]:
    """The schedule's peak, None where it isn't known yet, and its words; ``auto`` keeps a checkpoint's (``info``)."""
    if cfg.learning_rate != "auto":
        return cfg.learning_rate, format_value(cfg.learning_rate)
    rate = None
    if parameters and tokens:  # Step Law (Li et al., 2025), by the parameters without embeddings and the run's tokens
        rate = float(f"{RATE_LAW[cfg.optimizer] * parameters**-0.713 * tokens**0.307:.1e}")
    basis = f"파라미터 {parameters / 1e6:,.1f}M, 토큰 {tokens / 1e6:,.1f}M"
    if info:
        rate, fresh = info["options"]["learning_rate"], rate
        basis = "체크포인트의 값" + (f", 새로 시작하면 {format_value(fresh)}" if fresh else "")
    return rate, f"{format_value(rate)} (auto: {basis})" if rate else "auto (데이터를 준비한 뒤 정해집니다)"


def read_config(source: Path | str | None) -> dict[str, Any]:
    """The config.json that ``source``, a directory or the file itself, stands for; empty where it isn't here."""
    path = Path(source or os.devnull)
    return read_json(path if path.suffix == ".json" else path / "config.json")


def tokenizer_size(source: Path | str | None) -> int:
    """Vocabulary of a saved tokenizer, up to its largest id; 0 if its file doesn't tell."""
    content = read_json(Path(source or os.devnull) / "tokenizer.json")
    vocab = (content.get("model") or {}).get("vocab") or ()
    ids = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
    return max([-1, *ids, *(word["id"] for word in content.get("added_tokens", ()))]) + 1


def model_shape(cfg: TrainConfig) -> Preset | None:
    """Shape of the model as far as it can be told without importing transformers."""
    source = cfg.model_config or cfg.init_from
    if source is None:
        return PRESETS[cfg.model_size]
    values = read_config(source)
    needed = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    layers, hidden, mlp, heads = sizes = [values.get(name) for name in needed]
    if not all(isinstance(size, int) and size > 0 for size in sizes) or any("experts" in name for name in values):
        return None
    head = values.get("head_dim") or hidden // heads
    keys = head * (values.get("num_key_value_heads") or heads)
    tied = values.get("tie_word_embeddings", values.get("model_type") in TIED_BY_DEFAULT)
    return Preset(layers, hidden, mlp, head, head * heads, keys, tied)


def logit_chunk_size(tokens: int, vocab_size: int) -> int:
    """Rows of logits that the loss holds at a time: all that take 2 GiB in fp32, else pieces of at most 1 GiB."""
    size = 4 * tokens * vocab_size
    return tokens if size <= 2 << 30 else -(-tokens // -(-size >> 30))


# Bytes that a token leaves in a layer for each unit of its width, by a number's bytes and whether it is compiled: what
# autograd saved in transformers' Llama layer (autocast makes a half copy for each projection, a graph doesn't).
LAYER_BYTES = {(4, False): 14.6, (2, False): 9.8, (4, True): 11.3, (2, True): 6.35}


def estimate_memory(cfg: TrainConfig, shape: Preset, world_size: int) -> dict[str, int]:
    """Bytes that a rank needs at its peak, by what needs them."""
    half = 4 if cfg.precision == "fp32" else 2
    parameters, tokens = shape.parameter_count(cfg.vocab_size), cfg.batch_size * cfg.max_seq_length
    query = shape.query or shape.hidden
    width = shape.hidden + query + (shape.key or query) + shape.mlp
    layer = tokens * LAYER_BYTES[half, bool(cfg.compile)] * width
    if cfg.attention == "math":  # the only one that keeps the scores
        layer += tokens * (4 + (half == 2)) * cfg.max_seq_length * query // shape.head
    stream = tokens * 4 * shape.hidden
    kept = 2 * stream + shape.layers * (stream if cfg.gradient_checkpointing else layer)
    head, rows = cfg.vocab_size * shape.hidden, logit_chunk_size(tokens, cfg.vocab_size)
    # And their gradient as it is multiplied; compiled they are never written in fp32.
    logits = rows * cfg.vocab_size * (2 * half if cfg.compile else 4 + half * (half == 2))
    logits += half * head + 4 * head * (rows < tokens)  # the head's gradient, and in fp32 where pieces add up
    copies = 0 if half == 4 else 2 * (parameters - head * (not shape.tied))
    # One process without accumulation has no gradients before the backward pass; DDP's buckets are always there.
    early = 4 * parameters if world_size > 1 or cfg.gradient_accumulation_steps > 1 else 0
    again = layer if cfg.gradient_checkpointing else 0  # of one layer, computed once more
    moments = [  # gradients, half copies, activations, logits
        (early, copies, kept, logits),  # in the loss
        (early, 0 if again else copies, kept + again, 4 * head),  # just after it
        (4 * parameters, 0, layer, 8 * head * shape.tied),  # at the end of the backward pass
        (8 * parameters * (world_size > 1), 0, 0, 0),  # when DDP makes its buckets anew
    ]
    gradients, copies, activations, logits = max(moments, key=sum)
    return {
        "가중치": 4 * parameters,
        "기울기": gradients,
        "옵티마이저": 8 * parameters - 4 * shape.matrix_parameters() * (cfg.optimizer == "muon"),  # Muon's one moment
        "활성값": int(activations),
        "로짓": logits,
        "반정밀도 사본": copies,
        "라이브러리": 1_500_000_000 if cfg.device == "cuda" and world_size > 1 else 600_000_000,  # CUDA and NCCL
    }


def memory_words(parts: dict[str, int]) -> str:
    words = [f"{name} {size / 2**30:.1f}" for name, size in parts.items() if size >= 0.05 * 2**30]
    return f"{sum(parts.values()) / 2**30:.1f} GiB (추정: {' + '.join(words)})"


def disk_problem(folder: Path, needed: int) -> str | None:
    """A sentence without its full stop if the disk of ``folder`` has no ``needed`` bytes left."""
    free = shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.exists())).free
    figures = f"{folder} 에 {needed / 2**30:.2f} GiB가 필요하지만 {free / 2**30:.2f} GiB만 남았습니다"
    return f"디스크 공간이 부족합니다: {figures}" if needed > free else None


def room_problems(cfg: TrainConfig, gpus: list[Gpu], world_size: int, left: int) -> list[str]:
    """Sentences if a run needs more than its smallest GPU has, or the steps that are ``left`` save more than fits."""
    problems, shape, gpu = [], model_shape(cfg), min(gpus, key=lambda gpu: gpu.total, default=Gpu("", 0, 0))
    if shape is None:
        return problems
    least = {"batch_size": 1, "gradient_accumulation_steps": 2} if cfg.find_batch_size else {}  # that it may find
    parts = estimate_memory(replace(cfg, **least), shape, world_size)
    if gpu.total and sum(parts.values()) > gpu.total << 20:
        text = f"GPU당 {memory_words(parts)}가 필요하지만 {gpu.name}에는 {gpu.total / 2**10:.1f} GiB만 있습니다"
        problems.append(f"GPU 메모리가 부족합니다: {text} (--find-batch-size, --gradient-checkpointing, --model-size)")
    have = len(list_checkpoints(cfg.output_dir)) if cfg.resume else 0  # these take no more room
    count = min(-(-left // cfg.save_steps), max(0, (cfg.save_total_limit or math.inf) - have)) + 1
    needed = (count + (cfg.save_initial and not have)) * parts["가중치"]
    needed += min(count, 3 - min(have, 2)) * parts["옵티마이저"]  # which three have, one of them half-written
    if left and not node_rank(cfg) and (problem := disk_problem(cfg.output_dir, needed)):
        problems.append(f"{problem}. --save-total-limit 2 를 쓰거나 --save-steps 를 늘리세요")
    return problems


def named_peak_flops(gpu_name: str) -> float | None:
    """Dense BF16 FLOP/s as its maker publishes them, by the first name that fits; None if unknown, as of a part."""
    known = {"H100 PCIe": 756, "H100 NVL": 835, "H200 NVL": 835, "H200": 989, "H100": 989, "A100": 312, "L40S": 362}
    return next((peak * 1e12 for part, peak in known.items() if part in gpu_name and " MIG " not in gpu_name), None)


def training_flops(parameters: int, layers: int, hidden: int, length: int) -> int:
    """FLOPs of a token, ``parameters`` without an untied input embedding (Chowdhery et al., PaLM, 2022, appendix B)."""
    return 6 * parameters + 12 * layers * hidden * length


def source_problems(cfg: TrainConfig) -> list[str]:
    problems, earlier = [], [*list_checkpoints(cfg.output_dir), cfg.output_dir / "initial_model"]
    for name in ("model_config", "tokenizer", "init_from"):
        source, typed = getattr(cfg, name), as_typed(name)
        if not isinstance(source, Path):  # not given, or on the hub
            continue
        wanted, usable = "config.json", bool(read_config(source))
        if name == "tokenizer":
            wanted, usable = "tokenizer.json", any((source / file).is_file() for file in TOKENIZER_FILES[:2])
        if not usable:
            problems.append(f"{typed}: {display_path(source)} 에 쓸 수 있는 {wanted}이 없습니다. 다른 경로를 주세요")
        if cfg.resume is None and any(source.resolve().is_relative_to(folder.resolve()) for folder in earlier):
            problems.append(f"{typed}: 새 학습이 지울 출력 디렉토리 안에 있습니다. 다른 --output-dir 를 쓰세요")
    model = read_config(cfg.init_from)
    limits = (model.get(name) or sys.maxsize for name in ("vocab_size", "max_position_embeddings"))
    return problems + init_from_problems(cfg, tokenizer_size(cfg.tokenizer), *limits)


def init_from_problems(cfg: TrainConfig, size: int, vocabulary: int, longest: int) -> list[str]:
    """What doesn't fit into the model of ``--init-from``: a tokenizer of ``size`` tokens, the length of a row."""
    problems = []
    if size > vocabulary:
        problems.append(f"--tokenizer의 어휘 {size:,}개가 --init-from 모델의 {vocabulary:,}개보다 큽니다. 빼고 쓰세요")
    if cfg.max_seq_length > longest:
        text = f"--max-seq-length {cfg.max_seq_length}: --init-from 모델의 최대 길이 {longest}보다 깁니다"
        problems.append(f"{text}. --max-seq-length {longest} 을(를) 쓰세요")
    return problems


def check_use(cfg: TrainConfig) -> TrainConfig:
    """Complete what --generate or --evaluate asks for; UsageProblem or EnvironmentProblem as ``make_launch_plan``."""
    device, _, _, problems = plan_device(cfg, 1)
    complete = resolve_config(cfg, device)[0]
    path = cfg.generate or cfg.evaluate
    if not (path / "config.json").is_file():
        example = display_path([Path("outputs/checkpoint-500"), *list_checkpoints(path)][-1])
        problems.append(f"체크포인트가 없습니다: {path} (config.json이 든 디렉토리를 주세요. 예: {example})")
    if problems:
        raise EnvironmentProblem(problems)
    if cfg.evaluate:
        corpus_files(cfg)  # it may refuse
    return replace(complete, max_seq_length=cfg.max_seq_length)  # the model's own, unless it was typed


class LaunchPlan(NamedTuple):
    cfg: TrainConfig  # complete
    files: list[Path]  # of the corpus
    gpus: list[Gpu]  # that it uses
    processes: int  # on each machine
    nodes: int  # machines
    point: ResumePoint  # where it begins
    steps: int  # of the whole run; 0 where only the prepared corpus tells
    exact: bool  # whether they are no estimate
    notes: list[str]  # what was adapted to the machine


def make_launch_plan(cfg: TrainConfig, num_gpus: int) -> LaunchPlan:
    """Complete the options on this machine; UsageProblem or EnvironmentProblem hold all that keeps a run from it."""
    device, gpus, notes, problems = plan_device(cfg, num_gpus)
    cfg, adapted = resolve_config(cfg, device)
    processes, nodes = len(gpus) or num_gpus, cfg.nnodes or int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    world_size = processes * nodes
    problems += source_problems(cfg)
    try:
        problems += output_problems(cfg)
        files, left_out = corpus_files(cfg)
        corpus, lists = corpus_folders(cfg, files)
        report = {**read_json(corpus / "corpus.json"), **read_json(lists / "lists.json")}  # empty until it is prepared
        point = find_resume_point(cfg, world_size, report.get("fingerprint", ""))
        done, step_tokens = point.info.get("step", 0), point.step_tokens
        tokens = report.get("train_tokens", estimated_bytes(files) // 5)  # as on the shared corpus at 64k
        exact = bool(cfg.max_steps or "train_tokens" in report)
        steps = total_steps(cfg, tokens // cfg.max_seq_length, step_tokens, done if exact else 0)
        if (cfg.max_tokens or math.inf) < step_tokens:
            problems.append(f"--max-tokens {cfg.max_tokens}: 한 스텝의 토큰 수 {step_tokens:,}보다 작습니다")
    except Refusal as error:
        problems += error.problems
    if problems:
        raise EnvironmentProblem(problems)
    short = room_problems(cfg, gpus, world_size, max(0, steps - done))
    if short and cfg.mode == "train":
        raise EnvironmentProblem(short)
    notes += [*adapted, *point.notes, *short]
    if (own := read_config(cfg.model_config).get("vocab_size", cfg.vocab_size)) != cfg.vocab_size:
        notes.append(f"--model-config의 vocab_size {own:,} 대신 토크나이저의 크기를 씁니다 (최대 {cfg.vocab_size:,})")
    for reason, paths in left_out.items():
        names = ", ".join(display_path(path) for path in paths[:3]) + (" …" if len(paths) > 3 else "")
        notes.append(f"데이터에서 뺀 것 {len(paths):,}개 ({reason}): {names}")
    if point.checkpoint and not (report or uses_dummy_data(cfg)):
        notes.append("준비해 둔 토큰이 없어 데이터를 다시 토큰화합니다. 그때와 내용이 다르면 그 뒤에 거부됩니다")
    if not cfg.max_steps and 0 < steps < (cfg.max_tokens or 0) // step_tokens:
        notes.append("말뭉치가 --max-tokens 전에 끝납니다 ('전체 학습'을 보세요). 다 하려면 --max-epochs 를 늘리세요")
    if cfg.learning_rate == "auto" and cfg.max_hours:
        notes.append("--max-hours 로 먼저 끝나면 auto가 헤아린 토큰 수보다 짧고, 학습률이 다 내려가지 않습니다")
    return LaunchPlan(cfg, files, gpus, processes, nodes, point, steps, exact, notes)


def print_launch_plan(argv: list[str], when: str, background: bool) -> None:
    """Answer the launcher: a block of ``name=value`` lines, and two that a person sees, or one that says why not."""
    values, shown = {"code": ENVIRONMENT_ERROR}, []  # of an error that nobody expects
    try:
        typed = parse_args(argv)
        missing = [f"{name}>={least}" for name, least in MINIMUM_VERSIONS.items() if not has_package(name, least)]
        values["missing"] = " ".join(missing)
        plans = when == "always" or (when == "complete" and not missing)  # "never": the options are only read
        if plans and (typed.generate or typed.evaluate):
            check_use(typed)
        elif plans:
            plan = make_launch_plan(typed, typed.num_gpus)
            cfg, threads = plan.cfg, max(1, usable_cpus() // plan.processes)
            values |= {name: getattr(cfg, name) for name in ("device", "output_dir", "logs_dir", "max_restarts")}
            values |= {"processes": plan.processes, "threads": threads, "nnodes": plan.nodes}
            values |= {"node_rank": node_rank(cfg), "rdzv_endpoint": cfg.rdzv_endpoint or ""}
            shown = [check_lines(plan, missing), info_lines(plan, background)]
        values["code"] = 0
    except Refusal as error:
        values, shown = {"code": error.exit_code}, [[f"❌ {problem}" for problem in error.problems]]
    finally:
        blocks = [[f"{name}={value}" for name, value in values.items()], *shown]
        print("\n\n".join("\n".join(lines) for lines in blocks))


def require_cuda() -> None:
    import torch

    if torch.cuda.is_available():
        return
    version = importlib.metadata.version("torch")
    package = f"torch=={version.partition('+')[0]}+cu126 --index-url https://download.pytorch.org/whl/cu126"
    text = "nvidia-smi의 GPU를 쓰지 못합니다. 드라이버를 올리거나 fabricmanager를 켜거나 맞는 PyTorch를 설치하세요"
    with refusing(f"{text} ({sys.executable} -m pip install {package})", f"PyTorch {version}"):
        torch.cuda.init()  # the driver's own words; it makes no context here


def check_lines(plan: LaunchPlan, missing: list[str]) -> list[str]:
    """The lines of the environment check; PyTorch is imported, and may refuse, only where nvidia-smi saw a GPU."""
    cfg, lines, fp8 = plan.cfg, [], plan.cfg.precision == "fp8"
    if plan.gpus and not missing:
        import torch

        require_cuda()
        if fp8 and torch.cuda.get_device_capability() < (8, 9):
            raise EnvironmentProblem("--fp8: FP8은 compute capability 8.9부터 있습니다. --bf16 을 쓰세요")
        if cfg.attention == "fa3" and importlib.util.find_spec("flash_attn_interface") is None:
            raise EnvironmentProblem("--attention fa3: flash_attn_interface 패키지가 없습니다. auto 를 쓰세요")
        if fp8 and importlib.util.find_spec("torchao") is None:
            raise EnvironmentProblem(f"--fp8: torchao가 없습니다. 설치하세요: {sys.executable} -m pip install torchao")
        lines.append(f"✅ PyTorch 및 CUDA 확인 완료 (PyTorch {torch.__version__}, CUDA {torch.version.cuda})")
    elif not missing:
        lines.append(f"✅ PyTorch 확인 완료 (PyTorch {importlib.metadata.version('torch')}, CUDA 사용 안 함)")
    if plan.gpus:
        lines.append(f"✅ GPU 확인 완료: {len(plan.gpus)}개 사용 가능")
        lines += [f"  GPU {index}: {gpu.name}" for index, gpu in enumerate(plan.gpus)]
    lines += [f"⚠️  {note}" for note in plan.notes]
    if uses_dummy_data(cfg):
        reason = "--dummy-data" if cfg.dummy_data else f"데이터셋 없음 ({corpus_name(cfg)})"
        lines.append(f"⚠️  {reason}: 더미 한국어/영어 데이터를 만들어 씁니다")
    else:
        count = len(plan.files)
        lines.append(f"✅ 데이터셋 확인 완료: {f'{count:,}개 파일' if count else f'허브의 {corpus_name(cfg)}'}")
        lines += [f"  {display_path(path)} ({path.stat().st_size / 1e6:,.1f} MB)" for path in plan.files[:MOST_SHOWN]]
        lines += [f"  … 외 {count - MOST_SHOWN:,}개"] if count > MOST_SHOWN else []
    return [*lines, "✅ 모든 요구사항 충족"]


def info_lines(plan: LaunchPlan, background: bool) -> list[str]:
    cfg, point, world_size = plan.cfg, plan.point, plan.nodes * plan.processes
    source, shape, tokens = cfg.model_config or cfg.init_from, model_shape(cfg), plan.steps * point.step_tokens
    model = f"추정, {display_path(Path(source))}" if source else cfg.model_size
    parameters = f"{shape.parameter_count(cfg.vocab_size) / 1e6:,.1f}M ({model})" if shape else "읽은 뒤 정해집니다"
    length = f"{cfg.max_steps}스텝" if cfg.max_steps else f"{cfg.max_epochs}에포크"
    estimated = "" if plan.exact else " (추정)"
    nodes = f" (머신 {plan.nodes}대 x {plan.processes}개, 이 머신은 {node_rank(cfg)}번)" if plan.nodes > 1 else ""
    matrices = shape.matrix_parameters() if shape else 0
    rate = peak_rate(cfg, matrices, tokens, point.info)[1]
    training = {"배치 크기": f"{cfg.batch_size}{'부터 줄여 찾음' if cfg.find_batch_size else ''}"}
    training["학습률"] = rate + (estimated if "토큰" in rate else "")
    best = peak_rate(replace(cfg, optimizer="muon", learning_rate="auto"), matrices, tokens, {})[0]
    fresh, typed = cfg.mode == "train" and not (cfg.init_from or point.info), cfg.learning_rate
    if best and fresh and typed != "auto" and (typed == TrainConfig.learning_rate or not best / 3 <= typed <= 3 * best):
        training["권장"] = f"--optimizer muon --learning-rate auto ({format_value(best)}){estimated}"
    training |= {"최대 시퀀스 길이": cfg.max_seq_length, "Mixed Precision": cfg.precision}
    training |= {"모델 컴파일": str(cfg.compile).lower(), "옵티마이저": cfg.optimizer, "모델 파라미터": parameters}
    run = f"{plan.steps:,} 스텝, {tokens:,} 토큰{estimated}" if tokens else "데이터를 준비한 뒤 정해집니다"
    training |= {"스텝당 토큰": f"{point.step_tokens:,}", "전체 학습": run}
    paths = {"데이터셋": "더미 데이터" if uses_dummy_data(cfg) else ", ".join(map(display_path, cfg.dataset_path))}
    paths |= {"출력": display_path(cfg.output_dir), "로그": display_path(cfg.logs_dir)}
    saving = {"저장 간격": f"{cfg.save_steps} 스텝", "초기 모델 저장": str(cfg.save_initial).lower()}
    saving |= {"백그라운드 실행": str(background).lower()}
    on_gpu = cfg.device == "cuda"
    machine = {"GPU 수" if on_gpu else "CPU 프로세스 수": f"{world_size}{nodes}"}
    machine |= {"분산 학습": "DDP" if world_size > 1 else "없음 (단일 프로세스)"}
    machine |= {"최적화": cfg.precision.upper() + (" + torch.compile" if cfg.compile else "")}
    if shape and not cfg.find_batch_size:
        needed = memory_words(estimate_memory(cfg, shape, world_size))
        machine["예상 메모리"] = f"{'GPU' if on_gpu else '프로세스'}당 {needed}"
    sections = {"🔧 하이퍼파라미터:": training, "📁 경로:": paths, "💾 저장 설정:": saving}
    sections["🚀 H100 설정:" if on_gpu else "🚀 실행 설정 (CPU):"] = machine
    lines = ["📋 학습 정보", "=" * 33, f"🎯 모드: {'테스트' if cfg.mode == 'test' else '실제 학습'} 모드 ({length})"]
    for title, rows in sections.items():
        lines += [title, *(f"   • {label}: {text}" for label, text in rows.items())]
    return lines


def has_package(name: str, least: str) -> bool:
    with suppress(importlib.metadata.PackageNotFoundError):
        have, wanted = (re.findall(r"\d+", text)[:2] for text in (importlib.metadata.version(name), least))
        return [*map(int, have)] >= [*map(int, wanted)]
    return False


# ==== Stops and restarts: what a run tells of itself on the disk, and how it ends =====
# Who holds what: training.pid names the supervisor, which holds the logs' lock on descriptor 9, as does torchrun; rank
# 0 takes the outputs' lock (torchrun's ranks inherit nothing).  run_info.json's run_id tells this run from others.
# A stop: the supervisor signals the ranks (before step 1 torchrun too); they agree, save, set "stopped", exit with 0.
# A failure: with a known cause the rank sets "failed" and exits with 1; torchrun starts all ranks again, they find
# "failed" and exit with 0.  After any other (killed, hung, memory that fitted) it is "running" yet: they go on from the
# newest checkpoint, while --max-restarts lasts.  The end: once every rank has left (the outputs' lock is free), the
# supervisor sets by finalize_state what they could not, removes the PID file and runs --notify, without its lock.

LOST_PEER = "다른 랭크의 프로세스가 죽었거나 연결이 끊겼습니다"  # told by a rank to which it happened


def timestamp() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def rank_and_world() -> tuple[int, int]:
    """Rank and number of processes as torchrun announces them, before any process group exists."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def is_local_main() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def run_id() -> str:
    """What one start of the launcher, or of torchrun, has in common over all its restarts."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")  # "none" for every run without --standalone
    return os.environ.get("H100_DUAL_RUN_ID") or (f"{name}-{os.getppid()}" if name else str(os.getpid()))


def update_run_info(output_dir: Path, if_state: str | None = None, **changes: Any) -> bool:
    """Change ``run_info.json``, with ``if_state`` only a run in that state; returns whether it was written."""
    with open(output_dir / ".run_info.lock", "w") as lock:  # ranks that fail at once and the supervisor take turns
        fcntl.flock(lock, fcntl.LOCK_EX)
        info = read_json(output_dir / "run_info.json")
        as_expected = if_state in (None, info.get("state"))
        if as_expected:
            write_json(output_dir / "run_info.json", info | changes)
    return as_expected


def note_stop_request(output_dir: str, agent: str) -> None:
    """Keep that the supervisor was asked to stop, for ``--stop`` typed twice, ``--status`` and a restart."""
    info = read_json(Path(output_dir) / "run_info.json")
    is_ours = info.get("run_id") == run_id()  # else ours isn't written yet: only the first machine's supervisor asks
    if is_ours:
        update_run_info(Path(output_dir), stop_requested=timestamp())
    if not is_ours or "first_step" not in info:  # nothing to save, and torchrun would start the ranks again
        with suppress(ProcessLookupError):
            os.kill(int(agent), signal.SIGTERM)


def finalize_state(folder: str, outcome: str, code: str, detail_log: str) -> None:
    """Set, where the ranks had no time to, and print a run's state; what a hang was taken for is put right."""
    info, is_news = read_json(Path(folder) / "run_info.json"), False
    crash = f"프로세스가 비정상 종료했습니다 (코드 {code})"
    if info.get("run_id") != run_id():  # an earlier run's: this one ended before it wrote its own
        info = {"state": outcome}
    elif info["state"] == "running" or (info["state"] == "stopped" and outcome == "failed"):  # nobody had asked
        info, is_news = info | {"state": outcome, "ended": timestamp()}, True
        if outcome == "failed":
            info["error"] = crash
    for path in Path(detail_log).parent.glob("training_detail_rank_*.log"):
        if info.get("error") in (crash, LOST_PEER) and path.stat().st_mtime >= (Path(folder) / ".lock").stat().st_mtime:
            _, timeout, after = path.read_bytes().rpartition(b"\nTimeout (")  # faulthandler's, in the rank that hung
            if timeout and not re.search(rb"(?m)^\d{4}-\d\d-\d\d ", after):  # else it was started anew since
                minutes = info["options"]["hang_timeout"]
                info["error"], is_news = f"{minutes:g}분 동안 진행이 없어 학습을 끝냈습니다 (--hang-timeout)", True
    if is_news and "error" in info:
        print(f"❌ {info['error']}", file=sys.stderr)
    print(info["state"])  # first: the disk may take no more
    if is_news:
        update_run_info(Path(folder), **info)


def is_restart(info: dict[str, Any]) -> bool:
    """Whether torchrun started this worker anew in the run that ``info``, a ``run_info.json``, speaks of, if of any."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0 and info.get("run_id", run_id()) == run_id()


class StopFlag:
    """Turns SIGTERM and SIGINT, however often they come, into a flag for the loop, and holds the timer for hangs."""

    def __init__(self) -> None:
        self.requested = False
        self.limit, self.log = 0.0, None  # seconds without a heartbeat that are a hang, and where it is told
        self.armed = math.inf  # when the timer was last set; infinite while there is none
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return  # a shell may well go away
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: no orphan of a killed torchrun holds a GPU
        with suppress(OSError):  # it died just now, or belongs to somebody else, as whoever adopts orphans may
            if os.environ.get("H100_DUAL_RUN_ID", "").encode() in Path(f"/proc/{os.getppid()}/environ").read_bytes():
                return
        os._exit(0)  # torchrun was gone before we asked

    def listen(self) -> None:
        """From now on there is something to save; before, the kernel ends us, also in a collective that never ends."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: setattr(self, "requested", True))

    def arm(self, minutes: float, log: Any = None) -> None:
        """From now on ``minutes`` without a heartbeat end this process, with all stacks in ``log`` or the last."""
        self.limit, self.log, self.armed = 60 * minutes, log or self.log, -math.inf
        self.heartbeat()

    def heartbeat(self) -> None:
        now = time.monotonic()
        if now - self.armed > min(1.0, self.limit / 10):  # setting it costs 0.1 ms; it needs no thread and no GIL
            faulthandler.dump_traceback_later(self.limit, exit=True, file=self.log)
            self.armed = now


# ==== Watching: --status, --follow, training_curves.png ===============================

STATE_NAMES = {"running": "실행 중", "finished": "완료", "stopped": "중단됨", "failed": "실패"}
STATUS_LINES = {  # label and format; what isn't known, and a count of 0, has no line
    "seconds_left": ("남은 시간", format_duration),
    "loss": ("손실", "{:.4f}".format),
    "val_bits_per_byte": ("검증 bits/byte", "{:.4f}".format),
    "val_bits_per_byte_ko": ("   한국어", "{:.4f}".format),
    "val_bits_per_byte_en": ("   영어", "{:.4f}".format),
    "tokens_per_second": ("속도", "{:,.0f} 토큰/s".format),
    "mfu": ("MFU", "{:.1%}".format),
    "memory_gb": ("메모리", "{:.1f} GB".format),
    "restarts": ("자동 재시작", "{:,}번".format),
    "failed_saves": ("실패한 저장", "{:,}번".format),
    "skipped_steps": ("건너뛴 스텝", "{:,}번".format),
    "last_checkpoint": ("마지막 체크포인트", os.path.basename),
    "error": ("오류", str),
}
CURVES = {  # title: figures of metrics.jsonl
    "Training loss (nats/token)": ("loss",),
    "Validation (bits/byte)": ("val_bits_per_byte", "val_bits_per_byte_ko", "val_bits_per_byte_en"),
    "Learning rate": ("learning_rate",),
    "Tokens/s (all ranks)": ("tokens_per_second",),
}


def read_metrics(output_dir: Path, most: int = 1 << 19) -> list[dict[str, Any]]:
    """The lines in the last ``most`` bytes of ``metrics.jsonl``, oldest first; by default more than 2,000."""
    records = []
    with suppress(FileNotFoundError), open(output_dir / "metrics.jsonl", "rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - most))
        for line in stream:
            with suppress(ValueError):  # cut off by where we began to read, or half-written
                records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict) and "step" in record]


def seconds_left(records: Iterable[dict[str, Any]], total_steps: int | None) -> float | None:
    """Time to the end at the pace of the last 100 logged steps, evaluations and saves included; None if unknown."""
    logged = [record for record in records if "loss" in record][-100:]
    if len(logged) < 2 or total_steps is None:
        return None
    first, last = logged[0], logged[-1]
    return (total_steps - last["step"]) * (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])


def find_supervisor(cfg: TrainConfig) -> str:
    """PID of the living supervisor of these logs, which has their lock on descriptor 9; empty if there is none."""
    with suppress(OSError):  # it is gone, or somebody else's
        pid = log_path(cfg, "training.pid").read_text(encoding="utf-8").strip()
        if os.path.samefile(f"/proc/{pid}/fd/9", cfg.logs_dir / f".{log_path(cfg, 'training.lock').name}"):
            return pid
    return ""


def run_status(cfg: TrainConfig) -> dict[str, Any]:
    """How a run stands, as ``--status --json`` prints it; while it starts, nothing of the one before it."""
    pid, info = find_supervisor(cfg), read_json(cfg.output_dir / "run_info.json")
    if pid and str(info.get("run_id")).partition("-")[0] != pid:
        info = {}
    elif not pid and info.get("state") == "running":
        with suppress(OSError):  # there is no lock, or it is another user's
            try:
                lock_output(cfg.output_dir, "r+").close()
            except EnvironmentProblem:  # held by a rank: its supervisor has other logs, or torchrun was started by hand
                holder = (cfg.output_dir / ".lock").read_text(encoding="utf-8")
                pid = holder if os.path.exists(f"/proc/{holder}/exe") else ""  # a zombie has none
    records = read_metrics(cfg.output_dir) if info or not pid else []
    latest = {name: value for record in records for name, value in record.items()}
    ended = info.get("state") if info.get("state") != "running" else "failed"  # it died without a word
    checkpoints = list_checkpoints(cfg.output_dir) if info or not pid else []
    return {
        "state": "running" if pid else ended,
        "stopping": bool(pid and info.get("stop_requested")),
        "pid": int(pid) if pid else None,
        # The last logged one while it runs, or died; one that ended by itself has said which was its last.
        "step": info["step"] if not pid and "step" in info and ended != "failed" else latest.get("step"),
        **{name: {**latest, **info}.get(name) for name in ("started", "total_steps", *STATUS_LINES)},
        "seconds_left": seconds_left(records, info.get("total_steps")) if pid else None,
        "last_checkpoint": str(checkpoints[-1]) if checkpoints else None,
    }


def print_status(cfg: TrainConfig, as_json: bool = False) -> int:
    """Returns the exit code: 0 running, 1 dead with its PID file there, 3 not running."""
    status = run_status(cfg)
    pid, step, total = status["pid"], status["step"], status["total_steps"]
    code = 0 if pid else 1 if log_path(cfg, "training.pid").exists() else NOT_RUNNING
    if as_json:
        print(json.dumps(status, ensure_ascii=False))
        return code
    state = "멈추는 중" if status["stopping"] else STATE_NAMES.get(status["state"], "기록 없음")
    print(f"📊 상태: {state}" + (f" (PID {pid})" if pid else ""))
    lines = [] if step is None else [("스텝", f"{step:,}" + (f" / {total:,} ({step / total:.1%})" if total else ""))]
    lines += [(label, form(status[name])) for name, (label, form) in STATUS_LINES.items() if status[name]]
    for label, text in lines:
        print(f"   • {label}:{' ' * (19 - display_width(label))}{text}")
    return code


def follow_log(cfg: TrainConfig, pid: str, stream: Any) -> None:
    """Show the log from where ``stream`` stands to the end of the supervisor ``pid``; on a terminal a bar below it."""
    bar, show, alive, text = nullcontext(), print, True, b""
    if sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        with suppress(ImportError):  # it comes with the packages, which this Python may lack
            from tqdm import tqdm

            # In ASCII: block characters are two columns wide on some Korean terminals.
            form = "[{bar}] {percentage:5.1f}% {desc}"
            bar = tqdm(file=sys.stdout, bar_format=form, ascii="-=", leave=False, ncols=77, nrows=24)
            show = bar.write
    with bar:
        while alive:
            alive = os.path.exists(f"/proc/{pid}/fd/9")  # asked before reading, so that the last lines are not missed
            text += stream.read()
            if end := text.rfind(b"\n") + 1 if alive else len(text):
                show(text[:end].decode("utf-8", "replace"), end="")
                text = text[end:]
                if show is not print:
                    set_bar(bar, run_status(cfg))
            if alive:
                time.sleep(0.3)


def set_bar(bar: Any, status: dict[str, Any]) -> None:
    words = {name: form(status[name]) if status[name] else "-" for name, (_, form) in STATUS_LINES.items()}
    rest = "멈추는 중" if status["stopping"] else f"{words['seconds_left']} 남음"
    bar.n, bar.total = status["step"] or 0, status["total_steps"]
    bar.ncols = shutil.get_terminal_size().columns - 3  # with room for the ^C that a terminal shows
    text = f"{bar.n:,}/{bar.total or 0:,}  손실 {words['loss']}  {words['tokens_per_second']}  {rest}"
    bar.set_description_str(text if status["step"] else "시작하는 중")


def follow_run(cfg: TrainConfig, mode: str) -> int:
    """Follow a run's log to its end: to "follow" or "stop" it, or for a launcher of this PID; returns the exit code."""
    pid = mode if mode.isdigit() else find_supervisor(cfg)
    if not pid:
        print(f"이 로그 디렉토리로 실행 중인 학습이 없습니다: {display_path(cfg.logs_dir)}")
        return print_status(cfg) if mode == "follow" else NOT_RUNNING
    # For a launcher in the foreground signals are meant; of the others Ctrl-C ends only this, not the run.
    signal.signal(signal.SIGINT, signal.SIG_IGN if mode == pid else signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_IGN if mode == pid else signal.SIG_DFL)
    path = log_path(cfg, "training_console.log")
    with open(path if path.exists() else os.devnull, "rb") as stream:
        if mode == "follow":
            stream.seek(-sum(map(len, deque(stream, 10))), os.SEEK_CUR)
        elif mode == "stop":
            # A second signal would end it unsaved; the log tells of the first one, whichever --output-dir was typed.
            if "🛑 중단 요청".encode() in stream.read() or run_status(cfg)["stopping"]:
                print(f"이미 멈추는 중입니다. 저장을 기다립니다 (저장하지 않고 즉시 끝내려면: kill {pid})")
            else:
                print(f"🛑 중단 요청을 보냅니다 (PID {pid}). 현재 스텝을 마치고 저장합니다...")
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGTERM)
        try:
            follow_log(cfg, pid, stream)
        except KeyboardInterrupt:
            again = f"학습은 계속됩니다 (PID {pid}). 다시 보려면 --follow, 멈추려면 --stop 을 쓰세요"
            print("저장이 끝나면 학습이 멈춥니다. 확인하려면 --status 를 쓰세요" if mode == "stop" else again)
            return 0
    info = read_json(cfg.output_dir / "run_info.json")
    if mode == "stop":
        if not node_rank(cfg) and str(info.get("run_id")).partition("-")[0] != pid:  # only the first machine's counts
            print("🛑 학습이 시작되기 전에 중단했습니다")
            return 0
        print_status(cfg)
    was_asked = mode != "stop" and "stop_requested" in info  # by somebody else, and not by its own --max-hours
    return {"finished": 0, "stopped": STOPPED if was_asked else 0}.get(info.get("state"), ENVIRONMENT_ERROR)


def draw_curves(folder: str) -> None:
    os.nice(10)  # training goes first
    from matplotlib.figure import Figure

    records = read_metrics(Path(folder), most=sys.maxsize)
    figure = Figure(figsize=(8, 6), dpi=200, layout="constrained")  # legible at half of its 1600 x 1200
    for axes, (title, names) in zip(figure.subplots(2, 2).flat, CURVES.items(), strict=True):
        for name in names:
            known = [(record["step"], record[name]) for record in records if record.get(name) is not None]
            if known:
                axes.plot(*zip(*known, strict=True), label=name, marker="o" if "val" in name else "", markersize=3)
        axes.set(title=title, xlabel="Step")
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.locator_params(axis="x", nbins=5, integer=True)
        if len(axes.lines) > 1:
            axes.legend()
    figure.savefig(Path(folder) / "training_curves.png")


# What the launcher asks, and the process that draws; the words that follow are the arguments.
INTERNAL: dict[str, Callable[..., int | None]] = {
    "internal:plan": lambda when, background, *argv: print_launch_plan(argv, when, background == "true"),
    "internal:status": lambda as_json, *argv: print_status(parse_args(argv), as_json == "true"),
    "internal:curves": draw_curves,
    "internal:follow": lambda mode, *argv: follow_run(parse_args(argv), mode),
    "internal:stopping": note_stop_request,
    "internal:finalize": finalize_state,
}


def set_up_config(typed: TrainConfig) -> TrainConfig:
    """Complete the options of a rank; where no launcher has made the plan and shown it, the first one does."""
    info, processes = read_json(typed.output_dir / "run_info.json"), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if is_restart(info):
        if info.get("state", "running") != "running" or "stop_requested" in info:
            sys.exit()  # it failed for a known reason, or is to stop
        begun = "first_step" in info or not info  # a lost file doesn't make it begin anew, over its own checkpoints
        if begun and list_checkpoints(typed.output_dir) and typed.mode == "train":  # which starts over
            typed = replace(typed, resume="auto")
    if "H100_DUAL_RUN_ID" in os.environ or rank_and_world()[0] or is_restart(info):
        device = typed.device if "H100_DUAL_RUN_ID" in os.environ else plan_device(typed, processes)[0]
        return resolve_config(typed, device)[0]
    plan = make_launch_plan(typed, processes)
    print("\n".join([*info_lines(plan, False), *(f"⚠️  {note}" for note in plan.notes)]))
    return plan.cfg


def standalone_main(argv: list[str]) -> tuple[TrainConfig, StopFlag | None]:
    """Answer what needs no package and leave; else return all options, with the stop flag where a rank is to run."""
    for stream in (sys.stdout, sys.stderr):
        # Whatever the locale and PYTHONIOENCODING say, and also for what was typed in another encoding.
        stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # whoever reads an answer may have seen enough; a run ignores it
    try:
        if "--help" in argv or "-h" in argv:
            print(help_text())
            sys.exit()
        if argv and argv[0] in INTERNAL:
            sys.exit(INTERNAL[argv[0]](*argv[1:]))
        cfg = parse_args(argv)
        checkpoint = cfg.generate or cfg.evaluate
        if checkpoint or cfg.device == "cpu":  # threads that spin leave no core to the loader and the saver
            os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        return (check_use(cfg), None) if checkpoint else (set_up_config(cfg), StopFlag())
    except (Refusal, OSError) as error:
        if is_local_main():
            complain(error)
        sys.exit(getattr(error, "exit_code", ENVIRONMENT_ERROR))


if __name__ == "__main__":
    config, stop_flag = standalone_main(sys.argv[1:])
    gc.disable()  # importing makes much and frees nothing: the collector would take a fifth of the time

import codecs
import csv
import functools
import io
import logging
import lzma
import multiprocessing
import pickle
import random
import resource
import sysconfig
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import psutil
import pyarrow.parquet  # faster than gzip, and unlike zstandard it takes no truncated file for a whole one
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.benchmark
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DDPCommunicationHookType, broadcast, broadcast_object_list, gather_object, set_seed
from filelock import FileLock
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from torch.nn.attention import SDPBackend, activate_flash_attention_impl, sdpa_kernel
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.generation import GenerationConfig, TextStreamer
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

END_OF_TEXT = "<|endoftext|>"
# A word with the mark before it, up to three digits, punctuation with its line breaks, runs of space: Llama 3's
# pattern.  An eojeol stays one piece, and llama.cpp knows it: a tokenizer trained here goes into a GGUF file unchanged.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FAST_PATTERNS = (SPLIT_PATTERN, SPLIT_PATTERN.replace("{1,3}", ""))  # which both engines read alike: this, and Qwen2's
CHUNK_BYTES = 4 << 20
LONGEST_RECORD = 128 << 20  # of a file: more isn't meant to be one document
SAMPLE_BYTES = 64 << 20  # of a large corpus that are looked at for the tokenizer's sample
SAMPLE_CHUNK_BYTES = 256 << 10
LEAST_HELD_OUT_DOCUMENTS = 30
LARGE_SHARE = 0.05  # of characters that a tokenizer can't write, and of the bytes that a language has to have for it
MOST_EVALUATION_TOKENS = 2_000_000
MUON_BATCH = 32 << 20  # elements that a rank orthogonalises at once: enough for a GPU, little beside the momentum
LOADER_THREADS, BATCHES_AHEAD = 2, 4  # batches that each thread reads before the step asks
SAMPLE_PROMPTS = ("오늘 아침 서울에서", "It is important that")  # completed while training, unless --prompt is given
SPIKE_WINDOW = 128  # steps by which a loss or a gradient norm is judged
COMPILE_MINUTES = 30  # that the first step may take longer than --hang-timeout
ATTENTION_NAME = "packed_causal"  # under which transformers knows ``causal_attention``
logger = logging.getLogger("h100_dual")

# ==== Runtime: logs, the accelerator ==================================================


def set_up_logging(cfg: TrainConfig, rank: int) -> None:
    """Three logs: the console (rank 0), each rank's own at INFO, its detail, with what libraries say, at DEBUG."""
    cfg.logs_dir.mkdir(parents=True, exist_ok=True)
    detail = logging.FileHandler(cfg.logs_dir / f"training_detail_rank_{rank}.log", encoding="utf-8")
    own = logging.FileHandler(cfg.logs_dir / f"training_rank_{rank}.log", encoding="utf-8")
    form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(handlers=[detail], level=logging.INFO, format=form, force=True)
    own.setFormatter(detail.formatter)
    own.setLevel(logging.INFO)
    quiet_libraries()
    logger.setLevel(logging.DEBUG)
    logger.handlers[:] = [own]
    if is_local_main():
        console = logging.StreamHandler(sys.stdout)
        console.setLevel(logging.DEBUG if cfg.verbose else logging.INFO)
        logger.addHandler(console)


def quiet_libraries() -> None:
    logging.captureWarnings(True)
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    transformers_logging.disable_progress_bar()


def store_url() -> str:
    """Where the ranks meet: on one machine a file of the launcher's, for each restart, else the store of torchrun's."""
    folder, count = os.environ.get("H100_DUAL_STORE_DIR"), os.environ.get("TORCHELASTIC_RESTART_COUNT")
    return f"file://{folder}/ranks-{count}" if folder else "env://"


def loopback_only(world_size: int) -> None:
    """On one machine let nobody else connect."""
    if world_size == int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")


def build_accelerator(cfg: TrainConfig) -> Accelerator:
    """Create the process group and the precision policy; of accumulation, which is ``train_step``'s, it isn't told."""
    if cfg.device == "cpu" and hasattr(ctypes.CDLL(None), "mallopt"):
        # Else the kernel clears the same pages for each step anew: a tenth of the tiny model's.
        for parameter, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(parameter, value)
    if cfg.device == "cuda":
        # No holes in the GPU's memory; pinned buffers as large as asked, not rounded up to a power of two.
        exact = ",pinned_max_round_threshold_mb:1" if has_package("torch", "2.13") else ""  # 2.11 refuses unknown words
        settings = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True" + exact)
        os.environ.setdefault("PYTORCH_ALLOC_CONF", settings)
        torch.set_float32_matmul_precision("high")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))  # before anything makes a context on another's
    trackers = [name for name in cfg.report_to.split(",") if name != "none"]
    # The group waits longer than the hang timer, which shows where each rank is.
    patience = timedelta(minutes=cfg.hang_timeout + COMPILE_MINUTES + 5)
    rank, world_size = rank_and_world()
    numbers = f"?rank={rank}&world_size={world_size}" if cfg.device == "cuda" else ""  # else accelerate adds them
    group = InitProcessGroupKwargs(init_method=store_url() + numbers, timeout=patience)
    loopback_only(world_size)
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:  # each would count
        logger.debug(f"{name}={os.environ.pop(name)} is dropped")
    hook = DDPCommunicationHookType.BF16 if cfg.bf16_allreduce else DDPCommunicationHookType.NO
    ddp_settings = DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False, comm_hook=hook)
    precision = {"fp32": "no", "fp8": "bf16"}.get(cfg.precision, cfg.precision)  # of what FP8 leaves
    details = {"kwargs_handlers": [ddp_settings, group], "project_dir": str(cfg.logs_dir / "tensorboard")}
    accelerator = Accelerator(cpu=cfg.device == "cpu", mixed_precision=precision, log_with=trackers or None, **details)
    set_seed(cfg.seed)
    for name in {*trackers} - {*map(str, accelerator.log_with)}:
        logger.info(f"⚠️  {name} 패키지가 없어 기록을 보내지 않습니다 (설치: {sys.executable} -m pip install {name})")
    return accelerator


# ==== Self-test: what is wrong with the machine, told before the corpus is touched ====

SELF_TEST_SECONDS = 120  # that a part of it may take: NCCL itself waits for as long as --hang-timeout
SELF_TEST_ADVICE = {  # its parts in their order, and what to try where one fails or hangs
    "compile": "torch.compile을 쓸 수 없습니다. --no-compile 로 시작할 수 있습니다",
    "compute": "GPU가 계산을 마치지 못합니다. nvidia-smi 와 dmesg(Xid)를 보고 다른 GPU를 고르세요",
    "attention": "어텐션 커널을 쓸 수 없습니다. --attention math 로 시작할 수 있습니다",
    "reduce": "GPU 사이의 통신이 되지 않습니다. --ipc=host(컨테이너), NCCL_P2P_DISABLE=1, BIOS의 ACS 끄기를 해 보세요",
}


def check_compiler(device: torch.device) -> float:
    begun, header = time.perf_counter(), Path(sysconfig.get_path("include"), "Python.h")
    try:
        torch.compile(lambda x: (x.sin() + 1).sum())(torch.ones(1024, device=device)).item()
    except Exception as error:  # each backend and each compiler has its own
        if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
            raise RuntimeError("C 컴파일러가 없습니다 (apt install gcc)") from error
        if not header.exists():
            raise RuntimeError(f"{header} 파일이 없습니다 (apt install python3-dev)") from error
        raise
    return time.perf_counter() - begun


def measure_tflops(device: torch.device) -> float:
    size = 8192 if device.type == "cuda" else 256
    names = {"a": torch.randn(size, size, device=device, dtype=torch.bfloat16), "torch": torch}
    timer = torch.utils.benchmark.Timer("torch.mm(a, a)", globals=names)
    timer.blocked_autorange(min_run_time=0.5)  # until the clock has risen
    return 2 * size**3 / timer.blocked_autorange(min_run_time=0.5).median / 1e12


def check_attention(cfg: TrainConfig, device: torch.device) -> list[str]:
    """Run attention forward and backward beside the plain kernel in fp32; returns the GPU's two longest kernels."""
    shape, results, names = model_shape(cfg) or PRESETS["1.3b"], [], []
    length, dtype = min(cfg.max_seq_length, 2048), {"fp32": torch.float32, "fp16": torch.float16}.get(cfg.precision)
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler tells of itself on stderr
    like = torch.randn(4, 1, length, (shape.query or shape.hidden) // shape.head, shape.head, device=device)
    for kernel, kind in (("math", torch.float32), (cfg.attention, dtype or torch.bfloat16)):
        # Views of (batch, tokens, heads, size), as a layer has them.
        *inputs, gradient = like.to(kind).transpose(2, 3)
        inputs = [x.detach().requires_grad_() for x in inputs]
        with attention_kernels(kernel), torch.profiler.profile() as profile:
            output = causal_attention(None, *inputs, None)[0]
            output.backward(gradient.transpose(1, 2))
        results.append([output.detach(), *(x.grad for x in inputs)])
        kernels = [event for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
        kernels.sort(key=lambda event: -event.self_device_time_total)
        names = [re.split(r"[<(]", event.key)[0].split("::")[-1] for event in kernels[:2]]
    for exact, seen in zip(*results, strict=True):
        error = ((seen.float() - exact).norm() / exact.norm()).item()
        if not error < 0.02:  # also a NaN; bf16 itself differs by 0.003
            raise RuntimeError(f"fp32와 {error:.2%} 다릅니다 ({', '.join(names)})")
    return names


def measure_reduce(device: torch.device) -> float:
    """GB/s that cross a link, 2 (n - 1) / n of the bytes each way, while 256 MiB are added up over the ranks."""
    data, ranks = torch.ones((256 if device.type == "cuda" else 4) << 18, device=device), dist.get_world_size()
    for count in (1, 5):  # the first connects
        dist.barrier()
        begun = time.perf_counter()
        for _ in range(count):
            dist.all_reduce(data)
        dist.barrier()
    return 5 * data.nbytes * 2 * (ranks - 1) / ranks / (time.perf_counter() - begun) / 1e9


def try_part(cfg: TrainConfig, part: str, found: dict[str, Any]) -> Any:
    """Try one part of the self-test, in its process; the last one, "reduce", gives what every rank has ``found``."""
    rank, ranks = rank_and_world()
    device = torch.device(cfg.device, int(os.environ.get("LOCAL_RANK", "0")) if cfg.device == "cuda" else 0)
    measures = {"compile": check_compiler, "compute": measure_tflops}
    measures["attention"] = functools.partial(check_attention, cfg)
    try:
        if cfg.device == "cuda":
            torch.cuda.set_device(device)
        if part in measures:
            return measures[part](device)
        loopback_only(ranks)
        os.environ["TORCHELASTIC_RESTART_COUNT"] = "self-test"  # a file of its own in store_url
        store = next(dist.rendezvous(f"{store_url()}?rank={rank}&world_size={ranks}"))[0]
        backend, limit = "nccl" if cfg.device == "cuda" else "gloo", timedelta(seconds=SELF_TEST_SECONDS)
        store = dist.PrefixStore("self-test", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=limit)
        everything = [None] * ranks
        dist.all_gather_object(everything, found | {"reduce": measure_reduce(device)})
        return everything
    except Exception as error:  # whatever a driver, a compiler or NCCL says, in words: not all errors can be pickled
        raise EnvironmentProblem(str(error)[:300] or repr(error)) from error


def self_test(cfg: TrainConfig) -> list[dict[str, Any]]:
    """Try this rank's compiler, GPU and links; returns what each rank measured, EnvironmentProblem says what fails."""
    # In a process that is gone before the corpus is read: nothing may be forked from one that knows CUDA.
    (rank, ranks), found, part = rank_and_world(), {}, "compute"
    alone = ranks == 1 or ranks > int(os.environ["LOCAL_WORLD_SIZE"])  # other machines may be at another restart
    skipped = {"compile": not cfg.compile, "reduce": alone}
    try:
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), enter_worker, (None, os.getpid()))
        for part in [part for part in SELF_TEST_ADVICE if not skipped.get(part)]:
            found[part] = pool.submit(try_part, cfg, part, found).result(SELF_TEST_SECONDS)
    except (OSError, BrokenExecutor, EnvironmentProblem) as error:  # a time-out is an OSError without a text
        reason = "점검하던 프로세스가 죽었습니다" if isinstance(error, BrokenExecutor) else str(error)
        reason = reason or f"{SELF_TEST_SECONDS}초 안에 끝나지 않았습니다"
        text = f"머신 점검(랭크 {rank}): {SELF_TEST_ADVICE[part]}. 이유: {reason}"
        raise EnvironmentProblem(f"{text} (점검 끄기: --no-self-test)") from error
    finally:
        for worker in multiprocessing.active_children():  # it may hang
            worker.kill()
    pool.shutdown()
    return found.get("reduce", [found])


def report_self_test(cfg: TrainConfig, everything: list[dict[str, Any]]) -> None:
    found, speeds = everything[0], [found["compute"] for found in everything]
    logger.info("🩺 머신 점검")
    if "compile" in found:
        logger.info(f"✅ 컴파일: {found['compile']:.1f}초")
    logger.info(f"✅ 계산: {', '.join(f'{speed:,.0f}' for speed in speeds)} TFLOP/s (BF16 행렬곱)")
    logger.info(f"✅ 어텐션: {', '.join(found['attention']) or cfg.attention} (fp32와 비교)")
    if slow := [rank for rank, speed in enumerate(speeds) if speed < 0.9 * max(speeds)]:
        advice = "nvidia-smi -q -d PERFORMANCE 로 온도와 전력을 보세요"
        logger.warning(f"⚠️  랭크 {', '.join(map(str, slow))}의 GPU가 10% 넘게 느려 모두 기다리게 합니다. {advice}")
    if "reduce" in found:
        links = {"cuda": "PCIe", "cpu": "gloo"}[cfg.device]
        with suppress(OSError, subprocess.SubprocessError):  # without nvidia-smi, or with one that hangs
            matrix = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=30).stdout
            links = "NVLink" if re.search(r"\bNV\d+\b", matrix) else links
        logger.info(f"✅ 통신: {found['reduce']:,.1f} GB/s (all-reduce, {links})")
        if found["reduce"] < 100 and not cfg.bf16_allreduce:
            logger.warning("⚠️  GPU 사이가 느립니다. --bf16-allreduce 는 주고받는 양을 절반으로 줄입니다")
        if os.path.isdir("/dev/shm") and (left := shutil.disk_usage("/dev/shm").free >> 20) < 256:
            logger.warning(f"⚠️  /dev/shm에 {left:,} MiB만 남았습니다. 컨테이너라면 --ipc=host 를 쓰세요")
    update_run_info(cfg.output_dir, self_test=everything)


# ==== Data: files -> documents -> one stream of tokens with an index -> lists of documents -> rows ====

# A document in the index: where it begins in the stream (the end of text of what is before it, the rest of
# ``document_start``, its own tokens), the numbers of its language and its source (0: none).  The last holds the end.
DOCUMENT = np.dtype([("hash", "<u8"), ("offset", "<i8"), ("bytes", "<u4"), ("language", "<u2"), ("source", "<u2")])


@dataclass
class Documents:
    file: str = ""
    encoding: str = ""
    texts: list[str] = field(default_factory=list)  # in NFC, in the file's order, as the two below
    languages: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)  # "": none
    bad: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)  # records that aren't blank, bad, empty; of the others the figures
    by_language: dict[str, Counter] = field(default_factory=dict)  # documents, bytes, tokens, eojeols, characters, lost


def detect_encoding(head: bytes) -> str:
    """UTF-16 by its BOM; CP949 where ``head`` is that, no UTF-8, and mostly KS X 1001's 2,350 syllables; or UTF-8."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    for encoding in ("utf-8", "cp949"):
        with suppress(UnicodeDecodeError):
            codecs.getincrementaldecoder(encoding)().decode(head, final=len(head) < HEAD_BYTES)
            pairs = re.findall(rb"(?s)[\x81-\xfe].", head) if encoding == "cp949" else []
            common = sum(0xB0 <= first <= 0xC8 and second > 0xA0 for first, second in pairs)
            return encoding if common >= 0.8 * len(pairs) else "utf-8"
    return "utf-8"


def csv_records(text: Iterable[str], delimiter: str) -> Iterator[tuple[int, str]]:
    """The rows of a table, by its header; behind a tab quotes are text, as in NSMC.  A list: its length is another."""
    csv.field_size_limit(LONGEST_RECORD)
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    rows = csv.DictReader(text, delimiter=delimiter, quoting=quoting, strict=True)  # an open quote would take the rest
    for row in rows:
        odd = None in row or None in row.values()
        yield rows.line_num, json.dumps(list(row.values()) if odd else row, ensure_ascii=False)


def json_records(text: Any, head: str, text_column: str) -> Iterator[str]:
    """Elements, as if alone, of the array of a JSON file or of several put together: the path's first, or objects."""
    # Python's own parser finds the ends: ijson's (yajl) alters a lone surrogate in silence and ends a file at NaN.
    names, bracket, _ = text_column.partition("[]")
    keys = names.split(".") if bracket and not head.startswith("[") else []
    before, after = "".join(f'{{"{key}":' for key in keys) + "[" * bool(keys), "]" * bool(keys) + "}" * len(keys)
    path = "".join(rf'.*?"{re.escape(key)}"\s*:' for key in keys) + r"\s*\[" * (head.startswith("[") or bool(keys))
    opening, separator, decoder = re.compile(path, re.DOTALL), re.compile(r"[\s,]*"), json.JSONDecoder(strict=False)
    buffer, at, inside, ended = "", 0, False, False
    while block := text.read(max(HEAD_BYTES, len(buffer) - at)):
        buffer, at = buffer[at:] + block, 0
        while inside or (match := opening.match(buffer, at)):
            at = separator.match(buffer, at if inside else match.end()).end()
            inside = not buffer.startswith("]", at)
            if not inside:
                at, ended, opening = at + 1, True, re.compile(r".*?\}\s*\{" * bool(keys) + path, re.DOTALL)
                continue
            try:
                end = decoder.raw_decode(buffer, at)[1]
            except json.JSONDecodeError:  # the rest of it is to come
                break
            yield f"{before}{buffer[at:end]}{after}"
            at = end
        if ended and not inside:  # what else the object holds
            at = max(at, len(buffer) - HEAD_BYTES)
        if len(buffer) - at > LONGEST_RECORD:
            raise ValueError("한 문서가 128 MiB를 넘습니다. --text-column 을 document[].paragraph[].form 처럼 주세요")
    if (inside and path) or (not keys and buffer[at:].strip()):
        raise ValueError("JSON이 끝나지 않았습니다")
    if not inside and not ended:
        yield buffer  # nothing is where the path leads: a bad record, which tells what there is


def text_records(lines: Iterable[str], text_column: str) -> Iterator[tuple[int, str]]:
    """Paragraphs, that is, lines up to an empty one; of a file that begins with a title, as wikitext does, articles."""
    parts, is_wikitext = [], None
    for number, line in enumerate(itertools.chain(lines, [None]), 1):  # None: the end
        title, blank = re.match(TITLE, line or ""), not (line or "").strip()
        if parts and (line is None or (title if is_wikitext else blank)):
            text = re.sub(r"\n\s*\Z", "", "".join(parts).replace("\r\n", "\n"))
            yield number - len(parts), json.dumps({text_column: text}, ensure_ascii=False)
            parts = []
        if parts or not blank:
            is_wikitext = bool(title) if is_wikitext is None else is_wikitext
            parts.append(line)


def table_records(source: str, text_column: str) -> Iterator[tuple[int, Any]]:
    if name := HUB_NAME.fullmatch(source):
        import datasets

        repository, revision, config, split = (part or None for part in name.groups())
        rows = datasets.load_dataset(repository, config, split=split or "train", revision=revision, streaming=True)
        batches = rows.with_format("arrow").iter(1024)
    elif source.lower().endswith(".arrow"):  # as save_to_disk leaves it
        batches = pyarrow.ipc.open_stream(pyarrow.memory_map(source))
    else:
        file = pyarrow.parquet.ParquetFile(source)
        own = {text_column, re.split(r"[.\[]", text_column)[0]}.intersection(file.schema_arrow.names)
        # Without one of them every row is bad, and tells what else there is.
        batches = file.iter_batches(1024, columns=list(own | {"lang", "source"}) if own else None)
    number = 1
    for batch in batches:
        yield number, batch
        number += batch.num_rows


def open_records(source: str, text_column: str) -> tuple[Iterable[tuple[int, Any]], str]:
    """The numbered records of a file by its format, or of a data set of the hub; and the file's encoding."""
    kind, packed = "table" if HUB_NAME.fullmatch(source) else file_format(Path(source)), split_name(Path(source))[2]
    if kind == "table":
        return table_records(source, text_column), "utf-8"
    unpack = lzma.open if packed == ".xz" else functools.partial(pyarrow.input_stream, compression=PACKED.get(packed))
    stream = io.BufferedReader(unpack(source), HEAD_BYTES)
    encoding = detect_encoding(stream.peek())
    stream.read(len(codecs.BOM_UTF8) * stream.peek().startswith(codecs.BOM_UTF8))
    head = stream.peek().decode(encoding, "replace").lstrip()
    errors = "surrogatepass" if encoding == "utf-16" else "surrogateescape"  # no UTF-8 either: a bad record
    open_text = functools.partial(io.TextIOWrapper, stream, encoding, errors, newline="\n")
    line, _, more = head.partition("\n")
    # JSON lines, but for one object alone in which a path finds documents: a bad one is to cost no other.
    if kind == "json" and not (is_json_object(line) and (more.strip() or "[]" not in text_column)):
        return enumerate(json_records(open_text(), head, text_column), 1), encoding
    if kind in ("lines", "json"):
        return enumerate(stream if encoding == "utf-8" else open_text(), 1), encoding
    if kind == "text":
        return text_records(open_text(), text_column), encoding
    return csv_records(open_text(newline=""), kind), encoding


def read_chunks(cfg: TrainConfig, files: list[Path], size: int | None = None) -> Iterator[tuple]:
    """In a stable order, about ``size`` bytes at a time: file, encoding, numbered records (JSON, or pyarrow's rows)."""
    for source in map(str, files or cfg.dataset_path):
        batch, total, number = [], 0, 0
        try:
            records, encoding = open_records(source, cfg.text_column)
            for number, record in records:
                batch.append((number, record))
                total += getattr(record, "nbytes", 0) or len(record)
                if total >= (size or CHUNK_BYTES):
                    yield source, encoding, batch
                    batch, total = [], 0
            yield source, encoding, batch
        except Exception as error:  # each format's library has its own
            if not files or getattr(error, "errno", None):  # the hub's, or the system's: no permission, for instance
                raise
            advice = "zstd -d --long=31 로 풀어서" if "too much memory" in str(error) else "손상되었으면 다시 받아서"
            problem = f"파일을 읽지 못했습니다: {source} ({error}; {number:,}번째 줄까지 읽음)"
            raise RuntimeError(f"{problem}. {advice} 쓰세요") from error


def pinned_dataset(cfg: TrainConfig) -> str:
    if pin := known_pin(cfg):
        return pin
    repository, revision, *more = HUB_NAME.fullmatch(corpus_name(cfg)).groups()
    with refusing("허브에 없거나 연결할 수 없습니다", repository):
        commit = huggingface_hub.dataset_info(repository, revision=revision).sha
    return ":".join([f"hf:{repository}@{commit}", *(part or "" for part in more)])


def text_paths(value: Any, path: str = "") -> list[str]:
    """What --text-column could be to find text in a record."""
    if isinstance(value, dict):
        return [way for name in value for way in text_paths(value[name], f"{path}.{name}".lstrip("."))]
    if isinstance(value, list):
        return text_paths(value[0], f"{path}[]") if value else []
    return [path] if isinstance(value, str) else []


def follow_path(values: list[Any], steps: list[str]) -> list[Any]:
    """What a path leads to from these values, in order: what is empty stays so, ``...`` is where it leads nowhere."""
    for step in steps:
        if step == "[]":
            values = [item for value in values for item in (value if isinstance(value, list) else [value and ...])]
        else:
            values = [value.get(step, ...) if isinstance(value, dict) else value and ... for value in values]
    return values


def parse_record(record: Any, text_column: str) -> list[tuple[str, str, str]]:
    """Text, language and source of a record's documents; ValueError: the reason in Korean why one isn't there."""
    if not isinstance(record, dict):
        with suppress(json.JSONDecodeError, RecursionError):
            record = json.loads(record.decode("utf-8") if isinstance(record, bytes) else record)
    if not isinstance(record, dict):
        raise ValueError("JSON 객체가 아닙니다 (표라면 열의 수가 머리글과 다릅니다)")
    steps = [text_column] if text_column in record else re.findall(r"\[\]|[^.\[\]]+", text_column)
    split, documents = steps.index("[]") + 1 if "[]" in steps else 0, []
    for element in follow_path([record], steps[:split]):  # each a document
        texts = [text for text in follow_path([element], steps[split:]) if text is not None]
        texts = [text.decode("utf-8") if isinstance(text, bytes) else text for text in texts]
        if not all(isinstance(text, str) for text in texts):
            columns = ", ".join(text_paths(record)[:MOST_SHOWN]) or "없음"
            raise ValueError(f"'{text_column}' 열에 문자열이 없습니다 (글이 든 열: {columns})")
        names = {**record, **element} if isinstance(element, dict) else record
        language, source = (names[key] if isinstance(names.get(key), str) else "" for key in ("lang", "source"))
        documents.append((unicodedata.normalize("NFC", "\n".join(texts)), language.lower(), source))
        "".join(documents[-1]).encode("utf-8")  # which a lone surrogate doesn't let itself
    return documents


def detect_language(text: str) -> str:
    if text.isascii():
        return "en"
    letters = re.sub(r"[\W\d_]+", "", text[:2000])
    hangul = len(letters) - len(re.sub("[가-힣ㄱ-ㆎ]+", "", letters))
    return "ko" if letters and hangul >= 0.2 * len(letters) else "en"


def parse_chunk(chunk: tuple, text_column: str) -> Documents:
    file, encoding, records = chunk
    documents = Documents(file, encoding)
    for first, rows in records:
        if isinstance(rows, (bytes, str)):
            rows = [rows] if rows and not rows.isspace() else []
        else:
            try:  # here, as helpers do it, not the process that reads
                rows = rows.to_pylist()
            except ValueError:  # one is no UTF-8
                rows = [rows.slice(row, 1) for row in range(rows.num_rows)]
        documents.counts["records"] += len(rows)
        for number, row in enumerate(rows, first):
            try:
                row = row if isinstance(row, (bytes, str, dict)) else row.to_pylist()[0]
                for text, language, source in parse_record(row, text_column):
                    if text.strip():
                        documents.texts.append(text)
                        documents.languages.append(language or detect_language(text))
                        documents.sources.append(source)
                    else:
                        documents.counts["empty"] += 1
            except ValueError as error:
                reason = "UTF-8이 아닙니다" if isinstance(error, UnicodeError) else str(error)
                documents.bad.append({"file": file, "line": number, "reason": reason})
    size = sum(len(text.encode()) for text in documents.texts)
    documents.counts.update(documents=len(documents.texts), bytes=size, bad=len(documents.bad), empty=0)
    return documents


def content_hash(data: bytes) -> int:
    """64 bits of a document's UTF-8 text; they decide what is held out, so equal documents are on one side."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


class Tally:
    """What was read of each file, and the first 100,000 bad records, which go to ``path``."""

    def __init__(self, path: Path | None = None):
        self.path, self.bad, self.total, self.files = path, [], Counter(), {}

    def add(self, documents: Documents) -> None:
        counts = self.files.setdefault(documents.file, Counter(encoding=documents.encoding))
        self.bad += documents.bad[: max(0, 100_000 - len(self.bad))]
        for counter in (counts, self.total):
            counter.update(documents.counts)
            if 2 * counter["bad"] >= counter["records"] > 10_000:  # enough to tell before all is read
                self.check(documents.file)

    def check(self, corpus: str) -> None:
        """RuntimeError where half of a file or 1 % of all is bad, or where there is no document."""
        if self.path and self.bad:
            self.path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self.bad), "utf-8")
        halves = [file for file, counts in self.files.items() if 2 * counts["bad"] >= counts["records"] > 0]
        file, counts = (halves[0], self.files[halves[0]]) if halves else (corpus, self.total)
        if halves or counts["bad"] > 0.01 * counts["records"]:
            problem = f"{file}: {counts['records']:,}줄 가운데 {counts['bad']:,}줄을 읽지 못했습니다"
            shown = ["{file}:{line}: {reason}".format(**bad) for bad in self.bad if not halves or bad["file"] == file]
            rest = [f"그 밖에 절반을 읽지 못한 파일: {', '.join(halves[1:MOST_SHOWN])}"] if len(halves) > 1 else []
            rest += [f"모두: {display_path(self.path)}"] if self.path else []
            problem += " (허용: 전체의 1%, 한 파일의 절반). 처음 몇 줄:"
            raise RuntimeError("\n   ".join([problem, *shown[:5], *rest]))
        if not counts["documents"]:
            raise RuntimeError(f"문서가 하나도 없습니다: {corpus} (빈 글 {counts['empty']:,}개)")


def map_ahead(pool: Executor, function: Callable, items: Iterable, ahead: int) -> Iterator[Any]:
    """``pool.map`` that takes an item only when fewer than ``ahead`` are under way, or wait to be asked for."""
    pending: deque = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) >= ahead:
            yield pending.popleft().result()
    yield from (future.result() for future in pending)


def enter_worker(function: Callable, parent: int) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a helper ends with its parent, however that ends
    if os.getppid() != parent:  # it ended before we asked
        os._exit(1)
    call_worker.function = function  # such as can't be pickled


def call_worker(item: Any) -> Any:
    return call_worker.function(item)


def parallel_map(function: Callable, items: Iterable, workers: int) -> Iterator[Any]:
    """``map`` over ``workers`` forked processes, each with at most two items under way; 0: in this one."""
    try:
        fork, start = multiprocessing.get_context("fork"), (function, os.getpid())
        pool = ProcessPoolExecutor(workers, fork, enter_worker, start) if workers else None
    except OSError as error:  # their locks are files in /dev/shm
        logger.warning(f"⚠️  /dev/shm을 쓸 수 없어 프로세스 하나로 준비합니다 ({describe_error(error)[0]})")
        pool = None
    try:
        with pool or nullcontext():
            yield from map_ahead(pool, call_worker, items, 2 * workers) if pool else map(function, items)
    except BrokenExecutor as error:
        raise RuntimeError("데이터를 준비하던 하위 프로세스가 죽었습니다 (메모리가 부족했을 수 있습니다)") from error


@contextmanager
def log_waiting(title: str, done: Counter | None = None, whole: int = 0) -> Iterator[None]:
    """Log every ten seconds that something takes long, and of ``whole`` bytes how many are ``done``."""
    ended, start = threading.Event(), time.monotonic()

    def beat() -> None:
        while not ended.wait(10):
            seconds, share = time.monotonic() - start, min(1.0, done["bytes"] / whole) if whole else 0.0
            left = f", {share:.0%}, 남은 시간 {format_duration(seconds / share - seconds)}" if share > 0.001 else ""
            logger.info(f"   {title}... {format_duration(seconds)} 지남{left}")

    threading.Thread(target=beat, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def train_tokenizer(texts: Iterable[str], vocab_size: int, config: Any = None) -> Any:
    """Train a byte-level BPE tokenizer on NFC text; reserved tokens make its vocabulary a multiple of 128."""
    backend = Tokenizer(models.BPE())
    backend.normalizer, backend.decoder = normalizers.NFC(), decoders.ByteLevel()
    split, to_bytes = Regex(SPLIT_PATTERN), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(split, "isolated"), to_bytes])
    with TemporaryDirectory() as name:  # some models' checkpoints split in a way of their own, whatever was saved
        save_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend), Path(name))
        opened = AutoTokenizer.from_pretrained(name, config=config, trust_remote_code=False).backend_tokenizer
    backend.normalizer, backend.pre_tokenizer = opened.normalizer, opened.pre_tokenizer
    options = {"min_frequency": 2, "special_tokens": [END_OF_TEXT], "initial_alphabet": to_bytes.alphabet()}
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, **options))
    backend.add_special_tokens([f"<|reserved_{index}|>" for index in range(-backend.get_vocab_size() % 128)])
    names = {"model_input_names": ["input_ids", "attention_mask"]}
    names |= dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer under the class name that transformers 4 knows too: llama.cpp's converter and vLLM use it."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text("utf-8").replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'), "utf-8")


def load_tokenizer(source: str | Path) -> Any:
    with refusing("토크나이저를 열 수 없습니다", source):
        # A tokenizer.json is taken as it stands: by class or model type AutoTokenizer may make another of it.
        as_it_stands = cached_file(source, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
        kind = PreTrainedTokenizerFast if as_it_stands else AutoTokenizer
        tokenizer = kind.from_pretrained(source, trust_remote_code=False)
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise RuntimeError(f"tokenizer.json과 문서 끝 토큰(eos_token)이 있는 토크나이저를 주세요: {source}")
    backend = tokenizer.backend_tokenizer
    if backend.truncation or backend.padding:
        logger.warning(f"⚠️  tokenizer.json에 켜진 자르기(truncation)와 채우기(padding)를 끄고 씁니다: {source}")
        backend.no_truncation()
        backend.no_padding()
    tokenizer.split_special_tokens = backend.encode_special_tokens = True  # their names in a text are text
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(document_start(tokenizer)[-1])  # for all who open it later
    return tokenizer


def document_start(tokenizer: Any) -> list[int]:
    """The ids that a document begins with, wherever one does: what the tokenizer puts before a text, else eos."""
    probe = tokenizer.backend_tokenizer.encode("a가1")
    return probe.ids[: [*probe.special_tokens_mask, 0].index(0)] or [tokenizer.eos_token_id]


def vocabulary_size(tokenizer: Any) -> int:
    return max(tokenizer.get_vocab().values()) + 1  # there may be holes below it, which ``len`` doesn't count


def tiktoken_ranks(spec: dict[str, Any]) -> dict[bytes, int] | None:
    """The tokens of a ``tokenizer.json`` for tiktoken's engine where it gives the same ids for any text, else None."""
    # It joins any two neighbours that make a token, the smallest id first; ``tokenizers`` goes by its list of merges.
    # If that is in the order of ids, what makes a token of its bytes alone makes it anywhere, else nothing does.
    model, steps = spec["model"], (spec["pre_tokenizer"] or {}).get("pretokenizers", [])
    splitting = [value for step in steps for name, value in step.items() if name != "trim_offsets"]
    known = [["Split", {"Regex": pattern}, "Isolated", False, "ByteLevel", False, False] for pattern in FAST_PATTERNS]
    odd = [model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")]
    odd += [not token["special"] for token in spec["added_tokens"]]
    odd += [model["type"] != "BPE", splitting not in known, spec["normalizer"] not in (None, {"type": "NFC"})]
    if any(odd):
        return None
    merges, ranks = [tuple(pair) for pair in model["merges"]], {}
    order, by_merges = [model["vocab"]["".join(pair)] for pair in merges], models.BPE(model["vocab"], merges)
    to_byte = {char: byte for byte, char in bytes_to_unicode().items()}  # as ByteLevel writes each byte
    for word, number in model["vocab"].items():
        if to_byte.keys() >= set(word) and [token.id for token in by_merges.tokenize(word)] == [number]:
            ranks[bytes(map(to_byte.__getitem__, word))] = number
        elif model["ignore_merges"]:  # a text that is this word has it all the same
            return None
    return ranks if order == sorted(order) and all(bytes([byte]) in ranks for byte in range(256)) else None


def make_encoder(tokenizer: Any) -> tuple[Callable[[list[str]], list[tuple[np.ndarray, str]]], str]:
    """From NFC texts to their ids and the characters that are lost, blanks apart: in no token or an unknown one."""
    backend, vocab, size = tokenizer.backend_tokenizer, tokenizer.get_vocab(), vocabulary_size(tokenizer)
    spec, dtype = json.loads(backend.to_str()), np.min_scalar_type(size - 1)
    unknown = vocab.get(spec["model"].get("unk_token"), spec["model"].get("unk_id"))
    of_bytes = (set(bytes_to_unicode().values()), set(map("<0x{:02X}>".format, range(256))))
    writes_all = any(vocab.keys() >= names for names in of_bytes)

    def find_lost(text: str, item: Any) -> str:
        left = list(text)
        for number, (begin, end) in zip(item.ids, item.offsets, strict=True):  # a mark may share a character's place
            left[begin:end] = text[begin:end] if number == unknown else [""] * (end - begin)
        return "".join("".join(left).split())

    def encode_ordinary(texts: list[str]) -> list[tuple[np.ndarray, str]]:
        encode = backend.encode_batch_fast if writes_all else backend.encode_batch  # which knows the places, too
        encoded = zip(texts, encode(texts, add_special_tokens=False), strict=True)
        return [(np.array(item.ids, dtype), "" if writes_all else find_lost(text, item)) for text, item in encoded]

    ranks = tiktoken_ranks(spec)
    if ranks is None or not has_package("tiktoken", "0.13"):  # an older one takes long for a run of one letter
        return encode_ordinary, "tokenizers"
    import tiktoken  # thrice as fast

    pattern, tail = spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"], r"|\s+(?!\S)|\s+"
    pattern = f"(?:{pattern.removesuffix(tail)}){tail}"  # what looks ahead stands apart: a quarter faster
    never = {"\0": size}  # without a special token to look for, it stops at every byte: half as fast
    engine = tiktoken.Encoding("corpus", pat_str=pattern, mergeable_ranks=ranks, special_tokens=never)

    def encode_fast(texts: list[str]) -> list[tuple[np.ndarray, str]]:
        try:
            return [(engine.encode_to_numpy(text, disallowed_special=()).astype(dtype), "") for text in texts]
        except ValueError:  # a run of some 100,000 blanks is more than its regex engine's stack takes
            return encode_ordinary(texts)

    return encode_fast, "tiktoken"


def draw_sample(cfg: TrainConfig, files: list[Path]) -> list[str]:
    """Texts to train the tokenizer on, by their hashes: of a small corpus all but what is held out by default."""
    # The typed --validation-split doesn't count: one tokenizer serves them all, and is the same when it is made again.
    # Chunks at even distances, whatever the format: all are read, and of lines, the large corpora, only these parsed.
    step, drawn, size = math.ceil(estimated_bytes(files) / SAMPLE_BYTES) or 1, {}, 0
    for chunk in itertools.islice(read_chunks(cfg, files, SAMPLE_CHUNK_BYTES), 0, None, step):
        documents = parse_chunk(chunk, cfg.text_column)
        for text, language in zip(documents.texts, documents.languages, strict=True):
            data = text.encode()
            drawn.setdefault(language, []).append((content_hash(data), text[: 64 << 10], len(data)))
        size += documents.counts["bytes"]
        if not files and size > SAMPLE_BYTES:
            logger.info("🔤 허브 데이터셋은 앞부분의 문서로 토크나이저를 학습합니다")
            break
    kept, texts, words, characters = [], [], set(), 0
    for rows in drawn.values():
        hashes, sizes = np.array([row[0] for row in rows], np.uint64), np.array([row[2] for row in rows])
        # What is held out has the smallest hashes; of which documents, a part can't tell: it does without more.
        bound = held_out_bound(hashes, sizes, TrainConfig.validation_split) if files and step == 1 else int(0.2 * 2**64)
        kept += [row for row in rows if row[0] > bound]
    for _, text, _ in sorted(kept):
        texts.append(text)
        characters += len(text)
        words.update(text.split())  # of which each distinct one takes 1.2 KB of the trainer's memory
        if characters > 20 << 20 or len(words) > 550_000:
            break
    return texts


def encode_chunk(text_column: str, encode: Callable, opening: np.ndarray, chunk: tuple) -> tuple:
    """Parse, hash and encode a chunk: documents without texts, their tokens, their index with lengths as ``offset``."""
    documents, rows, tokens = parse_chunk(chunk, text_column), [], []
    for text, language, (ids, lost) in zip(documents.texts, documents.languages, encode(documents.texts), strict=True):
        data, words = text.encode(), text.split()
        rows.append((content_hash(data), len(opening) + len(ids), len(data), 0, 0))
        tokens += (opening, ids)
        figures = {"tokens": len(ids), "eojeols": len(words), "characters": sum(map(len, words)), "lost": len(lost)}
        documents.counts.update(figures)
        documents.by_language.setdefault(language, Counter()).update(figures, documents=1, bytes=len(data))
    documents.texts = []
    return documents, b"".join(tokens), np.array(rows, DOCUMENT)


def write_stream(folder: Path, cfg: TrainConfig, files: list[Path], tokenizer: Any) -> dict[str, Any]:
    start, end, (encode, engine) = document_start(tokenizer), [tokenizer.eos_token_id], make_encoder(tokenizer)
    opening = np.array(start if start[:1] == end else end + start, np.min_scalar_type(vocabulary_size(tokenizer) - 1))
    if problem := disk_problem(folder.parent, estimated_bytes(files) * opening.itemsize // 4):
        raise RuntimeError(f"{problem}. 다른 --cache-dir 를 쓰세요")
    names: dict[str, dict[str, int]] = {"language": {}, "source": {"": 0}}  # each with its number
    tally, by_language = Tally(cfg.logs_dir / "bad_lines.jsonl"), {}
    workers = 0 if 0 < estimated_bytes(files) < SMALL_CORPUS_BYTES else usable_cpus()
    encoding = functools.partial(encode_chunk, cfg.text_column, encode, opening)
    waiting = log_waiting("토큰화하는 중", tally.total, estimated_bytes(files))
    with open(folder / "tokens.bin", "wb") as stream, open(folder / "documents.bin", "wb") as records, waiting:
        for documents, tokens, index in parallel_map(encoding, read_chunks(cfg, files), workers):
            tally.add(documents)
            lengths = index["offset"]
            index["offset"] = stream.tell() // opening.itemsize + np.cumsum(lengths) - lengths
            for own, (column, numbers) in zip((documents.languages, documents.sources), names.items(), strict=True):
                for name in own:
                    if len(numbers) < 2**16:  # what two bytes hold; later ones are 0
                        numbers.setdefault(name, len(numbers))
                index[column] = [numbers.get(name, 0) for name in own]
            for language, figures in documents.by_language.items():
                by_language.setdefault(language, Counter()).update(figures)
            stream.write(tokens)
            records.write(index.tobytes())
        records.write(np.array((0, stream.tell() // opening.itemsize, 0, 0, 0), DOCUMENT).tobytes())
        stream.write(opening[:1].tobytes())  # the end of text
    tally.check(corpus_name(cfg))
    write_json(folder / "files.json", tally.files)
    if tally.bad:
        shutil.copy(tally.path, folder)  # for the runs that find the corpus prepared
    figures = {**tally.total, "by_language": by_language}
    figures |= {"languages": list(names["language"]), "sources": list(names["source"])}
    return figures | {"engine": engine, "dtype": opening.dtype.name}


def write_cache(folder: Path, cfg: TrainConfig, files: list[Path]) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a helper keeps one core busy, and has no threads after its fork
    config, place = model_settings(cfg), folder / "tokenizer"
    if cfg.tokenizer or cfg.init_from:
        save_tokenizer(load_tokenizer(cfg.tokenizer or cfg.init_from), place)
        texts = parse_chunk(next(read_chunks(cfg, files), ("", "", [])), cfg.text_column).texts
    else:
        with log_waiting("토크나이저 학습 중"):
            texts = draw_sample(cfg, files)
            logger.info(f"🔤 토크나이저 학습 중... (어휘 {cfg.vocab_size:,}, 표본 {len(texts):,}개 문서)")
            train = functools.partial(train_tokenizer, texts, cfg.vocab_size, config)
            list(parallel_map(lambda path: save_tokenizer(train(), path), [place], 1))  # its end gives all memory back
    tokenizer = load_tokenizer(place)
    opened = AutoTokenizer.from_pretrained(place, config=config, trust_remote_code=False)  # as from a checkpoint
    for text in [*texts[:200], "2024년 12월, 서울  12,345명!\r\n\n\tIt isn't 한국어 👩‍👩‍👧‍👦 नमस्ते"]:
        if opened(text, split_special_tokens=True).input_ids != tokenizer(text).input_ids:
            problem = f"AutoTokenizer로 연 '{config.model_type}' 체크포인트에서는 토큰이 달라집니다: {text[:40]!r}"
            raise RuntimeError(f"{problem}. --tokenizer 를 빼고 학습하거나, model_type을 바꾸세요 (예: llama)")
    report = write_stream(folder, cfg, files, tokenizer)
    # The same content gives the same rows wherever the files lie: this is what --resume compares.
    content = file_checksum(folder / "documents.bin") + tokenizer_fingerprint(tokenizer)
    report["fingerprint"] = hashlib.blake2b(content.encode(), digest_size=12).hexdigest()
    report |= {"vocab_size": vocabulary_size(tokenizer)} | ({} if files else {"dataset": corpus_name(cfg)})
    write_json(folder / "corpus.json", report)


@dataclass(frozen=True)
class DocumentList:
    """Documents one after the other, each behind its opening, as if they were a stream of their own."""

    tokens: np.ndarray  # the stream
    pieces: np.ndarray  # starts and shifts (2, pieces + 1) int64: from starts[i], token p is the stream's p + shifts[i]

    def __len__(self) -> int:
        return int(self.pieces[0, -1])  # tokens, an opening for each document counted

    def rows(self, max_seq_length: int) -> int:
        return len(self) // max_seq_length  # each with a token more, which is the next one's first

    def read(self, first: int, count: int) -> np.ndarray:
        """Tokens ``first`` to ``first + count``, that one too, of the list."""
        (starts, shifts), places = self.pieces, np.arange(first, first + count + 1)
        low, high = np.searchsorted(starts[:-1], places[[0, -1]], "right")  # they lie in the pieces low - 1 to high - 1
        piece = low - 1 + np.searchsorted(starts[low:high], places, "right")
        return self.tokens[places + shifts[piece]]


def list_pieces(offsets: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """``pieces`` of a ``DocumentList`` of documents given by their numbers; ``offsets`` is the index's."""
    begin, end = offsets[chosen], offsets[chosen + 1]
    starts = np.concatenate([[0], np.cumsum(end - begin)])
    first = np.flatnonzero(np.diff(chosen, prepend=-2) != 1)  # what follows its forerunner in the stream goes on
    return np.stack([np.append(starts[first], starts[-1]), np.append(begin[first] - starts[first], 0)])


def held_out_bound(hashes: np.ndarray, sizes: np.ndarray, fraction: float) -> int:
    """The hash up to which a language's documents are held out: ``fraction`` of them, or 30 if these have few bytes."""
    hashes, number = np.unique(hashes, return_inverse=True)
    few = np.cumsum(np.bincount(number, sizes)) <= max(fraction, LARGE_SHARE) * sizes.sum()
    wanted = max(round(fraction * len(hashes)), min(LEAST_HELD_OUT_DOCUMENTS, few.sum()) if fraction else 0)
    return int(hashes[wanted - 1]) if wanted else 0


def write_lists(folder: Path, cfg: TrainConfig, cache: Path) -> None:
    """Write the lists of documents that --mix and --validation-split stand for, and their part of the report."""
    records, names = np.memmap(cache / "documents.bin", DOCUMENT, "r"), list(cfg.mix_counts) or ["all"]
    index, offsets = records[:-1], np.ascontiguousarray(records["offset"])
    languages, sources = map(read_json(cache / "corpus.json").get, ("languages", "sources"))
    domain = np.full(len(index), -1 if cfg.mix_counts else 0, np.int16)
    for column, own in (("language", languages), ("source", sources)):  # a source's name goes before a language's
        number = np.array([names.index(name) if name in names else -1 for name in own], np.int16)[index[column]]
        domain = np.where(number < 0, domain, number)
    if lacking := [name for place, name in enumerate(names) if not (domain == place).any()]:
        have = f"source가 lang보다 먼저입니다. 있는 이름: {', '.join([*languages, *sources[1:]][:20])}"
        raise UsageProblem([f"--mix: '{', '.join(lacking)}'에 드는 문서가 없습니다 ({have})"])
    hashes, held, late, left_out = index["hash"], [], [], int((domain < 0).sum())
    for language in range(len(languages)):
        own = np.flatnonzero(index["language"] == language)
        own = own[hashes[own] <= held_out_bound(hashes[own], index["bytes"][own], cfg.validation_split)]
        held.append(own[np.argsort(hashes[own], kind="stable")])
        late.append(np.arange(len(own)) >= LEAST_HELD_OUT_DOCUMENTS)
    # As an evaluation takes them: by hash, after 30 of each language, as those of a small one reach further.
    held, late = np.concatenate(held), np.concatenate(late)
    held = held[np.lexsort((hashes[held], late))]
    domain[held] = -1
    lists = [list_pieces(offsets, np.flatnonzero(domain == place)) for place in range(len(names))]
    for place, pieces in enumerate([*lists, list_pieces(offsets, held)]):
        np.save(folder / f"{place}.npy", pieces)
    np.save(folder / "val_documents.npy", held)
    tokens = dict(zip(names, (int(pieces[0, -1]) for pieces in lists), strict=True))
    report = {"train_tokens": sum(tokens.values()), "domains": tokens, "left_out": left_out}
    counts = np.bincount(index["language"][held], minlength=len(languages)).tolist()
    write_json(folder / "lists.json", {**report, "val_by_language": dict(zip(languages, counts, strict=True))})


@dataclass(frozen=True)
class Corpus:
    path: Path
    tokenizer: Any
    documents: np.ndarray  # the index (documents + 1), of dtype DOCUMENT
    domains: tuple[DocumentList, ...]  # one for each name of --mix, else just one
    val: DocumentList
    val_documents: np.ndarray  # their numbers in the index
    report: dict[str, Any]
    store: Any = None  # what the ranks shared to open it; kept for the process group, as it ends with rank 0's

    def rows(self, max_seq_length: int) -> int:
        return sum(domain.rows(max_seq_length) for domain in self.domains)


def prepare_lists(cfg: TrainConfig) -> Path:
    """Write what the token cache lacks; return the folder of the lists, which stands in the prepared corpus's."""
    info = read_json(cfg.output_dir / "run_info.json")
    if is_restart(info) and os.path.exists(info.get("lists", "")):  # whatever became of the files meanwhile
        return Path(info["lists"])
    cfg.cache_dir.mkdir(parents=True, exist_ok=True)
    files = [write_dummy_data(cfg.cache_dir)] if uses_dummy_data(cfg) else corpus_files(cfg)[0]
    if not files:
        cfg = replace(cfg, dataset_path=(Path(pinned_dataset(cfg)),))
    folder, lists = corpus_folders(cfg, files)
    if lists.exists():
        return lists
    with log_waiting("다른 실행이 같은 데이터를 준비하기를 기다리는 중"):
        lock = FileLock(folder.with_suffix(".lock")).acquire()  # the kernel ends a dead one's
    with lock:
        if not folder.exists():
            logger.info(f"📚 데이터 준비 중... ({len(files)}개 파일)")
            with atomic_dir(folder) as temporary:
                write_cache(temporary, cfg, files)
        if not lists.exists():
            with atomic_dir(lists) as temporary:
                write_lists(temporary, cfg, folder)
    return lists


def prepare_corpus(cfg: TrainConfig) -> Corpus:
    """Open the token cache, which a machine's first rank writes; before the process group, which would time out."""
    # The name counts restarts, which a store of torchrun's own outlives.  Rank 0 opens its own before it makes
    # the lists, as the others wait for a store only so long, and as if it were alone: it needn't wait for them.
    name = f"corpus/{os.environ.get('GROUP_RANK')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}"
    rank, world_size = rank_and_world()
    store = next(dist.rendezvous(store_url(), rank, 1))[0] if world_size > 1 else dist.HashStore()
    if is_local_main():  # it tells the others which corpus it is: they might see the files change
        store.set(name, str(prepare_lists(cfg)))
    store.wait([name], timedelta(days=365))  # should that rank fail, the agent ends us
    folder = (lists := Path(store.get(name).decode())).parent
    report = {**read_json(folder / "corpus.json"), **read_json(lists / "lists.json"), "lists": str(lists)}
    if report["bad"] and is_local_main():
        path = Path(shutil.copy(folder / "bad_lines.jsonl", cfg.logs_dir))
        logger.warning(f"⚠️  읽지 못한 줄 {report['bad']:,}개를 건너뛰었습니다: {display_path(path)}")
    tokens = np.memmap(folder / "tokens.bin", report["dtype"], "r")
    pieces = (np.asarray(np.load(lists / f"{place}.npy", "r")) for place in range(len(report["domains"]) + 1))
    *domains, val = (DocumentList(tokens, part) for part in pieces)
    documents, numbers = np.memmap(folder / "documents.bin", DOCUMENT, "r"), np.load(lists / "val_documents.npy")
    return Corpus(folder, load_tokenizer(folder / "tokenizer"), documents, tuple(domains), val, numbers, report, store)


def log_report(cfg: TrainConfig, corpus: Corpus) -> None:
    """Tell what was read, by file and by language; RuntimeError in train where the tokenizer can't write much of it."""
    report, files = corpus.report, read_json(corpus.path / "files.json")
    for number, (file, counts) in enumerate(files.items()):  # the first ones on the console, all in the detail log
        level = logging.INFO if number < MOST_SHOWN else logging.DEBUG
        text = "문서 {documents:,}개, 빈 글 {empty:,}개, 읽지 못한 줄 {bad:,}개, {encoding}".format(**counts)
        logger.log(level, f"   • {display_path(Path(file))}: {counts['bytes'] / 1e6:,.1f} MB, {text}")
    if len(files) > MOST_SHOWN:
        logger.info(f"   • 외 {len(files) - MOST_SHOWN:,}개 파일 (모두 상세 로그에 있습니다)")
    sizes = f"문서 {report['documents']:,}개, {report['bytes'] / 1e6:,.1f} MB, 토큰 {report['tokens']:,}개"
    logger.info(f"📚 말뭉치: {sizes}, 어휘 {report['vocab_size']:,}")
    most_lost = report["lost"] / report["characters"]
    for name, row in report["by_language"].items():
        held, share = report["val_by_language"].get(name, 0), row["bytes"] / report["bytes"]
        lost = row["lost"] / row["characters"]
        counts = f"문서 {row['documents']:,}개 (검증용 {held:,}개), 비중 {share:.1%}"
        lengths = row["bytes"] / max(1, row["tokens"]), row["tokens"] / row["eojeols"]
        written = f", 쓰지 못한 글자 {lost:.2%}" if lost else ""
        logger.info(f"   • {name}: {counts}, 토큰당 {lengths[0]:.2f} 바이트, 어절당 {lengths[1]:.2f} 토큰{written}")
        most_lost = max(most_lost, lost * (share >= LARGE_SHARE))
    if report["left_out"]:
        logger.info(f"⚠️  --mix에 없는 문서 {report['left_out']:,}개는 학습에 쓰지 않습니다")
    if most_lost > 0.01:
        problem = f"토크나이저가 쓰지 못하는 글자가 최대 {most_lost:.1%}입니다"
        if most_lost > LARGE_SHARE and cfg.mode == "train":
            raise RuntimeError(f"{problem}. 그 글자를 아는 --tokenizer 를 주거나, 빼고 말뭉치로 학습하세요")
        logger.warning(f"⚠️  {problem}")


def write_dummy_data(folder: Path) -> Path:
    """Write 2,000 Korean and English documents of a small grammar: a model learns something of it in ten steps."""
    path = folder / "dummy-3.jsonl"
    if path.exists():
        return path
    grammars = {
        "ko": "오늘|어제|내일|아침/학생이|연구원이|기자가|아이가|선생님이/서울에서|학교에서|도서관에서|시장에서/"
        "책을|논문을|모델을|데이터를|음식을/읽었다.|만들었다.|분석했다.|보냈다.|준비했다.",
        "en": "Today|Yesterday|Sometimes|Finally/the student|a researcher|the reporter|my teacher/read|wrote|analysed|"
        "prepared|found/a book|the paper|a small model|the data/in Seoul.|at school.|in the library.|by the sea.",
    }
    draw, lines = random.Random(0), []  # the same text on every machine
    for lang, grammar in [*grammars.items()] * 1000:
        parts = [part.split("|") for part in grammar.split("/")] * draw.randint(3, 16)
        text = " ".join(map(draw.choice, parts))
        lines.append(json.dumps({"text": text, "lang": lang}, ensure_ascii=False) + "\n")
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    temporary.write_text("".join(lines), encoding="utf-8")
    return temporary.replace(path)


class RowOrder:
    """Domain and row at a position of the run, by the seed alone; any ``sum(counts)`` in a row have these shares."""

    def __init__(self, rows: list[int], counts: list[int], seed: int):
        self.rows, self.counts, self.seed = rows, counts, seed
        self.slot_domain, self.slot_rank = np.empty((2, sum(counts)), np.int64)  # rank: its domain's slots before it
        self.kept: dict[int, tuple[int, np.ndarray]] = {}  # a domain's epoch and its permutation, four bytes a row
        shares, taken = np.array(counts), np.zeros(len(counts), np.int64)
        for slot in range(sum(counts)):  # each goes to the domain that is furthest behind its share
            chosen = np.argmax(shares * (slot + 1) - sum(counts) * taken)
            self.slot_domain[slot], self.slot_rank[slot] = chosen, taken[chosen]
            taken[chosen] += 1

    def __call__(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        turn, slot = np.divmod(np.asarray(position, np.int64), len(self.slot_domain))
        domain, row = self.slot_domain[slot], np.empty(len(position), np.int64)
        for index, (rows, count) in enumerate(zip(self.rows, self.counts, strict=True)):
            own = np.flatnonzero(domain == index)
            epoch, place = np.divmod(turn[own] * count + self.slot_rank[slot[own]], rows)
            for number in np.unique(epoch).tolist():
                if self.kept.get(index, (None,))[0] != number:
                    draw = np.random.default_rng([self.seed, index, number])
                    self.kept[index] = number, draw.permutation(np.arange(rows, dtype=np.uint32))
                chosen = epoch == number
                row[own[chosen]] = self.kept[index][1][place[chosen]]
        return domain, row


def rank_positions(run: Run | TrainConfig, rank: int, world_size: int, steps: range) -> Iterator[np.ndarray]:
    """Positions (batch_size) of each of one rank's micro-batches; a step's are the next ones of all ranks together."""
    size, micro_steps = run.batch_size, run.gradient_accumulation_steps
    for micro in range(steps.start * micro_steps, steps.stop * micro_steps):
        yield (micro * world_size + rank) * size + np.arange(size)


def read_rows(corpus: Corpus, domain: np.ndarray, row: np.ndarray, length: int, pinned: bool = False) -> torch.Tensor:
    """Rows as an int64 tensor (rows, length + 1); pinned memory's pool knows when the copy to the GPU has ended."""
    batch = torch.empty(len(row), length + 1, dtype=torch.int64, pin_memory=pinned)
    for tokens, index, number in zip(batch.numpy(), domain.tolist(), row.tolist(), strict=True):
        tokens[:] = corpus.domains[index].read(number * length, length)
    return batch


def make_loader(cfg: TrainConfig, corpus: Corpus, positions: Iterator[np.ndarray]) -> Iterator[torch.Tensor]:
    """Micro-batches of rows; for a GPU pinned, and read ahead by two threads, which wait for the disk's pages."""
    length, counts = cfg.max_seq_length, list(cfg.mix_counts.values()) or [MIX_WINDOW]
    order = RowOrder([domain.rows(length) for domain in corpus.domains], counts, cfg.seed)
    if cfg.device != "cuda":
        yield from (read_rows(corpus, *order(batch), length) for batch in positions)
        return
    device = torch.cuda.current_device()  # a thread's own is 0 at first: pinning would make a context there
    with ThreadPoolExecutor(LOADER_THREADS, "loader", torch.cuda.set_device, (device,)) as pool:
        places, ahead = map(order, positions), 1 + BATCHES_AHEAD * LOADER_THREADS
        yield from map_ahead(pool, lambda place: read_rows(corpus, *place, length, pinned=True), places, ahead)


# ==== Model and optimizer: decoder, loss, attention; AdamW, Muon, schedule ============


def causal_attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> tuple:
    """Causal attention of tensors (batch, heads, tokens, size), without the mask that keeps flash and cuDNN out."""
    settings = {"dropout_p": options.get("dropout") or 0.0, "scale": options.get("scaling")}
    settings["enable_gqa"] = query.shape[1] != key.shape[1]
    causal = query.shape[2] == key.shape[2]  # while generating, a single query sees all cached keys
    output = F.scaled_dot_product_attention(query, key, value, is_causal=causal, **settings)
    return output.transpose(1, 2).contiguous(), None


def attention_kernels(attention: str) -> Any:
    """Context in which SDPA takes the kernel of this value of ``--attention``, or tries "auto"'s in their order."""
    # cuDNN's, the fastest on Hopper, has given NaN going backward (pocket-tts PR 264, pytorch 196678): only by name.
    flash, efficient, plain = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
    named = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": flash, "fa3": flash, "efficient": efficient, "math": plain}
    if attention == "fa3":
        activate_flash_attention_impl("FA3")
    return sdpa_kernel(named.get(attention, [flash, efficient, plain]), set_priority=True)


def attention_backend(model: nn.Module, cfg: TrainConfig, batch_size: int) -> str:
    """The kernel that SDPA takes for this run's shapes; EnvironmentProblem if the one that was asked for can't."""
    if model.config._attn_implementation != ATTENTION_NAME:
        return model.config._attn_implementation  # transformers' own, which chooses by its mask
    config = model.config.get_text_config()
    heads, dtype = config.num_attention_heads, {"fp32": torch.float32, "fp16": torch.float16}.get(cfg.precision)
    shape = (batch_size, heads, cfg.max_seq_length, getattr(config, "head_dim", None) or config.hidden_size // heads)
    like = torch.empty(shape, dtype=dtype or torch.bfloat16, device=model.device, requires_grad=True)
    keys = like[:, : getattr(config, "num_key_value_heads", None) or heads]
    try:  # as causal_attention calls it; not every kernel takes fewer keys than queries
        chosen = torch._fused_sdp_choice(like, keys, keys, is_causal=True, enable_gqa=keys.shape != like.shape)
    except RuntimeError as error:
        raise EnvironmentProblem(f"--attention {cfg.attention}: 이 모델에는 쓸 수 없습니다. auto 를 쓰세요") from error
    return "fa3" if cfg.attention == "fa3" else SDPBackend(chosen).name.partition("_")[0].lower()


@torch.no_grad()
def try_out(model: nn.Module) -> tuple[bool, bool]:
    """Whether a model looks ahead (an encoder), and whether its head is one matrix without cap or scale: by trying."""
    head, base, training = model.get_output_embeddings(), model.base_model, model.training
    tokens = torch.arange(8, device=model.device).repeat(2, 1)
    tokens[1, -1] = 8
    model.eval()
    with attention_kernels("math"):  # flash and cuDNN, where they alone are allowed, take no fp32
        logits = model(input_ids=tokens, use_cache=False).logits
        plain = type(head) is nn.Linear and head.bias is None and base is not model
        plain = plain and torch.equal(logits, head(base(input_ids=tokens, use_cache=False)[0]))
    model.train(training)
    return not torch.allclose(*logits[:, :-1], rtol=1e-2, atol=1e-3), plain


def choose_attention(model: nn.Module) -> None:
    """Give a model our attention where plain causal attention is all it needs, else transformers' own."""
    if try_out(model)[0]:
        raise RuntimeError('뒤의 글도 보는 인코더는 쓸 수 없습니다. 설정에 "is_decoder": true 를 넣으세요')
    AttentionInterface.register(ATTENTION_NAME, causal_attention)
    config = model.config
    full = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)  # which SDPA can't do
    name = "eager" if capped else ATTENTION_NAME if full and not getattr(config, "sliding_window", None) else "sdpa"
    with suppress(ValueError):  # the model knows its own only
        model.set_attn_implementation(name)


def model_settings(cfg: TrainConfig) -> Any:
    if source := cfg.model_config or cfg.init_from:
        with refusing("모델을 만들 수 없는 설정입니다", source):
            return AutoConfig.from_pretrained(source, trust_remote_code=False)
    preset = PRESETS[cfg.model_size]
    sizes = {"hidden_size": preset.hidden, "intermediate_size": preset.mlp, "num_hidden_layers": preset.layers}
    sizes |= {"num_attention_heads": preset.hidden // preset.head, "max_position_embeddings": cfg.max_seq_length}
    return AutoConfig.for_model("llama", **sizes, rms_norm_eps=1e-5, tie_word_embeddings=True)


def build_model(cfg: TrainConfig, tokenizer: Any, device: torch.device | str = "cpu") -> nn.Module:
    """The transformers model with fp32 weights on ``device``; the same weights on every rank."""
    set_seed(cfg.seed)
    if cfg.init_from:
        model = load_model(cfg.init_from).to(device)
        embedding, longest = model.get_input_embeddings(), context_length(model, default=cfg.max_seq_length)
        if problems := init_from_problems(cfg, vocabulary_size(tokenizer), len(embedding.weight), longest):
            raise ValueError("\n".join(problems))
        embedding.padding_idx = None  # it may be the end of text's, and that row has to learn
    else:
        config = model_settings(cfg)
        text = config.get_text_config()
        text.vocab_size = -(-vocabulary_size(tokenizer) // 128) * 128
        text.bos_token_id, text.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        text.pad_token_id = None  # an Embedding doesn't train its padding row, which is the end of text's here
        text.max_position_embeddings = max(cfg.max_seq_length, getattr(text, "max_position_embeddings", None) or 0)
        naming = refusing("모델을 만들 수 없는 설정입니다", cfg.model_config) if cfg.model_config else nullcontext()
        with naming, torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
            choose_attention(model)
        for name, weight in model.named_parameters() if not cfg.model_config else ():
            # So that the stream's variance doesn't grow with depth (Radford et al., 2019).
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.data.mul_((2 * model.config.num_hidden_layers) ** -0.5)
    if cfg.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def load_model(source: str | Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    options = {"dtype": dtype, "trust_remote_code": False, "output_loading_info": True}
    with refusing("모델을 열 수 없습니다", source):
        model, info = AutoModelForCausalLM.from_pretrained(source, **options)
    lacking, surplus = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if lacking:  # for which transformers takes random ones
        raise RuntimeError(f"모델의 가중치 {len(lacking)}개가 없습니다: {source} (예: {lacking[0]})")
    if surplus:
        logger.warning(f"⚠️  모델 설정에 없는 가중치 {len(surplus)}개를 읽지 않았습니다: {source} (예: {surplus[0]})")
    choose_attention(model)
    return model


def context_length(model: nn.Module, default: int = 2048) -> int:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or default


class HeadLoss(torch.autograd.Function):
    """Mean cross entropy of a linear output head, with its gradients worked out beside it."""

    # While the logits of some rows are at hand, their gradient takes their place: nothing of the size of all logits is
    # kept and no row computed twice (Hsu et al., "Liger Kernel", 2024).  Unscaled sums keep gradients in FP16's range.

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, rows: int) -> torch.Tensor:
        """Take (n, width), (vocabulary, width) of one type and (n,); ``rows`` of them at a time."""
        total, hidden_grad, weight_grad = hidden.new_zeros((), dtype=torch.float32), [], None
        for part, target in zip(hidden.split(rows), targets[:, None].split(rows), strict=True):
            logits = (part @ weight.t()).float()
            logits.sub_(logits.amax(1, keepdim=True))
            chosen = logits.gather(1, target)
            normalizer = logits.exp_().sum(1, keepdim=True)
            total = total + (normalizer.log() - chosen).sum()
            grad = logits.div_(normalizer)
            if torch.compiler.is_compiling():  # one kernel, where a scatter would write the probabilities in fp32
                grad = grad - (torch.arange(len(weight), device=weight.device) == target).float()
            else:  # which needs no second matrix of this size
                grad.scatter_add_(1, target, torch.full_like(normalizer, -1.0))
            grad = grad.to(weight.dtype)
            hidden_grad.append(grad @ weight)
            sum_part = grad.t() @ part
            weight_grad = sum_part if weight_grad is None else weight_grad.float().add_(sum_part)
            del logits, grad, sum_part  # before the next rows' are made
        ctx.save_for_backward(torch.cat(hidden_grad), weight_grad.to(weight.dtype))
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        scale = scale / len(hidden_grad)
        return hidden_grad * scale, weight_grad * scale, None, None


class LMWithLoss(nn.Module):
    """A causal language model with its loss on packed rows (batch, tokens + 1): inputs and targets, one apart."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        _, self.plain_head = try_out(model)

    def forward(self, rows: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        """Return the cross entropy in nats: its mean, or with "none" one a target (batch * tokens)."""
        inputs, targets = rows[:, :-1], rows[:, 1:].flatten()
        if reduction == "mean" and getattr(self.model.config.get_text_config(), "output_router_logits", False):
            # The router's auxiliary loss, which it asks for, is in the model's own.
            return self.model(input_ids=inputs, use_cache=False, labels=targets, shift_labels=targets).loss
        if not self.plain_head:
            logits = self.model(input_ids=inputs, use_cache=False).logits
            return F.cross_entropy(logits.flatten(0, 1).float(), targets, reduction=reduction)
        hidden = self.model.base_model(input_ids=inputs, use_cache=False)[0].flatten(0, 1)
        return self.head_loss(hidden, self.model.get_output_embeddings().weight, targets, reduction)

    @staticmethod
    def head_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, reduction: str) -> torch.Tensor:
        """The loss of hidden states (n, width) under a head (vocabulary, width), in pieces where memory asks for it."""
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            hidden, weight = (item.to(torch.get_autocast_dtype(device)) for item in (hidden, weight))
        size = logit_chunk_size(len(targets), len(weight))
        if reduction == "mean":
            return HeadLoss.apply(hidden, weight, targets, size)
        size = -(-size // 2)  # PyTorch's keeps a copy: an evaluation takes no more memory than a step
        parts = zip(hidden.split(size), targets.split(size), strict=True)
        return torch.cat([F.cross_entropy((part @ weight.t()).float(), goal, reduction="none") for part, goal in parts])

    def compile_parts(self, **options: Any) -> None:
        torch._dynamo.config.optimize_ddp = False  # which would cut a graph at each border of DDP's buckets
        for layer in next((module for module in self.model.modules() if isinstance(module, nn.ModuleList)), ()):
            layer.compile(**options)  # one graph serves all of them
        self.head_loss = torch.compile(self.head_loss, **options)


def build_loss(cfg: TrainConfig, tokenizer: Any, device: torch.device | str = "cpu") -> LMWithLoss:
    loss_module = LMWithLoss(build_model(cfg, tokenizer, device))
    if cfg.precision == "fp8":
        from accelerate.utils.ao import convert_model_to_fp8_ao
        from torchao.float8 import Float8LinearConfig

        # Not by ``prepare``, which would wrap the optimizer's weights; not the first layer, the head and odd widths.
        convert_model_to_fp8_ao(loss_module.model, config=Float8LinearConfig(pad_inner_dim=True))
    if cfg.compile:
        loss_module.compile_parts()
    return loss_module


def build_optimizer(model: nn.Module, cfg: TrainConfig, alone: bool = False) -> torch.optim.Optimizer:
    """Fused AdamW, or Muon for the inner matrices (a collective, unless ``alone``); only matrices decay."""
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    outer = {id(module.weight) for module in (*embeddings, model.get_output_embeddings()) if module is not None}
    hidden, matrices, vectors = groups = {"params": []}, {"params": []}, {"params": [], "weight_decay": 0.0}
    for weight in (weight for weight in model.parameters() if weight.requires_grad):
        is_hidden = cfg.optimizer == "muon" and weight.dim() == 2 and id(weight) not in outer
        group = hidden if is_hidden else matrices if weight.dim() >= 2 else vectors
        group["params"].append(weight)
    groups = [group for group in groups if group["params"]]
    settings = {"weight_decay": cfg.weight_decay, "betas": (0.9, 0.95), "fused": True}  # each step sets the rate
    return Muon(groups, alone, **settings) if cfg.optimizer == "muon" else torch.optim.AdamW(groups, **settings)


def newton_schulz(matrices: torch.Tensor, out: torch.Tensor) -> None:
    """Orthogonalise ``matrices`` (n, rows, columns), overwriting them, into ``out`` (Jordan et al., "Muon", 2024)."""
    now, then = (matrices, out) if matrices.shape[1] <= matrices.shape[2] else (matrices.mT, out.mT)
    now.div_(torch.linalg.vector_norm(now, dim=(1, 2), keepdim=True).clamp_(min=1e-7))
    for _ in range(5):  # an odd number, so that the last one ends in ``out``
        gram = now @ now.mT
        gram = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        torch.baddbmm(now, gram, now, beta=3.4445, out=then)
        now, then = then, now


class Muon(torch.optim.AdamW):
    """Muon for the first group's matrices; the other groups are fused AdamW's."""

    # An orthogonal matrix times 0.2 * sqrt(max(rows, columns)) has the RMS of AdamW's updates: learning rate and decay
    # carry over (Liu et al., "Muon is Scalable for LLM Training", 2025).  Every rank keeps all of the momentum, so rank
    # 0's checkpoint is complete; each orthogonalises its share of a shape's matrices and gathers the others', so that
    # weights can't drift apart.  Like fused AdamW, a step whose ``found_inf`` is 1 changes nothing, without a wait.
    momentum = 0.95

    def __init__(self, groups: list[dict[str, Any]], alone: bool = False, **settings: Any):
        super().__init__(groups, **settings)
        self.rank, self.ranks = (0, 1) if alone else rank_and_world()

    def __setstate__(self, state: dict[str, Any]) -> None:
        torch.optim.Optimizer.__setstate__(self, state)  # AdamW's looks for AdamW's state in every group

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        found_inf = getattr(self, "found_inf", self.param_groups[0]["params"][0].new_zeros(()))
        groups, kept = self.param_groups, 1 - found_inf
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for weight in groups[0]["params"]:
            if not self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
            momentum = self.state[weight]["momentum_buffer"]
            torch.where(found_inf.bool(), momentum, weight.grad, out=weight.grad)  # a NaN times 0 would stay one
            momentum.lerp_(weight.grad, 1 - self.momentum)
            weight.mul_(1 - kept * groups[0]["lr"] * groups[0]["weight_decay"])
            by_shape.setdefault(weight.shape, []).append(weight)
        for shape, alike in by_shape.items():
            most = self.ranks * max(1, MUON_BATCH // shape.numel())
            for first in range(0, len(alike), most):
                self.update(alike[first : first + most], kept)
        self.param_groups = groups[1:]
        super().step()
        self.param_groups = groups

    def update(self, alike: list[nn.Parameter], kept: torch.Tensor) -> None:
        shape, share = alike[0].shape, -(-len(alike) // self.ranks)
        mine = slice(self.rank * share, (self.rank + 1) * share)
        dtype = torch.float32 if alike[0].is_cpu else torch.bfloat16  # which is 22 times slower on a CPU with AVX2 only
        scratch = torch.zeros(share, *shape, dtype=dtype, device=alike[0].device)
        updates = scratch.new_empty(self.ranks * share, *shape)
        for row, weight in zip(scratch, alike[mine], strict=False):  # the last rank may have fewer, or none
            row.copy_(weight.grad.lerp_(self.state[weight]["momentum_buffer"], self.momentum))  # and so uses it up
        newton_schulz(scratch, updates[mine])
        if self.ranks > 1:
            dist.all_gather_into_tensor(updates, updates[mine])
        rate = -0.2 * max(shape) ** 0.5 * self.param_groups[0]["lr"]
        for weight, update in zip(alike, updates.mul_(kept), strict=False):
            weight.add_(update, alpha=rate)


def learning_rate_at(run: Run, step: int) -> float:
    """Learning rate of the ``step``-th of all steps, counted from 0."""
    total, warmup, ratio = run.total_steps, run.warmup_steps, run.cfg.decay_ratio
    if step < warmup:
        return run.peak_rate * (step + 1) / warmup
    left = (total - step) / max(1, total - warmup)
    factors = {"cosine": 0.5 * (1 - math.cos(math.pi * left)), "linear": left, "wsd": min(1.0, left / ratio)}
    return run.peak_rate * factors.get(run.cfg.lr_schedule, 1.0)  # of "constant"


def find_batch_size(cfg: TrainConfig, rows: int, tokenizer: Any, accelerator: Accelerator) -> int:
    """The first batch size, from a rank's ``rows`` of a step on and halved each time, that fits on every rank."""
    logger.info(f"🔍 배치 크기를 찾는 중... (스텝당 행 {rows}개에서 시작해 절반씩 줄임)")
    if cfg.device == "cuda":
        torch.cuda.set_per_process_memory_fraction(0.92)  # the allocator's gaps and what others hold take the rest
    size = rows
    while True:
        fits = try_steps(cfg, size, tokenizer, accelerator)
        torch._dynamo.reset()  # a second shape would make the sizes of the first graph dynamic
        for _ in range(2):  # it keeps the models that it prepared, and collects only before it lets go of them
            accelerator.free_memory()
        if all(gather_object([fits])):
            break
        logger.info(f"   • 배치 크기 {size}: 메모리가 부족합니다")
        if size == 1:
            advice = "--gradient-checkpointing 을 쓰거나 --max-seq-length, --model-size 를 줄이세요"
            raise EnvironmentProblem(f"--find-batch-size: 배치 크기 1도 GPU 메모리에 들어가지 않습니다. {advice}")
        size = next(smaller for smaller in range(size // 2, 0, -1) if rows % smaller == 0)
    if cfg.device == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.reset_peak_memory_stats()
    logger.info(f"✅ 배치 크기 {size}, 기울기 누적 {rows // size} (스텝당 토큰은 그대로)")
    return size


def try_steps(cfg: TrainConfig, size: int, tokenizer: Any, accelerator: Accelerator) -> bool:
    """Whether there is memory for two steps of a new model; without any collective, as one rank may fail alone."""
    try:
        loss_module = build_loss(cfg, tokenizer, accelerator.device)
        optimizer = build_optimizer(loss_module.model, cfg, alone=True)
        model = accelerator.prepare_model(loss_module, evaluation_mode=True)
        if accelerator.num_processes > 1:  # DDP makes its buckets anew, while NCCL may still hold the first ones
            model.first_buckets = [torch.empty_like(weight) for weight in model.parameters()]
        for _ in range(2):  # the second beside gradients and the optimizer's state
            model(torch.zeros(size, cfg.max_seq_length + 1, dtype=torch.int64, device=accelerator.device)).backward()
            optimizer.step()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


# ==== The run and its state ===========================================================


@dataclass
class TrainState:
    """How far a run has come; all of it is saved, and comes back with ``--resume``."""

    step: int = 0
    tokens_seen: int = 0
    elapsed_seconds: float = 0.0
    skipped_steps: int = 0
    loss: float | None = None
    skipped_recently: list[int] = field(default_factory=list)  # which of the last 1,000 steps gave NaN
    loss_window: list[float] = field(default_factory=list)  # of the steps since the last line of the log
    evaluation: dict[str, float | None] = field(default_factory=dict)


@dataclass
class Run:
    """What a run works with: fixed once it has started, and from ``save_seconds`` on what it has measured or begun."""

    cfg: TrainConfig
    accelerator: Accelerator
    corpus: Corpus
    loss_module: LMWithLoss  # the model with its loss, as it was built
    ddp_model: nn.Module  # the same, wrapped for training
    optimizer: Any
    batch_size: int  # rows of a micro-step on each rank: as typed, or what --find-batch-size found
    gradient_accumulation_steps: int  # as typed, or so that a step reads what it did before a resume
    step_tokens: int  # of all ranks
    total_steps: int
    warmup_steps: int  # of the run as it began, however long it has become
    peak_rate: float  # as typed, or what "auto" found
    spike_window: torch.Tensor  # loss, gradient norm and whether it was skipped of the last steps, on the device
    stop: StopFlag
    backend: str  # of attention, as it really runs
    saver: Saver
    save_seconds: float  # how long the last one took; before the first, what is known of it
    evaluation_seconds: float = 0.0
    sample_seconds: float = 0.0
    painter: subprocess.Popen | None = None  # of the curves

    @property
    def model(self) -> nn.Module:
        return self.loss_module.model

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process


@functools.cache
def provenance() -> dict[str, Any]:
    """What a run is made of: versions, and the commit of this checkout, with a plus where it was changed."""
    packages = {name: importlib.metadata.version(name) for name in MINIMUM_VERSIONS}
    command, commit = ["git", "-C", str(SCRIPT_DIR), "describe", "--always", "--abbrev=40", "--dirty=+"], None
    with suppress(OSError, subprocess.SubprocessError):
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return {"versions": {"python": sys.version.split()[0], **packages}, "git_commit": commit}


def write_model(folder: Path, run: Run, weights: dict[str, torch.Tensor]) -> str:
    """Write a Hugging Face model: weights, configuration and tokenizer; returns the SHA-256 of the weights' file."""
    tokenizer = run.corpus.tokenizer
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = run.model.config.to_dict()
    config.update(use_cache=True, architectures=[type(run.model).__name__], dtype="float32")
    config.get("text_config", config).update(ids)  # the tokenizer may not be the one that --init-from came with
    saved = json.loads(type(run.model.config).from_dict(config).to_json_string())
    # transformers 4, and what reads configurations as it did, knows no rope_parameters and would take its defaults.
    rope = dict(saved.get("rope_parameters") or {})
    if "rope_theta" in rope:  # else none, or several by type of layer, which version 4 had no common names for
        saved.update({name: rope.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in rope})
        if rope.get("rope_type", "default") != "default":
            saved["rope_scaling"] = rope
    write_json(folder / "config.json", saved)
    sampling = {"do_sample": True, "temperature": 0.8, "top_k": 0, "top_p": 0.95}
    GenerationConfig(**ids, pad_token_id=tokenizer.pad_token_id, **sampling).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return write_tensors(folder / "pytorch_model.bin", weights)


def write_tensors(path: Path, content: dict[str, Any]) -> str:
    """``torch.save``; returns the file's SHA-256, taken while its bytes pass."""
    digest = hashlib.sha256()
    with open(path, "wb") as stream:  # a Python file tells a full disk from other errors

        def write(data: bytes) -> int:
            digest.update(data)
            return stream.write(data)

        torch.save(content, SimpleNamespace(write=write, flush=stream.flush))
    return digest.hexdigest()


def flush_to_disk(paths: Iterable[Path]) -> None:
    """Have the disk hold what was written to files, and to directories' lists of names."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def atomic_dir(folder: Path) -> Iterator[Path]:
    """Give a temporary sibling to write into; on success it is flushed and gets its name at once."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        flush_to_disk([*temporary.rglob("*"), temporary])
        if folder.exists():
            remove_directory(folder)
        os.rename(temporary, folder)
        flush_to_disk([folder.parent])
    except BaseException:  # give back the room that half of it takes
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_directory(folder: Path) -> None:
    """Remove a directory so that, whenever this is interrupted, its name stands for all of it or for nothing."""
    aside = folder.with_name(f".{folder.name}.old.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)
    shutil.rmtree(aside)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    return hashlib.blake2b(tokenizer.backend_tokenizer.to_str().encode(), digest_size=12).hexdigest()


def save_initial_model(run: Run) -> None:
    """Write the untrained model to ``initial_model/``, on rank 0 only; a run can do without it."""
    logger.info("🚀 초기 모델 저장 중...")
    begun, folder = time.monotonic(), run.cfg.output_dir / "initial_model"
    embedding = run.model.get_input_embeddings().weight
    counts = {"total": run.model.num_parameters(), "embedding": embedding.numel()}
    info = {"parameters": counts, "dtype": "float32", "vocab_size": len(embedding), **provenance()}
    info |= {"architecture": type(run.model).__name__, "model_size": options_of(run.cfg)["model_size"]}
    info |= {"tokenizer_fingerprint": tokenizer_fingerprint(run.corpus.tokenizer), "created": timestamp()}
    try:
        with atomic_dir(folder) as temporary:
            write_model(temporary, run, run.saver.copy_weights(run.model))
            write_json(temporary / "model_info.json", info)
        logger.info(f"✅ 초기 모델 저장 완료: {display_path(folder)}")
    except OSError as error:
        logger.warning(f"⚠️  초기 모델을 저장하지 못했습니다: {describe_error(error)[0]}. 학습은 계속합니다")
    run.save_seconds = 3 * (time.monotonic() - begun)  # a checkpoint holds two Adam moments besides


def training_info(run: Run, state: TrainState) -> dict[str, Any]:
    seconds, report, rows = state.elapsed_seconds, run.corpus.report, run.corpus.rows(run.cfg.max_seq_length)
    info = {"layout_version": LAYOUT_VERSION, "total_steps": run.total_steps, **state.evaluation}
    info |= {name: value for name, value in asdict(state).items() if not isinstance(value, (list, dict))}
    info["epoch"] = state.tokens_seen / (rows * run.cfg.max_seq_length)
    info["learning_rate"] = learning_rate_at(run, max(0, state.step - 1))
    info["tokens_per_second"] = state.tokens_seen / seconds if seconds else None
    info |= {"world_size": run.accelerator.num_processes, "mode": run.cfg.mode, "attention_backend": run.backend}
    info["save_seconds"] = run.save_seconds  # of the save before: this one's aren't known yet
    info |= {"corpus": report, "data_fingerprint": report["fingerprint"], "warmup_steps": run.warmup_steps}
    info |= {"tokenizer_fingerprint": tokenizer_fingerprint(run.corpus.tokenizer), "created": timestamp()}
    chosen = {"batch_size": run.batch_size, "gradient_accumulation_steps": run.gradient_accumulation_steps}
    chosen["learning_rate"] = run.peak_rate
    return info | {"options": options_of(run.cfg) | chosen, **provenance()}


class Saver:
    """Writes checkpoints in a thread of rank 0, one at a time, from buffers in host memory that serve every save."""

    def __init__(self) -> None:
        self.buffers: dict[str, torch.Tensor] = {}
        self.executor = ThreadPoolExecutor(1, "saver", os.nice, (10,))  # on a CPU, training needs the same cores
        self.pending: Future | None = None  # a call of write_checkpoint, until the loop has told how it ended
        self.step = 0  # that it saves
        self.failed = 0  # saves of this run, its restarts included

    def busy(self, seconds: float | None = 0.0) -> bool:
        """Whether a save is still being written after so many seconds (None: however long it takes)."""
        return self.pending is not None and bool(wait([self.pending], seconds).not_done)

    def copy(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a tensor into the buffer of that name; from a GPU it is complete once the stream is."""
        if name not in self.buffers:
            self.buffers[name] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return self.buffers[name].copy_(tensor, non_blocking=True)

    def copy_weights(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Copy a model's weights, tied ones into one buffer, and wait for this and the copies before it."""
        first, weights = {}, {}
        for name, value in model.state_dict().items():
            weights[name] = self.copy(first.setdefault((value.data_ptr(), value.shape), name), value)
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()  # the one wait of a save: the next step overwrites the sources
        return weights


def wait_for_saver(run: Run) -> None:
    """Wait on every rank until rank 0 writes no checkpoint any more, and let it tell how that ended."""
    busy = torch.ones((), device=run.accelerator.device)
    with log_waiting("앞선 체크포인트의 저장을 기다리는 중"):
        while busy:  # short collectives, so that no rank's hang timer takes a slow disk for a hang
            broadcast(busy.fill_(run.saver.busy(1.0)))  # other ranks have none
            run.stop.heartbeat()
    report_save(run)


def save_checkpoint(run: Run, state: TrainState) -> None:
    """Copy the run's state to host memory and start writing ``checkpoint-STEP`` from there; all ranks call it."""
    wait_for_saver(run)
    if not run.is_main:
        return
    logger.info(f"💾 체크포인트 저장 중... (스텝 {state.step:,})")
    moments, copy = {}, run.saver.copy
    for name, weight in run.model.named_parameters():
        kinds = run.optimizer.state.get(weight, {})
        moments[name] = {kind: copy(f"{name} {kind}", value) for kind, value in kinds.items()}
    scaler = run.accelerator.scaler.state_dict() if run.accelerator.scaler else None
    content = {"optimizer": moments, "scaler": scaler, "progress": asdict(state)}
    content["spike_window"] = copy("spike_window", run.spike_window)
    weights, info = run.saver.copy_weights(run.model), training_info(run, state)
    run.saver.step = state.step
    run.saver.pending = run.saver.executor.submit(write_checkpoint, run, weights, content, info)


def write_checkpoint(run: Run, weights: dict[str, torch.Tensor], content: dict[str, Any], info: dict[str, Any]) -> None:
    """Write a checkpoint from host memory, in the saver's thread; what it replaces goes only once it is there."""
    begun = time.monotonic()
    with atomic_dir(run.cfg.output_dir / f"checkpoint-{info['step']}") as temporary:
        (temporary / "training_state").mkdir()
        hashes = {"pytorch_model.bin": write_model(temporary, run, weights)}
        hashes["training_state/state.pt"] = write_tensors(temporary / "training_state" / "state.pt", content)
        write_json(temporary / "training_info.json", info)
        files = {}
        for path in sorted(path for path in temporary.rglob("*") if path.is_file()):
            name = path.relative_to(temporary).as_posix()
            files[name] = {"bytes": path.stat().st_size, "sha256": hashes.get(name) or file_checksum(path)}
        write_json(temporary / MANIFEST, {"files": files})
    # The training state stays in the newest two only.
    checkpoints = list_checkpoints(run.cfg.output_dir)
    kept = run.cfg.save_total_limit or len(checkpoints)
    states = [path / "training_state" for path in checkpoints[-kept:-2] if (path / "training_state").is_dir()]
    for path in (*checkpoints[:-kept], *states):
        try:
            remove_directory(path)
        except OSError as error:  # somebody reads it, as on NFS; the new one is there all the same
            logger.warning(f"⚠️  오래된 체크포인트를 지우지 못했습니다: {display_path(path)} ({error})")
    run.save_seconds = time.monotonic() - begun


def report_save(run: Run, is_last: bool = False) -> None:
    """Tell, once, how a save ended; the last is waited for, on rank 0 alone, and a RuntimeError if it failed."""
    saver = run.saver
    if saver.pending is None or saver.busy(None if is_last else 0.0):
        return
    error, saver.pending = saver.pending.exception(), None
    folder = run.cfg.output_dir / f"checkpoint-{saver.step}"
    saver.failed += error is not None
    with suppress(OSError):  # a full disk: it is told after the next save
        update_run_info(run.cfg.output_dir, failed_saves=saver.failed)
    if error is None:
        logger.info(f"✅ 체크포인트 저장 완료: {display_path(folder)} ({run.save_seconds:.1f}초)")
        return
    reason, left = f"{describe_error(error)[0]}, {display_path(folder)}", last_checkpoint(run.cfg)
    if is_last:
        text = f"마지막 스텝({saver.step:,})을 저장하지 못했습니다: {reason}"
        raise RuntimeError(f"{text}. 공간을 비우고 --train --resume 으로 이어서 하세요. {left}") from error
    logging.getLogger("traceback").error("a save failed", exc_info=error)
    text = f"⚠️  체크포인트를 저장하지 못했습니다 (스텝 {saver.step:,}): {reason}"
    logger.warning(f"{text}. 다음 저장 때 다시 시도합니다. {left}")


def last_checkpoint(cfg: TrainConfig) -> str:
    try:
        newest, _ = newest_whole(list_checkpoints(cfg.output_dir))
    except OSError as error:
        return f"마지막 체크포인트를 확인하지 못했습니다: {describe_error(error)[0]}"
    return f"마지막 체크포인트: {display_path(newest) if newest else '없음'}"


def load_checkpoint(run: Run, folder: Path) -> TrainState:
    """Go back to where a checkpoint was written; rank 0 reads it and gives it to the others, a tensor at a time."""
    content: dict[str, Any] = {}
    if run.is_main:
        paths = (folder / "pytorch_model.bin", folder / "training_state" / "state.pt")
        try:  # a disk that doesn't answer for a moment is no known cause: a restart may find it well
            weights, content = (torch.load(path, "cpu", weights_only=True, mmap=True) for path in paths)
        except pickle.UnpicklingError as error:
            raise RuntimeError(f"코드가 실행될 수 있어 열지 않습니다: {folder} (다른 체크포인트를 쓰세요)") from error
        with refusing("모델과 맞지 않는 체크포인트입니다", folder):
            run.model.load_state_dict(weights)
    moments = content.pop("optimizer", {})
    shapes = {name: {kind: value.to("meta") for kind, value in kinds.items()} for name, kinds in moments.items()}
    content, shapes = broadcast_object_list([content, shapes])
    broadcast(run.model.state_dict())
    for name, weight in run.model.named_parameters():
        for kind, shape in shapes.get(name, {}).items():
            moment = torch.empty_like(shape, device=weight.device)
            if run.is_main:
                moment.copy_(moments[name][kind])
            run.optimizer.state[weight][kind] = broadcast(moment)
    if run.accelerator.scaler and content["scaler"]:
        run.accelerator.scaler.load_state_dict(content["scaler"])
    run.spike_window.copy_(content.get("spike_window", run.spike_window))
    known = TrainState.__dataclass_fields__  # older versions kept more
    return TrainState(**{name: value for name, value in content["progress"].items() if name in known})


# ==== Metrics =========================================================================


class StepLog:
    """Tells a step's figures: added up over the ranks, so that all stop together, and read one step late, unwaited."""

    def __init__(self, run: Run, state: TrainState):
        self.run, self.state = run, state
        config, device = run.model.config.get_text_config(), run.accelerator.device
        self.peak = named_peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        unused = 0 if config.tie_word_embeddings else run.model.get_input_embeddings().weight.numel()
        weights = sum(weight.numel() for weight in run.model.parameters()) - unused
        self.flops = training_flops(weights, config.num_hidden_layers, config.hidden_size, run.cfg.max_seq_length)
        self.recent: deque[dict[str, Any]] = deque(maxlen=100)
        self.unwritten = b""
        self.begun = time.monotonic() - state.elapsed_seconds
        self.waiting: tuple | None = None  # a step's number, when it was launched, its figures, its end on the GPU
        self.pinned = [torch.zeros(4, pin_memory=True) for _ in range(2)] if device.type == "cuda" else None
        self.restart_clock()

    def restart_clock(self) -> None:
        """Measure the speed from here on, where the device has nothing to do; a save before it is no part of it."""
        self.marked, self.marked_step = time.monotonic(), self.state.step

    def push(self, step: int, stats: torch.Tensor) -> bool:
        """Hand in the figures (4 float32 on the device) of a step, and ``pop`` the one before it."""
        ended = None
        if self.pinned:
            stats, ended = self.pinned[step % 2].copy_(stats, non_blocking=True), torch.cuda.Event()
            ended.record()
        launched = step, time.monotonic(), stats, ended
        asked, self.waiting = self.pop(), launched
        return asked

    def pop(self) -> bool:
        """Take in the step that waits, if one does; returns whether a rank is asked to stop."""
        if self.waiting is None:
            return False
        (step, moment, stats, ended), self.waiting = self.waiting, None
        if ended:  # the host launched the step long before its end, which it waits for while the next one runs
            ended.synchronize()
            moment = time.monotonic()
        loss, grad_norm, verdict, asked = stats.tolist()
        self.judge(step, loss, grad_norm, verdict)
        self.handle(step, moment, loss, grad_norm)
        return bool(asked)

    def judge(self, step: int, loss: float, grad_norm: float, verdict: float) -> None:
        """Tell of a step that stands out (2) or isn't finite (1); RuntimeError, on all ranks, where too many aren't."""
        run, state = self.run, self.state
        state.loss = loss
        if not verdict:
            return
        rows = run.step_tokens // run.cfg.max_seq_length
        place = f"데이터 행 위치 {(step - 1) * rows:,}–{step * rows - 1:,}"
        what = "손실이나 기울기가 NaN/Inf라" if verdict == 1 else f"손실({loss:.4f})이나 기울기({grad_norm:.3f})가 튀어"
        if verdict == 2 and not skips_spikes(run):
            logger.warning(f"⚠️  스텝 {step:,}: {what}올랐습니다 ({place})")
            return
        state.skipped_steps += 1
        logger.warning(f"⚠️  스텝 {step:,}: {what} 갱신을 건너뜁니다 (모두 {state.skipped_steps}번, {place})")
        if run.is_main:
            with suppress(OSError):  # a full disk
                update_run_info(run.cfg.output_dir, skipped_steps=state.skipped_steps)
        if verdict == 2:
            return
        state.skipped_recently = [earlier for earlier in state.skipped_recently if earlier > step - 1000] + [step]
        often, scaler = len(state.skipped_recently), run.accelerator.scaler
        in_a_row = state.skipped_recently[-5:] == [*range(step - 4, step + 1)]
        is_searching = scaler is not None and scaler.get_scale() >= 1  # FP16's skips steps to find its scale
        if (in_a_row or often > 10) and not is_searching:
            wait_for_saver(run)  # only then all ranks see the same checkpoints
            count = "다섯 스텝 연속으로" if in_a_row else f"최근 1,000스텝 가운데 {often}스텝에서"
            other = "math" if run.backend == "flash" else "flash"
            advice = f"--learning-rate 를 낮추거나 어텐션 커널을 {run.backend} 대신 --attention {other} 로 바꿔 보세요"
            raise RuntimeError(f"{count} 손실이나 기울기가 NaN/Inf입니다. {advice}. {last_checkpoint(run.cfg)}")

    def handle(self, step: int, moment: float, loss: float, grad_norm: float) -> None:
        """Note a step that had ended by ``moment``; a line of the log holds the mean loss since the one before."""
        run, losses = self.run, self.state.loss_window
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        memory = (torch.cuda.max_memory_allocated() if run.cfg.device == "cuda" else resident) / 1e9
        logger.debug(f"step {step}: loss {loss:.6f}, grad_norm {grad_norm:.4f}, memory {memory:.2f} GB")
        losses.append(loss)
        if step % run.cfg.logging_steps and step not in (1, run.total_steps):
            return
        speed = (step - self.marked_step) * run.step_tokens / (moment - self.marked)
        self.marked, self.marked_step = moment, step
        record = {
            "step": step,
            "loss": sum(losses) / len(losses),
            "learning_rate": learning_rate_at(run, step - 1),
            "grad_norm": grad_norm,
            "tokens_per_second": speed,
            "mfu": speed * self.flops / (self.peak * run.accelerator.num_processes) if self.peak else None,
            "memory_gb": memory,
            "seconds": moment - self.begun,
        }
        losses.clear()
        self.recent.append(record)
        self.write(record)
        figures = f"손실 {record['loss']:.4f} | 학습률 {record['learning_rate']:.2e} | 기울기 {grad_norm:.3f}"
        left, mfu = seconds_left(self.recent, run.total_steps), f"{record['mfu']:.1%}" if self.peak else "-"
        left = "-" if left is None else format_duration(left)
        logger.info(f"스텝 {step:,}/{run.total_steps:,} | {figures}")  # two lines, which 80 columns hold
        logger.info(f"   {speed:,.0f} 토큰/s | MFU {mfu} | 메모리 {memory:.1f} GB | 남은 시간 {left}")

    def write(self, record: dict[str, Any]) -> None:
        """Append a line to ``metrics.jsonl``; what a full disk doesn't take of it is kept for the next."""
        if not self.run.is_main:
            return
        record, path = known_numbers(record), self.run.cfg.output_dir / "metrics.jsonl"
        self.unwritten += json.dumps(record).encode() + b"\n"
        try:
            with open(path, "ab", buffering=0) as stream:
                while self.unwritten:  # a disk that fills up takes the first part
                    self.unwritten = self.unwritten[stream.write(self.unwritten) :]
        except OSError as error:
            logger.warning(f"⚠️  metrics.jsonl에 쓰지 못했습니다 (다음에 다시 씁니다): {describe_error(error)[0]}")
        group = "validation" if "val_loss" in record else "train"
        figures = {f"{group}/{name.removeprefix('val_')}": value for name, value in record.items() if value is not None}
        with tracking(self.run):
            self.run.accelerator.log(figures, step=record["step"])


@contextmanager
def tracking(run: Run) -> Iterator[None]:
    """What fails with a tracker (network, account, room) ends tracking, said once, and never training."""
    try:
        yield
    except Exception as error:
        run.accelerator.trackers.clear()
        logging.getLogger("traceback").error("tracking failed", exc_info=error)
        logger.warning(f"⚠️  --report-to 기록에 실패해 학습만 계속합니다. {describe_error(error)[0]}")


def start_trackers(run: Run, state: TrainState) -> None:
    """Open rank 0's trackers; in TensorBoard the run's points replace those that stand from its first step on."""
    if run.is_main:
        settings = {"tensorboard": {"purge_step": state.step + 1}, "wandb": {"dir": str(run.cfg.logs_dir)}}
        with tracking(run):
            run.accelerator.init_trackers("h100_dual", init_kwargs=settings)


def draw_curves_beside(run: Run, wait: bool = False) -> None:
    """Have ``training_curves.png`` drawn by a process, one at a time: a thread would hold the loop's GIL."""
    if run.painter and (run.painter.wait() if wait else run.painter.poll()) is None:  # it still draws
        return
    command = [sys.executable, str(Path(__file__).resolve()), "internal:curves", str(run.cfg.output_dir)]
    detail_log = run.cfg.logs_dir / "training_detail_rank_0.log"
    with suppress(OSError), open(detail_log, "a", encoding="utf-8") as log:  # training doesn't depend on it
        run.painter = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        if wait and run.painter.wait():
            logger.warning(f"⚠️  학습 곡선을 그리지 못했습니다. 자세한 내용: {display_path(detail_log)}")


def cut_file(path: Path, step: int) -> None:
    """Drop from ``metrics.jsonl`` or ``samples.md`` what is of steps after ``step`` and, saying so, what is torn."""
    is_metrics, kept, size = path.suffix == ".jsonl", [], 0
    pattern = r'^\{"step": (\d+).*\n' if is_metrics else r"^## 스텝 ([\d,]+)\n(?:(?!## 스텝 ).*\n)*"
    try:
        content = path.read_bytes() if path.exists() else b""
        for part in re.finditer(pattern.encode(), content, re.MULTILINE):
            with suppress(ValueError):  # a torn line, or bytes that no text has
                json.loads(part[0] if is_metrics else json.dumps(part[0].decode()))
                size += len(part[0])
                kept += [part[0]] if int(part[1].replace(b",", b"")) <= step else []
        if b"".join(kept) != content:
            with open(path, "r+b") as stream:  # no copy aside: the disk may be full
                stream.write(b"".join(kept))
                stream.truncate()
        if size < len(content):
            logger.warning(f"⚠️  {path.name} 에서 읽을 수 없는 {len(content) - size:,}바이트를 뺐습니다")
    except OSError as error:  # no reason not to go on
        logger.warning(f"⚠️  {path.name} 을(를) 정리하지 못했습니다: {describe_error(error)[0]}")


def start_profile(run: Run, left: int) -> Any:
    """Profile three of the ``left`` steps after five, on rank 0; the loop calls the profiler's ``step`` after each."""
    if not run.cfg.profile or not run.is_main:
        return None
    if left < 8:
        logger.warning("⚠️  --profile: 여덟 스텝은 있어야 합니다. --max-steps 를 늘리세요")
        return None

    def report(profiler: Any) -> None:
        path, device = run.cfg.output_dir / "profile_trace.json.gz", "device" if run.cfg.device == "cuda" else "cpu"
        profiler.export_chrome_trace(str(path))
        table = profiler.key_averages().table(f"self_{device}_time_total", row_limit=20, max_name_column_width=60)
        logger.info(f"🔬 프로파일: 3스텝의 합, 자기 시간이 긴 연산부터 (트레이스: {display_path(path)})\n{table}")

    steps = torch.profiler.schedule(skip_first=4, wait=0, warmup=1, active=3, repeat=1)
    profiler = torch.profiler.profile(schedule=steps, on_trace_ready=report)
    profiler.start()
    return profiler


# ==== Evaluation: bits per byte, samples ==============================================


def rolling_windows(tokens: np.ndarray, length: int, start: int) -> Iterator[tuple[np.ndarray, int]]:
    """Rows of at most ``length`` + 1 tokens, each with how many of its last are scored: all but ``start``, once."""
    for first in range(start - 1, len(tokens) - 1, length):
        end = min(first + length, len(tokens) - 1)
        yield tokens[max(0, end - length) : end + 1], end - first  # the last reaches back, as in lm-evaluation-harness


def score_windows(loss_module: LMWithLoss, windows: list[tuple], most: int, heartbeat: Callable = int) -> None:
    """Add to the totals of each window (a row, how many last tokens, totals) their nats; ``most`` inputs at a time."""
    windows = sorted(windows, key=lambda window: -len(window[0]))  # what doesn't fit into memory shows at once
    while windows:
        size = max(1, most // (len(windows[0][0]) - 1))
        batch, windows = windows[:size], windows[size:]
        # Attention is causal: what fills the shorter ones up changes nothing.
        rows = nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row, _, _ in batch], batch_first=True)
        with torch.compiler.set_stance("force_eager"):  # each length would be compiled anew
            loss = loss_module(rows.to(loss_module.model.device), reduction="none")
        for nats, (row, count, total) in zip(loss.view(len(batch), -1).double().cpu().numpy(), batch, strict=True):
            total[3] += nats[len(row) - 1 - count : len(row) - 1].sum()
        heartbeat()


@torch.no_grad()
def evaluate(run: Run) -> dict[str, float | None]:
    """Loss and bits per byte of held-out documents, up to 2 M tokens, scored as ``--evaluate`` does: all, ko, en."""
    corpus, length, windows, start = run.corpus, run.cfg.max_seq_length, [], document_start(run.corpus.tokenizer)
    apart = start[0] != corpus.tokenizer.eos_token_id  # then each document's first token is the end of another
    names, offsets, chosen = corpus.report["languages"], corpus.documents["offset"], corpus.val_documents
    ends = np.cumsum(offsets[chosen + 1] - offsets[chosen])
    chosen = chosen[: max(1, np.searchsorted(ends, MOST_EVALUATION_TOKENS, "right"))]
    totals = np.zeros((len(names), 4))  # documents, tokens, bytes, nats
    for number in chosen[run.accelerator.process_index :: run.accelerator.num_processes]:
        tokens = corpus.val.tokens[offsets[number] + apart : offsets[number + 1]].astype(np.int64)
        total = totals[corpus.documents["language"][number]]
        total += (1, len(tokens) - len(start), corpus.documents["bytes"][number], 0)
        windows += [(row, count, total) for row, count in rolling_windows(tokens, length, len(start))]
    run.loss_module.eval()
    most = max(run.batch_size * length, 2048)  # small batches of short rows, as on a CPU, cost more in calls than work
    score_windows(run.loss_module, windows, most, run.stop.heartbeat)
    run.loss_module.train()
    sums = run.accelerator.reduce(torch.from_numpy(totals).to(run.accelerator.device), "sum")
    figures = {}
    for suffix, languages in (("", names), ("_ko", ["ko"]), ("_en", ["en"])):
        _, tokens, size, nats = sums[[names.index(name) for name in languages if name in names]].sum(0).tolist()
        figures[f"val_loss{suffix}"] = nats / tokens if tokens else None
        figures[f"val_bits_per_byte{suffix}"] = nats / math.log(2) / size if size else None
    return figures


def evaluate_and_log(run: Run, state: TrainState, log: StepLog) -> None:
    if len(run.corpus.val) == 0:
        return
    start = time.monotonic()
    state.evaluation = evaluate(run)
    run.evaluation_seconds = time.monotonic() - start
    log.write({"step": state.step, **state.evaluation})
    logger.info(f"📈 검증 (스텝 {state.step:,}, {run.evaluation_seconds:.1f}초)")
    for suffix, name in (("", "전체"), ("_ko", "ko"), ("_en", "en")):
        loss, bits = state.evaluation[f"val_loss{suffix}"], state.evaluation[f"val_bits_per_byte{suffix}"]
        if loss is not None:
            logger.info(f"   • {name}: 손실 {loss:.4f}, bits/byte {bits:.4f}")


@torch.no_grad()
def generate_text(model: nn.Module, tokenizer: Any, cfg: TrainConfig, streamer: Any = None) -> str:
    """Continue ``cfg.prompt`` as from a document's beginning; the same for a seed, and no generator's state changes."""
    prompt = unicodedata.normalize("NFC", cfg.prompt)  # as all text in training
    ids = document_start(tokenizer) + tokenizer.backend_tokenizer.encode(prompt, add_special_tokens=False).ids
    length = context_length(model)
    room = length - len(ids)
    if room <= 0:
        raise ValueError(f"--prompt: {len(ids):,} 토큰은 모델의 최대 길이({length:,} 토큰)를 넘습니다. 줄이세요")
    if room < cfg.max_new_tokens:
        logger.warning(f"⚠️  모델의 최대 길이가 {length:,} 토큰이라 {room:,} 토큰까지만 이어 씁니다")
    sampling = {"do_sample": cfg.temperature > 0, "temperature": cfg.temperature or 1.0, "top_p": cfg.top_p}
    sampling |= {"max_new_tokens": min(room, cfg.max_new_tokens), "top_k": 0, "use_cache": True}  # top_k: else 50
    tokens = torch.tensor([ids], device=model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    # The kernel that --attention names may not take a single query; a growing cache would compile the layers anew.
    with torch.random.fork_rng(devices), attention_kernels("auto"), torch.compiler.set_stance("force_eager"):
        torch.manual_seed(cfg.seed)
        mask, settings = torch.ones_like(tokens), GenerationConfig(**sampling)
        tokens = model.generate(tokens, attention_mask=mask, generation_config=settings, streamer=streamer)
    return tokenizer.decode(tokens[0, len(ids) :], skip_special_tokens=True)


def generate_samples(run: Run, state: TrainState) -> None:
    """Complete the prompts, on every rank, so that none waits in a collective; rank 0 shows and keeps the texts."""
    cfg, tokenizer, start, texts = run.cfg, run.corpus.tokenizer, time.monotonic(), {}
    most = min(64, cfg.max_seq_length // 2)
    run.loss_module.eval()
    try:
        run.model.generation_config.update(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
        for prompt in [cfg.prompt] if cfg.prompt else SAMPLE_PROMPTS:
            with run.accelerator.autocast():
                text = generate_text(run.model, tokenizer, replace(cfg, prompt=prompt, max_new_tokens=most))
            run.stop.heartbeat()
            # An untrained model writes any bytes: also control characters.
            texts[prompt] = "".join(char if char.isprintable() or char == "\n" else " " for char in text).strip("\n")
        if run.is_main:
            logger.info(f"📝 샘플 (스텝 {state.step:,}, {time.monotonic() - start:.1f}초)")
            for prompt, text in texts.items():
                logger.info("\n     ".join([f"   [{prompt}]", *text.split("\n")]))
            quoted = [f"**{prompt}**\n\n> " + text.replace("\n", "\n> ") + "\n" for prompt, text in texts.items()]
            with open(cfg.output_dir / "samples.md", "a", encoding="utf-8") as stream:
                stream.write("\n".join([f"## 스텝 {state.step:,}\n", *quoted, ""]))
    except Exception as error:  # a model that can be trained but not generate, a full disk: no reason to end
        logging.getLogger("traceback").error("sampling failed", exc_info=error)
        logger.warning(f"⚠️  샘플을 만들지 못했습니다: {describe_error(error)[0]}. 학습은 계속합니다")
    run.loss_module.train()
    run.sample_seconds = time.monotonic() - start


@torch.inference_mode()
def score_corpus(model: nn.Module, tokenizer: Any, cfg: TrainConfig) -> dict[str, np.ndarray]:
    """Score every document of ``cfg.dataset_path`` by itself: a language's documents, tokens, bytes and nats."""
    most, length = context_length(model), cfg.max_seq_length or context_length(model)
    if length > most:
        raise ValueError(f"--max-seq-length {length}: 이 모델의 최대 길이는 {most:,} 토큰입니다")
    files, _ = corpus_files(cfg)
    if not files:
        cfg = replace(cfg, dataset_path=(Path(pinned_dataset(cfg)),))
    loss_module, totals, tally = LMWithLoss(model), {}, Tally()
    start, (encode, _) = document_start(tokenizer), make_encoder(tokenizer)
    with log_waiting("평가하는 중", tally.total, estimated_bytes(files)):
        for chunk in read_chunks(cfg, files, size=1 << 20):
            documents, windows = parse_chunk(chunk, cfg.text_column), []
            tally.add(documents)
            encoded = zip(documents.texts, documents.languages, encode(documents.texts), strict=True)
            for text, language, (ids, lost) in encoded:
                total = totals.setdefault(language, np.zeros(6))
                total += (1, len(ids), len(text.encode()), 0, len("".join(text.split())), len(lost))
                tokens = np.concatenate([start, ids])
                windows += [(row, count, total) for row, count in rolling_windows(tokens, length, len(start))]
            score_windows(loss_module, windows, cfg.batch_size * length)
    tally.check(corpus_name(cfg))
    if bad := tally.bad:
        first = "{file}:{line}".format(**bad[0])
        logger.warning(f"⚠️  읽지 못한 줄 {tally.total['bad']:,}개를 건너뛰었습니다 (처음: {first})")
    return totals


def evaluation_table(totals: dict[str, np.ndarray]) -> list[str]:
    rows = [("언어", "문서", "토큰", "바이트", "손실", "퍼플렉시티", "bits/byte")]
    for name, (documents, tokens, size, nats, characters, lost) in {"전체": sum(totals.values()), **totals}.items():
        if lost > LARGE_SHARE * characters:  # of what wasn't encoded nothing was predicted
            logger.warning(f"⚠️  {name}: 글자의 {lost / characters:.1%}를 토크나이저가 쓰지 못해 점수를 매기지 않습니다")
            nats = math.nan
        counts, loss = (f"{count:,.0f}" for count in (documents, tokens, size)), nats / tokens
        rows.append((name, *counts, f"{loss:.4f}", f"{np.exp(loss):,.2f}", f"{nats / math.log(2) / size:.4f}"))
    rows = [[cell.replace("nan", "-") for cell in row] for row in rows]
    return ["".join(f"{' ' * (11 - display_width(cell))} {cell}" for cell in row) for row in rows]


# ==== Loop and main ===================================================================


def propagate_nonfinite(loss: torch.Tensor) -> torch.Tensor:
    """Give a loss that isn't finite gradients that aren't either, of which every rank hears in DDP's reduction."""
    value = loss.detach()
    return loss * (value - value + 1)


def skips_spikes(run: Run) -> bool:
    return run.cfg.skip_spikes and run.accelerator.scaler is None  # which skips by itself


def find_spike(run: Run, loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
    """Whether a step stands out by 6 standard deviations, on the device (OLMo-core's skip-step optimizer)."""
    # Values and window are the same on all ranks.  Before the window is full it holds NaN, which nothing is above; what
    # isn't finite never enters it.  After three skips in a row the step is taken: the loss may really have changed.
    window, values = run.spike_window, torch.stack([loss, grad_norm])
    is_finite, most = torch.isfinite(values).all(), window[:2].mean(1) + 6 * window[:2].std(1)
    spike = is_finite & (values > most).any() & ~window[2, -3:].bool().all()
    column = torch.cat([values, (spike * skips_spikes(run)).float()[None]])
    window.copy_(torch.where(is_finite, torch.cat([window[:, 1:], column[:, None]], 1), window))
    return spike


def train_step(run: Run, batches: Iterator[torch.Tensor], learning_rate: float) -> torch.Tensor:
    """One optimizer step: accumulate, clip, step; the host never waits.  Returns four float32 on the device."""
    accelerator, micro_steps = run.accelerator, run.gradient_accumulation_steps
    total = torch.zeros((), device=accelerator.device)
    for micro_step in range(micro_steps):
        rows = next(batches).to(accelerator.device, non_blocking=True)
        with nullcontext() if micro_step == micro_steps - 1 else accelerator.no_sync(run.ddp_model):
            loss = propagate_nonfinite(run.ddp_model(rows)) / micro_steps
            accelerator.backward(loss)
        total += loss.detach()
        run.stop.heartbeat()
    grad_norm = accelerator.clip_grad_norm_(run.model.parameters(), run.cfg.max_grad_norm)
    asked = torch.full((), float(run.stop.requested), device=accelerator.device)
    shared = torch.stack([total, grad_norm.float(), asked])  # as one, so that ranks can't judge differently
    loss, grad_norm, asked = accelerator.reduce(shared, "mean")  # NCCL holds up the stream and not the host
    skipped, spike = ~torch.isfinite(grad_norm), find_spike(run, loss, grad_norm)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate
    if accelerator.scaler is None:  # which, under FP16, skips such a step; else the optimizer reads this on the device
        run.optimizer.optimizer.found_inf = (skipped | (spike & run.cfg.skip_spikes)).float()
    run.optimizer.step()
    # DDP's buckets are the gradients: cut off from them, the earlier micro-steps' would need memory of their own.
    run.optimizer.zero_grad(set_to_none=accelerator.num_processes == 1)
    # Loss, gradient norm, whether the step wasn't finite (1), is a spike (2) or neither (0), and the requests to stop.
    return torch.stack([loss, grad_norm, torch.where(skipped, 1.0, 2.0 * spike), asked])


def keep_to_hours(run: Run, step_seconds: float) -> None:
    """Have rank 0 ask all to stop while ``--max-hours`` has room for three steps, an evaluation and a save."""
    if run.cfg.max_hours is None or not run.is_main:
        return
    tokens = min(len(run.corpus.val), MOST_EVALUATION_TOKENS)
    evaluation = run.evaluation_seconds or 0.5 * step_seconds * tokens / run.step_tokens  # forward: a third of a step
    saves = 2.5 if run.saver.busy() else 1.5
    reserve = 3 * step_seconds + evaluation + run.sample_seconds + saves * run.save_seconds + 5
    oldest = psutil.Process(os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None)  # restarts don't begin anew
    if time.time() - oldest.create_time() > 3600 * run.cfg.max_hours - reserve:
        run.stop.requested = True


def train(run: Run, state: TrainState) -> str:
    cfg, accelerator, start = run.cfg, run.accelerator, state.step
    steps = range(start, run.total_steps)
    positions = rank_positions(run, accelerator.process_index, accelerator.num_processes, steps)
    batches = make_loader(cfg, run.corpus, positions)
    log, profile, stopping = StepLog(run, state), start_profile(run, len(steps)), False
    while state.step < run.total_steps and not stopping:
        begun, is_first = time.monotonic(), state.step == start
        torch.manual_seed(hash((cfg.seed, state.step, accelerator.process_index)))  # what dropout draws needs no saving
        with log_waiting("첫 스텝을 컴파일하는 중") if cfg.compile and is_first else nullcontext():
            stats = train_step(run, batches, learning_rate_at(run, state.step))
        state.step += 1
        state.tokens_seen += run.step_tokens
        state.elapsed_seconds = time.monotonic() - log.begun
        stopping = log.push(state.step, stats)
        report_save(run)
        if profile is not None:
            profile.step()
        if is_first:
            run.stop.arm(cfg.hang_timeout)  # evaluations and samples compile nothing
            if cfg.device == "cuda":
                # DDP makes its buckets anew in the second forward pass: NCCL's watchdog (0.1 s) lets go of the old.
                torch.cuda.synchronize()
                time.sleep(0.3)
        else:
            keep_to_hours(run, time.monotonic() - begun)
        if state.step == start + 3 and cfg.device == "cuda":  # from now on it takes no more
            peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), torch.cuda.mem_get_info()[0]
            figures = "최대 할당 {:.1f} GB, 예약 {:.1f} GB, 남음 {:.1f} GB".format(*(size / 1e9 for size in peaks))
            logger.info(f"   GPU 메모리: {figures}")
        last = state.step == run.total_steps
        intervals = (cfg.eval_steps, cfg.sample_steps, cfg.save_steps)
        evaluates, samples, saves = (last or state.step % interval == 0 for interval in intervals)
        if is_first or stopping or evaluates or samples or saves:
            stopping = log.pop() or stopping
            if evaluates and (last or not stopping):
                evaluate_and_log(run, state, log)
            if samples and (last or not stopping):
                generate_samples(run, state)
            if saves or stopping:
                save_checkpoint(run, state)
                if run.is_main and not last and not stopping:
                    draw_curves_beside(run)
            gc.collect()
            run.stop.heartbeat()
            log.restart_clock()
        elif state.step % 500 == 0:
            gc.collect()
    return "finished" if state.step >= run.total_steps else "stopped"


def claim_output(cfg: TrainConfig, world_size: int) -> Any:
    """Take the output directory, clear what a test left there and begin ``run_info.json``: rank 0, to keep the lock."""
    cfg.output_dir.mkdir(parents=True, exist_ok=True)
    # A killed rank's helpers hold it a little longer, and a launcher that looks for a moment.
    lock = lock_output(cfg.output_dir, "a+", patience=20)
    lock.truncate(0)
    lock.write(os.environ.get("H100_DUAL_RUN_ID", str(os.getpid())).partition("-")[0])
    lock.flush()
    if problems := results_problems(cfg, read_json(cfg.output_dir / "run_info.json")):
        raise EnvironmentProblem(problems)  # whatever the environment says of a launcher's plan
    for torn in (*cfg.output_dir.glob(".*.tmp"), *cfg.output_dir.glob("checkpoint-*/.*.tmp")):
        shutil.rmtree(torn, ignore_errors=True) if torn.is_dir() else torn.unlink(missing_ok=True)
    if cfg.resume is None:
        for path in (*list_checkpoints(cfg.output_dir), *cfg.output_dir.glob("initial_model")):
            remove_directory(path)
        for name in ("metrics.jsonl", "samples.md", "training_curves.png"):
            (cfg.output_dir / name).unlink(missing_ok=True)
    path = cfg.output_dir / "run_info.json"
    info, kept = read_json(path), ("step", "total_steps", "dataset") if cfg.resume else ()  # what still holds
    if is_restart(info):
        kept += ("restarts", "first_step", "failed_saves", "dataset", "self_test", "lists")
        info["restarts"] = count = info.get("restarts", 0) + 1
        most = f"{count}/{os.environ['TORCHELASTIC_MAX_RESTARTS']}번째"
        logger.info(f"⚠️  학습 프로세스가 죽어 자동으로 다시 시작했습니다 ({most})")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    command = ["env", f"CUDA_VISIBLE_DEVICES={visible}"] if visible else []
    command += os.environ.get("LAUNCHER_COMMAND", "").split("\x1e")[:-1] or [sys.executable, *sys.argv]
    info = {name: info[name] for name in kept if name in info}
    info |= {"state": "running", "mode": cfg.mode, "options": options_of(cfg), "world_size": world_size}
    info["command"] = f"cd {shlex.quote(os.getcwd())} && {shlex.join(command)}"  # it can be pasted anywhere
    info["machine"] = {"host": os.uname().nodename, "cpus": os.cpu_count(), "visible_devices": visible}
    # What isn't kept goes, a stop request too; never removed first, as a full disk may take no new one.
    write_json(path, info | {"started": timestamp(), "run_id": run_id(), **provenance()})
    return lock


def build_run(
    cfg: TrainConfig, corpus: Corpus, stop: StopFlag, accelerator: Accelerator, point: ResumePoint | None = None
) -> Run:
    length, ranks = cfg.max_seq_length, accelerator.num_processes
    point = point or ResumePoint(cfg.tokens_per_step(ranks))
    step_tokens, rows = point.step_tokens, point.step_tokens // (ranks * length)
    steps = total_steps(cfg, corpus.rows(length), step_tokens, point.info.get("step", 0))
    if steps == 0 or corpus.rows(length) == 0:
        problem = f"말뭉치({corpus.report['train_tokens']:,} 토큰)가 한 스텝({step_tokens:,} 토큰)보다 작습니다"
        raise RuntimeError(f"{problem}. --batch-size, --max-seq-length, --gradient-accumulation-steps 를 줄이세요")
    for name, domain in zip(cfg.mix_counts, corpus.domains, strict=False):
        if not domain.rows(length):
            raise RuntimeError(f"--mix: '{name}' 문서가 한 행({length:,} 토큰)보다 적습니다. 빼거나 더하세요")
    before = point.info if point.info.get("options", {}).get("warmup_ratio") == cfg.warmup_ratio else {}
    warmup = before.get("warmup_steps", math.ceil(cfg.warmup_ratio * before.get("total_steps", steps)))
    size = find_batch_size(cfg, rows, corpus.tokenizer, accelerator) if cfg.find_batch_size else cfg.batch_size
    loss_module = build_loss(cfg, corpus.tokenizer, accelerator.device)
    ddp, optimizer = accelerator.prepare(loss_module, build_optimizer(loss_module.model, cfg))
    backend = attention_backend(loss_module.model, cfg, size)
    shape = model_shape(cfg)  # the plan's, so that both say one rate; what it couldn't tell is counted
    count = shape.matrix_parameters() if shape else loss_module.model.num_parameters(exclude_embeddings=True)
    peak, text = peak_rate(cfg, count, steps * step_tokens, point.info)
    if cfg.learning_rate == "auto":
        logger.info(f"학습률: {text}")
    window = torch.full((3, SPIKE_WINDOW), torch.nan, device=accelerator.device)
    counts = size, rows // size, step_tokens, steps, warmup, peak, window
    # Of a run that goes on, as long as before; else 12 bytes a parameter at 200 MB/s, as on a slow disk.
    seconds = point.info.get("save_seconds") or 12 * loss_module.model.num_parameters() / 200e6
    return Run(cfg, accelerator, corpus, loss_module, ddp, optimizer, *counts, stop, backend, Saver(), seconds)


def run_training(cfg: TrainConfig, stop: StopFlag) -> NoReturn:
    """The whole run on one rank; never returns, as DDP, let go of, waits for gloo's threads with the GIL held."""
    rank, world_size = rank_and_world()
    lock = claim_output(cfg, world_size) if rank == 0 else None
    if cfg.self_test and cfg.device == "cuda" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        everything = self_test(cfg)
        if rank == 0:
            report_self_test(cfg, everything)
    corpus = prepare_corpus(cfg)
    # Armed only now: the others wait for the first one's tokenisation, however long it takes.
    minutes, detail_log = cfg.hang_timeout + (COMPILE_MINUTES if cfg.compile else 0), logging.getLogger().handlers[0]
    stop.arm(minutes, detail_log.stream)
    log_report(cfg, corpus)
    with attention_kernels(cfg.attention):
        accelerator, point, fingerprint = build_accelerator(cfg), None, corpus.report["fingerprint"]
        if accelerator.is_main_process:  # which may be the only one to see the checkpoints
            point = find_resume_point(cfg, world_size, fingerprint, thorough=True)
            for note in point.notes:  # the plan's once more: the log is kept, and a thorough look may find more
                logger.info(f"⚠️  {note}")
        point, first = broadcast_object_list([point, fingerprint])
        if first != fingerprint:
            raise RuntimeError("이 머신의 말뭉치가 랭크 0의 것과 다릅니다. 모든 머신에 같은 데이터를 두세요")
        run = build_run(cfg, corpus, stop, accelerator, point)
        state = load_checkpoint(run, point.checkpoint) if point.checkpoint else TrainState()
        stop.listen()
        if run.is_main:
            begin_at(run, state, point)
            if point.checkpoint is None and cfg.save_initial:
                save_initial_model(run)
        ended = train_quietly(run, state)
    faulthandler.cancel_dump_traceback_later()  # from here on nothing hangs: what is left takes as long as it takes
    with tracking(run):
        run.accelerator.end_training()  # all ranks together: only then may rank 0 write for as long as it takes
    if lock is not None:
        report_save(run, is_last=True)
        draw_curves_beside(run, wait=True)
        update_run_info(cfg.output_dir, state=ended, ended=timestamp(), step=state.step)
        again = "" if cfg.mode == "test" else " 이어서 하려면 처음 명령에 --resume 을 덧붙이세요"
        message = {"finished": "✅ 학습 완료!", "stopped": f"🛑 학습을 중단했습니다.{again}"}[ended]
        if point.info.get("step") == state.step:
            message = "✅ 이미 끝난 학습입니다. 더 하려면 --max-steps 를 늘리세요"
        logger.info(f"{message} (스텝 {state.step:,}, {format_duration(state.elapsed_seconds)})")
        lock.close()
    hard_exit(0)


def begin_at(run: Run, state: TrainState, point: ResumePoint) -> None:
    """Make the files agree with the step where the run begins, and say where that is; rank 0 only."""
    cfg, begun = run.cfg, {"total_steps": run.total_steps, "first_step": state.step}
    run.saver.failed = read_json(cfg.output_dir / "run_info.json").get("failed_saves", 0)
    for name in ("metrics.jsonl", "samples.md"):
        cut_file(cfg.output_dir / name, state.step)
    for path in list_checkpoints(cfg.output_dir, after=state.step):  # the run will write its own
        aside = path.rename(path.with_name(f"{path.name}.before-{time.strftime('%Y%m%d-%H%M%S')}"))
        logger.info(f"⚠️  스텝 {state.step:,} 뒤의 체크포인트를 옮겨 두었습니다: {display_path(aside)}")
    if corpus_name(cfg).startswith("hf:"):
        begun["dataset"] = {"asked": corpus_name(cfg), "pinned": run.corpus.report["dataset"]}
    if cfg.device == "cuda":
        begun["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    update_run_info(cfg.output_dir, skipped_steps=state.skipped_steps, lists=run.corpus.report["lists"], **begun)
    if point.checkpoint is not None:
        logger.info(f"🔁 이어서 학습: {display_path(point.checkpoint)} (스텝 {state.step:,}부터)")
        if (before := point.info["total_steps"]) != (now := run.total_steps):
            rate = learning_rate_at(run, min(state.step, now - 1))
            change = f"학습률: 마지막 스텝 {point.info['learning_rate']:.2e} → 다음 스텝 {rate:.2e}"
            logger.info(f"⚠️  전체 스텝: {before:,} → {now:,}. {change} (워밍업은 처음처럼 {run.warmup_steps:,}스텝)")


def train_quietly(run: Run, state: TrainState) -> str:
    """Say what the plan could only estimate, and ``train`` without Python's garbage collector."""
    start_trackers(run, state)
    length, tokens = run.cfg.max_seq_length, run.total_steps * run.step_tokens
    size, epochs = run.model.num_parameters() / 1e6, tokens / (run.corpus.rows(length) * length)
    logger.info(f"🚀 학습 시작!\n테스트 모드: {run.cfg.mode == 'test'}\n최대 스텝: {run.total_steps:,}")
    logger.info(f"파라미터 {size:,.1f}M, {tokens:,} 토큰 ({epochs:.2f} 에포크), 어텐션 {run.backend}")
    for (name, count), domain in zip(run.cfg.mix_counts.items(), run.corpus.domains, strict=False):
        epochs = count / MIX_WINDOW * tokens / (domain.rows(length) * length)
        logger.info(f"   • {name}: 비율 {count / MIX_WINDOW:.1%}, {epochs:.2f} 에포크")
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection in the middle of a step costs up to half a second; the loop does it
    try:
        return train(run, state)
    except Exception:
        while run.saver.busy(1.0):  # a save that has begun isn't lost, unless torchrun's 30 s for the others are over
            run.stop.heartbeat()
        raise


def use_checkpoint(cfg: TrainConfig) -> None:
    """Do what --generate or --evaluate asks for: the result goes to the output, everything else beside it."""
    logging.getLogger().addHandler(logging.NullHandler())
    logging.getLogger("torch").setLevel(logging.ERROR)  # it has a handler of its own
    logger.setLevel(logging.INFO)
    logger.addHandler(logging.StreamHandler())
    quiet_libraries()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(cfg.precision, torch.float32)
    source, device = cfg.generate or cfg.evaluate, cfg.device
    tokenizer = load_tokenizer(source)
    model = load_model(source, dtype if cfg.generate else torch.float32).to(device).eval()
    if cfg.generate:
        generate_text(model, tokenizer, cfg, TextStreamer(tokenizer, skip_special_tokens=True))
        return
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        totals = score_corpus(model, tokenizer, cfg)
    settings = f"구간 {cfg.max_seq_length or context_length(model):,} 토큰, {device.upper()} {cfg.precision}"
    print(f"📈 평가: {display_path(source)} ({', '.join(map(display_path, cfg.dataset_path))}, {settings})")
    print("\n".join(evaluation_table(totals)))


def report_failure(cfg: TrainConfig, error: Exception) -> None:
    """Tell the person, keep the traceback, set the run's state unless it restarts; of ranks that fail one speaks."""
    (text, known), rank = describe_error(error), rank_and_world()[0]
    logging.getLogger("traceback").error("run failed", exc_info=error)
    is_lost = isinstance(error, dist.DistError) or "gloo/transport" in str(error)
    is_victim = is_lost and not (known or re.search("nccl(System|UnhandledCuda|Internal|Invalid)", str(error)))
    begun = (info := read_json(cfg.output_dir / "run_info.json")).get("first_step", math.inf)
    known = known and not (is_out_of_memory(error) and list_checkpoints(cfg.output_dir, after=begun))  # it did fit
    if is_victim:  # the other's fault is the cause: it may be about to say why
        text = LOST_PEER
        time.sleep(1)
    most, used = (int(os.environ.get(f"TORCHELASTIC_{name}", "0")) for name in ("MAX_RESTARTS", "RESTART_COUNT"))
    again = not known and used < most
    if info.get("run_id") != run_id():  # before the directory was ours
        speaks = is_local_main()
    elif again:
        speaks = not is_victim
    else:
        try:
            speaks = update_run_info(cfg.output_dir, "running", state="failed", error=text, ended=timestamp())
        except OSError:  # a disk that takes nothing any more
            speaks = True
    if speaks:
        text += f"\n   자세한 내용: {display_path(cfg.logs_dir / f'training_detail_rank_{rank}.log')}"
        with suppress(OSError):  # a full disk
            print(f"{'⚠️ ' if again else '❌'} {text}", flush=True)


def main(cfg: TrainConfig, stop: StopFlag | None) -> int:
    gc.freeze()  # what was imported stays: no collection has to look at it
    gc.enable()
    try:
        if stop is None:
            use_checkpoint(cfg)
            return 0
        set_up_logging(cfg, rank_and_world()[0])
        if cfg.device == "cuda":
            require_cuda()
            # A cache for each attention, which a graph's key doesn't name; on no remote disk, whose locks don't hold.
            disks = [disk for disk in psutil.disk_partitions(all=True) if cfg.cache_dir.is_relative_to(disk.mountpoint)]
            _, kind = max(((len(disk.mountpoint), disk.fstype) for disk in disks), default=(0, ""))
            remote = kind.startswith(("nfs", "cifs", "smb", "lustre", "ceph", "beegfs", "gpfs", "fuse.sshfs"))
            folder = Path(f"/tmp/h100_dual_{os.getuid()}") if remote else cfg.cache_dir
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "compiled" / cfg.attention))
        run_training(cfg, stop)
    except Exception as error:
        report_failure(cfg, error) if stop else complain(error)
        return getattr(error, "exit_code", ENVIRONMENT_ERROR)


def hard_exit(code: int) -> NoReturn:
    """End with everything written; Python's own way would pull the interpreter from under gloo's threads: SIGABRT."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    hard_exit(main(config, stop_flag))
