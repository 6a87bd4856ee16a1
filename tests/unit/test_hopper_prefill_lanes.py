"""Who arrives at the barriers of the Hopper kernels, and how many arrivals they count.

With ``W4_EVERY_LANE=1`` (for racecheck) all 32 lanes of a warp arrive where one does otherwise. A
barrier that counts warps and does not say so would never open, or open too early.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from kernel_source import c_constants, c_find, c_text, c_value

from sglang_w4afp8 import env
from sglang_w4afp8.kernels.hopper import build
from sglang_w4afp8.kernels.hopper.plan import Kernel

ROOT = Path(__file__).resolve().parents[2]
RING, JOBS = "prefill_ring.cuh", "prefill_own_jobs.cuh"
TABLES, PRODUCE = "prefill_tables.cuh", "prefill_produce.cuh"
SIZES = {"kCluster": 2, "kConsumers": 256, "readers": 11, "kWeightWarps": 2, "kTokenWarps": 4}
SIZES["kTokenArrivals"] = int(c_find(RING, (), "kTokenArrivals"))
# Arrivals by threads for themselves, and by warps.
COPIES, QUEUE_FULL = (1, 0), (1, 0)  # who expects the bytes; who claims
ARRIVALS = {
    RING: {
        "ring.weights_full(i)": COPIES,
        "ring.tokens_full(i, h)": (64, 0),  # every lane of two warps; see below
        "ring.empty(i)": (0, 2 * 8),
        "ring.queue_bars + i * 16": QUEUE_FULL,
        "ring.queue_bars + i * 16 + 8": (0, 8 + 3),
    },
    JOBS: {
        "weights_full(i)": COPIES,
        "weights_empty(i)": (0, 4 * 2),
        "tokens_full(i)": (1, 1),  # who expects the bytes, and what columns are
        "tokens_empty(i)": (0, 4),
        "table_full(i)": (0, 1),
        "table_empty(i)": (0, 8 + 2 + 4),
        "number_full(i)": (1, 0),  # who has written the number
        "number_empty(i)": (0, 2),
        "turn(i / 4, i % 4)": (0, 1),
    },
    TABLES: {
        "scaled()": (0, 1),  # the clerk
        "full()": COPIES,
        "stored()": (0, 8),
    },
    "prefill_inner.cuh": {"smem_address(columns_bars + i)": (0, 1)},  # who claims
    "gemm.cu": {"bars + i * 16": (1, 1), "bars + i * 16 + 8": (0, 8)},
    "own_down.cu": {"bars + i * 16": (1, 1), "bars + i * 16 + 8": (0, 8)},
    "small_up.cu": {"bars + i * 16": COPIES, "bars + i * 16 + 8": (0, 8)},
    "small_down.cu": {"bars + i * 16": (2, 0), "bars + i * 16 + 8": (0, 8)},
    "ceiling.cu": {"bars + i * 8": COPIES},
}
# Arrivals that are no warp's; their number in a file, by their line.
OTHERS = {
    (RING, "barrier_arrive(bar);"): 1,  # claim: one lane works
    (TABLES, "barrier_arrive(bar);"): 1,  # as claim
    ("prefill_inner.cuh", "barrier_arrive(bar);"): 1,
    (RING, "if (lane < kCluster) barrier_arrive_at(empty, lane);"): 1,  # a lane for each CTA
    (RING, "for (u32 to = 0; to < kCluster; ++to) barrier_arrive_at(empty, to);"): 1,  # all lanes
    (JOBS, "for (int i = 0; i < 4; ++i) barrier_arrive(turn(0, i), kLanes);"): 1,
    (JOBS, "barrier_arrive(bar);"): 1,  # arrive_at
    (JOBS, "barrier_arrive_at(bar, to);"): 1,
}
# `… &&` before it or `&& …` behind it may say whether the warp arrives at all.
LANE = r"(lane(\(\))?|\(threadIdx\.x & 31\))"
GUARD = rf"^if \(([^|]*\()?kEveryLane \|\| {LANE} == 0(\)[^|]*)?\) \w*arrive"
SOURCES = sorted(path.name for path in build.CSRC.glob("*.cu*") if path.name != "primitives.cuh")


def lanes(every_lane: int) -> int:
    count = c_constants("primitives.cuh", {"W4_EVERY_LANE": every_lane})["kLanes"]
    assert isinstance(count, int)
    return count


def test_one_lane_or_all() -> None:
    assert (lanes(0), lanes(1)) == (1, 32)
    assert c_constants("primitives.cuh", {})["kLanes"] == 1, "what is served"


@pytest.mark.parametrize("source", SOURCES)
def test_barriers_count_who_arrives(source: str) -> None:
    found: dict[str, Any] = {}
    for line in re.findall(r"\bbarrier_init\((.*)\);", (build.CSRC / source).read_text()):
        bar, arrivals = re.fullmatch(r"(.*), (.*)", line).groups()  # type: ignore[union-attr]
        assert bar not in found
        found[bar] = arrivals
    assert {*found} == {*ARRIVALS.get(source, {})}
    for bar, arrivals in found.items():
        threads, warps = ARRIVALS[source][bar]
        for every_lane in range(2):
            scope = {**SIZES, "kLanes": lanes(every_lane)}
            assert c_value(arrivals, scope) == threads + warps * lanes(every_lane), bar


@pytest.mark.parametrize("source", SOURCES)
def test_warps_arrive_as_the_define_says(source: str) -> None:
    """No other way than ``if (kEveryLane || lane == 0)``; ``barrier_expect`` is one thread's."""
    others: dict[tuple[str, str], int] = {}
    text = re.sub(r"^__device__.*", "", (build.CSRC / source).read_text(), flags=re.M)
    text = re.sub(r" \{\n\s*(?=barrier_arrive\(ring|arrive_at)", " ", text)  # long lines
    for line in map(str.strip, text.splitlines()):
        if not re.search(r"\b(barrier_)?arrive(_at)?\(", line):
            continue
        if not re.search(GUARD, line):
            others[source, line] = others.get((source, line), 0) + 1
    assert others == {key: n for key, n in OTHERS.items() if key[0] == source}


