"""Memory: the estimate against what autograd keeps, refusals, the loss in pieces, the search for a batch size."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Place, assert_in_order
from faults import SMALL, weights
from samples import SHAPE, Words, config, options, tiny_run
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, Qwen3Config

import train_h100_dual as t


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of every tensor's storage from the operation that makes it until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, storage._cdata)

    def forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for item in tree_leaves(out):
            if isinstance(item, torch.Tensor):
                self.count(item)
        return out


def measured_peak(cfg: t.TrainConfig, world_size: int, real: bool = False) -> tuple[int, int]:
    """Peak of a run's second step and what it leaves behind, in bytes; without ``real`` nothing is computed."""
    with nullcontext() if real else FakeTensorMode(), t.attention_kernels(cfg.attention), LiveTensors() as live:
        loss_module = t.LMWithLoss(t.build_model(cfg, Words(cfg.vocab_size)))
        optimizer = t.build_optimizer(loss_module.model, cfg)
        rows = torch.zeros(cfg.batch_size, cfg.max_seq_length + 1, dtype=torch.int64)
        for _ in range(2):
            live.peak = 0
            for _ in range(cfg.gradient_accumulation_steps):
                with torch.autocast("cpu", torch.bfloat16) if cfg.precision == "bf16" else nullcontext():
                    loss = loss_module(rows)
                loss.backward()
                del loss
            torch.nn.utils.clip_grad_norm_(loss_module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=world_size == 1)  # DDP's buckets are gradients that stay
        return live.peak, live.now


WIDE = t.Preset(2, 768, 2048, 64)
TINY = replace(t.PRESETS["tiny"], layers=2)
CASES = [
    (TINY, 2048, 128, 8, 1, "--fp32"),
    (TINY, 2048, 512, 8, 1, "--bf16 --attention math"),
    (TINY, 65536, 128, 4, 1, "--bf16 --gradient-accumulation-steps 2"),
    (WIDE, 4096, 2048, 4, 1, "--bf16"),
    (WIDE, 4096, 2048, 4, 1, "--bf16 --gradient-checkpointing"),
    (WIDE, 65536, 512, 4, 2, "--fp32 --gradient-checkpointing"),
]
LARGE_CASES = [
    (t.PRESETS["350m"], 65536, 2048, 16, 2, "--bf16 --gradient-checkpointing"),
    (t.PRESETS["1.3b"], 65536, 2048, 4, 2, "--bf16"),
    (t.PRESETS["1.3b"], 65536, 2048, 4, 1, "--fp32"),
    (t.PRESETS["3b"], 65536, 2048, 2, 1, "--bf16 --gradient-checkpointing"),
]


@pytest.mark.parametrize(
    ("preset", "vocabulary", "length", "batch", "world_size", "options"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in LARGE_CASES)],
)
def test_the_estimate_is_right_within_a_tenth(
    tmp_path, monkeypatch, preset, vocabulary, length, batch, world_size, options
):
    monkeypatch.setattr(t, "try_out", lambda model: (False, True))  # tensors without values can't be looked at
    monkeypatch.setitem(t.PRESETS, "tiny", preset)
    shape = f"--vocab-size {vocabulary} --max-seq-length {length} --batch-size {batch}"
    cfg = config(tmp_path, *shape.split(), *options.split())
    parts = t.estimate_memory(cfg, preset, world_size)
    parts.pop("라이브러리")
    peak, _ = measured_peak(cfg, world_size)
    assert sum(parts.values()) == pytest.approx(peak, rel=0.1)


def test_the_parts_that_stay_between_steps_are_exact_and_counting_needs_no_values(tmp_path: Path) -> None:
    cfg = config(tmp_path, "--bf16")
    peak, left = measured_peak(cfg, 2, real=True)
    parts = t.estimate_memory(cfg, t.PRESETS["tiny"], 2)
    # Gradients are as large as the weights; twice that is there once, when DDP makes its buckets anew.
    assert left == pytest.approx(2 * parts["가중치"] + parts["옵티마이저"], rel=0.001)
    assert parts["기울기"] == 2 * parts["가중치"]
    assert t.estimate_memory(cfg, t.PRESETS["tiny"], 1)["기울기"] == parts["가중치"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t, "try_out", lambda model: (False, True))
        assert measured_peak(cfg, 2)[0] == pytest.approx(peak, rel=0.001)


