"""``sglang-w4afp8 convert SRC DST``: make a W4AFP8 checkpoint from an FP8, BF16 or INT4 one.

Owns the order of events: plan from headers, check the target, run the shards (resuming those that
are done), write the small files. The source is opened read-only and never touched. Work in progress
is recorded in ``DST/.w4afp8-work``; a run that was killed goes on with the same command, and ends
in the same bytes as one that was not.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sglang_w4afp8.checkpoint.index import INDEX_NAME, CheckpointIndex, open_index, read_json
from sglang_w4afp8.checkpoint.stream import remove_stale_temps, write_error
from sglang_w4afp8.errors import CheckpointError, ConfigError, HostError
from sglang_w4afp8.quantize.weights import METHODS
from sglang_w4afp8.tools.act_scales import load_amaxes, scales_for_layers
from sglang_w4afp8.tools.console import Progress, human_bytes, human_seconds, print_json
from sglang_w4afp8.tools.convert_job import (
    RECORD_SUFFIX,
    ShardRecord,
    init_worker,
    run_job,
    run_job_in_worker,
)
from sglang_w4afp8.tools.convert_output import MANIFEST_NAME, quality_table, write_outputs
from sglang_w4afp8.tools.convert_plan import ConvertOptions, ConvertPlan, ShardJob, make_plan

WORK_DIR = ".w4afp8-work"
_DONE_DIR = ".w4afp8-done"
# Room for index, card and file-system overhead beside the tensors.
_SPARE_BYTES = 64 << 20


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
        tensors_converted: expert projections rounded or taken over.
        tensors_copied: tensors copied bit for bit.
        source_bytes: bytes read.
        output_bytes: bytes of the result's tensors.
        shards: output shards.
        shards_resumed: of these, finished by an earlier run.
        seconds: wall time of this run.
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
    tensors_copied: int
    source_bytes: int
    output_bytes: int
    shards: int
    shards_resumed: int = 0
    seconds: float = 0.0
    quality: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)


def check_paths(source: Path, target: Path) -> None:
    """Refuse targets that would touch the source.

    Raises:
        ConfigError: one directory lies inside the other.
    """
    src, dst = source.resolve(), target.resolve()
    if src == dst or src in dst.parents or dst in src.parents:
        raise ConfigError(
            f"SRC {src}, DST {dst}",
            "one lies inside the other; the source must stay untouched and a loader that reads one "
            "would see the other's files",
            ["choose a DST beside the source, e.g. " + str(src.parent / (src.name + "-W4AFP8"))],
        )


def _prepare_target(target: Path, fingerprint: str, overwrite: bool) -> bool:
    """Make the target usable; returns whether the same conversion is already complete there."""
    manifest = target / MANIFEST_NAME
    work = target / WORK_DIR
    if target.exists() and not target.is_dir():
        raise ConfigError(f"DST {target} is a file", "a directory is written", ["choose another"])
    if manifest.is_file() and (target / "config.json").is_file() and not overwrite:
        made = read_json(manifest)
        complete = made.get("fingerprint") == fingerprint and all(
            (target / shard).is_file() and (target / shard).stat().st_size == info["size_bytes"]
            for shard, info in made.get("shards", {}).items()
        )
        if complete:
            return True
    started = work / "fingerprint"
    if started.is_file() and started.read_text(encoding="utf-8") != fingerprint and not overwrite:
        raise ConfigError(
            f"{target} holds an unfinished conversion of another source or with other options",
            "going on would mix two results",
            [
                "run it with the options it was started with",
                "--overwrite  drops it and starts again",
                "choose another DST",
            ],
        )
    if target.is_dir() and not started.is_file():
        others = [item.name for item in target.iterdir() if item.name not in (WORK_DIR, _DONE_DIR)]
        if others and not overwrite:
            raise ConfigError(
                f"{target} is not empty ({', '.join(sorted(others)[:4])} …)",
                "files of another checkpoint would be mixed with the result",
                ["choose another DST", "--overwrite  replaces the checkpoint in it"],
            )
    try:
        target.mkdir(parents=True, exist_ok=True)
        if overwrite and not (
            started.is_file() and started.read_text(encoding="utf-8") == fingerprint
        ):
            _drop_checkpoint(target)
        work.mkdir(exist_ok=True)
        remove_stale_temps(target)
        remove_stale_temps(work)
        if not started.is_file():
            temp = work / "fingerprint.new"
            temp.write_text(fingerprint, encoding="utf-8")
            temp.replace(started)
    except OSError as error:
        raise write_error(target, error) from error
    return False


def _drop_checkpoint(target: Path) -> None:
    for name in (WORK_DIR, _DONE_DIR):
        shutil.rmtree(target / name, ignore_errors=True)
    for name in ("config.json", INDEX_NAME, MANIFEST_NAME, "hf_quant_config.json"):
        (target / name).unlink(missing_ok=True)
    for path in target.glob("*.safetensors"):
        path.unlink()


@contextlib.contextmanager
def _lock(work: Path) -> Iterator[None]:
    with (work / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"{work.parent} is being written by another process",
                "two conversions into one directory would overwrite each other",
                ["wait for it to finish", "choose another DST"],
            ) from error
        yield


def _check_space(target: Path, needed: int) -> None:
    place = target
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed + _SPARE_BYTES > free:
        raise CheckpointError(
            f"{place} has {human_bytes(free)} free, {human_bytes(needed)} are still to be written",
            "the conversion would stop with a full disk",
            ["free some space", "choose a DST on another disk"],
        )


def _device_type(device: str) -> str:
    kind = device.split(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"--device {device}", "known devices are cpu and cuda[:N]", [])
    if kind == "cuda" and not torch.cuda.is_available():
        raise HostError(
            "--device cuda",
            "torch sees no CUDA device",
            ["--device cpu", "sglang-w4afp8 doctor  tells what is missing"],
        )
    return kind


def _finished(work: Path, target: Path, job: ShardJob) -> ShardRecord | None:
    record = ShardRecord.load(work / (job.shard + RECORD_SUFFIX))
    if record is None or record.shard != job.shard:
        return None
    path = target / job.shard
    return record if path.is_file() and path.stat().st_size == record.size_bytes else None


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    # The pieces are cache-sized: torch's own threads would spend their time waiting for each
    # other, 10 times slower on a busy machine. Processes are the unit of parallelism.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run_jobs(
    jobs: list[ShardJob],
    plan: ConvertPlan,
    index: CheckpointIndex,
    target: Path,
    device: str,
    workers: int,
    progress: Progress,
) -> list[ShardRecord]:
    work = target / WORK_DIR
    if workers == 1 or len(jobs) <= 1:
        with _one_thread():
            return [
                run_job(
                    job,
                    source_root=index.root,
                    target_root=target,
                    record_path=work / (job.shard + RECORD_SUFFIX),
                    options=plan.options,
                    device=device,
                    advance=progress.advance,
                )
                for job in jobs
            ]
    # Spawned, not forked: CUDA and torch's thread pools do not survive a fork.
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    start = progress.done_bytes
    records: list[ShardRecord] = []
    with ProcessPoolExecutor(
        max_workers=min(workers, len(jobs)),
        mp_context=context,
        initializer=init_worker,
        initargs=(counter, os.getpid()),
    ) as pool:
        # Largest first, so that no long job is left for the end.
        ordered = sorted(jobs, key=lambda job: -job.source_bytes)
        futures = {
            pool.submit(
                run_job_in_worker,
                job,
                index.root,
                target,
                work / (job.shard + RECORD_SUFFIX),
                plan.options,
                device,
            )
            for job in ordered
        }
        try:
            while futures:
                done = {future for future in futures if future.done()}
                records.extend(future.result() for future in done)
                futures -= done
                progress.update(start + counter.value)
                if futures and not done:
                    with contextlib.suppress(TimeoutError):
                        next(as_completed(futures, timeout=0.5))
        except BrokenProcessPool as error:
            raise HostError(
                "a worker process died without a message",
                "the system kills processes when memory runs out; finished shards are kept",
                ["run the same command again with a smaller --workers"],
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return records


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
    full_range: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: bool = False,
) -> ConvertReport:
    """Convert a checkpoint directory to W4AFP8.

    Args:
        src: source directory (FP8-block, BF16/FP16/FP32 experts).
        dst: target directory; an unfinished conversion in it is continued.
        method: ``mse`` (searched scales), ``rtn`` (absmax / 7).
        group_size: 32, 64 or 128; None takes an INT4 source's own, else 128.
        activation: ``static`` writes input scales from ``act_scales``; ``dynamic`` writes none.
            None means static when ``act_scales`` is given.
        act_scales: file of calibrated amaxes, see :func:`~.act_scales.load_amaxes`.
        device: ``cpu`` or ``cuda[:N]``, where rounding is computed.
        workers: processes; memory grows by about one expert matrix in float32 per worker.
        keep: regular expressions searched in ``…layers.L.….experts``; matching layers stay.
        full_range: ``mse`` only: negative scales and the code −8 (better by about 0.8 dB).
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
    scheme = activation or ("static" if act_scales is not None else "dynamic")
    _check_options(method, group_size, scheme, act_scales, full_range, workers)
    index = open_index(source)
    options = ConvertOptions(
        method=method,
        group_size=group_size,
        activation=scheme,
        full_range=full_range,
        keep=tuple(keep),
        device_type=_device_type(device),
    )
    plan = make_plan(index, options)
    if scheme == "static":
        assert act_scales is not None
        scales = scales_for_layers(load_amaxes(Path(act_scales)), plan.layers)
        plan = make_plan(index, options, scales)
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
        _check_space(target, plan.output_bytes)
        return report
    if _prepare_target(target, plan.fingerprint, overwrite):
        report.shards_resumed = report.shards
        report.quality = read_json(target / MANIFEST_NAME).get("quality", {})
        report.notes.append("the same conversion is already complete in DST; nothing was done")
        shutil.rmtree(target / WORK_DIR, ignore_errors=True)
        shutil.rmtree(target / _DONE_DIR, ignore_errors=True)
        return report
    with _lock(target / WORK_DIR):
        records = [r for job in plan.jobs if (r := _finished(target / WORK_DIR, target, job))]
        report.shards_resumed = len(records)
        finished = {record.shard for record in records}
        todo = [job for job in plan.jobs if job.shard not in finished]
        _check_space(target, sum(job.output_bytes for job in todo))
        bar = Progress(plan.source_bytes, "convert", enabled=progress)
        bar.update(sum(job.source_bytes for job in plan.jobs if job.shard in finished))
        records += _run_jobs(todo, plan, index, target, device, workers, bar)
        bar.finish()
        records.sort(key=lambda record: record.shard)
        write_outputs(plan, index, records, target)
        report.quality = quality_table(records)
        # Renamed before it is emptied: a kill in between must not look like unfinished work.
        (target / WORK_DIR).replace(target / _DONE_DIR)
    shutil.rmtree(target / _DONE_DIR, ignore_errors=True)
    report.seconds = time.monotonic() - started
    return report


