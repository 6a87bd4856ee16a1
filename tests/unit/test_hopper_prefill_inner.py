"""Per-token scales between gate and up and down, without a GPU: who quantises which rows, and when.

Expressions are the kernels' own; the statements around them follow ``prefill_inner.cuh``.
"""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from kernel_source import c_constants, c_find, c_text, c_value

from sglang_w4afp8.kernels.hopper.plan import CTA_SHARED_BYTES, Layer
from sglang_w4afp8.kernels.hopper.plan_prefill import plan_prefill

UP, INNER = "prefill_up.cu", "prefill_inner.cuh"
WIDTHS = (64, 128, 192, 256, 320, 512, 704, 1408, 2048, 2112, 4096)


def up_constants(width: int) -> tuple[dict[str, Any], Any]:
    """Constants of gate and up for ``width`` columns between the projections, and its launch."""
    group = next(group for group in (128, 64) if width % group == 0)
    layer = Layer(16, 7168, width, 128, group, 8, minus_eight=False, dynamic=True)
    up = plan_prefill(layer, 1024, 132).launches[1]
    assert up.kernel.source == UP
    return c_constants(UP, dict(up.kernel.defines)), up


@pytest.mark.parametrize("width", WIDTHS)
def test_every_row_and_column_of_a_tile_is_quantised_once(width: int) -> None:
    c, _ = up_constants(width)
    assert c["kInner"] == width
    rows, vectors = c["kRowsHeld"], c["kVectors"]
    # A lane's registers, and nothing held where a single row is too much for them.
    assert rows * vectors <= c["kHeld"] and (rows > 0) == (width <= c["kHeld"] * 128)
    within = ("void quantize_tile(",)
    scope = c | {"kRows": rows, "kWarps": c_value(c_find(INNER, within, "kWarps"), c)}
    alone = (*within, "if constexpr (kRows == 0)")
    held = (*within, "for (int begin")
    for count in (1, 2, 3, 7, 8, 9, 63, 64, 65, 128, 191, 192):
        if count > c["kTokens"]:
            continue
        at = scope | {"count": count}
        done: list[int] = []
        for warp in range(scope["kWarps"]):
            if rows == 0:
                begin = c_value(c_find(INNER, alone, "c"), at | {"warp": warp})
                step = c_value(c_find(INNER, alone, "c +=").split(")")[0], at)
                done += range(begin, count, step)
                continue
            begin = c_value(c_find(INNER, within, "begin"), at | {"warp": warp})
            step = c_value(c_find(INNER, within, "begin +=").split(")")[0], at)
            for first in range(begin, count, step):
                here = c_value(c_find(INNER, held, "rows"), at | {"begin": first})
                assert 0 < here <= rows <= 32  # lanes fetch the pairs of so many
                done += range(first, first + here)
        assert sorted(done) == list(range(count))
    if rows == 0:
        return
    # What is asked for is what is stored.
    assert c_text(INNER).count("column < kInner") == 2
    columns = []
    for i in range(vectors):
        for lane in range(32):
            column = c_value(c_find(INNER, held, "column"), {"i": i, "lane": lane})
            columns += range(column, column + 4) if column < width else []
    assert sorted(columns) == list(range(width))


@pytest.mark.parametrize("width", WIDTHS)
def test_what_columns_are_has_room_beside_the_ring(width: int) -> None:
    c, up = up_constants(width)
    within = ("struct Columns",)
    scales = c_find(INNER, (*within, "float* scales()"), "return")
    offset = c_value(scales.split("at + ")[1].rstrip(")"), c)
    assert offset == c["kTokens"] * 4 and 2 * offset <= c["kGatherBytes"]
    # gather, items, and what a block is told; dynamic memory has 1024 bytes of alignment.
    assert c["kWgs"] * c["kGatherBytes"] + 1024 + up.shared_bytes <= CTA_SHARED_BYTES
    # Named barriers 1 .. kWgs are those of warpgroups; there are 16.
    barrier, threads = c_find(INNER, ("bool last_block(",), "named_sync(").split(", ")
    assert c["kWgs"] < c_value(barrier, c) < 16 and threads == "kConsumers"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("seed", range(3))
def test_who_has_the_last_block_of_a_tile_is_the_only_one_to_quantise_it(
    width: int, seed: int
) -> None:
    c, _ = up_constants(width)
    p = SimpleNamespace(weights=SimpleNamespace(rows=2 * width))
    order = ("struct Order {", "int blocks()")
    items = c_value(c_find(UP, order, "return"), c | {"p": p})
    blocks = c_value(c_find(UP, ("void finish_tile()",), "blocks"), c | {"p": p})
    # An item for each block, whole ones only, in one CTA each.
    assert items == blocks and not c["kHalved"] and c["kCluster"] == 1
    assert items * c["kRowTiles"] * 64 >= 2 * width > (items - 1) * c["kRowTiles"] * 64
    arriving = [tile for tile in range(5) for _ in range(items)]
    random.Random(seed).shuffle(arriving)
    counts, there = [0] * 5, [0] * 5
    last = c_find(INNER, ("bool last_block(",), "last").replace("atomicAdd(count, 1u)", "before")
    for tile in arriving:
        there[tile] += 1
        ends = c_value(last, {"before": counts[tile], "blocks": blocks})
        counts[tile] += 1
        assert ends == (there[tile] == items), "rows that are not there, or nobody to quantise them"
        if ends:
            counts[tile] = 0
    assert "if (last) *count = 0;" in c_text(INNER) and not any(counts)


def test_idle_warpgroups_meet_the_others() -> None:
    """All consumers are at the barriers of ``last_block``: those without a row tile, too."""
    text = c_text(UP)
    loop = text[text.index("const bool idle") : text.index("body.place.next_item();")]
    passing, finishing = loop.index("pass(p.weights.k"), loop.index("body.finish_tile();")
    assert passing < loop.index("with_columns(item.count, body);") < finishing
    # Behind both branches; only items without columns, which all warpgroups skip, are left out.
    assert loop[loop.rindex("    }\n    if constexpr (kDynamic)") :].count("else") == 0
    assert "if (uniform(body.item().count) > 0) body.finish_tile();" in loop
