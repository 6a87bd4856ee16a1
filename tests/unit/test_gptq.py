from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_w4afp8.errors import CheckpointError, ConfigError
from sglang_w4afp8.packing import has_minus_eight
from sglang_w4afp8.quantize.gptq import inverse_factor, quantize_gptq
from sglang_w4afp8.quantize.weights import quantize_weight
from sglang_w4afp8.reference import dequantize_int4
from sglang_w4afp8.testing.checkpoints import MoeShape, tensors_of, write_bf16
from sglang_w4afp8.tools.convert import convert_checkpoint


def correlated_inputs(columns: int, tokens: int = 4096) -> torch.Tensor:
    torch.manual_seed(3)
    mix = torch.randn(columns, columns) / columns**0.5
    return torch.randn(tokens, columns) @ (mix + 0.5 * torch.eye(columns))


def loss(weight: torch.Tensor, value: torch.Tensor, inputs: torch.Tensor) -> float:
    return float(((weight - value) @ inputs.T).square().sum())


@pytest.mark.parametrize("symmetric", [False, True])
def test_output_error_is_below_that_of_the_search(symmetric):
    inputs = correlated_inputs(256)
    torch.manual_seed(0)
    weight = torch.randn(96, 256)
    factor = inverse_factor(inputs.T @ inputs / len(inputs))
    losses = {}
    for method, options in {"mse": {}, "gptq": {"factor": factor}}.items():
        packed, scale, _ = quantize_weight(weight, method=method, symmetric=symmetric, **options)
        assert has_minus_eight(packed) != symmetric
        losses[method] = loss(weight, dequantize_int4(packed, scale, 128, torch.float32), inputs)
    assert losses["gptq"] < 0.7 * losses["mse"]


def test_uncorrelated_inputs_leave_nothing_to_gain():
    torch.manual_seed(0)
    weight = torch.randn(32, 256)
    plain = quantize_weight(weight, method="mse")
    gptq = quantize_weight(weight, method="gptq", factor=inverse_factor(torch.eye(256)))
    assert torch.equal(plain[1], gptq[1])
    assert (plain[0] != gptq[0]).float().mean() < 1e-3  # ties in division


def test_column_order_is_a_textbook_case():
    # Two perfectly coupled inputs in one group: the second column takes over the first's error.
    weight = torch.zeros(1, 32)
    weight[0, 0], weight[0, 1], weight[0, 2] = 0.4, 0.4, 7.0
    moments = torch.eye(32)
    moments[0, 1] = moments[1, 0] = 0.999
    codes, scale = quantize_gptq(weight, inverse_factor(moments), 32)
    value = (codes * scale.unsqueeze(-1)).flatten()
    # Alone each 0.4 rounds to nothing; together they are one step.
    assert float(value[0]) == 0.0
    assert float(value[1]) == abs(float(scale[0, 0]))
    assert abs(float(value[1]) - 0.8) < 0.5


def test_inputs_that_never_fire():
    inputs = correlated_inputs(256)
    inputs[:, 10:20] = 0
    factor = inverse_factor(inputs.T @ inputs)
    assert factor.isfinite().all()
    weight = torch.randn(8, 256)
    packed, scale, _ = quantize_weight(weight, method="gptq", factor=factor)
    assert dequantize_int4(packed, scale, 128, torch.float32).isfinite().all()


@pytest.mark.parametrize("bad", [torch.ones(2, 3), torch.full((2, 2), float("nan")), -torch.eye(2)])
def test_unusable_moments(bad):
    with pytest.raises(CheckpointError):
        inverse_factor(bad)


def test_indefinite_moments():
    moments = torch.tensor([[1.0, 5.0], [5.0, 1.0]])
    with pytest.raises(CheckpointError, match="inverted"):
        inverse_factor(moments)


def test_moments_and_method_belong_together():
    with pytest.raises(ConfigError):
        quantize_weight(torch.randn(2, 128), method="gptq")
    with pytest.raises(ConfigError):
        quantize_weight(torch.randn(2, 128), method="mse", factor=torch.eye(128))
    with pytest.raises(ConfigError, match="another layer"):
        quantize_weight(torch.randn(2, 128), method="gptq", factor=torch.eye(256))


@pytest.fixture
def calibrated(tmp_path):
    shape = MoeShape(inner=128)
    source = write_bf16(tmp_path / "src", shape)
    inputs = {"w13": correlated_inputs(shape.hidden), "w2": correlated_inputs(shape.inner)}
    moments = {}
    for layer in (1, 2):
        for gemm, x in inputs.items():
            moments[f"model.layers.{layer}.mlp.experts.{gemm}.hessian"] = x.T @ x / len(x)
    (tmp_path / "moments").mkdir()
    save_file(moments, tmp_path / "moments" / "a.safetensors")
    return source, tmp_path / "moments", inputs


def test_a_whole_checkpoint(tmp_path, calibrated):
    source, moments, inputs = calibrated
    convert_checkpoint(source, tmp_path / "mse")
    report = convert_checkpoint(source, tmp_path / "gptq", method="gptq", hessians=moments)
    assert report.method == "gptq"
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())
    assert config["quantization_config"]["producer"]["method"] == "gptq"
    before = tensors_of(source)
    losses = {}
    for method in ("mse", "gptq"):
        after = tensors_of(tmp_path / method)
        name = "model.layers.2.mlp.experts.1.up_proj.weight"
        value = dequantize_int4(after[name], after[f"{name}_scale_inv"], 128, torch.float32)
        losses[method] = loss(before[name].float(), value, inputs["w13"])
    assert losses["gptq"] < 0.7 * losses["mse"]


def test_missing_moments_are_found_before_anything_is_written(tmp_path, calibrated):
    source, moments, _ = calibrated
    file = moments / "a.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.2.mlp.experts.w2.hessian"]
    save_file(tensors, file)
    with pytest.raises(ConfigError, match=r"w2\.hessian"):
        convert_checkpoint(source, tmp_path / "dst", method="gptq", hessians=moments)
    with pytest.raises(ConfigError, match="--hessians"):
        convert_checkpoint(source, tmp_path / "dst", method="gptq")
    assert not (tmp_path / "dst").exists()
