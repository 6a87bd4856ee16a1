"""Down on tokens in the order of the list, in any order of events, without a GPU.

A wait that never ends, a contribution that is read before it is published or after it was
overwritten, and owners, scales or results of another item all show; so does what is left out on
purpose.
"""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hopper_sorted import DOWN, Slices
from kernel_source import c_text
from sorted_call import TILE, WGS, Call, Problem


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


def errors(broken: str, seeds: range) -> set[str]:
    """What goes wrong in so many calls."""
    found = set()
    for seed in seeds:
        try:
            random_call(seed, broken).run()
        except AssertionError as error:
            found.add(str(error).splitlines()[0])
    return found


def test_every_call_ends_with_all_sums() -> None:
    calls = [random_call(seed) for seed in range(400)]
    for call in calls:
        call.run()
    # What makes it hard is in many of them.
    assert sum(call.slices.count() > 2 for call in calls) > 100
    assert sum(call.slices.row_tiles % WGS > 0 and len(call.ctas) > 1 for call in calls) > 100
    twice = [
        any(a.token == b.token for (_, a), (_, b) in pairwise(call.problem.owners.items()))
        for call in calls
    ]
    assert sum(twice) > 100
    assert sum(call.late and len(call.ctas) > 1 for call in calls) > 12


@pytest.mark.parametrize("ctas", [1, 2, 4])
@pytest.mark.parametrize(("row_tiles", "counts"), [(16, [1]), (13, [4, 4]), (15, [2, 3, 1])])
def test_slices_of_one_block_and_few_tiles(ctas: int, row_tiles: int, counts: list[int]) -> None:
    """Items of a CTA are two slices and more apart."""
    for seed in range(25):
        problem = Problem(random.Random(seed), counts, 2)
        slices = Slices(
            row_tiles, len(counts), problem.slots, 2 * WGS * 128 * max(problem.slots, 1)
        )
        assert problem.slots == 0 or slices.per_slice == 1
        Call(problem, slices, seed, ctas).run()


@pytest.mark.parametrize(
    ("broken", "wanted"),
    [
        ("fetch first", "another item's owners"),  # in place of those that are still read
        ("scaled", "scales of another item"),
        ("idle", "scales of another item"),  # who has no row tile counts for the item before
        ("written", "results of another item"),  # left before the other warp has written them
        ("slice", "a contribution that is not there"),  # nobody waits for the last slice but one
        ("target", "a contribution that is not there"),  # or not for all of it
        ("early", "a contribution that is not there"),  # it is given up before it was read
        ("tiles", "a contribution that is not there"),
        ("own tile", "a contribution that is not there"),
        ("publish", "a contribution that is not there"),  # said before it is written
        ("ended", "another stage"),  # sums where another warpgroup's stage still is
    ],
)
def test_the_simulation_sees_what_is_missing(broken: str, wanted: str) -> None:
    assert wanted in errors(broken, range(100))


def test_a_claim_out_of_order_may_wait_for_ever() -> None:
    """An item waits for those before it, which somebody must have who runs."""
    found = set()
    for seed in range(100):
        call = random_call(seed)
        call.late = True
        last = 0
        while call.slices.item(last) is not None:
            last += 1
        call.items = {i: call.slices.item(last - 1 - i) for i in range(last)}
        try:
            call.run()
        except AssertionError as error:
            found.add(str(error).splitlines()[0])
    assert "nobody can go on" in found


def in_order(within: str, *statements: str) -> None:
    """A function of the kernel makes these statements one after the other.

    ``within``: strings separated by `` > `` after which it begins.
    """
    text, at = " ".join(c_text(DOWN).split()), 0
    for marker in within.split(" > "):
        at = text.index(marker, at)
    end = text.find(" __device__ ", at + 1)
    for statement in statements:
        found = text.find(statement, at, end)
        assert found >= 0, (within, statement)
        at = found + len(statement)