def test_tokens_arrive_as_often_in_whatever_order_they_are() -> None:
    """Every lane of two warps with its own copies, or one lane for all of them."""
    body = c_text(PRODUCE)
    gathered = body[body.index("void produce_tokens(") :]
    assert len(re.findall(r"async_copy_arrive\(ring\.tokens_full\(", gathered)) == 1
    up = (build.CSRC / "prefill_up.cu").read_text()
    assert up.count("produce_tokens(") == 1 and "queue, ring, warp - 2," in up
    within = "void produce_stages("
    scope = SIZES | {"full": lambda: 0, "bytes": 0}
    expected = c_find(PRODUCE, (within,), "barrier_expect_all(")
    assert c_value(expected, scope)[2] == SIZES["kTokenArrivals"] == 2 * 32
    alone = body[body.index("      if (mine) {", body.index(within)) :]
    alone = alone[: alone.index("\n      }\n")]
    assert alone.count("barrier_expect_all(full()") == body.count("barrier_expect_all(full()") == 1
    assert alone.count("barrier_expect(full()") == 1
    assert "const bool mine = chosen();" in body


def test_items_are_read_by_as_many_warps_as_the_barriers_count() -> None:
    """Consumers and, of gate and up, three others; of down, who fills the ring.

    Who fills the ring of gate and up with rows of the list reads for those who write them.
    """
    up, down = ((build.CSRC / f"prefill_{name}.cu").read_text() for name in ("up", "down"))
    assert "kReaders = kConsumers / 32 + 3;" in (build.CSRC / RING).read_text()
    assert "make_ring(shared, p.ring, 0);" in up
    assert "make_ring(shared, p.ring, Tables::bytes(), kConsumers / 32 + 1);" in down
    produce = (build.CSRC / PRODUCE).read_text()
    assert produce.count("reader.next(queue, ring, Rows::kReads)") == 1, "of produce_stages"
    assert produce.count("reader.next(queue, ring)") == 2, "of the others"
    assert up.count("reader.next(") == down.count("reader.next(") == 0
    of_rows = ((PRODUCE, "NoRows", 1), ("prefill_up.cu", "BlockRows", 3), (TABLES, "PanelRows", 1))
    for source, rows, reads in of_rows:
        assert int(c_find(source, (f"struct {rows}",), "kReads")) == reads
    # With NoRows two more warps copy tokens; with BlockRows they read no items.
    body = up[up.index("if (warp == 1)") : up.index("take_registers")]
    assert re.findall(r"(\w+Rows)\{", body) == ["BlockRows", "NoRows"]
    assert "write_beside(p, warp - 2)" in body


