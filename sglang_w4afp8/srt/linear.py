"""Block-FP8 linears whose shard is not a whole number of blocks.

SGLang refuses them ("Weight output_partition_size = 576 is not divisible by weight quantization
block_n = 128") or, with that check off, loads too few scales. A cut inside a block is harmless when
the rank's scales are re-blocked to the finer block ``gcd(shard, block)`` that no cut crosses: each
scale is repeated, no value changes (:mod:`sglang_w4afp8.sharding`). DeepSeek's dense MLP at tp 32:
18432 / 32 = 576 = 4.5 blocks of 128, local block 64.

Whenever a layer does divide, everything here steps aside: parameters, loader and kernels are
``Fp8LinearMethod``'s. Mirrors ``layers/quantization/fp8.py`` and the weight-loading contract of
``layers/linear.py`` in SGLang 0.5.16 … 0.5.23.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from sglang.srt.layers.quantization.fp8 import Fp8LinearMethod
from sglang.srt.utils import set_weight_attrs
from torch.nn import Parameter

from sglang_w4afp8.errors import CheckpointError, ConfigError
from sglang_w4afp8.layer import Device
from sglang_w4afp8.reference import dequantize_fp8_block
from sglang_w4afp8.sharding import AxisShard, LinearShard

if TYPE_CHECKING:
    from sglang_w4afp8.srt.config import ShardedW4AFp8Config


class ShardedFp8LinearMethod(Fp8LinearMethod):
    """Upstream's block-FP8 linear, and the re-blocked one where upstream's cannot be cut.

    Args:
        quant_config: the model's config.
        prefix: the layer's name, for messages.
    """

    def __init__(self, quant_config: ShardedW4AFp8Config, prefix: str) -> None:
        super().__init__(quant_config)
        self.prefix = prefix
        self.regrouped: RegroupedWeight | None = None

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        skip_block_quant_check: bool = False,
        **extra_weight_attrs: Any,
    ) -> None:
        """Allocate ``weight`` ``(N, K)`` float8_e4m3fn and ``weight_scale_inv`` float32.

        The scale has one row and column per block of the checkpoint where the shard divides, and
        per local block where it does not.

        Raises:
            ConfigError: the layer is pre-sharded by its model in a way that has no scale rule.
        """
        shard = _plan(
            layer,
            input_size,
            input_size_per_partition,
            output_partition_sizes,
            tuple(self.quant_config.weight_block_size),
        )
        if shard.divides:
            # Upstream picks its newer loader by the method's class name, which is not ours.
            extra_weight_attrs["weight_loader"] = getattr(
                layer, "weight_loader_v2", extra_weight_attrs.get("weight_loader")
            )
            super().create_weights(
                layer,
                input_size_per_partition,
                output_partition_sizes,
                input_size,
                output_size,
                params_dtype,
                skip_block_quant_check,
                **extra_weight_attrs,
            )
            return
        if getattr(layer, "use_presharded_weights", False):
            raise ConfigError(
                f"{self.prefix}: weights that the model has cut already",
                f"the shard of {output_partition_sizes} × {input_size_per_partition} is no whole "
                "number of FP8 blocks, and where it starts in the checkpoint is unknown",
                ["use a --tp at which the shard divides by the block"],
            )
        layer.logical_widths = output_partition_sizes
        layer.input_size_per_partition = input_size_per_partition
        layer.output_size_per_partition = sum(output_partition_sizes)
        layer.orig_dtype = params_dtype
        self.regrouped = RegroupedWeight(self.prefix, shard)
        self.regrouped.register(layer)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Upstream's step, or the completeness check of a re-blocked weight.

        Raises:
            CheckpointError: part of the weight or of its scales never arrived.
        """
        if self.regrouped is None:
            super().process_weights_after_loading(layer)
            return
        from sglang_w4afp8.srt import host

        if host.uses_weight_loaders():
            self.regrouped.check_complete()
        device = Device.of(layer.weight.device)
        if not device.keeps_fp8(self.prefix, self.regrouped.block):
            # Weight-only: an FP8 value times its scale, rounded once to the model dtype.
            dense = dequantize_fp8_block(
                layer.weight.data,
                layer.weight_scale_inv.data,
                self.regrouped.block,
                torch.float32,
            ).to(layer.orig_dtype)
            layer.weight = Parameter(dense, requires_grad=False)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``x @ weightᵀ + bias``: ``(…, K)`` to ``(…, N)`` in ``x``'s dtype."""
        if self.regrouped is None:
            return super().apply(layer, x, bias)
        if layer.weight.dtype != torch.float8_e4m3fn:
            return F.linear(x, layer.weight, bias)
        from sglang.srt.layers.quantization.fp8_utils import triton_w8a8_block_fp8_linear

        return triton_w8a8_block_fp8_linear(
            input=x,
            weight=layer.weight,
            block_size=list(self.regrouped.block),
            weight_scale=layer.weight_scale_inv,
            bias=bias,
        )


