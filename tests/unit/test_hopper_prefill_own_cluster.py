"""CTAs that own outputs and share weights, in any order of events, without a GPU.

The statements follow ``prefill_own_jobs.cuh``, ``prefill_own.cuh`` and ``prefill_own_down.cu``; a
barrier that never opens, a wait that mistakes a phase for the one two before it, and a slot that is
overwritten too early all show. Of a warpgroup there are two warps, which do not go in step. Jobs in
parts are those of several clusters.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
from hopper_own import Part, Work
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
        work: shared with other clusters.
    """

    def __init__(self, sizes: Sizes, work: Work) -> None:
        self.z, self.work, self.on_the_way = sizes, work, work.on_the_way
        self.claims: list[int] = []  # numbers as they were claimed
        self.parts: list[int] = []  # and those of parts that they stand for
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
            # A warp hands over or writes the sums of some tokens.
            sums=[[] for _ in range(z.wgs * WARPS)],
            # Of named barriers, how many warps have come
            together=0,
        )
        for bar in cta.weights_full:
            bar.arrive(2)  # codes and scales
        for warp in range(WARPS):
            cta.turn[0][warp].arrive()
        return cta

    def warps(self) -> list[Warp]:
        z, warps = self.z, []
        for rank in range(z.cluster):
            warps.append(self.describe(rank))
            warps += [self.produce_weights(rank, part) for part in range(z.weight_warps)]
            warps += [self.produce_tokens(rank, part) for part in range(z.token_warps)]
            for wg in range(z.wgs):
                warps += [self.consume(rank, wg, warp) for warp in range(WARPS)]
        return warps

    def check(self) -> None:
        """When all warps have ended."""
        steps = sum(max(0, self.work.part(number).steps) for number in self.parts)
        for cta in self.ctas:
            assert all(added == list(range(steps)) for added in cta.added), "out of order"

    def describe(self, rank: int) -> Warp:
        mine, n, claims, pending = self.ctas[rank], 0, 0, list[int]()
        while True:
            if not pending:
                i, phase = claims & 1, claims >> 1 & 1
                if rank == 0:
                    yield mine.number_empty[i].passed(phase ^ 1)
                    self.claims.append(self.work.claimed)
                    self.parts += self.work.claim(self.work.claimed)
                    self.work.claimed += 1
                    for to in self.ctas:
                        to.numbers[i] = self.claims[claims]
                        yield lambda: True
                        to.number_full[i].arrive()
                yield mine.number_full[i].passed(phase)
                number = mine.numbers[i]
                yield lambda: True
                self.ctas[0].number_empty[i].arrive()
                assert number == self.claims[claims], "a number twice or never"
                pending += self.work.claim(number)
                claims += 1
            yield mine.table_empty[n & 1].passed(n >> 1 & 1 ^ 1)
            part = pending.pop(0)
            assert part == self.parts[n], "a job twice or never"
            job = mine.tables[n & 1] = self.work.part(part)
            yield lambda: True
            mine.table_full[n & 1].arrive()
            if job.steps < 0:
                return
            n += 1

    def job(self, rank: int, n: int) -> Part:
        job: Part = self.ctas[rank].tables[n & 1]
        assert job.number == self.parts[n], "another job's table"
        return job

    def produce_weights(self, rank: int, part: int) -> Warp:
        z, mine, number, n = self.z, self.ctas[rank], 0, 0
        phases = [0] * z.weight_slots
        while True:
            yield mine.table_full[n & 1].passed(n >> 1 & 1)
            steps = self.job(rank, n).steps
            if steps < 0:
                return
            in_turn = z.cluster * z.weight_warps
            for i in range((rank + z.cluster * part - number) % in_turn, steps, in_turn):
                step = number + i
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
            number += steps
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
                steps = self.job(rank, n).steps
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

    def take(
        self,
        rank: int,
        wg: int,
        warp: int,
        number: int,
        another: bool,
        turns: int,
        of: tuple[int, int],
    ) -> Warp:
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
        for sums in mine.sums:
            sums.append((*of, warp))
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
            job = self.job(rank, n)
            steps = job.steps
            if steps < 0:
                return
            if own < steps:
                yield from self.load(rank, warp, number + own)
            while own < steps:
                another, of = own + z.wgs < steps, (job.number, own)
                yield from self.take(rank, wg, warp, number + own, another, turns, of)
                turns, own = turns + 1, own + z.wgs
            own, number = own - steps, number + steps
            yield from self.sync(rank)
            assert len(mine.added[warp]) == number, "sums that are not complete"
            sync = partial(self.sync, rank)
            yield from self.work.finish(job, rank, wg * WARPS + warp, mine.sums, sync)
            self.job(rank, n)  # exponents of its table were needed
            mine.table_empty[n & 1].arrive()
            n += 1


