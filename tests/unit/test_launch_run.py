"""Launchers find each other, start together and end together; the server is a stand-in."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sglang_w4afp8 import cli
from sglang_w4afp8.testing.server import free_ports

REPOSITORY = Path(__file__).resolve().parents[2]
# Has a child like a rank, drains on SIGTERM, and ends by itself when a file says so.
SERVER = """
import json, os, pathlib, signal, subprocess, sys, time
def drain(*_):
    print("drained", flush=True)
    sys.exit(0)
if "--deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    signal.signal(signal.SIGTERM, drain)
child = subprocess.Popen(["sleep", "60"])
names = ("SGLANG_W4AFP8_STRICT", "SGLANG_HOST_IP", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
said = {"arguments": sys.argv[1:], "environment": {name: os.environ.get(name) for name in names}}
print("server", json.dumps(said | {"pids": [os.getpid(), child.pid]}), flush=True)
crash = pathlib.Path(os.environ["CRASH"])
while not crash.exists():
    time.sleep(0.05)
child.kill()
sys.exit(3)
"""


@dataclass
class Cluster:
    """Nodes at 127.0.0.1, 127.0.0.2, … of one machine.

    Attributes:
        folder: for logs and the stand-in.
        port: ``--dist-port``.
        nodes: the launchers by rank.
    """

    folder: Path
    port: int
    nodes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(
        self,
        rank: int,
        *words: str,
        nnodes: int = 2,
        tp: int = 4,
        env: dict[str, str] | None = None,
    ) -> None:
        """Start node ``rank``'s launcher; further words go to it."""
        path = os.pathsep.join([str(self.folder), str(REPOSITORY)])
        environ = {k: v for k, v in os.environ.items() if not k.startswith(("SGLANG", "NCCL"))}
        environ |= {"PYTHONPATH": path, "CRASH": str(self.crash(rank)), **(env or {})}
        command = [sys.executable, "-m", "sglang_w4afp8.cli", "launch", "org/model", "--run"]
        command += ["--tp", str(tp), "--host", f"127.0.0.{rank + 1}", "--wait", "60"]
        command += ["--dist-port", str(self.port), "--port", str(self.port + 1)]
        if not env:
            command += ["--nnodes", str(nnodes), "--node-rank", str(rank)]
            command += ["--master", "127.0.0.1"]
        with self.log(rank).open("ab") as sink:
            self.nodes[rank] = subprocess.Popen(
                [*command, *words], env=environ, stdout=sink, stderr=sink, cwd=self.folder
            )

    def crash(self, rank: int) -> Path:
        """The file whose existence ends a node's server."""
        return self.folder / f"crash-{rank}"

    def log(self, rank: int) -> Path:
        """A node's log."""
        return self.folder / f"node-{rank}.log"

    def wait_for(self, text: str, *ranks: int, limit_s: float = 60.0) -> None:
        """Until the logs of these nodes contain a text."""
        deadline = time.monotonic() + limit_s
        while missing := [r for r in ranks if text not in self.log(r).read_text()]:
            logs = "\n".join(f"-- {r}\n{self.log(r).read_text()}" for r in ranks)
            assert time.monotonic() < deadline, f"no {text!r} from {missing}:\n{logs}"
            time.sleep(0.02)

    def code(self, rank: int, limit_s: float = 60.0) -> int:
        """A launcher's exit code."""
        return self.nodes[rank].wait(limit_s)


@contextmanager
def cluster(folder: Path, port: int) -> Iterator[Cluster]:
    """A cluster without nodes; whatever is started is gone afterwards."""
    package = folder / "sglang"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "launch_server.py").write_text(SERVER)
    made = Cluster(folder, port)
    try:
        yield made
    finally:
        for node in made.nodes.values():
            with suppress(ProcessLookupError):
                node.send_signal(signal.SIGCONT)
            node.kill()
            node.wait()


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Cluster]:
    with cluster(tmp_path, consecutive_ports(3) + 1) as made:
        yield made


def consecutive_ports(count: int) -> int:
    """The first of several TCP ports in a row that nobody listens on."""
    while True:
        (first,) = free_ports(1)
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("", port))
        except (OSError, OverflowError):
            continue
        return first


def server_of(nodes: Cluster, rank: int) -> dict[str, Any]:
    nodes.wait_for("\nserver ", rank)
    line = next(x for x in nodes.log(rank).read_text().splitlines() if x.startswith("server "))
    return json.loads(line.removeprefix("server "))


def assert_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 5
    for pid in pids:
        stat = Path(f"/proc/{pid}/stat")
        while stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z":
            assert time.monotonic() < deadline, f"process {pid} still runs"
            time.sleep(0.02)


