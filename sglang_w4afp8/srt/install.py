"""Puts our config class where SGLang looks ``w4afp8`` up. Called by ``plugin.register`` only.

``QUANTIZATION_METHODS`` is a copy of ``BASE_QUANTIZATION_METHODS`` made at import, and other
modules hold the same dict objects, so both are changed in place. Importing this module imports
SGLang's quantization package, which resolves the platform; when ``load_plugins()`` can be called,
SGLang's own imports have done that already (a contract test checks it).
"""

from __future__ import annotations

from sglang.srt.layers import quantization
from sglang.srt.layers.quantization.w4afp8 import W4AFp8Config

from sglang_w4afp8.srt.config import ShardedW4AFp8Config

NAME = "w4afp8"


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
    for table in tables:
        table[NAME] = ours
    return ours
