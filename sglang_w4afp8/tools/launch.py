"""``sglang-w4afp8 launch``: one server over one or many machines, with a reason for every flag.

Prints the command and environment of this node; ``--run`` carries it out: finds the other nodes,
compares what they are about to start, starts the server, and ends it when another node is gone.
Owns the options and the order of things; the work is in ``launch_place`` (who am I),
``launch_plan`` (what to run), ``rendezvous`` (the other nodes) and ``launch_run`` (the process).
Standard library only, so a wrong flag or interface shows within a second.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from sglang_w4afp8 import __version__
from sglang_w4afp8.errors import ConfigError, HostError
from sglang_w4afp8.tools import launch_plan, launch_run, network
from sglang_w4afp8.tools.console import print_json
from sglang_w4afp8.tools.launch_link import Hello, News
from sglang_w4afp8.tools.launch_place import Place, find_place
from sglang_w4afp8.tools.launch_plan import NodeCommand, Wanted
from sglang_w4afp8.tools.rendezvous import Leader, Member, Say
from sglang_w4afp8.tools.versions import version_of

PASSES_ON = True
"""``cli`` splits the arguments at ``--`` and puts what follows into ``args.passed_on``."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``launch``."""
    parser.add_argument("model", metavar="MODEL", help="W4AFP8 checkpoint, same path on every node")
    parser.add_argument("--tp", type=int, required=True, help="tensor-parallel ranks in all")
    parser.add_argument("--ep", type=int, help="expert-parallel degree (default: SGLang's)")
    many = parser.add_argument_group("several nodes", "what a scheduler's variables say is known")
    many.add_argument("--nnodes", type=int, help="number of machines")
    many.add_argument("--node-rank", type=int, help="this machine, from 0")
    many.add_argument("--master", metavar="IP", help="name or address of node 0")
    many.add_argument("--hosts", type=Path, metavar="FILE", help="all nodes, a line each, 0 first")
    many.add_argument("--iface", metavar="NAME", help="interface between nodes (default: by route)")
    many.add_argument("--dist-port", type=int, default=5000, help="torch's port on node 0 (5000)")
    many.add_argument("--wait", type=float, default=600, metavar="S", help="for other nodes (600)")
    many.add_argument(
        "--peer-timeout",
        type=float,
        default=30,
        metavar="S",
        help="a node that is silent for so long is gone (30)",
    )
    parser.add_argument("--host", default="0.0.0.0", help="HTTP address (0.0.0.0)")
    parser.add_argument("--port", type=int, default=30000, help="HTTP port (30000)")
    parser.add_argument("--run", action="store_true", help="start this node's server")
    parser.add_argument("--dry-run", action="store_true", help="print only, even with --run")
    parser.add_argument("--json", action="store_true", help="print as JSON (with --dry-run)")
    parser.epilog = "What follows -- goes to sglang.launch_server as it is."


def run(args: argparse.Namespace) -> int:
    """Print, or run this node; its exit code."""
    place = find_place(
        os.environ,
        node_rank=args.node_rank,
        nnodes=args.nnodes,
        master=args.master,
        hosts=args.hosts,
    )
    wanted = Wanted(
        model=args.model,
        tp=args.tp,
        ep=args.ep,
        nnodes=place.nnodes,
        master=place.master,
        dist_port=args.dist_port,
        host=args.host,
        port=args.port,
        passed_on=tuple(args.passed_on),
    )
    wanted.check()
    if args.run and not args.dry_run:
        return _run_node(wanted, place, args)
    _show(wanted, place, args)
    return 0


# -------------------------------------------------------------------------------------- printing


