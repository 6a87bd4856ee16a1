"""What down is told of its rows, and where their results go, without a GPU.

Expressions are the kernels' own; the statements around them follow ``prefill_route.cu`` and
``prefill_down.cu``.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from functools import cache
from itertools import pairwise, product
from types import SimpleNamespace
from typing import Any

import pytest
from hopper_sorted import DOWN, ROUTE, Slices, constants, list_places
from kernel_source import c_find, c_locals, c_text, c_value

from sglang_w4afp8.kernels.hopper.layout import _row_order
from sglang_w4afp8.kernels.hopper.plan import Layer
from sglang_w4afp8.kernels.hopper.plan_prefill import BLOCK_BYTES, plan_prefill

WITHIN = "void describe_owners"


# ---- owners --------------------------------------------------------------------------------------
class Owners:
    """``describe_owners`` for all tokens.

    Args:
        places: of pairs: row (-1: another rank's) and tile; a list of ``top_k`` for each token.
        most_parts: room of a token.
        order: of the warps' atomics.
    """

    def __init__(
        self, places: list[list[tuple[int, int]]], most_parts: int, order: random.Random
    ) -> None:
        self.owners: dict[int, tuple[int, Any, Any, int]] = {}
        self.parts: dict[int, tuple[int, Any]] = {}
        self.tiles: dict[int, int] = {}
        self.slots, self.most_parts, self.top_k = 0, most_parts, len(places[0])
        for token in order.sample(range(len(places)), len(places)):
            self.warp(token, places[token])

    def warp(self, token: int, places: list[tuple[int, int]]) -> None:
        """One warp; lanes from ``top_k`` on have no pair."""
        rows = places + [(-1, 0)] * (32 - len(places))
        weights = {token * self.top_k + k: ("weight", token, k) for k in range(self.top_k)}
        p = SimpleNamespace(sorted=SimpleNamespace(top_k=self.top_k, weights=weights))
        p.sorted.most_parts = self.most_parts
        common: dict[str, Any] = {
            "p": p, "token": token, "__popc": int.bit_count,
            "__ffs": lambda bits: (bits & -bits).bit_length(),
            "__reduce_max_sync": lambda mask, value: max(row for row, _ in rows),
            "__ballot_sync": lambda mask, value: sum(
                1 << lane for lane, (row, _) in enumerate(rows) if row >= 0),
            "__float_as_uint": lambda value: value,
        }  # fmt: skip
        begin = None
        for lane, (row, tile) in enumerate(rows):
            place = SimpleNamespace(row=row, tile=tile)
            scope = common | {"threadIdx": SimpleNamespace(x=lane + 64), "place": place}
            scope = c_locals(ROUTE, WITHIN, "k pair ours last count", scope)
            assert scope["k"] == lane
            if row < 0:
                continue
            scope = c_locals(ROUTE, WITHIN, "weight", scope)
            if scope["count"] == 1:
                self.put(self.owners, row, self.made("count == 1", "owners[place.row]", scope))
                continue
            scope = c_locals(ROUTE, WITHIN, "leader before", scope)
            if begin is None:  # the shuffle: all have what the leader was given
                assert lane == scope["leader"]
                begin, self.slots = self.slots, self.slots + scope["count"]
            scope |= {"slot": begin, "__shfl_sync": lambda mask, value, lane: value}
            scope = c_locals(ROUTE, f"{WITHIN} > atomicAdd(", "slot parts to", scope)
            self.put(self.owners, row, self.made("u32 parts", "owners[place.row]", scope))
            self.put(self.parts, scope["to"], self.made("u64 to", "parts[to]", scope))
            tiles = c_find(ROUTE, (WITHIN,), "p.sorted.tiles[to]")
            self.put(self.tiles, scope["to"], c_value(tiles, scope))

    @staticmethod
    def made(after: str, name: str, scope: dict[str, Any]) -> Any:
        """A struct that is written."""
        text = c_find(ROUTE, (WITHIN, after), f"p.sorted.{name}")
        return c_value(text.replace("Owner{", "(").replace("Part{", "(").replace("}", ")"), scope)

    @staticmethod
    def put(into: dict[int, Any], at: int, what: Any) -> None:
        assert at not in into, "two in one place"
        into[at] = what


def random_places(
    order: random.Random, tokens: int, top_k: int, experts: int, share: float
) -> list[list[tuple[int, int]]]:
    """Where pairs are in the list; a ``share`` of them is this rank's, experts named twice too."""
    ids = [[order.randrange(experts) if order.random() < share else -1 for _ in range(top_k)]
           for _ in range(tokens)]  # fmt: skip
    counts = [sum(row.count(e) for row in ids) for e in range(experts)]
    tiles, first = list_places(counts), 0
    places = [[(-1, 0)] * top_k for _ in ids]
    for e in range(experts):
        pairs = [(t, k) for t, row in enumerate(ids) for k in range(top_k) if row[k] == e]
        for row, (t, k) in enumerate(order.sample(pairs, len(pairs)), first):  # atomics: any order
            places[t][k] = row, tiles[row]
        first += counts[e]
    return places


@pytest.mark.parametrize("top_k", [1, 2, 3, 8, 9, 32])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_every_row_has_an_owner_and_the_last_ones_know_all(top_k: int, share: float) -> None:
    order = random.Random(top_k * 10 + int(share * 10))
    most_parts = top_k + top_k % 2
    places = random_places(order, 4000 // top_k // 8, top_k, 3, share)
    found = Owners(places, most_parts, order)
    assert sorted(found.owners) == list(range(sum(row >= 0 for t in places for row, _ in t)))
    slots, expected_parts, several = [], {}, 0
    for token, of_token in enumerate(places):
        local = [(k, row, tile >> 3) for k, (row, tile) in enumerate(of_token) if row >= 0]
        if len(local) == 1:
            k, row, _ = local[0]
            assert found.owners[row] == (token, token * top_k + k, ("weight", token, k), -1)
            continue
        last = max((row for _, row, _ in local), default=-1)
        several += len(local) > 0
        for number, (k, row, tile) in enumerate(local):
            owner_token, pair, parts, slot = found.owners[row]
            assert (owner_token, pair) == (token, token * top_k + k)
            assert parts == (len(local) if row == last else 0)
            slots.append(slot)
            at = last * most_parts + number
            assert number < most_parts, "the next row's"
            expected_parts[at] = (slot, ("weight", token, k)), tile
            # Only tiles that were claimed before are waited for.
            assert tile <= of_token[[r for r, _ in of_token].index(last)][1] >> 3
    assert sorted(slots) == list(range(found.slots))
    assert {at: (found.parts[at], found.tiles[at]) for at in found.parts} == expected_parts
    assert several > 0 or top_k == 1


# ---- results of a warpgroup ----------------------------------------------------------------------
@cache
def stored(columns: int) -> dict[int, tuple[int, int, int, int]]:
    """Shared memory after ``run<columns>``: (column, warp, g, half) of every BF16, by address.

    Also whether a warp's stores meet each other's banks.
    """
    c = constants(DOWN, 128)
    memory: dict[int, tuple[int, int, int, int]] = {}
    address_text = c_find(DOWN, ("void run()",), "sts32(")
    assert "for (int a = 0; a < kN / 2; a += 4)" in c_text(DOWN)
    for a, e, warp in product(range(0, columns // 2, 4), range(2), range(4)):
        banks = set()
        for lane in range(32):
            scope = {**c, "thread": warp * 32 + lane, "lane": lane, "a": a, "e": e, "out": 0}
            scope = c_locals(DOWN, "void run()", "mine c", scope)
            scope |= {"acc": range(columns // 2), "scale": 1, "pack_bf16": lambda *two: two}
            address, halves = c_value(address_text, scope)
            assert address % 4 == 0 and address + 4 <= c["kOutBytes"]
            banks.add(address // 4 % 32)
            for half, number in enumerate(halves):
                # wgmma: numbers 4 b + 0, 1 are columns 8 b + 2 q and the next, 2, 3 8 rows below.
                column = number // 4 * 8 + lane % 4 * 2 + number % 2
                assert address + 2 * half not in memory, "two results in one place"
                memory[address + 2 * half] = column, warp, lane // 4, number % 4 // 2
        assert len(banks) == 32, "stores that wait for each other"
    return memory


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


@pytest.mark.parametrize(("rows", "tiles"), [(640, 1), (64, 1), (640, 2), (1024, 4), (256, 4)])
@pytest.mark.parametrize("count", [1, 37, 128])
def test_every_output_is_the_row_that_the_layout_says(rows: int, tiles: int, count: int) -> None:
    c = constants(DOWN, 128 if tiles == 1 else 256 // tiles, W4_TILES=tiles)
    memory = stored(-(-count // 16) * 16)
    order = _row_order(rows, False, tiles).view(-1, 4, 8, 2)
    loop = re.search(r"for \(int c = (.*?); c < count; c \+= (.*?)\) {", leaving())
    load = re.search(r"lds128\((tables.out .*? \* 16\))\);", leaving())
    assert loop is not None and load is not None
    written: Counter[tuple[int, int]] = Counter()
    read = {}
    for wg, which, lane in product(range(3), range(2), range(32)):
        scope = {**c, "lane": lane, "which": lambda which=which: which, "wg": wg}
        scope["tables"] = SimpleNamespace(out=0)
        scope = c_locals(DOWN, "void leave()", "piece", scope)
        step = c_value(loop[2], scope)
        for column in range(c_value(loop[1], scope), count, step):
            address = c_value(load[1], scope | {"c": column}) - wg * c["kOutBytes"]
            assert address % 16 == 0 and 0 <= address <= c["kOutBytes"] - 16
            values = [memory[address + 2 * i] for i in range(8)]
            assert read.setdefault((column, scope["piece"], wg), values) is values, "twice"
    read = {at[:2]: values for at, values in read.items() if at[2] == 0}  # all of them the same
    for tile, (at, values) in product(range(rows // 64), read.items()):
        for (column, warp, g, half), place in zip(values, outputs_of(c, tile, at[1]), strict=True):
            assert column == at[0], "another token's"
            assert order[tile, warp, g, half] == place
            written[at[0], place] += 1
    assert sorted(written) == list(product(range(count), range(rows)))
    assert set(written.values()) == {1}


def leaving() -> str:
    body = " ".join(c_text(DOWN).split())
    return body[body.index("void leave()") : body.index("u32 last_rows(")]


@pytest.mark.parametrize("tiles", [1, 2, 3])
def test_contributions_are_read_where_they_were_written(tiles: int) -> None:
    """A slot's bytes: eight lanes for each row tile, and ``store`` takes both the same way."""
    c, body = constants(DOWN, 128), " ".join(c_text(DOWN).split())
    assert "slices.buffer(p.y, item().slice, item().block) + piece * 16;" in leaving()
    to = "y + static_cast<u64>(slot) * kRowBytes + wg * 128"
    assert to in leaving() and leaving().count("if (wg >= tiles) continue;") == 2
    assert "store(static_cast<int>(owner.x), block * kWgs + wg, piece, total);" in leaving()
    adding = body[body.index("void add_up()") : body.index("static void sum(")]
    assert "if (lane >= row_tiles_of(p, item().block) * 8) return;" in adding
    assert "slices.buffer(p.y, item().slice, item().block) + lane * 16;" in adding
    source = "y + static_cast<u64>(lds32(at)) * kRowBytes"
    assert source in adding
    assert "item().block * kWgs + (lane >> 3), lane & 7, total);" in adding
    written = {
        c_value(to, c | {"y": piece * 16, "slot": 5, "wg": wg}): (wg, piece)
        for wg, piece in product(range(tiles), range(8))
    }
    read = {
        c_value(source, c | {"y": lane * 16, "lds32": lambda at: 5, "at": 0}): (lane >> 3, lane & 7)
        for lane in range(tiles * 8)
    }
    assert written == read and len(read) == tiles * 8
    # What lanes ask for does not meet, of both warps.
    cells = {
        c_value(c_find(DOWN, ("void add_up()",), "cells"), scope) + i * c["kRowBytes"]
        for which, lane, i in product(range(2), range(tiles * 8), range(c["kCells"]))
        for scope in (
            {**c, "which": lambda which=which: which, "lane": lane}
            | {"tables": SimpleNamespace(cells=0)},
        )
    }
    assert len(cells) == 2 * tiles * 8 * c["kCells"]
    assert max(cells) + 16 <= c["kFinishers"] * c["kCells"] * c["kRowBytes"]


@pytest.mark.parametrize("share", [0.0, 0.03, 0.2, 0.6, 1.0])
def test_every_sum_is_made_once_and_of_what_was_asked_for(share: float) -> None:
    """``add_up``: a finisher's columns in turn; what is read has been asked for, cell by cell."""
    order, c = random.Random(int(share * 100)), constants(DOWN, 128)
    body = " ".join(c_text(DOWN).split())
    found = "const u64 found = last_rows(0) | static_cast<u64>(last_rows(1)) << 32;"
    assert found in body and "__ballot_sync(0xffffffffu, parts > 0)" in body
    assert body.count("rest &= rest - 1") == body.count("coming &= coming - 1") == 1
    assert "for (int i = 0; i < kCells; ++i) ask(cells + i * kRowBytes);" in body
    next_cell = c_find(DOWN, ("async_copy_wait", "ask(cell)"), "cell")
    assert "async_copy_wait<kCells - 1>();" in body  # of the last kCells, the first has come
    place = c_find(DOWN, ("u32 last_rows(",), "c")
    column = c_find(DOWN, ("int column_of(",), "return").replace("static_cast<long long>", "")
    for _ in range(10):
        count = order.randint(1, 128)
        parts = {i: order.randint(2, 9) for i in range(count) if order.random() < share}
        made: Counter[int] = Counter()
        for which in range(2):
            scope: dict[str, Any] = {**c, "which": lambda which=which: which}
            scope |= {"__ffsll": lambda bits: (bits & -bits).bit_length()}
            bits = 0
            for half, lane in product(range(2), range(32)):
                scope |= {"half": half, "threadIdx": SimpleNamespace(x=13 * 32 + lane)}
                bits |= (c_value(place, scope) in parts) << (half * 32 + lane)
            columns = []
            while bits:
                columns.append(c_value(column, scope | {"found": bits}))
                bits &= bits - 1
            made.update(columns)
            wanted = [(i, k) for i in columns for k in range(parts[i])]
            cells: dict[int, tuple[int, int]] = {}
            for i, asked in enumerate(wanted[: c["kCells"]]):
                cells[i * c["kRowBytes"]] = asked
            scope |= {"cells": 0, "cell": 0}
            for number, one in enumerate(wanted):
                assert cells.pop(scope["cell"]) == one, "another contribution"
                for asked in wanted[number + c["kCells"] :][:1]:
                    cells[scope["cell"]] = asked
                scope["cell"] = c_value(next_cell, scope)
        assert made == Counter(parts.keys())


# ---- slices --------------------------------------------------------------------------------------
def test_two_slices_of_contributions_have_room() -> None:
    order = random.Random(3)
    several = 0
    for _ in range(300):
        row_tiles, slots = order.randint(1, 40), order.choice((0, 1, 5, 1000))
        blocks = -(-row_tiles // 3)
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
        slices = Slices(order.randint(1, 30), order.randint(0, 6), 2, order.randint(2, 9) * 768)
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
