"""``sglang-w4afp8 resize-blocks SRC [DST]``: smaller FP8 blocks or INT4 groups, no value changed.

A block-FP8 checkpoint cannot be cut for many ranks when a shard ends inside a block: 18432 columns
at TP 32 are 576 each, 4.5 blocks of 128. Cutting blocks to 64x64 repeats every scale 2x2; weights
are copied bit for bit, so dequantisation is identical. The same holds for INT4 groups. With this
package's plugin neither is necessary (it re-blocks while loading); the command is for stock SGLang,
other engines and kernels that know one block size only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sglang_w4afp8 import __version__
from sglang_w4afp8.checkpoint.formats import ExpertParts
from sglang_w4afp8.checkpoint.fp8_block import block_of
from sglang_w4afp8.checkpoint.index import (
    INDEX_NAME,
    CheckpointIndex,
    TensorEntry,
    open_index,
)
from sglang_w4afp8.checkpoint.reader import TensorReader
from sglang_w4afp8.checkpoint.stream import (
    OutTensor,
    write_atomic,
)
from sglang_w4afp8.checkpoint.w4afp8 import W4AFp8
from sglang_w4afp8.errors import CheckpointError, ConfigError
from sglang_w4afp8.quantize.fp8 import block_grid, resize_block_scale
from sglang_w4afp8.quantize.groups import resize_group_scale
from sglang_w4afp8.spec import GROUP_SIZES
from sglang_w4afp8.tools.console import human_bytes, human_seconds, print_json
from sglang_w4afp8.tools.convert_output import copy_auxiliary, dump, manifest, weight_index
from sglang_w4afp8.tools.rewrite import MANIFEST_NAME, check_paths, check_space, rewrite
from sglang_w4afp8.tools.rewrite_job import Made, ShardJob, ShardRecord
from sglang_w4afp8.tools.source_tensors import quant_section

_SCALE = "weight_scale_inv"


@dataclass(frozen=True)
class BlockScaleTask:
    """Scales of one FP8 weight under smaller blocks."""

    scale: TensorEntry
    shape: tuple[int, int]
    block: tuple[int, int]
    new_block: tuple[int, int]

    @property
    def key(self) -> str:
        """The scale tensor's name."""
        return self.scale.name

    @property
    def sources(self) -> list[TensorEntry]:
        """The scale."""
        return [self.scale]

    def outputs(self) -> list[OutTensor]:
        """The same scale, larger."""
        grid = block_grid(self.shape, self.new_block)
        return [OutTensor(self.scale.name, self.scale.dtype, grid)]

    def make(self, reader: TensorReader, device: str) -> Made:
        """Repeat and crop."""
        scale = resize_block_scale(reader.read(self.scale), self.shape, self.block, self.new_block)
        return Made({self.key: scale})


@dataclass(frozen=True)
class GroupScaleTask:
    """Scales of one INT4 weight under smaller groups."""

    scale: TensorEntry
    group_size: int
    new_group_size: int

    @property
    def key(self) -> str:
        """The scale tensor's name."""
        return self.scale.name

    @property
    def sources(self) -> list[TensorEntry]:
        """The scale."""
        return [self.scale]

    def outputs(self) -> list[OutTensor]:
        """The same scale, wider."""
        rows, columns = self.scale.shape
        repeat = self.group_size // self.new_group_size
        return [OutTensor(self.scale.name, self.scale.dtype, (rows, columns * repeat))]

    def make(self, reader: TensorReader, device: str) -> Made:
        """Repeat."""
        scale = resize_group_scale(reader.read(self.scale), self.group_size, self.new_group_size)
        return Made({self.key: scale})


@dataclass
class ResizeReport:
    """What was done.

    Attributes:
        target: directory written.
        dry_run: whether nothing was written.
        block: FP8 blocks before and after, or None.
        group_size: INT4 groups before and after, or None.
        resized: scale tensors changed.
        copied: tensors copied bit for bit.
        source_bytes: bytes of the source's tensors.
        output_bytes: bytes of the result's tensors.
        shards: output shards.
        shards_resumed: of these, finished by an earlier run.
        seconds: wall time.
        notes: remarks.
    """

    target: str
    dry_run: bool
    block: tuple[list[int], list[int]] | None
    group_size: tuple[int, int] | None
    resized: int
    copied: int
    source_bytes: int
    output_bytes: int
    shards: int
    shards_resumed: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


