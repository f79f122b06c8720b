#!/usr/bin/env python3
"""Pretrain a Korean/English decoder (0.1B to 3B parameters) on one or two H100s, or try it on a CPU.

``run_h100_dual.sh`` is the usual way in: it sets up the environment, starts this script under
torchrun in the background and watches it.  The script also runs by itself::

    # CPU, one process: a tiny model on generated text, ten steps
    python3 train_h100_dual.py --test --device cpu --dummy-data
    # one GPU
    torchrun --standalone --nproc-per-node 1 train_h100_dual.py --train --dataset-path corpus.jsonl
    # two GPUs
    torchrun --standalone --nproc-per-node 2 train_h100_dual.py --train --dataset-path corpus.jsonl

The file reads in the order in which a run happens: configuration, runtime, data, model and
optimizer, checkpoints, metrics, evaluation, loop, ``main``.
"""

from __future__ import annotations

import difflib
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NoReturn

# ======================================================================================
# Configuration: standard library only, so that --help and a mistyped option are answered
# within a second by any Python, before anything is installed.
# ======================================================================================

SCRIPT_DIR = Path(__file__).resolve().parent

# The one place where the least versions stand; requirements.txt pins what is installed.
MINIMUM_PYTHON = (3, 11)
if sys.version_info < MINIMUM_PYTHON:  # before anything below that an older one can't do
    sys.exit(f"❌ Python {MINIMUM_PYTHON[0]}.{MINIMUM_PYTHON[1]} 이상이 필요합니다 (지금 {sys.version.split()[0]})")
MINIMUM_VERSIONS = {
    "torch": "2.11",
    "transformers": "5.17",
    "datasets": "4.0",
    "accelerate": "1.10",
    "numpy": "2.0",
    "tiktoken": "0.9",
}

USAGE_ERROR, ENVIRONMENT_ERROR, STOPPED = 2, 1, 130

# Two figures for the estimates before a corpus is tokenised (shown as 추정): measured on the
# Korean reviews and English speeches of the shared corpus at 64k and rounded down.
BYTES_PER_TOKEN_ESTIMATE = 5.0
COMPRESSION_ESTIMATE = 2.5

CACHE_VERSION = 3  # of the token cache's format and of how texts are read and split
DATA_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt")
PREFERRED_DATA_FILE = "mixed_pretraining.jsonl"
MIX_WINDOW = 1000  # rows in which --mix keeps its proportions exactly

GROUPS = {
    "run": "실행 모드",
    "data": "데이터",
    "output": "출력",
    "model": "모델",
    "optimisation": "학습 하이퍼파라미터",
    "hopper": "H100 최적화",
    "saving": "저장과 평가",
    "control": "실행 제어",
}


@dataclass(frozen=True)
class Preset:
    """Shape of a decoder with SwiGLU, RMSNorm, rotary positions and tied embeddings."""

    layers: int
    hidden: int
    mlp: int
    head: int

    def parameter_count(self, vocab_size: int) -> int:
        """Number of parameters, with embeddings shared between input and output."""
        layer = 4 * self.hidden * self.hidden + 3 * self.hidden * self.mlp + 2 * self.hidden
        return vocab_size * self.hidden + self.layers * layer + self.hidden


PRESETS = {
    "tiny": Preset(4, 256, 768, 64),
    "125m": Preset(12, 768, 2048, 64),
    "350m": Preset(24, 1024, 2816, 64),
    "760m": Preset(24, 1536, 4096, 128),
    "1.3b": Preset(24, 2048, 5504, 128),
    "3b": Preset(28, 3072, 8192, 128),
}


def parse_number(convert: type, low: float, high: float = math.inf) -> Callable[[str], Any]:
    """Return a parser for a number in ``[low, high]``; it raises ValueError with the nearest valid one."""

    def parse(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            kind, example = ("정수", "예: 8") if convert is int else ("숫자", "예: 1e-4")
            raise ValueError(f"'{text}' 값은 {kind}가 아닙니다 ({example})") from None
        if not low <= value <= high:  # also catches nan
            limits = f"{low:g} 이상" if high == math.inf else f"{low:g} 이상 {high:g} 이하"
            nearest = high if value > high else low
            raise ValueError(f"'{text}' 값은 범위를 벗어났습니다 ({limits}). 가장 가까운 값: {nearest:g}")
        return value

    return parse


def parse_choice(*choices: str) -> Callable[[str], str]:
    """Return a parser for one of ``choices``; it raises ValueError with the most similar one."""

    def parse(text: str) -> str:
        if text not in choices:
            nearest = (difflib.get_close_matches(text, choices, 1, 0.0) or [choices[0]])[0]
            raise ValueError(f"'{text}' 값은 쓸 수 없습니다 ({' | '.join(choices)}). 가장 가까운 값: {nearest}")
        return text

    return parse


def parse_text(text: str) -> str:
    """Return ``text`` as it is; an empty one is an error."""
    if not text:
        raise ValueError("빈 값은 쓸 수 없습니다")
    return text


def parse_path(text: str) -> Path:
    """Return a typed path, which is relative to the caller; a data set of the hub stays as it is."""
    return Path(text) if parse_text(text).startswith("hf:") else Path(os.path.abspath(Path(text).expanduser()))


def parse_mix(text: str) -> str:
    """Return shares by name, as ``ko=0.7,en=0.3``, in thousandths that sum up to one, sorted by name."""
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = (word.strip() for word in part.rpartition("="))
        if not name or name in shares:
            raise ValueError(f"'{part}' 부분을 읽을 수 없습니다. 이름=비율을 이름마다 한 번 쓰세요 (예: ko=0.7,en=0.3)")
        shares[name] = parse_number(float, 0, 1e6)(number)
    whole = sum(shares.values()) or 1.0
    exact = {name: MIX_WINDOW * share / whole for name, share in sorted(shares.items())}
    least = min(exact, key=exact.__getitem__)
    if exact[least] < 1 - 1e-9:
        raise ValueError(f"'{least}' 비율이 너무 작습니다 (합계의 {1 / MIX_WINDOW:g} 이상). 빼거나 늘리세요")
    counts = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: MIX_WINDOW - sum(counts.values())]:
        counts[name] += 1
    return ",".join(f"{name}={count / MIX_WINDOW:g}" for name, count in counts.items())


SITUATIONS = ("base", "test", "cpu", "cpu_test")


def option(group: str, metavar: str, parse: Callable[[str], Any], help_text: str, **more: Any) -> Any:
    """Declare one option: its group in ``--help``, its value's name and parser, what it does.

    ``default`` is its default.  One that depends on the situation is given by ``base``, ``test``,
    ``cpu`` and ``cpu_test`` instead, the last that applies counting; the field is then None until
    ``resolve_config``, unless the person sets it.  ``empty`` is the value of an option typed bare.
    """
    adapt = {name: more.pop(name) for name in SITUATIONS if name in more}
    details = {"group": group, "metavar": metavar, "parse": parse, "help": help_text, "adapt": adapt}
    return field(default=more.pop("default", None), metadata={**details, **more})


def switch(group: str, flags: dict[str, tuple[Any, str]], **more: Any) -> Any:
    """Declare options without a value: ``flags`` maps each to what it stands for and its help text."""
    return option(group, "", parse_text, "", flags=flags, **more)


positive = parse_number(int, 1)
share = parse_number(float, 0, 1)
DEVICES = ("auto", "cuda", "cpu")
SCHEDULES = ("cosine", "wsd", "linear", "constant")
ATTENTION = ("auto", "cudnn", "flash", "flash3", "efficient", "math")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Every option of a run and its default; None means that the person did not set it."""

    # fmt: off  (one option a line or two: this is the table that people look things up in)
    # run
    mode: str = switch(
        "run",
        {
            "--test": ("test", "테스트 모드: 짧게 돌려 전체 과정을 확인 (기본)"),
            "--train": ("train", "실제 학습 모드: 전체 에포크"),
        },
        default="test",
    )
    max_steps: int | None = option("run", "N", positive, "최대 스텝", test=10, base=None)
    max_epochs: int = option("run", "N", positive, "최대 에포크 (--max-steps가 없을 때)", default=1)
    max_tokens: int | None = option("run", "N", positive, "최대 학습 토큰 수")
    max_hours: float | None = option(
        "run", "H", parse_number(float, 0.01), "최대 시간 (데이터 준비부터 마지막 저장까지)"
    )
    resume: str | None = option(
        "run", "[auto|PATH]", parse_text, "이어서 학습 (값이 없으면 최신 체크포인트)", empty="auto"
    )
    device: str = option("run", "|".join(DEVICES), parse_choice(*DEVICES), "연산 장치", default="auto")
    seed: int = option("run", "N", parse_number(int, 0, 2**31 - 1), "난수 시드", default=42)
    logging_steps: int | None = option("run", "N", positive, "로그 간격 (스텝)", base=10, test=1)
    # data
    dataset_path: Path = option(
        "data",
        "PATH",
        parse_path,
        "데이터셋: 디렉토리, 파일, 또는 hf:ORG/NAME[@REVISION][:CONFIG[:SPLIT]]",
        default=Path("../../../../datasets"),
    )
    tokenizer: str | None = option("data", "PATH|ID", parse_text, "사용할 토크나이저 (없으면 말뭉치로 학습)")
    vocab_size: int | None = option(
        "data", "N", parse_number(int, 384, 1_048_576), "학습할 토크나이저의 어휘 크기", base=65536, cpu_test=2048
    )
    text_column: str = option("data", "NAME", parse_text, "본문이 든 열의 이름", default="text")
    validation_split: float = option(
        "data", "F", parse_number(float, 0, 0.5), "검증용으로 떼어 둘 문서의 비율", default=0.005
    )
    mix: str | None = option("data", "ko=F,en=F", parse_mix, "lang(또는 source)별 학습 비율, 예: ko=0.7,en=0.3")
    dummy_data: bool = switch("data", {"--dummy-data": (True, "더미 한국어/영어 데이터로 실행")}, default=False)
    cache_dir: Path | None = option("data", "PATH", parse_path, "토큰 캐시 위치 (기본: ~/.cache/h100_dual)")
    num_workers: int | None = option(
        "data", "N", parse_number(int, 0, 64), "프로세스당 데이터 로더 작업자 수", base=2, cpu=0
    )
    # output
    output_dir: Path = option("output", "PATH", parse_path, "출력 디렉토리", default=Path("./outputs"))
    logs_dir: Path = option("output", "PATH", parse_path, "로그 디렉토리", default=Path("./logs"))
    # model
    model_size: str | None = option(
        "model", "|".join(PRESETS), parse_choice(*PRESETS), "모델 크기", base="1.3b", cpu_test="tiny"
    )
    model_config: Path | None = option("model", "PATH", parse_path, "Hugging Face config.json (또는 그 디렉토리)")
    init_from: str | None = option("model", "PATH|ID", parse_text, "기존 가중치에서 이어서 사전학습")
    # optimisation
    batch_size: int = option("optimisation", "N", positive, "GPU당 배치 크기", default=4)
    learning_rate: float = option("optimisation", "LR", parse_number(float, 1e-9, 1), "학습률", default=1e-4)
    max_seq_length: int | None = option(
        "optimisation", "N", parse_number(int, 8, 131072), "최대 시퀀스 길이", base=2048, cpu_test=256
    )
    gradient_accumulation_steps: int | None = option("optimisation", "N", positive, "기울기 누적 횟수", base=8, test=1)
    lr_schedule: str = option(
        "optimisation", "|".join(SCHEDULES), parse_choice(*SCHEDULES), "학습률 스케줄", default="cosine"
    )
    warmup_ratio: float = option("optimisation", "F", share, "워밍업 비율", default=0.05)
    weight_decay: float = option("optimisation", "F", parse_number(float, 0, 10), "가중치 감쇠 (행렬에만)", default=0.1)
    max_grad_norm: float = option(
        "optimisation", "F", parse_number(float, 1e-6), "기울기 클리핑 최대 노름", default=1.0
    )
    # hopper
    precision: str | None = switch(
        "hopper",
        {
            "--bf16": ("bf16", "BF16 mixed precision (GPU 기본)"),
            "--fp16": ("fp16", "FP16 mixed precision (GPU 전용)"),
            "--fp32": ("fp32", "FP32 precision (CPU 기본)"),
        },
        base="bf16",
        cpu="fp32",
    )
    compile: bool | None = switch(
        "hopper",
        {
            "--no-compile": (False, "torch.compile 비활성화 (CPU 기본)"),
            "--compile": (True, "torch.compile 사용 (GPU 기본)"),
        },
        base=True,
        cpu=False,
    )
    attention: str = option("hopper", "|".join(ATTENTION), parse_choice(*ATTENTION), "어텐션 커널", default="auto")
    gradient_checkpointing: bool = switch(
        "hopper", {"--gradient-checkpointing": (True, "활성값을 다시 계산해 메모리 절약")}, default=False
    )
    # saving and evaluating
    save_steps: int = option("saving", "N", positive, "모델 저장 간격 (스텝)", default=500)
    save_initial: bool = switch("saving", {"--no-save-initial": (False, "초기 모델 저장 비활성화")}, default=True)
    save_total_limit: int | None = option("saving", "N", positive, "남겨 둘 체크포인트 수 (기본: 전부)")
    eval_steps: int = option("saving", "N", positive, "평가 간격 (스텝)", default=500)
    # control
    verbose: bool = switch("control", {"--verbose": (True, "상세 로그 출력")}, default=False)
    # fmt: on

    @property
    def is_test(self) -> bool:
        """Whether this is a short check rather than a training run."""
        return self.mode == "test"

    @property
    def mix_counts(self) -> dict[str, int]:
        """Rows of each stream among every ``MIX_WINDOW`` rows; empty without ``--mix``."""
        pairs = (part.rpartition("=") for part in (self.mix or "").split(",") if part)
        return {name: round(float(share) * MIX_WINDOW) for name, _, share in pairs}

    def tokens_per_step(self, world_size: int) -> int:
        """Tokens that one optimizer step reads over all ranks."""
        rows = self.batch_size * self.gradient_accumulation_steps * world_size
        return rows * self.max_seq_length


class UsageProblem(ValueError):
    """Options that can't be used; ``problems`` holds one Korean sentence each.  Exit code 2."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(problems))
        self.problems = problems


def option_names() -> dict[str, Any]:
    """Map each option as it is typed to its field."""
    names = {}
    for item in fields(TrainConfig):
        for name in item.metadata.get("flags", {"--" + item.name.replace("_", "-"): None}):
            names[name] = item
    return names


def nearest_option(name: str, more: list[str]) -> str:
    """Return a sentence that names the option most like ``name``, or the way to see them all."""
    close = difflib.get_close_matches(name, [*option_names(), *more], 1, 0.5)
    return f"가장 가까운 옵션: {close[0]}" if close else "전체 옵션: --help"


def parse_args(argv: list[str]) -> TrainConfig:
    """Read the command line.

    Raises:
        UsageProblem: an option is unknown, lacks its value, or its value can't be used; all the
            problems are collected, so that they can be mended in one go.
    """
    names, values, problems = option_names(), {}, []
    launcher_options = os.environ.get("LAUNCHER_OPTIONS", "").split()
    rest = list(argv)
    while rest:
        name, equals, text = rest.pop(0).partition("=")
        item = names.get(name)
        if item is None:
            kind = "옵션" if name.startswith("-") else "인자"
            problems.append(f"알 수 없는 {kind}: {name} ({nearest_option(name, launcher_options)})")
            if rest and not rest[0].startswith("--"):
                rest.pop(0)  # most likely its value: one mistake, one line
            continue
        if "flags" in item.metadata:
            if equals:
                problems.append(f"{name}: 값을 받지 않는 옵션입니다. {name} 만 쓰세요")
            values[item.name] = item.metadata["flags"][name][0]
            continue
        if not equals:
            if rest and not rest[0].startswith("--"):
                text = rest.pop(0)
            elif "empty" in item.metadata:
                text = item.metadata["empty"]
            else:
                problems.append(f"{name}: 값이 없습니다. 예: {name} {example_value(item)}")
                continue
        try:
            values[item.name] = item.metadata["parse"](text)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise UsageProblem(problems)
    return with_default_paths(TrainConfig(**values), values)


def example_value(item: Any) -> str:
    """A value that could be typed for an option: its default, or its metavar."""
    value = item.default if item.default is not None else item.metadata["adapt"].get("base")
    return item.metadata["metavar"] if value is None else format_value(value)


def with_default_paths(cfg: TrainConfig, typed: dict[str, Any]) -> TrainConfig:
    """Make the paths that were not typed absolute: they are relative to the script, not the caller."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "h100_dual"
    paths = {
        item.name: Path(os.path.abspath(SCRIPT_DIR / (item.default or cache)))
        for item in fields(TrainConfig)
        if item.metadata["parse"] is parse_path and item.name not in typed and item.name != "model_config"
    }
    return replace(cfg, **paths)


ADAPTED_NAMES = {
    "model_size": "모델 {}",
    "vocab_size": "어휘 {:,}",
    "max_seq_length": "길이 {} 토큰",
    "precision": "{}",
    "compile": "torch.compile 없음",
}


def resolve_config(cfg: TrainConfig, device: str) -> tuple[TrainConfig, list[str]]:
    """Fill in what the person left open, for ``device`` ("cuda" or "cpu").

    Returns the complete configuration and one Korean line for what was adapted to the CPU.
    """
    situations = ["base"]
    situations += ["test"] if cfg.is_test else []
    situations += ["cpu"] if device == "cpu" else []
    situations += ["cpu_test"] if device == "cpu" and cfg.is_test else []
    chosen, adapted = {"device": device}, []
    for item in fields(TrainConfig):
        adapt = item.metadata["adapt"]
        if not adapt or getattr(cfg, item.name) is not None:
            continue
        situation = next(name for name in reversed(situations) if name in adapt)
        chosen[item.name] = adapt[situation]
        if situation.startswith("cpu") and item.name in ADAPTED_NAMES:
            adapted.append(item.name)
    if cfg.model_config or cfg.init_from:
        adapted = [name for name in adapted if name != "model_size"]
    if cfg.tokenizer or cfg.init_from:
        adapted = [name for name in adapted if name != "vocab_size"]
    words = ", ".join(text.format(chosen[name]) for name, text in ADAPTED_NAMES.items() if name in adapted)
    notes = [f"CPU에 맞춰 바꾼 설정: {words}"] if words else []
    return replace(cfg, **chosen), notes


def validate_config(cfg: TrainConfig) -> list[str]:
    """Return one Korean sentence for each combination of options that can't be meant."""
    problems = []

    def refuse(condition: Any, text: str) -> None:
        if condition:
            problems.append(text)

    refuse(
        cfg.resume and cfg.is_test,
        "--resume: 테스트 모드에서는 이어서 학습하지 않습니다. --train --resume 을 쓰세요",
    )
    refuse(
        cfg.model_config and cfg.init_from,
        "--model-config 와 --init-from 은 함께 쓸 수 없습니다. 하나만 쓰세요",
    )
    nearest = round((cfg.vocab_size or 0) / 128) * 128
    refuse(
        cfg.vocab_size != nearest, f"--vocab-size {cfg.vocab_size}: 128의 배수여야 합니다. 가장 가까운 값: {nearest}"
    )
    refuse(
        cfg.dummy_data and cfg.dataset_path != default_dataset_path(),
        "--dummy-data 와 --dataset-path 는 함께 쓸 수 없습니다. 하나만 쓰세요",
    )
    return problems


