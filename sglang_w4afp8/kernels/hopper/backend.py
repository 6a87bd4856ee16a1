"""The ``hopper`` backend: our wgmma kernels for sm_90a, see :mod:`sglang_w4afp8.kernels.hopper`.

The call is a ``torch.library`` op with a fake implementation, so that torch.compile and CUDA
graphs see one opaque node. Whether the weights hold a −8 is written in their dtype after
``prepare``: uint8 if they do, int8 if not; SGLang's expert rebalancing moves rows and keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from sglang_w4afp8.errors import BackendError
from sglang_w4afp8.kernels.base import MoEProblem, MoEWeights
from sglang_w4afp8.kernels.hopper import build, driver, launch, launch_rows, plan, tables
from sglang_w4afp8.kernels.hopper.layout import pad_to_tiles, shuffle_in_place
from sglang_w4afp8.kernels.hopper.plan_rows import row_kernels
from sglang_w4afp8.packing import has_minus_eight
from sglang_w4afp8.spec import ActivationScheme

_SCHEMES = (ActivationScheme.STATIC, ActivationScheme.DYNAMIC_PER_TOKEN)


@dataclass(frozen=True)
class State:
    """What a prepared layer keeps beside its weights.

    Attributes:
        counters: see :func:`sglang_w4afp8.kernels.hopper.launch.new_counters`; None off the GPU.
        limits: which path a number of tokens takes.
    """

    counters: torch.Tensor | None
    limits: plan.Limits


class HopperBackend:
    """See the module."""

    name = "hopper"

    def supports(self, problem: MoEProblem) -> str | None:
        """Hopper, BF16, static or per-token scales, sizes in multiples of 32."""
        if problem.device.type != "cuda" or problem.device.capability != (9, 0):
            return f"{problem.device.name} is not a Hopper GPU (compute capability 9.0)"
        if problem.dtype is not torch.bfloat16:
            return f"{problem.dtype} hidden states (bfloat16 is built)"
        if problem.activation != "silu":
            return f"activation {problem.activation!r} is not implemented (silu is)"
        if problem.apply_router_weight_on_input:
            return "router weights on the input are not implemented"
        if problem.scheme not in _SCHEMES:
            return f"{problem.scheme} activations ({' and '.join(_SCHEMES)} are built)"
        return plan.why_not(
            problem.hidden_size,
            problem.intermediate_size,
            problem.num_experts,
            problem.group_size,
            problem.w2_group_size,
        )

    def prepare(self, problem: MoEProblem, weights: MoEWeights) -> MoEWeights:
        """Stage order, in the tensors' own storage, one expert at a time; builds the kernels.

        Sizes that are no multiples of 64 need a copy, filled up.

        Raises:
            BackendError: group scales that BF16 cannot hold.
        """
        weights = pad_to_tiles(weights)
        w13_scale, w2_scale = _as_bf16(weights.w13_scale), _as_bf16(weights.w2_scale)
        minus_eight = any(
            has_minus_eight(expert) for packed in (weights.w13, weights.w2) for expert in packed
        )
        w13, w2 = weights.w13.contiguous(), weights.w2.contiguous()
        shuffle_in_place(w13, w13_scale, True, minus_eight)
        shuffle_in_place(w2, w2_scale, False, minus_eight)
        dtype = torch.uint8 if minus_eight else torch.int8
        dynamic = problem.scheme is not ActivationScheme.STATIC
        top_k = problem.top_k or 8
        sizes = layer_of(w13, w2, w13_scale, w2_scale, top_k, minus_eight, dynamic)
        limits = tables.find(sizes, problem.device.name).limits
        counters = None
        if weights.w13.is_cuda:
            tables.log_once(sizes, problem.device.name)
            counters = launch.new_counters(weights.w13.device)
            # A graph capture must find the kernels loaded.
            properties = torch.cuda.get_device_properties(weights.w13.device)
            sms = properties.multi_processor_count
            needed = plan.kernels(replace(sizes, limits=limits), sms)
            if problem.dispatched:
                needed = tuple(dict.fromkeys((*needed, *row_kernels(sizes, sms))))
            build.build_all(needed)
            with torch.cuda.device(weights.w13.device):
                for kernel in needed:
                    driver.function(weights.w13.device.index or 0, kernel)
        return weights.replaced(
            w13=w13.view(dtype),
            w2=w2.view(dtype),
            w13_scale=w13_scale,
            w2_scale=w2_scale,
            state=State(counters, limits),
        )

    def run(
        self,
        problem: MoEProblem,
        weights: MoEWeights,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        routed_scaling_factor: float,
        x_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See :meth:`sglang_w4afp8.kernels.base.MoEBackend.run`."""
        static = problem.scheme is ActivationScheme.STATIC
        filled = weights.hidden_size - x.shape[1]
        out = hopper_moe(
            torch.nn.functional.pad(x, (0, filled)) if filled else x,
            topk_weights,
            topk_ids,
            weights.w13,
            weights.w13_scale,
            weights.w2,
            weights.w2_scale,
            weights.w13_input_scale if static else None,
            weights.w2_input_scale if static else None,
            weights.state.counters,
            weights.state.limits,
            routed_scaling_factor,
            x_scale,
        )
        return out[:, : x.shape[1]].contiguous() if filled else out

    def run_masked(
        self,
        problem: MoEProblem,
        weights: MoEWeights,
        rows: torch.Tensor,
        row_scale: torch.Tensor | None,
        masked_m: torch.Tensor,
        expected_m: int,
    ) -> torch.Tensor:
        """See :meth:`sglang_w4afp8.kernels.base.MoEBackend.run_masked`."""
        static = problem.scheme is ActivationScheme.STATIC
        filled = weights.hidden_size - rows.shape[2]
        out = hopper_moe_slots(
            torch.nn.functional.pad(rows, (0, filled)) if filled else rows,
            row_scale,
            masked_m,
            weights.w13,
            weights.w13_scale,
            weights.w2,
            weights.w2_scale,
            weights.w13_input_scale if static else None,
            weights.w2_input_scale if static else None,
            weights.state.counters,
            expected_m,
        )
        return out[..., : rows.shape[2]].contiguous() if filled else out


