"""What fills the ring of the prefill path's matrix kernels, on the CPU: copies of every stage.

Index expressions are the kernels' own.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from hopper_sorted import TABLES, UP
from kernel_source import c_find, c_locals, c_text, c_value

PRODUCE = "prefill_produce.cuh"


@dataclass(frozen=True)
class Copy:
    """Of the ring: addresses in a stage, and in ``what``."""

    what: str
    to: int
    source: int
    size: int


def _made(source: str, within: tuple[str, ...], scope: dict[str, Any]) -> Any:
    """The ``Copy`` that a function gives back."""
    text = c_find(source, within, "return")
    return c_value(text.replace("Copy{", "(").replace("}", ")"), scope)


def token_copies(c: dict[str, Any], item: SimpleNamespace, k: int, rows: int) -> list[Any]:
    """``BlockRows`` of gate and up, or ``PanelRows`` of down: from, to and bytes of each copy.

    The last element is how far it is from a stage to the next.
    """
    up = "kAdders" not in c
    source, struct = (UP, "struct BlockRows") if up else (TABLES, "struct PanelRows")
    names = "kPanels kPieces kCopies" if up else "kCopies"
    scope = c_locals(source, struct, names, {**c, "item": item, "x": 0, "q": 0, "k": k})
    scope |= {"rows": rows}
    next_stage = c_value(c_find(source, (struct, "u32 next()"), "return"), scope)
    found: list[Any] = []
    for i in range(scope["kCopies"]):
        names = "panel block begin end line bytes to" if up else "from"
        at = scope | ({"number": i} if up else {"panel": i})
        at = c_locals(source, f"{struct} > Copy copy(", names, at)
        found.append(_made(source, (struct, "Copy copy("), at))
    return [*found, next_stage]


def stage_copies(
    c: dict[str, Any], item: SimpleNamespace, k: int, rows: int, b_rows: int, tokens: bool = True
) -> list[list[Copy]]:
    """``produce_stages``: what is copied for an item, for each stage.

    Args:
        c: constants, of gate and up or of down.
        item: expert, block, first, count.
        k: columns.
        rows: of the weights.
        b_rows: of the tokens.
        tokens: whether they are among it (not so with ``NoRows``).
    """
    within = "void produce_stages"
    p = SimpleNamespace(rows=rows, k=k, w=0, scales=0)
    scope: dict[str, Any] = {**c, "p": p, "item": item, "stage": 0}
    scope |= {"full": lambda: "full", "kWithTokens": tokens}
    scope = c_locals(PRODUCE, within, "tiles stages kBlockTiles row_tiles bytes", scope)
    lists: dict[str, list[int]] = {"codes": [], "scales": [], "beside": []}
    for t in range(c["kRowTiles"]):
        at = c_locals(PRODUCE, within, "tile block before", scope | {"t": t})
        for name, values in lists.items():
            values.append(c_value(c_find(PRODUCE, (within,), f"{name}[t]"), at))
    *copies, next_stage = token_copies(c, item, k, b_rows) if tokens else [0]
    codes = c_find(PRODUCE, (within, "barrier_expect(full()"), "bulk_copy(")
    scales = c_find(PRODUCE, (within, "bulk_copy(", "full());"), "bulk_copy(")
    of_tokens = c_find(PRODUCE, (within, "tokens[i].bytes > 0"), "bulk_copy(")
    expected = c_find(PRODUCE, (within,), "barrier_expect_all(" if tokens else "barrier_expect(")
    stages: list[list[Copy]] = []
    for step in range(scope["stages"]):
        stage: list[Copy] = []
        for t in range(scope["row_tiles"]):
            for what, text in (("codes", codes), ("scales", scales)):
                *copy, barrier = c_value(text, scope | lists | {"t": t})
                assert barrier == "full", "another barrier"
                stage.append(Copy(what, *copy))
        for i, (source, to, size) in enumerate(copies):
            one = SimpleNamespace(**{"from_": source, "to": to, "bytes": size})
            *copy, barrier = c_value(of_tokens, scope | {"tokens": {i: one}, "i": i})
            assert barrier == "full", "another barrier"
            stage += [Copy("tokens", *copy)] if size else []
            copies[i] = source + next_stage, to, size
        stages.append(stage)
        bar, size, *arrivals = c_value(expected, scope)
        assert (bar, size) == ("full", sum(has.size for has in stage)), "bytes expected"
        assert arrivals == ([c["kTokenArrivals"]] if tokens else [])
        at = c_locals(PRODUCE, within, "last_cut", scope | {"step": step})
        for t in range(c["kRowTiles"]):
            more = c_locals(PRODUCE, within, "next", at | lists | {"t": t})
            for name in ("codes", "scales"):
                lists[name][t] += c_value(c_find(PRODUCE, (within,), f"{name}[t] +="), more)
    assert "tokens[i].from += rows.next();" in c_text(PRODUCE)
    return stages
