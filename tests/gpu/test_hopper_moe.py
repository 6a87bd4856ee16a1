"""The Hopper kernels against the float64 oracle, on small shapes that reach every branch."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from sglang_w4afp8.kernels.hopper import launch
from sglang_w4afp8.kernels.hopper.layout import shuffle_in_place
from sglang_w4afp8.kernels.hopper.plan import Layer
from sglang_w4afp8.layer import MoEWeights
from sglang_w4afp8.packing import pack_int4
from sglang_w4afp8.reference import moe_reference
from sglang_w4afp8.spec import ActivationScheme

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
]

# BF16 rounding gives 2e-3. The rest are E4M3 codes that fall on the other side of a rounding
# boundary because the matrix unit keeps about 14 bits of a sum: up to 5e-3 where many experts
# average it out, more where few tokens or one expert make up the result.
TOLERANCE = 1.2e-2


@dataclass(frozen=True)
class Case:
    """A layer's sizes."""

    experts: int = 16
    hidden: int = 1024
    inner: int = 256
    group: int = 128
    inner_group: int = 128
    top_k: int = 4
    minus_eight: bool = False
    dynamic: bool = False

    @property
    def layer(self) -> Layer:
        """As the kernels see it."""
        return Layer(
            self.experts,
            self.hidden,
            self.inner,
            self.group,
            self.inner_group,
            self.top_k,
            self.minus_eight,
            self.dynamic,
        )


