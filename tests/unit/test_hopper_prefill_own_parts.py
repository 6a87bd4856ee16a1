"""Jobs in parts of down whose CTAs own outputs, without a GPU: which there are, where they meet.

Index expressions are the kernels' own.
"""

from __future__ import annotations

import math
import random
import re
from fractions import Fraction
from itertools import pairwise, product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hopper_own import (
    JOBS,
    KERNEL,
    claimed_jobs,
    own_constants,
    pack_step,
    part_of,
    sum_offset,
    unpack_step,
)
from kernel_source import c_find, c_value

from sglang_w4afp8.kernels.hopper import launch_prefill
from sglang_w4afp8.kernels.hopper.build import CSRC
from sglang_w4afp8.kernels.hopper.launch import Tensors
from sglang_w4afp8.kernels.hopper.plan import Layer
from sglang_w4afp8.kernels.hopper.plan_own import OWN_PART_COST, Jobs
from sglang_w4afp8.kernels.hopper.plan_prefill import plan_prefill as planned

LAYERS = [
    Layer(256, 7168, 256, 128, 128, 8, False, False),  # TP8
    Layer(256, 7168, 128, 128, 128, 8, False, True),
    Layer(160, 5120, 192, 128, 32, 6, False, False),
    Layer(8, 64, 64, 32, 64, 2, True, True),  # one row tile
    Layer(16, 4096, 256, 128, 128, 2, False, False),
    Layer(128, 4096, 64, 128, 64, 8, False, False),
]
TOKENS = (1, 9, 500, 1024, 1025, 2048, 3000, 5000, 16_384, 30_000)


# ---- the plan ------------------------------------------------------------------------------------
def pieces(last: int, shares: int) -> list[list[Fraction]]:
    """Of each job the sizes of its parts, cut where a share ends."""
    cuts = {Fraction(i * last, shares) for i in range(shares)} | {Fraction(i) for i in range(last)}
    ends = [*sorted(cuts), Fraction(last)]
    found: list[list[Fraction]] = [[] for _ in range(last)]
    for begin, end in pairwise(ends):
        found[int(begin)].append(end - begin)
    return found


def last_round(last: int, shares: int) -> float:
    """How long a round of shares takes, in jobs."""
    return last / shares + OWN_PART_COST * (max(map(len, pieces(last, shares))) - 1)


@pytest.mark.parametrize("clusters", [1, 2, 39, 57, 66, 78, 132])
def test_the_last_round_is_shared_where_it_ends_sooner(clusters: int) -> None:
    seen = set()
    for jobs in [*range(1, 2 * clusters + 1, 3), clusters + 1, 10 * clusters + 1, 1792, 3 * 112]:
        for cluster, most in ((1, 256), (2, 1024)):
            found = Jobs.of(jobs, cluster, clusters, most)
            last = jobs % clusters
            assert found.whole + found.shared == jobs and found.shared in (0, last)
            assert (found.parts == 1) == (found.shared == 0) == (found.shares == 1)
            if last:
                ends = {n: last_round(last, n) for n in range(last, clusters + 1)}
                least = min(ends.values())
                assert math.isclose(ends[found.shares if found.shared else last], least)
                assert found.shared or least == 1.0
            if found.shared:
                assert last < found.shares <= clusters
                assert found.parts == max(map(len, pieces(last, found.shares)))
            assert found.places == found.shared * cluster
            assert found.sum_bytes == found.places * (found.parts - 1) * most * 128
            seen.add(found.shared > 0)
    assert seen == ({False} if clusters == 1 else {False, True})