Jobs = list[list[int]]  # steps of their parts


def run(sizes: Sizes, jobs: Jobs, seed: int, clusters: int, joined: tuple[int, ...]) -> None:
    """Until all warps of some clusters have ended."""
    work = Work(jobs, WARPS, sizes.broken, joined)
    running = [Cluster(sizes, work) for _ in range(clusters)]
    warps = [warp for cluster in running for warp in cluster.warps()]
    run_warps(warps, random.Random(seed), work.on_the_way)
    assert not work.on_the_way
    for cluster in running:
        cluster.check()
    work.check(sizes.cluster, sizes.wgs * WARPS)


def errors(
    sizes: Sizes, jobs: Jobs, seeds: int, clusters: int = 1, joined: tuple[int, ...] = ()
) -> set[str]:
    """What goes wrong in so many orders of events."""
    found = set()
    for seed in range(seeds):
        try:
            run(sizes, jobs, seed, clusters, joined)
        except AssertionError as error:
            found.add(str(error).splitlines()[0])
    return found


def whole(*jobs: int) -> Jobs:
    """Jobs that are not in parts."""
    return [[steps] for steps in jobs]


JOBS = [whole(7, 4, 1, 9), whole(0, 0, 5, 0, 3), whole(40), whole(*[1] * 9), whole(13, 17, 2)]
IN_PARTS = [
    [[7], [4], [5], [3, 2], [1, 4]],
    [[2, 1, 0, 3], [0, 0, 0, 0], [4, 0, 1, 1]],
    [[1], [1, 0], [0, 2], [9, 1], [1, 1]],
    [[6, 5, 7]],
]
# As shares have them: three of two jobs, five of three, seven of four
IN_SHARES: list[tuple[Jobs, tuple[int, ...]]] = [
    ([[6, 2], [3, 5]], (1,)),
    ([[4], [2, 1], [2, 3], [0, 5]], (2, 4)),
    ([[3, 1], [2, 4, 0], [1, 3, 2], [2, 7]], (1, 4, 7)),
    ([[0, 0], [0, 0]], (1,)),
]
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
    assert errors(sizes, whole(40, 23, 1, 1, 30), 150) != set()


@pytest.mark.parametrize("clusters", [1, 2, 3])
@pytest.mark.parametrize("cluster", [1, 2])
def test_parts_of_a_job_meet_in_the_last(cluster: int, clusters: int) -> None:
    """Whichever clusters have them, however far ahead they claim."""
    for jobs in IN_PARTS:
        assert errors(Sizes(cluster=cluster), jobs, 6, clusters) == set()


@pytest.mark.parametrize("clusters", [1, 2, 3])
@pytest.mark.parametrize("cluster", [1, 2])
def test_a_share_may_be_the_end_of_a_job_and_the_beginning_of_the_next(
    cluster: int, clusters: int
) -> None:
    for jobs, joined in IN_SHARES:
        assert errors(Sizes(cluster=cluster), jobs, 6, clusters, joined) == set()


@pytest.mark.parametrize(
    ("broken", "wanted"),
    [
        ("flag first", "sums that were not handed over"),
        ("no sync", "sums that were not handed over"),
        ("one waits", "sums that were not handed over"),
        ("not cleared", "other sums"),
        ("first waits", "nobody can go on"),
    ],
)
def test_the_simulation_sees_parts_that_do_not_meet(broken: str, wanted: str) -> None:
    """A flag before all sums are in memory, warps that do not wait for it, and sums that stay.

    And a first part that waits for others: its own cluster may have claimed them.
    """
    assert wanted in errors(Sizes(cluster=1, broken=broken), IN_PARTS[0], 30, 2)
