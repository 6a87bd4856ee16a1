"""QuantSpec: the frozen, validated view of a checkpoint's W4AFP8 quantization config.

Two styles of checkpoint exist. The newer one has a ``quantization_config`` dict in config.json; the
older one has none, only ``hf_quant_config.json`` with ``quant_algo: MIXED_PRECISION``, which tells
nothing beyond the method. :meth:`QuantSpec.from_dict` reads the first and :meth:`QuantSpec.default`
is the second. Nothing here imports torch or sglang.

What the keys mean here (SGLang 0.5.16 … 0.5.23 reads none of them but ``quant_method``):

=========================== ======================================================================
``group_size``              INT4 scale group along K: 32, 64 or 128. Default 128.
``weight_block_size``       FP8 block of the other linears, ``[n, k]``. Default ``[128, 128]``;
                            ``null`` says that the linears are not FP8 at all.
``moe_activation_scheme``   ``static`` (one scale per tensor, from the checkpoint; the default),
                            ``dynamic_per_tensor``, ``dynamic_per_token``, or ``dynamic``, which
                            means per token.
``activation_scheme``,      the linears' scheme. Block FP8 knows ``dynamic`` only. The value
``linear_activation_scheme````static`` for the experts may also be spelt ``activation_scheme``.
``modules_to_not_convert``, module names left unquantised; ``ignored_layers``, ``ignore`` and
…                           ``exclude_modules`` are other spellings of the same list.
=========================== ======================================================================
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from sglang_w4afp8.errors import ConfigError

logger = logging.getLogger(__name__)

GROUP_SIZES = (32, 64, 128)

_SKIP_LIST_KEYS = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules")
_KNOWN_KEYS = frozenset(
    (
        "quant_method",
        "quant_algo",
        "group_size",
        "weight_block_size",
        "moe_activation_scheme",
        "activation_scheme",
        "linear_activation_scheme",
        *_SKIP_LIST_KEYS,
        # Carried along by converters or added by SGLang; they change nothing here.
        "producer",
        "fmt",
        "bits",
        "version",
        "scale_fmt",
        "kv_cache_quant_algo",
        "kv_cache_scheme",
        "packed_modules_mapping",
        "hf_config",
    )
)


class ActivationScheme(StrEnum):
    """How the experts' inputs become FP8 E4M3. ``q = clamp(x / scale, ±448)``."""

    STATIC = "static"
    """One scale per layer and GEMM, read from the checkpoint (amax of a calibration run / 448)."""
    DYNAMIC_PER_TENSOR = "dynamic_per_tensor"
    """One scale per call: amax of the batch / 448."""
    DYNAMIC_PER_TOKEN = "dynamic_per_token"
    """One scale per row: amax of the row / 448."""
    NONE = "none"
    """Not quantised; the accuracy reference. No checkpoint asks for it."""

    @classmethod
    def parse(cls, value: object, key: str) -> ActivationScheme:
        """Read a scheme by name; ``dynamic`` is per token.

        Raises:
            ConfigError: ``value`` is no scheme.
        """
        if value == "dynamic":
            return cls.DYNAMIC_PER_TOKEN
        try:
            return cls(value)  # type: ignore[arg-type]
        except ValueError:
            names = "static, dynamic, dynamic_per_tensor, dynamic_per_token, none"
            raise ConfigError(
                f"{key} = {value!r}",
                f"the known activation schemes are {names}",
                [
                    f'set "{key}": "static" in config.json if there are input_scale tensors',
                    f'set "{key}": "dynamic" if it has none',
                ],
            ) from None


