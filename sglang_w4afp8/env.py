"""Every ``SGLANG_W4AFP8_*`` variable, in one table, and the only code that reads one.

The table in ``docs/configuration.md`` is generated from :data:`VARIABLES`. Values are read when
asked for, not at import, so a test or a launcher may set them late.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from sglang_w4afp8.errors import ConfigError


@dataclass(frozen=True)
class Variable:
    """One ``SGLANG_W4AFP8_*`` variable.

    Attributes:
        name: the full name.
        default: what an unset or empty variable means.
        choices: the accepted values; empty when free text is.
        effect: one sentence for the docs.
    """

    name: str
    default: str
    choices: tuple[str, ...]
    effect: str

    def get(self) -> str:
        """The value, or the default.

        Raises:
            ConfigError: the value is not among :attr:`choices`.
        """
        value = os.environ.get(self.name, "") or self.default
        if self.choices and value not in self.choices:
            raise ConfigError(
                f"{self.name}={value!r}",
                f"the accepted values are {', '.join(self.choices)}",
                [f"export {self.name}={self.choices[0]}", f"unset {self.name}"],
            )
        return value

    def is_on(self) -> bool:
        """Whether a 0/1 variable is 1."""
        return self.get() == "1"


_SWITCH = ("0", "1")

ENABLE = Variable(
    "SGLANG_W4AFP8_ENABLE", "1", _SWITCH, "0 leaves SGLang's own w4afp8 method in place."
)
STRICT = Variable(
    "SGLANG_W4AFP8_STRICT",
    "0",
    _SWITCH,
    "1 ends the process when the plugin cannot register; otherwise SGLang would log the error and "
    "serve with its own method.",
)
MOE_BACKEND = Variable(
    "SGLANG_W4AFP8_MOE_BACKEND",
    "auto",
    (),
    "Name of the expert kernel; a named one that cannot run the layer is an error, never a "
    "fallback. `auto` takes the fastest that can.",
)
ACTIVATION = Variable(
    "SGLANG_W4AFP8_ACTIVATION",
    "checkpoint",
    ("checkpoint", "static", "dynamic", "dynamic_per_tensor", "dynamic_per_token", "none"),
    "Overrides how expert inputs are quantised. `dynamic` (per token) also lets a checkpoint load "
    "whose input scales are missing. `none` keeps activations in the model dtype (accuracy "
    "reference, `torch` backend only).",
)
LOAD_METHOD = Variable(
    "SGLANG_W4AFP8_LOAD_METHOD",
    "mse",
    ("mse", "rtn"),
    "Rounding of experts that are FP8 or BF16 in the checkpoint, when `--quantization w4afp8` "
    "makes INT4 of them while loading; as `convert --method`.",
)
ACT_SCALES = Variable(
    "SGLANG_W4AFP8_ACT_SCALES",
    "",
    (),
    "File of calibrated activation amaxes, as `convert --act-scales` reads it: static activation "
    "scales for a checkpoint that has none (with `--quantization w4afp8`), the MTP layer of a "
    "draft included.",
)
CACHE_DIR = Variable(
    "SGLANG_W4AFP8_CACHE_DIR",
    "",
    (),
    "Where compiled kernels and tuning tables are kept; default `~/.cache/sglang-w4afp8`.",
)
EVERY_LANE = Variable(
    "SGLANG_W4AFP8_EVERY_LANE",
    "0",
    _SWITCH,
    "For racecheck: 1 builds Hopper kernels in which every lane of a warp arrives at a barrier, "
    "not one for all. Not for serving.",
)
SHARE_IMPORTS = Variable(
    "SGLANG_W4AFP8_SHARE_IMPORTS",
    "0",
    _SWITCH,
    "For tests on the CPU platform: 1 forks a server's ranks from one process that has imported "
    "SGLang, instead of letting each import it.",
)

VARIABLES = (
    ENABLE,
    STRICT,
    MOE_BACKEND,
    ACTIVATION,
    LOAD_METHOD,
    ACT_SCALES,
    CACHE_DIR,
    EVERY_LANE,
    SHARE_IMPORTS,
)
