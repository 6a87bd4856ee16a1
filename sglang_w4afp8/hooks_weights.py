"""The part of the hook table that concerns weights and kernels; see :mod:`sglang_w4afp8.hooks`."""

from __future__ import annotations

from functools import partial

from sglang_w4afp8.contract import Hook, Kind

_QUANT = "sglang.srt.layers.quantization"
_FP8_LINEAR = f"{_QUANT}.fp8:Fp8LinearMethod"
_MOE_PACKAGE = "sglang.srt.layers.moe"
_FUSED_MOE = f"{_MOE_PACKAGE}.fused_moe_triton.layer:FusedMoE"
_LINEAR_LAYERS = "sglang.srt.layers.linear"

_LOADER_ARGUMENTS = ("param", "loaded_weight", "weight_name", "shard_id", "expert_id")

_loader = partial(Hook, used_by="srt/loader.py")
_LOADER = (
    _loader(
        f"{_FUSED_MOE}.weight_loader",
        Kind.CALL,
        _LOADER_ARGUMENTS,
        "maps logical to physical expert ids",
    ),
    _loader(
        f"{_FUSED_MOE}._weight_loader_impl",
        Kind.OVERRIDE,
        _LOADER_ARGUMENTS,
        "replaced on the layer by our slicing",
    ),
    # Both roads must reach the replacement, through the instance and by keyword.
    *(
        _loader(
            f"{_FUSED_MOE}.{name}",
            Kind.SOURCE,
            _LOADER_ARGUMENTS,
            "must pass through the replaced attribute",
            callee="self._weight_loader_impl",
        )
        for name in ("weight_loader", "_weight_loader_physical")
    ),
)

_linear = partial(Hook, used_by="srt/linear.py")
_LINEAR = (
    _linear(_FP8_LINEAR, Kind.CALL, ("quant_config",), "base class of the linears' method"),
    _linear(
        f"{_FP8_LINEAR}.create_weights",
        Kind.OVERRIDE,
        (
            "layer",
            "input_size_per_partition",
            "output_partition_sizes",
            "input_size",
            "output_size",
            "params_dtype",
            "skip_block_quant_check",
            "**",
        ),
        "makes scales for shards that are no whole blocks",
    ),
    _linear(
        f"{_FP8_LINEAR}.process_weights_after_loading",
        Kind.OVERRIDE,
        ("layer",),
        "keeps re-blocked scales away from block kernels",
    ),
    _linear(
        f"{_FP8_LINEAR}.apply",
        Kind.OVERRIDE,
        ("layer", "x", "bias"),
        "multiplies a re-blocked weight",
    ),
    *(
        _linear(
            f"{_LINEAR_LAYERS}:{name}.weight_loader_v2",
            Kind.ATTRIBUTE,
            (),
            "upstream's newer loader, which it picks by the method's class name",
        )
        for name in (
            "ColumnParallelLinear",
            "MergedColumnParallelLinear",
            "QKVParallelLinear",
            "RowParallelLinear",
        )
    ),
    # Up to 0.5.20 a linear has its rank, later the group it is sharded over.
    *(
        _linear(
            f"{_LINEAR_LAYERS}:{name}.tp_rank",
            Kind.ATTRIBUTE,
            (),
            "which part of the weight is this rank's",
            or_else=f"{_LINEAR_LAYERS}:get_group_rank_size",
        )
        for name in ("ColumnParallelLinear", "RowParallelLinear")
    ),
    _linear(
        f"{_LINEAR_LAYERS}:QKVParallelLinear.num_kv_head_replicas",
        Kind.ATTRIBUTE,
        (),
        "which k and v heads are this rank's",
    ),
    _linear(
        f"{_QUANT}.fp8_utils:triton_w8a8_block_fp8_linear",
        Kind.CALL,
        ("input", "weight", "block_size", "weight_scale", "bias"),
        "the block kernel that takes small blocks",
    ),
)

_cutlass = partial(Hook, used_by="srt/cutlass.py")
_CUTLASS = (
    _cutlass(
        f"{_MOE_PACKAGE}.cutlass_w4a8_moe:cutlass_w4a8_moe",
        Kind.OVERRIDE,
        (
            *("a", "w1_q", "w2_q", "w1_scale", "w2_scale", "topk_weights", "topk_ids"),
            *("a_strides1", "b_strides1", "c_strides1", "a_strides2", "b_strides2", "c_strides2"),
            *("s_strides13", "s_strides2", "expert_offsets", "problem_sizes1", "problem_sizes2"),
            *("a1_scale", "a2_scale", "apply_router_weight_on_input", "routed_scaling_factor"),
        ),
        "the Hopper kernel with its glue, called by position",
    ),
)

WEIGHT_HOOKS: tuple[Hook, ...] = (*_LOADER, *_LINEAR, *_CUTLASS)
