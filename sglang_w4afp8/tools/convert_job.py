"""Executing one shard of a conversion plan, in this process or in a worker.

Reads only the tensors the shard needs, one expert projection at a time; the result is written as a
stream. Nothing is shared between jobs but the source files, so any number may run at once.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sglang_w4afp8.checkpoint.formats import FloatWeight, all_formats
from sglang_w4afp8.checkpoint.stream import ShardWriter, TensorReader, write_atomic
from sglang_w4afp8.packing import has_minus_eight
from sglang_w4afp8.quantize.groups import resize_group_scale
from sglang_w4afp8.quantize.metrics import ErrorStats
from sglang_w4afp8.quantize.weights import quantize_weight
from sglang_w4afp8.tools.convert_plan import ConvertOptions, ExpertTask, ShardJob

RECORD_SUFFIX = ".json"


@dataclass
class ShardRecord:
    """What is known about a finished shard; kept on disk until the whole conversion is done.

    Attributes:
        shard: file name.
        sha256: of the file.
        size_bytes: of the file.
        quality: projection prefix → energies (:class:`ErrorStats` fields), rounded formats only.
        has_minus_eight: whether the code −8 occurs.
    """

    shard: str
    sha256: str
    size_bytes: int
    quality: dict[str, dict[str, Any]]
    has_minus_eight: bool

    def to_json(self) -> bytes:
        """The record's file content."""
        return json.dumps(asdict(self), sort_keys=True).encode()

    @classmethod
    def load(cls, path: Path) -> ShardRecord | None:
        """Read a record; None when it is absent or unreadable (then the shard is made again)."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None


def _convert(
    task: ExpertTask, reader: TensorReader, options: ConvertOptions, device: str
) -> tuple[dict[str, torch.Tensor], ErrorStats | None]:
    source = next(item for item in all_formats() if item.name == task.format_name)
    weight = source.load(task.parts, reader.read)
    prefix = task.name.prefix
    stats: ErrorStats | None = None
    if isinstance(weight, FloatWeight):
        packed, scale, stats = quantize_weight(
            weight.data.to(device),
            None if weight.scale is None else weight.scale.to(device),
            weight.block,
            method=options.method,
            group_size=task.group_size,
            full_range=options.full_range,
            name=prefix,
        )
    else:
        packed = weight.packed
        scale = resize_group_scale(weight.scale, weight.group_size, task.group_size)
    made = {f"{prefix}.weight": packed.cpu(), f"{prefix}.weight_scale_inv": scale.cpu()}
    if task.input_scale is not None:
        made[task.input_scale_name] = torch.tensor([task.input_scale], dtype=torch.bfloat16)
    return made, stats


def run_job(
    job: ShardJob,
    *,
    source_root: Path,
    target_root: Path,
    record_path: Path,
    options: ConvertOptions,
    device: str,
    advance: Callable[[int], None],
) -> ShardRecord:
    """Make one output shard.

    Args:
        job: what it holds.
        source_root: checkpoint that is read.
        target_root: directory that the shard is written into.
        record_path: where the record goes once the shard has its final name.
        options: see :class:`ConvertOptions`.
        device: torch device for the arithmetic.
        advance: told the source bytes of every finished tensor.

    Raises:
        W4AFp8Error: the source cannot be read or the target not written; no partial file remains.
    """
    ready: dict[str, torch.Tensor] = {}
    quality: dict[str, dict[str, Any]] = {}
    minus_eight = False
    with (
        TensorReader(source_root) as reader,
        ShardWriter(target_root / job.shard, job.outputs) as writer,
    ):
        for item in job.outputs:
            entry = job.copies.get(item.name)
            if entry is not None:
                writer.write_raw(item.name, reader.chunks(entry))
                advance(entry.nbytes)
                continue
            if item.name not in ready:
                task = job.experts[job.owner[item.name]]
                made, stats = _convert(task, reader, options, device)
                ready.update(made)
                if stats is not None:
                    quality[task.name.prefix] = asdict(stats)
                if stats is None or options.full_range:
                    minus_eight |= has_minus_eight(made[f"{task.name.prefix}.weight"])
                advance(task.source_bytes)
            writer.write(item.name, ready.pop(item.name))
        digest = writer.commit()
        record = ShardRecord(job.shard, digest, writer.size_bytes, quality, minus_eight)
    # The record comes after the shard: a kill in between costs one shard's work, never a claim
    # about a file that is not there.
    write_atomic(record_path, record.to_json())
    return record


_counter: Any = None


def init_worker(counter: Any, parent: int) -> None:
    """Prepare a worker process: shared progress counter, one thread, no life after the parent."""
    global _counter
    _counter = counter
    torch.set_num_threads(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_job_in_worker(
    job: ShardJob,
    source_root: Path,
    target_root: Path,
    record_path: Path,
    options: ConvertOptions,
    device: str,
) -> ShardRecord:
    """:func:`run_job` with progress reported through the shared counter."""

    def advance(nbytes: int) -> None:
        with _counter.get_lock():
            _counter.value += nbytes

    return run_job(
        job,
        source_root=source_root,
        target_root=target_root,
        record_path=record_path,
        options=options,
        device=device,
        advance=advance,
    )
