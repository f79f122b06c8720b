"""The decoder: shapes, initial weights, causality, attention."""

from __future__ import annotations

import copy
import itertools
import json
import math

import pytest
import torch
from samples import SHAPE, SMALL_MODEL, Words, config, options
from transformers import BertConfig, LlamaConfig, LlamaForCausalLM, MixtralConfig

import train_h100_dual as t


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return t.build_model(config(tmp_path_factory.mktemp("model")), Words())


@pytest.mark.parametrize("size", list(t.PRESETS))
def test_presets_have_the_parameters_that_help_states(tmp_path, size):
    cfg = config(tmp_path, "--model-size", size)
    settings = t.model_settings(cfg)
    settings.vocab_size = 512
    with torch.device("meta"):
        model = LlamaForCausalLM(settings)
    assert sum(weight.numel() for weight in model.parameters()) == t.PRESETS[size].parameter_count(512)
    assert settings.head_dim == t.PRESETS[size].head


def test_initial_weights_are_scaled_by_depth_and_the_same_for_the_same_seed(tmp_path, model):
    layer = model.model.layers[0]
    expected = 0.02 / math.sqrt(2 * 4)
    assert layer.self_attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert layer.self_attn.o_proj.weight.std().item() == pytest.approx(expected, rel=0.05)
    assert layer.mlp.down_proj.weight.std().item() == pytest.approx(expected, rel=0.05)
    assert model.model.embed_tokens.weight[0].abs().sum() > 0
    again = t.build_model(config(tmp_path), Words())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    rows = torch.randint(0, 500, (4, 33))
    assert t.LMWithLoss(model)(rows).item() == pytest.approx(math.log(512), abs=0.2), "it is as unsure as it should be"


def test_attention_is_the_models_own(model):
    tokens = torch.randint(0, 500, (2, 32))
    plain = LlamaForCausalLM(copy.deepcopy(model.config))
    plain.load_state_dict(model.state_dict())
    plain.set_attn_implementation("eager")
    with torch.no_grad():
        ours, theirs = (item(input_ids=tokens, use_cache=False).logits for item in (model, plain))
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_one_compiled_graph_without_a_mask_serves_all_layers_and_gives_the_same_gradients(tmp_path):
    gradients, rows = [], torch.randint(0, 500, (2, 33))
    torch._dynamo.utils.counters.clear()
    for more, compiled in itertools.product(((), ("--gradient-checkpointing",)), (False, True)):
        torch._dynamo.reset()
        loss, graphs = t.LMWithLoss(t.build_model(config(tmp_path, *more), Words())), []
        assert loss.model.is_gradient_checkpointing is bool(more)
        names = set(loss.model.state_dict())
        if compiled:
            loss.compile_parts(backend=lambda graph, inputs, graphs=graphs: graphs.append(graph) or graph)
        loss(rows).backward()
        gradients.append([weight.grad for weight in loss.parameters()])
        assert set(loss.model.state_dict()) == names
        assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(gradients[0], gradients[-1], strict=True))
        if compiled:
            (layer, _) = graphs  # and the head's with its loss
            parts = [part for part in layer.modules() if isinstance(part, torch.fx.GraphModule)]  # a checkpointed one
            (call,) = [node for part in parts for node in part.graph.nodes if "scaled_dot_product" in str(node.target)]
            assert call.kwargs["is_causal"] is True
            assert call.kwargs.get("attn_mask") is None
            assert len(call.args) == 3
    torch._dynamo.reset()
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("more", [(), ("--gradient-checkpointing",)])
def test_parts_compiled_apart_find_what_the_whole_model_does(tmp_path, more, backend):
    cfg, rows, found = config(tmp_path, *SMALL_MODEL, *more), torch.arange(66).reshape(2, 33) * 7 % 500, []
    for compiles in (
        lambda module: module,
        lambda module: torch.compile(module, backend="aot_eager", fullgraph=True),
        lambda module: module.compile_parts(backend=backend) or module,
    ):
        torch._dynamo.reset()
        module = t.LMWithLoss(t.build_model(cfg, Words()))
        loss = compiles(module)(rows)
        loss.backward()
        found.append([loss.detach(), *(weight.grad for weight in module.parameters())])
    torch._dynamo.reset()
    eager, whole, parts = found
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(parts, eager, strict=True))
    if backend == "aot_eager":
        assert all(torch.equal(a, b) for a, b in zip(parts, whole, strict=True))


def test_a_model_configuration_can_be_brought_along(tmp_path):
    LlamaConfig(**SHAPE, num_key_value_heads=2, vocab_size=99).save_pretrained(tmp_path)
    model = t.build_model(config(tmp_path, "--model-config", str(tmp_path)), Words())
    assert model.config.vocab_size == 512  # the tokenizer's, up to a multiple of 128
    assert model.config.num_key_value_heads == 2
    assert t.LMWithLoss(model)(torch.randint(0, 500, (2, 17))).isfinite()


