"""Dequantisation, activation quantisation and one MoE layer in plain torch: the oracle.

Everything else is measured against this file. :func:`moe_reference` computes in the dtype it is
told, float64 for tests; the ``torch`` backend is the same function in float32. The arithmetic, for
token t and expert e with group scales s and activation scale a::

    q1 = e4m3(clamp(x_t / a1, ±448))                         FP8 input of gate and up
    h  = a1 · Σ_k q1[k] · code13[n, k] · s13[n, k // g]      gate rows n < N, up rows n ≥ N
    u  = silu(h_gate) · h_up
    q2 = e4m3(clamp(u / a2, ±448))                           FP8 input of down
    y  = a2 · Σ_n q2[n] · code2[k, n] · s2[k, n // g2]
    out_t = routed_scaling_factor · Σ_e weight[t, e] · y_e

Scales are applied exactly, sums are not rounded in between; a kernel may differ from this by its
accumulation order and by where it rounds to BF16, which is what tolerances allow for.

Rows that a token dispatcher has quantised already (DeepEP: E4M3 and one scale per 128 columns) take
the place of q1 as they are. :func:`masked_reference` is the layer without the last line, for rows
that the dispatcher has sorted to experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sglang_w4afp8.layer import MoEWeights
from sglang_w4afp8.packing import unpack_int4
from sglang_w4afp8.spec import ActivationScheme

FP8_MAX = 448.0
"""Largest finite E4M3 value."""
ROW_GROUP = 128
"""Columns per scale of the E4M3 rows that token dispatchers send."""


def dequantize_int4(
    packed: torch.Tensor, scales: torch.Tensor, group_size: int, dtype: torch.dtype
) -> torch.Tensor:
    """Codes times their group's scale.

    Args:
        packed: ``(..., rows, K/2)`` int8, see :mod:`sglang_w4afp8.packing`.
        scales: ``(..., rows, K/group_size)`` floating point.
        group_size: codes per scale along K.
        dtype: of the product; the scale is converted to it first.

    Returns:
        ``(..., rows, K)`` in ``dtype``.
    """
    codes = unpack_int4(packed, dtype)
    grouped = codes.unflatten(-1, (-1, group_size)) * scales.to(dtype).unsqueeze(-1)
    return grouped.flatten(-2)


def dequantize_fp8_block(
    weight: torch.Tensor, scale_inv: torch.Tensor, block: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """Block-FP8 weight times its block scales.

    Args:
        weight: ``(…, N, K)`` float8_e4m3fn.
        scale_inv: ``(…, ceil(N/n), ceil(K/k))`` float32; multiplied, despite its name.
        block: ``(n, k)``.
        dtype: of the product.

    Returns:
        ``(…, N, K)`` in ``dtype``.
    """
    rows, columns = weight.shape[-2:]
    per_row = scale_inv.to(dtype).repeat_interleave(block[0], dim=-2)[..., :rows, :]
    return weight.to(dtype) * per_row.repeat_interleave(block[1], dim=-1)[..., :columns]


def activation_scale(
    x: torch.Tensor, scheme: ActivationScheme, static_scale: torch.Tensor | None
) -> torch.Tensor:
    """The divisor that brings ``x`` into E4M3's range.

    Args:
        x: ``(T, K)``.
        scheme: anything but ``none``.
        static_scale: one element, for the static scheme.

    Returns:
        ``(1, 1)`` or ``(T, 1)`` float32. An all-zero row or batch has scale 1, and one of denormal
        numbers 2^-126: divided by amax / 448, which may be zero, its zeros would not be numbers.
    """
    if scheme is ActivationScheme.STATIC:
        assert static_scale is not None
        return static_scale.to(torch.float32).reshape(1, 1)
    magnitude = x.detach().abs().to(torch.float32)
    if scheme is ActivationScheme.DYNAMIC_PER_TENSOR:
        amax = magnitude.amax().reshape(1, 1) if x.numel() else magnitude.new_zeros(1, 1)
    else:
        amax = magnitude.amax(dim=-1, keepdim=True)
    # A tensor as divisor: torch turns a number into a multiplication by its reciprocal on a GPU,
    # one bit off what kernels divide by, and codes on a rounding boundary then fall the other way.
    scale = (amax / torch.full_like(amax, FP8_MAX)).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(amax > 0, scale, torch.ones_like(amax))


def fake_quantize_fp8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``x`` rounded to E4M3 at ``scale`` and multiplied back.

    Args:
        x: ``(T, K)``.
        scale: broadcastable to ``x``, float32.

    Returns:
        ``(T, K)`` in ``x``'s dtype.
    """
    # The division is float32 even for a float64 x: kernels divide in float32, and a value on a
    # rounding boundary must fall the same way here.
    scaled = (x.to(torch.float32) / scale).clamp(-FP8_MAX, FP8_MAX)
    codes = scaled.to(torch.float8_e4m3fn)
    return codes.to(x.dtype) * scale.to(x.dtype)


