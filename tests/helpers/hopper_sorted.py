"""The prefill path on tokens in the order of the list, on the CPU: lists, slices, items, results.

Constants and index expressions are the kernels' own; the statements around them follow them.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import product
from types import SimpleNamespace
from typing import Any

from hopper_route import cut_tiles
from kernel_source import c_constants, c_find, c_locals, c_text, c_value

from sglang_w4afp8.kernels.hopper.plan_prefill import SORTED_TOKENS, SORTED_WARPGROUPS

ROUTE, SORT, SHARED = "prefill_route.cu", "prefill_sort.cuh", "prefill.cuh"
LISTED = "prefill_listed.cuh"
UP, DOWN, TABLES = "prefill_up.cu", "prefill_down.cu", "prefill_tables.cuh"
SIZES = {"sizeof": int, "Owner": 16, "Part": 8}
ROUTED = c_constants(ROUTE, {})
WGS = SORTED_WARPGROUPS


def constants(source: str, stage_k: int, **more: int) -> dict[str, Any]:
    """What a matrix kernel's sources call their sizes, for weights with stages of ``stage_k``."""
    defines = {"W4_K": stage_k, "W4_TILES": 1, "W4_GROUP": 32, "W4_MINUS_EIGHT": 0, "W4_DYNAMIC": 0}
    defines |= {"W4_PER_WG": 1, "W4_PANEL": 128, "W4_SORTED": 1, "W4_PARTS": 8}
    return c_constants(source, defines | SIZES | more)


@dataclass(frozen=True)
class Tile:
    """Of the list: ``number`` counts the tiles of all experts."""

    number: int
    expert: int
    first: int
    count: int


def list_tiles(counts: list[int]) -> list[Tile]:
    """``place_part``: tiles of a list whose experts have so many rows."""
    tiles: list[Tile] = []
    first = 0
    for expert, tokens in enumerate(counts):
        lists = SimpleNamespace(together=1, tile_tokens=SORTED_TOKENS)
        for cut in cut_tiles(expert, first, tokens, lists):
            tiles.append(Tile(len(tiles), *cut))
        first += tokens
    return tiles


def list_columns(counts: list[int]) -> list[int]:
    """``ListPlace::column`` without the expert, for a list whose experts have so many rows."""
    text = c_find(SORT, ("u32 column = 0", "if (mine[i] >= 0)"), "column")
    columns, first = [], 0
    for tokens in counts:
        scope: dict[str, Any] = {"e": 0, "counts": [first]}
        columns += [c_value(text, scope | {"row": first + i}) for i in range(tokens)]
        first += tokens
    return columns


