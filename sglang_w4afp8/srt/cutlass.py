"""The ``cutlass`` backend: sglang-kernel's grouped INT4 × FP8 GEMM with SGLang's glue, on Hopper.

It is what SGLang's own method runs. The kernel knows groups of 128 and one activation scale per
call, so a shard that starts or ends inside a group is given to it inside the smallest window of
whole groups (:attr:`~sglang_w4afp8.sharding.AxisShard.aligned`): zero codes around the shard, which
add nothing. Layout facts are those of ``layers/moe/cutlass_w4a8_moe.py`` in SGLang 0.5.16 … 0.5.23.

Nothing of SGLang is imported before the first forward, so ``doctor`` and ``plan`` can ask
:meth:`CutlassBackend.supports` anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_w4afp8.layer import MoEProblem, MoEWeights
from sglang_w4afp8.sharding import AxisShard
from sglang_w4afp8.spec import ActivationScheme

KERNEL_GROUP = 128


@dataclass
class _Workspace:
    """Stride and problem tensors that the kernel wants per layer, each indexed by expert."""

    hidden: torch.Tensor  # (E, 3) int64, all K
    gate_up: torch.Tensor  # (E, 3) int64, all 2N
    columns: torch.Tensor  # (E, 3) int64, all N
    expert_offsets: torch.Tensor  # (E + 1,) int32
    problem_sizes1: torch.Tensor  # (E, 3) int32
    problem_sizes2: torch.Tensor  # (E, 3) int32


class CutlassBackend:
    """See the module."""

    name = "cutlass"

    def supports(self, problem: MoEProblem) -> str | None:
        """Hopper, BF16, group 128, one activation scale per call."""
        device = problem.device
        if device.type != "cuda" or device.capability != (9, 0):
            capability = ".".join(map(str, device.capability))
            return f"compiled for Hopper (compute capability 9.0), found {device.name} {capability}"
        if problem.group_size != KERNEL_GROUP:
            return f"INT4 groups of {KERNEL_GROUP} only, the checkpoint has {problem.group_size}"
        if problem.scheme not in (ActivationScheme.STATIC, ActivationScheme.DYNAMIC_PER_TENSOR):
            return f"one activation scale per call, not {problem.scheme}"
        if problem.dtype != torch.bfloat16:
            return f"bfloat16 hidden states only, found {problem.dtype}"
        if problem.hidden_size % KERNEL_GROUP:
            return f"hidden size {problem.hidden_size} is no multiple of {KERNEL_GROUP}"
        if problem.dispatched:
            return "rows of a token dispatcher (DeepEP) are not wired to it"
        if problem.activation != "silu" or problem.apply_router_weight_on_input:
            return "silu and output-side router weights only"
        return None

    def prepare(self, problem: MoEProblem, weights: MoEWeights) -> MoEWeights:
        """Pad to whole groups where needed and interleave the scales as the kernel reads them."""
        padded = pad_to_groups(problem.columns, weights)
        return padded.replaced(
            w13_scale=interleave_scales(padded.w13_scale.to(torch.bfloat16)),
            w2_scale=interleave_scales(padded.w2_scale.to(torch.bfloat16)),
            # Per layer, because two streams may run two layers at once.
            state=_workspace(padded),
        )

    def run(
        self,
        problem: MoEProblem,
        weights: MoEWeights,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        routed_scaling_factor: float,
    ) -> torch.Tensor:
        """See :meth:`sglang_w4afp8.kernels.base.MoEBackend.run`."""
        if x.shape[0] == 0:
            return torch.empty_like(x)
        from sglang.srt.layers.moe.cutlass_w4a8_moe import cutlass_w4a8_moe

        work = weights.state
        return cutlass_w4a8_moe(
            x,
            weights.w13,
            weights.w2,
            weights.w13_scale,
            weights.w2_scale,
            topk_weights,
            topk_ids,
            work.hidden,
            work.hidden,
            work.gate_up,
            work.columns,
            work.columns,
            work.hidden,
            work.gate_up,
            work.hidden,
            work.expert_offsets,
            work.problem_sizes1,
            work.problem_sizes2,
            weights.w13_input_scale,
            weights.w2_input_scale,
            routed_scaling_factor=routed_scaling_factor,
        )


def _workspace(weights: MoEWeights) -> _Workspace:
    experts, gate_up, _ = weights.w13.shape
    device = weights.w13.device

    def strides(value: int) -> torch.Tensor:
        return torch.full((experts, 3), value, dtype=torch.int64, device=device)

    def sizes(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    return _Workspace(
        strides(weights.w2.shape[1]),
        strides(gate_up),
        strides(gate_up // 2),
        sizes(experts + 1),
        sizes(experts, 3),
        sizes(experts, 3),
    )


def pad_to_groups(columns: AxisShard, weights: MoEWeights) -> MoEWeights:
    """Put a rank's columns into the smallest window of whole groups, zero codes around them.

    Args:
        columns: the rank's part of the intermediate axis.
        weights: in checkpoint order, ``w2_group_size`` = ``columns.local_group``.

    Returns:
        Weights with N = ``columns.aligned.size`` and ``w2_group_size`` = ``columns.group``; the
        same storage where the shard is aligned already.
    """
    window = columns.aligned
    if columns.is_aligned and window.size == columns.size:
        return weights
    before = columns.start - window.start
    inside = slice(before, before + columns.size)
    experts, _, packed_hidden = weights.w13.shape
    groups = weights.w13_scale.shape[-1]
    hidden = weights.w2.shape[1]

    w13 = weights.w13.new_zeros(experts, 2, window.size, packed_hidden)
    w13[:, :, inside] = weights.w13.unflatten(1, (2, columns.size))
    w13_scale = weights.w13_scale.new_zeros(experts, 2, window.size, groups)
    w13_scale[:, :, inside] = weights.w13_scale.unflatten(1, (2, columns.size))
    w2 = weights.w2.new_zeros(experts, hidden, window.size // 2)
    w2[:, :, before // 2 : (before + columns.size) // 2] = weights.w2
    # One local group of each whole group is enough: the others repeat its scale.
    firsts = [
        columns.scale_columns.index(column) for column in dict.fromkeys(columns.scale_columns)
    ]
    w2_scale = weights.w2_scale[:, :, firsts].contiguous()
    return MoEWeights(
        w13=w13.flatten(1, 2),
        w13_scale=w13_scale.flatten(1, 2),
        w2=w2,
        w2_scale=w2_scale,
        w13_group_size=weights.w13_group_size,
        w2_group_size=columns.group,
        w13_input_scale=weights.w13_input_scale,
        w2_input_scale=weights.w2_input_scale,
    )


def interleave_scales(scales: torch.Tensor) -> torch.Tensor:
    """Four neighbouring groups of a row next to each other, or one where four do not divide.

    Args:
        scales: ``(E, rows, groups)``.

    Returns:
        ``(E, groups/a, rows·a)`` with a = 4 or 1: element ``[e, g, r·a + i]`` is the scale of row r
        and group ``g·a + i``.
    """
    lanes = 4 if scales.shape[-1] % 4 == 0 else 1
    return scales.unflatten(-1, (-1, lanes)).transpose(1, 2).flatten(2).contiguous()
