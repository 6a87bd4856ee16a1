"""Comparing one matrix or tensor of two checkpoints: the arithmetic of ``verify``.

A linear is whatever its parts restore to: FP8 blocks, INT4 groups, BF16. Two linears are compared
row block by row block, so memory stays at two stored matrices plus a few megabytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sglang_w4afp8.checkpoint.formats import ExpertParts, FloatWeight, Int4Weight, detect
from sglang_w4afp8.checkpoint.index import TensorEntry
from sglang_w4afp8.checkpoint.reader import TensorReader
from sglang_w4afp8.errors import W4AFp8Error
from sglang_w4afp8.quantize.metrics import ErrorStats
from sglang_w4afp8.quantize.weights import float_rows
from sglang_w4afp8.reference import dequantize_int4

_PIECE = 1 << 19  # float32 elements per row block


@dataclass(frozen=True)
class LinearPair:
    """A linear in both checkpoints.

    Attributes:
        prefix: its name in the source.
        source: its parts there.
        target: its parts in the result.
    """

    prefix: str
    source: ExpertParts
    target: ExpertParts

    @property
    def nbytes(self) -> int:
        """Bytes read from the source."""
        return sum(entry.nbytes for entry in self.source.parts.values())


@dataclass(frozen=True)
class CopyPair:
    """A tensor that must be equal bit for bit."""

    source: TensorEntry
    target: TensorEntry

    @property
    def nbytes(self) -> int:
        """Bytes read from the source."""
        return self.source.nbytes


@dataclass
class Finding:
    """What a comparison found.

    Attributes:
        name: linear or tensor.
        stats: energies, for linears.
        problems: in words; empty when all is well.
    """

    name: str
    stats: ErrorStats | None = None
    problems: list[str] = field(default_factory=list)


def _rows(weight: FloatWeight | Int4Weight, start: int, stop: int) -> torch.Tensor:
    if isinstance(weight, FloatWeight):
        return float_rows(weight.data, weight.scale, weight.block, start, stop)
    return dequantize_int4(
        weight.packed[start:stop], weight.scale[start:stop], weight.group_size, torch.float32
    )


def _row_count(weight: FloatWeight | Int4Weight) -> int:
    return (weight.data if isinstance(weight, FloatWeight) else weight.packed).shape[0]


def _scale_problems(weight: FloatWeight | Int4Weight) -> Iterator[str]:
    scale = weight.scale
    if scale is None:
        return
    value = scale.to(torch.float32)
    if not bool(value.isfinite().all()):
        yield "scales are not finite"
    elif bool((value == 0).any()):
        yield f"{int((value == 0).sum())} scales are zero"


def compare_linear(
    pair: LinearPair, source_reader: TensorReader, target_reader: TensorReader
) -> Finding:
    """Restore both and measure the difference."""
    finding = Finding(pair.prefix)
    try:
        before = detect(pair.source)
        after = detect(pair.target)
        shapes = before.shape(pair.source), after.shape(pair.target)
        if shapes[0] != shapes[1]:
            finding.problems.append(f"shape {shapes[1]}, the source has {shapes[0]}")
            return finding
        original = before.load(pair.source, source_reader.read)
        restored = after.load(pair.target, target_reader.read)
    except W4AFp8Error as error:
        finding.problems.append(f"{error.found}: {error.why}")
        return finding
    finding.problems.extend(_scale_problems(restored))
    stats = ErrorStats()
    rows, columns = shapes[0]
    step = max(1, _PIECE // columns)
    assert _row_count(original) == rows
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        stats.add(ErrorStats.compare(_rows(original, start, stop), _rows(restored, start, stop)))
    finding.stats = stats
    if stats.error != stats.error:
        finding.problems.append("restored weights are not finite")
    return finding


def compare_copy(
    pair: CopyPair, source_reader: TensorReader, target_reader: TensorReader
) -> Finding:
    """Compare bytes."""
    finding = Finding(pair.source.name)
    kinds = [(entry.dtype, entry.shape) for entry in (pair.source, pair.target)]
    if kinds[0] != kinds[1]:
        finding.problems.append(
            f"{kinds[1][0]} {list(kinds[1][1])}, the source has {kinds[0][0]} {list(kinds[0][1])}"
        )
        return finding
    streams = zip(source_reader.chunks(pair.source), target_reader.chunks(pair.target), strict=True)
    if any(left != right for left, right in streams):
        finding.problems.append("bytes differ from the source's")
    return finding


def compare_batch(
    pairs: list[LinearPair | CopyPair], source_root: Path, target_root: Path
) -> list[Finding]:
    """Compare several; the unit of work of a worker process."""
    torch.set_num_threads(1)
    with TensorReader(source_root) as source, TensorReader(target_root) as target:
        return [
            compare_linear(pair, source, target)
            if isinstance(pair, LinearPair)
            else compare_copy(pair, source, target)
            for pair in pairs
        ]
