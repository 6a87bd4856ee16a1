"""Down on tokens in the order of the list, as warps that run in any order of events.

The statements follow ``prefill_ring.cuh``, ``prefill_tables.cuh`` and ``prefill_down.cu``; items,
slices and addresses are their own. A wait that never ends, a contribution that is read before it is
published or after it was overwritten, and owners, scales and results that are another item's all
show. Of a warpgroup there are two warps, which do not go in step.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any

from hopper_sorted import DOWN, TABLES, WGS, Slices, constants
from kernel_source import c_find, c_value
from simulated_warps import Barrier, Warp, run_warps

WARPS, ADDERS = 2, 2
TILE = 4
"""Most columns."""
FOUND = 2
"""Columns that a warp looks through at a time for sums that it makes."""
PAIRS = 2
"""Pairs of contributions that are asked for ahead."""


def now() -> bool:
    """For a warp that lets others go first."""
    return True


def pairs_of(owner: SimpleNamespace) -> list[list[int]]:
    """Slots of a column's contributions, two by two."""
    slots = [slot for slot, _ in owner.parts]
    return [slots[i : i + 2] for i in range(0, len(slots), 2)]


class Problem:
    """Rows of a list with their owners, as ``describe_owners`` makes them.

    Args:
        order: random numbers.
        counts: columns of tiles.
        tokens: of which each row has one, perhaps several times in a tile.
    """

    def __init__(self, order: random.Random, counts: list[int], tokens: int) -> None:
        self.counts = counts
        rows = [(tile, c) for tile, count in enumerate(counts) for c in range(count)]
        of_token: dict[int, list[tuple[int, int]]] = {}
        for row in rows:
            of_token.setdefault(order.randrange(tokens), []).append(row)
        self.slots = 0
        self.owners: dict[tuple[int, int], SimpleNamespace] = {}
        for token in order.sample(sorted(of_token), len(of_token)):
            mine = of_token[token]
            slots = list(range(self.slots, self.slots + len(mine)))
            if len(mine) == 1:
                self.owners[mine[0]] = SimpleNamespace(token=token, slot=-1, parts=[])
                continue
            self.slots += len(mine)
            in_order_of_k = order.sample(list(zip(slots, mine, strict=True)), len(mine))
            parts = [(slot, tile) for slot, (tile, _) in in_order_of_k]
            for slot, row in zip(slots, mine, strict=True):
                has = parts if row == mine[-1] else []
                self.owners[row] = SimpleNamespace(token=token, slot=slot, parts=has)
        self.tokens = {
            token: [slot for slot, _ in self.owners[mine[-1]].parts]
            for token, mine in of_token.items()
        }