def _show(wanted: Wanted, place: Place, args: argparse.Namespace) -> None:
    """This node's command; every node's where this node's rank is not known."""
    address = None
    if place.rank is not None and place.nnodes > 1:
        with suppress(OSError, HostError):  # printing is allowed where running is not
            address = _own_address(args.iface, place)
    ranks = range(place.nnodes) if place.rank is None else (place.rank,)
    nodes = [_node(wanted, rank, address, args.iface) for rank in ranks]
    if args.json:
        print_json({"nodes": [_as_json(node) for node in nodes]})
        return
    for node in nodes:
        print(f"# {place.label(node.rank)} of {place.nnodes}, from {place.source}")
        print(node.shell(reasons=node is nodes[0]) + "\n")
    if place.nnodes > 1 and address is None:
        print("# --run also sets SGLANG_HOST_IP, and without --iface the interface, on each node.")
    print("# With --run this command starts the server itself and watches the other nodes.")


def _as_json(node: NodeCommand) -> dict[str, Any]:
    return {
        "rank": node.rank,
        "command": node.command,
        "environment": node.environment,
        "reasons": {
            **{flag.words[0]: flag.why for flag in node.flags},
            **{setting.name: setting.why for setting in node.settings},
        },
    }


def _node(wanted: Wanted, rank: int, address: str | None, iface: str | None) -> NodeCommand:
    interface = network.interface_of(address) if address else None
    if interface is None and iface:
        interface = network.Interface(iface, (), True)
    settings = launch_plan.node_settings(
        interface, address, network.rdma_ports(), os.environ, nnodes=wanted.nnodes
    )
    return NodeCommand(rank, sys.executable, launch_plan.node_flags(wanted, rank), settings)


# --------------------------------------------------------------------------------------- running


def _run_node(wanted: Wanted, place: Place, args: argparse.Namespace) -> int:
    if place.rank is None:
        raise ConfigError(
            f"{place.nnodes} nodes, and nothing says which this one is",
            "every node needs its own rank",
            ["--node-rank R", "--hosts FILE with this machine in it", "srun, torchrun or LWS"],
        )
    me = f"node {place.rank}"

    def say(line: str) -> None:
        print(f"[launch {time.strftime('%H:%M:%S')} {me}/{place.nnodes}] {line}", flush=True)

    with launch_run.catching() as signals:
        try:
            if args.iface:
                network.interface_named(args.iface)
            _check_node(wanted)
            if place.nnodes == 1:
                node = _node(wanted, 0, None, None)
                return _serve(node, launch_run.Alone(), signals, me, say)
            return _run_with_others(wanted, place, args, signals, say)
        except launch_run.Stopped as stop:
            say(f"stopped by signal {stop.signum} before the server ran")
            return 128 + stop.signum


def _run_with_others(
    wanted: Wanted,
    place: Place,
    args: argparse.Namespace,
    signals: launch_run.Signals,
    say: Say,
) -> int:
    assert place.rank is not None and place.master is not None
    # One below torch's port; the ports above it are SGLang's with DP attention.
    control_port = wanted.dist_port - 1
    same = _must_be_the_same(wanted)

    def hello(address: str) -> Hello:
        own = address if args.iface is None else _own_address(args.iface, place)
        return Hello(place.rank or 0, socket.gethostname(), own, os.getpid(), same)

    peers: Leader | Member
    if place.rank == 0:
        own = hello(_own_address(args.iface, place))
        _check_ports(wanted)
        peers = Leader(own, place, control_port, say, args.peer_timeout)
    else:
        peers = Member(hello, place.master, control_port, say, args.peer_timeout)
    with closing(peers):
        try:
            if isinstance(peers, Leader):
                everyone = peers.gather(args.wait)
                say("all nodes are here: " + ", ".join(str(node) for node in everyone))
            else:
                own = peers.gather(args.wait)
                say("all nodes are here")
        except launch_run.Stopped as stop:
            what = f"{place.label(place.rank)} was stopped by signal {stop.signum}"
            peers.tell(News("gone", what))
            raise
        node = _node(wanted, place.rank, own.address, args.iface)
        return _serve(node, peers, signals, str(own), say)


