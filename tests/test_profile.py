"""--profile: where the time of a step goes, from a trace."""

from __future__ import annotations

import gzip
import json
import logging

import pytest
from samples import tiny_run

import train_h100_dual as t


def event(name: str, start: float, length: float, cat: str = "cpu_op", row: int = 1) -> dict:
    return {"ph": "X", "name": name, "ts": start, "dur": length, "cat": cat, "pid": 0, "tid": row}


CPU_STEP = [
    event("PyTorch Profiler (0)", -100, 1200, "Trace", row=3),
    event("ProfilerStep#5", 0, 1000, "user_annotation"),
    event("next batch", 0, 50, "user_annotation"),
    event("aten::index", 10, 10),  # what the loader does is the loader's
    event("aten::linear", 100, 200),
    event("aten::mm", 110, 180),
    event("aten::_scaled_dot_product_flash_attention_for_cpu", 300, 100),
    event("aten::silu", 400, 50),
    event("autograd::engine::evaluate_function: LogSoftmaxBackward0", 450, 50),
    event("aten::mul", 460, 20),
    event("autograd::engine::evaluate_function: AccumulateGrad", 500, 200),  # waits for the reduction
    event("aten::add_", 500, 20),
    event("gloo:all_reduce", 350, 300, "user_annotation", row=2),  # 300 to 500 is hidden by computing
    event("Optimizer.step#AdamW.step", 700, 100, "user_annotation"),
    event("aten::mm", 710, 80),  # an optimizer's own
]
GPU_STEP = [
    event("ProfilerStep#5", 0, 400, "user_annotation"),
    event("next batch", 0, 120, "user_annotation"),
    event("aten::mm", 130, 5),  # launched only
    event("ProfilerStep#5", 100, 1000, "gpu_user_annotation", row=7),
    event("nvjet_sm90_tst_128x256", 130, 270, "kernel", row=7),
    event("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", 400, 100, "kernel", row=7),
    event("triton_red_fused__log_softmax_nll_loss_forward", 500, 100, "kernel", row=7),
    event("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 550, 150, "kernel", row=9),
    event("triton_poi_fused_mul_silu", 750, 50, "kernel", row=7),
    event("Optimizer.step#Muon.step", 800, 200, "gpu_user_annotation", row=7),
    event("nvjet_sm90_tst_64x64", 800, 90, "kernel", row=7),
]


def test_each_microsecond_of_a_step_on_the_cpu_goes_to_one_kind_of_work():
    found, whole = t.time_by_work(CPU_STEP)
    assert whole == 1000
    assert found == {
        "어텐션": 100,
        "행렬곱": 200,
        "손실": 50,
        "옵티마이저": 100,
        "그 밖의 연산": 70,
        "통신": 130,
        "데이터 로더": 50,
        "대기": 300,
    }


def test_on_a_gpu_the_streams_count_and_hidden_communication_costs_nothing():
    found, whole = t.time_by_work(GPU_STEP)
    assert whole == 1000
    assert found == {
        "어텐션": 100,
        "행렬곱": 270,
        "손실": 100,
        "옵티마이저": 200,
        "그 밖의 연산": 50,
        "통신": 100,
        "데이터 로더": 20,
        "대기": 160,
    }


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_32", "cuDNN"),
        ("void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<...>>>", "FlashAttention-3"),
        ("void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnBwdSm90<...>>>", "FlashAttention-3"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64>>", "flash"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", "efficient"),
    ],
)
def test_the_attention_kernel_is_known_by_its_name(kernel, name):
    events = [*CPU_STEP, event(kernel, 1, 9, "kernel", row=7), event("nvjet_sm90", 10, 90, "kernel", row=7)]
    assert t.attention_kernel(events) == (name, kernel)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("triton_poi_fused__scaled_dot_product_cudnn_attention__to_copy_cat_cos_mul_neg_sin_3", "그 밖의 연산"),
        ("triton_per_fused__to_copy_div_exp_prepare_softmax_online_scatter_add_sub_7", "손실"),
        ("triton_tem_fused_mm_12", "행렬곱"),
    ],
)
def test_a_fused_kernel_is_not_taken_for_the_attention_that_its_name_recalls(kernel, kind):
    events = [*GPU_STEP[:4], event(kernel, 100, 1000, "kernel", row=7)]
    found, _ = t.time_by_work(events)
    assert max(found, key=found.get) == kind
    assert t.attention_kernel(events)[0] != "cuDNN"


def test_a_profiled_run_leaves_a_trace_and_tells_where_the_time_went(tmp_path, caplog):
    run = tiny_run(tmp_path, "--profile", "--max-steps", "6", "--eval-steps", "1000", "--no-save-initial")
    t.logger.propagate = True
    with caplog.at_level(logging.INFO, "h100_dual"):
        t.train(run, t.TrainState())
        run.saver.wait()
    with gzip.open(run.cfg.output_dir / "profile_trace.json.gz") as stream:
        events = [item for item in json.load(stream)["traceEvents"] if item.get("ph") == "X"]
    assert len([item for item in events if item["name"].startswith("ProfilerStep#")]) == 3
    found, whole = t.time_by_work(events)
    assert sum(found.values()) == pytest.approx(whole)
    assert found["행렬곱"] > 0.2 * whole
    assert min(found[kind] for kind in ("어텐션", "손실", "옵티마이저", "데이터 로더", "대기")) > 0
    lines = [text for text in caplog.messages if text.startswith("   • ") and "%" in text]
    shares = [float(line.split("%")[0].split()[-1]) for line in lines]
    assert len(shares) == 8
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert any("어텐션 커널: flash (CPU) (aten::_scaled_dot_product_flash" in text for text in caplog.messages)


def test_a_run_of_one_step_is_too_short_to_profile(tmp_path, caplog):
    run = tiny_run(tmp_path, "--profile")
    t.logger.propagate = True
    assert t.start_profile(run, 1) is None
    assert "--max-steps" in caplog.text
