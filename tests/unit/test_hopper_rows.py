"""The Hopper kernels for a dispatcher's rows, without a GPU: plans, arguments, index arithmetic.

The emulations follow ``csrc/masked.cu`` and ``csrc/row_scales.cuh`` line by line.
"""

from __future__ import annotations

import ctypes
from itertools import product

import pytest
import torch
from kernel_source import c_offsets

from sglang_w4afp8.kernels.hopper import (
    backend,
    launch,
    launch_prefill,
    launch_rows,
    plan,
    plan_rows,
)
from sglang_w4afp8.kernels.hopper.plan import Layer
from sglang_w4afp8.kernels.registry import select
from sglang_w4afp8.layer import Device, MoEProblem
from sglang_w4afp8.sharding import AxisShard
from sglang_w4afp8.spec import ActivationScheme

EP8 = Layer(32, 7168, 2048, 128, 128, 8, False, False)
LAYERS = [
    EP8,
    Layer(16, 7168, 2048, 64, 64, 8, True, True),
    Layer(8, 2688, 1536, 32, 64, 8, False, True),  # stages of 192 columns
    Layer(32, 4224, 2048, 128, 128, 8, True, False),  # 33 · 128
    Layer(8, 128, 256, 32, 128, 4, True, True),  # of a model for tests
    Layer(8, 64, 512, 64, 64, 4, True, False),
    Layer(plan.MAX_EXPERTS, 7168, 2048, 128, 128, 8, False, True),
]
MOST_SLOTS = 1024 * 512 // 512  # DeepEP: 1024 tokens a rank, as many ranks as experts / local ones


def plans(layer: Layer) -> list[plan.Plan]:
    found = [plan_rows.plan_tokens(layer, tokens, 132) for tokens in (1, 8, 300, 4096, 65_536)]
    for slots, expected, scaled in product((1, 7, 128, 1024), (1, 5, 20, 4000), (True, False)):
        found.append(plan_rows.plan_slots(layer, slots, expected, 132, scaled))
    return found


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_launches_fit_the_hardware(layer: Layer) -> None:
    ahead = set(plan_rows.row_kernels(layer, 132))
    for chosen in plans(layer):
        up, down = chosen.launches[1:3]
        assert {launch.kernel for launch in chosen.launches} <= ahead
        assert up.tokens == down.tokens and "W4_ROW_SCALES" not in dict(down.kernel.defines)
        assert up.grid[0] * 2 + chosen.tiles <= plan.COUNTERS
        for one in (up, down):
            assert one.shared_bytes == one.ring * (stage_bytes(one.kernel) + plan.BARRIER_BYTES)
            per_sm = one.grid[0] // 132
            assert one.ring >= 3 and per_sm * (one.shared_bytes + 6_144) <= plan.SM_SHARED_BYTES
            assert one.shared_bytes + 5_248 <= plan.CTA_SHARED_BYTES


def stage_bytes(kernel: plan.Kernel) -> int:
    """``kStageBytes`` of gemm.cu."""
    d = dict(kernel.defines)
    k, rows, tokens = d["W4_K"], 2 * d["W4_TILES"] * 64, d["W4_TOKENS"]
    size = rows * k // 2 + rows * k // d["W4_GROUP"] * 2 + tokens * k
    if d.get("W4_ROW_SCALES"):
        spans = k // (128 if k % 128 == 0 else 64)
        size += (spans * tokens * 4 + 127) // 128 * 128
    return size