class Slices:
    """``Slices`` of a call.

    Args:
        row_tiles: of the outputs.
        tiles: of the list.
        slots: of y in use.
        y_bytes: of y.
    """

    def __init__(self, row_tiles: int, tiles: int, slots: int, y_bytes: int) -> None:
        weights = SimpleNamespace(rows=row_tiles * 64)
        self.p = SimpleNamespace(weights=weights, y_bytes=y_bytes)
        scope: dict[str, Any] = {
            "p": self.p,
            "kWgs": WGS,
            "max": max,
            "slots": slots,
            "tiles": tiles,
        }
        scope["kRowBytes"] = WGS * 128
        scope = c_locals(TABLES, "Slices of(", "blocks block_bytes most", scope)
        limit = c_find(TABLES, ("Slices of(", "if (block_bytes"), "most")
        if scope["block_bytes"] * scope["blocks"] > y_bytes:
            scope["most"] = c_value(limit, scope)
        scope = c_locals(TABLES, "Slices of(", "slices", scope)
        made = c_find(TABLES, ("Slices of(",), "return").replace("*p.header", "tiles")
        made = made.replace("Slices{", "(").replace("}", ")")
        self.blocks, self.tiles, self.slots, self.per_slice = c_value(made, scope)
        self.row_tiles = row_tiles

    @property
    def scope(self) -> dict[str, Any]:
        """What members of the struct see."""
        own = {"blocks": self.blocks, "tiles": self.tiles, "slots": self.slots, "p": self.p}
        return own | {"per_slice": self.per_slice, "kWgs": WGS, "kRowBytes": WGS * 128}

    def count(self) -> int:
        return int(c_value(c_find(TABLES, ("int count()",), "return"), self.scope))

    def blocks_of(self, slice_: int) -> int:
        text = c_find(TABLES, ("int blocks_of(",), "return")
        return int(c_value(text, self.scope | {"slice": slice_}))

    def buffer(self, slice_: int, block: int) -> int:
        """Where contributions to a block begin in y, in bytes."""
        scope = self.scope | {"y": 0, "slice": slice_, "block": block}
        scope = c_locals(TABLES, "u8* buffer(", "at", scope)
        return int(c_value(c_find(TABLES, ("u8* buffer(",), "return"), scope))

    def row_tiles_of(self, block: int) -> int:
        text = c_find(TABLES, ("int row_tiles_of(",), "return")
        return int(c_value(text, self.scope | {"block": block}))

    def left_target(self, slice_: int) -> int:
        """Items of a slice that ``wait_slice`` waits for, before one of the next but one."""
        slices = SimpleNamespace(tiles=self.tiles, blocks_of=self.blocks_of)
        scope = {"slices": slices, "slice": slice_ + 2}
        return int(c_locals(TABLES, "void wait_slice(", "target", scope)["target"])

    def item(self, number: int) -> SimpleNamespace | None:
        """``Order::item``: slice, step (the tile) and block; None past the last."""
        slices = SimpleNamespace(**self.scope)
        scope: dict[str, Any] = {"slices": slices, "number": number}
        scope = c_locals(TABLES, "struct Order", "whole slice at", scope)
        if scope["whole"] == 0 or scope["slice"] >= self.count():
            return None
        slices.blocks_of = self.blocks_of
        scope = c_locals(TABLES, "struct Order", "blocks i", scope)
        if scope["i"] >= self.tiles:
            return None
        block = c_value(c_find(TABLES, ("struct Order",), "item.block"), scope)
        return SimpleNamespace(slice=scope["slice"], step=scope["i"], block=block)


class Number(int):
    """One of the accumulators, and what it is multiplied with."""

    def __mul__(self, other: int) -> tuple[int, int]:  # type: ignore[override]
        return int(self), other


def banks(addresses: list[int], size: int) -> int:
    """Most words that a bank has, where lanes of a warp have ``size`` bytes at once each."""
    most, together = 0, 128 // size
    for first in range(0, len(addresses), together):
        words = {
            at // 4 + i for at in addresses[first : first + together] for i in range(size // 4)
        }
        most = max(most, max(Counter(word % 32 for word in words).values()))
    return most


Result = tuple[int, int, int, int, int]


