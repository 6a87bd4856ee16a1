"""``prefill_sort.cuh``, ``prefill_sort_own.cuh`` on the CPU: pairs by expert, tiles, rows of q.

Constants and most index expressions are the kernel's own; the statements around them follow it.
"""

from __future__ import annotations

import random
import re
from functools import cache
from types import SimpleNamespace
from typing import Any

from kernel_source import c_constants, c_find, c_locals, c_text, c_value

from sglang_w4afp8.kernels.hopper.plan import MAX_EXPERTS, Layer
from sglang_w4afp8.kernels.hopper.plan_prefill import PrefillPlan

SOURCE, OWN = "prefill_sort.cuh", "prefill_sort_own.cuh"
ROUTE = c_constants("prefill_route.cu", {})
Tile = tuple[int, int, int]
CUT = "least tiles share step all_steps steps wider size"
"""What ``place_part`` calls the parts of an expert's cut."""
TILES = (
    r"for \(int i = 0, at = 0; i < tiles; \+\+i\) \{\s*const int here = [^;]*;"
    r"\s*out\[i\] = Tile\{[^;]*;\s*at \+= here;\s*\}"
)
"""The loop that :func:`cut_tiles` plays."""


def cut_tiles(expert: int, first: int, tokens: int, lists: SimpleNamespace) -> list[Tile]:
    """The tiles of one expert's pairs, which begin at ``first``."""
    assert re.search(TILES, c_text(SOURCE)), "place_part has another loop"
    scope = {**ROUTE, "tokens": tokens, "lists": lists, "tid": expert, "first": first}
    cut = c_locals(SOURCE, "Tiles of equal size", CUT, scope)
    text = c_find(SOURCE, ("Tiles of equal size",), "out[i]")
    text = text.replace("Tile{", "(").replace("}", ")")
    tiles, at = [], 0
    for i in range(cut["tiles"]):
        here = c_locals(SOURCE, "Tiles of equal size", "here", cut | {"i": i, "at": at, "min": min})
        tiles.append(c_value(text, here)[:3])
        at += c_value(c_find(SOURCE, ("Tiles of equal size",), "at +="), here)
    return tiles


def names_twice(ids: list[int], local: list[int], begin: int, top_k: int) -> bool:
    """``names_twice`` for a part whose experts are ``local``: pairs from ``begin`` on."""
    within, found = "bool names_twice", False
    p = SimpleNamespace(own=SimpleNamespace(top_k=top_k))
    scope = {**ROUTE, "p": p}
    in_warp = c_locals(OWN, within, "in_warp", scope)["in_warp"]
    for start in range(0, len(local), 32):
        seen = set()  # what lanes before this one have, for __match_any_sync
        for lane, expert in enumerate(local[start : start + 32]):
            pair, ours = begin + start + lane, expert >= 0
            thread = (start + lane) % ROUTE["kThreads"]
            here = scope | {"pair": pair, "ours": ours, "expert": expert}
            here = c_locals(OWN, within, "token", here)
            here["threadIdx"] = SimpleNamespace(x=thread)
            if in_warp:
                key = c_locals(OWN, within, "key", here)["key"]
                assert 0 <= key < 1 << 32
                found |= key in seen
                seen.add(key)
            elif ours:
                first = c_value(c_find(OWN, (within,), "other"), here)
                found |= any(ids[other] == expert for other in range(first, pair))
    return found


class U64(int):
    """An unsigned number of 64 bits."""

    def __mul__(self, other: int) -> U64:
        return U64(int(self) * other % (1 << 64))


def of_four(name: str, four: int) -> U64:
    """``sums_before`` or ``sum_of``."""
    return U64(c_value(c_find(SOURCE, (f" {name}(u64 four)",), "return"), {"four": U64(four)}))


def of_class(four: int, k: int) -> int:
    value: int = c_value(c_find(SOURCE, ("int of_class(",), "return"), {"four": four, "k": k})
    return value


