"""Constant-memory reading of safetensors files, in the background if wanted.

One tensor's bytes are fetched with ``pread``: no map, so resident memory is what was asked for.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from sglang_w4afp8.checkpoint.index import TensorEntry
from sglang_w4afp8.checkpoint.stages import Stages
from sglang_w4afp8.errors import CheckpointError

_COPY_BYTES = 16 << 20


def byte_view(flat: torch.Tensor) -> memoryview:
    """The memory of a flat CPU tensor as a buffer, without a copy."""
    # numpy arrays are buffers, but NumPy's stubs say so only from Python 3.12 on.
    array: Any = flat.numpy()
    return memoryview(array)


class TensorReader:
    """Reads tensors of one checkpoint directory; keeps a few files open.

    Args:
        root: checkpoint directory.
        max_open: file descriptors kept, per thread.
        pinned: read into page-locked memory, from which a GPU copies without a detour.
        threads: background threads of :meth:`prefetch`.
        stages: told how long reading took.
    """

    def __init__(
        self,
        root: Path,
        max_open: int = 8,
        *,
        pinned: bool = False,
        threads: int = 1,
        stages: Stages | None = None,
    ) -> None:
        self._root = root
        self._max_open = max_open
        self._pinned = pinned
        self._files: dict[str, int] = {}
        self._ahead: dict[str, Future[torch.Tensor]] = {}
        self.stages = stages or Stages()
        # Every background thread has descriptors of its own: nothing here needs a lock.
        self._threads = threads
        self._pool: ThreadPoolExecutor | None = None
        self._own = threading.local()
        self._background: list[TensorReader] = []

    def _descriptor(self, shard: str) -> int:
        descriptor = self._files.pop(shard, None)
        if descriptor is None:
            if len(self._files) >= self._max_open:
                os.close(self._files.pop(next(iter(self._files))))
            descriptor = os.open(self._root / shard, os.O_RDONLY)
        self._files[shard] = descriptor  # most recently used last
        return descriptor

    def read_into(self, entry: TensorEntry, offset: int, view: memoryview) -> None:
        """Fill ``view`` from the tensor's bytes starting at ``offset``.

        Raises:
            CheckpointError: the file cannot be read, or ends early (it was removed, replaced or cut
                after its header had been checked).
        """
        done = 0
        while done < len(view):
            try:
                descriptor = self._descriptor(entry.shard)
                count = os.preadv(descriptor, [view[done:]], entry.start + offset + done)
            except OSError as error:
                raise CheckpointError(
                    f"{self._root / entry.shard}: {error.strerror}",
                    f"the bytes of {entry.name} can no longer be read from it",
                    ["check the disk and the download, then run the same command again"],
                ) from error
            if count == 0:
                raise CheckpointError(
                    f"{self._root / entry.shard} ends inside {entry.name}",
                    "the file became shorter while it was being read",
                    ["check the disk and the download, then run the same command again"],
                )
            done += count

    def read(self, entry: TensorEntry) -> torch.Tensor:
        """One tensor, on the CPU, in its stored dtype and shape."""
        ahead = self._ahead.pop(entry.name, None)
        if ahead is not None:
            with self.stages.measure("wait for read"):
                return ahead.result()
        with self.stages.measure("read"):
            buffer = torch.empty(entry.nbytes, dtype=torch.uint8, pin_memory=self._pinned)
            if entry.nbytes:
                self.read_into(entry, 0, byte_view(buffer))
        return buffer.view(entry.torch_dtype).view(entry.shape)

    def prefetch(self, entries: Iterable[TensorEntry]) -> None:
        """Start reading tensors in the background; a later :meth:`read` takes them over."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads)
        for entry in entries:
            self._ahead[entry.name] = self._pool.submit(self._read_in_thread, entry)

    def _read_in_thread(self, entry: TensorEntry) -> torch.Tensor:
        reader = getattr(self._own, "reader", None)
        if reader is None:
            reader = TensorReader(
                self._root, self._max_open, pinned=self._pinned, stages=self.stages
            )
            self._own.reader = reader
            self._background.append(reader)
        return reader.read(entry)

    def chunks(self, entry: TensorEntry, size: int = _COPY_BYTES) -> Iterable[memoryview]:
        """The tensor's raw bytes in pieces; each piece is valid until the next one."""
        buffer = memoryview(bytearray(min(size, entry.nbytes)))
        offset = 0
        while offset < entry.nbytes:
            part = buffer[: min(size, entry.nbytes - offset)]
            self.read_into(entry, offset, part)
            yield part
            offset += len(part)

    def close(self) -> None:
        """Close all files."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        for reader in self._background:
            reader.close()
        self._ahead.clear()
        while self._files:
            os.close(self._files.popitem()[1])

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
