"""Jobs in parts of down whose CTAs own outputs, without a GPU: which there are, where they meet.

Index expressions are the kernels' own.
"""

from __future__ import annotations

import random
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hopper_own import (
    JOBS,
    KERNEL,
    claimed_job,
    own_constants,
    pack_step,
    part_begin,
    part_of,
    sum_offset,
    unpack_step,
)
from kernel_source import c_find, c_value

from sglang_w4afp8.kernels.hopper import launch_prefill
from sglang_w4afp8.kernels.hopper.build import CSRC
from sglang_w4afp8.kernels.hopper.launch import Tensors
from sglang_w4afp8.kernels.hopper.plan import Layer
from sglang_w4afp8.kernels.hopper.plan_own import OWN_MOST_PARTS, OWN_PART_COST, Jobs
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
def last_round(jobs: int, clusters: int, parts: int) -> float:
    """How long a round of parts takes, in jobs: clusters do whole ones of them."""
    ends = [0] * clusters
    for _ in range(jobs % clusters * parts):
        ends[ends.index(min(ends))] += 1
    return max(ends) / parts + OWN_PART_COST * (parts - 1)


@pytest.mark.parametrize("clusters", [1, 2, 39, 57, 66, 78, 132])
def test_the_last_round_is_shared_where_it_ends_sooner(clusters: int) -> None:
    seen = set()
    for jobs in [*range(1, 4 * clusters + 1), 10 * clusters + 1, 1792, 3 * 112]:
        for cluster, most in ((1, 256), (2, 1024)):
            found = Jobs.of(jobs, cluster, clusters, most)
            last = jobs % clusters
            assert found.whole + found.shared == jobs and found.shared in (0, last)
            assert found.shared < clusters and 1 <= found.parts <= OWN_MOST_PARTS
            assert (found.parts == 1) == (found.shared == 0)
            assert found.whole % clusters == 0 or found.parts == 1
            ends = {n: last_round(jobs, clusters, n) for n in range(1, OWN_MOST_PARTS + 1)}
            assert ends[found.parts] == min(ends.values())
            assert all(ends[fewer] > ends[found.parts] for fewer in range(1, found.parts))
            assert found.places == found.shared * cluster
            assert found.sum_bytes == found.places * (found.parts - 1) * most * 128
            seen.add(found.parts)
    assert seen == ({1} if clusters == 1 else {1, 2})


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
        claimed, number, places = [], 0, set()
        while True:
            job = claimed_job(p, cluster, number, 0)
            if c_value("tile >= tiles", vars(job)):
                break
            claimed.append((job.job_number, job.part, job.parts))
            for rank in range(cluster):
                other = claimed_job(p, cluster, number, rank)
                assert (other.tile, other.list) == (job.tile, job.group + rank)
                if other.parts == 1:
                    continue
                place = getattr(other, "job.place")
                assert 0 <= place < jobs.places
                mine = place_of(p, c, place, other.part, other.parts)
                if other.part + 1 < other.parts:
                    assert mine not in places and mine % 16 == 0, "two parts' sums in one place"
                    places.add(mine)
                else:
                    before = {place_of(p, c, place, i, other.parts) for i in range(other.part)}
                    assert before <= places and len(before) == other.part, "others' sums"
            number += 1
        # Jobs in their order, and parts of each: the last one has the largest number.
        assert claimed == sorted(claimed)
        whole = [(job, 0, 1) for job in range(jobs.whole)]
        behind = range(jobs.whole, jobs.whole + jobs.shared)
        assert claimed == whole + [
            (job, part, jobs.parts) for job in behind for part in range(jobs.parts)
        ]
        assert len({claimed_job(p, cluster, n, 0).job_number for n in range(number)}) == (
            layer.hidden // 64 * -(-plan.down.count // cluster)
        )
        assert len(places) * c["kSumBytes"] == jobs.sum_bytes <= room
        assert c["kSumBytes"] == jobs.place_bytes
        assert places == {*range(p.sums, p.sums + jobs.sum_bytes, c["kSumBytes"])}
        assert p.zeros_end == p.handed + 4 * jobs.places
        seen.add(jobs.parts)
    assert seen != {1}


@pytest.mark.parametrize("parts", range(2, OWN_MOST_PARTS + 1))
def test_a_number_is_one_part_of_one_job(parts: int) -> None:
    """Whatever the number of whole jobs; two CTAs of a cluster, and a list that is alone."""
    for whole, shared in ((0, 1), (1, 5), (5, 2), (6, 3), (7, 65)):
        p = SimpleNamespace(whole=whole, job_parts=parts, lists=1)
        p.weights = SimpleNamespace(rows=64 * (whole + shared))
        found = [claimed_job(p, 2, n, 1) for n in range(whole + shared * parts + 4)]
        wanted = [(job, 0, 1) for job in range(whole)]
        wanted += [(whole + job, part, parts) for job in range(shared) for part in range(parts)]
        here = [(job.tile, job.part, job.parts) for job in found if job.tile < job.tiles]
        assert here == wanted and all(job.tile >= job.tiles for job in found[len(wanted) :])


def place_of(p: SimpleNamespace, c: dict[str, int], place: int, part: int, parts: int) -> int:
    """``place_of``."""
    job, within = SimpleNamespace(place=place, parts=parts), ("u8* place_of(",)
    found = c_value(c_find(KERNEL, within, "place"), {"job": job, "part": part})
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
                       "if (threadIdx.x == 0)", "fence.acq_rel.gpu", "red.relaxed.gpu.global.add",
                       "p.handed + job.place"],
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


@pytest.mark.parametrize("parts", range(1, OWN_MOST_PARTS + 1))
def test_parts_are_all_steps_and_cut_no_expert(parts: int) -> None:
    for counts in some_counts():
        steps = steps_of(counts)
        begins = [part_begin(steps, part, parts) for part in range(parts + 1)]
        assert begins[0] == 0 and begins[-1] == len(steps) and begins == sorted(begins)
        found: list[int] = []
        owners: dict[int, int] = {}
        for part in range(parts):
            first, count = part_of(steps, part, parts)
            assert (first, first + count) == (begins[part], begins[part + 1])
            mine = steps[first : first + count]
            found += mine
            for bits in mine:
                assert owners.setdefault(unpack_step(bits)[0], part) == part, "an expert cut"
            # Not longer than its share by more than the expert that its end is moved behind
            assert count <= len(steps) / parts + max([*counts, 1])
        assert found == steps
