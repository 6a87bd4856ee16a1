"""The exact ``sglang.launch_server`` command and environment of one node, a reason for each part.

Pure: reads the checkpoint's config.json and this machine's interfaces, starts nothing. Flags are
spelt as both the oldest and the newest tested SGLang know them.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sglang_w4afp8 import env
from sglang_w4afp8.errors import CheckpointError, ConfigError
from sglang_w4afp8.tools import network

METHOD = "w4afp8"
# Flags that launch writes itself, with SGLang's other spellings of them.
OWN_FLAGS = {
    **dict.fromkeys(("--model-path", "--model"), "MODEL"),
    **dict.fromkeys(("--tp-size", "--tp", "--tensor-parallel-size"), "--tp"),
    **dict.fromkeys(("--ep-size", "--ep", "--expert-parallel-size"), "--ep"),
    **dict.fromkeys(("--nnodes", "--node-rank", "--host", "--port"), "the flag of the same name"),
    **dict.fromkeys(("--dist-init-addr", "--nccl-init-addr"), "--master and --dist-port"),
}


@dataclass(frozen=True)
class Flag:
    """Words of the command that belong together, and why they are there."""

    words: tuple[str, ...]
    why: str


@dataclass(frozen=True)
class Setting:
    """An environment variable, and why it is set."""

    name: str
    value: str
    why: str


@dataclass(frozen=True)
class NodeCommand:
    """What one node runs.

    Attributes:
        rank: its node rank.
        python: interpreter.
        flags: arguments of ``sglang.launch_server``.
        settings: environment variables beside those already there.
    """

    rank: int
    python: str
    flags: tuple[Flag, ...]
    settings: tuple[Setting, ...] = ()

    @property
    def arguments(self) -> list[str]:
        """Arguments of ``sglang.launch_server``."""
        return [word for flag in self.flags for word in flag.words]

    @property
    def command(self) -> list[str]:
        """The whole command."""
        return [self.python, "-m", "sglang.launch_server", *self.arguments]

    @property
    def environment(self) -> dict[str, str]:
        """Name → value of every setting."""
        return {setting.name: setting.value for setting in self.settings}

    def shell(self, *, reasons: bool = True) -> str:
        """A shell script: reasons as comments, exports, the command."""
        lines = [f"# {' '.join(flag.words)}: {flag.why}" for flag in self.flags] * reasons
        for setting in self.settings:
            lines += [f"# {setting.why}"] * reasons
            lines.append(f"export {setting.name}={shlex.quote(setting.value)}")
        words = [shlex.join(flag.words) for flag in self.flags]
        head = shlex.join([self.python, "-m", "sglang.launch_server"])
        return "\n".join(lines) + "\n" + " \\\n    ".join([head, *words])


@dataclass(frozen=True)
class Wanted:
    """What the user asked for.

    Attributes:
        model: folder or hub name.
        tp, ep: ranks over all nodes; expert-parallel degree or None.
        nnodes: number of nodes; divides ``tp``.
        master: name or address of node 0; None with one node.
        dist_port: TCP port of torch.distributed on node 0.
        host, port: where a node's HTTP server listens.
        passed_on: further arguments, handed to SGLang as they are.
    """

    model: str
    tp: int
    ep: int | None = None
    nnodes: int = 1
    master: str | None = None
    dist_port: int = 5000
    host: str = "0.0.0.0"
    port: int = 30000
    passed_on: tuple[str, ...] = field(default=())

    def check(self) -> None:
        """Refuse what no server can do, before anything starts.

        Raises:
            ConfigError: degrees that do not divide, no master, or a flag given twice.
        """
        if self.tp % self.nnodes:
            raise ConfigError(
                f"--tp {self.tp} over {self.nnodes} nodes",
                f"every node runs tp / nnodes ranks, and {self.tp} / {self.nnodes} is not whole",
                [f"--tp {self.nnodes * max(1, self.tp // self.nnodes)}", "another --nnodes"],
            )
        if self.ep is not None and self.tp % self.ep:
            raise ConfigError(
                f"--ep {self.ep} with --tp {self.tp}",
                "the expert-parallel degree must divide the tensor-parallel one",
                [f"--ep {self.tp}", "leave --ep out"],
            )
        if self.nnodes > 1 and self.master is None:
            raise ConfigError(
                f"{self.nnodes} nodes without --master",
                "every node has to find node 0",
                ["--master IP-OF-NODE-0", "--hosts FILE   with node 0 first"],
            )
        for word in self.passed_on:
            own = OWN_FLAGS.get(word.partition("=")[0])
            if own:
                raise ConfigError(
                    f"{word} after --", f"launch writes this argument itself, from {own}", [own]
                )


def node_flags(wanted: Wanted, rank: int) -> tuple[Flag, ...]:
    """The server's arguments on node ``rank``.

    Raises:
        ConfigError: see :meth:`Wanted.check`; or the checkpoint is of another method.
        CheckpointError: the folder has no readable config.json.
    """
    wanted.check()
    a_node = wanted.tp // wanted.nnodes
    flags = [Flag(("--model-path", wanted.model), "the same path on every node")]
    if not any(word.startswith("--quantization") for word in wanted.passed_on):
        flags.append(Flag(("--quantization", METHOD), quantization_reason(wanted.model)))
    flags.append(
        Flag(
            ("--tp-size", str(wanted.tp)),
            f"tensor-parallel ranks over all nodes, {a_node} on each (one a GPU)",
        )
    )
    if wanted.ep is not None:
        flags.append(Flag(("--ep-size", str(wanted.ep)), "expert-parallel degree"))
    if wanted.nnodes > 1:
        meeting = join_port(wanted.master or "", wanted.dist_port)
        flags += [
            Flag(("--nnodes", str(wanted.nnodes)), "number of machines"),
            Flag(("--node-rank", str(rank)), "this machine; node 0 answers requests"),
            Flag(
                ("--dist-init-addr", meeting),
                "where torch.distributed meets, on node 0; the same on every node",
            ),
        ]
    flags.append(
        Flag(
            ("--host", wanted.host),
            "address the HTTP server listens on; 0.0.0.0 is every one, 127.0.0.1 this machine "
            "only (add -- --api-key KEY where others can reach it)",
        )
    )
    flags.append(Flag(("--port", str(wanted.port)), "port of the HTTP server"))
    if wanted.passed_on:
        flags.append(Flag(wanted.passed_on, "passed on as given after --"))
    return tuple(flags)


def node_settings(
    interface: network.Interface | None,
    address: str | None,
    ports: Sequence[network.RdmaPort],
    environ: Mapping[str, str],
    *,
    nnodes: int,
) -> tuple[Setting, ...]:
    """The environment of a node's server; what the user has set already stays as it is.

    Args:
        interface: the one that leads to the other nodes; None when it is not known yet.
        address: this node's address on it.
        ports: RDMA ports of this machine.
        environ: the variables already there.
        nnodes: one node needs the first setting only.
    """
    settings = [
        Setting(
            env.STRICT.name, "1", "a server without this plugin would be wrong; it ends instead"
        )
    ]
    if nnodes > 1 and interface is not None:
        settings += [
            Setting(
                "GLOO_SOCKET_IFNAME",
                interface.name,
                f"the interface towards the other nodes; gloo may take another: {interface}",
            ),
            Setting(
                "NCCL_SOCKET_IFNAME",
                f"={interface.name}",
                "the same for NCCL; '=' makes it this name, not every name that starts so",
            ),
        ]
    if nnodes > 1 and address is not None:
        settings.append(
            Setting("SGLANG_HOST_IP", address, "SGLang tells the other nodes this address")
        )
    index, why = network.gid_index(ports)
    if nnodes > 1 and index is not None:
        settings.append(Setting("NCCL_IB_GID_INDEX", str(index), why))
    kept = "as your environment has it"
    return tuple(
        Setting(s.name, environ[s.name], kept) if environ.get(s.name) else s for s in settings
    )


def join_port(host: str, port: int) -> str:
    """``host:port``, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def quantization_reason(model: str) -> str:
    """Why ``--quantization w4afp8``; reads config.json where ``model`` is a folder.

    Raises:
        CheckpointError: config.json is missing or no JSON.
        ConfigError: the checkpoint is of another quantization method, or of none.
    """
    folder = Path(model)
    if not folder.is_dir():
        return "the method of this package (config.json is not on this machine, not checked)"
    config = read_config(folder)
    own = config.get("quantization_config") or {}
    if own.get("quant_method") == METHOD:
        return f"what {folder.name}/config.json says; with it another method is an error"
    if (folder / "hf_quant_config.json").is_file() and not own:
        return f"{folder.name} has its method in hf_quant_config.json"
    found = own.get("quant_method") or "no quantization"
    raise ConfigError(
        f"{folder}: config.json says {found!r}",
        f"this command serves {METHOD} checkpoints",
        [
            f"sglang-w4afp8 convert {folder} {folder}-W4AFP8",
            "launch … -- --quantization NAME   serves it with SGLang's own method",
        ],
    )


def read_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's config.json.

    Raises:
        CheckpointError: missing, or no JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: {error}", "without it no server can be started", [f"ls {folder}"]
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: no JSON object", "it describes the model", [f"head {path}"])
    return config


def fingerprint(model: str) -> str:
    """First 12 hex digits of SHA-256 over config.json; empty where it is not on this machine."""
    path = Path(model) / "config.json"
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.is_file() else ""
