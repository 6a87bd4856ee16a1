"""The upstream names this package relies on. Data only; :mod:`sglang_w4afp8.compat` compares them.

Adding a use of SGLang to ``srt/`` means adding a row here, with the reason; a test compares the
imports there with this table. A row that is no longer used goes away with its use. The CPU
platform, ``virtual_*`` and ``peers/`` are not in it: they serve tests, demonstrations and the
bench, which fail by themselves.
"""

from __future__ import annotations

from functools import partial

from sglang_w4afp8.contract import Hook, Kind
from sglang_w4afp8.hooks_deepep import DEEPEP_HOOKS
from sglang_w4afp8.hooks_weights import WEIGHT_HOOKS

_PLUGINS = "sglang.srt.plugins"
_QUANT = "sglang.srt.layers.quantization"
_W4AFP8 = f"{_QUANT}.w4afp8"
_BASE = f"{_QUANT}.base_config"
_MOE_PACKAGE = "sglang.srt.layers.moe"
_FUSED_MOE = f"{_MOE_PACKAGE}.fused_moe_triton.layer:FusedMoE"
_LINEAR_LAYERS = "sglang.srt.layers.linear"

_plugin = partial(Hook, used_by="plugin.py")
_REGISTRATION = (
    _plugin(f"{_PLUGINS}:load_plugins", Kind.CALL, (), "runs our entry point"),
    _plugin(
        f"{_PLUGINS}:GENERAL_PLUGINS_GROUP",
        Kind.TEXT,
        ("'sglang.srt.plugins'",),
        "the group of our entry point",
    ),
    _plugin(
        f"{_QUANT}:get_quantization_config",
        Kind.CALL,
        ("quantization",),
        "resolves the name to our class",
    ),
    # Each process that builds a model must run the plugins first, or it would use the stock method.
    *(
        _plugin(
            target,
            Kind.SOURCE,
            (),
            "or this process would not know the plugin",
            callee="load_plugins",
            every_process=False,
        )
        for target in (
            "sglang.srt.managers.scheduler:run_scheduler_process",
            "sglang.srt.entrypoints.engine:Engine.__init__",
        )
    ),
)

_install = partial(Hook, used_by="srt/install.py")
_TABLES = (
    _install(
        f"{_QUANT}:BASE_QUANTIZATION_METHODS",
        Kind.ATTRIBUTE,
        ("w4afp8",),
        "our config class takes this entry's place",
    ),
    _install(
        f"{_QUANT}:QUANTIZATION_METHODS",
        Kind.ATTRIBUTE,
        (),
        "the dict that model loading reads, changed in place",
    ),
    _install(
        "sglang.srt.model_executor.model_runner_components.moe_ep_setup"
        ":check_quantized_moe_compatibility",
        Kind.OVERRIDE,
        ("model_config", "tp_size", "moe_ep_size", "moe_dp_size"),
        "lifted: refuses expert shards that are no whole number of FP8 blocks",
    ),
    _install(
        "sglang.srt.model_loader.weight_utils:get_quant_config",
        Kind.OVERRIDE,
        ("model_config", "load_config", "packed_modules_mapping", "remap_prefix"),
        "wrapped: says which model a config without arguments is for",
    ),
    _install(f"{_W4AFP8}:W4AFp8Config.get_name", Kind.CALL, (), "SGLang compares it as well"),
)

_host = partial(Hook, used_by="srt/host.py")
_HOST = (
    _host("sglang.srt.runtime_context:get_server_args", Kind.CALL, (), "--load-format, --tp"),
    _host(
        "sglang.srt.arg_groups.overrides:resolution_result",
        Kind.CALL,
        ("server_args", "field"),
        "arguments as SGLang decided them, where it records that beside them",
        optional=True,
    ),
    _host(
        "sglang.srt.configs.model_config:ModelConfig._parse_quant_hf_config",
        Kind.CALL,
        (),
        "whether a checkpoint has any quantization config",
        every_process=False,
    ),
    _host(
        "sglang.srt.configs.model_config:ModelConfig.__init__",
        Kind.TEXT,
        ("self.is_draft_model = is_draft_model", "self.hf_text_config = get_hf_text_config("),
        "which layer of the checkpoint an MTP module is",
        every_process=False,
    ),
    _host("sglang.srt.utils:is_cuda", Kind.CALL, (), "who applies routed_scaling_factor"),
    # On CUDA the method multiplies, elsewhere the model does; twice or never would be silent.
    *(
        _host(
            target,
            Kind.TEXT,
            ("not _is_cuda", "*= self.routed_scaling_factor"),
            "who applies routed_scaling_factor",
            every_process=False,
        )
        for target in (
            "sglang.srt.models.deepseek_v2:DeepseekV2MoE.forward_normal",
            "sglang.srt.models.glm4_moe:Glm4MoeSparseMoeBlock.forward_normal",
        )
    ),
)

