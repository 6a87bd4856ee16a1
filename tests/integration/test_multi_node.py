"""One real server over two nodes with different addresses, started and watched by ``launch``.

The nodes are two network namespaces with a virtual cable between them, each with a /dev/shm of its
own: gloo, SGLang's message queues and our launchers have nothing but the network. Where namespaces
are not permitted, the nodes are 127.0.0.1 and 127.0.0.2 instead; one of the two variants runs, and
the reason why the other one did not is in the summary.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sglang")

from sglang_w4afp8.testing import server as launcher  # noqa: E402

pytestmark = [pytest.mark.sglang, pytest.mark.server]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LIMIT = 1e-4  # natural-log probability, as for one node
START_LIMIT_S = 400.0
_CLONE_NEWNET = 0x40000000
# A node of its own also for shared memory: SGLang asks it whether two ranks are on one machine.
_OWN_SHM = 'mount -t tmpfs tmpfs /dev/shm && exec "$@"'


@dataclass
class Nodes:
    """Two nodes to start launchers on.

    Attributes:
        addresses: by rank.
        interface: between them; its name on node 0.
        prefixes: put in front of a command to run it on that node.
        namespaces: of each node; empty without.
        folder: for logs.
    """

    addresses: tuple[str, str]
    interface: str
    prefixes: tuple[tuple[str, ...], tuple[str, ...]]
    namespaces: tuple[str, ...]
    folder: Path
    ports: list[int] = field(default_factory=lambda: launcher.free_ports(2))
    processes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, rank: int, model: Path | str, *words: str) -> None:
        """Run ``sglang-w4afp8 launch`` on a node."""
        command = [*self.prefixes[rank], sys.executable, "-m", "sglang_w4afp8.cli", "launch"]
        command += [str(model), "--run", "--tp", "4", "--nnodes", "2", "--node-rank", str(rank)]
        command += ["--master", self.addresses[0], "--host", self.addresses[rank]]
        command += ["--port", str(self.ports[0]), "--dist-port", str(self.ports[1])]
        environ = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        environ |= {"SGLANG_PLATFORM": "w4afp8_cpu", "SGLANG_W4AFP8_ACTIVATION": "none"}
        environ |= launcher.light_start("deepseek_v2")
        with self.log(rank).open("wb") as sink:
            self.processes[rank] = subprocess.Popen(
                [*command, *words],
                env=environ,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )

    def log(self, rank: int) -> Path:
        """A node's log."""
        return self.folder / f"node-{rank}.log"

    def wait_for(self, text: str, rank: int, limit_s: float) -> None:
        """Until a node's log contains a text; a launcher that ends before is an error."""
        deadline = time.monotonic() + limit_s
        while text not in self.log(rank).read_text(errors="replace"):
            ended = [r for r, p in self.processes.items() if p.poll() is not None]
            assert not ended and time.monotonic() < deadline, "\n".join(
                self.log(r).read_text(errors="replace")[-4000:] for r in self.processes
            )
            time.sleep(0.1)


@pytest.fixture(scope="module")
def nodes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Nodes]:
    """Two nodes, of the kind that this machine permits."""
    folder = tmp_path_factory.mktemp("nodes")
    with contextlib.ExitStack() as stack:
        try:
            made = stack.enter_context(_namespaces(folder))
            refused = ""
        except (OSError, subprocess.CalledProcessError) as error:
            told = getattr(error, "stderr", "") or str(error)
            refused = told.strip() or repr(error)
        if request.param == "namespaces" and refused:
            pytest.skip(f"network namespaces are NOT PERMITTED here ({refused}): see loopback")
        if request.param == "loopback":
            if not refused:
                pytest.skip("ran in two network namespaces instead")
            made = Nodes(("127.0.0.1", "127.0.0.2"), "lo", ((), ()), (), folder)
        try:
            yield made
        finally:
            for process in made.processes.values():
                process.terminate()  # the launcher kills the server's group, then itself ends
                process.terminate()
            launcher.stop_groups(list(made.processes.values()))


