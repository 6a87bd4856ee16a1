"""Workspace and kernel arguments of the ``prefill`` path."""

from __future__ import annotations

import ctypes

import torch

from sglang_w4afp8.kernels.hopper.launch import SPAN, Tensors, Workspace, pointer, strides
from sglang_w4afp8.kernels.hopper.layout import ROW_TILE
from sglang_w4afp8.kernels.hopper.plan import MAX_EXPERTS, Launch, Layer
from sglang_w4afp8.kernels.hopper.plan_own import own_steps
from sglang_w4afp8.kernels.hopper.plan_prefill import (
    BLOCK_ROWS,
    DONE_TILES,
    OWNER_BYTES,
    PART_BYTES,
    SORTED_WARPGROUPS,
    PrefillPlan,
)

_P, _I, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_float


class _Weights(ctypes.Structure):
    """``Weights`` in prefill_produce.cuh."""

    _fields_ = (("w", _P), ("scales", _P), ("rows", _I), ("k", _I))


class _Lists(ctypes.Structure):
    """``Lists`` in prefill_sort.cuh."""

    _fields_ = (
        ("tiles", _P), ("header", _P), ("columns", _P), ("first", _P), ("count", _I),
        ("parts", _I), ("max_tiles", _I), ("together", _I), ("tile_tokens", _I),
    )  # fmt: skip


class _Own(ctypes.Structure):
    """``Own`` in prefill_sort.cuh."""

    _fields_ = (
        ("columns", _P), ("rows", _P), ("twice", _P), ("sizes", _P), ("largest", _P),
        ("counts", _P), ("weights", _P), ("w2_scale", _P), ("expert_scales", _I), ("top_k", _I),
    )  # fmt: skip


class _SpanScales(ctypes.Structure):
    """``SpanScales`` in prefill_listed.cuh."""

    _fields_ = (
        ("from", _P), ("listed", _P), ("of_token", _I), ("of_span", _I), ("rows", _I),
    )  # fmt: skip


class _Listed(ctypes.Structure):
    """``Listed`` in prefill_listed.cuh."""

    _fields_ = (
        ("x", _P), ("spans", _SpanScales), ("a_scale", _P), ("columns", _P), ("place", _P),
        ("xq", _P), ("x_scale", _P), ("claimed", _P), ("written", _P), ("hidden", _I),
        ("panel", _I), ("top_k", _I), ("early", _I),
    )  # fmt: skip


class _Sorted(ctypes.Structure):
    """``Sorted`` in prefill_sort.cuh."""

    _fields_ = (
        ("place", _P), ("owners", _P), ("parts", _P), ("total", _P), ("slots", _P),
        ("weights", _P), ("empty", _P), ("listed", _Listed), ("room", _I), ("top_k", _I),
        ("most_parts", _I),
    )  # fmt: skip


class _RouteParams(ctypes.Structure):
    """``PrefillRouteParams`` in prefill_sort.cuh."""

    _fields_ = (
        ("x", _P), ("ids", _P), ("xq", _P), ("x_scale", _P), ("a_scale", _P), ("up", _Lists),
        ("down", _Lists), ("own", _Own), ("sorted", _Sorted), ("counts", _P),
        ("arrived", _P), ("zeros", _P),
        ("tokens", _I), ("pairs", _I), ("hidden", _I), ("experts", _I), ("zero_count", _I),
        ("ids_are_64", _I), ("sorters", _I), ("part_pairs", _I),
    )  # fmt: skip


class _UpParams(ctypes.Structure):
    """``PrefillUpParams`` in prefill_up.cu."""

    _fields_ = (
        ("weights", _Weights), ("b", _P), ("tiles", _P), ("header", _P), ("columns", _P),
        ("b_scale", _P), ("q_scale", _P), ("q", _P), ("rows", _P), ("q_row_scale", _P),
        ("inner", _P),
        ("claimed", _P), ("tile_count", _P), ("arrived", _P), ("top_k", _I),
        ("lists", _I), ("list_pairs", _I), ("max_tiles", _I), ("ring", _I),
        ("q_rows", _I), ("total", _P), ("empty", _P), ("out", _P), ("room", _I), ("tokens", _I),
        ("listed", _Listed),
    )  # fmt: skip


