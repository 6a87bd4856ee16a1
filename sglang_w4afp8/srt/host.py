"""What this package asks of the running SGLang process, with answers that survive its absence.

Layers are also built outside a server (tests, ``bench_one_batch``, notebooks), where SGLang's
server arguments are not set; every question here has an answer for that case.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

# Formats whose tensors do not pass through a parameter's weight_loader: they fill the parameters
# in one piece, before or after process_weights_after_loading.
_FORMATS_WITHOUT_LOADER = frozenset(
    ("dummy", "sharded_state", "remote", "remote_instance", "rdma", "private")
)

# Formats that stream tensors through buffers of their own.
_FORMATS_REUSING_BUFFERS = frozenset(("runai_streamer", "fastsafetensors"))


def argument(name: str, default: Any = None) -> Any:
    """The value in effect of a server argument; ``default`` where there is no server or no value.

    SGLang up to 0.5.20 writes what it decides into the arguments themselves; later versions keep
    them as the user gave them and record decisions beside them.
    """
    args = _server_args()
    if args is None:
        return default
    try:
        from sglang.srt.arg_groups.overrides import resolution_result
    except ImportError:
        value = getattr(args, name, None)
    else:
        value = resolution_result(args, name)
    return default if value is None else value


def _server_args() -> Any | None:
    from sglang.srt.runtime_context import get_server_args

    try:
        return get_server_args()
    except ValueError:  # "Global server args is not set yet!"
        return None


def load_format() -> str:
    """The ``--load-format`` in effect, ``auto`` outside a server."""
    value = argument("load_format", "auto")
    return str(getattr(value, "value", value)).lower()


_model_being_built: Any = None


class BuiltModel(NamedTuple):
    """The model whose quantization config is being made.

    Attributes:
        layers: decoder layers, without those of MTP; None where that is not known.
        is_draft: whether it drafts for another one (speculative decoding).
    """

    layers: int | None
    is_draft: bool


def built_model() -> BuiltModel:
    """What is known of the model being built; outside a server nothing is."""
    text = getattr(_model_being_built, "hf_text_config", None)
    layers = getattr(text, "num_hidden_layers", None)
    draft = bool(getattr(_model_being_built, "is_draft_model", False))
    return BuiltModel(layers if isinstance(layers, int) else None, draft)


@contextmanager
def building(model_config: Any) -> Iterator[None]:
    """Note whose quantization config is being made, for the functions above and below."""
    global _model_being_built
    _model_being_built = model_config
    try:
        yield
    finally:
        _model_being_built = None


def is_unquantised_checkpoint() -> bool:
    """Whether the model being built has no quantization config in any place SGLang looks.

    SGLang makes the config with no arguments both for such a checkpoint and for one that has only
    ``hf_quant_config.json``. Outside a server the latter is assumed.
    """
    return _model_being_built is not None and _model_being_built._parse_quant_hf_config() is None


def reuses_buffers() -> bool:
    """Whether a tensor that was handed over may be overwritten by the next ones."""
    return load_format() in _FORMATS_REUSING_BUFFERS


def uses_weight_loaders() -> bool:
    """Whether checkpoint tensors come through ``param.weight_loader`` one by one."""
    return load_format() not in _FORMATS_WITHOUT_LOADER


def model_scales_routed_output() -> bool:
    """Whether the model itself multiplies the experts' output by ``routed_scaling_factor``.

    SGLang's DeepSeek and GLM models do so off CUDA and leave it to the method on CUDA; the same
    flag decides here (``_is_cuda`` in ``models/deepseek_v2.py``).
    """
    from sglang.srt.utils import is_cuda

    return not is_cuda()


def is_rank_zero() -> bool:
    """Whether this process is the one that logs per-model lines."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return True
    return torch.distributed.get_rank() == 0
