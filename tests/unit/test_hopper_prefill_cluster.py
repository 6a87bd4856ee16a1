"""Two CTAs of gate and up that share weights, in any order of events, without a GPU.

The statements follow ``prefill_ring.cuh``, ``prefill.cuh`` and ``prefill_up.cu``; a barrier that
never opens, a stage that is overwritten too early and an arrival at a CTA that has ended all show.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace

import pytest
from simulated_warps import Barrier, Warp, run_warps

CONSUMERS = 3  # warps; eight do the same
TOKEN_WARPS = 2


class Cluster:
    """Two CTAs with their rings.

    Args:
        items: tokens of both CTAs' tiles, for each item.
        stages: along K.
        ring: slots.
        seed: of the order of events.
        broken: what is left out.
    """

    def __init__(
        self, items: list[tuple[int, int]], stages: int, ring: int, seed: int, broken: str = ""
    ) -> None:
        self.items, self.stages, self.ring, self.broken = items, stages, ring, broken
        self.random = random.Random(seed)
        self.on_the_way: list[Callable[[], None]] = []
        self.ctas = [self.cta() for _ in range(2)]
        self.synced = 0
        self.multiplied = 0

    def cta(self) -> SimpleNamespace:
        slots = range(self.ring)
        return SimpleNamespace(
            full=[Barrier(1) for _ in slots],
            tokens_full=[Barrier(TOKEN_WARPS) for _ in slots],
            empty=[Barrier(2 * CONSUMERS) for _ in slots],
            weights=[[None] * 2 for _ in slots],
            tokens=[[None] * TOKEN_WARPS for _ in slots],
            warps=1 + TOKEN_WARPS + CONSUMERS,  # not ended
        )

    def there(self, rank: int) -> SimpleNamespace:
        cta = self.ctas[rank]
        assert cta.warps > 0, "a CTA that has ended"
        return cta

    def run(self) -> None:
        """Until all warps have ended."""
        warps = []
        for rank in range(2):
            mine = [self.produce_weights(rank)]
            mine += [self.produce_tokens(rank, part) for part in range(TOKEN_WARPS)]
            mine += [self.consume(rank) for _ in range(CONSUMERS)]
            warps += [self.counted(rank, warp) for warp in mine]
        run_warps(warps, self.random, self.on_the_way)
        assert not self.on_the_way
        tiles = sum(count > 0 for counts in self.items for count in counts)
        assert self.multiplied == tiles * self.stages * CONSUMERS

    def counted(self, rank: int, warp: Warp) -> Warp:
        yield from warp
        self.ctas[rank].warps -= 1

    def places(self) -> Iterator[tuple[int, int, int, int]]:
        """Item, stage, slot and phase, in turn."""
        for at in range(len(self.items) * self.stages):
            yield *divmod(at, self.stages), at % self.ring, at // self.ring & 1

    def produce_weights(self, rank: int) -> Warp:
        mine = self.ctas[rank]
        for item, step, slot, phase in self.places():
            yield mine.empty[slot].passed(phase ^ 1)
            mine.full[slot].arrive(2)
            yield lambda: True

            def copy(to: int, item: int = item, step: int = step, slot: int = slot) -> None:
                cta = self.there(to)
                cta.weights[slot][rank] = item, step
                cta.full[slot].came(1)

            self.on_the_way += [partial(copy, 0), partial(copy, 1)]

    def produce_tokens(self, rank: int, part: int) -> Warp:
        mine = self.ctas[rank]
        for item, step, slot, phase in self.places():
            yield mine.empty[slot].passed(phase ^ 1)

            def copy(item: int = item, step: int = step, slot: int = slot) -> None:
                mine.tokens[slot][part] = item, step
                mine.tokens_full[slot].arrive()

            if self.items[item][rank] > 0:
                self.on_the_way.append(copy)
            else:
                mine.tokens_full[slot].arrive()

    def consume(self, rank: int) -> Warp:
        mine = self.ctas[rank]
        for item, step, slot, phase in self.places():
            yield mine.full[slot].passed(phase)
            if self.items[item][rank] > 0:
                yield mine.tokens_full[slot].passed(phase)
                for _ in range(2):  # as long as it reads
                    assert mine.weights[slot] == [(item, step)] * 2, "other weights"
                    assert mine.tokens[slot] == [(item, step)] * TOKEN_WARPS, "other tokens"
                    yield lambda: True
                self.multiplied += 1
            elif self.broken != "pass":
                yield mine.tokens_full[slot].passed(phase)
            for to in range(2):
                self.there(to).empty[slot].arrive()
                yield lambda: True
        if self.broken != "sync":
            self.synced += 1
            yield lambda: self.synced == 2 * CONSUMERS


SHAPES = [
    ([(3, 3)], 1, 2),
    ([(3, 0), (5, 5), (1, 0), (2, 2)], 5, 3),
    ([(3, 0)] * 4, 7, 2),
    ([(2, 1)] * 5, 3, 4),
    ([(2, 0), (3, 3)] * 3, 2, 8),
]


@pytest.mark.parametrize(("items", "stages", "ring"), SHAPES)
def test_a_cluster_ends_and_reads_what_was_meant(
    items: list[tuple[int, int]], stages: int, ring: int
) -> None:
    for seed in range(60):
        Cluster(items, stages, ring, seed).run()


@pytest.mark.parametrize("broken", ["pass", "sync"])
def test_the_simulation_sees_what_is_missing(broken: str) -> None:
    """An item without tokens that waits for no tokens; CTAs that do not end together."""
    found = set()
    for seed in range(100):
        try:
            Cluster([(3, 0)] * 4, 7, 2, seed, broken).run()
        except AssertionError as error:
            found.add(str(error).splitlines()[0])
    assert found == {"nobody can go on" if broken == "pass" else "a CTA that has ended"}