def _check_options(
    method: str,
    group_size: int | None,
    activation: str,
    act_scales: object,
    full_range: bool,
    workers: int,
) -> None:
    if method not in METHODS:
        raise ConfigError(
            f"method {method!r}", f"known methods: {', '.join(METHODS)}", ["--method mse"]
        )
    if group_size not in (None, 32, 64, 128):
        raise ConfigError(
            f"group size {group_size}", "kernels exist for 32, 64 and 128", ["--group-size 128"]
        )
    if activation not in ("static", "dynamic"):
        raise ConfigError(
            f"activation {activation!r}", "known schemes: static, dynamic", ["--activation dynamic"]
        )
    if activation == "static" and act_scales is None:
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
    if full_range and method != "mse":
        raise ConfigError(
            f"--full-range with --method {method}",
            "only the scale search makes use of the sixteenth code",
            ["--method mse --full-range"],
        )
    if workers < 1:
        raise ConfigError(f"--workers {workers}", "at least one is needed", ["--workers 1"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("src", help="checkpoint directory: FP8-block or BF16/FP16 experts")
    parser.add_argument("dst", help="directory to write; an unfinished conversion is continued")
    parser.add_argument("--method", choices=METHODS, default="mse", help="default: %(default)s")
    parser.add_argument(
        "--group-size", type=int, choices=(32, 64, 128), help="default: the source's own, or 128"
    )
    parser.add_argument(
        "--activation",
        choices=("static", "dynamic"),
        help="default: static with --act-scales, dynamic without",
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
        "--full-range",
        action="store_true",
        help="mse: negative scales and the code -8, about 0.8 dB better",
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
        full_range=args.full_range,
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
    print(
        f"{report.tensors_converted} expert matrices ({', '.join(report.formats) or 'none'}) → "
        f"INT4 g{report.group_size} by {report.method}, {report.activation} activations; "
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
