"""Down on tokens in the order of the list, as warps that run in any order of events.

The statements follow ``prefill_ring.cuh``, ``prefill_tables.cuh`` and ``prefill_down.cu``; items,
slices and addresses are their own. A wait that never ends, a contribution that is read before it is
published or after it was overwritten, and a table that is another item's all show. Of a warpgroup
there are two warps, which do not go in step: sums are shared out otherwise than results are.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from hopper_sorted import DOWN, TABLES, Slices, constants
from kernel_source import c_find, c_value
from simulated_warps import Barrier, Wait, Warp, run_warps

WGS, WARPS = 3, 2
TILE = 4
"""Most columns; a warp looks through half of them for sums."""
AT_ONCE = 2
"""Contributions of a warp's first sum that are asked for early; the others while it adds."""


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
        self.random = random.Random(seed)
        self.on_the_way: list[Callable[[], None]] = []
        self.claimed = 0
        self.y: dict[tuple[int, int], tuple[int, int]] = {}  # by row tile's buffer and slot
        self.done: dict[tuple[int, int], int] = {}
        self.left = [0] * slices.count()
        self.out: dict[tuple[int, int], list[int]] = {}  # slots that were added up
        c = constants(DOWN, 128)
        self.queue = c["kQueue"]
        # With tables fewer than the kernel's its numbers and parities are the same expressions.
        self.tables = {"one table": 1, "two tables": 2}.get(broken, c["kTables"])
        self.rows = 2 if broken == "two rows" else self.tables
        self.items: dict[int, Any] = {}
        self.buffers = {
            (s, block, wg): slices.buffer(s, block, wg)
            for s in range(slices.count())
            for block in range(s * slices.per_slice, s * slices.per_slice + slices.blocks_of(s))
            for wg in range(WGS)
        }
        self.targets = [slices.left_target(s) for s in range(slices.count())]
        self.ctas = [self.cta() for _ in range(ctas)]

    def cta(self) -> SimpleNamespace:
        warps = WGS * WARPS
        return SimpleNamespace(
            items=[None] * self.queue,
            queue_full=[Barrier(1) for _ in range(self.queue)],
            queue_empty=[Barrier(warps + 2) for _ in range(self.queue)],
            stages=[None] * self.ring,
            stage_full=[Barrier(1) for _ in range(self.ring)],
            stage_empty=[Barrier(warps) for _ in range(self.ring)],
            tables=[None] * self.rows,
            full=[Barrier(1) for _ in range(self.tables)],
            ready=[Barrier(1) for _ in range(self.tables)],
            empty=[Barrier(warps) for _ in range(self.tables)],
            together=[0] * WGS,
            results=[[None] * TILE for _ in range(WGS)],  # `out`: the item's number of a column
            not_ended=warps + 3,
        )

    def run(self) -> None:
        """Until all warps have ended; then all outputs are there."""
        warps = []
        for rank, cta in enumerate(self.ctas):
            mine = [self.claim(cta), self.produce_stages(cta), self.produce_tables(cta)]
            mine += [self.consume(cta, wg, warp) for wg in range(WGS) for warp in range(WARPS)]
            warps += [self.counted(rank, warp) for warp in mine]
        run_warps(warps, self.random, self.on_the_way)
        assert not self.on_the_way
        for token, slots in self.problem.tokens.items():
            for row_tile in range(self.slices.row_tiles):
                assert self.out.pop((token, row_tile), None) == slots, "another sum"
        assert not self.out
        if self.slices.count() > 2 and self.broken != "end":
            assert self.left == self.targets

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

    def claim(self, cta: SimpleNamespace) -> Warp:
        """``claim``: the item after next is claimed while an item is given."""
        n, number = 0, self.claimed
        self.claimed += 1
        while True:
            then, self.claimed = self.claimed, self.claimed + 1
            item = self.described(number)
            i, phase = n % self.queue, n // self.queue & 1
            yield cta.queue_empty[i].passed(phase ^ 1)
            cta.items[i] = n, item
            yield now
            cta.queue_full[i].arrive()
            if item is None:
                return
            n, number = n + 1, then

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
    def table(self, n: int) -> tuple[int, int]:
        """Number of the n-th item's, and the parity of its barriers."""
        scope = {"n": n, "kTables": self.tables}
        number = c_value(c_find(TABLES, ("int table_of(",), "return"), scope)
        return number, c_value(c_find(TABLES, ("u32 phase_of(",), "return"), scope)

    def owner(self, cta: SimpleNamespace, n: int, tile: int, c: int) -> SimpleNamespace:
        assert cta.tables[self.table(n)[0] % self.rows] == n, "another item's table"
        return self.problem.owners[tile, c]

    def produce_tables(self, cta: SimpleNamespace) -> Warp:
        n = 0
        while (item := (yield from self.next(cta, n))) is not None:
            i, phase = self.table(n)
            if self.broken != "empty":
                yield cta.empty[i].passed(phase ^ 1)
            cta.full[i].arrive(1)

            def copy(n: int = n, i: int = i) -> None:
                cta.tables[i % self.rows] = n
                cta.full[i].came(1)

            self.on_the_way.append(copy)
            yield cta.full[i].passed(phase)
            target = self.slices.row_tiles_of(item.block)
            for c in range(self.problem.counts[item.step]):
                for _, tile in self.owner(cta, n, item.step, c).parts:
                    if tile != item.step and self.broken != "done":
                        place = tile, item.block
                        yield self.is_done(place, target)
            yield now
            cta.ready[i].arrive()
            n += 1

    def is_done(self, place: tuple[int, int], target: int) -> Wait:
        return lambda: self.done.get(place, 0) >= target

    # ---- consumers -------------------------------------------------------------------------------
    def sync(self, cta: SimpleNamespace, wg: int) -> Warp:
        cta.together[wg] += 1
        wanted = -(-cta.together[wg] // WARPS) * WARPS
        yield lambda: cta.together[wg] >= wanted

    def contribution(self, at: int, slot: int, block: int) -> None:
        assert self.y.get((at, slot)) == (slot, block), "a contribution that is not there"

    def consume(self, cta: SimpleNamespace, wg: int, warp: int) -> Warp:
        nothing = SimpleNamespace(slice=-1)
        me = SimpleNamespace(cta=cta, wg=wg, warp=warp, n=0, at=0, before=nothing, free_below=0)
        while True:
            yield cta.queue_full[me.n % self.queue].passed(me.n // self.queue & 1)
            item = self.look(cta, me.n)
            if item is None:
                break
            idle = (item.block * WGS + wg) >= self.slices.row_tiles
            two_on = item.slice > me.before.slice + 1
            if (idle and self.broken != "idle") or (two_on and self.broken != "settle"):
                yield from self.settle(me)
            if idle:
                yield from self.multiply(me)
                i, phase = self.table(me.n)
                if self.broken != "skip":
                    yield cta.ready[i].passed(phase)
                cta.empty[i].arrive()
            else:
                yield from self.work(me, item)
            self.look(cta, me.n)
            cta.queue_empty[me.n % self.queue].arrive()
            me.n += 1
        if self.broken != "end":
            yield from self.settle(me)

    def multiply(self, me: SimpleNamespace) -> Warp:
        for step in range(self.stages):
            slot = me.at % self.ring
            yield me.cta.stage_full[slot].passed(me.at // self.ring & 1)
            assert me.cta.stages[slot] == (me.n, step), "another stage"
            yield now
            me.cta.stage_empty[slot].arrive()
            me.at += 1

    def work(self, me: SimpleNamespace, item: Any) -> Warp:
        cta, wg, results = me.cta, me.wg, me.cta.results[me.wg]
        count, row_tile = self.problem.counts[item.step], item.block * WGS + wg
        yield from self.multiply(me)
        coming = yield from self.ask(me)
        i, phase = self.table(me.n)
        yield cta.full[i].passed(phase)
        for c in range(me.warp, TILE, WARPS):  # as little a warp's own columns as wgmma's are
            results[c] = me.n
        if self.broken != "slice":
            yield from self.wait_slice(me, item.slice)
        yield from self.sync(cta, wg)
        at = self.buffers[item.slice, item.block, wg]
        for c in range(me.warp * TILE // WARPS, min(count, (me.warp + 1) * TILE // WARPS)):
            owner = self.owner(cta, me.n, item.step, c)
            assert results[c] == me.n, "results of another item"
            if owner.slot >= 0:
                self.y[at, owner.slot] = owner.slot, item.block
            else:
                self.store(owner.token, row_tile, [])
            yield now
        if self.broken == "early" and me.warp == 0 and me.before.slice >= 0:
            self.left[me.before.slice] += 1
        yield from self.add_up(me, coming)
        if self.broken != "sync":
            yield from self.sync(cta, wg)
        if me.warp == 0:
            place = item.step, item.block
            self.done[place] = self.done.get(place, 0) + 1
            yield now
            if me.before.slice >= 0 and self.broken != "early":
                self.left[me.before.slice] += 1
        me.before = item

    def wait_slice(self, me: SimpleNamespace, at: int) -> Warp:
        if at < 2 or me.free_below > at - 2:
            return
        fewer = self.slices.tiles if self.broken == "target" else 0
        yield lambda: self.left[at - 2] >= self.targets[at - 2] - fewer
        me.free_below = at - 1

    def settle(self, me: SimpleNamespace) -> Warp:
        if me.before.slice < 0:
            return
        coming = yield from self.ask(me)
        yield from self.add_up(me, coming)
        yield from self.sync(me.cta, me.wg)
        if me.warp == 0:
            self.left[me.before.slice] += 1
        me.before = SimpleNamespace(slice=-1)

    def ask(self, me: SimpleNamespace) -> Any:
        """Columns of the item before that this warp adds up, and what is asked for already."""
        before = me.before
        if before.slice < 0:
            return []
        i, phase = self.table(me.n - 1)
        if self.broken != "ready":
            yield me.cta.ready[i].passed(phase)
        count = self.problem.counts[before.step]
        found: list[tuple[int, int, list[int], int]] = []
        # Here a warp has the columns that another one stored.
        for c in range(me.warp, count, WARPS):
            owner = self.owner(me.cta, me.n - 1, before.step, c)
            if owner.parts:
                early = AT_ONCE if not found else 0
                found.append((c, owner.token, [slot for slot, _ in owner.parts], early))
        for _, _, slots, early in found:
            for slot in slots[:early]:
                self.contribution(self.buffer_before(me), slot, before.block)
        yield now
        return found

    def buffer_before(self, me: SimpleNamespace) -> int:
        return self.buffers[me.before.slice, me.before.block, me.wg]

    def add_up(self, me: SimpleNamespace, coming: Any) -> Warp:
        before = me.before
        if before.slice < 0:
            return
        for c, token, slots, _ in coming:
            for slot in slots:  # also what was asked for: it may come as late as this
                self.contribution(self.buffer_before(me), slot, before.block)
                yield now
            self.owner(me.cta, me.n - 1, before.step, c)
            self.store(token, before.block * WGS + me.wg, slots)
        yield now
        me.cta.empty[self.table(me.n - 1)[0]].arrive()

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
