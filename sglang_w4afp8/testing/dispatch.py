"""What DeepEP would hand to a rank's experts and do with their output, without DeepEP.

Layouts are those of DeepEP's ``Buffer.dispatch`` and ``Buffer.low_latency_dispatch`` as SGLang
0.5.16 … 0.5.23 calls them; what DeepEP leaves undefined is poison here. One batch stands for the
tokens of all ranks together, and nothing is sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sglang_w4afp8.reference import FP8_MAX, ROW_GROUP
from sglang_w4afp8.testing.cases import Routing


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 with the scale amax/448 per 128 columns, as dispatchers send it.

    Args:
        x: ``(…, K)``.

    Returns:
        ``(…, K)`` float8_e4m3fn and ``(…, K/128)`` float32.
    """
    groups = x.float().unflatten(-1, (-1, ROW_GROUP))
    scale = groups.abs().amax(dim=-1).clamp(min=1e-4) / FP8_MAX
    codes = (groups / scale.unsqueeze(-1)).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return codes.flatten(-2), scale


@dataclass(frozen=True)
class Tokens:
    """Normal mode: each token that has an expert on the rank, once, in the batch's order.

    Attributes:
        rows: ``(R, K)`` bfloat16 or float8_e4m3fn.
        row_scale: ``(R, K/128)`` float32 for the latter.
        topk_ids: ``(R, top_k)`` int64, −1 for experts of other ranks.
        topk_weights: ``(R, top_k)`` float32, 0 for those.
        origin: ``(R,)`` int64 token of the batch.
    """

    rows: torch.Tensor
    row_scale: torch.Tensor | None
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    origin: torch.Tensor

    def combine(self, results: torch.Tensor, into: torch.Tensor) -> None:
        """Add ``(R, K)`` results to their tokens in ``(T, K)``."""
        into.index_add_(0, self.origin, results.to(into.dtype))


def dispatch_tokens(batch: Routing, rank: int, experts: int, fp8: bool) -> Tokens:
    """What ``rank`` receives.

    Args:
        batch: expert ids are global, −1 for none.
        rank: experts ``rank · experts`` … are on it.
        experts: on each rank.
        fp8: rows in E4M3.
    """
    local = batch.topk_ids.long() - rank * experts
    here = (local >= 0) & (local < experts) & (batch.topk_ids >= 0)
    origin = here.any(dim=-1).nonzero().squeeze(-1)
    rows, scale = quantize_rows(batch.x[origin]) if fp8 else (batch.x[origin], None)
    return Tokens(
        rows,
        scale,
        torch.where(here, local, -1)[origin],
        torch.where(here, batch.topk_weights, 0.0)[origin],
        origin,
    )


@dataclass(frozen=True)
class Slots:
    """Low-latency mode: rows sorted to experts.

    Attributes:
        rows: ``(E, M, K)`` bfloat16 or float8_e4m3fn; NaN behind ``masked_m``.
        row_scale: ``(E, M, K/128)`` float32 for the latter, columns outermost in memory; NaN
            behind ``masked_m``.
        masked_m: ``(E,)`` int32.
        weights: ``(E, M)`` float32 router weight of each row, 0 behind ``masked_m``.
        origin: ``(E, M)`` int64 token of the batch, 0 behind ``masked_m``.
    """

    rows: torch.Tensor
    row_scale: torch.Tensor | None
    masked_m: torch.Tensor
    weights: torch.Tensor
    origin: torch.Tensor

    @property
    def valid(self) -> torch.Tensor:
        """``(E, M)``: whether a row came."""
        slots = torch.arange(self.rows.shape[1], device=self.masked_m.device)
        return slots < self.masked_m.unsqueeze(-1)

    def combine(self, results: torch.Tensor, into: torch.Tensor) -> None:
        """Add ``(E, M, K)`` results, weighed, to their tokens in ``(T, K)``."""
        valid = self.valid
        weighed = results[valid].to(into.dtype) * self.weights[valid].to(into.dtype).unsqueeze(-1)
        into.index_add_(0, self.origin[valid], weighed)


