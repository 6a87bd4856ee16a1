"""The doctor's look at network, RDMA, disks, a checkpoint, and at other nodes over a fake ssh."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from sglang_w4afp8 import cli
from sglang_w4afp8.tools import doctor, doctor_cluster, doctor_machine, doctor_probes, network
from sglang_w4afp8.tools.doctor import FAIL, OK, WARN, Row

IPV4 = "0000:0000:0000:0000:0000:ffff:0a00:0005"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SGLANG_", "NCCL_", "GLOO_")):
            monkeypatch.delenv(name)


def rows_of(probe: doctor.Probe) -> dict[str, Row]:
    return {row.topic: row for row in doctor.run_probe(probe)}


# ------------------------------------------------------------------------------- this machine


def port_of(tmp_path: Path, name: str, state: str, gid: int) -> None:
    folder = tmp_path / name / "ports" / "1"
    for part in ("gids", "gid_attrs/types", "gid_attrs/ndevs"):
        (folder / part).mkdir(parents=True)
    (folder / "state").write_text(state)
    (folder / "rate").write_text("400 Gb/sec (4X NDR)")
    (folder / "link_layer").write_text("Ethernet")
    (folder / "gids" / str(gid)).write_text(IPV4)
    (folder / "gid_attrs/types" / str(gid)).write_text("RoCE v2")
    (folder / "gid_attrs/ndevs" / str(gid)).write_text("eth2")


def test_rdma(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "INFINIBAND", tmp_path)
    monkeypatch.setattr(doctor_machine, "VERBS", tmp_path)
    assert rows_of(doctor_machine.rdma)["RDMA"].status == OK, "no GPU: nothing is missing"
    monkeypatch.setattr(doctor_machine, "_gpus_and_driver", lambda: ("8 × H20", "570"))
    assert rows_of(doctor_machine.rdma)["RDMA"].status == WARN

    port_of(tmp_path, "mlx5_0", "4: ACTIVE", 3)
    port_of(tmp_path, "mlx5_1", "1: DOWN", 3)
    rows = rows_of(doctor_machine.rdma)
    assert (rows["mlx5_0"].status, rows["mlx5_1"].status) == (OK, WARN)
    assert "RoCE, 400 Gb/sec (4X NDR), RoCE v2 IPv4 GIDs {3: 'eth2'}" in rows["mlx5_0"].found
    assert "ibstat mlx5_1" in rows["mlx5_1"].cure
    assert rows["GID index"].status == OK
    assert doctor_machine.facts(None)["RoCE GID index"] == "3"

    for wrong in ("1", "three"):
        monkeypatch.setenv("NCCL_IB_GID_INDEX", wrong)
        assert rows_of(doctor_machine.rdma)["GID index"].cure == "export NCCL_IB_GID_INDEX=3"
    monkeypatch.delenv("NCCL_IB_GID_INDEX")
    monkeypatch.setattr(doctor_machine, "VERBS", tmp_path / "nowhere")
    assert rows_of(doctor_machine.rdma)["RDMA"].status == FAIL
    port_of(tmp_path, "mlx5_2", "4: ACTIVE", 5)
    assert rows_of(doctor_machine.rdma)["GID index"].status == WARN


def test_interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    known = [
        network.Interface("eth0", ("10.0.0.5",), True),
        network.Interface("lo", ("127.0.0.1",), True),
    ]
    monkeypatch.setattr(network, "interfaces", lambda: known)
    monkeypatch.setattr(network, "resolve", lambda host: "127.0.1.1")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth")
    rows = rows_of(doctor_machine.interfaces)
    assert rows["network"].found == "eth0 (10.0.0.5)"
    assert "NCCL_SOCKET_IFNAME" not in rows, "NCCL takes prefixes"
    assert rows["GLOO_SOCKET_IFNAME"].cure == "export GLOO_SOCKET_IFNAME=eth0"
    assert "--master 10.0.0.5" in rows["host name"].cure
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "=eth")
    assert rows_of(doctor_machine.interfaces)["NCCL_SOCKET_IFNAME"].status == FAIL
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "^docker0")
    assert "NCCL_SOCKET_IFNAME" not in rows_of(doctor_machine.interfaces)


def test_disks_and_clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (row,) = rows_of(doctor_machine.clock).values()
    assert row.topic == "clock" and row.found
    usage = doctor_machine.shutil.disk_usage("/")._replace(free=1 << 30)
    monkeypatch.setattr(doctor_machine.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setenv("SGLANG_W4AFP8_CACHE_DIR", str(tmp_path / "not" / "yet"))
    row = rows_of(doctor_machine.disk)["kernel cache"]
    assert (row.status, row.found) == (WARN, f"1.0 GiB free in {tmp_path}")


def test_a_checkpoint(tmp_path: Path) -> None:
    def row() -> Row:
        (found,) = doctor_machine.checkpoint(str(tmp_path / "m"))
        return found

    assert row().status == FAIL
    assert next(iter(doctor_machine.checkpoint("org/name"))).status == WARN
    (tmp_path / "m").mkdir()
    assert "config.json" in row().found
    config = {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    assert "sglang-w4afp8 convert" in row().cure
    config["quantization_config"]["quant_method"] = "w4afp8"
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    assert "no safetensors file" in row().found
    index = {"weight_map": {"a": "x-1.safetensors", "b": "x-2.safetensors"}}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "m" / "x-1.safetensors").write_bytes(bytes(100))
    assert "1 of 2 files of the index are missing: x-2.safetensors" in row().found
    (tmp_path / "m" / "x-2.safetensors").write_bytes(bytes(100))
    assert row().status == OK
    assert row().found.startswith("2 files")


# -------------------------------------------------------------------------------- other nodes

# ssh -o … -o … HOST COMMAND: what the host "HOST" does is in the folder beside.
SSH = """#!{python}
import json, os, pathlib, subprocess, sys, time
host, command = sys.argv[-2:]
assert sys.argv[1:5] == ["-o", "BatchMode=yes", "-o", "ConnectTimeout=15"], sys.argv
if host == "down":
    sys.exit("ssh: connect to host down port 22: No route to host" and 255)