_config = partial(Hook, used_by="srt/config.py")
_CONFIG = (
    _config(f"{_W4AFP8}:W4AFp8Config", Kind.ATTRIBUTE, (), "base class; SGLang tests for it"),
    _config(f"{_BASE}:QuantizationConfig.__init__", Kind.CALL, (), "the rest of the base class"),
    _config(
        f"{_BASE}:QuantizationConfig.packed_modules_mapping",
        Kind.ATTRIBUTE,
        (),
        "which checkpoint modules a fused linear consists of",
    ),
    _config(
        f"{_BASE}:QuantizationConfig.apply_weight_name_mapper",
        Kind.OVERRIDE,
        ("hf_to_sglang_mapper",),
        "renames the skip list",
    ),
    _config(
        "sglang.srt.models.utils:WeightsMapper.apply_list",
        Kind.OVERRIDE,
        ("values",),
        "renames the skip list",
    ),
    _config(
        f"{_BASE}:QuantizationConfig.override_quantization_method",
        Kind.OVERRIDE,
        ("hf_quant_cfg", "user_quant"),
        "claims checkpoints of other methods when asked by name",
    ),
    _config(
        "sglang.srt.configs.model_config:ModelConfig._verify_quantization",
        Kind.SOURCE,
        (),
        "or --quantization w4afp8 on another method's checkpoint would be refused",
        callee="method.override_quantization_method",
        every_process=False,
    ),
    _config(f"{_BASE}:QuantizeMethodBase", Kind.ATTRIBUTE, (), "what get_quant_method returns"),
    _config(
        f"{_W4AFP8}:W4AFp8Config.from_config",
        Kind.OVERRIDE,
        ("config",),
        "called with config.json's dict",
    ),
    _config(
        f"{_W4AFP8}:W4AFp8Config.get_quant_method",
        Kind.OVERRIDE,
        ("layer", "prefix"),
        "asked for each layer's method",
    ),
    *(
        _config(f"{_W4AFP8}:W4AFp8Config.{name}", Kind.OVERRIDE, (), "asked by the model loader")
        for name in ("get_min_capability", "get_supported_act_dtypes")
    ),
    _config(
        f"{_QUANT}.utils:is_layer_skipped",
        Kind.CALL,
        ("prefix", "ignored_layers", "fused_mapping"),
        "decides which linears stay unquantised",
    ),
    _config(f"{_QUANT}.unquant:UnquantizedLinearMethod", Kind.ATTRIBUTE, (), "skipped linears"),
    _config(f"{_LINEAR_LAYERS}:LinearBase", Kind.ATTRIBUTE, (), "tells linears from other layers"),
    _config(
        f"{_MOE_PACKAGE}.fused_moe_triton:FusedMoE",
        Kind.ATTRIBUTE,
        (),
        "tells experts from other layers",
    ),
    _config(
        f"{_FUSED_MOE}.__init__",
        Kind.SOURCE,
        (),
        "experts for which we return no method get the unquantised one",
        callee="UnquantizedFusedMoEMethod",
    ),
)

_moe = partial(Hook, used_by="srt/moe.py")
_MOE = (
    _moe(
        f"{_W4AFP8}:W4AFp8MoEMethod",
        Kind.CALL,
        ("quant_config",),
        "base class; DeepEP asserts it with isinstance",
    ),
    _moe(
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
    ),
    _moe(
        f"{_W4AFP8}:W4AFp8MoEMethod.process_weights_after_loading",
        Kind.OVERRIDE,
        ("layer",),
        "checks completeness and prepares the backend",
    ),
    _moe(
        f"{_W4AFP8}:W4AFp8MoEMethod.create_moe_runner",
        Kind.OVERRIDE,
        ("layer", "moe_runner_config"),
        "hands over top_k and the routed scaling factor",
    ),
    _moe(
        f"{_W4AFP8}:W4AFp8MoEMethod.apply",
        Kind.OVERRIDE,
        ("layer", "dispatch_output"),
        "runs the layer",
    ),
    _moe(
        f"{_MOE_PACKAGE}.moe_runner.base:MoeRunnerConfig",
        Kind.ATTRIBUTE,
        (
            "top_k",
            "params_dtype",
            "activation",
            "apply_router_weight_on_input",
            "routed_scaling_factor",
            # Asked for in order to refuse what the kernels do not compute.
            "is_gated",
            "no_combine",
            "gemm1_alpha",
            "gemm1_clamp_limit",
            "swiglu_limit",
        ),
        "what the layer computes",
    ),
    _moe(f"{_MOE_PACKAGE}.utils:get_moe_a2a_backend", Kind.CALL, (), "is a token dispatcher on"),
    _moe(f"{_MOE_PACKAGE}.utils:MoeA2ABackend.is_none", Kind.CALL, (), "is a token dispatcher on"),
    _moe(
        f"{_MOE_PACKAGE}.token_dispatcher.standard:StandardDispatchOutput",
        Kind.ATTRIBUTE,
        ("hidden_states", "topk_output"),
        "what apply() is given",
    ),
    _moe(
        f"{_MOE_PACKAGE}.topk:StandardTopKOutput",
        Kind.OVERRIDE,
        ("topk_weights", "topk_ids", "router_logits"),
        "unpacked in this order",
    ),
    _moe(
        f"{_MOE_PACKAGE}.token_dispatcher:StandardCombineInput",
        Kind.CALL,
        ("hidden_states",),
        "what apply() returns",
    ),
    _moe(
        "sglang.srt.utils:set_weight_attrs",
        Kind.OVERRIDE,
        ("weight", "weight_attrs"),
        "attaches the loader to a parameter",
    ),
    _moe(
        f"{_FUSED_MOE}.__init__",
        Kind.SOURCE,
        (),
        "the method must know its rank when it is made",
        callee="quant_config.get_quant_method",
        after=("moe_tp_rank", "moe_tp_size", "moe_ep_rank", "moe_ep_size"),
    ),
    _moe(
        f"{_FUSED_MOE}.__init__",
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
        callee="self.quant_method.create_weights",
    ),
    _moe(
        f"{_FUSED_MOE}.run_moe_core",
        Kind.SOURCE,
        ("layer", "dispatch_output"),
        "the standard path ends in our apply()",
        callee="self.quant_method.apply",
    ),
)

HOOKS: tuple[Hook, ...] = (
    *_REGISTRATION,
    *_TABLES,
    *_HOST,
    *_CONFIG,
    *_MOE,
    *DEEPEP_HOOKS,
    *WEIGHT_HOOKS,
)