@pytest.mark.parametrize(("own", "told"), [({}, False), ({"vocab_size": 512}, False), ({"vocab_size": 32000}, True)])
def test_a_vocabulary_that_gives_way_to_the_tokenizers_is_told(tmp_path, own, told):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", "hidden_size": 64, **own}))
    cfg = t.parse_args(options(tmp_path, "--dummy-data", "--model-config", str(path)))
    notes = [note for note in t.make_launch_plan(cfg, 1).notes if "vocab_size" in note]
    assert notes == ["--model-config의 vocab_size 32,000 대신 토크나이저의 크기를 씁니다 (최대 512)"] * told


def test_the_routers_loss_is_trained_where_a_configuration_asks_for_it(tmp_path):
    rows, losses = torch.randint(0, 500, (2, 17)), []
    for asked, coefficient in ((False, 1.0), (True, 0.0), (True, 1.0)):
        router = {"output_router_logits": asked, "router_aux_loss_coef": coefficient}
        MixtralConfig(**SHAPE, num_key_value_heads=2, **router).save_pretrained(tmp_path)
        loss = t.LMWithLoss(t.build_model(config(tmp_path, "--model-config", str(tmp_path)), Words()))
        total = loss(rows)
        total.backward()
        losses.append(total.item())
        assert loss(rows, reduction="none").mean().item() == pytest.approx(losses[0], abs=1e-4)  # an evaluation's
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[2] > losses[1] + 1  # of balanced experts it is the number of those that are chosen


def test_an_encoder_is_refused_unless_it_is_made_a_decoder(tmp_path):
    for is_decoder in (False, True):
        BertConfig(**SHAPE, is_decoder=is_decoder).save_pretrained(tmp_path)
        cfg = config(tmp_path, "--model-config", str(tmp_path))
        if is_decoder:
            assert t.LMWithLoss(t.build_model(cfg, Words()))(torch.randint(0, 500, (2, 17))).isfinite()
        else:
            with pytest.raises(RuntimeError, match=r'인코더.*"is_decoder": true'):
                t.build_model(cfg, Words())


def test_a_model_is_built_where_only_kernels_without_fp32_are_allowed(tmp_path):
    with t.attention_kernels("cudnn"):  # as a run with --attention does, flash's too on a GPU
        assert t.build_model(config(tmp_path), Words()).config._attn_implementation == t.ATTENTION_NAME


def test_a_vocabulary_larger_than_that_of_existing_weights_is_refused(tmp_path, model):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="513"):
        t.build_model(config(tmp_path, "--init-from", str(tmp_path)), Words(513))


def test_a_model_with_a_sliding_window_keeps_its_own_attention(tmp_path):
    from transformers import MistralConfig

    MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=8).save_pretrained(tmp_path)
    model = t.build_model(config(tmp_path, "--model-config", str(tmp_path)), Words())
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("typed", "kernel"), [("auto", "flash"), ("math", "math")])
def test_the_attention_that_really_runs_is_found_out(tmp_path, model, typed, kernel):
    with t.attention_kernels(typed):
        assert t.attention_backend(model, config(tmp_path, "--attention", typed), 2) == kernel


@pytest.mark.parametrize("precision", ["--fp32", "--bf16"])
@pytest.mark.parametrize("kernel", ["auto", "flash", "math"])
def test_each_kernel_of_this_machine_agrees_with_plain_attention_both_ways(tmp_path, kernel, precision):
    cfg = t.replace(config(tmp_path, precision), attention=kernel)  # on a CPU flash can't be typed
    assert t.check_attention(cfg, torch.device("cpu")) == []


def test_a_kernel_that_can_not_run_here_is_refused_by_its_name(tmp_path, model):
    cfg = t.replace(config(tmp_path), attention="cudnn")  # on a CPU the options refuse it themselves
    with t.attention_kernels("cudnn"), pytest.raises(t.EnvironmentProblem, match="--attention cudnn"):
        t.attention_backend(model, cfg, 2)


def test_the_kernel_is_asked_for_with_the_heads_that_the_model_has(tmp_path, monkeypatch):
    LlamaConfig(**SHAPE, num_key_value_heads=2, vocab_size=99).save_pretrained(tmp_path)
    model = t.build_model(config(tmp_path, "--model-config", str(tmp_path)), Words())
    asked = []

    def choose(*tensors, **options):
        asked.append(([item.shape[1] for item in tensors], options["enable_gqa"]))
        return 1

    monkeypatch.setattr(torch, "_fused_sdp_choice", choose)
    assert t.attention_backend(model, config(tmp_path), 2) == "flash"
    assert asked == [([4, 2, 2], True)]
