"""Runs one node's server between its launcher's signals and what the other nodes' launchers say.

The server gets a process group of its own. Node 0 has the requests: a signal to its launcher goes
to the server's main process, which drains and ends by itself. The other nodes' ranks are needed
until then, so a signal to one of their launchers asks node 0 to drain, and their servers end when
it has. A second signal kills the group at once, and so does the news that another node is gone:
the ranks here would wait in a collective that never ends.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

from sglang_w4afp8.errors import HostError
from sglang_w4afp8.testing.server import stop_groups
from sglang_w4afp8.tools.launch_link import News
from sglang_w4afp8.tools.rendezvous import Say

_POLL_S = 0.2
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1


class Stopped(Exception):
    """A signal came before the server ran."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class Peers(Protocol):
    """The other nodes, as :class:`~sglang_w4afp8.tools.rendezvous.Leader` and ``Member`` do it.

    Attributes:
        drains: whether this node has the requests; the others only compute.
    """

    drains: bool

    def poll(self, wait_s: float) -> News | None:
        """Wait that long; what the others want, or None."""

    def tell(self, news: News) -> None:
        """Tell the others."""


class Alone:
    """No other nodes."""

    drains = True

    def poll(self, wait_s: float) -> News | None:
        """Wait."""
        time.sleep(wait_s)
        return None

    def tell(self, news: News) -> None:
        """Nobody to tell."""


class Signals:
    """Signals received, in order; before :attr:`serving` they raise :class:`Stopped`."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self.serving = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """The handler."""
        self.received.append(signum)
        if not self.serving:
            raise Stopped(signum)


@contextmanager
def catching() -> Iterator[Signals]:
    """Collect the signals that a launcher forwards, for the length of a ``with`` block."""
    signals = Signals()
    before = {number: signal.signal(number, signals) for number in _FORWARDED}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def serve(
    command: Sequence[str],
    environment: Mapping[str, str],
    peers: Peers,
    signals: Signals,
    me: str,
    say: Say,
) -> int:
    """Run the server until it ends, a signal ends it, or another node is gone.

    Args:
        command: the server's.
        environment: variables beside this process's own.
        peers: the other nodes.
        signals: of :func:`catching`.
        me: this node, as the others shall read it.
        say: prints a line.

    Returns:
        The server's exit code; 128 + signal after a signal, as shells count; 0 when another node
        was asked to stop.

    Raises:
        HostError: another node is gone; the server has been killed.
    """
    signals.serving = True  # from here on a signal is forwarded
    server = subprocess.Popen(
        list(command),
        env=os.environ | dict(environment),
        start_new_session=True,
        preexec_fn=_die_with_parent,
    )
    try:
        return _watch(server, peers, signals, me, say)
    finally:
        stop_groups([server])


def _watch(
    server: subprocess.Popen[bytes], peers: Peers, signals: Signals, me: str, say: Say
) -> int:
    handled, asked = 0, ""
    while server.poll() is None:
        for number in signals.received[handled:]:
            name = signal.Signals(number).name
            handled += 1
            if handled > 1:
                say(f"{name} again: killing the server")
                peers.tell(News("gone", f"{me} was stopped by {name}"))
                return 128 + number
            if peers.drains:
                say(f"{name}: passed on to the server; once more kills it")
                server.send_signal(number)
            else:
                say(f"{name}: node 0 is asked to drain; once more kills this node's server")
                peers.tell(News("stop", f"{me} was stopped by {name}"))
        news = peers.poll(_POLL_S)
        if news is None:
            continue
        if news.kind == "stop":
            if not (asked or signals.received):
                asked = news.why
                say(f"{asked}: passing SIGTERM on to the server of this node")
                server.terminate()
        elif signals.received:
            say(news.why)
            break
        elif news.kind == "stopped":
            say(f"{news.why}: ending too")
            return 0
        else:
            raise _without_a_node(news.why)
    if signals.received:
        number = signals.received[0]
        peers.tell(News("stopped", f"{me} was stopped by {signal.Signals(number).name}"))
        return 128 + number
    if asked:
        peers.tell(News("stopped", asked))
        return 0
    code = server.returncode
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    say(f"the server of this node ended with {how}; its last lines above say why")
    peers.tell(News("gone", f"the server of {me} ended with {how}"))
    return 128 - code if code < 0 else code


def _without_a_node(why: str) -> HostError:
    return HostError(
        why,
        "the ranks of this node would wait for that node's ranks for ever, so this node's server "
        "has been killed",
        [
            "read the log of the node that is named",
            "sglang-w4afp8 doctor --cluster hosts.txt",
            "start all nodes again",
        ],
    )


def _die_with_parent() -> None:
    """In the child: SIGKILL when the launcher dies, however it dies (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