def test_the_first_turn_is_passed_on_by_as_many_as_a_warp() -> None:
    text = c_find(JOBS, ("void set_up() const", "i < 4;"), "barrier_arrive(")
    for every_lane in range(2):
        scope = {"kLanes": lanes(every_lane), "i": 2, "turn": lambda wg, warp: (wg, warp)}
        assert c_value(text, scope) == ((0, 2), lanes(every_lane))


def test_all_lanes_of_a_consumer_arrive_at_both_ctas() -> None:
    """One lane for each CTA otherwise."""
    text = c_text(RING)
    body = text[text.index("void release_stage(") :]
    one, many = (body.index(part) for part in ("constexpr (!kEveryLane)", "++to) barrier_arrive"))
    assert body.index("__syncwarp();") < one < body.index("if (lane < kCluster)") < many


# ---- how it is turned on -------------------------------------------------------------------------
def test_the_variable_is_a_define_and_in_the_cache_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "compiler", lambda: "none")
    kernel = Kernel("prefill_up.cu", "w4a8_prefill_up", (("W4_K", 256),))
    found = {}
    for value in ("", "0", "1"):
        monkeypatch.setenv(env.EVERY_LANE.name, value)
        found[value] = build._options(kernel), build.cubin_path(kernel)
    assert found[""] == found["0"] and found["0"][1] != found["1"][1]
    assert found["0"][0] == ["-std=c++17", "-DW4_K=256"]
    assert found["1"][0] == ["-std=c++17", "-DW4_K=256", "-DW4_EVERY_LANE=1"]


def script() -> ModuleType:
    path = ROOT / "benchmarks" / "sanitize_hopper.py"
    spec = importlib.util.spec_from_file_location("sanitize_hopper", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_racecheck_gets_such_kernels_and_the_result_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A compute-sanitizer that finds nothing, and tests that are not run."""
    built = []  # tool and variable of every run of the tests

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if "pytest" in command:
            tool = command[2] if command[0] == "compute-sanitizer" else ""
            built.append((tool, options["env"][env.EVERY_LANE.name]))
        hazards = 0 if "pytest" in command else 1  # the control's
        text = f"RACECHECK SUMMARY: {hazards} hazards\nERROR SUMMARY: 0 errors\n1 passed in 1 s\n"
        return subprocess.CompletedProcess(command, 0, text, "")

    module, out = script(), tmp_path / "found.json"
    monkeypatch.setattr(module.subprocess, "run", run)
    monkeypatch.setattr(module.shutil, "which", lambda program: program)
    monkeypatch.setattr(module, "environment", lambda commit: {})
    monkeypatch.setattr("sys.argv", ["sanitize_hopper.py", "--json", str(out)])
    assert module.main() == 0
    assert built == [("", "1"), ("", "0"), ("racecheck", "1"), ("memcheck", "0")]
    race, memory = json.loads(out.read_text())["runs"]
    assert race["every_lane"] is True and memory["every_lane"] is False
    assert race["command"].startswith("SGLANG_W4AFP8_EVERY_LANE=1 compute-sanitizer")
