"""Where ``plan`` gets a model from: a folder, a hub cache, a config.json, or the built-in configs.

Built-in configs (``plan_models.json``) are the public config.json of each model, trimmed to the
keys that decide shapes; their ``quantization_config`` is what ``convert`` writes for the model's
block-FP8 release (GLM-4.5 … 4.7: for the BF16 one). Of a folder with weights only the headers are
read: they say what is really FP8, and whether names and shapes are those of the config.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from sglang_w4afp8.checkpoint.index import CheckpointIndex, TensorEntry, open_index, read_json
from sglang_w4afp8.checkpoint.names import DOWN, layer_of, parse_expert
from sglang_w4afp8.errors import ConfigError
from sglang_w4afp8.spec import ActivationScheme, QuantSpec
from sglang_w4afp8.tools.plan_config import model_from_config
from sglang_w4afp8.tools.plan_model import Linear, Model

_SUFFIXES = re.compile(r"-(fp8|bf16|w4afp8)$")


def built_in() -> list[dict[str, Any]]:
    """The entries of ``plan_models.json``: ``names`` (lists show the first) and ``config``."""
    text = resources.files("sglang_w4afp8.tools").joinpath("plan_models.json").read_text("utf-8")
    entries: list[dict[str, Any]] = json.loads(text)
    return entries


def find_model(target: str) -> Model:
    """The model that ``target`` names: a path that exists, else a built-in name.

    Raises:
        ConfigError: there is no such thing, or its config cannot be understood.
        CheckpointError: config.json is no JSON.
    """
    path = Path(target)
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        return _with_hf_quant(path.name, path, read_json(path), path.parent)
    wanted = _SUFFIXES.sub("", target.rstrip("/").rpartition("/")[2].lower())
    for entry in built_in():
        for name in entry["names"]:
            if name.lower() == wanted:
                return model_from_config(name, "built-in config", entry["config"])
    raise ConfigError(
        f"{target}: no such folder or file, and no built-in model of that name",
        "plan reads a checkpoint folder, a config.json, or one of its own configs",
        [
            f"one of {', '.join(entry['names'][0] for entry in built_in())}",
            "huggingface-cli download REPO config.json --local-dir DIR, then plan DIR",
        ],
    )


def _from_folder(path: Path) -> Model:
    folder = _snapshot(path)
    config = read_json(folder / "config.json")
    if not config:
        raise ConfigError(
            f"{path}: no config.json",
            "sizes and quantization are read from it",
            ["huggingface-cli download REPO config.json --local-dir " + str(path)],
        )
    model = _with_hf_quant(path.resolve().name, folder, config, folder)
    if not any(folder.glob("*.safetensors")):
        model.notes.append("no weight files here: planned from config.json alone")
        return model
    return check_headers(model, open_index(folder, strict=False))


def _snapshot(path: Path) -> Path:
    """``path``, or the snapshot inside a hub cache folder (``models--ORG--NAME``)."""
    snapshots = path / "snapshots"
    if (path / "config.json").is_file() or not snapshots.is_dir():
        return path
    reference = path / "refs" / "main"
    if reference.is_file() and (snapshots / reference.read_text().strip()).is_dir():
        return snapshots / reference.read_text().strip()
    found = sorted(item for item in snapshots.iterdir() if (item / "config.json").is_file())
    return found[-1] if found else path


def _with_hf_quant(name: str, source: Path, config: dict[str, Any], folder: Path) -> Model:
    """The model of a config.json beside which ``hf_quant_config.json`` may say W4AFP8."""
    model = model_from_config(name, str(source), config)
    algorithm = read_json(folder / "hf_quant_config.json").get("quantization", {}).get("quant_algo")
    if model.is_w4afp8 or algorithm != "MIXED_PRECISION":
        return model
    section = {"quantization_config": {"quant_method": "w4afp8"}}
    model = model_from_config(name, str(source), {**config, **section})
    return replace(model, spec=replace(model.spec, origin=QuantSpec.default().origin))


def check_headers(model: Model, index: CheckpointIndex) -> Model:
    """Compare the config with the tensors and take the linears' formats from these.

    Returns:
        The model with ``fp8`` counts, notes and problems as found.
    """
    model.problems.extend(index.problems)
    layers = range(model.layers)
    by_path: dict[str, list[TensorEntry]] = {}
    for entry in index:
        layer = layer_of(entry.name)
        if layer in layers and entry.name.endswith(".weight") and parse_expert(entry.name) is None:
            tail = entry.name.split(f"layers.{layer}.", 1)[1].removesuffix(".weight")
            by_path.setdefault(tail, []).append(entry)
    linears = tuple(_check_linear(model, linear, by_path) for linear in model.linears)
    model = replace(model, linears=linears)
    _check_experts(model, index)
    if model.mtp and not any((layer_of(entry.name) or 0) >= model.layers for entry in index):
        model.problems.append("config.json announces MTP layers, no tensor belongs to them")
    return model


def _check_linear(model: Model, linear: Linear, by_path: dict[str, list[TensorEntry]]) -> Linear:
    parent = linear.path.rpartition(".")[0]
    rows, fp8 = 0, []
    for part in linear.parts:
        entries = by_path.get(f"{parent}.{part}", [])
        if len(entries) < len(linear.layers):
            model.problems.append(
                f"{parent}.{part}.weight: in {len(entries)} of {len(linear.layers)} layers"
            )
            return linear
        (shape, _), *others = Counter(entry.shape for entry in entries).most_common()
        if others or len(shape) != 2 or shape[1] != linear.columns:
            found = ", ".join(str(list(s)) for s in [shape, *(other for other, _ in others)])
            model.problems.append(
                f"{parent}.{part}.weight is {found}, config.json says {linear.columns} columns"
            )
            return linear
        rows += shape[0]
        fp8.append(sum(entry.dtype == "F8_E4M3" for entry in entries))
    if rows != sum(linear.rows):
        model.problems.append(
            f"{linear.path}: {rows} rows in the files, config.json makes it {sum(linear.rows)}"
        )
    if fp8[0] and model.spec.weight_block_size is None:
        model.problems.append(f"{linear.path} is FP8, weight_block_size in config.json is null")
    return replace(linear, fp8=min(fp8))


def _check_experts(model: Model, index: CheckpointIndex) -> None:
    """Format, shape and group size of the experts' down projections, and their input scales."""
    layers, formats, problems = set(model.moe_layers), Counter[str](), Counter[str]()
    scales = 0
    for entry in index:
        name = parse_expert(entry.name)
        if name is None or name.layer not in layers:
            continue
        scales += name.part == "input_scale"
        if name.projection != DOWN:
            continue
        if name.part in ("weight", "weight_packed", "qweight"):
            formats[entry.dtype] += 1
        if not model.is_w4afp8:
            continue
        per_byte = {"weight": 2, "weight_scale_inv": model.spec.group_size}.get(name.part)
        expected = (model.hidden, model.expert_width // (per_byte or 1))
        if per_byte and entry.shape != expected:
            problems[f"experts' down_proj.{name.part} is {list(entry.shape)}, config.json "
                     f"makes it {list(expected)}"] += 1  # fmt: skip
    expected_count = len(layers) * model.experts
    model.problems.extend(f"{text} ({count} tensors)" for text, count in problems.items())
    if sum(formats.values()) != expected_count:
        model.problems.append(
            f"{sum(formats.values())} of {expected_count} experts are in the files"
        )
    if model.is_w4afp8 and set(formats) - {"I8", "U8"}:
        model.problems.append(f"experts are {', '.join(formats)}, W4AFP8 packs them into I8")
    static = model.spec.moe_activation is ActivationScheme.STATIC
    if model.is_w4afp8 and static and scales < 3 * expected_count:
        model.problems.append(
            f"{3 * expected_count - scales} of {3 * expected_count} input scales are missing and "
            "activations are static; SGLANG_W4AFP8_ACTIVATION=dynamic serves without them"
        )
