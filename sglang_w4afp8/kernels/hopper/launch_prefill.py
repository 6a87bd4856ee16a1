"""Workspace and kernel arguments of the ``prefill`` path."""

from __future__ import annotations

import ctypes

import torch

from sglang_w4afp8.kernels.hopper.launch import Tensors, Workspace, pointer
from sglang_w4afp8.kernels.hopper.plan import MAX_EXPERTS, Launch, Layer
from sglang_w4afp8.kernels.hopper.plan_prefill import BUFFERS, PrefillPlan, own_steps

_P, _I, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_float


class _Weights(ctypes.Structure):
    """``Weights`` in prefill.cuh."""

    _fields_ = (("w", _P), ("scales", _P), ("rows", _I), ("k", _I))


class _Lists(ctypes.Structure):
    """``Lists`` in prefill_route.cu."""

    _fields_ = (
        ("tiles", _P), ("header", _P), ("columns", _P), ("first", _P), ("count", _I),
        ("parts", _I), ("max_tiles", _I), ("together", _I),
    )  # fmt: skip


class _Own(ctypes.Structure):
    """``Own`` in prefill_route.cu."""

    _fields_ = (
        ("columns", _P), ("rows", _P), ("twice", _P), ("sizes", _P), ("largest", _P),
        ("weights", _P), ("w2_scale", _P), ("expert_scales", _I), ("top_k", _I),
    )  # fmt: skip


class _RouteParams(ctypes.Structure):
    """``PrefillRouteParams`` in prefill_route.cu."""

    _fields_ = (
        ("x", _P), ("ids", _P), ("xq", _P), ("x_scale", _P), ("a_scale", _P), ("up", _Lists),
        ("down", _Lists), ("own", _Own), ("counts", _P), ("arrived", _P), ("place", _P),
        ("zeros", _P),
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
        ("q_rows", _I),
    )  # fmt: skip


class _DownParams(ctypes.Structure):
    """``PrefillDownParams`` in prefill_down.cu."""

    _fields_ = (
        ("weights", _Weights), ("b", _P), ("tiles", _P), ("header", _P), ("columns", _P),
        ("place", _P), ("b_scale", _P), ("topk_weights", _P), ("y", _P), ("out", _P),
        ("claimed", _P), ("done", _P), ("factor", _F), ("tokens", _I), ("top_k", _I),
        ("lists", _I), ("list_tokens", _I), ("max_tiles", _I), ("slices", _I),
        ("slice_blocks", _I), ("warp_tokens", _I), ("ring", _I),
    )  # fmt: skip


class _OwnDownParams(ctypes.Structure):
    """``PrefillOwnParams`` in prefill_own_jobs.cuh."""

    _fields_ = (
        ("weights", _Weights), ("b", _P), ("columns", _P), ("first", _P), ("twice", _P),
        ("sizes", _P), ("largest", _P), ("b_scale", _P), ("out", _P), ("claimed", _P),
        ("factor", _F), ("tokens", _I), ("top_k", _I), ("lists", _I), ("list_tokens", _I),
        ("parts", _I), ("experts", _I), ("max_steps", _I), ("b_rows", _I),
    )  # fmt: skip


