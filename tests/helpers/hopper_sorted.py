"""The prefill path on tokens in the order of the list, on the CPU: the list, slices and items.

Constants and index expressions are the kernels' own; the statements around them follow them.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from kernel_source import c_constants, c_find, c_locals, c_value

ROUTE, SORT, SHARED = "prefill_route.cu", "prefill_sort.cuh", "prefill.cuh"
UP, DOWN, TABLES = "prefill_up.cu", "prefill_down.cu", "prefill_tables.cuh"
SIZES = {"sizeof": int, "Owner": 16, "Part": 8}
ROUTED = c_constants(ROUTE, {})


def constants(source: str, stage_k: int, **more: int) -> dict[str, Any]:
    """What a matrix kernel's sources call their sizes, for weights with stages of ``stage_k``."""
    defines = {"W4_K": stage_k, "W4_TILES": 1, "W4_GROUP": 32, "W4_MINUS_EIGHT": 0, "W4_DYNAMIC": 0}
    defines |= {"W4_PER_WG": 1, "W4_WGS": 3, "W4_PANEL": 128, "W4_SORTED": 1, "W4_PARTS": 8}
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
        scope = {**ROUTED, "tokens": tokens, "lists": SimpleNamespace(together=1)}
        cut = c_locals(SORT, "Tiles of equal size", "least tiles size", scope)
        text = c_find(SORT, ("Tiles of equal size",), "out[i]")
        text = text.replace("Tile{", "(").replace("}", ")")
        for i in range(cut["tiles"]):
            scope = cut | {"first": first, "tid": expert, "i": i, "max": max}
            found = c_value(text, scope)
            tiles.append(Tile(len(tiles), *found[:3]))
        first += tokens
    return tiles


def list_places(counts: list[int]) -> list[int]:
    """``Place::tile`` of all rows of a list whose experts have so many."""
    places, tile, first = [], 0, 0
    for tokens in counts:
        scope = {**ROUTED, "tokens": tokens, "lists": SimpleNamespace(together=1)}
        cut = c_locals(SORT, "Tiles of equal size", "least tiles size", scope)
        # An expert without rows has none that ask for the size.
        scope = {"begins": SimpleNamespace(tile=tile, size=cut["size"])}
        packed = c_value(c_find(SORT, ("tiles[tid] = begins.tile",), "tiles[tid]"), scope)
        for i in range(tokens):
            scope = {"e": 0, "tiles": [packed], "counts": [first], "row": first + i}
            scope = c_locals(SORT, "u32 tile = 0", "at size", scope)
            places.append(c_locals(SORT, "at: among", "tile", scope)["tile"])
        tile, first = tile + cut["tiles"], first + tokens
    return places


@dataclass(frozen=True)
class Copy:
    """Of the ring: addresses in a stage, and in ``what``."""

    what: str
    to: int
    source: int
    size: int


def down_copies(
    c: dict[str, Any], item: SimpleNamespace, k: int, rows: int, b_rows: int
) -> list[list[Copy]]:
    """``produce_stages``: what all lanes copy for an item, for each stage.

    Args:
        c: constants.
        item: expert, block, first, count.
        k: columns.
        rows: of the weights.
        b_rows: of the tokens.
    """
    within = "void produce_stages"
    stages: list[list[Copy]] = [[] for _ in range(k // c["kStageK"])]
    p = SimpleNamespace(rows=rows, k=k, w=0, scales=0)
    fixed: dict[str, Any] = {**c, "p": p, "item": item, "b": 0, "rows": b_rows, "min": min}
    fixed |= {"ring": SimpleNamespace(stage=int), "place": SimpleNamespace(slot=0)}
    fixed |= {"weights": "weights", "tokens": "tokens"}
    expected = {
        "weights": c_find(TABLES, (within, "barrier_expect(weights, "), "barrier_expect("),
        "tokens": c_find(TABLES, (within,), "barrier_expect_all("),
    }
    for lane in range(32):
        names = "lane tiles stages kBlockTiles kPanels is_scale is_token mine row_bytes tile_bytes "
        names += "to row_tiles tile block beside"
        scope = c_locals(TABLES, within, names, fixed | {"threadIdx": SimpleNamespace(x=lane)})
        assert scope["stages"] == len(stages)
        inside = f"{within} > if (is_token)" + ("" if scope["is_token"] else " > else")
        scope = c_locals(TABLES, inside, "from bytes next next_cut here", scope)
        what = "tokens" if scope["is_token"] else "scales" if scope["is_scale"] else "codes"
        for step, stage in enumerate(stages):
            copy = c_value(c_find(TABLES, (within, "if (here)"), "bulk_copy("), scope)
            assert copy[3] == ("tokens" if what == "tokens" else "weights"), "another barrier"
            if scope["here"]:
                stage.append(Copy(what, *copy[:3]))
            scope["from"] += c_value(c_find(TABLES, (within,), "from +="), scope | {"step": step})
    for stage in stages:
        counted = {"weights": 0, "tokens": 0}
        for one in stage:
            counted["tokens" if one.what == "tokens" else "weights"] += one.size
        for name, text in expected.items():
            assert c_value(text, scope)[1] == counted[name], "bytes expected"
        assert c_value(expected["tokens"], scope)[2] == c["kTokenArrivals"]
    return stages


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
        scope: dict[str, Any] = {"p": self.p, "kWgs": 3, "max": max, "slots": slots, "tiles": tiles}
        scope["kRowBytes"] = 3 * 128
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
        return own | {"per_slice": self.per_slice, "kWgs": 3, "kRowBytes": 3 * 128}

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
