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

from sglang_w4afp8 import __version__
from sglang_w4afp8.checkpoint.dense_float import DenseFloat
from sglang_w4afp8.checkpoint.formats import ExpertFormat, ExpertParts, detect
from sglang_w4afp8.checkpoint.index import CheckpointIndex
from sglang_w4afp8.checkpoint.names import (
    GEMM_OF,
    ExpertName,
    input_scale_name,
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
from sglang_w4afp8.tools.source_tensors import (
    MAIN_PARTS,
    collect_experts,
    describe_linears,
    quant_section,
)


@dataclass
class ConvertPlan:
    """Everything decided before the first byte.

    Attributes:
        options: see :class:`ConvertOptions`.
        jobs: one per output shard.
        formats: source format → number of expert projections.
        rounded: of these, how many are rounded; the others are taken over exactly.
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
    rounded: int
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


def _check_calibration(name: ExpertName, other: str, options: ConvertOptions) -> None:
    """Refuse what is calibrated by the number of a layer that two modules have.

    Raises:
        ConfigError: names both.
    """
    if options.activation == "static" or options.method == "gptq":
        what = "activation amaxes" if options.activation == "static" else "second moments"
        raise ConfigError(
            f"{other} and {name.module} are both layer {name.layer}",
            f"{what} are looked up by layer, so one would get the other's without a word",
            [
                f"--keep '^{name.module}$'  leaves these experts as they are",
                "--activation dynamic  with --method mse needs no calibration",
            ],
        )


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
    linears = describe_linears(index, quant)
    kept = _kept_modules((name.module for name, _ in experts.values()), options.keep)
    w_names = uses_w_scale_names(index.config)
    tasks: dict[str, Task] = {}
    consumed: set[str] = set()
    formats: Counter[str] = Counter()
    rounded = 0
    groups: set[int] = set()
    modules: dict[int, str] = {}
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
        rounded += options.requantize or source.group_size(bundle) is None
        groups.add(group)
        if modules.setdefault(name.layer, name.module) != name.module:
            _check_calibration(name, modules[name.layer], options)
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
            jobs[entry.shard].copy(entry, linears.renamed.get(entry.name))
    for job in jobs.values():
        job.seal()
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
        rounded=rounded,
        layers=sorted(modules),
        kept=sorted(kept),
        group_size=groups.pop() if groups else options.group_size or 128,
        weight_block_size=linears.block,
        unquantised_linears=linears.plain,
        fingerprint=digest.hexdigest(),
        notes=list(index.notes),
    )
