"""What the commands show: a progress line, sizes for humans, JSON for machines."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO


def human_bytes(count: float) -> str:
    """``1536`` → ``1.5 KB``; decimal units, as disks and downloads are labelled."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def human_seconds(seconds: float) -> str:
    """``3671`` → ``1h01m``."""
    whole = int(seconds)
    if whole < 60:
        return f"{seconds:.1f}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def print_json(value: Any, stream: TextIO | None = None) -> None:
    """One JSON document on standard output."""
    json.dump(value, stream or sys.stdout, indent=2, sort_keys=False, ensure_ascii=False)
    print(file=stream or sys.stdout)


class Progress:
    """A line with percentage, rate and time left, on standard error.

    On a terminal it redraws; elsewhere it prints a line at most every 30 s, so that a log of a
    long run stays readable.

    Args:
        total_bytes: what is to be processed.
        label: first word of the line.
        enabled: False prints nothing.
        show: a count in words, where it is not bytes that are counted.
    """

    def __init__(
        self,
        total_bytes: int,
        label: str,
        *,
        enabled: bool = True,
        show: Callable[[float], str] = human_bytes,
    ) -> None:
        self._show = show
        self._total = max(1, total_bytes)
        self._label = label
        self._enabled = enabled
        self._stream = sys.stderr
        self._tty = self._stream.isatty()
        self._start = time.monotonic()
        self._skipped = 0
        self._last = self._start
        self._last_length = 0
        self.done_bytes = 0

    def update(self, done_bytes: int) -> None:
        """Set the number of bytes processed so far and redraw when it is time."""
        self.done_bytes = done_bytes
        now = time.monotonic()
        if self._enabled and now - self._last >= (0.2 if self._tty else 30.0):
            self._last = now
            self._draw(now)

    def expect(self, total_bytes: int) -> None:
        """Correct the total."""
        self._total = max(1, total_bytes)

    def skip(self, nbytes: int) -> None:
        """Count bytes as processed that an earlier run did; they do not enter the rate."""
        self._skipped += nbytes
        self.done_bytes += nbytes

    def advance(self, nbytes: int) -> None:
        """Add to the bytes processed so far."""
        self.update(self.done_bytes + nbytes)

    def _draw(self, now: float, end: str = "") -> None:
        elapsed = max(1e-6, now - self._start)
        rate = (self.done_bytes - self._skipped) / elapsed
        left = (self._total - self.done_bytes) / rate if rate > 0 else 0.0
        line = (
            f"{self._label} {100 * self.done_bytes / self._total:5.1f} %  "
            f"{self._show(self.done_bytes)} of {self._show(self._total)}  "
            f"{self._show(rate)}/s  {human_seconds(left)} left"
        )
        pad = " " * max(0, self._last_length - len(line))
        self._last_length = len(line)
        self._stream.write(("\r" if self._tty else "") + line + pad + (end if self._tty else "\n"))
        self._stream.flush()

    def finish(self) -> None:
        """Draw the final state."""
        if self._enabled and self.done_bytes:
            self._draw(time.monotonic(), end="\n")
