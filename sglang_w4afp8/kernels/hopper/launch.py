"""One MoE layer on Hopper: workspace, kernel arguments, launches.

:func:`run` is the whole layer for weights in stage order. Its memory comes from torch's caching
allocator, so a CUDA graph that captures it owns what it needs and replays without allocating.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from sglang_w4afp8.kernels.hopper.driver import function
from sglang_w4afp8.kernels.hopper.plan import (
    COUNTERS,
    Kernel,
    Launch,
    Layer,
    Plan,
    most_tokens,
    plan,
    takes_prefill,
)
from sglang_w4afp8.kernels.hopper.plan_prefill import plan_prefill, takes_row_scales

_P, _I, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_float


class Join(ctypes.Structure):
    """``Join`` in units.cuh."""

    _fields_ = (("partial", _P), ("ready", _P), ("stages_per_unit", _I))


class _Batch(ctypes.Structure):
    """``Batch`` in slots.cuh."""

    _fields_ = (
        ("ids", _P), ("tokens", _I), ("top_k", _I), ("experts", _I), ("ids_are_64", _I),
    )  # fmt: skip


class RouteParams(ctypes.Structure):
    """``RouteParams`` in route.cu."""

    _fields_ = (
        ("x", _P), ("ids", _P), ("xq", _P), ("x_scale", _P), ("a_scale", _P), ("header", _P),
        ("tile_expert", _P), ("columns", _P), ("pairs", _I), ("top_k", _I), ("hidden", _I),
        ("experts", _I), ("tile_tokens", _I), ("ids_are_64", _I),
    )  # fmt: skip


class GemmParams(ctypes.Structure):
    """``GemmParams`` in gemm.cu."""

    _fields_ = (
        ("w", _P), ("scales", _P), ("b", _P), ("ids", _P), ("header", _P), ("tile_expert", _P),
        ("columns", _P), ("b_scale", _P), ("q_scale", _P), ("q", _P), ("q_row_scale", _P),
        ("inner", _P), ("y", _P), ("join", Join), ("tile_count", _P), ("rows", _I), ("k", _I),
        ("blocks", _I), ("top_k", _I), ("ring", _I), ("dynamic", _I), ("pairs", _I),
        ("experts", _I), ("ids_are_64", _I),
    )  # fmt: skip


class CombineParams(ctypes.Structure):
    """``CombineParams`` in combine.cu."""

    _fields_ = (
        ("y", _P), ("weights", _P), ("ids", _P), ("out", _P), ("factor", _F), ("hidden", _I),
        ("top_k", _I), ("experts", _I), ("ids_are_64", _I),
    )  # fmt: skip


class _OwnDownParams(ctypes.Structure):
    """``OwnDownParams`` in own_down.cu."""

    _fields_ = (
        ("w", _P), ("scales", _P), ("b", _P), ("header", _P), ("tile_expert", _P),
        ("columns", _P), ("b_scale", _P), ("weights", _P), ("out", _P), ("factor", _F),
        ("rows", _I), ("tokens", _I), ("top_k", _I), ("max_tiles", _I), ("ring", _I),
        ("dynamic", _I),
    )  # fmt: skip


class _SmallUpParams(ctypes.Structure):
    """``SmallUpParams`` in small_up.cu."""

    _fields_ = (
        ("w", _P), ("scales", _P), ("x", _P), ("a_scale", _P), ("q_scale", _P), ("q", _P),
        ("q_row_scale", _P), ("inner", _P), ("join", Join), ("slot_count", _P),
        ("batch", _Batch), ("rows", _I), ("k", _I), ("blocks", _I), ("ring", _I),
        ("dynamic", _I),
    )  # fmt: skip


class _SmallDownParams(ctypes.Structure):
    """``SmallDownParams`` in small_down.cu."""

    _fields_ = (
        ("w", _P), ("scales", _P), ("b", _P), ("b_scale", _P), ("weights", _P), ("out", _P),
        ("batch", _Batch), ("factor", _F), ("rows", _I), ("ring", _I), ("dynamic", _I),
    )  # fmt: skip


@dataclass(frozen=True)
class Tensors:
    """The arguments of a call that are tensors.

    Attributes:
        x: ``(M, hidden)`` bfloat16 or, with ``x_scale``, float8_e4m3fn; contiguous.
        topk_weights: ``(M, top_k)`` float32, contiguous.
        topk_ids: ``(M, top_k)`` int32 or int64, contiguous; ids outside 0 … E − 1 are skipped.
        w13: ``(E, 2N, hidden/2)`` bytes in stage order.
        w13_scale: ``(E, 2N, hidden/group)`` bfloat16 in stage order.
        w2: ``(E, hidden, N/2)`` bytes in stage order.
        w2_scale: ``(E, hidden, N/inner_group)`` bfloat16 in stage order.
        w13_input_scale: ``(1,)`` float32, or None for per-token scales.
        w2_input_scale: likewise.
        counters: what :func:`new_counters` made for this layer.
        x_scale: ``(M, hidden/128)`` float32 of any strides.
    """

    x: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    w13: torch.Tensor
    w13_scale: torch.Tensor
    w2: torch.Tensor
    w2_scale: torch.Tensor
    w13_input_scale: torch.Tensor | None
    w2_input_scale: torch.Tensor | None
    counters: torch.Tensor
    x_scale: torch.Tensor | None = None


class Workspace:
    """Parts of one allocation, each at a multiple of 256 bytes."""

    def __init__(self, device: torch.device, sizes: dict[str, int]) -> None:
        offsets, total = {}, 0
        for name, size in sizes.items():
            offsets[name] = total
            total += -(-size // 256) * 256
        self._memory = torch.empty(total, dtype=torch.uint8, device=device)
        base = self._memory.data_ptr()
        self.at = {name: base + offset for name, offset in offsets.items()}


SPAN = 128
"""Columns of a scale of E4M3 rows."""


def strides(scale: torch.Tensor) -> tuple[int, ...]:
    """Those of a tensor of scales, of which kernels count the numbers with 32 bits."""
    last = sum((n - 1) * step for n, step in zip(scale.shape, scale.stride(), strict=True))
    assert last < 1 << 31, f"scales reach over {last} numbers, the kernel counts to 2^31"
    return scale.stride()


def new_counters(device: torch.device) -> torch.Tensor:
    """Zeros in which the kernels of one layer count arrivals, ``(COUNTERS,)`` int32.

    They leave it zero. A layer has its own, made when its weights are prepared, so that layers on
    several streams do not meet; the calls of one layer must follow each other.
    """
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)


def pointer(tensor: torch.Tensor | None) -> int | None:
    """``tensor``'s address, NULL for none."""
    return None if tensor is None else tensor.data_ptr()


