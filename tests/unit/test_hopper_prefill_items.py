"""The prefill path without a GPU: the order of its items, and what a warp adds up.

Constants and most index expressions are the kernels' own (``tests/helpers/kernel_source.py``); the
statements around them follow ``prefill_ring.cuh``, ``prefill_up.cu`` and ``prefill_down.cu``.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_source import c_constants, c_find, c_locals, c_value

from sglang_w4afp8.kernels.hopper import plan_prefill

UP, DOWN, RING = "prefill_up.cu", "prefill_down.cu", "prefill_ring.cuh"
Item = dict[str, int]


class DownScope:
    """The functions of prefill_down.cu that count items, from their source."""

    def __init__(self, p: SimpleNamespace) -> None:
        names: dict[str, Any] = {"blocks_of": self.blocks_of, "list_tokens": self.list_tokens}
        names["sum_tokens"] = self.sum_tokens
        defines = {"W4_K": 256, "W4_TILES": 1, "W4_GROUP": 128, "W4_PER_WG": 2}
        constants = c_constants(DOWN, defines | {"W4_MINUS_EIGHT": 0, "W4_DYNAMIC": 0})
        self.scope = {**constants, **names, "sum_items": self.sum_items, "p": p}
        self.scope |= {"kEnd": 0, "kMatrix": 1, "kCombine": 2}

    def blocks_of(self, p: SimpleNamespace, slice: int) -> int:
        scope = c_locals(DOWN, "int blocks_of", "blocks", self.scope | {"slice": slice})
        return int(c_value(c_find(DOWN, ("int blocks_of",), "return"), scope))

    def list_tokens(self, p: SimpleNamespace, list: int) -> int:
        text = c_find(DOWN, ("int list_tokens",), "return")
        return int(c_value(text, self.scope | {"list": list}))

    def sum_tokens(self, p: SimpleNamespace) -> int:
        return int(c_value(c_find(DOWN, ("int sum_tokens",), "return"), self.scope))

    def sum_items(self, p: SimpleNamespace, list: int, blocks: int) -> int:
        scope = self.scope | {"list": list, "blocks": blocks}
        scope = c_locals(DOWN, "int sum_items", "tokens", scope)
        return int(c_value(c_find(DOWN, ("int sum_items",), "return"), scope))


def fields(source: str, within: str, names: str, scope: dict[str, object]) -> Item:
    return {
        name: c_value(c_find(source, tuple(within.split(" > ")), f"item.{name}"), scope)
        for name in names.split()
    }


def down_items(p: SimpleNamespace) -> Iterator[Item]:
    """``Order`` of prefill_down.cu."""
    fixed, step, begin, number = DownScope(p).scope, 0, 0, 0
    while True:
        names = "slice list blocks matrix old_list old_slice old_blocks sums at"
        scope = fixed | {"step": step, "begin": begin, "number": number}
        s = c_locals(DOWN, "struct Order", names, scope)
        if s["at"] < s["matrix"]:
            s = c_locals(DOWN, "if (at < matrix)", "i tile", s)
            names = "kind expert first count slice step list block"
            yield fields(DOWN, "if (at < matrix)", names, s)
        elif s["at"] < s["matrix"] + s["sums"]:
            s = c_locals(DOWN, "if (at < matrix + sums)", "i", s)
            yield fields(DOWN, "if (at < matrix + sums)", "kind first step list slice block", s)
        elif step == p.slices * p.lists:
            return
        else:
            begin, step = begin + s["matrix"] + s["sums"], step + 1
            continue
        number += 1


def some_tiles(header: list[int], max_tiles: int) -> list[SimpleNamespace]:
    tiles = [SimpleNamespace(expert=-1, first=-1, count=-1)] * (len(header) * max_tiles)
    for number, count in enumerate(header):
        for i in range(count):
            tile = SimpleNamespace(expert=i // 2, first=i * 100, count=100)
            tiles[number * max_tiles + i] = tile
    return tiles


@pytest.mark.parametrize(
    ("header", "rows", "slice_blocks", "list_tokens", "tokens", "warp_tokens"),
    [
        ([5], 640, 1, 70, 70, 4),
        ([7], 7168, 8, 1, 1, 16),
        ([3, 0, 9], 704, 2, 64, 160, 8),
        ([0, 0], 64, 1, 512, 1000, 16),
        ([4, 2, 1, 6], 2048, 3, 96, 300, 4),
    ],
)
def test_down_waits_for_earlier_items_only(
    header: list[int],
    rows: int,
    slice_blocks: int,
    list_tokens: int,
    tokens: int,
    warp_tokens: int,
) -> None:
    blocks = -(-rows // 256)
    p = SimpleNamespace(
        header=header, weights=SimpleNamespace(rows=rows), slice_blocks=slice_blocks,
        lists=len(header), list_tokens=list_tokens, tokens=tokens, max_tiles=11,
        warp_tokens=warp_tokens, slices=-(-blocks // slice_blocks),
        tiles=some_tiles(header, 11), done=0,
    )  # fmt: skip
    counts = DownScope(p).scope
    items = list(down_items(p))
    matrix = [item for item in items if item["kind"] == counts["kMatrix"]]
    sums = [item for item in items if item["kind"] == counts["kCombine"]]
    wanted = sorted((n, i * 100, b) for n, k in enumerate(header) for i, b in
                    product(range(k), range(blocks)))  # fmt: skip
    assert sorted((i["list"], i["first"], i["block"]) for i in matrix) == wanted
    assert all(i["expert"] == i["first"] // 200 and i["count"] == 100 for i in matrix)
    assert sorted((i["list"] * list_tokens + i["first"], i["block"]) for i in sums) == sorted(
        (number * list_tokens + first, block)
        for number in range(len(header))
        for first in range(0, min(list_tokens, tokens - number * list_tokens), 8 * warp_tokens)
        for block in range(blocks)
    )
    # What is counted when each item begins to wait: all before it. Both warpgroups count.
    done: dict[int, int] = {}
    for item in items:
        step, slice = item["step"], item["slice"]
        assert step == slice * p.lists + item["list"]
        assert 0 <= item["block"] - slice * slice_blocks < counts["blocks_of"](p, slice)
        is_sum = item["kind"] == counts["kCombine"]
        old = step - counts["kBuffers"]
        if is_sum or old >= 0:
            text = c_find(DOWN, ("void sum()" if is_sum else "void run()",), "wait_count(")
            scope = counts | {"step": step, "old": old, "slice": slice, "list": item["list"]}
            count, target = c_value(text, scope)
            assert done.get(count, 0) == target, "waits for an item that comes later"
        done[step * 2 + is_sum] = done.get(step * 2 + is_sum, 0) + 2
    assert len(done) <= 2 * p.slices * p.lists and max(done) < 2 * p.slices * p.lists


@pytest.mark.parametrize("top_k", [1, 2, 7, 8, 9, 16, 17, 40, plan_prefill.MAX_TOP_K])
@pytest.mark.parametrize("warp_tokens", plan_prefill.WARP_TOKENS)
def test_contributions_of_a_warp_have_room(top_k: int, warp_tokens: int) -> None:
    """``find_pairs``: places in the warp's list, and the token in the high byte of a row."""
    p = SimpleNamespace(top_k=top_k, warp_tokens=warp_tokens)
    scope = c_locals(DOWN, "void sum()", "at_once", DownScope(p).scope | {"max": max})
    room = scope["kWarpPairs"]
    assert room == plan_prefill.MAX_TOP_K
    assert 0 < scope["at_once"] <= warp_tokens <= scope["kWarpTokens"] < 256
    assert scope["at_once"] * top_k <= room
    found: list[tuple[int, int]] = []
    here = [bool(n) for n in torch.randint(0, 2, (scope["at_once"] * top_k,)).tolist()]
    for begin in range(0, len(here), 32):
        lanes = range(begin, min(begin + 32, len(here)))
        ballot = {"valid": sum(here[i] << i - begin for i in lanes), "count": len(found)}
        at_lanes: list[tuple[int, int]] = []
        for i in (i for i in lanes if here[i]):
            more = {"lane": i - begin, "__popc": int.bit_count}
            at = c_value(c_find(DOWN, ("int find_pairs",), "at"), scope | ballot | more)
            assert at == len(found) + len(at_lanes) < room
            at_lanes.append((i, c_value("i / p.top_k", scope | {"i": i})))
        found += at_lanes
    assert [token for _, token in found] == [i // top_k for i, yes in enumerate(here) if yes]


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("tokens", [1, 5, 16])
def test_every_token_is_stored_once_with_its_experts(tokens: int, share: float) -> None:
    """``add_up``: tokens without a contribution, too, and batches that end within a token."""
    at_once = DownScope(SimpleNamespace()).scope["kAtOnce"]
    here = torch.rand(tokens, 8) < share
    found = [(token, k) for token in range(tokens) for k in range(8) if here[token, k]]
    stored: list[list[int]] = []
    total: list[int] = []

    def finish(before: int) -> None:
        nonlocal total
        while len(stored) < before:
            stored.append(total)
            total = []

    for begin in range(0, len(found), at_once):
        for token, k in found[begin : begin + at_once]:
            finish(token)
            total.append(k)
    finish(tokens)
    assert stored == [torch.nonzero(row).flatten().tolist() for row in here]


def up_items(p: SimpleNamespace, row_tiles: int, cluster: int, block: int) -> list[Item]:
    """``Order`` of prefill_up.cu in the CTA ``block``: items by their numbers."""
    fixed = {"p": p, "kRowTiles": row_tiles, "kMatrix": 1, "kCluster": cluster}
    fixed["blockIdx"] = SimpleNamespace(x=block)
    begin, items = 0, list[Item]()
    for at_list in range(len(p.header)):
        while True:
            scope = fixed | {"list": at_list, "begin": begin, "number": len(items)}
            s = c_locals(UP, "struct Order", "blocks items at", scope)
            if s["at"] >= s["items"]:
                begin += s["items"]
                break
            s = c_locals(UP, "if (at < items)", "i tile", s)
            items.append(fields(UP, "if (at < items)", "expert first count tile block list", s))
    return items


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


def dealt(items: int, grid: int, block: int) -> list[int]:
    """``claim`` of a CTA of a cluster of two: the numbers of its items."""
    scope = {"kCluster": 2, "blockIdx": SimpleNamespace(x=block)}
    scope["gridDim"] = SimpleNamespace(x=grid)
    after = c_find(RING, ("void claim",), "return")
    number = c_value(c_find(RING, ("void claim",), "u32 next"), scope)
    found = []
    while number < items:
        found.append(number)
        number = c_value(after, scope | {"before": number})
    return found


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
