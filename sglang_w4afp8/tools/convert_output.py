"""The files of a converted checkpoint that are not weights: index, configs, manifest, model card.

Everything here is a function of the plan and the shard records alone, without dates or paths, so
that an interrupted and a straight conversion end in identical bytes.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sglang_w4afp8 import __version__
from sglang_w4afp8.checkpoint.index import INDEX_NAME, CheckpointIndex
from sglang_w4afp8.checkpoint.names import PROJECTIONS, parse_expert, text_config
from sglang_w4afp8.checkpoint.stream import TEMP_SUFFIX, write_atomic, write_error
from sglang_w4afp8.quantize.metrics import ErrorStats
from sglang_w4afp8.spec import QuantSpec
from sglang_w4afp8.tools.console import human_bytes
from sglang_w4afp8.tools.convert_plan import ConvertPlan
from sglang_w4afp8.tools.rewrite import MANIFEST_NAME
from sglang_w4afp8.tools.rewrite_job import ShardJob, ShardRecord
from sglang_w4afp8.tools.source_tensors import quant_section

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_REWRITTEN = frozenset(
    {"config.json", "hf_quant_config.json", "quant_cfg.json", "README.md", MANIFEST_NAME}
)
# A skip list of the source that would contradict ours, under any of its spellings.
_SKIP_KEYS = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules")


def dump(value: Any) -> bytes:
    """JSON as this tool writes it: two spaces, a final newline."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def producer(plan: ConvertPlan, minus_eight: bool) -> dict[str, Any]:
    """The recipe, for people and for bug reports; no reader acts on it."""
    return {
        "name": "sglang-w4afp8",
        "version": __version__,
        "method": plan.options.method if plan.rounded else "taken over exactly",
        "source_formats": plan.formats,
        "codes": [-8, 7] if minus_eight else [-7, 7],
    }


def quantization_config(
    plan: ConvertPlan, source_config: dict[str, Any], minus_eight: bool
) -> dict[str, Any]:
    """The ``quantization_config`` of the result's config.json."""
    source = quant_section(source_config)
    skipped = set(plan.unquantised_linears) | set(plan.kept)
    if plan.weight_block_size is not None:
        for key in _SKIP_KEYS:
            names = source.get(key)
            if isinstance(names, list):
                # compressed-tensors' regular expressions are covered by the tensors' dtypes.
                skipped.update(n for n in names if isinstance(n, str) and not n.startswith("re:"))
    section: dict[str, Any] = {
        "quant_method": "w4afp8",
        "group_size": plan.group_size,
        "weight_block_size": list(plan.weight_block_size) if plan.weight_block_size else None,
        "moe_activation_scheme": plan.options.activation,
        "modules_to_not_convert": sorted(skipped),
    }
    if source.get("scale_fmt") and plan.weight_block_size:
        section["scale_fmt"] = source["scale_fmt"]  # E8M0 linears keep theirs
    section["producer"] = producer(plan, minus_eight)
    QuantSpec.from_dict(section, "the config.json to be written")
    return section


def hf_quant_config() -> dict[str, Any]:
    """The older style that SGLang and TensorRT-LLM recognise without a quantization_config."""
    return {
        "producer": {"name": "sglang-w4afp8", "version": __version__},
        "quantization": {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None},
    }


def model_config(source_config: dict[str, Any], section: dict[str, Any]) -> dict[str, Any]:
    """config.json of the result: the source's with the quantization section replaced."""
    config = copy.deepcopy(source_config)
    for place in (config, config.get("text_config")):
        if isinstance(place, dict):
            place.pop("quantization_config", None)
            place.pop("compression_config", None)
    config["quantization_config"] = section
    return config


def weight_index(jobs: Iterable[ShardJob]) -> dict[str, Any]:
    """The safetensors index of what jobs make."""
    placed = [(item.name, job.shard, item.nbytes) for job in jobs for item in job.outputs]
    return {
        "metadata": {"total_size": sum(nbytes for _, _, nbytes in placed)},
        "weight_map": {name: shard for name, shard, _ in sorted(placed)},
    }