def cpu_problems(cfg: TrainConfig) -> list[str]:
    """Return one Korean sentence for each option that a CPU can't do; accelerate would silently run fp32."""
    problems = []
    if cfg.device == "cpu" and cfg.precision == "fp16":
        problems.append("--fp16: CPU에서는 쓸 수 없습니다. --fp32 또는 --bf16 을 쓰세요")
    if cfg.device == "cpu" and cfg.attention not in ("auto", "flash", "math"):
        problems.append(f"--attention {cfg.attention}: CPU에서는 쓸 수 없습니다. --attention auto 를 쓰세요")
    return problems


def default_dataset_path() -> Path:
    """Where the documents' preprocessing step leaves its result."""
    return with_default_paths(TrainConfig(), {}).dataset_path


def format_value(value: Any) -> str:
    """Write a value as a person would type it: 1e-4 rather than 0.0001, ./outputs rather than outputs."""
    if isinstance(value, Path) and not value.is_absolute() and value.parts[0] != "..":
        return f"./{value}"
    if isinstance(value, float) and 0 < value < 1e-3:
        mantissa, exponent = f"{value:.6e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def display_width(text: str) -> int:
    """Columns that ``text`` takes on a terminal: Hangul and other wide characters take two."""
    import unicodedata

    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def help_text() -> str:
    """The options of the script by group, with defaults; the launcher adds its own."""
    lines = []
    for group, title in GROUPS.items():
        lines += ["", f"{title}:"]
        for item in (item for item in fields(TrainConfig) if item.metadata["group"] == group):
            for name, (_, text) in item.metadata.get("flags", {}).items():
                lines.append(help_line(name, text))
            if "flags" not in item.metadata:
                name = "--" + item.name.replace("_", "-")
                lines.append(help_line(f"{name} {item.metadata['metavar']}", item.metadata["help"], item))
    lines += ["", "모델 크기별 파라미터 수 (어휘 65,536):"]
    for name, preset in PRESETS.items():
        shape = f"{preset.layers}층 x {preset.hidden}, MLP {preset.mlp}, 헤드 {preset.head}"
        lines.append(f"  {name:<6}{preset.parameter_count(65536) / 1e6:>8,.1f}M  ({shape})")
    return "\n".join(lines[1:])


def help_line(left: str, text: str, item: Any = None) -> str:
    """One option of ``--help``: its name, what it does, its default."""
    if item is not None:
        default = item.default if item.default is not None else item.metadata["adapt"].get("base")
        shown = [] if default is None else [f"기본: {format_value(default)}"]
        names = {"test": "테스트", "cpu": "CPU", "cpu_test": "CPU 테스트"}
        adapt = item.metadata["adapt"]
        shown += [f"{names[key]}: {format_value(adapt[key])}" for key in names if key in adapt]
        text += f" ({', '.join(shown)})" if shown else ""
    gap = 34 - display_width("  " + left)
    return f"  {left}{' ' * gap}{text}" if gap > 0 else f"  {left}\n{' ' * 34}{text}"


# --- the plan of a run: what can be told, and refused, before anything heavy is imported ---


class EnvironmentProblem(RuntimeError):
    """Something that this machine or its files lack; one Korean sentence each.  Exit code 1."""

    def __init__(self, problems: list[str] | str):
        self.problems = [problems] if isinstance(problems, str) else problems
        super().__init__("\n".join(self.problems))


@dataclass(frozen=True)
class Gpu:
    """One visible GPU as nvidia-smi reports it; memory in MiB."""

    name: str
    total: int
    used: int


def query_gpus() -> list[Gpu]:
    """Ask nvidia-smi for the GPUs that CUDA_VISIBLE_DEVICES leaves visible, in its order."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total,memory.used", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise EnvironmentProblem(
            f"nvidia-smi가 GPU를 보고하지 못했습니다 ({error}). 드라이버를 확인하세요: nvidia-smi"
        ) from error
    found = {}
    for line in answer.strip().splitlines():
        index, uuid, name, total, used = (part.strip() for part in line.split(","))
        gpu = Gpu(name, *(int(value) if value.isdigit() else 0 for value in (total, used)))
        found[index] = found[uuid] = gpu
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [gpu for key, gpu in found.items() if key.isdigit()]
    wanted = [key.strip() for key in visible.split(",") if key.strip()]
    # An index is exact; a UUID may be cut short, as CUDA allows.
    return [
        gpu
        for key in wanted
        for name, gpu in found.items()
        if name == key or (key.startswith("GPU-") and name.startswith(key))
    ]


def list_data_files(path: Path) -> list[Path]:
    """The data files that ``path`` stands for, in a stable order.

    Raises:
        FileNotFoundError: nothing is there, the directory holds no data file, or a file is empty.
    """
    if path.is_dir():
        preferred = path / PREFERRED_DATA_FILE
        found = [item for item in path.iterdir() if item.name.endswith(DATA_SUFFIXES) and item.is_file()]
        files = [preferred] if preferred.is_file() else sorted(found)
        if not files:
            kinds = ", ".join(f"*{suffix}" for suffix in DATA_SUFFIXES)
            raise FileNotFoundError(f"데이터 디렉토리에 데이터 파일이 없습니다: {path} (찾은 종류: {kinds})")
    elif path.is_file():
        files = [path]
        if not path.name.endswith(DATA_SUFFIXES):
            raise FileNotFoundError(f"읽을 수 없는 종류의 데이터 파일입니다: {path} (가능: {', '.join(DATA_SUFFIXES)})")
    else:
        raise FileNotFoundError(
            f"데이터셋이 없습니다: {path} (있는 경로를 --dataset-path 로 주거나 --dummy-data 를 쓰세요)"
        )
    if not any(item.stat().st_size for item in files):
        raise FileNotFoundError(f"데이터 파일이 비어 있습니다: {files[0]}")
    return files


def uses_dummy_data(cfg: TrainConfig) -> bool:
    """Whether generated text stands in for a corpus: asked for, or a test without any at the default path."""
    return cfg.dummy_data or (
        cfg.is_test and cfg.dataset_path == default_dataset_path() and not cfg.dataset_path.exists()
    )


def checkpoint_dir(path: str | Path) -> Path:
    """A checkpoint may be named by its directory or by its weights file; return the directory."""
    path = Path(path)
    return path.parent if path.name == "pytorch_model.bin" else path


def checkpoint_step(path: Path) -> int:
    """Step of a directory called ``checkpoint-N``; -1 for any other name."""
    match = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(match[1]) if match else -1


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if checkpoint_step(path) >= 0]
    return sorted(found, key=checkpoint_step)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; a missing or torn file is an empty one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def known_numbers(value: Any) -> Any:
    """Replace what JSON has no word for, NaN and infinities, by null."""
    if isinstance(value, dict):
        return {name: known_numbers(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object so that a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    text = json.dumps(known_numbers(content), ensure_ascii=False, indent=2, allow_nan=False)
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)


def find_latest_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint that holds a training state, or None."""
    whole = [path for path in list_checkpoints(output_dir) if has_training_state(path)]
    return whole[-1] if whole else None


def has_training_state(checkpoint: Path) -> bool:
    """Whether a run can go on from a checkpoint: older ones hold only the model."""
    return all((checkpoint / name).is_file() for name in ("training_info.json", "training_state/state.pt"))


def resume_checkpoint(cfg: TrainConfig) -> Path | None:
    """The checkpoint from which ``--resume`` goes on; None without ``--resume``.

    Raises:
        FileNotFoundError: there is none, or it holds no training state.
    """
    if cfg.resume is None:
        return None
    if cfg.resume == "auto":
        found = find_latest_checkpoint(cfg.output_dir)
        if found is None:
            raise FileNotFoundError(
                f"이어서 학습할 체크포인트가 없습니다: {cfg.output_dir} "
                "(--resume 없이 시작하거나 --output-dir 를 확인하세요)"
            )
        return found
    path = checkpoint_dir(os.path.abspath(Path(cfg.resume).expanduser()))
    if not has_training_state(path):
        raise FileNotFoundError(
            f"학습 상태가 없는 체크포인트입니다: {path} (training_state/ 가 있는 것을 주거나 --init-from 을 쓰세요)"
        )
    return path


def resume_problems(cfg: TrainConfig, world_size: int, info: dict[str, Any], fingerprint: str | None) -> list[str]:
    """What keeps a run from going on from a checkpoint with this ``training_info.json``, one sentence each.

    Other rows than those that an undisturbed run would read next are never read in silence.
    ``fingerprint`` is the corpus's, where it is known.
    """
    if info["mode"] == "test":
        return ["테스트 모드의 체크포인트에서는 이어서 학습하지 않습니다. --resume 없이 시작하세요"]
    problems = []
    fixed = ["seed", "max_seq_length", "validation_split", "mix", "model_config"]
    fixed += [] if cfg.model_config or cfg.init_from else ["model_size"]
    for name in fixed:
        value, typed = info["options"].get(name), "--" + name.replace("_", "-")
        if str(getattr(cfg, name)) != str(value):
            instead = f"{typed} 없이 실행하세요" if value is None else f"쓸 값: {typed} {format_value(value)}"
            problems.append(f"{typed}: 체크포인트와 다른 값으로는 이어서 학습할 수 없습니다 ({instead})")
    before, after = info["tokens_seen"] // max(1, info["step"]), cfg.tokens_per_step(world_size)
    if before != after and not problems:
        problems.append(
            f"스텝당 토큰이 체크포인트({before:,})와 다릅니다({after:,}). "
            "GPU 수 x --batch-size x --gradient-accumulation-steps 가 같아야 합니다"
        )
    if fingerprint not in (None, info["data_fingerprint"]):
        problems.append(
            "체크포인트와 데이터의 내용이 다릅니다. 같은 데이터와 토크나이저로 이어서 학습하거나, "
            "새 데이터로는 --init-from 을 쓰세요"
        )
    return problems


def check_output(cfg: TrainConfig) -> None:
    """Refuse to touch what an earlier training run left, and a directory that can't be written.

    Raises:
        EnvironmentProblem: with the options to type instead.
    """
    problems = []
    for path, name in ((cfg.output_dir, "--output-dir"), (cfg.logs_dir, "--logs-dir"), (cfg.cache_dir, "--cache-dir")):
        if not can_write(path):
            problems.append(f"쓸 수 없는 디렉토리입니다: {path} (다른 경로를 {name} 로 주세요)")
    if problems:
        raise EnvironmentProblem(problems)
    if run_is_alive(cfg.output_dir):
        raise EnvironmentProblem(
            f"이 출력 디렉토리에서 다른 학습이 실행 중입니다 (PID {lock_owner(cfg.output_dir)}): {cfg.output_dir} "
            "(다른 --output-dir 를 쓰거나 --stop 으로 멈추세요)"
        )
    earlier = list_checkpoints(cfg.output_dir) or (cfg.output_dir / "metrics.jsonl").exists()
    if earlier and cfg.resume is None and read_json(cfg.output_dir / "run_info.json").get("mode") != "test":
        raise EnvironmentProblem(
            f"이전 학습의 결과가 있습니다: {cfg.output_dir} "
            "(이어서 하려면 --train --resume, 새로 하려면 다른 --output-dir 를 쓰세요)"
        )


def can_write(folder: Path) -> bool:
    """Whether files can be made in ``folder``, or it itself: tried, as permission bits don't tell all."""
    if folder.exists():
        return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
    probe = next(path for path in (folder, *folder.parents) if path.parent.exists())
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError:
        return False
    return True


def lock_owner(output_dir: Path) -> str:
    """The PID that a person can stop, as the run that holds the lock wrote it there."""
    return (output_dir / ".lock").read_text().strip() or "?"


def run_is_alive(output_dir: Path) -> bool:
    """Whether a process holds the lock of ``output_dir``; looks without taking or making it."""
    try:
        with open(output_dir / ".lock", "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def plan_device(cfg: TrainConfig, gpus: list[Gpu], num_gpus: int) -> tuple[str, int, list[str]]:
    """Choose the device and the number of processes.

    A test adapts to what it finds and says so in the returned notes; a training run gets exactly
    what was asked for.

    Raises:
        EnvironmentProblem: the GPUs that were asked for are not there, or are in use.
    """
    if cfg.device == "cpu":
        return "cpu", num_gpus, []
    if not gpus:
        if cfg.device == "cuda" or not cfg.is_test:
            raise EnvironmentProblem("GPU를 찾을 수 없습니다. CPU로 학습하려면 --device cpu 를 쓰세요")
        return "cpu", num_gpus, [f"GPU가 없어 CPU 프로세스 {num_gpus}개(gloo)로 실행합니다"]
    notes, in_use = [], []
    if len(gpus) < num_gpus:
        if not cfg.is_test:
            raise EnvironmentProblem(
                f"GPU {num_gpus}개를 요청했지만 {len(gpus)}개만 있습니다. --num-gpus {len(gpus)} 로 실행하세요"
            )
        notes.append(f"GPU가 {len(gpus)}개뿐이라 {len(gpus)}개로 실행합니다 (요청: {num_gpus}개)")
        num_gpus = len(gpus)
    for index, gpu in enumerate(gpus[:num_gpus]):
        if gpu.used > 1024:  # a driver and a display take less
            text = f"GPU {index} ({gpu.name})의 메모리 {gpu.used:,} MiB를 다른 프로세스가 쓰고 있습니다"
            in_use.append(f"{text}. 비우거나 CUDA_VISIBLE_DEVICES 로 다른 GPU를 고르세요")
            notes.append(text)
    if in_use and not cfg.is_test:
        raise EnvironmentProblem(in_use)
    return "cuda", num_gpus, notes


def corpus_key(cfg: TrainConfig, files: list[Path]) -> str:
    """Identity of a prepared corpus: its files, how they are read, and the tokenizer.

    A file is known by path, size, mtime and a hash of its head and tail, so a changed one makes
    a new cache and a 100 GB one costs two reads.
    """
    parts: list[Any] = [CACHE_VERSION, cfg.text_column, cfg.validation_split, list(cfg.mix_counts)]
    parts += [] if files else [str(cfg.dataset_path)]
    for path in files:
        info = path.stat()
        with open(path, "rb") as stream:
            digest = hashlib.blake2b(stream.read(65536))
            stream.seek(max(0, info.st_size - 65536))
            digest.update(stream.read(65536))
        parts.append([str(path), info.st_size, info.st_mtime_ns, digest.hexdigest()])
    parts.append(tokenizer_key(cfg))
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=12).hexdigest()


def tokenizer_key(cfg: TrainConfig) -> str:
    """Identity of the tokenizer that the options stand for."""
    source = cfg.tokenizer or cfg.init_from
    if source is None:
        return f"trained:{cfg.vocab_size}"
    file = checkpoint_dir(Path(source).expanduser()) / "tokenizer.json"
    return hashlib.blake2b(file.read_bytes()).hexdigest() if file.is_file() else f"hub:{source}"


