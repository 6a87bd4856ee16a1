"""One weight matrix through one rounding method, in pieces that fit a CPU's cache.

Owns the loop over row blocks: decode, scale, round, pack, measure. Whether the source is block-FP8
or a plain float matrix is decided here and nowhere else; methods see float32 groups only. The piece
size depends on the shape alone, so results do not depend on thread or process counts.
"""

from __future__ import annotations

import torch

from sglang_w4afp8.errors import CheckpointError, ConfigError
from sglang_w4afp8.packing import pack_int4
from sglang_w4afp8.quantize import fp8
from sglang_w4afp8.quantize.gptq import quantize_gptq
from sglang_w4afp8.quantize.metrics import ErrorStats
from sglang_w4afp8.quantize.mse import quantize_mse
from sglang_w4afp8.quantize.rtn import quantize_rtn

METHODS = ("rtn", "mse", "gptq")

# float32 elements per piece. With 2 MiB buffers neither dispatch nor memory dominates; see
# benchmarks/convert_speed.py.
_CPU_PIECE = 1 << 19
_GPU_PIECE = 1 << 25


def float_rows(
    data: torch.Tensor,
    scale: torch.Tensor | None,
    block: tuple[int, int] | None,
    start: int,
    stop: int,
) -> torch.Tensor:
    """Rows ``start … stop − 1`` of a weight as float32 ``(R, K)``, in memory of their own.

    Args:
        data: ``(N, K)`` float8_e4m3fn, bfloat16, float16 or float32.
        scale: float32 block scales ``(ceil(N/n), ceil(K/k))`` of an FP8 weight, else None.
        block: ``(n, k)`` when ``scale`` is given.
    """
    part = data[start:stop]
    if part.dtype != torch.float8_e4m3fn:
        return part.to(torch.float32, copy=True)
    values = fp8.decode_e4m3(part)
    if scale is None or block is None:
        return values
    return fp8.apply_block_scale(values, scale, block, start)


def _check(data: torch.Tensor, name: str, group_size: int) -> None:
    columns = data.shape[-1]
    if data.dim() != 2 or columns % group_size:
        fitting = [g for g in (128, 64, 32) if columns % g == 0]
        raise ConfigError(
            f"{name}: {list(data.shape)} with group size {group_size}",
            f"K = {columns} is not a multiple of {group_size}, and the format has one scale per "
            "whole group",
            [f"--group-size {g}" for g in fitting] or ["keep these layers: --keep REGEX"],
        )


def _not_finite(name: str) -> CheckpointError:
    return CheckpointError(
        f"{name} contains NaN or infinite values",
        "a group with a non-finite weight has no scale; serving it would give NaN logits",
        ["download the shard again and compare checksums", "--keep REGEX  leaves the layer as is"],
    )


def measure(groups: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> ErrorStats:
    """What codes at these scales lost.

    Args:
        groups: ``(R, G, g)`` float32 weights.
        codes: ``(R, G, g)`` float32 codes.
        scale: ``(R, G)`` float32.
    """
    # Three dot products per group give all energies; the restored weights are never formed.
    signal = torch.linalg.vecdot(groups, groups).to(torch.float64)
    dot = torch.linalg.vecdot(groups, codes).to(torch.float64)
    energy = torch.linalg.vecdot(codes, codes).to(torch.float64)
    wide = scale.to(torch.float64)
    dot = dot * wide
    recovered = energy * wide * wide
    error = (signal - 2.0 * dot + recovered).clamp_(min=0.0)
    totals = torch.stack((signal.sum(), error.sum(), dot.sum(), recovered.sum())).tolist()
    return ErrorStats(
        signal=totals[0],
        error=totals[1],
        dot=totals[2],
        recovered=totals[3],
        count=groups.numel(),
        zero_groups=int((signal == 0).sum()),
    )


def quantize_weight(
    data: torch.Tensor,
    scale: torch.Tensor | None = None,
    block: tuple[int, int] | None = None,
    *,
    method: str = "mse",
    group_size: int = 128,
    symmetric: bool = False,
    factor: torch.Tensor | None = None,
    name: str = "weight",
) -> tuple[torch.Tensor, torch.Tensor, ErrorStats]:
    """Quantise one matrix to INT4 groups.

    Args:
        data: ``(N, K)`` float8_e4m3fn, bfloat16, float16 or float32, K a multiple of
            ``group_size``.
        scale: float32 block scales ``(ceil(N/n), ceil(K/k))`` of an FP8 weight.
        block: ``(n, k)`` when ``scale`` is given.
        method: ``rtn``, ``mse`` or ``gptq``.
        group_size: codes per scale along K.
        symmetric: codes −7…7 and positive scales only; ``rtn`` always does so.
        factor: ``(K, K)`` from :func:`.gptq.inverse_factor`, for ``gptq``.
        name: for messages.

    Returns:
        packed codes ``(N, K/2)`` int8, scales ``(N, K/group_size)`` bfloat16, and what was lost.

    Raises:
        ConfigError: K is not a multiple of the group size, or the method is unknown.
        CheckpointError: the weight holds NaN or infinity.
    """
    _check(data, name, group_size)
    rows, columns = data.shape
    if method not in METHODS or (method == "gptq") != (factor is not None):
        raise ConfigError(
            f"method {method!r} with{'' if factor is not None else 'out'} second moments",
            f"the methods are {', '.join(METHODS)}; gptq needs second moments, the others none",
            ["--method mse"],
        )
    if factor is not None and factor.shape != (columns, columns):
        raise ConfigError(
            f"{name}: K = {columns}, second moments {list(factor.shape)}",
            "they belong to another layer or model",
            ["calibrate this model"],
        )
    packed = torch.empty(rows, columns // 2, dtype=torch.int8, device=data.device)
    scales = torch.empty(rows, columns // group_size, dtype=torch.bfloat16, device=data.device)
    stats = ErrorStats()
    piece = _CPU_PIECE if data.device.type == "cpu" else _GPU_PIECE
    # GPTQ goes through the columns one by one: the fewer row blocks, the less dispatch.
    step = max(1, piece // columns) if factor is None else rows
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        groups = float_rows(data, scale, block, start, stop).view(stop - start, -1, group_size)
        if factor is not None:
            codes, group_scale = quantize_gptq(
                groups.flatten(1), factor, group_size, symmetric=symmetric
            )
        elif method == "rtn":
            codes, group_scale = quantize_rtn(groups)
        else:
            codes, group_scale = quantize_mse(groups, symmetric=symmetric)
        part = measure(groups, codes, group_scale)
        if not part.signal < float("inf"):
            raise _not_finite(name)
        stats.add(part)
        packed[start:stop] = pack_int4(codes.to(torch.int8).view(stop - start, columns))
        scales[start:stop] = group_scale.to(torch.bfloat16)
    return packed, scales, stats
