"""The prefill path without a GPU: the order of its items, and the slices of down's outputs.

Constants and most index expressions are the kernels' own (``tests/helpers/kernel_source.py``); the
statements around them follow ``prefill_ring.cuh``, ``prefill_up.cu``, ``prefill_down.cu`` and
``prefill_tables.cuh``.
"""

from __future__ import annotations

import re
from itertools import pairwise, product, takewhile
from types import SimpleNamespace
from typing import Any

import pytest
from kernel_source import c_constants, c_find, c_locals, c_text, c_value

from sglang_w4afp8.kernels.hopper.build import CSRC

UP, RING = "prefill_up.cu", "prefill_ring.cuh"
TABLES, DOWN = "prefill_tables.cuh", "prefill_down.cu"
Item = dict[str, int]


def fields(source: str, within: str, names: str, scope: dict[str, object]) -> Item:
    return {
        name: c_value(c_find(source, tuple(within.split(" > ")), f"item.{name}"), scope)
        for name in names.split()
    }


def some_tiles(header: list[int], max_tiles: int) -> list[SimpleNamespace]:
    tiles = [SimpleNamespace(expert=-1, first=-1, count=-1)] * (len(header) * max_tiles)
    for number, count in enumerate(header):
        for i in range(count):
            tile = SimpleNamespace(expert=i // 2, first=i * 100, count=100)
            tiles[number * max_tiles + i] = tile
    return tiles


def down_constants() -> dict[str, Any]:
    defines = {"W4_K": 256, "W4_TILES": 1, "W4_GROUP": 128, "W4_PER_WG": 1, "W4_SORTED": 1}
    return c_constants(TABLES, defines | {"W4_MINUS_EIGHT": 0, "W4_DYNAMIC": 0, "W4_PARTS": 8})


class Slices:
    """``Slices`` of prefill_tables.cuh, from its source."""

    def __init__(self, p: SimpleNamespace) -> None:
        within = "static Slices of"
        scope = {**down_constants(), "p": p, "_p_slots": p.slots[0], "_p_header": p.header[0]}
        texts = {name: c_find(TABLES, (within,), name) for name in ("blocks", "slots")}
        texts["block_bytes"] = c_find(TABLES, (within,), "block_bytes")
        for name, text in texts.items():
            scope[name] = c_value(text.replace("*p.", "_p_"), scope)
        scope["most"] = c_value(c_find(TABLES, (within,), "most"), scope)
        condition = re.search(r"if \((.*)\) most = ", (CSRC / TABLES).read_text())
        assert condition is not None
        if c_value(condition[1], scope):
            scope["most"] = c_value(c_find(TABLES, (within, "p.y_bytes) "), "most"), scope)
        scope = c_locals(TABLES, within, "slices", scope)
        text = c_find(TABLES, (within, "int slices"), "return").removeprefix("Slices{")
        values = c_value(text.removesuffix("}").replace("*p.", "_p_"), scope)
        self.blocks, self.tiles, self.slots, self.per_slice = values
        self.scope = {**scope, **vars(self)}

    def count(self) -> int:
        return int(c_value(c_find(TABLES, ("int count() const",), "return"), self.scope))

    def blocks_of(self, slice: int) -> int:
        scope = self.scope | {"slice": slice}
        return int(c_value(c_find(TABLES, ("int blocks_of(",), "return"), scope))

    def buffer(self, slice: int, block: int) -> int:
        scope = self.scope | {"slice": slice, "block": block, "y": 0}
        scope = c_locals(TABLES, "u8* buffer(", "at", scope)
        return int(c_value(c_find(TABLES, ("u8* buffer(",), "return"), scope))


def down_item(p: SimpleNamespace, slices: Slices, number: int) -> Item | None:
    """``Order::item`` of prefill_tables.cuh."""
    scope = slices.scope | {"slices": slices, "p": p, "number": number, "kMatrix": 1}
    s = c_locals(TABLES, "struct Order", "whole slice at", scope)
    if s["whole"] == 0 or s["slice"] >= slices.count():
        return None
    s = c_locals(TABLES, "struct Order", "blocks i", s)
    if s["i"] >= slices.tiles:
        return None
    s = c_locals(TABLES, "struct Order", "tile", s)
    return fields(TABLES, "struct Order", "kind expert first count slice step block", s)


BLOCK = 2 * 128  # bytes of a contribution to a block


@pytest.mark.parametrize(
    ("tiles", "rows", "slots", "y_bytes"),
    [
        (5, 704, 10, 60 * BLOCK),  # all blocks at once
        (7, 7168, 300, 300 * 20 * BLOCK),  # slices of different sizes
        (7, 7168, 300, 300 * 56 * BLOCK),  # as many blocks as fit
        (7, 7168, 300, 300 * 56 * BLOCK - 1),
        (3, 7168, 1000, 2000 * BLOCK),  # a block at a time
        (1, 64, 1, 2 * BLOCK),
        (4, 192, 0, 2 * BLOCK),  # no token has several rows
        (4, 1280, 70, 70 * 10 * BLOCK - 1),
        (0, 7168, 0, 1000 * BLOCK),  # no rows
    ],
)
def test_down_claims_every_block_of_every_tile_once(
    tiles: int, rows: int, slots: int, y_bytes: int
) -> None:
    weights, header = SimpleNamespace(rows=rows), [tiles]
    p = SimpleNamespace(header=header, slots=[slots], weights=weights, y_bytes=y_bytes)
    p.tiles = some_tiles(header, 9)
    slices = Slices(p)
    blocks = -(-rows // 128)
    assert (slices.blocks, slices.tiles, slices.slots) == (blocks, tiles, slots)
    # Slices cover all blocks; two of them, or all where there is one, have room in y.
    runs = [slices.blocks_of(slice) for slice in range(slices.count())]
    assert sum(runs) == blocks and min(runs) > 0 and {*runs[:-1]} <= {slices.per_slice}
    block_bytes = slots * BLOCK
    assert block_bytes * slices.per_slice * min(2, len(runs)) <= y_bytes
    assert len(runs) == 1 or block_bytes * blocks > y_bytes, "slices that are not needed"
    fewest = -(-blocks // max(1, y_bytes // (2 * max(1, block_bytes))))
    assert len(runs) == 1 or len(runs) <= fewest
    # All of a slice before the next, tiles in order inside slices, blocks in order inside tiles.
    wanted = [
        (slice, tile, slice * slices.per_slice + block)
        for slice, tile in product(range(len(runs)), range(tiles))
        for block in range(runs[slice])
    ]
    items = []
    for number in range(len(wanted) + 3 * blocks * max(1, tiles)):
        item = down_item(p, slices, number)
        assert (item is None) == (number >= len(wanted)), number
        if item is not None:
            items.append(item)
    assert [(item["slice"], item["step"], item["block"]) for item in items] == wanted
    for item in items:
        tile = p.tiles[item["step"]]
        assert item["kind"] == 1 and (item["expert"], item["first"], item["count"]) == (
            tile.expert, tile.first, tile.count,
        )  # fmt: skip
    # What is written at a time does not overlap: this slice and the one before.
    for slice in range(len(runs)):
        some = [s for s in (slice - 1, slice) if s >= 0]
        buffers = sorted(
            slices.buffer(s, s * slices.per_slice + block) for s in some for block in range(runs[s])
        )
        assert all(b - a >= slots * BLOCK for a, b in pairwise(buffers)) and buffers[0] >= 0
        assert slots == 0 or buffers[-1] + slots * BLOCK <= y_bytes


@pytest.mark.parametrize(("tiles", "rows"), [(4, 7168), (3, 704), (5, 64 * 19), (2, 64 * 20)])
def test_a_slice_is_left_by_as_many_as_the_next_but_one_waits_for(tiles: int, rows: int) -> None:
    """Items with smaller numbers only (``wait_slice``)."""
    weights = SimpleNamespace(rows=rows)
    p = SimpleNamespace(header=[tiles], slots=[100], weights=weights, y_bytes=100 * 2 * BLOCK)
    p.tiles = some_tiles(p.header, 9)
    slices = Slices(p)
    assert slices.per_slice == 1
    for per_slice in range(1, slices.blocks):
        slices.per_slice = slices.scope["per_slice"] = per_slice
        left: dict[int, int] = {}
        for number in range(tiles * slices.blocks):
            item = down_item(p, slices, number)
            assert item is not None
            scope = slices.scope | {"slices": slices, "p": p, "slice": item["slice"]}
            if item["slice"] >= 2:
                target = c_value(c_find(TABLES, ("void wait_slice(",), "target"), scope)
                assert left[item["slice"] - 2] == target
            scope |= {"block": item["block"]}
            mine = c_value(c_find(TABLES, ("int row_tiles_of(",), "return"), scope)
            assert mine == sum(item["block"] * 128 + wg * 64 < rows for wg in range(2))
            left[item["slice"]] = left.get(item["slice"], 0) + 1
        assert sum(left.values()) == tiles * slices.blocks


@pytest.mark.parametrize(("tiles", "blocks"), [(1, 1), (32, 2), (33, 1), (70, 3), (1100, 1)])
def test_sums_wait_for_their_tile_and_all_before_it_and_no_other(tiles: int, blocks: int) -> None:
    """``publish`` and ``wait_tiles``: a bit for each tile of a block, words for lanes in turn."""
    body, waiting = (" ".join((CSRC / file).read_text().split()) for file in (TABLES, DOWN))
    assert "for (int w = threadIdx.x & 31; w < words; w += 32) {" in waiting
    assert "all = all && (seen & wanted) == wanted;" in waiting
    assert "while (!__all_sync(0xffffffffu, all));" in waiting
    (at_bit,) = re.findall(r'\[%0\], %1;" ::"l"\((done [^)]*)\), "r"\((1u << .*?)\) :', body)
    words = -(-tiles // 32)
    set_by: dict[tuple[int, int], tuple[int, int]] = {}  # words of `done` and their bits
    waits: dict[tuple[int, int], set[tuple[int, int]]] = {}
    for step, block in product(range(tiles), range(blocks)):
        item = SimpleNamespace(step=step, block=block)
        scope = {"item": {0: item}.__getitem__, "n": 0, "p": SimpleNamespace(done=0)}
        scope |= {"slices": SimpleNamespace(tiles=tiles)}
        place = c_locals(TABLES, "void publish(", "step done", scope)
        word, bit = (c_value(text, place) for text in at_bit)
        assert bit.bit_count() == 1
        at = word, bit.bit_length() - 1
        assert at not in set_by and 0 <= at[0] < blocks * words and at[1] < 32
        set_by[at] = step, block
        waits[step, block] = set()
        scope |= {"item": item}
        scope = c_locals(DOWN, "void wait_tiles(", "tiles words done", scope)
        for w in range(scope["words"]):
            wanted = c_value(c_find(DOWN, ("void wait_tiles(",), "wanted"), scope | {"w": w})
            places = {(scope["done"] + w, i) for i in range(32) if wanted >> i & 1}
            assert wanted < 1 << 32
            waits[step, block] |= places
    for (step, block), places in waits.items():
        assert {set_by[at] for at in places} == {(tile, block) for tile in range(step + 1)}


def up_items(
    p: SimpleNamespace, row_tiles: int, cluster: int, block: int, grid: int = 1, halved: int = 0
) -> list[Item]:
    """``Order`` of prefill_up.cu in the CTA ``block``: items by their numbers."""
    order = "struct Order"
    fixed = {"p": p, "kRowTiles": row_tiles, "kMatrix": 1, "kCluster": cluster, "kHalved": halved}
    fixed |= {"blockIdx": SimpleNamespace(x=block), "gridDim": SimpleNamespace(x=grid)}
    blocks = c_value(c_find(UP, (order, "int blocks()"), "return"), fixed)
    fixed["blocks"] = lambda: blocks
    text = c_find(UP, (order, "int items("), "return")
    here = [c_value(text, fixed | {"list": i}) for i in range(len(p.header))]
    s = c_locals(UP, f"{order} > static Order of(", "ctas rest", fixed | {"all": sum(here)})
    cut = c_value(c_find(UP, (order, "static Order of("), "order.cut"), s)
    items = list[Item]()
    while True:
        scope = fixed | {"number": len(items), "cut": cut}
        scope = c_locals(UP, f"{order} > Item item(int number)", "past skipped", scope)
        number, at_list, begin = scope["number"] - scope["skipped"], 0, 0
        while at_list < len(here) and number - begin >= here[at_list]:
            begin, at_list = begin + here[at_list], at_list + 1
        if at_list == len(here):
            return items
        s = c_locals(
            UP, "if (at < here)", "i tile", scope | {"list": at_list, "at": number - begin}
        )
        item = fields(UP, "if (at < here)", "expert first count tile block list", s)
        if s["past"] >= 0:
            s = c_locals(UP, "if (past >= 0)", "most before", s)
            item |= fields(UP, "if (past >= 0)", "first count", s)
        items.append(item)


@pytest.mark.parametrize(("rows", "per_wg"), [(512, 2), (64, 1), (384, 1), (1408, 2)])
def test_up_claims_every_block_of_every_tile_once(rows: int, per_wg: int) -> None:
    header = [4, 0, 7]
    weights = SimpleNamespace(rows=rows)
    p = SimpleNamespace(header=header, weights=weights, max_tiles=8, tiles=some_tiles(header, 8))
    items = up_items(p, 2 * per_wg, 1, 5)
    found = [(i["tile"], i["block"]) for i in items]
    blocks = -(-rows // (128 * per_wg))
    wanted = [(n * 8 + i, b) for n, k in enumerate(header) for i in range(k) for b in range(blocks)]
    assert found == wanted
    assert all(i["first"] == i["tile"] % 8 * 100 and i["tile"] // 8 == i["list"] for i in items)


@pytest.mark.parametrize("grid", [1, 5, 20, 25, 41, 44, 60])
def test_the_last_round_is_halves_of_items_if_there_are_ctas_for_them(grid: int) -> None:
    header, rows = [4, 0, 7], 1024
    tiles = some_tiles(header, 8)
    for i, count in enumerate((1, 16, 17, 100, 128)):
        tiles[2 * 8 + i] = SimpleNamespace(expert=i // 2, first=i * 200, count=count)
    p = SimpleNamespace(header=header, weights=SimpleNamespace(rows=rows), max_tiles=8, tiles=tiles)
    whole = up_items(p, 4, 1, 0, grid)
    items = up_items(p, 4, 1, 0, grid, 1)
    rest = len(whole) % grid
    cut = len(whole) - (rest if 2 * rest <= grid else 0)
    assert items[:cut] == whole[:cut] and len(items) == 2 * len(whole) - cut
    for number, item in enumerate(whole[cut:]):
        first, second = items[cut + 2 * number : cut + 2 * number + 2]
        parts = ("expert", "tile", "block", "list")
        assert all(item[name] == first[name] == second[name] for name in parts)
        assert first["first"] == item["first"] and first["count"] > 0
        assert second["first"] == first["first"] + first["count"]
        assert first["count"] + second["count"] == item["count"]
        assert 0 <= second["count"] <= first["count"] <= max(16, second["count"] + 31)


def dealt(items: int, grid: int, block: int) -> list[int]:
    """``claim`` of a CTA of a cluster of two: the numbers of its items."""
    scope = {"kCluster": 2, "blockIdx": SimpleNamespace(x=block)}
    scope["gridDim"] = SimpleNamespace(x=grid)
    text = c_find(RING, ("u32 claim_number(",), "return")
    numbers = (c_value(text, scope | {"i": i}) for i in range(items + 1))
    return list(takewhile(lambda number: number < items, numbers))


def test_an_item_is_claimed_when_it_has_a_slot() -> None:
    """``claim``: earlier, the items of CTAs that run beside each other would lie apart."""
    text = " ".join(c_text(RING).split())
    text = text[text.index("void claim(") : text.index("struct Reader")]
    slot = text.index("barrier_wait(bar + 8, ((i / kQueue) & 1) ^ 1);")
    claimed = text.index("const Item item = describe(claim_number(counter, i));")
    assert slot < claimed < text.index("queue.item[i % kQueue] = item; barrier_arrive(bar);")
    # The one that is worked on, and the next. Gate and up and down have the same ring.
    assert down_constants()["kQueue"] == 2


@pytest.mark.parametrize(("rows", "grid"), [(512, 4), (256, 132), (1024, 6)])
def test_ctas_of_a_cluster_have_items_of_the_same_weights(rows: int, grid: int) -> None:
    header = [4, 0, 6, 2]
    weights = SimpleNamespace(rows=rows)
    p = SimpleNamespace(header=header, weights=weights, max_tiles=6, tiles=some_tiles(header, 6))
    found = []
    for first in range(0, grid, 2):
        beside = []
        for block in (first, first + 1):
            items = up_items(p, 4, 2, block)
            beside.append([items[number] for number in dealt(len(items), grid, block)])
        assert len(beside[0]) == len(beside[1]), "they end together"
        for one, other in zip(*beside, strict=True):
            same = ("expert", "block", "list")
            assert [one[name] for name in same] == [other[name] for name in same]
            assert (one["tile"] % 2, other["tile"]) == (0, one["tile"] + 1)
        found += [(item["tile"], item["block"]) for item in beside[0] + beside[1]]
    wanted = [
        (n * 6 + i, b) for n, k in enumerate(header) for i in range(k) for b in range(rows // 256)
    ]
    assert sorted(found) == wanted


@pytest.mark.parametrize(("grid", "tokens", "units"), [(132, 5000, 7), (78, 40, 0), (3, 1000, 2)])
def test_up_looks_at_every_token_once_for_zeros(grid: int, tokens: int, units: int) -> None:
    """``write_beside``: some with every unit, the rest after the last; all columns of each.

    Or all at once, where tokens are gathered.
    """
    body = (CSRC / UP).read_text()
    body = body[body.index("int zero_tokens(") : body.index("struct UpBody")]
    assert "i < count && token < p.tokens; ++i, token += step)" in body
    within = "void write_beside("
    assert "[&] { token = zero_tokens(p, token, step, 8); });" in body
    fixed = {"p": SimpleNamespace(tokens=tokens), "gridDim": SimpleNamespace(x=grid)}
    rest = c_value(c_find(UP, (within, "});\n"), "zero_tokens("), fixed | {"token": 0, "step": 0})
    alone = c_find(UP, ("if (kSorted && warp == 3)",), "zero_tokens(")
    seen, gathering = [], []
    for block in range(grid):
        scope: dict[str, Any] = fixed | {"blockIdx": SimpleNamespace(x=block)}
        _, token, step, count = c_value(alone, scope)
        gathering += list(range(token, tokens, step))[:count]
        for part in range(2):
            at = c_locals(UP, within, "step token", scope | {"part": part})
            token = at["token"]
            for count in [8] * units + [rest[3]]:
                for _ in range(count):
                    if token < tokens:
                        seen.append(token)
                        token += at["step"]
    assert sorted(seen) == sorted(gathering) == list(range(tokens))
    loop = re.search(r"for \(int k = (.*?); k < p\.weights\.k; k \+= (\d+)\)", body)
    assert loop is not None
    first, more = loop.groups()
    lanes = [c_value(first, {"threadIdx": SimpleNamespace(x=96 + lane)}) for lane in range(32)]
    assert lanes == list(range(0, int(more), 8)), "16 bytes each"
