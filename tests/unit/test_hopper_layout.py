"""The Hopper weight order, read back the way the kernel reads it.

The emulation below follows ``csrc/``: addresses of stages, of a thread's 16 bytes, the decoding of
a word, and the place of an A operand's registers in a 64×32 tile (PTX ISA, wgmma m64k32, 8-bit
types). It knows nothing of :mod:`sglang_w4afp8.kernels.hopper.layout` but the cut into stages.
"""

from __future__ import annotations

import pytest
import torch

from sglang_w4afp8.kernels.hopper import layout
from sglang_w4afp8.kernels.hopper.layout import StageShape, pad_to_tiles, shuffle_in_place
from sglang_w4afp8.layer import MoEWeights
from sglang_w4afp8.packing import pack_int4, unpack_int4
from sglang_w4afp8.reference import moe_reference
from sglang_w4afp8.spec import ActivationScheme

SHAPES = [
    # rows, K, group, gate and up
    (512, 512, 128, True),
    (256, 512, 64, True),
    (128, 256, 128, True),
    (192, 256, 32, True),
    (512, 256, 128, False),
    (640, 128, 128, False),
    (896, 64, 64, False),
    (320, 64, 32, False),
    (256, 192, 64, False),
    (256, 320, 64, False),
    (192, 512, 128, False),
    (128, 384, 128, True),
    (128, 384, 128, False),
    (128, 384, 64, False),
    # Hidden sizes of models for tests: K of gate and up, rows of down.
    (640, 128, 128, True),
    (512, 128, 32, True),
    (128, 64, 64, True),
    (896, 64, 32, True),
    (64, 512, 128, False),
    (64, 64, 32, False),
    (128, 128, 128, False),
    (128, 64, 64, False),
]


def _decode(word: int, minus_eight: bool) -> tuple[list[int], list[int]]:
    """``decode_int4`` of mma.cuh, then E4M3 below 2⁻⁵ as an integer times 2⁻⁹."""
    keep = 0x87878787
    registers = [word & keep, ((word << 4 | word >> 28) & 0xFFFFFFFF) & keep]
    if minus_eight:
        registers = [r + ((r >> 7) & 0x01010101) for r in registers]
    values = []
    for register in registers:
        codes = [(register >> (8 * i)) & 0xFF for i in range(4)]
        assert all(code & 0x7F <= 8 for code in codes)
        values.append([-(code & 0x7F) if code & 0x80 else code for code in codes])
    return values[0], values[1]


