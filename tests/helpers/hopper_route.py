"""``prefill_sort.cuh`` on the CPU: pairs sorted by expert, tiles, and rows of q.

Constants and most index expressions are the kernel's own; the statements around them follow it.
"""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

from kernel_source import c_constants, c_find, c_locals, c_value

from sglang_w4afp8.kernels.hopper.plan import MAX_EXPERTS, Layer
from sglang_w4afp8.kernels.hopper.plan_prefill import PrefillPlan

SOURCE = "prefill_sort.cuh"
ROUTE = c_constants("prefill_route.cu", {})
Tile = tuple[int, int, int]


def cut_tiles(expert: int, first: int, tokens: int, lists: SimpleNamespace) -> list[Tile]:
    """The tiles of one expert's pairs, which begin at ``first``."""
    scope = {**ROUTE, "tokens": tokens, "lists": lists, "tid": expert, "first": first}
    cut = c_locals(SOURCE, "Tiles of equal size", "least tiles size", scope)
    text = c_find(SOURCE, ("Tiles of equal size",), "out[i]")
    text = text.replace("Tile{", "(").replace("}", ")")
    return [c_value(text, cut | {"i": i})[:3] for i in range(cut["tiles"])]


def names_twice(ids: list[int], local: list[int], begin: int, top_k: int) -> bool:
    """``names_twice`` for a part whose experts are ``local``: pairs from ``begin`` on."""
    within, found = "bool names_twice", False
    p = SimpleNamespace(own=SimpleNamespace(top_k=top_k))
    scope = {**ROUTE, "p": p}
    in_warp = c_locals(SOURCE, within, "in_warp", scope)["in_warp"]
    for start in range(0, len(local), 32):
        seen = set()  # what lanes before this one have, for __match_any_sync
        for lane, expert in enumerate(local[start : start + 32]):
            pair, ours = begin + start + lane, expert >= 0
            thread = (start + lane) % ROUTE["kThreads"]
            here = scope | {"pair": pair, "ours": ours, "expert": [expert], "i": 0}
            here = c_locals(SOURCE, within, "token", here)
            here["threadIdx"] = SimpleNamespace(x=thread)
            if in_warp:
                key = c_locals(SOURCE, within, "key", here)["key"]
                assert 0 <= key < 1 << 32
                found |= key in seen
                seen.add(key)
            elif ours:
                first = c_value(c_find(SOURCE, (within,), "other"), here)
                found |= any(ids[other] == expert for other in range(first, pair))
    return found


def rank_in_order(local: list[int], counts: list[int]) -> list[int]:
    """``rank_in_order`` of a block: warps of 32 lanes one after the other."""
    ranks = [0] * len(local)
    threads, mine = ROUTE["kThreads"], ROUTE["kMine"]
    padded = local + [-1] * (threads * mine - len(local))
    for i in range(mine):
        for warp in range(ROUTE["kWarps"]):
            lanes = padded[i * threads + warp * 32 :][:32]
            before = [counts[max(e, 0)] for e in lanes]  # all lanes read, then the last ones write
            for lane, e in enumerate(lanes):
                same = sum(1 << other for other in range(32) if lanes[other] == e)
                scope = {"same": same, "lane": lane, "before": before[lane]}
                scope["__popc"] = int.bit_count
                rank = c_value(c_find(SOURCE, ("void rank_in_order",), "rank[i]"), scope)
                pair = i * threads + warp * 32 + lane
                if e >= 0:
                    ranks[pair] = rank
                    if same >> lane == 1:
                        counts[e] = rank + 1
    return ranks