def test_a_late_node_is_waited_for_by_name_and_a_signal_ends_all(nodes: Cluster) -> None:
    hosts = nodes.folder / "hosts.txt"
    hosts.write_text("alpha.invalid # node 0\nbeta.invalid\n\ngamma.invalid\n")
    words = ("--hosts", str(hosts), "--", "--new-flag", "x y")
    nodes.start(0, *words, nnodes=3, tp=6)
    nodes.start(1, *words, nnodes=3, tp=6)
    nodes.wait_for("waiting for node 2 (gamma.invalid) (", 0, 1)
    assert "starting the server" not in nodes.log(0).read_text()
    nodes.start(2, *words, nnodes=3, tp=6)
    servers = [server_of(nodes, rank) for rank in range(3)]
    for rank, server in enumerate(servers):
        arguments = server["arguments"]
        assert arguments[arguments.index("--node-rank") + 1] == str(rank)
        assert arguments[arguments.index("--dist-init-addr") + 1] == f"127.0.0.1:{nodes.port}"
        assert arguments[-2:] == ["--new-flag", "x y"]
        assert server["environment"] == {
            "SGLANG_W4AFP8_STRICT": "1",
            "SGLANG_HOST_IP": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo",
            "NCCL_SOCKET_IFNAME": "=lo",
        }
    nodes.nodes[1].send_signal(signal.SIGTERM)
    assert [nodes.code(rank) for rank in range(3)] == [0, 128 + signal.SIGTERM, 0]
    drained = ["drained" in nodes.log(rank).read_text() for rank in range(3)]
    assert drained == [True, False, False], "node 0 has the requests; it needs the others' ranks"
    for rank in (0, 2):
        assert f"node 1 ({socket.gethostname()}, 127.0.0.1) was stopped by SIGTERM" in (
            nodes.log(rank).read_text()
        )
    for server in servers:
        assert_gone(server["pids"])


def test_a_killed_node_ends_the_other_by_name(nodes: Cluster) -> None:
    nodes.start(0)
    nodes.start(1)
    servers = [server_of(nodes, rank) for rank in range(2)]
    started = time.monotonic()
    nodes.nodes[1].kill()
    assert nodes.code(0) == 1
    assert time.monotonic() - started < 10
    text = nodes.log(0).read_text()
    assert f"node 1 ({socket.gethostname()}, 127.0.0.1) is gone: its connection closed" in text
    assert "Ways out:" in text
    assert_gone(servers[0]["pids"])
    # Nobody is left to kill the group of the other: the kernel ends its leader, and SGLang's
    # ranks end with theirs.
    assert_gone(servers[1]["pids"][:1])
    os.kill(servers[1]["pids"][1], signal.SIGKILL)


def test_the_leader_killed_ends_the_others(nodes: Cluster) -> None:
    nodes.start(0)
    nodes.start(1)
    server, leader = server_of(nodes, 1), server_of(nodes, 0)
    nodes.nodes[0].kill()
    os.kill(leader["pids"][1], signal.SIGKILL)
    assert nodes.code(1) == 1
    assert "node 0 (127.0.0.1) is gone: its connection closed" in nodes.log(1).read_text()
    assert_gone(server["pids"])


def test_a_server_that_crashes_ends_the_others(nodes: Cluster) -> None:
    nodes.start(0)
    nodes.start(1)
    server_of(nodes, 0)
    server_of(nodes, 1)
    nodes.crash(1).touch()
    assert nodes.code(1) == 3
    assert "the server of this node ended with exit code 3" in nodes.log(1).read_text()
    assert nodes.code(0) == 1
    assert f"the server of node 1 ({socket.gethostname()}, 127.0.0.1) ended with exit code 3" in (
        nodes.log(0).read_text()
    )


def test_a_machine_that_falls_silent_is_gone(nodes: Cluster) -> None:
    nodes.start(0, "--peer-timeout", "2.5")
    nodes.start(1, "--peer-timeout", "2.5")
    server_of(nodes, 0)
    server_of(nodes, 1)
    time.sleep(3)
    assert nodes.nodes[0].poll() is None, "beats were not enough to be alive"
    nodes.nodes[1].send_signal(signal.SIGSTOP)
    assert nodes.code(0) == 1
    assert "is gone: nothing heard from it for 2 s" in nodes.log(0).read_text()


def test_a_signal_to_every_node_still_drains(nodes: Cluster) -> None:
    """As Slurm and Kubernetes stop a job."""
    nodes.start(0)
    nodes.start(1)
    server_of(nodes, 0)
    server_of(nodes, 1)
    for rank in (1, 0):
        nodes.nodes[rank].send_signal(signal.SIGTERM)
    assert [nodes.code(rank) for rank in range(2)] == [128 + signal.SIGTERM] * 2
    assert "drained" in nodes.log(0).read_text()
    assert "is gone" not in nodes.log(0).read_text() + nodes.log(1).read_text()


