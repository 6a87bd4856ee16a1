"""The quantization config class that takes the name ``w4afp8`` in SGLang.

It subclasses upstream's ``W4AFp8Config`` because SGLang tests for that class (DeepEP) and for the
name. It reads what upstream drops from the checkpoint's config, as a
:class:`~sglang_w4afp8.spec.QuantSpec`, and hands out one method per layer. Mirrors
``layers/quantization/w4afp8.py`` of SGLang 0.5.16 … 0.5.23; SGLang builds it with no arguments
when the checkpoint has only ``hf_quant_config.json``.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from sglang.srt.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.quantization.utils import is_layer_skipped
from sglang.srt.layers.quantization.w4afp8 import W4AFp8Config

from sglang_w4afp8 import env
from sglang_w4afp8.spec import QuantSpec
from sglang_w4afp8.srt.preflight import check_model

logger = logging.getLogger(__name__)


class ShardedW4AFp8Config(W4AFp8Config):
    """One per model. See the module.

    Args:
        spec: what the checkpoint says; None for a checkpoint without a ``quantization_config``.
    """

    def __init__(self, spec: QuantSpec | None = None) -> None:
        # Not W4AFp8Config.__init__: it overwrites what we read and logs half a sentence.
        QuantizationConfig.__init__(self)
        stated = spec or QuantSpec.default()
        self.spec = stated.with_activation_override(env.ACTIVATION.get())
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
            ConfigError: see :meth:`sglang_w4afp8.spec.QuantSpec.from_dict`.
        """
        instance = cls(QuantSpec.from_dict(config))
        instance.packed_modules_mapping = config.get("packed_modules_mapping") or {}
        return instance

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
            if self.weight_block_size is None or self._is_skipped(prefix):
                return UnquantizedLinearMethod()
            return ShardedFp8LinearMethod(self, prefix)
        if isinstance(layer, FusedMoE):
            if self._is_skipped(prefix):
                return None  # FusedMoE then makes its own unquantised method
            self.moe_layers += 1
            return choose_moe_method(self, layer, prefix)
        return None

    def _is_skipped(self, prefix: str) -> bool:
        mapping = getattr(self, "packed_modules_mapping", None) or {}
        return is_layer_skipped(prefix, self.ignored_layers, fused_mapping=mapping)
