"""README against the program: its commands, option tables, file trees, quoted messages and links."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import train_h100_dual as t

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
LAUNCHER = (ROOT / "run_h100_dual.sh").read_text(encoding="utf-8")
SCRIPT = (ROOT / "train_h100_dual.py").read_text(encoding="utf-8")

# The sections of the document that the project implements, in its order; the rest stands between and after them.
SECTIONS = [
    *("특징", "파일 구조", "설치 요구사항", "빠른 시작", "주요 옵션", "사용 예시"),
    *("성능 모니터링", "체크포인트 관리", "데이터 형식", "트러블슈팅", "다음 단계", "도움말", "English"),
]
EXAMPLE = "기본 테스트 (10스텝, 백그라운드)"
# Options of other programs that the README names.
FOREIGN_OPTIONS = {
    *(
        "--standalone",
        "--nproc-per-node",
        "--shutdown-timeout",
        "--index-url",
        "--all",
        "--outfile",
        "--outtype",
        "--dtype",
        "--logdir",
    ),
    *("--model", "--model_args", "--batch_size", "--tasks", "--num_fewshot", "--include_path"),
}


# --- reading the README ---


def section(title: str) -> str:
    """The text below the heading ``title``, up to the next heading of its level or a higher one."""
    heading = re.search(rf"^(#+) {re.escape(title)}$", README, re.M)
    assert heading, f"no heading {title}"
    rest = README[heading.end() :]
    end = re.search(rf"^#{{1,{len(heading[1])}}} ", re.sub(r"```.*?```", blank_out, rest, flags=re.S), re.M)
    return rest[: end.start()] if end else rest


def blank_out(found: re.Match) -> str:
    """As many characters without a heading among them: a comment in a code block starts with # too."""
    return re.sub(r"[^\n]", " ", found[0])


def code_blocks(text: str, language: str) -> list[str]:
    """The contents of the fenced blocks of a language ("" for blocks that name none)."""
    return [body for name, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S) if name == language]


def tables(text: str) -> list[list[list[str]]]:
    """The tables in a text: rows of cells, without the heading and the ruler."""
    found = re.findall(r"(?:^\|.*\|\n)+", text, re.M)
    rows = [[re.split(r"(?<!\\)\|", line.strip()[1:-1]) for line in table.splitlines()[2:]] for table in found]
    return [[[cell.strip().replace("\\|", "|") for cell in row] for row in table] for table in rows]


def commands() -> list[str]:
    """Every command line in the README's bash blocks, joined where a backslash goes on, and in its code spans."""
    lines = []
    for block in code_blocks(README, "bash"):
        lines += re.sub(r"<<'(\w+)'\n.*?^\1$", "", block, flags=re.M | re.S).replace("\\\n", " ").splitlines()
    prose = re.sub(r"```.*?```", "", README, flags=re.S)
    lines += [span for span in re.findall(r"`([^`\n]+)`", prose) if span.startswith("./run_h100_dual.sh -")]
    return list(dict.fromkeys(line.strip() for line in lines if line.strip() and not line.startswith("#")))


def arguments_of(program: str) -> list[list[str]]:
    """The arguments of each command that runs ``program``."""
    words = [shlex.split(line, comments=True) for line in commands()]
    return [line[index + 1 :] for line in words for index, word in enumerate(line) if word.endswith(program)]


# --- commands ---


def option_list(variable: str) -> list[str]:
    """A space-separated list of options that the launcher keeps in a variable."""
    return re.search(rf'{variable}="([^"]+)"', LAUNCHER)[1].split()


def with_launcher_options() -> list[list[str]]:
    """The commands that use an option of the launcher itself; the script's are checked below without a process."""
    own = {*option_list("OWN_OPTIONS")} - {"--help"}
    return [arguments for arguments in arguments_of("/run_h100_dual.sh") if own & {*arguments}]