def random_weights(case: Case, seed: int = 0) -> MoEWeights:
    """In checkpoint order, on the GPU."""
    g = torch.Generator("cuda").manual_seed(seed)
    low = -8 if case.minus_eight else -7

    def codes(rows: int, k: int) -> torch.Tensor:
        shape = (case.experts, rows, k)
        return torch.randint(low, 8, shape, generator=g, device="cuda", dtype=torch.int8)

    def scales(rows: int, groups: int, size: float) -> torch.Tensor:
        shape = (case.experts, rows, groups)
        return ((torch.rand(shape, generator=g, device="cuda") + 0.5) * size).bfloat16()

    up = scales(2 * case.inner, case.hidden // case.group, 0.25 / case.hidden**0.5)
    down = scales(case.hidden, case.inner // case.inner_group, 0.25 / case.inner**0.5)
    static = torch.tensor([0.02], device="cuda")
    return MoEWeights(
        pack_int4(codes(2 * case.inner, case.hidden)),
        up,
        pack_int4(codes(case.hidden, case.inner)),
        down,
        case.group,
        case.inner_group,
        None if case.dynamic else static,
        None if case.dynamic else static.clone(),
    )


def stage_order(case: Case, weights: MoEWeights) -> MoEWeights:
    """A copy as the kernels read it."""
    copy = weights.replaced(
        w13=weights.w13.clone(),
        w2=weights.w2.clone(),
        w13_scale=weights.w13_scale.clone(),
        w2_scale=weights.w2_scale.clone(),
        state=launch.new_counters(weights.w13.device),
    )
    shuffle_in_place(copy.w13, copy.w13_scale, True, case.minus_eight)
    shuffle_in_place(copy.w2, copy.w2_scale, False, case.minus_eight)
    return copy


def call(
    case: Case,
    shuffled: MoEWeights,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    path: str | None,
    factor: float = 1.0,
) -> torch.Tensor:
    """The kernels, into memory that was NaN before."""
    tensors = launch.Tensors(
        x,
        topk_weights,
        topk_ids,
        shuffled.w13,
        shuffled.w13_scale,
        shuffled.w2,
        shuffled.w2_scale,
        shuffled.w13_input_scale,
        shuffled.w2_input_scale,
        shuffled.state,
    )
    out = torch.full_like(x, float("nan"))
    launch.start(launch.launches(case.layer, tensors, out, factor, path), x.device)
    return out


def oracle(
    case: Case,
    weights: MoEWeights,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    factor: float = 1.0,
) -> torch.Tensor:
    """float64."""
    scheme = ActivationScheme.DYNAMIC_PER_TOKEN if case.dynamic else ActivationScheme.STATIC
    return moe_reference(
        x, weights, topk_weights, topk_ids, scheme=scheme, routed_scaling_factor=factor
    )


def routing(case: Case, tokens: int, kind: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random combine weights and ids."""
    g = torch.Generator("cuda").manual_seed(seed)
    weights = torch.rand(tokens, case.top_k, generator=g, device="cuda") + 0.1
    scores = torch.rand(tokens, case.experts, generator=g, device="cuda")
    ids = scores.topk(case.top_k, dim=-1).indices.to(torch.int32)
    if kind == "one expert":
        ids = torch.full_like(ids, 3)
    elif kind in ("holes", "few"):
        drop = torch.rand(ids.shape, generator=g, device="cuda") < (0.4 if kind == "holes" else 0.7)
        ids = torch.where(drop, -1, ids)
    elif kind == "none":
        ids = torch.full_like(ids, -1)
    elif kind == "int64":
        ids = ids.to(torch.int64)
    return weights, ids.contiguous()


def error(out: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative to the reference's norm; NaN stays NaN."""
    return float((out.double() - wanted).norm() / wanted.norm().clamp(min=1e-30))


CASES = [
    Case(),
    Case(dynamic=True),
    Case(minus_eight=True),
    Case(inner=128),
    Case(inner=64, inner_group=64),
    Case(inner=64, inner_group=64, dynamic=True),
    Case(inner=192, group=64, inner_group=64),
    Case(inner=512, hidden=512, group=32, inner_group=32),
    Case(inner=64, inner_group=32, group=64, hidden=640, minus_eight=True),
    Case(experts=5, inner=320, hidden=704, group=64, inner_group=64, top_k=2, dynamic=True),
    # Hidden sizes of models for tests
    Case(hidden=64, inner=64, group=32, inner_group=32),
    Case(hidden=64, inner=256, group=64, minus_eight=True, dynamic=True),
    Case(hidden=128, inner=64, inner_group=64, minus_eight=True),
    Case(hidden=128, inner=128, group=32, inner_group=64, dynamic=True),
    Case(experts=5, hidden=128, inner=320, group=64, inner_group=64, top_k=2),
]
SIZES = [("small", 1), ("small", 3), ("small", 8), ("small", 13), ("large", 1), ("large", 7)]
SIZES += [("large", 33), ("large", 75), ("large", 150), ("large", 500)]
ONE_HOT = [("small", 8), ("medium", 64), ("large", 8), ("large", 64), ("prefill", 64)]
GRAPHS = [("small", 5, 256), ("medium", 40, 256), ("large", 40, 256)]  # path, tokens, inner
GRAPHS += [("prefill", tokens, inner) for tokens in (90, 700) for inner in (256, 512, 1408)]
SIZES += [("medium", 1), ("medium", 19), ("medium", 64), ("medium", 170), ("medium", 256)]
SIZES += [("prefill", 1), ("prefill", 37), ("prefill", 300), ("prefill", 500)]
SIZES += [("prefill", 1111)]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("path", "tokens"), SIZES)
def test_against_the_oracle(case: Case, path: str, tokens: int) -> None:
    weights = random_weights(case)
    shuffled = stage_order(case, weights)
    g = torch.Generator("cuda").manual_seed(tokens)
    x = torch.randn(tokens, case.hidden, generator=g, device="cuda").bfloat16()
    for kind in ("uniform", "one expert", "holes", "few", "none", "int64"):
        route = routing(case, tokens, kind, tokens)
        out = call(case, shuffled, x, *route, path, 2.5)
        wanted = oracle(case, weights, x, *route, 2.5)
        if kind == "none":
            assert torch.equal(out, torch.zeros_like(out))
        else:
            assert error(out, wanted) < TOLERANCE, kind
        again = call(case, shuffled, x, *route, path, 2.5)
        assert torch.equal(out, again), f"{kind}: two runs differ"


@pytest.mark.parametrize("active", [1, 2, 3])
@pytest.mark.parametrize("inner", [256, 128])
def test_many_tokens_of_few_experts(inner: int, active: int) -> None:
    """Jobs of very few steps follow each other faster than what they wait for."""
    case = Case(experts=64, hidden=512, inner=inner, top_k=2)
    weights = random_weights(case)
    shuffled = stage_order(case, weights)
    for tokens in (600, 2500, 9000):
        x = torch.randn(tokens, case.hidden, device="cuda").bfloat16()
        scores = torch.rand(tokens, active, device="cuda")
        ids = torch.full((tokens, 2), -1, dtype=torch.int32, device="cuda")
        used = min(active, 2)
        ids[:, :used] = scores.topk(used, dim=-1).indices.to(torch.int32) * 20 + 3
        route = (torch.rand(tokens, 2, device="cuda") + 0.1, ids)
        out = call(case, shuffled, x, *route, "prefill")
        assert error(out, oracle(case, weights, x, *route)) < TOLERANCE, tokens


@pytest.mark.parametrize("path", ["small", "medium", "large", "prefill"])
@pytest.mark.parametrize("inner", [256, 512])
def test_rows_too_small_for_a_scale_are_zero(path: str, inner: int) -> None:
    """Rows of denormal numbers, of x or between the projections: amax / 448 has no reciprocal, or
    is 0, and neither 0 / 0 nor 0 times infinity is a number.
    """
    case = Case(inner=inner, dynamic=True)
    weights = random_weights(case)
    x = torch.randn(8, case.hidden, device="cuda").bfloat16()
    x[1::2] = 0
    x[1::2, 5] = 2.0**-133  # the smallest BF16 number
    x[3, 5] = 2.0**-126
    x[2], x[4] = x[2] * 2.0**-65, x[4] * 2.0**-70  # products of gate and up are denormal, or zero
    route = routing(case, len(x), "all", 0)
    out = call(case, stage_order(case, weights), x, *route, path)
    assert torch.isfinite(out).all() and not out[1::2].any()
    assert error(out, oracle(case, weights, x, *route)) < TOLERANCE


@pytest.mark.parametrize(("path", "tokens"), ONE_HOT)
@pytest.mark.parametrize("inner", [512, 256, 128, 64])
def test_one_hot_gives_w2_bit_for_bit(path: str, tokens: int, inner: int) -> None:
    group = min(inner, 128)
    case = Case(experts=2, hidden=512, inner=inner, inner_group=group, top_k=1, minus_eight=True)
    weights = random_weights(case, seed=1)
    # gate = 56 and up = 1 for feature f where x is one-hot at f; silu(56) is 56 in FP32. Prefill
    # adds in FP16, which holds a code times a scale (11 bits), and not seven times that: 64.
    code, size = (4, 16) if path == "prefill" else (7, 8)
    codes = torch.zeros(2, 2 * inner, 512, dtype=torch.int8, device="cuda")
    feature = torch.arange(inner, device="cuda")
    codes[:, feature, feature] = code
    codes[:, inner + feature, feature] = 1
    scale = torch.ones_like(weights.w13_scale)
    scale[:, :inner] = size
    one = torch.ones(1, device="cuda")
    weights = weights.replaced(
        w13=pack_int4(codes), w13_scale=scale, w13_input_scale=one, w2_input_scale=one
    )
    shuffled = stage_order(case, weights)
    for first in range(0, inner, tokens):
        x = torch.eye(512, device="cuda")[first : first + tokens].bfloat16().contiguous()
        ids = torch.arange(x.shape[0], device="cuda", dtype=torch.int32)[:, None] % 2
        route = (torch.ones_like(ids, dtype=torch.float32), ids)
        wanted = oracle(case, weights, x, *route).bfloat16()
        assert wanted.abs().max() > 0
        assert torch.equal(call(case, shuffled, x, *route, path), wanted)


@pytest.mark.parametrize(("path", "tokens"), ONE_HOT)
def test_one_hot_gives_w13_codes_bit_for_bit(path: str, tokens: int) -> None:
    inner = 128
    case = Case(experts=2, hidden=512, inner=inner, top_k=1, minus_eight=True)
    weights = random_weights(case, seed=2)
    g = torch.Generator("cuda").manual_seed(3)
    codes = torch.randint(-8, 8, (2, 2 * inner, 512), generator=g, device="cuda").to(torch.int8)
    codes[:, :inner] = 4  # gate = 64, silu(64) = 64
    scale = torch.ones_like(weights.w13_scale)
    scale[:, :inner] = 16
    pick = torch.zeros(2, 512, inner, dtype=torch.int8, device="cuda")
    row = torch.arange(512, device="cuda")
    pick[:, row, row % inner] = 1
    one = torch.ones(1, device="cuda")
    weights = weights.replaced(
        w13=pack_int4(codes),
        w13_scale=scale,
        w2=pack_int4(pick),
        w2_scale=torch.ones_like(weights.w2_scale),
        w13_input_scale=one,
        w2_input_scale=one * 4,
    )
    shuffled = stage_order(case, weights)
    for first in range(0, 512, tokens):
        x = torch.eye(512, device="cuda")[first : first + tokens].bfloat16().contiguous()
        ids = torch.arange(x.shape[0], device="cuda", dtype=torch.int32)[:, None] % 2
        route = (torch.ones_like(ids, dtype=torch.float32), ids)
        column = torch.arange(first, first + x.shape[0], device="cuda")
        up = codes[ids[:, 0].long(), inner:, :].permute(0, 2, 1).float()
        wanted = 64 * up[torch.arange(x.shape[0], device="cuda"), column][:, row % inner]
        out = call(case, shuffled, x, *route, path)
        assert torch.equal(out.float(), wanted)


@pytest.mark.parametrize(("path", "tokens", "inner"), GRAPHS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_graph_replay_with_other_routing(path: str, tokens: int, inner: int, dynamic: bool) -> None:
    case = Case(inner=inner, dynamic=dynamic)
    weights = random_weights(case)
    shuffled = stage_order(case, weights)
    x = torch.randn(tokens, case.hidden, device="cuda").bfloat16()
    topk_weights, ids = routing(case, tokens, "uniform", 1)
    call(case, shuffled, x, topk_weights, ids, path)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(case, shuffled, x, topk_weights, ids, path)
    for seed, kind in ((2, "uniform"), (3, "holes"), (4, "one expert"), (5, "uniform")):
        new_weights, new_ids = routing(case, tokens, kind, seed)
        topk_weights.copy_(new_weights)
        ids.copy_(new_ids)
        x.copy_(torch.randn(tokens, case.hidden, device="cuda"))
        graph.replay()
        assert error(out, oracle(case, weights, x, topk_weights, ids)) < TOLERANCE