class Route:
    """``sort_part`` of all blocks; what it writes, as dictionaries from index to value.

    Attributes:
        columns: of each kind of lists, pairs by place; ``own.columns`` is ``down``. Where CTAs of
            down do not own outputs there is one list for both, ``up``.
        tiles: of each kind of lists that has tiles.
        header: how many a list has.
        place: of pairs, their rows and what is said of their tiles; empty where CTAs of down own
            outputs.
        total: of pairs, for those who want to know whether there is room; the same.
        rows: ``own.rows``.
        first: ``lists.first``, by (list, expert).
        twice: of parts, whether a token names an expert twice.

    Args:
        ids: experts of all pairs.
        layer: sizes.
        plan: of the call.
        seed: of the order of atomics.
    """

    def __init__(self, ids: list[int], layer: Layer, plan: PrefillPlan, seed: int = 0) -> None:
        self.ids, self.plan, self.part = ids, plan, plan.part_pairs
        self.own = plan.room == 0
        self.place: dict[int, tuple[int, int]] = {}
        self.total: list[int] = []
        kinds = {"up": plan.up} | ({"down": plan.down} if self.own else {})
        self.columns: dict[str, dict[int, int]] = {name: {} for name in kinds}
        self.tiles: dict[str, dict[tuple[int, int], Tile]] = {name: {} for name in kinds}
        self.header: dict[str, dict[int, int]] = {name: {} for name in kinds}
        self.rows: dict[int, int] = {}
        self.first: dict[tuple[int, int], int] = {}
        self.twice: list[bool] = []
        local = [[e if 0 <= e < layer.experts else -1 for e in part] for part in self.split(ids)]
        order = random.Random(seed)
        ranks = []
        self.counts: list[list[int]] = []
        for number, experts in enumerate(local):
            count = [0] * MAX_EXPERTS
            twice = self.own and names_twice(ids, experts, number * self.part, layer.top_k)
            self.twice.append(twice)
            rank = rank_in_order(experts, count) if twice else [0] * len(experts)
            if not twice:
                for i in order.sample(range(len(experts)), len(experts)):  # atomics: any order
                    if experts[i] >= 0:
                        rank[i] = count[experts[i]]
                        count[experts[i]] += 1
            ranks.append(rank)
            self.counts.append(count)
        for number, experts in enumerate(local):
            begins, starts = {}, {}
            for name in kinds:
                begins[name] = self.place_part(name, number)
                lists = {kind: SimpleNamespace(parts=one.parts) for kind, one in kinds.items()}
                p = SimpleNamespace(**lists, part_pairs=self.part)
                scope = {**ROUTE, "p": p, "part": number, "own": self.own}
                starts[name] = c_locals(SOURCE, "counts[tid] = begins.all", name, scope)[name]
            ups = begins["up"]
            scope = {"up_first": [begin.mine for begin in ups], "counts": [b.all for b in ups]}
            text = c_find(SOURCE, ("if (own) {\n    begins", "} else {"), "down_first[tid]")
            packed = [c_value(text, {"begins": begin}) for begin in ups]
            for i, e in enumerate(experts):
                pair = number * self.part + i
                here = scope | {"e": e, "i": 0, "rank": [ranks[number][i]]}
                here = c_locals(SOURCE, "void sort_part", "up_row", here)
                up = here["up_row"]
                if e >= 0:
                    self.put("up", starts["up"] + up, pair)
                if self.own and e >= 0:
                    at = begins["down"][e].mine + ranks[number][i]
                    self.put("down", starts["down"] + at, pair)
                    first = begins["down"][e].all
                    self.rows[starts["up"] + up] = self.q_row(starts["down"], at, first)
                elif not self.own:
                    # A word of 32 bits
                    tile = self.tile(here | {"down_first": packed}) & 0xFFFFFFFF if e >= 0 else 0
                    self.place[pair] = up, tile

    def put(self, name: str, place: int, pair: int) -> None:
        assert place not in self.columns[name], "two in one place"
        self.columns[name][place] = pair

    @staticmethod
    def tile(scope: dict[str, Any]) -> int:
        """``Place::tile`` of a pair."""
        scope = c_locals(SOURCE, "u32 tile = 0;", "at size", scope)
        text = c_find(SOURCE, ("u32 tile = 0;", "size = down_first"), "tile")
        value: int = c_value(text, scope)
        return value

    @staticmethod
    def q_row(down: int, at: int, first: int) -> int:
        """The value for a pair at ``at`` of its list, which begins at ``down``, its expert's at
        ``first`` of the list."""
        text = c_find(SOURCE, ("void sort_part",), "q_row(")
        row, number = c_value(text, {"down": down, "at": at, "counts": [first], "e": 0})
        found = c_find(SOURCE, ("int q_row(",), "return")
        value: int = c_value(found, {"row": row, "of_expert": number})
        return value

    def split(self, values: list[int]) -> list[list[int]]:
        """Parts of the sorting blocks."""
        return [values[begin : begin + self.part] for begin in range(0, len(values), self.part)]

    def place_part(self, name: str, part: int) -> list[SimpleNamespace]:
        """``Begin`` of every expert for a part; the first part of a list writes its tiles."""
        plan = getattr(self.plan, name)
        lists = SimpleNamespace(parts=plan.parts, together=plan.together)
        p = SimpleNamespace(sorters=len(self.counts))
        scope = {**ROUTE, "part": part, "lists": lists, "p": p}
        s = c_locals(SOURCE, "Begin place_part", "list first_part last_part", scope)
        has_tiles = not (self.own and name == "down")
        writes = part == s["first_part"]
        text = c_find(SOURCE, ("Begin place_part",), "return").replace("Begin{", "(")
        text = text.replace("}", ")")
        first = tile = 0
        begins = []
        for tid in range(MAX_EXPERTS):
            in_list = range(s["first_part"], s["last_part"])
            tokens = sum(self.counts[i][tid] for i in in_list)
            before = sum(self.counts[i][tid] for i in in_list if i < part)
            here = s | {"tid": tid, "first": first, "tokens": tokens}
            here = c_locals(SOURCE, "Tiles of equal size", "least tiles size", here)
            here |= {"before": before, "tile": tile}
            fields = zip(("mine", "all", "tile", "size"), c_value(text, here), strict=True)
            begins.append(SimpleNamespace(**dict(fields)))
            if writes and not has_tiles:
                self.first[s["list"], tid] = first
            elif writes and tokens:
                found = cut_tiles(tid, first, tokens, lists)
                for i, one in enumerate(found):
                    key = s["list"], tile + i
                    assert key not in self.tiles[name]
                    self.tiles[name][key] = one
            first, tile = first + tokens, tile + here["tiles"]
        if writes and has_tiles:
            self.header[name][s["list"]] = tile
        elif writes:
            self.first[s["list"], MAX_EXPERTS] = first
        if writes and not self.own:
            text = c_find(SOURCE, ("Begin place_part",), "*p.sorted.total")
            self.total.append(c_value(text, {"first": first, "tokens": 0}))
        return begins