@pytest.mark.parametrize("arguments", with_launcher_options(), ids=" ".join)
def test_the_launcher_accepts_the_command(arguments, tmp_path):
    # With --status appended the launcher reads every option, its own and the script's, and starts nothing:
    # 3 means that all of them were understood, and 2 that one was not.
    arguments = [word.replace("/path/to/python3", sys.executable) for word in arguments]
    command = [ROOT / "run_h100_dual.sh", *arguments, "--output-dir", tmp_path, "--logs-dir", tmp_path, "--status"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 3, done.stderr


def without_launcher_options(arguments: list[str]) -> list[str]:
    """What the launcher hands on to the script."""
    own, kept = option_list("OWN_OPTIONS"), []
    rest = iter(arguments)
    for word in rest:
        if word not in own:
            kept.append(word)
        elif word in ("--num-gpus", "--notify", "--python", "--nnodes", "--node-rank", "--rdzv-endpoint"):
            next(rest)
    return kept


@pytest.mark.parametrize(
    "arguments",
    [*map(without_launcher_options, arguments_of("/run_h100_dual.sh")), *arguments_of("train_h100_dual.py")],
    ids=" ".join,
)
def test_the_options_of_a_command_go_together(arguments):
    cfg = t.parse_args(arguments)
    device = "cpu" if cfg.device == "cpu" else "cuda"
    assert t.validate_config(t.resolve_config(cfg, device)[0]) == []


def test_the_two_set_up_commands_come_first():
    first = code_blocks(README, "bash")[0]
    assert [line.split("#")[0].strip() for line in first.splitlines()] == [
        "./run_h100_dual.sh --test",
        "./tests/run.sh",
    ]
    assert README.index(first) < README.index("\n## ")


def test_an_activated_environment_is_the_only_thing_that_torchrun_and_python_need():
    direct = section("학습 스크립트 직접 실행")
    assert "source .venv/bin/activate" in direct
    assert len(re.findall(r"^(?:torchrun|python3) .*train_h100_dual\.py", direct, re.M)) == 2


# --- options ---


@cache
def help_groups() -> dict[str, dict[str, str]]:
    """What ``--help`` shows: for each group, options as they are typed and their help texts."""
    done = subprocess.run([ROOT / "run_h100_dual.sh", "--help"], capture_output=True, text=True, timeout=60, check=True)
    groups: dict[str, dict[str, str]] = {}
    for line in done.stdout.splitlines():
        if re.fullmatch(r"\S[^:]*:", line):
            name = None
            options = groups.setdefault(line[:-1], {})
        elif found := re.match(r"  (--\S+(?: (?:\[[^\]]+\]|[A-Z]+(?:[|:][A-Z]+)?|\S+[|,]\S+))?)(?: +(.*))?$", line):
            name = found[1]
            options[name] = found[2] or ""
        elif line.startswith(" " * 34) and name:
            options[name] += line.strip()
    return {title: options for title, options in groups.items() if options}


def readme_groups() -> dict[str, dict[str, str]]:
    """What the option tables show: for each heading, options as they are typed and their default cells."""
    titles = re.findall(r"^### (.+)$", section("주요 옵션"), re.M)
    return {title: {row[0].strip("`"): row[2] for row in tables(section(title))[0]} for title in titles}


def default_in_help(text: str) -> str:
    """The default that a help text ends with, without its brackets; empty if there is none."""
    found = re.search(r"\(([^()]*기본[^()]*|(?:테스트|CPU)[^()]*: [^()]*)\)$", text)
    return found[1] if found else ""


def default_in_table(cell: str) -> str:
    """A cell of the column 기본값, written as ``--help`` writes it."""
    cell = cell.replace("`", "").replace("✅", "기본")
    if not cell or "기본" in cell or ": " in cell.split("(")[0]:
        return cell
    base, _, rest = cell.partition(" (")
    return f"기본: {base}" + (f", {rest.removesuffix(')')}" if rest else "")


def test_help_is_read_whole():
    shown = {name.split()[0] for options in help_groups().values() for name in options}
    own = {name for name in option_list("OWN_OPTIONS") if name != "--json"}
    assert shown == {*t.option_names(), *own}


def test_the_tables_show_the_options_of_help_and_no_others_in_its_order():
    shown = {title: list(options) for title, options in readme_groups().items()}
    assert shown == {title: list(options) for title, options in help_groups().items()}
    assert list(shown) == list(help_groups())


def test_the_tables_show_the_defaults_of_help():
    for title, options in help_groups().items():
        for name, text in options.items():
            told = default_in_table(readme_groups()[title][name])
            assert told == default_in_help(text), f"{name}: {told!r}, but --help says {default_in_help(text)!r}"


def test_no_option_is_named_that_is_not_there():
    known = {*t.option_names(), *option_list("OWN_OPTIONS"), *FOREIGN_OPTIONS}
    code = " ".join([*re.findall(r"`([^`\n]+)`", README), *commands()])
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code))
    assert named - known == set()


