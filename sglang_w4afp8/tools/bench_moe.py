"""What ``bench moe`` measures: shapes, inputs, ceilings of the card, timing of one provider.

A measurement is one whole MoE layer, routing output in and combined BF16 out. Calls with different
routings and tokens rotate over several sets of weights inside one CUDA graph, so that weights come
from device memory, not from the L2 cache. Nothing is timed that has not just agreed with the
float64 oracle on the same inputs.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import gcd

import torch

from sglang_w4afp8.kernels.hopper import launch
from sglang_w4afp8.layer import Device, MoEProblem, MoEWeights
from sglang_w4afp8.reference import moe_reference
from sglang_w4afp8.sharding import AxisShard
from sglang_w4afp8.spec import ActivationScheme

COLD_BYTES = 150e6
"""What the calls of one graph read between two visits to the same weights: three times the L2."""

GRAPH_TOKENS = 32_768
"""Most tokens of all calls of one graph together."""


@dataclass(frozen=True)
class Shape:
    """One rank's slice of a model's routed experts.

    Attributes:
        name: as on the command line.
        experts: on this rank.
        all_experts: of the model; routing picks from these.
        hidden: hidden size.
        inner: intermediate size of this rank.
        full_inner: of the model.
        top_k: experts per token.
        group: INT4 scale group of the checkpoint.
    """

    name: str
    experts: int
    all_experts: int
    hidden: int
    inner: int
    full_inner: int
    top_k: int
    group: int = 128

    def problem(self, scheme: ActivationScheme, device: torch.device) -> MoEProblem:
        """What backends are asked about."""
        parts = self.full_inner // self.inner
        columns = AxisShard.even(self.full_inner, self.group, 0, parts, "intermediate size")
        return MoEProblem(
            self.experts,
            self.hidden,
            columns,
            self.group,
            self.top_k,
            scheme,
            Device.of(device),
        )

    @property
    def inner_group(self) -> int:
        """INT4 codes per scale of this rank's w2."""
        return gcd(self.inner, self.group)

    @property
    def expert_bytes(self) -> int:
        """INT4 weights and BF16 scales of one expert."""
        codes = 3 * self.inner * self.hidden
        up, down = 2 * codes // 3 // self.group, codes // 3 // self.inner_group
        return codes // 2 + 2 * (up + down)


def _r1(name: str, tp: int, ep: int = 1) -> Shape:
    return Shape(name, 256 // ep, 256, 7168, 2048 // tp, 2048, 8)


SHAPES = {
    shape.name: shape
    for shape in (
        *(_r1(f"r1-tp{tp}", tp) for tp in (4, 8, 16, 32)),
        *(_r1(f"r1-ep{ep}", 1, ep) for ep in (8, 16, 32)),
        Shape("kimi-k2-tp16", 384, 384, 7168, 128, 2048, 8),
        Shape("qwen3-235b-tp8", 128, 128, 4096, 192, 1536, 8),
        Shape("glm-tp8", 160, 160, 5120, 192, 1536, 8),
    )
}


def shape_of(words: str) -> Shape:
    """A named shape, or one spelt out.

    Args:
        words: a name of :data:`SHAPES`, or ``experts=…,hidden=…,inner=…,top_k=…`` with optional
            ``all_experts``, ``full_inner`` and ``group``.

    Raises:
        ValueError: neither.
    """
    if words in SHAPES:
        return SHAPES[words]
    try:
        sizes = {key: int(value) for key, value in (w.split("=") for w in words.split(","))}
        sizes = {"all_experts": sizes["experts"], "full_inner": sizes["inner"]} | sizes
        name = "custom-" + "-".join(str(sizes[key]) for key in ("experts", "hidden", "inner"))
        return Shape(name, **sizes)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{words!r} is none of {', '.join(SHAPES)}, and not of the form "
            "experts=256,hidden=7168,inner=256,top_k=8"
        ) from error


def shape_argument(words: str) -> Shape:
    """:func:`shape_of` for argparse, which shows the reason."""
    try:
        return shape_of(words)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


