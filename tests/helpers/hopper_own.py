"""``prefill_own_jobs.cuh`` on the CPU: shared memory, and the steps of jobs.

Constants and expressions are the kernel's own; the statements around them follow it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from types import SimpleNamespace
from typing import Any

from kernel_source import c_constants, c_find, c_locals, c_offsets, c_value
from simulated_warps import Warp

from sglang_w4afp8.kernels.hopper.build import CSRC
from sglang_w4afp8.kernels.hopper.plan import Kernel

KERNEL, JOBS, FEED = "prefill_own_down.cu", "prefill_own_jobs.cuh", "prefill_own.cuh"


def own_constants(kernel: Kernel) -> dict[str, Any]:
    """What the kernel's sources call their sizes."""
    return c_constants(KERNEL, dict(kernel.defines))


def job_bytes() -> int:
    """``sizeof(Job)``, with the alignment that it is declared with."""
    found = re.search(r"struct (__align__\((\d+)\) )?Job \{", (CSRC / JOBS).read_text())
    assert found is not None
    size, align = c_offsets(JOBS, re.escape(found[1] or "") + "Job")[1], int(found[2] or 1)
    return -(-size // align) * align


def sum_offset(t: int) -> int:
    """Where the sums of a token are."""
    offset: int = c_value(c_find(JOBS, ("u32 sum_offset",), "return"), {"t": t})
    return offset


def shared_map(c: dict[str, Any], begin: int, max_steps: int) -> SimpleNamespace:
    """``Shared::of`` for memory that begins at an address."""
    s = SimpleNamespace(max_steps=max_steps)
    scope = {**c, "s": s, "begin": begin, "max_steps": max_steps, "shared": begin}
    scope |= {"sizeof": int, "Step": 4}
    for name in ("token_slots", "sums", "weight_slots", "metas", "exponent_tables"):
        setattr(s, name, c_value(c_find(JOBS, ("static Shared of",), f"s.{name}"), scope))
    scope["tables"] = c_value(c_find(JOBS, ("static Shared of",), "tables"), scope)
    table = c_find(JOBS, ("static Shared of",), "s.step_tables")
    table = table.replace("reinterpret_cast<Step*>", "")
    s.step_tables = c_value(table, scope)
    s.bars = c_value(c_find(JOBS, ("static Shared of",), "s.bars"), scope)
    return s


def shared_at(c: dict[str, Any], s: SimpleNamespace, name: str, *at: int) -> int:
    """A member function of ``Shared`` that gives an address: ``tokens(2)``."""
    names = "i" if len(at) == 1 else "wg warp"
    scope = {**c, **vars(s), **dict(zip(names.split(), at, strict=True))}
    for other in ("tokens_full", "weights_full", "table_full"):
        if other != name:
            scope[other] = lambda i, other=other: shared_at(c, s, other, i)
    address: int = c_value(c_find(JOBS, (f" {name}(",), "return"), scope)
    return address


def pack_step(expert: int, first: int, count: int) -> int:
    """``Step::of``, in 32 bits."""
    text = c_find(JOBS, ("static Step of(",), "return").removeprefix("Step{").removesuffix("}")
    bits: int = c_value(text, {"expert": expert, "first": first, "count": count})
    return bits & 0xFFFFFFFF


def unpack_step(bits: int) -> tuple[int, int, int]:
    """Expert, first column, number of columns."""
    texts = (c_find(JOBS, (f"int {name}() const",), "return") for name in STEP)
    expert, first, count = (c_value(text, {"kMaxExperts": 512, "bits": bits}) for text in texts)
    return expert, first, count


STEP = ("expert", "first", "count")


def job_steps(c: dict[str, Any], begins: list[list[int]], rank: int) -> list[int]:
    """``describe_jobs``: packed steps of a CTA.

    Args:
        c: constants of the kernel.
        begins: for each list of the cluster where its experts' columns begin, and the end.
        rank: of the CTA; its list need not be there.
    """
    steps = []
    for e in range(max(map(len, begins)) - 1):
        own = own_end = most = 0
        for r, first in enumerate(begins):
            most = max(most, first[e + 1] - first[e])
            if r == rank:
                own, own_end = first[e], first[e + 1]
        scope = {**c, "most": most, "own": own, "own_end": own_end, "e": e}
        for i in range(c_value(c_find(JOBS, ("void describe_jobs",), "mine"), scope)):
            text = c_find(JOBS, ("void describe_jobs", "i < mine"), "at")
            at = c_value(text, scope | {"i": i})
            text = c_find(JOBS, ("void describe_jobs",), "Step::of(")
            steps.append(pack_step(*c_value(text, scope | {"at": at})))
    return steps


def claimed_part(p: SimpleNamespace, number: int, again: bool) -> SimpleNamespace:
    """``claimed_part``: what a claimed number stands for.

    Args:
        p: arguments of the kernel.
        number: as it was claimed.
        again: the end of a job, whose successor's beginning came first.
    """
    within: tuple[str, ...] = ("Claimed claimed_part(",)
    scope = {"p": p, "number": number, "again": again, "false": False, "max": max, "min": min}
    text = (CSRC / JOBS).read_text()
    condition = re.search(r"if \((.*?)\) return", text[text.index(within[0]) :])
    assert condition is not None
    if not c_value(condition[1], scope):
        names = "share from to ends begins job start end first last"
        scope = c_locals(JOBS, within[0], names, scope)
        within = (*within, "last =")
    text = c_find(JOBS, within, "return").replace("Claimed{", "(").replace("}", ")")
    found = c_value(text.replace("!again", "not again"), scope)
    names = "job begin end part parts more"
    return SimpleNamespace(**dict(zip(names.split(), found, strict=True)))


def claimed_jobs(p: SimpleNamespace, cluster: int, number: int, rank: int) -> list[SimpleNamespace]:
    """``describe_jobs``: the parts of jobs of a claimed number, in the order they are done.

    Args:
        p: arguments of the kernel.
        cluster: CTAs of a cluster.
        number: as it was claimed.
        rank: of the CTA.
    """
    found: list[SimpleNamespace] = []
    while not found or found[-1].more:
        part = claimed_part(p, number, bool(found))
        scope = {"p": p, "kCluster": cluster, "rank": rank, "claimed": part}
        names = "groups tiles tile group list job.place"
        scope = c_locals(JOBS, "void describe_jobs", names, scope)
        found.append(SimpleNamespace(**vars(part), **scope))
    return found


def part_begin(steps: list[int], at: int, all_: int) -> int:
    """``part_begin`` for packed steps."""
    table = [SimpleNamespace(expert=lambda bits=bits: unpack_step(bits)[0]) for bits in steps]
    scope = {"steps": table, "count": len(steps), "at": at, "all": all_}
    within = ("int part_begin(",)
    begin: int = c_value(c_find(JOBS, within, "begin"), scope)
    go_on = c_find(JOBS, within, "while (").split(") ++begin;")[0]
    while c_value(go_on, scope | {"begin": begin}):
        begin += 1
    return begin


def part_of(steps: list[int], begin: int, end: int, shares: int) -> tuple[int, int]:
    """A part's first step, and how many it has (``describe_jobs``)."""
    scope: dict[str, Any] = {"steps": steps, "count": len(steps)}
    scope["p"] = SimpleNamespace(shares=shares)
    scope["claimed"] = SimpleNamespace(begin=begin, end=end)
    scope["part_begin"] = lambda steps, _, at, all_: part_begin(steps, at, all_)
    scope["job"] = job = SimpleNamespace()
    for name in ("first", "steps"):
        text = c_find(JOBS, ("void describe_jobs",), f"job.{name}")
        setattr(job, name, c_value(text, scope))
    return job.first, job.steps


# ---- parts that meet -----------------------------------------------------------------------------
@dataclass(frozen=True)
class Part:
    """Of a job, see ``claimed_jobs`` and ``part_of``; -1 steps after the last."""

    number: int
    steps: int
    job: int = -1
    part: int = 0
    parts: int = 1


Sums = list[tuple[int, int, int]]  # (number, step, warp that has added it)


class Work:
    """What clusters share: jobs, how many are claimed, sums in memory and how many are there.

    Args:
        jobs: numbers of steps of each part.
        adders: warps that add in every step.
        broken: what is left out.
        joined: numbers of parts that end a job and are claimed together with the next job's first.
    """

    def __init__(
        self, jobs: list[list[int]], adders: int, broken: str = "", joined: tuple[int, ...] = ()
    ) -> None:
        self.jobs, self.adders, self.broken, self.claimed = jobs, adders, broken, 0
        self.numbers = [
            Part(0, steps, job, part, len(parts))
            for job, parts in enumerate(jobs)
            for part, steps in enumerate(parts)
        ]
        self.claims: list[list[int]] = []
        for number in range(len(self.numbers)):
            if number - 1 in joined:
                self.claims[-1].insert(0, number)
            else:
                self.claims.append([number])
        self.stored: dict[tuple[int, ...], Sums] = {}  # by job, CTA, part and warp
        self.handed: Counter[tuple[int, int]] = Counter()
        self.written: Counter[tuple[int, ...]] = Counter()
        self.on_the_way: list[Callable[[], None]] = []

    def part(self, number: int) -> Part:
        there = number < len(self.numbers)
        return replace(self.numbers[number], number=number) if there else Part(number, -1)

    def claim(self, claim: int) -> list[int]:
        """Numbers of the parts that a claim stands for, in the order they are done."""
        return self.claims[claim] if claim < len(self.claims) else [len(self.numbers)]

    def finish(
        self, job: Part, rank: int, me: int, all_sums: list[Sums], sync: Callable[[], Warp]
    ) -> Warp:
        """``finish`` of a consumer warp, for the tokens that it hands over or writes.

        Args:
            job: the part that is done.
            rank: of the CTA.
            me: the warp.
            all_sums: by warp.
            sync: ``named_sync`` of the consumers.
        """
        sums, place = all_sums[me], (job.job, rank)
        last = 0 if self.broken == "first waits" else job.parts - 1
        if job.part != last:
            if me == 0 and self.broken == "flag first":
                self.handed[place] += 1
            yield lambda: True
            self.stored[*place, job.part, me] = list(sums)
            yield lambda: True
            if self.broken != "not cleared":
                sums.clear()
            if self.broken != "no sync":
                yield from sync()
            if me == 0 and self.broken != "flag first":
                self.handed[place] += 1
            return
        if job.parts > 1:
            if me == 0:
                yield lambda: self.handed[place] + 1 >= job.parts
            if self.broken != "one waits":
                yield from sync()
            for part in (part for part in range(job.parts) if part != last):
                key = (*place, part, me)
                assert key in self.stored, "sums that were not handed over"
                sums += self.stored.pop(key)
                yield lambda: True
            yield from sync()
        first = job.number - job.part
        wanted = [
            (first + part, step, warp)
            for part, steps in enumerate(self.jobs[job.job])
            for step, warp in product(range(steps), range(self.adders))
        ]
        assert sorted(sums) == wanted, "other sums"
        self.written[*place, me] += 1
        sums.clear()
        yield from sync()

    def check(self, cluster: int, warps: int) -> None:
        """When all warps have ended: ``cluster`` CTAs with so many consumer warps each."""
        assert not self.stored, "sums that nobody has taken"
        everyone = product(range(len(self.jobs)), range(cluster), range(warps))
        assert self.written == Counter(everyone), "an output twice or never"
