"""``sglang-w4afp8 inspect CKPT``: what a checkpoint holds, and what is wrong with it.

Reads headers, and of the data only the input scales (two bytes each). The problems it looks for are
those that a server would not mention: a missing input scale that becomes 1.0, an expert or MTP
layer that is listed and absent, scales that contradict the stated group size.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from sglang_w4afp8.checkpoint.formats import ExpertFormat, ExpertParts, detect
from sglang_w4afp8.checkpoint.index import CheckpointIndex, TensorEntry, open_index, read_json
from sglang_w4afp8.checkpoint.names import (
    GEMM_OF,
    PROJECTIONS,
    ExpertName,
    classify,
    layer_of,
    mtp_layers,
    text_config,
    uses_w_scale_names,
)
from sglang_w4afp8.checkpoint.reader import TensorReader
from sglang_w4afp8.errors import W4AFp8Error
from sglang_w4afp8.spec import QuantSpec
from sglang_w4afp8.tools.console import human_bytes, print_json
from sglang_w4afp8.tools.source_tensors import collect_experts, quant_section

Experts = dict[str, tuple[ExpertName, dict[str, TensorEntry]]]

_CLASS_ORDER = (
    "experts",
    "mtp experts",
    "shared experts",
    "dense mlp",
    "attention",
    "router",
    "mtp other",
    "embedding",
    "lm_head",
    "norm",
    "other",
)


@dataclass
class ClassRow:
    """One line of the table.

    Attributes:
        name: tensor class, see :func:`~sglang_w4afp8.checkpoint.names.classify`.
        tensors: number of tensors.
        dtypes: dtype → bytes.
        nbytes: all bytes.
    """

    name: str
    tensors: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)
    nbytes: int = 0


@dataclass
class InspectReport:
    """What was found.

    Attributes:
        path: the directory.
        kind: the checkpoint in one phrase.
        shards: number of files.
        total_bytes: bytes of all tensors.
        classes: the table.
        expert_formats: source format → expert projections.
        group_sizes: INT4 groups → expert projections.
        moe_layers: layers with routed experts.
        mtp_layers: of these, multi-token-prediction layers.
        experts_per_layer: number of experts.
        input_scales: expert projections that have one.
        stock_sglang: why SGLang without the plugin would not serve it right; empty when it would.
        notes: harmless irregularities.
        problems: what should be repaired.
    """

    path: str
    kind: str = "unknown"
    shards: int = 0
    total_bytes: int = 0
    classes: list[ClassRow] = field(default_factory=list)
    expert_formats: dict[str, int] = field(default_factory=dict)
    group_sizes: dict[int, int] = field(default_factory=dict)
    moe_layers: list[int] = field(default_factory=list)
    mtp_layers: list[int] = field(default_factory=list)
    experts_per_layer: int = 0
    input_scales: int = 0
    stock_sglang: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def _table(index: CheckpointIndex, mtp: frozenset[int]) -> list[ClassRow]:
    rows: dict[str, ClassRow] = {}
    for entry in index:
        name = classify(entry.name, mtp)
        row = rows.setdefault(name, ClassRow(name))
        row.tensors += 1
        row.nbytes += entry.nbytes
        row.dtypes[entry.dtype] = row.dtypes.get(entry.dtype, 0) + entry.nbytes
    return [rows[name] for name in _CLASS_ORDER if name in rows]


def _check_completeness(index: CheckpointIndex, experts: Experts, report: InspectReport) -> None:
    """Every MoE layer has the same experts, every expert three projections, MTP is there."""
    present: dict[str, set[tuple[int, str]]] = defaultdict(set)
    layers: dict[str, int] = {}
    for name, _ in experts.values():
        present[name.module].add((name.expert, name.projection))
        layers[name.module] = name.layer
    config = text_config(index.config)
    stated = next(
        (
            config[k]
            for k in ("n_routed_experts", "num_experts", "num_local_experts")
            if k in config
        ),
        None,
    )
    counts = {module: len({expert for expert, _ in found}) for module, found in present.items()}
    expected = stated if isinstance(stated, int) else max(counts.values(), default=0)
    report.experts_per_layer = expected
    report.moe_layers = sorted(set(layers.values()))
    for module, found in sorted(present.items(), key=lambda item: layers[item[0]]):
        missing = [
            f"{expert}.{projection}"
            for expert in range(expected)
            for projection in PROJECTIONS
            if (expert, projection) not in found
        ]
        if missing:
            report.problems.append(
                f"{module}: {len(missing)} of {3 * expected} expert matrices are missing, "
                f"first {missing[0]}; they would stay uninitialised"
            )
    announced = mtp_layers(index.config)
    have = {layer_of(entry.name) for entry in index}
    for layer in sorted(announced - have):
        report.problems.append(
            f"config.json announces an MTP layer {layer}, no tensor belongs to it: speculative "
            "decoding with this checkpoint would not start"
        )
    report.mtp_layers = sorted(announced & have)


def _check_formats(index: CheckpointIndex, experts: Experts, report: InspectReport) -> None:
    quant = quant_section(index.config)
    formats: Counter[str] = Counter()
    groups: Counter[int] = Counter()
    complaints: Counter[str] = Counter()
    for prefix, (_, parts) in experts.items():
        bundle = ExpertParts(prefix, parts, quant)
        try:
            source: ExpertFormat = detect(bundle)
            source.shape(bundle)
            reason = source.inexact(bundle)
            group = None if reason else source.group_size(bundle)
        except W4AFp8Error as error:
            if not complaints["format"]:
                report.problems.append(f"{error.found}: {error.why}")
            complaints["format"] += 1
            continue
        formats[source.name] += 1
        if group is not None:
            groups[group] += 1
        report.input_scales += "input_scale" in parts
    if complaints["format"] > 1:
        report.problems.append(f"… and {complaints['format'] - 1} more expert matrices like it")
    report.expert_formats = dict(formats)
    report.group_sizes = dict(groups)


def _check_linears(index: CheckpointIndex, report: InspectReport) -> None:
    bare = [
        entry.name
        for entry in index
        if entry.dtype == "F8_E4M3"
        and entry.name.endswith(".weight")
        and not any(
            f"{entry.name.removesuffix('.weight')}.{part}" in index.tensors
            for part in ("weight_scale_inv", "weight_scale", "scale")
        )
    ]
    if bare:
        report.problems.append(f"{len(bare)} FP8 weights have no scales, first {bare[0]}")


def _check_input_scales(
    index: CheckpointIndex, experts: Experts, spec: QuantSpec, report: InspectReport
) -> None:
    total = len(experts)
    if spec.moe_activation.value != "static":
        if report.input_scales:
            report.notes.append(
                f"{report.input_scales} input scales are stored, the config says "
                f"{spec.moe_activation.value}: they have no effect"
            )
        return
    if report.input_scales < total:
        report.problems.append(
            f"{total - report.input_scales} of {total} expert matrices have no input_scale, "
            "activations are static; SGLang alone would take 1.0 for each (the scale of a layer is "
            "the largest of its experts'). Repair: sglang-w4afp8 convert CKPT DST --act-scales "
            "FILE, or serve with SGLANG_W4AFP8_ACTIVATION=dynamic"
        )
    values: dict[tuple[str, int, str], set[float]] = defaultdict(set)
    per_layer: dict[tuple[str, str], set[float]] = defaultdict(set)
    unfit = unusable = 0
    with TensorReader(index.root) as reader:
        for name, parts in experts.values():
            entry = parts.get("input_scale")
            if entry is None:
                continue
            value = float(reader.read(entry).to(torch.float64).max())
            gemm = GEMM_OF[name.projection]
            values[(name.module, name.expert, gemm)].add(value)
            per_layer[(name.module, gemm)].add(value)
            unfit += float(torch.tensor(value).to(torch.bfloat16)) != value
            unusable += not 0.0 < value < float("inf")
    unequal = sum(len(found) > 1 for found in values.values())
    uneven = sum(len(found) > 1 for found in per_layer.values())
    if unusable:
        report.problems.append(f"{unusable} input scales are zero, negative or not finite")
    if unequal:
        report.stock_sglang.append(
            f"{unequal} experts have different input scales for gate and up; its loader raises"
        )
    if unfit:
        report.stock_sglang.append(
            f"{unfit} input scales are no BF16 numbers; its loader compares gate's rounded value "
            "with up's exact one and raises when they differ by more than 1e-5"
        )
    if uneven:
        report.notes.append(
            f"input scales differ between the experts of {uneven} layer GEMMs; SGLang takes the "
            "largest of a rank's own experts, so expert-parallel ranks would disagree"
        )


def _check_w4afp8(index: CheckpointIndex, experts: Experts, report: InspectReport) -> None:
    section = quant_section(index.config)
    hf = read_json(index.root / "hf_quant_config.json")
    is_mixed = hf.get("quantization", {}).get("quant_algo") == "MIXED_PRECISION"
    if section and section.get("quant_method") != "w4afp8":
        report.problems.append(
            f"experts are W4AFP8, config.json says quant_method {section.get('quant_method')!r}: "
            "SGLang would choose another method"
        )
        return
    if not section and not is_mixed:
        report.problems.append(
            "experts are W4AFP8, but neither config.json nor hf_quant_config.json says so: SGLang "
            "would load the model as unquantised"
        )
    try:
        spec = QuantSpec.from_dict(section) if section else QuantSpec.default()
    except W4AFp8Error as error:
        report.problems.append(f"{error.found}: {error.why}")
        return
    for group, count in report.group_sizes.items():
        if group != spec.group_size:
            report.problems.append(
                f"{count} expert matrices have groups of {group}, the config says {spec.group_size}"
            )
    _check_input_scales(index, experts, spec, report)
    if spec.moe_activation.value != "static":
        report.stock_sglang.append("it has no dynamic scheme and takes 1.0 for every input scale")
    if spec.group_size != 128:
        report.stock_sglang.append(f"it knows groups of 128 only, these are {spec.group_size}")
    if spec.weight_block_size != (128, 128):
        stated = spec.weight_block_size or "not FP8"
        report.stock_sglang.append(f"it assumes 128x128 FP8 linears, these are {stated}")
    skipped = [n for n in spec.ignored_layers if not n.endswith((".gate", "lm_head", "eh_proj"))]
    if skipped and spec.weight_block_size:
        report.stock_sglang.append(
            f"it ignores modules_to_not_convert and would read {skipped[0]} as FP8"
        )
    has_w_names = any(".w1.input_scale" in entry.name for entry in index)
    if has_w_names and not uses_w_scale_names(index.config):
        report.stock_sglang.append(
            "w1/w2/w3.input_scale names are known to DeepSeek's loader only, others drop them"
        )
    report.kind = (
        f"W4AFP8, INT4 g{spec.group_size} experts, {spec.moe_activation.value} activations, "
        + ("FP8 linears" if spec.weight_block_size else "unquantised linears")
    )


def inspect_checkpoint(path: str) -> InspectReport:
    """Describe a checkpoint directory.

    Args:
        path: directory of safetensors files.

    Raises:
        CheckpointError: there is nothing to describe.
    """
    index = open_index(path, strict=False)
    report = InspectReport(path=str(path), shards=len(index.shards))
    report.problems = list(index.problems)
    report.notes = list(index.notes)
    report.total_bytes = index.total_bytes
    report.classes = _table(index, mtp_layers(index.config))
    try:
        experts = collect_experts(index)
    except W4AFp8Error as error:
        report.problems.append(f"{error.found}: {error.why}")
        return report
    _check_linears(index, report)
    if not experts:
        report.kind = "no routed experts"
        return report
    _check_completeness(index, experts, report)
    _check_formats(index, experts, report)
    report.kind = " + ".join(sorted(report.expert_formats)) + " experts"
    if "w4afp8" in report.expert_formats:
        _check_w4afp8(index, experts, report)
    return report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("checkpoint", help="directory of safetensors files")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def _layers(numbers: list[int]) -> str:
    return f"{numbers[0]}–{numbers[-1]} ({len(numbers)})" if numbers else "none"


def run(args: argparse.Namespace) -> int:
    """Run the command; 1 when problems were found."""
    report = inspect_checkpoint(args.checkpoint)
    if args.json:
        document: dict[str, Any] = asdict(report)
        print_json(document)
        return 1 if report.problems else 0
    print(f"{report.path}: {report.kind}")
    print(f"{report.shards} shards, {human_bytes(report.total_bytes)}")
    if report.moe_layers:
        mtp = f", MTP {_layers(report.mtp_layers)}" if report.mtp_layers else ""
        print(
            f"MoE layers {_layers(report.moe_layers)}{mtp}, {report.experts_per_layer} experts; "
            + ", ".join(f"{n} matrices {kind}" for kind, n in report.expert_formats.items())
        )
    print(f"\n{'class':<16} {'tensors':>8} {'size':>10}  dtypes")
    for row in report.classes:
        dtypes = ", ".join(
            f"{name} {human_bytes(size)}"
            for name, size in sorted(row.dtypes.items(), key=lambda item: -item[1])
        )
        print(f"{row.name:<16} {row.tensors:>8} {human_bytes(row.nbytes):>10}  {dtypes}")
    for title, lines in (
        ("\nSGLang without the plugin would not serve this:", report.stock_sglang),
        ("\nNotes:", report.notes),
        ("\nProblems:", report.problems),
    ):
        if lines:
            print(title, *(f"  - {line}" for line in lines), sep="\n")
    if not report.problems:
        print("\nno problems found")
    return 1 if report.problems else 0
