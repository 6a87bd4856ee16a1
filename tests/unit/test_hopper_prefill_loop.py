"""The loop over K of the prefill path's matrix kernels (``multiply``), without a GPU.

Its conditions and addresses are the kernel's own; what waits, loads and multiplications do is
played here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
from kernel_source import c_constants, c_text, c_value

from sglang_w4afp8.kernels.hopper.layout import StageShape

Part = tuple[int, int, int, int]
"""Stage of the item, half, scale group of the half, row tile."""


PLAYED = """
constexpr int kParts = @kParts@; ...
wait(@first_wait@); u32 stage = ... load_codes(codes, @first_load@); ...
for (int left = @left@; left > 0; --left) { #pragma unroll
  for (int part = 0; part < @parts@; ++part) {
    const int half = @half@, group = @group@;
    Fragment f; decode(f, codes); ...
    const u64 b = panel_descriptor(@b@);
    issue<kN>(products, f, b, group);
    const bool last = @last@;
    const u32 empty = ring.empty(@empty@), here = @here@;
    if (last) {
      place.advance(ring.size);
      stage = ring.stage(place.slot);
      if (@next_comes@) wait(@next_wait@);
    } else if (@half_ends@) {
      wait(@half_wait@);
    }
    mma_wait<0>(); ...
    if (@releases@) release_stage(empty, mine.lane);
    const u32 columns = @columns@; ...
    float (&sums)[kN / 2] = acc[@sums@]; ...
    const int next = @next@, next_half = @next_half@;
    u32 w = @w@; u32 s = @s@; ...
    if (@loads@) { load_codes(codes, @load@); } else { forget(codes); ... }
    add<@rest@>(sums, products, f.scales, columns);
    if (@releases_late@) release_stage(empty, mine.lane);
"""
"""What :func:`play` follows, with names for what it evaluates."""


@cache
def loop() -> dict[str, str]:
    """The expressions in ``multiply`` that have a name in :data:`PLAYED`."""
    text = " ".join(re.sub(r"//.*", "", c_text("prefill.cuh")).split())
    text = text[text.index("void multiply(") : text.index("void with_columns(")]
    pattern = re.escape(" ".join(PLAYED.split())).replace(r"\.\.\.", ".*?")
    found = re.search(
        re.sub(r"@(\w+)@", r"(?P<\1>[^{};]*?)", pattern).replace(r"\ .*?", ".*?"), text
    )
    assert found is not None, "multiply is not what this test plays"
    return found.groupdict()


@dataclass
class Item:
    """What a warpgroup sees of an item: stages come when it waits, and go when it releases."""

    c: dict[str, Any]
    ring: int
    there: set[tuple[int, int]] = field(default_factory=set)  # stage of the item, half
    done: list[Part] = field(default_factory=list)
    released: int = 0
    number: int = 0  # of the stage in the item

    def wait(self, half: int) -> None:
        assert (self.number, half) not in self.there, "a phase is waited for twice"
        assert half == 0 or (self.number, half - 1) in self.there
        self.there.add((self.number, half))

    def within(self, address: int) -> tuple[int, int]:
        """The stage of the item at an address, and the offset in it."""
        slot, offset = divmod(address, self.c["kStageBytes"])
        here = [n for n in (self.number, self.number - 1) if n >= 0 and n % self.ring == slot]
        assert here, "another slot of the ring"
        assert here[0] >= self.released, "read after it was released"
        return here[0], offset

    def load(self, w: int, s: int, tile: int, group: int) -> Part:
        number, codes = self.within(w)
        assert self.within(s)[0] == number
        half = codes // (self.c["kK"] * 32)
        assert codes == half * self.c["kK"] * 32
        assert self.within(s)[1] == half * self.c["kGroups"] * 128
        assert (number, 0) in self.there, "codes before they are there"
        return number, half, group, tile

    def multiply(self, codes: Part, b: int, group: int, sums: int) -> None:
        number, offset = self.within(b)
        half, rest = divmod(offset, self.c["kTokenBytes"])
        assert rest == 0 and (number, half) in self.there, "tokens before they are there"
        assert (number, half, group, sums) == codes, "another part's codes"
        self.done.append(codes)


def play(c: dict[str, Any], stages: int, ring: int) -> Item:
    """One item of ``stages`` stages, whose first one is in slot 0 of ``ring``."""
    text, item = loop(), Item(c, ring)
    mine = SimpleNamespace(codes=0, scales=0, lane=0)
    place = SimpleNamespace(slot=0)
    shared = SimpleNamespace(empty=lambda slot: slot)
    fixed = c | {"place": place, "ring": shared, "mine": mine, "first": mine, "stages": stages}

    def value(name: str, scope: dict[str, Any]) -> Any:
        return c_value(text[name], fixed | scope)  # a tuple, if there are commas

    fixed["kParts"] = value("kParts", {})
    item.wait(value("first_wait", {}))
    stage = 0
    held: Part | None = item.load(*value("first_load", {"stage": stage}))
    for left in range(value("left", {}), 0, -1):
        for part in range(value("parts", {})):
            assert held is not None, "no codes were asked for"
            scope: dict[str, Any] = {"left": left, "part": part, "stage": stage}
            for name in ("half", "group", "last", "empty", "here", "next", "next_half"):
                scope[name] = value(name, scope)
            b, sums = value("b", scope), value("sums", scope)
            item.multiply(held, b, scope["group"], sums)
            of = item.number
            if scope["last"]:
                item.number += 1
                place.slot = item.number % ring
                scope["stage"] = stage = place.slot * c["kStageBytes"]
                if value("next_comes", scope):
                    item.wait(value("next_wait", scope))
            elif value("half_ends", scope):
                item.wait(value("half_wait", scope))

            def release(scope: dict[str, Any] = scope) -> None:
                assert scope["empty"] == item.released % ring, "another slot"
                item.released += 1

            if value("releases", scope):
                release()
            held = None
            if value("loads", scope):
                at = scope | {"w": value("w", scope), "s": value("s", scope)}
                held = item.load(*value("load", at))
            if c["kRowScales"]:
                assert item.within(value("columns", scope)) == (of, c["kColumnScalesAt"])
            if value("releases_late", scope):
                release()
    assert held is None, "codes of the next item"
    return item


SHAPES = [
    shape
    for shape in (
        *product((512, 384, 256, 192, 128, 64), (128, 64, 32), (1, 2), (0,)),
        *product((512, 384, 192, 64), (128, 64, 32), (1,), (1,)),
        *product((512, 640), (128, 64, 32), (1,), (2,)),
    )
    if shape[0] % shape[1] == 0
]
"""K, group, row tiles of a warpgroup, and whether tokens are in the order of the list: 2, and come
with scales."""


@pytest.mark.parametrize("stages", [1, 2, 3, 7])
@pytest.mark.parametrize(("k", "group", "per_wg", "in_order"), SHAPES)
def test_all_parts_are_multiplied_once_with_their_tokens(
    k: int, group: int, per_wg: int, in_order: int, stages: int
) -> None:
    shape = StageShape.of(512, k, group, True)
    defines = {"W4_K": shape.stage_k, "W4_TILES": shape.tiles, "W4_GROUP": group}
    defines |= {"W4_MINUS_EIGHT": 0, "W4_DYNAMIC": 0, "W4_PER_WG": per_wg, "W4_PANEL": 0}
    defines |= {"W4_CLUSTER": 1, "W4_SORTED": min(in_order, 1), "W4_ROW_SCALES": in_order // 2}
    c = c_constants("prefill_up.cu", defines)
    for ring in (2, 3, 5):
        item = play(c, stages, ring)
        halves = range(c["kHalves"])
        everything = product(range(stages), halves, range(c["kGroups"]), range(per_wg))
        assert sorted(item.done) == list(everything)
        assert item.there == {*product(range(stages), halves)} and item.released == stages
        # A row tile's groups are added in the order of K.
        for tile in range(per_wg):
            mine = [part for part in item.done if part[3] == tile]
            assert mine == sorted(mine)
