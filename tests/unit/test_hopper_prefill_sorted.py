"""Tokens in the order of the list, without a GPU: from where they are written to the matrix unit.

Index expressions are the kernels' own. What they are held against: wgmma's operands as the PTX ISA
has them.
"""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hopper_sorted import (
    DOWN,
    LISTED,
    ROUTE,
    ROUTED,
    SHARED,
    UP,
    Tile,
    constants,
    list_columns,
    list_tiles,
)
from hopper_stages import stage_copies, token_copies
from kernel_source import c_find, c_locals, c_text, c_value

from sglang_w4afp8.kernels.hopper.plan import Layer
from sglang_w4afp8.kernels.hopper.plan_prefill import (
    BLOCK_ROWS,
    SORTED_TOKENS,
    _panel,
    plan_prefill,
)

UNIT = 4
"""Bytes that are looked at together: scales for each token make a row of q in such pieces."""
COUNTS = {
    "every count of a tile": list(range(1, SORTED_TOKENS + 1)),
    "several tiles of an expert": [5, 0, 300, 1, 129, 0, 0, 1000, 64, 257],
    "a whole block": [64, 128, 64, 8, 56],
    "one row": [1],
}
CUTS = [(512, 256), (384, 128), (384, 192), (320, 64)]
"""Columns, and those of the layout's stages."""


def write(memory: np.ndarray, address: np.ndarray, row: np.ndarray, column: np.ndarray) -> None:
    """Columns of rows, UNIT at a time."""
    at = np.broadcast_to(address, np.broadcast_shapes(row.shape, column.shape))
    assert (at % UNIT == 0).all() and at.min() >= 0 and at.max() < len(memory) * UNIT
    at = at // UNIT
    assert len(np.unique(at)) == at.size, "two in one place"
    assert (memory[at] == -1).all()
    memory[at] = row * 10_000 + column


