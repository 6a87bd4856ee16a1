"""Atomic writing of safetensors files in constant memory.

A writer knows every name, dtype and shape before the first byte, writes the header, streams the
tensors in order into a temporary file in the same directory, and only an fsync'ed, complete file is
renamed to its final name. A process killed at any moment leaves either no file or a whole one, plus
at most a temporary file that the next run removes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from sglang_w4afp8.checkpoint.index import DTYPE_NAMES, DTYPES
from sglang_w4afp8.checkpoint.reader import byte_view
from sglang_w4afp8.checkpoint.stages import Stages
from sglang_w4afp8.errors import CheckpointError

TEMP_SUFFIX = ".w4afp8-tmp"
# Tensors that may wait for the disk while the next ones are computed.
_WRITE_BEHIND = 3
# The disk is asked to store what was written this often, so that little is left for the end.
_SYNC_BYTES = 128 << 20


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor without a copy."""
    flat = tensor.contiguous().flatten()
    return byte_view(flat.view(torch.uint8)) if flat.numel() else memoryview(b"")


@dataclass(frozen=True)
class OutTensor:
    """A tensor that a shard will hold: name, safetensors dtype, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        count = DTYPES[self.dtype].itemsize
        for extent in self.shape:
            count *= extent
        return count


def file_order(tensors: Iterable[OutTensor]) -> list[OutTensor]:
    """The order in which a file stores tensors: as given, with the awkward sizes last.

    A reader views the data at its dtype, so offsets must stay aligned; tensors whose length is not
    a multiple of 8 bytes go to the end, widest dtype first.
    """
    items = list(tensors)
    even = [item for item in items if item.nbytes % 8 == 0]
    odd = [item for item in items if item.nbytes % 8]
    odd.sort(key=lambda item: (-DTYPES[item.dtype].itemsize, item.name))
    return even + odd


def build_header(tensors: list[OutTensor], metadata: Mapping[str, str]) -> bytes:
    """Length prefix and JSON header of a file with these tensors, padded to 8 bytes."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for item in tensors:
        header[item.name] = {
            "dtype": item.dtype,
            "shape": list(item.shape),
            "data_offsets": [offset, offset + item.nbytes],
        }
        offset += item.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


