"""Down whose CTAs own outputs, without a GPU: its plans, shared memory, steps and FP16 sums."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hopper_own import (
    FEED,
    JOBS,
    KERNEL,
    job_bytes,
    job_steps,
    own_constants,
    pack_step,
    shared_at,
    shared_map,
    unpack_step,
)
from hopper_route import ROUTE
from kernel_source import c_find, c_value

from sglang_w4afp8.kernels.hopper import plan_own
from sglang_w4afp8.kernels.hopper.build import CSRC
from sglang_w4afp8.kernels.hopper.plan import CTA_SHARED_BYTES, Layer, kernels, most_tokens
from sglang_w4afp8.kernels.hopper.plan_own import own_steps
from sglang_w4afp8.kernels.hopper.plan_prefill import PrefillPlan
from sglang_w4afp8.kernels.hopper.plan_prefill import plan_prefill as planned

LAYERS = [
    Layer(256, 7168, 256, 128, 128, 8, False, False),  # TP8
    Layer(256, 7168, 128, 128, 128, 8, False, True),  # TP16
    Layer(256, 7168, 64, 128, 64, 8, True, False),  # TP32
    Layer(128, 4096, 192, 128, 64, 8, False, False),
    Layer(160, 5120, 192, 128, 32, 6, False, False),
    Layer(512, 2048, 128, 128, 128, 10, False, True),
    Layer(512, 2048, 256, 128, 32, 9, False, False),
    Layer(64, 2048, 256, 64, 64, 6, True, False),
    Layer(32, 7168, 256, 128, 128, 8, False, False),  # EP, of a small model
    Layer(16, 704, 64, 64, 64, 1, True, False),
    Layer(8, 64, 64, 32, 64, 2, True, True),
    Layer(384, 7168, 256, 128, 128, 128, False, False),
]


def some_tokens(layer: Layer, sms: int, count: int) -> list[int]:
    """Numbers of tokens of calls: edges, and some between."""
    most, own = most_tokens(layer, sms), plan_own.own_tokens(layer)
    order = random.Random(layer.experts + sms)
    edges = {n * own + d for n in (1, 2, 3, 4, 8, 9) for d in (-1, 0, 1)} | {1, 7, 8, 9, most}
    anywhere = {order.randint(1, most) for _ in range(count)}
    few = {order.randint(1, min(most, 5 * own)) for _ in range(count)}
    return sorted(n for n in edges | anywhere | few if n <= most)


def own_max_steps(layer: Layer, plan: PrefillPlan) -> int:
    """What the launch tells the kernel."""
    down = plan.launches[2]
    chosen = dict(down.kernel.defines)
    return own_steps(layer, chosen["W4_MOST_TOKENS"], chosen["W4_CLUSTER"], down.tokens)


@pytest.mark.parametrize("sms", [78, 114, 132])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_every_call_has_its_kernel_and_sorters(layer: Layer, sms: int) -> None:
    ahead = set(kernels(layer, sms))
    for tokens in some_tokens(layer, sms, 150):
        plan = planned(layer, tokens, sms)
        _, up, down = plan.launches
        assert plan.room == 0 and down.kernel.source == KERNEL
        assert {launch.kernel for launch in plan.launches} <= ahead, tokens
        c = own_constants(down.kernel)
        assert plan.down.tokens <= c["kMostTokens"] and plan.down.tokens % plan.down.parts == 0
        part_tokens = plan.down.tokens // plan.down.parts
        assert plan.part_pairs == part_tokens * layer.top_k <= ROUTE["kPart"]
        assert plan.sorters == -(-tokens // part_tokens) <= 2 * sms
        assert (plan.down.count - 1) * plan.down.parts < plan.sorters
        assert plan.sorters <= plan.down.count * plan.down.parts
        shared = tokens > plan_own.own_tokens(layer) and c["kK"] == plan_own.OWN_MOST_K
        assert c["kCluster"] == (2 if shared else 1)
        assert down.grid[0] % c["kCluster"] == 0 and down.grid[0] > sms - c["kCluster"]
        assert (plan.up.tokens == tokens) or plan.up.tokens % part_tokens == 0
        defines = dict(up.kernel.defines)
        assert defines["W4_PANEL"] == c["kPanel"] and layer.inner % c["kPanel"] == 0
        assert layer.down.rows % 64 == 0


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_shared_memory_holds_what_is_laid_out(layer: Layer) -> None:
    seen = set()
    for tokens in some_tokens(layer, 132, 40):
        plan = planned(layer, tokens, 132)
        down = plan.launches[2]
        if down.kernel in seen:
            continue
        seen.add(down.kernel)
        c = own_constants(down.kernel)
        assert c["kNobody"] == plan_own.OWN_NOBODY
        # What is dynamic has 128 bytes of alignment.
        static = -(-(2 * job_bytes() + 2 * 4) // 128) * 128
        assert down.shared_bytes + static <= CTA_SHARED_BYTES
        max_steps = own_max_steps(layer, plan)
        for begin in range(0, 1024, 128):
            s = shared_map(c, begin, max_steps)
            at = partial(shared_at, c, s)
            spans = [(begin, begin)]
            for i in range(c["kTokenSlots"]):
                spans.append((at("tokens", i), at("tokens", i) + c["kColumns"] * c["kK"]))
                assert at("tokens", i) % (8 * c["kPanel"]) == 0, "where the swizzle repeats"
            spans.append((s.sums, s.sums + (c["kMostTokens"] + c["kNobody"]) * 64 * 2))
            assert s.token_slots % 1024 == 0 and s.sums % 128 == 0
            for i in range(c["kWeightSlots"]):
                size = c["kTileBytes"] + c["kTileScaleBytes"]
                spans.append((at("weights", i), at("weights", i) + size))
                assert at("weights", i) % 16 == 0 and size % 16 == 0
            for i in range(c["kMetaSlots"]):
                spans.append((at("meta", i), at("meta", i) + 8 * c["kColumns"]))
                assert at("meta", i) % 16 == 0
            spans += [(at("exponents", i), at("exponents", i) + c["kMostTokens"]) for i in range(2)]
            tables = [s.step_tables + i * max_steps * 4 for i in range(2)]
            spans += [(table, table + max_steps * 4) for table in tables]
            assert s.step_tables % 4 == 0
            names = {"weights": c["kWeightSlots"], "tokens": c["kTokenSlots"]}
            names |= {"table": 2, "number": 2}
            bars = [
                at(f"{name}_{kind}", i)
                for name, count in names.items()
                for i in range(count)
                for kind in ("full", "empty")
            ]
            bars += [at("turn", wg, warp) for wg in range(c["kWgs"]) for warp in range(4)]
            assert all(bar % 8 == 0 for bar in bars)
            spans += [(bar, bar + 8) for bar in bars]
            spans.sort()
            assert all(a[1] <= b[0] for a, b in pairwise(spans)), "two things in one place"
            assert spans[-1][1] <= begin + down.shared_bytes
    assert len(seen) >= 2


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_slots_and_warps_are_what_the_kernel_wants(layer: Layer) -> None:
    for tokens in some_tokens(layer, 132, 40):
        launch = planned(layer, tokens, 132).launches[2]
        c = own_constants(launch.kernel)
        assert min(c["kWeightSlots"], c["kTokenSlots"]) >= c["kWgs"]
        assert c["kWeightSlots"] <= 32, "bits of `phases`"
        assert c["kTokenSlots"] % c["kTokenWarps"] == 0
        in_turn = c["kWeightWarps"] * c["kCluster"]
        assert c["kWeightWarps"] == 1 or c["kWeightSlots"] % in_turn == 0
        assert 1 + c["kWeightWarps"] + c["kTokenWarps"] <= 8
        assert launch.threads == c["kThreads"] == (c["kWgs"] + 2) * 128 <= 1024
        assert (launch.ring, launch.tokens) == (c["kWeightSlots"], c["kColumns"])
        assert c["kColumns"] % 8 == 0 and 16 <= c["kColumns"] <= 48
        assert c["kK"] == layer.down.k and c["kK"] % c["kGroup"] == 0
        assert c["kLayoutTiles"] == layer.down.tiles
        text = (CSRC / KERNEL).read_text()
        (taken,) = (c_value(line, c) for line in [text.split('"n"(')[1].split("));")[0]])
        (left,) = (int(line.split(";")[0]) for line in text.split("dec.sync.aligned.u32 ")[1:])
        launched = 65_536 // c["kThreads"] // 8 * 8  # registers of a thread, before and after
        assert c["kThreads"] * launched >= c["kConsumers"] * taken + 256 * left
        turns = c_value(c_find(FEED, ("void produce_weights",), "kTurns"), c)
        assert turns == in_turn
        scope = c | {"kTurns": turns}
        # Static assertions of the kernel, as the compiler would see them.
        for source in (KERNEL, FEED, JOBS):
            for line in (CSRC / source).read_text().split("static_assert(")[1:]:
                assert c_value(line.split(', "')[0], scope), line


# ---- steps ---------------------------------------------------------------------------------------
def everything(pairs: int, experts: int, rank: int) -> list[int]:
    counts = [0] * experts
    counts[rank % experts] = pairs
    return counts


def random_counts(pairs: int, experts: int, rank: int) -> list[int]:
    order = random.Random(pairs + rank)
    counts = [0] * experts
    for _ in range(pairs):
        counts[int(order.random() ** 3 * experts)] += 1
    return counts


def one_too_many(pairs: int, experts: int, rank: int, columns: int = 48) -> list[int]:
    """Experts with one column more than a step has, in turns with the other list's."""
    counts = [0] * experts
    for e in range(rank, experts, 2):
        counts[e] = min(columns * (1 + e % 3) + 1, pairs - sum(counts))
    return counts


