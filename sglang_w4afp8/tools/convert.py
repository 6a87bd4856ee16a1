"""``sglang-w4afp8 convert SRC DST``: make a W4AFP8 checkpoint from an FP8, BF16 or INT4 one.

Owns the command line, the checking of options and the report. The plan is :mod:`.convert_plan`, the
arithmetic :mod:`.convert_tasks`, the files beside the shards :mod:`.convert_output`, and running,
resuming and safety are :mod:`.rewrite`.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sglang_w4afp8.checkpoint.act_scales import amaxes_of_source, load_amaxes, scales_for_layers
from sglang_w4afp8.checkpoint.index import open_index, read_json
from sglang_w4afp8.errors import ConfigError
from sglang_w4afp8.quantize.weights import METHODS
from sglang_w4afp8.spec import GROUP_SIZES
from sglang_w4afp8.tools.console import human_bytes, human_seconds, print_json
from sglang_w4afp8.tools.convert_output import write_outputs
from sglang_w4afp8.tools.convert_plan import make_plan
from sglang_w4afp8.tools.convert_tasks import ConvertOptions
from sglang_w4afp8.tools.rewrite import (
    MANIFEST_NAME,
    check_device,
    check_paths,
    check_space,
    rewrite,
)
from sglang_w4afp8.tools.rewrite_job import ShardRecord
from sglang_w4afp8.tools.source_tensors import collect_experts, input_scale_entries


@dataclass
class ConvertReport:
    """What a conversion did.

    Attributes:
        target: the directory that was (or would be) written.
        dry_run: whether nothing was written.
        formats: source format → number of expert projections.
        layers: MoE layers converted, MTP layers included.
        kept: experts left as they were.
        method: rounding method.
        group_size: INT4 codes per scale.
        activation: ``static`` or ``dynamic``.
        tensors_rounded: of the converted ones, those that were not taken over exactly.
        tensors_converted: expert projections rounded or taken over.
        tensors_copied: tensors copied bit for bit.
        source_bytes: bytes read.
        output_bytes: bytes of the result's tensors.
        shards: output shards.
        shards_resumed: of these, finished by an earlier run.
        seconds: wall time of this run.
        stage_seconds: seconds per stage, added up over workers and their threads; shards finished
            by an earlier run included.
        quality: SNR summary, see :func:`~.convert_output.quality_table`.
        notes: remarks worth reading.
    """

    target: str
    dry_run: bool
    formats: dict[str, int]
    layers: list[int]
    kept: list[str]
    method: str
    group_size: int
    activation: str
    tensors_converted: int
    tensors_rounded: int
    tensors_copied: int
    source_bytes: int
    output_bytes: int
    shards: int
    shards_resumed: int = 0
    seconds: float = 0.0
    stage_seconds: dict[str, float] = field(default_factory=dict)
    quality: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)


def convert_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    method: str = "mse",
    group_size: int | None = None,
    activation: str | None = None,
    act_scales: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    workers: int = 1,
    keep: Sequence[str] = (),
    symmetric: bool = False,
    requantize: bool = False,
    hessians: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: bool = False,
) -> ConvertReport:
    """Convert a checkpoint directory to W4AFP8.

    Args:
        src: source directory (FP8-block, BF16/FP16/FP32 experts).
        dst: target directory; an unfinished conversion in it is continued.
        method: ``mse`` (searched scales), ``rtn`` (absmax / 7) or ``gptq``.
        group_size: 32, 64 or 128; None takes an INT4 source's own, else 128.
        activation: ``static`` writes input scales from ``act_scales``; ``dynamic`` writes none.
            None means static when ``act_scales`` is given or the source has input scales.
        act_scales: file of calibrated amaxes, see
            :func:`~sglang_w4afp8.checkpoint.act_scales.load_amaxes`.
        device: ``cpu`` or ``cuda[:N]``, where rounding is computed.
        workers: processes, or threads with ``device="cuda"``; each holds a few expert matrices.
        keep: regular expressions searched in ``…layers.L.….experts``; matching layers stay.
        symmetric: codes −7…7 and positive scales only: about 0.8 dB worse, without the code that
            kernels of the sign-and-magnitude kind have to treat separately. ``rtn`` always is.
        requantize: round 4-bit sources again (needed for AWQ, asymmetric or permuted GPTQ, MXFP4,
            and for coarser groups) instead of taking their codes over.
        hessians: directory of safetensors with second moments of the experts' inputs, for
            ``method="gptq"``: ``…layers.L.….experts[.E].(w13|w2).hessian``, ``(K, K)``.
        overwrite: replace whatever checkpoint is in ``dst``.
        dry_run: plan and check, write nothing.
        progress: draw a progress line on standard error.

    Returns:
        The report.

    Raises:
        W4AFp8Error: with what was found, why it cannot work, and ways out.
    """
    started = time.monotonic()
    source, target = Path(src), Path(dst)
    check_paths(source, target)
    index = open_index(source)
    own_scales = input_scale_entries(collect_experts(index))
    scheme = activation
    if scheme is None:
        scheme = "static" if act_scales is not None or own_scales else "dynamic"
    _check_options(method, group_size, scheme, act_scales, bool(own_scales))
    options = ConvertOptions(
        method=method,
        group_size=group_size,
        activation=scheme,
        symmetric=symmetric,
        requantize=requantize,
        keep=tuple(keep),
        device_type=check_device(device),
    )
    if (method == "gptq") != (hessians is not None):
        raise ConfigError(
            f"--method {method} with{'' if hessians else 'out'} --hessians",
            "gptq needs second moments of the experts' inputs, the other methods use none",
            ["--method gptq --hessians DIR", "--method mse"],
        )
    moments = None if hessians is None else open_index(hessians)
    plan = make_plan(index, options, moments=moments)
    if scheme == "static":
        if act_scales is not None:
            amaxes = load_amaxes(act_scales)
        else:
            amaxes = amaxes_of_source(index, own_scales)
        scales = scales_for_layers(amaxes, plan.layers)
        plan = make_plan(index, options, scales, moments)
    report = ConvertReport(
        target=str(target),
        dry_run=dry_run,
        formats=plan.formats,
        layers=plan.layers,
        kept=plan.kept,
        method=method,
        group_size=plan.group_size,
        activation=scheme,
        tensors_converted=sum(plan.formats.values()),
        tensors_rounded=plan.rounded,
        tensors_copied=sum(len(job.copies) for job in plan.jobs),
        source_bytes=plan.source_bytes,
        output_bytes=plan.output_bytes,
        shards=len(plan.jobs),
        notes=list(plan.notes),
    )
    if scheme == "dynamic":
        report.notes.append(
            "activations: dynamic, no input scales are stored; stock SGLang would take 1.0 for "
            "each, the plugin computes them per token"
        )
    if dry_run:
        check_space(target, plan.output_bytes)
        return report

    def finish(records: list[ShardRecord]) -> None:
        write_outputs(plan, index, records, target)

    outcome = rewrite(
        plan.jobs,
        plan.fingerprint,
        source,
        target,
        finish,
        label="convert",
        device=device,
        workers=workers,
        overwrite=overwrite,
        progress=progress,
    )
    report.shards_resumed = outcome.resumed
    for record in outcome.records:
        for stage, seconds in record.seconds.items():
            report.stage_seconds[stage] = report.stage_seconds.get(stage, 0.0) + seconds
    report.quality = read_json(target / MANIFEST_NAME).get("quality", {})
    if outcome.was_complete:
        report.notes.append("the same conversion is already complete in DST; nothing was done")
    report.seconds = time.monotonic() - started
    return report


def _check_options(
    method: str,
    group_size: int | None,
    activation: str,
    act_scales: object,
    has_own_scales: bool,
) -> None:
    if method not in METHODS:
        raise ConfigError(
            f"method {method!r}", f"known methods: {', '.join(METHODS)}", ["--method mse"]
        )
    if group_size not in (None, *GROUP_SIZES):
        raise ConfigError(
            f"group size {group_size}", "kernels exist for 32, 64 and 128", ["--group-size 128"]
        )
    if activation not in ("static", "dynamic"):
        raise ConfigError(
            f"activation {activation!r}", "known schemes: static, dynamic", ["--activation dynamic"]
        )
    if activation == "static" and act_scales is None and not has_own_scales:
        raise ConfigError(
            "--activation static without --act-scales",
            "static scales come from a calibration run; a missing one is silently 1.0 in SGLang",
            [
                "--act-scales FILE  (JSON or safetensors of amaxes per layer and GEMM)",
                "--activation dynamic  computes them per token while serving",
            ],
        )
    if activation == "dynamic" and act_scales is not None:
        raise ConfigError(
            "--act-scales together with --activation dynamic",
            "a dynamic checkpoint stores no input scales",
            ["drop --act-scales", "--activation static"],
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("src", help="checkpoint directory: FP8-block or BF16/FP16 experts")
    parser.add_argument("dst", help="directory to write; an unfinished conversion is continued")
    parser.add_argument("--method", choices=METHODS, default="mse", help="default: %(default)s")
    parser.add_argument(
        "--group-size", type=int, choices=GROUP_SIZES, help="default: the source's own, or 128"
    )
    parser.add_argument(
        "--activation",
        choices=("static", "dynamic"),
        help="default: static with --act-scales or scales in the source, else dynamic",
    )
    parser.add_argument("--act-scales", metavar="FILE", help="calibrated amaxes per layer and GEMM")
    parser.add_argument("--device", default="cpu", help="cpu or cuda[:N]; default: %(default)s")
    parser.add_argument("--workers", type=int, default=1, help="processes; default: %(default)s")
    parser.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="REGEX",
        help="leave the experts of matching layers as they are; may be repeated",
    )
    parser.add_argument(
        "--symmetric-range",
        action="store_true",
        help="codes -7..7 and positive scales only: about 0.8 dB worse",
    )
    parser.add_argument(
        "--requantize",
        action="store_true",
        help="round 4-bit sources again instead of taking their codes over",
    )
    parser.add_argument(
        "--hessians", metavar="DIR", help="gptq: second moments of the experts' inputs"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint in DST")
    parser.add_argument("--dry-run", action="store_true", help="plan and check, write nothing")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    report = convert_checkpoint(
        args.src,
        args.dst,
        method=args.method,
        group_size=args.group_size,
        activation=args.activation,
        act_scales=args.act_scales,
        device=args.device,
        workers=args.workers,
        keep=args.keep,
        symmetric=args.symmetric_range,
        requantize=args.requantize,
        hessians=args.hessians,
        overwrite=args.overwrite,
        dry_run=args.dry_run,
        progress=not args.json,
    )
    if args.json:
        print_json(report.to_dict())
        return 0
    verb = "would be written" if report.dry_run else "written"
    print(
        f"{report.target}: {report.shards} shards {verb}, "
        f"{human_bytes(report.source_bytes)} → {human_bytes(report.output_bytes)}"
    )
    how = f"by {report.method}" if report.tensors_rounded else "taken over exactly"
    print(
        f"{report.tensors_converted} expert matrices ({', '.join(report.formats) or 'none'}) → "
        f"INT4 g{report.group_size} {how}, {report.activation} activations; "
        f"{report.tensors_copied} tensors copied bit for bit"
    )
    if report.quality:
        overall = report.quality["overall"]
        worst = report.quality["worst"][0]
        print(
            f"SNR {overall['snr_db']:.2f} dB overall, worst {worst['snr_db']:.2f} dB "
            f"({worst['name']})"
        )
    if not report.dry_run:
        resumed = f", {report.shards_resumed} from an earlier run" if report.shards_resumed else ""
        print(f"{human_seconds(report.seconds)}{resumed}")
    for note in report.notes:
        print(f"note: {note}")
    return 0
