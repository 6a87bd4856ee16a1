"""The server launcher against a stand-in for the server: readiness, failure, and clean ends."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import textwrap
import time
from pathlib import Path

import pytest

from sglang_w4afp8.errors import HostError
from sglang_w4afp8.testing import server as launcher

# Takes SGLang's arguments, answers two endpoints, and has a child like a rank.
FAKE = """\
#!{python}
import json, mmap, os, subprocess, sys, http.server
args = sys.argv[1:]
print("arguments", json.dumps(args), "platform", os.environ.get("SGLANG_PLATFORM"), flush=True)
if "--fail" in args:
    print("the reason why", flush=True)
    sys.exit(3)
segment = open("/dev/shm/sgl_w4afp8_test_%d" % os.getpid(), "wb+")
segment.truncate(4096)
mapped = mmap.mmap(segment.fileno(), 4096)
child = subprocess.Popen(["sleep", "600"])
print("child", child.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(503 if "--never" in args else 200, b"")
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body.get("prompt") == "bad":
            return self.answer(400, b"no such thing")
        if body.get("stream"):
            chunks = [json.dumps({{"choices": [{{"text": t}}]}}) for t in "ab"] + ["[DONE]"]
            return self.answer(200, "".join(f"data: {{c}}\\n\\n" for c in chunks).encode())
        self.answer(200, json.dumps({{"echo": body}}).encode())
    def answer(self, code, data):
        self.send_response(code)
        self.end_headers()
        self.wfile.write(data)
    def log_message(self, *_):
        pass
port = int(args[args.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def fake(tmp_path: Path) -> str:
    script = tmp_path / "fake-python"
    script.write_text(textwrap.dedent(FAKE).format(python=sys.executable))
    script.chmod(0o755)
    return str(script)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A killed orphan may stay a zombie until init collects it.
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def wait_gone(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


def child_of(server: launcher.Server) -> int:
    return int(server.log_text().split("child ")[1].split()[0])


def test_arguments_clients_and_clean_end(fake, tmp_path):
    with launcher.launch(
        "/m", log_dir=tmp_path / "log", tp=4, args=["--x", "1"], python=fake
    ) as server:
        log = server.log_text()
        assert '"-m", "sglang.launch_server", "--model-path", "/m", "--tp-size", "4"' in log
        assert '"--x", "1"]' in log and "--nnodes" not in log
        assert "platform w4afp8_cpu" in log
        body = server.complete("hello", max_tokens=3)["echo"]
        assert (body["prompt"], body["max_tokens"], body["temperature"]) == ("hello", 3, 0)
        texts = [c["choices"][0]["text"] for c in server.stream("hello", max_tokens=2)]
        assert texts == ["a", "b"]
        with pytest.raises(HostError, match="HTTP 400: no such thing"):
            server.complete("bad", max_tokens=1)
        child = child_of(server)
        assert alive(child)
        segment = Path(f"/dev/shm/sgl_w4afp8_test_{server.processes[0].pid}")
        assert segment.exists()
    assert server.processes[0].poll() is not None
    assert not segment.exists(), "shared memory was left behind"
    assert wait_gone(child), "a rank outlived its launcher"


def test_the_group_dies_when_the_test_body_raises(fake, tmp_path):
    with (
        pytest.raises(RuntimeError),
        launcher.launch("/m", log_dir=tmp_path, python=fake) as server,
    ):
        child = child_of(server)
        raise RuntimeError
    assert wait_gone(child)


def test_two_nodes_share_a_rendezvous_and_differ_in_rank(fake, tmp_path):
    nodes = (launcher.Node(), launcher.Node(env={"SGLANG_PLATFORM": "other"}))
    with launcher.launch("/m", log_dir=tmp_path, tp=4, nodes=nodes, python=fake) as server:
        deadline = time.monotonic() + 10
        while "child" not in server.log_text(1) and time.monotonic() < deadline:
            time.sleep(0.05)
        first, second = server.log_text(0), server.log_text(1)
        for rank, log in enumerate((first, second)):
            assert f'"--nnodes", "2", "--node-rank", "{rank}"' in log
        address = first.split('"--dist-init-addr", ')[1].split("]")[0]
        assert address in second
        assert "platform other" in second


def test_a_server_that_ends_is_reported_with_its_last_words(fake, tmp_path):
    with (
        pytest.raises(HostError, match=r"(?s)exit code 3.*the reason why") as caught,
        launcher.launch("/m", log_dir=tmp_path, args=["--fail"], python=fake),
    ):
        pytest.fail("not reached")
    assert str(tmp_path / "node-0.log") in str(caught.value)


def test_a_server_that_never_gets_ready_is_stopped(fake, tmp_path):
    started = time.monotonic()
    with (
        pytest.raises(HostError, match="not become ready"),
        launcher.launch("/m", log_dir=tmp_path, args=["--never"], python=fake, timeout_s=2),
    ):
        pytest.fail("not reached")
    assert time.monotonic() - started < 10
    child = int((tmp_path / "node-0.log").read_text().split("child ")[1].split()[0])
    assert wait_gone(child)


def test_free_ports_are_different_and_no_socket_is_given_them_by_itself():
    ports = launcher.free_ports(20)
    assert len(set(ports)) == 20
    given = []
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            sock = stack.enter_context(socket.socket())
            sock.bind(("127.0.0.1", 0))
            given.append(sock.getsockname()[1])
    assert max(ports) < max(8192, min(given))  # 8192: where the range was widened downwards


def test_a_taken_port_is_not_offered(monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        monkeypatch.setattr(launcher.random.SystemRandom, "sample", lambda *_: [port] * 40)
        with pytest.raises(HostError, match="0 of 40 ports"):
            launcher.free_ports(1)


@pytest.mark.parametrize(("shared", "method"), [("0", "spawn"), ("1", "forkserver")])
def test_ranks_are_forked_only_when_asked_for(
    shared: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang's own call, on the platform and elsewhere."""
    import multiprocessing

    from sglang_w4afp8.testing import cpu_platform

    calls: list[tuple[str | None, bool]] = []
    monkeypatch.setattr(
        multiprocessing, "set_start_method", lambda name, force=False: calls.append((name, force))
    )
    monkeypatch.setattr(multiprocessing, "set_forkserver_preload", lambda modules: None)
    monkeypatch.setenv("SGLANG_W4AFP8_SHARE_IMPORTS", shared)
    monkeypatch.delenv("SGLANG_PLATFORM", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cpu_platform.activate() is None
    multiprocessing.set_start_method("spawn", force=True)
    monkeypatch.setenv("SGLANG_PLATFORM", cpu_platform.NAME)
    assert cpu_platform.activate() == cpu_platform.CLASS
    multiprocessing.set_start_method("spawn", force=True)
    assert calls == [("spawn", True), (method, True)]
