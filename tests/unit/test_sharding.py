"""The sharding rule: exact for every size, group and degree, and loud where it cannot be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_w4afp8.errors import ShardError
from sglang_w4afp8.packing import pack_int4
from sglang_w4afp8.reference import dequantize_fp8_block, dequantize_int4
from sglang_w4afp8.sharding import (
    AxisShard,
    ExpertShard,
    LinearShard,
    common_local_block,
    nearest_divisors,
)

GROUPS = st.sampled_from([32, 64, 128])


@st.composite
def cut_axes(draw: st.DrawFn) -> tuple[int, int, int]:
    """(size of a grouped axis, group, tp size) with tp dividing the size into even parts."""
    group = draw(GROUPS)
    size = group * draw(st.integers(1, 24))
    halves = size // 2
    tp_size = draw(st.sampled_from([d for d in range(1, min(halves, 64) + 1) if halves % d == 0]))
    return size, group, tp_size


@given(cut_axes())
def test_every_element_keeps_its_scale(case: tuple[int, int, int]) -> None:
    size, group, tp_size = case
    covered = []
    for rank in range(tp_size):
        shard = AxisShard.even(size, group, rank, tp_size)
        assert len(shard.scale_columns) * shard.local_group == shard.size
        for j in range(shard.size):
            assert shard.scale_columns[j // shard.local_group] == (shard.start + j) // group
        covered += range(shard.start, shard.stop)
    assert covered == list(range(size))


@given(cut_axes())
def test_local_group_is_the_coarsest_that_works(case: tuple[int, int, int]) -> None:
    size, group, tp_size = case
    shard = AxisShard.even(size, group, tp_size - 1, tp_size)
    assert group % shard.local_group == 0
    assert shard.size % shard.local_group == 0
    assert shard.start % shard.local_group == 0
    finer = [g for g in range(shard.local_group + 1, group + 1) if group % g == 0]
    assert not [g for g in finer if shard.size % g == 0 and shard.start % g == 0]


@given(cut_axes())
def test_aligned_window_holds_the_shard_in_whole_groups(case: tuple[int, int, int]) -> None:
    size, group, tp_size = case
    for rank in range(tp_size):
        shard = AxisShard.even(size, group, rank, tp_size)
        window = shard.aligned
        assert window.start % group == 0 and window.size % group == 0
        assert window.start <= shard.start and shard.stop <= window.stop
        assert window.size - shard.size < 2 * group
        assert window.local_group == group
        assert window.scale_columns == tuple(dict.fromkeys(shard.scale_columns))


@settings(max_examples=30, deadline=None)
@given(cut_axes(), st.integers(0, 2**31))
def test_shards_put_together_are_the_whole_bit_for_bit(
    case: tuple[int, int, int], seed: int
) -> None:
    size, group, tp_size = case
    hidden = 2 * group
    generator = torch.Generator().manual_seed(seed)
    gate = torch.randint(-8, 8, (size, hidden), generator=generator, dtype=torch.int8)
    gate_scale = torch.rand(size, hidden // group, generator=generator).bfloat16()
    down = torch.randint(-8, 8, (hidden, size), generator=generator, dtype=torch.int8)
    down_scale = torch.rand(hidden, size // group, generator=generator).bfloat16()
    packed_gate, packed_down = pack_int4(gate), pack_int4(down)
    gates, downs = [], []
    for rank in range(tp_size):
        shard = ExpertShard.plan(hidden, size, group, rank, tp_size)
        rows = shard.w13_rows
        gates.append(dequantize_int4(packed_gate[rows], gate_scale[rows], group, torch.float32))
        scales = down_scale[:, list(shard.w2_scale_columns)]
        codes = packed_down[:, shard.w2_bytes]
        downs.append(dequantize_int4(codes, scales, shard.w2_group_size, torch.float32))
    whole_gate = dequantize_int4(packed_gate, gate_scale, group, torch.float32)
    whole_down = dequantize_int4(packed_down, down_scale, group, torch.float32)
    assert torch.equal(torch.cat(gates), whole_gate)
    assert torch.equal(torch.cat(downs, dim=1), whole_down)


@settings(max_examples=30, deadline=None)
@given(
    blocks=st.integers(1, 9),
    ragged=st.sampled_from([0, 32, 64, 96]),
    tp_size=st.sampled_from([1, 2, 4, 8, 16, 32]),
    seed=st.integers(0, 2**31),
)
def test_fp8_blocks_put_together_are_the_whole(
    blocks: int, ragged: int, tp_size: int, seed: int
) -> None:
    rows = (128 * blocks + ragged) * tp_size if ragged else 128 * blocks
    if rows % tp_size:
        return
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 64, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-rows // 128), 1, generator=generator)
    whole = dequantize_fp8_block(weight, scale, (128, 128), torch.float32)
    parts = []
    for rank in range(tp_size):
        shard = AxisShard.even(rows, 128, rank, tp_size)
        local = scale[list(shard.scale_columns)]
        part = weight[shard.start : shard.stop]
        parts.append(dequantize_fp8_block(part, local, (shard.local_group, 128), torch.float32))
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize(
    ("full", "group", "tp", "rank", "local_group", "columns"),
    [
        (2048, 128, 32, 0, 64, (0,)),  # DeepSeek-R1 tp 32
        (2048, 128, 32, 1, 64, (0,)),
        (2048, 128, 32, 31, 64, (15,)),
        (1536, 128, 8, 0, 64, (0, 0, 1)),  # Qwen3-235B tp 8
        (1536, 128, 8, 1, 64, (1, 2, 2)),
        (2560, 128, 8, 1, 64, (2, 3, 3, 4, 4)),  # Qwen3-Coder-480B tp 8
        (1408, 128, 8, 0, 16, (0,) * 8 + (1,) * 3),  # GLM-4.5-Air tp 8
        (18432, 128, 32, 1, 64, (4, 5, 5, 6, 6, 7, 7, 8, 8)),  # R1's dense MLP
    ],
)
def test_known_cases(
    full: int, group: int, tp: int, rank: int, local_group: int, columns: tuple[int, ...]
) -> None:
    shard = AxisShard.even(full, group, rank, tp)
    assert shard.local_group == local_group
    assert shard.scale_columns == columns


def test_regrouping_and_common_block() -> None:
    shard = AxisShard.even(18432, 128, 1, 32)
    assert shard.regrouped(32) == tuple(k // 128 for k in range(576, 1152, 32))
    with pytest.raises(ShardError):
        shard.regrouped(128)
    assert common_local_block([shard, AxisShard.even(96, 128, 0, 1)]) == 32


@pytest.mark.parametrize(
    ("rows", "columns", "tp", "divides", "scale_shape"),
    [
        ((18432, 18432), 7168, 32, False, (18, 56)),  # R1's gate and up: 2 × 576 rows in 64s
        ((18432, 18432), 7168, 16, True, (18, 56)),  # 2 × 1152 rows in 128s
        ((1600,), 256, 2, False, (25, 2)),  # 800 = 6.25 blocks: 32 rows each
        ((2112,), 256, 1, True, (17, 2)),  # uncut, ragged end
        ((1536, 576), 256, 1, False, (33, 2)),  # uncut, but the second would begin inside a block
    ],
)
def test_linear_shards(
    rows: tuple[int, ...],
    columns: int,
    tp: int,
    divides: bool,
    scale_shape: tuple[int, int],
) -> None:
    for rank in (0, tp - 1):
        parts = tuple(AxisShard.even(n, 128, rank, tp) for n in rows)
        shard = LinearShard(parts, AxisShard.even(columns, 128, 0, 1))
        assert shard.divides is divides
        assert shard.height == sum(rows) // tp
        assert shard.scale_shape == scale_shape


def test_copied_parts() -> None:
    """4 key heads of 128 over 8 ranks: neighbours hold the same one."""
    starts = [AxisShard.copied(128, 128, rank, 8, 2).start for rank in range(8)]
    assert starts == [0, 0, 128, 128, 256, 256, 384, 384]
    assert AxisShard.copied(128, 128, 7, 8, 2).full_size == 512
    assert AxisShard.copied(192, 128, 3, 8, 1) == AxisShard.even(1536, 128, 3, 8)


@pytest.mark.parametrize(
    ("hidden", "intermediate", "group", "tp", "numbers"),
    [
        (7168, 2048, 128, 24, ["2048", "24", "85.33", "--tp 32", "--tp 16"]),
        (7168, 2048, 128, 2048, ["2048", "1 columns", "--tp 1024"]),
        (7104, 2048, 128, 8, ["7104", "128", "--group-size 64"]),
        (7168, 2000, 128, 8, ["2000", "128", "modules_to_not_convert"]),
    ],
)
def test_what_cannot_be_cut_is_said_with_numbers(
    hidden: int, intermediate: int, group: int, tp: int, numbers: list[str]
) -> None:
    with pytest.raises(ShardError) as caught:
        ExpertShard.plan(hidden, intermediate, group, 0, tp, what="model.layers.3.mlp.experts")
    for number in numbers:
        assert number in str(caught.value)


def test_bad_ranges() -> None:
    with pytest.raises(ShardError):
        AxisShard.even(128, 128, 8, 8)
    with pytest.raises(ShardError):
        AxisShard(128, 64, 128, 128)
    with pytest.raises(ShardError):
        AxisShard(128, 0, 0, 128)


def test_nearest_divisors() -> None:
    assert nearest_divisors(2048, 24) == [32, 16]
    assert nearest_divisors(7, 3) == [7, 1] or nearest_divisors(7, 3) == [1]
    assert 12 not in nearest_divisors(1536, 12)
