"""README against the program: its options, commands, file tree, figures and example against what really happens."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from conftest import LAUNCHER

import train_h100_dual as t

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MOST_LINES = 620
# In the order of the document that the project implements; what it doesn't have stands between 모니터링 and 트러블슈팅.
SECTIONS = [
    *("특징", "파일 구조", "설치 요구사항", "빠른 시작", "주요 옵션", "사용 예시", "성능 모니터링"),
    *("체크포인트와 이어서 학습", "데이터", "트러블슈팅", "다음 단계", "도움말", "English"),
]
# Options of other programs: torchrun, sbatch, pip, docker, tensorboard, vLLM, llama.cpp, lm-evaluation-harness.
FOREIGN_OPTIONS = {
    *("--standalone", "--nproc-per-node", "--shutdown-timeout", "--index-url", "--all", "--gpus", "--signal"),
    *("--logdir", "--dtype", "--outfile", "--outtype", "--model", "--model_args", "--batch_size", "--tasks"),
    "--ipc",
}


def section(title: str) -> str:
    """The text below the heading ``title``, up to the next heading of its level or a higher one."""
    heading = re.search(rf"^(#+) {re.escape(title)}$", README, re.M)
    assert heading, f"no heading {title}"
    rest = README[heading.end() :]
    end = re.search(rf"^#{{1,{len(heading[1])}}} ", without_code(rest), re.M)
    return rest[: end.start()] if end else rest


def without_code(text: str) -> str:
    """The same text with spaces for what stands in fenced blocks, where a comment looks like a heading."""
    return re.sub(r"```.*?```", lambda block: re.sub(r"[^\n]", " ", block[0]), text, flags=re.S)


def code_blocks(text: str, language: str) -> list[str]:
    """The contents of the fenced blocks of a language ("" for blocks that name none)."""
    return [body for name, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S) if name == language]


def tables(text: str) -> list[list[list[str]]]:
    """The tables in a text as rows of cells, without the ruler below the heading."""
    rows = [
        [re.split(r"(?<!\\)\|", line[1:-1]) for line in table.splitlines()]
        for table in re.findall(r"(?:^\|.*\|\n)+", text, re.M)
    ]
    return [[[cell.strip().replace("\\|", "|") for cell in row] for row in [head, *body]] for head, _, *body in rows]


def commands(text: str = README) -> list[str]:
    """Every command line in the bash blocks of a text and, where it starts the launcher, in its code spans."""
    lines = "\n".join(code_blocks(text, "bash")).replace("\\\n", " ").splitlines()
    spans = re.findall(r"`(\./run_h100_dual\.sh -[^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    return [line.strip() for line in [*lines, *spans] if line.strip() and not line.startswith("#")]


def arguments_of(program: str) -> list[list[str]]:
    """The arguments of each command that runs ``program``, without repeats."""
    words = [shlex.split(line, comments=True) for line in commands()]
    found = [line[index + 1 :] for line in words for index, word in enumerate(line) if word.endswith(program)]
    return [list(arguments) for arguments in dict.fromkeys(map(tuple, found))]


@cache
def help_groups() -> dict[str, dict[str, str]]:
    """What ``--help`` shows: for each group, options as they are typed and their help texts."""
    groups: dict[str, dict[str, str]] = {}
    for line in help_text().splitlines():
        if re.fullmatch(r"\S[^:]*:", line):
            name, options = None, groups.setdefault(line[:-1], {})
        elif option := re.match(r"  (--\S+(?: (?:\[[^\]]+\]|[A-Z]+(?:[|:][A-Z]+)?|\S+[|,]\S+))?)(?: +(.*))?$", line):
            name = option[1]
            options[name] = option[2] or ""
        elif line.startswith(" " * 10) and name:
            options[name] += line.strip()
    return {title: options for title, options in groups.items() if options}


def readme_groups() -> dict[str, dict[str, str]]:
    """What the option tables show: for each group, options as they are typed and their default cells."""
    return {head[0]: {row[0].strip("`"): row[2] for row in rows} for head, *rows in tables(section("주요 옵션"))}


def default_in_help(text: str) -> str:
    """The default that a help text ends with, without its brackets; empty if there is none."""
    default = re.search(r"\(([^()]*기본[^()]*|(?:테스트|CPU)[^()]*: [^()]*)\)$", text)
    return default[1] if default else ""


def default_in_table(cell: str) -> str:
    """A cell of the column 기본값, written as ``--help`` writes it."""
    cell = cell.replace("`", "").replace("✅", "기본")
    if not cell or "기본" in cell or ": " in cell.split("(")[0]:
        return cell
    base, _, rest = cell.partition(" (")
    return f"기본: {base}" + (f", {rest.removesuffix(')')}" if rest else "")


def launcher_options() -> set[str]:
    """Options that the launcher keeps to itself: those of --help that the script doesn't know."""
    shown = {word for options in help_groups().values() for name in options for word in re.findall(r"--[\w-]+", name)}
    return shown - {*t.OPTIONS}


