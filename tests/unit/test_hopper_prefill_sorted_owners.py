"""What down is told of its rows, and where their results go, without a GPU.

Expressions are the kernels' own; the statements around them follow ``prefill_route.cu``,
``prefill_down.cu`` and ``prefill_tables.cuh``.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from itertools import pairwise, product
from types import SimpleNamespace
from typing import Any

import pytest
from hopper_sorted import (
    DOWN,
    ROUTE,
    TABLES,
    WGS,
    Adder,
    Slices,
    banks,
    constants,
    list_tiles,
    stored,
)
from kernel_source import c_find, c_locals, c_text, c_value

from sglang_w4afp8.kernels.hopper.layout import _row_order
from sglang_w4afp8.kernels.hopper.plan import Layer
from sglang_w4afp8.kernels.hopper.plan_prefill import BLOCK_BYTES, plan_prefill

WITHIN, EMPTY = "void describe_owners", "p.sorted.empty[token]"


# ---- owners --------------------------------------------------------------------------------------
class Owners:
    """``describe_owners`` for all tokens.

    Args:
        rows: of pairs in the list (-1: another rank's), ``top_k`` for each token.
        most_parts: room of a token.
        order: of the warps' atomics.
    """

    def __init__(self, rows: list[list[int]], most_parts: int, order: random.Random) -> None:
        self.owners: dict[int, tuple[int, Any, Any, int]] = {}
        self.parts: dict[int, tuple[int, Any]] = {}
        self.empty: dict[int, bool] = {}
        self.rows, self.slots, self.most_parts = rows, 0, most_parts
        self.top_k, self.width = len(rows[0]), 1
        for line in (
            "while (width < p.sorted.top_k) width <<= 1;",
            "for (int d = width >> 1; d; d >>= 1) last = max(last, __shfl_xor_sync(",
            "slot = atomicAdd(p.sorted.slots, __popc(several));",
        ):
            assert line in c_text(ROUTE)
        while self.width < self.top_k:
            self.width <<= 1
        together = c_locals(ROUTE, "void serve_list", "together", {"width": self.width})["together"]
        firsts = range(0, len(rows), together)
        for first in order.sample(firsts, len(firsts)):
            self.warp(first)

    def warp(self, first: int) -> None:
        """One warp; lanes from ``top_k`` on have no pair, nor have those of tokens past the end."""
        pairs = range(len(self.rows) * self.top_k)
        weights = {pair: ("weight", *divmod(pair, self.top_k)) for pair in pairs}
        p = SimpleNamespace(sorted=SimpleNamespace(top_k=self.top_k, weights=weights, place=None))
        p.sorted.most_parts, p.tokens = self.most_parts, len(self.rows)
        fixed: dict[str, Any] = {"p": p, "first": first, "width": self.width}
        fixed |= {"__popc": int.bit_count, "__float_as_uint": lambda value: value}
        lanes = []
        for lane in range(32):
            at = fixed | {"threadIdx": SimpleNamespace(x=lane + 64)}
            at = c_locals(ROUTE, WITHIN, "lane k begin token pair here", at)
            at["load_place"] = self.place
            lanes.append(c_locals(ROUTE, WITHIN, "row", at))
        mine = [at["row"] for at in lanes]
        ballot = sum(1 << lane for lane, row in enumerate(mine) if row >= 0)
        for lane, at in enumerate(lanes):
            at["__ballot_sync"] = lambda mask, value: ballot
            at |= c_locals(ROUTE, WITHIN, "ours count", at)
            # Halves of a token's lanes, and halves of those, exchange what is largest.
            group = range(lane - lane % self.width, lane - lane % self.width + self.width)
            at["last"] = max(mine[other] for other in group)
            if at["here"] and at["k"] == 0:
                self.put(self.empty, at["token"], c_value(c_find(ROUTE, (WITHIN,), EMPTY), at))
        several = sum(1 << i for i, at in enumerate(lanes) if at["row"] >= 0 and at["count"] > 1)
        begin, self.slots = self.slots, self.slots + several.bit_count()
        for at in (at for at in lanes if at["row"] >= 0):
            at |= {
                "several": several,
                "slot": begin,
                "__shfl_sync": lambda mask, value, lane: value,
            }
            at |= c_locals(ROUTE, f"{WITHIN} > atomicAdd(", "slot weight", at)
            if at["count"] == 1:
                self.put(self.owners, at["row"], self.made("count == 1", "owners[row]", at))
                continue
            at |= c_locals(ROUTE, f"{WITHIN} > count == 1", "before parts to", at)
            self.put(self.owners, at["row"], self.made("u32 parts", "owners[row]", at))
            self.put(self.parts, at["to"], self.made("u64 to", "parts[to]", at))

    def place(self, places: None, pair: int) -> SimpleNamespace:
        token, k = divmod(pair, self.top_k)
        return SimpleNamespace(row=self.rows[token][k])

    @staticmethod
    def made(after: str, name: str, scope: dict[str, Any]) -> Any:
        """A struct that is written."""
        text = c_find(ROUTE, (WITHIN, after), f"p.sorted.{name}")
        return c_value(text.replace("Owner{", "(").replace("Part{", "(").replace("}", ")"), scope)

    @staticmethod
    def put(into: dict[int, Any], at: int, what: Any) -> None:
        assert at not in into, "two in one place"
        into[at] = what


def random_rows(
    order: random.Random, tokens: int, top_k: int, experts: int, share: float
) -> tuple[list[list[int]], list[int]]:
    """Rows of pairs in the list, and the tiles of rows.

    A ``share`` of pairs is this rank's; tokens may name an expert twice.
    """
    ids = [[order.randrange(experts) if order.random() < share else -1 for _ in range(top_k)]
           for _ in range(tokens)]  # fmt: skip
    counts = [sum(row.count(e) for row in ids) for e in range(experts)]
    first, rows = 0, [[-1] * top_k for _ in ids]
    for e in range(experts):
        pairs = [(t, k) for t, row in enumerate(ids) for k in range(top_k) if row[k] == e]
        for row, (t, k) in enumerate(order.sample(pairs, len(pairs)), first):  # atomics: any order
            rows[t][k] = row
        first += counts[e]
    return rows, [tile.number for tile in list_tiles(counts) for _ in range(tile.count)]


@pytest.mark.parametrize("top_k", [1, 2, 3, 8, 9, 32])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_every_row_has_an_owner_and_the_last_ones_know_all(top_k: int, share: float) -> None:
    order = random.Random(top_k * 10 + int(share * 10))
    most_parts = top_k + top_k % 2
    rows, tiles = random_rows(order, 6000 // top_k // 8, top_k, 3, share)
    found = Owners(rows, most_parts, order)
    assert sorted(found.owners) == list(range(sum(row >= 0 for t in rows for row in t)))
    assert len(tiles) == len(found.owners) and (share < 1 or tiles[-1] > 2)
    slots, expected_parts, several = [], {}, 0
    for token, of_token in enumerate(rows):
        local = [(k, row) for k, row in enumerate(of_token) if row >= 0]
        if len(local) == 1:
            k, row = local[0]
            assert found.owners[row] == (token, token * top_k + k, ("weight", token, k), -1)
            continue
        last = max((row for _, row in local), default=-1)
        several += len(local) > 0
        for number, (k, row) in enumerate(local):
            owner_token, pair, parts, slot = found.owners[row]
            assert (owner_token, pair) == (token, token * top_k + k)
            assert parts == (len(local) if row == last else 0)
            slots.append(slot)
            at = last * most_parts + number
            assert number < most_parts, "the next row's"
            expected_parts[at] = slot, ("weight", token, k)
            # Who adds up waits for all tiles before its own.
            assert tiles[row] <= tiles[last]
    assert sorted(slots) == list(range(found.slots))
    assert found.parts == expected_parts
    assert found.empty == {token: max(of_token) < 0 for token, of_token in enumerate(rows)}
    assert several > 0 or top_k == 1


# ---- results of a warpgroup ----------------------------------------------------------------------
def outputs_of(c: dict[str, Any], tile: int, piece: int) -> list[int]:
    """``store``: where a thread's eight values go in a token's row."""
    body = " ".join(c_text(DOWN)[c_text(DOWN).index("void store(") :].split())
    whole, words = "out + tile * 64 + piece * 8)", "out + row + (piece * 4 + j) * 2 * kLayoutTiles)"
    assert whole in body and words in body
    scope = {**c, "tile": tile, "piece": piece, "out": 0}
    if c["kLayoutTiles"] == 1:
        begin = c_value(whole.removesuffix(")"), scope)
        return list(range(begin, begin + 8))
    found = []
    for j in range(4):
        scope = c_locals(DOWN, "void store(", "row", scope) | {"j": j}
        begin = c_value(words.removesuffix(")"), scope)
        found += [begin, begin + 1]
    return found


def left_pieces(c: dict[str, Any], count: int) -> dict[tuple[int, int], list[tuple[int, int, int]]]:
    """``leave`` of all consumers: (wg, column) to pieces: number, address in ``out`` and in y."""
    body = " ".join(c_text(DOWN).split())
    body = body[body.index("void leave(") : body.index("struct Adder")]
    loop = re.search(r"for \(int c = (.*?); c < count; c \+= (.*?)\) {", body)
    assert loop is not None and "store(p, static_cast<int>(owner.x), tile, piece, v);" in body
    slices = SimpleNamespace(buffer=lambda y, slice_, block: 0)
    item = SimpleNamespace(block=0, slice=0)
    fixed = {**c, "tables": SimpleNamespace(out=0), "slices": slices, "p": SimpleNamespace(y=0)}
    fixed["item"] = lambda: item
    source = c_find(DOWN, ("void leave(", "lds128(tables.owner"), "v")
    target = re.search(r"reinterpret_cast<uint4\*>\((y .*?)\) = v;", body)
    assert target is not None
    found: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for warp in range(c["kConsumers"] // 32):
        rows: dict[int, list[int]] = {}
        for lane in range(32):
            scope = fixed | {"threadIdx": SimpleNamespace(x=warp * 32 + lane)}
            scope = c_locals(DOWN, "void leave(", "thread wg piece tile from y", scope)
            assert scope["tile"] == scope["wg"] == warp // 4
            step = c_value(loop[2], scope)
            for turn, column in enumerate(range(c_value(loop[1], scope), count, step)):
                more = {"c": column, "slot": 5, "lds128": int}
                address = c_value(source, scope | more)
                assert address % 16 == 0 and 0 <= address <= c["kOutBytes"] - 16
                rows.setdefault(turn, []).append(address)
                place = scope["piece"], address, c_value(target[1], scope | more)
                found.setdefault((scope["wg"], column), []).append(place)
        assert all(banks(addresses, 16) == 1 for addresses in rows.values())
    return found


@pytest.mark.parametrize(("rows", "tiles"), [(640, 1), (64, 1), (640, 2), (1024, 4), (256, 4)])
@pytest.mark.parametrize("count", [1, 37, 128, 133, 192])
def test_every_output_is_the_row_that_the_layout_says(rows: int, tiles: int, count: int) -> None:
    c = constants(DOWN, 128 if tiles == 1 else 256 // tiles, W4_TILES=tiles)
    step = 8 if count > 128 else 16
    memory = stored(-(-count // step) * step)
    order = _row_order(rows, False, tiles).view(-1, 4, 8, 2).tolist()
    left = left_pieces(c, count)
    assert sorted(left) == list(product(range(WGS), range(count)))
    written: Counter[tuple[int, int]] = Counter()
    for tile, column in product(range(rows // 64), range(count)):
        for piece, address, _ in left[tile % WGS, column]:
            values = [memory[address + 2 * i] for i in range(8)]
            for value, place in zip(values, outputs_of(c, tile, piece), strict=True):
                wg, of_column, warp, g, half = value
                assert (wg, of_column) == (tile % WGS, column), "another token's, or warpgroup's"
                assert order[tile][warp][g][half] == place
                written[column, place] += 1
    assert sorted(written) == list(product(range(count), range(rows)))
    assert set(written.values()) == {1}


@pytest.mark.parametrize("tiles", [1, 2])
def test_contributions_are_read_where_they_were_written(tiles: int) -> None:
    """A slot's bytes: eight lanes for each row tile, and ``store`` takes both the same way."""
    c, body = constants(DOWN, 128), " ".join(c_text(DOWN).split())
    assert "if (lane >= row_tiles_of(p, item.block) * 8) return;" in body
    adding = body[body.index("void add_up(") : body.index("static void sum(")]
    assert "slices.buffer(p.y, item.slice, item.block) + lane * 16;" in adding
    assert "item.block * kWgs + (lane >> 3), lane & 7, make_uint4(" in adding
    left = left_pieces(c, 1)
    written = {y: (wg, piece) for wg in range(tiles) for piece, _, y in left[wg, 0]}
    source = c_find(DOWN, ("void add_up(", "const uint4 two"), "async_copy16(")
    scope: dict[str, Any] = {**c, "cell": 0, "two": SimpleNamespace(x=5)}
    read = {
        c_value(source, scope | {"y": lane * 16})[1]: (lane >> 3, lane & 7)
        for lane in range(tiles * 8)
    }
    assert written == read and len(read) == tiles * 8
    # What lanes ask for does not meet, nor what the warp knows of it.
    text = c_find(DOWN, ("void add_up(", "auto ask"), "cell")
    begin = c_find(DOWN, ("void add_up(",), "cells").replace("this->cells", "0")
    scope |= {"kPairs": c["kCells"] // 2}
    cells = set()
    for half, lane in product(range(2), range(tiles * 8)):
        scope["cells"] = c_value(begin, scope | {"half": half, "lane": lane})
        for i, second in product(range(3 * c["kCells"]), (0, c["kRowBytes"])):
            cells.add(c_value(text, scope | {"i": i}) + second)
    assert len(cells) == tiles * 8 * 2 * c["kCells"]
    assert max(cells) + 16 <= 2 * c["kCells"] * c["kRowBytes"]


def test_columns_are_scaled_as_their_owners_say() -> None:
    """``scale``: a token's only row becomes its output, others are BF16 contributions."""
    body = " ".join(c_text(TABLES).split())
    body = body[body.index("void scale(") : body.index("void wait_slice(")]
    assert "if (static_cast<int>(owner.w) < 0) by *= __uint_as_float(owner.z) * p.factor;" in body
    assert "sts32(tables.scales + c * 4, __float_as_uint(by));" in body
    text = c_find(TABLES, ("void scale(", "lds128("), "by").replace("512.0f", "512")
    p, owner = SimpleNamespace(b_scale=[3, 5]), SimpleNamespace(y=1)
    scope: dict[str, Any] = {"p": p, "owner": owner, "b_scale": 7}
    assert c_value(text, scope | {"kDynamic": 0}) == 7 * 512
    assert c_value(text, scope | {"kDynamic": 1}) == 5 * 512, "of its pair"
    columns = re.search(r"for \(int c = lane\(\); c < kTokens; c \+= 32\)", body)
    assert columns is not None and "if (c < count) {" in body


@pytest.mark.parametrize("most", [2, 10, 32])
@pytest.mark.parametrize("share", [0.0, 0.03, 0.2, 0.6, 1.0])
@pytest.mark.parametrize("at_once", [False, True])
def test_every_sum_is_made_once_and_of_what_was_asked_for(
    share: float, at_once: bool, most: int
) -> None:
    """``find`` and ``add_up``: columns in turn, contributions in cells that are used again."""
    order, c = random.Random(int(share * 100)), constants(DOWN, 128, W4_PARTS=most)
    body = " ".join(c_text(DOWN).split())
    loop = "for (int first = 0; first < item.count; first += 32) {"
    assert f"{loop} const Found found = find(item, first); add_up(item, found);" in body
    assert "if (token < 0) continue;" in body and "if (i < count) {" in body
    # A row that is not the last of its token, or its only one, which has a weight.
    text = c_find(DOWN, ("Found find(", "first + lane < item.count"), "count")
    for z, w, count in ((0, 3, 0), (0x3F800000, -1, 0), (5, 8, 5)):
        assert c_value(text, {"owner": SimpleNamespace(z=z, w=w)}) == count
    odd = reused = 0
    adder = Adder(c, at_once)
    for _ in range(10):
        rows = []
        for token in range(32):
            count = order.randint(2, most) if order.random() < share else 0
            rows.append((token, [token * 100 + 2 * k for k in range(count)]))
        pairs = adder.find(rows)
        assert pairs[0] <= pairs[1] <= c["kMostPairs"]
        for half in range(2):
            mine = rows[16 * half : 16 * half + 16]
            assert adder.add_up(half, pairs) == [row for row in mine if row[1]]
        odd += sum(len(slots) % 2 for _, slots in rows)
        reused += max(pairs[0], pairs[1] - pairs[0]) > c["kCells"] // 2
    assert share <= 0.2 or (reused > 1 and (odd > 20 or most == 2))


# ---- slices --------------------------------------------------------------------------------------
def test_two_slices_of_contributions_have_room() -> None:
    order = random.Random(3)
    several = 0
    for _ in range(300):
        row_tiles, slots = order.randint(1, 40), order.choice((0, 1, 5, 1000))
        blocks = -(-row_tiles // WGS)
        block_bytes = max(slots, 1) * BLOCK_BYTES
        y_bytes = min(blocks * block_bytes, order.randint(2 * block_bytes, 50 * block_bytes))
        slices = Slices(row_tiles, 3, slots, y_bytes)
        assert sum(slices.blocks_of(s) for s in range(slices.count())) == slices.blocks == blocks
        assert all(slices.blocks_of(s) > 0 for s in range(slices.count()))
        several += slices.count() > 2
        buffers: dict[int, tuple[int, ...]] = {}
        for s in range(slices.count()):
            # What the slice before has stays; what the last but one had is overwritten.
            buffers = {at: what for at, what in buffers.items() if what[0] == s - 1}
            for block in range(slices.blocks_of(s)):
                at = slices.buffer(s, block + s * slices.per_slice)
                assert at not in buffers or slots == 0
                assert at % 128 == 0 and at + slots * BLOCK_BYTES <= y_bytes
                buffers[at] = s, block
        if slots:
            ends = sorted(buffers)
            assert all(b - a >= slots * BLOCK_BYTES for a, b in pairwise(ends))
    assert several > 20


def test_items_are_all_blocks_of_all_tiles_slice_by_slice() -> None:
    order = random.Random(4)
    for _ in range(60):
        slices = Slices(
            order.randint(1, 30), order.randint(0, 6), 2, order.randint(2, 9) * 2 * BLOCK_BYTES
        )
        found: list[tuple[int, int, int]] = []
        while (item := slices.item(len(found))) is not None:
            found.append((item.slice, item.step, item.block))
        assert found == sorted(found)
        assert sorted((step, block) for _, step, block in found) == list(
            product(range(slices.tiles), range(slices.blocks))
        )
        assert all(s == block // slices.per_slice for s, _, block in found)
        # Past the end it stays so: CTAs claim one more each, and one ahead.
        assert all(slices.item(len(found) + i) is None for i in range(300))
        for s in range(slices.count()):
            assert slices.left_target(s) == sum(at == s for at, _, _ in found)


def test_the_plan_has_room_for_two_blocks_of_all_pairs() -> None:
    for hidden, tokens, top_k in product((128, 384, 640, 7168), (1, 700, 40_000), (1, 8, 9)):
        layer = Layer(32, hidden, 512, 128, 128, top_k, False, False)
        plan = plan_prefill(layer, tokens, 132)
        for slots in {0, 1, tokens * top_k // 7, tokens * top_k}:
            slices = Slices(hidden // 64, 3, slots, plan.slice_bytes)
            last = max(
                slices.buffer(s, min(slices.blocks, (s + 1) * slices.per_slice) - 1)
                for s in range(slices.count())
            )
            assert last + slots * BLOCK_BYTES <= plan.slice_bytes
