"""Checkpoints that become W4AFP8 while a server loads them: what their config says.

``--quantization w4afp8`` on such a checkpoint brings its ``quantization_config`` here. The experts'
tensors are then rounded or taken over on the way into memory (:mod:`.expert_window`), with the
codes and scales that ``sglang-w4afp8 convert`` would write. What cannot be done so is refused here,
before anything is loaded, with the command that converts it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sglang_w4afp8.errors import ConfigError
from sglang_w4afp8.spec import GROUP_SIZES, ActivationScheme, QuantSpec

# Tensors of an expert projection, by format: what makes the matrix, and what is only looked at.
DATA_PARTS = {
    "fp8": ("weight", "weight_scale_inv"),
    "bf16": ("weight",),
    "pack-quantized": ("weight_packed", "weight_scale"),
    "gptq": ("qweight", "scales"),
}
CHECKED_PARTS = {
    "fp8": (),
    "bf16": (),
    "pack-quantized": ("weight_shape", "weight_zero_point", "weight_g_idx"),
    "gptq": ("qzeros", "g_idx"),
}

_CONVERT = "sglang-w4afp8 convert SRC DST"
_REQUANTIZE = f"{_CONVERT} --requantize"
_FROM_ORIGINAL = f"{_CONVERT}  with the BF16 or FP8 checkpoint as SRC"
_DROP_FLAG = "serve it with its own method: leave --quantization w4afp8 away"


@dataclass(frozen=True)
class LoadSource:
    """A checkpoint to be turned into W4AFP8 while loading.

    Attributes:
        kind: ``fp8``, ``bf16``, ``pack-quantized`` or ``gptq``.
        spec: the W4AFP8 layer that comes out; activations are dynamic.
        quant: the source's ``quantization_config``.
        is_int4_linear: whether a linear outside the experts (by its name) is INT4 in the source.
    """

    kind: str
    spec: QuantSpec
    quant: Mapping[str, Any] = field(default_factory=dict)
    is_int4_linear: Callable[[str], bool] = field(default=lambda prefix: False)

    @property
    def data_parts(self) -> tuple[str, ...]:
        """Tensors that make up a matrix."""
        return DATA_PARTS[self.kind]

    @property
    def parts(self) -> tuple[str, ...]:
        """All tensors of an expert projection that the source may hold."""
        return DATA_PARTS[self.kind] + CHECKED_PARTS[self.kind]


def dense_source() -> LoadSource:
    """A checkpoint without any quantisation."""
    return LoadSource("bf16", _spec(128, None, (), "a checkpoint without quantization_config"))


def read_load_source(config: Mapping[str, Any]) -> LoadSource:
    """What a foreign ``quantization_config`` describes.

    Raises:
        ConfigError: it cannot become W4AFP8 while loading; with the reason and a command.
    """
    method = _plain_name(str(config.get("quant_method", "")))
    if method in _READERS:
        return _READERS[method](config)
    why, command = _REFUSED.get(
        method,
        ("its experts are neither FP8, BF16 nor INT4 groups that W4AFP8 can hold", _FROM_ORIGINAL),
    )
    raise _refusal(f"quant_method {config.get('quant_method')!r}", why, command)


def can_read(method: str) -> bool:
    """Whether :func:`read_load_source` has an answer, or a reason, for this ``quant_method``."""
    return _plain_name(method) in (*_READERS, *_REFUSED)


def _plain_name(method: str) -> str:
    """A ``quant_method`` without the spellings that name a kernel."""
    return method.lower().replace("_", "-").removesuffix("-marlin")


def _refusal(found: str, why: str, command: str) -> ConfigError:
    return ConfigError(
        f"--quantization w4afp8 on a checkpoint with {found}",
        f"loading cannot make W4AFP8 of it: {why}",
        [command, _DROP_FLAG],
    )


def _spec(
    group_size: int, block: tuple[int, int] | None, ignored: tuple[str, ...], origin: str
) -> QuantSpec:
    return QuantSpec(group_size, ActivationScheme.DYNAMIC_PER_TOKEN, block, ignored, origin)


def _group(size: object, where: str) -> int:
    """The W4AFP8 group for a source's: itself, or the largest kernels know that divides it."""
    if size in (-1, None):  # one scale per channel
        return 128
    fitting = [g for g in GROUP_SIZES[::-1] if isinstance(size, int) and size % g == 0]
    if not fitting:
        raise _refusal(
            f"INT4 groups of {size} ({where})",
            f"the kernels know groups of {', '.join(map(str, GROUP_SIZES))}",
            f"{_REQUANTIZE} --group-size 32",
        )
    return fitting[0]


def _fp8(config: Mapping[str, Any]) -> LoadSource:
    plain = {
        key: value
        for key, value in config.items()
        if key in ("weight_block_size", "modules_to_not_convert", "ignored_layers", "ignore")
    }
    if config.get("weight_block_size") is None:
        raise _refusal(
            "FP8 weights without weight_block_size",
            "its linears have per-channel or per-tensor scales, and W4AFP8's linears beside the "
            "experts are block-FP8 or not FP8 at all",
            _FROM_ORIGINAL,
        )
    if str(config.get("fmt", "e4m3")).lower() != "e4m3":
        raise _refusal(f"FP8 format {config['fmt']!r}", "only E4M3 is read", _FROM_ORIGINAL)
    read = QuantSpec.from_dict(plain)
    spec = _spec(128, read.weight_block_size, read.ignored_layers, "an FP8 checkpoint")
    return LoadSource("fp8", spec, config)