def default_target(source: Path, block: int | None, group_size: int | None) -> Path:
    """``MODEL-Block64x64``, as the community's script names it, or ``MODEL-Group64``."""
    suffix = f"-Block{block}x{block}" if block else ""
    suffix += f"-Group{group_size}" if group_size else ""
    source = source.resolve()
    return source.with_name(source.name + suffix)


@dataclass
class _Plan:
    jobs: list[ShardJob]
    blocks: set[tuple[int, int]]
    groups: set[int]
    resized: int


def _scale_task(
    index: CheckpointIndex,
    weight: TensorEntry,
    scale: TensorEntry,
    block: int | None,
    group_size: int | None,
) -> BlockScaleTask | GroupScaleTask | None:
    prefix = weight.name.removesuffix(".weight")
    quant = quant_section(index.config)
    if weight.dtype == "F8_E4M3" and block is not None:
        old = block_of(prefix, weight, scale, quant.get("weight_block_size"))
        if old[0] % block or old[1] % block:
            raise ConfigError(
                f"{prefix}: blocks of {old[0]}x{old[1]}, --block {block}",
                "only a divisor keeps each new block inside one old block",
                [f"--block {old[0] // 2}"],
            )
        shape = (weight.shape[0], weight.shape[1])
        return BlockScaleTask(scale, shape, old, (block, block))
    if weight.dtype == "I8" and group_size is not None:
        source = W4AFp8()
        parts = ExpertParts(prefix, {"weight": weight, _SCALE: scale}, quant)
        old_group = source.group_size(parts) if source.matches(parts) else None
        if old_group is None:
            return None
        if old_group % group_size:
            raise ConfigError(
                f"{prefix}: groups of {old_group}, --group-size {group_size}",
                "only a divisor keeps each new group inside one old group; coarser groups need "
                "requantisation",
                [
                    f"--group-size {old_group // 2}",
                    f"sglang-w4afp8 convert SRC DST --group-size {group_size} --requantize",
                ],
            )
        return GroupScaleTask(scale, old_group, group_size)
    return None


def _plan(index: CheckpointIndex, block: int | None, group_size: int | None) -> _Plan:
    tasks: dict[str, BlockScaleTask | GroupScaleTask] = {}
    plan = _Plan([], set(), set(), 0)
    for weight in index:
        if not weight.name.endswith(".weight"):
            continue
        scale = index.tensors.get(f"{weight.name.removesuffix('.weight')}.{_SCALE}")
        if scale is None:
            continue
        task = _scale_task(index, weight, scale, block, group_size)
        if isinstance(task, BlockScaleTask):
            plan.blocks.add(task.block)
        elif isinstance(task, GroupScaleTask):
            plan.groups.add(task.group_size)
        if task is not None:
            tasks[scale.name] = task
    for kind, wanted, found in (("--block", block, plan.blocks),
                                ("--group-size", group_size, plan.groups)):  # fmt: skip
        if wanted and not found:
            raise CheckpointError(
                f"{index.root}: {kind} {wanted}, but no tensor pair weight + {_SCALE} of that kind",
                "--block needs FP8 E4M3 weights with block scales, --group-size W4AFP8 experts",
                ["sglang-w4afp8 inspect SRC  shows what the checkpoint holds"],
            )
    jobs = {shard: ShardJob(shard) for shard in index.shards}
    for entry in index:
        task = tasks.get(entry.name)
        if task is not None:
            jobs[entry.shard].add(task)
        else:
            jobs[entry.shard].copy(entry)
    for job in jobs.values():
        job.seal()
    plan.jobs = [job for job in jobs.values() if job.outputs]
    plan.resized = len(tasks)
    return plan


def _config(index: CheckpointIndex, plan: _Plan, block: int | None, group: int | None) -> Any:
    config = json.loads(json.dumps(index.config))
    section = quant_section(config)
    if not section:
        # Old-style W4AFP8: hf_quant_config.json alone cannot say anything but 128.
        section = {"quant_method": "w4afp8", "moe_activation_scheme": "static"}
        config["quantization_config"] = section
    if block:
        section["weight_block_size"] = [block, block]
    if group:
        section["group_size"] = group
    return config


