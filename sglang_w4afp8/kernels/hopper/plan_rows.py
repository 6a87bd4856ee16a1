"""The launches for rows that a token dispatcher sends. Integers only, no GPU.

* E4M3 tokens with scales take ``large``: ``route`` sorts and quantises nothing, gate and up read
  the rows where they are. Calls of so many tokens that BF16 would take ``prefill`` do so, too, if
  down has a long K; gate and up then scale each column once for every 128 of K.
* Slots (rows that are sorted to experts already) need three launches: ``masked`` lists the token
  tiles from the counts and quantises rows that came in BF16; gate and up; down, which writes each
  row's result to its slot.
"""

from __future__ import annotations

from functools import lru_cache

from sglang_w4afp8.kernels.hopper.plan import (
    COUNTERS,
    ROUTE,
    ROUTE_THREADS,
    TILE_TOKENS,
    UNLIMITED,
    Kernel,
    Launch,
    Layer,
    Plan,
    combine_launch,
    gemm_launches,
    takes_prefill,
    tile_tokens,
)
from sglang_w4afp8.kernels.hopper.plan_prefill import plan_prefill, takes_row_scales

MASKED = Kernel("masked.cu", "w4a8_masked")
QUANTIZE_BLOCKS = 64
"""CTAs that share the BF16 rows of an expert."""


@lru_cache  # every layer of a forward pass asks for the same
def plan_tokens(layer: Layer, tokens: int, sms: int) -> Plan:
    """For E4M3 tokens: route, gate and up, down, combine.

    Args:
        layer: the sizes.
        tokens: M, at least 1.
        sms: multiprocessors.
    """
    pairs = tokens * layer.top_k
    columns = tile_tokens(pairs / layer.experts)
    route = Launch(ROUTE, (1, 1), ROUTE_THREADS)
    launches = (route, *gemm_launches(layer, columns, sms, True), combine_launch(layer, tokens))
    return Plan("large", launches, min(pairs, layer.experts + pairs // columns))


@lru_cache  # see plan_tokens
def plan_slots(layer: Layer, slots: int, expected: int, sms: int, row_scales: bool) -> Plan:
    """For slots: masked, gate and up, down.

    Args:
        layer: the sizes; ``top_k`` is not looked at.
        slots: M of each expert, at least 1.
        expected: rows that an expert is likely to have; decides the width of tiles.
        sms: multiprocessors.
        row_scales: rows are E4M3 with scales, not BF16.
    """
    columns = tile_tokens(min(expected, slots))

    def tiles(width: int) -> int:
        return layer.experts * -(-slots // width)

    # Every expert may be full, whatever is expected.
    while columns < TILE_TOKENS[-1] and tiles(columns) > COUNTERS - 4 * sms:
        columns *= 2
    blocks = 1 if row_scales else 1 + min(QUANTIZE_BLOCKS, slots)
    masked = Launch(MASKED, (layer.experts, blocks), ROUTE_THREADS)
    return Plan("slots", (masked, *gemm_launches(layer, columns, sms, row_scales)), tiles(columns))


def row_kernels(layer: Layer, sms: int) -> tuple[Kernel, ...]:
    """Every kernel that rows of a dispatcher need, for building before a graph is captured."""
    found = dict.fromkeys((MASKED, ROUTE, combine_launch(layer, 1).kernel))
    for columns in TILE_TOKENS:
        for row_scales in (True, False):
            for launch in gemm_launches(layer, columns, sms, row_scales):
                found[launch.kernel] = None
    if takes_prefill(layer, UNLIMITED) and takes_row_scales(layer):
        found |= {launch.kernel: None for launch in plan_prefill(layer, 1, sms, True).launches}
    return tuple(found)
