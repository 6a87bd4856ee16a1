"""The tensors of a source checkpoint as the tools see them: experts, input scales, other linears.

Between the file level (:mod:`sglang_w4afp8.checkpoint`) and the commands: groups parts into
projections and says how the linears outside the experts are stored.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from sglang_w4afp8.checkpoint.fp8_block import DEFAULT_BLOCK, block_of
from sglang_w4afp8.checkpoint.index import CheckpointIndex, TensorEntry
from sglang_w4afp8.checkpoint.names import (
    GEMM_OF,
    ExpertName,
    is_fused_expert,
    parse_expert,
    text_config,
)
from sglang_w4afp8.errors import CheckpointError

# The part that decides in which shard the result of an expert projection is stored.
MAIN_PARTS = ("weight", "weight_packed", "qweight")
_INT4_LINEAR = re.compile(r"\.(qweight|weight_packed)$")


def quant_section(config: dict[str, Any]) -> dict[str, Any]:
    """The source's quantization config, wherever its config.json keeps it."""
    for place in (config, text_config(config)):
        for key in ("quantization_config", "compression_config"):
            section = place.get(key)
            if isinstance(section, dict):
                return section
    return {}


def collect_experts(index: CheckpointIndex) -> dict[str, tuple[ExpertName, dict[str, TensorEntry]]]:
    """Group the expert tensors by projection.

    Raises:
        CheckpointError: the checkpoint stores all experts of a layer in one tensor.
    """
    # TensorRT-style w1.input_scale belongs to gate_proj: hence the canonical projection as key.
    grouped: dict[tuple[str, int, str], list[tuple[ExpertName, TensorEntry]]] = {}
    for entry in index:
        name = parse_expert(entry.name)
        if name is not None:
            key = (name.module, name.expert, name.projection)
            grouped.setdefault(key, []).append((name, entry))
        elif is_fused_expert(entry.name) and len(entry.shape) == 3:
            raise CheckpointError(
                f"{entry.name} {list(entry.shape)}",
                "all experts of the layer are in one tensor; convert reads checkpoints with one "
                "tensor per expert and projection",
                ["save the model with per-expert tensors first"],
            )
    found: dict[str, tuple[ExpertName, dict[str, TensorEntry]]] = {}
    for (module, expert, projection), items in grouped.items():
        main = [name for name, _ in items if name.part in MAIN_PARTS]
        if not main:
            raise CheckpointError(
                f"{module}.{expert} has no {projection} weight, only {items[0][1].name}",
                "scales without their weight cannot be converted",
                ["download the shard that the index names for it", "rebuild the index"],
            )
        found[main[0].prefix] = (main[0], {name.part: entry for name, entry in items})
    return found


def input_scale_entries(
    experts: dict[str, tuple[ExpertName, dict[str, TensorEntry]]],
) -> dict[tuple[int, str], list[TensorEntry]]:
    """``(layer, gemm)`` → the input scales in the source; empty unless every expert has one."""
    found: dict[tuple[int, str], list[TensorEntry]] = {}
    for name, parts in experts.values():
        if "input_scale" not in parts:
            return {}
        found.setdefault((name.layer, GEMM_OF[name.projection]), []).append(parts["input_scale"])
    return found


@dataclass
class Linears:
    """How the linears outside the experts are stored.

    Attributes:
        block: FP8 block, or None when none of them is FP8.
        plain: modules that are not FP8 although others are.
        renamed: scale tensors whose names change, old → new.
    """

    block: tuple[int, int] | None = None
    plain: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)


def describe_linears(index: CheckpointIndex, quant: dict[str, Any]) -> Linears:
    """Look at every linear outside the experts.

    compressed-tensors calls the scales of block-FP8 linears ``weight_scale``; the W4AFP8 method's
    linears want ``weight_scale_inv``, same numbers. DeepSeek-V4's ``scale`` stays: its SGLang
    loader renames it.

    Raises:
        CheckpointError: a linear is INT4, or FP8 with another scale than one block size for all.
    """
    found = Linears()
    blocks: dict[tuple[int, int], str] = {}
    plain: list[str] = []
    for entry in index:
        if parse_expert(entry.name) is not None:
            continue
        if _INT4_LINEAR.search(entry.name):
            raise CheckpointError(
                f"{entry.name} {entry.dtype} {list(entry.shape)}",
                "linears outside the experts are INT4 too, and W4AFP8 has no such layer",
                ["convert from the BF16 or FP8 checkpoint instead"],
            )
        if len(entry.shape) != 2 or not entry.name.endswith(".weight"):
            continue
        prefix = entry.name.removesuffix(".weight")
        if entry.dtype != "F8_E4M3":
            if "embed" not in prefix and "norm" not in prefix:
                plain.append(prefix)
            continue
        blocks.setdefault(_linear_block(index, prefix, entry, quant, found), prefix)
    if len(blocks) > 1:
        listed = ", ".join(f"{n}x{k} ({prefix})" for (n, k), prefix in blocks.items())
        raise CheckpointError(
            f"FP8 linears have different blocks: {listed}",
            "the format states one block size; per-channel and per-tensor scales have none",
            ["convert from the BF16 checkpoint, or from one with block scales"],
        )
    if blocks:
        found.block = next(iter(blocks))
        found.plain = sorted(plain)
    return found


def _linear_block(
    index: CheckpointIndex, prefix: str, weight: TensorEntry, quant: dict[str, Any], found: Linears
) -> tuple[int, int]:
    declared = quant.get("weight_block_size")
    for part in ("weight_scale_inv", "weight_scale", "scale"):
        scale = index.tensors.get(f"{prefix}.{part}")
        if scale is None:
            continue
        block = block_of(prefix, weight, scale, declared)
        if declared is None and block != DEFAULT_BLOCK:
            # A matrix inside one block has a single scale whatever it is called.
            if scale.shape != (1, 1) or max(weight.shape) > min(DEFAULT_BLOCK):
                raise CheckpointError(
                    f"{scale.name} {list(scale.shape)} for {list(weight.shape)}",
                    "the linear has per-channel or per-tensor FP8 scales; W4AFP8 checkpoints have "
                    "block scales beside the experts",
                    ["convert from the BF16 checkpoint, or from one with block scales"],
                )
            block = DEFAULT_BLOCK
        if part == "weight_scale":
            found.renamed[scale.name] = f"{prefix}.weight_scale_inv"
        return block
    raise CheckpointError(
        f"{prefix}.weight is FP8 and has no scales",
        "the linear cannot be restored without them",
        ["download the shard that the index names for them", "rebuild the index"],
    )