def test_the_tables_show_the_options_of_help_in_its_groups_and_order_and_help_shows_all():
    assert {title: list(options) for title, options in readme_groups().items()} == {
        title: list(options) for title, options in help_groups().items()
    }
    assert list(readme_groups()) == list(help_groups())
    shown = {name.split()[0] for options in help_groups().values() for name in options}
    assert {*t.OPTIONS} <= shown


def test_the_tables_show_the_defaults_of_help():
    told = {name: default_in_table(cell) for options in readme_groups().values() for name, cell in options.items()}
    assert told == {name: default_in_help(text) for options in help_groups().values() for name, text in options.items()}


def test_no_option_is_named_that_is_not_there():
    known = {*t.OPTIONS, *launcher_options(), *FOREIGN_OPTIONS}
    code = " ".join([*re.findall(r"`([^`\n]+)`", README), *commands()])
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code)) - known == set()


@pytest.mark.parametrize("arguments", arguments_of("run_h100_dual.sh"), ids=" ".join)
def test_the_options_of_a_launcher_command_go_together(arguments):
    rest, own = [], launcher_options()
    words = iter(arguments)
    for word in words:
        if word not in own:
            rest.append(word)
        elif word in ("--notify", "--python"):
            assert not next(words).startswith("--")
    check_options(rest)


@pytest.mark.parametrize("arguments", arguments_of("train_h100_dual.py"), ids=" ".join)
def test_the_options_of_a_script_command_go_together(arguments):
    check_options(arguments)


def check_options(arguments: list[str]) -> None:
    """Assert that the script takes these options on the machine that they name, else on one with GPUs."""
    cfg = t.parse_args(arguments)
    t.resolve_config(cfg, "cpu" if cfg.device == "cpu" else "cuda")


def test_the_launcher_takes_its_own_options_as_they_are_shown(place):
    # With --status it reads every option and starts nothing: 3 says that it understood them, 2 that it didn't.
    own = launcher_options() - {"--help"}
    shown = {frozenset(own & {*arguments}): arguments for arguments in arguments_of("run_h100_dual.sh")}
    assert len(shown) > 3
    for arguments in [*shown.values(), ["--python", sys.executable], ["--no-install", "--notify", "true"]]:
        answer = place.run(*arguments, "--status")
        assert answer.code == 3, answer.text


@pytest.mark.slow
def test_the_first_text_comes_from_the_commands_that_promise_it(place):
    train, generate = commands(section("1. 첫 글 써 보기"))
    assert place.run(*shlex.split(train)[1:], timeout=600).code == 0
    answer = place.run(*shlex.split(generate)[1:], timeout=120)
    assert answer.code == 0, answer.text
    assert answer.out.startswith("오늘 학생이")
    assert re.search(r"에서 \S+[을를] \S+다\.", answer.out)  # as the dummy sentences go


def test_the_two_set_up_commands_come_first():
    first = code_blocks(README, "bash")[0]
    assert [line.split("#")[0].strip() for line in first.splitlines()] == [
        "./run_h100_dual.sh --test",
        "./tests/run.sh",
    ]
    assert README.index(first) < README.index("\n## ")