@cache
def columns_of(n: int, k: int) -> int:
    value: int = c_value(c_find(OWN, ("int columns_of(",), "return"), {"n": n, "k": k})
    return value


def column_at(k: int, r: int) -> int:
    value: int = c_value(c_find(OWN, ("int column_at(",), "return"), {"k": k, "r": r})
    return value


@cache
def column_for(all_: int, k: int, r: int) -> int:
    """The column of the r-th pair of class k."""
    within = "int column_for("
    names = {f.__name__: f for f in (of_class, columns_of, column_at)}
    scope = {**ROUTE, **names, "all": all_, "k": k, "r": r}
    scope["sum_of"] = lambda four: of_four("sum_of", four)
    scope = c_locals(OWN, within, "n over", scope)
    if scope["over"] < 0:
        value: int = c_value(c_find(OWN, (within,), "return"), scope)
        return value
    scope["left"] = scope["over"]
    for j in range(ROUTE["kClasses"]):
        scope["left"] += c_value(c_find(OWN, (within,), "left +="), scope | {"j": j})
    found = []
    for j in range(ROUTE["kClasses"]):
        scope = c_locals(OWN, within, "used empty", scope | {"j": j})
        if 0 <= scope["left"] < scope["empty"]:
            found.append(c_value(c_find(OWN, (within, "left < empty"), "column"), scope))
        scope["left"] -= scope["empty"]
    (column,) = found
    return int(column)


def half_of(key: int) -> int:
    value: int = c_value(c_find(OWN, ("int half_of(",), "return"), {"key": key})
    return value


def rank_in_order(keys: list[int], counts: list[int]) -> list[int]:
    """``rank_in_order`` of a block: warps of 32 lanes one after the other.

    Args:
        keys: of pairs, -1 for those of other ranks.
        counts: words of two keys, zero before.

    Returns:
        Keys with ranks.
    """
    pairs, within = list(keys), ("void rank_in_order",)
    add = c_find(OWN, within, "atomicAdd(").replace("&counts[key / 2]", "key / 2")
    put = c_find(OWN, within, "pairs[first + lane]")
    names = {**ROUTE, "half_of": half_of, "__popc": int.bit_count, "counts": counts}
    for first in range(0, len(keys), 32):
        lanes = keys[first : first + 32]
        scopes = []
        for lane, pair in enumerate(lanes):  # all lanes read, then the last ones add
            same = sum(1 << other for other, key in enumerate(lanes) if key == pair)
            scope = names | {"same": same, "lane": lane, "pair": pair}
            scopes.append(c_locals(OWN, within[0], "key before rank", scope))
        for lane, pair in enumerate(lanes):
            if pair != ROUTE["kNotOurs"]:
                pairs[first + lane] = c_value(put, scopes[lane])
                if scopes[lane]["same"] >> lane == 1:
                    word, more = c_value(add, scopes[lane])
                    counts[word] += more
    return pairs


def words_of(four: list[int]) -> list[int]:
    """An array of u16 over one of u64."""
    return [value >> 16 * k & 0xFFFF for value in four for k in range(4)]


