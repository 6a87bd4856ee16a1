"""The place of a node, its command and its environment, from simulated schedulers and networks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_w4afp8 import cli
from sglang_w4afp8.errors import ConfigError, HostError
from sglang_w4afp8.tools import launch, launch_plan, network
from sglang_w4afp8.tools.launch_place import Place, expand_nodelist, find_place, read_hosts
from sglang_w4afp8.tools.launch_plan import NodeCommand, Wanted

# As srun sets them for the third of four nodes, inside an allocation of eight.
SLURM = {
    "SLURM_JOB_NODELIST": "gpu[01-08]",
    "SLURM_NNODES": "4",
    "SLURM_STEP_NODELIST": "gpu[01-03,07]",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_NODEID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_PROCID": "2",
}
LWS = {
    "LWS_WORKER_INDEX": "3",
    "LWS_GROUP_SIZE": "4",
    "LWS_LEADER_ADDRESS": "r1-0.r1.serving",
}
TORCHRUN = {
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "RANK": "1",
    "WORLD_SIZE": "2",
}


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        (
            SLURM,
            Place(2, 4, "gpu01", ("gpu01", "gpu02", "gpu03", "gpu07"), "Slurm's variables"),
        ),
        (
            # The batch script itself: no step, no task.
            {"SLURM_NODEID": "0", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "a,b"},
            Place(0, 2, "a", ("a", "b"), "Slurm's variables"),
        ),
        (
            LWS,
            Place(
                3,
                4,
                "r1-0.r1.serving",
                ("r1-0", "r1-0-1", "r1-0-2", "r1-0-3"),
                "LeaderWorkerSet's variables",
            ),
        ),
        (TORCHRUN, Place(1, 2, "10.0.0.1", (), "torchrun's variables")),
        (
            {"NODE_RANK": "1", "NNODES": "2", "MASTER_ADDR": "m"},
            Place(1, 2, "m", (), "NODE_RANK and NNODES"),
        ),
        ({}, Place(0, 1, None, (), "flags")),
    ],
)
def test_schedulers(environ: dict[str, str], place: Place) -> None:
    assert find_place(environ) == place


def test_flags_win_and_names_follow() -> None:
    assert find_place(SLURM, master="10.0.0.1").master == "10.0.0.1"
    assert find_place(SLURM, nnodes=3, node_rank=0).names == ()
    assert find_place({}, nnodes=4, master="m") == Place(None, 4, "m", (), "flags")
    assert find_place(LWS).label(2) == "node 2 (r1-0-2)"
    assert find_place(TORCHRUN).label(1) == "node 1"


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (SLURM | {"SLURM_LOCALID": "1"}, "SLURM_LOCALID=1: Slurm starts several"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE=8: torchrun starts several"),
        (LWS | {"LWS_GROUP_SIZE": ""}, "LWS_GROUP_SIZE=''"),
        (LWS | {"LWS_WORKER_INDEX": "4"}, "node rank 4 of 4 nodes"),
    ],
)
def test_contradictions(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match="(?s)" + message.replace("'", ".")):
        find_place(environ)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("a", ["a"]),
        ("a,b-1", ["a", "b-1"]),
        ("n[08-10]", ["n08", "n09", "n10"]),
        ("r[1-2]n[1,3].x,y", ["r1n1.x", "r1n3.x", "r2n1.x", "r2n3.x", "y"]),
        ("", []),
    ],
)
def test_nodelists(text: str, hosts: list[str]) -> None:
    assert expand_nodelist(text) == hosts


def test_hosts_files(tmp_path: Path) -> None:
    file = tmp_path / "hosts.txt"
    file.write_text("# cluster\n192.0.2.250  slots=8\n127.0.0.1 # here\n\n")
    assert read_hosts(file) == ["192.0.2.250", "127.0.0.1"]
    place = find_place({}, hosts=file)
    assert (place.rank, place.nnodes, place.master) == (1, 2, "192.0.2.250")
    file.write_text("a\na\n")
    with pytest.raises(ConfigError, match="a is listed twice"):
        read_hosts(file)


def checkpoint(folder: Path, method: str | None) -> Path:
    folder.mkdir()
    config = {} if method is None else {"quantization_config": {"quant_method": method}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_command(tmp_path: Path) -> None:
    model = str(checkpoint(tmp_path / "R1-W4AFP8", "w4afp8"))
    wanted = Wanted(
        model, tp=32, ep=8, nnodes=4, master="10.0.0.1", passed_on=("--log-level", "info")
    )
    node = NodeCommand(3, "python3", launch_plan.node_flags(wanted, 3))
    assert node.command == [
        *("python3", "-m", "sglang.launch_server", "--model-path", model),
        *("--quantization", "w4afp8", "--tp-size", "32", "--ep-size", "8", "--nnodes", "4"),
        *("--node-rank", "3", "--dist-init-addr", "10.0.0.1:5000", "--host", "0.0.0.0"),
        *("--port", "30000", "--log-level", "info"),
    ]
    assert all(flag.why for flag in node.flags)
    assert launch_plan.join_port("fd00::1", 5000) == "[fd00::1]:5000"
    one = NodeCommand(0, "python3", launch_plan.node_flags(Wanted(model, tp=8), 0))
    assert not {"--nnodes", "--node-rank", "--dist-init-addr"} & set(one.command)


def test_what_nodes_compare_leaves_out_what_is_a_nodes_own() -> None:
    def told(port: int, host: str, master: str, *more: str) -> dict[str, str]:
        wanted = Wanted("m", 32, nnodes=4, master=master, host=host, port=port, passed_on=more)
        return launch._must_be_the_same(wanted)

    # Ports that are part of other arguments too.
    assert told(32, "a", "a") == told(5000, "b", "10.0.0.1") == told(30000, "0.0.0.0", "b")
    assert told(32, "a", "a") != told(32, "a", "a", "--dtype", "float16")


def test_what_is_printed_runs_as_it_stands(tmp_path: Path) -> None:
    """The shell gives the server exactly the words that --run would."""
    flags = launch_plan.node_flags(Wanted("org/a b", tp=8, passed_on=("--x", "$HOME 'q'")), 0)
    setting = launch_plan.Setting("NCCL_SOCKET_IFNAME", "=eth0", "why")
    told = (
        "import os, sys, json; print(json.dumps([sys.argv[1:], os.environ['NCCL_SOCKET_IFNAME']]))"
    )
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{told}" "$@"\n')
    fake.chmod(0o755)
    node = NodeCommand(0, str(fake), flags, (setting,))
    done = subprocess.run(
        ["bash", "-euc", node.shell()], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [node.command[1:], "=eth0"]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Wanted("m", tp=32, nnodes=3, master="a"), "--tp 32 over 3 nodes"),
        (Wanted("m", tp=32, ep=5), "--ep 5 with --tp 32"),
        (Wanted("m", tp=32, nnodes=2), "2 nodes without --master"),
        (Wanted("m", tp=8, passed_on=("--tp-size=4",)), "--tp-size=4 after --"),
        (Wanted("m", tp=8, passed_on=("--dist-init-addr", "x")), "--dist-init-addr after --"),
    ],
)
def test_what_cannot_work(wanted: Wanted, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        wanted.check()


def test_other_checkpoints_are_refused_with_the_way_out(tmp_path: Path) -> None:
    for name, method in (("fp8", "fp8"), ("plain", None)):
        model = str(checkpoint(tmp_path / name, method))
        with pytest.raises(ConfigError) as caught:
            launch_plan.node_flags(Wanted(model, tp=8), 0)
        assert f"sglang-w4afp8 convert {model}" in caught.value.ways[0]
        flags = launch_plan.node_flags(Wanted(model, tp=8, passed_on=("--quantization", "fp8")), 0)
        assert ("--quantization", "w4afp8") not in [flag.words for flag in flags]
    (tmp_path / "plain" / "hf_quant_config.json").write_text("{}")
    assert "hf_quant_config.json" in launch_plan.quantization_reason(str(tmp_path / "plain"))


def rdma(tmp_path: Path, name: str, layer: str, gids: dict[int, tuple[str, str]]) -> None:
    """A device as the kernel shows it; index → (type, GID)."""
    port = tmp_path / name / "ports" / "1"
    for folder in ("gids", "gid_attrs/types", "gid_attrs/ndevs"):
        (port / folder).mkdir(parents=True)
    (port / "state").write_text("4: ACTIVE\n")
    (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    (port / "link_layer").write_text(layer + "\n")
    for index, (kind, gid) in gids.items():
        (port / "gids" / str(index)).write_text(gid + "\n")
        (port / "gid_attrs/types" / str(index)).write_text(kind + "\n")
        (port / "gid_attrs/ndevs" / str(index)).write_text("eth2\n")


LOCAL = "fe80:0000:0000:0000:0e42:a1ff:fe5b:8b2c"
IPV4 = "0000:0000:0000:0000:0000:ffff:0a00:0005"
COMMON = {0: ("IB/RoCE v1", LOCAL), 1: ("RoCE v2", LOCAL), 2: ("IB/RoCE v1", IPV4)}


def test_the_gid_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "INFINIBAND", tmp_path)
    assert network.gid_index(network.rdma_ports())[0] is None
    rdma(tmp_path, "mlx5_0", "InfiniBand", {0: ("IB/RoCE v1", LOCAL)})
    assert network.gid_index(network.rdma_ports())[0] is None, "InfiniBand proper needs none"
    rdma(tmp_path, "mlx5_1", "Ethernet", {**COMMON, 3: ("RoCE v2", IPV4)})
    ports = network.rdma_ports()
    assert ports[1] == network.RdmaPort(
        "mlx5_1", 1, "ACTIVE", "Ethernet", "400 Gb/sec (4X NDR)", {3: "eth2"}
    )
    assert network.gid_index(ports)[0] == 3
    rdma(tmp_path, "mlx5_2", "Ethernet", {**COMMON, 4: ("RoCE v2", IPV4)})
    index, why = network.gid_index(network.rdma_ports())
    assert index is None
    assert "mlx5_1: [3]; mlx5_2: [4]" in why


def test_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "INFINIBAND", tmp_path)
    rdma(tmp_path, "mlx5_1", "Ethernet", {**COMMON, 3: ("RoCE v2", IPV4)})
    ports = network.rdma_ports()
    eth = network.Interface("eth2", ("10.0.0.5",), True)
    environ = {"GLOO_SOCKET_IFNAME": "bond0"}
    found = launch_plan.node_settings(eth, "10.0.0.5", ports, environ, nnodes=4)
    assert {s.name: s.value for s in found} == {
        "SGLANG_W4AFP8_STRICT": "1",
        "GLOO_SOCKET_IFNAME": "bond0",
        "NCCL_SOCKET_IFNAME": "=eth2",
        "SGLANG_HOST_IP": "10.0.0.5",
        "NCCL_IB_GID_INDEX": "3",
    }
    (alone,) = launch_plan.node_settings(eth, "10.0.0.5", ports, {}, nnodes=1)
    assert alone.name == "SGLANG_W4AFP8_STRICT"


def test_this_machine_has_a_loopback() -> None:
    (lo,) = [interface for interface in network.interfaces() if interface.is_loopback]
    assert "127.0.0.1" in lo.addresses
    assert network.interface_of("127.0.0.9") == lo
    assert network.interface_of("192.0.2.250") is None
    assert network.is_local("127.0.0.1")
    assert not network.is_local("192.0.2.250")
    assert network.address_towards("127.0.0.1") == "127.0.0.1"
    with pytest.raises(HostError, match="'eth77' is no interface"):
        network.interface_named("eth77")


def test_printing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(checkpoint(tmp_path / "m", "w4afp8"))
    words = ["launch", model, "--tp", "4", "--nnodes", "2", "--master", "127.0.0.1"]
    assert cli.main([*words, "--", "--log-level", "warning"]) == 0
    text = capsys.readouterr().out
    assert text.count("-m sglang.launch_server") == 2, "every node's, as no rank is known"
    assert text.count("--log-level warning") == 3  # the reason, and two commands
    assert cli.main([*words, "--node-rank", "1", "--json", "--run", "--dry-run"]) == 0
    (node,) = json.loads(capsys.readouterr().out)["nodes"]
    assert node["rank"] == 1
    assert node["environment"]["GLOO_SOCKET_IFNAME"] == "lo"
    assert set(node["reasons"]) >= {"--tp-size", "--dist-init-addr", "GLOO_SOCKET_IFNAME"}
    assert cli.main(["launch", model, "--tp", "8"]) == 0
    assert "--nnodes" not in capsys.readouterr().out
    assert cli.main([*words, "--run"]) == 2
    assert "nothing says which this one is" in capsys.readouterr().err
