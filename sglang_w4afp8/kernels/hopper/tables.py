"""Measured limits of the paths: small JSON tables per card, the user's before the committed.

``sglang-w4afp8 bench tune`` writes ``tuning/<card>.json`` into the user's cache folder; tables of
cards that were measured for this repository are in ``tuning/`` beside this file. :func:`find` is
asked once a layer, when its weights are prepared; a call opens no file. Without a table, or with
one that cannot be used, a layer gets :func:`~sglang_w4afp8.kernels.hopper.plan.default_limits`:
every path is right for every call that it accepts, so a table is about time only.

A table::

    {"format": 1, "device": "NVIDIA H100 80GB HBM3",
     "layers": {"256 experts, 7168 x 256, groups 128/128, top 8":
                {"static, 15 codes": {"limits": {"small": 8, "medium": 256}, "from": "…"}}}}
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from sglang_w4afp8.errors import ConfigError
from sglang_w4afp8.kernels.hopper import build
from sglang_w4afp8.kernels.hopper.plan import (
    PATHS,
    UNLIMITED,
    Layer,
    Limits,
    default_limits,
)

logger = logging.getLogger(__name__)

FORMAT = 1
COMMITTED = Path(__file__).parent / "tuning"
RETUNE = "sglang-w4afp8 bench tune --model MODEL --tp N"
Layers = dict[str, dict[str, dict[str, Any]]]


@dataclass(frozen=True)
class Table:
    """A table that has been read and checked.

    Attributes:
        path: where it is.
        device: the card's name, as torch says it.
        layers: by :func:`sizes` and :func:`variant`: ``limits`` by path, and where they are from.
    """

    path: Path
    device: str
    layers: Layers


@dataclass(frozen=True)
class Found:
    """Limits for a layer.

    Attributes:
        limits: to be used.
        source: whence, for a log.
    """

    limits: Limits
    source: str


def slug(device: str) -> str:
    """A card's name as a file's: ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def user_path(device: str) -> Path:
    """The user's table for a card."""
    return build.cache_dir().parent / "tuning" / f"{slug(device)}.json"


def committed_path(device: str) -> Path:
    """The committed table for a card."""
    return COMMITTED / f"{slug(device)}.json"


def sizes(layer: Layer) -> str:
    """The first key: sizes after filling up, as the kernels see them."""
    return (
        f"{layer.experts} experts, {layer.hidden} x {layer.inner}, "
        f"groups {layer.group}/{layer.inner_group}, top {layer.top_k}"
    )


def variant(layer: Layer) -> str:
    """The second key: what makes kernels of the same sizes differ."""
    scheme = "per token" if layer.dynamic else "static"
    return f"{scheme}, {16 if layer.minus_eight else 15} codes"


def read(path: Path, device: str) -> Table:
    """Read and check a table.

    Args:
        path: of a file that exists.
        device: the card that it must be for.

    Raises:
        ConfigError: it is no table, or another card's, or another version's.
    """
    try:
        document = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise _unusable(path, f"it cannot be read: {error}") from error
    if not isinstance(document, dict) or not isinstance(document.get("layers"), dict):
        raise _unusable(path, 'it has no "layers"')
    if document.get("format") != FORMAT:
        raise _unusable(
            path, f"its format is {document.get('format')!r}, this version reads {FORMAT}"
        )
    if document.get("device") != device:
        raise _unusable(path, f"it is for {document.get('device')!r}, this card is {device!r}")
    for key, variants in document["layers"].items():
        if not isinstance(variants, dict) or not variants:
            raise _unusable(path, f"{key!r} has no variants")
        for name, entry in variants.items():
            _check_entry(path, f"{key}: {name}", entry)
    return Table(path, device, document["layers"])


def _check_entry(path: Path, where: str, entry: Any) -> None:
    limits = entry.get("limits") if isinstance(entry, dict) else None
    if not isinstance(limits, dict):
        raise _unusable(path, f'{where!r} has no "limits"')
    for name, most in limits.items():
        if name not in Limits._fields:
            known = ", ".join(Limits._fields)
            raise _unusable(path, f"{where!r} limits a path {name!r}; those here are {known}")
        if not isinstance(most, int) or isinstance(most, bool) or most < 0:
            raise _unusable(path, f"{where!r}: {name} is {most!r}, not a number of tokens")


def _unusable(path: Path, why: str) -> ConfigError:
    ways = [f"{RETUNE}   (measures this card and writes the table anew)", f"rm {path}"]
    return ConfigError(f"tuning table {path}", why, ways)


@lru_cache
def _usable(path: Path, device: str) -> Table | None:
    """The table, read once a process; None, with a warning, where it cannot be used."""
    if not os.path.exists(path):  # unlike Path.exists, False where a folder may not be entered
        return None
    try:
        return read(path, device)
    except ConfigError as error:
        logger.warning("sglang-w4afp8: %s\n  Going on without it: slower at most, not wrong", error)
        return None


def find(layer: Layer, device: str) -> Found:
    """The limits for a layer: the user's, else the committed, else the defaults.

    A table that knows the sizes in another variant only (scheme, codes) is used too: its limits
    were at least measured on this card at these sizes.

    Args:
        layer: the sizes; its own ``limits`` are not looked at.
        device: the card's name.
    """
    for path in (user_path(device), committed_path(device)):
        table = _usable(path, device)
        variants = table.layers.get(sizes(layer)) if table else None
        if variants:
            name = variant(layer) if variant(layer) in variants else next(iter(variants))
            source = f"{path}" + ("" if name == variant(layer) else f", measured with {name}")
            return Found(limits_of(variants[name]["limits"], layer), source)
    return Found(default_limits(layer), "built-in defaults")


def limits_of(named: Mapping[str, int], layer: Layer) -> Limits:
    """Limits by name; a path that the table does not name keeps its default."""
    return default_limits(layer)._replace(**named)


def words(limits: Limits) -> str:
    """``small to 8, medium to 256, large to 900 tokens, prefill beyond``."""
    used: list[str] = []
    reached = 0
    for name, most in limits._asdict().items():
        if most >= UNLIMITED:
            return ", ".join([*used, f"{name} beyond"])
        if most > reached:
            used.append(f"{name} to {most} tokens")
            reached = most
    return ", ".join([*used, f"{PATHS[-1]} beyond"])


@lru_cache
def log_once(layer: Layer, device: str) -> None:
    """Say, once a process and shape, which limits a layer has and whence."""
    found = find(layer, device)
    logger.info("sglang-w4afp8: %s: %s (%s)", sizes(layer), words(found.limits), found.source)


def save(path: Path, layer: Layer, limits: Limits, device: str, origin: str) -> Path | None:
    """Put a layer's limits into a table, whole or not at all; other layers' stay.

    Args:
        path: of the table; made if it is not there.
        layer: the sizes and the variant.
        limits: measured.
        device: the card's name.
        origin: what measured them, when.

    Returns:
        Where a file that was no table has been moved to, or None.
    """
    layers: Layers = {}
    moved = None
    if path.exists():
        try:
            layers = read(path, device).layers
        except ConfigError:
            moved = path.with_suffix(".json.unusable")
            os.replace(path, moved)
    layers.setdefault(sizes(layer), {})[variant(layer)] = {
        "limits": limits._asdict(),
        "from": origin,
    }
    document = {"format": FORMAT, "device": device, "layers": layers}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1)
            file.write("\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _usable.cache_clear()
    return moved
