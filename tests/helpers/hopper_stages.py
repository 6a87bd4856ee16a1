"""What fills the ring of the prefill path's matrix kernels, on the CPU: copies of every stage.

Index expressions are the kernels' own.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from hopper_sorted import LISTED, TABLES, UP
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

    Codes, and scales if columns have some; the last element is how far it is for each of them from
    a stage to the next.
    """
    up = "kAdders" not in c
    source, struct = (UP, "struct BlockRows") if up else (TABLES, "struct PanelRows")
    names = "kPanels kPieces kRowCopies kCopies" if up else "kCopies"
    scope = c_locals(source, struct, names, {**c, "item": item, "x": 0, "q": 0, "k": k})
    scope |= {"rows": rows, "spans": SimpleNamespace(listed=0, rows=rows)}
    scope["written"] = SimpleNamespace(p=SimpleNamespace(spans=scope["spans"]))
    codes = scope["kRowCopies"] if up else scope["kCopies"]
    make = "Copy codes(" if up else "Copy copy("
    found: list[Any] = []
    for i in range(codes):
        names = "panel block begin end line bytes to" if up else "from"
        at = scope | ({"number": i} if up else {"panel": i})
        at = c_locals(source, f"{struct} > {make}", names, at)
        found.append(_made(source, (struct, make), at))
    if scope["kCopies"] > codes:
        at = scope | {"span_row": span_row, "scale_bytes": lambda item: _scale_bytes(c, item)}
        at = c_locals(source, f"{struct} > Copy scales(", "row", at)
        text = c_find(source, (struct, "Copy scales("), "return")
        text = text.replace("reinterpret_cast<const u8*>", "4 * ").replace("Copy{", "(")
        found.append(c_value(text.replace("}", ")"), at))
    within = (struct, "u32 next(int")
    text = c_find(source, within, "return")
    return [*found, [c_value(text, scope | {"number": i}) for i in range(len(found))]]


def span_row(row: int, before: int, expert: int) -> int:
    """``span_row``."""
    text = c_find(LISTED, ("int span_row(",), "return")
    number: int = c_value(text, {"row": row, "before": before, "expert": expert})
    return number


def _scale_bytes(c: dict[str, Any], item: SimpleNamespace) -> int:
    text = c_find(UP, ("struct BlockRows", "u32 scale_bytes("), "return")
    size: int = c_value(text, {**c, "item": item})
    return size


def _token_bytes(c: dict[str, Any], item: SimpleNamespace, tokens: bool) -> int:
    """``bytes`` of what copies tokens."""
    source, struct = (UP, "struct BlockRows") if "kAdders" not in c else (TABLES, "PanelRows")
    if not tokens:
        source, struct = PRODUCE, "struct NoRows"
    scope = {**c, "item": item, "scale_bytes": lambda item: _scale_bytes(c, item)}
    size: int = c_value(c_find(source, (struct, "u32 bytes("), "return"), scope)
    return size


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
    scope["rows"] = SimpleNamespace(bytes=lambda item: _token_bytes(c, item, tokens))
    scope = c_locals(PRODUCE, within, "tiles stages kBlockTiles row_tiles bytes", scope)
    lists: dict[str, list[int]] = {"codes": [], "scales": [], "beside": []}
    for t in range(c["kRowTiles"]):
        at = c_locals(PRODUCE, within, "tile block before", scope | {"t": t})
        for name, values in lists.items():
            values.append(c_value(c_find(PRODUCE, (within,), f"{name}[t]"), at))
    *copies, next_stages = token_copies(c, item, k, b_rows) if tokens else [[]]
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
            what = "tokens" if to < c["kWeightsAt"] else "column scales"
            stage += [Copy(what, *copy)] if size else []
            copies[i] = source + next_stages[i], to, size
        stages.append(stage)
        bar, size, *arrivals = c_value(expected, scope)
        assert (bar, size) == ("full", sum(has.size for has in stage)), "bytes expected"
        assert arrivals == ([c["kTokenArrivals"]] if tokens else [])
        at = c_locals(PRODUCE, within, "last_cut", scope | {"step": step})
        for t in range(c["kRowTiles"]):
            more = c_locals(PRODUCE, within, "next", at | lists | {"t": t})
            for name in ("codes", "scales"):
                lists[name][t] += c_value(c_find(PRODUCE, (within,), f"{name}[t] +="), more)
    assert "tokens[i].from += rows.next(i);" in c_text(PRODUCE)
    return stages
