"""``prefill_own_jobs.cuh`` on the CPU: shared memory, and the steps of jobs.

Constants and expressions are the kernel's own; the statements around them follow it.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from kernel_source import c_constants, c_find, c_value

from sglang_w4afp8.kernels.hopper.plan import Kernel

KERNEL, JOBS, FEED = "prefill_own_down.cu", "prefill_own_jobs.cuh", "prefill_own.cuh"


def own_constants(kernel: Kernel) -> dict[str, Any]:
    """What the kernel's sources call their sizes."""
    return c_constants(KERNEL, dict(kernel.defines))


def shared_map(c: dict[str, Any], begin: int, max_steps: int) -> SimpleNamespace:
    """``Shared::of`` for memory that begins at an address."""
    s = SimpleNamespace(max_steps=max_steps)
    scope = {**c, "s": s, "begin": begin, "max_steps": max_steps, "shared": begin}
    scope |= {"sizeof": int, "Step": 4}
    for name in ("token_slots", "sums", "weight_slots", "metas", "exponent_tables"):
        setattr(s, name, c_value(c_find(JOBS, ("static Shared of",), f"s.{name}"), scope))
    scope["tables"] = c_value(c_find(JOBS, ("static Shared of",), "tables"), scope)
    table = c_find(JOBS, ("static Shared of",), "s.step_tables")
    table = table.replace("reinterpret_cast<Step*>", "")
    s.step_tables = c_value(table, scope)
    s.bars = c_value(c_find(JOBS, ("static Shared of",), "s.bars"), scope)
    return s


def shared_at(c: dict[str, Any], s: SimpleNamespace, name: str, *at: int) -> int:
    """A member function of ``Shared`` that gives an address: ``tokens(2)``."""
    names = "i" if len(at) == 1 else "wg warp"
    scope = {**c, **vars(s), **dict(zip(names.split(), at, strict=True))}
    for other in ("tokens_full", "weights_full", "table_full"):
        if other != name:
            scope[other] = lambda i, other=other: shared_at(c, s, other, i)
    address: int = c_value(c_find(JOBS, (f" {name}(",), "return"), scope)
    return address


def pack_step(expert: int, first: int, count: int) -> int:
    """``Step::of``, in 32 bits."""
    text = c_find(JOBS, ("static Step of(",), "return").removeprefix("Step{").removesuffix("}")
    bits: int = c_value(text, {"expert": expert, "first": first, "count": count})
    return bits & 0xFFFFFFFF


def unpack_step(bits: int) -> tuple[int, int, int]:
    """Expert, first column, number of columns."""
    texts = (c_find(JOBS, (f"int {name}() const",), "return") for name in STEP)
    expert, first, count = (c_value(text, {"bits": bits}) for text in texts)
    return expert, first, count


STEP = ("expert", "first", "count")


def job_steps(c: dict[str, Any], begins: list[list[int]], rank: int) -> list[int]:
    """``describe_jobs``: packed steps of a CTA.

    Args:
        c: constants of the kernel.
        begins: for each list of the cluster where its experts' columns begin, and the end.
        rank: of the CTA; its list need not be there.
    """
    steps = []
    for e in range(max(map(len, begins)) - 1):
        own = own_end = most = 0
        for r, first in enumerate(begins):
            most = max(most, first[e + 1] - first[e])
            if r == rank:
                own, own_end = first[e], first[e + 1]
        scope = {**c, "most": most, "own": own, "own_end": own_end, "e": e}
        for i in range(c_value(c_find(JOBS, ("void describe_jobs",), "mine"), scope)):
            text = c_find(JOBS, ("void describe_jobs", "i < mine"), "at")
            at = c_value(text, scope | {"i": i})
            text = c_find(JOBS, ("void describe_jobs",), "Step::of(")
            steps.append(pack_step(*c_value(text, scope | {"at": at})))
    return steps
