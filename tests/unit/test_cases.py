"""The generators give what they say, and the error measure lets nothing pass that is wrong."""

from __future__ import annotations

import math

import pytest
import torch

from sglang_w4afp8.packing import has_minus_eight, unpack_int4
from sglang_w4afp8.reference import moe_reference
from sglang_w4afp8.spec import ActivationScheme
from sglang_w4afp8.testing import cases

SHAPE = cases.ExpertShape(experts=3, hidden=64, intermediate=96, group=32)
NAN, INF = float("nan"), float("inf")


# -------------------------------------------------------------------------------------- calc_diff


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_tensors_differ_by_nothing(dtype: torch.dtype) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert cases.calc_diff(x, x.clone()) == 0.0
    assert cases.calc_diff(torch.zeros_like(x), torch.zeros_like(x)) == 0.0
    assert cases.calc_diff(x[:0], x[:0]) == 0.0


def test_the_formula_as_the_docstring_has_it() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 5, 7, generator=generator)
    products = sum(float(a) * float(b) for a, b in zip(x.flatten(), y.flatten(), strict=True))
    squares = sum(float(v) ** 2 for v in [*x.flatten(), *y.flatten()])
    assert cases.calc_diff(x, y) == pytest.approx(1 - 2 * products / squares, rel=1e-12)


def test_landmarks() -> None:
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert cases.calc_diff(x, y) == 1.0
    assert cases.calc_diff(x, -x) == 2.0
    assert cases.calc_diff(x, torch.zeros(2)) == 1.0
    # Relative error e everywhere: e²/2. The literal formula would cancel to 0 or worse.
    x = torch.ones(10, dtype=torch.float64)
    assert cases.calc_diff(x, x * (1 + 1e-10)) == pytest.approx(5e-21, rel=1e-4)


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_extreme_sizes_are_no_excuse(size: float) -> None:
    x = torch.tensor([size, size], dtype=torch.float64)
    assert cases.calc_diff(x, -x) == 2.0
    assert cases.calc_diff(x, x.clone()) == 0.0


@pytest.mark.parametrize(("left", "right"), [(NAN, 1.0), (INF, 1.0), (INF, INF), (NAN, NAN)])
def test_what_is_not_finite_never_passes(left: float, right: float) -> None:
    x, y = torch.ones(4), torch.ones(4)
    x[2], y[2] = left, right
    for difference in (cases.calc_diff(x, y), cases.calc_diff(y, x)):
        assert not difference < 1e9
        assert difference > 1e9


def test_shapes_are_not_broadcast() -> None:
    with pytest.raises(ValueError, match=r"\(4, 1\).*\(4, 4\)"):
        cases.calc_diff(torch.ones(4, 1), torch.ones(4, 4))


# ---------------------------------------------------------------------------------------- experts