@dataclass(frozen=True)
class QuantSpec:
    """What a W4AFP8 checkpoint says about itself.

    Attributes:
        group_size: INT4 codes that share one scale, along K.
        moe_activation: how expert inputs are quantised.
        weight_block_size: FP8 block ``(n, k)`` of the other linears, or None when they are not FP8.
        ignored_layers: module names (prefixes) that are not quantised.
        origin: where this came from, for messages.
    """

    group_size: int = 128
    moe_activation: ActivationScheme = ActivationScheme.STATIC
    weight_block_size: tuple[int, int] | None = (128, 128)
    ignored_layers: tuple[str, ...] = ()
    origin: str = "defaults"

    @classmethod
    def default(cls) -> QuantSpec:
        """The spec of a checkpoint whose only sign is ``hf_quant_config.json`` MIXED_PRECISION."""
        return cls(origin="hf_quant_config.json (MIXED_PRECISION)")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], origin: str = "config.json") -> QuantSpec:
        """Read and check a ``quantization_config`` dict.

        Unknown keys are named in one warning: they may hold something this version should obey.

        Raises:
            ConfigError: a value is of the wrong type or unsupported, or two keys contradict.
        """
        unknown = sorted(set(config) - _KNOWN_KEYS)
        if unknown:
            logger.warning(
                "sglang-w4afp8: %s: quantization_config keys that are not understood and have no "
                "effect: %s",
                origin,
                ", ".join(unknown),
            )
        bits = config.get("bits", 4)
        if bits != 4:
            raise ConfigError(
                f"{origin}: quantization_config bits = {bits!r}",
                "W4AFP8 expert weights are 4-bit",
                [
                    "remove the key if the experts are INT4",
                    "serve with the quantization method that the checkpoint was made for",
                ],
            )
        return cls(
            group_size=_read_group_size(config, origin),
            moe_activation=_read_moe_activation(config, origin),
            weight_block_size=_read_block_size(config, origin),
            ignored_layers=_read_skip_list(config, origin),
            origin=origin,
        )

    def with_activation_override(self, override: str) -> QuantSpec:
        """This spec under ``SGLANG_W4AFP8_ACTIVATION``; ``checkpoint`` changes nothing."""
        if override == "checkpoint":
            return self
        scheme = ActivationScheme.parse(override, "SGLANG_W4AFP8_ACTIVATION")
        return replace(self, moe_activation=scheme)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _read_group_size(config: Mapping[str, Any], origin: str) -> int:
    group_size = config.get("group_size", 128)
    if not _is_int(group_size) or group_size not in GROUP_SIZES:
        raise ConfigError(
            f"{origin}: quantization_config group_size = {group_size!r}",
            f"the kernels know INT4 scale groups of {', '.join(map(str, GROUP_SIZES))} along K",
            [
                (
                    "per-channel or larger groups: sglang-w4afp8 resize-blocks SRC DST "
                    "--group-size 128 repeats the scales without changing a value"
                ),
                "any other size: requantise with sglang-w4afp8 convert SRC DST --group-size 128",
            ],
        )
    return int(group_size)


def _read_block_size(config: Mapping[str, Any], origin: str) -> tuple[int, int] | None:
    block = config.get("weight_block_size", (128, 128))
    if block is None:
        return None
    usable = (
        isinstance(block, Sequence)
        and not isinstance(block, str)
        and len(block) == 2
        and all(_is_int(side) and side > 0 for side in block)
    )
    if not usable:
        raise ConfigError(
            f"{origin}: quantization_config weight_block_size = {block!r}",
            "an FP8 block is two positive integers [n, k]",
            [
                'set "weight_block_size": [128, 128], what DeepSeek-style FP8 checkpoints have',
                'set "weight_block_size": null if the linears are not FP8',
            ],
        )
    return int(block[0]), int(block[1])


def _read_moe_activation(config: Mapping[str, Any], origin: str) -> ActivationScheme:
    linear = config.get("linear_activation_scheme", "dynamic")
    if linear != "dynamic":
        raise ConfigError(
            f"{origin}: quantization_config linear_activation_scheme = {linear!r}",
            "the linears are block-FP8, whose activations are quantised per token and block",
            ['set "linear_activation_scheme": "dynamic"'],
        )
    generic = config.get("activation_scheme")
    if generic not in (None, "static", "dynamic"):
        raise ConfigError(
            f"{origin}: quantization_config activation_scheme = {generic!r}",
            "the known values are static and dynamic; it describes the block-FP8 linears unless it "
            "says static",
            ['name the experts\' scheme in "moe_activation_scheme"'],
        )
    if "moe_activation_scheme" in config:
        key = "moe_activation_scheme"
        scheme = ActivationScheme.parse(config[key], key)
        if generic == "static" and scheme is not ActivationScheme.STATIC:
            raise ConfigError(
                f"{origin}: activation_scheme = 'static' and {key} = {config[key]!r}",
                "block-FP8 linears have no static scales, so `static` can only mean the experts, "
                "and there it contradicts the other key",
                [
                    f"remove activation_scheme to keep {config[key]!r}",
                    f"remove {key} to use the checkpoint's input scales",
                ],
            )
        return scheme
    # A lone activation_scheme=dynamic is what every block-FP8 config carries for its linears; it
    # says nothing about the experts, whose published default is static.
    return ActivationScheme.STATIC


def _read_skip_list(config: Mapping[str, Any], origin: str) -> tuple[str, ...]:
    found: dict[str, tuple[str, ...]] = {}
    for key in _SKIP_LIST_KEYS:
        names = config.get(key)
        if names is None:
            continue
        if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
            raise ConfigError(
                f"{origin}: quantization_config {key} = {names!r}",
                "it must be a list of module names",
                [f'set "{key}": ["model.layers.0.mlp.gate"] or remove it'],
            )
        found[key] = tuple(names)
    distinct = {frozenset(names) for names in found.values()}
    if len(distinct) > 1:
        sizes = ", ".join(f"{key} ({len(names)} names)" for key, names in found.items())
        raise ConfigError(
            f"{origin}: quantization_config has different skip lists: {sizes}",
            "they are spellings of one list; obeying one would silently drop the other",
            ["keep one of the keys, with the union of the names"],
        )
    return next(iter(found.values()), ())
