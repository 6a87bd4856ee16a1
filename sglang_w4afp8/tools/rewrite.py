"""Running a list of shard jobs into a target directory: safely, resumably, in parallel.

Owns what ``convert`` and ``resize-blocks`` have in common: refusing dangerous targets, one writer
per target, free space, resuming, and the order in which things become visible. Finished shards are
recorded in ``DST/.w4afp8-work``; a run that was killed goes on with the same command and ends in
the same bytes as one that was not. The source is only ever opened for reading.
"""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sglang_w4afp8.checkpoint.index import INDEX_NAME, read_json
from sglang_w4afp8.checkpoint.stream import remove_stale_temps, write_error
from sglang_w4afp8.errors import CheckpointError, ConfigError, HostError
from sglang_w4afp8.tools.console import Progress, human_bytes
from sglang_w4afp8.tools.rewrite_job import (
    JobPlace,
    ShardJob,
    ShardRecord,
    init_worker,
    run_job,
    run_job_in_worker,
    run_job_on_stream,
)

MANIFEST_NAME = "w4afp8-manifest.json"
WORK_DIR = ".w4afp8-work"
_DONE_DIR = ".w4afp8-done"
# Room for index, card and file-system overhead beside the tensors.
_SPARE_BYTES = 64 << 20

# Spawned, not forked: torch's thread pools do not survive a fork.
_SPAWN = multiprocessing.get_context("spawn")

Finish = Callable[[list[ShardRecord]], None]


@dataclass
class Outcome:
    """How a run ended.

    Attributes:
        records: one per shard, sorted; empty when everything was already there.
        resumed: shards that an earlier run had finished.
        was_complete: the target already held this very result.
    """

    records: list[ShardRecord]
    resumed: int
    was_complete: bool = False


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


def check_device(device: str) -> str:
    """``cpu`` or ``cuda`` from a device string.

    Raises:
        ConfigError: another kind of device.
        HostError: CUDA is not available.
    """
    kind = device.split(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ConfigError(
            f"--device {device}",
            "it is neither cpu nor cuda[:N]",
            ["--device cpu", "--device cuda"],
        )
    if kind == "cuda" and not torch.cuda.is_available():
        raise HostError(
            "--device cuda",
            "torch sees no CUDA device",
            ["--device cpu", "sglang-w4afp8 doctor  tells what is missing"],
        )
    return kind


def check_space(target: Path, needed: int) -> None:
    """Raise when the target's disk cannot hold ``needed`` more bytes.

    Raises:
        CheckpointError: with both numbers.
    """
    place = target.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed + _SPARE_BYTES > free:
        raise CheckpointError(
            f"{place} has {human_bytes(free)} free, {human_bytes(needed)} are still to be written",
            "the run would stop with a full disk",
            ["free some space", "choose a DST on another disk"],
        )


def _is_complete(target: Path, fingerprint: str) -> bool:
    manifest = target / MANIFEST_NAME
    if not manifest.is_file() or not (target / "config.json").is_file():
        return False
    made = read_json(manifest)
    return made.get("fingerprint") == fingerprint and all(
        (target / shard).is_file() and (target / shard).stat().st_size == info["size_bytes"]
        for shard, info in made.get("shards", {}).items()
    )


def _refuse_foreign_files(target: Path, fingerprint: str) -> None:
    started = target / WORK_DIR / "fingerprint"
    if target.exists() and not target.is_dir():
        raise ConfigError(f"DST {target} is a file", "a directory is written", ["choose another"])
    if not target.is_dir():
        return
    if started.is_file():
        if started.read_text(encoding="utf-8") != fingerprint:
            raise ConfigError(
                f"{target} holds unfinished work on another source or with other options",
                "going on would mix two results",
                [
                    "run it with the options it was started with",
                    "--overwrite  drops it and starts again",
                    "choose another DST",
                ],
            )
        return
    others = [item.name for item in target.iterdir() if item.name not in (WORK_DIR, _DONE_DIR)]
    if others:
        raise ConfigError(
            f"{target} is not empty ({', '.join(sorted(others)[:4])})",
            "files of another checkpoint would be mixed with the result",
            ["choose another DST", "--overwrite  replaces the checkpoint in it"],
        )


def _drop_checkpoint(target: Path) -> None:
    # config.json first: from then on nobody takes the rest for a checkpoint.
    for name in ("config.json", INDEX_NAME, MANIFEST_NAME, "hf_quant_config.json"):
        (target / name).unlink(missing_ok=True)
    for name in (WORK_DIR, _DONE_DIR):
        shutil.rmtree(target / name, ignore_errors=True)
    for path in target.glob("*.safetensors"):
        path.unlink()


def _prepare(target: Path, fingerprint: str, overwrite: bool) -> None:
    started = target / WORK_DIR / "fingerprint"
    try:
        is_same = started.is_file() and started.read_text(encoding="utf-8") == fingerprint
        if overwrite and not is_same and target.is_dir():
            _drop_checkpoint(target)
        (target / WORK_DIR).mkdir(parents=True, exist_ok=True)
        if not started.is_file():
            temp = started.with_name("fingerprint.new")
            temp.write_text(fingerprint, encoding="utf-8")
            temp.replace(started)
    except OSError as error:
        raise write_error(target, error) from error


@contextlib.contextmanager
def _lock(target: Path) -> Iterator[None]:
    try:
        file = (target / WORK_DIR / "lock").open("w")
    except OSError as error:
        raise write_error(target, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"{target} is being written by another process",
                "two runs into one directory would overwrite each other",
                ["wait for it to finish", "choose another DST"],
            ) from error
        yield


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run with a single torch thread.

    The pieces are cache-sized: torch's own threads would spend their time waiting for each other,
    10 times slower on a busy machine. Processes are the unit of parallelism.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run_jobs(
    jobs: list[ShardJob], place: JobPlace, workers: int, bar: Progress
) -> list[ShardRecord]:
    workers = min(workers, max(1, len(jobs)))
    is_cuda = place.device.startswith("cuda")
    if workers == 1 and not is_cuda:
        with one_thread():
            return [run_job(job, place, bar.advance) for job in jobs]
    # Largest first, so that no long job is left for the end.
    ordered = sorted(jobs, key=lambda job: -job.source_bytes)
    run = _run_threads if is_cuda else _run_processes
    return run(ordered, place, workers, bar)


def _run_threads(
    jobs: list[ShardJob], place: JobPlace, workers: int, bar: Progress
) -> list[ShardRecord]:
    """Threads for a GPU: one CUDA context, and what takes time (reading, copying, hashing, writing)
    runs without the interpreter's lock."""
    lock = threading.Lock()

    def advance(nbytes: int) -> None:
        with lock:
            bar.advance(nbytes)

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(run_job_on_stream, job, place, advance) for job in jobs]
        try:
            return [future.result() for future in as_completed(futures)]
        except BaseException:
            # Shards in the making are finished and kept; nothing new is begun.
            pool.shutdown(wait=True, cancel_futures=True)
            raise


