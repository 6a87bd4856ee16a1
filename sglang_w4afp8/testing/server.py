"""Start the real SGLang server, talk to it, and be sure that it is gone afterwards.

``launch`` runs ``python -m sglang.launch_server`` exactly as a user would, in a process group of
its own (a rank of SGLang that crashes kills its whole group), waits until it answers and writes
every node's log to a file. The clients are a few lines over the standard library, for SGLang's
native ``/generate`` with token ids and for the OpenAI-style ``/v1/completions``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sglang_w4afp8.errors import HostError
from sglang_w4afp8.testing.cpu_platform import NAME as CPU_PLATFORM

_POLL_S = 0.5
_LOG_TAIL_LINES = 40


@dataclass(frozen=True)
class Reply:
    """One answer of the native endpoint.

    Attributes:
        token_ids: generated tokens.
        logprobs: natural-log probability of each generated token.
        prompt_logprobs: of each prompt token after the first; empty unless asked for.
        cached_tokens: prompt tokens that came from the radix cache.
    """

    token_ids: list[int]
    logprobs: list[float]
    prompt_logprobs: list[float]
    cached_tokens: int


@dataclass(frozen=True)
class Node:
    """How one node of a server is started.

    Attributes:
        prefix: command in front of the server's, e.g. ``("ip", "netns", "exec", "a")``.
        env: variables of this node only, e.g. ``GLOO_SOCKET_IFNAME``.
    """

    prefix: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Server:
    """A running server; made by ``launch``.

    Attributes:
        url: base URL of node 0.
        logs: one log file per node.
        ready_s: seconds from start to the first healthy answer.
    """

    url: str
    logs: list[Path]
    processes: list[subprocess.Popen[bytes]]
    ready_s: float = 0.0

    def log_text(self, node: int = 0) -> str:
        """Everything that a node has written so far."""
        return self.logs[node].read_text(errors="replace")

    def request(
        self, path: str, body: Mapping[str, Any] | None = None, timeout_s: float = 300.0
    ) -> Any:
        """POST ``body`` as JSON (GET without one) and return the decoded answer.

        Raises:
            HostError: the server answered with an error; the message has its text.
        """
        with self._open(path, body, timeout_s) as answer:
            text = answer.read().decode()
        try:
            return json.loads(text)
        except json.JSONDecodeError:  # some endpoints answer in plain text
            return text

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        prompt_logprobs: bool = False,
        timeout_s: float = 300.0,
    ) -> list[Reply]:
        """Continue prompts of token ids greedily, all in one request (one batch)."""
        body: dict[str, Any] = {
            "input_ids": [list(prompt) for prompt in prompts],
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": max_new_tokens,
                "ignore_eos": True,
            },
            "return_logprob": True,
        }
        if prompt_logprobs:
            # Asking for these makes SGLang skip the radix cache for the prompt.
            body["logprob_start_len"] = 0
        return [_reply(answer) for answer in self.request("/generate", body, timeout_s)]

    def complete(self, prompt: str, *, max_tokens: int, **options: Any) -> dict[str, Any]:
        """One OpenAI-style completion; the decoded response object."""
        body = {"model": "default", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        answer = self.request("/v1/completions", {**body, **options})
        assert isinstance(answer, dict)
        return answer

    def stream(self, prompt: str, *, max_tokens: int, **options: Any) -> Iterator[dict[str, Any]]:
        """The same as a stream of server-sent events; yields each decoded chunk."""
        body = {"model": "default", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        with self._open("/v1/completions", {**body, **options, "stream": True}, 300.0) as answer:
            for line in answer:
                data = line.decode().strip().removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                if data:
                    yield json.loads(data)

    def flush_cache(self) -> None:
        """Empty the radix cache, so that the next prompt is computed in full."""
        self.request("/flush_cache", {})

    def _open(self, path: str, body: Mapping[str, Any] | None, timeout_s: float) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data=data, headers={"Content-Type": "application/json"}
        )
        try:
            # Straight to the server: a proxy from the environment must not see local requests.
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            return opener.open(request, timeout=timeout_s)
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")[:2000]
            raise HostError(
                f"{path} answered HTTP {error.code}: {text}",
                "the server refused or failed this request",
                [f"read {self.logs[0]}"],
            ) from error


@contextlib.contextmanager
def launch(
    model: str | Path,
    *,
    log_dir: str | Path,
    tp: int = 1,
    args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    nodes: Sequence[Node] = (Node(),),
    host: str = "127.0.0.1",
    python: str = sys.executable,
    platform: str | None = CPU_PLATFORM,
    timeout_s: float = 300.0,
) -> Iterator[Server]:
    """Run a server for the length of a ``with`` block.

    Args:
        model: checkpoint folder.
        log_dir: created if missing; receives ``node-<i>.log`` and is the servers' directory.
        tp: tensor-parallel degree over all nodes.
        args: further command-line arguments, the same for every node.
        env: further environment variables, the same for every node.
        nodes: one entry per node; more than one adds the multi-node arguments.
        host: address of node 0 as the other nodes and the clients see it.
        python: interpreter of the environment with SGLang and this package.
        platform: value of ``SGLANG_PLATFORM``; None leaves the choice to SGLang (a GPU).
        timeout_s: limit until the server is ready.

    Raises:
        HostError: a node ended, or the server was not ready in time; the message ends with the
            log's last lines.
    """
    folder = Path(log_dir)
    folder.mkdir(parents=True, exist_ok=True)
    ports = free_ports(len(nodes) + 1)  # the last one is for torch's store
    server = Server(f"http://{host}:{ports[0]}", [], [])
    started = time.monotonic()
    try:
        for rank, node in enumerate(nodes):
            command = [*node.prefix, python, "-m", "sglang.launch_server", "--model-path"]
            command += [str(model), "--tp-size", str(tp), "--host", host, "--port"]
            command += [str(ports[rank])]
            if len(nodes) == 1 and "--dp-size" not in args:  # data-parallel ranks need one each
                # Left to itself SGLang picks one of the ephemeral range, seconds before it binds.
                command += ["--nccl-port", str(ports[-1])]
            if len(nodes) > 1:
                command += ["--nnodes", str(len(nodes)), "--node-rank", str(rank)]
                command += ["--dist-init-addr", f"{host}:{ports[-1]}"]
            command += args
            log = folder / f"node-{rank}.log"
            with log.open("wb") as sink:
                server.processes.append(
                    subprocess.Popen(
                        command,
                        cwd=folder,
                        env=_environment(platform, {**(env or {}), **node.env}),
                        stdin=subprocess.DEVNULL,
                        stdout=sink,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
            server.logs.append(log)
        _wait_until_ready(server, started + timeout_s)
        server.ready_s = time.monotonic() - started
        yield server
    finally:
        stop_groups(server.processes)


def light_start(*models: str) -> dict[str, str]:
    """Environment with which a server's processes import less, for tests that start many.

    Args:
        models: modules of ``sglang.srt.models`` to keep, e.g. ``qwen3_moe``; SGLang imports all two
            hundred otherwise, in every rank.

    FlashInfer, which only a GPU can use, takes another second a process.
    """
    sglang = importlib.util.find_spec("sglang")
    assert sglang is not None and sglang.origin is not None, "sglang is not installed"
    folder = Path(sglang.origin).parent / "srt" / "models"
    missing = [name for name in models if not (folder / f"{name}.py").is_file()]
    assert not missing, f"no such modules: {missing}"
    others = {path.stem for path in folder.glob("*.py")} - {*models, "__init__"}
    return {
        "SGLANG_DISABLED_MODEL_ARCHS": ",".join(sorted(others)),
        "SGLANG_IS_FLASHINFER_AVAILABLE": "false",
    }


def free_ports(count: int) -> list[int]:
    """TCP ports that nobody listens on right now, all different.

    A server takes its port many seconds after this call, and its ranks open dozens of sockets in
    between. The kernel gives those ports of its ephemeral range, so ours come from below it.
    """
    first_ephemeral = _first_ephemeral_port()
    choices = random.SystemRandom().sample(range(1024, first_ephemeral), 40 * count)
    ports: list[int] = []
    for port in choices:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise HostError(
        f"{len(ports)} of {len(choices)} ports tried between 1024 and {first_ephemeral} are free",
        f"the server needs {count}",
        ["end the programs that hold them: ss -ltnp"],
    )


def _first_ephemeral_port() -> int:
    try:
        limits = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text()
    except FileNotFoundError:  # not Linux, or a sandbox; Linux's default
        return 32768
    # Hosts with many connections widen the range downwards; a few thousand ports stay ours.
    return max(int(limits.split()[0]), 8192)


def _environment(platform: str | None, extra: Mapping[str, str]) -> dict[str, str]:
    environment = dict(os.environ)
    # Every rank imports thousands of modules; without .pyc files each compiles them again.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    environment["PYTHONUNBUFFERED"] = "1"
    if platform is not None:
        environment["SGLANG_PLATFORM"] = platform
    environment.update(extra)
    return environment


def _wait_until_ready(server: Server, deadline: float) -> None:
    while True:
        for rank, process in enumerate(server.processes):
            if process.poll() is not None:
                raise HostError(
                    f"node {rank} of the server ended with exit code {process.returncode}",
                    "a server must keep running; its log ends with\n" + _tail(server.logs[rank]),
                    [f"read the whole log: {server.logs[rank]}"],
                )
        with contextlib.suppress(OSError, HostError):
            server.request("/health", timeout_s=5.0)
            return
        if time.monotonic() > deadline:
            raise HostError(
                "the server did not become ready in time",
                "its log ends with\n" + _tail(server.logs[0]),
                ["raise timeout_s; on two cores a rank takes about 8 s to start"],
            )
        time.sleep(_POLL_S)


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join(lines[-_LOG_TAIL_LINES:])


def stop_groups(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Kill every node's process group and remove the shared memory it leaves.

    SGLang leaves about 25 MB a server in /dev/shm, after an orderly end as well; containers often
    have 64 MB in all. An orderly end also waits for five seconds before it looks around.
    """
    segments = {path for process in processes for path in _shared_memory(process.pid)}
    for process in processes:
        # The group may outlive its leader as long as a rank is alive.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    for process in processes:
        process.wait()
    for path in segments:
        path.unlink(missing_ok=True)


def _shared_memory(group: int) -> set[Path]:
    """SGLang's segments (``/dev/shm/sgl*``) that processes of a process group have mapped."""
    found = set()
    for proc in Path("/proc").glob("[0-9]*"):
        # Processes come and go while we look, and some belong to other users.
        with contextlib.suppress(OSError):
            if os.getpgid(int(proc.name)) == group:
                maps = (proc / "maps").read_text()
                found.update(re.findall(r"/dev/shm/sgl\S+", maps))
    return {Path(name) for name in found}


def _reply(answer: Mapping[str, Any]) -> Reply:
    meta = answer["meta_info"]
    chosen = meta["output_token_logprobs"]
    prompt = meta.get("input_token_logprobs") or []
    return Reply(
        token_ids=[entry[1] for entry in chosen],
        logprobs=[entry[0] for entry in chosen],
        prompt_logprobs=[entry[0] for entry in prompt[1:]],
        cached_tokens=meta["cached_tokens"],
    )
