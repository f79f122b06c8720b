"""The launcher's answers before anything is started: usage, refusals, the dry run."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import H100, LAUNCHER, ROOT, Answer, Place, assert_in_order, list_tree, write_program
from samples import documents, write_corpus

# arguments, and what the one line of the answer has to contain
MISTAKES = {
    "unknown option": (["--batch-siz", "8"], ["--batch-siz ", "가장 가까운", "--batch-size"]),
    "unknown option of the launcher": (["--foregroun"], ["--foregroun ", "가장 가까운", "--foreground"]),
    "unknown option beside --status": (["--status", "--jsn"], ["--jsn ", "가장 가까운", "--json"]),
    "missing value": (["--batch-size"], ["--batch-size", "값이 없습니다", "--batch-size N"]),
    "missing value of the launcher": (["--num-gpus"], ["--num-gpus", "값이 없습니다", "--num-gpus N"]),
    "empty value of the launcher": (["--python="], ["--python", "값이 없습니다"]),
    "value out of range": (["--batch-size", "0"], ["--batch-size", "'0'", "가장 가까운 값: 1"]),
    "no GPU at all": (["--num-gpus", "0"], ["--num-gpus", "'0'", "가장 가까운 값: 1"]),
    "machines without this one's number": (["--nnodes=2", "--rdzv-endpoint=a:1"], ["--nnodes 2", "--node-rank 0"]),
    "a number without machines": (["--node-rank", "1"], ["--node-rank", "--nnodes"]),
    "a number past the machines": (["--nnodes=2", "--node-rank=2", "--rdzv-endpoint=a:1"], ["--node-rank", "--nnodes"]),
    "a place without port": (["--nnodes=2", "--node-rank=1", "--rdzv-endpoint=a"], ["--rdzv-endpoint 10.0.0.1:29500"]),
    "--json without --status": (["--stop", "--json"], ["--json", "--status"]),
    "value for a switch of the launcher": (["--foreground=yes"], ["--foreground=yes", "가장 가까운 옵션"]),
}


def has_hangul(text: str) -> bool:
    return any("가" <= char <= "힣" for char in text)


def answer_quickly(place: Place, *arguments: str) -> Answer:
    """Run the launcher, up to three times where the machine is loaded; assert that it answers within a second."""
    answers: list[Answer] = []
    # An answer's time holds that of a child of an earlier test, if starting this one is what reaps it.
    while len(answers) < 3 and not (answers and max(answers[-1].seconds, answers[-1].cpu_seconds) <= 1):
        answers.append(place.run(*arguments))
    # On a loaded machine the clock tells about the others; the computing is the launcher's own.
    assert min(answer.cpu_seconds for answer in answers) <= 1
    assert min(answer.seconds for answer in answers) <= 4
    return answers[-1]


def assert_refused(answer: Answer, place: Place, code: int, *phrases: str) -> None:
    """Assert a refusal in Korean within seconds that started and wrote nothing."""
    assert answer.code == code, answer.text
    assert answer.complaints, answer.text
    assert all(has_hangul(line) for line in answer.complaints)
    for phrase in phrases:
        assert phrase in "\n".join(answer.complaints), f"{phrase!r} is missing in: {answer.err}"
    assert "Traceback" not in answer.text
    assert "학습 시작!" not in answer.out
    assert answer.seconds < 30
    assert not place.processes()
    assert list_tree(place.folder) == {}


def test_help_and_a_mistake_are_answered_within_a_second_where_nothing_is_installed(bare_place: Place) -> None:
    assert answer_quickly(bare_place, "--batch-size", "0").code == 2
    answer = answer_quickly(bare_place, "--help")
    assert answer.code == 0
    for option in ["--test", "--train", "--batch-size", "--num-gpus", "--dry-run", "--status", "--stop", "--notify"]:
        assert f"{option} " in answer.out
    assert has_hangul(answer.out)
    assert not answer.err
    assert list_tree(bare_place.folder) == {}


@pytest.mark.parametrize(("arguments", "phrases"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_gets_one_line_where_nothing_is_installed(bare_place, bare_folder, arguments, phrases) -> None:
    before = list_tree(bare_folder / "checkout")
    answer = bare_place.run(*arguments)
    assert_refused(answer, bare_place, 2, *phrases)
    assert answer.text.strip().count("\n") == 0, "one mistake, one line"
    assert list_tree(bare_folder / "checkout") == before


def test_a_mistake_is_told_by_the_first_python_that_can(bare_place: Place, tmp_path: Path) -> None:
    other = write_program(tmp_path / "other" / "python3.12", f"touch '{tmp_path}/asked'; exit 1")
    bare_place.environment["PATH"] += f":{other.parent}"
    assert bare_place.run("--test", "--resume").code == 2
    assert not (tmp_path / "asked").exists()
    assert bare_place.run("--test", "--no-install").code == 1
    assert (tmp_path / "asked").exists()


def test_several_mistakes_are_all_reported(place: Place) -> None:
    answer = place.run("--num-gpus", "0", "--batch-size", "0", "--learning-rate", "abc", "--outptu-dir", "x", "--seed")
    assert_refused(answer, place, 2, "--num-gpus", "--batch-size", "--learning-rate", "--output-dir", "--seed")
    assert len(answer.complaints) == 5


@pytest.mark.parametrize(("used", "visible", "options", "phrases"), [
    (4, "", ["--num-gpus", "4"], ["4개", "2개", "--num-gpus 2"]),
    (4, "1", [], ["2개", "1개", "--num-gpus 1"]),
    (4, "GPU-11", [], ["2개", "1개", "--num-gpus 1"]),
    (40_000, "", [], ["GPU 0", "GPU 1", H100, "40,000 MiB", "CUDA_VISIBLE_DEVICES"]),
    (4, "", [], ["nvidia-smi", "PyTorch", "드라이버", "pip install torch"]),
], ids=["fewer", "visible by number", "visible by name", "in use", "not seen by PyTorch"])  # fmt: skip
def test_training_on_unfit_gpus_is_refused(place: Place, with_gpus, used, visible, options, phrases) -> None:
    with_gpus(2, used=used)
    if visible:
        place.environment["CUDA_VISIBLE_DEVICES"] = visible
    assert_refused(place.run("--train", "--dummy-data", *options), place, 1, *phrases)


@pytest.mark.usefixtures("with_cuda")
def test_a_test_says_that_a_gpu_is_in_use_and_goes_on(place: Place, with_gpus: Callable[..., None]) -> None:
    with_gpus(1, used=40_000)
    answer = place.run("--test", "--dry-run")
    assert answer.code == 0, answer.text
    assert_in_order(
        answer.out, [r"⚠️ .*2개를 요청했지만 1개만", r"⚠️ .*GPU 0 .*40,000 MiB", "모든 요구사항 충족", "GPU 수: 1"]
    )


def test_a_broken_nvidia_smi_is_said(place: Place, with_gpus: Callable[..., None], tmp_path: Path) -> None:
    with_gpus(2)
    write_program(tmp_path / "stubs" / "nvidia-smi", "echo 'Driver/library version mismatch'; exit 18")
    assert_refused(place.run("--test"), place, 1, "nvidia-smi", "드라이버")


def test_fp16_is_refused_where_the_gpu_is_missing(place: Place) -> None:
    assert_refused(place.run("--fp16"), place, 2, "--fp16", "--fp32")


# Below a file; and also root can't make a directory in /proc, though the permission bits let it.
@pytest.mark.parametrize(("mode", "folder"), [
    ("--train", LAUNCHER / "below"), ("--test", Path("/proc/launcher-test/below")),
], ids=["train", "test"])  # fmt: skip
def test_everything_that_is_lacking_is_reported_at_once(place: Place, mode: str, folder: Path) -> None:
    place.outputs, place.logs, place.cache = (folder / name for name in ("outputs", "logs", "cache"))
    answer = place.run(mode, "--dataset-path", "/no such/말뭉치")
    phrases = ["데이터셋이 없습니다", "/no such/말뭉치", "--dataset-path", *place.directories]
    gpu = ["GPU를 찾을 수 없습니다", "--device cpu"] if mode == "--train" else []
    assert_refused(answer, place, 1, *phrases, *gpu)
    assert len(answer.complaints) == (5 if gpu else 4)


def test_missing_packages_are_named_and_not_installed(bare_place: Place, bare_folder: Path) -> None:
    before = list_tree(bare_folder / "checkout")
    answer = bare_place.run("--test", "--no-install")
    assert_refused(answer, bare_place, 1, "torch>=", "transformers>=", "datasets>=", "accelerate>=", "pip install")
    assert list_tree(bare_folder / "checkout") == before


def test_a_named_python_that_is_none_or_has_no_packages_is_refused(place: Place, bare_folder: Path) -> None:
    bare = str(bare_folder / "python" / "bin" / "python3")
    for python, named in ((bare, "torch>="), ("/no such/python3", "--python")):
        assert_refused(place.run("--test", "--python", python), place, 1, named, python)


def test_a_dry_run_where_nothing_is_installed_shows_everything_and_writes_nothing(bare_place, bare_folder) -> None:
    before = list_tree(bare_folder / "checkout")
    answer = bare_place.run("--dry-run")
    assert answer.code == 0, answer.text
    assert ".venv" in answer.err
    assert_in_order(answer.out, ["📋 학습 정보", "🎯 모드", "실행할 명령어", "torch.distributed.run"])
    assert list_tree(bare_folder / "checkout") == before
    assert list_tree(bare_place.folder) == {}


@pytest.mark.usefixtures("with_cuda")
def test_a_dry_run_on_two_h100s_shows_what_the_documents_example_shows_of_gpus(place, with_gpus) -> None:
    with_gpus(2)
    answer = place.run("--dry-run")
    assert answer.code == 0, answer.text
    lines = """