def _as_bf16(scale: torch.Tensor) -> torch.Tensor:
    if scale.dtype is torch.bfloat16:
        return scale.contiguous()
    rounded = scale.to(torch.bfloat16)
    if not torch.equal(rounded.to(scale.dtype), scale):
        raise BackendError(
            f"group scales in {scale.dtype}",
            "some are no BF16 numbers, and this kernel would round them",
            ["export SGLANG_W4AFP8_MOE_BACKEND=torch", "convert the checkpoint with BF16 scales"],
        )
    return rounded


def layer_of(
    w13: torch.Tensor,
    w2: torch.Tensor,
    w13_scale: torch.Tensor,
    w2_scale: torch.Tensor,
    top_k: int,
    minus_eight: bool,
    dynamic: bool,
    limits: plan.Limits | None = None,
) -> plan.Layer:
    """The sizes of prepared tensors; the others are as in :class:`plan.Layer`."""
    experts, hidden, half_inner = w2.shape
    return plan.Layer(
        experts,
        hidden,
        half_inner * 2,
        hidden // w13_scale.shape[2],
        half_inner * 2 // w2_scale.shape[2],
        top_k,
        minus_eight,
        dynamic,
        limits,
    )


@torch.library.custom_op("sglang_w4afp8::hopper_moe", mutates_args=())
def hopper_moe(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    w13_input_scale: torch.Tensor | None,
    w2_input_scale: torch.Tensor | None,
    counters: torch.Tensor,
    limits: list[int],
    routed_scaling_factor: float,
    x_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """One MoE layer; arguments as in :class:`sglang_w4afp8.kernels.hopper.launch.Tensors`.

    ``limits`` are the values of a :class:`sglang_w4afp8.kernels.hopper.plan.Limits`.

    ``counters`` is as it was when the op has run, so it is not declared as written: torch.compile
    would have to copy it around.

    Returns:
        ``(M, hidden)`` bfloat16.
    """
    dynamic = w13_input_scale is None
    layer = layer_of(
        w13,
        w2,
        w13_scale,
        w2_scale,
        topk_ids.shape[1],
        w13.dtype is torch.uint8,
        dynamic,
        plan.Limits(*limits),
    )
    tensors = launch.Tensors(
        x.contiguous(),
        topk_weights.to(torch.float32).contiguous(),
        topk_ids.contiguous(),
        w13,
        w13_scale,
        w2,
        w2_scale,
        w13_input_scale,
        w2_input_scale,
        counters,
        x_scale,
    )
    with torch.cuda.device(x.device):
        return launch.run(layer, tensors, routed_scaling_factor)


@hopper_moe.register_fake
def _(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    w13_input_scale: torch.Tensor | None,
    w2_input_scale: torch.Tensor | None,
    counters: torch.Tensor,
    limits: list[int],
    routed_scaling_factor: float,
    x_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=torch.bfloat16)


@torch.library.custom_op("sglang_w4afp8::hopper_moe_slots", mutates_args=())
def hopper_moe_slots(
    rows: torch.Tensor,
    row_scale: torch.Tensor | None,
    masked_m: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    w13_input_scale: torch.Tensor | None,
    w2_input_scale: torch.Tensor | None,
    counters: torch.Tensor,
    expected_m: int,
) -> torch.Tensor:
    """Each expert on its rows; arguments as in the class ``Slots`` of ``launch_rows``.

    Returns:
        ``(E, M, hidden)`` bfloat16, undefined behind ``masked_m``.
    """
    minus_eight, dynamic = w13.dtype is torch.uint8, w13_input_scale is None
    layer = layer_of(w13, w2, w13_scale, w2_scale, 1, minus_eight, dynamic)
    slots = launch_rows.Slots(
        rows.contiguous(),
        row_scale,
        masked_m.to(torch.int32).contiguous(),
        w13,
        w13_scale,
        w2,
        w2_scale,
        w13_input_scale,
        w2_input_scale,
        counters,
    )
    with torch.cuda.device(rows.device):
        return launch_rows.run_slots(layer, slots, expected_m)


@hopper_moe_slots.register_fake
def _(
    rows: torch.Tensor,
    row_scale: torch.Tensor | None,
    masked_m: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    w13_input_scale: torch.Tensor | None,
    w2_input_scale: torch.Tensor | None,
    counters: torch.Tensor,
    expected_m: int,
) -> torch.Tensor:
    return rows.new_empty(rows.shape, dtype=torch.bfloat16)