@contextlib.contextmanager
def _namespaces(folder: Path) -> Iterator[Nodes]:
    names = tuple(f"w4afp8-{os.getpid()}-{i}" for i in range(2))
    cable = ("w4a", "w4b")

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    with contextlib.ExitStack() as stack:
        for name in names:
            ip("netns", "add", name)
            stack.callback(ip, "netns", "del", name)
        ip(*f"link add {cable[0]} netns {names[0]} type veth".split(),
           *f"peer name {cable[1]} netns {names[1]}".split())  # fmt: skip
        addresses = ("10.203.0.1", "10.203.0.2")
        for name, end, address in zip(names, cable, addresses, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        prefixes = [("ip", "netns", "exec", name, "sh", "-c", _OWN_SHM, "sh") for name in names]
        for prefix in prefixes:
            subprocess.run([*prefix, "true"], check=True, capture_output=True, text=True)
        yield Nodes(addresses, cable[0], (prefixes[0], prefixes[1]), names, folder)


@contextlib.contextmanager
def inside(nodes: Nodes, rank: int) -> Iterator[None]:
    """This thread's new sockets are on that node."""
    if not nodes.namespaces:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    with (
        open("/proc/thread-self/ns/net") as home,
        open(f"/var/run/netns/{nodes.namespaces[rank]}") as there,
    ):
        assert libc.setns(there.fileno(), _CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        try:
            yield
        finally:
            assert libc.setns(home.fileno(), _CLONE_NEWNET) == 0


both = pytest.mark.parametrize("nodes", ["namespaces", "loopback"], indirect=True)


@both
def test_a_wrong_interface_is_told_before_anything_is_loaded(nodes: Nodes) -> None:
    started = time.monotonic()
    nodes.start(1, "org/model", "--iface", "eth77")
    assert nodes.processes.pop(1).wait(60) == 1
    text = nodes.log(1).read_text()
    assert "'eth77' is no interface of this node" in text
    assert nodes.addresses[1] in text or nodes.interface == "lo"
    assert time.monotonic() - started < 20


@both
def test_one_server_over_two_nodes(
    nodes: Nodes, checkpoint_of: Callable[[str], Path], reference_of: Callable[[str], Any]
) -> None:
    """A late node is waited for; the answers are the judge's; a killed node ends the other."""
    model, reference = checkpoint_of("deepseek"), reference_of("deepseek")
    # The tiny tokenizer has no chat template of its own.
    more = ("--", "--dtype", "float32", "--chat-template", "chatml", "--sleep-on-idle")
    nodes.start(0, model, *more)
    nodes.wait_for("waiting for node 1", 0, 60)
    time.sleep(1)
    assert "starting the server" not in nodes.log(0).read_text()
    nodes.start(1, model, *more)
    for rank in range(2):
        nodes.wait_for("starting the server", rank, 60)

    server = launcher.Server(
        f"http://{nodes.addresses[0]}:{nodes.ports[0]}",
        [nodes.log(rank) for rank in range(2)],
        list(nodes.processes.values()),
    )
    nodes.wait_for("ready to roll", 0, START_LIMIT_S)
    with inside(nodes, 0):
        replies = server.generate(reference.prompts, max_new_tokens=len(reference.token_ids[0]))
    for prompt, reply in enumerate(replies):
        assert reply.token_ids == reference.token_ids[prompt]
        assert reply.logprobs == pytest.approx(reference.logprobs[prompt], abs=LIMIT, rel=0)

    with inside(nodes, 0):
        new_tokens = len(reference.token_ids[1])
        (again,) = server.generate([reference.prompts[1]], max_new_tokens=new_tokens)
    assert again.cached_tokens > 0
    assert again.token_ids == reference.token_ids[1]
    check_clients(nodes, model, server.url)

    text = [nodes.log(rank).read_text(errors="replace") for rank in range(2)]
    assert re.search(r"sglang-w4afp8: \d+ MoE layers, tp=4, .* backend=torch", text[0])
    for rank, address in enumerate(nodes.addresses):
        if nodes.namespaces:
            assert f"export SGLANG_HOST_IP={address}" in text[rank]
            assert f"export GLOO_SOCKET_IFNAME={('w4a', 'w4b')[rank]}" in text[rank]
    ranks = [{t for t in range(4) if f" TP{t}]" in log} for log in text]
    assert ranks == [{0, 1}, {2, 3}], "each node runs its own two ranks"

    started = time.monotonic()
    os.killpg(nodes.processes[1].pid, signal.SIGKILL)
    assert nodes.processes[0].wait(30) == 1
    assert time.monotonic() - started < 20
    last = nodes.log(0).read_text(errors="replace")[-2000:]
    assert "sglang-w4afp8 launch: node 1 (" in last
    assert "is gone: its connection closed" in last
    assert not _running(nodes), "a rank outlived its launcher"


def check_clients(nodes: Nodes, model: Path, url: str) -> None:
    """The examples' clients and benchmark, run on node 0."""

    def run(*words: object, **variables: str) -> str:
        done = subprocess.run(
            [*nodes.prefixes[0], *map(str, words)],
            cwd=nodes.folder,
            env=os.environ | {"NO_PROXY": "*"} | variables,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    out = run(sys.executable, EXAMPLES / "clients/chat.py", url)
    asked = re.fullmatch(r"(.*)\n\((\d+) tokens in, (\d+) out\)\n(.*)\n", out, re.S)
    assert asked, out
    assert asked[1] == asked[4], "greedy: the stream says the same"
    assert int(asked[3]) > 0
    lines = run(EXAMPLES / "clients/requests.sh", url).strip().splitlines()
    assert json.loads(lines[0])["choices"][0]["message"]["content"] == asked[1]
    assert lines[-1] == "data: [DONE]"
    assert len([line for line in lines if line.startswith("data: {")]) > 1

    told = run(
        EXAMPLES / "bench-serving.sh",
        model,
        url,
        **{"DATASET": "random-ids", "PROMPTS": "3", "INPUT": "8", "OUTPUT_LEN": "4"},
        **{"CONCURRENCY": "2", "OUTPUT": "bench.jsonl"},
        PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    )
    assert "Serving Benchmark Result" in told
    (result,) = (nodes.folder / "bench.jsonl").read_text().splitlines()
    assert json.loads(result)["completed"] == 3
    assert json.loads(result)["total_output_tokens"] == 12


def _running(nodes: Nodes) -> list[str]:
    """Processes of these servers that are still there after a moment."""
    port, deadline = f"{nodes.addresses[0]}:{nodes.ports[1]}", time.monotonic() + 10
    while True:
        found = []
        for proc in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (proc / "environ").read_bytes() + (proc / "cmdline").read_bytes()
                if str(nodes.folder).encode() in words or port.encode() in words:
                    found.append(f"{proc.name}: {(proc / 'cmdline').read_bytes()[:200]!r}")
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.2)
