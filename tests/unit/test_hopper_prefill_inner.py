"""Per-token scales between gate and up and down, without a GPU: who quantises which rows, and when.

Expressions are the kernels' own; the statements around them follow ``prefill_inner.cuh``.
"""

from __future__ import annotations

import random
import re
from types import SimpleNamespace
from typing import Any

import pytest
from kernel_source import c_constants, c_find, c_text, c_value

from sglang_w4afp8.kernels.hopper.plan import CTA_SHARED_BYTES, Layer
from sglang_w4afp8.kernels.hopper.plan_prefill import plan_prefill

UP, INNER = "prefill_up.cu", "prefill_inner.cuh"
WIDTHS = (64, 128, 192, 256, 320, 512, 704, 1408, 2048, 2112, 4096, 4160)


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
        at["each"] = c_value(c_find(INNER, within, "each"), at) if rows else 0
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
                assert here <= -(-count // scope["kWarps"]), "other warps have less to do"
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
    assert "struct __align__(8) Column {\n  int pair;\n  float scale;" in c_text(INNER)
    columns = c["kQueue"] * c["kTokens"] * 8
    gather = c["kWgs"] * c["kGatherBytes"]
    # The plan leaves room for rows of results, which only static scales gather. Dynamic memory has
    # 1024 bytes of alignment; 1024 are for the queue and what is told.
    assert columns + gather <= CTA_SHARED_BYTES - 2 * 1024 - up.shared_bytes
    # Every column that a warpgroup may compute is there; those behind the last have no pair.
    fetched = c_text(INNER)[c_text(INNER).index("void claim_and_count(") :]
    assert "for (int c = lane; c < kTokens; c += 32)" in fetched
    assert "const int pair = c < item.count ? pairs[c] : -1;" in fetched
    scale = "kRowScales ? 1.0f : pair < 0 ? 0.0f : __ldcg(p.b_scale + pair / p.top_k);"
    assert scale in fetched and "Column{pair, scale * 512.0f};" in fetched
    at = {"p": SimpleNamespace(columns=0, list_pairs=10_000)}
    at["item"] = SimpleNamespace(list=3, first=77)
    assert c_value(c_find(INNER, ("void claim_and_count(",), "pairs"), at) == 30_077
    to = "p.inner + static_cast<long long>(column.pair) * width + row_tile * 32 + f;"
    assert to in c_text(UP)
    assert "store_if(column.pair >= 0 && t < tiles," in c_text(UP)


def claiming(text: str, scope: dict[str, Any]) -> bool:
    """A condition of ``claim_and_count`` or ``count_columns``."""
    within = c_text(INNER)
    found = re.search(rf"if \(({re.escape(text)}[^{{;]*)\) (?:\{{|\w)", within)
    assert found is not None, text
    expression = found[1].replace("atomicAdd(count, here)", "before").replace("++rests", "rests")
    for name, value in (("tile.count", "tile_count"), ("next.kind", "kind")):
        expression = expression.replace(name, value)
    return bool(c_value(expression, scope))


class Cta:
    """What one CTA has claimed: items by number, what came with them, how many are released."""

    def __init__(self) -> None:
        self.items: list[tuple[str, int, int, int]] = []  # kind, tile, block, columns
        self.complete: list[int | None] = []
        self.released = self.rests = 0
        self.ended = False


def some_items(counts: list[int], blocks: int, ctas: int) -> list[tuple[str, int, int, int]]:
    """As ``Order`` has them: the last ones in halves, the second of which may have no columns."""
    whole = [("matrix", t, b, n) for t, n in enumerate(counts) for b in range(blocks)]
    rest = len(whole) % ctas
    cut = len(whole) - rest if rest * 2 <= ctas else len(whole)
    items = whole[:cut]
    for kind, tile, block, count in whole[cut:]:
        most = min((count + 31) // 32 * 16, count)
        items += [(kind, tile, block, most), (kind, tile, block, count - most)]
    return items


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("seed", range(6))
def test_rows_are_quantised_once_when_all_of_their_products_are_there(
    width: int, seed: int
) -> None:
    """CTAs claim, multiply and quantise in any order; who waits for nobody else ends."""
    c, _ = up_constants(width)
    random_ = random.Random(seed)
    p = SimpleNamespace(weights=SimpleNamespace(rows=2 * width))
    blocks = c_value(c_find(UP, ("struct Order {", "int blocks()"), "return"), c | {"p": p})
    assert blocks * c["kRowTiles"] * 64 >= 2 * width > (blocks - 1) * c["kRowTiles"] * 64
    assert c["kHalved"] and c["kQueue"] == 2
    counts = [random_.choice((1, 8, 16, 17, 100, 128)) for _ in range(random_.choice((0, 3, 9)))]
    ctas = [Cta() for _ in range(random_.choice((1, 4, 7)))]
    items = some_items(counts, blocks, len(ctas))
    kinds = {"kEnd": 0, "kMatrix": 1, "kRest": 2}
    there, counted, quantised = [0] * len(counts), [0] * len(counts), [0] * len(counts)
    taken, rest, end = 0, ("rest", -1, -1, 0), ("end", -1, -1, 0)

    within = ("Complete count_columns(",)
    texts = [c_find(INNER, within, "here"), c_find(INNER, (*within, "*count = 0"), "return")]
    texts[1] = texts[1].removeprefix("Complete{").removesuffix("}")

    def counts_in(cta: Cta, number: int) -> int | None:
        """``count_columns`` of an item that is released."""
        kind, number_of, _, count = cta.items[number]
        if count == 0:
            return None
        assert kind == "matrix"
        tile = SimpleNamespace(count=counts[number_of], first=1000 * number_of)
        item = SimpleNamespace(count=count, first=tile.first + tile.count - count, list=2)
        at = {"item": item, "tile": tile, "p": SimpleNamespace(list_pairs=10**6)}
        here = c_value(texts[0], at)
        before, counted[number_of] = counted[number_of], counted[number_of] + here
        scope = {"before": before, "here": here, "blocks": blocks, "tile_count": tile.count}
        if claiming("atomicAdd(count, here)", scope):
            return None
        counted[number_of] = 0
        assert c_value(texts[1], at) == (2 * 10**6 + tile.first, tile.count)
        return number_of

    def claim(cta: Cta) -> None:
        nonlocal taken
        number = len(cta.items)
        tile = None if number < c["kQueue"] else counts_in(cta, number - c["kQueue"])
        columns = 0 if tile is None else counts[tile]
        item = end
        if claiming("kApart && tile.count", c | {"tile_count": columns}):
            item = rest
        elif cta.rests == 0:
            item = items[taken] if taken < len(items) else item
            taken += 1
        kind = kinds["kEnd" if item == end else "kMatrix"]
        cta.rests += item == end
        if claiming("next.kind == kEnd", c | kinds | {"kind": kind, "rests": cta.rests}):
            item = rest
        cta.items.append(item)
        cta.complete.append(tile)

    def work(cta: Cta) -> None:
        kind, tile, _, count = cta.items[cta.released]
        done = cta.complete[cta.released]
        if done is not None:
            assert there[done] == blocks * counts[done], "rows that are not there"
            assert not c["kApart"] or kind != "matrix"
            quantised[done] += 1
        if kind == "matrix":
            there[tile] += count
        cta.ended = kind == "end"
        cta.released += 1

    while not all(cta.ended for cta in ctas):
        may = [
            (step, cta)
            for cta in ctas
            for step, can in (
                # A slot is free; nothing is claimed behind the end.
                (claim, len(cta.items) < cta.released + c["kQueue"] and end not in cta.items),
                (work, cta.released < len(cta.items) and not cta.ended),
            )
            if can
        ]
        assert may, "everybody waits"
        step, cta = random_.choice(may)
        step(cta)
    assert quantised == [1] * len(counts) and not any(counted)


def test_who_claims_publishes_what_comes_with_an_item_before_it() -> None:
    text = " ".join(c_text(INNER).split())
    claim = text[text.index("void claim_and_count(") :]
    free = claim.index("barrier_wait(bar + 8, ((i / kQueue) & 1) ^ 1);")
    counted = claim.index("i < kQueue ? Complete{} : count_columns(p, item, blocks);")
    assert free < counted < claim.index("complete[slot] = tile, item = next; barrier_arrive(bar);")
    # A fence between the products and their count, and between the count and who reads them.
    count = text[text.index("Complete count_columns(") : text.index("void claim_and_count(")]
    assert (
        count.index("__threadfence();")
        < count.index("atomicAdd(")
        < count.rindex("__threadfence();")
    )
    # Scales of tokens that are written beside are waited for, and not read from an old line.
    assert claim.index("ready(item);") < claim.index("__ldcg(p.b_scale + pair / p.top_k)")
    wait = "if (listed && !kRowScales) written.wait(item.first + item.count);"
    assert wait in c_text(UP)
    assert "claim_and_count(p, queue, ring, order.blocks(), describe, [&]" in c_text(UP)


def test_columns_are_waited_for_by_the_number_of_their_item() -> None:
    """A phase for each item, with columns or without."""
    within = ("const Column* wait_columns(",)
    parity = c_find(INNER, within, "barrier_wait(").split(", ")[1]
    for number in range(9):
        at = {"kQueue": 2, "number": number}
        slot = c_value(c_find(INNER, within, "slot"), at)
        assert (slot, c_value(parity, at)) == (number % 2, number // 2 % 2)
    assert c_find(INNER, within, "return") == "columns[slot]"
    assert "columns = kDynamic ? wait_columns(place.number()) : nullptr;" in c_text(UP)
    claim = c_text(INNER)[c_text(INNER).index("void claim_and_count(") :]
    filled = claim.index("columns[slot][c] = Column{pair, scale * 512.0f};")
    assert claim[filled:].split("\n")[1:5] == [
        "      }",
        "      __syncwarp();",
        "    }",  # rests, too
        "    if (kEveryLane || lane == 0) barrier_arrive(smem_address(columns_bars + slot));",
    ]


def test_all_warpgroups_quantise() -> None:
    """Before an item, the end, too, and whether they have rows of weights or not."""
    text = c_text(UP)
    loop = text[text.index("reader.wait(queue, ring);") :]
    quantising = loop.index("if constexpr (kDynamic) body.quantize_complete();")
    assert quantising < loop.index("if (kind == kEnd) break;") < loop.index("const bool idle")
    assert "kDynamic && kind == kRest ? 0 : p.weights.k / kStageK" in loop
    body = c_text(UP)[c_text(UP).index("void quantize_complete()") :]
    assert "const Complete tile = complete[place.number() % kQueue];" in body
    assert "p, p.columns + tile.first_column, tile.count," in body
    assert "[&](int c) { return row_of(tile.first_column, c); }," in body
    # Others do not see items without stages.
    ring = " ".join(c_text("prefill_ring.cuh").split())
    assert "release(ring, times); if (item.kind != kRest) return item;" in ring