class _DownParams(ctypes.Structure):
    """``PrefillDownParams`` in prefill_tables.cuh."""

    _fields_ = (
        ("weights", _Weights), ("b", _P), ("tiles", _P), ("header", _P), ("slots", _P),
        ("owners", _P), ("parts", _P), ("b_scale", _P), ("y", _P), ("out", _P), ("claimed", _P),
        ("summed", _P), ("done", _P), ("left", _P), ("y_bytes", ctypes.c_uint64), ("factor", _F),
        ("b_rows", _I), ("ring", _I),
    )  # fmt: skip


class _OwnDownParams(ctypes.Structure):
    """``PrefillOwnParams`` in prefill_own_jobs.cuh."""

    _fields_ = (
        ("weights", _Weights), ("b", _P), ("columns", _P), ("first", _P), ("twice", _P),
        ("sizes", _P), ("largest", _P), ("b_scale", _P), ("out", _P), ("claimed", _P),
        ("handed", _P), ("sums", _P),
        ("factor", _F), ("tokens", _I), ("top_k", _I), ("lists", _I), ("list_tokens", _I),
        ("parts", _I), ("experts", _I), ("max_steps", _I), ("b_rows", _I), ("whole", _I),
        ("shared", _I), ("shares", _I), ("job_parts", _I),
    )  # fmt: skip