def tree() -> Iterator[tuple[str, bool]]:
    """Paths in the tree of 파일 구조, and whether they are always there; directories end with a slash."""
    parents: list[str] = []
    for line in code_blocks(section("파일 구조"), "")[0].splitlines()[1:]:
        branch, name, comment = re.match(r"((?:│   |    |├── |└── )+)(\S+)(.*)", line).groups()
        parents[len(branch) // 4 - 1 :] = [name]
        yield "".join(parents), "만)" not in comment


def test_the_tree_shows_what_is_in_the_repository():
    paths = [path for path, _ in tree() if not path.startswith(("outputs/", "logs/"))]
    assert len(paths) > 3
    assert [path for path in paths if not (ROOT / path).exists()] == []


def without_numbers(text: str) -> str:
    """A line or a name with one sign for every number, time or length of something."""
    return re.sub(r"[\d.,:]*\d(?:e-\d+)?(?:\.\d+)?[kM]?", "N", text)


def comparable(line: str) -> str:
    """A line without what differs from run to run: numbers, padding around them, the place of the default data."""
    return re.sub(r"\s+", " ", without_numbers(re.sub(r"\(/\S+\)", "(DATA)", line)))


def test_the_table_of_sizes_shows_the_estimates_of_the_launcher(place, with_gpus, with_cuda):
    with_gpus(2, name="NVIDIA H100 80GB HBM3", total=10**6)
    rows = []
    for name, preset in t.PRESETS.items():
        count, shape = preset.parameter_count(65536), (preset.layers, preset.hidden, preset.mlp, preset.head)
        tokens = 20 * count
        # A test goes on where a training run would be refused for the disk of this machine.
        options = ["--dry-run", "--model-size", name, "--dummy-data", "--gradient-accumulation-steps", "8"]
        told = place.run(*options).out
        less = place.run(*options, "--gradient-checkpointing").out
        memory = [re.search(r"예상 메모리: GPU당 ([\d.]+) GiB", out)[1] for out in (told, less)]
        flops = t.training_flops(count, *shape[:2], 2048) * tokens
        hours = flops / (2 * 0.4 * t.named_peak_flops("NVIDIA H100 80GB HBM3")) / 3600
        time = f"{hours:.0f}시간" if hours > 0.9 else f"{60 * hours:.0f}분"
        row = [name, f"{count / 1e6:,.1f}M", "{} × {}, {}, {}".format(*shape), *memory, f"{tokens / 1e8:.0f}억", time]
        auto = t.TrainConfig(optimizer="muon", learning_rate="auto")
        rate = t.peak_rate(auto, preset.matrix_parameters(), tokens, {})[0]
        rows.append([*row, f"{rate:.1e}".replace("e-0", "e-"), f"{0.58e-3 * tokens**0.571:.0f}k"])
    assert tables(section("3. 크기, 배치, 학습률 고르기"))[0][1:] == rows


def help_text() -> str:
    environment = {**os.environ, "XDG_CACHE_HOME": ""}  # it is a default's part; README has the common one
    answer = subprocess.run(
        [LAUNCHER, "--help"], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    return answer.stdout


def test_the_versions_are_those_of_the_script_and_the_requirements():
    names, versions = tables(section("설치 요구사항"))[0]
    assert dict(zip(names, versions, strict=True)) == t.MINIMUM_VERSIONS
    assert "Python {}.{} 이상".format(*t.MINIMUM_PYTHON) in section("설치 요구사항")
    pins = re.findall(r"^(torch==[\d.]+)", (ROOT / "requirements.txt").read_text(), re.M)
    assert set(re.findall(r"torch==[\d.]+", README)) == {*pins}


def test_it_is_not_longer_than_somebody_reads_and_keeps_the_order():
    assert len(README.splitlines()) <= MOST_LINES
    assert re.findall(r"^## (.+)$", without_code(README), re.M) == SECTIONS


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)]+)\)", README))))
def test_a_link_leads_somewhere(target):
    if target.startswith("#"):
        headings = re.findall(r"^#+ (.+)$", without_code(README), re.M)
        assert target[1:] in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
    elif not target.startswith("http"):
        assert (ROOT / target).exists()


@pytest.mark.parametrize("code", code_blocks(README, "python"))
def test_a_python_example_compiles(code):
    compile(code, "README.md", "exec")


@pytest.mark.parametrize("block", code_blocks(README, "bash"))
def test_a_bash_block_is_bash(block):
    subprocess.run(["bash", "-n"], input=block, text=True, check=True, timeout=10)
