"""The prefill path without a GPU: the sort of its pairs and the order of its items.

Constants and most index expressions are the kernels' own (``tests/helpers/kernel_source.py``); the
statements around them follow ``prefill_route.cu``, ``prefill_up.cu`` and ``prefill_down.cu``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby, product
from types import SimpleNamespace

import pytest
import torch
from kernel_source import c_constants, c_find, c_locals, c_value

from sglang_w4afp8.kernels.hopper import plan_prefill
from sglang_w4afp8.kernels.hopper.plan import MAX_EXPERTS, Layer
from sglang_w4afp8.kernels.hopper.plan_prefill import Lists, PrefillPlan
from sglang_w4afp8.kernels.hopper.plan_prefill import plan_prefill as planned

# ---- route ---------------------------------------------------------------------------------------
C = c_constants("prefill_route.cu", {})
Tile = tuple[int, int, int]


def cut_tiles(expert: int, first: int, tokens: int, lists: SimpleNamespace) -> list[Tile]:
    """The tiles of one expert's pairs, which begin at ``first``."""
    scope = {**C, "tokens": tokens, "lists": lists, "tid": expert, "first": first}
    cut = c_locals("prefill_route.cu", "Tiles of equal size", "least tiles size", scope)
    text = c_find("prefill_route.cu", ("Tiles of equal size",), "out[i]")
    text = text.replace("Tile{", "(").replace("}", ")")
    return [c_value(text, cut | {"i": i})[:3] for i in range(cut["tiles"])]