def test_a_round_of_a_few_more_jobs_than_half_is_shared_in_uneven_parts() -> None:
    """38 jobs on 66 clusters: two parts of equal size would be 76."""
    found = Jobs.of(16 * 112 // 2, 2, 66, 1024)
    assert (found.whole, found.shared, found.shares, found.parts) == (13 * 66, 38, 57, 2)


def arguments(layer: Layer, tokens: int) -> tuple[SimpleNamespace, int]:
    """The kernel's arguments, and bytes of the workspace behind its sums up to the next part."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta")

    scales = [None if layer.dynamic else empty(1)] * 2
    groups = empty(layer.experts, layer.hidden, layer.inner // layer.inner_group)
    x, pairs = empty(tokens, layer.hidden), [empty(tokens, layer.top_k)] * 2
    given: list[Any] = [x, *pairs, *[empty(1)] * 3, groups, *scales, empty(1)]
    t = Tensors(*given)
    launched = launch_prefill.launches_prefill(layer, planned(layer, tokens, 132), t, empty(1), 1.0)
    (_, route), _, (_, own) = launched
    p = SimpleNamespace(**{name: getattr(own, name) or 0 for name, *_ in own._fields_})
    p.zeros_end = (route.zeros or 0) + 4 * route.zero_count
    ends = sorted({*route.workspace.at.values(), route.workspace._memory.numel()})
    return p, next((end for end in ends if end > p.sums), p.sums) - p.sums


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_numbers_are_parts_of_jobs_and_have_their_places(layer: Layer) -> None:
    seen = set()
    for tokens in TOKENS:
        p, room = arguments(layer, tokens)
        plan = planned(layer, tokens, 132)
        c, jobs = own_constants(plan.launches[2].kernel), plan.jobs
        assert jobs is not None
        cluster = c["kCluster"]
        places, done, number = set[int](), dict[int, list[Fraction]](), 0
        while True:
            here = claimed_jobs(p, cluster, number, 0)
            if c_value("tile >= tiles", vars(here[0])):
                break
            assert len(here) == 1 or number >= jobs.whole
            for rank in range(cluster):
                for mine, other in zip(here, claimed_jobs(p, cluster, number, rank), strict=True):
                    assert (other.tile, other.list) == (mine.tile, mine.group + rank)
                    assert (other.job, other.part) == (mine.job, mine.part)
                    if other.parts == 1:
                        continue
                    place = getattr(other, "job.place")
                    assert 0 <= place < jobs.places and other.parts <= jobs.parts
                    at = place_of(p, c, place, other.part)
                    if other.part + 1 < other.parts:
                        assert at not in places and at % 16 == 0, "two parts' sums in one place"
                        places.add(at)
                    else:
                        before = {place_of(p, c, place, i) for i in range(other.part)}
                        assert before <= places and len(before) == other.part, "others' sums"
            for part in here:
                done.setdefault(part.job, []).append(Fraction(part.end - part.begin, p.shares))
                # Nobody waits but the last part of a job, and it is what its share ends with.
                assert part is here[-1] or (part.part == 0 and part.parts > 1)
            number += 1
        assert [*done] == sorted(done) == list(range(jobs.whole + jobs.shared))
        assert len(done) == layer.hidden // 64 * -(-plan.down.count // cluster)
        assert all(done[job] == [1] for job in range(jobs.whole))
        if jobs.shared:
            assert [done[jobs.whole + i] for i in range(jobs.shared)] == (
                pieces(jobs.shared, jobs.shares)
            )
            assert number == jobs.whole + jobs.shares
        assert c["kSumBytes"] == jobs.place_bytes and jobs.sum_bytes <= room
        assert places <= {*range(p.sums, p.sums + jobs.sum_bytes, c["kSumBytes"])}
        assert p.zeros_end == p.handed + 4 * jobs.places
        seen.add(jobs.parts)
    assert seen != {1}


@pytest.mark.parametrize(
    ("shared", "shares"), [(1, 2), (1, 7), (38, 57), (38, 66), (5, 7), (7, 65)]
)
@pytest.mark.parametrize("whole", [0, 1, 7])
def test_a_number_is_a_share_of_the_last_jobs(whole: int, shared: int, shares: int) -> None:
    """Two CTAs of a cluster, and a list that is alone."""
    p = SimpleNamespace(whole=whole, shared=shared, shares=shares, lists=1)
    p.weights = SimpleNamespace(rows=64 * (whole + shared))
    ends: dict[int, int] = {}
    for number in range(whole + shares):
        here = claimed_jobs(p, 2, number, 1)
        assert len(here) <= 2 and all(part.tile < part.tiles for part in here)
        if number >= whole:
            assert sum(part.end - part.begin for part in here) == shared, "of equal size"
        for part in reversed(here):  # in the order of jobs
            assert part.begin == ends.get(part.tile, 0) and part.end > part.begin
            ends[part.tile] = part.end
            sizes = pieces(shared, shares)[part.tile - whole] if part.tile >= whole else [1]
            assert part.parts == len(sizes)
            assert Fraction(part.end - part.begin, shares) == sizes[part.part]
    assert ends == {job: shares for job in range(whole + shared)}
    for number in range(whole + shares, whole + shares + 4):
        assert claimed_jobs(p, 2, number, 1)[0].tile >= whole + shared


def place_of(p: SimpleNamespace, c: dict[str, int], place: int, part: int) -> int:
    """``place_of``."""
    job, within = SimpleNamespace(place=place), ("u8* place_of(",)
    found = c_value(c_find(KERNEL, within, "place"), {"p": p, "job": job, "part": part})
    address: int = c_value(c_find(KERNEL, within, "return"), {**c, "p": p, "place": found})
    return address


@pytest.mark.parametrize("count", [0, 1, 7, 8, 250, 1000, 1024])
def test_all_sums_of_a_list_are_handed_over_and_taken(count: int) -> None:
    """By the same offsets in memory, where tokens' sums are as in shared memory."""
    layer = Layer(256, 7168, 256, 128, 128, 8, False, False)
    c = own_constants(planned(layer, 4096, 132).launches[2].kernel)
    given: list[int] = []
    taken: list[int] = []
    of_part, of_all = loop("hand_over(", "i"), loop("take_over(", "begin")
    for thread in range(c["kConsumers"]):
        scope = {**c, "count": count, "threadIdx": SimpleNamespace(x=thread)}
        given += values(of_part, scope)
        scope["kAtOnce"] = at_once = int(c_find(KERNEL, ("void take_over(",), "kAtOnce"))
        scope["kStride"] = c_value(c_find(KERNEL, ("void take_over(",), "kStride"), scope)
        text = c_find(KERNEL, ("void take_over(",), "const int i")
        for begin in values(of_all, scope):
            here = [c_value(text, scope | {"begin": begin, "j": j}) for j in range(at_once)]
            taken += [i for i in here if i < count * 128]
    assert sorted(given) == sorted(taken) == list(range(0, count * 128, 16))
    assert all(t * 128 <= sum_offset(t) ^ 127 < t * 128 + 128 for t in range(count))


def body_of(function: str) -> str:
    """A member function of the kernel, with single blanks."""
    text = (CSRC / KERNEL).read_text()
    start = text.index(f"void {function}")
    return " ".join(text[start : text.index("\n  }\n", start)].split())


def loop(function: str, name: str) -> tuple[str, str, str]:
    """What a loop's variable begins with, is below of, and is increased by."""
    pattern = rf"for \(int {name} = (.*?); {name} < (.*?); {name} \+= (.*?)\) \{{"
    found = re.search(pattern, body_of(function))
    assert found is not None
    return found[1], found[2], found[3]


def values(texts: tuple[str, str, str], scope: dict[str, Any]) -> range:
    """Of a loop's variable."""
    return range(*(c_value(text, scope) for text in texts))


def test_sums_are_there_before_they_are_counted_and_taken() -> None:
    """The order that the simulation in test_hopper_prefill_own_cluster.py has."""
    zeros, everyone = "sts128(s.sums + i, make_uint4(0, 0, 0, 0))", "named_sync(1, kConsumers);"
    wanted = {
        "finish(": [everyone, "if (job.part + 1 < job.parts) { hand_over(job, count); return; }",
                    "if (job.parts > 1) take_over(job, count);", "write_rows(", everyone],
        "hand_over(": ["place_of(job, job.part)", "= lds128(s.sums + i)", zeros, everyone,
                       "if (threadIdx.x == 0)", "fence.acq_rel.gpu", "p.handed + job.place",
                       "red.relaxed.gpu.global.add"],
        "take_over(": ["if (threadIdx.x == 0)", "ld.acquire.gpu", "p.handed + job.place",
                       "while (seen + 1 < static_cast<u32>(job.parts))", everyone,
                       "for (int part = 0; part + 1 < job.parts; ++part)", "place_of(job, part)",
                       "if (i < count * 128) v[j] = __ldcg(", "if (i >= count * 128) continue;",
                       "add_halves(sum.x, v[j].x), add_halves(sum.y, v[j].y)",
                       "add_halves(sum.z, v[j].z), add_halves(sum.w, v[j].w)", everyone],
    }  # fmt: skip
    for function, markers in wanted.items():
        body, at = body_of(function), 0
        for marker in markers:
            at = body.index(marker, at) + len(marker)
    jobs = " ".join((CSRC / JOBS).read_text().split())
    claim = (
        "if (!more) number = next_number(p, s, rank, claims++); barrier_wait(s.table_empty(n & 1),"
    )
    assert claim in jobs, "phases of numbers are those of claims, of tables those of parts"
    assert "claimed = claimed_part(p, number, more); more = claimed.more;" in jobs
    assert "__syncwarp(); job.first = part_begin(" in jobs, "steps that another lane writes"


# ---- steps of parts ------------------------------------------------------------------------------
def steps_of(counts: list[int]) -> list[int]:
    """Packed steps, so many for each expert."""
    experts = [e for e, count in enumerate(counts) for _ in range(count)]
    return [pack_step(e, 8 * i, 8) for i, e in enumerate(experts)]


def some_counts() -> list[list[int]]:
    order = random.Random(3)
    found = [[], [1], [300], [1, 300, 1], [300, 1], [1, 300], [0, 0, 2], [1] * 256, [1, 2]]
    for _ in range(250):
        experts = order.choice((1, 2, 3, 5, 40))
        found.append([int(order.paretovariate(0.7)) % 70 for _ in range(experts)])
    return found


@pytest.mark.parametrize(("shared", "shares"), [(1, 1), (1, 2), (2, 3), (38, 57), (1, 5)])
def test_parts_are_all_steps_and_cut_no_expert(shared: int, shares: int) -> None:
    for counts, job in product(some_counts(), range(min(shared, 3))):
        steps = steps_of(counts)
        sizes = pieces(shared, shares)[job]
        ends = [int(sum(sizes[: i + 1]) * shares) for i in range(len(sizes))]
        found: list[int] = []
        owners: dict[int, int] = {}
        for part, (begin, end) in enumerate(pairwise([0, *ends])):
            first, count = part_of(steps, begin, end, shares)
            assert first == len(found)
            mine = steps[first : first + count]
            found += mine
            for bits in mine:
                assert owners.setdefault(unpack_step(bits)[0], part) == part, "an expert cut"
            # Not longer than its share by more than the expert that its end is moved behind
            assert count <= len(steps) * (end - begin) / shares + max([*counts, 1])
        assert found == steps