def _serve(
    node: NodeCommand,
    peers: launch_run.Peers,
    signals: launch_run.Signals,
    me: str,
    say: Say,
) -> int:
    say("starting the server:")
    print(node.shell(), flush=True)
    return launch_run.serve(node.command, node.environment, peers, signals, me, say)


def _own_address(iface: str | None, place: Place) -> str:
    """This node's address towards the others.

    Raises:
        HostError: the interface is not there; or this is node 0 and --master is another machine.
        OSError: the master's name does not resolve, or no route leads there.
    """
    if iface:
        return network.interface_named(iface).addresses[0]
    assert place.master is not None
    address = network.resolve(place.master)
    if place.rank == 0 and not network.is_local(address):
        own = ", ".join(str(i) for i in network.interfaces() if i.addresses and not i.is_loopback)
        raise HostError(
            f"--master {place.master} is {address}, and this is node 0 with {own}",
            "the other nodes would look for node 0 on another machine",
            ["--master with one of this node's addresses", "--node-rank R   if this is not node 0"],
        )
    return address if place.rank == 0 else network.address_towards(address)


def _must_be_the_same(wanted: Wanted) -> dict[str, str]:
    """What nodes compare before they start, by the name that a message uses."""
    # Every node may listen on an address of its own and reach node 0 by another name.
    common = replace(wanted, host="", port=0, master="")
    arguments = "\0".join(word for f in launch_plan.node_flags(common, 0) for word in f.words)
    return {
        "sglang-w4afp8": __version__,
        "sglang": version_of("sglang"),
        "--nnodes": str(wanted.nnodes),
        "--tp": str(wanted.tp),
        "MODEL's config.json": launch_plan.fingerprint(wanted.model) or "not a folder here",
        "arguments": hashlib.sha256(arguments.encode()).hexdigest()[:12],
    }


def _check_node(wanted: Wanted) -> None:
    """Refuse a node with fewer GPUs than ranks, or without the checkpoint.

    Where there is no nvidia-smi, SGLang decides about GPUs.

    Raises:
        HostError: too few GPUs, or the model's path leads nowhere.
    """
    a_node = wanted.tp // wanted.nnodes
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    program = shutil.which("nvidia-smi")
    if program and "SGLANG_PLATFORM" not in os.environ:
        done = subprocess.run([program, "-L"], capture_output=True, text=True, check=False)
        count = len([line for line in done.stdout.splitlines() if line.startswith("GPU ")])
        if visible is not None:
            count = min(count, len([name for name in visible.split(",") if name.strip()]))
        if done.returncode == 0 and count < a_node:
            ways = ["sglang-w4afp8 doctor   tells why some are not seen"]
            if visible is not None:
                ways.insert(0, "unset CUDA_VISIBLE_DEVICES")
            if count:  # the fewest nodes that hold all ranks, the same number each
                ranks = next(n for n in range(count, 0, -1) if wanted.tp % n == 0)
                ways = [f"--nnodes {wanted.tp // ranks}", f"--tp {count * wanted.nnodes}", *ways]
            raise HostError(
                f"{count} GPUs on this node, --tp {wanted.tp} over {wanted.nnodes} nodes",
                f"each of the {a_node} ranks of a node needs a GPU",
                ways,
            )
    if os.path.isabs(wanted.model) and not os.path.isdir(wanted.model):
        raise HostError(
            f"{wanted.model} is not on {socket.gethostname()}",
            "every node reads the checkpoint from this path",
            ["copy or mount it there on every node"],
        )


def _check_ports(wanted: Wanted) -> None:
    """Refuse ports that something listens on already.

    Raises:
        HostError: names the port.
    """
    for port, flag in ((wanted.dist_port, "--dist-port"), (wanted.port, "--port")):
        host = wanted.host if port == wanted.port else ""
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                raise HostError(
                    f"port {port} of this node: {error.strerror}",
                    "the server needs it",
                    [f"{flag} with another port", f"ss -ltnp 'sport = :{port}'   shows who has it"],
                ) from error
