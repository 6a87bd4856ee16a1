"""Down on tokens in the order of the list, as warps that run in any order of events.

The statements follow ``prefill_ring.cuh``, ``prefill_tables.cuh`` and ``prefill_down.cu``; items,
slices and addresses are their own. A wait that never ends, a contribution that is read before it is
published or after it was overwritten, results that are overwritten before they are through, and a
table that is another item's all show. Of a warpgroup there are two warps, which do not go in step.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from hopper_sorted import DOWN, TABLES, Slices, constants
from kernel_source import c_find, c_value
from simulated_warps import Barrier, Warp, run_warps

WGS, WARPS, FINISHERS = 3, 2, 2
TILE = 4
"""Most columns; a finisher has half of them."""
CELLS = 3
"""Contributions that are asked for ahead."""


def now() -> bool:
    """For a warp that lets others go first."""
    return True


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
        self.dynamic = seed % 2 == 1
        self.random = random.Random(seed)
        self.on_the_way: list[Callable[[], None]] = []
        self.claimed = 0
        self.y: dict[tuple[int, int, int], tuple[int, int]] = {}  # by block's buffer, wg, slot
        self.done: set[tuple[int, int]] = set()
        self.left = [0] * slices.count()
        self.out: dict[tuple[int, int], list[int]] = {}  # slots that were added up
        c = constants(DOWN, 128)
        self.queue = c["kQueue"]
        # With tables fewer than the kernel's the numbers are the same expressions.
        self.tables = 1 if broken == "one table" else c["kTables"]
        assert c["kFinishers"] == FINISHERS
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
            queue_empty=[Barrier(warps + 1 + FINISHERS) for _ in range(self.queue)],
            stages=[None] * self.ring,
            stage_full=[Barrier(1) for _ in range(self.ring)],
            stage_empty=[Barrier(warps) for _ in range(self.ring)],
            tables=[None] * self.tables,
            full=Barrier(1),
            written=Barrier(warps),
            through=Barrier(FINISHERS),
            ready=Barrier(1),
            results=[[None] * TILE for _ in range(WGS)],  # `out`: the item's number of a column
            not_ended=warps + 2 + FINISHERS,
        )

    def run(self) -> None:
        """Until all warps have ended; then all outputs are there."""
        warps = []
        for rank, cta in enumerate(self.ctas):
            mine = [self.produce_stages(cta), self.clerk(cta)]
            mine += [self.finish(cta, which) for which in range(FINISHERS)]
            mine += [self.consume(cta, wg, warp) for wg in range(WGS) for warp in range(WARPS)]
            warps += [self.counted(rank, warp) for warp in mine]
        run_warps(warps, self.random, self.on_the_way)
        assert not self.on_the_way
        for token, slots in self.problem.tokens.items():
            for row_tile in range(self.slices.row_tiles):
                assert self.out.pop((token, row_tile), None) == slots, "another sum"
        assert not self.out
        if self.slices.count() > 2:
            assert self.left == self.targets, "a slice that is not left"

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

    def next(self, cta: SimpleNamespace, n: int) -> Any:
        yield cta.queue_full[n % self.queue].passed(n // self.queue & 1)
        item = self.look(cta, n)
        yield now
        cta.queue_empty[n % self.queue].arrive()
        return item

    def produce_stages(self, cta: SimpleNamespace) -> Warp:
        n = at = 0
        while (yield from self.next(cta, n)) is not None:
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
    def table(self, n: int) -> int:
        """Number of the n-th item's."""
        text = c_find(TABLES, ("int table_of(",), "return")
        return int(c_value(text, {"n": n, "kTables": self.tables}))

    def phase(self, n: int) -> int:
        return int(c_value(c_find(TABLES, ("u32 phase_of(",), "return"), {"n": n}))

    def owner(self, cta: SimpleNamespace, n: int, tile: int, c: int) -> SimpleNamespace:
        assert cta.tables[self.table(n)] == n, "another item's table"
        return self.problem.owners[tile, c]

    # ---- the clerk -------------------------------------------------------------------------------
    def clerk(self, cta: SimpleNamespace) -> Warp:
        me = SimpleNamespace(cta=cta, settled=0, free_below=0)
        next_, self.claimed = self.claimed, self.claimed + 1
        i, items = 0, 1 << 30
        while i < items + self.queue - 1:
            item = None
            if i <= items:
                number, next_ = next_, self.claimed
                self.claimed += 1
                item = self.described(number)
            yield from self.settle(me, i - self.queue + 1)
            if i <= items:
                cta.items[i % self.queue] = i, item
                yield now
                cta.queue_full[i % self.queue].arrive()
                if item is None:
                    items = i
            steps = [(self.publish, i - self.queue + 1), (self.fetch, i - self.queue + 2)]
            if self.broken == "fetch first":
                steps = steps[::-1]
            for step, n in steps:
                if 0 <= n < items:
                    yield from step(me, n)
            i += 1
        if self.broken != "end":
            yield from self.settle(me, items)

    def settle(self, me: SimpleNamespace, count: int) -> Warp:
        while me.settled < count:
            n = me.settled
            yield me.cta.queue_empty[n % self.queue].passed(n // self.queue & 1)
            yield now
            if self.broken != "early":
                self.left[self.look(me.cta, n).slice] += 1
            me.settled += 1

    def publish(self, me: SimpleNamespace, n: int) -> Warp:
        item, cta = self.look(me.cta, n), me.cta
        waits = {"ready": lambda: self.are_done(item), "through": cta.through.passed(self.phase(n))}
        if self.broken == "through":
            self.done.add((item.step, item.block))
        while waits:
            yield lambda: any(wait() for wait in waits.values())
            there = self.random.choice([name for name, wait in waits.items() if wait()])
            del waits[there]
            yield now
            if there == "ready":
                cta.ready.arrive()
            else:
                self.done.add((item.step, item.block))
                if self.broken == "early":
                    self.left[item.slice] += 1

    def are_done(self, item: Any) -> bool:
        before = range(item.step if self.broken != "done" else 0)
        return all((tile, item.block) in self.done for tile in before)

    def fetch(self, me: SimpleNamespace, n: int) -> Warp:
        cta, at = me.cta, self.look(me.cta, n).slice
        if at >= 2 and me.free_below <= at - 2 and self.broken != "slice":
            if self.broken != "settle":
                yield from self.settle(me, n)
            fewer = self.slices.tiles if self.broken == "target" else 0
            yield lambda: self.left[at - 2] >= self.targets[at - 2] - fewer
            me.free_below = at - 1
        cta.full.arrive(1)

        def copy() -> None:
            cta.tables[self.table(n)] = n
            cta.full.came(1)

        self.on_the_way.append(copy)
        yield now

    # ---- consumers -------------------------------------------------------------------------------
    def consume(self, cta: SimpleNamespace, wg: int, warp: int) -> Warp:
        me = SimpleNamespace(cta=cta, wg=wg, n=0, at=0)
        while True:
            yield cta.queue_full[me.n % self.queue].passed(me.n // self.queue & 1)
            item = self.look(cta, me.n)
            if item is None:
                return
            idle = item.block * WGS + wg >= self.slices.row_tiles
            yield from self.multiply(me)
            if self.broken != "out" and not (idle and self.broken == "idle"):
                yield cta.through.passed(self.phase(me.n) ^ 1)
            if not idle:
                if self.dynamic:
                    yield cta.full.passed(self.phase(me.n))
                for c in range(warp, TILE, WARPS):
                    if self.dynamic and c < self.problem.counts[item.step]:
                        self.owner(cta, me.n, item.step, c)
                    cta.results[wg][c] = me.n
                    yield now
            cta.written.arrive()
            yield now
            self.look(cta, me.n)
            cta.queue_empty[me.n % self.queue].arrive()
            me.n += 1

    def multiply(self, me: SimpleNamespace) -> Warp:
        for step in range(self.stages):
            slot = me.at % self.ring
            yield me.cta.stage_full[slot].passed(me.at // self.ring & 1)
            assert me.cta.stages[slot] == (me.n, step), "another stage"
            yield now
            me.cta.stage_empty[slot].arrive()
            me.at += 1

    # ---- finishers -------------------------------------------------------------------------------
    def finish(self, cta: SimpleNamespace, which: int) -> Warp:
        n = 0
        while True:
            yield cta.queue_full[n % self.queue].passed(n // self.queue & 1)
            item = self.look(cta, n)
            if item is None:
                return
            phase = self.phase(n)
            if self.broken != "full":
                yield cta.full.passed(phase)
            if self.broken != "written":
                yield cta.written.passed(phase)
            yield from self.leave(cta, n, item, which)
            cta.through.arrive()
            if self.broken != "sync":
                yield cta.through.passed(phase)
            if self.broken != "ready":
                yield cta.ready.passed(phase)
            yield from self.add_up(cta, n, item, which)
            self.look(cta, n)
            cta.queue_empty[n % self.queue].arrive()
            n += 1

    def row_tiles(self, item: Any) -> range:
        return range(self.slices.row_tiles_of(item.block))

    def leave(self, cta: SimpleNamespace, n: int, item: Any, which: int) -> Warp:
        at = self.buffers[item.slice, item.block]
        for c in range(which, self.problem.counts[item.step], FINISHERS):
            owner = self.owner(cta, n, item.step, c)
            for wg in self.row_tiles(item):
                assert cta.results[wg][c] == n, "results of another item"
                if owner.slot >= 0:
                    self.y[at, wg, owner.slot] = owner.slot, item.block
                else:
                    self.store(owner.token, item.block * WGS + wg, [])
            yield now

    def contribution(self, item: Any, slot: int) -> None:
        at = self.buffers[item.slice, item.block]
        for wg in self.row_tiles(item):
            there = self.y.get((at, wg, slot)) == (slot, item.block)
            assert there, "a contribution that is not there"

    def add_up(self, cta: SimpleNamespace, n: int, item: Any, which: int) -> Warp:
        mine = range(which, self.problem.counts[item.step], FINISHERS)
        owners = [self.owner(cta, n, item.step, c) for c in mine]
        coming = [slot for owner in owners for slot, _ in owner.parts]
        for slot in coming[:CELLS]:
            self.contribution(item, slot)
        asked = CELLS
        for c, owner in zip(mine, owners, strict=True):
            for slot, _ in owner.parts:
                yield now
                self.contribution(item, slot)  # it may come as late as this
                for next_slot in coming[asked : asked + 1]:
                    self.contribution(item, next_slot)
                asked += 1
                self.owner(cta, n, item.step, c)
            for wg in self.row_tiles(item):
                if owner.parts:
                    slots = [slot for slot, _ in owner.parts]
                    self.store(owner.token, item.block * WGS + wg, slots)

    def store(self, token: int, row_tile: int, slots: list[int]) -> None:
        assert (token, row_tile) not in self.out, "an output twice"
        self.out[token, row_tile] = slots


def random_call(seed: int, broken: str = "") -> Call:
    """Few tiles and many slices as often as not; warpgroups without a row tile, too."""
    order = random.Random(seed)
    counts = [order.randint(1, TILE) for _ in range(order.randint(1, 5))]
    problem = Problem(order, counts, order.randint(1, 2 * len(counts)))
    block_bytes = max(problem.slots, 1) * WGS * 128
    slices = Slices(
        order.randint(1, 16),
        len(counts),
        problem.slots,
        order.choice((2, 2, 3, 4, 9)) * block_bytes,
    )
    shape = order.randint(1, 3), order.randint(2, 4)
    ctas = order.choice((1, 2, 2, 3, 5))
    return Call(problem, slices, seed, ctas, shape, order.random() < 0.1, broken)
