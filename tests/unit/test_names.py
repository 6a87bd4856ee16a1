from __future__ import annotations

import pytest

from sglang_w4afp8.checkpoint.names import (
    classify,
    input_scale_name,
    is_fused_expert,
    layer_of,
    mtp_layers,
    parse_expert,
    uses_w_scale_names,
)


@pytest.mark.parametrize(
    ("name", "module", "layer", "expert", "projection", "part"),
    [
        (
            "model.layers.3.mlp.experts.255.down_proj.weight_scale_inv",
            "model.layers.3.mlp.experts",
            3,
            255,
            "down",
            "weight_scale_inv",
        ),
        ("layers.0.ffn.experts.1.w3.weight", "layers.0.ffn.experts", 0, 1, "up", "weight"),
        (
            "language_model.model.layers.60.mlp.experts.7.gate_proj.weight_packed",
            "language_model.model.layers.60.mlp.experts",
            60,
            7,
            "gate",
            "weight_packed",
        ),
        (
            "model.layers.5.block_sparse_moe.experts.0.w2.weight",
            "model.layers.5.block_sparse_moe.experts",
            5,
            0,
            "down",
            "weight",
        ),
        (
            "model.layers.3.mlp.experts.0.up_proj.weight_scale.int4",
            "model.layers.3.mlp.experts",
            3,
            0,
            "up",
            "weight_scale.int4",
        ),
    ],
)
def test_expert_names(name, module, layer, expert, projection, part):
    parsed = parse_expert(name)
    assert parsed is not None
    assert (parsed.module, parsed.layer, parsed.expert) == (module, layer, expert)
    assert (parsed.projection, parsed.part) == (projection, part)
    assert name == f"{parsed.prefix}.{part}"


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.3.mlp.shared_experts.gate_proj.weight",
        "model.layers.3.mlp.gate.weight",
        "model.layers.3.mlp.gate_proj.weight",
        "model.layers.3.mlp.experts.gate_up_proj",
        "model.layers.3.mlp.experts.0.norm.weight",
        "model.experts.0.w1.weight",
    ],
)
def test_names_that_are_no_experts(name):
    assert parse_expert(name) is None


def test_fused_experts_are_recognised():
    assert is_fused_expert("model.layers.3.mlp.experts.gate_up_proj")
    assert is_fused_expert("model.layers.3.mlp.experts.down_proj.weight")
    assert not is_fused_expert("model.layers.3.mlp.experts.0.down_proj.weight")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.mlp.experts.0.up_proj.weight", "experts"),
        ("model.layers.61.mlp.experts.0.up_proj.weight", "mtp experts"),
        ("model.layers.61.eh_proj.weight", "mtp other"),
        ("model.layers.3.mlp.shared_experts.up_proj.weight", "shared experts"),
        ("model.layers.3.mlp.gate.weight", "router"),
        ("model.layers.3.mlp.gate.e_score_correction_bias", "router"),
        ("model.layers.0.mlp.gate_proj.weight", "dense mlp"),
        ("model.layers.0.self_attn.q_a_proj.weight", "attention"),
        ("model.layers.0.self_attn.q_a_layernorm.weight", "norm"),
        ("model.embed_tokens.weight", "embedding"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_classes(name, expected):
    assert classify(name, {61}) == expected


def test_mtp_layers_come_after_the_last_one():
    assert mtp_layers({"num_hidden_layers": 61, "num_nextn_predict_layers": 1}) == {61}
    nested = {"text_config": {"num_hidden_layers": 4, "num_nextn_predict_layers": 2}}
    assert mtp_layers(nested) == {4, 5}
    assert mtp_layers({"num_hidden_layers": 61}) == frozenset()


def test_scale_spelling_follows_the_loader():
    module = "model.layers.3.mlp.experts"
    assert uses_w_scale_names({"model_type": "deepseek_v3"})
    assert not uses_w_scale_names({"model_type": "qwen3_moe"})
    names = [input_scale_name(module, 0, p, w_names=True) for p in ("gate", "up", "down")]
    assert names == [f"{module}.0.{w}.input_scale" for w in ("w1", "w3", "w2")]
    assert input_scale_name(module, 0, "up", w_names=False) == f"{module}.0.up_proj.input_scale"
    assert layer_of("model.layers.12.x") == 12
    assert layer_of("lm_head.weight") is None
