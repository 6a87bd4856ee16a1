"""Which node of how many this is: from flags, a hosts file, LWS, Slurm, torchrun or NODE_RANK.

A source either knows this node's rank or is not there; the first one that is there answers, and
flags override single answers. Standard library only. Variables as documented by each system:

* LeaderWorkerSet: ``LWS_WORKER_INDEX``, ``LWS_GROUP_SIZE``, ``LWS_LEADER_ADDRESS``.
* Slurm, in a job step with one task a node: ``SLURM_NODEID``, ``SLURM_STEP_NUM_NODES`` (or
  ``SLURM_NNODES``), ``SLURM_STEP_NODELIST`` (or ``SLURM_JOB_NODELIST``).
* torchrun, with one process a node: ``GROUP_RANK``, ``GROUP_WORLD_SIZE``, ``MASTER_ADDR``.
* anything else: ``NODE_RANK``, ``NNODES``, ``MASTER_ADDR``.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from sglang_w4afp8.errors import ConfigError
from sglang_w4afp8.tools import network


@dataclass(frozen=True)
class Place:
    """This node's place in the cluster.

    Attributes:
        rank: node rank from 0; None where nothing says it (then no server can be started).
        nnodes: number of nodes.
        master: name or address of node 0; None where nothing says it.
        names: every node's name by rank; empty where unknown.
        source: who said so, for the log.
    """

    rank: int | None
    nnodes: int
    master: str | None
    names: tuple[str, ...] = ()
    source: str = "flags"

    def label(self, rank: int) -> str:
        """``node 2 (host-c)``, or without the name where it is unknown."""
        name = f" ({self.names[rank]})" if rank < len(self.names) else ""
        return f"node {rank}{name}"


def find_place(
    environ: Mapping[str, str],
    *,
    node_rank: int | None = None,
    nnodes: int | None = None,
    master: str | None = None,
    hosts: Path | None = None,
) -> Place:
    """Combine flags with what the environment says; a flag that is given wins.

    Raises:
        ConfigError: numbers contradict each other, or a scheduler starts several launches a node.
    """
    place = Place(None, 1, None, source="flags")
    sources: list[Callable[[Mapping[str, str]], Place | None]] = [_lws, _slurm, _torchrun, _plain]
    if hosts is not None:
        place = _hosts_file(hosts)
    elif node_rank is None or nnodes is None:
        place = next((found for source in sources if (found := source(environ))), place)
    names = place.names if nnodes in (None, place.nnodes) else ()
    place = replace(
        place,
        rank=place.rank if node_rank is None else node_rank,
        nnodes=place.nnodes if nnodes is None else nnodes,
        master=place.master if master is None else master,
        names=names,
    )
    if place.nnodes == 1 and place.rank is None:
        place = replace(place, rank=0)
    if place.nnodes < 1 or (place.rank is not None and not 0 <= place.rank < place.nnodes):
        raise ConfigError(
            f"node rank {place.rank} of {place.nnodes} nodes (from {place.source})",
            f"ranks go from 0 to {place.nnodes - 1}",
            ["--nnodes N --node-rank R, with the same N on every node"],
        )
    return place


def read_hosts(path: Path) -> list[str]:
    """Host names of a file: one a line, first word counts, ``#`` starts a comment.

    Raises:
        ConfigError: no host in it, or one twice.
        OSError: it cannot be read.
    """
    lines = [line.partition("#")[0].split() for line in path.read_text().splitlines()]
    hosts = [words[0] for words in lines if words]
    twice = sorted({host for host in hosts if hosts.count(host) > 1})
    if not hosts or twice:
        raise ConfigError(
            f"{path}: {f'{twice[0]} is listed twice' if twice else 'no host in it'}",
            "it must list every node once, node 0 first",
            [f"printf '%s\\n' host-a host-b > {path}"],
        )
    return hosts


def expand_nodelist(text: str) -> list[str]:
    """Slurm's compressed host list: ``n[01-03,7],x`` → n01, n02, n03, n7, x."""
    hosts: list[str] = []
    # Commas outside brackets separate; a name may have several brackets.
    for item in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        hosts += _expand(item.strip())
    return hosts