def launches_prefill(
    layer: Layer, plan: PrefillPlan, t: Tensors, out: torch.Tensor, factor: float
) -> list[tuple[Launch, ctypes.Structure]]:
    """The launches of a call with their arguments; see ``launches`` of the module ``launch``."""
    route, up, down = plan.launches
    tokens = t.x.shape[0]
    pairs, dynamic = tokens * layer.top_k, layer.dynamic
    own = plan.slices == 0
    top_k, shared = layer.top_k, own or plan.up == plan.down
    steps = plan.slices * plan.down.count
    # Rows of q are in the order of down's lists where CTAs own outputs.
    q_rows = plan.down.count * plan.down.tokens * top_k if own else pairs
    tiles = plan.up.count * plan.up.max_tiles
    zeros = 2 + 2 * steps + (tiles if dynamic else 0)
    lists = {"up": plan.up} | ({} if shared else {"down": plan.down})
    space = Workspace(
        t.x.device,
        {
            "zeros": zeros * 4,
            **{f"{name} header": part.count * 4 for name, part in lists.items()},
            **{f"{name} tiles": part.count * part.max_tiles * 16 for name, part in lists.items()},
            **{f"{name} columns": pairs * 4 for name in lists},
            "counts": plan.sorters * MAX_EXPERTS * 4,
            "place": 0 if own else pairs * 4,
            "own columns": q_rows * 8 if own else 0,
            "own rows": pairs * 4 if own else 0,
            "own first": plan.down.count * (MAX_EXPERTS + 1) * 4 if own else 0,
            "own twice": plan.sorters * 4 if own else 0,
            "own sizes": pairs * 4 if own else 0,
            "own largest": layer.experts * 4 if own else 0,
            "xq": tokens * layer.hidden,
            "x_scale": tokens * 4,
            "q": q_rows * layer.inner,
            "row_scale": pairs * 4 if dynamic else 0,
            "inner": pairs * layer.inner * 4 if dynamic else 0,
            "y": BUFFERS * plan.slice_blocks * plan.down.tokens * top_k * 512,
        },
    )
    at = space.at

    def addresses(name: str) -> tuple[int, int, int]:
        return at[f"{name} tiles"], at[f"{name} header"], at[f"{name} columns"]

    def described(name: str) -> _Lists:
        part = lists[name]
        return _Lists(*addresses(name), None, part.count, part.parts, part.max_tiles, part.together)

    claimed, arrived = at["zeros"], t.counters.data_ptr()
    down_lists, for_own = _Lists() if shared else described("down"), _Own()
    if own:
        down_lists = _Lists(None, None, None, at["own first"], plan.down.count, plan.down.parts, 0)
        for_own = _Own(
            at["own columns"], at["own rows"], at["own twice"], at["own sizes"], at["own largest"],
            t.topk_weights.data_ptr(), t.w2_scale.data_ptr(), t.w2_scale[0].numel(), top_k,
        )  # fmt: skip
    route_parameters = _RouteParams(
        t.x.data_ptr(), t.topk_ids.data_ptr(), at["xq"], at["x_scale"],
        pointer(t.w13_input_scale), described("up"), down_lists, for_own,
        at["counts"], arrived, at["place"], claimed, tokens, pairs, layer.hidden, layer.experts,
        zeros, int(t.topk_ids.dtype == torch.int64), plan.sorters,
        plan.part_pairs,
    )  # fmt: skip
    route_parameters.workspace = space  # lives as long as the launches may be made
    up_parameters = _UpParams(
        _Weights(t.w13.data_ptr(), t.w13_scale.data_ptr(), 2 * layer.inner, layer.hidden),
        at["xq"], *addresses("up"), at["x_scale"] if dynamic else pointer(t.w13_input_scale),
        pointer(t.w2_input_scale), at["q"], at["own rows" if own else "up columns"],
        at["row_scale"], at["inner"], claimed,
        claimed + 4 * (2 + 2 * steps), arrived, top_k, plan.up.count, plan.up.tokens * top_k,
        plan.up.max_tiles, up.ring, q_rows,
    )  # fmt: skip
    w2 = _Weights(t.w2.data_ptr(), t.w2_scale.data_ptr(), layer.hidden, layer.inner)
    q_scale = at["row_scale"] if dynamic else pointer(t.w2_input_scale)
    if own:
        chosen = dict(down.kernel.defines)
        steps = own_steps(layer, chosen["W4_MOST_TOKENS"], chosen["W4_CLUSTER"], down.tokens)
        own_parameters = _OwnDownParams(
            w2, at["q"], at["own columns"], at["own first"], at["own twice"], at["own sizes"],
            at["own largest"], q_scale, out.data_ptr(), claimed + 4, factor, tokens, top_k,
            plan.down.count, plan.down.tokens, plan.down.parts, layer.experts, steps, q_rows,
        )  # fmt: skip
        return [(route, route_parameters), (up, up_parameters), (down, own_parameters)]
    down_parameters = _DownParams(
        w2, at["q"], *addresses("up" if shared else "down"), at["place"], q_scale,
        t.topk_weights.data_ptr(),
        at["y"], out.data_ptr(), claimed + 4, claimed + 8, factor, tokens, top_k,
        plan.down.count, plan.down.tokens, plan.down.max_tiles, plan.slices, plan.slice_blocks,
        plan.warp_tokens, down.ring,
    )  # fmt: skip
    return [(route, route_parameters), (up, up_parameters), (down, down_parameters)]
