"""The plan of a conversion: which shard of the result holds what, made from headers alone.

Every output shard has the name of the source shard whose weights it holds. A tensor is converted
(routed expert, not kept) or copied bit for bit; an expert's scales may come from any shard. All
shapes, dtypes and divisibilities are checked here, before the first byte is written.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from sglang_w4afp8 import __version__
from sglang_w4afp8.checkpoint.dense_float import DenseFloat
from sglang_w4afp8.checkpoint.formats import ExpertFormat, ExpertParts, detect
from sglang_w4afp8.checkpoint.index import CheckpointIndex, TensorEntry
from sglang_w4afp8.checkpoint.names import (
    GEMM_OF,
    ExpertName,
    input_scale_name,
    is_fused_expert,
    parse_expert,
    text_config,
    uses_w_scale_names,
)
from sglang_w4afp8.errors import CheckpointError, ConfigError
from sglang_w4afp8.spec import GROUP_SIZES
from sglang_w4afp8.tools.convert_tasks import (
    ConvertOptions,
    ExpertTask,
    MomentsRef,
    UnpackTask,
)
from sglang_w4afp8.tools.rewrite_job import ShardJob, Task

# The part that decides in which shard the result of an expert projection is stored.
MAIN_PARTS = ("weight", "weight_packed", "qweight")
_INT4_LINEAR = re.compile(r"\.(qweight|weight_packed)$")


@dataclass
class ConvertPlan:
    """Everything decided before the first byte.

    Attributes:
        options: see :class:`ConvertOptions`.
        jobs: one per output shard.
        formats: source format → number of expert projections.
        layers: MoE layers that are converted.
        kept: ``…experts`` modules left as they are.
        group_size: of the result.
        weight_block_size: FP8 block of the copied linears, or None when they are not FP8.
        unquantised_linears: modules that are not FP8 although ``weight_block_size`` is set.
        fingerprint: hash of the source layout, the options and the static scales.
        notes: remarks for the report.
    """

    options: ConvertOptions
    jobs: list[ShardJob]
    formats: dict[str, int]
    layers: list[int]
    kept: list[str]
    group_size: int
    weight_block_size: tuple[int, int] | None
    unquantised_linears: list[str]
    fingerprint: str
    notes: list[str]

    @property
    def source_bytes(self) -> int:
        """Bytes read by all jobs."""
        return sum(job.source_bytes for job in self.jobs)

    @property
    def output_bytes(self) -> int:
        """Bytes of all tensors of the result."""
        return sum(job.output_bytes for job in self.jobs)


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


def _kept_modules(modules: Iterable[str], patterns: tuple[str, ...]) -> set[str]:
    try:
        compiled = [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        raise ConfigError(
            f"--keep {patterns}: {error}",
            "this is no regular expression",
            [r"--keep '\.layers\.3\.'"],
        ) from error
    unique = set(modules)
    for pattern in compiled:
        if not any(pattern.search(module) for module in unique):
            raise ConfigError(
                f"--keep {pattern.pattern!r} matches no MoE layer",
                "patterns are searched in the path of a layer's experts, e.g. "
                f"{min(unique, default='(there is none)')}",
                [r"--keep '\.layers\.3\.'"],
            )
    return {m for m in unique if any(pattern.search(m) for pattern in compiled)}


def _result_group(source_group: int | None, wanted: int | None, columns: int, prefix: str) -> int:
    if source_group is None:
        group = wanted or 128
    else:
        # Per-channel and odd groups are cut to the largest one that kernels know.
        group = wanted or next((g for g in (128, 64, 32) if source_group % g == 0), source_group)
    if source_group is not None and (source_group % group or group not in GROUP_SIZES):
        raise ConfigError(
            f"{prefix}: source groups of {source_group}, --group-size {group}",
            "INT4 codes can be taken over exactly only when the new group divides the old one; "
            "coarser groups would need requantisation, which costs 2 to 3 dB",
            [f"--group-size {g}" for g in GROUP_SIZES if source_group % g == 0]
            + ["--requantize", "convert from the BF16 or FP8 checkpoint instead"],
        )
    if columns % group:
        fitting = [g for g in (128, 64, 32) if columns % g == 0]
        raise ConfigError(
            f"{prefix}: K = {columns} with --group-size {group}",
            "the format has one scale per whole group",
            [f"--group-size {g}" for g in fitting] or ["--keep REGEX  leaves the layer as it is"],
        )
    return group


def _moments_of(moments: CheckpointIndex, name: ExpertName, columns: int) -> MomentsRef:
    gemm = GEMM_OF[name.projection]
    wanted = [f"{name.module}.{name.expert}.{gemm}.hessian", f"{name.module}.{gemm}.hessian"]
    entry = next((moments.tensors[n] for n in wanted if n in moments.tensors), None)
    if entry is None:
        raise ConfigError(
            f"--hessians {moments.root} has neither {wanted[0]} nor {wanted[1]}",
            "gptq needs the second moments of every layer's inputs",
            ["calibrate again", "--method mse  needs no calibration"],
        )
    if entry.shape != (columns, columns):
        raise ConfigError(
            f"{entry.name} has shape {list(entry.shape)}, {name.prefix} has K = {columns}",
            "they belong to another layer or model",
            ["calibrate this model"],
        )
    return MomentsRef(moments.root, entry)


def _group_of(
    source: ExpertFormat, parts: ExpertParts, shape: tuple[int, int], options: ConvertOptions
) -> int:
    reason = source.inexact(parts)
    if reason and not options.requantize:
        raise CheckpointError(
            f"{parts.prefix} is in {source.name} format",
            f"it cannot be taken over exactly: {reason}",
            [
                f"sglang-w4afp8 convert SRC DST --requantize --method {options.method}  rounds the "
                "4-bit weights once more",
                "convert from the BF16 or FP8 checkpoint instead: one rounding, not two",
            ],
        )
    taken_over = None if options.requantize else source.group_size(parts)
    return _result_group(taken_over, options.group_size, shape[1], parts.prefix)


def _linears(
    index: CheckpointIndex, quant: dict[str, Any]
) -> tuple[tuple[int, int] | None, list[str]]:
    """FP8 block of the non-expert linears, and which of them are not FP8."""
    has_fp8 = False
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
        if entry.dtype == "F8_E4M3":
            has_fp8 = True
        elif "embed" not in entry.name and "norm" not in entry.name:
            plain.append(entry.name.removesuffix(".weight"))
    if not has_fp8:
        return None, []
    block = quant.get("weight_block_size") or (128, 128)
    return (int(block[0]), int(block[1])), sorted(plain)


def make_plan(
    index: CheckpointIndex,
    options: ConvertOptions,
    input_scales: dict[tuple[int, str], float] | None = None,
    moments: CheckpointIndex | None = None,
) -> ConvertPlan:
    """Decide everything about a conversion.

    Args:
        index: the source.
        options: what is wanted.
        input_scales: ``(layer, gemm)`` → static scale, for ``activation="static"``.
        moments: second moments of the experts' inputs, for ``method="gptq"``: tensors
            ``…layers.L.….experts[.E].(w13|w2).hessian``, ``(K, K)``.

    Raises:
        CheckpointError: the source has no routed experts, or parts are missing or misshapen.
        ConfigError: an option does not fit the source.
    """
    quant = quant_section(index.config)
    experts = collect_experts(index)
    if not experts:
        raise CheckpointError(
            f"{index.root} has no routed experts",
            "W4AFP8 quantises the experts of MoE models; nothing here matches "
            "…layers.L.….experts.E.(gate|up|down)_proj.*",
            ["sglang-w4afp8 inspect SRC  lists the tensor classes"],
        )
    kept = _kept_modules((name.module for name, _ in experts.values()), options.keep)
    w_names = uses_w_scale_names(index.config)
    tasks: dict[str, Task] = {}
    consumed: set[str] = set()
    formats: Counter[str] = Counter()
    groups: set[int] = set()
    layers: set[int] = set()
    for prefix, (name, parts) in experts.items():
        bundle = ExpertParts(prefix, parts, quant)
        source = detect(bundle)
        shape = source.shape(bundle)
        main = next(part for part in MAIN_PARTS if part in parts)
        if name.module in kept:
            if source.name != DenseFloat.name:
                tasks[parts[main].name] = UnpackTask(name, bundle, source.name, shape)
                consumed.update(entry.name for entry in parts.values())
            continue
        group = _group_of(source, bundle, shape, options)
        scale = None
        if input_scales is not None and options.activation == "static":
            scale = input_scales[(name.layer, GEMM_OF[name.projection])]
        tasks[parts[main].name] = ExpertTask(
            name=name,
            parts=bundle,
            format_name=source.name,
            shape=shape,
            group_size=group,
            options=options,
            moments=None if moments is None else _moments_of(moments, name, shape[1]),
            input_scale=scale,
            input_scale_name=input_scale_name(
                name.module, name.expert, name.projection, w_names=w_names
            ),
        )
        consumed.update(entry.name for entry in parts.values())
        formats[source.name] += 1
        groups.add(group)
        layers.add(name.layer)
    if len(groups) > 1:
        raise ConfigError(
            f"experts would have group sizes {sorted(groups)}",
            "a checkpoint states one group size for all layers",
            [f"--group-size {min(groups)}"],
        )
    jobs = {shard: ShardJob(shard) for shard in index.shards}
    for entry in index:
        task = tasks.get(entry.name)
        if task is not None:
            jobs[entry.shard].add(task)
        elif entry.name not in consumed:
            jobs[entry.shard].copy(entry)
    for job in jobs.values():
        job.seal()
    block, plain = _linears(index, quant)
    digest = hashlib.sha256()
    digest.update(index.fingerprint().encode())
    digest.update(json.dumps(asdict(options), sort_keys=True).encode())
    scales = sorted((f"{key[0]}.{key[1]}", value) for key, value in (input_scales or {}).items())
    calibration = moments.fingerprint() if moments is not None else None
    digest.update(json.dumps([__version__, scales, calibration]).encode())
    return ConvertPlan(
        options=options,
        # A shard can end up empty: scales of FP8 experts may have a file of their own.
        jobs=[job for job in jobs.values() if job.outputs],
        formats=dict(formats),
        layers=sorted(layers),
        kept=sorted(kept),
        group_size=groups.pop() if groups else options.group_size or 128,
        weight_block_size=block,
        unquantised_linears=plain,
        fingerprint=digest.hexdigest(),
        notes=list(index.notes),
    )