def _expand(item: str) -> list[str]:
    match = re.match(r"([^\[]*)\[([^\]]*)\](.*)", item)
    if match is None:
        return [item] if item else []
    head, ranges, tail = match.groups()
    found = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        for number in range(int(first), int(last or first) + 1):
            start = f"{head}{number:0{len(first)}d}"
            found += [start + rest for rest in _expand(tail) or [""]]
    return found


def _hosts_file(path: Path) -> Place:
    hosts = read_hosts(path)
    own = {socket.gethostname(), socket.gethostname().partition(".")[0]}
    ranks = [rank for rank, host in enumerate(hosts) if host in own or _is_this_machine(host)]
    return Place(
        rank=ranks[0] if len(ranks) == 1 else None,
        nnodes=len(hosts),
        master=hosts[0],
        names=tuple(hosts),
        source=str(path),
    )


def _is_this_machine(host: str) -> bool:
    with suppress(OSError):
        return network.is_local(network.resolve(host))
    return False


def _lws(environ: Mapping[str, str]) -> Place | None:
    if "LWS_WORKER_INDEX" not in environ:
        return None
    leader, size = environ.get("LWS_LEADER_ADDRESS"), _number(environ, "LWS_GROUP_SIZE")
    # Pod names: the leader is SET-GROUP, its workers SET-GROUP-INDEX.
    pod = (leader or "").partition(".")[0]
    names = (pod, *(f"{pod}-{i}" for i in range(1, size))) if pod else ()
    rank = _number(environ, "LWS_WORKER_INDEX")
    return Place(rank, size, leader, names, "LeaderWorkerSet's variables")


def _slurm(environ: Mapping[str, str]) -> Place | None:
    if "SLURM_NODEID" not in environ:
        return None
    if environ.get("SLURM_LOCALID", "0") != "0":
        raise _several_a_node("Slurm", "SLURM_LOCALID", environ, "srun --ntasks-per-node=1 …")
    step = "SLURM_STEP_NUM_NODES" in environ
    listed = environ.get("SLURM_STEP_NODELIST" if step else "SLURM_JOB_NODELIST", "")
    names = tuple(expand_nodelist(listed))
    size = _number(environ, "SLURM_STEP_NUM_NODES" if step else "SLURM_NNODES")
    names = names if len(names) == size else ()
    return Place(
        rank=_number(environ, "SLURM_NODEID"),
        nnodes=size,
        master=names[0] if names else None,
        names=names,
        source="Slurm's variables",
    )


def _torchrun(environ: Mapping[str, str]) -> Place | None:
    if "GROUP_RANK" not in environ or "GROUP_WORLD_SIZE" not in environ:
        return None
    if environ.get("LOCAL_WORLD_SIZE", "1") != "1":
        raise _several_a_node(
            "torchrun", "LOCAL_WORLD_SIZE", environ, "torchrun --nproc-per-node 1 …"
        )
    rank, size = _number(environ, "GROUP_RANK"), _number(environ, "GROUP_WORLD_SIZE")
    return Place(rank, size, environ.get("MASTER_ADDR"), source="torchrun's variables")


def _plain(environ: Mapping[str, str]) -> Place | None:
    if "NODE_RANK" not in environ or "NNODES" not in environ:
        return None
    rank, size = _number(environ, "NODE_RANK"), _number(environ, "NNODES")
    return Place(rank, size, environ.get("MASTER_ADDR"), source="NODE_RANK and NNODES")


def _number(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name, "")
    if not value.isdigit():
        raise ConfigError(
            f"{name}={value!r}",
            "it has to be a whole number for this node's place to be known",
            ["--nnodes N --node-rank R --master IP   override every variable"],
        )
    return int(value)


def _several_a_node(system: str, name: str, environ: Mapping[str, str], cure: str) -> ConfigError:
    return ConfigError(
        f"{name}={environ[name]}: {system} starts several launches on one node",
        "one launch a node starts all of that node's ranks itself",
        [cure],
    )