def test_plans_of_slots() -> None:
    wide = plan_rows.plan_slots(EP8, 1024, 900, 132, True)
    assert [one.kernel.source for one in wide.launches] == ["masked.cu", "gemm.cu", "gemm.cu"]
    assert wide.launches[0].grid == (32, 1) and wide.tiles == 32 * 16
    narrow = plan_rows.plan_slots(EP8, 1024, 3, 132, False)
    assert narrow.launches[1].tokens == 8 and narrow.launches[0].grid == (32, 65)
    # Counters for every expert's being full come before narrow tiles.
    many = Layer(256, 7168, 2048, 128, 128, 8, False, False)
    assert plan_rows.plan_slots(many, 1024, 1, 132, True).launches[1].tokens == 32
    most = plan_rows.plan_slots(LAYERS[-1], 1024, 1, 132, True)
    assert most.launches[1].tokens == 64 and most.tiles == 512 * 16


@pytest.mark.parametrize("width", plan.TILE_TOKENS)
def test_tiles_hold_every_row_once(width: int) -> None:
    slots = 70
    for masked_m in ([0, 0, 0], [70, 1, 8], [0, 17, 0], [64, 0, 71], [-3, 9, 70]):
        counts = [min(max(count, 0), slots) for count in masked_m]
        tiles = [-(-count // width) for count in counts]
        tile_expert, columns, header = {}, {}, 0
        for expert, count in enumerate(counts):  # block (expert, 0)
            first = sum(tiles[:expert])
            for i in range(tiles[expert]):
                assert tile_expert.setdefault(first + i, expert) == expert
            for i in range(tiles[expert] * width):
                assert first * width + i not in columns
                columns[first * width + i] = expert * slots + i if i < count else -1
            if expert == len(counts) - 1:
                header = first + tiles[expert]
        assert header == sum(tiles) == len(tile_expert) and len(columns) == header * width
        rows = sorted(row for row in columns.values() if row >= 0)
        assert rows == [e * slots + i for e, count in enumerate(counts) for i in range(count)]
        for at, row in columns.items():
            assert row < 0 or row // slots == tile_expert[at // width]


@pytest.mark.parametrize("by_column", [True, False], ids=["columns outermost", "rows outermost"])
@pytest.mark.parametrize(
    ("k", "stage_k", "group"),
    [
        (512, 256, 128),
        (512, 256, 32),
        (384, 192, 64),
        (384, 192, 32),
        (640, 128, 128),
        (128, 128, 32),
    ],
)
@pytest.mark.parametrize("tokens", plan.TILE_TOKENS)
def test_every_sum_meets_its_tokens_scale(
    tokens: int, k: int, stage_k: int, group: int, by_column: bool
) -> None:
    """Producer lanes put the scales of a stage into shared memory, consumer lanes take them."""
    experts, slots, top_k = 3, 50, 1
    shape = (experts, k // 128, slots) if by_column else (experts, slots, k // 128)
    data = torch.arange(experts * slots * (k // 128), dtype=torch.float32).reshape(shape)
    scale = data.transpose(1, 2) if by_column else data
    first = ctypes.c_float * data.numel()
    memory = first.from_address(scale.data_ptr())
    address, rows, *strides = launch_rows._strided(scale)
    assert address == scale.data_ptr() and rows == slots
    generator = torch.Generator().manual_seed(tokens)
    pairs = torch.randperm(experts * slots, generator=generator)[:tokens].tolist()
    pairs[tokens // 2] = -1
    span = 64 if stage_k % 128 else 128
    spans = stage_k // span

    found = []  # find(): one list a lane
    for lane in range(32):
        row = []
        for j in range(-(-tokens // 32)):
            pair = pairs[(j * 32 + lane) % tokens]
            r = int(pair / top_k)
            row.append(-1 if pair < 0 else r // rows * strides[0] + r % rows * strides[1])
        found.append(row)
    for step in range(k // stage_k):
        shared: dict[int, float] = {}
        for lane in range(32):  # copy()
            for i in range((spans * tokens + 31) // 32):
                in_span, start = (i * 32 + lane) // tokens, found[lane][i % len(found[lane])]
                if in_span < spans and start >= 0:
                    column = (step * stage_k + in_span * span) // 128
                    at = (i * 32 + lane) * 4
                    assert at not in shared
                    shared[at] = memory[start + column * strides[2]]
        for lane, index in product(range(32), range(stage_k // group)):  # scale_tokens()
            t = (lane & 3) * 8 + index * group // span * tokens * 4
            for i in range(0, tokens // 2, 4):
                for c in range(2):
                    pair = pairs[i // 4 * 8 + (lane & 3) * 2 + c]
                    if pair < 0:
                        assert t + i * 8 + c * 4 not in shared
                        continue
                    column = (step * stage_k + index * group) // 128
                    wanted = float(scale[pair // slots, pair % slots, column])
                    assert shared[t + i * 8 + c * 4] == wanted


def test_normal_rows_are_one_expert_to_the_scales() -> None:
    scale = torch.zeros(40, 4)
    assert launch_rows._strided(scale)[1:] == (40, 160, 4, 1)
    transposed = torch.zeros(4, 40).T
    assert launch_rows._strided(transposed)[1:] == (40, 40, 1, 40)  # the first is times 0


@pytest.mark.parametrize(
    ("source", "struct", "ours"),
    [
        ("gemm.cu", "GemmParams", launch_rows._RowGemmParams),
        ("masked.cu", "MaskedParams", launch_rows._MaskedParams),
        ("route.cu", "RouteParams", launch.RouteParams),
        ("combine.cu", "CombineParams", launch.CombineParams),
        ("prefill_produce.cuh", "Weights", launch_prefill._Weights),
        ("prefill_own_jobs.cuh", "Weights", launch_prefill._Weights),
        ("prefill_sort.cuh", "Lists", launch_prefill._Lists),
        ("prefill_sort.cuh", "Own", launch_prefill._Own),
        ("prefill_sort.cuh", "Sorted", launch_prefill._Sorted),
        ("prefill_listed.cuh", "Listed", launch_prefill._Listed),
        ("prefill_sort.cuh", "PrefillRouteParams", launch_prefill._RouteParams),
        ("prefill_up.cu", "PrefillUpParams", launch_prefill._UpParams),
        ("prefill_tables.cuh", "PrefillDownParams", launch_prefill._DownParams),
        ("prefill_own_jobs.cuh", "PrefillOwnParams", launch_prefill._OwnDownParams),
    ],
)
def test_arguments_lie_where_the_kernel_looks(source: str, struct: str, ours: type) -> None:
    fields, size = c_offsets(source, struct)
    names = [
        name for base in reversed(ours.__mro__) for name, *_ in base.__dict__.get("_fields_", ())
    ]
    assert [(name, getattr(ours, name).offset) for name in names] == fields
    assert ctypes.sizeof(ours) == size


def test_hopper_takes_what_a_dispatcher_sends() -> None:
    columns = AxisShard.even(2048, 128, 0, 1)
    h100 = Device("cuda", (9, 0), "H100")
    problem = MoEProblem(32, 7168, columns, 128, 8, ActivationScheme.STATIC, h100, dispatched=True)
    assert select(problem, "auto").name == "hopper"


def test_slots_are_one_node_for_torch_compile() -> None:
    """Traced without a GPU, through the op's fake."""

    def step(rows: torch.Tensor, scale: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        weights = torch.zeros(1, dtype=torch.int8)
        return 2 * backend.hopper_moe_slots(
            rows, scale, counts, weights, weights, weights, weights, None, None, weights, 4
        )

    class Step(torch.nn.Module):
        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            return step(*inputs)

    rows = torch.zeros(2, 6, 256).to(torch.float8_e4m3fn)
    counts = torch.zeros(2, dtype=torch.int32)
    program = torch.export.export(Step(), (rows, torch.zeros(2, 6, 2), counts), strict=True)
    (node,) = (n for n in program.graph.nodes if "hopper_moe_slots" in str(n.target))
    made = node.meta["val"]
    assert made.shape == rows.shape and made.dtype == torch.bfloat16
