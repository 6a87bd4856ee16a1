"""The Hopper kernels on what DeepEP sends, against the float64 oracle; DeepEP is emulated."""

from __future__ import annotations

from typing import Any

import hopper_layers
import pytest
import torch
from hopper_layers import PER_TOKEN, STATIC, TOLERANCE, Case, relative_error

from sglang_w4afp8.kernels.hopper import launch_rows, plan
from sglang_w4afp8.kernels.hopper.backend import (
    State,
    hopper_moe,
    hopper_moe_slots,
    layer_of,
)
from sglang_w4afp8.kernels.hopper.launch import start
from sglang_w4afp8.reference import masked_reference, moe_reference
from sglang_w4afp8.spec import ActivationScheme
from sglang_w4afp8.testing.cases import Routing
from sglang_w4afp8.testing.dispatch import (
    Slots,
    dispatch_slots,
    dispatch_tokens,
    quantize_rows,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
]

TOP_K, RANKS, RANK = 4, 4, 1


def whole(inner: int = 512, experts: int = 8, **more: Any) -> Case:
    """One rank's whole experts."""
    return Case(full_inner=inner, tp=1, experts=experts, top_k=TOP_K, dispatched=True, **more)


class Layer(hopper_layers.Layer):
    """With slots."""

    def slots(self, sent: Slots, expected: int = 8) -> torch.Tensor:
        """``run_masked`` on emulated rows."""
        arguments = (sent.rows, sent.row_scale, sent.masked_m, expected)
        return self.backend.run_masked(self.problem, self.ready, *arguments)

    def wanted_of_slots(self, sent: Slots) -> torch.Tensor:
        """The oracle's rows, those that count."""
        scheme, scale = self.case.scheme, sent.row_scale
        wanted = masked_reference(
            sent.rows, self.weights, sent.masked_m, scheme=scheme, row_scale=scale
        )
        return wanted[sent.valid]


def is_close(out: torch.Tensor, wanted: torch.Tensor) -> bool:
    """By relative L2, which a NaN fails; two without rows are close."""
    if not len(out):
        return out.shape == wanted.shape
    return relative_error(out, wanted) < TOLERANCE