def test_a_second_signal_kills_a_server_that_does_not_end(nodes: Cluster) -> None:
    nodes.start(0, "--", "--deaf", nnodes=1)
    server = server_of(nodes, 0)
    nodes.nodes[0].send_signal(signal.SIGTERM)
    nodes.wait_for("SIGTERM: passed on", 0)
    time.sleep(0.5)
    assert nodes.nodes[0].poll() is None
    nodes.nodes[0].send_signal(signal.SIGINT)
    assert nodes.code(0) == 128 + signal.SIGINT
    assert_gone(server["pids"])


def test_a_missing_node_is_named_on_every_other(nodes: Cluster) -> None:
    nodes.start(1, nnodes=3, tp=6)
    nodes.wait_for("waiting for node 0 at 127.0.0.1", 1)
    nodes.start(0, "--wait", "2.5", nnodes=3, tp=6)
    assert (nodes.code(0), nodes.code(1)) == (1, 1)
    for rank in range(2):
        assert "node 2 did not come within 2 s" in nodes.log(rank).read_text()
        assert "starting the server" not in nodes.log(rank).read_text()


def test_a_leader_that_never_comes(nodes: Cluster) -> None:
    nodes.start(1, "--wait", "1")
    assert nodes.code(1) == 1
    text = nodes.log(1).read_text()
    assert f"node 0 at 127.0.0.1:{nodes.port - 1} did not let this node in within 1 s" in text
    assert "no launcher listens there yet" in text


def test_nodes_that_differ_do_not_start(nodes: Cluster) -> None:
    nodes.start(0, tp=4)
    nodes.start(1, tp=8)
    assert (nodes.code(0), nodes.code(1)) == (1, 1)
    for rank in range(2):
        assert "differs: --tp: 8 there, 4 on node 0" in nodes.log(rank).read_text()


def test_a_rank_taken_twice(nodes: Cluster) -> None:
    nodes.start(0, nnodes=3, tp=6)
    nodes.start(1, nnodes=3, tp=6)
    nodes.wait_for("127.0.0.1) is here", 0)
    nodes.start(2, "--node-rank", "1", nnodes=3, tp=6)
    assert [nodes.code(rank) for rank in range(3)] == [1, 1, 1]
    for rank in range(3):
        text = nodes.log(rank).read_text()
        assert "two launchers say that they are node 1: process " in text
        assert str(nodes.nodes[1].pid) in text and str(nodes.nodes[2].pid) in text


def test_strangers_on_the_port_change_nothing(nodes: Cluster) -> None:
    nodes.start(0)
    nodes.wait_for("waiting for node 1", 0)
    with socket.create_connection(("127.0.0.1", nodes.port - 1)) as stranger:
        stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
        with socket.create_connection(("127.0.0.1", nodes.port - 1)):
            nodes.start(1)
            server_of(nodes, 0)
    time.sleep(0.5)
    assert nodes.nodes[0].poll() is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--iface", "eth77"), "'eth77' is no interface of this node"),
        (("--master", "192.0.2.77"), "--master 192.0.2.77 is 192.0.2.77, and this is node 0"),
    ],
)
def test_what_is_wrong_here_shows_at_once(
    nodes: Cluster, words: tuple[str, ...], message: str
) -> None:
    nodes.start(0, *words)
    assert nodes.code(0) == 1
    assert message in nodes.log(0).read_text()
    assert "waiting for" not in nodes.log(0).read_text()


def test_a_port_that_is_taken(nodes: Cluster) -> None:
    with socket.socket() as taken:
        taken.bind(("", nodes.port))
        taken.listen()
        nodes.start(0)
        assert nodes.code(0) == 1
        assert f"port {nodes.port} of this node: Address already in use" in (
            nodes.log(0).read_text()
        )


def test_too_few_gpus(nodes: Cluster) -> None:
    program = nodes.folder / "nvidia-smi"
    program.write_text('#!/bin/sh\nfor i in 0 1 2; do echo "GPU $i: NVIDIA L40S"; done\n')
    program.chmod(0o755)
    place = {"NODE_RANK": "0", "NNODES": "2", "MASTER_ADDR": "127.0.0.1"}
    nodes.start(0, tp=8, env={**place, "PATH": f"{nodes.folder}:{os.environ['PATH']}"})
    assert nodes.code(0) == 1
    assert "3 GPUs on this node, --tp 8 over 2 nodes" in nodes.log(0).read_text()
    assert "--nnodes 4" in nodes.log(0).read_text(), "3 nodes cannot share 8 ranks"
    assert "--tp 6" in nodes.log(0).read_text()


def test_a_checkpoint_that_is_not_on_this_node(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi
    assert cli.main(["launch", str(tmp_path / "R1"), "--tp", "1", "--run"]) == 1
    text = capsys.readouterr().err
    assert f"{tmp_path / 'R1'} is not on {socket.gethostname()}" in text
    assert "copy or mount it there" in text
