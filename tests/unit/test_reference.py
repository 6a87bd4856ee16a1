"""The oracle against arithmetic written out in plain loops, and its own special cases."""

from __future__ import annotations

import math

import pytest
import torch

from sglang_w4afp8.layer import MoEWeights
from sglang_w4afp8.packing import pack_int4
from sglang_w4afp8.reference import (
    activation_scale,
    dequantize_fp8_block,
    dequantize_int4,
    fake_quantize_fp8,
    moe_reference,
)
from sglang_w4afp8.spec import ActivationScheme

E, K, N, G, TOP_K, T = 3, 64, 32, 32, 2, 5
G2 = 16


@pytest.fixture
def codes() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "w13": torch.randint(-8, 8, (E, 2 * N, K), generator=generator, dtype=torch.int8),
        "w2": torch.randint(-8, 8, (E, K, N), generator=generator, dtype=torch.int8),
        "s13": torch.rand(E, 2 * N, K // G, generator=generator).bfloat16() * 0.1,
        "s2": torch.rand(E, K, N // G2, generator=generator).bfloat16() * 0.1,
        "x": torch.randn(T, K, generator=generator),
        "ids": torch.stack([torch.randperm(E, generator=generator)[:TOP_K] for _ in range(T)]),
        "route": torch.rand(T, TOP_K, generator=generator),
    }


def weights_of(codes: dict[str, torch.Tensor], scales: float | None = None) -> MoEWeights:
    scale = None if scales is None else torch.tensor([scales])
    return MoEWeights(
        pack_int4(codes["w13"]), codes["s13"], pack_int4(codes["w2"]), codes["s2"], G, G2,
        scale, scale,
    )  # fmt: skip


def by_hand(codes: dict[str, torch.Tensor], quantise: object) -> list[list[float]]:
    """The docstring's formulas, element by element."""
    out = [[0.0] * K for _ in range(T)]
    for t in range(T):
        for slot in range(TOP_K):
            e = int(codes["ids"][t, slot])
            x = quantise(codes["x"][t])  # type: ignore[operator]
            h = [
                sum(
                    float(x[k]) * int(codes["w13"][e, n, k]) * float(codes["s13"][e, n, k // G])
                    for k in range(K)
                )
                for n in range(2 * N)
            ]
            u = torch.tensor(
                [h[n] / (1 + math.exp(-h[n])) * h[N + n] for n in range(N)], dtype=torch.float64
            )
            u = quantise(u)  # type: ignore[operator]
            for k in range(K):
                y = sum(
                    float(u[n]) * int(codes["w2"][e, k, n]) * float(codes["s2"][e, k, n // G2])
                    for n in range(N)
                )
                out[t][k] += float(codes["route"][t, slot]) * y
    return out


@pytest.mark.parametrize("scheme", [ActivationScheme.NONE, ActivationScheme.STATIC])
def test_one_layer_by_hand(codes: dict[str, torch.Tensor], scheme: ActivationScheme) -> None:
    scale = 0.01

    def quantise(v: torch.Tensor) -> torch.Tensor:
        if scheme is ActivationScheme.NONE:
            return v
        clamped = (v.float() / scale).clamp(-448, 448)
        return clamped.to(torch.float8_e4m3fn).double() * torch.tensor(scale).double()

    expected = torch.tensor(by_hand(codes, quantise), dtype=torch.float64)
    actual = moe_reference(
        codes["x"], weights_of(codes, scale), codes["route"], codes["ids"], scheme=scheme
    )
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scheme", list(ActivationScheme))
def test_visiting_all_experts_changes_nothing(
    codes: dict[str, torch.Tensor], scheme: ActivationScheme
) -> None:
    arguments = (codes["x"], weights_of(codes, 0.02), codes["route"], codes["ids"])
    gathered = moe_reference(*arguments, scheme=scheme)
    masked = moe_reference(*arguments, scheme=scheme, visit_all_experts=True)
    torch.testing.assert_close(masked, gathered, rtol=1e-9, atol=1e-9)


def test_ids_elsewhere_are_skipped(codes: dict[str, torch.Tensor]) -> None:
    weights = weights_of(codes)
    ids = codes["ids"].clone()
    ids[:, 1] = -1
    only_first = moe_reference(
        codes["x"], weights, codes["route"], ids, scheme=ActivationScheme.NONE
    )
    route = codes["route"].clone()
    route[:, 1] = 0
    zeroed = moe_reference(codes["x"], weights, route, codes["ids"], scheme=ActivationScheme.NONE)
    torch.testing.assert_close(only_first, zeroed)
    ids.fill_(-1)
    nothing = moe_reference(codes["x"], weights, route, ids, scheme=ActivationScheme.NONE)
    assert torch.equal(nothing, torch.zeros_like(nothing))


def test_an_expert_chosen_twice_counts_twice(codes: dict[str, torch.Tensor]) -> None:
    weights = weights_of(codes)
    ids = torch.zeros(T, 2, dtype=torch.int32)
    twice = moe_reference(codes["x"], weights, codes["route"], ids, scheme=ActivationScheme.NONE)
    summed = codes["route"].sum(dim=1, keepdim=True)
    once = moe_reference(codes["x"], weights, summed, ids[:, :1], scheme=ActivationScheme.NONE)
    torch.testing.assert_close(twice, once)


def test_scaling_zero_tokens_and_input_side_weights(codes: dict[str, torch.Tensor]) -> None:
    weights = weights_of(codes)
    one = codes["ids"][:, :1], codes["route"][:, :1]
    base = moe_reference(codes["x"], weights, one[1], one[0], scheme=ActivationScheme.NONE)
    scaled = moe_reference(
        codes["x"], weights, one[1], one[0], scheme=ActivationScheme.NONE,
        routed_scaling_factor=2.5,
    )  # fmt: skip
    torch.testing.assert_close(scaled, 2.5 * base)
    empty = moe_reference(
        codes["x"][:0], weights, one[1][:0], one[0][:0], scheme=ActivationScheme.DYNAMIC_PER_TENSOR
    )
    assert empty.shape == (0, K)
    weighted = moe_reference(
        codes["x"], weights, one[1], one[0], scheme=ActivationScheme.NONE,
        apply_router_weight_on_input=True,
    )  # fmt: skip
    by_input = moe_reference(
        codes["x"].double() * one[1].double(), weights, torch.ones_like(one[1]), one[0],
        scheme=ActivationScheme.NONE,
    )  # fmt: skip
    torch.testing.assert_close(weighted, by_input)


def test_activation_scales() -> None:
    x = torch.tensor([[1.0, -4.48], [0.0, 0.0]])
    per_token = activation_scale(x, ActivationScheme.DYNAMIC_PER_TOKEN, None)
    torch.testing.assert_close(per_token, torch.tensor([[0.01], [1.0]]))
    per_tensor = activation_scale(x, ActivationScheme.DYNAMIC_PER_TENSOR, None)
    torch.testing.assert_close(per_tensor, torch.tensor([[0.01]]))
    assert torch.equal(fake_quantize_fp8(x, per_token)[1], torch.zeros(2))
    # amax / 448 is zero here, and rows have zeros beside their denormal numbers.
    tiny = torch.tensor([[2.0**-149, 0.0, -(2.0**-140)]])
    smallest = activation_scale(tiny, ActivationScheme.DYNAMIC_PER_TOKEN, None)
    assert smallest.item() == 2.0**-126 and torch.isfinite(fake_quantize_fp8(tiny, smallest)).all()
    # Beyond the range values clamp; they must not become NaN.
    clipped = fake_quantize_fp8(torch.tensor([[1e6, -1e6]]), torch.tensor([[1.0]]))
    assert clipped.tolist() == [[448.0, -448.0]]


def test_block_dequantisation_of_ragged_blocks() -> None:
    weight = torch.randn(5, 7).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 2)
    dense = dequantize_fp8_block(weight, scale, (2, 4), torch.float64)
    for n in range(5):
        for k in range(7):
            assert dense[n, k] == weight[n, k].double() * scale[n // 2, k // 4].double()


def test_group_dequantisation() -> None:
    codes = torch.randint(-8, 8, (3, 4, 64), dtype=torch.int8)
    scales = torch.rand(3, 4, 2)
    dense = dequantize_int4(pack_int4(codes), scales, 32, torch.float64)
    assert torch.equal(dense, codes.double() * scales.double().repeat_interleave(32, dim=-1))
