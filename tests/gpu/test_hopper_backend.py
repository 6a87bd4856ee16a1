"""The ``hopper`` backend as SGLang uses it: prepared layers, graphs, torch.compile, streams."""

from __future__ import annotations

import hopper_layers
import pytest
import torch
from hopper_layers import PER_TOKEN, STATIC, TOLERANCE, Case, relative_error

from sglang_w4afp8.kernels.hopper import plan
from sglang_w4afp8.kernels.hopper.backend import hopper_moe
from sglang_w4afp8.reference import moe_reference
from sglang_w4afp8.spec import ActivationScheme

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
]


class Layer(hopper_layers.Layer):
    """As a server's layer is called."""

    def __call__(
        self, x: torch.Tensor, route: torch.Tensor, ids: torch.Tensor, factor: float = 1.0
    ) -> torch.Tensor:
        return self.backend.run(self.problem, self.ready, x, route, ids, factor)

    def error(self, out: torch.Tensor, *call: torch.Tensor) -> float:
        """Relative L2 against the oracle; NaN stays NaN."""
        x, route, ids = call
        wanted = moe_reference(x, self.weights, route, ids, scheme=self.case.scheme)
        return relative_error(out, wanted)


def call(case: Case, tokens: int, kind: str, seed: int) -> tuple[torch.Tensor, ...]:
    """Inputs; ``kind`` is how tokens choose experts."""
    g = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(tokens, case.hidden, generator=g, device="cuda").bfloat16()
    route = torch.rand(tokens, case.top_k, generator=g, device="cuda") + 0.1
    scores = torch.rand(tokens, case.experts, generator=g, device="cuda")
    if kind == "few experts":
        scores[:, case.top_k + 1 :] = -1  # the others stay empty
    ids = scores.topk(case.top_k, dim=-1).indices.to(torch.int32)
    if kind == "one expert":
        ids = torch.full_like(ids, case.experts - 1)
    elif kind == "elsewhere":
        ids = torch.where(torch.rand(ids.shape, generator=g, device="cuda") < 0.5, -1, ids)
    elif kind == "nobody":
        ids = torch.full_like(ids, -1)
    return x, route, ids.contiguous()


KINDS = ("uniform", "few experts", "one expert", "elsewhere", "nobody", "uniform")
SHARDS = [
    Case(full_inner=768),  # 96 columns, group 32, filled up to 128
    Case(full_inner=768, scheme=PER_TOKEN),
    Case(full_inner=1280, tp=8, scheme=PER_TOKEN),  # 160, filled up to 192
    Case(full_inner=512, tp=16, group=64),  # 32, filled up to 64
    Case(full_inner=768, tp=2),  # 384 columns, three stages of one group
    Case(hidden=544, full_inner=512, tp=4, group=32),  # hidden filled up to 576
    Case(hidden=1056, full_inner=768, group=32, scheme=PER_TOKEN),
    # Hidden sizes of models for tests, the first and the third filled up to 64 and 128
    Case(hidden=32, full_inner=512, tp=8, group=32),
    Case(hidden=64, full_inner=2048, tp=8, group=64, scheme=PER_TOKEN),
    Case(hidden=96, full_inner=768, tp=8, group=32, scheme=PER_TOKEN),
    Case(hidden=128, full_inner=1024, tp=8),
    Case(hidden=128, full_inner=512, tp=1, group=32),
]


@pytest.mark.parametrize("case", SHARDS, ids=str)
def test_shards_off_the_grid(case: Case) -> None:
    layer = Layer(case)
    for tokens in (1, 5, 33, 150, 500, 1100):
        for kind in KINDS[:5]:
            inputs = call(case, tokens, kind, tokens)
            out = layer(*inputs)
            assert out.shape == inputs[0].shape and out.is_contiguous()
            if kind == "nobody":
                assert torch.equal(out, torch.zeros_like(out))
            else:
                assert layer.error(out, *inputs) < TOLERANCE, (tokens, kind)


@pytest.mark.parametrize("scheme", [STATIC, PER_TOKEN], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 7, 9, 37, 129, 301])
def test_one_graph_serves_every_routing(tokens: int, scheme: ActivationScheme) -> None:
    case = Case(scheme=scheme)
    layer = Layer(case)
    inputs = call(case, tokens, "uniform", 0)
    layer(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(*inputs)
    for seed, kind in enumerate(KINDS, 1):
        for held, fresh in zip(inputs, call(case, tokens, kind, seed), strict=True):
            held.copy_(fresh)
        out.fill_(float("nan"))
        allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
        graph.replay()
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocated
        if kind == "nobody":
            assert torch.equal(out, torch.zeros_like(out))
        else:
            assert layer.error(out, *inputs) < TOLERANCE, kind
            assert torch.equal(out, layer(*inputs)), f"{kind}: replay and call differ"


@pytest.mark.parametrize("scheme", [STATIC, PER_TOKEN], ids=str)
def test_torch_compile_sees_one_graph(scheme: ActivationScheme) -> None:
    case = Case(scheme=scheme)
    layer = Layer(case)

    def step(x: torch.Tensor, route: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        # Exact around the op: Inductor keeps float32 between operations, and one bit of BF16 more
        # or less in the op's input moves FP8 codes and so 3 % of the output.
        return x + layer(x * 0.5, route, ids, 2.5)

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for tokens in (4, 40, 33):
        inputs = call(case, tokens, "uniform", tokens)
        assert torch.equal(compiled(*inputs), step(*inputs)), tokens


def test_the_op_keeps_torchs_rules() -> None:
    layer = Layer(Case())
    ready = layer.ready
    x, route, ids = call(layer.case, 6, "uniform", 0)
    arguments = (
        x, route, ids, ready.w13, ready.w13_scale, ready.w2, ready.w2_scale,
        ready.w13_input_scale, ready.w2_input_scale, ready.state.counters,
        ready.state.limits, 1.0,
    )  # fmt: skip
    torch.library.opcheck(hopper_moe, arguments)


@pytest.mark.parametrize("scheme", [STATIC, PER_TOKEN], ids=str)
def test_two_layers_on_two_streams(scheme: ActivationScheme) -> None:
    case = Case(hidden=2048, scheme=scheme)
    layers = [Layer(case, seed) for seed in (0, 1)]
    streams = [torch.cuda.Stream() for _ in layers]
    for tokens in (3, 64):
        inputs = [call(case, tokens, "uniform", seed) for seed in (3, 4)]
        wanted = [layer(*given) for layer, given in zip(layers, inputs, strict=True)]
        torch.cuda.synchronize()
        outs: list[list[torch.Tensor]] = [[], []]
        for _ in range(50):
            for layer, stream, given, kept in zip(layers, streams, inputs, outs, strict=True):
                with torch.cuda.stream(stream):
                    kept.append(layer(*given))
        torch.cuda.synchronize()
        for kept, one in zip(outs, wanted, strict=True):
            assert all(torch.equal(out, one) for out in kept)
        assert not any(layer.ready.state.counters.any() for layer in layers), (
            "counters must end as zeros"
        )


def test_more_tokens_than_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(hidden=512, full_inner=1024)
    layer = Layer(case)
    inputs = call(case, 2500, "uniform", 0)
    wanted = layer(*inputs)
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    monkeypatch.setattr(plan, "COUNTERS", 4 * sms + 2 * case.experts + 64)  # 1024 tokens a call
    assert torch.equal(layer(*inputs), wanted)
    assert layer.error(wanted, *inputs) < TOLERANCE
