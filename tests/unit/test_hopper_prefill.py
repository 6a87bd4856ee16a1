"""The prefill path without a GPU: the sort of its pairs.

Constants and most index expressions are the kernels' own (``tests/helpers/kernel_source.py``); the
statements around them follow ``prefill_route.cu``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from types import SimpleNamespace

import pytest
import torch
from kernel_source import c_constants, c_find, c_locals, c_value

from sglang_w4afp8.kernels.hopper import plan_prefill
from sglang_w4afp8.kernels.hopper.plan import MAX_EXPERTS, Layer
from sglang_w4afp8.kernels.hopper.plan_prefill import Lists, PrefillPlan
from sglang_w4afp8.kernels.hopper.plan_prefill import plan_prefill as planned

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
