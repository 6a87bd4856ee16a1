"""Rewriting one shard: the unit of work of ``convert`` and ``resize-blocks``.

A shard of the result holds copies (bit for bit) and tensors that tasks make from source tensors.
Only what the shard needs is read, one task at a time, and the result is written as a stream, so
memory is bounded by one task. Nothing is shared between jobs but the source files: any number may
run at once, in this process or in workers.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from sglang_w4afp8.checkpoint.index import TensorEntry
from sglang_w4afp8.checkpoint.reader import TensorReader
from sglang_w4afp8.checkpoint.stages import Stages
from sglang_w4afp8.checkpoint.stream import (
    OutTensor,
    ShardWriter,
    file_order,
    write_atomic,
)
from sglang_w4afp8.quantize.metrics import ErrorStats

_CUDA_AHEAD = 3


@dataclass
class Made:
    """What a task made.

    Attributes:
        tensors: name → CPU tensor, exactly the announced ones.
        stats: what rounding lost; None when nothing was rounded.
        has_minus_eight: whether INT4 codes of −8 are among them.
    """

    tensors: dict[str, torch.Tensor]
    stats: ErrorStats | None = None
    has_minus_eight: bool = False


def bytes_of(task: Task) -> int:
    """Bytes that a task reads."""
    return sum(entry.nbytes for entry in task.sources)


class Task(Protocol):
    """Something that turns source tensors into tensors of the result. Must be picklable."""

    @property
    def key(self) -> str:
        """Unique name, used in reports."""
        ...

    @property
    def sources(self) -> list[TensorEntry]:
        """What it reads."""
        ...

    def outputs(self) -> list[OutTensor]:
        """What it makes, known before anything is read."""
        ...

    def make(self, reader: TensorReader, device: str) -> Made:
        """Do it."""
        ...


@dataclass
class ShardJob:
    """One output file.

    Attributes:
        shard: file name.
        outputs: its tensors; in file order after :meth:`seal`.
        copies: output name → source entry.
        tasks: task key → task.
        owner: output name → task key.
    """

    shard: str
    outputs: list[OutTensor] = field(default_factory=list)
    copies: dict[str, TensorEntry] = field(default_factory=dict)
    tasks: dict[str, Task] = field(default_factory=dict)
    owner: dict[str, str] = field(default_factory=dict)

    def copy(self, entry: TensorEntry, name: str | None = None) -> None:
        """Take a tensor over bit for bit, under its own or another name."""
        entry.torch_dtype  # noqa: B018  raises here rather than in the middle of the run
        item = OutTensor(name or entry.name, entry.dtype, entry.shape)
        self.copies[item.name] = entry
        self.outputs.append(item)

    def add(self, task: Task) -> None:
        """Have a task's tensors in this shard."""
        self.tasks[task.key] = task
        for item in task.outputs():
            self.outputs.append(item)
            self.owner[item.name] = task.key

    def seal(self) -> None:
        """Bring the outputs into file order; nothing may be added afterwards."""
        self.outputs = file_order(self.outputs)

    @property
    def source_bytes(self) -> int:
        """Bytes this job reads."""
        copied = sum(entry.nbytes for entry in self.copies.values())
        return copied + sum(bytes_of(task) for task in self.tasks.values())

    @property
    def output_bytes(self) -> int:
        """Bytes of the tensors this job writes."""
        return sum(item.nbytes for item in self.outputs)


@dataclass
class ShardRecord:
    """What is known about a finished shard; kept on disk until the whole run is done.

    Attributes:
        shard: file name.
        sha256: of the file.
        size_bytes: of the file.
        quality: task key → energies (:class:`ErrorStats` fields), where something was rounded.
        has_minus_eight: whether the code −8 occurs.
        seconds: stage → seconds, see :class:`~sglang_w4afp8.checkpoint.stages.Stages`.
    """

    shard: str
    sha256: str
    size_bytes: int
    quality: dict[str, dict[str, Any]]
    has_minus_eight: bool
    seconds: dict[str, float] = field(default_factory=dict)

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


@dataclass(frozen=True)
class JobPlace:
    """Where a run's jobs read, write and compute.

    Attributes:
        source: checkpoint that is read.
        target: directory that the shards are written into.
        records: directory of the finished shards' records.
        device: torch device for the arithmetic.
    """

    source: Path
    target: Path
    records: Path
    device: str

    def record_of(self, job: ShardJob) -> Path:
        """Where the record of a job goes once its shard has its final name."""
        return self.records / f"{job.shard}.json"


def run_job(job: ShardJob, place: JobPlace, advance: Callable[[int], None]) -> ShardRecord:
    """Make one output shard.

    Args:
        job: what it holds.
        place: where from and where to.
        advance: told the source bytes of every finished tensor.

    Raises:
        W4AFp8Error: the source cannot be read or the target not written; no partial file remains.
    """
    ready: dict[str, torch.Tensor] = {}
    quality: dict[str, dict[str, Any]] = {}
    minus_eight = False
    stages = Stages()
    is_cuda = place.device.startswith("cuda")
    # A GPU is done with a matrix before the next one is read: read several, by two threads.
    ahead, threads = (_CUDA_AHEAD, 2) if is_cuda else (1, 1)
    with (
        TensorReader(place.source, pinned=is_cuda, threads=threads, stages=stages) as reader,
        ShardWriter(place.target / job.shard, job.outputs, stages=stages) as writer,
    ):
        # Tasks are made in file order; the next ones' tensors are read while one is computed.
        order = list(dict.fromkeys(job.owner[i.name] for i in job.outputs if i.name in job.owner))
        waiting = deque(order)
        coming = 0
        for item in job.outputs:
            entry = job.copies.get(item.name)
            if entry is not None:
                writer.write_raw(item.name, reader.chunks(entry))
                advance(entry.nbytes)
                continue
            if item.name not in ready:
                while waiting and coming <= ahead:
                    reader.prefetch(job.tasks[waiting.popleft()].sources)
                    coming += 1
                task = job.tasks[job.owner[item.name]]
                made = task.make(reader, place.device)
                coming -= 1
                ready.update(made.tensors)
                minus_eight |= made.has_minus_eight
                if made.stats is not None:
                    quality[task.key] = asdict(made.stats)
                advance(bytes_of(task))
            writer.write(item.name, ready.pop(item.name))
        digest = writer.commit()
        record = ShardRecord(
            job.shard, digest, writer.size_bytes, quality, minus_eight, stages.seconds
        )
    # The record comes after the shard: a kill in between costs one shard's work, never a claim
    # about a file that is not there.
    write_atomic(place.record_of(job), record.to_json())
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


def _advance_shared(nbytes: int) -> None:
    with _counter.get_lock():
        _counter.value += nbytes


def run_job_in_worker(job: ShardJob, place: JobPlace) -> ShardRecord:
    """:func:`run_job` with progress reported through the shared counter."""
    return run_job(job, place, _advance_shared)


def run_job_on_stream(
    job: ShardJob, place: JobPlace, advance: Callable[[int], None]
) -> ShardRecord:
    """:func:`run_job` on a CUDA stream of its own, for threads that share a device."""
    device = place.device
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        return run_job(job, place, advance)