class Call:
    """CTAs that work on a problem.

    Args:
        problem: rows.
        slices: how outputs are cut.
        seed: of the order of events.
        ctas: how many; all but the first begin when ``late`` ones before them have ended.
        shape: stages of an item and of the ring.
        broken: what is left out.
    """

    def __init__(
        self,
        problem: Problem,
        slices: Slices,
        seed: int,
        ctas: int,
        shape: tuple[int, int] = (2, 3),
        late: bool = False,
        broken: str = "",
    ) -> None:
        self.problem, self.slices, self.broken, self.late = problem, slices, broken, late
        self.stages, self.ring = shape
        self.random = random.Random(seed)
        self.on_the_way: list[Callable[[], None]] = []
        self.claimed = self.summed = 0
        self.y: dict[tuple[int, int, int], tuple[int, int]] = {}  # by block's buffer, wg, slot
        self.done: set[tuple[int, int]] = set()
        self.left, self.several = [0] * slices.count(), slices.count() > 2
        self.out: dict[tuple[int, int], list[int]] = {}  # slots that were added up
        c = constants(DOWN, 128)
        self.queue, self.ahead = c["kQueue"], c["kAhead"]
        assert c["kAdders"] == ADDERS
        self.items: dict[int, Any] = {}
        self.buffers = {
            (s, block): slices.buffer(s, block)
            for s in range(slices.count())
            for block in range(s * slices.per_slice, s * slices.per_slice + slices.blocks_of(s))
        }
        self.targets = [slices.left_target(s) for s in range(slices.count())]
        self.ctas = [self.cta() for _ in range(ctas)]

    def cta(self) -> SimpleNamespace:
        warps = WGS * WARPS
        return SimpleNamespace(
            items=[None] * self.queue,
            queue_full=[Barrier(1) for _ in range(self.queue)],
            queue_empty=[Barrier(warps + 1) for _ in range(self.queue)],
            stages=[None] * self.ring,
            stage_full=[Barrier(1) for _ in range(self.ring)],
            stage_empty=[Barrier(warps) for _ in range(self.ring)],
            owners=None,  # the item's number
            full=Barrier(1),
            stored=Barrier(warps),
            scaled=Barrier(1),
            scales=[None] * TILE,  # the item's number
            named=[Barrier(WARPS) for _ in range(WGS)],
            ended=Barrier(warps),
            results=[[[None] * TILE for _ in range(WARPS)] for _ in range(WGS)],  # `out`, the same
            not_ended=warps + 2 + ADDERS,
        )

    def run(self) -> None:
        """Until all warps have ended; then all outputs are there."""
        warps = []
        for rank, cta in enumerate(self.ctas):
            mine = [self.produce_stages(cta), self.clerk(cta)]
            mine += [self.add() for _ in range(ADDERS)]
            mine += [self.consume(cta, wg, warp) for wg in range(WGS) for warp in range(WARPS)]
            warps += [self.counted(rank, warp) for warp in mine]
        run_warps(warps, self.random, self.on_the_way)
        for token, slots in self.problem.tokens.items():
            for row_tile in range(self.slices.row_tiles):
                assert self.out.pop((token, row_tile), None) == slots, "another sum"
        assert not self.out and not self.on_the_way
        assert not self.several or self.left == self.targets, "a slice that is not left"

    def counted(self, rank: int, warp: Warp) -> Warp:
        if self.late and rank > 0:
            yield lambda: self.ctas[rank - 1].not_ended == 0
        yield from warp
        self.ctas[rank].not_ended -= 1

    # ---- the ring --------------------------------------------------------------------------------
    def described(self, number: int) -> Any:
        if number not in self.items:
            self.items[number] = self.slices.item(number)
        return self.items[number]

    def look(self, cta: SimpleNamespace, n: int) -> Any:
        number, item = cta.items[n % self.queue]
        assert number == n, "another item"
        return item

    def produce_stages(self, cta: SimpleNamespace) -> Warp:
        n = at = 0
        while True:
            yield cta.queue_full[n % self.queue].passed(n // self.queue & 1)
            item = self.look(cta, n)
            yield now
            cta.queue_empty[n % self.queue].arrive()
            if item is None:
                return
            for step in range(self.stages):
                slot = at % self.ring
                yield cta.stage_empty[slot].passed(at // self.ring & 1 ^ 1)
                cta.stage_full[slot].arrive(1)

                def copy(n: int = n, step: int = step, slot: int = slot) -> None:
                    cta.stages[slot] = n, step
                    cta.stage_full[slot].came(1)

                self.on_the_way.append(copy)
                at += 1
            n += 1

    # ---- the clerk -------------------------------------------------------------------------------
    def phase(self, n: int) -> int:
        """``phase_of``."""
        text = c_find(TABLES, (" phase_of(int n)",), "return")
        return int(c_value(text, {"n": n}))

    def owner(self, cta: SimpleNamespace, n: int, tile: int, c: int) -> SimpleNamespace:
        assert cta.owners == n, "another item's owners"
        return self.problem.owners[tile, c]

    def clerk(self, cta: SimpleNamespace) -> Warp:
        me = SimpleNamespace(cta=cta, free_below=0, posted=0, items=1 << 30)
        for _ in range(self.ahead):
            yield from self.post(me)
        n = 0
        while n < me.items:
            yield from self.post(me)
            early = self.broken == "fetch first"
            if n == 0 or not early:
                yield from self.fetch(me, n)
            yield from self.scale(me, n)
            if early and n + 1 < me.items:
                yield from self.fetch(me, n + 1)
            yield from self.publish(me, n)
            n += 1

    def post(self, me: SimpleNamespace) -> Warp:
        if me.posted > me.items:
            return
        at, phase = me.posted % self.queue, me.posted // self.queue & 1
        yield me.cta.queue_empty[at].passed(phase ^ 1)
        item, self.claimed = self.described(self.claimed), self.claimed + 1
        me.cta.items[at] = me.posted, item
        yield now
        me.cta.queue_full[at].arrive()
        if item is None:
            me.items = me.posted
        me.posted += 1

    def publish(self, me: SimpleNamespace, n: int) -> Warp:
        item, cta = self.look(me.cta, n), me.cta
        if self.broken == "publish":
            self.done.add((item.step, item.block))
        yield cta.stored.passed(self.phase(n))
        self.done.add((item.step, item.block))

    def fetch(self, me: SimpleNamespace, n: int) -> Warp:
        cta = me.cta
        if self.broken != "slice":
            yield from self.wait_slice(me, n)
        cta.full.arrive(1)

        def copy() -> None:
            cta.owners = n
            cta.full.came(1)

        self.on_the_way.append(copy)
        yield now

    def wait_slice(self, me: SimpleNamespace, n: int) -> Warp:
        at = self.look(me.cta, n).slice
        if at < 2 or me.free_below > at - 2:
            return
        fewer = self.slices.tiles if self.broken == "target" else 0
        yield lambda: self.left[at - 2] >= self.targets[at - 2] - fewer
        me.free_below = at - 1

    def scale(self, me: SimpleNamespace, n: int) -> Warp:
        cta = me.cta
        yield cta.full.passed(self.phase(n))
        for c in range(TILE):
            if c < self.problem.counts[self.look(cta, n).step]:
                self.owner(cta, n, self.look(cta, n).step, c)
            cta.scales[c] = n
            yield now
        cta.scaled.arrive()

    # ---- consumers -------------------------------------------------------------------------------
    def consume(self, cta: SimpleNamespace, wg: int, warp: int) -> Warp:
        me = SimpleNamespace(cta=cta, wg=wg, warp=warp, n=0, at=0, syncs=0)
        while True:
            yield cta.queue_full[me.n % self.queue].passed(me.n // self.queue & 1)
            item = self.look(cta, me.n)
            if item is None:
                break
            idle = item.block * WGS + wg >= self.slices.row_tiles
            yield from self.multiply(me)
            if self.broken != "scaled" and not (idle and self.broken == "idle"):
                yield cta.scaled.passed(self.phase(me.n))
            if not idle:
                yield from self.leave(me, item)
            cta.stored.arrive()
            yield now
            self.look(cta, me.n)
            cta.queue_empty[me.n % self.queue].arrive()
            me.n += 1
        cta.ended.arrive()
        if self.broken != "ended":
            yield cta.ended.passed(0)
        cta.stages[me.at % self.ring] = "sums"
        yield from self.add()

    def sync(self, me: SimpleNamespace) -> Warp:
        """Of the warps of a warpgroup."""
        phase, me.syncs = me.syncs & 1, me.syncs + 1
        me.cta.named[me.wg].arrive()
        yield me.cta.named[me.wg].passed(phase)

    def leave(self, me: SimpleNamespace, item: Any) -> Warp:
        """``run`` from the first barrier on, then ``leave``."""
        yield from self.sync(me)
        for c in range(TILE):
            assert me.cta.scales[c] == me.n, "scales of another item"
            me.cta.results[me.wg][me.warp][c] = me.n
            yield now
        if self.broken != "written":
            yield from self.sync(me)
        at = self.buffers[item.slice, item.block]
        for c in range(me.warp, self.problem.counts[item.step], WARPS):
            owner = self.owner(me.cta, me.n, item.step, c)
            assert {of[c] for of in me.cta.results[me.wg]} == {me.n}, "results of another item"
            if owner.slot >= 0:
                self.y[at, me.wg, owner.slot] = owner.slot, item.block
            else:
                self.store(owner.token, item.block * WGS + me.wg, [])
            yield now

    def multiply(self, me: SimpleNamespace) -> Warp:
        for step in range(self.stages):
            slot = me.at % self.ring
            yield me.cta.stage_full[slot].passed(me.at // self.ring & 1)
            assert me.cta.stages[slot] == (me.n, step), "another stage"
            yield now
            me.cta.stage_empty[slot].arrive()
            me.at += 1

    # ---- who adds up -----------------------------------------------------------------------------
    def add(self) -> Warp:
        if self.problem.slots == 0 and not self.several:
            return
        number, self.summed = self.summed, self.summed + 1
        while (item := self.described(number)) is not None:
            number, self.summed = self.summed, self.summed + 1
            if self.broken == "early":
                self.left[item.slice] += self.several
            if self.broken != "tiles":
                yield partial(self.are_done, item)
            for first in range(0, self.problem.counts[item.step], FOUND):
                yield now
                yield from self.add_up(item, first)
            if self.broken != "early":
                self.left[item.slice] += self.several

    def are_done(self, item: Any) -> bool:
        tiles = item.step + (self.broken != "own tile")
        return all((tile, item.block) in self.done for tile in range(tiles))

    def contributions(self, item: Any, slots: list[int]) -> None:
        at = self.buffers[item.slice, item.block]
        for slot, wg in product(slots, range(self.slices.row_tiles_of(item.block))):
            there = self.y.get((at, wg, slot))
            assert there == (slot, item.block), "a contribution that is not there"

    def add_up(self, item: Any, first: int) -> Warp:
        end = min(first + FOUND, self.problem.counts[item.step])
        owners = [self.problem.owners[item.step, c] for c in range(first, end)]
        coming = iter([pair for owner in owners for pair in pairs_of(owner)])
        for _ in range(PAIRS):
            self.contributions(item, next(coming, []))
        for owner in owners:
            for pair in pairs_of(owner):
                yield now
                self.contributions(item, pair)  # they may come as late as this
                self.contributions(item, next(coming, []))
            slots = [slot for slot, _ in owner.parts]
            for wg in range(self.slices.row_tiles_of(item.block) if slots else 0):
                self.store(owner.token, item.block * WGS + wg, slots)

    def store(self, token: int, row_tile: int, slots: list[int]) -> None:
        assert (token, row_tile) not in self.out, "an output twice"
        self.out[token, row_tile] = slots
