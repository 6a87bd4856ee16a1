"""The quantization config class that takes the name ``w4afp8`` in SGLang.

It subclasses upstream's ``W4AFp8Config`` because SGLang tests for that class (DeepEP) and for the
name. It reads what upstream drops from the checkpoint's config, as a
:class:`~sglang_w4afp8.spec.QuantSpec`, and hands out one method per layer. Mirrors
``layers/quantization/w4afp8.py`` of SGLang 0.5.16 … 0.5.23; SGLang builds it with no arguments
when the checkpoint has only ``hf_quant_config.json``.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from sglang.srt.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.quantization.utils import is_layer_skipped
from sglang.srt.layers.quantization.w4afp8 import W4AFp8Config

from sglang_w4afp8 import env
from sglang_w4afp8.checkpoint.act_scales import Amaxes, load_amaxes, scales_for_layers
from sglang_w4afp8.checkpoint.load_source import (
    LoadSource,
    can_read,
    dense_source,
    read_load_source,
)
from sglang_w4afp8.checkpoint.names import layer_of
from sglang_w4afp8.errors import ConfigError
from sglang_w4afp8.spec import ActivationScheme, QuantSpec
from sglang_w4afp8.srt import host
from sglang_w4afp8.srt.preflight import check_model

logger = logging.getLogger(__name__)

NAME = "w4afp8"


_WAYS_WITHOUT_ACT_SCALES = (
    f"unset {env.ACT_SCALES.name}  (a checkpoint without input scales gets scales per token)",
    "--speculative-draft-model-quantization fp8  leaves the experts of an FP8 draft alone",
)


def _int4_linear(prefix: str, kind: str) -> ConfigError:
    return ConfigError(
        f"{prefix} is INT4 in this {kind} checkpoint",
        "W4AFP8 has INT4 experts only; the linears beside them are FP8 or not quantised",
        [
            "sglang-w4afp8 convert SRC DST  with the BF16 or FP8 checkpoint as SRC",
            "serve it with its own method: leave --quantization w4afp8 away",
        ],
    )


class ShardedW4AFp8Config(W4AFp8Config):
    """One per model. See the module.

    Args:
        spec: what the checkpoint says; None for a checkpoint without a ``quantization_config``.
        source: what the checkpoint is, if it becomes W4AFP8 while loading.
    """

    def __init__(self, spec: QuantSpec | None = None, source: LoadSource | None = None) -> None:
        # Not W4AFp8Config.__init__: it overwrites what we read and logs half a sentence.
        QuantizationConfig.__init__(self)
        if spec is None and source is None and host.is_unquantised_checkpoint():
            source = dense_source()
        self.source = source
        stated = spec or (source.spec if source else QuantSpec.default())
        # MTP modules change the number of layers in their model's config when they are built.
        self._model = host.built_model()
        self._act_scales: Amaxes | None = None
        if env.ACT_SCALES.get():
            self._act_scales = load_amaxes(env.ACT_SCALES.get())
            stated = replace(stated, moe_activation=ActivationScheme.STATIC)
        self.spec = stated.with_activation_override(env.ACTIVATION.get())
        if source is not None and host.is_rank_zero():
            logger.info(
                "sglang-w4afp8: a %s checkpoint; experts become INT4 g%d while loading%s",
                source.kind,
                self.spec.group_size,
                f", {env.LOAD_METHOD.get()} rounding" if source.kind in ("fp8", "bf16") else "",
            )
        # Upstream reads these names off the config.
        self.is_checkpoint_fp8_serialized = True
        self.is_checkpoint_w4afp8_serialized = True
        self.linear_activation_scheme = "dynamic"
        self.moe_activation_scheme = (
            "static" if self.spec.moe_activation.value == "static" else "dynamic"
        )
        self.ignored_layers = list(self.spec.ignored_layers)
        block = self.spec.weight_block_size
        self.weight_block_size = list(block) if block else None
        self.group_size = self.spec.group_size
        self.moe_layers = 0
        self.has_logged_model = False
        self._checked = False

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ShardedW4AFp8Config:
        """Build from config.json's ``quantization_config``.

        Raises:
            ConfigError: see :meth:`sglang_w4afp8.spec.QuantSpec.from_dict` and, for a checkpoint
                of another method, :func:`sglang_w4afp8.checkpoint.load_source.read_load_source`.
        """
        if config.get("quant_method", NAME) == NAME:
            instance = cls(QuantSpec.from_dict(config))
        else:
            source = read_load_source(config)
            instance = cls(source.spec, source)
        instance.packed_modules_mapping = config.get("packed_modules_mapping") or {}
        return instance

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any] | None, user_quant: str | None
    ) -> str | None:
        """Claim a checkpoint of another method when the user asks for this one by name.

        SGLang otherwise refuses the difference. Methods without an answer are left to it.
        """
        method = str((hf_quant_cfg or {}).get("quant_method", ""))
        return NAME if user_quant == NAME and can_read(method) else None

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Model dtypes; float32 is for the ``torch`` backend."""
        return [torch.bfloat16, torch.float32, torch.float8_e4m3fn]

    @classmethod
    def get_min_capability(cls) -> int:
        """Ampere; what a card can run is each backend's answer, not this one."""
        return 80

    def apply_weight_name_mapper(self, hf_to_sglang_mapper: Any) -> None:
        """Rename the skip list as the model renames its modules."""
        if self.ignored_layers:
            renamed = hf_to_sglang_mapper.apply_list(self.ignored_layers)
            self.ignored_layers = list(dict.fromkeys(renamed))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of ``layer``, None where nothing is quantised (norms, embeddings).

        Args:
            layer: a linear or a ``FusedMoE``.
            prefix: its name, ``model.layers.3.mlp.experts``.
        """
        from sglang.srt.layers.linear import LinearBase
        from sglang.srt.layers.moe.fused_moe_triton import FusedMoE

        from sglang_w4afp8.srt.linear import ShardedFp8LinearMethod
        from sglang_w4afp8.srt.moe import choose_moe_method

        if not self._checked:
            self._checked = True
            check_model(self.spec)
        if isinstance(layer, LinearBase):
            if self.source is not None and self.source.is_int4_linear(prefix):
                raise _int4_linear(prefix, self.source.kind)
            if self.weight_block_size is None or self._is_skipped(prefix):
                return UnquantizedLinearMethod()
            return ShardedFp8LinearMethod(self, prefix)
        if isinstance(layer, FusedMoE):
            if self._is_skipped(prefix):
                return None  # FusedMoE then makes its own unquantised method
            self.moe_layers += 1
            return choose_moe_method(self, layer, prefix)
        return None

    def act_scales_of(self, prefix: str) -> dict[str, float] | None:
        """Static input scales of a layer from ``SGLANG_W4AFP8_ACT_SCALES``: ``w13``, ``w2``.

        Raises:
            ConfigError: the file has none for this layer, or which layer this is cannot be told.
        """
        if self._act_scales is None or self.spec.moe_activation is not ActivationScheme.STATIC:
            return None
        layer = self._act_scales_layer(prefix)
        kind = "the MTP layer" if layer == self._model.layers else "this layer"
        ways = (
            f"calibrate again with {kind}: amaxes model.layers.{layer}.mlp.experts.w13 and ….w2",
            *_WAYS_WITHOUT_ACT_SCALES[: 2 if self._model.is_draft else 1],
        )
        scales = scales_for_layers(self._act_scales, [layer], ways)
        return {gemm: value for (_, gemm), value in scales.items()}

    def _act_scales_layer(self, prefix: str) -> int:
        """The layer of the checkpoint that a module's tensors have their names from.

        An MTP module is called model.decoder, or has the number behind the last decoder layer;
        its tensors have the latter. Other drafts count their layers from 0, as the target does.
        """
        number, (layers, is_draft) = layer_of(prefix), self._model
        if number is not None and not is_draft:
            return number
        # A draft of one layer is a checkpoint of its own, in which the MTP layer has number 0.
        if layers is not None and layers > 1 and number in (None, layers):
            return layers
        model = "a draft model" if is_draft else "a model"
        count = "an unknown number of" if layers is None else layers
        raise ConfigError(
            f"{prefix} of {model} with {count} layers, and {env.ACT_SCALES.name}="
            f"{env.ACT_SCALES.get()}",
            "which layer of that file this is cannot be told; a scale of another layer may be too "
            "small, and would clip without a word",
            [
                "use a draft that is the MTP layer behind the last one in the target's checkpoint",
                *_WAYS_WITHOUT_ACT_SCALES,
            ],
        )

    def _is_skipped(self, prefix: str) -> bool:
        mapping = getattr(self, "packed_modules_mapping", None) or {}
        return is_layer_skipped(prefix, self.ignored_layers, fused_mapping=mapping)
