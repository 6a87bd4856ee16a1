"""What ``doctor`` looks at beside the software: network, RDMA, disks, clock, a checkpoint.

Standard library only. :func:`facts` are the values that have to be equal on every node of a
cluster; :mod:`sglang_w4afp8.tools.doctor_cluster` compares them.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from sglang_w4afp8 import env
from sglang_w4afp8.errors import W4AFp8Error
from sglang_w4afp8.tools import launch_plan, network
from sglang_w4afp8.tools.doctor import FAIL, OK, WARN, Row
from sglang_w4afp8.tools.versions import version_of

VERBS = Path("/dev/infiniband")
_INDEX = "model.safetensors.index.json"
_ENOUGH_PROCESSES = 32768  # a server has some hundred threads a rank
_ENOUGH_CACHE_GIB = 5  # compiled kernels of SGLang, Triton and this package
_STA_UNSYNC = 0x40  # linux/timex.h
_TIMEX_BYTES = 208
_STATUS_OFFSET = 40
# Distributions whose version decides whether nodes can work together.
_DISTRIBUTIONS = ("sglang-w4afp8", "sglang", "torch", "sglang-kernel", "transformers")


def facts(model: str | None) -> dict[str, str]:
    """What has to be equal on all nodes, by name; read without importing anything heavy."""
    found = {"Python": platform.python_version().rpartition(".")[0]}
    for name in _DISTRIBUTIONS:
        found[name] = version_of(name)
    nccl = sorted(
        f"{d.metadata['Name'].removeprefix('nvidia-nccl-')} {d.version}"
        for d in metadata.distributions()
        if (d.metadata["Name"] or "").startswith("nvidia-nccl-")
    )
    found["NCCL"] = ", ".join(nccl) or "not installed"
    found["GPUs"], found["driver"] = _gpus_and_driver()
    index, _ = network.gid_index(network.rdma_ports())
    found["RoCE GID index"] = "none" if index is None else str(index)
    if model is not None:
        found["MODEL's config.json"] = launch_plan.fingerprint(model) or "not a folder here"
    return found


def _gpus_and_driver() -> tuple[str, str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "none", "none"
    query = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return "nvidia-smi fails", "nvidia-smi fails"
    lines = [line.split(", ") for line in done.stdout.splitlines() if ", " in line]
    names = [words[0] for words in lines]
    listed = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
    return listed or "none", ", ".join(sorted({words[-1] for words in lines})) or "none"


def interfaces() -> Iterator[Row]:
    """The interfaces that NCCL and gloo may choose from, and the variables that choose."""
    known = [i for i in network.interfaces() if i.addresses and not i.is_loopback]
    if not known:
        yield Row(
            WARN,
            "network",
            "no interface but loopback: one node only",
            "ip link set NAME up, or docker run --network host …",
        )
    elif len(known) == 1:
        yield Row(OK, "network", str(known[0]))
    else:
        yield Row(
            OK,
            "network",
            ", ".join(str(i) for i in known) + "; launch takes the one that leads to --master",
        )
    names = {interface.name for interface in network.interfaces()}
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        value = os.environ.get(variable, "")
        wanted = [name.strip("= ") for name in value.split(",") if name.strip("= ")]
        if value.startswith("^"):  # NCCL: all but these
            continue
        exact = variable.startswith("GLOO") or value.startswith("=")
        for name in wanted:
            if not any(n == name or (not exact and n.startswith(name)) for n in names):
                yield Row(
                    FAIL,
                    variable,
                    f"{value}: no interface of this node is called {name}",
                    f"export {variable}={known[0].name if known else 'lo'}",
                )
    with suppress(OSError):
        own = network.resolve(socket.gethostname())
        if own.startswith("127.") and known:
            yield Row(
                WARN,
                "host name",
                f"{socket.gethostname()} is {own} on this machine; as --master it would be a "
                "loopback address",
                f"--master {known[0].addresses[0]}   (or correct /etc/hosts)",
            )


def rdma() -> Iterator[Row]:
    """RDMA devices and their GIDs: without them NCCL goes over TCP between nodes."""
    ports = network.rdma_ports()
    has_gpus = _gpus_and_driver()[0] != "none"
    if not ports:
        found = f"no device in {network.INFINIBAND}: between nodes NCCL would go over TCP"
        cure = "docker run --device /dev/infiniband …, or modprobe mlx5_ib ib_uverbs"
        yield Row(WARN, "RDMA", found, cure) if has_gpus else Row(OK, "RDMA", found)
        return
    for port in ports:
        layer = "RoCE" if port.is_roce else port.link_layer
        gids = f", RoCE v2 IPv4 GIDs {port.gids}" if port.is_roce else ""
        found = f"port {port.port} {port.state}, {layer}, {port.rate}{gids}"
        if port.is_active:
            yield Row(OK, port.device, found)
        else:
            yield Row(WARN, port.device, found, f"ibstat {port.device}   (cable, switch, link)")
    index, why = network.gid_index(ports)
    if any(port.is_active and port.is_roce for port in ports):
        chosen = os.environ.get("NCCL_IB_GID_INDEX", "")
        if index is None:
            yield Row(WARN, "GID index", why, "export NCCL_IB_HCA=DEVICE,…   of one kind only")
        elif chosen and chosen != str(index):
            active = [port for port in ports if port.is_active and port.is_roce]
            valid = all(chosen in map(str, port.gids) for port in active)
            yield Row(
                OK if valid else FAIL,
                "GID index",
                f"NCCL_IB_GID_INDEX={chosen}; {why}",
                "" if valid else f"export NCCL_IB_GID_INDEX={index}",
            )
        else:
            yield Row(OK, "GID index", f"{why}; launch sets NCCL_IB_GID_INDEX={index}")
    if any(p.is_active for p in ports) and not VERBS.is_dir():
        yield Row(
            FAIL,
            "RDMA",
            f"{VERBS} is not there, so no program can use the devices",
            "docker run --device /dev/infiniband …   (Kubernetes: an RDMA device plugin)",
        )
    if has_gpus and not Path("/sys/module/nvidia_peermem").is_dir():
        yield Row(
            WARN,
            "GPUDirect",
            "module nvidia_peermem is not loaded; without it (or DMA-BUF) data between nodes goes "
            "through host memory",
            "modprobe nvidia_peermem   (on the host)",
        )


def processes() -> Iterator[Row]:
    """Limits on processes, of this user and of this container."""
    _, most = resource.getrlimit(resource.RLIMIT_NPROC)
    if most != resource.RLIM_INFINITY and most < _ENOUGH_PROCESSES:
        yield Row(WARN, "processes", f"at most {most}", f"ulimit -u {_ENOUGH_PROCESSES}")
    pids = Path("/sys/fs/cgroup/pids.max")
    with suppress(OSError, ValueError):
        limit = int(pids.read_text())
        if limit < _ENOUGH_PROCESSES:
            yield Row(
                WARN, "processes", f"this container: at most {limit}", "docker run --pids-limit -1"
            )


def clock() -> Iterator[Row]:
    """Whether the kernel's clock is disciplined (NTP or PTP); logs of nodes are read together."""
    buffer = ctypes.create_string_buffer(_TIMEX_BYTES)  # modes = 0: only asks
    libc = ctypes.CDLL(None, use_errno=True)
    state = libc.adjtimex(buffer)
    if state < 0:
        yield Row(OK, "clock", f"{time.strftime('%F %T %z')} (this kernel tells no more)")
        return
    status = int.from_bytes(buffer.raw[_STATUS_OFFSET : _STATUS_OFFSET + 4], "little")
    if status & _STA_UNSYNC:
        yield Row(
            WARN,
            "clock",
            "not synchronised: logs of several nodes cannot be compared",
            "systemctl enable --now chronyd   (or systemd-timesyncd), on the host",
        )
    else:
        yield Row(OK, "clock", "synchronised")