def test_the_table_of_presets_shows_their_shapes_and_parameter_counts():
    told = {row[0]: row[1:] for row in tables(section("모델"))[1]}
    assert list(told) == list(t.PRESETS)
    for name, preset in t.PRESETS.items():
        count = f"{preset.parameter_count(65536) / 1e6:,.1f}M"
        assert told[name] == [count, *map(str, (preset.layers, preset.hidden, preset.mlp, preset.head))]


def test_the_table_of_memory_and_speed_shows_the_estimates_of_the_program(tmp_path, monkeypatch):
    monkeypatch.setattr(t, "format_duration", str)
    (table,) = tables(section("3. 모델 크기, 배치, 학습률 고르기"))
    assert [row[0] for row in table] == list(t.PRESETS)
    for name, *told in table:
        figures = []
        for more in ([], ["--gradient-checkpointing"]):
            cfg = t.resolve_config(t.parse_args(["--train", "--model-size", name, *more]), "cuda")[0]
            figures.append(f"{sum(t.estimate_memory(cfg, t.PRESETS[name], 2).values()) / 2**30:.1f}")
        assert told[:2] == figures
        tokens = 20 * t.PRESETS[name].parameter_count(65536)
        assert told[2] == f"{tokens / 1e8:.0f}억"
        cfg = t.replace(cfg, cache_dir=tmp_path)  # where no run has measured a speed
        seconds, how = t.estimated_time(cfg, 2, "NVIDIA H100 80GB HBM3", tokens).split(maxsplit=1)
        assert how == "(MFU 40% 가정)"
        assert float(told[3].replace(",", "")) == pytest.approx(tokens / float(seconds), rel=0.01)
        hours = float(seconds) / 3600
        assert told[4] == (f"{hours:.0f}시간" if hours > 0.9 else f"{60 * hours:.0f}분")


def test_the_tools_are_those_that_the_tests_use():
    pins = (ROOT / "tests" / "requirements-export.txt").read_text().split()
    told = re.findall(r"\w+==[\d.]+", section("배포 준비"))
    assert {*told} - {"gguf==0.19.0"} == {*pins}  # the converter of llama.cpp isn't among the tests


def test_the_example_of_an_evaluation_looks_as_the_program_prints_it():
    (example,) = code_blocks(section("체크포인트 평가"), "")
    head, *table = example.splitlines()
    assert any(re.fullmatch(known, head) for known in known_messages())
    rows = [line.split() for line in table]
    counts = {row[0]: [float(cell.replace(",", "")) for cell in row[1:5]] for row in rows[2:]}
    totals = {name: (*count[:3], count[1] * count[3]) for name, count in counts.items()}
    expected = t.evaluation_table({name: t.np.array(total) for name, total in totals.items()})
    assert [line.split()[:4] for line in expected] == [row[:4] for row in rows]
    assert list(map(t.display_width, table)) == list(map(t.display_width, expected))