def total_steps(cfg: TrainConfig, rows: int, world_size: int) -> int:
    """Optimizer steps of the whole run over a corpus of ``rows`` rows.

    Whole epochs unless ``max_steps`` says otherwise; what is left of the last epoch and fills no
    global batch is not read.
    """
    tokens = cfg.tokens_per_step(world_size)
    steps = cfg.max_steps or cfg.max_epochs * rows * cfg.max_seq_length // tokens
    if cfg.max_tokens is not None:
        steps = min(steps, max(1, cfg.max_tokens // tokens))
    return steps


def estimate_tokens(cfg: TrainConfig, files: list[Path]) -> tuple[int | None, bool]:
    """Training tokens of the corpus and whether that is exact: from the cache, else from the bytes."""
    if uses_dummy_data(cfg) or not files:
        return None, False
    report = read_json(cfg.cache_dir / corpus_key(cfg, files) / "corpus.json")
    if report:
        return report["train_tokens"], True
    size = sum(
        item.stat().st_size * (COMPRESSION_ESTIMATE if item.suffix in (".gz", ".zst", ".parquet") else 1)
        for item in files
    )
    return int(size / BYTES_PER_TOKEN_ESTIMATE), False


def model_shape(cfg: TrainConfig) -> tuple[Preset, str] | None:
    """Shape and name of the model as far as it can be told without importing transformers."""
    if cfg.model_config is None and cfg.init_from is None:
        return PRESETS[cfg.model_size], cfg.model_size
    source = Path(cfg.model_config or cfg.init_from)
    values = read_json(
        source if source.is_file() and source.suffix == ".json" else checkpoint_dir(source) / "config.json"
    )
    needed = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    if not all(isinstance(values.get(name), int) for name in needed):
        return None
    layers, hidden, mlp, heads = (values[name] for name in needed)
    return Preset(layers, hidden, mlp, hidden // heads), str(source)


def estimate_memory(cfg: TrainConfig, shape: Preset) -> int:
    """Bytes that a rank needs at its peak.

    About 0.6 GB for the libraries themselves; fp32 weights, gradients and two Adam moments; under
    mixed precision a half copy of the weights; per token and layer what the backward pass keeps (two
    residuals in fp32, eight hidden and four MLP vectors); the logits in half, in fp32, their gradient.
    """
    half = 4 if cfg.precision == "fp32" else 2
    parameters = shape.parameter_count(cfg.vocab_size)
    state = parameters * (16 + (0 if half == 4 else 2))
    layer = 4 * 4 * shape.hidden + half * (8 * shape.hidden + 4 * shape.mlp)
    tokens = cfg.batch_size * cfg.max_seq_length
    activations = tokens * (
        layer + shape.layers * 4 * shape.hidden if cfg.gradient_checkpointing else layer * shape.layers
    )
    return 600_000_000 + state + activations + tokens * cfg.vocab_size * (half + 8)


def plan_problems(cfg: TrainConfig, world_size: int) -> list[str]:
    """What keeps a run from starting on this machine's files, one Korean sentence each."""
    problems = []

    def attempt(check: Callable[[], Any]) -> None:
        try:
            check()
        except EnvironmentProblem as error:
            problems.extend(error.problems)
        except FileNotFoundError as error:
            problems.append(str(error))
        except PermissionError as error:
            problems.append(f"읽을 권한이 없습니다: {error.filename}")

    attempt(lambda: check_output(cfg))
    attempt(lambda: corpus_files(cfg))
    attempt(lambda: problems.extend(planned_resume_problems(cfg, world_size)))
    if cfg.model_config and not cfg.model_config.exists():
        problems.append(f"모델 설정 파일이 없습니다: {cfg.model_config} (--model-config 의 경로를 확인하세요)")
    for name, source in (("--tokenizer", cfg.tokenizer), ("--init-from", cfg.init_from)):
        could_be_hub = source and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) and source[0] not in ".~"
        if source and not could_be_hub and not checkpoint_dir(Path(source).expanduser()).exists():
            problems.append(f"{name}: 경로가 없습니다: {source} (있는 디렉토리나 Hugging Face ID를 주세요)")
    return problems


def planned_resume_problems(cfg: TrainConfig, world_size: int) -> list[str]:
    """``resume_problems`` as far as they can be told before the corpus is opened; FileNotFoundError as there."""
    checkpoint = resume_checkpoint(cfg)
    if checkpoint is None:
        return []
    files = corpus_files(cfg)
    report = read_json(cfg.cache_dir / corpus_key(cfg, files) / "corpus.json") if files else {}
    return resume_problems(cfg, world_size, read_json(checkpoint / "training_info.json"), report.get("fingerprint"))


def check_disk_for_checkpoints(cfg: TrainConfig, steps: int | None) -> str | None:
    """A sentence if the checkpoints that the options plan can't fit beside the output; None if they can.

    A checkpoint holds the weights in fp32; the newest two, and one that is being written, also two
    Adam moments.
    """
    shape = model_shape(cfg)
    if shape is None or steps is None:
        return None
    count = min(-(-steps // cfg.save_steps), cfg.save_total_limit or steps) + 1 + cfg.save_initial
    needed = 4 * shape[0].parameter_count(cfg.vocab_size) * (count + 2 * min(count, 3))
    existing = next(parent for parent in (cfg.output_dir, *cfg.output_dir.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed <= free:
        return None
    return (
        f"디스크 공간이 부족합니다: 체크포인트에 {needed / 2**30:.1f} GiB가 필요하지만 {existing} 에는 "
        f"{free / 2**30:.1f} GiB만 남았습니다. --save-total-limit 2 를 쓰거나 --save-steps 를 늘리세요"
    )


def corpus_files(cfg: TrainConfig) -> list[Path]:
    """The files of the corpus; empty where dummy text or a hub data set stands in for them."""
    if uses_dummy_data(cfg) or str(cfg.dataset_path).startswith("hf:"):
        return []
    return list_data_files(cfg.dataset_path)


def plan(argv: list[str], num_gpus: int, background: bool) -> int:
    """Print, for the launcher, ``name=value`` lines, an empty line, and what a person sees before the start."""
    cfg = parse_args(argv)
    typed_device = cfg.device
    gpus = [] if cfg.device == "cpu" else query_gpus()
    lacking = []
    try:
        device, processes, notes = plan_device(cfg, gpus, num_gpus)
    except EnvironmentProblem as error:  # go on as if the GPUs were there, to tell what else is lacking
        device, processes, notes, lacking = "cuda", num_gpus, [], error.problems
    cfg, adapted = resolve_config(cfg, device)
    wrong, lacking = validate_config(cfg), lacking + cpu_problems(cfg)
    if wrong or (lacking and typed_device == "cpu"):
        raise UsageProblem(wrong + lacking)
    problems = lacking + plan_problems(cfg, processes)
    if problems:
        raise EnvironmentProblem(problems)
    files = corpus_files(cfg)
    tokens, exact = estimate_tokens(cfg, files)
    steps = None
    if cfg.max_steps or tokens is not None:
        steps = total_steps(cfg, (tokens or 0) // cfg.max_seq_length, processes)
    problem = check_disk_for_checkpoints(cfg, steps)
    if problem and not cfg.is_test:
        raise EnvironmentProblem(problem)
    notes += [problem] if problem else []
    values = {
        "device": device,
        "processes": processes,
        "threads": max(1, (os.cpu_count() or 1) // processes),
        "output_dir": cfg.output_dir,
        "logs_dir": cfg.logs_dir,
        "add_device": "" if typed_device == device else device,
        "gpus": len(gpus[:processes]),
    }
    print("\n".join(f"{name}={value}" for name, value in values.items()), end="\n\n")
    print("\n".join(check_lines(cfg, gpus[:processes], files, notes)), end="\n\n")
    print("\n".join(info_lines(cfg, processes, background, (steps, exact))))
    print("\n".join(f"⚠️  {note}" for note in adapted))
    return 0


def check_lines(cfg: TrainConfig, gpus: list[Gpu], files: list[Path], notes: list[str]) -> list[str]:
    """The lines of the environment check that follow PyTorch's."""
    lines = []
    if gpus:
        lines.append(f"✅ GPU 확인 완료: {len(gpus)}개 사용 가능")
        lines += [f"  GPU {index}: {gpu.name}" for index, gpu in enumerate(gpus)]
    lines += [f"⚠️  {note}" for note in notes]
    if uses_dummy_data(cfg):
        reason = "--dummy-data" if cfg.dummy_data else f"데이터셋 없음 ({cfg.dataset_path})"
        lines.append(f"⚠️  {reason}: 더미 한국어/영어 데이터를 만들어 씁니다")
    elif files:
        lines.append(f"✅ 데이터셋 확인 완료: {len(files)}개 파일")
    else:
        lines.append(f"✅ 데이터셋: 허브의 {cfg.dataset_path}")
    return [*lines, "✅ 모든 요구사항 충족"]


def info_lines(cfg: TrainConfig, world_size: int, background: bool, known: tuple[int | None, bool]) -> list[str]:
    """The block 학습 정보: what will run, with the figures that can be told beforehand.

    ``known`` holds the steps of the run and whether they come from a tokenised corpus.
    """
    steps, exact = known
    step_tokens = cfg.tokens_per_step(world_size)
    shape = model_shape(cfg)
    gib = estimate_memory(cfg, shape[0]) / 2**30 if shape else None
    length = "테스트 모드" if cfg.is_test else "실제 학습 모드"
    length += f" ({cfg.max_steps}스텝)" if cfg.max_steps else f" ({cfg.max_epochs}에포크)"
    run_mark = "" if exact or cfg.max_steps else " (추정)"
    whole = f"{steps:,} 스텝, {steps * step_tokens:,} 토큰{run_mark}" if steps else "데이터를 준비한 뒤 정해집니다"
    parameters = (
        f"{shape[0].parameter_count(cfg.vocab_size) / 1e6:,.1f}M ({shape[1]})" if shape else "모델을 읽은 뒤 정해집니다"
    )
    engine = cfg.precision.upper() + (" + torch.compile" if cfg.compile else "")
    lines = [
        "📋 학습 정보",
        "=================================",
        f"🎯 모드: {length}",
        "🔧 하이퍼파라미터:",
        f"   • 배치 크기: {cfg.batch_size}",
        f"   • 학습률: {format_value(cfg.learning_rate)}",
        f"   • 최대 시퀀스 길이: {cfg.max_seq_length}",
        f"   • Mixed Precision: {cfg.precision}",
        f"   • 모델 컴파일: {str(cfg.compile).lower()}",
        f"   • 기울기 누적: {cfg.gradient_accumulation_steps}",
        f"   • 모델 파라미터: {parameters}",
        f"   • 스텝당 토큰: {step_tokens:,}",
        f"   • 전체 학습: {whole}",
        "📁 경로:",
        f"   • 데이터셋: {'더미 데이터' if uses_dummy_data(cfg) else display_path(cfg.dataset_path)}",
        *([f"   • 데이터 혼합: {cfg.mix}"] if cfg.mix else []),
        f"   • 출력: {display_path(cfg.output_dir)}",
        f"   • 로그: {display_path(cfg.logs_dir)}",
        "💾 저장 설정:",
        f"   • 저장 간격: {cfg.save_steps} 스텝",
        f"   • 초기 모델 저장: {str(cfg.save_initial).lower()}",
        f"   • 백그라운드 실행: {str(background).lower()}",
        "🚀 H100 설정:" if cfg.device == "cuda" else "🚀 실행 설정 (CPU):",
        f"   • {'GPU' if cfg.device == 'cuda' else 'CPU 프로세스'} 수: {world_size}",
        f"   • 분산 학습: {'DDP' if world_size > 1 else '없음 (단일 프로세스)'}",
        f"   • 최적화: {engine}",
    ]
    if gib is not None:
        lines.append(f"   • 예상 메모리: {'GPU' if cfg.device == 'cuda' else '프로세스'}당 {gib:.1f} GiB (추정)")
    return lines


def display_path(path: Path) -> str:
    """A path as the person at the prompt can use it: relative where that is shorter."""
    relative = os.path.relpath(path)
    relative = relative if relative.startswith("..") else f"./{relative}"
    return str(path) if str(path).startswith("hf:") or len(relative) >= len(str(path)) else relative


def missing_packages() -> list[str]:
    """What MINIMUM_VERSIONS asks for and this Python lacks, as pip would name it."""
    missing = []
    for name, least in MINIMUM_VERSIONS.items():
        try:
            have = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(f"{name}>={least}")
            continue
        numbers = [tuple(int(part) for part in re.findall(r"\d+", text)[:2]) for text in (have, least)]
        if numbers[0] < numbers[1]:
            missing.append(f"{name}>={least} (지금 {have})")
    return missing


def check_torch(needs_cuda: bool) -> int:
    """Print PyTorch's line of the environment check; ask it for CUDA only where a GPU was seen."""
    version = importlib.metadata.version("torch")
    if not needs_cuda:
        print(f"✅ PyTorch 확인 완료 (PyTorch {version}, CUDA 사용 안 함)")
        return 0
    import torch

    if not torch.cuda.is_available():
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU 전용"
        raise EnvironmentProblem(
            f"nvidia-smi는 GPU를 보지만 PyTorch {version} ({build})는 쓰지 못합니다. "
            f"드라이버를 올리거나 드라이버에 맞는 PyTorch를 설치하세요: {sys.executable} -m pip install "
            f"torch=={version.partition('+')[0]}+cu126 --index-url https://download.pytorch.org/whl/cu126"
        )
    print(f"✅ PyTorch 및 CUDA 확인 완료 (PyTorch {version}, CUDA {torch.version.cuda})")
    return 0


def read_last_metrics(output_dir: Path) -> dict[str, Any]:
    """The newest logged step of a run, with the newest evaluation's values added."""
    merged: dict[str, Any] = {}
    try:
        lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return merged
    for line in lines[-2000:]:
        try:
            merged.update(json.loads(line))
        except ValueError:
            continue  # the line that is being written right now
    return merged


STATE_NAMES = {"running": "실행 중", "finished": "완료", "stopped": "중단됨", "failed": "실패"}


def print_status(output_dir: Path, alive: bool, as_json: bool) -> int:
    """Print how a run stands; ``alive`` says whether the launcher found its process."""
    info, metrics = read_json(output_dir / "run_info.json"), read_last_metrics(output_dir)
    state = info.get("state")
    if alive:
        state = "running"
    elif state == "running":
        state = "failed"
    latest = list_checkpoints(output_dir)
    status = {
        "state": state,
        "step": metrics.get("step"),
        "total_steps": info.get("total_steps"),
        **{name: metrics.get(name) for name in ("loss", "val_bits_per_byte", "tokens_per_second", "mfu", "memory_gb")},
        "last_checkpoint": str(latest[-1]) if latest else None,
        "error": info.get("error"),
    }
    if as_json:
        print(json.dumps(status, ensure_ascii=False))
        return 0
    print(f"📊 상태: {STATE_NAMES.get(state, '기록 없음')}")
    labels = {
        "step": "스텝",
        "loss": "손실",
        "val_bits_per_byte": "검증 bits/byte",
        "tokens_per_second": "토큰/s",
        "mfu": "MFU",
        "memory_gb": "메모리(GB)",
        "last_checkpoint": "마지막 체크포인트",
        "error": "오류",
    }
    for name, label in labels.items():
        if status[name] is not None:
            total = f" / {status['total_steps']:,}" if name == "step" and status["total_steps"] else ""
            number = f"{status[name]:,.4g}" if isinstance(status[name], float) else status[name]
            print(f"   • {label}: {number}{total}")
    return 0


def finalize_state(output_dir: Path, outcome: str, reason: str) -> int:
    """Set the state of a run whose workers could not; print the state."""
    info = read_json(output_dir / "run_info.json")
    if info.get("run_id") != os.environ.get("RUN_ID"):
        info = {}  # an earlier run's: this one ended before it wrote its own
    if info.get("state") == "running":
        info.update(state=outcome, ended=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
        if outcome == "failed":
            info["error"] = reason
        write_json(output_dir / "run_info.json", info)
    print(info.get("state", outcome))
    return 0


def standalone_main(argv: list[str]) -> int | None:
    """Answer what needs no package: ``--help``, wrong options, and the launcher's questions.

    Returns an exit code, or None when a run is to start.
    """
    try:
        if "--help" in argv or "-h" in argv:
            print(help_text())
            return 0
        if argv[:1] == ["internal:plan"]:
            return plan(argv[3:], int(argv[1]), argv[2] == "true")
        if argv[:1] == ["internal:packages"]:
            print("\n".join(missing_packages()))
            return 0
        if argv[:1] == ["internal:torch"]:
            return check_torch(argv[1] != "0")
        if argv[:1] == ["internal:paths"]:
            cfg = parse_args(argv[1:])
            print(f"output_dir={cfg.output_dir}\nlogs_dir={cfg.logs_dir}")
            return 0
        if argv[:1] == ["internal:status"]:
            return print_status(parse_args(argv[3:]).output_dir, argv[1] == "true", argv[2] == "true")
        if argv[:1] == ["internal:finalize"]:
            return finalize_state(Path(argv[1]), argv[2], argv[3])
        parse_args(argv)
    except (UsageProblem, EnvironmentProblem) as error:
        for problem in error.problems:
            print(f"❌ {problem}", file=sys.stderr)
        return USAGE_ERROR if isinstance(error, UsageProblem) else ENVIRONMENT_ERROR
    return None


if __name__ == "__main__":
    exit_code = standalone_main(sys.argv[1:])
    if exit_code is not None:
        sys.exit(exit_code)

import gc
import gzip
import itertools
import logging
import multiprocessing
import random
import signal
import threading
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, set_seed
from torch import nn

END_OF_TEXT = "<|endoftext|>"

# Letters of one word with the mark before it, up to three digits, punctuation with its line
# breaks, runs of space: Llama 3's pattern.  An eojeol stays one piece, numbers stay short, and
# llama.cpp knows it, so a tokenizer trained here goes into a GGUF file unchanged.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHUNK_BYTES = 4 << 20
SMALL_CORPUS_BYTES = 16 << 20
TOKENIZER_SAMPLE_CHARACTERS = 20 << 20
CHECK_SAMPLE_CHARACTERS = 1 << 20  # on which the fast engine is compared with the tokenizer
TOKENIZER_SAMPLE_WORDS = 550_000  # distinct ones: the trainer takes 1.2 KB for each
LONGEST_SAMPLE_TEXT = 64 << 10
LEAST_HELD_OUT_DOCUMENTS = 30
MOST_EVALUATION_TOKENS = 2_000_000
MOST_BAD_LINES = 0.01
MOST_USEFUL_EPOCHS = 4  # repeated more often, data adds little (Muennighoff et al., 2023)
MOST_BAD_LINES_KEPT = 100_000
MOST_NAMES_SHOWN = 20

logger = logging.getLogger("h100_dual")

# ======================================================================================
# Runtime: logs, signals, the accelerator
# ======================================================================================


class StopRequested(BaseException):
    """A signal asked to end before the first step; not an Exception, so that nothing swallows it."""


class StopFlag:
    """Turns SIGTERM and SIGINT into a flag that the loop reads between two steps.

    Until ``defer`` is called there is nothing worth saving, so a signal ends the run at once.
    Outside the launcher a second signal ends it at once too.
    """

    def __init__(self) -> None:
        self.requested = False
        self.deferred = False
        self.deadline = math.inf  # of --max-hours, on the monotonic clock
        # Under torchrun a new parent means that the agent died; a shell may well go away.
        self.parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle)

    def handle(self, number: int, frame: Any) -> None:
        """Signal handler: set the flag, or leave."""
        if not self.deferred:
            raise StopRequested
        if self.requested:
            os._exit(STOPPED)
        self.requested = True

    def defer(self) -> None:
        """From now on a signal only sets the flag."""
        self.deferred = True

    def is_set(self) -> bool:
        """Whether to stop after this step: a signal asked, time is up, or the agent that started us is gone."""
        return self.requested or time.monotonic() > self.deadline or self.parent not in (None, os.getppid())


def set_up_logging(cfg: TrainConfig, rank: int) -> None:
    """Three logs: the console (rank 0), each rank's own at INFO, each rank's detail at DEBUG."""
    cfg.logs_dir.mkdir(parents=True, exist_ok=True)
    dated = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    detail = logging.FileHandler(cfg.logs_dir / f"training_detail_rank_{rank}.log", encoding="utf-8")
    detail.setLevel(logging.DEBUG)
    own = logging.FileHandler(cfg.logs_dir / f"training_rank_{rank}.log", encoding="utf-8")
    own.setLevel(logging.INFO)
    for handler in (detail, own):
        handler.setFormatter(dated)
    root = logging.getLogger()
    root.handlers[:] = [detail]  # what libraries say goes to the detail log only
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    logger.setLevel(logging.DEBUG)
    logger.handlers[:] = [own]
    if rank == 0:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(encoding="utf-8", line_buffering=True)  # also under LC_ALL=C
        console = logging.StreamHandler(sys.stdout)
        console.setLevel(logging.DEBUG if cfg.verbose else logging.INFO)
        logger.addHandler(console)


def quiet_libraries() -> None:
    """Send transformers' and datasets' messages to the detail log and keep their bars off the console."""
    import transformers.utils.logging as transformers_logging

    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    transformers_logging.disable_progress_bar()


def rank_and_world() -> tuple[int, int]:
    """Rank and number of processes as torchrun announces them, before any process group exists."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def build_accelerator(cfg: TrainConfig) -> Accelerator:
    """Create the process group and the precision policy.

    Accumulation is the loop's own (``train_step`` scales the loss and calls ``no_sync``), so that
    the accelerator's counter can't disagree with the data position.
    """
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)
    group = InitProcessGroupKwargs(timeout=timedelta(minutes=30))
    precision = "no" if cfg.precision == "fp32" else cfg.precision
    accelerator = Accelerator(cpu=cfg.device == "cpu", mixed_precision=precision, kwargs_handlers=[ddp, group])
    set_seed(cfg.seed)
    if cfg.device == "cuda":
        torch.set_float32_matmul_precision("high")
    return accelerator


# ======================================================================================
# Data: files -> documents -> tokens -> one memory-mapped stream -> rows
# ======================================================================================


@dataclass(frozen=True)
class Chunk:
    """Some consecutive lines of a file, or some texts of a table; ``first_line`` counts from 1."""

    file: str
    first_line: int
    lines: list[bytes] | list[Any]


@dataclass
class Documents:
    """The documents of a chunk, in order: normalised texts, languages, sources, and what was bad."""

    texts: list[str]
    languages: list[str]
    sources: list[str | None]
    bad: list[dict[str, Any]]
    line_count: int


def open_data_file(path: Path) -> Any:
    """Open a plain or compressed data file for reading bytes."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        import pyarrow  # comes with datasets, and unlike zstandard's own reader tells a truncated file from a whole one

        return pyarrow.input_stream(str(path), compression="zstd")
    return open(path, "rb")


def read_blocks(path: Path) -> Iterator[bytes]:
    """Read a file in blocks of ``CHUNK_BYTES``, without a byte order mark; the last block is empty.

    Raises:
        RuntimeError: the compressed file is damaged.
    """
    with open_data_file(path) as stream:
        block = None
        while block != b"":
            first = block is None
            try:
                block = stream.read(CHUNK_BYTES)
            except Exception as error:  # gzip and zlib each raise their own
                if path.suffix not in (".gz", ".zst"):
                    raise
                raise RuntimeError(f"압축 파일이 손상되었습니다: {path} ({error}). 파일을 다시 받으세요") from error
            yield block.removeprefix(b"\xef\xbb\xbf") if first else block


def read_line_chunks(path: Path) -> Iterator[Chunk]:
    """Cut a file into chunks of whole lines, or a .txt file into chunks of whole paragraphs."""
    first_line, pending = 1, []
    for block in read_blocks(path):
        pending.append(block)
        if block and b"\n" not in block:
            continue  # joined once, so that a very long line costs no more than its length
        lines = b"".join(pending).split(b"\n")
        cut = len(lines) - 1 if block else len(lines)
        while block and path.suffix == ".txt" and cut and lines[cut - 1].strip():
            cut -= 1
        pending = [b"\n".join(lines[cut:])]
        if cut:
            yield Chunk(str(path), first_line, lines[:cut])
            first_line += cut


def read_table_chunks(path: Path, text_column: str) -> Iterator[Chunk]:
    """Read a parquet file in batches of rows; each row stands for a line.

    Raises:
        RuntimeError: the file is damaged or has no such column.
    """
    import pyarrow
    import pyarrow.parquet

    first_line = 1
    try:
        table = pyarrow.parquet.ParquetFile(path)
        names = [name for name in (text_column, "lang", "source") if name in table.schema_arrow.names]
        for batch in table.iter_batches(1024, columns=names):
            yield Chunk(str(path), first_line, batch.to_pylist())
            first_line += batch.num_rows
    except pyarrow.ArrowInvalid as error:
        raise RuntimeError(f"parquet 파일이 손상되었습니다: {path} ({error})") from error


def split_hub_name(name: str) -> tuple[str, str, str, str]:
    """Repository, revision, configuration and split of ``hf:ORG/NAME[@REVISION][:CONFIG[:SPLIT]]``."""
    repository, config, split = [*name.removeprefix("hf:").split(":"), "", ""][:3]
    repository, _, revision = repository.partition("@")
    return repository, revision, config, split or "train"


def pin_hub_revision(name: str) -> str:
    """Name of a data set of the hub with the revision that it has now, so that what is read can't change.

    Raises:
        RuntimeError: the hub can't be reached or doesn't know the data set.
    """
    import huggingface_hub

    repository, revision, config, split = split_hub_name(name)
    try:
        commit = huggingface_hub.dataset_info(repository, revision=revision or None).sha
    except Exception as error:  # of the hub, of its HTTP client, or of the network
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RuntimeError(
            f"허브의 데이터셋을 열 수 없습니다: {repository} ({reason}). "
            "이름과 네트워크를 확인하거나, 내려받은 파일을 --dataset-path 로 주세요"
        ) from error
    return f"hf:{repository}@{commit}:{config}:{split}"


def read_hub_chunks(name: str) -> Iterator[Chunk]:
    """Stream a data set of the hub; nothing of it is executed."""
    import datasets

    repository, revision, config, split = split_hub_name(name)
    stream = datasets.load_dataset(repository, config or None, split=split, revision=revision or None, streaming=True)
    first_line = 1
    for batch in stream.iter(1024):
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        yield Chunk(name, first_line, rows)
        first_line += len(rows)


def read_chunks(cfg: TrainConfig, files: list[Path]) -> Iterator[Chunk]:
    """Read the whole corpus in a stable order."""
    if not files:
        yield from read_hub_chunks(str(cfg.dataset_path))
    for path in files:
        reader = read_table_chunks(path, cfg.text_column) if path.suffix == ".parquet" else read_line_chunks(path)
        yield from reader


def parse_record(record: Any, text_column: str) -> tuple[str, str, str | None]:
    """Return text, language and source of one JSON line or table row.

    Raises:
        ValueError: with the reason in Korean.
    """
    if isinstance(record, bytes):
        try:
            record = json.loads(record.decode("utf-8"))
        except UnicodeDecodeError:
            raise ValueError("UTF-8이 아닙니다") from None
        except (ValueError, RecursionError):
            raise ValueError("JSON이 아닙니다") from None
    if not isinstance(record, dict):
        raise ValueError("JSON 객체가 아닙니다")
    if text_column not in record:
        raise ValueError(f"'{text_column}' 열이 없습니다")
    text, language, source = record[text_column], record.get("lang"), record.get("source")
    if not isinstance(text, str):
        raise ValueError(f"'{text_column}' 값이 문자열이 아닙니다")
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("짝이 없는 서로게이트가 있습니다") from None
    language = language.lower() if isinstance(language, str) and language else detect_language(text)
    return text, language, source if isinstance(source, str) else None


def detect_language(text: str) -> str:
    """Tell Korean from English by the share of Hangul among the letters of the first 2,000 characters."""
    letters = [char for char in text[:2000] if char.isalpha()]
    hangul = sum("가" <= char <= "힣" or "ㄱ" <= char <= "ㆎ" for char in letters)
    return "ko" if letters and hangul >= 0.2 * len(letters) else "en"


def split_plain_text(chunk: Chunk) -> Documents:
    """Documents of a .txt file: paragraphs, that is, lines up to an empty one."""
    texts, languages, bad, paragraph = [], [], [], []
    for number, line in enumerate([*chunk.lines, b""], chunk.first_line):
        try:
            text = line.decode("utf-8").rstrip("\r")
        except UnicodeDecodeError:
            bad.append({"file": chunk.file, "line": number, "reason": "UTF-8이 아닙니다"})
            continue
        if text.strip():
            paragraph.append(text)
        elif paragraph:
            texts.append(unicodedata.normalize("NFC", "\n".join(paragraph)))
            languages.append(detect_language(texts[-1]))
            paragraph = []
    return Documents(texts, languages, [None] * len(texts), bad, len(chunk.lines))


def parse_chunk(chunk: Chunk, text_column: str) -> Documents:
    """Read the documents of a chunk; blank lines and empty texts are no documents, bad lines are listed."""
    if chunk.file.endswith(".txt"):
        return split_plain_text(chunk)
    texts, languages, sources, bad, blank = [], [], [], [], 0
    for number, record in enumerate(chunk.lines, chunk.first_line):
        if isinstance(record, bytes) and not record.strip():
            blank += 1
            continue
        try:
            text, language, source = parse_record(record, text_column)
        except ValueError as error:
            bad.append({"file": chunk.file, "line": number, "reason": str(error)})
            continue
        if text:
            texts.append(text)
            languages.append(language)
            sources.append(source)
    return Documents(texts, languages, sources, bad, len(chunk.lines) - blank)


def assign_streams(documents: Documents, names: list[str]) -> np.ndarray:
    """Index of each document's stream (int16): its source's where ``names`` has that, else its language's.

    -1 where ``names`` has neither; without names (no ``--mix``) there is one stream.
    """
    index = {name: number for number, name in enumerate(names)}
    pairs = zip(documents.sources, documents.languages, strict=True)
    found = [index.get(source, index.get(language, -1)) if names else 0 for source, language in pairs]
    return np.array(found, np.int16)


# --- work over all cores ---

WORKER: dict[str, Any] = {}  # what a forked helper works with; set once by enter_worker


def enter_worker(function: Callable, state: Any) -> None:
    """Start of a helper process: it ends with its parent, and leaves Ctrl-C to it."""
    import ctypes

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no orphan after kill -9
    WORKER.update(function=function, state=state)


def call_worker(item: Any) -> Any:
    """Do one item in a helper process."""
    return WORKER["function"](WORKER["state"], item)


def parallel_map(function: Callable, state: Any, items: Iterable, workers: int) -> Iterator[Any]:
    """``function(state, item)`` for each item, in order, over ``workers`` processes.

    Forked, so that ``state`` costs nothing to hand over; at most two items a process are under
    way, so memory stays bounded; a helper that dies is an error and not a hang.
    """
    if workers == 1:
        yield from (function(state, item) for item in items)
        return
    context = multiprocessing.get_context("fork")
    pending: deque = deque()
    with ProcessPoolExecutor(workers, context, enter_worker, (function, state)) as pool:
        for item in items:
            pending.append(pool.submit(call_worker, item))
            if len(pending) >= 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def call_in_child(title: str, function: Callable[[], None]) -> None:
    """Run a long call in a process of its own: all its memory is given back, and a signal needn't wait for it.

    Raises:
        RuntimeError: the process died.
    """
    process = multiprocessing.get_context("fork").Process(target=run_child, args=(function,))
    process.start()
    try:
        with heartbeat(title):  # its thread starts after the fork
            process.join()
    finally:
        process.kill()
        process.join()
    if process.exitcode:
        reason = "메모리가 부족했을 수 있습니다" if process.exitcode < 0 else "콘솔 로그의 오류를 보세요"
        raise RuntimeError(f"{title} 하위 프로세스가 죽었습니다 (종료 코드 {process.exitcode}, {reason})")


def run_child(function: Callable[[], None]) -> None:
    """What a child of ``call_in_child`` does."""
    enter_worker(function, None)
    function()


class Progress:
    """Says every few seconds how far a long stage is, with the time left where the whole is known."""

    def __init__(self, title: str, whole: int, every: float = 5.0):
        self.title, self.whole, self.every = title, whole, every
        self.start = self.last = time.monotonic()

    def update(self, done: int) -> None:
        """Log a line if the last one is old enough; ``done`` in the units of ``whole``."""
        now = time.monotonic()
        if now - self.last < self.every:
            return
        self.last = now
        share = min(1.0, done / max(1, self.whole))
        left = (now - self.start) * (1 / max(share, 1e-6) - 1)
        logger.info(f"   {self.title}: {share:.0%}, 남은 시간 {format_duration(left)}")


def format_duration(seconds: float) -> str:
    """Hours, minutes and seconds as 1:02:03."""
    return str(timedelta(seconds=round(seconds)))


# --- first pass: what is there, what is held out, the tokenizer's sample ---


@dataclass
class Scan:
    """What the first pass over a corpus found."""

    languages: list[str]  # names; a document's language is an index into them
    document_language: np.ndarray  # uint16 a document
    document_key: np.ndarray  # uint64 a document: a hash of its content
    document_bytes: np.ndarray  # uint32 a document
    sample: list[tuple[int, int, str]]  # (sampling key, content key, text), evenly spread over the documents
    bad: list[dict[str, Any]]
    bad_count: int
    line_count: int


def content_keys(text: str) -> tuple[int, int, int]:
    """Two independent 64-bit hashes of a text, and its length in bytes.

    The first decides what is held out and the second what the tokenizer sees.  They depend on
    nothing but the content, so equal documents are never on both sides of the split.
    """
    data = text.encode("utf-8")
    digest = hashlib.blake2b(data, digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little"), len(data)


@dataclass
class ScannedChunk:
    """What the first pass found in one chunk; the texts are those that may go into the sample."""

    keys: np.ndarray
    lengths: np.ndarray
    languages: list[str]
    sources: set[str]
    left_out: int  # documents that --mix doesn't name
    named: set[int]  # streams that have a document here
    sample: list[tuple[int, int, str]]
    bad: list[dict[str, Any]]
    line_count: int


def scan_chunk(state: tuple[str, list[str]], task: tuple[Chunk, int]) -> ScannedChunk:
    """First pass over one chunk; texts whose sampling key is under the bound are handed back too."""
    text_column, mix_names = state
    chunk, bound = task
    documents = parse_chunk(chunk, text_column)
    keys = [content_keys(text) for text in documents.texts]
    sample = [
        (second, first, text[:LONGEST_SAMPLE_TEXT])
        for (first, second, _), text in zip(keys, documents.texts, strict=True)
        if second < bound
    ]
    streams = assign_streams(documents, mix_names)
    return ScannedChunk(
        np.array([key[0] for key in keys], np.uint64),
        np.array([key[2] for key in keys], np.uint32),
        documents.languages,
        {source for source in documents.sources if source} if mix_names else set(),
        int((streams < 0).sum()),
        set(streams.tolist()),
        sample,
        documents.bad,
        documents.line_count,
    )


class BoundedSample:
    """Keeps the texts with the smallest keys up to a number of bytes: an even sample of unknown length."""

    def __init__(self, budget: int):
        self.budget, self.bound, self.size = budget, 2**64, 0
        self.items: list[tuple[int, int, str]] = []

    def add(self, items: list[tuple[int, int, str]]) -> None:
        """Add candidates; past twice the budget the half with the larger keys is dropped."""
        self.items += [item for item in items if item[0] < self.bound]
        self.size += sum(len(item[2]) for item in items)
        if self.size > 2 * self.budget:
            self.trim()

    def trim(self) -> list[tuple[int, int, str]]:
        """Cut down to the budget (in characters) and return the items in the order of their keys."""
        self.items.sort(key=lambda item: item[0])
        self.size = kept = 0
        for item in self.items:
            if self.size >= self.budget:
                break
            self.size += len(item[2])
            kept += 1
        if kept < len(self.items):
            self.bound = self.items[kept][0]
            del self.items[kept:]
        return self.items


def scan_corpus(cfg: TrainConfig, files: list[Path], workers: int) -> Scan:
    """First pass: count, hash and sample the documents.

    Raises:
        RuntimeError: more than 1 % of the lines are bad, or no document is left.
        UsageProblem: ``--mix`` names what the corpus hasn't.
    """
    index: dict[str, int] = {}
    keys, lengths, languages, bad, named, sources = [], [], [], [], set(), set()
    bad_count = line_count = byte_count = left_out = 0
    own_tokenizer = cfg.tokenizer is None and cfg.init_from is None
    sample = BoundedSample(TOKENIZER_SAMPLE_CHARACTERS if own_tokenizer else CHECK_SAMPLE_CHARACTERS)
    progress = Progress("말뭉치 읽는 중", estimated_bytes(files))
    mix_names = list(cfg.mix_counts)
    tasks = ((chunk, sample.bound) for chunk in read_chunks(cfg, files))
    for found in parallel_map(scan_chunk, (cfg.text_column, mix_names), tasks, workers):
        keys.append(found.keys)
        lengths.append(found.lengths)
        languages.append(np.array([index.setdefault(name, len(index)) for name in found.languages], np.uint16))
        sample.add(found.sample)
        bad += found.bad[: max(0, MOST_BAD_LINES_KEPT - len(bad))]
        bad_count += len(found.bad)
        line_count += found.line_count
        byte_count += int(found.lengths.sum())
        left_out += found.left_out
        named |= found.named
        sources |= found.sources if len(sources) < MOST_NAMES_SHOWN else set()
        progress.update(byte_count)
    parts = (np.concatenate(part) if part else np.array([]) for part in (languages, keys, lengths))
    scan = Scan(list(index), *parts, sample.trim(), bad, bad_count, line_count)
    check_scan(cfg, scan)
    check_mix(mix_names, named, left_out, scan.languages, sorted(sources))
    return scan


def check_mix(names: list[str], found: set[int], left_out: int, languages: list[str], sources: list[str]) -> None:
    """Refuse a name of ``--mix`` that no document has; say how many documents no name stands for.

    Raises:
        UsageProblem: naming what there is.
    """
    lacking = [name for number, name in enumerate(names) if number not in found]
    if lacking:
        there = f"lang: {', '.join(languages[:MOST_NAMES_SHOWN])}"
        there += f"; source: {', '.join(sources[:MOST_NAMES_SHOWN])}" if sources else ""
        raise UsageProblem([f"--mix: 말뭉치에 '{', '.join(lacking)}' 문서가 없습니다 (있는 이름 {there})"])
    if left_out:
        logger.info(f"⚠️  --mix에 없는 문서 {left_out:,}개는 학습에 쓰지 않습니다")


def estimated_bytes(files: list[Path]) -> int:
    """Bytes of text in the files, roughly: compressed ones hold more than their size."""
    return int(
        sum(path.stat().st_size * (COMPRESSION_ESTIMATE if path.suffix in (".gz", ".zst") else 1) for path in files)
    )


def check_scan(cfg: TrainConfig, scan: Scan) -> None:
    """Write down the bad lines; refuse a corpus with too many of them or with nothing in it."""
    if scan.bad:
        path = cfg.logs_dir / "bad_lines.jsonl"
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in scan.bad), encoding="utf-8")
        logger.warning(f"⚠️  읽지 못한 줄 {scan.bad_count:,}개를 건너뛰었습니다: {display_path(path)}")
    if scan.bad_count > MOST_BAD_LINES * scan.line_count:
        first = "\n".join(f"   {line['file']}:{line['line']}: {line['reason']}" for line in scan.bad[:5])
        raise RuntimeError(
            f"전체 {scan.line_count:,}줄 가운데 {scan.bad_count:,}줄을 읽지 못했습니다 (허용: 1%). 처음 몇 줄:\n{first}"
        )
    if not len(scan.document_key):
        raise RuntimeError(f"문서가 하나도 없습니다: {cfg.dataset_path}")


def held_out_bounds(scan: Scan, fraction: float) -> np.ndarray:
    """Per language, the content key up to and including which documents are held out (uint64).

    The documents with the smallest keys: ``fraction`` of each language and at least 30 of it where
    there are more than that.  The choice hangs on content alone, so it is the same whatever the
    order of files, the seed or the number of processes.
    """
    bounds = np.zeros(len(scan.languages), np.uint64)
    for index in range(len(scan.languages)):
        keys = np.unique(scan.document_key[scan.document_language == index])
        wanted = round(fraction * len(keys))
        if fraction and len(keys) > LEAST_HELD_OUT_DOCUMENTS:
            wanted = max(wanted, LEAST_HELD_OUT_DOCUMENTS)
        if wanted:
            bounds[index] = np.partition(keys, wanted - 1)[wanted - 1]
    return bounds


# --- tokenizer ---


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """Train a byte-level BPE tokenizer on NFC text.

    A corpus that doesn't support ``vocab_size`` pieces gives fewer; the vocabulary is then filled
    up to a multiple of 128 with reserved tokens, since tensor cores like it.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    lacking = -backend.get_vocab_size() % 128
    backend.add_special_tokens([AddedToken(f"<|reserved_{index}|>", special=True) for index in range(lacking)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer so that transformers 4 opens it too: it doesn't know version 5's class name."""
    tokenizer.save_pretrained(folder)
    settings = read_json(folder / "tokenizer_config.json")
    if settings.get("tokenizer_class") == "TokenizersBackend":
        write_json(folder / "tokenizer_config.json", {**settings, "tokenizer_class": "PreTrainedTokenizerFast"})


def load_tokenizer(source: str | Path) -> Any:
    """Open a fast tokenizer from a directory, a checkpoint or the hub; no code of it is executed.

    Raises:
        RuntimeError: there is none, it is a slow one, or it names no end-of-text token.
    """
    from transformers import AutoTokenizer

    path = checkpoint_dir(Path(source).expanduser())
    try:
        tokenizer = AutoTokenizer.from_pretrained(path if path.exists() else str(source), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise RuntimeError(f"토크나이저를 열 수 없습니다: {source} ({str(error).splitlines()[0]})") from error
    if not tokenizer.is_fast:
        raise RuntimeError(f"빠른(fast) 토크나이저가 아닙니다: {source} (tokenizer.json이 있는 것을 쓰세요)")
    if tokenizer.eos_token_id is None:
        raise RuntimeError(f"토크나이저에 문서 끝 토큰(eos_token)이 없습니다: {source}")
    return tokenizer


def tiktoken_engine(tokenizer: Any) -> Any | None:
    """The same byte-level BPE on tiktoken's engine, about 2.5 times as fast; None for other tokenizers."""
    import tiktoken
    from tokenizers.pre_tokenizers import ByteLevel

    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    model, steps = spec["model"], spec["pre_tokenizer"]
    steps = steps["pretokenizers"] if steps and steps["type"] == "Sequence" else [steps]
    split_then_bytes = [step and step["type"] for step in steps] == ["Split", "ByteLevel"]
    plain = not any(model.get(name) for name in ("dropout", "unk_token", "ignore_merges", "byte_fallback"))
    if model["type"] != "BPE" or not plain or not split_then_bytes or spec["normalizer"] not in (None, {"type": "NFC"}):
        return None
    pattern = steps[0]["pattern"].get("Regex")
    if pattern is None or steps[0]["behavior"] != "Isolated" or steps[1]["use_regex"] or steps[1]["add_prefix_space"]:
        return None
    # ByteLevel writes each byte as one printable character; this is its table read backwards.
    printable = [char for char in map(chr, range(0x180)) if char in set(ByteLevel.alphabet())]
    shifted = iter(char for char in printable if ord(char) > 0xFF)
    to_byte = {(chr(byte) if chr(byte) in printable else next(shifted)): byte for byte in range(256)}
    special = {token["content"] for token in spec["added_tokens"]}
    ranks = {
        bytes(to_byte[char] for char in piece): rank for piece, rank in model["vocab"].items() if piece not in special
    }
    return tiktoken.Encoding("corpus", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def make_encoder(tokenizer: Any, sample: list[str]) -> tuple[Callable[[list[str]], list[np.ndarray]], str]:
    """Return a function from NFC texts to token ids (uint32), and the name of its engine.

    Names of special tokens that occur in a text are text like any other.  The fast engine is used
    only where it gives the tokenizer's own ids on every text of ``sample``.
    """
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True

    def encode_ordinary(texts: list[str]) -> list[np.ndarray]:
        found = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(item.ids, np.uint32) for item in found]

    engine = tiktoken_engine(tokenizer)
    if engine is None:
        return encode_ordinary, "tokenizers"

    def encode_one(text: str) -> np.ndarray:
        try:
            return engine.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # a run of some 100,000 blanks is more than its regex engine's stack takes
            return encode_ordinary([text])[0]

    def encode_fast(texts: list[str]) -> list[np.ndarray]:
        return [encode_one(text) for text in texts]

    pairs = zip(encode_fast(sample), encode_ordinary(sample), strict=True)
    if not all(np.array_equal(fast, ordinary) for fast, ordinary in pairs):
        logger.warning("⚠️  빠른 토큰화 엔진의 결과가 달라 원래 토크나이저로 토큰화합니다")
        return encode_ordinary, "tokenizers"
    return encode_fast, "tiktoken"


# --- second pass: the token cache ---


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus, memory-mapped.

    Each of ``streams`` (one for each name of ``--mix``, else just one) and ``val`` is a stream of token
    ids that begins with an end-of-text token and carries one after each document; document i is
    ``stream[offsets[i]:offsets[i + 1] - 1]``.
    """

    path: Path
    tokenizer: Any
    streams: tuple[np.ndarray, ...]
    val: np.ndarray
    val_offsets: np.ndarray  # int64 (documents + 1)
    val_languages: np.ndarray  # uint16 a document
    val_bytes: np.ndarray  # uint32 a document
    report: dict[str, Any]

    def rows(self, max_seq_length: int) -> int:
        """Training rows of an epoch: each has ``max_seq_length`` targets, each token is a target once."""
        return sum(stream_rows(self.streams, max_seq_length))


def stream_rows(streams: Iterable[np.ndarray], max_seq_length: int) -> list[int]:
    """Rows of each stream; neighbouring rows share one token."""
    return [(len(stream) - 1) // max_seq_length for stream in streams]


@dataclass(frozen=True)
class Encoding:
    """How the second pass turns texts into tokens."""

    text_column: str
    encode: Callable[[list[str]], list[np.ndarray]]
    languages: dict[str, int]
    mix_names: list[str]
    bounds: np.ndarray  # a language's largest content key that is held out
    end: np.ndarray  # the end-of-text token, in the cache's dtype


def encode_chunk(how: Encoding, chunk: Chunk) -> tuple[list[tuple], list[tuple], np.ndarray]:
    """Second pass over one chunk.

    Returns, a stream, its training tokens, documents' lengths and languages; the held-out documents
    one by one; and a language's documents, bytes, tokens and eojeols (languages, 4).
    """
    documents = parse_chunk(chunk, how.text_column)
    languages = np.array([how.languages[name] for name in documents.languages], np.uint16)
    keys = [content_keys(text) for text in documents.texts]
    held = np.array([key[0] <= how.bounds[index] > 0 for key, index in zip(keys, languages, strict=True)], bool)
    ids = how.encode(documents.texts)
    lengths = np.array([len(tokens) + 1 for tokens in ids], np.int64)
    counts = np.zeros((len(how.languages), 4), np.int64)
    sizes = [
        (1, key[2], len(tokens), len(text.split()))
        for text, key, tokens in zip(documents.texts, keys, ids, strict=True)
    ]
    np.add.at(counts, languages, np.array(sizes, np.int64).reshape(-1, 4))
    ids = [tokens.astype(how.end.dtype) for tokens in ids]
    val = [(keys[i][0], ids[i], int(languages[i]), keys[i][2]) for i in np.flatnonzero(held)]
    stream_of = np.where(held, -1, assign_streams(documents, how.mix_names))
    parts = []
    for stream in range(max(1, len(how.mix_names))):
        chosen = np.flatnonzero(stream_of == stream)
        tokens = [part for i in chosen for part in (ids[i], how.end)]
        parts.append((np.concatenate([how.end[:0], *tokens]), lengths[chosen], languages[chosen]))
    return parts, val, counts


class StreamWriter:
    """Writes one stream of training tokens, and beside it its documents' offsets and languages."""

    def __init__(self, folder: Path, index: int, end: np.ndarray):
        self.stem = folder / f"train-{index}"
        self.file = open(f"{self.stem}.bin", "wb")  # noqa: SIM115  (close() ends it)
        self.lengths: list[np.ndarray] = [np.array([1], np.int64)]
        self.languages: list[np.ndarray] = [np.array([], np.uint16)]
        self.file.write(end.tobytes())

    def add(self, tokens: np.ndarray, lengths: np.ndarray, languages: np.ndarray) -> None:
        """Append documents."""
        self.file.write(tokens.tobytes())
        self.lengths.append(lengths)
        self.languages.append(languages)

    def close(self) -> int:
        """Finish the files and return the number of tokens."""
        self.file.close()
        offsets = np.cumsum(np.concatenate(self.lengths))
        np.save(f"{self.stem}_offsets.npy", offsets)
        np.save(f"{self.stem}_languages.npy", np.concatenate(self.languages))
        return int(offsets[-1])


def write_cache(folder: Path, cfg: TrainConfig, files: list[Path], workers: int) -> None:
    """Prepare a corpus into ``folder``: both passes, the tokenizer, the streams and the report."""
    # Each helper keeps one core busy by itself; a pool of threads in it would also be lost in its forks.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    scan = scan_corpus(cfg, files, workers)
    bounds = held_out_bounds(scan, cfg.validation_split)
    source = cfg.tokenizer or cfg.init_from
    if source:
        tokenizer = load_tokenizer(source)
        save_tokenizer(tokenizer, folder / "tokenizer")
    else:
        tokenizer = train_own_tokenizer(cfg, scan, bounds, folder / "tokenizer")
    encode, engine = make_encoder(tokenizer, [item[2] for item in scan.sample[:400]])
    scan.sample.clear()
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    check_disk(folder, int(scan.document_bytes.sum()) * dtype().itemsize // 2)
    names = {name: index for index, name in enumerate(scan.languages)}
    end = np.array([tokenizer.eos_token_id], dtype)
    how = Encoding(cfg.text_column, encode, names, list(cfg.mix_counts), bounds, end)
    progress = Progress("토큰화하는 중", len(scan.document_key))
    writers = [StreamWriter(folder, index, end) for index in range(max(1, len(how.mix_names)))]
    val, counts = [], np.zeros((len(names), 4), np.int64)
    for parts, held, count in parallel_map(encode_chunk, how, read_chunks(cfg, files), workers):
        for writer, part in zip(writers, parts, strict=True):
            writer.add(*part)
        val += held
        counts += count
        progress.update(int(counts[:, 0].sum()))
    tokens = [writer.close() for writer in writers]
    write_held_out(folder, sorted(val, key=lambda item: item[0]), end)
    report = corpus_report(scan, counts, len(tokenizer), engine)
    report["train_tokens"] = sum(tokens)
    report["streams"] = dict(zip(how.mix_names or ["all"], tokens, strict=True))
    report["val_documents"] = len(val)
    report["val_by_language"] = {name: sum(item[2] == index for item in val) for name, index in names.items()}
    # The same content gives the same rows wherever the files lie: this is what --resume compares.
    content = [hashlib.blake2b(scan.document_key.tobytes()).hexdigest(), tokenizer_fingerprint(tokenizer)]
    report["fingerprint"] = hashlib.blake2b(json.dumps(content).encode(), digest_size=12).hexdigest()
    report["dtype"] = end.dtype.name
    write_json(folder / "corpus.json", report)


def train_own_tokenizer(cfg: TrainConfig, scan: Scan, bounds: np.ndarray, folder: Path) -> Any:
    """Train a tokenizer on the scan's sample without the held-out documents, and say how it went."""
    highest = int(bounds.max())  # leaves out a little more than needed, and never less
    scan.sample[:] = limit_words([item for item in scan.sample if item[1] > highest], TOKENIZER_SAMPLE_WORDS)
    texts = [text for _, _, text in scan.sample]
    size = sum(len(text) for text in texts)
    logger.info(f"🔤 토크나이저 학습 중... (어휘 {cfg.vocab_size:,}, 표본 {len(texts):,}개 문서 {size / 1e6:.1f}M자)")
    start = time.monotonic()
    call_in_child("토크나이저 학습 중", lambda: save_tokenizer(train_tokenizer(texts, cfg.vocab_size), folder))
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) < cfg.vocab_size:
        logger.info(f"⚠️  말뭉치가 작아 어휘를 {cfg.vocab_size:,}개가 아니라 {len(tokenizer):,}개로 정했습니다")
    logger.info(f"✅ 토크나이저 학습 완료: 어휘 {len(tokenizer):,} ({time.monotonic() - start:.1f}초)")
    return tokenizer


def limit_words(sample: list[tuple[int, int, str]], most: int) -> list[tuple[int, int, str]]:
    """The first items of a sample, up to ``most`` distinct words: these are what the trainer's memory goes by."""
    words: set[str] = set()
    for count, (_, _, text) in enumerate(sample):
        words.update(text.split())
        if len(words) > most:
            return sample[: count + 1]
    return sample


@contextmanager
def heartbeat(title: str, every: float = 10.0) -> Iterator[None]:
    """Log a line every few seconds while a call that can't report progress runs."""
    done, start = threading.Event(), time.monotonic()

    def beat() -> None:
        while not done.wait(every):
            logger.info(f"   {title}... {format_duration(time.monotonic() - start)} 지남")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def check_disk(folder: Path, needed: int) -> None:
    """Refuse to begin what can't fit.

    Raises:
        RuntimeError: with both figures and the option to type.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RuntimeError(
            f"디스크 공간이 부족합니다: {folder} 에 {needed / 2**30:.1f} GiB가 필요하지만 "
            f"{free / 2**30:.1f} GiB만 남았습니다 (다른 --cache-dir 를 주세요)"
        )


def write_held_out(folder: Path, documents: list[tuple], end: np.ndarray) -> None:
    """Write the held-out documents in the order of their content keys, which is as good as shuffled."""
    parts = [end, *(part for _, tokens, _, _ in documents for part in (tokens, end))]
    np.concatenate(parts).tofile(folder / "val.bin")
    lengths = [1, *(len(tokens) + 1 for _, tokens, _, _ in documents)]
    np.save(folder / "val_offsets.npy", np.cumsum(np.array(lengths, np.int64)))
    np.save(folder / "val_languages.npy", np.array([item[2] for item in documents], np.uint16))
    np.save(folder / "val_bytes.npy", np.array([item[3] for item in documents], np.uint32))


def corpus_report(scan: Scan, counts: np.ndarray, vocab_size: int, engine: str) -> dict[str, Any]:
    """The figures about a corpus that are shown before training and kept in ``training_info.json``."""
    whole = counts.sum(axis=0)
    named = {"all": whole, **dict(zip(scan.languages, counts, strict=True))}
    return {
        "documents": int(whole[0]),
        "bytes": int(whole[1]),
        "tokens": int(whole[2]),
        "vocab_size": vocab_size,
        "engine": engine,
        "bad_lines": scan.bad_count,
        "languages": scan.languages,
        "by_language": {
            name: {
                "documents": int(row[0]),
                "byte_share": float(row[1] / max(1, whole[1])),
                "bytes_per_token": float(row[1] / max(1, row[2])),
                "tokens_per_eojeol": float(row[2] / max(1, row[3])),
            }
            for name, row in named.items()
        },
    }


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; the kernel lets go of it however the process ends."""
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("⏳ 다른 실행이 같은 데이터를 준비하고 있어 기다립니다")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def prepare_corpus(cfg: TrainConfig) -> Corpus:
    """Open the token cache of the corpus, and write it first if it isn't there.

    Every rank calls this before the process group exists: a machine's first writes, the others wait
    for the result, so that no tokenisation, however long, can time out a collective.
    """
    cfg.cache_dir.mkdir(parents=True, exist_ok=True)
    files = [write_dummy_data(cfg.cache_dir)] if uses_dummy_data(cfg) else corpus_files(cfg)
    if not files:
        cfg = replace(cfg, dataset_path=Path(pin_hub_revision(str(cfg.dataset_path))))
    folder = cfg.cache_dir / corpus_key(cfg, files)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with file_lock(folder.with_suffix(".lock")):  # another run may be at it
            if not folder.exists():
                build_cache(folder, cfg, files)
    while not folder.exists():  # rank 0 is at it; should it fail, the agent ends us
        time.sleep(0.1)
    return open_corpus(folder)


def build_cache(folder: Path, cfg: TrainConfig, files: list[Path]) -> None:
    """Write a cache under a temporary name and rename it: a folder with the right name is whole."""
    for torn in folder.parent.glob(f"{folder.name}.tmp-*"):
        shutil.rmtree(torn)  # its writer is dead: we hold the lock
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    temporary.mkdir()
    logger.info(f"📚 데이터 준비 중... ({len(files)}개 파일)")
    start = time.monotonic()
    small = bool(files) and estimated_bytes(files) < SMALL_CORPUS_BYTES
    try:
        write_cache(temporary, cfg, files, 1 if small else len(os.sched_getaffinity(0)))
        sync_tree(temporary)
        os.rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    logger.info(f"✅ 데이터 준비 완료 ({time.monotonic() - start:.1f}초)")


def sync_tree(folder: Path) -> None:
    """Flush every file and directory under ``folder`` to the disk."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def open_corpus(folder: Path) -> Corpus:
    """Memory-map a prepared corpus."""
    report = read_json(folder / "corpus.json")
    dtype = np.dtype(report["dtype"])
    return Corpus(
        folder,
        load_tokenizer(folder / "tokenizer"),
        tuple(np.memmap(folder / f"train-{index}.bin", dtype, "r") for index in range(len(report["streams"]))),
        np.memmap(folder / "val.bin", dtype, "r"),
        *(np.load(folder / f"val_{name}.npy") for name in ("offsets", "languages", "bytes")),
        report,
    )


def log_report(report: dict[str, Any], path: Path) -> None:
    """Say what the corpus is like before training on it."""
    logger.info(
        f"📚 말뭉치: 문서 {report['documents']:,}개, {report['bytes'] / 1e6:,.1f} MB, 토큰 {report['tokens']:,}개, "
        f"어휘 {report['vocab_size']:,}"
    )
    held = ", ".join(f"{name} {count:,}개" for name, count in report["val_by_language"].items())
    logger.info(f"   • 검증용 문서: {report['val_documents']:,}개 ({held})")
    for name, row in report["by_language"].items():
        if name != "all":
            logger.info(
                f"   • {name}: 문서 {row['documents']:,}개, 비중 {row['byte_share']:.1%}, "
                f"토큰당 {row['bytes_per_token']:.2f} 바이트, 어절당 {row['tokens_per_eojeol']:.2f} 토큰"
            )
    logger.debug(f"token cache: {path}, engine {report['engine']}")


def write_dummy_data(folder: Path) -> Path:
    """Make Korean and English text for trying the system out; the same on every machine.

    Sentences from a small grammar, so that a model can learn something in ten steps; 4,000
    documents, about 2 MB.
    """
    path = folder / "dummy-1.jsonl"
    if path.exists():
        return path
    draw = random.Random(0)
    grammars = {
        "ko": (
            "오늘|어제|내일|아침|저녁|주말|지난달|올해",
            "학생이|연구원이|기자가|아이가|선생님이|개발자가|친구가|의사가|요리사가|여행자가",
            "서울에서|부산에서|학교에서|도서관에서|회사에서|시장에서|바닷가에서|집에서",
            "책을|논문을|모델을|데이터를|음식을|영화를|편지를|코드를|사진을|노래를",
            "읽었다.|만들었다.|분석했다.|보냈다.|준비했다.|고쳤다.|나누었다.|기억했다.|찾았다.|설명했다.",
        ),
        "en": (
            "Today|Yesterday|Tomorrow|Sometimes|Later|Often|Suddenly|Finally",
            "the student|a researcher|the reporter|a child|my teacher|the engineer|an old friend|the doctor",
            "read|wrote|analysed|shared|prepared|repaired|remembered|found|explained|measured",
            "a book|the paper|a small model|the data|some food|a film|the letter|new code|a photograph|that song",
            "in Seoul.|at school.|in the library.|at work.|by the sea.|at home.|in the market.|on the train.",
        ),
    }
    choices = {lang: [part.split("|") for part in grammar] for lang, grammar in grammars.items()}

    def document(index: int) -> dict[str, str]:
        lang = ("ko", "en")[index % 2]
        words = [draw.choice(part) for _ in range(draw.randint(3, 16)) for part in choices[lang]]
        return {"text": " ".join(words), "lang": lang}

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    lines = (json.dumps(document(index), ensure_ascii=False) + "\n" for index in range(4000))
    temporary.write_text("".join(lines), encoding="utf-8")
    os.utime(temporary, (0, 0))  # whichever rank comes last, the token cache knows the file by the same time
    os.replace(temporary, path)
    return path


# --- rows in their order ---


def mix_bits(value: np.ndarray) -> np.ndarray:
    """Scramble uint64 values one to one (the finaliser of splitmix64)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def permute(index: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """A pseudo-random permutation of ``range(size)``, one value at a time, in O(1) memory.

    A balanced Feistel network over the next power of four, walked until the value falls into range
    (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).  ``index`` and ``key`` are
    uint64 arrays of one shape: each value is permuted by its own key.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    value, outside = index.copy(), np.ones(index.shape, bool)
    while outside.any():
        left, right = value[outside] >> half, value[outside] & mask
        for turn in range(6):
            salt = mix_bits(key[outside] + np.uint64(turn))
            left, right = right, left ^ (mix_bits(right + salt) & mask)
        value[outside] = (left << half) | right
        outside = value >= size
    return value


def row_at(position: np.ndarray, rows: int, seed: int) -> np.ndarray:
    """Rows of a stream at positions in it: a pure function of (seed, epoch, index).

    Position p is the p-th row that the run reads of it, over all ranks; each epoch is a new permutation.
    """
    position = np.asarray(position, np.uint64)
    epoch, index = position // np.uint64(rows), position % np.uint64(rows)
    key = mix_bits(epoch + mix_bits(np.full(position.shape, seed + 1, np.uint64)))
    return permute(index, rows, key).astype(np.int64)


def mix_slots(counts: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The stream of each of ``sum(counts)`` slots, spread evenly, and how many of its slots come before.

    Each slot goes to the stream that is furthest behind its share, so that every global batch is
    mixed about as the whole is.
    """
    whole, taken = sum(counts), [0] * len(counts)
    stream, rank = np.empty(whole, np.int64), np.empty(whole, np.int64)
    for slot in range(whole):
        chosen = max(range(len(counts)), key=lambda index: counts[index] * (slot + 1) - whole * taken[index])
        stream[slot], rank[slot] = chosen, taken[chosen]
        taken[chosen] += 1
    return stream, rank


class RowOrder:
    """Which row of which stream stands at a position of the run: a pure function, in O(1) memory.

    Slots repeat, so any ``sum(counts)`` rows in a row have the proportions of ``counts`` exactly; a
    stream's own rows come in the order of ``row_at``, a new permutation each time it is used up.
    """

    def __init__(self, rows: list[int], counts: list[int], seed: int):
        self.rows, self.counts, self.seed = rows, counts, seed
        self.slot_stream, self.slot_rank = mix_slots(counts)

    def __call__(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Stream and row (int64) at each position (int64)."""
        round_, slot = np.divmod(np.asarray(position, np.int64), len(self.slot_stream))
        stream, row = self.slot_stream[slot], np.empty(len(position), np.int64)
        for index, (rows, count) in enumerate(zip(self.rows, self.counts, strict=True)):
            here = stream == index
            own = round_[here] * count + self.slot_rank[slot[here]]
            row[here] = row_at(own, rows, self.seed + (index << 32))
        return stream, row


class PackedRows(torch.utils.data.Dataset):
    """Rows of ``max_seq_length + 1`` tokens; neighbours share one token."""

    def __init__(self, streams: tuple[np.ndarray, ...], max_seq_length: int):
        self.streams, self.length = streams, max_seq_length

    def __getitems__(self, places: list[tuple[int, int]]) -> torch.Tensor:
        """Return the rows at ``places`` (stream, row) as an int64 tensor (rows, max_seq_length + 1)."""
        batch = np.empty((len(places), self.length + 1), np.int64)
        for target, (stream, row) in zip(batch, places, strict=True):
            start = row * self.length
            target[:] = self.streams[stream][start : start + self.length + 1]
        return torch.from_numpy(batch)


class RankPositions:
    """Positions of one rank's micro-batches, from the row where the run stands to its end.

    A global step takes the next ``batch_size * world_size * gradient_accumulation_steps`` rows
    whatever the number of ranks; micro-batch m of rank r takes the r-th share of the m-th slice.
    """

    def __init__(self, cfg: TrainConfig, rank: int, world_size: int, steps: range):
        self.cfg, self.rank, self.world_size, self.steps = cfg, rank, world_size, steps

    def __len__(self) -> int:
        return len(self.steps) * self.cfg.gradient_accumulation_steps

    def __iter__(self) -> Iterator[list[int]]:
        size, micro_steps = self.cfg.batch_size, self.cfg.gradient_accumulation_steps
        for micro in range(self.steps.start * micro_steps, self.steps.stop * micro_steps):
            first = (micro * self.world_size + self.rank) * size
            yield list(range(first, first + size))


class PlacedBatches:
    """Micro-batches of (stream, row), for micro-batches of positions.

    Worked out for many micro-batches at a time: numpy takes hardly longer for a block than for one.
    """

    def __init__(self, positions: RankPositions, order: RowOrder, block: int = 256):
        self.positions, self.order, self.block = positions, order, block

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        batches = iter(self.positions)
        while block := list(itertools.islice(batches, self.block)):
            places = zip(*(part.tolist() for part in self.order(np.concatenate(block))), strict=True)
            for batch in block:
                yield list(itertools.islice(places, len(batch)))


def keep(batch: torch.Tensor) -> torch.Tensor:
    """Collate nothing: the data set hands out whole batches."""
    return batch


def row_order(cfg: TrainConfig, corpus: Corpus) -> RowOrder:
    """The order in which a run reads its corpus."""
    counts = list(cfg.mix_counts.values()) or [MIX_WINDOW]
    return RowOrder(stream_rows(corpus.streams, cfg.max_seq_length), counts, cfg.seed)


def stream_epochs(cfg: TrainConfig, corpus: Corpus, tokens: int) -> dict[str, float]:
    """How many times a run of ``tokens`` tokens reads each stream of the corpus."""
    order = row_order(cfg, corpus)
    read = tokens / cfg.max_seq_length / sum(order.counts)
    names = cfg.mix_counts or ["all"]
    return {name: read * count / rows for name, count, rows in zip(names, order.counts, order.rows, strict=True)}


def make_loader(cfg: TrainConfig, corpus: Corpus, positions: RankPositions) -> torch.utils.data.DataLoader:
    """Batches of rows in pinned memory, read ahead of the step by ``num_workers`` processes."""
    return torch.utils.data.DataLoader(
        PackedRows(corpus.streams, cfg.max_seq_length),
        batch_sampler=PlacedBatches(positions, row_order(cfg, corpus)),
        collate_fn=keep,
        num_workers=cfg.num_workers,
        prefetch_factor=4 if cfg.num_workers else None,
        pin_memory=cfg.device == "cuda",
    )


# ======================================================================================
# Model and optimizer
# ======================================================================================


def causal_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    """Causal attention of packed rows through SDPA, without a mask tensor.

    Takes (batch, heads, tokens, head size) and returns (batch, tokens, heads, head size).  Under
    torch.compile transformers builds an explicit mask for its own "sdpa", and with a mask the
    flash and cuDNN kernels are out of reach.
    """
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        dropout_p=options.get("dropout") or 0.0,
        is_causal=True,
        scale=options.get("scaling"),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2).contiguous(), None


ATTENTION_NAME = "packed_causal"


def choose_attention(config: Any, cfg: TrainConfig) -> str:
    """Name of the attention implementation for a model: ours where plain causal attention is all it needs.

    Raises:
        EnvironmentProblem: FlashAttention-3 was asked for and isn't installed.
    """
    from transformers import AttentionInterface

    if cfg.attention == "flash3":
        from transformers.utils import is_flash_attn_3_available

        if not is_flash_attn_3_available():
            raise EnvironmentProblem("--attention flash3: FlashAttention-3가 없습니다. --attention auto 를 쓰세요")
        return "flash_attention_3"
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    special = getattr(config, "sliding_window", None) or getattr(config, "attn_logit_softcapping", None)
    if special or layer_types != {"full_attention"}:
        logger.info("⚠️  이 모델은 특별한 어텐션을 써서 transformers의 기본 구현으로 학습합니다")
        return "sdpa"
    AttentionInterface.register(ATTENTION_NAME, causal_attention)
    return ATTENTION_NAME


def attention_kernels(cfg: TrainConfig) -> Any:
    """Context in which SDPA tries its kernels in our order: cuDNN first on Hopper, where it is the fastest."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    named = {
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }
    if cfg.attention in named:
        return sdpa_kernel([named[cfg.attention]])
    if cfg.device == "cpu":
        return nullcontext()
    hopper = torch.cuda.get_device_capability()[0] >= 9
    order = ["cudnn", "flash", "efficient", "math"] if hopper else ["flash", "efficient", "cudnn", "math"]
    return sdpa_kernel([named[name] for name in order], set_priority=True)


def attention_backend(model: nn.Module, cfg: TrainConfig, device: torch.device) -> str:
    """Find out which kernel attention really runs for this run's shapes, by running it once."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "attention" in str(func) or "softmax" in str(func):
                seen.append(str(func))
            return func(*args, **(kwargs or {}))

    config = model.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(cfg.precision, torch.float32)
    shape = (cfg.batch_size, config.num_attention_heads, cfg.max_seq_length, head)
    part = torch.zeros(shape, dtype=dtype, device=device, requires_grad=True)
    with Watch():
        F.scaled_dot_product_attention(part, part, part, is_causal=True)
    text = " ".join(seen)
    names = {"cudnn": "cuDNN", "flash_attention_for_cpu": "flash (CPU)", "flash": "flash", "efficient": "efficient"}
    return next((name for part_name, name in names.items() if part_name in text), "math")


def model_settings(cfg: TrainConfig, tokenizer: Any) -> Any:
    """Configuration of the model to build: a preset's, or the one that ``--model-config`` names.

    ``pad_token_id`` stays unset: an Embedding doesn't train its padding row, and here the padding
    token is the end-of-text token.
    """
    from transformers import AutoConfig, LlamaConfig

    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    vocab_size = -(-len(tokenizer) // 128) * 128
    if cfg.model_config:
        config = AutoConfig.from_pretrained(cfg.model_config, trust_remote_code=False)
        for name, value in {**special, "pad_token_id": None, "vocab_size": vocab_size}.items():
            setattr(config.get_text_config(), name, value)
        return config
    preset = PRESETS[cfg.model_size]
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=preset.hidden,
        intermediate_size=preset.mlp,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.hidden // preset.head,
        max_position_embeddings=cfg.max_seq_length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        **special,
    )


def build_model(cfg: TrainConfig, tokenizer: Any, device: torch.device | str = "cpu") -> nn.Module:
    """Build the decoder with fp32 weights on ``device``; the same weights on every rank.

    Weights are normal with deviation 0.02; the projections that write into the residual stream are
    smaller by sqrt(2 * layers), so that its variance doesn't grow with depth (Radford et al., 2019).
    """
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    if cfg.init_from:
        path = checkpoint_dir(Path(cfg.init_from).expanduser())
        model = AutoModelForCausalLM.from_pretrained(
            path if path.exists() else cfg.init_from, dtype=torch.float32, trust_remote_code=False
        ).to(device)
        fit_vocabulary(model, tokenizer)
    else:
        set_seed(cfg.seed)
        config = model_settings(cfg, tokenizer)
        with torch.device(device):
            if cfg.model_config:
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
            else:
                model = LlamaForCausalLM(config)
                shrink_residual_projections(model)
    model.set_attn_implementation(choose_attention(model.config, cfg))
    if cfg.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def shrink_residual_projections(model: nn.Module) -> None:
    """Scale the projections into the residual stream by 1 / sqrt(2 * layers)."""
    factor = (2 * model.config.num_hidden_layers) ** -0.5
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(factor)


def fit_vocabulary(model: nn.Module, tokenizer: Any) -> None:
    """Refuse weights whose vocabulary is smaller than the tokenizer's.

    Raises:
        ValueError: with both sizes.
    """
    have = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > have:
        raise ValueError(
            f"--tokenizer의 어휘 {len(tokenizer):,}개가 --init-from 모델의 {have:,}개보다 큽니다. "
            "모델의 토크나이저를 쓰세요"
        )


class CausalLoss(nn.Module):
    """A causal language model with its loss on packed rows.

    ``forward`` takes rows (batch, tokens + 1): inputs and targets are the same rows, one apart, so
    nothing is shifted or copied.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, rows: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        """Return the cross entropy in nats: its mean, or with "none" one a target (batch * tokens)."""
        logits = self.model(input_ids=rows[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten(), reduction=reduction)


def build_optimizer(model: nn.Module, cfg: TrainConfig) -> torch.optim.Optimizer:
    """Fused AdamW; weight decay on matrices only, not on norms and biases."""
    matrices = [weight for weight in model.parameters() if weight.requires_grad and weight.dim() >= 2]
    others = [weight for weight in model.parameters() if weight.requires_grad and weight.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": cfg.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=cfg.learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True
    )


def learning_rate_at(step: int, total: int, cfg: TrainConfig) -> float:
    """Learning rate of the ``step``-th of ``total`` steps, counted from 0.

    A linear rise over ``warmup_ratio`` of the steps, then the schedule: half a cosine or a line
    down to zero, a constant, or "wsd", constant with a line to zero over the last fifth.
    """
    warmup = math.ceil(cfg.warmup_ratio * total)
    if step < warmup:
        return cfg.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    factor = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "wsd": min(1.0, (1 - progress) / 0.2),
        "constant": 1.0,
    }[cfg.lr_schedule]
    return cfg.learning_rate * factor


# ======================================================================================
# The run and its state
# ======================================================================================


@dataclass
class TrainState:
    """How far a run has come; all of it is saved, and comes back with ``--resume``."""

    step: int = 0
    tokens_seen: int = 0
    elapsed_seconds: float = 0.0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    loss: float | None = None
    loss_window: list[float] = field(default_factory=list)  # of the steps since the last line of the log
    evaluation: dict[str, float] = field(default_factory=dict)
    evaluation_step: int | None = None


@dataclass
class Run:
    """What a run works with; fixed once it has started."""

    cfg: TrainConfig
    accelerator: Accelerator
    corpus: Corpus
    causal_loss: CausalLoss  # the model with its loss, as it was built
    model: nn.Module  # the same, wrapped for training
    optimizer: Any
    total_steps: int
    stop: StopFlag
    backend: str  # of attention, as it really runs
    save_seconds: float = 0.0  # how long the last one took; before the first, what is known of it
    evaluation_seconds: float | None = None

    @property
    def decoder(self) -> nn.Module:
        """The bare transformers model."""
        return self.causal_loss.model

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes and speaks."""
        return self.accelerator.is_main_process

    @property
    def step_tokens(self) -> int:
        """Tokens of a step over all ranks."""
        return self.cfg.tokens_per_step(self.accelerator.num_processes)


# ======================================================================================
# Checkpoints: Hugging Face models with a training state beside them
# ======================================================================================


def versions() -> dict[str, str]:
    """Versions of what a run is made of."""
    return {"python": sys.version.split()[0], **{name: importlib.metadata.version(name) for name in MINIMUM_VERSIONS}}


def git_commit() -> str | None:
    """Commit of this script's checkout, with a plus where it was changed; None outside of one."""
    command = ["git", "-C", str(SCRIPT_DIR), "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def now() -> str:
    """The time with its zone, as metadata carries it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def options_of(cfg: TrainConfig) -> dict[str, Any]:
    """All options in a form that JSON holds."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(cfg).items()}


def write_model(folder: Path, run: Run) -> None:
    """Write weights, configuration and tokenizer as a Hugging Face model."""
    from transformers import GenerationConfig

    decoder, tokenizer = run.decoder, run.corpus.tokenizer
    weights = {name: value.cpu() for name, value in shared_once(decoder.state_dict()).items()}
    torch.save(weights, folder / "pytorch_model.bin")
    config = decoder.config.to_dict()
    config.update(use_cache=True, architectures=[type(decoder).__name__], dtype="float32")
    type(decoder.config).from_dict(config).save_pretrained(folder)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    GenerationConfig(
        **ids, pad_token_id=tokenizer.pad_token_id, do_sample=True, temperature=0.8, top_p=0.95
    ).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def shared_once(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give tied weights one tensor object, so that they are moved and written once."""
    first: dict[tuple, torch.Tensor] = {}
    return {
        name: first.setdefault((value.data_ptr(), value.shape) if value.numel() else name, value)
        for name, value in weights.items()
    }


@contextmanager
def whole_directory(folder: Path) -> Iterator[Path]:
    """Give a temporary sibling to write into; on success it is flushed and gets its name at once."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    sync_tree(temporary)
    if folder.exists():  # the same step again, after a resume from an earlier one
        shutil.rmtree(folder)
    os.rename(temporary, folder)
    descriptor = os.open(folder.parent, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def save_initial_model(run: Run) -> None:
    """Write the untrained model to ``initial_model/`` with ``model_info.json``."""
    folder = run.cfg.output_dir / "initial_model"
    begun = time.monotonic()
    if run.is_main:
        logger.info("🚀 초기 모델 저장 중...")
        with whole_directory(folder) as temporary:
            write_model(temporary, run)
            write_json(temporary / "model_info.json", model_info(run))
        logger.info(f"✅ 초기 모델 저장 완료: {display_path(folder)}")
    run.accelerator.wait_for_everyone()
    run.save_seconds = 3 * (time.monotonic() - begun)  # a checkpoint holds two Adam moments besides


def model_info(run: Run) -> dict[str, Any]:
    """Content of ``model_info.json``."""
    decoder, tokenizer = run.decoder, run.corpus.tokenizer
    weights = list(decoder.parameters())
    return {
        "parameters": {
            "total": sum(weight.numel() for weight in weights),
            "trainable": sum(weight.numel() for weight in weights if weight.requires_grad),
            "embedding": decoder.get_input_embeddings().weight.numel(),
        },
        "architecture": type(decoder).__name__,
        "model_size": None if run.cfg.model_config or run.cfg.init_from else run.cfg.model_size,
        "dtype": "float32",
        "vocab_size": decoder.get_input_embeddings().weight.shape[0],
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "created": now(),
        "versions": versions(),
    }


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of everything that decides how text becomes tokens."""
    return hashlib.blake2b(tokenizer.backend_tokenizer.to_str().encode(), digest_size=12).hexdigest()


def training_info(run: Run, state: TrainState) -> dict[str, Any]:
    """Content of ``training_info.json``."""
    world_size = run.accelerator.num_processes
    rows = run.corpus.rows(run.cfg.max_seq_length)
    return {
        "step": state.step,
        "total_steps": run.total_steps,
        "epoch": state.tokens_seen / (rows * run.cfg.max_seq_length),
        "stream_epochs": stream_epochs(run.cfg, run.corpus, state.tokens_seen),
        "tokens_seen": state.tokens_seen,
        "loss": state.loss,
        **state.evaluation,
        "evaluation_step": state.evaluation_step,
        "learning_rate": learning_rate_at(max(0, state.step - 1), run.total_steps, run.cfg),
        "elapsed_seconds": state.elapsed_seconds,
        "tokens_per_second": state.tokens_seen / state.elapsed_seconds if state.elapsed_seconds else None,
        "skipped_steps": state.skipped_steps,
        "world_size": world_size,
        "mode": run.cfg.mode,
        "data_fingerprint": run.corpus.report["fingerprint"],
        "tokenizer_fingerprint": tokenizer_fingerprint(run.corpus.tokenizer),
        "corpus": run.corpus.report,
        "options": options_of(run.cfg),
        "attention_backend": run.backend,
        "versions": versions(),
        "git_commit": git_commit(),
        "created": now(),
    }


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """States of the generators that a model with dropout draws from on this rank."""
    found = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def save_checkpoint(run: Run, state: TrainState) -> None:
    """Write ``checkpoint-STEP``: whole or not there at all, also when killed while writing."""
    folder = run.cfg.output_dir / f"checkpoint-{state.step}"
    device = run.accelerator.device
    begun = time.monotonic()
    generators = [None] * run.accelerator.num_processes
    if dist.is_initialized():
        dist.all_gather_object(generators, rng_state(device))
    else:
        generators = [rng_state(device)]
    if run.is_main:
        logger.info(f"💾 체크포인트 저장 중... (스텝 {state.step:,})")
        with whole_directory(folder) as temporary:
            write_model(temporary, run)
            write_json(temporary / "training_info.json", training_info(run, state))
            (temporary / "training_state").mkdir()
            content = {
                "optimizer": run.optimizer.state_dict(),
                "scaler": run.accelerator.scaler.state_dict() if run.accelerator.scaler else None,
                "generators": generators,
                "progress": asdict(state),
            }
            torch.save(content, temporary / "training_state" / "state.pt")
        remove_old_checkpoints(run.cfg)
        logger.info(f"✅ 체크포인트 저장 완료: {display_path(folder)} ({time.monotonic() - begun:.1f}초)")
    run.accelerator.wait_for_everyone()
    run.save_seconds = time.monotonic() - begun


def remove_old_checkpoints(cfg: TrainConfig) -> None:
    """Keep the training state in the newest two checkpoints; remove whole ones past ``save_total_limit``."""
    found = list_checkpoints(cfg.output_dir)
    if cfg.save_total_limit is not None:
        for path in found[: -cfg.save_total_limit]:
            shutil.rmtree(path)
    for path in found[:-2]:
        shutil.rmtree(path / "training_state", ignore_errors=True)


def load_checkpoint(run: Run, folder: Path) -> TrainState:
    """Bring model, optimizer, scaler and generators back to where a checkpoint was written.

    Raises:
        EnvironmentProblem: the run it belongs to read other data or had another number of tokens a step.
    """
    info = read_json(folder / "training_info.json")
    problems = resume_problems(run.cfg, run.accelerator.num_processes, info, run.corpus.report["fingerprint"])
    if problems:
        raise EnvironmentProblem(problems)
    weights = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    run.decoder.load_state_dict(weights)
    content = torch.load(folder / "training_state" / "state.pt", map_location="cpu", weights_only=True)
    decay = [group["weight_decay"] for group in run.optimizer.param_groups]
    run.optimizer.load_state_dict(content["optimizer"])
    for group, value in zip(run.optimizer.param_groups, decay, strict=True):
        group["weight_decay"] = value  # this run's option, not the saved one
    if run.accelerator.scaler and content["scaler"]:
        run.accelerator.scaler.load_state_dict(content["scaler"])
    rank = run.accelerator.process_index
    if rank < len(content["generators"]):
        torch.set_rng_state(content["generators"][rank]["cpu"])
        if "cuda" in content["generators"][rank] and run.cfg.device == "cuda":
            torch.cuda.set_rng_state(content["generators"][rank]["cuda"], run.accelerator.device)
    state = TrainState(**content["progress"])
    logger.info(f"🔁 이어서 학습: {display_path(folder)} (스텝 {state.step:,}부터)")
    if info["total_steps"] != run.total_steps:
        logger.info(
            f"⚠️  전체 스텝: {info['total_steps']:,} → {run.total_steps:,}. 학습률을 새 길이에 맞춰 다시 계산합니다"
        )
    changed = changed_options(info["options"], options_of(run.cfg))
    if changed:
        logger.info(f"⚠️  바뀐 옵션: {', '.join(changed)}")
    return state


FREE_TO_CHANGE = {"resume", "output_dir", "logs_dir", "cache_dir", "verbose", "dataset_path", "num_workers"}


def changed_options(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Name what differs between two sets of options and matters to the result."""
    names = sorted(set(before) & set(after) - FREE_TO_CHANGE)
    return [f"{name} {before[name]} → {after[name]}" for name in names if before[name] != after[name]]


# ======================================================================================
# Metrics
# ======================================================================================

# Dense BF16 TFLOP/s as the makers publish them; the first name that occurs in the GPU's decides.
PEAK_TFLOPS = {"H100 PCIe": 756, "H100 NVL": 835, "H200": 989, "H100": 989, "A100": 312, "L40S": 362}


def peak_flops(device: torch.device) -> float | None:
    """Peak FLOP/s of a GPU; None where it isn't known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((value * 1e12 for part, value in PEAK_TFLOPS.items() if part in name), None)


def flops_per_token(decoder: nn.Module, max_seq_length: int) -> float:
    """Training FLOPs of a token: 6 N + 12 layers hidden T, N without an untied input embedding.

    Source: Chowdhery et al., "PaLM" (2022), appendix B.
    """
    config = decoder.config.get_text_config()
    parameters = sum(weight.numel() for weight in decoder.parameters())
    if not config.tie_word_embeddings:
        parameters -= decoder.get_input_embeddings().weight.numel()
    return 6 * parameters + 12 * config.num_hidden_layers * config.hidden_size * max_seq_length


class StatsReader:
    """Adds up each step's figures over the ranks and reads them one step late.

    Reading a tensor of the step that was just launched would make the host wait for the GPU; the
    one before is there already.  So all ranks also see a stop request at the same step.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.waiting: deque = deque()
        self.pinned = [torch.zeros(4, pin_memory=True) for _ in range(2)] if device.type == "cuda" else None

    def push(self, step: int, stats: torch.Tensor) -> tuple[int, float, list[float]] | None:
        """Hand in a step's figures (4 float32 on the device); returns the step before it, if any.

        A step is returned as its number, the time at which it was handed in, and its figures.
        """
        work = dist.all_reduce(stats, async_op=True) if dist.is_initialized() else None
        event = None
        if self.pinned:
            if work:
                work.wait()  # orders the streams; the host goes on
            host = self.pinned[step % 2]
            host.copy_(stats, non_blocking=True)
            stats, work, event = host, None, torch.cuda.Event()
            event.record()
        self.waiting.append((step, time.monotonic(), stats, work, event))
        return self.pop() if len(self.waiting) > 1 else None

    def pop(self) -> tuple[int, float, list[float]] | None:
        """Wait for the oldest step's figures and return them; None if none is waiting."""
        if not self.waiting:
            return None
        step, moment, stats, work, event = self.waiting.popleft()
        if work:
            work.wait()
        if event:
            event.synchronize()
        return step, moment, stats.tolist()


class StepLog:
    """Turns the figures of a step into the console's line and a line of ``metrics.jsonl``."""

    def __init__(self, run: Run, state: TrainState):
        self.run, self.state = run, state
        self.peak = peak_flops(run.accelerator.device)
        self.flops = flops_per_token(run.decoder, run.cfg.max_seq_length)
        self.path = run.cfg.output_dir / "metrics.jsonl"
        self.first_step = self.marked_step = state.step
        self.marked = time.monotonic()
        self.begun = self.marked - state.elapsed_seconds
        self.paused = self.all_paused = 0.0

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave evaluation and saving out of the speed."""
        start = time.monotonic()
        yield
        self.paused += time.monotonic() - start
        self.all_paused += time.monotonic() - start

    def handle(self, step: int, moment: float, loss: float, grad_norm: float) -> None:
        """Note a step that was launched by ``moment``; write a line every ``logging_steps``, the first and the last.

        The line's loss is the mean over the steps since the last line.
        """
        run, state = self.run, self.state
        logger.debug(f"step {step}: loss {loss:.6f}, grad_norm {grad_norm:.4f}, memory {memory_gb(run):.2f} GB")
        state.loss_window.append(loss)
        if step % run.cfg.logging_steps and step not in (1, run.total_steps):
            return
        speed = (step - self.marked_step) * run.step_tokens / (moment - self.marked - self.paused)
        self.marked, self.marked_step, self.paused = moment, step, 0.0
        record = {
            "step": step,
            "loss": sum(state.loss_window) / len(state.loss_window),
            "learning_rate": learning_rate_at(step - 1, run.total_steps, run.cfg),
            "grad_norm": grad_norm,
            "tokens_per_second": speed,
            "mfu": speed * self.flops / (self.peak * run.accelerator.num_processes) if self.peak else None,
            "memory_gb": memory_gb(run),
            "seconds": moment - self.begun,
        }
        state.loss_window.clear()
        self.write(record)
        logger.info(self.line(record))

    def line(self, record: dict[str, Any]) -> str:
        """The console's line for a record; the time left allows for evaluations and saves as they have been."""
        step, speed = record["step"], record["tokens_per_second"]
        pauses = self.all_paused / max(1, step - self.first_step)
        left = (self.run.total_steps - step) * (self.run.step_tokens / speed + pauses)
        mfu = f"{record['mfu']:.1%}" if self.peak else "-"
        return (
            f"스텝 {step:,}/{self.run.total_steps:,} | 손실 {record['loss']:.4f} | "
            f"학습률 {record['learning_rate']:.2e} | 기울기 {record['grad_norm']:.3f} | {speed:,.0f} 토큰/s | "
            f"MFU {mfu} | 메모리 {record['memory_gb']:.1f} GB | 남은 시간 {format_duration(left)}"
        )

    def write(self, record: dict[str, Any]) -> None:
        """Append a line to ``metrics.jsonl``."""
        if self.run.is_main:
            with open(self.path, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(known_numbers(record)) + "\n")


def memory_gb(run: Run) -> float:
    """Memory of this rank in GB: the peak on a GPU, what the process holds now on a CPU."""
    if run.cfg.device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9


def set_aside_later_checkpoints(output_dir: Path, step: int) -> None:
    """Rename the checkpoints after ``step``: the run that goes on from there will write its own."""
    for path in list_checkpoints(output_dir):
        if checkpoint_step(path) > step:
            aside = path.with_name(f"{path.name}.before-{time.strftime('%Y%m%d-%H%M%S')}")
            path.rename(aside)
            logger.info(f"⚠️  스텝 {step:,} 뒤의 체크포인트를 옮겨 두었습니다: {display_path(aside)}")


def cut_metrics(path: Path, step: int) -> None:
    """Drop the lines of steps after ``step``: a resumed run writes them again."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


# ======================================================================================
# Evaluation
# ======================================================================================


def evaluation_rows(corpus: Corpus, max_seq_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pack the held-out documents, up to 2 M tokens of whole ones, into rows as in training.

    Returns rows (n, max_seq_length + 1) int64; for each target the language of its document, or -1
    for what fills up the last row (n, max_seq_length) int64; and the bytes of text by language.
    """
    ends = corpus.val_offsets
    count = max(1, int(np.searchsorted(ends, MOST_EVALUATION_TOKENS, "right")) - 1)
    count = min(count, len(ends) - 1)
    stream = np.asarray(corpus.val[: ends[count]], np.int64)
    lengths = np.diff(ends[: count + 1])
    languages = np.repeat(corpus.val_languages[:count].astype(np.int64), lengths)
    names = len(corpus.report["languages"])
    text_bytes = np.bincount(corpus.val_languages[:count], corpus.val_bytes[:count], minlength=names)
    rows = -(-len(languages) // max_seq_length)
    filled = np.full(rows * max_seq_length + 1, stream[0])
    filled[: len(stream)] = stream
    tags = np.full(rows * max_seq_length, -1)
    tags[: len(languages)] = languages
    windows = np.lib.stride_tricks.sliding_window_view(filled, max_seq_length + 1)[::max_seq_length]
    return windows, tags.reshape(rows, max_seq_length), text_bytes


@torch.no_grad()
def evaluate(run: Run) -> dict[str, float]:
    """Loss and bits per byte on the held-out documents: of all, and of Korean and English apart.

    The loss is the mean over all targets in nats.  Bits per byte count the text and not the
    end-of-text tokens, so they compare across tokenizers.
    """
    rows, tags, text_bytes = evaluation_rows(run.corpus, run.cfg.max_seq_length)
    size, world_size, rank = run.cfg.batch_size, run.accelerator.num_processes, run.accelerator.process_index
    names = run.corpus.report["languages"]
    sums = torch.zeros(3, len(names) + 1, dtype=torch.float64, device=run.accelerator.device)
    end_of_text = run.corpus.tokenizer.eos_token_id
    run.causal_loss.eval()
    for first in range(rank * size, len(rows), world_size * size):
        missing = max(0, first + size - len(rows))  # one shape for every batch: nothing recompiles
        batch = np.pad(rows[first : first + size], ((0, missing), (0, 0)), mode="edge")
        tag = np.pad(tags[first : first + size], ((0, missing), (0, 0)), constant_values=-1)
        batch = torch.from_numpy(batch).to(sums.device)
        tag = torch.from_numpy(tag).to(sums.device).flatten() + 1  # column 0 takes the filling
        loss = run.causal_loss(batch, reduction="none").double()
        is_text = (batch[:, 1:].flatten() != end_of_text).double()
        for line, value in zip(sums, (loss, torch.ones_like(loss), loss * is_text), strict=True):
            line.index_add_(0, tag, value)
    run.causal_loss.train()
    if dist.is_initialized():
        dist.all_reduce(sums)
    return evaluation_figures(sums[:, 1:].cpu().numpy(), text_bytes, names)


def evaluation_figures(sums: np.ndarray, text_bytes: np.ndarray, names: list[str]) -> dict[str, float]:
    """Turn sums by language (loss, targets, loss of text) into losses and bits per byte."""
    figures = {}
    for suffix, chosen in (("", range(len(names))), ("_ko", ["ko"]), ("_en", ["en"])):
        columns = [
            names.index(name) if isinstance(name, str) else name for name in chosen if name in names or suffix == ""
        ]
        loss, targets, text_loss = sums[:, columns].sum(axis=1)
        size = text_bytes[columns].sum()
        figures[f"val_loss{suffix}"] = float(loss / targets) if targets else None
        figures[f"val_bits_per_byte{suffix}"] = float(text_loss / math.log(2) / size) if size else None
    return figures


def evaluate_and_log(run: Run, state: TrainState, log: StepLog) -> None:
    """Evaluate, say so, and keep the figures."""
    if len(run.corpus.val_offsets) < 2:
        return
    start = time.monotonic()
    logger.info(f"📈 검증 중... (스텝 {state.step:,})")
    state.evaluation, state.evaluation_step = evaluate(run), state.step
    run.evaluation_seconds = time.monotonic() - start
    log.write({"step": state.step, **state.evaluation})
    parts = []
    for suffix, name in (("", "전체"), ("_ko", "ko"), ("_en", "en")):
        if state.evaluation[f"val_loss{suffix}"] is not None:
            loss, bits = state.evaluation[f"val_loss{suffix}"], state.evaluation[f"val_bits_per_byte{suffix}"]
            parts.append(f"{name} 손실 {loss:.4f}, bits/byte {bits:.4f}")
    logger.info(f"📈 검증 (스텝 {state.step:,}): {' | '.join(parts)} ({run.evaluation_seconds:.1f}초)")


# ======================================================================================
# Loop
# ======================================================================================


def train_step(run: Run, batches: Iterator[torch.Tensor], learning_rate: float) -> torch.Tensor:
    """One optimizer step: accumulate, clip, step; the host never waits for the device.

    A gradient that isn't finite skips the update on the device: fused AdamW reads ``found_inf``
    itself, and under FP16 the scaler sees to it.  Returns four float32 on the device, to be added up
    over the ranks: the loss and the gradient norm, each divided by the number of ranks, whether the
    step was skipped, likewise, and the requests to stop.
    """
    accelerator, cfg = run.accelerator, run.cfg
    total = torch.zeros((), device=accelerator.device)
    for micro_step in range(cfg.gradient_accumulation_steps):
        rows = next(batches).to(accelerator.device, non_blocking=True)
        last = micro_step == cfg.gradient_accumulation_steps - 1
        with nullcontext() if last else accelerator.no_sync(run.model):
            loss = run.model(rows) / cfg.gradient_accumulation_steps
            accelerator.backward(loss)
        total += loss.detach()
    grad_norm = accelerator.clip_grad_norm_(run.decoder.parameters(), cfg.max_grad_norm)
    skipped = ~torch.isfinite(grad_norm)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate
    if accelerator.scaler is None:
        run.optimizer.optimizer.found_inf = skipped.float()
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    asked = torch.full((), float(run.stop.is_set()), device=accelerator.device)
    shares = torch.stack([total, grad_norm.float(), skipped.float()]) / accelerator.num_processes
    return torch.cat([shares, asked[None]])


def note_step(run: Run, state: TrainState, log: StepLog, read: tuple[int, float, list[float]] | None) -> bool:
    """Take in the figures of a step that has ended on every rank; returns whether to stop.

    Raises:
        RuntimeError: five steps in a row gave no finite gradient.
    """
    if read is None:
        return False
    step, moment, (loss, grad_norm, skipped, asked) = read
    state.loss = loss
    if skipped:
        state.skipped_steps += 1
        state.skipped_in_a_row += 1
        logger.warning(
            f"⚠️  스텝 {step:,}: 기울기가 유한하지 않아 이 스텝의 갱신을 건너뜁니다 (모두 {state.skipped_steps}번)"
        )
    else:
        state.skipped_in_a_row = 0
    if state.skipped_in_a_row >= 5 and run.accelerator.scaler is None:
        last = list_checkpoints(run.cfg.output_dir)
        raise RuntimeError(
            "다섯 스텝 연속으로 기울기가 유한하지 않아(NaN/Inf) 학습을 중단합니다. 학습률을 낮춰 보세요. "
            f"마지막 체크포인트: {display_path(last[-1]) if last else '없음'}"
        )
    log.handle(step, moment, loss, grad_norm)
    return bool(asked)


def process_age() -> float:
    """Seconds since this process was started, imports and all."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return uptime - ticks / os.sysconf("SC_CLK_TCK")


def set_deadline(run: Run, step_seconds: float) -> None:
    """Tell the stop flag when to stop, so that ``--max-hours`` has room for two steps, an evaluation and a save.

    Before the first evaluation its length is estimated from its tokens: a forward pass is a third of
    a step.  Rank 0 decides for all.
    """
    if run.cfg.max_hours is None or not run.is_main:
        return
    evaluation = run.evaluation_seconds
    if evaluation is None:
        evaluation = 0.5 * step_seconds * min(len(run.corpus.val), MOST_EVALUATION_TOKENS) / run.step_tokens
    reserve = 2 * step_seconds + evaluation + 1.5 * run.save_seconds + 5
    run.stop.deadline = time.monotonic() - process_age() + run.cfg.max_hours * 3600 - reserve


def train(run: Run, state: TrainState) -> str:
    """Train to the end or until asked to stop; returns the state in which the run ended."""
    cfg, accelerator = run.cfg, run.accelerator
    steps = range(state.step, run.total_steps)
    positions = RankPositions(cfg, accelerator.process_index, accelerator.num_processes, steps)
    batches = iter(make_loader(cfg, run.corpus, positions))
    reader, log = StatsReader(accelerator.device), StepLog(run, state)
    stopping = False
    while state.step < run.total_steps and not stopping:
        step_start = time.monotonic()
        stats = train_step(run, batches, learning_rate_at(state.step, run.total_steps, cfg))
        state.step += 1
        state.tokens_seen += run.step_tokens
        state.elapsed_seconds = time.monotonic() - log.begun
        stopping = note_step(run, state, log, reader.push(state.step, stats))
        set_deadline(run, time.monotonic() - step_start)
        last = state.step == run.total_steps
        evaluates, saves = last or state.step % cfg.eval_steps == 0, last or state.step % cfg.save_steps == 0
        if stopping or evaluates or saves:
            stopping = note_step(run, state, log, reader.pop()) or stopping
            with log.pause():
                if evaluates and (last or not stopping):
                    evaluate_and_log(run, state, log)
                if saves or stopping:
                    save_checkpoint(run, state)
        if state.step % 500 == 0:
            gc.collect()
    return "finished" if state.step >= run.total_steps else "stopped"


# ======================================================================================
# main
# ======================================================================================


def detect_device(cfg: TrainConfig) -> str:
    """The device that this process will use.

    Raises:
        EnvironmentProblem: CUDA was asked for, or a training run started, where there is none.
    """
    if cfg.device == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if cfg.device == "cuda" or not cfg.is_test:
        raise EnvironmentProblem("GPU를 찾을 수 없습니다. CPU로 학습하려면 --device cpu 를 쓰세요")
    return "cpu"


def set_up_config(argv: list[str]) -> tuple[TrainConfig, list[str]]:
    """Read, complete and check the options on this machine.

    Raises:
        UsageProblem: the options can't be used together.
        EnvironmentProblem: what they ask for isn't there.
    """
    cfg = parse_args(argv)
    cfg, notes = resolve_config(cfg, detect_device(cfg))
    problems = validate_config(cfg) + cpu_problems(cfg)
    if problems:
        raise UsageProblem(problems)
    return cfg, notes


def claim_output(cfg: TrainConfig) -> Any:
    """Take the output directory for this run and clear what an earlier test left there; rank 0 only.

    Returns the open lock file, which has to be kept: the kernel lets go of it however we end.

    Raises:
        EnvironmentProblem: another run works there, or an earlier training run's results are there.
    """
    problems = plan_problems(cfg, rank_and_world()[1])
    if problems:
        raise EnvironmentProblem(problems)
    cfg.output_dir.mkdir(parents=True, exist_ok=True)
    lock = open(cfg.output_dir / ".lock", "a")  # noqa: SIM115 - held until the process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise EnvironmentProblem(f"이 출력 디렉토리에서 다른 학습이 실행 중입니다: {cfg.output_dir}") from None
    lock.truncate(0)
    lock.write(os.environ.get("RUN_ID", str(os.getpid())).partition("-")[0])
    lock.flush()
    for torn in cfg.output_dir.glob(".*.tmp"):
        shutil.rmtree(torn) if torn.is_dir() else torn.unlink()
    if cfg.resume is None:
        for path in [*list_checkpoints(cfg.output_dir), cfg.output_dir / "initial_model"]:
            shutil.rmtree(path, ignore_errors=True)
        for name in ("metrics.jsonl", "run_info.json"):
            (cfg.output_dir / name).unlink(missing_ok=True)
    link = cfg.output_dir / "training.log"
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(cfg.logs_dir / "training_console.log", cfg.output_dir))
    return lock


def write_run_info(cfg: TrainConfig, world_size: int, **more: Any) -> None:
    """Write or complete ``run_info.json``: what runs, on what, and how it stands."""
    path = cfg.output_dir / "run_info.json"
    info = read_json(path)
    if more.get("state") == "running":
        info = {
            **({name: info[name] for name in ("step", "total_steps") if name in info} if cfg.resume else {}),
            "mode": cfg.mode,
            "options": options_of(cfg),
            "command": [sys.executable, *sys.argv],
            "world_size": world_size,
            "machine": {
                "host": os.uname().nodename,
                "cpus": os.cpu_count(),
                "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
            },
            "versions": versions(),
            "git_commit": git_commit(),
            "started": now(),
            "run_id": os.environ.get("RUN_ID"),
        }
    write_json(path, {**info, **more})


def build_run(cfg: TrainConfig, corpus: Corpus, stop: StopFlag) -> Run:
    """Create the process group, the model and the optimizer, and wrap them for training.

    Raises:
        RuntimeError: the corpus is smaller than one global batch, or a stream than one row.
    """
    accelerator = build_accelerator(cfg)
    world_size = accelerator.num_processes
    steps = total_steps(cfg, corpus.rows(cfg.max_seq_length), world_size)
    if steps == 0 or corpus.rows(cfg.max_seq_length) == 0:
        raise RuntimeError(
            f"말뭉치({corpus.report['train_tokens']:,} 토큰)가 한 스텝({cfg.tokens_per_step(world_size):,} 토큰)보다 "
            "작습니다. --batch-size, --max-seq-length, --gradient-accumulation-steps 를 줄이세요"
        )
    for name, rows in zip(cfg.mix_counts, stream_rows(corpus.streams, cfg.max_seq_length), strict=False):
        if not rows:
            raise RuntimeError(
                f"--mix: '{name}' 문서가 한 행({cfg.max_seq_length:,} 토큰)보다 적습니다. 빼거나 더하세요"
            )
    decoder = build_model(cfg, corpus.tokenizer, accelerator.device)
    causal_loss = CausalLoss(decoder)
    if cfg.compile:
        causal_loss.compile()
    optimizer = build_optimizer(decoder, cfg)
    model, optimizer = accelerator.prepare(causal_loss, optimizer)
    backend = attention_backend(decoder, cfg, accelerator.device)
    return Run(cfg, accelerator, corpus, causal_loss, model, optimizer, steps, stop, backend)


def log_start(run: Run) -> None:
    """Say what is about to run."""
    cfg, corpus = run.cfg, run.corpus
    parameters = sum(weight.numel() for weight in run.decoder.parameters())
    rows = corpus.rows(cfg.max_seq_length)
    left = cfg.max_epochs * rows * cfg.max_seq_length - run.total_steps * run.step_tokens
    logger.info("🚀 학습 시작!")
    logger.info(f"테스트 모드: {cfg.is_test}")
    logger.info(f"최대 스텝: {run.total_steps:,}")
    tokens = run.total_steps * run.step_tokens
    logger.info(
        f"파라미터 {parameters / 1e6:,.1f}M, 스텝당 {run.step_tokens:,} 토큰, 모두 {tokens:,} 토큰 "
        f"({tokens / (rows * cfg.max_seq_length):.2f} 에포크), 어텐션 {run.backend}"
    )
    for name, epochs in stream_epochs(cfg, corpus, tokens).items() if cfg.mix else ():
        often = f" ⚠️  {epochs:.0f}번 되풀이해 읽습니다" if epochs > MOST_USEFUL_EPOCHS else ""
        logger.info(f"   • {name}: 비율 {cfg.mix_counts[name] / MIX_WINDOW:.1%}, {epochs:.2f} 에포크{often}")
    if cfg.max_steps is None and cfg.max_tokens is None and cfg.mix is None and left:
        logger.info(f"   마지막 전역 배치를 채우지 못하는 {left // cfg.max_seq_length:,}개 행은 읽지 않습니다")
    if peak_flops(run.accelerator.device):
        logger.info("   MFU = 토큰/s x (6N + 12 x 층 x 은닉 x 길이) / 최대 FLOP/s")


def run_training(cfg: TrainConfig, notes: list[str], stop: StopFlag) -> int:
    """The whole run on one rank; returns the exit code."""
    rank, world_size = rank_and_world()
    for note in notes:
        logger.info(f"⚠️  {note}")
    lock = claim_output(cfg) if rank == 0 else None
    if rank == 0:
        write_run_info(cfg, world_size, state="running")
    corpus = prepare_corpus(cfg)
    log_report(corpus.report, corpus.path)
    with attention_kernels(cfg):
        run = build_run(cfg, corpus, stop)
        checkpoint = resume_checkpoint(cfg)
        state = load_checkpoint(run, checkpoint) if checkpoint else TrainState()
        stop.defer()
        if rank == 0:
            cut_metrics(cfg.output_dir / "metrics.jsonl", state.step)
            set_aside_later_checkpoints(cfg.output_dir, state.step)
            write_run_info(cfg, world_size, total_steps=run.total_steps)
        if checkpoint is None and cfg.save_initial:
            save_initial_model(run)
        done = state.step >= run.total_steps
        if done:
            logger.info(f"✅ 이미 끝난 학습입니다 (스텝 {state.step:,}). 더 하려면 --max-steps 를 늘리세요")
            ended = "finished"
        else:
            log_start(run)
            gc.collect()
            gc.freeze()
            gc.disable()  # a collection in the middle of a step costs up to half a second; the loop does it
            ended = train(run, state)
    if rank == 0:
        write_run_info(cfg, world_size, state=ended, ended=now(), step=state.step)
        stopped = (
            "🛑 테스트를 중단했습니다"
            if cfg.is_test
            else "🛑 학습을 중단했습니다. 이어서 하려면 --train --resume 을 쓰세요"
        )
        if not done:
            how = "✅ 학습 완료!" if ended == "finished" else stopped
            logger.info(f"{how} (스텝 {state.step:,}, {format_duration(state.elapsed_seconds)})")
    run.accelerator.end_training()
    if lock is not None:
        lock.close()
    return 0


def report_failure(cfg: TrainConfig, error: BaseException, rank: int) -> int:
    """Tell the person in a sentence or a few, keep the traceback, set the run's state; returns the exit code."""
    expected = isinstance(error, (ValueError, FileNotFoundError, RuntimeError)) and re.search("[가-힣]", str(error))
    text = str(error) if expected else f"예상하지 못한 오류: {type(error).__name__}: {str(error).strip()[:300]}"
    if isinstance(error, torch.OutOfMemoryError):
        smaller = max(1, cfg.batch_size // 2)
        text = f"GPU 메모리가 부족합니다. --batch-size {smaller} 또는 --gradient-checkpointing 을 쓰세요"
    logging.getLogger("traceback").error("run failed", exc_info=error)
    path = cfg.output_dir / "run_info.json"
    info = read_json(path)
    state = info.get("state") if info.get("run_id") == os.environ.get("RUN_ID") else None
    if rank == 0 or state == "running":  # a rank that fails because another did has nothing to add
        detail = cfg.logs_dir / f"training_detail_rank_{rank}.log"
        print(f"❌ {text}\n   자세한 내용: {display_path(detail)}", flush=True)
    if state == "running":
        write_json(path, {**info, "state": "failed", "error": text, "ended": now()})
    return USAGE_ERROR if isinstance(error, UsageProblem) else ENVIRONMENT_ERROR


def main() -> int:
    """Run one rank of a training run from the command line; returns the exit code."""
    rank, world_size = rank_and_world()
    stop = StopFlag()
    try:
        cfg, notes = set_up_config(sys.argv[1:])
    except (UsageProblem, EnvironmentProblem) as error:
        print("\n".join(f"❌ {problem}" for problem in error.problems), file=sys.stderr)
        return USAGE_ERROR if isinstance(error, UsageProblem) else ENVIRONMENT_ERROR
    set_up_logging(cfg, rank)
    quiet_libraries()
    try:
        return run_training(cfg, notes, stop)
    except StopRequested:
        logger.info("🛑 시작하기 전에 중단했습니다")
        if rank == 0 and (cfg.output_dir / "run_info.json").exists():
            write_run_info(cfg, world_size, state="stopped", ended=now())
        return STOPPED
    except Exception as error:
        return report_failure(cfg, error, rank)


def leave(code: int) -> NoReturn:
    """End this process at once, with everything written.

    Python's own way out takes the interpreter down under gloo's and NCCL's threads.  One that still
    holds the last collective's tensors then asks for a GIL that is gone, and the process dies of
    SIGABRT, so that torchrun calls a finished run failed.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
