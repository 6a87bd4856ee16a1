"""W4AFP8 for SGLang: INT4 group-quantised expert weights, FP8 activations, at any TP degree.

Importing this package imports the standard library only. ``register()`` installs the plugin in the
current process; SGLang calls it by itself through the entry point group ``sglang.srt.plugins``, so
only processes that SGLang does not prepare (a Ray actor of your own, ``bench_one_batch``) call it
by hand.
"""

from __future__ import annotations

__version__ = "0.1.0"

__all__ = ["__version__", "register"]


def register() -> None:
    """Install the quantization method; see :func:`sglang_w4afp8.plugin.register`."""
    from sglang_w4afp8.plugin import register as _register

    _register()