def _read_expert(
    data: torch.Tensor, rows: int, k: int, group: int, minus_eight: bool, gate_up: bool = False
) -> dict[tuple[int, int], list[int]]:
    """Rows of (row tile, row in tile) as the wgmmas of both warpgroups see them."""
    shape = StageShape.of(rows, k, group, gate_up)
    words = data.contiguous().view(torch.uint8).flatten().view(torch.int32).tolist()
    tile_bytes = shape.stage_k * 32
    seen: dict[tuple[int, int], list[int]] = {}
    for block in range(shape.blocks):
        row_tiles = min(2 * shape.tiles, rows // 64 - block * 2 * shape.tiles)
        for step in range(shape.stages_per_unit):
            stage = (
                block * 2 * shape.tiles * shape.stages_per_unit + step * row_tiles
            ) * tile_bytes
            for in_stage in range(row_tiles):
                tile = block * 2 * shape.tiles + in_stage
                for thread in range(128):
                    warp, lane = divmod(thread, 32)
                    g, q = divmod(lane, 4)
                    for h in range(shape.stage_k // 64):
                        at = (stage + in_stage * tile_bytes + thread * 16 + h * 2048) // 4
                        for j in range(4):
                            x, y = _decode(words[at + j] & 0xFFFFFFFF, minus_eight)
                            column = step * shape.stage_k + h * 64 + j // 2 * 32
                            column += j % 2 * 16 + q * 4
                            for row, values in ((g, x), (g + 8, y)):
                                line = seen.setdefault((tile, warp * 16 + row), [99] * k)
                                line[column : column + 4] = values
    return seen


def _checkpoint_row(tile: int, row: int, rows: int, gate_up: bool, tiles: int) -> int:
    """Which row the epilogue takes (tile, row) for."""
    warp, in_warp = divmod(row, 16)
    half, g = divmod(in_warp, 8)
    if gate_up:
        return tile * 32 + warp * 8 + g + half * (rows // 2)
    first = tile // tiles * tiles * 64
    return first + (warp * 16 + g * 2) * tiles + tile % tiles * 2 + half


@pytest.mark.parametrize("minus_eight", [False, True])
@pytest.mark.parametrize(("rows", "k", "group", "gate_up"), SHAPES)
def test_kernel_reads_every_code_and_scale(
    rows: int, k: int, group: int, gate_up: bool, minus_eight: bool
) -> None:
    generator = torch.Generator().manual_seed(rows + k)
    lowest = -8 if minus_eight else -7
    codes = torch.randint(lowest, 8, (2, rows, k), generator=generator, dtype=torch.int8)
    packed = pack_int4(codes)
    scales = torch.rand(2, rows, k // group, generator=generator).to(torch.bfloat16)
    wanted = scales.clone()
    shuffle_in_place(packed, scales, gate_up, minus_eight)

    seen = _read_expert(packed[1], rows, k, group, minus_eight, gate_up)
    assert len(seen) == rows
    shape = StageShape.of(rows, k, group, gate_up)
    found = {
        _checkpoint_row(tile, row, rows, gate_up, shape.tiles): line
        for (tile, row), line in seen.items()
    }
    assert found == dict(enumerate(codes[1].tolist()))

    flat, groups = scales[1].flatten(), shape.stage_k // group
    for block in range(shape.blocks):
        row_tiles = min(2 * shape.tiles, rows // 64 - block * 2 * shape.tiles)
        for step in range(shape.stages_per_unit):
            first = block * 2 * shape.tiles * shape.stages_per_unit + step * row_tiles
            for in_stage in range(row_tiles):
                for index in range(groups):
                    for pair in range(32):  # warp * 8 + g
                        at = ((first + in_stage) * groups + index) * 64 + pair * 2
                        tile = block * 2 * shape.tiles + in_stage
                        for half in range(2):
                            in_tile = pair // 8 * 16 + pair % 8 + half * 8
                            row = _checkpoint_row(tile, in_tile, rows, gate_up, shape.tiles)
                            assert flat[at + half] == wanted[1, row, step * groups + index]


@pytest.mark.parametrize(("rows", "k", "group", "gate_up"), SHAPES)
def test_piece_by_piece_is_the_same(
    rows: int, k: int, group: int, gate_up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the last block is a short one."""
    packed = torch.randint(-128, 128, (2, rows, k // 2), dtype=torch.int8)
    scales = torch.rand(2, rows, k // group).bfloat16()
    whole, pieces = (packed.clone(), scales.clone()), (packed.clone(), scales.clone())
    shuffle_in_place(*whole, gate_up, True)
    monkeypatch.setattr(layout, "PIECE_BYTES", 1)
    shuffle_in_place(*pieces, gate_up, True)
    assert torch.equal(whole[0], pieces[0])
    assert torch.equal(whole[1], pieces[1])


def test_every_code_value_survives() -> None:
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(64, 64 // 16)
    packed = pack_int4(codes)[None].clone()
    scales = torch.ones(1, 64, 1, dtype=torch.bfloat16)
    shuffle_in_place(packed, scales, False, True)
    seen = _read_expert(packed[0], 64, 64, 64, True)
    assert all(line == codes[0].tolist() for line in seen.values())


def test_layout_moves_nibbles_within_an_expert_only() -> None:
    codes = torch.zeros(3, 128, 128, dtype=torch.int8)
    codes[1, 5, 7] = 3
    packed = pack_int4(codes)
    scales = torch.ones(3, 128, 1, dtype=torch.bfloat16)
    shuffle_in_place(packed, scales, False, False)
    assert [int((unpack_int4(packed[e]) != 0).sum()) for e in range(3)] == [0, 1, 0]


def test_stage_shapes() -> None:
    # (rows, K, group) → columns of a stage, row tiles per warpgroup, stages along K
    wanted = {
        (512, 7168, 128): (256, 1, 28),
        (256, 7168, 128): (256, 1, 28),
        (128, 7168, 32): (256, 1, 28),
        (7168, 256, 128): (256, 1, 1),
        (7168, 128, 128): (128, 2, 1),
        (7168, 64, 64): (64, 4, 1),
        (7168, 192, 64): (192, 1, 1),
        (7168, 384, 64): (192, 1, 2),
        (7168, 384, 128): (128, 1, 3),
        (7168, 2048, 128): (256, 1, 8),
        (640, 64, 32): (64, 2, 1),
        (704, 64, 64): (64, 1, 1),
    }
    for (rows, k, group), cut in wanted.items():
        shape = StageShape.of(rows, k, group, False)
        assert (shape.stage_k, shape.tiles, shape.stages_per_unit) == cut
        assert shape.stage_k * shape.tiles <= 256
        assert shape.stage_k % group == 0
        # Gate and up have stages of as many columns, with one row tile for each warpgroup.
        shape = StageShape.of(rows, k, group, True)
        assert (shape.stage_k, shape.tiles, shape.stages_per_unit) == (cut[0], 1, cut[2])


@pytest.mark.parametrize(
    ("rows", "k", "group", "reason"),
    [
        (96, 64, 32, "multiples of 64"),
        (64, 96, 32, "multiples of 64"),
        (64, 192, 128, "groups of 128"),
    ],
)
def test_sizes_off_the_grid_are_refused(rows: int, k: int, group: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        StageShape.of(rows, k, group, False)


def random_layer(experts: int, hidden: int, inner: int, group: int, w2_group: int) -> MoEWeights:
    g = torch.Generator().manual_seed(hidden + inner)

    def codes(rows: int, k: int) -> torch.Tensor:
        return pack_int4(torch.randint(-8, 8, (experts, rows, k), generator=g))

    return MoEWeights(
        codes(2 * inner, hidden),
        torch.rand(experts, 2 * inner, hidden // group, generator=g).bfloat16(),
        codes(hidden, inner),
        torch.rand(experts, hidden, inner // w2_group, generator=g).bfloat16(),
        group,
        w2_group,
    )


@pytest.mark.parametrize(
    ("hidden", "inner", "group"), [(128, 96, 128), (128, 32, 64), (160, 64, 32), (224, 352, 32)]
)
def test_filling_up_changes_no_result(hidden: int, inner: int, group: int) -> None:
    weights = random_layer(3, hidden, inner, group, min(32, inner))
    filled = pad_to_tiles(weights)
    wide, inner_filled = filled.w2.shape[1], filled.w2.shape[2] * 2
    assert wide % 64 == inner_filled % 64 == 0
    assert wide - hidden < 64 and inner_filled - inner < 64
    assert filled.w13.shape == (3, 2 * inner_filled, wide // 2)
    x = torch.randn(5, hidden, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0, 2], [1, 0], [2, 1], [-1, 1], [0, 1]])
    route = torch.rand(5, 2, generator=torch.Generator().manual_seed(1))
    for scheme in (ActivationScheme.NONE, ActivationScheme.DYNAMIC_PER_TOKEN):
        wanted = moe_reference(x, weights, route, ids, scheme=scheme)
        wide_x = torch.nn.functional.pad(x, (0, wide - hidden))
        found = moe_reference(wide_x, filled, route, ids, scheme=scheme)
        assert found[:, hidden:].abs().max() == 0 if wide > hidden else True
        torch.testing.assert_close(found[:, :hidden], wanted, rtol=1e-12, atol=1e-12)


def test_nothing_is_copied_that_fits() -> None:
    weights = random_layer(2, 128, 64, 128, 64)
    assert pad_to_tiles(weights) is weights


def test_prepare_fills_up_and_shuffles() -> None:
    """``HopperBackend.prepare`` on a CPU: what the kernels of a 96-column shard will read."""
    from sglang_w4afp8.kernels.hopper.backend import HopperBackend
    from sglang_w4afp8.layer import Device, MoEProblem
    from sglang_w4afp8.sharding import AxisShard

    columns = AxisShard.even(768, 128, 1, 8)
    assert (columns.size, columns.local_group) == (96, 32)
    problem = MoEProblem(2, 128, columns, 128, 2, ActivationScheme.STATIC, Device("cpu"))
    weights = random_layer(2, 128, 96, 128, 32)
    before = unpack_int4(weights.w2)
    ready = HopperBackend().prepare(problem, weights)
    assert ready.w2.shape == (2, 128, 64) and ready.w2_scale.shape == (2, 128, 4)
    seen = _read_expert(ready.w2[1], 128, 128, 32, ready.w2.dtype is torch.uint8)
    tiles = StageShape.of(128, 128, 32, False).tiles
    for (tile, row), line in seen.items():
        at = _checkpoint_row(tile, row, 128, False, tiles)
        assert line == [*before[1, at].tolist(), *[0] * 32]