def written_x(counts: list[int], hidden: int, panel: int, room: int) -> np.ndarray:
    """``write_rows``, for all pairs of a list."""
    numbers = list_columns(counts)
    memory = np.full(room * hidden // UNIT, -1)
    p = SimpleNamespace(panel=panel, hidden=hidden, xq=0)
    within = "void write_rows("
    scope: dict[str, Any] = {**ROUTED, "p": p, "kTogether": 4, "first": 0}
    lanes = np.arange(32)[:, None]
    for row, number in enumerate(numbers):
        at = scope | {"lane": lanes, "r": row}
        names = "kStep column in_panel row block"
        at = c_locals(LISTED, f"{within} > constexpr int kStep", names, at)
        # The lane that looks the row up multiplies its column's number for the swizzle.
        text = c_find(LISTED, (within, "token_of = pair"), "key_of")
        at["key"] = c_value(text.replace("column", "number"), at | {"number": number})
        begins = c_value(c_find(LISTED, (within,), "u8* to"), at)
        left = hidden - at["column"]
        together, steps = 4, -(-hidden // (4 * ROUTED["kRowColumns"]))
        for step in range(steps):
            for i in range(together):
                here = (left > i * ROUTED["kRowColumns"]).ravel()
                chunk = step * together + i
                columns = at["column"][here] + chunk * ROUTED["kRowColumns"]
                for half in range(8 // UNIT) if here.any() else ():
                    address = begins[here] + i * at["kStep"] + half * UNIT
                    write(memory, address, np.full_like(columns, row), columns + half * UNIT)
            begins = begins + together * at["kStep"]
            left = left - together * ROUTED["kRowColumns"]
    return memory


def written_q(counts: list[int], inner: int, panel: int, q_rows: int) -> np.ndarray:
    """Gate and up, for all pairs of a list."""
    c = constants(UP, 128, W4_PANEL=panel)
    memory = np.full(q_rows * inner // UNIT, -1)
    columns = np.arange(0, inner, UNIT)[None, :]
    p = SimpleNamespace(q=0, q_rows=q_rows)
    for tile in list_tiles(counts):
        places = np.arange(tile.count)[:, None]
        scope: dict[str, Any] = {**c, "first_column": tile.first, "c": places}
        scope = c_locals(UP, "int row_of(", "row", scope)
        row = c_value(c_find(UP, ("int row_of(",), "return"), scope)
        scope = {**c, "p": p, "row": row, "column": columns, "kColumns": panel}
        scope = c_locals(UP, "u8* q_piece", "number key at", scope)
        address = c_value(c_find(UP, ("u8* q_piece", "u64 at"), "return"), scope)
        write(memory, address, tile.first + places, columns)
    return memory


def copies(c: dict[str, Any], tile: Tile, k: int, rows: int) -> list[list[tuple[int, int, int]]]:
    """``produce_stages``: to, from and bytes of tokens, for each stage."""
    item = SimpleNamespace(first=tile.first, count=tile.count, block=0, expert=0)
    return [
        [(one.to, one.source, one.size) for one in stage if one.what == "tokens"]
        for stage in stage_copies(c, item, k, 128, rows)
    ]


def check_tile(c: dict[str, Any], memory: np.ndarray, tile: Tile, **how: Any) -> None:
    """All that the matrix unit reads of a tile's tokens is what was written for them."""
    for step, found in enumerate(copies(c, tile, **how)):
        stage = np.full(c["kStageBytes"] // UNIT, -1)
        for to, source, size in found:
            # What a bulk copy asks for.
            assert to % 16 == source % 16 == size % 16 == 0 and size > 0
            assert to >= 0 and to + size <= c["kTokenBytes"]
            assert source >= 0 and source + size <= len(memory) * UNIT, "past the end"
            assert (stage[to // UNIT : (to + size) // UNIT] == -1).all(), "a byte twice"
            stage[to // UNIT : (to + size) // UNIT] = memory[source // UNIT :][: size // UNIT]
        row, units = np.arange(tile.count)[:, None], np.arange(0, 32, UNIT)[None, :]
        for j in range(c["kStageK"] // 32):
            scope = c_locals(SHARED, "panel_descriptor", "kSwizzle", {**c, "address": 0, "j": j})
            descriptor = c_value(c_find(SHARED, ("u64 panel_descriptor",), "return"), scope)
            descriptor += c_value(c_find(SHARED, ("u64 column_step",), "return"), scope)
            # PTX ISA: rows of 128 or 64 bytes, 8 of them every so many; address bits are swapped.
            begin, eight = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
            row_bytes, mask = {1: (128, 7), 2: (64, 3)}[descriptor >> 62]
            at = begin + row // 8 * eight + row % 8 * row_bytes + units
            at ^= (at >> 7 & mask) << 4
            column = step * c["kStageK"] + j * 32 + units
            wanted = (tile.first + row) * 10_000 + column
            assert (stage[at // UNIT] == wanted).all(), (tile, step, j)
            # The same in the words of prefill_ring.cuh.
            in_panel = (j * 32 + units) % c["kPanel"]
            key = row % 8 if c["kPanel"] == 128 else row // 2 % 4
            panel = (j * 32 + units) // c["kPanel"] * c["kTokens"] * c["kPanel"]
            again = panel + row * c["kPanel"] + (in_panel // 16 ^ key) * 16 + in_panel % 16
            assert (again == at).all()


@pytest.mark.parametrize(("hidden", "stage_k"), CUTS)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_the_matrix_unit_reads_the_rows_of_x_that_route_wrote(
    hidden: int, stage_k: int, counts: list[int]
) -> None:
    c = constants(UP, stage_k)
    assert c["kPanel"] == _panel(stage_k), "another panel than route is told"
    room = -(-sum(counts) // BLOCK_ROWS) * BLOCK_ROWS  # all of it in use, so that none is beyond
    memory = written_x(counts, hidden, c["kPanel"], room)
    for tile in list_tiles(counts):
        check_tile(c, memory, tile, k=hidden, rows=room)


@pytest.mark.parametrize(("inner", "stage_k"), CUTS)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_the_matrix_unit_reads_the_rows_of_q_that_gate_and_up_wrote(
    inner: int, stage_k: int, counts: list[int]
) -> None:
    c = constants(DOWN, stage_k)
    assert c["kPanel"] == _panel(stage_k)
    q_rows = sum(counts) + 3
    memory = written_q(counts, inner, _panel(stage_k), q_rows)
    for tile in list_tiles(counts):
        check_tile(c, memory, tile, k=inner, rows=q_rows)


@pytest.mark.parametrize(("blocks", "stage_k"), [(b, k) for b in (True, False) for _, k in CUTS])
def test_the_pieces_of_a_panel_are_all_of_a_tile(blocks: bool, stage_k: int) -> None:
    """Wherever a tile begins; the lists above have tiles at few places of a block."""
    c = constants(UP if blocks else DOWN, stage_k)
    for first in range(0, 2 * c["kBlockRows"]):
        for count in (1, 7, 8, 127, 128, 129, c["kTokens"]):
            copies(c, Tile(0, 0, first, count), stage_k, 4096)  # all bytes, else it fails
            item = SimpleNamespace(first=first, count=count)
            assert sum(size for _, _, size in token_copies(c, item, stage_k, 4096)[:-1]) > 0


def test_tiles_begin_where_the_swizzle_does() -> None:
    order = random.Random(5)
    for _ in range(40):
        counts = [order.choice((0, 1, 17, 128, 129, order.randint(1, 900))) for _ in range(9)]
        tiles, columns = list_tiles(counts), list_columns(counts)
        assert len(columns) == sum(tile.count for tile in tiles) == sum(counts)
        for tile in tiles:
            assert 0 < tile.count <= SORTED_TOKENS
            assert (tile.first - sum(counts[: tile.expert])) % 8 == 0
            for i in range(tile.count):
                assert columns[tile.first + i] == i % 8


@pytest.mark.parametrize("hidden", [64, 128, 320, 4096, 7168, 7232])
def test_threads_of_route_have_every_column_once(hidden: int) -> None:
    scope = {**ROUTED, "p": SimpleNamespace(tokens=99), "first": 0}
    within = "void quantize_rows"
    together = c_locals(ROUTE, within, "kTogether", scope)["kTogether"]
    assert "begin += kTogether * kRowThreads * 8)" in c_text(ROUTE)
    step = together * ROUTED["kRowThreads"] * 8
    seen = []
    for tid in range(ROUTED["kRowThreads"]):
        at = c_locals(ROUTE, within, "at", scope | {"tid": tid})
        for begin in range(0, hidden, step):
            for i in range(together):
                scope = at | {"begin": begin, "i": i}
                seen.append(c_locals(ROUTE, f"{within} > uint4 v[", "column", scope)["column"])
    assert sorted(column for column in seen if column < hidden) == list(range(0, hidden, 8))


def test_blocks_of_rows_are_whole_in_memory() -> None:
    """The last row of a list may be anywhere in its block, and the block has room for it."""
    assert ROUTED["kBlockRows"] == BLOCK_ROWS
    layer = Layer(16, 512, 512, 128, 128, 4, False, False)
    for tokens in (1, 13, 64, 1000, 4097):
        assert plan_prefill(layer, tokens, 132).room % BLOCK_ROWS == 0