def launches_prefill(
    layer: Layer, plan: PrefillPlan, t: Tensors, out: torch.Tensor, factor: float
) -> list[tuple[Launch, ctypes.Structure]]:
    """The launches of a call with their arguments; see ``launches`` of the module ``launch``.

    The plan is one for ``row_scales`` if the tensors have an ``x_scale``.
    """
    route, up, down = plan.launches
    tokens = t.x.shape[0]
    pairs, dynamic = tokens * layer.top_k, layer.dynamic
    own = plan.jobs is not None
    top_k = layer.top_k
    # Rows of q are in the order of down's lists.
    q_rows = plan.down.count * plan.down.tokens * top_k if own else pairs
    tiles = plan.up.count * plan.up.max_tiles
    blocks = -(-layer.hidden // (SORTED_WARPGROUPS * ROW_TILE))
    # Claims of two kernels, and of sums; of down: tiles that are in memory, slices that are left,
    # or parts of jobs that are handed over
    done, left = 3, 3 + (0 if own else -(-tiles // DONE_TILES) * blocks)
    finished = left + (0 if own else blocks)
    handed = finished + (tiles if dynamic else 0)
    # Units of rows of x, and the rows of each block of them
    rows = handed + (plan.jobs.places if plan.jobs else 0)
    zeros = rows + (0 if own else 1 + plan.room // BLOCK_ROWS)
    xq_bytes = max(tokens, plan.room) * layer.hidden
    # An expert's rows begin at a multiple of 4 there, and the last copy ends at one.
    span_rows = 0 if t.x_scale is None else plan.room + 4 * (layer.experts + 2)
    sum_bytes = plan.jobs.sum_bytes if plan.jobs else 0
    over_xq = sum_bytes <= xq_bytes  # nobody needs it any more
    parts = 0 if own else pairs * plan.most_parts
    space = Workspace(
        t.x.device,
        {
            "zeros": zeros * 4,
            "header": plan.up.count * 4,
            "tiles": tiles * 16,
            "columns": pairs * 4,
            "counts": plan.sorters * MAX_EXPERTS * 4,
            "place": 0 if own else pairs * 8,
            "owners": 0 if own else pairs * OWNER_BYTES,
            "parts": parts * PART_BYTES,
            "total": 8,
            "empty": 0 if own else tokens,
            "own columns": q_rows * 8 if own else 0,
            "own rows": pairs * 4 if own else 0,
            "own first": plan.down.count * (MAX_EXPERTS + 1) * 4 if own else 0,
            "own twice": plan.sorters * 4 if own else 0,
            "own sizes": pairs * 4 if own else 0,
            "own largest": layer.experts * 4 if own else 0,
            "own counts": plan.sorters * MAX_EXPERTS * 8 if own else 0,
            "xq": xq_bytes,
            "sums": 0 if over_xq else sum_bytes,
            "x_scale": tokens * 4,
            "spans": layer.hidden // SPAN * span_rows * 4,
            "q": q_rows * layer.inner,
            "row_scale": pairs * 4 if dynamic else 0,
            "inner": pairs * layer.inner * 4 if dynamic else 0,
            "y": plan.slice_bytes,
        },
    )
    at = space.at

    up_lists = _Lists(
        at["tiles"], at["header"], at["columns"], None, plan.up.count, plan.up.parts,
        plan.up.max_tiles, plan.up.together, plan.up.tile_tokens,
    )  # fmt: skip
    claimed, arrived = at["zeros"], t.counters.data_ptr()
    down_lists, for_own, for_sorted, listed = _Lists(), _Own(), _Sorted(), _Listed()
    if own:
        down_lists = _Lists(
            None, None, None, at["own first"], plan.down.count, plan.down.parts, 0,
            plan.down.together, plan.down.tile_tokens,
        )  # fmt: skip
        for_own = _Own(
            at["own columns"], at["own rows"], at["own twice"], at["own sizes"], at["own largest"],
            at["own counts"], t.topk_weights.data_ptr(), t.w2_scale.data_ptr(),
            t.w2_scale[0].numel(), top_k,
        )  # fmt: skip
    else:
        spans = _SpanScales()
        if t.x_scale is not None:
            spans = _SpanScales(t.x_scale.data_ptr(), at["spans"], *strides(t.x_scale), span_rows)
        listed = _Listed(
            t.x.data_ptr(), spans, pointer(t.w13_input_scale), at["columns"], at["place"], at["xq"],
            at["x_scale"], claimed + 4 * rows, claimed + 4 * rows + 4, layer.hidden,
            plan.panel[0], top_k, plan.early,
        )  # fmt: skip
        for_sorted = _Sorted(
            at["place"], at["owners"], at["parts"], at["total"], at["total"] + 4,
            t.topk_weights.data_ptr(), at["empty"], listed, plan.room, top_k, plan.most_parts,
        )  # fmt: skip
    route_parameters = _RouteParams(
        t.x.data_ptr(), t.topk_ids.data_ptr(), at["xq"], at["x_scale"],
        pointer(t.w13_input_scale), up_lists, down_lists, for_own, for_sorted,
        at["counts"], arrived, claimed, tokens, pairs, layer.hidden, layer.experts,
        zeros, int(t.topk_ids.dtype == torch.int64), plan.sorters,
        plan.part_pairs,
    )  # fmt: skip
    route_parameters.workspace = space  # lives as long as the launches may be made
    up_parameters = _UpParams(
        _Weights(t.w13.data_ptr(), t.w13_scale.data_ptr(), 2 * layer.inner, layer.hidden),
        at["xq"], at["tiles"], at["header"], at["columns"],
        at["x_scale"] if dynamic else pointer(t.w13_input_scale),
        pointer(t.w2_input_scale), at["q"], at["own rows"],
        at["row_scale"], at["inner"], claimed,
        claimed + 4 * finished, arrived, top_k, plan.up.count, plan.up.tokens * top_k,
        plan.up.max_tiles, up.ring, q_rows, at["total"], at["empty"], out.data_ptr(),
        plan.room, tokens, listed,
    )  # fmt: skip
    w2 = _Weights(t.w2.data_ptr(), t.w2_scale.data_ptr(), layer.hidden, layer.inner)
    q_scale = at["row_scale"] if dynamic else pointer(t.w2_input_scale)
    if plan.jobs is not None:
        chosen = dict(down.kernel.defines)
        steps = own_steps(layer, chosen["W4_MOST_TOKENS"], chosen["W4_CLUSTER"], down.tokens)
        own_parameters = _OwnDownParams(
            w2, at["q"], at["own columns"], at["own first"], at["own twice"], at["own sizes"],
            at["own largest"], q_scale, out.data_ptr(), claimed + 4, claimed + 4 * handed,
            at["xq" if over_xq else "sums"], factor, tokens, top_k,
            plan.down.count, plan.down.tokens, plan.down.parts, layer.experts, steps, q_rows,
            plan.jobs.whole, plan.jobs.shared, plan.jobs.shares, plan.jobs.parts,
        )  # fmt: skip
        return [(route, route_parameters), (up, up_parameters), (down, own_parameters)]
    down_parameters = _DownParams(
        w2, at["q"], at["tiles"], at["header"], at["total"] + 4, at["owners"], at["parts"],
        q_scale, at["y"], out.data_ptr(), claimed + 4, claimed + 8, claimed + 4 * done,
        claimed + 4 * left,
        plan.slice_bytes, factor, q_rows, down.ring,
    )  # fmt: skip
    return [(route, route_parameters), (up, up_parameters), (down, down_parameters)]