def test_expert_tensors_are_a_checkpoints() -> None:
    tensors = cases.expert_tensors(SHAPE, "m.experts", input_scale=0.5)
    assert len(tensors) == 3 * 3 * 3
    sizes = {"gate_proj": (96, 64), "up_proj": (96, 64), "down_proj": (64, 96)}
    for expert in range(3):
        for projection, (n, k) in sizes.items():
            name = f"m.experts.{expert}.{projection}"
            weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale_inv"]
            assert (weight.dtype, tuple(weight.shape)) == (torch.int8, (n, k // 2))
            assert (scale.dtype, tuple(scale.shape)) == (torch.bfloat16, (n, k // 32))
            assert (scale > 0).all()
            given = tensors[f"{name}.input_scale"]
            assert given.dtype == torch.float32 and given.tolist() == [0.5]
            assert set(unpack_int4(weight).unique().tolist()) == set(range(-8, 8))
    assert not any("input_scale" in name for name in cases.expert_tensors(SHAPE))
    reduced = cases.expert_tensors(SHAPE, lowest_code=-7)
    assert not any(has_minus_eight(t) for n, t in reduced.items() if n.endswith(".weight"))


def test_the_seed_decides() -> None:
    first, again, other = (cases.expert_tensors(SHAPE, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    generator = torch.Generator().manual_seed(1)
    drawn = [cases.expert_tensors(SHAPE, seed=generator) for _ in range(2)]
    name = next(iter(first))
    assert torch.equal(drawn[0][name], first[name]) and not torch.equal(drawn[1][name], first[name])


@pytest.mark.parametrize(("hidden", "intermediate"), [(100, 128), (128, 100)])
def test_groups_must_divide(hidden: int, intermediate: int) -> None:
    with pytest.raises(ValueError, match="groups"):
        cases.ExpertShape(2, hidden, intermediate, group=64)


def test_whole_weights_put_everything_in_its_place() -> None:
    tensors = cases.expert_tensors(SHAPE, "m.experts", input_scale=0.5)
    tensors["m.experts.1.up_proj.input_scale"] = torch.tensor([2.0])
    tensors["m.experts.2.down_proj.input_scale"] = torch.tensor([3.0])
    tensors["m.experts_of_another.9.up_proj.weight"] = torch.zeros(1)
    whole = cases.whole_weights(tensors, "m.experts", 32)
    assert (whole.num_experts, whole.hidden_size) == (3, 64)
    assert (whole.w13_group_size, whole.w2_group_size) == (32, 32)
    for kind, w13, w2 in [
        ("weight", whole.w13, whole.w2),
        ("weight_scale_inv", whole.w13_scale, whole.w2_scale),
    ]:
        for expert in range(3):
            name = f"m.experts.{expert}"
            assert torch.equal(w13[expert, :96], tensors[f"{name}.gate_proj.{kind}"])
            assert torch.equal(w13[expert, 96:], tensors[f"{name}.up_proj.{kind}"])
            assert torch.equal(w2[expert], tensors[f"{name}.down_proj.{kind}"])
    assert whole.w13_input_scale is not None and whole.w13_input_scale.tolist() == [2.0]
    assert whole.w2_input_scale is not None and whole.w2_input_scale.tolist() == [3.0]
    without = cases.whole_weights(cases.expert_tensors(SHAPE), group=32)
    assert without.w13_input_scale is None and without.w2_input_scale is None


def test_unit_scales_keep_outputs_near_one() -> None:
    for width in (256, 1024):
        shape = cases.ExpertShape(2, width, width)
        whole = cases.whole_weights(cases.expert_tensors(shape, scales=cases.INT4_UNIT))
        x, _, ids = cases.random_routing(8, shape, 1, seed=1)
        out = moe_reference(x, whole, torch.ones(8, 1), ids, scheme=ActivationScheme.NONE)
        assert 0.1 < float(out.square().mean().sqrt()) < 3


# ---------------------------------------------------------------------------------------- routing


@pytest.mark.parametrize("kind", ["uniform", "zipf", "one"])
@pytest.mark.parametrize("tokens", [0, 1, 50])
def test_routing(kind: str, tokens: int) -> None:
    shape = cases.ExpertShape(8, 64, 64, 32)
    x, weights, ids = cases.random_routing(tokens, shape, 3, kind=kind, dtype=torch.bfloat16)
    assert (x.dtype, tuple(x.shape)) == (torch.bfloat16, (tokens, 64))
    assert (weights.dtype, tuple(weights.shape)) == (torch.float32, (tokens, 3))
    assert (ids.dtype, tuple(ids.shape)) == (torch.int32, (tokens, 3))
    assert ((ids >= 0) & (ids < 8)).all()
    distinct = 1 if kind == "one" else 3
    assert all(len(set(row)) == distinct for row in ids.tolist())


def test_how_often_experts_are_chosen() -> None:
    def shares(kind: str) -> list[float]:
        shape = cases.ExpertShape(4, 32, 32, 32)
        ids = cases.random_routing(4000, shape, 1, kind=kind, seed=3).topk_ids
        return sorted((ids.flatten().bincount(minlength=4) / 4000).tolist(), reverse=True)

    # Five standard deviations of a share of 1/2 in 4000.
    assert shares("uniform") == pytest.approx([0.25] * 4, abs=0.04)
    assert shares("zipf") == pytest.approx([12 / 25, 6 / 25, 4 / 25, 3 / 25], abs=0.04)
    assert shares("one") == [1.0, 0.0, 0.0, 0.0]


def test_absent_experts() -> None:
    shape = cases.ExpertShape(4, 32, 32, 32)
    ids = cases.random_routing(2000, shape, 2, absent=0.3).topk_ids
    assert float((ids == -1).float().mean()) == pytest.approx(0.3, abs=0.04)
    assert (cases.random_routing(5, shape, 2, absent=1.0).topk_ids == -1).all()
    # What is left is what would have been chosen anyway.
    unmasked = cases.random_routing(2000, shape, 2).topk_ids
    assert torch.equal(ids, torch.where(ids < 0, ids, unmasked))


def test_routing_moves_as_one() -> None:
    routing = cases.random_routing(3, SHAPE, 2)
    assert all(tensor.is_meta for tensor in routing.to("meta"))
    assert math.prod(routing.to("cpu").x.shape) == 3 * 64


# -------------------------------------------------------------------------------------------- FP8


def test_fp8_linear_with_partial_blocks() -> None:
    tensors = cases.fp8_linear_tensors("a.q_proj", 192, 320, seed=4)
    weight, scale = tensors["a.q_proj.weight"], tensors["a.q_proj.weight_scale_inv"]
    assert (weight.dtype, tuple(weight.shape)) == (torch.float8_e4m3fn, (192, 320))
    assert (scale.dtype, tuple(scale.shape)) == (torch.float32, (2, 3))
    dense = cases.fp8_dense(tensors, "a.q_proj")
    assert dense.dtype == torch.float64
    for row, column in [(0, 0), (127, 128), (128, 127), (191, 319)]:
        by_hand = float(weight[row, column]) * float(scale[row // 128, column // 128])
        assert float(dense[row, column]) == by_hand


def test_fp8_mlp_reference_by_hand() -> None:
    tensors = cases.fp8_mlp_tensors("m.mlp", 8, 6, seed=5, scales=cases.FP8_UNIT)
    assert len(tensors) == 6
    gate, up, down = (
        cases.fp8_dense(tensors, f"m.mlp.{name}").tolist()
        for name in ("gate_proj", "up_proj", "down_proj")
    )
    x = torch.randn(1, 8, generator=torch.Generator().manual_seed(6))
    inner = []
    for n in range(6):
        g, u = (sum(m[n][k] * float(x[0, k]) for k in range(8)) for m in (gate, up))
        inner.append(g / (1 + math.exp(-g)) * u)
    expected = [sum(down[k][n] * inner[n] for n in range(6)) for k in range(8)]
    actual = cases.fp8_mlp_reference(x, tensors, "m.mlp")[0].tolist()
    assert actual == pytest.approx(expected, rel=1e-12)
