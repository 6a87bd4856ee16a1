"""E4M3 rows with a scale per 128 columns in the order of the list, without a GPU: from where they
are written to who multiplies. Index expressions are the kernels' own.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hopper_sorted import LISTED, ROUTE, ROUTED, SHARED, UP, constants, list_columns, list_tiles
from hopper_stages import span_row, stage_copies
from kernel_source import c_constants, c_find, c_locals, c_text, c_value

from sglang_w4afp8.kernels.hopper import launch_prefill, plan, plan_rows
from sglang_w4afp8.kernels.hopper.plan import CTA_SHARED_BYTES, Layer
from sglang_w4afp8.kernels.hopper.plan_prefill import BLOCK_ROWS, plan_prefill, takes_row_scales
from sglang_w4afp8.kernels.hopper.plan_rows import row_kernels

EP8 = Layer(32, 7168, 2048, 128, 128, 8, False, False)
COUNTS = [
    list(range(1, 193, 7)),
    [5, 0, 300, 1, 129, 0, 0, 1000, 64, 257, 3, 2, 1],
    [1],
    [0, 0, 4, 4, 3, 3],
]


def span_rows(room: int, experts: int) -> int:
    """What :mod:`launch_prefill` makes room for, for each span."""
    source = SimpleNamespace(
        plan=SimpleNamespace(room=room), layer=SimpleNamespace(experts=experts)
    )
    text = "plan.room + 4 * (layer.experts + 2)"
    with open(launch_prefill.__file__) as file:
        assert f"0 if t.x_scale is None else {text}" in file.read()
    rows: int = eval(text, vars(source))
    return rows


def scale_rows(counts: list[int]) -> list[int]:
    """``copy_rows``: where the scales of each row of the list are."""
    columns, experts = list_columns(counts), np.repeat(np.arange(len(counts)), counts)
    within, found = "void copy_rows( > const ListPlace place", []
    text = c_find(LISTED, ("void copy_rows(", "const ListPlace place"), "scale_of")
    for row, column in enumerate(columns):
        place = SimpleNamespace(column=column | int(experts[row]) << 3)
        at = c_locals(LISTED, within, "number expert", {"place": place})
        assert (at["number"], at["expert"]) == (column, experts[row])
        found.append(c_value(text, at | {"row": row, "span_row": span_row}))
    return found


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_scales_come_with_the_columns_that_they_are_of(counts: list[int]) -> None:
    hidden, group = 512, 128
    c = constants(UP, 128, W4_ROW_SCALES=1) | {"kGroup": group}
    room = -(-sum(counts) // BLOCK_ROWS) * BLOCK_ROWS
    stride, rows = span_rows(room, len(counts)), scale_rows(counts)
    assert len({*rows}) == len(rows) == sum(counts) and min(rows) >= 0 and max(rows) < stride
    memory = np.full((hidden // 128, stride), -1)
    for row, at in enumerate(rows):
        memory[:, at] = row + 100_000 * np.arange(hidden // 128)
    for tile in list_tiles(counts):
        item = SimpleNamespace(first=tile.first, count=tile.count, block=0, expert=tile.expert)
        stages = stage_copies(c, item, hidden, 128, stride)
        assert len(stages) == hidden // 128
        for span, copies in enumerate(stages):
            (one,) = (copy for copy in copies if copy.what == "column scales")
            assert one.source % 16 == one.size % 16 == one.to % 16 == 0
            assert one.to + one.size <= c["kStageBytes"] and one.source >= 0
            first = one.source // 4
            assert first + one.size // 4 <= memory.size, "past the end"
            there = np.full(c["kTokens"], -2)
            there[: one.size // 4] = memory.ravel()[first : first + one.size // 4]
            wanted = tile.first + np.arange(tile.count) + 100_000 * span
            assert (there[: tile.count] == wanted).all()


def test_each_thread_reads_the_scales_of_its_columns() -> None:
    """wgmma's accumulators: value i of a thread is of column i / 4 · 8 + 2 · (lane % 4) + i % 2."""
    within = ("void add(", "if constexpr (kRowScales)")
    address = c_find(SHARED, within, "lds64(")
    for lane in range(32):
        at: dict[str, Any] = {"here": 0, "kColumnScalesAt": 0, "mine": SimpleNamespace(lane=lane)}
        columns = c_value(c_find(SHARED, ("void multiply(",), "columns"), at)
        for i in range(0, 96, 4):
            byte = c_value(address, {"columns": columns, "c": i})
            assert byte == (i // 4 * 8 + 2 * (lane % 4)) * 4 and byte % 8 == 0
    text = " ".join(c_text(SHARED).split())
    assert "to[0] += v[0] * t0 * s0, to[1] += v[1] * t1 * s0; to[2] += v[2] * t0 * s1, " in text
    assert "to[3] += v[3] * t1 * s1;" in text


def test_lanes_gather_every_scale_once() -> None:
    c = constants(UP, 128, W4_ROW_SCALES=1)
    mine = c_value(c_find(UP, ("struct GatheredScales",), "kMine"), c)
    first = c_find(UP, ("auto produce = [&]",), "first")
    seen = []
    for warp in (2, 3):
        for lane in range(32):
            at = {**c, "warp": warp, "threadIdx": SimpleNamespace(x=256 + 32 * warp + lane)}
            begin = c_value(first, at)
            for i in range(mine):
                scope = {"first": begin, "i": i}
                column = c_locals(UP, "void find(const int* pairs", "c", scope)["c"]
                to = c_value(
                    c_find(UP, ("void copy(u32 to",), "async_copy4(").split(", ")[0],
                    scope | {"to": 0},
                )
                assert to == column * 4
                seen.append(column)
    assert sorted(seen) == list(range(c["kTokens"]))


@pytest.mark.parametrize("hidden", [128, 384, 640, 7168])
@pytest.mark.parametrize("together", [4, 7])
def test_rows_are_copied_as_the_matrix_unit_wants_them(hidden: int, together: int) -> None:
    """Where ``write_rows`` would put the same columns, 16 instead of 8 of them at a time."""
    counts = [5, 0, 300, 9]
    columns = list_columns(counts)
    p = SimpleNamespace(hidden=hidden, panel=128, xq=0)
    lanes = np.arange(32)
    written = {}
    for row in (0, 4, 5, 11, 304, 305, 313):
        scope: dict[str, Any] = {**ROUTED, "p": p, "first": 0, "r": row, "lane": lanes}
        scope |= {"kTogether": together, "number": columns[row], "row": row}
        text = c_find(LISTED, ("void copy_rows(", "token_of = pair"), "key_of")
        scope["key"] = c_value(text, scope)
        names = "kWarpColumns kStep column in_panel"
        at = c_locals(LISTED, "void copy_rows( > constexpr int kWarpColumns", names, scope)
        to = c_value(c_find(LISTED, ("void copy_rows(",), "u8* to"), at)
        left, source = hidden - at["column"], at["column"].copy()
        while (left > 0).any():
            for i in range(together):
                here = i * at["kWarpColumns"] < left
                for begin, column in zip(to[here], source[here], strict=True):
                    for byte in range(16):
                        key = int(begin + i * at["kStep"] + byte)
                        assert key not in written, "two in one place"
                        written[key] = (row, int(column + i * at["kWarpColumns"] + byte))
            to = to + together * at["kStep"]
            source, left = (
                v + s * together * at["kWarpColumns"] for v, s in ((source, 1), (left, -1))
            )
    for address, (row, column) in written.items():
        panel, in_panel = divmod(column, 128)
        block = row // BLOCK_ROWS * BLOCK_ROWS * hidden
        piece = (in_panel // 16) ^ columns[row] % 8
        line = panel * BLOCK_ROWS + row % BLOCK_ROWS
        assert address == block + line * 128 + piece * 16 + in_panel % 16
    assert len(written) == 7 * hidden


def test_route_and_gate_and_up_copy_instead_of_quantising() -> None:
    text = " ".join(c_text(ROUTE).split())
    assert "} else if (!kRowScales) {" in text, "rows that are gathered stay where they are"
    assert "if constexpr (kCopied) { copy_rows<kTogether>(p, first, count); } else {" in text
    assert "write_listed<kRowScales>(p.listed, *p.total," in c_text(UP)


LAYERS = [
    EP8,
    Layer(32, 7168, 2048, 32, 64, 8, True, True),
    Layer(8, 1024, 512, 64, 64, 4, True, False),
    Layer(16, 640, 320, 32, 64, 8, False, True),
]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_stages_fit_with_the_scales_of_columns(layer: Layer) -> None:
    assert takes_row_scales(layer)
    chosen = plan_prefill(layer, 4096, 132, True)
    up = chosen.launches[1]
    defines = dict(up.kernel.defines)
    assert defines["W4_ROW_SCALES"] == 1
    c = c_constants(UP, {**defines, "sizeof": int, "Owner": 16, "Part": 8})
    assert c["kColumnScalesAt"] + c["kTokens"] * 4 <= c["kStageBytes"]
    assert c["kColumnScalesAt"] % 16 == 0
    bars = c["kBars"] * up.ring + c["kQueue"] * plan.BARRIER_BYTES
    assert up.ring >= 3 and up.shared_bytes >= 1024 + up.ring * c["kStageBytes"] + bars
    assert up.shared_bytes + c["kWgs"] * c["kGatherBytes"] <= CTA_SHARED_BYTES
    others = plan_prefill(layer, 4096, 132)
    assert chosen.launches[2] == others.launches[2], "down is the same kernel"
    assert dict(chosen.launches[0].kernel.defines) == {"W4_ROW_SCALES": 1}
    assert not others.launches[0].kernel.defines
    assert {launch.kernel for launch in chosen.launches} <= {*row_kernels(layer, 132)}


@pytest.mark.parametrize(
    "layer",
    [
        Layer(32, 7168, 256, 128, 128, 8, False, False),  # CTAs of down own outputs
        Layer(8, 384, 512, 64, 64, 4, True, False),  # stages of 192 columns
        Layer(64, 7168, 2048, 128, 128, 33, False, False),
    ],
    ids=str,
)
def test_other_layers_take_large(layer: Layer) -> None:
    assert not takes_row_scales(layer)
    assert not any("W4_ROW_SCALES" in dict(k.defines) and "prefill" in k.source
                   for k in plan_rows.row_kernels(layer, 132))  # fmt: skip
