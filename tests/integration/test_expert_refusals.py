"""Experts that must not load: what the error says, and of which tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

from sglang_w4afp8.errors import BackendError, CheckpointError, ConfigError, ShardError
from sglang_w4afp8.spec import QuantSpec
from sglang_w4afp8.testing import cases

pytestmark = pytest.mark.sglang

PREFIX = cases.EXPERTS_PREFIX
SHAPE = cases.ExpertShape(experts=4, hidden=256, intermediate=512)


@pytest.fixture(autouse=True)
def weights_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_W4AFP8_ACTIVATION", "none")


def made(input_scale: float | None = None) -> dict[str, torch.Tensor]:
    return cases.expert_tensors(SHAPE, PREFIX, seed=512, input_scale=input_scale)


def config(**fields: Any) -> Any:
    from sglang_w4afp8.srt.config import ShardedW4AFp8Config

    return ShardedW4AFp8Config(QuantSpec(**fields))


def build(
    tensors: dict[str, torch.Tensor], intermediate: int, quant_config: Any = None, **options: Any
) -> Any:
    from sglang_w4afp8.srt.virtual_ranks import load_experts

    return load_experts(
        quant_config or config(),
        tensors,
        PREFIX,
        num_experts=SHAPE.experts,
        hidden_size=SHAPE.hidden,
        intermediate_size=intermediate,
        top_k=2,
        **options,
    )


@pytest.mark.parametrize("kind", ["weight", "weight_scale_inv"])
@pytest.mark.parametrize("projection", ["gate_proj", "up_proj", "down_proj"])
def test_a_missing_tensor_is_named(projection: str, kind: str) -> None:
    from sglang_w4afp8.srt.virtual_ranks import virtual_rank

    tensors = made()
    name = f"{PREFIX}.3.{projection}.{kind}"
    del tensors[name]
    # Expert 3 is slot 1 of the second expert-parallel rank; the message names the checkpoint's.
    with virtual_rank(1, 2, ep_size=2), pytest.raises(CheckpointError) as caught:
        build(tensors, 512)
    assert name in str(caught.value)
    assert "1 of 6" in str(caught.value)


def test_missing_input_scales_need_an_explicit_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_w4afp8.srt.virtual_ranks import virtual_rank

    tensors = made(input_scale=0.01)
    del tensors[f"{PREFIX}.2.down_proj.input_scale"]
    monkeypatch.setenv("SGLANG_W4AFP8_ACTIVATION", "checkpoint")
    with virtual_rank(0, 1), pytest.raises(CheckpointError) as caught:
        build(tensors, 512)
    assert f"{PREFIX}.2.down_proj.input_scale" in str(caught.value)
    assert "SGLANG_W4AFP8_ACTIVATION=dynamic" in str(caught.value)
    monkeypatch.setenv("SGLANG_W4AFP8_ACTIVATION", "dynamic")
    with virtual_rank(0, 1):
        build(tensors, 512)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_senseless_input_scales(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_w4afp8.srt.virtual_ranks import virtual_rank

    monkeypatch.setenv("SGLANG_W4AFP8_ACTIVATION", "checkpoint")
    tensors = made(input_scale=0.01)
    tensors[f"{PREFIX}.0.gate_proj.input_scale"] = torch.tensor([value])
    with virtual_rank(0, 1), pytest.raises(CheckpointError, match="positive and finite"):
        build(tensors, 512)


@pytest.mark.parametrize(
    ("kind", "change", "numbers"),
    [
        ("weight", lambda t: t.to(torch.float8_e4m3fn), ["float8_e4m3fn", "int8"]),
        ("weight", lambda t: t[:, :100], ["(256, 100)", "(256, 256)"]),
        ("weight_scale_inv", lambda t: t[:, :3], ["(256, 3)", "(256, 4)"]),
        ("weight_scale_inv", lambda t: t.to(torch.int32), ["int32"]),
    ],
)
def test_wrong_dtypes_and_shapes(kind: str, change: Any, numbers: list[str]) -> None:
    from sglang_w4afp8.srt.virtual_ranks import virtual_rank

    tensors = made()
    name = f"{PREFIX}.1.down_proj.{kind}"
    tensors[name] = change(tensors[name])
    with virtual_rank(0, 1), pytest.raises(CheckpointError) as caught:
        build(tensors, 512)
    text = str(caught.value)
    assert name in text and "(1)" in text
    assert all(number in text for number in numbers)


def test_a_group_size_that_the_checkpoint_does_not_have() -> None:
    from sglang_w4afp8.srt.virtual_ranks import virtual_rank

    with virtual_rank(0, 1), pytest.raises(CheckpointError, match="group_size 64"):
        build(made(), 512, config(group_size=64))


def test_layers_that_the_format_cannot_express() -> None:
    from sglang_w4afp8.srt.virtual_ranks import virtual_rank

    tensors = made()
    with virtual_rank(0, 1):
        with pytest.raises(ConfigError, match="biases"):
            build(tensors, 512, with_bias=True)
        with pytest.raises(ConfigError, match="one tensor holds all experts"):
            build(tensors, 512, use_weight_loader_fused=True)
        with pytest.raises(BackendError, match="swiglu_limit"):
            build(tensors, 512, swiglu_limit=7.0)
        with pytest.raises(BackendError, match="gelu"):
            build(tensors, 512, activation="gelu")
    with virtual_rank(0, 8), pytest.raises(ShardError, match="modules_to_not_convert"):
        build(tensors, 520)
    with virtual_rank(0, 512), pytest.raises(ShardError, match="512 / tp 512 = 1 columns"):
        build(tensors, 512)
