"""From times of the paths to limits: which numbers of tokens to measure, and what they say.

Nothing here needs a GPU; :mod:`sglang_w4afp8.tools.bench_tune` measures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from sglang_w4afp8.kernels.hopper.plan import PATHS, UNLIMITED, Limits

Times = dict[str, dict[int, float]]
"""Microseconds by path and number of tokens; a path lacks the numbers that it cannot run."""

SWITCH = 0.01
"""What a further path costs: it must save 1 % at one of the measured numbers, or noise chooses."""
CLOSE = 1.1
"""Neighbours around a limit are near enough at this ratio."""
ROUNDS = 4
"""Times that the numbers around the limits are halved."""


def first_numbers(most: int) -> list[int]:
    """Powers of two up to ``most`` tokens, and ``most``."""
    return sorted({1 << n for n in range(most.bit_length()) if 1 << n <= most} | {most})


def choose(times: Times, paths: Sequence[str] = PATHS) -> Limits:
    """The limits with the smallest sum of log(time / fastest) over the measured numbers.

    Exact: paths follow each other in a fixed order, so the best cover of the first j numbers by
    the first i paths is that of fewer paths and a run of path i.

    Args:
        times: at least one path for each number.
        paths: in the order of growing calls; names the fields of the limits, but for the last.

    Raises:
        ValueError: no order of paths covers the numbers.
    """
    tokens = sorted({m for measured in times.values() for m in measured})
    fastest = {m: min(t[m] for t in times.values() if m in t) for m in tokens}

    def cost(path: str, begin: int, end: int) -> float:
        """Of a run ``tokens[begin:end]``; infinite where the path cannot run one of them."""
        if begin == end:
            return 0.0
        measured = times.get(path, {})
        if any(m not in measured for m in tokens[begin:end]):
            return math.inf
        return SWITCH + sum(math.log(measured[m] / fastest[m]) for m in tokens[begin:end])

    # best[j]: cost and ends of runs of the cover of tokens[:j] by the paths so far.
    nothing: tuple[int, ...] = ()
    best = [(0.0, nothing)] + [(math.inf, nothing)] * len(tokens)
    for path in paths:
        best = [
            min(
                (best[begin][0] + cost(path, begin, end), (*best[begin][1], end))
                for begin in range(end + 1)
            )
            for end in range(len(tokens) + 1)
        ]
    total, ends = best[-1]
    if total == math.inf:
        raise ValueError(f"no path covers each of {tokens} tokens")
    limits = []
    for begin, end in pairwise((0, *ends[:-1])):
        if end == begin:
            limits.append(0)
        else:
            limits.append(UNLIMITED if end == len(tokens) else tokens[end - 1])
    return Limits(*limits)


def path_of(limits: Limits, tokens: int) -> str:
    """The path that limits mean where every path can run: the first that is not exceeded."""
    return next((name for name, most in limits._asdict().items() if tokens <= most), PATHS[-1])


def between(times: Times, limits: Limits) -> list[int]:
    """Numbers to measure next: the middle between each limit and the number above it."""
    tokens = sorted({m for measured in times.values() for m in measured})
    found = []
    for below, above in pairwise(tokens):
        if path_of(limits, below) != path_of(limits, above) and above > below * CLOSE:
            middle = round(math.sqrt(below * above))
            if below < middle < above:
                found.append(middle)
    return found


def search(
    measure: Callable[[str, int], float | None],
    most: int,
    told: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Times, Limits]:
    """Measure powers of two, choose, and measure more where paths change.

    Args:
        measure: microseconds of a path for a number of tokens; None where it cannot run.
        most: largest number of tokens.
        told: hears, before each measurement, how many are done and how many there may be.
    """
    times: Times = {path: {} for path in PATHS}
    numbers, done = first_numbers(most), 0
    changes = len(PATHS) - 1
    total = len(PATHS) * (len(numbers) + ROUNDS * changes)
    for round_number in range(ROUNDS + 1):
        for m in numbers:
            for path in PATHS:
                told(done, total)
                us = measure(path, m)
                done += 1
                if us is not None:
                    times[path][m] = us
        limits = choose(times)
        numbers = between(times, limits)
        total = done + len(PATHS) * len(numbers) * (ROUNDS - round_number)
        if not numbers:
            break
    told(done, done)
    return times, limits