class ShardWriter:
    """Streams one safetensors file; ``commit`` makes it visible, anything else removes it.

    Tensors must be written in the order of :func:`file_order`. Hashing and writing happen in a
    thread, a few tensors behind the caller; a failed write is raised by a later call, at the
    latest by ``commit``. Use as a context manager.

    Args:
        path: final file.
        tensors: what it will hold, already in file order.
        metadata: the header's ``__metadata__``.
        stages: told how long hashing, writing and syncing took.
    """

    def __init__(
        self,
        path: Path,
        tensors: list[OutTensor],
        metadata: Mapping[str, str] | None = None,
        stages: Stages | None = None,
    ) -> None:
        self.path = path
        self._stages = stages or Stages()
        self._temp = path.with_name(f"{path.name}.{os.getpid()}{TEMP_SUFFIX}")
        self._pending = list(reversed(tensors))
        self._digest = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1)
        self._behind: deque[Future[None]] = deque()
        self._sync_thread = ThreadPoolExecutor(1)
        self._sync: Future[None] | None = None
        self._synced_bytes = 0
        self.size_bytes = 0
        header = build_header(tensors, metadata or {"format": "pt"})
        total = len(header) + sum(item.nbytes for item in tensors)
        try:
            self._file = os.open(self._temp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        except OSError as error:
            raise write_error(self._temp, error) from error
        try:
            reserve(self._file, total)
            self._write(header)
        except BaseException as error:
            self.abort()
            if isinstance(error, OSError):
                raise write_error(path, error) from error
            raise

    def _write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        with self._stages.measure("hash"):
            self._digest.update(view)
        with self._stages.measure("write"):
            while len(view):
                count = os.write(self._file, view)
                self.size_bytes += count
                view = view[count:]
        if self.size_bytes - self._synced_bytes >= _SYNC_BYTES and self._is_synced():
            self._synced_bytes = self.size_bytes
            self._sync = self._sync_thread.submit(self._sync_now)

    def _is_synced(self) -> bool:
        if self._sync is not None and self._sync.done():
            self._sync.result()  # raises what the disk had to say
            self._sync = None
        return self._sync is None

    def _sync_now(self) -> None:
        with self._stages.measure("sync"):
            os.fsync(self._file)

    def _next(self, name: str) -> OutTensor:
        item = self._pending.pop()
        assert item.name == name, f"{name} written, {item.name} expected"
        return item

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next tensor; ``name``, dtype and shape must be the announced ones."""
        item = self._next(name)
        found = (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
        assert found == (item.dtype, item.shape), f"{name}: {found} written, {item} announced"
        with self._stages.measure("wait for write"):
            self._wait(_WRITE_BEHIND)
        self._behind.append(self._thread.submit(self._write, tensor_bytes(tensor.cpu())))

    def _wait(self, allowed: int) -> None:
        """Wait until at most ``allowed`` tensors are still to be written."""
        try:
            while len(self._behind) > allowed:
                self._behind.popleft().result()
        except OSError as error:
            raise write_error(self.path, error) from error

    def write_raw(self, name: str, chunks: Iterable[memoryview]) -> None:
        """Write the next tensor from raw pieces (a bit-identical copy)."""
        item = self._next(name)
        # The pieces are reused by their reader, so they cannot wait.
        self._wait(0)
        before = self.size_bytes
        try:
            for chunk in chunks:
                self._write(chunk)
        except OSError as error:
            raise write_error(self.path, error) from error
        assert self.size_bytes - before == item.nbytes, f"{name}: wrong number of bytes"

    def commit(self) -> str:
        """Flush to disk and give the file its name.

        Returns:
            sha256 of the file, hexadecimal.
        """
        assert not self._pending, f"{len(self._pending)} tensors were never written"
        with self._stages.measure("wait for write"):
            self._wait(0)
        try:
            with self._stages.measure("wait for sync"):
                if self._sync is not None:
                    self._sync.result()
                self._sync_now()
            os.close(self._file)
            self._file = -1
            os.replace(self._temp, self.path)
            sync_directory(self.path.parent)
        except OSError as error:
            raise write_error(self.path, error) from error
        return self._digest.hexdigest()

    def abort(self) -> None:
        """Drop the temporary file; harmless after ``commit``."""
        self._thread.shutdown(cancel_futures=True)
        self._sync_thread.shutdown(cancel_futures=True)
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._temp.unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()


def reserve(descriptor: int, size: int) -> None:
    """Claim disk space now, so that a full disk shows before hours of work.

    File systems without the call are left alone: writing will tell.
    """
    if size <= 0 or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise


def sync_directory(path: Path) -> None:
    """Make renames in a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a small file so that it is either absent, old or complete.

    Raises:
        CheckpointError: the directory cannot be written.
    """
    temp = path.with_name(f"{path.name}.{os.getpid()}{TEMP_SUFFIX}")
    try:
        with temp.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
        sync_directory(path.parent)
    except OSError as error:
        temp.unlink(missing_ok=True)
        raise write_error(path, error) from error


def write_error(path: Path, error: OSError) -> CheckpointError:
    """Turn an operating-system error while writing into one that says what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return CheckpointError(
            f"writing {path}: {error.strerror}",
            "the disk or a quota is full; finished shards are kept",
            [
                "free space and run the same command again: it goes on where it stopped",
                "sglang-w4afp8 convert SRC DST --dry-run  shows the size of the result",
            ],
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return CheckpointError(
            f"writing {path}: {error.strerror}",
            "the target is read-only for this user",
            ["choose another DST", f"chmod u+w {path.parent}"],
        )
    return CheckpointError(
        f"writing {path}: {error.strerror or error}",
        "the operating system refused the write; finished shards are kept",
        ["solve the cause and run the same command again: it goes on where it stopped"],
    )


def remove_stale_temps(directory: Path) -> int:
    """Delete temporary files of killed runs; returns how many there were."""
    stale = list(directory.glob(f"*{TEMP_SUFFIX}"))
    for path in stale:
        path.unlink(missing_ok=True)
    return len(stale)
