"""Down on tokens in the order of the list, in any order of events, without a GPU.

A wait that never ends, a contribution that is read before it is published or after it was
overwritten, and a table that is another item's all show; so does what is left out on purpose.
"""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hopper_sorted import DOWN, Slices
from kernel_source import c_text
from sorted_call import WGS, Call, Problem, random_call


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
        ("settle", "nobody can go on"),  # an item two slices on waits for its own CTA's sums
        ("end", "nobody can go on"),  # sums of a CTA's last items are not counted
        ("fetch first", "nobody can go on"),  # who may miss that an item's results are through
        ("idle", "results of another item"),  # who has no row tile counts for the item before
        ("out", "results of another item"),
        ("written", "results of another item"),
        ("one table", "another item's table"),
        ("full", "another item's table"),
        ("slice", "a contribution that is not there"),  # nobody waits for the last slice but one
        ("target", "a contribution that is not there"),  # or not for all of it
        ("early", "a contribution that is not there"),  # it is given up before it was read
        ("ready", "a contribution that is not there"),
        ("done", "a contribution that is not there"),
        ("through", "a contribution that is not there"),  # published before it is written
        ("sync", "a contribution that is not there"),  # one finisher needs what the other writes
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
    through, full = "barrier_wait(tables.through(), phase", "barrier_wait(tables.full(), phase"
    in_order("void wait_out()", through + "_of(place.number()) ^ 1)")
    in_order("struct DownBody > void run()", "multiply_one", "wait_out();", full, "sts32(")
    in_order(
        "w4a8_prefill_down(", "reader.wait(queue, ring)", "== kEnd) break",
        ">= p.weights.rows)", "pass(", "body.wait_out();", "with_columns(", "__syncwarp()",
        "barrier_arrive(tables.written())", ".release(ring)", "body.place.next_item()",
    )  # fmt: skip
    in_order(
        "struct Finisher > void run()", "reader.wait(queue, ring).kind == kEnd) return",
        "phase_of(reader.number)", full, "barrier_wait(tables.written(), phase", "leave();",
        "__syncwarp()", "barrier_arrive(tables.through())", through,
        "barrier_wait(tables.ready(), phase)", "add_up();", "reader.release(ring)",
    )  # fmt: skip
    in_order(
        "struct Clerk > void run()", "i < items + kQueue - 1", "i <= items", "order.item(",
        "settle(i - kQueue + 1)", "queue.item[i % kQueue] = claimed",
        "barrier_arrive(ring.queue_bars + i % kQueue * 16)", "kind == kEnd) items = i",
        "n = i - kQueue + 1; n >= 0 && n < items) publish(n)",
        "n = i - kQueue + 2; n >= 0 && n < items) fetch(n)", "settle(items)",
    )  # fmt: skip
    in_order(
        "void settle(", "settled < count",
        "barrier_wait(ring.queue_bars + settled % kQueue * 16 + 8, settled / kQueue & 1)",
        "slices.count() > 2", "fence.acq_rel.gpu", "p.left + item(settled).slice",
    )  # fmt: skip
    in_order(
        "void publish(", "while (!ready || !through)", "if (!ready)", "ld.acquire.gpu",
        "__all_sync", "__syncwarp()", "barrier_arrive(tables.ready())", "if (!through)",
        "if (ready) " + through + "_of(n))", "barrier_test(tables.through(), phase_of(n))",
        "fence.acq_rel.gpu", "red.relaxed.gpu.global.or",
    )  # fmt: skip
    in_order("void fetch(", "wait_slice(n)", "barrier_expect(tables.full()", "bulk_copy(")
    in_order(
        "void wait_slice(", "slice < 2 || free_below > slice - 2) return", "settle(n)",
        "ld.acquire.gpu", "p.left + slice - 2", "< target", "free_below = slice - 1",
    )  # fmt: skip