@dataclass(frozen=True)
class Call:
    """The inputs of one layer call.

    Attributes:
        x: ``(M, hidden)`` bfloat16.
        topk_weights: ``(M, top_k)`` float32.
        topk_ids: ``(M, top_k)`` int32, −1 for experts of other ranks.
    """

    x: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor


def random_weights(
    shape: Shape,
    scheme: ActivationScheme,
    seed: int,
    codes_used: int = 15,
    *,
    device: str = "cuda",
) -> MoEWeights:
    """Random codes, and group scales that keep every sum near 1, in checkpoint order.

    Args:
        shape: of the layer.
        scheme: of its activations.
        seed: of the random numbers.
        codes_used: 15 (−7 … 7, positive scales) or 16 (−8 … 7, scales of both signs, as the
            converter writes by default).
        device: for the tensors.
    """
    g = torch.Generator(device).manual_seed(seed)
    lowest = 7 - codes_used + 1

    def codes(rows: int, k: int) -> torch.Tensor:
        packed = torch.empty(shape.experts, rows, k // 2, dtype=torch.int8, device=device)
        for expert in packed:
            size = (rows, k)
            values = torch.randint(lowest, 8, size, generator=g, device=device, dtype=torch.int8)
            expert.copy_(pack_int4_unchecked(values))
        return packed

    def scales(rows: int, groups: int, k: int) -> torch.Tensor:
        size = (shape.experts, rows, groups)
        scale = (torch.rand(size, generator=g, device=device) + 0.5) * 0.25 / k**0.5
        if codes_used == 16:
            scale *= torch.randint(0, 2, size, generator=g, device=device) * 2 - 1
        return scale.bfloat16()

    static = torch.tensor([0.015], device=device) if scheme is ActivationScheme.STATIC else None
    inner, hidden = shape.inner, shape.hidden
    return MoEWeights(
        codes(2 * inner, hidden),
        scales(2 * inner, hidden // shape.group, hidden),
        codes(hidden, inner),
        scales(hidden, inner // shape.inner_group, inner),
        shape.group,
        shape.inner_group,
        static,
        None if static is None else static.clone(),
    )


def pack_int4_unchecked(codes: torch.Tensor) -> torch.Tensor:
    """:func:`~sglang_w4afp8.packing.pack_int4` without its check, which waits for the GPU."""
    nibbles = codes.to(torch.uint8) & 0x0F
    return (nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)).view(torch.int8)


ROUTINGS = {
    "uniform": "every expert equally likely",
    "zipf": "the expert of rank r is chosen with a chance proportional to r^-1.2",
    "hot": "30 % of tokens choose one expert among others, the rest is uniform",
}


def random_calls(
    shape: Shape, tokens: int, routing: str, count: int, seed: int, device: str = "cuda"
) -> list[Call]:
    """``count`` calls with a routing of :data:`ROUTINGS`; each call has its own zipf order."""
    assert routing in ROUTINGS, routing
    g = torch.Generator(device).manual_seed(seed)
    calls = []
    for _ in range(count):
        # An exponential race: with waiting times divided by p, first place has a chance ∝ p.
        waits = torch.rand(tokens, shape.all_experts, generator=g, device=device).log().neg()
        if routing == "zipf":
            rank = torch.randperm(shape.all_experts, generator=g, device=device) + 1
            waits = waits * rank**1.2
        elif routing == "hot":
            chosen = torch.rand(tokens, generator=g, device=device) < 0.3
            chosen[0] = True  # also where there are too few tokens for 30 %
            waits[chosen, 1] = -1.0
        ids = waits.topk(shape.top_k, dim=-1, largest=False).indices.to(torch.int32)
        ids = torch.where(ids < shape.experts, ids, -1)
        weights = torch.rand(tokens, shape.top_k, generator=g, device=device) + 0.1
        weights = weights / weights.sum(dim=-1, keepdim=True)
        x = torch.randn(tokens, shape.hidden, generator=g, device=device).bfloat16()
        calls.append(Call(x, weights, ids.contiguous()))
    return calls


def call_count(shape: Shape, tokens: int) -> int:
    """Calls in one graph, so that weights are cold when a replay starts over.

    Large calls read all weights each and take milliseconds: two are cold and long enough, and more
    would only hold memory.
    """
    one = shape.expert_bytes * min(shape.experts, tokens * shape.top_k) * 0.6
    most = max(2, GRAPH_TOKENS // tokens)
    return int(min(48, most, max(8, COLD_BYTES // one)))


def errors(out: torch.Tensor, wanted: torch.Tensor) -> tuple[float, float]:
    """``‖out − wanted‖ / ‖wanted‖`` and the largest difference over wanted's rms; NaN stays NaN.

    Where nothing is wanted, as when all experts are on other ranks, anything but zero is an error.
    """
    wanted = wanted.double()
    difference = out.double() - wanted
    rms = wanted.square().mean().sqrt().clamp(min=1e-30)
    return float(difference.square().mean().sqrt() / rms), float(difference.abs().max() / rms)


def oracle(weights: MoEWeights, call: Call, scheme: ActivationScheme) -> torch.Tensor:
    """The layer in float64."""
    return moe_reference(call.x, weights, call.topk_weights, call.topk_ids, scheme=scheme)


def graph_times_us(body: Callable[[], object], calls: int, replays: int) -> list[float]:
    """Microseconds per call of ``replays`` replays of a graph that holds ``body`` once.

    Args:
        body: launches ``calls`` calls.
        calls: how many.
        replays: timed replays, after three untimed ones.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        body()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = body()
    times = []
    for number in range(replays + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if number >= 3:
            times.append(begin.elapsed_time(end) * 1e3 / calls)
    del kept
    return times


def spread(times: Sequence[float]) -> tuple[float, float]:
    """Median, and largest minus smallest."""
    return statistics.median(times), max(times) - min(times)


def hit_experts(calls: Sequence[Call]) -> float:
    """Distinct experts of this rank per call, on average."""
    return statistics.mean(
        int(torch.unique(call.topk_ids[call.topk_ids >= 0]).numel()) for call in calls
    )


@dataclass(frozen=True)
class Ceilings:
    """What the card did in this run.

    Attributes:
        read_gb_s: reading device memory into shared memory with bulk copies, nothing else.
        copy_gb_s: device-to-device copy, bytes read plus bytes written.
        fp8_tflops: an 8192³ E4M3 matrix product.
    """

    read_gb_s: float
    copy_gb_s: float
    fp8_tflops: float

    def roofline_us(self, weight_bytes: float, flops: float) -> float:
        """The time below which no kernel for this work gets."""
        return max(weight_bytes / self.read_gb_s / 1e3, flops / self.fp8_tflops / 1e6)


def measure_ceilings() -> Ceilings:
    """All ceilings, each the median of 10."""
    source = torch.empty(2 << 30, dtype=torch.uint8, device="cuda").random_(0, 255)
    target = torch.empty_like(source)

    def copying() -> torch.Tensor:
        return target.copy_(source)

    copy, _ = spread(graph_times_us(copying, 1, 10))
    read, _ = spread(graph_times_us(lambda: launch.stream(source), 1, 10))
    size = 8192
    a = torch.randn(size, size, device="cuda").to(torch.float8_e4m3fn)
    b = torch.randn(size, size, device="cuda").to(torch.float8_e4m3fn).t()
    one = torch.ones((), device="cuda")

    def product() -> torch.Tensor:
        return torch._scaled_mm(a, b, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    product_us, _ = spread(graph_times_us(product, 1, 10))
    size_gb = (2 << 30) / 1e9
    tflop = 2 * size**3 / 1e12
    return Ceilings(size_gb / read * 1e6, 2 * size_gb / copy * 1e6, tflop / product_us * 1e6)


def private_copy(weights: MoEWeights) -> MoEWeights:
    """A copy that a backend's ``prepare`` may overwrite."""
    return replace(
        weights,
        w13=weights.w13.clone(),
        w13_scale=weights.w13_scale.clone(),
        w2=weights.w2.clone(),
        w2_scale=weights.w2_scale.clone(),
    )