def resize_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str] | None = None,
    *,
    block: int | None = None,
    group_size: int | None = None,
    workers: int = 1,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: bool = False,
) -> ResizeReport:
    """Cut FP8 blocks or INT4 groups of a checkpoint smaller.

    Args:
        src: source directory.
        dst: target directory; None: beside the source, see :func:`default_target`.
        block: side of the new square FP8 blocks.
        group_size: new INT4 group; with neither, ``block=64``.
        workers: processes.
        overwrite: replace whatever checkpoint is in ``dst``.
        dry_run: plan and check, write nothing.
        progress: draw a progress line on standard error.

    Raises:
        W4AFp8Error: the new size is no divisor, nothing can be resized, or files are bad.
    """
    started = time.monotonic()
    if block is None and group_size is None:
        block = 64
    for option, value in (("--block", block), ("--group-size", group_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{option} {value}", "it must be positive", [f"{option} 64"])
    source = Path(src)
    target = Path(dst) if dst is not None else default_target(source, block, group_size)
    check_paths(source, target)
    index = open_index(source)
    plan = _plan(index, block, group_size)
    report = ResizeReport(
        target=str(target),
        dry_run=dry_run,
        block=(list(min(plan.blocks)), [block, block]) if block else None,
        group_size=(min(plan.groups), group_size) if group_size else None,
        resized=plan.resized,
        copied=sum(len(job.copies) for job in plan.jobs),
        source_bytes=index.total_bytes,
        output_bytes=sum(job.output_bytes for job in plan.jobs),
        shards=len(plan.jobs),
        notes=list(index.notes),
    )
    if dry_run:
        check_space(target, report.output_bytes)
        return report
    identity = json.dumps(["resize", __version__, index.fingerprint(), block, group_size])
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()

    def finish(records: list[ShardRecord]) -> None:
        copy_auxiliary(index, target, rewritten=("config.json", MANIFEST_NAME))
        options = {"block": block, "group_size": group_size}
        files = {
            INDEX_NAME: weight_index(plan.jobs),
            MANIFEST_NAME: manifest(fingerprint, options, records),
            "config.json": _config(index, plan, block, group_size),
        }
        for name, value in files.items():
            write_atomic(target / name, dump(value))

    outcome = rewrite(
        plan.jobs,
        fingerprint,
        source,
        target,
        finish,
        label="resize",
        workers=workers,
        overwrite=overwrite,
        progress=progress,
    )
    report.shards_resumed = outcome.resumed
    if outcome.was_complete:
        report.notes.append("the same result is already complete in DST; nothing was done")
    report.seconds = time.monotonic() - started
    return report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("src", help="block-FP8 or W4AFP8 checkpoint directory")
    parser.add_argument("dst", nargs="?", help="default: SRC-Block64x64 or SRC-Group64")
    parser.add_argument(
        "--block", type=int, metavar="SIDE", help="new FP8 block; 64 when no size is given"
    )
    parser.add_argument("--group-size", type=int, choices=GROUP_SIZES, help="new INT4 group")
    parser.add_argument("--workers", type=int, default=1, help="processes; default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint in DST")
    parser.add_argument("--dry-run", action="store_true", help="plan and check, write nothing")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    report = resize_checkpoint(
        args.src,
        args.dst,
        block=args.block,
        group_size=args.group_size,
        workers=args.workers,
        overwrite=args.overwrite,
        dry_run=args.dry_run,
        progress=not args.json,
    )
    if args.json:
        print_json(asdict(report))
        return 0
    verb = "would be written" if report.dry_run else "written"
    print(
        f"{report.target}: {report.shards} shards {verb}, "
        f"{human_bytes(report.source_bytes)} → {human_bytes(report.output_bytes)}"
    )
    if report.block:
        print("FP8 blocks {0[0]}x{0[1]} → {1[0]}x{1[1]}".format(*report.block))
    if report.group_size:
        print("INT4 groups {} → {}".format(*report.group_size))
    print(
        f"{report.resized} scale tensors repeated, {report.copied} tensors copied bit for bit"
        + ("" if report.dry_run else f", {human_seconds(report.seconds)}")
    )
    for note in report.notes:
        print(f"note: {note}")
    return 0
