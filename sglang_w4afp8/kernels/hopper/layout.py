"""The order in which the Hopper kernels stream weights, and the way there from checkpoint order.

A *row tile* is 64 rows for one warpgroup. A *stage* is what travels to shared memory in one copy:
``2 · tiles`` row tiles by ``stage_k`` columns, the first half for warpgroup 0, the second for 1;
with 256 columns there is one row tile for each, in w2 with 128 two and with 64 four, so that a copy
has 16 KB wherever the shape allows. Bytes of one expert, outermost first::

    weights  [block of 2·tiles row tiles][stage along K][row tile][64 columns][thread][16 bytes]
    scales   [block][stage along K][row tile][scale group][warp 4][g 8][row half 2]   (bfloat16)

Thread ``32 w + 4 g + q`` of a warpgroup owns rows g and g + 8 of warp w's 16 rows, as wgmma and
mma.sync want the A operand. Which rows of the checkpoint these are is free, and used:

* gate and up: row g is a gate row and row g + 8 the up row of the same feature, so that
  SiLU(gate)·up needs no exchange between threads;
* down: rows g and g + 8 are neighbouring output columns, and so are the same rows of a
  warpgroup's several row tiles, so that a thread's results are stored together.

The 16 bytes are four words; word j holds columns 16 j + 4 q + (0…3) of rows g (``x``) and g + 8
(``y``), byte i being ``|x_i| + 8·sign(y_i) + 16·|y_(i+1 mod 4)| + 128·sign(x_i)``. E4M3 bit
patterns 0…15 are the numbers 0…15 times 2⁻⁹, so one AND gives the E4M3 register of x and one
rotation by four and an AND that of y. −8 has no such code: with ``minus_eight`` a negative v is
kept as −v − 1 and the kernel adds the one back.

The order is a permutation of nibbles within one expert's projection; shapes and bytes stay. Sizes
that are no multiples of 64 are filled up first (:func:`pad_to_tiles`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_w4afp8.layer import MoEWeights
from sglang_w4afp8.packing import unpack_int4

ROW_TILE = 64
STAGE_COLUMNS = (256, 192, 128, 64)


@dataclass(frozen=True)
class StageShape:
    """How one projection is cut into stages.

    Attributes:
        rows: of one expert; a multiple of 64.
        k: columns; a multiple of 64.
        stage_k: columns of a stage.
        tiles: row tiles per warpgroup in a stage.
    """

    rows: int
    k: int
    stage_k: int
    tiles: int

    @classmethod
    def of(cls, rows: int, k: int, group: int, gate_up: bool) -> StageShape:
        """The cut for a projection of ``rows`` by ``k`` with ``group`` codes per scale.

        Args:
            rows: of one expert.
            k: columns.
            group: codes per scale.
            gate_up: w13, whose stages have one row tile per warpgroup whatever the size.

        Raises:
            ValueError: a size is not a multiple of 64, or K no whole number of groups.
        """
        if rows % ROW_TILE or k % 64:
            raise ValueError(f"{rows} rows by {k} columns: both must be multiples of 64")
        if k % group:
            raise ValueError(f"{k} columns are no whole groups of {group}")
        # Stages end with a group: 384 columns in groups of 128 are three stages, not two of 192.
        stage_k = next(size for size in STAGE_COLUMNS if k % size == 0 and size % group == 0)
        # Several row tiles share a stage only when each is complete within it: their sums need no
        # registers from one stage to the next. A warpgroup's tiles interleave, so it has all or
        # none of them. The kernels for gate and up finish one row tile per warpgroup and stage: a
        # K this small is a hidden size that only a model for tests has.
        tiles = max(1, 256 // stage_k) if stage_k == k and not gate_up else 1
        while rows // ROW_TILE % tiles:
            tiles //= 2
        return cls(rows, k, stage_k, tiles)

    @property
    def stages_per_unit(self) -> int:
        """Stages along K."""
        return self.k // self.stage_k

    @property
    def blocks(self) -> int:
        """Blocks of ``2 · tiles`` row tiles; the last may have fewer."""
        return -(-self.rows // (2 * self.tiles * ROW_TILE))


PIECE_BYTES = 2**20
"""Packed weights that are reordered at a time."""


def _row_order(rows: int, gate_up: bool, tiles: int) -> torch.Tensor:
    """Checkpoint row of (row tile, warp, g, half), flat: ``(rows,)`` int64."""
    tile, warp, g, half = torch.meshgrid(
        torch.arange(rows // ROW_TILE),
        torch.arange(4),
        torch.arange(8),
        torch.arange(2),
        indexing="ij",
    )
    if gate_up:
        order = tile * 32 + warp * 8 + g + half * (rows // 2)
    else:
        group, in_group = tile // tiles, tile % tiles
        order = group * 64 * tiles + (warp * 16 + g * 2) * tiles + in_group * 2 + half
    return order.flatten()


def _stage_order(tiles: torch.Tensor, shape: StageShape) -> torch.Tensor:
    """Flatten ``(row tiles, stages, …)`` block by block, stages outside row tiles."""
    per_block = 2 * shape.tiles
    parts = [block.transpose(0, 1).flatten() for block in torch.split(tiles, per_block)]
    return torch.cat(parts)


def shuffle_expert(
    packed: torch.Tensor,
    gate_up: bool,
    minus_eight: bool,
    shape: StageShape,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """One expert's weights in stage order.

    Args:
        packed: ``(rows, K/2)`` int8 in checkpoint order.
        gate_up: gate rows then up rows (w13) rather than down (w2).
        minus_eight: use the code that can express −8.
        shape: of the projection.
        out: ``(rows, K/2)`` uint8 for the result, not the memory of ``packed``.

    Returns:
        ``(rows, K/2)`` uint8.
    """
    out = torch.empty_like(packed, dtype=torch.uint8) if out is None else out
    order = _row_order(shape.rows, gate_up, shape.tiles).to(packed.device)
    # Blocks follow each other in the result, so a piece of whole blocks is a run of its rows.
    block_rows = 2 * shape.tiles * ROW_TILE
    rows = block_rows * max(1, PIECE_BYTES // (block_rows * shape.k // 2))
    for start in range(0, shape.rows, rows):
        piece = order[start : start + rows]
        out[start : start + rows] = _convert(packed[piece], minus_eight, shape)
    return out


def _convert(packed: torch.Tensor, minus_eight: bool, shape: StageShape) -> torch.Tensor:
    """Whole blocks, ``(rows, K/2)`` int8 with rows in stage order -> the same shape, uint8."""
    rows, k = packed.shape[0], shape.k
    # k = 64 block + 16 j + 4 q + i, row = (tile, warp, g, half)
    codes = unpack_int4(packed).view(rows // ROW_TILE, 4, 8, 2, k // 64, 4, 4, 4)
    negative = codes < 0
    magnitude = torch.where(negative, -codes - 1, codes) if minus_eight else codes.abs()
    sign, size = negative.to(torch.uint8), magnitude.to(torch.uint8)
    x, y = size[:, :, :, 0], size[:, :, :, 1]
    word = x | (sign[:, :, :, 1] << 3) | (y.roll(-1, dims=-1) << 4) | (sign[:, :, :, 0] << 7)
    # (tile, warp, g, block, j, q, i) → (tile, stage, block in stage, warp, g, q, j, i)
    word = word.permute(0, 3, 1, 2, 5, 4, 6)
    word = word.reshape(rows // ROW_TILE, shape.stages_per_unit, -1)
    return _stage_order(word, shape).view(rows, k // 2)


def shuffle_expert_scales(scales: torch.Tensor, gate_up: bool, shape: StageShape) -> torch.Tensor:
    """One expert's group scales in stage order.

    Args:
        scales: ``(rows, K/group)`` bfloat16 in checkpoint order.
        gate_up: as in :func:`shuffle_expert`.
        shape: of the projection.

    Returns:
        ``(rows, K/group)`` bfloat16.
    """
    rows, groups = scales.shape
    ordered = scales[_row_order(rows, gate_up, shape.tiles).to(scales.device)]
    ordered = ordered.view(rows // ROW_TILE, ROW_TILE, groups).transpose(1, 2)
    ordered = ordered.reshape(rows // ROW_TILE, shape.stages_per_unit, -1)
    return _stage_order(ordered, shape).view(rows, groups)


def pad_to_tiles(weights: MoEWeights) -> MoEWeights:
    """Fill hidden and intermediate size up to multiples of 64 with zero codes and zero scales.

    Features of zero weights are SiLU(0)·0 = 0 and meet zero weights in w2; the added hidden columns
    meet zeros in the input. Only K needs it (a stage has at least 64 columns), but a size is K of
    one projection and rows of the other.

    Args:
        weights: in checkpoint order, sizes in multiples of 32 and of their groups.

    Returns:
        ``weights`` itself where nothing is to fill up, else a copy.
    """
    rows, half_hidden = weights.w13.shape[1:]
    inner, hidden = rows // 2, half_hidden * 2
    more_inner, more_hidden = -inner % 64, -hidden % 64
    if not more_inner and not more_hidden:
        return weights

    def filled(tensor: torch.Tensor, more_rows: int, more_columns: int) -> torch.Tensor:
        return torch.nn.functional.pad(tensor, (0, more_columns, 0, more_rows))

    def halves(tensor: torch.Tensor, more_columns: int) -> torch.Tensor:
        gate_up = tensor.unflatten(1, (2, inner))
        return filled(gate_up, more_inner, more_columns).flatten(1, 2)

    return weights.replaced(
        w13=halves(weights.w13, more_hidden // 2),
        w13_scale=halves(weights.w13_scale, more_hidden // weights.w13_group_size),
        w2=filled(weights.w2, more_hidden, more_inner // 2),
        w2_scale=filled(weights.w2_scale, more_hidden, more_inner // weights.w2_group_size),
    )


def shuffle_in_place(
    packed: torch.Tensor, scales: torch.Tensor, gate_up: bool, minus_eight: bool
) -> None:
    """Bring all experts of a projection into stage order, one after the other.

    Beside the projection itself there is one expert's copy and what a piece of it needs on its way
    (about 16 times ``PIECE_BYTES``).

    Args:
        packed: ``(E, rows, K/2)`` int8, contiguous; overwritten.
        scales: ``(E, rows, K/group)`` bfloat16, contiguous; overwritten.
        gate_up: as in :func:`shuffle_expert`.
        minus_eight: as in :func:`shuffle_expert`.
    """
    k = packed.shape[2] * 2
    shape = StageShape.of(packed.shape[1], k, k // scales.shape[2], gate_up)
    for expert in range(packed.shape[0]):
        source, result = packed[expert].clone(), packed[expert].view(torch.uint8)
        shuffle_expert(source, gate_up, minus_eight, shape, out=result)
        scales[expert].copy_(shuffle_expert_scales(scales[expert], gate_up, shape))
