"""The CUTLASS backend's padding, without the kernel: a padded layer computes the same thing."""

from __future__ import annotations

import pytest
import torch

from sglang_w4afp8.layer import MoEWeights
from sglang_w4afp8.packing import pack_int4
from sglang_w4afp8.reference import moe_reference
from sglang_w4afp8.sharding import AxisShard
from sglang_w4afp8.spec import ActivationScheme
from sglang_w4afp8.srt.cutlass import interleave_scales, pad_to_groups


@pytest.mark.parametrize(("full", "tp"), [(2048, 32), (1536, 8), (2560, 8), (1408, 8), (512, 4)])
def test_padding_changes_no_result(full: int, tp: int) -> None:
    generator = torch.Generator().manual_seed(full)
    experts, hidden = 2, 128
    for rank in sorted({0, 1, tp // 2, tp - 1}):
        columns = AxisShard.even(full, 128, rank, tp)
        rows = 2 * columns.size
        w13 = torch.randint(-8, 8, (experts, rows, hidden), generator=generator)
        w2 = torch.randint(-8, 8, (experts, hidden, columns.size), generator=generator)
        # One scale per checkpoint column, so that local groups of one column agree.
        by_column = torch.rand(experts, hidden, full // 128, generator=generator).bfloat16()
        weights = MoEWeights(
            pack_int4(w13),
            torch.rand(experts, rows, 1, generator=generator).bfloat16(),
            pack_int4(w2),
            by_column[:, :, list(columns.scale_columns)],
            128,
            columns.local_group,
        )
        padded = pad_to_groups(columns, weights)
        assert padded.w2_group_size == 128
        assert padded.w13.shape[1] // 2 == columns.aligned.size
        assert padded.w2_scale.shape[-1] * 128 == columns.aligned.size
        x = torch.randn(4, hidden, generator=generator)
        ids = torch.randint(0, experts, (4, 1), generator=generator)
        route = torch.rand(4, 1, generator=generator)
        for scheme in (ActivationScheme.NONE, ActivationScheme.DYNAMIC_PER_TOKEN):
            torch.testing.assert_close(
                moe_reference(x, padded, route, ids, scheme=scheme),
                moe_reference(x, weights, route, ids, scheme=scheme),
                rtol=1e-12,
                atol=1e-12,
            )


def test_an_aligned_shard_is_not_copied() -> None:
    columns = AxisShard.even(512, 128, 1, 4)
    w13 = torch.zeros(1, 256, 64, dtype=torch.int8)
    weights = MoEWeights(
        w13, torch.zeros(1, 256, 1), torch.zeros(1, 128, 64, dtype=torch.int8),
        torch.zeros(1, 128, 1), 128, 128,
    )  # fmt: skip
    assert pad_to_groups(columns, weights) is weights


@pytest.mark.parametrize("groups", [1, 2, 4, 56])
def test_interleaving(groups: int) -> None:
    scales = torch.randn(2, 3, groups)
    lanes = 4 if groups % 4 == 0 else 1
    out = interleave_scales(scales)
    assert out.shape == (2, groups // lanes, 3 * lanes)
    for row in range(3):
        for group in range(groups):
            assert torch.equal(out[:, group // lanes, row * lanes + group % lanes],
                               scales[:, row, group])  # fmt: skip