def spread(pairs: int, experts: int, rank: int) -> list[int]:
    return [pairs // experts + (e < pairs % experts) for e in range(experts)]


@pytest.mark.parametrize("make", [everything, random_counts, one_too_many, spread])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_steps_cover_columns_once_and_agree_in_a_cluster(
    layer: Layer, make: Callable[[int, int, int], list[int]]
) -> None:
    own = plan_own.own_tokens(layer)
    for tokens in (own // 2, own, 2 * own, 2 * own + 1):
        plan = planned(layer, tokens, 132)
        c = own_constants(plan.launches[2].kernel)
        max_steps = own_max_steps(layer, plan)
        cluster = c["kCluster"]
        for lists_here in {cluster, 1}:  # the last list may be alone
            begins = []
            for rank in range(lists_here):
                counts = make(plan.down.tokens * layer.top_k, layer.experts, rank)
                begins.append([sum(counts[:e]) for e in range(layer.experts + 1)])
            steps = [
                [unpack_step(bits) for bits in job_steps(c, begins, rank)]
                for rank in range(cluster)
            ]
            assert len(steps[0]) <= max_steps
            assert all(
                [e for e, _, _ in mine] == sorted(e for e, _, _ in steps[0]) for mine in steps
            ), "weights of other experts"
            for rank, mine in enumerate(steps):
                assert all(0 <= count <= c["kColumns"] for _, _, count in mine)
                columns = [(e, first + i) for e, first, count in mine for i in range(count)]
                if rank < lists_here:
                    first = begins[rank]
                    wanted = [
                        (e, i) for e in range(layer.experts) for i in range(first[e], first[e + 1])
                    ]
                    assert columns == wanted
                    for e, at, count in mine:
                        assert count == 0 or (at - first[e]) % 8 == 0, "the swizzle of its rows"
                else:
                    assert columns == []


def test_a_step_fits_its_word() -> None:
    for expert, first, count in ((511, 65_535, 48), (0, 0, 0), (511, 0, 1), (0, 65_536, 63)):
        assert unpack_step(pack_step(expert, first, count)) == (expert, first, count)
    # An empty step may be behind the last of 65,536 columns.
    for layer in (*LAYERS, Layer(512, 7168, 256, 128, 128, 256, False, False)):
        assert 0 < plan_own.own_tokens(layer) * layer.top_k <= 65_536


def branch(text: str, scope: dict[str, int]) -> str:
    """The statements of a chain of ifs that are reached; what is nested stays as it is."""
    while text.startswith("if ("):
        condition, rest = text.removeprefix("if (").split(") {", 1)
        depth, end = 1, 0
        while depth:
            depth += {"{": 1, "}": -1}.get(rest[end], 0)
            end += 1
        if c_value(condition, scope):
            return rest[: end - 1].strip()
        text = rest[end:].strip().removeprefix("else").strip()
    return text.removeprefix("{").rsplit("}", 1)[0].strip()


@pytest.mark.parametrize("most", range(16, plan_own.OWN_MOST_COLUMNS + 1, 8))
def test_a_step_is_multiplied_with_the_fewest_columns_that_are_described(most: int) -> None:
    """``take``, ``run`` and what ``produce_tokens`` says of columns."""
    text = (CSRC / KERNEL).read_text()
    text = text[text.index("const int count = uniform(step.count());") :]
    text = text[text.index("    if (") : text.index("    pass_turn();")].strip()
    feed = (CSRC / FEED).read_text()
    leave = re.search(r"if \((.*)\) break;  // nobody reads these", feed)
    assert leave is not None
    for count in range(most + 1):
        scope = {"kColumns": most, "count": count}
        reached = text
        while reached.startswith("if (") and not reached.startswith("if constexpr"):
            reached = branch(reached, scope)
        found = re.fullmatch(r"(?:if constexpr \((.*)\) )?run<(\d+)>\(.*\);", reached)
        if count == 0:
            assert found is None and "wait_turn();" in reached
            continue
        assert found is not None, reached
        assert found[1] is None or c_value(found[1], scope), "a step that is left out"
        columns = int(found[2])
        assert count <= columns < count + 8
        described = set()
        for i in range(-(-most // 32)):
            if c_value(leave[1], {"i": i, "now": SimpleNamespace(here=count)}):
                break
            described |= {lane + 32 * i for lane in range(32) if lane + 32 * i < most}
        assert {*range(columns)} <= described


def test_a_token_is_found_without_division() -> None:
    """``inverse_top_k`` and ``__umulhi``."""
    for layer in LAYERS:
        if layer.top_k == 1:
            continue
        p = SimpleNamespace(top_k=layer.top_k)
        inverse = c_value(c_find(FEED, ("void produce_tokens",), "inverse_top_k"), {"p": p})
        pairs = np.arange(plan_own.own_tokens(layer) * layer.top_k, dtype=np.uint64)
        assert np.array_equal(pairs * np.uint64(inverse) >> np.uint64(32), pairs // layer.top_k)
