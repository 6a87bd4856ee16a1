"""The part of the hook table that concerns token dispatchers; see :mod:`sglang_w4afp8.hooks`."""

from __future__ import annotations

from functools import partial

from sglang_w4afp8.contract import Hook, Kind

_METHOD = "sglang.srt.layers.quantization.w4afp8:W4AFp8MoEMethod"
_MOE_PACKAGE = "sglang.srt.layers.moe"
_DISPATCHER = f"{_MOE_PACKAGE}.token_dispatcher"
_EP_MOE = f"{_MOE_PACKAGE}.ep_moe.layer:DeepEPMoE"

_ROWS = ("hidden_states", "hidden_states_scale", "topk_ids", "topk_weights")
_FORMATS = {
    # Name of the mode: method of DeepEPMoE that calls us, class of rows, their fields beside _ROWS.
    "normal": ("forward_cutlass_w4afp8", "Normal", ()),
    "ll": ("forward_cutlass_w4afp8_masked", "LL", ("masked_m", "expected_m")),
}

_deepep = partial(Hook, used_by="srt/deepep.py")


def _mode(name: str) -> tuple[Hook, ...]:
    caller, form, fields = _FORMATS[name]
    return (
        _deepep(
            f"{_METHOD}.apply_deepep_{name}",
            Kind.OVERRIDE,
            ("layer", "dispatch_output"),
            "runs the rows of a dispatcher",
        ),
        _deepep(
            f"{_EP_MOE}.{caller}",
            Kind.SOURCE,
            ("layer", "dispatch_output"),
            "the dispatcher's path ends in our method",
            callee=f"self.quant_method.apply_deepep_{name}",
        ),
        _deepep(
            f"{_DISPATCHER}.deepep:DeepEP{form}DispatchOutput",
            Kind.ATTRIBUTE,
            (*_ROWS, *fields),
            "what the method is given",
        ),
        _deepep(
            f"{_DISPATCHER}:DeepEP{form}CombineInput",
            Kind.CALL,
            ("hidden_states", "topk_ids", "topk_weights"),
            "what apply() returns for such rows",
        ),
        _deepep(
            f"{_DISPATCHER}.base:DispatchOutputFormat.is_deepep_{name}",
            Kind.CALL,
            (),
            "tells such rows from standard ones",
        ),
    )


DEEPEP_HOOKS: tuple[Hook, ...] = (
    *_mode("normal"),
    *_mode("ll"),
    _deepep(
        f"{_DISPATCHER}.base:BaseDispatcher.set_quant_config",
        Kind.OVERRIDE,
        ("quant_config",),
        "says in which form rows should come",
    ),
    _deepep(
        f"{_MOE_PACKAGE}.utils:get_deepep_output_dtype",
        Kind.TEXT,
        ("self.quant_config.get('dispatcher_output_dtype', None)",),
        "or rows would come in another form than asked for, which is slower and not wrong",
        every_process=False,
    ),
    _deepep(
        f"{_MOE_PACKAGE}.fused_moe_triton.layer:FusedMoE.set_overlap_args",
        Kind.TEXT,
        ("self.down_gemm_overlap_args = ",),
        "or a combine that waits for signals would hang instead of being refused",
        every_process=False,
    ),
    # Once: the entry points leave it to the model on every platform.
    *(
        _deepep(
            target,
            Kind.TEXT,
            ("self.routed_scaling_factor",),
            "the model scales what combine returns",
            every_process=False,
        )
        for target in (
            "sglang.srt.models.deepseek_v2:DeepseekV2MoE.forward_deepep",
            "sglang.srt.models.glm4_moe:Glm4MoeSparseMoeBlock.forward_deepep",
        )
    ),
)