def test_the_simulation_follows_the_kernel() -> None:
    scaled = "barrier_wait(tables.scaled(), phase_of("
    in_order(
        "struct DownBody > void run()", "multiply<kN>(", scaled + "place.number()))",
        "named_sync(1 + wg, 128);", "lds64(tables.scales", "sts32(", "sts32(",
    )  # fmt: skip
    in_order(
        "struct DownBody > void leave(", "named_sync(1 + wg, 128);", "item().count",
        "tables.owner(c)", "lds128(from", "slot >= 0", "(y + ", "} else {", "store(p",
    )  # fmt: skip
    in_order(
        "w4a8_prefill_down(", "reader.wait(queue, ring)", "== kEnd) break",
        ">= p.weights.rows)", "pass(", scaled + "body.place.number()))", "} else {",
        "with_columns(", "body.leave(slices)", "__syncwarp()",
        "barrier_arrive(tables.stored())", ".release(ring)", "body.place.next_item()",
        "named_sync(kWgs + 1, kConsumers);", "ring.size * kStageBytes / kAdderBytes",
        "Adder::of(p, slices, ring.stages + warp * kAdderBytes).run();",
    )  # fmt: skip
    in_order(
        "struct Adder > void run()", "slices.slots == 0 && slices.count() <= 2) return",
        "atomicAdd(p.summed, 1u)", "next = claim()", "order.item(", "== kEnd) return",
        "next = claim();", "wait_tiles(item);", "first < item.count", "find(item, first)",
        "add_up(item, found)",
        "__syncwarp();", "slices.count() > 2", "fence.acq_rel.gpu", "p.left + item.slice",
    )  # fmt: skip
    in_order("void wait_tiles(", "ld.acquire.gpu", "while (!__all_sync(", "__syncwarp()")
    in_order(
        "struct Clerk > void run()", "auto post", "posted > items) return",
        "bar = ring.queue_bars + posted % kQueue * 16",
        "barrier_wait(bar + 8, (posted / kQueue & 1) ^ 1)",
        "queue.item[posted % kQueue] = order.item(atomicAdd(p.claimed, 1u));",
        "barrier_arrive(bar)",
        "kind == kEnd) items = posted", "++posted", "i < kAhead; ++i) post();",
        "n < items; ++n) {", "post();", "fetch(n);", "scale(n);", "publish(n);",
    )  # fmt: skip
    in_order(
        "void publish(", "barrier_wait(tables.stored(), phase_of(n))", "fence.acq_rel.gpu",
        "red.relaxed.gpu.global.or",
    )  # fmt: skip
    in_order(
        "void fetch(", "wait_slice(item(n).slice);", "barrier_expect(tables.full()", "bulk_copy(",
        "tables.full())",
    )  # fmt: skip
    in_order(
        "void scale(", "barrier_wait(tables.full(), phase_of(n))", "tables.owner(c)",
        "sts32(tables.scales", "__syncwarp()", "barrier_arrive(tables.scaled())",
    )  # fmt: skip
    in_order(
        "void wait_slice(", "slice < 2 || free_below > slice - 2) return", "ld.acquire.gpu",
        "p.left + slice - 2", "< target", "free_below = slice - 1",
    )  # fmt: skip


def test_a_stage_is_waited_for_as_it_was_copied() -> None:
    """One barrier where one lane copies all of it; two where lanes gather tokens."""
    in_order(
        "void wait_listed(", "barrier_wait(ring.tokens_full(place.slot, 0)", "if (gathered) {",
        "barrier_wait(ring.weights_full(place.slot)", "fence_async_proxy();",
    )  # fmt: skip
    in_order("void pass(", "wait_listed(ring, place, gathered)", "release_stage(")
    in_order("void multiply(", "wait_listed(ring, place, gathered)", "wait(0);")
    up = c_text("prefill_up.cu")
    assert (
        "multiply<kN>(acc, p.weights.k / kStageK, ring, place, !kSorted || *p.total > p.room);"
        in up
    )
    assert "const int total = kSorted ? *p.total : 0;" in up
    assert "const bool listed = kSorted && total <= p.room;" in up
    assert "ring, body.place, kSorted && *p.total > p.room);" in up
