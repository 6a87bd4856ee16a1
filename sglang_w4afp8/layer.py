"""One rank's MoE layer as data: the device, the problem, the weights.

The oracle, the kernels and the SGLang side all speak of a layer through these three. Nothing here
computes, and nothing knows SGLang.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from sglang_w4afp8.sharding import AxisShard
from sglang_w4afp8.spec import ActivationScheme

# Triton's FP8 dot takes K in multiples of 32 and the block kernel wants one scale per K tile.
_SMALLEST_KERNEL_BLOCK = 32


@dataclass(frozen=True)
class Device:
    """What a backend asks about the hardware.

    Attributes:
        type: ``cuda`` or ``cpu``.
        capability: CUDA compute capability, ``(9, 0)`` for Hopper; ``(0, 0)`` elsewhere.
        name: for messages.
    """

    type: str
    capability: tuple[int, int] = (0, 0)
    name: str = "cpu"

    @classmethod
    def of(cls, device: torch.device) -> Device:
        """Describe a torch device."""
        if device.type != "cuda":
            return cls(device.type, (0, 0), device.type)
        return cls(
            "cuda",
            torch.cuda.get_device_capability(device),
            torch.cuda.get_device_name(device),
        )

    def keeps_fp8(self, name: str, block: tuple[int, int]) -> bool:
        """Whether a linear that had to be re-blocked stays FP8 here.

        SGLang's Triton block kernel takes it unless the card has no FP8 or a block is too small.
        ``kv_b_proj`` never stays: MLA absorbs it (``deepseek_weight_loader.py``, SGLang 0.5.16 …
        0.5.23) and would read its scales at the config's block, whatever their shape. What does
        not stay is dequantised to the model's dtype at load.

        Args:
            name: the linear's name or the end of it.
            block: side lengths of the re-blocked scales.
        """
        has_fp8 = self.type == "cuda" and self.capability >= (8, 9)
        is_absorbed = name.endswith("kv_b_proj")
        return has_fp8 and not is_absorbed and min(block) >= _SMALLEST_KERNEL_BLOCK


@dataclass(frozen=True)
class MoEProblem:
    """One rank's MoE layer as known before any weight is loaded.

    Attributes:
        num_experts: experts on this rank.
        hidden_size: K.
        columns: this rank's part of the experts' intermediate axis N, with the checkpoint's group.
        group_size: INT4 codes per scale of gate and up; down's is ``columns.local_group``.
        top_k: experts per token, 0 if unknown.
        scheme: how expert inputs are quantised.
        device: where it runs.
        dtype: of the hidden states.
        activation: between gate and up, ``silu`` for all supported models.
        apply_router_weight_on_input: weigh inputs, not outputs.
        dispatched: a token dispatcher (DeepEP) brings the rows, perhaps in E4M3 and perhaps sorted
            to experts.
    """

    num_experts: int
    hidden_size: int
    columns: AxisShard
    group_size: int
    top_k: int
    scheme: ActivationScheme
    device: Device
    dtype: torch.dtype = torch.bfloat16
    activation: str = "silu"
    apply_router_weight_on_input: bool = False
    dispatched: bool = False

    @property
    def intermediate_size(self) -> int:
        """N of this rank."""
        return self.columns.size

    @property
    def w2_group_size(self) -> int:
        """INT4 codes per scale of this rank's down projection."""
        return self.columns.local_group


@dataclass(frozen=True)
class MoEWeights:
    """The tensors of a rank's MoE layer. The first dimension of each but the input scales is E.

    As loaded ("checkpoint order"); a backend's ``prepare`` returns another one whose tensors may
    have any shape, as long as E stays first: SGLang's expert rebalancing moves rows of them.

    Attributes:
        w13: ``(E, 2N, K/2)`` int8, gate rows then up rows.
        w13_scale: ``(E, 2N, K/w13_group_size)`` bfloat16 or float32.
        w2: ``(E, K, N/2)`` int8.
        w2_scale: ``(E, K, N/w2_group_size)`` like ``w13_scale``.
        w13_group_size: codes per scale along K.
        w2_group_size: codes per scale along N.
        w13_input_scale: ``(1,)`` float32 for the static scheme, else None.
        w2_input_scale: likewise for down.
        state: whatever a backend's ``prepare`` wants to find again in ``run``: descriptors, scratch
            memory. It lives and dies with the layer.
    """

    w13: torch.Tensor
    w13_scale: torch.Tensor
    w2: torch.Tensor
    w2_scale: torch.Tensor
    w13_group_size: int
    w2_group_size: int
    w13_input_scale: torch.Tensor | None = None
    w2_input_scale: torch.Tensor | None = None
    state: Any = None

    @property
    def num_experts(self) -> int:
        """E."""
        return self.w13.shape[0]

    @property
    def hidden_size(self) -> int:
        """K, in checkpoint order."""
        return self.w2.shape[1]

    def replaced(self, **fields: Any) -> MoEWeights:
        """A copy with some fields exchanged."""
        return replace(self, **fields)
