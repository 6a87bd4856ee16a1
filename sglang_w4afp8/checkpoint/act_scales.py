"""Static activation scales: reading calibrated amaxes, making the numbers a checkpoint stores.

One scale per layer and GEMM. SGLang reduces the experts' input scales of a layer to their maximum
anyway, and under expert parallelism every rank would take the maximum over *its* experts only, so
the checkpoint stores the layer-wide value for every expert. The value is amax / 448, rounded **up**
to BF16: SGLang keeps these parameters in BF16 and compares the second of gate and up with the
rounded first, so a value that BF16 cannot hold fails to load; rounding down would clip.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from sglang_w4afp8.checkpoint.index import (
    CheckpointIndex,
    TensorEntry,
    open_index,
    read_header,
)
from sglang_w4afp8.checkpoint.reader import TensorReader
from sglang_w4afp8.errors import CheckpointError, ConfigError
from sglang_w4afp8.reference import FP8_MAX

_KEY = re.compile(
    r"(?:^|\.)layers\.(?P<layer>\d+)\..*?experts(?:\.\d+)?\."
    r"(?P<proj>gate_up_proj|gate_proj|up_proj|down_proj|w13|w1|w2|w3)"
    r"(?:[._](?P<kind>input_scale|(?:input_)?(?:quantizer\.)?_?amax))?$"
)
_GEMM = {"down_proj": "w2", "w2": "w2"}

Amaxes = dict[tuple[int, str], float]


def round_up_bf16(value: float) -> float:
    """The smallest BF16 number that is not below a positive float."""
    exact = torch.tensor(value, dtype=torch.float64)
    rounded = exact.to(torch.bfloat16)
    if rounded.to(torch.float64) < exact:
        # Neighbouring positive floats have neighbouring bit patterns.
        rounded = (rounded.view(torch.int16) + 1).view(torch.bfloat16)
    return float(rounded)


def static_scale(amax: float) -> float:
    """The ``input_scale`` for an observed amax: amax / 448, BF16, rounded up."""
    return round_up_bf16(amax / FP8_MAX)


def _add(found: Amaxes, name: str, value: float) -> None:
    match = _KEY.search(name)
    if match is None:
        raise ConfigError(
            f"{name!r} in the activation scales",
            "no layer and GEMM can be read from this name",
            ["use names like model.layers.3.mlp.experts.w13 and ….w2 (values are amaxes)"],
        )
    if name.startswith("mtp."):
        raise ConfigError(
            f"{name!r} in the activation scales",
            "layers of mtp.* are counted from 0, as the decoder's are: their amaxes would be taken "
            "for one layer's",
            ["leave them out of the file, and  --keep '^mtp'", "--activation dynamic"],
        )
    if match["kind"] == "input_scale":
        value *= FP8_MAX
    if not math.isfinite(value) or value <= 0.0:
        raise ConfigError(
            f"{name} = {value}",
            "an activation amax must be positive and finite; zero means that no token reached "
            "the layer during calibration",
            ["calibrate with more text", "--activation dynamic  needs no scales"],
        )
    key = (int(match["layer"]), _GEMM.get(match["proj"], "w13"))
    found[key] = max(found.get(key, 0.0), value)


def _from_json(path: Path) -> Iterable[tuple[str, float]]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        table: Mapping[str, object] = document.get("amax", document)
        for name, value in table.items():
            if isinstance(value, (list, tuple)):
                yield name, max(float(item) for item in value)
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                yield name, float(value)
    except (ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{path}: {error}",
            "activation scales must be a JSON object of name: amax, or a safetensors file",
            ["sglang-w4afp8 convert --help  shows both forms"],
        ) from error


def _from_safetensors(path: Path) -> Iterable[tuple[str, float]]:
    _, entries = read_header(path)
    with TensorReader(path.parent) as reader:
        for entry in entries:
            yield entry.name, float(reader.read(entry).to(torch.float64).max())


def load_amaxes(path: str | os.PathLike[str]) -> Amaxes:
    """Read calibrated activation amaxes.

    Args:
        path: a ``.json`` file (name → amax, optionally under the key ``amax``), a safetensors
            file, or a directory of safetensors files. Names end in the GEMM or projection, after
            ``layers.L.…experts`` and an optional expert index; a name that ends in ``input_scale``
            holds amax / 448. Experts, and gate and up, are reduced to their maximum.

    Returns:
        ``(layer, "w13" | "w2")`` → amax.

    Raises:
        ConfigError: a name or value cannot be used.
        CheckpointError: the file cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise ConfigError(
            f"--act-scales {path}", "there is no such file", ["--activation dynamic  needs none"]
        )
    found: Amaxes = {}
    if path.is_dir():
        files = [path / shard for shard in open_index(path).shards]
    else:
        files = [path]
    for file in files:
        items = _from_json(file) if file.suffix == ".json" else _from_safetensors(file)
        for name, value in items:
            _add(found, name, value)
    if not found:
        raise ConfigError(
            f"{path} holds no activation scales",
            "nothing can be static",
            ["calibrate again", "--activation dynamic  needs no scales"],
        )
    return found


def amaxes_of_source(
    index: CheckpointIndex, entries: Mapping[tuple[int, str], Sequence[TensorEntry]]
) -> Amaxes:
    """Amaxes from the input scales that a source checkpoint already holds.

    Args:
        index: the source.
        entries: ``(layer, gemm)`` → its ``input_scale`` tensors.
    """
    found: Amaxes = {}
    with TensorReader(index.root) as reader:
        for tensors in entries.values():
            for entry in tensors:
                value = float(reader.read(entry).to(torch.float64).max())
                _add(found, entry.name, value)
    return found


WAYS_TO_SCALES = (
    "calibrate again with text that reaches these layers (the MTP layer included)",
    "--activation dynamic  needs no scales",
)


def scales_for_layers(
    amaxes: Amaxes, layers: Iterable[int], ways: Sequence[str] = WAYS_TO_SCALES
) -> Amaxes:
    """Input scales of every layer and GEMM that is converted.

    Args:
        amaxes: what :func:`load_amaxes` read.
        layers: whose.
        ways: out of a missing amax.

    Returns:
        ``(layer, gemm)`` → scale, BF16-representable.

    Raises:
        ConfigError: a layer has no amax; SGLang would use 1.0 for it without a word.
    """
    needed = [(layer, gemm) for layer in sorted(set(layers)) for gemm in ("w13", "w2")]
    missing = [key for key in needed if key not in amaxes]
    if missing:
        names = ", ".join(f"layer {layer} {gemm}" for layer, gemm in missing[:6])
        known = sorted({layer for layer, _ in amaxes})
        raise ConfigError(
            f"no activation amax for {len(missing)} of {len(needed)} GEMMs: {names}; there are "
            f"some for {len(known)} layers, {known[0]} to {known[-1]}",
            "SGLang would take 1.0 for a missing input scale without a word",
            ways,
        )
    return {key: static_scale(amaxes[key]) for key in needed}
