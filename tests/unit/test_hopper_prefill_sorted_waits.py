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


def test_two_tables_would_do() -> None:
    """The third one is for speed: a table is there before the sums of the item before are made."""
    assert errors("two tables", range(100)) == set()


@pytest.mark.parametrize(
    ("broken", "wanted"),
    [
        ("settle", "nobody can go on"),  # an item two slices on waits for its own CTA's sums
        ("idle", "nobody can go on"),  # sums of a warpgroup that has no row tile now
        ("one table", "nobody can go on"),
        ("slice", "a contribution that is not there"),  # nobody waits for the last slice but one
        ("target", "a contribution that is not there"),  # or not for all of it
        ("early", "a contribution that is not there"),  # it is given up before it was read
        ("ready", "a contribution that is not there"),
        ("done", "a contribution that is not there"),
        ("sync", "a contribution that is not there"),  # one warp publishes what others write
        ("two rows", "another item's table"),  # barriers of three tables, memory of two
        ("empty", "another item's table"),
        ("skip", "another item's table"),  # who has no row tile gives up a table to come
        ("end", "another sum"),
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
    """A function of the kernel makes these statements one after the other."""
    text = " ".join(c_text(DOWN).split())
    at = text.index(within)
    end = text.find(" __device__ ", at + len(within))
    for statement in statements:
        found = text.find(statement, at, end)
        assert found >= 0, (within, statement)
        at = found + len(statement)


def test_the_simulation_follows_the_kernel() -> None:
    ask, add_up, sync = "ask();", "add_up(coming);", "named_sync(1 + wg, 128);"
    full, ready = "barrier_wait(tables.full(", "barrier_wait(tables.ready("
    in_order(
        "void run()", "multiply_one<kN>", ask, full + "table())", "sts32(", "wait_slice();", sync,
        "leave(out);", add_up, sync, "if (thread == 0)", "fence.acq_rel.gpu", "add(p.done",
        "before().slice >= 0 && slices.count() > 2", "add(p.left + before().slice)",
        "remember(item().slice, item().block, item().count)",
    )  # fmt: skip
    in_order(
        "void settle()", "before().slice) < 0) return", "add_up(ask());", "named_sync(",
        "fence.acq_rel.gpu", "add(p.left + before().slice)", "remember(-1, 0, 0)",
    )  # fmt: skip
    in_order("void skip()", "pass(", ready + "table())", "barrier_arrive(tables.empty(table()))")
    in_order("Coming ask()", "before().slice >= 0", ready + "table_before())", "load_part(")
    in_order(
        "void add_up(", "< 0) return", "r < kRounds", "column_of(coming.found, r * 4 + number)",
        "add_one(c, coming.v[r], kAtOnce)", "j < kRounds * 4; ++j) rest &= rest - 1",
        "while (rest != 0)", "column_of(rest, number)", "add_one(c, coming.v[0], 0)",
        "j < 4; ++j) rest &= rest - 1", "arrive(tables.empty(table_before()))",
    )  # fmt: skip
    in_order(
        "void wait_slice()", "slice < 2 || uniform(before().free_below) > slice - 2) return",
        "ld.acquire.gpu", "p.left + slice - 2", "< target", "free_below = slice - 1",
    )  # fmt: skip
    in_order(
        "void produce_tables(", "reader.next(", "barrier_wait(tables.empty(i), phase_of(n) ^ 1)",
        full + "i), phase_of(n))", "row_tiles_of(p, item.block)", "tile == item.step) continue",
        "ld.acquire.gpu", "seen < target", "__syncwarp()", "barrier_arrive(tables.ready(i))",
    )  # fmt: skip
    in_order(
        "w4a8_prefill_down(", "reader.wait(queue, ring)",
        "idle || item.slice > memories[threadIdx.x >> 5].slice + 1)) body.settle()",
        "body.skip()", "with_columns(", "body.reader.release(ring)", "body.settle()",
    )  # fmt: skip