def counters_at(counters: torch.Tensor, up: Launch, chosen: Plan) -> int:
    """The address of a layer's counters, of which a call of this plan needs no more than it has."""
    needed = up.grid[0] * 2 + chosen.tiles
    assert needed <= counters.numel(), f"{needed} counters of {counters.numel()}"
    return counters.data_ptr()


def partial_bytes(launch: Launch) -> int:
    """Room for the sums that the CTAs of gate and up hand to each other."""
    # 2 warpgroups of a CTA, columns / 2 accumulators, 128 threads, FP32
    return launch.grid[0] * 2 * (launch.tokens // 2) * 128 * 4


def launches(
    layer: Layer,
    t: Tensors,
    out: torch.Tensor,
    factor: float,
    path: str | None = None,
    tune: Callable[[Plan], Plan] | None = None,
) -> list[tuple[Launch, ctypes.Structure]]:
    """The launches of a call with their arguments, in order. They share one workspace.

    Args:
        layer: the sizes; ``dynamic`` must agree with the input scales in ``t``.
        t: the tensors, M at least 1.
        out: ``(M, hidden)`` bfloat16, written.
        factor: ``routed_scaling_factor``.
        path: see :func:`sglang_w4afp8.kernels.hopper.plan.plan`.
        tune: changes the plan; for experiments.
    """
    device = t.x.device
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    row_scales = t.x_scale is not None
    prefill = takes_prefill(layer, t.x.shape[0], path)
    if prefill and (not row_scales or takes_row_scales(layer)):
        from sglang_w4afp8.kernels.hopper.launch_prefill import launches_prefill

        chosen = plan_prefill(layer, t.x.shape[0], sms, row_scales)
        return launches_prefill(layer, chosen, t, out, factor)
    if row_scales:
        from sglang_w4afp8.kernels.hopper.launch_rows import launches_tokens

        return launches_tokens(layer, t, out, factor, sms)
    few = plan(layer, t.x.shape[0], sms, path)
    few = tune(few) if tune else few
    return (_small if few.path == "small" else _large)(layer, few, t, out, factor)


def start(
    work: list[tuple[Launch, ctypes.Structure]], device: torch.device, first_depends: bool = False
) -> None:
    """Make the launches on the current stream.

    Args:
        work: what :func:`launches` returned.
        device: of the tensors; must be the current one.
        first_depends: let the first kernel, too, start before the one in front of it has ended.
    """
    stream = torch.cuda.current_stream(device).cuda_stream
    for number, (launch, parameters) in enumerate(work):
        dependent = number > 0 or first_depends
        function(device.index or 0, launch.kernel).launch(launch, parameters, stream, dependent)


def run(layer: Layer, t: Tensors, factor: float, path: str | None = None) -> torch.Tensor:
    """The layer's output, ``(M, hidden)`` bfloat16; arguments as for :func:`launches`.

    More tokens than a call has counters for are worked off in several.
    """
    device = t.x.device
    out = torch.empty(t.x.shape, dtype=torch.bfloat16, device=device)
    most = most_tokens(layer, torch.cuda.get_device_properties(device).multi_processor_count)
    if 0 < t.x.shape[0] <= most:
        start(launches(layer, t, out, factor, path), device, first_depends=True)
        return out
    for first in range(0, t.x.shape[0], most):
        rows = slice(first, first + most)
        part = replace(
            t,
            x=t.x[rows],
            topk_weights=t.topk_weights[rows],
            topk_ids=t.topk_ids[rows],
            x_scale=None if t.x_scale is None else t.x_scale[rows],
        )
        start(launches(layer, part, out[rows], factor, path), device, first_depends=True)
    return out


def _small(
    layer: Layer, chosen: Plan, t: Tensors, out: torch.Tensor, factor: float
) -> list[tuple[Launch, ctypes.Structure]]:
    up, down = chosen.launches
    rows = chosen.tiles * up.tokens
    space = Workspace(
        t.x.device,
        {
            "q": rows * layer.inner,
            "row_scale": rows * 4,
            "inner": rows * layer.inner * 4 if layer.dynamic else 0,
            "partial": partial_bytes(up),
        },
    )
    counts = counters_at(t.counters, up, chosen)
    at = space.at
    batch = _Batch(
        t.topk_ids.data_ptr(),
        t.x.shape[0],
        layer.top_k,
        layer.experts,
        int(t.topk_ids.dtype == torch.int64),
    )
    up_parameters = _SmallUpParams(
        t.w13.data_ptr(), t.w13_scale.data_ptr(), t.x.data_ptr(), pointer(t.w13_input_scale),
        pointer(t.w2_input_scale), at["q"], at["row_scale"], at["inner"],
        Join(at["partial"], counts, layer.up.stages_per_unit), counts + up.grid[0] * 8, batch,
        2 * layer.inner, layer.hidden, layer.up.blocks, up.ring, int(layer.dynamic),
    )  # fmt: skip
    down_parameters = _SmallDownParams(
        t.w2.data_ptr(), t.w2_scale.data_ptr(), at["q"],
        at["row_scale"] if layer.dynamic else pointer(t.w2_input_scale),
        t.topk_weights.data_ptr(), out.data_ptr(), batch, factor, layer.hidden, down.ring,
        int(layer.dynamic),
    )  # fmt: skip
    up_parameters.workspace = space  # lives as long as the launches may be made
    return [(up, up_parameters), (down, down_parameters)]


def _large(
    layer: Layer, chosen: Plan, t: Tensors, out: torch.Tensor, factor: float
) -> list[tuple[Launch, ctypes.Structure]]:
    route, up, down = chosen.launches[:3]
    tokens = t.x.shape[0]
    pairs = tokens * layer.top_k
    ids, ids_are_64 = t.topk_ids.data_ptr(), int(t.topk_ids.dtype == torch.int64)
    space = Workspace(
        t.x.device,
        {
            "header": 16,
            "tile_expert": chosen.tiles * 4,
            "columns": chosen.tiles * up.tokens * 4,
            "xq": tokens * layer.hidden,
            "x_scale": tokens * 4,
            "q": pairs * layer.inner,
            "row_scale": pairs * 4,
            "inner": pairs * layer.inner * 4 if layer.dynamic else 0,
            "y": pairs * layer.hidden * 2 if chosen.path == "large" else 0,
            "partial": partial_bytes(up),
        },
    )
    counts = counters_at(t.counters, up, chosen)
    at = space.at
    lists = (at["header"], at["tile_expert"], at["columns"])
    join = Join(at["partial"], counts, layer.up.stages_per_unit)
    dynamic = int(layer.dynamic)
    route_parameters = RouteParams(
        t.x.data_ptr(), ids, at["xq"], at["x_scale"], pointer(t.w13_input_scale), *lists, pairs,
        layer.top_k, layer.hidden, layer.experts, up.tokens, ids_are_64,
    )  # fmt: skip
    up_parameters = GemmParams(
        t.w13.data_ptr(), t.w13_scale.data_ptr(), at["xq"], ids, *lists,
        at["x_scale"] if dynamic else pointer(t.w13_input_scale), pointer(t.w2_input_scale),
        at["q"], at["row_scale"], at["inner"], None, join, counts + up.grid[0] * 8,
        2 * layer.inner, layer.hidden, layer.up.blocks, layer.top_k, up.ring, dynamic, pairs,
        layer.experts, ids_are_64,
    )  # fmt: skip
    route_parameters.workspace = space  # lives as long as the launches may be made
    work: list[tuple[Launch, ctypes.Structure]] = [(route, route_parameters), (up, up_parameters)]
    row_scale = at["row_scale"] if dynamic else pointer(t.w2_input_scale)
    if chosen.path == "medium":
        own_parameters = _OwnDownParams(
            t.w2.data_ptr(), t.w2_scale.data_ptr(), at["q"], *lists, row_scale,
            t.topk_weights.data_ptr(), out.data_ptr(), factor, layer.hidden, tokens, layer.top_k,
            chosen.tiles, down.ring, dynamic,
        )  # fmt: skip
        return [*work, (down, own_parameters)]
    down_join = Join(None, None, layer.down.stages_per_unit)
    down_parameters = GemmParams(
        t.w2.data_ptr(), t.w2_scale.data_ptr(), at["q"], ids, *lists,
        row_scale, None, None, None, None,
        at["y"], down_join, None, layer.hidden, layer.inner, layer.down.blocks, layer.top_k,
        down.ring, dynamic, pairs, layer.experts, ids_are_64,
    )  # fmt: skip
    combine_parameters = CombineParams(
        at["y"], t.topk_weights.data_ptr(), ids, out.data_ptr(), factor, layer.hidden,
        layer.top_k, layer.experts, ids_are_64,
    )  # fmt: skip
    return [*work, (down, down_parameters), (chosen.launches[3], combine_parameters)]


class _CeilingParams(ctypes.Structure):
    """``CeilingParams`` in ceiling.cu."""

    _fields_ = (("data", _P), ("chunks", _I))


def stream(data: torch.Tensor) -> None:
    """Read ``data`` (bytes, a multiple of 16 KB) into shared memory and drop it, for the bench."""
    sms = torch.cuda.get_device_properties(data.device).multi_processor_count
    kernel = Kernel("ceiling.cu", "w4a8_ceiling")
    start(
        [
            (
                Launch(kernel, (2 * sms, 1), 32, 6 * (16_384 + 8)),
                _CeilingParams(data.data_ptr(), data.numel() // 16_384),
            )
        ],
        data.device,
    )
