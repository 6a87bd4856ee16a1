"""Which rows, packed bytes and scale columns a tensor-parallel rank owns. Integers only.

The problem
-----------
A quantised matrix is two tensors: codes, and scales that each belong to a run of codes (an INT4
*group* along K, or an FP8 *block* along both axes). Cutting the codes for a rank is division; the
scales do not divide along with them, because a cut may fall inside a group. SGLang cuts scale
columns by the same division and rounds down, so a rank gets too few of them, or none::

    DeepSeek-R1, tp 32     2048 / 32 = 64 columns a rank, group 128
      codes   | rank 0: 0…63 | rank 1: 64…127 | rank 2: 128… | …
      scales  |        column 0               |      column 1       16 // 32 = 0 each

    Qwen3-235B, tp 8       1536 / 8 = 192 columns a rank, group 128
      codes   | rank 0: 0…191          | rank 1: 192…383       | …
      scales  | col 0   | col 1        | col 1 | col 2         |    12 // 8 = 1 each

The rule
--------
Rank r owns elements ``start … start + size − 1`` with ``start = r · size``. The scale of its local
element j is column ``(start + j) // group``. Those columns, one per element, are constant over
runs of ``local_group = gcd(size, group)`` elements: ``local_group`` divides ``group`` and every
``start`` that is a multiple of ``size``, so no run crosses a group's edge. A rank therefore holds
an ordinary grouped matrix whose group is ``local_group`` and whose scale column c is the
checkpoint's column ``(start + c · local_group) // group``. Nothing is rounded and no value
changes: put together, the ranks' dequantised shards are the dequantised whole, bit for bit. 64 of
2048 at tp 32: local group 64, ranks 2i and 2i+1 hold the same column. 192 of 1536 at tp 8: local
group 64, rank 1 holds columns 1, 2, 2. When the shard is a multiple of the group the local group
is the group.

A kernel that only knows the checkpoint's group (CUTLASS: 128) can have :meth:`AxisShard.aligned`
instead: the same elements inside the smallest group-aligned window around them, zero codes at both
ends, scale columns as in the checkpoint. It costs the padding's bytes and is exact too.

Both FP8 axes follow the same rule with ``group = block side``; a last block may be ragged
(``ceil(n / block)`` scale rows), which the rule never notices.

The caller's side: ``srt/loader.py`` copies what :class:`ExpertShard` names, ``srt/linear.py`` what
:class:`LinearShard` names, and ``plan`` prints both. Nobody else computes an offset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

from sglang_w4afp8.errors import ShardError
from sglang_w4afp8.spec import GROUP_SIZES


@dataclass(frozen=True)
class AxisShard:
    """One rank's part of one axis whose scales come one per ``group`` elements.

    Attributes:
        full_size: elements of the whole axis.
        start: first element of this rank.
        size: elements of this rank.
        group: elements that share a scale in the checkpoint.
    """

    full_size: int
    start: int
    size: int
    group: int

    def __post_init__(self) -> None:
        if self.group <= 0 or self.size <= 0:
            raise ShardError(
                f"an axis of {self.full_size} elements, shard size {self.size}, group {self.group}",
                "sizes must be positive",
            )
        if self.start < 0 or self.start + self.size > self.full_size:
            raise ShardError(
                f"elements {self.start}…{self.stop - 1} of an axis of {self.full_size}",
                "the shard lies outside the axis",
            )

    @classmethod
    def even(
        cls, full_size: int, group: int, tp_rank: int, tp_size: int, what: str = "axis"
    ) -> AxisShard:
        """The rank's part when the axis is cut into ``tp_size`` equal ones.

        Args:
            full_size: elements of the whole axis.
            group: elements per scale.
            tp_rank: 0 … tp_size − 1.
            tp_size: number of equal parts.
            what: the axis's name for the error.

        Raises:
            ShardError: ``tp_size`` does not divide ``full_size`` or the rank is out of range.
        """
        if not 0 <= tp_rank < tp_size:
            raise ShardError(
                f"tensor-parallel rank {tp_rank} of {tp_size}", "a rank lies in 0 … size − 1"
            )
        if full_size % tp_size:
            raise ShardError(
                f"{what}: {full_size} elements over {tp_size} tensor-parallel ranks",
                f"{full_size} / {tp_size} = {full_size / tp_size:.2f} is not a whole number, and "
                "ranks must have equal shapes",
                [f"--tp {divisor}" for divisor in nearest_divisors(full_size, tp_size)]
                + [
                    f"--tp {tp_size} --ep-size {tp_size}, which keeps experts whole, if this axis "
                    "is the experts'"
                ],
            )
        size = full_size // tp_size
        return cls(full_size, tp_rank * size, size, group)

    @classmethod
    def copied(cls, size: int, group: int, rank: int, ranks: int, copies: int) -> AxisShard:
        """The rank's part when ``copies`` neighbouring ranks hold the same one.

        Key and value heads are cut that way when there are fewer of them than ranks; with
        ``copies`` = 1 it is :meth:`even`, for a size that is known to divide.

        Args:
            size: elements of one part.
            group: elements per scale.
            rank: 0 … ranks − 1.
            ranks: how many ranks there are.
            copies: ranks per part.
        """
        return cls(size * (ranks // copies), rank // copies * size, size, group)

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.start + self.size

    @property
    def local_group(self) -> int:
        """Elements per scale in this rank's tensor: ``gcd(size, group)`` for even parts."""
        return gcd(self.size, self.group, self.start)

    @property
    def scale_columns(self) -> tuple[int, ...]:
        """The checkpoint's scale column for each local group; length ``size // local_group``."""
        step = self.local_group
        return tuple(k // self.group for k in range(self.start, self.stop, step))

    @property
    def is_aligned(self) -> bool:
        """Whether the cuts fall on group edges, so that scales divide along with the codes."""
        return self.local_group == self.group

    @property
    def is_whole(self) -> bool:
        """Whether the axis is not cut at all; its last group may be ragged."""
        return self.size == self.full_size

    @property
    def covering_columns(self) -> int:
        """How many of the checkpoint's scale columns this shard needs."""
        return self.aligned.size // self.group

    def regrouped(self, local_group: int) -> tuple[int, ...]:
        """:attr:`scale_columns` for a finer group that divides :attr:`local_group`."""
        if self.local_group % local_group:
            raise ShardError(
                f"local group {local_group} for a shard of {self.size} that starts at {self.start}",
                f"it must divide {self.local_group}",
            )
        return tuple(k // self.group for k in range(self.start, self.stop, local_group))

    @property
    def aligned(self) -> AxisShard:
        """The smallest window of whole groups that holds this shard; see the module docstring.

        Elements ``start … stop − 1`` sit at offset ``start − aligned.start`` in it; the rest is
        padding. Its ``full_size`` counts a ragged last group as a whole one.
        """
        first = self.start // self.group * self.group
        last = -(-self.stop // self.group) * self.group
        full = -(-self.full_size // self.group) * self.group
        return AxisShard(full, first, last - first, self.group)


@dataclass(frozen=True)
class ExpertShard:
    """One rank's part of every expert of a layer.

    Shapes as in the checkpoint, one expert: gate and up ``[N, K/2]`` bytes with scales
    ``[N, K/group]``, down ``[K, N/2]`` bytes with scales ``[K, N/group]``; N is the expert's
    intermediate size and K the hidden size. Gate and up are cut by rows (whole groups along K),
    down by columns.

    Attributes:
        hidden_size: K, never cut.
        group_size: INT4 codes per scale in the checkpoint.
        columns: this rank's part of N, as down's K axis sees it.
    """

    hidden_size: int
    group_size: int
    columns: AxisShard

    @classmethod
    def plan(
        cls,
        hidden_size: int,
        intermediate_size: int,
        group_size: int,
        tp_rank: int,
        tp_size: int,
        what: str = "experts",
    ) -> ExpertShard:
        """Plan a rank's slices.

        Args:
            hidden_size: K.
            intermediate_size: N of the whole expert.
            group_size: INT4 codes per scale.
            tp_rank: rank among the ranks that cut an expert (SGLang's ``moe_tp_rank``).
            tp_size: how many cut it (``moe_tp_size`` = tp / ep).
            what: layer name for errors.

        Raises:
            ShardError: N or K cannot be cut or packed that way.
        """
        if hidden_size % group_size:
            raise ShardError(
                f"{what}: hidden size {hidden_size}, group size {group_size}",
                f"{hidden_size} / {group_size} is not a whole number of scale groups along K",
                _regroup_ways(hidden_size, intermediate_size),
            )
        if intermediate_size % group_size:
            raise ShardError(
                f"{what}: expert intermediate size {intermediate_size}, group size {group_size}",
                "the down projection has no whole number of scale groups along K",
                _regroup_ways(hidden_size, intermediate_size),
            )
        columns = AxisShard.even(
            intermediate_size, group_size, tp_rank, tp_size, f"{what}: expert intermediate size"
        )
        if columns.size % 2:
            raise ShardError(
                f"{what}: {intermediate_size} / tp {tp_size} = {columns.size} columns a rank",
                "two INT4 codes share a byte, so a cut must fall on an even column",
                [
                    f"--tp {tp_size // 2}" if tp_size % 2 == 0 else "--tp 1",
                    f"--tp {tp_size} --ep-size {tp_size}",
                ],
            )
        return cls(hidden_size, group_size, columns)

    @property
    def w13_rows(self) -> slice:
        """Rows of gate and of up, of their codes and of their scales alike."""
        return slice(self.columns.start, self.columns.stop)

    @property
    def w2_bytes(self) -> slice:
        """Packed columns of down."""
        return slice(self.columns.start // 2, self.columns.stop // 2)

    @property
    def w2_scale_columns(self) -> tuple[int, ...]:
        """Scale columns of down, one per local group, repeats included."""
        return self.columns.scale_columns

    @property
    def w2_group_size(self) -> int:
        """Codes per scale in the rank's down projection."""
        return self.columns.local_group


@dataclass(frozen=True)
class LinearShard:
    """One rank's part of a block-FP8 linear ``[N, K]`` and of its scales ``[N/block, K/block]``.

    Attributes:
        rows: the part of each logical output (gate and up; q, k and v), in order.
        columns: the part of the input axis.
    """

    rows: tuple[AxisShard, ...]
    columns: AxisShard

    @property
    def height(self) -> int:
        """Rows of the rank's weight: all logical outputs together."""
        return sum(shard.size for shard in self.rows)

    @property
    def divides(self) -> bool:
        """Whether every cut falls on a block's edge, so that SGLang's own linear is right.

        An axis that is not cut may end in a partial block; a merged output may not, because the
        next one would begin inside it.
        """
        fits = all(shard.is_aligned or shard.is_whole for shard in (*self.rows, self.columns))
        ragged = len(self.rows) > 1 and any(shard.size % shard.group for shard in self.rows)
        return fits and not ragged

    @property
    def block(self) -> tuple[int, int]:
        """Side lengths of the re-blocked scales: the finest block that no cut crosses."""
        return common_local_block(self.rows), self.columns.local_group

    @property
    def scale_shape(self) -> tuple[int, int]:
        """Shape of the rank's scales: the checkpoint's blocks where they divide, else its own."""
        if self.divides:
            heights = (-(-shard.size // shard.group) for shard in self.rows)
            return sum(heights), -(-self.columns.size // self.columns.group)
        return self.height // self.block[0], self.columns.size // self.block[1]


def _regroup_ways(hidden_size: int, intermediate_size: int) -> list[str]:
    """Commands that give both axes whole groups; empty when no group size that exists does."""
    sizes = [g for g in GROUP_SIZES if hidden_size % g == 0 and intermediate_size % g == 0]
    return [f"requantise: sglang-w4afp8 convert SRC DST --group-size {g}" for g in sizes[::-1]] or [
        "leave these experts unquantised: name them in modules_to_not_convert"
    ]


def nearest_divisors(number: int, wanted: int, count: int = 2) -> list[int]:
    """The ``count`` divisors of ``number`` nearest to ``wanted``, largest first."""
    divisors = [d for d in range(1, min(number, 4 * wanted) + 1) if number % d == 0 and d != wanted]
    return sorted(sorted(divisors, key=lambda d: (abs(d - wanted), d))[:count], reverse=True)


def common_local_block(shards: Sequence[AxisShard]) -> int:
    """The block side that all ``shards`` (the parts of one merged axis) can share: the gcd."""
    return gcd(*(shard.local_group for shard in shards))