if host == "bare":
    print("/usr/bin/python3: No module named sglang_w4afp8", file=sys.stderr)
    sys.exit(1)
pathlib.Path({folder!r}, host + ".command").write_text(command)
# As on a node without any package: the standard library has to do, and starts fast.
command = command.replace(" -m ", " -S -m ", 1)
done = subprocess.run(command, shell=True, capture_output=True, text=True)
told = json.loads(done.stdout)
change = json.loads(os.environ["CHANGE"]).get(host, {{}})
told["clock"] += change.pop("clock", 0)
told["rows"] += change.pop("rows", [])
told["facts"].update(change)
print("Welcome to", host)
print(json.dumps(told))
"""


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fake ssh on PATH, which runs the command here; returns a hosts file of four nodes."""
    program = tmp_path / "ssh"
    program.write_text(SSH.format(python=sys.executable, folder=str(tmp_path)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(doctor.__file__).parents[2]))
    monkeypatch.setattr(doctor_probes, "PROBES", (doctor_probes.python,))
    monkeypatch.setenv("CHANGE", "{}")
    return tmp_path / "hosts.txt"


def ask(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Row]:
    cli.main(["doctor", "--quick", "--json", *words])
    return {row["topic"]: Row(**row) for row in json.loads(capsys.readouterr().out)["rows"]}


def test_nodes_that_differ_are_told_with_the_cure(
    ssh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ssh.write_text("a  # node 0\nb\nc\ndown\nbare\n")
    broken = {"status": "FAIL", "topic": "GPU", "found": "nvidia-smi: gone", "cure": "reboot"}
    change = {
        "a": {"sglang": "0.5.16", "torch": "not installed"},
        "b": {"sglang": "0.5.99", "clock": 60, "Python": "3.9", "torch": "2.9.1"},
        "c": {
            "sglang": "0.5.16",
            "torch": "not installed",
            "NCCL": "cu12 2.27.3",
            "GPUs": "7 × NVIDIA L40S",
            "rows": [broken],
        },
    }
    monkeypatch.setenv("CHANGE", json.dumps(change))
    rows = ask(capsys, "--cluster", str(ssh), "/models/R1")
    assert rows["same sglang"].found == "0.5.16 on a, c; 0.5.99 on b"
    assert rows["same sglang"].cure == "on b: pip install sglang==0.5.16"
    assert rows["same GPUs"].status == FAIL
    assert rows["same GPUs"].cure.startswith("on c: ")
    assert rows["same torch"].cure == "on a, c: pip install torch==2.9.1"
    assert rows["same Python"].cure == (
        "on b: make the environment anew with the other nodes' Python"
    )
    assert rows["same NCCL"].cure.startswith("on c: pip install the same torch")
    assert rows["c: GPU"] == Row(FAIL, "c: GPU", "nvidia-smi: gone", "reboot")
    assert rows["b: clock"].status == WARN
    assert "+" in rows["b: clock"].found
    assert "a: clock" not in {t for t in rows if rows[t].found.endswith("this machine's")}
    assert rows["down"].status == FAIL
    assert "ssh down true" in rows["down"].cure
    assert rows["bare"].found.startswith("sglang-w4afp8 is not installed there")
    assert "transformers" in rows["same on 3 nodes"].found
    command = (ssh.parent / "a.command").read_text()
    assert command.endswith("-m sglang_w4afp8.cli doctor --json --quick /models/R1")


def test_equal_nodes_are_one_row(ssh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ssh.write_text("a\nb\n")
    rows = ask(capsys, "--cluster", str(ssh))
    assert not [topic for topic in rows if topic.startswith("same ") and rows[topic].status != OK]
    same = rows["same on 2 nodes"].found
    assert f"Python {sys.version_info.major}.{sys.version_info.minor}" in same
    assert "RoCE GID index" in same


def test_without_ssh(ssh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(ssh.parent / "empty"))
    answer = doctor_cluster.ask("a", ["python3"])
    assert answer.problem is not None
    assert "no ssh" in answer.problem.found