@pytest.mark.parametrize("options", ["--bf16", pytest.param("--fp32", marks=pytest.mark.slow)])
def test_the_estimate_of_compiled_activations_is_what_the_partitioner_keeps(
    tmp_path: Path, monkeypatch, options: str
) -> None:
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    kept: list[int] = []

    def count_outputs(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        nodes = tree_leaves(next(iter(graph.graph.find_nodes(op="output"))).args[0])
        made = [node.meta["val"] for node in nodes if isinstance(node, torch.fx.Node) and node.op != "placeholder"]
        storages = {item.untyped_storage()._cdata: item.untyped_storage().nbytes() for item in made}
        kept.append(sum(storages.values()))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=count_outputs,
        bw_compiler=lambda graph, inputs: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table,
    )
    monkeypatch.setitem(t.PRESETS, "tiny", TINY)
    shape = "--vocab-size 2048 --max-seq-length 256 --batch-size 16"
    cfg = config(tmp_path, "--compile", options, *shape.split())
    loss_module = t.LMWithLoss(t.build_model(cfg, Words(2048)))
    rows = torch.zeros(cfg.batch_size, cfg.max_seq_length + 1, dtype=torch.int64)
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16) if options == "--bf16" else nullcontext():
        torch.compile(loss_module, backend=backend, fullgraph=True)(rows)
    torch._dynamo.reset()
    parts = t.estimate_memory(cfg, TINY, 1)
    assert parts["활성값"] + parts["반정밀도 사본"] == pytest.approx(kept[0], rel=0.1)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> torch.nn.Module:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(t.PRESETS, "tiny", TINY)
        return t.build_model(config(tmp_path_factory.mktemp("model")), Words())