def quality_table(records: Iterable[ShardRecord]) -> dict[str, Any]:
    """Energies added up: overall, per layer and projection, and the worst tensors.

    Returns:
        ``{"overall": {...}, "layers": {"3": {"gate": {...}}}, "worst": [...]}``; SNR in dB.
    """
    total = ErrorStats()
    layers: dict[int, dict[str, ErrorStats]] = {}
    singles: list[tuple[float, str]] = []
    for record in records:
        for prefix, energies in record.quality.items():
            stats = ErrorStats(**energies)
            name = parse_expert(f"{prefix}.weight")
            assert name is not None
            total.add(stats)
            layers.setdefault(name.layer, {}).setdefault(name.projection, ErrorStats()).add(stats)
            singles.append((stats.snr_db, prefix))
    if not singles:
        return {}

    def row(stats: ErrorStats) -> dict[str, float]:
        return {"snr_db": round(stats.snr_db, 3), "cosine": round(stats.cosine, 6)}

    return {
        "overall": {**row(total), "weights": total.count, "zero_groups": total.zero_groups},
        "layers": {
            str(layer): {p: row(layers[layer][p]) for p in PROJECTIONS if p in layers[layer]}
            for layer in sorted(layers)
        },
        "worst": [
            {"name": prefix, "snr_db": round(snr, 3)} for snr, prefix in sorted(singles)[:20]
        ],
    }


def manifest(
    fingerprint: str, options: dict[str, Any], records: Iterable[ShardRecord], **more: Any
) -> dict[str, Any]:
    """What a run made, under which options, with checksums."""
    return {
        "format": "sglang-w4afp8 manifest 1",
        "fingerprint": fingerprint,
        "version": __version__,
        "options": options,
        **more,
        "shards": {
            record.shard: {"sha256": record.sha256, "size_bytes": record.size_bytes}
            for record in sorted(records, key=lambda item: item.shard)
        },
    }


def conversion_manifest(plan: ConvertPlan, records: list[ShardRecord]) -> dict[str, Any]:
    """:func:`manifest` of a conversion."""
    return manifest(
        plan.fingerprint,
        {
            "method": plan.options.method,
            "group_size": plan.group_size,
            "activation": plan.options.activation,
            "symmetric": plan.options.symmetric,
            "keep": list(plan.options.keep),
            "device": plan.options.device_type,
        },
        records,
        source_formats=plan.formats,
        layers=plan.layers,
        kept=plan.kept,
        quality=quality_table(records),
    )


def model_card(
    plan: ConvertPlan, index: CheckpointIndex, records: list[ShardRecord], minus_eight: bool
) -> str:
    """README.md of the result."""
    config = text_config(index.config)
    options = plan.options
    name = index.config.get("_name_or_path") or config.get("model_type", "model")
    linears = (
        f"FP8 E4M3, {plan.weight_block_size[0]}x{plan.weight_block_size[1]} blocks, unchanged"
        if plan.weight_block_size
        else "as in the source, unchanged"
    )
    activations = (
        "FP8 E4M3, static scales (one per layer and GEMM)"
        if options.activation == "static"
        else "FP8 E4M3, dynamic; the checkpoint holds no input scales"
    )
    codes = "codes −8…7, scales may be negative" if minus_eight else "codes −7…7"
    method = producer(plan, minus_eight)["method"]
    quality = quality_table(records)
    lines = [
        "---",
        "library_name: sglang",
        "tags: [w4afp8, int4, fp8, moe]",
        "---",
        "",
        f"# {name}, W4AFP8",
        "",
        f"Made by sglang-w4afp8 {__version__}.",
        "",
        "| | |",
        "|---|---|",
        f"| routed experts | INT4 g{plan.group_size} along K, BF16 scales, {codes} |",
        f"| method | {method}; source: {', '.join(sorted(plan.formats)) or 'none'} |",
        f"| expert activations | {activations} |",
        f"| other linears | {linears} |",
        f"| converted layers | {_ranges(plan.layers)} |",
        f"| left as they were | {', '.join(plan.kept) or 'none'} |",
        f"| size | {human_bytes(plan.source_bytes)} → {human_bytes(plan.output_bytes)} |",
        "",
        "## Serve",
        "",
        "```bash",
        "pip install sglang-w4afp8",
        "python3 -m sglang.launch_server --model-path PATH --tp 8 --trust-remote-code",
        "```",
        "",
    ]
    if options.activation == "dynamic":
        lines += [
            "Dynamic activations need the sglang-w4afp8 plugin: SGLang alone reads no scheme from "
            "the config and would use 1.0 for every missing input scale.",
            "",
        ]
    if plan.weight_block_size is None:
        lines += [
            "The linears outside the experts are not FP8. SGLang alone assumes 128x128 block FP8 "
            "for them; the sglang-w4afp8 plugin reads `weight_block_size: null`.",
            "",
        ]
    if quality:
        overall = quality["overall"]
        lines += [
            "## What rounding cost",
            "",
            f"Signal-to-noise over all converted weights: **{overall['snr_db']:.2f} dB** "
            f"(cosine {overall['cosine']:.5f}). Worst tensors:",
            "",
            "| tensor | SNR (dB) |",
            "|---|---:|",
            *(f"| `{item['name']}` | {item['snr_db']:.2f} |" for item in quality["worst"][:5]),
            "",
            "SNR of the weights is no accuracy figure; evaluate the model on your task.",
            "",
        ]
    lines += [
        "## Checksums (sha256)",
        "",
        "```",
        *(f"{r.sha256}  {r.shard}" for r in sorted(records, key=lambda item: item.shard)),
        "```",
        "",
    ]
    return "\n".join(lines)


