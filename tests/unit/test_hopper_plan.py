"""The launch arithmetic of the Hopper kernels: every stage once, every limit kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from sglang_w4afp8.kernels.hopper import plan, plan_prefill, plan_rows
from sglang_w4afp8.kernels.hopper.plan import Layer

R1 = [
    Layer(256, 7168, 256, 128, 128, 8, False, False),
    Layer(256, 7168, 128, 128, 128, 8, False, True),
    Layer(256, 7168, 64, 128, 64, 8, True, False),
    Layer(32, 7168, 2048, 128, 128, 8, False, False),
    Layer(128, 4096, 192, 128, 64, 8, False, False),
    Layer(128, 2048, 384, 128, 128, 8, False, True),
]
TESTS = [  # hidden sizes of models for tests, 32 and 96 filled up
    Layer(8, hidden, inner, group, min(inner, 128), 2, False, True)
    for hidden, group in ((64, 32), (64, 64), (128, 32), (128, 128))
    for inner in (64, 128, 256, 512)
]


@pytest.mark.parametrize("layer", R1 + TESTS, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 4, 8, 9, 16, 64, 256, 1000, 16384])
def test_launches_fit_the_hardware(layer: Layer, tokens: int) -> None:
    for path in (None, "small", "medium", "large"):
        chosen = plan.plan(layer, tokens, 132, path)
        assert len(chosen.launches) <= 4
        for launch in chosen.launches:
            # Static tables of the kernels take up to 6 KB more, 23 KB in small_down.cu.
            static = {"small_down.cu": 23_552, "own_down.cu": 512}.get(launch.kernel.source, 6_144)
            assert launch.shared_bytes + static <= plan.CTA_SHARED_BYTES
            assert launch.ring == 0 or launch.ring >= 3
            assert launch.grid[1] <= 65_535
        if chosen.path == "large":
            up = chosen.launches[1]
            per_sm = up.grid[0] // 132
            assert per_sm * (up.shared_bytes + 6144) <= plan.SM_SHARED_BYTES


@pytest.mark.parametrize("total", [1, 5, 131, 132, 133, 896, 6384, 17920])
@pytest.mark.parametrize("per_unit", [1, 3, 28])
def test_owners_are_those_whose_runs_meet_the_unit(total: int, per_unit: int) -> None:
    total *= per_unit
    ctas = min(264, total)
    runs = [
        (plan.run_start(total, cta, ctas), plan.run_start(total, cta + 1, ctas))
        for cta in range(ctas)
    ]
    assert runs[0][0] == 0 and runs[-1][1] == total
    assert all(begin < end for begin, end in runs), "a CTA without work would be waited for"
    assert max(e - b for b, e in runs) - min(e - b for b, e in runs) <= 1
    for unit in range(total // per_unit):
        begin, end = unit * per_unit, (unit + 1) * per_unit
        meet = [cta for cta, run in enumerate(runs) if run[0] < end and run[1] > begin]
        assert (meet[0], meet[-1]) == plan.owners(total, ctas, unit, per_unit)
        # The CTA that starts a unit finishes it; every other one has it at the beginning of its
        # run, so that one place for a published sum is enough.
        for cta in meet:
            assert (runs[cta][0] <= begin) == (cta == meet[0])


@pytest.mark.parametrize(
    "layer", [*R1, Layer(plan.MAX_EXPERTS, 2048, 256, 128, 128, 4, False, True)], ids=str
)
def test_counters_are_enough(layer: Layer) -> None:
    most = plan.most_tokens(layer, 132)
    assert most >= 65_536
    sizes = {1 << n for n in range(18)} | set(range(1, most, 997)) | {most}
    for tokens in (size for size in sizes if size <= most):
        for path in (None, "small", "medium", "large"):
            chosen = plan.plan(layer, tokens, 132, path)
            up = chosen.launches[0 if chosen.path == "small" else 1]
            assert up.grid[0] * 2 + chosen.tiles <= plan.COUNTERS, tokens


def test_every_kernel_of_a_plan_is_built_ahead() -> None:
    for layer in R1 + TESTS:
        ahead = set(plan.kernels(layer, 132))
        for tokens in range(1, 2000, 7):
            assert {launch.kernel for launch in plan.plan(layer, tokens, 132).launches} <= ahead


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ((7168, 256, 256, 128, 128), None),
        ((7168, 64, 256, 128, 64), None),
        ((7168, 96, 256, 128, 32), None),
        ((2880, 384, 64, 32, 128), None),
        ((7168, 48, 256, 128, 16), "intermediate size of this rank 48"),
        ((7184, 64, 256, 16, 64), "hidden size 7184"),
        ((7168, 256, 600, 128, 128), "600 experts"),
        ((128, 256, 8, 128, 128), None),
        ((96, 256, 8, 32, 128), None),
        ((64, 64, 8, 64, 64), None),
        ((32, 32, 8, 32, 32), None),
        ((48, 256, 8, 16, 128), "hidden size 48"),
        ((192, 256, 8, 64, 128), None),
        ((7168, 256, 64, 16, 128), "group of 16"),
    ],
)
def test_reasons(sizes: tuple[int, int, int, int, int], reason: str | None) -> None:
    found = plan.why_not(*sizes)
    assert (found is None) if reason is None else (found is not None and reason in found)


@pytest.mark.parametrize("layer", TESTS, ids=str)
def test_gate_and_up_of_a_small_hidden_size_are_stages_of_two_row_tiles(layer: Layer) -> None:
    """The kernels finish one row tile for each warpgroup and stage of w13."""
    assert (layer.up.stage_k, layer.up.tiles, layer.up.stages_per_unit) == (layer.hidden, 1, 1)
    assert layer.up.blocks == -(-2 * layer.inner // 128)
    for path in ("medium", "large"):
        up = plan.plan(layer, 40, 132, path).launches[1]
        assert dict(up.kernel.defines) | {"W4_UP": 1, "W4_TILES": 1} == dict(up.kernel.defines)
    # 64 or 128 outputs are one row tile or two, which one block of w2 holds.
    assert layer.down.blocks == 1 and layer.down.tiles in (1, 2)
    for tokens, path in ((8, "small"), (40, "medium")):
        chosen = plan.plan(layer, tokens, 132, path)
        assert (chosen.path == path) == (layer.inner <= 256), "K of w2 in one stage"
        if chosen.path == path:
            assert chosen.launches[-1].grid == (layer.hidden // 64, 1)


@pytest.mark.parametrize(
    ("make", "calls"),
    [
        (plan.plan, [(1, 132), (16, 132), (16, 78), (16, 132, "large")]),
        (plan_prefill.plan_prefill, [(1024, 132), (4096, 132), (4096, 78)]),
        (plan_rows.plan_tokens, [(16, 132), (64, 132)]),
        (plan_rows.plan_slots, [(64, 16, 132, True), (64, 16, 132, False), (64, 32, 132, True)]),
    ],
)
def test_a_plan_is_made_once_for_all_layers_of_a_forward_pass(
    make: Callable[..., Any], calls: list[tuple[Any, ...]]
) -> None:
    for layer in R1[:2]:
        first = [make(layer, *call) for call in calls]
        for call, made in zip(calls, first, strict=True):
            assert make(replace(layer), *call) is made, "a layer of the same sizes"
            assert make.__wrapped__(layer, *call) == made  # type: ignore[attr-defined]
    assert make.cache_info().misses == 2 * len(calls)  # type: ignore[attr-defined]