def _compressed_tensors(config: Mapping[str, Any]) -> LoadSource:
    groups = config.get("config_groups") or {}
    sizes: set[int] = set()
    targets: list[str] = []
    for name, group in groups.items():
        weights = group.get("weights") or {}
        what = f"config_groups.{name}"
        if weights.get("num_bits") != 4 or weights.get("type", "int") != "int":
            raise _refusal(
                f"{weights.get('num_bits')}-bit {weights.get('type', 'int')} weights ({what})",
                "only INT4 experts beside unquantised linears are taken over",
                _CONVERT,
            )
        if weights.get("symmetric") is False:
            raise _refusal(
                f"asymmetric weights ({what})",
                "q − zero point spans −15…15, more than four bits",
                _REQUANTIZE,
            )
        if weights.get("actorder") in ("group", "dynamic", True):
            raise _refusal(
                f"actorder {weights['actorder']!r} ({what})",
                "activation ordering permutes the groups, so they are not contiguous along K",
                _REQUANTIZE,
            )
        layout = group.get("format") or config.get("format", "pack-quantized")
        if layout != "pack-quantized":
            raise _refusal(f"format {layout!r} ({what})", "only pack-quantized is read", _CONVERT)
        sizes.add(_group(weights.get("group_size"), what))
        targets += group.get("targets") or ["Linear"]
    if len(sizes) != 1:
        raise _refusal(
            f"{len(sizes)} different groups of INT4 weights",
            "a W4AFP8 model has one group size",
            f"{_CONVERT} --group-size {min(sizes, default=32)}",
        )
    ignored = tuple(config.get("ignore") or ())

    def is_int4(prefix: str) -> bool:
        targeted = any(target == "Linear" or _names(target, prefix) for target in targets)
        return targeted and not any(_names(entry, prefix) for entry in ignored)

    names = tuple(entry for entry in ignored if not entry.startswith("re:"))
    spec = _spec(sizes.pop(), None, names, "a compressed-tensors checkpoint")
    return LoadSource("pack-quantized", spec, config, is_int4)


def _names(entry: str, prefix: str) -> bool:
    """Whether a compressed-tensors target or ignore entry means this module."""
    if entry.startswith("re:"):
        return re.match(entry[3:], prefix) is not None
    return prefix == entry or prefix.endswith(f".{entry}")


def _gptq(config: Mapping[str, Any]) -> LoadSource:
    bits = config.get("bits", 4)
    if bits != 4:
        raise _refusal(f"{bits}-bit GPTQ weights", "W4AFP8 experts are 4-bit", _FROM_ORIGINAL)
    if config.get("sym") is False:
        raise _refusal(
            "asymmetric GPTQ weights (sym: false)",
            "q − zero point spans −15…15, more than four bits",
            _REQUANTIZE,
        )
    if config.get("desc_act"):
        raise _refusal(
            "GPTQ act-order (desc_act: true)",
            "it permutes the groups, so they are not contiguous along K",
            _REQUANTIZE,
        )
    packing = str(config.get("packing_format", "auto_round:auto_gptq"))
    layout = str(config.get("checkpoint_format", "gptq"))
    if "gptq" not in packing or layout not in ("gptq", "gptq_v2"):
        raise _refusal(
            f"packing {packing!r}, checkpoint_format {layout!r}",
            "only the GPTQ layouts are read",
            _REQUANTIZE,
        )
    dynamic = config.get("dynamic") or {}
    negative = [rule[2:] for rule in dynamic if rule.startswith("-:")]
    extra = config.get("extra_config") or {}
    spared = [name for name, own in extra.items() if own.get("bits", 4) >= 16]
    ignored = tuple(config.get("modules_to_not_convert") or ())
    blocks = config.get("modules_in_block_to_quantize") or []
    inside = [name for item in blocks for name in (item if isinstance(item, list) else [item])]

    def is_int4(prefix: str) -> bool:
        if prefix.rpartition(".")[2] in ("gate", "shared_expert_gate", "lm_head"):
            return False  # no GPTQ tool quantises routers or the head
        if any(re.match(rule, prefix) for rule in negative):
            return False
        if any(name in prefix for name in (*ignored, *spared)):
            return False
        return not inside or any(name in prefix for name in inside)

    group = _group(config.get("group_size", 128), "group_size")
    return LoadSource("gptq", _spec(group, None, ignored, "a GPTQ checkpoint"), config, is_int4)


_READERS: dict[str, Callable[[Mapping[str, Any]], LoadSource]] = {
    "fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "auto-round": _gptq,
    "intel/auto-round": _gptq,
}
_REFUSED = {
    "awq": ("AWQ weights are asymmetric: q − zero point spans −15…15", _REQUANTIZE),
    "mxfp4": ("MXFP4 values (0, 0.5, 1, 1.5, 2, 3, 4, 6) are no integer grid", _REQUANTIZE),
}