def _ranges(numbers: list[int]) -> str:
    """``[3, 4, 5, 9]`` → ``3–5, 9``."""
    parts: list[str] = []
    for number in numbers:
        if parts and int(parts[-1].split("–")[-1]) == number - 1:
            parts[-1] = f"{parts[-1].split('–')[0]}–{number}"
        else:
            parts.append(str(number))
    return ", ".join(parts) or "none"


def auxiliary_files(index: CheckpointIndex, rewritten: Iterable[str]) -> list[Path]:
    """Files to be copied as they are: tokenizer, templates, remote code; relative paths.

    Args:
        index: the source.
        rewritten: top-level files that the caller writes itself.
    """
    found = []
    root, own = index.root, frozenset(rewritten)
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        if any(part.startswith(".") for part in relative.parts) or not path.is_file():
            continue
        if relative.name in index.shards or relative.name.endswith(
            (*_WEIGHT_SUFFIXES, ".index.json", TEMP_SUFFIX)
        ):
            continue
        if len(relative.parts) == 1 and relative.name in own:
            continue
        found.append(relative)
    return found


def copy_auxiliary(index: CheckpointIndex, target: Path, rewritten: Iterable[str]) -> None:
    """Copy what :func:`auxiliary_files` names.

    Raises:
        CheckpointError: the target cannot be written.
    """
    for relative in auxiliary_files(index, rewritten):
        place = target / relative
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            temp = place.with_name(place.name + TEMP_SUFFIX)
            shutil.copyfile(index.root / relative, temp)
            temp.replace(place)
        except OSError as error:
            raise write_error(place, error) from error


def write_outputs(
    plan: ConvertPlan, index: CheckpointIndex, records: list[ShardRecord], target: Path
) -> None:
    """Write everything but the shards; config.json last, so that no reader finds half a model.

    Raises:
        CheckpointError: the target cannot be written.
    """
    minus_eight = any(record.has_minus_eight for record in records)
    copy_auxiliary(index, target, _REWRITTEN)
    source_card = index.root / "README.md"
    if source_card.is_file():
        write_atomic(target / "README.source.md", source_card.read_bytes())
    card = model_card(plan, index, records, minus_eight)
    write_atomic(target / "README.md", card.encode())
    write_atomic(target / INDEX_NAME, dump(weight_index(plan.jobs)))
    write_atomic(target / "hf_quant_config.json", dump(hf_quant_config()))
    write_atomic(target / MANIFEST_NAME, dump(conversion_manifest(plan, records)))
    section = quantization_config(plan, index.config, minus_eight)
    write_atomic(target / "config.json", dump(model_config(index.config, section)))