def disk() -> Iterator[Row]:
    """Free space where kernels are compiled to."""
    wanted = {
        "kernel cache": env.CACHE_DIR.get() or "~/.cache",
        "temporary files": os.environ.get("TMPDIR") or "/tmp",
    }
    for topic, name in wanted.items():
        path = Path(name).expanduser()
        place = next((p for p in (path, *path.parents) if p.is_dir()), Path("/"))
        free_gib = shutil.disk_usage(place).free / 2**30
        found = f"{free_gib:.1f} GiB free in {place}"
        if not os.access(place, os.W_OK):
            yield Row(FAIL, topic, f"{place} cannot be written", f"chown $USER {place}")
        elif free_gib < _ENOUGH_CACHE_GIB:
            yield Row(WARN, topic, found, f"du -xh --max-depth 2 {place} | sort -h | tail")
        else:
            yield Row(OK, topic, found)


def checkpoint(model: str) -> Iterator[Row]:
    """A checkpoint's folder on this node: config, method, all files of the index, their size."""
    folder = Path(model)
    topic = f"model {folder.name}"
    if not folder.is_dir():
        hub = not folder.is_absolute() and model.count("/") == 1 and not model.startswith(".")
        yield Row(
            WARN if hub else FAIL,
            topic,
            f"{model} is not a folder of this node" + (", a hub name?" if hub else ""),
            f"huggingface-cli download {model}" if hub else f"ls {folder.parent}",
        )
        return
    try:
        reason = launch_plan.quantization_reason(model)
    except W4AFp8Error as error:
        yield Row(FAIL, topic, error.found, error.ways[0])
        return
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    with suppress(OSError, ValueError, AttributeError):
        listed = set(json.loads((folder / _INDEX).read_text())["weight_map"].values())
        absent = sorted(listed - set(names))
        if absent:
            yield Row(
                FAIL,
                topic,
                f"{len(absent)} of {len(listed)} files of the index are missing: {absent[0]} …",
                f"rsync -a OTHER-NODE:{folder}/ {folder}/",
            )
            return
        names = sorted(listed)
    if not names:
        yield Row(FAIL, topic, f"no safetensors file in {folder}", f"ls {folder}")
        return
    total_gib = sum((folder / name).stat().st_size for name in names) / 2**30
    yield Row(OK, topic, f"{len(names)} files, {total_gib:.1f} GiB; {reason}")