@cache
def stored(columns: int) -> dict[int, Result]:
    """Shared memory after ``run<columns>``: (wg, column, warp, g, half) of every BF16, by address.

    Each has been multiplied with what is said of its column; no stores meet each other's banks.
    """
    c = constants(DOWN, 128)
    memory: dict[int, Result] = {}
    text = " ".join(c_text(DOWN).split())
    text = text[text.index("struct DownBody") : text.index("void leave(")]
    assert "for (int a = 0; a < kN / 2; a += 4) { const int c = a * 2 + column;" in text
    within = ("void run()", "const int c =")
    stores = [c_find(DOWN, (*within, *more), "sts32(") for more in ((), ("* s0));",))]
    assert stores[0] != stores[1] and text.count(" sts32(") == 2
    tables = SimpleNamespace(out=0, scales=0)

    def scales(address: int) -> SimpleNamespace:
        assert address % 8 == 0
        return SimpleNamespace(x=address // 4, y=address // 4 + 1)

    fixed = {**c, "tables": tables, "lds64": scales, "__uint_as_float": int}
    fixed |= {"acc": [Number(i) for i in range(columns // 2)], "pack_bf16": lambda *two: two}
    for a, warp in product(range(0, columns // 2, 4), range(c["kConsumers"] // 32)):
        found: list[list[int]] = [[], []]
        for lane, (at, store) in product(range(32), enumerate(stores)):
            scope = fixed | {"threadIdx": SimpleNamespace(x=warp * 32 + lane), "a": a}
            scope = c_locals(DOWN, "void run()", "thread wg lane mine column", scope)
            scope = c_locals(DOWN, "void run() > a += 4", "c scale s0 s1", scope)
            address, halves = c_value(store, scope)
            assert address % 4 == 0 and address + 4 <= c["kOutBytes"]
            found[at].append(address)
            for half, (number, column_of_scale) in enumerate(halves):
                # wgmma: numbers 4 b + 0, 1 are columns 8 b + 2 q and the next, 2, 3 8 rows below.
                column = number // 4 * 8 + lane % 4 * 2 + number % 2
                assert column == column_of_scale
                assert address + 2 * half not in memory, "two results in one place"
                place = warp // 4, column, warp % 4, lane // 4, number % 4 // 2
                memory[address + 2 * half] = place
        assert [banks(addresses, 4) for addresses in found] == [1, 1], "stores wait for each other"
    assert len(memory) == columns * c["kRowBytes"] // 2
    return memory


class Adder:
    """``find`` and ``add_up`` of a warp: what the first lane of a half asks for and adds to what.

    A contribution is told by its slot in y, which is also its weight's number.

    Args:
        c: constants.
        at_once: copies come at once, or else as late as the waits allow.
    """

    def __init__(self, c: dict[str, Any], at_once: bool) -> None:
        self.at_once = at_once
        made = c_find(DOWN, ("static Adder of(",), "return").replace("Adder{", "(")
        scope = c_locals(DOWN, "static Adder of(", "pairs", {**c, "memory": 0})
        scope |= {"p": None, "slices": None}
        _, _, cells, pairs, tokens = c_value(made.replace("}", ")"), scope)
        self.scope = {**c, "lane": 0, "cells": cells, "pairs": pairs, "tokens": tokens, "y": 0}
        self.scope |= {"__uint_as_float": int, "lds128": self.read, "lds32": self.memory_of}
        self.warp = self.scope | c_locals(DOWN, "void add_up(", "kPairs", self.scope)
        self.scope = self.warp
        self.memory: dict[int, Any] = {}
        self.groups: list[list[tuple[int, int]]] = []
        wait = re.search(r"async_copy_wait<(.*?)>\(\);", c_text(DOWN))
        assert wait is not None
        self.pending = c_value(wait[1], self.scope)

    def memory_of(self, address: int) -> Any:
        assert 0 <= address < self.scope["kAdderBytes"]
        return self.memory[address]

    def read(self, address: int) -> Any:
        assert address % 16 == 0
        return self.memory_of(address)

    def find(self, rows: list[tuple[int, list[int]]]) -> tuple[int, int]:
        """Tokens of 32 columns with the slots of what they are to add up, none for others.

        Returns how many pairs the first 16 have, and all.
        """
        within, end, half = "Found find(", 0, 0
        self.scope = self.warp
        made = " ".join(c_find(DOWN, (within,), "return").split())
        assert made == "Found{__shfl_sync(0xffffffffu, end, 15), __shfl_sync(0xffffffffu, end, 31)}"
        for lane, (token, slots) in enumerate(rows):
            half = end if lane == 16 else half
            scope = self.scope | {"count": len(slots), "token": token}
            end += c_value(c_find(DOWN, (within,), "end"), scope)
            begin = c_value(c_find(DOWN, (within,), "begin"), scope | {"end": end})
            for i in range(begin, end):
                scope |= {"i": i, "begin": begin, "end": end, "two": None}
                both = slots[2 * (i - begin) :][:2]
                # What is in memory behind a token's last one is anything; 0 is no weight.
                two = SimpleNamespace(x=both[0], y=both[0] + 1, z=77, w=78)
                if len(both) == 2:
                    two = SimpleNamespace(x=both[0], y=both[0] + 1, z=both[1], w=both[1] + 1)
                alone = re.search(r"if \((\(i - begin\).*?)\) two\.w = 0;", c_text(DOWN))
                assert alone is not None
                if c_value(alone[1], scope):
                    two.w = 0
                to, _ = c_value(c_find(DOWN, (within,), "sts128("), scope)
                assert to % 16 == 0 and to >= self.scope["pairs"]
                self.memory[to] = two
                last = c_find(DOWN, (within,), "sts32(").replace("~0u", "-1")
                to, value = c_value(last, scope)
                assert self.scope["tokens"] <= to <= self.scope["kAdderBytes"] - 4
                self.memory[to] = value
        return half, end

    def value(self, after: str, name: str, **more: Any) -> Any:
        """Of an expression of ``add_up``."""
        return c_value(c_find(DOWN, ("void add_up(", after), name), self.scope | more)

    def ask(self, i: int, count: int) -> None:
        copies = []
        if i < count:
            two = self.value("auto ask", "two", i=i)
            cell = self.value("auto ask", "cell", i=i)
            copies.append(self.value("auto ask", "async_copy16(", two=two, cell=cell))
            if two.w != 0:
                copies.append(self.second(two, cell))
        slots = [(to, *divmod(source, self.scope["kRowBytes"])) for to, source in copies]
        assert not any(rest for _, _, rest in slots)
        self.groups.append([(to, slot) for to, slot, _ in slots])
        if self.at_once:
            self.come(0)

    def second(self, two: Any, cell: int) -> Any:
        text = c_text(DOWN)
        text = text[text.index("if (two.w != 0) async_copy16(") :]
        found = re.match(r"if \(two\.w != 0\) async_copy16(\(.*?\));", text, re.S)
        assert found is not None
        return c_value(found[1], self.scope | {"two": two, "cell": cell})

    def come(self, pending: int) -> None:
        """What all but the last groups have asked for."""
        while len(self.groups) > pending:
            for to, slot in self.groups.pop(0):
                assert 0 <= to <= self.warp["pairs"] - self.scope["kRowBytes"]
                self.memory[to] = slot

    def add_up(self, number: int, pairs: tuple[int, int]) -> list[tuple[int, list[int]]]:
        """Tokens, and slots of their contributions in the order of the additions, of a half."""
        scope = self.warp | {"threadIdx": SimpleNamespace(x=64 + number * 16)}
        scope["found"] = SimpleNamespace(half=pairs[0], all=pairs[1])
        names = "half lane begin count"
        scope = c_locals(DOWN, "void add_up(", names, scope)
        assert (scope["half"], scope["lane"]) == (number, 0)
        scope["this"] = SimpleNamespace(**{n: self.warp[n] for n in ("cells", "pairs", "tokens")})
        for name in ("cells", "pairs", "tokens"):
            text = c_find(DOWN, ("void add_up(",), name).replace("this->", "this.")
            self.scope = self.warp | {**scope, name: c_value(text, scope)}
            scope[name] = self.scope[name]
        count = scope["count"]
        for i in range(self.scope["kPairs"]):
            self.ask(i, count)
        sums, total = [], []
        for i in range(count):
            self.come(self.pending)
            cell = self.value("async_copy_wait", "cell", i=i)
            two = self.value("async_copy_wait", "two", i=i)
            assert self.memory[cell] == two.x == two.y - 1, "another contribution"
            total.append(two.x)
            if two.w != 0:
                at = cell + self.scope["kRowBytes"]
                assert self.memory[at] == two.z == two.w - 1, "another contribution"
                total.append(two.z)
            token = self.value("async_copy_wait", "token", i=i)
            self.ask(self.value("async_copy_wait", "ask(", i=i), count)
            if token >= 0:
                sums.append((token, total))
                total = []
        assert not any(self.groups) and not total
        return sums
