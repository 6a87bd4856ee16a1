"""Warps of a GPU as generators, in any order of events.

A warp yields what it waits for, and a scheduler lets one of those go on that can, at random.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

Wait = Callable[[], bool]
Warp = Iterator[Wait]


class Barrier:
    """An mbarrier: phases, each of so many arrivals and of the bytes that are expected in it."""

    def __init__(self, arrivals: int) -> None:
        self.arrivals, self.here, self.bytes, self.phase = arrivals, 0, 0, 0

    def arrive(self, expected: int = 0) -> None:
        """One more, that expects bytes."""
        self.here += 1
        assert self.here <= self.arrivals, "one too many"
        self.bytes += expected
        self._end()

    def came(self, size: int) -> None:
        """Bytes, perhaps before they are expected."""
        self.bytes -= size
        self._end()

    def _end(self) -> None:
        if self.here == self.arrivals and self.bytes == 0:
            self.here, self.phase = 0, self.phase + 1

    def passed(self, parity: int) -> Wait:
        """Whether the phase of this parity has ended, as ``mbarrier.try_wait.parity`` knows it."""
        return lambda: (self.phase - 1) % 2 == parity


class Running:
    """A warp that can be asked what it waits for."""

    def __init__(self, warp: Warp) -> None:
        self.warp, self.ended = warp, False
        self.wait: Wait = lambda: True

    def go_on(self) -> bool:
        try:
            self.wait = next(self.warp)
        except StopIteration:
            self.ended, self.wait = True, lambda: False
        return not self.ended


def run_warps(
    warps: list[Warp], order: random.Random, on_the_way: list[Callable[[], None]]
) -> None:
    """Run warps that are all resident, some of them slowly.

    Args:
        warps: what runs.
        order: of events.
        on_the_way: what copies will do at some time; warps add to it.

    Raises:
        AssertionError: nobody can go on, or it does not end.
    """
    running = [Running(warp) for warp in warps]
    slow = {id(warp): order.choice((1.0, 0.3, 0.03)) for warp in running}
    for _ in range(100_000):
        running = [warp for warp in running if not warp.ended]
        if not running:
            return
        able = [warp for warp in running if warp.wait()]
        assert able or on_the_way, "nobody can go on"
        able = [warp for warp in able if order.random() < slow[id(warp)]] or able
        if on_the_way and (not able or order.random() < 0.3):
            on_the_way.pop(order.randrange(len(on_the_way)))()
            continue
        warp = order.choice(able)
        for _ in range(order.choice((1, 3, 20))):
            if not warp.go_on() or not warp.wait():
                break
    raise AssertionError("it does not end")