class Route:
    """What the blocks that sort write, as dictionaries from index to value.

    Attributes:
        columns: of each kind of lists, pairs by place; ``own.columns`` is ``down``. Where CTAs of
            down do not own outputs there is one list for both, ``up``.
        tiles: of each kind of lists that has tiles.
        header: how many a list has.
        place: of pairs, their rows and ``ListPlace::column``; empty where CTAs of down own
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
        self.local = [
            [e if 0 <= e < layer.experts else -1 for e in part] for part in self.split(ids)
        ]
        self.counts: list[list[int]] = []
        self.order = random.Random(seed)
        if self.own:
            self.sort_own(layer.top_k)
        else:
            self.sort()

    def any_order(self, experts: list[int]) -> list[int]:
        """This rank's pairs of a part in any order, as that of atomics."""
        order = self.order.sample(range(len(experts)), len(experts))
        return [i for i in order if experts[i] >= 0]

    def sort(self) -> None:
        """``sort_part`` of all blocks."""
        ranks = []
        add = c_find(SOURCE, ("void sort_part",), "mine[i] +=")
        add = add.replace("atomicAdd(&counts[mine[i]], 1)", "old")
        for experts in self.local:
            count, mine = [0] * MAX_EXPERTS, list(experts)
            for i in self.any_order(experts):
                mine[i] += c_value(add, {**ROUTE, "old": count[experts[i]]})
                count[experts[i]] += 1
            ranks.append(mine)
            self.counts.append(count)
        for number, experts in enumerate(self.local):
            begins, start = self.place_part("up", number), self.list_begin("up", number)
            scope = {**ROUTE, "first": [b.mine for b in begins], "counts": [b.all for b in begins]}
            column = c_find(SOURCE, ("u32 column = 0;", "if (mine[i] >= 0)"), "column")
            for i, expert in enumerate(experts):
                pair = number * self.part + i
                self.place[pair] = -1, 0
                if expert >= 0:
                    here = scope | {"mine": ranks[number][i : i + 1], "i": 0}
                    here = c_locals(SOURCE, "u32 column = 0;", "e row", here)
                    assert here["e"] == expert
                    self.put("up", start + here["row"], pair)
                    self.place[pair] = here["row"], c_value(column, here)

    def sort_own(self, top_k: int) -> None:
        """``sort_own_part`` of all blocks."""
        within, p = "void sort_own_part", SimpleNamespace(own=SimpleNamespace(top_k=top_k))
        scope = {**ROUTE, "p": p, "half_of": half_of, "column_for": column_for, "twice": False}
        atomic = c_find(OWN, (within,), "rank")
        atomic = atomic.replace("atomicAdd(&counts[key / 2], 1u << half)", "old")
        put = c_find(OWN, (within,), "tables.pairs[i]")
        all_keys, fours = [], []
        for number, experts in enumerate(self.local):
            words, keys = [0] * (2 * MAX_EXPERTS), [ROUTE["kNotOurs"]] * len(experts)
            self.twice.append(names_twice(self.ids, experts, number * self.part, top_k))
            for i in self.any_order(experts):
                here = scope | {"begin": number * self.part, "i": i, "expert": experts[i]}
                here = c_locals(OWN, within, "token key half", here) | {"rank": 0}
                if not self.twice[-1]:
                    word = here["key"] // 2
                    here["rank"] = c_value(atomic, here | {"old": words[word]})
                    words[word] += 1 << here["half"]
                keys[i] = c_value(put, here)
            if self.twice[-1]:
                keys = rank_in_order(keys, words)
            all_keys.append(keys)
            fours.append([words[2 * e] | words[2 * e + 1] << 32 for e in range(MAX_EXPERTS)])
            self.counts.append([of_four("sum_of", four) for four in fours[-1]])
        for number, keys in enumerate(all_keys):
            here = scope | {"part": number}
            here["p"] = SimpleNamespace(down=self.plan.down, sorters=len(fours))
            here = c_locals(OWN, within, "first_part last_part", here)
            parts = range(here["first_part"], here["last_part"])
            in_list = [[fours[i][e] for i in parts] for e in range(MAX_EXPERTS)]
            before = [sum(four[: number - parts[0]]) for four in in_list]
            here["tables"] = SimpleNamespace(all=[sum(four) for four in in_list])
            here["up_ranks"] = words_of([of_four("sums_before", four) for four in fours[number]])
            here["down_ranks"] = words_of(before)
            here["up_first"] = [begin.mine for begin in self.place_part("up", number)]
            here["down_first"] = [begin.all for begin in self.place_part("down", number)]
            up, down = (self.list_begin(name, number) for name in ("up", "down"))
            for i, found in enumerate(keys):
                if found != ROUTE["kNotOurs"]:
                    one, names = here | {"found": found}, "key rank e up_row column at"
                    one = c_locals(OWN, f"{within} > const u16* up_ranks", names, one)
                    pair = number * self.part + i
                    self.put("up", up + one["up_row"], pair)
                    self.put("down", down + one["at"], pair)
                    self.rows[up + one["up_row"]] = self.q_row(one | {"down": down})

    def list_begin(self, name: str, part: int) -> int:
        """The first pair of the list in which a part is."""
        lists, p = getattr(self.plan, name), SimpleNamespace(part_pairs=self.part)
        text = c_find(SOURCE, ("u64 list_begin(",), "return")
        value: int = c_value(text, {"part": part, "lists": lists, "p": p})
        return value

    def put(self, name: str, place: int, pair: int) -> None:
        assert place not in self.columns[name], "two in one place"
        self.columns[name][place] = pair

    @staticmethod
    def q_row(scope: dict[str, Any]) -> int:
        """The value for a pair."""
        row, number = c_value(c_find(OWN, ("void sort_own_part",), "q_row("), scope)
        found = c_find(SOURCE, ("int q_row(",), "return")
        value: int = c_value(found, {"row": row, "of_expert": number})
        return value

    def split(self, values: list[int]) -> list[list[int]]:
        """Parts of the sorting blocks."""
        return [values[begin : begin + self.part] for begin in range(0, len(values), self.part)]

    def place_part(self, name: str, part: int) -> list[SimpleNamespace]:
        """``Begin`` of every expert for a part; the first part of a list writes its tiles."""
        plan = getattr(self.plan, name)
        lists = SimpleNamespace(
            parts=plan.parts, together=plan.together, tile_tokens=plan.tile_tokens
        )
        p = SimpleNamespace(sorters=len(self.counts), sorted=SimpleNamespace(place=not self.own))
        scope = {**ROUTE, "part": part, "lists": lists, "p": p, "nullptr": False}
        scope |= {"of_class": of_class, "sums_before": lambda four: of_four("sums_before", four)}
        scope["sum_of"] = lambda four: of_four("sum_of", four)
        within = "Begin place_part"
        s = c_locals(SOURCE, within, "list first_part last_part", scope)
        has_tiles = not (self.own and name == "down")
        writes = part == s["first_part"]
        text = c_find(SOURCE, (within,), "return").replace("Begin{", "(")
        text = text.replace("}", ")")
        first, tile_sum = 0, U64(0)
        begins, threads = [], []
        for tid in range(MAX_EXPERTS):
            in_list = range(s["first_part"], s["last_part"])
            tokens = sum(self.counts[i][tid] for i in in_list)
            before = sum(self.counts[i][tid] for i in in_list if i < part)
            here = s | {"tid": tid, "first": first, "tokens": tokens, "before": before}
            here = c_locals(SOURCE, within, f"{CUT} ordered kind", here)
            fields = zip(("mine", "all"), c_value(text, here), strict=True)
            begins.append(SimpleNamespace(**dict(fields)))
            if writes and not has_tiles:
                self.first[s["list"], tid] = first
            mine = c_value(c_find(SOURCE, (within,), "u64 tile_sum"), here)
            tile_sum = U64(tile_sum + mine)
            threads.append(here | {"tile_sum": tile_sum})
            first += tokens
        for here in threads if writes and has_tiles else []:
            here = c_locals(SOURCE, "u64 of_warps", "tile", here | {"of_warps": tile_sum})
            for i, one in enumerate(cut_tiles(here["tid"], here["first"], here["tokens"], lists)):
                key = s["list"], here["tile"] + i
                assert key not in self.tiles[name]
                self.tiles[name][key] = one
        if writes and has_tiles:
            header = c_value(c_find(SOURCE, (within,), "lists.header[list]"), here)
            self.header[name][s["list"]] = header
        elif writes:
            self.first[s["list"], MAX_EXPERTS] = first
        if writes and not self.own:
            text = c_find(SOURCE, ("Begin place_part",), "*p.sorted.total")
            self.total.append(c_value(text, {"first": first, "tokens": 0}))
        return begins
