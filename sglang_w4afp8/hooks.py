"""The table of upstream names this package relies on. Data only; :mod:`sglang_w4afp8.compat` checks it.

Adding a use of SGLang to ``srt/`` means adding a row here, with the reason. A row that is no longer
used goes away with its use.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from packaging.specifiers import SpecifierSet


class Kind(StrEnum):
    """What "fits" means for a hook."""

    OVERRIDE = "override"
    """We replace or subclass it: parameter names and order must match exactly."""
    CALL = "call"
    """We call it with these keywords: it must take them and require no others."""
    ATTRIBUTE = "attribute"
    """It must exist; with names: a dict literal with these keys, or a class with these members."""
    SOURCE = "source"
    """Its body must call ``callee`` with these keywords, after having set ``self.<after>``."""


@dataclass(frozen=True)
class Hook:
    """One upstream name.

    Attributes:
        target: ``package.module:Name.attribute``.
        kind: how to compare.
        names: parameters, keywords or keys, by kind; ``**`` stands for any keyword.
        why: what breaks without it, as half a sentence.
        used_by: our module.
        callee: for SOURCE, the call as written there.
        after: for SOURCE, attributes of self that must be set by then.
        versions: the SGLang versions it applies to; empty means all.
        every_process: False for what a process has proved by getting as far as registering.
    """

    target: str
    kind: Kind
    names: tuple[str, ...]
    why: str
    used_by: str
    callee: str = ""
    after: tuple[str, ...] = ()
    versions: str = ""
    every_process: bool = True

    def applies_to(self, version: str | None) -> bool:
        """Whether ``version`` needs this hook; an unknown version needs all."""
        if version is None or not self.versions:
            return True
        return SpecifierSet(self.versions).contains(version, prereleases=True)


_PLUGINS = "sglang.srt.plugins"
_QUANT = "sglang.srt.layers.quantization"
_W4AFP8 = f"{_QUANT}.w4afp8"
_MOE_LAYER = "sglang.srt.layers.moe.fused_moe_triton.layer"

_PLUGIN = "plugin.py"
_INSTALL = "srt/install.py"
_CONFIG = "srt/config.py"
_MOE = "srt/moe.py"
_LOADER = "srt/loader.py"
_LINEAR = "srt/linear.py"

_LOADER_ARGUMENTS = ("param", "loaded_weight", "weight_name", "shard_id", "expert_id")

_REGISTRATION = (
    Hook(
        f"{_PLUGINS}:load_plugins",
        Kind.CALL,
        (),
        "runs our entry point",
        _PLUGIN,
    ),
    Hook(
        f"{_PLUGINS}:GENERAL_PLUGINS_GROUP",
        Kind.ATTRIBUTE,
        (),
        "the entry point group of pyproject.toml",
        _PLUGIN,
    ),
    Hook(
        f"{_QUANT}:BASE_QUANTIZATION_METHODS",
        Kind.ATTRIBUTE,
        ("w4afp8",),
        "our config class takes this entry's place",
        _INSTALL,
    ),
    Hook(
        f"{_QUANT}:QUANTIZATION_METHODS",
        Kind.ATTRIBUTE,
        (),
        "the dict that model loading reads, changed in place",
        _INSTALL,
    ),
    Hook(
        f"{_QUANT}:get_quantization_config",
        Kind.CALL,
        ("quantization",),
        "resolves the name to our class",
        _INSTALL,
    ),
    # Each process that builds a model must run the plugins first, or it would use the stock method.
    *(
        Hook(
            target,
            Kind.SOURCE,
            (),
            "or this process would not know the plugin",
            _PLUGIN,
            callee="load_plugins",
            every_process=False,
        )
        for target in (
            "sglang.srt.managers.scheduler:run_scheduler_process",
            "sglang.srt.entrypoints.engine:Engine.__init__",
        )
    ),
)

_CONFIG_CLASS = (
    Hook(
        f"{_W4AFP8}:W4AFp8Config",
        Kind.CALL,
        (
            "is_checkpoint_fp8_serialized",
            "is_checkpoint_w4afp8_serialized",
            "linear_activation_scheme",
            "moe_activation_scheme",
            "ignored_layers",
            "weight_block_size",
            "group_size",
        ),
        "base class, built by our constructor",
        _CONFIG,
    ),
    Hook(
        f"{_W4AFP8}:W4AFp8Config.from_config",
        Kind.OVERRIDE,
        ("config",),
        "called with config.json's dict",
        _CONFIG,
    ),
    Hook(
        f"{_W4AFP8}:W4AFp8Config.get_quant_method",
        Kind.OVERRIDE,
        ("layer", "prefix"),
        "asked for each layer's method",
        _CONFIG,
    ),
    *(
        Hook(f"{_W4AFP8}:W4AFp8Config.{name}", Kind.OVERRIDE, (), "asked by the loader", _CONFIG)
        for name in (
            "get_name",
            "get_min_capability",
            "get_supported_act_dtypes",
            "get_config_filenames",
        )
    ),
    Hook(
        f"{_QUANT}.utils:is_layer_skipped",
        Kind.CALL,
        ("prefix", "ignored_layers"),
        "decides which linears stay unquantised",
        _CONFIG,
    ),
)

_MOE_METHOD = (
    Hook(
        f"{_W4AFP8}:W4AFp8MoEMethod",
        Kind.CALL,
        ("quant_config",),
        "base class; DeepEP asserts it with isinstance",
        _MOE,
    ),
    Hook(
        f"{_W4AFP8}:W4AFp8MoEMethod.create_weights",
        Kind.OVERRIDE,
        (
            "layer",
            "num_experts",
            "hidden_size",
            "intermediate_size_per_partition",
            "params_dtype",
            "**",
        ),
        "makes the parameters of a rank's shard",
        _MOE,
    ),
    Hook(
        f"{_W4AFP8}:W4AFp8MoEMethod.process_weights_after_loading",
        Kind.OVERRIDE,
        ("layer",),
        "checks completeness and prepares the backend",
        _MOE,
    ),
    Hook(
        f"{_W4AFP8}:W4AFp8MoEMethod.create_moe_runner",
        Kind.OVERRIDE,
        ("layer", "moe_runner_config"),
        "hands over top_k and the routed scaling factor",
        _MOE,
    ),
    Hook(
        f"{_W4AFP8}:W4AFp8MoEMethod.apply",
        Kind.OVERRIDE,
        ("layer", "dispatch_output"),
        "runs the layer",
        _MOE,
    ),
    Hook(
        "sglang.srt.layers.moe.token_dispatcher:StandardCombineInput",
        Kind.CALL,
        ("hidden_states",),
        "what apply() returns",
        _MOE,
    ),
    Hook(
        "sglang.srt.utils:set_weight_attrs",
        Kind.CALL,
        ("weight", "weight_attrs"),
        "attaches the loader to a parameter",
        _MOE,
    ),
)

_MOE_LAYER_HOOKS = (
    Hook(
        f"{_MOE_LAYER}:FusedMoE.__init__",
        Kind.SOURCE,
        (),
        "the method must know its rank when it is made",
        _MOE,
        callee="quant_config.get_quant_method",
        after=("moe_tp_rank", "moe_tp_size", "moe_ep_rank", "moe_ep_size", "layer_id"),
    ),
    Hook(
        f"{_MOE_LAYER}:FusedMoE.__init__",
        Kind.SOURCE,
        (
            "layer",
            "num_experts",
            "hidden_size",
            "intermediate_size_per_partition",
            "params_dtype",
            "weight_loader",
            "moe_intermediate_size",
        ),
        "the uncut expert size places a rank's columns",
        _MOE,
        callee="self.quant_method.create_weights",
    ),
    Hook(
        f"{_MOE_LAYER}:FusedMoE.run_moe_core",
        Kind.SOURCE,
        ("layer", "dispatch_output"),
        "the standard path ends in our apply()",
        _MOE,
        callee="self.quant_method.apply",
    ),
    Hook(
        f"{_MOE_LAYER}:FusedMoE.weight_loader",
        Kind.CALL,
        _LOADER_ARGUMENTS,
        "maps logical to physical expert ids",
        _LOADER,
    ),
    Hook(
        f"{_MOE_LAYER}:FusedMoE._weight_loader_impl",
        Kind.OVERRIDE,
        _LOADER_ARGUMENTS,
        "replaced on the layer by our slicing",
        _LOADER,
    ),
    # Both roads must reach the replacement, through the instance and by keyword.
    *(
        Hook(
            f"{_MOE_LAYER}:FusedMoE.{name}",
            Kind.SOURCE,
            _LOADER_ARGUMENTS,
            "must pass through the replaced attribute",
            _LOADER,
            callee="self._weight_loader_impl",
        )
        for name in ("weight_loader", "_weight_loader_physical")
    ),
    Hook(
        f"{_MOE_LAYER}:FusedMoE._map_global_expert_id_to_local_expert_id",
        Kind.CALL,
        ("expert_id",),
        "maps physical to local expert ids",
        _LOADER,
    ),
)

_LINEAR_HOOKS = (
    Hook(
        f"{_QUANT}.fp8:Fp8LinearMethod",
        Kind.CALL,
        ("quant_config",),
        "base class of the linears' method",
        _LINEAR,
    ),
    Hook(
        f"{_QUANT}.fp8:Fp8LinearMethod.create_weights",
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
        _LINEAR,
    ),
    Hook(
        f"{_QUANT}.fp8:Fp8LinearMethod.process_weights_after_loading",
        Kind.OVERRIDE,
        ("layer",),
        "keeps re-blocked scales away from block kernels",
        _LINEAR,
    ),
    Hook(
        f"{_QUANT}.fp8:Fp8LinearMethod.apply",
        Kind.OVERRIDE,
        ("layer", "x", "bias"),
        "multiplies a re-blocked weight",
        _LINEAR,
    ),
    Hook(
        f"{_QUANT}.fp8:Fp8LinearMethod.validate_block_quant_shapes",
        Kind.ATTRIBUTE,
        (),
        "the check that refuses such shards upstream",
        _LINEAR,
    ),
    Hook(
        "sglang.srt.layers.linear:WEIGHT_LOADER_V2_SUPPORTED",
        Kind.ATTRIBUTE,
        (),
        "a subclass of a linear method must be on this list by name",
        _LINEAR,
    ),
    *(
        Hook(
            f"sglang.srt.layers.linear:{name}.weight_loader_v2",
            Kind.ATTRIBUTE,
            (),
            "hands a parameter the whole tensor to cut",
            _LINEAR,
        )
        for name in (
            "ColumnParallelLinear",
            "MergedColumnParallelLinear",
            "RowParallelLinear",
        )
    ),
)

HOOKS: tuple[Hook, ...] = (
    *_REGISTRATION,
    *_CONFIG_CLASS,
    *_MOE_METHOD,
    *_MOE_LAYER_HOOKS,
    *_LINEAR_HOOKS,
)