def loss_and_gradients(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    model.zero_grad()
    value = loss()
    value.backward()
    return [value.detach(), *(weight.grad.clone() for weight in model.parameters())]


def plain_loss(model: torch.nn.Module, rows: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """The loss as a textbook has it: all logits, then their cross entropy."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten(), reduction=reduction)


def difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """The largest relative difference between two lists of tensors."""
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("piece", [132, 37], ids=["whole", "in pieces"])
def test_the_loss_has_the_gradients_of_the_plain_cross_entropy(model, monkeypatch, piece: int) -> None:
    monkeypatch.setattr(t, "logit_chunk_size", lambda tokens, vocabulary: piece)
    rows, loss = torch.randint(0, 500, (4, 34)), t.LMWithLoss(model)
    plain = loss_and_gradients(model, lambda: plain_loss(model, rows))
    assert difference(loss_and_gradients(model, lambda: loss(rows)), plain) < 2e-6
    assert difference([loss(rows, reduction="none")], [plain_loss(model, rows, reduction="none")]) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        ours = loss_and_gradients(model, lambda: loss(rows))
        theirs = loss_and_gradients(model, lambda: plain_loss(model, rows))
    assert difference(ours, plain) < 1.1 * difference(theirs, plain)


def test_the_loss_in_pieces_and_checkpointing_are_one_graph_with_the_same_gradients(model, monkeypatch) -> None:
    monkeypatch.setattr(t, "logit_chunk_size", lambda tokens, vocabulary: 20)
    rows, again = torch.randint(0, 500, (2, 33)), copy.deepcopy(model)
    plain = loss_and_gradients(model, lambda: plain_loss(model, rows))
    again.gradient_checkpointing_enable({"use_reentrant": False})
    torch._dynamo.reset()
    compiled = torch.compile(t.LMWithLoss(again), backend="aot_eager", fullgraph=True)
    assert difference(loss_and_gradients(again, lambda: compiled(rows)), plain) < 2e-6
    torch._dynamo.reset()


def test_more_rows_than_two_gib_of_logits_need_no_more_memory_for_them(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(t, "try_out", lambda model: (False, True))
    peaks = []
    for batch in (4, 64):  # 0.5 and 8 GiB of logits
        options = f"--vocab-size 65536 --max-seq-length 512 --batch-size {batch} --gradient-checkpointing"
        cfg = config(tmp_path, *options.split())
        peaks.append(measured_peak(cfg, 1)[0] - batch * 512 * 256 * 4 * (4 + 12))  # without what grows with the rows
    assert peaks[1] - peaks[0] < 1.5 * 2**30
    assert [t.logit_chunk_size(tokens, 65536) for tokens in (8192, 8193, 65536)] == [8192, 2731, 4096]


@pytest.mark.parametrize("precision", ["--bf16", "--fp32"])
def test_an_evaluation_needs_no_more_memory_than_a_step(tmp_path: Path, monkeypatch, precision: str) -> None:
    monkeypatch.setattr(t, "try_out", lambda model: (False, True))
    monkeypatch.setitem(t.PRESETS, "tiny", WIDE)
    shape = "--vocab-size 65536 --max-seq-length 512 --batch-size 16 --gradient-checkpointing"  # 2 GiB of logits
    cfg = config(tmp_path, *shape.split(), precision)
    with FakeTensorMode(), torch.no_grad(), LiveTensors() as live:
        loss_module = t.LMWithLoss(t.build_model(cfg, Words(cfg.vocab_size)))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "--bf16"):
            loss_module(torch.zeros(16, 513, dtype=torch.int64), reduction="none")
    assert live.peak + t.estimate_memory(cfg, WIDE, 1)["옵티마이저"] < measured_peak(cfg, 1)[0]


def test_models_that_change_their_logits_keep_their_own(tmp_path: Path) -> None:
    shape = SHAPE | {"num_key_value_heads": 2, "vocab_size": 512, "eos_token_id": 0, "bos_token_id": 0}
    rows = torch.randint(0, 500, (2, 17))
    for kind, plain in ((Qwen3Config, True), (Gemma2Config, False), (CohereConfig, False), (GraniteConfig, False)):
        more = {"logits_scaling": 8.0} if kind is GraniteConfig else {}
        model = AutoModelForCausalLM.from_config(kind(**shape, **more, pad_token_id=None))
        model.train()
        loss = t.LMWithLoss(model)
        assert loss.plain_head is plain, kind
        assert model.training
        assert torch.allclose(loss(rows), plain_loss(model, rows), atol=1e-6), kind


def test_the_least_that_a_search_may_find_is_what_has_to_fit(tmp_path: Path) -> None:
    cfg, _ = t.resolve_config(t.parse_args(["--train", "--batch-size", "24", "--no-compile"]), "cuda")
    gpu = t.Gpu("NVIDIA H100 PCIe", 81559, 4)
    (text,) = t.room_problems(cfg, [gpu, gpu], 2, 0)
    phrases = ["부족합니다", r"GPU당 [\d.]+ GiB", "가중치 5.0", "활성값", "로짓", "79.6 GiB", "--find-batch-size"]
    assert_in_order(text, phrases)
    assert t.room_problems(replace(cfg, find_batch_size=True), [gpu, gpu], 2, 0) == []


@pytest.mark.usefixtures("with_cuda")
def test_training_that_does_not_fit_is_refused_and_a_test_goes_on(place: Place, with_gpus: Callable[..., None]) -> None:
    with_gpus(2, total=24_576)
    answer = place.run("--train", "--dummy-data")
    assert answer.code == 1
    assert len(answer.complaints) == 1
    for words in ("GPU 메모리가 부족합니다", "24.0 GiB", "옵티마이저 10.0", "--model-size"):
        assert words in answer.err
    assert not place.outputs.exists()
    answer = place.run("--test", "--dry-run")
    assert answer.code == 0, answer.text
    assert_in_order(
        answer.out, [r"⚠️ .*GPU 메모리가 부족합니다: .*--find-batch-size", "예상 메모리: GPU당 .*가중치 5.0 "]
    )


def test_the_shape_of_a_model_that_is_brought_along_is_read(tmp_path: Path) -> None:
    kind = Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=32, vocab_size=512, tie_word_embeddings=False)
    kind.save_pretrained(tmp_path)
    cfg = config(tmp_path, "--model-config", str(tmp_path))
    found = t.model_shape(cfg)
    real = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(kind).parameters())
    norms = 2 * 2 * 32  # Qwen3's of queries and keys
    assert found.parameter_count(512) == real - norms


# As on GPUs of which the second holds five rows; a CPU would refuse the option.
LIMIT = """
real_main = main
def main(cfg, stop):
    return real_main(replace(cfg, find_batch_size=True), stop)
real_forward = LMWithLoss.forward
def limited(self, rows, reduction="mean"):
    if torch.is_grad_enabled() and len(rows) > (16, 5)[rank_and_world()[0]]:  # evaluating needs less
        raise torch.OutOfMemoryError("injected")
    return real_forward(self, rows, reduction)
LMWithLoss.forward = limited
"""


@pytest.mark.slow
def test_the_found_batch_size_is_the_least_of_all_ranks_and_trains_as_if_it_had_been_typed(broken) -> None:
    options, limited = [*SMALL, "--max-steps", "4"], broken(LIMIT)
    answer = limited.run(*options, "--batch-size", "6", "--gradient-accumulation-steps", "2")
    assert answer.code == 0, answer.text
    too_large = [f"배치 크기 {size}: 메모리가 부족합니다" for size in (12, 6)]
    assert_in_order(answer.out, [*too_large, "✅ 배치 크기 3, 기울기 누적 4 ", "스텝 1/4"])
    assert "다시 시작" not in answer.out
    typed = broken("")
    answer = typed.run(*options, "--batch-size", "3", "--gradient-accumulation-steps", "4")
    assert answer.code == 0, answer.text
    found, expected = weights(limited.folder, 4), weights(typed.folder, 4)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_search_leaves_no_model_behind(tmp_path: Path, monkeypatch) -> None:
    run = tiny_run(tmp_path, "--bf16", "--gradient-accumulation-steps", "2")  # accelerate's wrapper refers to itself
    forward, beside = t.LMWithLoss.forward, []

    def others() -> int:
        return sum(type(item) is torch.nn.Parameter and id(item) not in there for item in gc.get_objects())

    def limited(self: t.LMWithLoss, rows: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        beside.append(others() - len(list(self.parameters())))
        if len(rows) > 1:
            raise torch.OutOfMemoryError
        return forward(self, rows, reduction)

    monkeypatch.setattr(t.LMWithLoss, "forward", limited)
    before = [weight.clone() for weight in run.model.parameters()]
    there = {id(item) for item in gc.get_objects() if type(item) is torch.nn.Parameter}
    gc.disable()  # no luck
    try:
        assert t.find_batch_size(run.cfg, 4, run.corpus.tokenizer, run.accelerator) == 1
    finally:
        gc.enable()
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), before, strict=True))
    assert beside == [0] * 4  # sizes 4, 2, 1 and 1, no try beside another's model
    assert others() == 0


CUBLAS = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), CUBLAS])
def test_nothing_that_fits_is_said(tmp_path: Path, monkeypatch, error: RuntimeError) -> None:
    run = tiny_run(tmp_path, "--gradient-accumulation-steps", "2")
    sizes = []

    def fail(self: t.LMWithLoss, rows: torch.Tensor) -> None:
        sizes.append(len(rows))
        raise error

    monkeypatch.setattr(t.LMWithLoss, "forward", fail)
    with pytest.raises(t.EnvironmentProblem, match="배치 크기 1도"):
        t.find_batch_size(run.cfg, 4, run.corpus.tokenizer, run.accelerator)
    assert sizes == [4, 2, 1]


def test_fp8_is_refused_where_it_cannot_run(place: Place, with_gpus: Callable[..., None], with_cuda: None) -> None:
    answer = place.run("--device", "cpu", "--fp8")
    assert answer.code == 2
    assert "--fp8: CPU에서는 쓸 수 없습니다" in answer.err
    with_gpus(2)  # an A100 by the stub's compute capability
    answer = place.run("--train", "--dummy-data", "--fp8")
    assert answer.code == 1
    assert "compute capability 8.9" in answer.err
    assert not place.outputs.exists()


def test_fp8_without_its_package_is_refused(tmp_path: Path, monkeypatch) -> None:
    plan = t.make_launch_plan(t.parse_args(options(tmp_path, "--dummy-data")), 1)
    plan = plan._replace(cfg=replace(plan.cfg, precision="fp8"), gpus=[t.Gpu("NVIDIA H100 PCIe", 81559, 4)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(t.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(t.EnvironmentProblem, match="pip install torchao"):
        t.check_lines(plan, [])


def test_fp8_converts_all_but_the_first_layer_and_the_head_and_leaves_the_weights_alone(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    from torchao.float8.float8_linear import Float8Linear

    before = t.build_model(config(tmp_path), Words()).state_dict()
    loss = t.build_loss(t.replace(config(tmp_path), precision="fp8"), Words())
    model = loss.model
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    kept = {name for name, module in linear.items() if not isinstance(module, Float8Linear)}
    assert kept == {"lm_head", "model.layers.0.self_attn.q_proj"}
    assert len(linear) == 4 * 7 + 1
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    for name, weight in before.items():
        assert type(after[name]) is torch.nn.Parameter
        assert after[name].dtype == weight.dtype
        assert torch.equal(after[name], weight)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert loss.plain_head
