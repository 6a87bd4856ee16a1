"""The errors a user can cause, all of one shape: what was found, why it cannot work, ways out.

``assert`` is for our own invariants only; anything a checkpoint, a flag or a machine can trigger
raises one of these classes, so that a service log shows numbers and commands instead of a stack of
library calls. The classes say who has to act: the config's author (:class:`ConfigError`), the
checkpoint's (:class:`CheckpointError`), whoever chose the parallel layout (:class:`ShardError`) or
the kernel (:class:`BackendError`), or the environment's owner (:class:`HostError`).
"""

from __future__ import annotations

from collections.abc import Sequence


class W4AFp8Error(Exception):
    """Base class. ``str(error)`` fits one screen.

    Args:
        found: what was found, with the tensor or option name and the numbers.
        why: why that cannot work.
        ways: ways out, each a command, a flag or an environment variable; shown numbered.
    """

    def __init__(self, found: str, why: str, ways: Sequence[str] = ()) -> None:
        self.found = found
        self.why = why
        self.ways = tuple(ways)
        lines = [f"{found}", f"  Why this cannot work: {why}"]
        if self.ways:
            lines.append("  Ways out:")
            lines += [f"    ({i}) {way}" for i, way in enumerate(self.ways, 1)]
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[type[W4AFp8Error], tuple[str, str, tuple[str, ...]]]:
        # Exceptions are pickled between SGLang's processes; the default would pass one argument.
        return type(self), (self.found, self.why, self.ways)


class ConfigError(W4AFp8Error):
    """The quantization config or an environment variable contradicts itself or is unknown."""


class CheckpointError(W4AFp8Error):
    """A tensor is missing, truncated, or has another shape or dtype than its config promises."""


class ShardError(W4AFp8Error):
    """A parallel layout asks for a slice that the format cannot express."""


class BackendError(W4AFp8Error):
    """No kernel, or not the kernel that was asked for, can run this layer on this device."""


class HostError(W4AFp8Error):
    """The installed SGLang, torch or driver is not one that this package can work with."""
