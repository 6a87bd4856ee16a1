"""Workspace and kernel arguments for rows that a token dispatcher sends."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from sglang_w4afp8.kernels.hopper.launch import (
    CombineParams,
    GemmParams,
    Join,
    RouteParams,
    Tensors,
    Workspace,
    counters_at,
    partial_bytes,
    pointer,
    start,
    strides,
)
from sglang_w4afp8.kernels.hopper.plan import Launch, Layer, Plan
from sglang_w4afp8.kernels.hopper.plan_rows import plan_slots, plan_tokens

_P, _I = ctypes.c_void_p, ctypes.c_int
_LATE = 1 << 30
"""Pairs of a call whose tiles gate and up cannot find themselves."""

Work = list[tuple[Launch, ctypes.Structure]]


class _RowGemmParams(GemmParams):
    """``GemmParams`` in gemm.cu with ``W4_ROW_SCALES``."""

    _fields_ = (  # type: ignore[assignment]
        ("row_scale", _P), ("slots", _I), ("scale_expert", _I), ("scale_slot", _I),
        ("scale_span", _I),
    )  # fmt: skip


class _MaskedParams(ctypes.Structure):
    """``MaskedParams`` in masked.cu."""

    _fields_ = (
        ("masked_m", _P), ("x", _P), ("xq", _P), ("x_scale", _P), ("a_scale", _P),
        ("header", _P), ("tile_expert", _P), ("columns", _P), ("experts", _I), ("slots", _I),
        ("hidden", _I), ("tile_tokens", _I),
    )  # fmt: skip


@dataclass(frozen=True)
class Slots:
    """The tensors of a call on rows that are sorted to experts.

    Attributes:
        rows: ``(E, M, hidden)`` contiguous, bfloat16 or float8_e4m3fn.
        row_scale: ``(E, M, hidden/128)`` float32 of any strides for the latter, else None.
        masked_m: ``(E,)`` int32, contiguous; a count beyond M means M, below 0 none.
        w13: this and the others as in :class:`~sglang_w4afp8.kernels.hopper.launch.Tensors`.
    """

    rows: torch.Tensor
    row_scale: torch.Tensor | None
    masked_m: torch.Tensor
    w13: torch.Tensor
    w13_scale: torch.Tensor
    w2: torch.Tensor
    w2_scale: torch.Tensor
    w13_input_scale: torch.Tensor | None
    w2_input_scale: torch.Tensor | None
    counters: torch.Tensor


class _Matrices:
    """Gate and up, and down: arguments that tokens and slots have in common.

    Args:
        layer: the sizes.
        chosen: the plan; its second and third launches are meant.
        t: the tensors.
        pairs: rows of results, each of one expert.
        top_k: rows of results of a row of input.
        more: further parts of the workspace with their bytes.
    """

    def __init__(
        self,
        layer: Layer,
        chosen: Plan,
        t: Tensors | Slots,
        pairs: int,
        top_k: int,
        more: dict[str, int],
    ) -> None:
        self.layer, self.t, self.pairs, self.top_k = layer, t, pairs, top_k
        _, self.up, self.down = chosen.launches[:3]
        self.counts = counters_at(t.counters, self.up, chosen)
        self.space = Workspace(
            t.w13.device,
            {
                "header": 16,
                "tile_expert": chosen.tiles * 4,
                "columns": chosen.tiles * self.up.tokens * 4,
                "q": pairs * layer.inner,
                "row_scale": pairs * 4,
                "inner": pairs * layer.inner * 4 if layer.dynamic else 0,
                "partial": partial_bytes(self.up),
                **more,
            },
        )
        at = self.space.at
        self.lists = (at["header"], at["tile_expert"], at["columns"])

    def launches(
        self,
        rows: int,
        scale: torch.Tensor | None,
        b_scale: int | None,
        y: int,
        ids: int | None = None,
        ids_are_64: int = 0,
    ) -> Work:
        """Both launches.

        Args:
            rows: address of the E4M3 rows.
            scale: ``(R, hidden/128)`` or ``(E, M, hidden/128)`` of them, or None.
            b_scale: address of their other scales, where ``scale`` is None.
            y: address of the results.
            ids: address of the ids, None for slots.
            ids_are_64: whether they are int64.
        """
        layer, t, at = self.layer, self.t, self.space.at
        dynamic, pairs = int(layer.dynamic), self.pairs if ids else _LATE
        common = (
            t.w13.data_ptr(), t.w13_scale.data_ptr(), rows, ids, *self.lists, b_scale,
            pointer(t.w2_input_scale), at["q"], at["row_scale"], at["inner"], None,
            Join(at["partial"], self.counts, layer.up.stages_per_unit),
            self.counts + self.up.grid[0] * 8, 2 * layer.inner, layer.hidden, layer.up.blocks,
            self.top_k, self.up.ring, dynamic, pairs, layer.experts, ids_are_64,
        )  # fmt: skip
        up = GemmParams(*common) if scale is None else _RowGemmParams(*common, *_strided(scale))
        down = GemmParams(
            t.w2.data_ptr(), t.w2_scale.data_ptr(), at["q"], ids, *self.lists,
            at["row_scale"] if dynamic else pointer(t.w2_input_scale), None, None, None, None, y,
            Join(None, None, layer.down.stages_per_unit), None, layer.hidden, layer.inner,
            layer.down.blocks, self.top_k, self.down.ring, dynamic, pairs, layer.experts,
            ids_are_64,
        )  # fmt: skip
        up.workspace = self.space  # lives as long as the launches may be made
        return [(self.up, up), (self.down, down)]


def _strided(scale: torch.Tensor) -> tuple[int, ...]:
    """Address; rows of an expert; strides of expert, row and span."""
    by_expert = scale if scale.dim() == 3 else scale.unsqueeze(0)
    return (scale.data_ptr(), by_expert.shape[1], *strides(by_expert))


def launches_tokens(layer: Layer, t: Tensors, out: torch.Tensor, factor: float, sms: int) -> Work:
    """The launches for E4M3 tokens; see ``launches`` of the module ``launch``."""
    tokens = t.x.shape[0]
    chosen, pairs = plan_tokens(layer, tokens, sms), tokens * layer.top_k
    matrices = _Matrices(layer, chosen, t, pairs, layer.top_k, {"y": pairs * layer.hidden * 2})
    ids, ids_are_64 = t.topk_ids.data_ptr(), int(t.topk_ids.dtype == torch.int64)
    y = matrices.space.at["y"]
    route = RouteParams(
        None, ids, None, None, None, *matrices.lists, pairs, layer.top_k, layer.hidden,
        layer.experts, matrices.up.tokens, ids_are_64,
    )  # fmt: skip
    combine = CombineParams(
        y, t.topk_weights.data_ptr(), ids, out.data_ptr(), factor, layer.hidden, layer.top_k,
        layer.experts, ids_are_64,
    )  # fmt: skip
    return [
        (chosen.launches[0], route),
        *matrices.launches(t.x.data_ptr(), t.x_scale, None, y, ids, ids_are_64),
        (chosen.launches[3], combine),
    ]


def launches_slots(layer: Layer, t: Slots, out: torch.Tensor, expected: int, sms: int) -> Work:
    """The launches for slots, M at least 1.

    Args:
        layer: the sizes.
        t: the tensors.
        out: ``(E, M, hidden)`` bfloat16; rows behind the counts are not written.
        expected: see :func:`sglang_w4afp8.kernels.hopper.plan_rows.plan_slots`.
        sms: multiprocessors.
    """
    slots = t.rows.shape[1]
    pairs = layer.experts * slots
    bf16 = t.row_scale is None
    chosen = plan_slots(layer, slots, expected, sms, not bf16)
    more = {"xq": pairs * layer.hidden, "x_scale": pairs * 4} if bf16 else {}
    matrices = _Matrices(layer, chosen, t, pairs, 1, more)
    at = matrices.space.at
    masked = _MaskedParams(
        t.masked_m.data_ptr(), t.rows.data_ptr(), at.get("xq"), at.get("x_scale"),
        pointer(t.w13_input_scale), *matrices.lists, layer.experts, slots, layer.hidden,
        matrices.up.tokens,
    )  # fmt: skip
    rows = at["xq"] if bf16 else t.rows.data_ptr()
    b_scale = at.get("x_scale") if layer.dynamic else pointer(t.w13_input_scale)
    work = matrices.launches(rows, t.row_scale, b_scale, out.data_ptr())
    return [(chosen.launches[0], masked), *work]


def run_slots(layer: Layer, t: Slots, expected: int) -> torch.Tensor:
    """Each row's result, ``(E, M, hidden)`` bfloat16, undefined behind the counts."""
    device = t.rows.device
    out = torch.empty(t.rows.shape, dtype=torch.bfloat16, device=device)
    if t.rows.shape[1]:
        sms = torch.cuda.get_device_properties(device).multi_processor_count
        start(launches_slots(layer, t, out, expected, sms), device, first_depends=True)
    return out
