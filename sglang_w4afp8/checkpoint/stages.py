"""Where the time of a rewriting job goes: seconds per stage, added up over threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stages:
    """Seconds by stage name. Stages of different threads overlap, so their sum exceeds the clock.

    ``read``, ``hash``, ``write`` and ``sync`` are work of background threads (``sync`` is waiting
    for the disk); ``compute`` and the ``wait for …`` stages are the job's own thread.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    def add(self, name: str, seconds: float) -> None:
        """Count ``seconds`` for stage ``name``."""
        with self._lock:
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Count the time spent inside."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)