class RegroupedWeight:
    """One rank's re-blocked FP8 weight: its shape, its loader, what has arrived.

    Args:
        prefix: the layer's name.
        shard: this rank's part of each logical output and of the input axis.
    """

    def __init__(self, prefix: str, shard: LinearShard) -> None:
        self.prefix = prefix
        self.shard = shard
        self.rows = shard.rows
        self.columns = shard.columns
        self.block = shard.block
        self._arrived = {
            "weight": [False] * len(shard.rows),
            "weight_scale_inv": [False] * len(shard.rows),
        }

    def register(self, layer: torch.nn.Module) -> None:
        """Create ``weight`` and ``weight_scale_inv`` in ``layer``, with this object's loader."""
        shape = (self.shard.height, self.columns.size)
        weight = torch.empty(shape, dtype=torch.float8_e4m3fn)
        scale = torch.full(self.shard.scale_shape, float("nan"), dtype=torch.float32)
        for name, tensor in (("weight", weight), ("weight_scale_inv", scale)):
            parameter = Parameter(tensor, requires_grad=False)
            set_weight_attrs(parameter, {"weight_loader": self.load, "regrouped_name": name})
            layer.register_parameter(name, parameter)
        layer.register_parameter("input_scale", None)

    def load(
        self,
        param: Parameter,
        loaded_weight: torch.Tensor,
        loaded_shard_id: int | str | tuple[int, ...] | None = None,
    ) -> None:
        """Copy this rank's part of a checkpoint tensor.

        Args:
            param: one of the two parameters.
            loaded_weight: the whole tensor, ``(N, K)`` or its scales.
            loaded_shard_id: which logical output: an index, ``q`` ``k`` ``v``, several indices, or
                None when the tensor holds all of them.

        Raises:
            CheckpointError: wrong dtype or shape.
        """
        parts = self._parts(loaded_shard_id)
        is_scale = param.regrouped_name == "weight_scale_inv"
        heights = [_extent(self.rows[part], is_scale) for part in parts]
        width = _extent(self.columns, is_scale)
        self._check(loaded_weight, (sum(heights), width), param.regrouped_name, parts)
        start = 0
        for part, height in zip(parts, heights, strict=True):
            self._copy(param, loaded_weight[start : start + height], part, is_scale)
            start += height
            self._arrived[param.regrouped_name][part] = True

    def check_complete(self) -> None:
        """Raise if a logical output's weight or scale never arrived."""
        for name, arrived in self._arrived.items():
            if not all(arrived):
                raise CheckpointError(
                    f"{self.prefix}.{name}: {arrived.count(False)} of {len(arrived)} parts are not "
                    "in the checkpoint",
                    "the layer would compute with uninitialised memory",
                    [
                        "sglang-w4afp8 inspect CHECKPOINT lists everything that is missing",
                        "name the module in modules_to_not_convert if it is not FP8",
                    ],
                )

    def _parts(self, shard_id: int | str | tuple[int, ...] | None) -> list[int]:
        if shard_id is None:
            return list(range(len(self.rows)))
        if isinstance(shard_id, tuple):
            return list(shard_id)
        return ["qkv".index(shard_id) if isinstance(shard_id, str) else shard_id]

    def _check(
        self, loaded: torch.Tensor, expected: tuple[int, int], name: str, parts: list[int]
    ) -> None:
        if name == "weight" and loaded.dtype != torch.float8_e4m3fn:
            raise CheckpointError(
                f"{self.prefix}.weight has dtype {loaded.dtype}",
                "the config says that this linear is block FP8 (float8_e4m3fn)",
                [
                    "name the module in modules_to_not_convert if it is not FP8",
                    'set "weight_block_size": null if no linear is',
                ],
            )
        if tuple(loaded.shape) != expected:
            fused = f" ({len(parts)} outputs in one tensor)" if len(parts) > 1 else ""
            raise CheckpointError(
                f"{self.prefix}.{name} has shape {tuple(loaded.shape)}{fused}",
                f"sizes and weight_block_size {[self.rows[0].group, self.columns.group]} in "
                f"config.json make it {expected}",
                ["correct weight_block_size in config.json", "download the checkpoint again"],
            )
        if name == "weight_scale_inv" and len(parts) > 1:
            ragged = [s.full_size for s in self.rows[:-1] if s.full_size % s.group]
            if ragged:
                raise CheckpointError(
                    f"{self.prefix}.{name} holds {len(parts)} outputs and one has {ragged[0]} rows",
                    f"a block of {self.rows[0].group} rows would belong to two outputs",
                    ["store the outputs as separate tensors"],
                )

    def _copy(self, param: Parameter, loaded: torch.Tensor, part: int, is_scale: bool) -> None:
        rows, columns = self.rows[part], self.columns
        top = sum(shard.size for shard in self.rows[:part])
        if not is_scale:
            target = param.data[top : top + rows.size]
            target.copy_(loaded[rows.start : rows.stop, columns.start : columns.stop])
            return
        block_n, block_k = self.block
        target = param.data[top // block_n : (top + rows.size) // block_n]
        row_index = torch.tensor(rows.regrouped(block_n), device=loaded.device)
        column_index = torch.tensor(columns.regrouped(block_k), device=loaded.device)
        target.copy_(loaded[row_index][:, column_index])


def _extent(shard: AxisShard, is_scale: bool) -> int:
    """Elements, or scale blocks, that the checkpoint has along a whole axis."""
    return -(-shard.full_size // shard.group) if is_scale else shard.full_size


def _plan(
    layer: torch.nn.Module,
    input_size: int,
    input_size_per_partition: int,
    output_partition_sizes: list[int],
    block: tuple[int, int],
) -> LinearShard:
    """This rank's part of each logical output and of the input axis of a parallel linear."""
    tp_rank, tp_size = _rank_and_size(layer, "tp_group")
    if input_size_per_partition == input_size:
        columns = AxisShard(input_size, 0, input_size, block[1])
    else:
        start = tp_rank * input_size_per_partition
        columns = AxisShard(input_size, start, input_size_per_partition, block[1])
    is_column_parallel = getattr(layer, "output_partition_sizes", None) is not None
    rows = []
    for index, size in enumerate(output_partition_sizes):
        if not is_column_parallel:
            rows.append(AxisShard(size, 0, size, block[0]))
            continue
        if index > 0 and hasattr(layer, "total_num_kv_heads"):
            # k and v heads are replicated when there are fewer of them than ranks, and may be cut
            # by another group than q (SGLang 0.5.23).
            kv_rank, kv_size = _rank_and_size(layer, "kv_tp_group", default=(tp_rank, tp_size))
            copies = layer.num_kv_head_replicas
            rows.append(AxisShard.copied(size, block[0], kv_rank, kv_size, copies))
        else:
            rows.append(AxisShard.copied(size, block[0], tp_rank, tp_size, 1))
    return LinearShard(tuple(rows), columns)


def _rank_and_size(
    layer: torch.nn.Module, group: str, default: tuple[int, int] = (0, 1)
) -> tuple[int, int]:
    """Which part of how many a linear is: attributes up to 0.5.20, a group object since then."""
    if hasattr(layer, group):
        from sglang.srt.layers.linear import get_group_rank_size

        return get_group_rank_size(getattr(layer, group))
    if group == "tp_group" and hasattr(layer, "tp_size"):
        return layer.tp_rank, layer.tp_size
    return default