def batch(case: Case, tokens: int, kind: str, seed: int = 0) -> Routing:
    """A batch of all ranks; ``kind`` is how tokens choose among all ranks' experts."""
    g = torch.Generator("cuda").manual_seed(seed + tokens)
    x = torch.randn(tokens, case.hidden, generator=g, device="cuda")
    # Blocks of very different size, so that a scale of a neighbour would be noticed.
    blocks = -(-case.hidden // 128)
    sizes = 2.0 ** torch.randint(-3, 4, (tokens, blocks), generator=g, device="cuda")
    x *= sizes.repeat_interleave(128, 1)[:, : case.hidden]
    route = torch.rand(tokens, TOP_K, generator=g, device="cuda") + 0.1
    scores = torch.rand(tokens, RANKS * case.experts, generator=g, device="cuda")
    first = RANK * case.experts
    if kind == "here":
        scores[:, first : first + case.experts] += 1
    elif kind == "some experts empty":
        scores[:, first : first + case.experts // 2] = -1
    ids = scores.topk(TOP_K, dim=-1).indices
    if kind == "one expert":
        ids[:, 1:] = -1
        ids[:, 0] = first + 1
    return Routing(x.bfloat16(), route, ids)


def poison() -> None:
    """Bytes 0xff, NaN in every format here, into the memory that torch.empty gives out next."""
    torch.cuda.empty_cache()
    held = torch.full((1 << 30,), 0xFF, dtype=torch.uint8, device="cuda")
    del held


CASES = [
    whole(),
    whole(scheme=PER_TOKEN),
    whole(group=64, minus_eight=False),
    whole(group=32, scheme=PER_TOKEN, inner=320),
    whole(hidden=384, group=64, inner=192),  # stages of 192 columns: scales of 64
    whole(hidden=384, group=32, inner=256, scheme=PER_TOKEN),
    whole(hidden=640, inner=256, minus_eight=False),  # stages of 128
    whole(hidden=128, inner=256),
    whole(hidden=128, group=32, scheme=PER_TOKEN),
    whole(hidden=7168, inner=2048, experts=32),  # EP8 of DeepSeek-R1
]


@pytest.fixture(scope="module", params=CASES, ids=str)
def layer(request: pytest.FixtureRequest) -> Layer:
    return Layer(request.param)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("tokens", [1, 6, 40, 300, 1500])
def test_normal(layer: Layer, tokens: int, fp8: bool) -> None:
    for kind in ("uniform", "here", "some experts empty", "one expert"):
        sent = dispatch_tokens(batch(layer.case, tokens, kind), RANK, layer.case.experts, fp8)
        arguments = (sent.rows, sent.topk_weights, sent.topk_ids)
        poison()
        out = layer.backend.run(layer.problem, layer.ready, *arguments, 1.0, x_scale=sent.row_scale)
        assert out.dtype == torch.bfloat16 and out.shape == sent.rows.shape
        wanted = moe_reference(
            sent.rows, layer.weights, sent.topk_weights, sent.topk_ids,
            scheme=layer.case.scheme, x_scale=sent.row_scale,
        )  # fmt: skip
        assert is_close(out, wanted), kind
        again = layer.backend.run(
            layer.problem, layer.ready, *arguments, 1.0, x_scale=sent.row_scale
        )
        assert torch.equal(out, again), f"{kind}: two runs differ"
    assert not layer.ready.state.counters.any(), "counters must end as zeros"


def test_normal_without_tokens(layer: Layer) -> None:
    rows = torch.empty(0, layer.case.hidden, device="cuda").to(torch.float8_e4m3fn)
    scale = torch.empty(0, layer.case.hidden // 128, device="cuda")
    ids = torch.empty(0, TOP_K, dtype=torch.int64, device="cuda")
    out = layer.backend.run(layer.problem, layer.ready, rows, ids.float(), ids, 1.0, x_scale=scale)
    assert out.dtype == torch.bfloat16 and out.shape == rows.shape


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("tokens", [1, 6, 40, 200])
def test_slots(layer: Layer, tokens: int, fp8: bool) -> None:
    case = layer.case
    for kind in ("uniform", "here", "some experts empty", "one expert"):
        sent = dispatch_slots(batch(case, tokens, kind), RANK, case.experts, tokens, fp8)
        wanted = layer.wanted_of_slots(sent)
        for expected in (1, 8, 20, 1000):  # every width of tiles
            poison()
            out = layer.slots(sent, expected)
            assert out.dtype == torch.bfloat16 and out.shape == sent.rows.shape
            assert is_close(out[sent.valid], wanted), (kind, expected)
            assert torch.equal(out[sent.valid], layer.slots(sent, expected)[sent.valid])
    assert not layer.ready.state.counters.any(), "counters must end as zeros"


@pytest.mark.parametrize("hidden", [32, 64, 96])
def test_bf16_rows_of_a_small_hidden_size(hidden: int) -> None:
    """E4M3 rows have a scale per 128 columns; the sizes of models for tests are below."""
    layer = Layer(whole(hidden=hidden, inner=192, group=32, scheme=PER_TOKEN))
    for tokens in (1, 6, 40, 300, 1500):
        test_normal(layer, tokens, False)
    for tokens in (1, 40):
        test_slots(layer, tokens, False)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("slots", [1, 16, 130])
def test_empty_and_full_experts_and_what_is_not_written(
    layer: Layer, slots: int, fp8: bool
) -> None:
    """Rows behind the counts are NaN on the way in and on the way out."""
    case, ready = layer.case, layer.ready
    full, g = dispatch_of(case, slots, fp8), torch.Generator().manual_seed(slots)
    sizes = layer_of(
        ready.w13, ready.w2, ready.w13_scale, ready.w2_scale, 1, ready.w13.dtype is torch.uint8,
        case.scheme is PER_TOKEN,
    )  # fmt: skip
    nothing, everything = torch.zeros(case.experts), torch.full((case.experts,), slots)
    mixed = torch.randint(0, slots + 1, (case.experts,), generator=g)
    mixed[0], mixed[-1] = slots, 0
    for counts in (nothing, everything, mixed, mixed.flip(0)):
        sent = cut(full, counts)
        static = case.scheme is STATIC
        tensors = launch_rows.Slots(
            sent.rows, sent.row_scale, sent.masked_m, ready.w13, ready.w13_scale, ready.w2,
            ready.w2_scale, ready.w13_input_scale if static else None,
            ready.w2_input_scale if static else None, ready.state.counters,
        )  # fmt: skip
        out = torch.full(sent.rows.shape, float("nan"), device="cuda").bfloat16()
        sms = torch.cuda.get_device_properties(0).multi_processor_count
        start(launch_rows.launches_slots(sizes, tensors, out, 8, sms), out.device, True)
        assert out[~sent.valid].isnan().all(), "written behind the counts"
        assert is_close(out[sent.valid], layer.wanted_of_slots(sent))


def dispatch_of(case: Case, slots: int, fp8: bool) -> Slots:
    """Every expert full."""
    g = torch.Generator("cuda").manual_seed(slots)
    shape = (case.experts, slots, case.hidden)
    rows = torch.randn(shape, generator=g, device="cuda").bfloat16()
    rows, scale = quantize_rows(rows) if fp8 else (rows, None)
    counts = torch.full((case.experts,), slots, dtype=torch.int32, device="cuda")
    return Slots(rows, scale, counts, torch.ones(shape[:2], device="cuda"), counts)


def cut(full: Slots, counts: torch.Tensor) -> Slots:
    """The first ``counts`` rows of each expert, NaN behind; scales with columns outermost."""
    masked_m = counts.to("cuda", torch.int32)
    valid = torch.arange(full.rows.shape[1], device="cuda") < masked_m[:, None]
    rows = torch.where(valid[..., None], full.rows.float(), float("nan")).to(full.rows.dtype)
    scale = full.row_scale
    if scale is not None:
        scale = torch.where(valid[..., None], scale, float("nan"))
        scale = scale.transpose(1, 2).contiguous().transpose(1, 2)
    return Slots(rows, scale, masked_m, full.weights, full.origin)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("scheme", [STATIC, PER_TOKEN], ids=str)
def test_one_graph_serves_all_counts(scheme: ActivationScheme, fp8: bool) -> None:
    case, slots = whole(scheme=scheme), 96
    layer = Layer(case)
    full = dispatch_of(case, slots, fp8)
    held = cut(full, torch.full((case.experts,), 3))
    layer.slots(held)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer.slots(held)
    g = torch.Generator().manual_seed(0)
    for counts in (
        torch.zeros(case.experts),
        torch.full((case.experts,), slots),
        *(torch.randint(0, slots + 1, (case.experts,), generator=g) for _ in range(4)),
    ):
        sent = cut(full, counts)
        held.rows.copy_(sent.rows)
        held.masked_m.copy_(sent.masked_m)
        if held.row_scale is not None and sent.row_scale is not None:
            held.row_scale.copy_(sent.row_scale)
        out.fill_(float("nan"))
        allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
        graph.replay()
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocated
        assert out[~sent.valid].isnan().all()
        assert is_close(out[sent.valid], layer.wanted_of_slots(sent))
        assert torch.equal(out[sent.valid], layer.slots(held)[sent.valid])


@pytest.mark.parametrize("tokens", [1, 30, 200, 700])
@pytest.mark.parametrize("group", [128, 64, 32])
def test_scales_of_a_power_of_two_change_no_bit(group: int, tokens: int) -> None:
    """E4M3 rows at the static scale are what BF16 rows become: the same kernel, the same sums."""
    layer = Layer(whole(group=group), static_scale=2.0**-5)
    counters = layer.ready.state.counters
    large = layer.ready.replaced(state=State(counters, plan.Limits(0, 0, plan.UNLIMITED)))
    x, route, ids = batch(layer.case, tokens, "here")
    ids = torch.where(ids // layer.case.experts == RANK, ids % layer.case.experts, -1)
    codes = (x.float() * 32).clamp(-448, 448).to(torch.float8_e4m3fn)
    for scale in (
        torch.full((tokens, layer.case.hidden // 128), 2.0**-5, device="cuda"),
        torch.full((layer.case.hidden // 128, tokens), 2.0**-5, device="cuda").T,
    ):
        found = layer.backend.run(layer.problem, large, codes, route, ids, 1.0, x_scale=scale)
        wanted = layer.backend.run(layer.problem, large, x, route, ids, 1.0)
        assert wanted.abs().max() > 0 and torch.equal(found, wanted)


def test_the_ops_keep_torchs_rules() -> None:
    layer = Layer(whole(scheme=PER_TOKEN))
    ready, sent = layer.ready, dispatch_of(layer.case, 5, True)
    weights = (ready.w13, ready.w13_scale, ready.w2, ready.w2_scale, None, None)
    counters = ready.state.counters
    # Its schema test multiplies arguments, which torch cannot do with FP8 on a GPU; the tests of
    # results call the op twice and would see an argument change.
    others = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        hopper_moe_slots,
        (sent.rows, sent.row_scale, sent.masked_m, *weights, counters, 4),
        test_utils=others,
    )
    tokens = dispatch_tokens(batch(layer.case, 6, "here"), RANK, layer.case.experts, True)
    routing = (tokens.topk_weights, tokens.topk_ids)
    limits = list(ready.state.limits)
    torch.library.opcheck(
        hopper_moe,
        (tokens.rows, *routing, *weights, counters, limits, 1.0, tokens.row_scale),
        test_utils=others,
    )


def test_more_tokens_than_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(whole())
    sent = dispatch_tokens(batch(layer.case, 2500, "here"), RANK, layer.case.experts, True)
    arguments = (sent.rows, sent.topk_weights, sent.topk_ids, 1.0)
    wanted = layer.backend.run(layer.problem, layer.ready, *arguments, x_scale=sent.row_scale)
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    monkeypatch.setattr(plan, "COUNTERS", 4 * sms + 2 * layer.case.experts + 64)
    found = layer.backend.run(layer.problem, layer.ready, *arguments, x_scale=sent.row_scale)
    # Other runs of stages, so sums are cut elsewhere.
    assert is_close(found, wanted)
