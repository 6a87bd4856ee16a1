"""The FusedMoE method: parameters, loading, one post-processing step, forward.

The road: ``create_weights`` plans this rank's slices and allocates them; an
:class:`~sglang_w4afp8.srt.loader.ExpertLoader` fills them; ``process_weights_after_loading`` checks
that everything came and lets the chosen backend reorder it, layer by layer, so that loading peaks
one layer above the final size; ``apply`` runs the backend. Mirrors ``W4AFp8MoEMethod`` of SGLang
0.5.16 … 0.5.23.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.quantization.w4afp8 import W4AFp8MoEMethod
from sglang.srt.utils import set_weight_attrs
from torch.nn import Parameter

from sglang_w4afp8.errors import BackendError, ConfigError
from sglang_w4afp8.kernels.base import MoEBackend
from sglang_w4afp8.kernels.registry import select
from sglang_w4afp8.layer import Device, MoEProblem, MoEWeights
from sglang_w4afp8.sharding import ExpertShard
from sglang_w4afp8.spec import ActivationScheme
from sglang_w4afp8.srt import host
from sglang_w4afp8.srt.deepep import DISPATCHERS, DispatchedRows
from sglang_w4afp8.srt.importer import ExpertImporter
from sglang_w4afp8.srt.loader import PART, ExpertLoader

if TYPE_CHECKING:
    from sglang.srt.layers.moe import MoeRunnerConfig
    from sglang.srt.layers.moe.token_dispatcher import CombineInput, StandardDispatchOutput

    from sglang_w4afp8.srt.config import ShardedW4AFp8Config

logger = logging.getLogger(__name__)

_PARAMETERS = ("w13_weight", "w13_weight_scale_inv", "w2_weight", "w2_weight_scale_inv")


def choose_moe_method(
    config: ShardedW4AFp8Config, layer: torch.nn.Module, prefix: str
) -> W4AFp8MoEMethod:
    """Our method, or upstream's for a token dispatcher that ours has no entry point for.

    Raises:
        BackendError: such a dispatcher is on, and upstream's method would be wrong for this model.
    """
    from sglang.srt.layers.moe.utils import get_moe_a2a_backend

    a2a = get_moe_a2a_backend()
    if a2a.is_none() or a2a.value in DISPATCHERS:
        return ShardedW4AFp8MoEMethod(config, prefix, dispatched=not a2a.is_none())
    columns = layer.intermediate_size_per_partition
    fits = (
        config.group_size == 128
        and config.spec.moe_activation is ActivationScheme.STATIC
        and columns % 128 == 0
    )
    if not fits:
        raise BackendError(
            f"--moe-a2a-backend {a2a.value} with group_size {config.group_size}, "
            f"{config.spec.moe_activation} activations and {columns} columns a rank ({prefix})",
            "that dispatcher runs SGLang's own kernels, which know group_size 128, static "
            "activation scales and multiples of 128 columns only",
            [
                "--moe-a2a-backend none",
                f"--moe-a2a-backend {DISPATCHERS[0]}, which runs this package's kernels",
                "--ep-size equal to --tp, which keeps experts whole",
            ],
        )
    if config.moe_layers == 1 and host.is_rank_zero():
        logger.warning(
            "sglang-w4afp8: --moe-a2a-backend %s: experts run SGLang's own w4afp8 method",
            a2a.value,
        )
    return W4AFp8MoEMethod(config)


class ShardedW4AFp8MoEMethod(DispatchedRows, W4AFp8MoEMethod):
    """W4AFP8 experts of one layer on one rank.

    Args:
        quant_config: the model's config.
        prefix: the layer's name; messages start with it.
        dispatched: rows come through :class:`~sglang_w4afp8.srt.deepep.DispatchedRows`.
    """

    def __init__(
        self, quant_config: ShardedW4AFp8Config, prefix: str, dispatched: bool = False
    ) -> None:
        super().__init__(quant_config)
        self.prefix = prefix
        self.dispatched = dispatched
        self.backend: MoEBackend | None = None
        self.input_scales: list[torch.Tensor] | None = None

    def create_weights(
        self,
        layer: torch.nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Allocate this rank's parameters and put our loader into the layer.

        Registers, for E = ``num_experts`` slots, K = ``hidden_size`` and N columns of this rank::

            w13_weight            (E, 2N, K/2)          int8   gate rows, then up rows
            w13_weight_scale_inv  (E, 2N, K/group)      bf16   float32 in a float32 model
            w2_weight             (E, K, N/2)           int8
            w2_weight_scale_inv   (E, K, N/local group) like w13's
            w13_input_scale       (E, 2)                float32
            w2_input_scale        (E,)                  float32

        Raises:
            ShardError: the sizes cannot be cut or packed.
            ConfigError: the layer has biases or fused expert tensors, which W4AFP8 has no form for.
        """
        if extra_weight_attrs.pop("with_bias", False):
            raise ConfigError(
                f"{self.prefix}: experts with biases",
                "W4AFP8 checkpoints have no expert biases and the kernels add none",
                ["serve with the quantization method that the checkpoint was made for"],
            )
        loader = extra_weight_attrs["weight_loader"]
        if getattr(loader, "__name__", "") == "weight_loader_fused":
            raise ConfigError(
                f"{self.prefix}: one tensor holds all experts of a projection",
                "packed INT4 experts are stored one by one, as in every public W4AFP8 checkpoint",
                [
                    "save the source with a tensor for each expert, then sglang-w4afp8 convert",
                    "serve with the quantization method that the checkpoint was made for",
                ],
            )
        full_size = extra_weight_attrs.pop(
            "moe_intermediate_size", intermediate_size_per_partition * layer.moe_tp_size
        )
        group = self.quant_config.group_size
        shard = ExpertShard.plan(
            hidden_size, full_size, group, layer.moe_tp_rank, layer.moe_tp_size, self.prefix
        )
        if shard.columns.size != intermediate_size_per_partition:
            raise ConfigError(
                f"{self.prefix}: {intermediate_size_per_partition} columns a rank where "
                f"{full_size} / {layer.moe_tp_size} = {shard.columns.size}",
                "another MoE runner backend has padded the experts",
                ["--moe-runner-backend auto"],
            )
        self.shard = shard
        self.scheme = self.quant_config.spec.moe_activation
        source = self.quant_config.source
        self.experts_loader = ExpertLoader(
            self.prefix,
            shard,
            num_experts,
            layer.moe_ep_rank * num_experts,
            None if source is None else ExpertImporter(source, shard),
        )
        # The mapping of checkpoint experts to slots stays FusedMoE's; see srt/loader.py.
        layer._weight_loader_impl = self.experts_loader

        columns = shard.columns.size
        scale_dtype = torch.float32 if params_dtype == torch.float32 else torch.bfloat16
        # Scales and input scales start as NaN: what is never written cannot pass for a number.
        tensors = {
            "w13_weight": torch.empty(num_experts, 2 * columns, hidden_size // 2, dtype=torch.int8),
            "w13_weight_scale_inv": torch.full(
                (num_experts, 2 * columns, hidden_size // group), float("nan"), dtype=scale_dtype
            ),
            "w2_weight": torch.empty(num_experts, hidden_size, columns // 2, dtype=torch.int8),
            "w2_weight_scale_inv": torch.full(
                (num_experts, hidden_size, columns // shard.w2_group_size),
                float("nan"),
                dtype=scale_dtype,
            ),
            "w13_input_scale": torch.full((num_experts, 2), float("nan"), dtype=torch.float32),
            "w2_input_scale": torch.full((num_experts,), float("nan"), dtype=torch.float32),
        }
        # A foreign checkpoint's tensors need parameters of their names to arrive for.
        self.guests = [
            f"{gemm}_{part}"
            for part in (source.parts if source else ())
            for gemm in ("w13", "w2")
            if f"{gemm}_{part}" not in tensors
        ]
        tensors |= {name: torch.empty(num_experts, 0) for name in self.guests}
        for name, tensor in tensors.items():
            parameter = Parameter(tensor, requires_grad=False)
            layer.register_parameter(name, parameter)
            part = name.partition("_")[2]
            set_weight_attrs(parameter, {**extra_weight_attrs, PART: part})
            self.experts_loader.parameters[name] = parameter
        scales = self.quant_config.act_scales_of(self.prefix)
        if scales is not None:
            for gemm, value in scales.items():
                self.experts_loader.parameters[f"{gemm}_input_scale"].data.fill_(value)
            self.experts_loader.arrived["input_scale"].fill_(True)

    def create_moe_runner(self, layer: torch.nn.Module, moe_runner_config: MoeRunnerConfig) -> None:
        """Keep the runner config and choose the backend, before anything is loaded.

        Raises:
            BackendError: no backend can run this layer.
        """
        self.moe_runner_config = moe_runner_config
        self._refuse_unsupported(moe_runner_config)
        self.problem = MoEProblem(
            num_experts=layer.w13_weight.shape[0],
            hidden_size=self.shard.hidden_size,
            columns=self.shard.columns,
            group_size=self.shard.group_size,
            top_k=moe_runner_config.top_k or 0,
            scheme=self.scheme,
            device=Device.of(layer.w13_weight.device),
            dtype=moe_runner_config.params_dtype or torch.bfloat16,
            activation=moe_runner_config.activation,
            apply_router_weight_on_input=moe_runner_config.apply_router_weight_on_input,
            dispatched=self.dispatched,
        )
        self.backend = select(self.problem)
        if host.model_scales_routed_output():
            self.routed_scaling_factor = 1.0
        else:
            self.routed_scaling_factor = moe_runner_config.routed_scaling_factor or 1.0

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Check completeness, reduce input scales, let the backend reorder the weights.

        Raises:
            CheckpointError: a tensor never arrived.
        """
        if host.uses_weight_loaders():
            self.experts_loader.check_complete(self.scheme is ActivationScheme.STATIC)
            for name in self.guests:
                if self.experts_loader.parameters.pop(name, None) is not None:
                    delattr(layer, name)
        elif host.load_format() == "dummy":
            self._fill_dummy(layer)
        if self.scheme is ActivationScheme.STATIC:
            # One scale per layer and GEMM, as the kernels take it: the largest, so nothing clips.
            largest = [layer.w13_input_scale.data.amax(), layer.w2_input_scale.data.amax()]
            if self.input_scales is None:
                self.input_scales = [scale.reshape(1).clone() for scale in largest]
            for held, scale in zip(self.input_scales, largest, strict=True):
                held.copy_(scale)  # in place: CUDA graphs may know its address
        loaded = self._weights(layer)
        prepared = self.backend.prepare(self.problem, loaded)
        if prepared is not loaded:
            tensors = (prepared.w13, prepared.w13_scale, prepared.w2, prepared.w2_scale)
            for name, tensor in zip(_PARAMETERS, tensors, strict=True):
                self._replace(layer, name, tensor)
                # The loader must not keep the memory that the reordered tensor replaces.
                self.experts_loader.parameters[name] = getattr(layer, name)
        self.weights = self._weights(layer, prepared.state)
        if self.dispatched:
            self.ask_for_rows(layer)
        self._log_model()

    def apply(
        self, layer: torch.nn.Module, dispatch_output: StandardDispatchOutput
    ) -> CombineInput:
        """Run the layer on this rank's experts.

        Args:
            layer: the ``FusedMoE``.
            dispatch_output: hidden states ``(T, K)`` and standard top-k output, ids local, −1 for
                experts of other ranks.

        Returns:
            ``(T, K)``: this rank's partial sum; the all-reduce follows outside.
        """
        from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput

        if self.dispatched and (combine_input := self.apply_dispatched(layer, dispatch_output)):
            return combine_input
        topk_weights, topk_ids, _ = dispatch_output.topk_output
        output = self.backend.run(
            self.problem,
            self._current(layer),
            dispatch_output.hidden_states,
            topk_weights,
            topk_ids,
            self.routed_scaling_factor,
        )
        return StandardCombineInput(hidden_states=output)

    def _current(self, layer: torch.nn.Module) -> MoEWeights:
        """The weights to run with: CPU offloading moves a parameter's data between calls."""
        if self.weights.w13.data_ptr() != layer.w13_weight.data_ptr():
            self.weights = self._weights(layer, self.weights.state)
        return self.weights

    def _weights(self, layer: torch.nn.Module, state: Any = None) -> MoEWeights:
        scales = self.input_scales or (None, None)
        return MoEWeights(
            w13=layer.w13_weight.data,
            w13_scale=layer.w13_weight_scale_inv.data,
            w2=layer.w2_weight.data,
            w2_scale=layer.w2_weight_scale_inv.data,
            w13_group_size=self.shard.group_size,
            w2_group_size=self.shard.w2_group_size,
            w13_input_scale=scales[0],
            w2_input_scale=scales[1],
            state=state,
        )

    def _replace(self, layer: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
        """Put a reordered tensor in parameter ``name``'s place, even if the storage is the same.

        The dtype may tell a kernel something, and a later weight update must not copy checkpoint
        order into the kernel's order.
        """
        parameter = Parameter(tensor, requires_grad=False)
        set_weight_attrs(parameter, {"weight_loader": self._refuse_reload})
        setattr(layer, name, parameter)

    def _refuse_reload(self, *args: Any, **kwargs: Any) -> None:
        raise BackendError(
            f"{self.prefix}: new weights for a running model",
            f"backend {self.backend.name!r} has reordered the loaded weights and cannot take "
            "checkpoint tensors any more",
            [
                "restart the server with the new checkpoint",
                "SGLANG_W4AFP8_MOE_BACKEND=torch keeps checkpoint order",
            ],
        )

    def _fill_dummy(self, layer: torch.nn.Module) -> None:
        """Plausible values for ``--load-format dummy``, which leaves int8 tensors uninitialised."""
        generator = torch.Generator(device=layer.w13_weight.device).manual_seed(1234)
        for name in ("w13_weight", "w2_weight"):
            getattr(layer, name).data.random_(-128, 128, generator=generator)
            # Code −8 is one no symmetric quantiser emits; it would choose a slower conversion.
            data = getattr(layer, name).data.view(torch.uint8)
            data.bitwise_or_(((data & 0x07) == 0).to(torch.uint8))
            data.bitwise_or_(((data & 0x70) == 0).to(torch.uint8) << 4)
            getattr(layer, f"{name}_scale_inv").data.fill_(2.0**-8)
        layer.w13_input_scale.data.fill_(1.0)
        layer.w2_input_scale.data.fill_(1.0)

    def _refuse_unsupported(self, config: MoeRunnerConfig) -> None:
        found = [
            f"{name}={getattr(config, name)}"
            for name in ("gemm1_alpha", "gemm1_clamp_limit", "swiglu_limit")
            if getattr(config, name, None) is not None
        ]
        if getattr(config, "no_combine", False):
            found.append("no_combine=True")
        if not getattr(config, "is_gated", True):
            found.append("is_gated=False")
        if self.dispatched and config.apply_router_weight_on_input:
            found.append("apply_router_weight_on_input=True with a token dispatcher")
        if found:
            raise BackendError(
                f"{self.prefix}: {', '.join(found)}",
                "the W4AFP8 kernels compute silu(gate) · up and combine the experts themselves",
                ["serve with the quantization method that the checkpoint was made for"],
            )

    def _log_model(self) -> None:
        config = self.quant_config
        if config.has_logged_model or not host.is_rank_zero():
            return
        config.has_logged_model = True
        shard = self.shard
        group = f"{shard.group_size}"
        if shard.w2_group_size != shard.group_size:
            group += f"→{shard.w2_group_size}"
        tp_size = shard.columns.full_size // shard.columns.size
        logger.info(
            "sglang-w4afp8: %d MoE layers, tp=%d, %d experts a rank, local K %d/%d, group %s, "
            "%s activations, backend=%s%s",
            config.moe_layers,
            tp_size,
            self.problem.num_experts,
            shard.hidden_size,
            shard.columns.size,
            group,
            self.scheme,
            self.backend.name,
            ", behind a dispatcher" if self.dispatched else "",
        )