def dequantize_rows(
    rows: torch.Tensor, row_scale: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Rows as numbers: converted, and times their scales if they have some.

    Args:
        rows: ``(…, K)`` floating point; float8_e4m3fn where there are scales.
        row_scale: ``(…, K/128)`` float32 of any strides, or None.
        dtype: of the result.
    """
    rows = rows.to(dtype)
    if row_scale is None:
        return rows
    return (rows.unflatten(-1, (-1, ROW_GROUP)) * row_scale.to(dtype).unsqueeze(-1)).flatten(-2)


def moe_reference(
    x: torch.Tensor,
    weights: MoEWeights,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    scheme: ActivationScheme,
    x_scale: torch.Tensor | None = None,
    routed_scaling_factor: float = 1.0,
    apply_router_weight_on_input: bool = False,
    compute_dtype: torch.dtype = torch.float64,
    visit_all_experts: bool = False,
) -> torch.Tensor:
    """One MoE layer over the experts that this rank holds.

    Args:
        x: ``(T, K)`` hidden states.
        weights: in checkpoint order, see :class:`~sglang_w4afp8.layer.MoEWeights`.
        topk_weights: ``(T, top_k)`` float32.
        topk_ids: ``(T, top_k)`` integer local expert ids; any id outside 0 … E − 1 is skipped.
        scheme: how expert inputs are quantised.
        x_scale: ``(T, K/128)`` float32, for ``x`` in float8_e4m3fn: the input of gate and up as it
            is, not quantised again.
        routed_scaling_factor: multiplies the result.
        apply_router_weight_on_input: weigh the input instead of the output (top_k = 1 models).
        compute_dtype: of every product and sum.
        visit_all_experts: multiply every token by every expert and mask, instead of gathering the
            tokens of each. Far slower, but no tensor's shape depends on the routing and nothing
            waits for the host, so that a CUDA graph can hold it.

    Returns:
        ``(T, K)`` in ``compute_dtype``.
    """
    out = torch.zeros(x.shape[0], weights.hidden_size, dtype=compute_dtype, device=x.device)
    if x.shape[0] == 0:
        return out
    x = dequantize_rows(x, x_scale, compute_dtype)
    route = topk_weights.to(compute_dtype)

    def quantized(rows: torch.Tensor, static_scale: torch.Tensor | None) -> torch.Tensor:
        if scheme is ActivationScheme.NONE:
            return rows
        return fake_quantize_fp8(rows, activation_scale(rows, scheme, static_scale))

    def quantized_input(rows: torch.Tensor) -> torch.Tensor:
        return rows if x_scale is not None else quantized(rows, weights.w13_input_scale)

    # One entry per visited expert: the tokens, their router weights, silu(gate) · up.
    visits: list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]] = []
    quantized_x = x if apply_router_weight_on_input else quantized_input(x)
    for expert in range(weights.num_experts):
        hits = topk_ids == expert  # (T, top_k)
        if visit_all_experts:
            tokens = torch.arange(x.shape[0], device=x.device)
        else:
            tokens = hits.any(dim=-1).nonzero().squeeze(-1)
            if tokens.numel() == 0:
                continue
        weight = (route * hits).sum(dim=-1, keepdim=True)[tokens]  # (t, 1)
        rows = quantized_x[tokens]
        if apply_router_weight_on_input:
            rows = quantized_input(rows * weight)
            weight = hits.any(dim=-1, keepdim=True)[tokens].to(compute_dtype)
        inner = _gate_up(rows, weights, expert)
        if visit_all_experts:
            # Rows of tokens that are not this expert's must not reach a per-tensor amax.
            inner = inner * hits.any(dim=-1, keepdim=True)
        visits.append((expert, tokens, weight, inner))
    if not visits:
        return out

    # A dynamic per-tensor scale is that of all experts' rows together, as in SGLang's kernels.
    inner_all = quantized(torch.cat([inner for *_, inner in visits]), weights.w2_input_scale)
    pieces = inner_all.split([len(tokens) for _, tokens, _, _ in visits])
    for (expert, tokens, weight, _), inner in zip(visits, pieces, strict=True):
        out.index_add_(0, tokens, _down(inner, weights, expert) * weight)
    return out * routed_scaling_factor


def _gate_up(rows: torch.Tensor, weights: MoEWeights, expert: int) -> torch.Tensor:
    """``silu(gate) · up`` of ``(t, K)`` quantised rows."""
    w13 = dequantize_int4(
        weights.w13[expert], weights.w13_scale[expert], weights.w13_group_size, rows.dtype
    )
    gate, up = (rows @ w13.T).chunk(2, dim=-1)
    return F.silu(gate) * up


def _down(inner: torch.Tensor, weights: MoEWeights, expert: int) -> torch.Tensor:
    w2 = dequantize_int4(
        weights.w2[expert], weights.w2_scale[expert], weights.w2_group_size, inner.dtype
    )
    return inner @ w2.T


def masked_reference(
    rows: torch.Tensor,
    weights: MoEWeights,
    masked_m: torch.Tensor,
    *,
    scheme: ActivationScheme,
    row_scale: torch.Tensor | None = None,
    compute_dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Every expert on the rows that a dispatcher has put into its slots.

    No tensor's shape depends on the counts and nothing waits for the host.

    Args:
        rows: ``(E, M, K)``; what lies behind an expert's count may be anything, NaN as well.
        weights: in checkpoint order.
        masked_m: ``(E,)`` integer rows of each expert, at most M.
        scheme: how expert inputs are quantised.
        row_scale: ``(E, M, K/128)`` float32 for rows in float8_e4m3fn, see :func:`moe_reference`.
        compute_dtype: of every product and sum.

    Returns:
        ``(E, M, K)`` in ``compute_dtype``, without router weights, zeros behind the counts.
    """
    experts, most, _ = rows.shape
    place = torch.arange(most, device=rows.device).unsqueeze(-1)

    def rows_of(expert: int) -> torch.Tensor:
        scale = None if row_scale is None else row_scale[expert]
        numbers = dequantize_rows(rows[expert], scale, compute_dtype)
        return torch.where(place < masked_m[expert], numbers, numbers.new_zeros(()))

    def quantized(
        part: torch.Tensor, static_scale: torch.Tensor | None, amaxes: list[torch.Tensor]
    ) -> torch.Tensor:
        if scheme is ActivationScheme.NONE:
            return part
        # A dynamic per-tensor scale is that of all experts' rows together.
        sample = torch.stack(amaxes) if scheme is ActivationScheme.DYNAMIC_PER_TENSOR else part
        return fake_quantize_fp8(part, activation_scale(sample, scheme, static_scale))

    shared = scheme is ActivationScheme.DYNAMIC_PER_TENSOR and most > 0
    amaxes = [rows_of(e).abs().amax() for e in range(experts)] if shared else []
    inners = []
    for expert in range(experts):
        part = rows_of(expert)
        if row_scale is None:
            part = quantized(part, weights.w13_input_scale, amaxes)
        inners.append(_gate_up(part, weights, expert))
    amaxes = [inner.abs().amax() for inner in inners] if shared else []
    out = rows.new_zeros(rows.shape, dtype=compute_dtype)
    for expert, inner in enumerate(inners):
        out[expert] = _down(quantized(inner, weights.w2_input_scale, amaxes), weights, expert)
    return out
