"""Puts our config class where SGLang looks ``w4afp8`` up. Called by ``plugin.register`` only.

SGLang refuses a model whose config.json has a ``weight_block_size`` when an expert shard is no
whole number of blocks, before the model is built and whatever its method can do. That check is
lifted for models of this method; :mod:`sglang_w4afp8.srt.preflight` makes its own.

``QUANTIZATION_METHODS`` is a copy of ``BASE_QUANTIZATION_METHODS`` made at import, and other
modules hold the same dict objects, so both are changed in place. Importing this module imports
SGLang's quantization package, which resolves the platform; when ``load_plugins()`` can be called,
SGLang's own imports have done that already (a contract test checks it).
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from sglang.srt.layers import quantization
from sglang.srt.layers.quantization.w4afp8 import W4AFp8Config
from sglang.srt.model_executor.model_runner_components import moe_ep_setup
from sglang.srt.model_loader import weight_utils

from sglang_w4afp8.srt import host
from sglang_w4afp8.srt.config import NAME, ShardedW4AFp8Config


def install() -> type:
    """Replace both entries, or none.

    Returns:
        The class that is now installed.

    Raises:
        TypeError: the tables or the class are not what SGLang's checks expect.
    """
    tables = (quantization.BASE_QUANTIZATION_METHODS, quantization.QUANTIZATION_METHODS)
    ours = ShardedW4AFp8Config
    # SGLang tests for this class and this name in a dozen places (DeepEP, input-scale mapping).
    if not issubclass(ours, W4AFp8Config) or ours.get_name() != NAME:
        raise TypeError(f"{ours.__name__} is not a {NAME} config")
    for table in tables:
        if not isinstance(table, dict) or NAME not in table:
            raise TypeError(f"SGLang's quantization tables have no entry {NAME!r}")
    lift_block_check()
    note_model()
    for table in tables:
        table[NAME] = ours
    return ours


def note_model() -> None:
    """Have ``get_quant_config`` tell which model it works for; again does nothing.

    The config class gets no argument for a checkpoint without a ``quantization_config``, and must
    know whether that is an unquantised one or one with ``hf_quant_config.json`` only.
    """
    original = weight_utils.get_quant_config
    if getattr(original, "notes_w4afp8", False):
        return

    @functools.wraps(original)
    def get(model_config: Any, *arguments: Any, **options: Any) -> Any:
        with host.building(model_config):
            return original(model_config, *arguments, **options)

    get.notes_w4afp8 = True  # type: ignore[attr-defined]
    weight_utils.get_quant_config = get
    # The loader imports the function by name; it may have done so already.
    loader = sys.modules.get("sglang.srt.model_loader.loader")
    if getattr(loader, original.__name__, None) is original:
        setattr(loader, original.__name__, get)


def lift_block_check() -> None:
    """Let ``check_quantized_moe_compatibility`` pass models of this method; again does nothing."""
    original = moe_ep_setup.check_quantized_moe_compatibility
    if getattr(original, "passes_w4afp8", False):
        return

    @functools.wraps(original)
    def check(*, model_config: Any, **layout: Any) -> None:
        if model_config.quantization != NAME:
            original(model_config=model_config, **layout)

    check.passes_w4afp8 = True  # type: ignore[attr-defined]
    moe_ep_setup.check_quantized_moe_compatibility = check
    # model_runner imports the function by name; it may have done so already.
    runner = sys.modules.get("sglang.srt.model_executor.model_runner")
    if getattr(runner, original.__name__, None) is original:
        setattr(runner, original.__name__, check)
