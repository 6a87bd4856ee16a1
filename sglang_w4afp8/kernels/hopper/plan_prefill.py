"""The launches of the ``prefill`` path: hundreds of tokens and more. Integers only, no GPU.

``route`` sorts the (token, k) pairs by expert and quantises x; ``up`` and ``down`` are persistent
kernels, one CTA per SM, that claim tiles of at most 128 tokens by 256 weight rows. What the experts
contribute to a token goes from ``down``'s tiles to its sums through a ring of buffers that fits in
L2, so that it never becomes a tensor of ``M · top_k · hidden`` values.
"""

from __future__ import annotations

from dataclasses import dataclass

from sglang_w4afp8.kernels.hopper.layout import ROW_TILE
from sglang_w4afp8.kernels.hopper.plan import (
    BARRIER_BYTES,
    CTA_SHARED_BYTES,
    Kernel,
    Launch,
    Layer,
)

TILE_TOKENS = 128
THREADS = 384
ROUTE_THREADS = 512
ROUTE_ROWS = 4
"""Rows of x that a CTA of route quantises."""
QUEUE = 4
"""Items that a CTA claims ahead."""
STAGE_BARRIER_BYTES = 32
ALIGNMENT = 1024
"""Of a stage: the swizzle of its tokens repeats after so many bytes."""
BUFFERS = 3
"""Slices of contributions in memory at a time."""
SLICE_PAIRS = 32_768
"""Pairs times blocks of 256 outputs of a slice: 16 MB of BF16."""
MAX_SLICE_BLOCKS = 8
MAX_RING = 8


@dataclass(frozen=True)
class PrefillPlan:
    """The launches of a call and the sizes that its kernels are told.

    Attributes:
        launches: route, up, down.
        max_tiles: room for tiles in a list.
        lists: runs of tokens that are sorted by expert on their own.
        list_tokens: tokens of a list; the last may have fewer.
        slices: parts of the outputs.
        slice_blocks: blocks of 256 outputs of a slice; the last may have fewer.
    """

    launches: tuple[Launch, Launch, Launch]
    max_tiles: int
    lists: int
    list_tokens: int
    slices: int
    slice_blocks: int


def _matrix(layer: Layer, sms: int, up: bool) -> Launch:
    shape, group = (layer.up, layer.group) if up else (layer.down, layer.inner_group)
    row_tiles = shape.rows // ROW_TILE
    # Two row tiles a warpgroup, unless a quarter or more of the last block would be empty.
    per_wg = 2 if not up or row_tiles % 4 == 0 or row_tiles > 12 else 1
    k = shape.stage_k
    weights = 2 * per_wg * (k * 32 + k // group * 128)
    stage = -(-(weights + TILE_TOKENS * k) // ALIGNMENT) * ALIGNMENT + STAGE_BARRIER_BYTES
    static = (2 * TILE_TOKENS * (per_wg * 32 + 16) if up else 0) + 1024 + ALIGNMENT
    ring = min(MAX_RING, (CTA_SHARED_BYTES - static - QUEUE * BARRIER_BYTES) // stage)
    kernel = Kernel(
        "prefill_up.cu" if up else "prefill_down.cu",
        "w4a8_prefill_up" if up else "w4a8_prefill_down",
        (
            ("W4_K", shape.stage_k),
            ("W4_TILES", shape.tiles),
            ("W4_GROUP", group),
            ("W4_MINUS_EIGHT", int(layer.minus_eight)),
            ("W4_PER_WG", per_wg),
            ("W4_DYNAMIC", int(layer.dynamic)),
        ),
    )
    shared = ALIGNMENT + ring * stage + QUEUE * BARRIER_BYTES
    return Launch(kernel, (sms, 1), THREADS, shared, ring, TILE_TOKENS)


def plan_prefill(layer: Layer, tokens: int, sms: int, local_share: float = 1.0) -> PrefillPlan:
    """The launches for ``tokens`` tokens on a card with ``sms`` SMs.

    Args:
        layer: the sizes.
        tokens: M, at least 1.
        sms: multiprocessors.
        local_share: part of the pairs that is expected to name an expert of this rank.
    """
    list_tokens = max(16, int(SLICE_PAIRS / local_share) // layer.top_k // 16 * 16)
    lists = -(-tokens // list_tokens)
    list_tokens = min(list_tokens, tokens)
    expected = max(1, int(list_tokens * layer.top_k * local_share))
    blocks = -(-layer.hidden // 256)
    slice_blocks = max(1, min(MAX_SLICE_BLOCKS, blocks, SLICE_PAIRS // expected))
    list_pairs = list_tokens * layer.top_k
    route = Launch(
        Kernel("prefill_route.cu", "w4a8_prefill_route"),
        (lists + -(-tokens // ROUTE_ROWS), 1),
        ROUTE_THREADS,
    )
    return PrefillPlan(
        launches=(route, _matrix(layer, sms, True), _matrix(layer, sms, False)),
        max_tiles=min(list_pairs, layer.experts + list_pairs // TILE_TOKENS),
        lists=lists,
        list_tokens=list_tokens,
        slices=-(-blocks // slice_blocks),
        slice_blocks=slice_blocks,
    )
