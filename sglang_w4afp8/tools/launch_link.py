"""What launchers say to each other: a node's greeting, and a connection that carries JSON lines."""

from __future__ import annotations

import json
import socket
import time
from dataclasses import dataclass
from typing import Any

_LONGEST_LINE = 65536
_SEND_LIMIT_S = 5.0
Message = dict[str, Any]


@dataclass(frozen=True)
class News:
    """What the other nodes want of this one.

    Attributes:
        kind: ``gone``: a node is no more, end at once. ``stop``: a node was asked to stop, so
            drain (node 0 hears this). ``stopped``: node 0 has drained, end.
        why: in words for a log.
    """

    kind: str
    why: str


@dataclass(frozen=True)
class Hello:
    """What a node says of itself.

    Attributes:
        rank: node rank.
        host: its host name.
        address: its IP address towards node 0.
        pid: its launcher's process; two launchers of one machine are two.
        same: what has to be equal on all nodes, by name: versions, degrees, the model's config.
    """

    rank: int
    host: str
    address: str
    pid: int
    same: dict[str, str]

    def __str__(self) -> str:
        return f"node {self.rank} ({self.host}, {self.address})"


class Link:
    """A connection that carries one JSON object a line.

    Attributes:
        heard: when something last arrived, on ``time.monotonic``'s clock.
        hello: who is at the other end, once it said so.
        broken: what ended the connection, if something did.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(_SEND_LIMIT_S)
        self._pending = b""
        self.heard = time.monotonic()
        self.hello: Hello | None = None
        self.broken = ""

    def fileno(self) -> int:
        """For ``select``."""
        return self.sock.fileno()

    def send(self, **message: Any) -> None:
        """Send one message.

        Raises:
            OSError: the other side is gone.
        """
        self.sock.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[Message]:
        """What has arrived; call when ``select`` says so.

        Raises:
            OSError: the connection is closed, or carries something else than JSON lines.
        """
        data = self.sock.recv(_LONGEST_LINE)
        if not data:
            raise ConnectionError("its connection closed")
        self.heard = time.monotonic()
        *lines, self._pending = (self._pending + data).split(b"\n")
        if len(self._pending) > _LONGEST_LINE:
            raise ConnectionError("it does not speak this protocol")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            raise ConnectionError("it does not speak this protocol") from None
        return [message for message in messages if isinstance(message, dict)]

    def close(self) -> None:
        """Close the connection."""
        self.sock.close()