@contextlib.contextmanager
def worker_pool(
    workers: int, initializer: Callable[..., object] | None = None, arguments: tuple[Any, ...] = ()
) -> Iterator[ProcessPoolExecutor]:
    """Worker processes, each of which calls ``initializer`` first.

    Raises:
        HostError: one of them died.
    """
    try:
        with ProcessPoolExecutor(workers, _SPAWN, initializer, arguments) as pool:
            yield pool
    except BrokenProcessPool as error:
        raise HostError(
            "a worker process died without a message",
            "the system kills processes when memory runs out",
            [
                "run the same command again with a smaller --workers; convert and resize-blocks go "
                "on where they stopped"
            ],
        ) from error


def _run_processes(
    jobs: list[ShardJob], place: JobPlace, workers: int, bar: Progress
) -> list[ShardRecord]:
    counter = _SPAWN.Value("q", 0)
    start = bar.done_bytes
    records: list[ShardRecord] = []
    with worker_pool(workers, init_worker, (counter, os.getpid())) as pool:
        futures = {pool.submit(run_job_in_worker, job, place) for job in jobs}
        try:
            while futures:
                done = {future for future in futures if future.done()}
                records.extend(future.result() for future in done)
                futures -= done
                bar.update(start + counter.value)
                if futures and not done:
                    with contextlib.suppress(TimeoutError):
                        next(as_completed(futures, timeout=0.5))
        except BaseException:
            # Shards in the making are finished and kept; nothing new is begun.
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return records


def _finished(job: ShardJob, place: JobPlace) -> ShardRecord | None:
    record = ShardRecord.load(place.record_of(job))
    if record is None or record.shard != job.shard:
        return None
    path = place.target / job.shard
    return record if path.is_file() and path.stat().st_size == record.size_bytes else None


def rewrite(
    jobs: list[ShardJob],
    fingerprint: str,
    source: Path,
    target: Path,
    finish: Finish,
    *,
    label: str,
    device: str = "cpu",
    workers: int = 1,
    overwrite: bool = False,
    progress: bool = False,
) -> Outcome:
    """Make a checkpoint out of jobs.

    Args:
        jobs: sealed, one per output shard.
        fingerprint: of the source and every option that decides the bytes of the result.
        source: directory that is read.
        target: directory that is written; unfinished work with the same fingerprint is continued.
        finish: writes the files beside the shards, from the sorted records; the last one must be
            ``config.json``, after the manifest.
        label: first word of the progress line.
        device: torch device for arithmetic.
        workers: processes; threads on a CUDA device.
        overwrite: drop a checkpoint or other unfinished work in ``target`` first.
        progress: draw a progress line on standard error.

    Raises:
        W4AFp8Error: with what was found, why it cannot work, and ways out.
    """
    if workers < 1:
        raise ConfigError(f"--workers {workers}", "at least one is needed", ["--workers 1"])
    if _is_complete(target, fingerprint):
        for name in (WORK_DIR, _DONE_DIR):
            shutil.rmtree(target / name, ignore_errors=True)
        return Outcome([], len(jobs), was_complete=True)
    if not overwrite:
        _refuse_foreign_files(target, fingerprint)
    _prepare(target, fingerprint, overwrite)
    place = JobPlace(source, target, target / WORK_DIR, device)
    with _lock(target):
        remove_stale_temps(target)
        remove_stale_temps(place.records)
        records = [record for job in jobs if (record := _finished(job, place))]
        finished = {record.shard for record in records}
        todo = [job for job in jobs if job.shard not in finished]
        check_space(target, sum(job.output_bytes for job in todo))
        bar = Progress(sum(job.source_bytes for job in jobs), label, enabled=progress)
        bar.skip(sum(job.source_bytes for job in jobs if job.shard in finished))
        records += _run_jobs(todo, place, workers, bar)
        bar.finish()
        records.sort(key=lambda record: record.shard)
        finish(records)
        # Renamed before it is emptied: a kill in between must not look like unfinished work.
        place.records.replace(target / _DONE_DIR)
    shutil.rmtree(target / _DONE_DIR, ignore_errors=True)
    return Outcome(records, len(finished))
