"""Launchers of one cluster find each other before any server starts, and notice when one is gone.

torch.distributed waits for missing ranks in silence and, once connected, for dead ones for ever.
So every launcher other than node 0's opens one TCP connection to node 0's and keeps it as long as
the server runs. One JSON object a line goes over it:

* ``hello``: who the worker is and what it is about to start; node 0 compares it with its own.
* ``waiting``: node 0 tells who is missing. ``go``: all are here, start.
* ``beat``: still alive, both ways, every two seconds. A machine that loses power closes nothing.
* ``gone``: why everybody has to end at once, in words for a log; node 0 passes it on. ``stop``: a
  node was asked to stop, so node 0, where the requests are, drains; then it says ``stopped``.

A star, because then only node 0's address has to be known. There is no authentication, as there is
none in torch's own store next door: both belong into a private network.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from sglang_w4afp8.errors import HostError
from sglang_w4afp8.tools import network
from sglang_w4afp8.tools.launch_link import Hello, Link, Message, News
from sglang_w4afp8.tools.launch_place import Place

BEAT_S = 2.0
RETRY_S = 1.0
REPORT_S = 10.0
Say = Callable[[str], None]


class Leader:
    """Node 0's side.

    Args:
        me: what every other node's ``same`` is compared with.
        place: number and, where known, names of the nodes.
        port: TCP port to listen on.
        say: prints a line.
        peer_timeout_s: silence after which a node counts as dead.

    Raises:
        HostError: the port is taken.
    """

    drains = True

    def __init__(
        self, me: Hello, place: Place, port: int, say: Say, peer_timeout_s: float = 30.0
    ) -> None:
        self._me, self._place, self._say, self._timeout_s = me, place, say, peer_timeout_s
        self._links: list[Link] = []
        self._beat, self._beat_s = 0.0, min(BEAT_S, peer_timeout_s / 3)
        family = socket.AF_INET6 if ":" in me.address else socket.AF_INET
        self._listener = socket.socket(family, socket.SOCK_STREAM)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            # Loopback nodes are a test on one machine: others must not get in between.
            self._listener.bind((me.address if me.address.startswith("127.") else "", port))
        except OSError as error:
            raise HostError(
                f"port {port} of this node cannot be listened on: {error.strerror}",
                "the other nodes' launchers come to this port (one below --dist-port)",
                ["end the launch that still runs here", "another --dist-port on every node"],
            ) from error
        self._listener.listen(place.nnodes)

    @property
    def missing(self) -> list[str]:
        """Labels of the nodes that have not come."""
        here = {0, *(link.hello.rank for link in self._links if link.hello)}
        return [self._place.label(rank) for rank in range(self._place.nnodes) if rank not in here]

    def gather(self, limit_s: float) -> list[Hello]:
        """Wait until every node is here; all of them, by rank.

        Raises:
            HostError: some did not come in time (names them), or one does not fit.
        """
        started = reported = time.monotonic()
        told: list[str] = []
        while self.missing:
            now = time.monotonic()
            if now - started > limit_s:
                raise self._too_late(limit_s)
            if self.missing != told or now - reported > REPORT_S:
                told, reported = self.missing, now
                text = f"waiting for {', '.join(told)} ({now - started:.0f} s of {limit_s:.0f} s)"
                self._say(text)
                self._send_all(waiting=text)
            for link, message in self._messages(0.2):
                if "hello" in message:
                    self._admit(link, message["hello"])
            for link, why in self._drop_dead():
                if link.hello:
                    self._say(f"{link.hello} has left again: {why}")
        self._listener.close()
        for link in [link for link in self._links if link.hello is None]:
            self._forget(link)  # whatever it was, it is no launcher
        self._send_all(go=True)
        return [self._me, *sorted(self._hellos(), key=lambda hello: hello.rank)]

    def poll(self, wait_s: float) -> News | None:
        """Pass the time; what the others want. That a node is gone has been passed on then."""
        for _, message in self._messages(wait_s):
            for kind in ("gone", "stop"):
                if kind in message:
                    news = News(kind, str(message[kind]))
                    if kind == "gone":
                        self.tell(news)
                    return news
        for link, why in self._drop_dead():
            news = News("gone", f"{link.hello} is gone: {why}")
            self.tell(news)
            return news
        return None

    def tell(self, news: News) -> None:
        """Tell every node."""
        self._send_all(**{news.kind: news.why})

    def close(self) -> None:
        """Close everything."""
        self._listener.close()
        for link in self._links:
            link.close()

    def _hellos(self) -> Iterable[Hello]:
        return (link.hello for link in self._links if link.hello)

    def _too_late(self, limit_s: float) -> HostError:
        missing = ", ".join(self.missing)
        found = f"{missing} did not come within {limit_s:.0f} s"
        self.tell(News("gone", f"{found}; the others were here"))
        return HostError(
            found,
            f"all {self._place.nnodes} nodes have to be there before the server starts",
            [
                f"look at the log of {missing}: is the same command running there?",
                f"from there: nc -vz {self._me.address} {_port_of(self._listener)}   "
                "(firewall, wrong --master)",
                "--wait SECONDS   if it is only slow",
            ],
        )

    def _admit(self, link: Link, told: Message) -> None:
        """Take a node in.

        Raises:
            HostError: it was started in another way than this node, or its rank is taken.
        """
        try:
            hello = Hello(**told)
        except TypeError:
            self._forget(link)
            return
        link.hello = hello
        problem = self._problem(hello)
        if problem:
            found, ways = problem
            self.tell(News("gone", found))
            raise HostError(found, "the nodes would wait for each other or compute garbage", ways)
        self._say(f"{hello} is here")

    def _problem(self, hello: Hello) -> tuple[str, list[str]] | None:
        taken = [other for other in self._hellos() if other.rank == hello.rank and other != hello]
        if hello.rank == 0 or taken:
            other = taken[0] if taken else self._me
            return (
                f"two launchers say that they are node {hello.rank}: process {other.pid} of "
                f"{other.host} ({other.address}) and {hello.pid} of {hello.host} ({hello.address})",
                ["--node-rank R, another one on every node"],
            )
        mine, its = self._me.same, hello.same
        different = [name for name in mine if mine[name] != its.get(name)]
        if different:
            listed = "; ".join(f"{n}: {its.get(n)} there, {mine[n]} on node 0" for n in different)
            return f"{hello} differs: {listed}", [
                "start the same command on every node",
                "sglang-w4afp8 doctor --cluster hosts.txt   compares versions and checkpoints",
            ]
        if self._me.address.startswith("127.") != hello.address.startswith("127."):
            return (
                f"node 0 is at {self._me.address} and {hello}: one of these is a loopback address",
                ["--master with node 0's address in the network (see /etc/hosts on node 0)"],
            )
        return None

    def _messages(self, wait_s: float) -> list[tuple[Link, Message]]:
        """What arrived within ``wait_s``; takes new connections in, sends beats."""
        sources: list[Any] = [*self._links]
        if self._listener.fileno() >= 0:
            sources.append(self._listener)
        ready, _, _ = select.select(sources, [], [], wait_s)
        found: list[tuple[Link, Message]] = []
        for source in ready:
            if source is self._listener:
                with suppress(OSError):
                    self._links.append(Link(self._listener.accept()[0]))
                continue
            try:
                found += [(source, message) for message in source.receive()]
            except OSError as error:
                source.broken = str(error) or type(error).__name__
        if time.monotonic() - self._beat > self._beat_s:
            self._beat = time.monotonic()
            self._send_all(beat=1)
        return found

    def _drop_dead(self) -> list[tuple[Link, str]]:
        """Links that closed or are silent, taken off the list, with what happened."""
        now, dead = time.monotonic(), []
        for link in list(self._links):
            if link.broken:
                dead.append((link, link.broken))
            elif now - link.heard > self._timeout_s:
                dead.append((link, f"nothing heard from it for {self._timeout_s:.0f} s"))
        for link, _ in dead:
            self._forget(link)
        return dead

    def _forget(self, link: Link) -> None:
        self._links.remove(link)
        link.close()

    def _send_all(self, **message: Any) -> None:
        for link in self._links:
            with suppress(OSError):  # seen as dead when its turn to be read comes
                link.send(**message)


class Member:
    """The side of a node other than 0; see :class:`Leader` for the arguments.

    Args:
        hello: says who this node is, given its address towards node 0.
        master: node 0's name or address.
        port: node 0's port.
    """

    drains = False

    def __init__(
        self,
        hello: Callable[[str], Hello],
        master: str,
        port: int,
        say: Say,
        peer_timeout_s: float = 30.0,
    ) -> None:
        self._hello, self._master, self._port = hello, master, port
        self._say, self._timeout_s = say, peer_timeout_s
        self._link: Link | None = None
        self._beat, self._beat_s = 0.0, min(BEAT_S, peer_timeout_s / 3)

    def gather(self, limit_s: float) -> Hello:
        """Find node 0 and wait until it says that all are here; this node's own greeting.

        Raises:
            HostError: node 0 did not answer in time, or has refused this node or another.
        """
        started = reported = time.monotonic()
        problem = ""
        while time.monotonic() - started < limit_s:
            try:
                return self._meet(started + limit_s + 2 * RETRY_S)
            except OSError as error:
                if str(error) != problem or time.monotonic() - reported > REPORT_S:
                    problem, reported = str(error), time.monotonic()
                    self._say(
                        f"waiting for node 0 at {self._master}:{self._port}: {problem} "
                        f"({time.monotonic() - started:.0f} s of {limit_s:.0f} s)"
                    )
            time.sleep(RETRY_S)
        raise HostError(
            f"node 0 at {self._master}:{self._port} did not let this node in within "
            f"{limit_s:.0f} s: {problem}",
            "its launcher has to run before any server can start",
            [
                "start the same command with --node-rank 0 on node 0",
                f"nc -vz {self._master} {self._port}   (a firewall? the port is --dist-port - 1)",
                "--master IP-OF-NODE-0   if that is not its address",
            ],
        )

    def poll(self, wait_s: float) -> News | None:
        """Pass the time; what node 0 says."""
        assert self._link is not None, "gather() comes first"
        try:
            for message in self._receive(self._link, wait_s):
                for kind in ("gone", "stopped"):
                    if kind in message:
                        return News(kind, str(message[kind]))
        except OSError as error:
            return News("gone", f"node 0 ({self._master}) is gone: {error}")
        return None

    def tell(self, news: News) -> None:
        """Tell node 0, which tells the others."""
        if self._link is not None:
            with suppress(OSError):
                self._link.send(**{news.kind: news.why})

    def close(self) -> None:
        """Close the connection."""
        if self._link is not None:
            self._link.close()

    def _meet(self, deadline: float) -> Hello:
        """Connect, greet and wait for ``go``; OSError when node 0 is not there (any more)."""
        address = network.resolve(self._master)
        try:
            sock = socket.create_connection((address, self._port), timeout=5.0)
        except TimeoutError:
            raise OSError("no answer (wrong address, or a firewall drops it)") from None
        except ConnectionRefusedError:
            raise OSError("the machine answers, but no launcher listens there yet") from None
        link = Link(sock)
        hello = self._hello(str(sock.getsockname()[0]))
        try:
            link.send(hello=asdict(hello))
            while time.monotonic() < deadline:
                for message in self._receive(link, 0.2):
                    if "waiting" in message:
                        self._say(str(message["waiting"]))
                    if "gone" in message:
                        raise HostError(
                            f"node 0 ends the start: {message['gone']}",
                            "a server needs all of its nodes",
                            ["see the log of node 0", "start all nodes again"],
                        )
                    if "go" in message:
                        self._link = link
                        return hello
            raise OSError("it waits for others")
        finally:
            if self._link is not link:
                link.close()

    def _receive(self, link: Link, wait_s: float) -> list[Message]:
        """What arrived within ``wait_s``; sends beats. OSError when node 0 is gone."""
        if time.monotonic() - self._beat > self._beat_s:
            self._beat = time.monotonic()
            link.send(beat=1)
        ready, _, _ = select.select([link], [], [], wait_s)
        if ready:
            return link.receive()
        if time.monotonic() - link.heard > self._timeout_s:
            raise OSError(f"nothing heard from it for {self._timeout_s:.0f} s")
        return []


def _port_of(listener: socket.socket) -> int:
    return int(listener.getsockname()[1])
