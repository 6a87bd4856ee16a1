"""The oracle on rows that a dispatcher sends, and the emulated dispatcher itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sglang_w4afp8.kernels.registry import explain, get_backend, select
from sglang_w4afp8.layer import Device, MoEProblem, MoEWeights
from sglang_w4afp8.reference import (
    activation_scale,
    dequantize_int4,
    dequantize_rows,
    fake_quantize_fp8,
    masked_reference,
    moe_reference,
)
from sglang_w4afp8.sharding import AxisShard
from sglang_w4afp8.spec import ActivationScheme
from sglang_w4afp8.testing import cases
from sglang_w4afp8.testing.dispatch import dispatch_slots, dispatch_tokens, quantize_rows

RANKS, LOCAL, TOP_K, TOKENS, SLOTS = 2, 3, 2, 9, 12
SHAPE = cases.ExpertShape(RANKS * LOCAL, hidden=256, intermediate=128, group=64)
SCHEMES = list(ActivationScheme)
NONE, STATIC = ActivationScheme.NONE, ActivationScheme.STATIC


@pytest.fixture(scope="module")
def weights() -> MoEWeights:
    tensors = cases.expert_tensors(SHAPE, scales=cases.INT4_UNIT, input_scale=0.02)
    return cases.whole_weights(tensors, group=SHAPE.group)


@pytest.fixture(scope="module")
def batch() -> cases.Routing:
    return cases.random_routing(
        TOKENS, SHAPE, TOP_K, kind="zipf", absent=0.1, dtype=torch.bfloat16, seed=4
    )


def on_rank(weights: MoEWeights, rank: int) -> MoEWeights:
    own = slice(rank * LOCAL, (rank + 1) * LOCAL)
    return weights.replaced(
        w13=weights.w13[own],
        w13_scale=weights.w13_scale[own],
        w2=weights.w2[own],
        w2_scale=weights.w2_scale[own],
    )


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_rows_are_worth_their_codes_times_their_scales() -> None:
    x = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[1, 2] = 0
    codes, scale = quantize_rows(x)
    assert codes.dtype == torch.float8_e4m3fn and scale.shape == (2, 3, 2)
    numbers = dequantize_rows(codes, scale, torch.float64)
    assert numbers[0, 1, 130] == codes[0, 1, 130].double() * scale[0, 1, 1].double()
    assert (numbers - x).abs().max() < 2**-4 * x.abs().max()
    assert numbers[1, 2].abs().max() == 0
    assert codes[0].float().abs().amax() == 448


def by_expert(
    x: torch.Tensor, weights: MoEWeights, batch: cases.Routing, scheme: ActivationScheme
) -> torch.Tensor:
    """The layer for an unquantised input and a quantised product, in plain matrices."""
    inner, places = [], []
    for expert in range(RANKS * LOCAL):
        w13 = dequantize_int4(
            weights.w13[expert], weights.w13_scale[expert], SHAPE.group, torch.float64
        )
        for token, place in (batch.topk_ids == expert).nonzero().tolist():
            gate, up = (w13 @ x[token]).chunk(2)
            inner.append(torch.nn.functional.silu(gate) * up)
            places.append((expert, token, place))
    product = torch.stack(inner)
    if scheme is not NONE:
        product = fake_quantize_fp8(product, activation_scale(product, scheme, None))
    out = torch.zeros(TOKENS, SHAPE.hidden, dtype=torch.float64)
    for row, (expert, token, place) in zip(product, places, strict=True):
        w2 = dequantize_int4(
            weights.w2[expert], weights.w2_scale[expert], SHAPE.group, torch.float64
        )
        out[token] += float(batch.topk_weights[token, place]) * (w2 @ row)
    return out


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_fp8_rows_take_the_place_of_the_quantised_input(
    weights: MoEWeights, batch: cases.Routing, scheme: ActivationScheme
) -> None:
    """An input of E4M3 numbers at the static scale is what the static scheme makes of itself."""
    codes = (batch.x.float() / 0.02).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale = torch.full((TOKENS, 2), 0.02)
    arguments = (weights, batch.topk_weights, batch.topk_ids)
    found = moe_reference(codes, *arguments, scheme=scheme, x_scale=scale)
    if scheme is STATIC:
        close(found, moe_reference(batch.x, *arguments, scheme=scheme))
    else:
        numbers = codes.double() * scale[0, 0].double()
        close(found, by_expert(numbers, weights, batch, scheme))
    masked = moe_reference(codes, *arguments, scheme=scheme, x_scale=scale, visit_all_experts=True)
    close(masked, found)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_both_modes_are_the_layer(
    weights: MoEWeights, batch: cases.Routing, scheme: ActivationScheme, fp8: bool
) -> None:
    rows, scale = quantize_rows(batch.x) if fp8 else (batch.x, None)
    out = torch.zeros(2, TOKENS, SHAPE.hidden, dtype=torch.float64)
    wanted = torch.zeros(TOKENS, SHAPE.hidden, dtype=torch.float64)
    for rank in range(RANKS):
        own = on_rank(weights, rank)
        # A per-tensor scale is that of a rank's rows, so the sum is compared rank by rank.
        sent = dispatch_tokens(batch, rank, LOCAL, fp8)
        local = torch.where(batch.topk_ids < 0, -1, batch.topk_ids - rank * LOCAL)
        if scheme is ActivationScheme.DYNAMIC_PER_TENSOR and not fp8:
            # Only the rows that came may be looked at.
            arguments = (sent.rows, own, sent.topk_weights, sent.topk_ids)
            wanted.index_add_(0, sent.origin, moe_reference(*arguments, scheme=scheme))
        else:
            arguments = (rows, own, batch.topk_weights, local)
            wanted += moe_reference(*arguments, scheme=scheme, x_scale=scale)
        part = moe_reference(
            sent.rows, own, sent.topk_weights, sent.topk_ids, scheme=scheme, x_scale=sent.row_scale
        )
        sent.combine(part, out[0])
        slots = dispatch_slots(batch, rank, LOCAL, SLOTS, fp8, seed=rank)
        assert slots.masked_m.min() == 0 or slots.masked_m.max() > 1
        each = masked_reference(
            slots.rows, own, slots.masked_m, scheme=scheme, row_scale=slots.row_scale
        )
        assert each[~slots.valid].abs().max() == 0, "poison must not be read"
        slots.combine(each, out[1])
    assert wanted.abs().max() > 0
    close(out[0], wanted)
    close(out[1], wanted)


def test_counts_decide_alone(weights: MoEWeights) -> None:
    own = on_rank(weights, 0)
    x = torch.randn(LOCAL, 4, SHAPE.hidden, generator=torch.Generator().manual_seed(2)).bfloat16()
    codes, scale = quantize_rows(x)
    for counts in ([0, 0, 0], [4, 4, 4], [0, 4, 1]):
        masked_m = torch.tensor(counts, dtype=torch.int32)
        out = masked_reference(codes, own, masked_m, scheme=STATIC, row_scale=scale)
        for expert, count in enumerate(counts):
            ids = torch.full((4, 1), expert)
            ids[count:] = -1
            one = moe_reference(
                codes[expert], own, torch.ones(4, 1), ids, scheme=STATIC, x_scale=scale[expert]
            )
            close(out[expert], one)


def problem(device: Device, scheme: ActivationScheme = STATIC) -> MoEProblem:
    columns = AxisShard.even(SHAPE.intermediate, SHAPE.group, 0, 1)
    return MoEProblem(
        LOCAL, SHAPE.hidden, columns, SHAPE.group, TOP_K, scheme, device, dispatched=True
    )


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_torch_backend(weights: MoEWeights, batch: cases.Routing, fp8: bool) -> None:
    own, backend, layer = on_rank(weights, 1), get_backend("torch"), problem(Device("cpu"))
    assert backend.supports(layer) is None
    sent = dispatch_tokens(batch, 1, LOCAL, fp8)
    arguments = (sent.rows, sent.topk_weights, sent.topk_ids, 1.0)
    out = backend.run(layer, own, *arguments, x_scale=sent.row_scale)
    wanted = moe_reference(
        sent.rows, own, sent.topk_weights, sent.topk_ids, scheme=STATIC, x_scale=sent.row_scale
    )
    assert out.dtype == torch.bfloat16 and cases.calc_diff(out, wanted) < 1e-5
    slots = dispatch_slots(batch, 1, LOCAL, SLOTS, fp8)
    each = backend.run_masked(layer, own, slots.rows, slots.row_scale, slots.masked_m, 3)
    wanted = masked_reference(
        slots.rows, own, slots.masked_m, scheme=STATIC, row_scale=slots.row_scale
    )
    assert each.dtype == torch.bfloat16 and each.shape == wanted.shape
    assert cases.calc_diff(each[slots.valid], wanted[slots.valid]) < 1e-5


def test_backends_say_what_they_think_of_dispatched_rows() -> None:
    h100 = Device("cuda", (9, 0), "H100")
    fit = replace(problem(h100), group_size=128, columns=AxisShard.even(128, 128, 0, 1))
    reasons = {verdict.backend: verdict.reason for verdict in explain(fit)}
    assert "dispatcher" in (reasons["cutlass"] or "")
    assert reasons["torch"] is None
    assert select(problem(Device("cpu"))).name == "torch"