✅ PyTorch 및 CUDA 확인 완료
✅ GPU 확인 완료: 2개 사용 가능
  GPU 0: NVIDIA H100 PCIe
  GPU 1: NVIDIA H100 PCIe
✅ 모든 요구사항 충족
   • 최대 시퀀스 길이: 2048
   • Mixed Precision: bf16
   • 모델 컴파일: true
   • 모델 파라미터: 1,
   • 데이터셋: 더미 데이터
🚀 H100 설정:
   • GPU 수: 2
   • 분산 학습: DDP
   • 최적화: BF16 + torch.compile
"""
    assert_in_order(answer.out, [f"^{re.escape(line)}" for line in lines.strip().splitlines()])
    assert "--nproc-per-node 2" in answer.out
    assert "--device cpu" not in answer.out
    assert list_tree(place.folder) == {}


def test_a_dry_run_estimates_a_training_run_from_the_bytes_and_says_so(place: Place, tmp_path: Path) -> None:
    data = write_corpus(tmp_path / "corpus.jsonl", documents(200))
    options = "--train --device cpu --model-size tiny --vocab-size 1024 --max-seq-length 64 --batch-size 2"
    answer = place.run("--dry-run", *options.split(), "--dataset-path", str(data))
    assert answer.code == 0, answer.text
    assert_in_order(
        answer.out, ["실제 학습 모드", r"모델 파라미터: 3\.", "스텝당 토큰: 2,048", r"전체 학습: .*스텝.*토큰.*추정"]
    )
    assert list_tree(place.folder) == {}


def test_a_dry_run_writes_nothing_and_its_command_can_be_pasted(tmp_path: Path, warm_cache: Path) -> None:
    """With awkward paths, in the C locale, from anywhere."""
    place = Place(tmp_path / "작업 '폴더' $HOME", cache=warm_cache)
    place.environment["LC_ALL"] = "C"
    options = "--test --max-steps 2 --num-gpus 1 --batch-size 2 --max-seq-length 64 --dummy-data"
    dry = place.run("--dry-run", *options.split())
    assert dry.code == 0, dry.text
    assert_in_order(dry.out, ["학습 환경 확인", "모든 요구사항 충족", "📋 학습 정보", "실행할 명령어"])
    assert "🎯 학습 시작!" not in dry.out
    assert list_tree(place.folder) == {}
    command = {**place.command(), "args": ["bash", "-c", dry.out.strip().splitlines()[-1]], "cwd": ROOT.parent}
    done = place.execute(command)
    assert done.code == 0, done.text + place.report()
    assert "✅ 학습 완료!" in done.out
    assert (place.outputs / "checkpoint-2" / "pytorch_model.bin").is_file()
    assert place.info()["state"] == "finished"


def test_stop_where_nothing_runs(place: Place) -> None:
    answer = place.run("--stop")
    assert answer.code == 3
    assert "실행 중인 학습이 없습니다" in answer.text
    assert list_tree(place.folder) == {}


def test_stop_leaves_a_process_alone_that_only_mentions_the_launcher(place: Place) -> None:
    environment = place.command()["env"]  # by which it ends with the place
    bystander = subprocess.Popen(["bash", "-c", "sleep 300; true", str(LAUNCHER)], env=environment)
    place.logs.mkdir()
    place.pid_file.write_text(f"{bystander.pid}\n")
    answer = place.run("--stop", timeout=20)
    assert answer.code == 3, answer.text
    assert bystander.poll() is None
    assert place.run("--status").code == 1
