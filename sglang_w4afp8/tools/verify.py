"""``sglang-w4afp8 verify SRC DST``: does the converted checkpoint hold what the source holds?

Every source tensor must have a counterpart: routed experts are restored on both sides and compared
by signal-to-noise ratio, everything else must be equal bit for bit (or, where scales were repeated,
equal after dequantisation). Tensors without origin, missing ones, broken scales and the problems
that ``inspect`` knows are reported too. Exit code 1 when anything is wrong or an SNR is below the
threshold.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sglang_w4afp8.checkpoint.formats import ExpertParts
from sglang_w4afp8.checkpoint.index import CheckpointIndex, TensorEntry, open_index
from sglang_w4afp8.checkpoint.names import parse_expert
from sglang_w4afp8.errors import ConfigError
from sglang_w4afp8.quantize.metrics import LOSSLESS_DB, ErrorStats
from sglang_w4afp8.tools.console import Progress, human_seconds, print_json
from sglang_w4afp8.tools.inspect import inspect_checkpoint
from sglang_w4afp8.tools.rewrite import one_thread, worker_pool
from sglang_w4afp8.tools.source_tensors import collect_experts, quant_section
from sglang_w4afp8.tools.verify_compare import CopyPair, Finding, LinearPair, compare_batch
from sglang_w4afp8.tools.verify_report import write_html, write_png

# A wrong nibble order, a lost sign or a shifted scale column gives 0 dB or less; the plainest
# rounding of the heaviest tails seen gives 12.4. Between them lies no honest result.
DEFAULT_THRESHOLD_DB = 10.0
_BATCH_BYTES = 64 << 20
_SHOWN_PROBLEMS = 50


@dataclass
class TensorQuality:
    """One restored linear: name, place in the model, SNR in dB, cosine."""

    name: str
    layer: int
    projection: str
    snr_db: float
    cosine: float


@dataclass
class VerifyReport:
    """What was compared and found.

    Attributes:
        source: directory.
        target: directory.
        threshold_db: lowest accepted SNR of an expert matrix.
        sample: fraction of the comparisons that was made.
        linears_compared: restored and measured.
        copies_compared: compared bit for bit.
        overall_snr_db: of all experts together.
        overall_cosine: likewise.
        below_threshold: number of matrices.
        worst: the twenty with the lowest SNR.
        layers: ``layer → projection → SNR`` in dB, all experts of the layer together.
        problems: everything that is wrong.
        notes: remarks.
        seconds: wall time.
    """

    source: str
    target: str
    threshold_db: float
    sample: float
    linears_compared: int = 0
    copies_compared: int = 0
    overall_snr_db: float = LOSSLESS_DB
    overall_cosine: float = 1.0
    below_threshold: int = 0
    worst: list[TensorQuality] = field(default_factory=list)
    layers: dict[int, dict[str, float]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def is_good(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems and not self.below_threshold


def _linear_parts(index: CheckpointIndex) -> dict[str, ExpertParts]:
    """Linears outside the experts that have scales: prefix → parts."""
    quant = quant_section(index.config)
    found: dict[str, dict[str, TensorEntry]] = {}
    for entry in index:
        prefix, _, part = entry.name.rpartition(".")
        # compressed-tensors' name of the scales is changed by convert.
        if part in ("weight_scale_inv", "weight_scale") and parse_expert(entry.name) is None:
            weight = index.tensors.get(f"{prefix}.weight")
            if weight is not None:
                found[prefix] = {"weight": weight, part: entry}
    return {prefix: ExpertParts(prefix, parts, quant) for prefix, parts in found.items()}


def pair_up(
    source: CheckpointIndex, target: CheckpointIndex
) -> tuple[list[LinearPair | CopyPair], list[str]]:
    """Match the tensors of two checkpoints.

    Returns:
        What is to be compared, and what has no counterpart.
    """
    pairs: list[LinearPair | CopyPair] = []
    problems: list[str] = []
    used: set[str] = set()
    seen: set[str] = set()
    quant = quant_section(source.config), quant_section(target.config)
    experts = collect_experts(source), collect_experts(target)
    keyed = {(n.module, n.expert, n.projection): p for n, p in experts[1].values()}
    for prefix, (name, parts) in experts[0].items():
        seen.update(entry.name for entry in parts.values())
        after = keyed.get((name.module, name.expert, name.projection))
        if after is None:
            problems.append(f"{prefix} is missing in the result")
            continue
        used.update(entry.name for entry in after.values())
        pairs.append(
            LinearPair(
                prefix, ExpertParts(prefix, parts, quant[0]), ExpertParts(prefix, after, quant[1])
            )
        )
    linears = _linear_parts(source), _linear_parts(target)
    for prefix, linear in linears[0].items():
        other = linears[1].get(prefix)
        if other is None:
            continue  # its tensors are reported one by one below
        shapes = [{k: (e.dtype, e.shape) for k, e in p.parts.items()} for p in (linear, other)]
        if shapes[0] != shapes[1]:
            pairs.append(LinearPair(prefix, linear, other))
            seen.update(entry.name for entry in linear.parts.values())
            used.update(entry.name for entry in other.parts.values())
    for entry in source:
        if entry.name in seen:
            continue
        after_entry = target.tensors.get(entry.name)
        if after_entry is None:
            problems.append(f"{entry.name} is missing in the result")
            continue
        used.add(entry.name)
        pairs.append(CopyPair(entry, after_entry))
    foreign = [entry.name for entry in target if entry.name not in used]
    problems.extend(f"{name} has no origin in the source" for name in foreign)
    return pairs, problems


def _sampled(pairs: Iterable[LinearPair | CopyPair], sample: float) -> list[LinearPair | CopyPair]:
    """A fraction of the pairs, the same for the same names every time."""

    def chosen(pair: LinearPair | CopyPair) -> bool:
        name = pair.prefix if isinstance(pair, LinearPair) else pair.source.name
        digest = hashlib.sha256(name.encode()).digest()
        return int.from_bytes(digest[:4], "big") < sample * 2**32

    return [pair for pair in pairs if sample >= 1.0 or chosen(pair)]


def _batches(pairs: list[LinearPair | CopyPair]) -> list[list[LinearPair | CopyPair]]:
    batches: list[list[LinearPair | CopyPair]] = []
    size = _BATCH_BYTES
    for pair in pairs:
        if size >= _BATCH_BYTES:
            batches.append([])
            size = 0
        batches[-1].append(pair)
        size += pair.nbytes
    return batches


def _compare(
    pairs: list[LinearPair | CopyPair], source: Path, target: Path, workers: int, progress: bool
) -> list[Finding]:
    batches = _batches(pairs)
    bar = Progress(sum(pair.nbytes for pair in pairs), "verify", enabled=progress)
    findings: list[Finding] = []
    if workers == 1 or len(batches) <= 1:
        with one_thread():
            for batch in batches:
                findings += compare_batch(batch, source, target)
                bar.advance(sum(pair.nbytes for pair in batch))
    else:
        with worker_pool(min(workers, len(batches))) as pool:
            roots = [source] * len(batches), [target] * len(batches)
            results = pool.map(compare_batch, batches, *roots)
            for batch, result in zip(batches, results, strict=True):
                findings += result
                bar.advance(sum(pair.nbytes for pair in batch))
    bar.finish()
    return findings


def _summarise(findings: list[Finding], report: VerifyReport) -> list[TensorQuality]:
    total = ErrorStats()
    layers: dict[int, dict[str, ErrorStats]] = {}
    qualities: list[TensorQuality] = []
    for finding in findings:
        report.problems.extend(f"{finding.name}: {problem}" for problem in finding.problems)
        if finding.stats is None:
            report.copies_compared += not finding.problems
            continue
        report.linears_compared += 1
        name = parse_expert(f"{finding.name}.weight")
        snr = finding.stats.snr_db
        if name is None:
            # Outside the experts only scales may be repeated, which changes nothing.
            if snr < LOSSLESS_DB:
                report.problems.append(f"{finding.name}: restored weights differ, {snr:.2f} dB")
            continue
        total.add(finding.stats)
        cell = layers.setdefault(name.layer, {}).setdefault(name.projection, ErrorStats())
        cell.add(finding.stats)
        qualities.append(
            TensorQuality(finding.name, name.layer, name.projection, snr, finding.stats.cosine)
        )
    qualities.sort(key=lambda item: item.snr_db)
    report.worst = qualities[:20]
    # Not "snr < threshold": an SNR that is not a number must not pass.
    report.below_threshold = sum(not item.snr_db >= report.threshold_db for item in qualities)
    report.overall_snr_db, report.overall_cosine = total.snr_db, total.cosine
    report.layers = {
        layer: {projection: stats.snr_db for projection, stats in sorted(cells.items())}
        for layer, cells in sorted(layers.items())
    }
    return qualities


def verify_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    threshold_db: float = DEFAULT_THRESHOLD_DB,
    sample: float = 1.0,
    workers: int = 1,
    html: str | os.PathLike[str] | None = None,
    png: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> VerifyReport:
    """Compare a converted checkpoint with its source.

    Args:
        src: source directory.
        dst: directory made by ``convert`` or ``resize-blocks``.
        threshold_db: lowest accepted SNR of any expert matrix.
        sample: fraction of the tensors whose data is compared (names are always all matched).
        workers: processes.
        html: write a report with a heat map there.
        png: write the heat map alone there.
        progress: draw a progress line on standard error.

    Raises:
        W4AFp8Error: a directory cannot be read, or an option makes no sense.
    """
    started = time.monotonic()
    if not 0.0 < sample <= 1.0:
        raise ConfigError(
            f"--sample {sample}", "it is a fraction between 0 and 1", ["--sample 0.1", "--sample 1"]
        )
    if workers < 1:
        raise ConfigError(f"--workers {workers}", "at least one is needed", ["--workers 1"])
    source, target = open_index(src), open_index(dst)
    report = VerifyReport(str(src), str(dst), threshold_db, sample)
    pairs, report.problems = pair_up(source, target)
    inspection = inspect_checkpoint(str(dst))
    report.problems += inspection.problems
    report.notes += inspection.notes
    if sample < 1.0:
        report.notes.append(f"data of {sample:.0%} of the tensors was compared, names of all")
    findings = _compare(_sampled(pairs, sample), Path(src), Path(dst), workers, progress)
    _summarise(findings, report)
    report.seconds = time.monotonic() - started
    if html is not None:
        write_html(Path(html), asdict(report))
    if png is not None:
        write_png(Path(png), report.layers)
    return report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("src", help="the source checkpoint")
    parser.add_argument("dst", help="what convert or resize-blocks made of it")
    parser.add_argument(
        "--threshold",
        type=float,
        default=DEFAULT_THRESHOLD_DB,
        metavar="DB",
        help="lowest accepted SNR of an expert matrix; default: %(default)s dB",
    )
    parser.add_argument(
        "--sample", type=float, default=1.0, metavar="FRACTION", help="compare a part of the data"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes; default: %(default)s")
    parser.add_argument("--html", metavar="FILE", help="write a report with a heat map")
    parser.add_argument("--png", metavar="FILE", help="write the heat map, layer by projection")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Run the command; 1 when something is wrong or below the threshold."""
    report = verify_checkpoint(
        args.src,
        args.dst,
        threshold_db=args.threshold,
        sample=args.sample,
        workers=args.workers,
        html=args.html,
        png=args.png,
        progress=not args.json,
    )
    if args.json:
        document: dict[str, Any] = {"is_good": report.is_good, **asdict(report)}
        print_json(document)
        return 0 if report.is_good else 1
    print(
        f"{report.linears_compared} linears restored and compared, {report.copies_compared} "
        f"tensors equal bit for bit, {human_seconds(report.seconds)}"
    )
    if report.worst:
        print(
            f"experts: SNR {report.overall_snr_db:.2f} dB, cosine {report.overall_cosine:.5f}; "
            f"{report.below_threshold} below {report.threshold_db:g} dB. Worst:"
        )
        for item in report.worst:
            print(f"  {item.snr_db:7.2f} dB  {item.cosine:.5f}  {item.name}")
    for note in report.notes:
        print(f"note: {note}")
    for problem in report.problems[:_SHOWN_PROBLEMS]:
        print(f"problem: {problem}")
    if len(report.problems) > _SHOWN_PROBLEMS:
        print(f"… {len(report.problems) - _SHOWN_PROBLEMS} more; --json lists all")
    print("good" if report.is_good else "NOT good")
    return 0 if report.is_good else 1
