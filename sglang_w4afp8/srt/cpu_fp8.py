"""Block-FP8 linears and experts on a device without FP8 kernels.

Upstream's methods create, load and post-process FP8 weights on the CPU without complaint and then
launch a Triton kernel. ``install`` replaces that last step: weights are dequantised on the fly and
multiplied in the activation's dtype. Activations are *not* rounded to FP8, so outputs can be held
against a plain float model that uses the dequantised weights.

The patch looks at the device of the activations on every call, so a process with GPU tensors keeps
upstream's kernels. It belongs to the CPU platform and is never installed elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from sglang_w4afp8.errors import ShardError
from sglang_w4afp8.reference import dequantize_fp8_block

_INSTALLED = "_w4afp8_cpu"


def dequantize_blocks(
    weight: torch.Tensor, scale: torch.Tensor, block: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """Multiply every block of an FP8 weight by its scale.

    Args:
        weight: (..., N, K) float8_e4m3fn.
        scale: (..., ceil(N / block[0]), ceil(K / block[1])), any float dtype.
        block: rows and columns per scale.
        dtype: dtype of the result; the product is formed in float32.

    Returns:
        (..., N, K) in ``dtype``.

    Raises:
        ShardError: the scale grid does not cover the weight exactly.
    """
    rows, cols = weight.shape[-2:]
    grid = (-(-rows // block[0]), -(-cols // block[1]))
    if tuple(scale.shape[-2:]) != grid:
        raise ShardError(
            f"a scale grid of {tuple(scale.shape[-2:])} for an FP8 weight of {rows} x {cols} in "
            f"blocks of {block[0]} x {block[1]}",
            f"the grid must be {grid}; a shard that starts or ends inside a block needs its "
            "scales cut anew",
            [
                "choose a --tp-size whose shards are whole blocks",
                "--quantization w4afp8, which re-blocks the scales of such shards",
            ],
        )
    return dequantize_fp8_block(weight, scale, (block[0], block[1]), torch.float32).to(dtype)


def dequantize_linear(layer: torch.nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """Dequantise the block-FP8 weight of a linear layer to (N, K) in ``dtype``."""
    method: Any = layer.quant_method
    block = getattr(method, "weight_block_size", None) or method.quant_config.weight_block_size
    return dequantize_blocks(layer.weight, layer.weight_scale_inv, block, dtype)


def install() -> None:
    """Patch upstream's FP8 classes for CPU tensors; a second call does nothing."""
    from sglang.srt.layers.quantization import fp8

    if getattr(fp8.Fp8LinearMethod.apply, _INSTALLED, False):
        return
    fp8.Fp8LinearMethod.apply = _linear_apply(fp8.Fp8LinearMethod.apply)
    fp8.Fp8MoEMethod.apply = _moe_apply(fp8.Fp8MoEMethod.apply)
    fp8.Fp8MoEMethod.create_moe_runner = _moe_runner(fp8.Fp8MoEMethod.create_moe_runner)
    fp8.Fp8Config.get_supported_act_dtypes = classmethod(_act_dtypes)


def _act_dtypes(cls: type) -> list[torch.dtype]:
    """What ``--dtype`` may be: upstream's two, and float32, which only kernels rule out."""
    return [torch.bfloat16, torch.half, torch.float32]


def _linear_apply(upstream: Any) -> Any:
    def apply(
        self: Any, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        on_cpu = isinstance(x, torch.Tensor) and x.device.type == "cpu"
        if not (on_cpu and self.block_quant):
            return upstream(self, layer, x, bias)
        return F.linear(x, dequantize_linear(layer, x.dtype), bias)

    setattr(apply, _INSTALLED, True)
    return apply


def _moe_runner(upstream: Any) -> Any:
    def create_moe_runner(self: Any, layer: torch.nn.Module, moe_runner_config: Any) -> None:
        if layer.w13_weight.device.type != "cpu":
            upstream(self, layer, moe_runner_config)
            return
        # No runner: 0.5.23 then knows that apply() consumes plain top-k ids itself.
        self.moe_runner_config = moe_runner_config

    return create_moe_runner


def _moe_apply(upstream: Any) -> Any:
    def apply(self: Any, layer: torch.nn.Module, dispatch_output: Any) -> Any:
        x = dispatch_output.hidden_states
        if x.device.type != "cpu" or not self.block_quant:
            return upstream(self, layer, dispatch_output)
        from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput

        topk = dispatch_output.topk_output
        return StandardCombineInput(
            hidden_states=_experts(layer, x, topk.topk_ids, topk.topk_weights, self)
        )

    return apply


def _experts(
    layer: torch.nn.Module, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, method: Any
) -> torch.Tensor:
    """Sum of SwiGLU experts, one at a time: x (T, K), ids and weights (T, top_k) -> (T, K).

    Ids of -1 belong to experts of other ranks. ``routed_scaling_factor`` is not applied: off CUDA
    the DeepSeek model multiplies the experts' output itself.
    """
    block = method.weight_block_size
    out = torch.zeros_like(x)
    for expert in ids.unique().tolist():
        if expert < 0:
            continue
        tokens, slots = (ids == expert).nonzero(as_tuple=True)
        w13 = dequantize_blocks(
            layer.w13_weight[expert], layer.w13_weight_scale_inv[expert], block, x.dtype
        )
        w2 = dequantize_blocks(
            layer.w2_weight[expert], layer.w2_weight_scale_inv[expert], block, x.dtype
        )
        gate, up = F.linear(x[tokens], w13).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, w2) * weights[tokens, slots, None].to(x.dtype)
        out.index_add_(0, tokens, y)
    return out
