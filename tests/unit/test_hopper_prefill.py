"""The prefill path without a GPU: the sort of its pairs.

Constants and most index expressions are the kernels' own: ``tests/helpers/hopper_route.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby, product
from types import SimpleNamespace

import pytest
import torch
from hopper_route import Route, cut_tiles

from sglang_w4afp8.kernels.hopper import plan_prefill
from sglang_w4afp8.kernels.hopper.plan import Layer
from sglang_w4afp8.kernels.hopper.plan_lists import TILE_TOKENS, Lists
from sglang_w4afp8.kernels.hopper.plan_prefill import SORTED_TOKENS
from sglang_w4afp8.kernels.hopper.plan_prefill import plan_prefill as planned


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


@pytest.mark.parametrize(
    ("together", "most"), [(1, TILE_TOKENS), (2, TILE_TOKENS), (1, SORTED_TOKENS)]
)
def test_tiles_of_an_expert_are_shared_out(together: int, most: int) -> None:
    """For every number of tokens: whole clusters, each with tokens, and of about equal size."""
    for tokens in range(1, 5000):
        tiles = cut_tiles(7, 100, tokens, SimpleNamespace(together=together, tile_tokens=most))
        counts = [count for _, _, count in tiles]
        assert len(tiles) % together == 0 and len(tiles) - together < -(-tokens // most)
        assert sum(counts) == tokens and 0 <= min(counts) <= max(counts) <= most
        assert all(counts[::together]), "a cluster without work"
        full = [count for count in counts if count]
        assert len(counts) - len(full) < together and counts[: len(full)] == full
        step = 16 if max(counts) <= 96 else 8
        assert full == sorted(full, reverse=True) and full[0] - full[-1] < 2 * step
        assert all(count % step == 0 for count in full[:-1])
        assert max(counts) - tokens / len(tiles) < step, "wider than an equal share needs"
        columns = sum(-(-count // step) * step for count in counts)
        assert columns - tokens < step, "columns without a token in more than one tile"
        at = 100
        for expert, first, count in tiles:
            assert expert == 7 and (first == at or count == 0)
            at += count


@pytest.mark.parametrize("inner", [256, 512])  # CTAs of down own outputs, or they do not
@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize(("tokens", "top_k", "experts", "make"), ROUTES)
def test_every_pair_is_in_one_tile_of_its_expert(
    tokens: int,
    top_k: int,
    experts: int,
    make: Callable[[int, int], list[int]],
    together: int,
    inner: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(tokens)
    layer = Layer(experts, 7168, inner, 128, 128, top_k, False, False)
    ids = make(tokens * top_k, experts)
    monkeypatch.setattr(plan_prefill, "UP_LIST_PAIRS", 4096)
    monkeypatch.setattr(plan_prefill, "CLUSTER_PAIRS", (0, 1 << 30 if together == 2 else 0))
    monkeypatch.setattr(plan_prefill, "CLUSTER_ROWS", 2 * inner)
    plan = planned(layer, tokens, 132)
    own = inner == 256
    assert (plan.up.together, plan.down.together) == (together if own else 1, 1)
    assert own or plan.up == plan.down
    found = Route(ids, layer, plan)
    assert found.own == own
    local = [pair for pair, e in enumerate(ids) if 0 <= e < experts]
    if not own:
        here = [found.place[pair][0] >= 0 for pair in range(len(ids))]
        assert here == [0 <= e < experts for e in ids] and len(found.place) == len(ids)
        assert all(row == -1 for row, _ in found.place.values() if row < 0)
        assert found.total == [len(local)], "said once"
    for name, columns in found.columns.items():
        lists: Lists = getattr(plan, name)
        list_pairs = lists.tokens * top_k
        if own and name == "down":
            seen = []
            for number, e in product(range(lists.count), range(experts)):
                for at in range(found.first[number, e], found.first[number, e + 1]):
                    pair = columns[number * list_pairs + at]
                    assert ids[pair] == e and pair // list_pairs == number and at < list_pairs
                    seen.append(pair)
            assert sorted(seen) == local
            continue
        assert sorted(found.header[name]) == list(range(lists.count))
        seen = []
        for (number, tile), (expert, first, count) in found.tiles[name].items():
            assert tile < found.header[name][number] <= lists.max_tiles
            assert 0 <= count <= lists.tile_tokens and (count == 0 or first + count <= list_pairs)
            for at in range(first, first + count):
                pair = columns[number * list_pairs + at]
                assert ids[pair] == expert and pair // list_pairs == number
                if not own:  # and its column of the tile modulo 8, with the expert
                    assert found.place[pair] == (at, (at - first) % 8 + 8 * expert)
                seen.append(pair)
        assert sorted(seen) == local
        assert len(found.tiles[name]) == sum(found.header[name].values())
        for key, group in groupby(found.tiles[name].items(), key=lambda t: (t[0][0], t[1][0])):
            counts = [count for _, (_, _, count) in group]
            least = -(-sum(counts) // lists.tile_tokens)
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
        for number, one in enumerate(experts_of):
            tiles = [found.tiles[name][number, t] for t in range(len(one))]
            widest = {e: max(count for other, _, count in tiles if other == e) for e in one}
            keys = [((widest[e] <= 96) + (widest[e] <= 64), e) for e in one]
            if own and lists.together == 1:
                assert keys == sorted(keys), "wide tiles first"
            else:
                assert one == sorted(one), "as their rows"