def dispatch_slots(
    batch: Routing, rank: int, experts: int, slots: int, fp8: bool, seed: int = 0
) -> Slots:
    """What ``rank`` receives.

    Args:
        batch: expert ids are global, −1 for none.
        rank: experts ``rank · experts`` … are on it.
        experts: E, on each rank.
        slots: M.
        fp8: rows in E4M3.
        seed: of the order of arrival.

    Raises:
        ValueError: an expert has more rows than slots.
    """
    device, hidden = batch.x.device, batch.x.shape[1]
    rows = batch.x.new_full((experts, slots, hidden), float("nan"))
    scale = torch.full((experts, hidden // ROW_GROUP, slots), float("nan"), device=device)
    counts = torch.zeros(experts, dtype=torch.int32, device=device)
    weights = torch.zeros(experts, slots, device=device)
    origin = torch.zeros(experts, slots, dtype=torch.int64, device=device)
    by_column = scale.transpose(1, 2)  # DeepEP's own order, which TMA wants
    generator = torch.Generator().manual_seed(seed)
    sent = rows.to(torch.float8_e4m3fn) if fp8 else rows
    for expert in range(experts):
        token, place = (batch.topk_ids == rank * experts + expert).nonzero(as_tuple=True)
        order = torch.randperm(len(token), generator=generator).to(device)
        token, place, count = token[order], place[order], len(order)
        if count > slots:
            raise ValueError(f"{count} rows for expert {expert}, which has {slots} slots")
        counts[expert] = count
        weights[expert, :count] = batch.topk_weights[token, place]
        origin[expert, :count] = token
        if fp8:
            sent[expert, :count], by_column[expert, :count] = quantize_rows(batch.x[token])
        else:
            sent[expert, :count] = batch.x[token]
    return Slots(sent, by_column if fp8 else None, counts, weights, origin)


class OneBatch:
    """DeepEP's ``Buffer`` for a rank that receives its rows of one batch, which all ranks share.

    It has the methods that SGLang's ``DeepEPDispatcher`` calls. Combine returns the rank's part of
    the batch's output, ``(T, K)`` float64, and takes BF16 alone, like DeepEP's.

    Args:
        batch: see :func:`dispatch_tokens`; what is sent is not looked at.
        rank: which.
        ranks: how many.
        experts: on each.
    """

    def __init__(self, batch: Routing, rank: int, ranks: int, experts: int) -> None:
        self.batch, self.rank, self.group_size, self.experts = batch, rank, ranks, experts
        self.sent: Tokens | Slots | None = None

    def get_dispatch_layout(self, *_: Any, **__: Any) -> tuple[None, None, None, None, None]:
        """Nothing that SGLang looks into."""
        return None, None, None, None, None

    def dispatch(self, x: Any, **_: Any) -> tuple[Any, ...]:
        """Rows, ids, weights, counts, handle, event; E4M3 if ``x`` is a pair."""
        sent = dispatch_tokens(self.batch, self.rank, self.experts, isinstance(x, tuple))
        self.sent = sent
        rows = sent.rows if sent.row_scale is None else (sent.rows, sent.row_scale)
        return rows, sent.topk_ids, sent.topk_weights, [0] * self.experts, object(), _NoEvent()

    def combine(self, x: torch.Tensor, handle: object, **_: Any) -> tuple[Any, ...]:
        """Output, weights, event."""
        return self._back(x), None, _NoEvent()

    def low_latency_dispatch(
        self, x: torch.Tensor, ids: torch.Tensor, slots: int, experts: int, use_fp8: bool, **_: Any
    ) -> tuple[Any, ...]:
        """Rows, counts, handle, event, hook; ``slots`` for each rank's tokens."""
        most = slots * self.group_size
        self.sent = sent = dispatch_slots(self.batch, self.rank, self.experts, most, use_fp8)
        rows = sent.rows if sent.row_scale is None else (sent.rows, sent.row_scale)
        return rows, sent.masked_m, object(), None, lambda: None

    def low_latency_combine(self, *, x: torch.Tensor, **_: Any) -> tuple[Any, ...]:
        """Output, event, hook."""
        return self._back(x), None, lambda: None

    def _back(self, results: torch.Tensor) -> torch.Tensor:
        # The dtype switch of DeepEP's intranode combine has this one case: "Unsupported type".
        if results.dtype != torch.bfloat16 or not results.is_contiguous():
            raise TypeError(f"combine takes contiguous bfloat16, got {results.dtype}")
        assert self.sent is not None
        out = self.batch.x.new_zeros(self.batch.x.shape, dtype=torch.float64)
        self.sent.combine(results, out)
        return out


class _NoEvent:
    """What DeepEP records on a stream, where there is none."""

    def current_stream_wait(self) -> None:
        """Nothing to wait for."""