class Route:
    """``sort_part`` of all blocks; what it writes, as dictionaries from index to value."""

    def __init__(self, ids: list[int], layer: Layer, plan: PrefillPlan) -> None:
        self.ids, self.plan, self.part = ids, plan, C["kPart"]
        self.place: dict[int, int] = {}
        several = plan.up != plan.down
        kinds = {"up": plan.up} | ({"down": plan.down} if several else {})
        self.columns: dict[str, dict[int, int]] = {name: {} for name in kinds}
        self.tiles: dict[str, dict[tuple[int, int], Tile]] = {name: {} for name in kinds}
        self.header: dict[str, dict[int, int]] = {name: {} for name in kinds}
        self.parts = {n: -(-one.tokens * layer.top_k // self.part) for n, one in kinds.items()}
        local = [[e if 0 <= e < layer.experts else -1 for e in part] for part in self.split(ids)]
        ranks = []
        self.counts = []
        for experts in local:
            count, rank = [0] * MAX_EXPERTS, {}
            for i in torch.randperm(len(experts)).tolist():  # atomics come in any order
                if experts[i] >= 0:
                    rank[i] = count[experts[i]]
                    count[experts[i]] += 1
            ranks.append(rank)
            self.counts.append(count)
        for part, experts in enumerate(local):
            begins = {name: self.place_part(name, part) for name in kinds}
            for i, e in enumerate(experts):
                pair = part * self.part + i
                at = -1
                if e >= 0:
                    for name, first in begins.items():
                        p = SimpleNamespace(
                            **{name: SimpleNamespace(columns=0, parts=self.parts[name])}
                        )
                        scope = {**C, "p": p, "part": part, "several": several, "nullptr": 0}
                        start = c_locals("prefill_route.cu", "void sort_part", name, scope)[name]
                        at = first[e] + ranks[part][i]
                        assert start + at not in self.columns[name], "two pairs in one place"
                        self.columns[name][start + at] = pair
                self.place[pair] = at

    def split(self, values: list[int]) -> Iterator[list[int]]:
        for begin in range(0, len(values), self.part):
            yield values[begin : begin + self.part]

    def place_part(self, name: str, part: int) -> list[int]:
        lists = SimpleNamespace(parts=self.parts[name], together=getattr(self.plan, name).together)
        p = SimpleNamespace(sorters=len(self.counts))
        scope = {**C, "part": part, "lists": lists, "p": p}
        s = c_locals("prefill_route.cu", "int place_part", "list first_part last_part", scope)
        first = tile = 0
        begins = []
        for tid in range(MAX_EXPERTS):
            in_list = range(s["first_part"], s["last_part"])
            tokens = sum(self.counts[i][tid] for i in in_list)
            before = sum(self.counts[i][tid] for i in in_list if i < part)
            begins.append(first + before)
            if tokens and part == s["first_part"]:
                found = cut_tiles(tid, first, tokens, lists)
                for i, one in enumerate(found):
                    key = s["list"], tile + i
                    assert key not in self.tiles[name]
                    self.tiles[name][key] = one
                tile += len(found)
            first += tokens
        if part == s["first_part"]:
            self.header[name][s["list"]] = tile
        return begins


def skewed(pairs: int, experts: int) -> list[int]:
    squares = torch.rand(pairs) ** 4 * experts
    return squares.int().tolist()


ROUTES: list[tuple[int, int, int, Callable[[int, int], list[int]]]] = [
    (1, 8, 256, lambda n, e: list(range(n))),
    (700, 8, 256, skewed),
    (700, 6, 16, lambda n, e: torch.randint(-1, 4 * e, (n,)).tolist()),  # others' experts, too
    (5000, 3, 40, skewed),
    (9000, 1, 8, lambda n, e: [3] * n),
    (1500, 6, 16, lambda n, e: [-1] * n),
    (1600, 8, 512, lambda n, e: torch.randint(0, e, (n,)).tolist()),
]


@pytest.mark.parametrize("together", [1, 2])
def test_tiles_of_an_expert_are_shared_out(together: int) -> None:
    """For every number of tokens: whole clusters, each with tokens, and of about equal size."""
    for tokens in range(1, 5000):
        tiles = cut_tiles(7, 100, tokens, SimpleNamespace(together=together))
        counts = [count for _, _, count in tiles]
        assert len(tiles) % together == 0 and len(tiles) - together < -(-tokens // C["kTokens"])
        assert sum(counts) == tokens and 0 <= min(counts) <= max(counts) <= C["kTokens"]
        assert all(counts[::together]), "a cluster without work"
        full = [count for count in counts if count]
        assert len(counts) - len(full) < together and counts[: len(full)] == full
        assert len({*full[:-1]}) <= 1 and all(count % 16 == 0 for count in full[:-1])
        assert max(counts) - tokens / len(tiles) < 16, "wider than an equal share needs"
        at = 100
        for expert, first, count in tiles:
            assert expert == 7 and (first == at or count == 0)
            at += count


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize(("tokens", "top_k", "experts", "make"), ROUTES)
def test_every_pair_is_in_one_tile_of_its_expert(
    tokens: int,
    top_k: int,
    experts: int,
    make: Callable[[int, int], list[int]],
    together: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(tokens)
    layer = Layer(experts, 7168, 256, 128, 128, top_k, False, False)
    ids = make(tokens * top_k, experts)
    monkeypatch.setattr(plan_prefill, "UP_LIST_PAIRS", 4096)
    monkeypatch.setattr(plan_prefill, "SLICE_PAIRS", 9000)
    monkeypatch.setattr(plan_prefill, "CLUSTER_PAIRS", 0 if together == 2 else 1 << 30)
    plan = planned(layer, tokens, 132)
    assert (plan.up.together, plan.down.together) == (together, 1)
    found = Route(ids, layer, plan)
    assert sorted(found.place) == list(range(len(ids)))
    local = [pair for pair, e in enumerate(ids) if 0 <= e < experts]
    assert [found.place[pair] >= 0 for pair in range(len(ids))] == [0 <= e < experts for e in ids]
    for name, columns in found.columns.items():
        lists: Lists = getattr(plan, name)
        list_pairs = lists.tokens * top_k
        assert sorted(found.header[name]) == list(range(lists.count))
        seen = []
        for (number, tile), (expert, first, count) in found.tiles[name].items():
            assert tile < found.header[name][number] <= lists.max_tiles
            assert 0 <= count <= C["kTokens"] and (count == 0 or first + count <= list_pairs)
            for at in range(first, first + count):
                pair = columns[number * list_pairs + at]
                assert ids[pair] == expert and pair // list_pairs == number
                if name == "down" or plan.up == plan.down:
                    assert found.place[pair] == at
                seen.append(pair)
        assert sorted(seen) == local
        assert len(found.tiles[name]) == sum(found.header[name].values())
        for key, group in groupby(found.tiles[name].items(), key=lambda t: (t[0][0], t[1][0])):
            counts = [count for _, (_, _, count) in group]
            least = -(-sum(counts) // C["kTokens"])
            assert len(counts) == -(-least // lists.together) * lists.together, key
        # The CTAs of a cluster share weights: their tiles are of one expert.
        experts_of = [
            [found.tiles[name][n, t][0] for t in range(found.header[name][n])]
            for n in range(lists.count)
        ]
        assert all(
            one[:: lists.together] == one[lists.together - 1 :: lists.together]
            for one in experts_of
        )


# ---- order of items ------------------------------------------------------------------------------
UP, DOWN, RING = "prefill_up.cu", "prefill_down.cu", "prefill_ring.cuh"
Item = dict[str, int]


class DownScope:
    """The functions of prefill_down.cu that count items, from their source."""

    def __init__(self, p: SimpleNamespace) -> None:
        names = {"blocks_of": self.blocks_of, "list_tokens": self.list_tokens}
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

    def sum_items(self, p: SimpleNamespace, list: int, blocks: int) -> int:
        text = c_find(DOWN, ("int sum_items",), "return")
        return int(c_value(text, self.scope | {"list": list, "blocks": blocks}))


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
    ("header", "rows", "slice_blocks", "list_tokens", "tokens"),
    [
        ([5], 640, 1, 70, 70),
        ([7], 7168, 8, 1, 1),
        ([3, 0, 9], 704, 2, 64, 160),
        ([0, 0], 64, 1, 512, 1000),
        ([4, 2, 1, 6], 2048, 3, 96, 300),
    ],
)
def test_down_waits_for_earlier_items_only(
    header: list[int], rows: int, slice_blocks: int, list_tokens: int, tokens: int
) -> None:
    blocks = -(-rows // 256)
    p = SimpleNamespace(
        header=header, weights=SimpleNamespace(rows=rows), slice_blocks=slice_blocks,
        lists=len(header), list_tokens=list_tokens, tokens=tokens, max_tiles=11,
        slices=-(-blocks // slice_blocks), tiles=some_tiles(header, 11), done=0,
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
        for first in range(0, min(list_tokens, tokens - number * list_tokens), 32)
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
