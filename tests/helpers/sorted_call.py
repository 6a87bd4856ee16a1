"""Down on tokens in the order of the list, as warps that run in any order of events.

The statements follow ``prefill_ring.cuh``, ``prefill_tables.cuh`` and ``prefill_down.cu``; items,
slices and addresses are their own. A wait that never ends, a contribution that is read before it is
published or after it was overwritten, and tables, scales and results that are another item's all
show. Of a warpgroup there are two warps, which do not go in step.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any

from hopper_sorted import DOWN, TABLES, Slices, constants
from kernel_source import c_find, c_value
from simulated_warps import Barrier, Wait, Warp, run_warps

WGS, WARPS, ADDERS = 3, 2, 2
TILE = 4
"""Most columns; an adder has half of them."""
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
        self.claimed = 0
        self.y: dict[tuple[int, int, int], tuple[int, int]] = {}  # by block's buffer, wg, slot
        self.done: set[tuple[int, int]] = set()
        self.left, self.several = [0] * slices.count(), slices.count() > 2
        self.out: dict[tuple[int, int], list[int]] = {}  # slots that were added up
        c = constants(DOWN, 128)
        self.queue, self.tables, self.ahead = c["kQueue"], c["kTables"], c["kAhead"]
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
            queue_empty=[Barrier(warps + 1 + ADDERS) for _ in range(self.queue)],
            stages=[None] * self.ring,
            stage_full=[Barrier(1) for _ in range(self.ring)],
            stage_empty=[Barrier(warps) for _ in range(self.ring)],
            tables=[None] * self.tables,
            full=[Barrier(1) for _ in range(self.tables)],
            stored=[Barrier(warps) for _ in range(self.tables)],
            scaled=Barrier(1),
            scales=[None] * TILE,  # the item's number
            named=[Barrier(WARPS) for _ in range(WGS)],
            results=[[[None] * TILE for _ in range(WARPS)] for _ in range(WGS)],  # `out`, the same
            not_ended=warps + 2 + ADDERS,
        )

    def run(self) -> None:
        """Until all warps have ended; then all outputs are there."""
        warps = []
        for rank, cta in enumerate(self.ctas):
            mine = [self.produce_stages(cta), self.clerk(cta)]
            mine += [self.finish(cta, which) for which in range(ADDERS)]
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

    # ---- tables ----------------------------------------------------------------------------------
    def value(self, name: str, n: int) -> int:
        """What a function of an item's number returns."""
        text = c_find(TABLES, (f" {name}(int n)",), "return")
        return int(c_value(text, {"n": n, "kTables": self.tables}))

    def barrier(self, cta: SimpleNamespace, name: str, n: int) -> tuple[Barrier, Wait]:
        """``full`` or ``stored`` of the n-th item, and whether its phase has ended."""
        at, parity = self.value("table_of", n), self.value("table_phase", n)
        if self.broken == f"one {name}":
            at, parity = 0, n & 1
        barrier: Barrier = getattr(cta, name)[at]
        return barrier, barrier.passed(parity)

    def passed(self, cta: SimpleNamespace, name: str, n: int) -> Wait:
        return self.barrier(cta, name, n)[1]

    def owner(self, cta: SimpleNamespace, n: int, tile: int, c: int) -> SimpleNamespace:
        assert cta.tables[self.value("table_of", n)] == n, "another item's table"
        return self.problem.owners[tile, c]

    # ---- the clerk -------------------------------------------------------------------------------
    def clerk(self, cta: SimpleNamespace) -> Warp:
        me = SimpleNamespace(cta=cta, settled=0, free_below=0, posted=0, items=1 << 30)
        me.next, self.claimed = self.claimed, self.claimed + 1
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
        if self.broken != "end":
            yield from self.settle(me, me.items)

    def post(self, me: SimpleNamespace) -> Warp:
        if me.posted > me.items:
            return
        item = self.described(me.next)
        me.next, self.claimed = self.claimed, self.claimed + 1
        yield from self.settle(me, me.posted - self.queue + 1)
        me.cta.items[me.posted % self.queue] = me.posted, item
        yield now
        me.cta.queue_full[me.posted % self.queue].arrive()
        if item is None:
            me.items = me.posted
        me.posted += 1

    def settle(self, me: SimpleNamespace, count: int) -> Warp:
        while me.settled < count:
            n = me.settled
            yield me.cta.queue_empty[n % self.queue].passed(n // self.queue & 1)
            yield now
            if self.broken != "early":
                self.left[self.look(me.cta, n).slice] += self.several
            me.settled += 1

    def publish(self, me: SimpleNamespace, n: int) -> Warp:
        item, cta = self.look(me.cta, n), me.cta
        if self.broken == "publish":
            self.done.add((item.step, item.block))
        yield self.passed(cta, "stored", n)
        self.done.add((item.step, item.block))
        if self.broken == "early":
            self.left[item.slice] += self.several

    def fetch(self, me: SimpleNamespace, n: int) -> Warp:
        cta = me.cta
        yield from self.settle(me, n - self.tables + (self.broken != "table"))
        if self.broken != "slice":
            yield from self.wait_slice(me, n)
        full, _ = self.barrier(cta, "full", n)
        full.arrive(1)

        def copy() -> None:
            cta.tables[self.value("table_of", n)] = n
            full.came(1)

        self.on_the_way.append(copy)
        yield now

    def wait_slice(self, me: SimpleNamespace, n: int) -> Warp:
        at = self.look(me.cta, n).slice
        if at < 2 or me.free_below > at - 2:
            return
        last = n
        while last > me.settled and self.look(me.cta, last - 1).slice > at - 2:
            last -= 1
        if self.broken != "settle":
            yield from self.settle(me, last)
        fewer = self.slices.tiles if self.broken == "target" else 0
        yield lambda: self.left[at - 2] >= self.targets[at - 2] - fewer
        me.free_below = at - 1

    def scale(self, me: SimpleNamespace, n: int) -> Warp:
        cta = me.cta
        yield self.passed(cta, "full", n)
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
                return
            idle = item.block * WGS + wg >= self.slices.row_tiles
            yield from self.multiply(me)
            if self.broken != "scaled" and not (idle and self.broken == "idle"):
                yield cta.scaled.passed(self.value("phase_of", me.n))
            if not idle:
                yield from self.leave(me, item)
            self.barrier(cta, "stored", me.n)[0].arrive()
            yield now
            self.look(cta, me.n)
            cta.queue_empty[me.n % self.queue].arrive()
            me.n += 1

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
    def finish(self, cta: SimpleNamespace, which: int) -> Warp:
        n = 0
        while True:
            yield cta.queue_full[n % self.queue].passed(n // self.queue & 1)
            item = self.look(cta, n)
            if item is None:
                return
            yield self.passed(cta, "full", n)
            if self.broken != "stored":
                yield self.passed(cta, "stored", n)
            if self.broken != "tiles":
                yield partial(self.are_done, item)
            yield from self.add_up(cta, n, item, which)
            self.look(cta, n)
            cta.queue_empty[n % self.queue].arrive()
            n += 1

    def are_done(self, item: Any) -> bool:
        return all((tile, item.block) in self.done for tile in range(item.step))

    def contributions(self, item: Any, slots: list[int]) -> None:
        at = self.buffers[item.slice, item.block]
        for slot, wg in product(slots, range(self.slices.row_tiles_of(item.block))):
            there = self.y.get((at, wg, slot))
            assert there == (slot, item.block), "a contribution that is not there"

    def add_up(self, cta: SimpleNamespace, n: int, item: Any, which: int) -> Warp:
        mine = range(which, self.problem.counts[item.step], ADDERS)
        owners = [self.owner(cta, n, item.step, c) for c in mine]
        coming = iter([pair for owner in owners for pair in pairs_of(owner)])
        for _ in range(PAIRS):
            self.contributions(item, next(coming, []))
        for c, owner in zip(mine, owners, strict=True):
            for pair in pairs_of(owner):
                yield now
                self.contributions(item, pair)  # they may come as late as this
                self.contributions(item, next(coming, []))
                self.owner(cta, n, item.step, c)
            slots = [slot for slot, _ in owner.parts]
            for wg in range(self.slices.row_tiles_of(item.block) if slots else 0):
                self.store(owner.token, item.block * WGS + wg, slots)

    def store(self, token: int, row_tile: int, slots: list[int]) -> None:
        assert (token, row_tile) not in self.out, "an output twice"
        self.out[token, row_tile] = slots