def test_the_least_versions_are_those_of_the_script():
    assert {row[0]: row[1] for row in tables(section("Python 패키지"))[0]} == t.MINIMUM_VERSIONS
    for name, least in re.findall(r'"([a-z]+)>=([\d.]+)"', section("Python 패키지")):
        assert t.MINIMUM_VERSIONS[name] == least
    assert "Python {}.{} 이상".format(*t.MINIMUM_PYTHON) in section("설치 요구사항")


# --- files ---

WRITTEN_BY_LIBRARIES = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}


def tree() -> Iterator[str]:
    """Paths in the tree of 파일 구조; directories end with a slash."""
    parents: list[str] = []
    for line in code_blocks(section("파일 구조"), "")[0].splitlines()[1:]:
        branch, name = re.match(r"((?:│   |    |├── |└── )+)(\S+)", line).groups()
        parents[len(branch) // 4 - 1 :] = [name]
        yield "".join(parents)


def name_patterns() -> list[str]:
    """Regular expressions for every name in a string of the program, its variable parts being anything."""
    words = re.findall(r"""["'/ ]([\w.{}$-]*\w[\w.{}$-]*)(?=["'])""", SCRIPT + LAUNCHER)
    return [re.sub(r"\\?\$?\\\{.*?\\\}", r"\\w*", re.escape(word)) for word in words]


def test_the_tree_shows_files_of_the_repository_that_are_there():
    for path in tree():
        if not path.startswith(("outputs/", "logs/")):
            assert (ROOT / path).exists(), path


def test_the_tree_shows_only_names_that_the_program_writes():
    patterns = name_patterns()
    for path in tree():
        name = re.sub(r"^training_console\.log\.\d+$", "training_console.log", Path(path).name)
        if path.startswith(("outputs/", "logs/")) and name not in WRITTEN_BY_LIBRARIES:
            assert any(re.fullmatch(pattern, name) for pattern in patterns), path


def test_the_tree_shows_every_name_that_the_program_writes():
    shown = {Path(path).name for path in tree()}
    written = re.findall(r'(?:output_dir|logs_dir|folder|temporary|"training_state") / f?"([^"]+)"', SCRIPT)
    launcher = re.sub(r"\$\{node\}|\$\(\(.*?\)\)", "", LAUNCHER).replace("_rank_.", "_rank_0.")  # on one machine
    written += re.findall(r"\$\{plan\[(?:output|logs)_dir\]\}/([\w.]+)", launcher)
    cache_files = {"tokenizer", "corpus.json", *re.findall(r'folder / f?"(\w+\.(?:bin|npy))"', SCRIPT)}
    for name in {*written} - cache_files | {"pytorch_model.bin"}:
        pattern = re.sub(r"\\\{.*?\\\}", r"\\w+", re.escape(name))
        if not name.startswith((".", "val_{", "train-{", "dummy-")):
            assert any(re.fullmatch(pattern, one) for one in shown), name


def test_the_fields_of_a_logged_step_are_all_named():
    fields = [ast.literal_eval(key) for key in re.findall(r'^            ("\w+"): .*,$', logged_record(), re.M)]
    table = tables(section("metrics.jsonl"))[0]
    assert re.findall(r"`(\w+)`", table[0][1]) == fields
    assert set(re.findall(r"`(\w+)`", table[1][1])) == {
        "step",
        *(f"val_{figure}{suffix}" for figure in ("loss", "bits_per_byte") for suffix in ("", "_ko", "_en")),
    }


def logged_record() -> str:
    """The lines of the script between the first and the last field of a logged step."""
    return re.search(r"^        record = \{\n(.*?)^        \}", SCRIPT, re.M | re.S)[1]


# --- messages ---


def script_messages() -> Iterator[str]:
    """Every string of the script as a regular expression; what is filled in is anything."""
    for node in ast.walk(ast.parse(SCRIPT)):
        if isinstance(node, ast.JoinedStr):
            parts = [re.escape(part.value) if isinstance(part, ast.Constant) else ".+" for part in node.values]
            yield "".join(parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.escape(node.value)


def launcher_messages() -> Iterator[str]:
    """Every message of the launcher as a regular expression; what is filled in is anything."""
    for text in re.findall(r'\b(?:die |warn |log |reason=)"(.*)"(?: \d)?(?: ;;)?$', LAUNCHER, re.M):
        filled_in = r"\$\(\(.*?\)\)|\$\([^)]*\)|\$\{[^}]*\}|\$\w+"
        yield ".+".join(re.escape(part) for part in re.split(filled_in, text))


def hangul(text: str) -> int:
    return len(re.findall("[가-힣]", text))


@cache
def known_messages(least: int = 4) -> list[str]:
    """Patterns of single lines with enough fixed Hangul not to match by accident."""
    lines = [line for text in (*script_messages(), *launcher_messages()) for line in re.split(r"\\?\n", text)]
    return [line for line in lines if hangul(line) >= least]


def quoted_messages() -> list[str]:
    return [line for block in code_blocks(section("트러블슈팅"), "text") for line in block.splitlines()]


@pytest.mark.parametrize("message", quoted_messages())
def test_a_quoted_message_is_one_that_the_program_prints(message):
    text = re.sub(r"^(?:❌ |⚠️  )", "", message)
    after_option = re.sub(r"^--[a-z-]+: ", "", text)
    assert any(re.fullmatch(known, line) for known in known_messages() for line in (message, text, after_option))


def test_each_trouble_has_a_message_and_a_command():
    for title in re.findall(r"^### (.+)$", section("트러블슈팅"), re.M):
        assert code_blocks(section(title), "text"), title
        assert code_blocks(section(title), "bash"), title


def console_example() -> list[str]:
    return [line for block in code_blocks(section(EXAMPLE), "") for line in block.splitlines()]


def run_block(lines: list[str]) -> list[str]:
    """The lines of 학습 정보 that hang on neither the caller's directory, the data, nor what ran here before."""
    first = lines.index("📋 학습 정보")
    block = lines[first : lines.index("", first)]
    return [line for line in block if not re.match(r"   • (?:데이터셋|출력|로그|예상 시간): ", line)]


def test_the_console_example_shows_what_a_test_on_a_cpu_shows(tmp_path):
    options = [
        "--test",
        "--device",
        "cpu",
        "--dummy-data",
        "--output-dir",
        tmp_path / "o",
        "--logs-dir",
        tmp_path / "l",
    ]
    command = [ROOT / "run_h100_dual.sh", "--dry-run", "--python", sys.executable, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert run_block(console_example()) == run_block(done.stdout.splitlines())


def test_the_console_example_has_lines_that_the_program_prints():
    told = run_block(console_example())
    lines = [line for line in console_example() if hangul(line) >= 2 and line not in told]
    assert len(lines) > 30
    fixed = re.compile("|".join(known_messages(2)))
    for line in lines:
        known = line in LAUNCHER or line.strip(" []") in t.SAMPLE_PROMPTS
        assert known or any(fixed.fullmatch(line[start:]) for start in (0, 2, 3, 4)), line


# --- the whole ---


def test_the_sections_come_in_their_order():
    assert re.findall(r"^## (.+)$", re.sub(r"```.*?```", "", README, flags=re.S), re.M) == SECTIONS


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)]+)\)", README))))
def test_a_link_leads_somewhere(target):
    if target.startswith("#"):
        headings = re.findall(r"^#+ (.+)$", README, re.M)
        assert target[1:] in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
    elif not target.startswith("http"):
        assert (ROOT / target).exists()


def test_the_python_examples_compile():
    examples = [*code_blocks(README, "python"), *re.findall(r"<<'PYTHON'\n(.*?)^PYTHON$", README, re.M | re.S)]
    assert len(examples) == 5
    for code in examples:
        compile(code, "README.md", "exec")


def test_nothing_is_named_that_is_not_there_yet():
    for word in ("inference.py", "TensorBoard", "tensorboard", "--generate", "--evaluate", "Muon", "FP8", "samples.md"):
        assert word not in README or word in SCRIPT + LAUNCHER, word
