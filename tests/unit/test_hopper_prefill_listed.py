"""Rows of x in the order of the list, without a GPU: who writes them, who waits, how they round.

Expressions are the kernels' own; the statements around them follow ``prefill_listed.cuh`` and
``serve_list`` of ``prefill_route.cu``.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hopper_sorted import LISTED, ROUTE, ROUTED
from kernel_source import c_find, c_locals, c_text, c_value

from sglang_w4afp8.kernels.hopper.plan_prefill import SORTED_TOKENS

BLOCK, UNIT = ROUTED["kBlockRows"], ROUTED["kUnitRows"]
BROKEN = {
    "no wait for the last block": ("wanted", "end / kBlockRows"),
    "a row too few": ("rows", "(kBlockRows - 1 if block < wanted else 0)"),
    "published before it is written": ("early", ""),
}


class Call:
    """Rows that are written by CTAs of gate and up, while others read them.

    Args:
        seed: of the order of events.
        total: rows.
        early: rows that are there.
        ctas: with two warps each that write.
        broken: what is left out, a key of ``BROKEN``.
    """

    def __init__(self, seed: int, total: int, early: int, ctas: int, broken: str = "") -> None:
        self.order, self.total, self.early = random.Random(seed), total, early
        self.ctas, self.instead = ctas, BROKEN.get(broken, ("", ""))
        self.p = SimpleNamespace(early=early)
        self.times = [int(row < early) for row in range(total)]
        self.claimed = 0
        self.written = [0] * -(-total // BLOCK)

    def value(self, name: str, text: str, scope: dict[str, Any]) -> Any:
        return c_value(self.instead[1] if self.instead[0] == name else text, scope)

    def writer(self) -> Iterator[None]:
        """``write_listed``."""
        within = "void write_listed("
        claim = c_find(LISTED, (within,), "const int first").replace("__shfl_sync", "shuffled")
        scope: dict[str, Any] = {**ROUTED, "p": self.p, "total": self.total}
        scope["shuffled"] = lambda mask, value, lane: value
        assert "if (first >= total) return;" in c_text(LISTED)
        following, self.claimed = self.claimed, self.claimed + 1
        while True:
            scope["first"] = c_value(claim, scope | {"next": following})
            yield
            if scope["first"] >= self.total:
                return
            following, self.claimed = self.claimed, self.claimed + 1
            count = c_locals(LISTED, f"{within} > next = claim();", "count", scope)["count"]
            block = scope["first"] // BLOCK
            if self.instead[0] == "early":
                self.written[block] += count
                yield
            for row in range(scope["first"], scope["first"] + count):
                self.times[row] += 1
                assert row // BLOCK == block, "a unit in two blocks"
                yield
            assert "p.written + first / kBlockRows" in c_text(LISTED)
            if self.instead[0] != "early":
                self.written[block] += count

    def reader(self, tiles: list[tuple[int, int]]) -> Iterator[None]:
        """``Written``, for the items of a CTA."""
        within = "void wait(int end)"
        scope: dict[str, Any] = {**ROUTED, "p": self.p, "total": self.total}
        made = c_find(LISTED, ("Written of(",), "return").replace("Written{", "(")
        blocks = c_value(made.replace("}", ")"), scope)[2]
        for first, count in tiles:
            wanted = self.value("wanted", c_find(LISTED, (within,), "wanted"), {
                **scope, "end": first + count})  # fmt: skip
            assert "if (blocks >= wanted) return;" in c_text(LISTED)
            late = blocks < wanted
            while blocks < wanted:
                lanes = []
                for lane in range(32):
                    at = scope | {"blocks": blocks, "wanted": wanted}
                    at["threadIdx"] = SimpleNamespace(x=lane)
                    at = c_locals(LISTED, within, "block", at)
                    rows = self.value("rows", c_find(LISTED, (within, "blocks += 32"), "rows"), at)
                    lanes.append((at["block"], rows))
                while any(rows > 0 and self.written[block] < rows for block, rows in lanes):
                    yield
                blocks += 32
            if late:
                blocks = wanted
            assert all(self.times[first : first + count]), "a row that is not there"
            yield

    def run(self) -> None:
        """Until all have ended; a wait without an end is an error."""
        tiles = []
        first = 0
        while first < self.total:
            tiles.append((first, min(self.order.randint(1, SORTED_TOKENS), self.total - first)))
            first += tiles[-1][1]
        warps: list[Iterator[None]] = []
        for cta in range(self.ctas):
            warps += [self.writer(), self.writer(), self.reader(tiles[cta :: self.ctas])]
        for _ in range(200 * self.total + 10_000):
            if not warps:
                break
            warp = self.order.choice(warps)
            try:
                next(warp)
            except StopIteration:
                warps.remove(warp)
        assert not warps, "a wait without an end"
        assert self.times == [1] * self.total, "a row twice, or never"


CALLS = [
    (1, 0, 1),
    (3, 0, 2),
    (2 * BLOCK + 2, BLOCK, 1),
    (3 * BLOCK - 1, 2 * BLOCK, 2),
    (2 * BLOCK + 9, 0, 4),
    (5 * BLOCK + 60, 2 * BLOCK, 3),
    (BLOCK, BLOCK, 1),
]


@pytest.mark.parametrize(("total", "early", "ctas"), CALLS)
def test_every_row_is_written_once_before_it_is_read(total: int, early: int, ctas: int) -> None:
    for seed in range(6):
        Call(seed, total, early, ctas).run()


@pytest.mark.parametrize("broken", BROKEN)
def test_the_simulation_notices(broken: str) -> None:
    with pytest.raises(AssertionError):
        for seed in range(20):
            Call(seed, 4 * BLOCK + 9, BLOCK, 3, broken).run()


@pytest.mark.parametrize("workers", [1, 7, 264])
def test_route_writes_the_first_rows_once(workers: int) -> None:
    """``serve_list``: a row for each warp."""
    within = "void serve_list("
    text = " ".join(c_text(ROUTE).split())
    put = "put_rows<kRowScales, 7>(p.sorted.listed, row, 1);"
    assert f"row < rows; row += warps) {{ {put}" in text
    for total, early in ((5, 1536), (1536, 1536), (3000, 1536), (0, 1536)):
        p = SimpleNamespace(sorted=SimpleNamespace(listed=SimpleNamespace(early=early)))
        seen = []
        for worker in range(workers):
            for warp in range(ROUTED["kWarps"]):
                at: dict[str, Any] = {**ROUTED, "worker": worker, "workers": workers, "p": p}
                at |= {"threadIdx": SimpleNamespace(x=warp * 32 + 5), "total": total}
                at = c_locals(ROUTE, within, "warp warps rows", at)
                seen += list(range(at["warp"], at["rows"], at["warps"]))
        assert sorted(seen) == list(range(min(total, early)))


# ---- rounding ------------------------------------------------------------------------------------
def rounded(value: Fraction, to_zero: bool = False) -> Fraction:
    """The nearest float32 (ties to even), or the one towards zero; no overflow, no subnormals."""
    if value == 0:
        return value
    size, exponent = abs(value), 0
    while size >= 2**24:
        size, exponent = size / 2, exponent + 1
    while size < 2**23:
        size, exponent = size * 2, exponent - 1
    whole, rest = divmod(size, 1)
    if not to_zero and (rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2)):
        whole += 1
    return whole * Fraction(2) ** exponent * (1 if value > 0 else -1)


def quotient(a: Fraction, b: Fraction) -> Fraction:
    """``divide(float, Divisor)``."""
    for line in (
        "const float high = __frcp_rz(b);",
        "fmaxf(__fmaf_rn(-high, b, 1.0f) * high, high * 0x1p-60f)",
        "return __fmaf_rn(a, by.high, a * by.low);",
    ):
        assert line in c_text("primitives.cuh")
    high = rounded(1 / b, to_zero=True)
    low = max(rounded(rounded(1 - high * b) * high), high / 2**60)
    return rounded(a * high + rounded(a * low))


def e4m3(values: list[Fraction]) -> torch.Tensor:
    exact = torch.tensor([float(v) for v in values], dtype=torch.float32)
    assert [Fraction(float(v)) for v in exact] == values, "float32 already"
    return exact.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)


def test_rows_are_divided_as_ieee_division_would() -> None:
    """In E4M3: also where the quotient is in the middle of two of its numbers."""
    order, middles = random.Random(3), (17, 19, 21, 23, 25, 27, 29, 31)
    ours, wanted, ties = [], [], 0
    for i in range(3000):
        scale = Fraction(float(np.float32(order.uniform(1e-4, 2.0))))
        x = Fraction(order.randint(128, 255)) * Fraction(2) ** order.randint(-20, 4)
        if i % 3 == 0:  # the middle of two numbers
            scale = Fraction(order.randint(1, 7), 2 ** order.randint(0, 14))
            x = scale * order.choice(middles) / 2 ** order.randint(0, 6)
        if i % 3 == 1:  # as near to it as BF16 comes
            near = scale * order.choice(middles) / 2 ** order.randint(0, 6)
            x = Fraction(float(torch.tensor(float(near)).bfloat16()))
        ours.append(quotient(x, scale) * order.choice((1, -1)))
        wanted.append(rounded(x / scale) * (1 if ours[-1] > 0 else -1))
        ties += x / scale == rounded(x / scale)
    assert torch.equal(e4m3(ours), e4m3(wanted)) and ties >= 1000
