"""E4M3 rows of a token dispatcher in calls of the prefill path, against the float64 oracle."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hopper_layers import PER_TOKEN, STATIC, TOLERANCE, Case, Layer, relative_error

from sglang_w4afp8.kernels.hopper import launch, plan, plan_prefill
from sglang_w4afp8.kernels.hopper.backend import State
from sglang_w4afp8.reference import moe_reference
from sglang_w4afp8.testing.dispatch import quantize_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
]

ALWAYS = plan.Limits(0, 0, 0)
"""Every call takes the prefill path."""
NEVER = plan.Limits(0, 0, plan.UNLIMITED)


class Rows(NamedTuple):
    """A call: rows, their scales, weights and ids."""

    x: torch.Tensor
    scale: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor


def case_of(inner: int, **more: object) -> Case:
    """A rank's whole experts."""
    sizes = {"tp": 1, "experts": 8, "top_k": 4, "dispatched": True, "full_inner": inner}
    return Case(**{**sizes, **more})  # type: ignore[arg-type]


def rows_of(case: Case, tokens: int, here: float, twice: bool = True) -> Rows:
    """Rows whose blocks of 128 columns differ in size, so that another's scale would be noticed.

    Args:
        case: the layer.
        tokens: M.
        here: which part of the pairs is this rank's.
        twice: some tokens name an expert twice.
    """
    g = torch.Generator("cuda").manual_seed(tokens)
    x = torch.randn(tokens, case.hidden // 128, 128, generator=g, device="cuda")
    x *= 2.0 ** torch.randint(-3, 4, (*x.shape[:2], 1), generator=g, device="cuda")
    codes, scale = quantize_rows(x.flatten(1))
    scores = torch.rand(tokens, case.experts, generator=g, device="cuda")
    ids = scores.topk(case.top_k, dim=-1).indices
    ids = torch.where(torch.rand(ids.shape, generator=g, device="cuda") < here, ids, -1)
    if twice:
        ids[::5, 1] = ids[::5, 0]
    weights = torch.rand(ids.shape, generator=g, device="cuda") + 0.1
    return Rows(codes, scale, weights, ids)


def call(layer: Layer, rows: Rows, limits: plan.Limits = ALWAYS) -> torch.Tensor:
    """The layer's output, from memory that was full of NaN before."""
    ready = layer.ready.replaced(state=State(layer.ready.state.counters, limits))
    torch.cuda.empty_cache()
    held = torch.full((1 << 29,), 0xFF, dtype=torch.uint8, device="cuda")
    del held
    arguments = (rows.x, rows.weights, rows.ids, 2.5)
    return layer.backend.run(layer.problem, ready, *arguments, x_scale=rows.scale)


def check(layer: Layer, rows: Rows) -> None:
    """Against the oracle, and two calls against each other."""
    out = call(layer, rows)
    wanted = moe_reference(
        rows.x, layer.weights, rows.weights, rows.ids,
        scheme=layer.case.scheme, x_scale=rows.scale, routed_scaling_factor=2.5,
    )  # fmt: skip
    assert out.dtype == torch.bfloat16 and out.shape == rows.x.shape
    assert relative_error(out, wanted) < TOLERANCE
    assert torch.equal(out, call(layer, rows)), "two runs differ"
    assert not layer.ready.state.counters.any(), "counters must end as zeros"


def launches_of(layer: Layer, tokens: int) -> list[str]:
    """What runs."""
    rows, ready, static = rows_of(layer.case, tokens, 1.0), layer.ready, layer.case.scheme is STATIC
    sizes = plan.Layer(
        layer.case.experts, layer.case.hidden, layer.case.full_inner, layer.case.group,
        layer.case.group, layer.case.top_k, ready.w13.dtype is torch.uint8, not static, ALWAYS,
    )  # fmt: skip
    tensors = launch.Tensors(
        rows.x, rows.weights, rows.ids, ready.w13, ready.w13_scale, ready.w2, ready.w2_scale,
        ready.w13_input_scale if static else None, ready.w2_input_scale if static else None,
        ready.state.counters, rows.scale,
    )  # fmt: skip
    out = torch.empty(rows.x.shape, dtype=torch.bfloat16, device="cuda")
    return [made.kernel.entry for made, _ in launch.launches(sizes, tensors, out, 1.0)]


CASES = [
    case_of(512),
    case_of(768, experts=32, scheme=PER_TOKEN),
    case_of(320, group=64, minus_eight=False, experts=5),
    case_of(320, group=32, scheme=PER_TOKEN, experts=16, hidden=640),
    case_of(2048, hidden=7168, experts=32),  # EP8 of DeepSeek-R1
]


@pytest.fixture(scope="module", params=CASES, ids=str)
def layer(request: pytest.FixtureRequest) -> Layer:
    return Layer(request.param)


@pytest.mark.parametrize(("room", "early_rounds"), [(0.25, 2), (8, 2), (8, 0)])
def test_rows_and_room(
    layer: Layer, room: float, early_rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are gathered, or copied to the order of the list by both kernels or by one of them."""
    monkeypatch.setattr(plan_prefill, "ROOM", room)
    monkeypatch.setattr(plan_prefill, "EARLY_ROUNDS", early_rounds)
    assert launches_of(layer, 40)[1] == "w4a8_prefill_up"
    for tokens, here in ((1, 1.0), (40, 0.5), (700, 0.3), (1500, 1.0), (3001, 0.3)):
        rows = rows_of(layer.case, tokens, here)
        check(layer, rows)
    columns_outermost = rows.scale.T.contiguous().T
    assert torch.equal(call(layer, rows), call(layer, rows._replace(scale=columns_outermost)))
    check(layer, rows_of(layer.case, 300, 0.0, twice=False))  # nothing for this rank


@pytest.mark.parametrize("tokens", [30, 200, 900])
@pytest.mark.parametrize("group", [128, 64, 32])
@pytest.mark.parametrize("scheme", [STATIC, PER_TOKEN], ids=str)
def test_scales_of_a_power_of_two_change_no_bit(scheme: object, group: int, tokens: int) -> None:
    """E4M3 rows at a power of two are what BF16 rows become: the same sums, column by column.

    With per-token scales that is so for rows whose largest value is 448 times the scale.
    """
    layer = Layer(case_of(512, group=group, scheme=scheme), static_scale=2.0**-5)
    g = torch.Generator("cuda").manual_seed(tokens)
    hidden = layer.case.hidden
    codes = torch.randn(tokens, hidden, generator=g, device="cuda") * 40
    codes[:, ::128] = 448
    codes = codes.to(torch.float8_e4m3fn)
    rows = rows_of(layer.case, tokens, 0.4)
    rows = rows._replace(x=codes, scale=torch.full_like(rows.scale, 2.0**-5))
    x = (codes.float() / 32).bfloat16()
    ready = layer.ready.replaced(state=State(layer.ready.state.counters, ALWAYS))
    wanted = layer.backend.run(layer.problem, ready, x, rows.weights, rows.ids, 2.5)
    assert wanted.abs().max() > 0 and torch.equal(call(layer, rows), wanted)
    other = call(layer, rows, NEVER)
    assert relative_error(call(layer, rows), other) < TOLERANCE


@pytest.mark.parametrize(
    ("tokens", "here", "room"), [(200, 0.4, 8), (1100, 0.4, 8), (1100, 1.0, 0.5)]
)
@pytest.mark.parametrize("scheme", [STATIC, PER_TOKEN], ids=str)
def test_few_items_of_a_dispatcher(
    scheme: object, tokens: int, here: float, room: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that CTAs share and use again, in calls short enough for a race detector."""
    monkeypatch.setattr(plan_prefill, "ROOM", room)
    layer = Layer(case_of(512, hidden=7168, experts=6, scheme=scheme))
    check(layer, rows_of(layer.case, tokens, here))


def test_one_graph_serves_other_rows() -> None:
    layer = Layer(case_of(512, scheme=PER_TOKEN))
    ready = layer.ready.replaced(state=State(layer.ready.state.counters, ALWAYS))
    held = rows_of(layer.case, 600, 0.5)

    def run(rows: Rows) -> torch.Tensor:
        arguments = (rows.x, rows.weights, rows.ids, 2.5)
        return layer.backend.run(layer.problem, ready, *arguments, x_scale=rows.scale)

    run(held)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(held)
    for here in (0.1, 0.5, 1.0):  # in the order of the list, and gathered
        rows = rows_of(layer.case, 600, here)
        for to, value in zip(held, rows, strict=True):
            to.copy_(value)
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, run(rows))


def test_more_rows_than_a_call_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worked off in several, each with its part of the scales, whatever their order in memory."""
    layer = Layer(case_of(512))
    rows = rows_of(layer.case, 2500, 0.5)
    rows = rows._replace(scale=rows.scale.T.contiguous().T)
    wanted, most, asked = call(layer, rows), 700, []
    plan_one = launch.plan_prefill

    def note(sizes: plan.Layer, tokens: int, *more: object) -> object:
        asked.append((tokens, *more[1:]))
        return plan_one(sizes, tokens, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(launch, "plan_prefill", note)
    monkeypatch.setattr(launch, "most_tokens", lambda *_: most)
    assert torch.equal(call(layer, rows), wanted)
    assert asked == [(700, True), (700, True), (700, True), (400, True)]


@pytest.mark.parametrize(
    "case",
    [
        case_of(256),  # down's K is short
        case_of(512, hidden=384, group=64),  # stages of 192 columns
        case_of(512, top_k=33, experts=40),
    ],
    ids=str,
)
def test_other_layers_take_large(case: Case) -> None:
    layer = Layer(case)
    assert launches_of(layer, 300)[1] == "w4a8_gemm"
    check(layer, rows_of(case, 300, 0.5))
