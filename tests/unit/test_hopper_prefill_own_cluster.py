"""CTAs that own outputs and share weights, in any order of events, without a GPU.

The statements follow ``prefill_own_jobs.cuh``, ``prefill_own.cuh`` and ``prefill_own_down.cu``; a
barrier that never opens, a wait that mistakes a phase for the one two before it, and a slot that is
overwritten too early all show. Of a warpgroup there are two warps, which do not go in step.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
from simulated_warps import Barrier, Warp, run_warps

from sglang_w4afp8.kernels.hopper.plan_own import OWN_MOST_SLOTS, OWN_TOKEN_SLOTS

WARPS = 2  # of a warpgroup; four do the same


@dataclass(frozen=True)
class Sizes:
    """Of a kernel, and of what is left out of it."""

    weight_slots: int = 6
    token_slots: int = 4
    token_warps: int = 4
    weight_warps: int = 1
    cluster: int = 2
    wgs: int = 3
    broken: str = ""

    @property
    def early(self) -> bool:
        return self.weight_slots >= 2 * self.wgs or self.broken == "early"


class Cluster:
    """CTAs of a cluster.

    Args:
        sizes: of slots.
        jobs: their numbers of steps.
        seed: of the order of events.
    """

    def __init__(self, sizes: Sizes, jobs: list[int], seed: int) -> None:
        self.z, self.jobs = sizes, jobs
        self.random = random.Random(seed)
        self.on_the_way: list[Callable[[], None]] = []
        self.claimed = 0
        self.ctas = [self.cta() for _ in range(sizes.cluster)]

    def cta(self) -> SimpleNamespace:
        z = self.z
        users = z.wgs * WARPS + z.weight_warps + z.token_warps
        cta = SimpleNamespace(
            weights_full=[Barrier(1) for _ in range(z.weight_slots)],
            weights_empty=[Barrier(WARPS * z.cluster) for _ in range(z.weight_slots)],
            tokens_full=[Barrier(2) for _ in range(z.token_slots)],
            tokens_empty=[Barrier(WARPS) for _ in range(z.token_slots)],
            table_full=[Barrier(1) for _ in range(2)],
            table_empty=[Barrier(users) for _ in range(2)],
            number_full=[Barrier(1) for _ in range(2)],
            number_empty=[Barrier(z.cluster) for _ in range(2)],
            turn=[[Barrier(1) for _ in range(WARPS)] for _ in range(z.wgs)],
            weights=[None] * z.weight_slots,
            tokens=[None] * z.token_slots,
            metas=[None] * (2 * z.token_slots),
            numbers=[-1, -1],
            tables=[None, None],
            added=[[] for _ in range(WARPS)],
            # Of named barriers, how many warps have come
            together=0,
        )
        for bar in cta.weights_full:
            bar.arrive(2)  # codes and scales
        for warp in range(WARPS):
            cta.turn[0][warp].arrive()
        return cta

    def run(self) -> None:
        """Until all warps have ended."""
        z, warps = self.z, []
        for rank in range(z.cluster):
            warps.append(self.describe(rank))
            warps += [self.produce_weights(rank, part) for part in range(z.weight_warps)]
            warps += [self.produce_tokens(rank, part) for part in range(z.token_warps)]
            for wg in range(z.wgs):
                warps += [self.consume(rank, wg, warp) for warp in range(WARPS)]
        run_warps(warps, self.random, self.on_the_way)
        assert not self.on_the_way
        for cta in self.ctas:
            assert all(added == list(range(sum(self.jobs))) for added in cta.added), "out of order"

    def describe(self, rank: int) -> Warp:
        mine, n = self.ctas[rank], 0
        while True:
            i, phase = n & 1, n >> 1 & 1
            if rank == 0:
                yield mine.number_empty[i].passed(phase ^ 1)
                for to in self.ctas:
                    to.numbers[i] = self.claimed
                    yield lambda: True
                    to.number_full[i].arrive()
                self.claimed += 1
            yield mine.number_full[i].passed(phase)
            number = mine.numbers[i]
            yield lambda: True
            self.ctas[0].number_empty[i].arrive()
            yield mine.table_empty[i].passed(phase ^ 1)
            assert number == n, "a job twice or never"
            steps = self.jobs[n] if n < len(self.jobs) else -1
            mine.tables[i] = n, steps
            yield lambda: True
            mine.table_full[i].arrive()
            if steps < 0:
                return
            n += 1

    def job(self, rank: int, n: int) -> int:
        number, steps = self.ctas[rank].tables[n & 1]
        assert number == n, "another job's table"
        return steps

    def produce_weights(self, rank: int, part: int) -> Warp:
        z, mine, number, n = self.z, self.ctas[rank], 0, 0
        phases = [0] * z.weight_slots
        while True:
            yield mine.table_full[n & 1].passed(n >> 1 & 1)
            steps = self.job(rank, n)
            if steps < 0:
                return
            for _ in range(steps):
                step, number = number, number + 1
                if step % (z.cluster * z.weight_warps) != rank + z.cluster * part:
                    continue
                slot = step % z.weight_slots
                if step >= z.weight_slots:
                    yield mine.weights_empty[slot].passed(phases[slot])
                    phases[slot] ^= 1
                self.job(rank, n)

                def copy(to: SimpleNamespace, what: int, slot: int = slot) -> None:
                    to.weights[slot] = what
                    to.weights_full[slot].came(1)

                for cta in self.ctas:
                    self.on_the_way += [partial(copy, cta, step)] * 2
                yield lambda: True
            mine.table_empty[n & 1].arrive()
            n += 1

    def produce_tokens(self, rank: int, part: int) -> Warp:
        z, mine = self.z, self.ctas[rank]
        n, own, base, steps, now = -1, part, 0, 0, None
        while True:
            # fetch
            of_now, later = n, False
            while own >= steps:
                if now is not None and n > of_now and z.broken != "ahead":
                    later = True  # the job of `now` must end before the next table is there
                    break
                own, base = own - steps, base + steps
                if n >= 0:
                    mine.table_empty[n & 1].arrive()
                n += 1
                yield mine.table_full[n & 1].passed(n >> 1 & 1)
                steps = self.job(rank, n)
                if steps < 0:
                    break
            then = (base + own, n) if steps >= 0 and not later else None
            own += z.token_warps if then is not None else 0
            if now is not None:
                number, of_job = now
                slot = number % z.token_slots
                yield mine.tokens_empty[slot].passed(number // z.token_slots & 1 ^ 1)

                def copy(number: int = number, slot: int = slot) -> None:
                    mine.tokens[slot] = number
                    mine.tokens_full[slot].came(1)

                mine.tokens_full[slot].arrive(1)
                self.on_the_way.append(copy)
                yield lambda: True
                self.job(rank, of_job)  # exponents of its table
                mine.metas[number % (2 * z.token_slots)] = number
                yield lambda: True
                mine.tokens_full[slot].arrive()
            if then is None and not later:
                return
            now = then

    def load(self, rank: int, warp: int, number: int) -> Warp:
        z, mine = self.z, self.ctas[rank]
        slot = number % z.weight_slots
        yield mine.weights_full[slot].passed(number // z.weight_slots & 1)
        for _ in range(2):
            assert mine.weights[slot] == number, "other weights"
            yield lambda: True
        if warp == 0:
            mine.weights_full[slot].arrive(2)
        to = (number + z.weight_slots) % z.cluster
        self.ctas[to].weights_empty[slot].arrive()

    def take(self, rank: int, wg: int, warp: int, number: int, another: bool, turns: int) -> Warp:
        z, mine = self.z, self.ctas[rank]
        slot, meta = number % z.token_slots, number % (2 * z.token_slots)
        yield mine.tokens_full[slot].passed(number // z.token_slots & 1)
        for _ in range(2):
            assert mine.tokens[slot] == number, "other tokens"
            yield lambda: True
        mine.tokens_empty[slot].arrive()
        if z.early and another:
            yield from self.load(rank, warp, number + z.wgs)
        for _ in range(2):
            assert mine.metas[meta] == number, "other columns"
            yield lambda: True
        yield mine.turn[wg][warp].passed(turns & 1)
        mine.added[warp].append(number)
        yield lambda: True
        mine.turn[(wg + 1) % z.wgs][warp].arrive()
        if not z.early and another:
            yield from self.load(rank, warp, number + z.wgs)

    def sync(self, rank: int) -> Warp:
        mine, all_warps = self.ctas[rank], self.z.wgs * WARPS
        mine.together += 1
        wanted = -(-mine.together // all_warps) * all_warps
        yield lambda: mine.together >= wanted

    def consume(self, rank: int, wg: int, warp: int) -> Warp:
        z, mine = self.z, self.ctas[rank]
        number, own, n, turns = 0, wg, 0, 0
        while True:
            yield mine.table_full[n & 1].passed(n >> 1 & 1)
            steps = self.job(rank, n)
            if steps < 0:
                return
            if own < steps:
                yield from self.load(rank, warp, number + own)
            while own < steps:
                another = own + z.wgs < steps
                yield from self.take(rank, wg, warp, number + own, another, turns)
                turns, own = turns + 1, own + z.wgs
            own, number = own - steps, number + steps
            yield from self.sync(rank)
            assert len(mine.added[warp]) == number, "sums that are not complete"
            self.job(rank, n)  # exponents of its table
            yield from self.sync(rank)
            mine.table_empty[n & 1].arrive()
            n += 1


def errors(sizes: Sizes, jobs: list[int], seeds: int) -> set[str]:
    """What goes wrong in so many orders of events."""
    found = set()
    for seed in range(seeds):
        try:
            Cluster(sizes, jobs, seed).run()
        except AssertionError as error:
            found.add(str(error).splitlines()[0])
    return found


JOBS = [[7, 4, 1, 9], [0, 0, 5, 0, 3], [40], [1] * 9, [13, 17, 2]]
PLANNED = [
    Sizes(slots, token_slots, token_warps, weight_warps, cluster)
    for token_slots, token_warps in OWN_TOKEN_SLOTS
    for slots in (max(3, token_slots - 1), token_slots, OWN_MOST_SLOTS)
    for cluster in (1, 2)
    for weight_warps in (1, 2)
    if weight_warps == 1 or (slots % (2 * cluster) == 0 and token_warps < 6)
]


@pytest.mark.parametrize("sizes", sorted({*PLANNED}, key=str), ids=str)
def test_steps_have_their_weights_and_tokens_and_come_in_order(sizes: Sizes) -> None:
    for jobs in JOBS:
        assert errors(sizes, jobs, 4) == set()


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(token_slots=4, token_warps=3),
        Sizes(token_slots=3, token_warps=2),
        Sizes(weight_slots=4, broken="early"),
        Sizes(weight_slots=5, broken="early"),
        Sizes(weight_slots=5, weight_warps=2),
        Sizes(weight_slots=2, token_slots=3, token_warps=3),
        Sizes(token_slots=2, token_warps=2),
        Sizes(broken="ahead"),
    ],
    ids=str,
)
def test_the_simulation_sees_what_must_not_be(sizes: Sizes) -> None:
    """Warps that do not divide slots, weights ahead with few slots, fewer slots than warpgroups.

    And a warp that waits for the table of a job while it keeps tokens of the last but one.
    """
    assert errors(sizes, [40, 23, 1, 1, 30], 150) != set()
