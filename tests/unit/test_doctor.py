"""The doctor finds what is wrong, names a cure, and survives environments that are broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_w4afp8 import cli
from sglang_w4afp8.tools import doctor, doctor_probes
from sglang_w4afp8.tools.doctor import FAIL, OK, WARN, Row


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SGLANG_", "NCCL_", "GLOO_")):
            monkeypatch.delenv(name)


def rows_of(probe: doctor.Probe) -> list[Row]:
    return doctor.run_probe(probe)


def test_a_probe_that_raises_is_a_row() -> None:
    def broken_probe() -> Iterator[Row]:
        yield Row(OK, "first", "fine")
        raise RuntimeError("libcuda.so is a directory")

    (row,) = rows_of(broken_probe)
    assert row.status == FAIL
    assert row.topic == "broken probe"
    assert "libcuda.so is a directory" in row.found


@pytest.mark.parametrize(
    ("variables", "cure"),
    [
        ({"SGLANG_PLUGINS": "mine, yours"}, "export SGLANG_PLUGINS=mine,yours,w4afp8"),
        ({"SGLANG_PLATFORM": "ascend"}, "python -m sglang_w4afp8.run"),
    ],
)
def test_filters_that_leave_us_out(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], cure: str
) -> None:
    assert [row.status for row in rows_of(doctor_probes.entry_point)] == [OK]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (row,) = rows_of(doctor_probes.entry_point)
    assert row.status == FAIL
    assert cure in row.cure


@pytest.mark.parametrize("variables", [{"SGLANG_PLUGINS": "w4afp8"}, {"SGLANG_PLUGINS": " , "}])
def test_filters_that_keep_us(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert [row.status for row in rows_of(doctor_probes.entry_point)] == [OK]


def test_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_W4AFP8_STRIKT", "1")
    monkeypatch.setenv("SGLANG_W4AFP8_ACTIVATION", "per_token")
    monkeypatch.setenv("SGLANG_W4AFP8_MOE_BACKEND", "torch")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")
    rows = {row.topic: row for row in rows_of(doctor_probes.variables)}
    assert rows["SGLANG_W4AFP8_STRIKT"].status == WARN
    assert rows["SGLANG_W4AFP8_STRIKT"].cure == "export SGLANG_W4AFP8_STRICT=1"
    assert rows["SGLANG_W4AFP8_ACTIVATION"].status == FAIL
    assert "dynamic_per_token" in rows["SGLANG_W4AFP8_ACTIVATION"].found
    assert (rows["SGLANG_W4AFP8_MOE_BACKEND"].status, rows["NCCL_SOCKET_IFNAME"].found) == (
        OK,
        "eth7",
    )
    assert rows["SGLANG_W4AFP8_STRICT"].status == WARN


def test_small_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = doctor_probes.shutil.disk_usage("/")._replace(total=64 << 20, free=60 << 20)
    monkeypatch.setattr(doctor_probes.shutil, "disk_usage", lambda path: usage)
    (row,) = rows_of(doctor_probes.shared_memory)
    assert row.status == WARN
    assert "0.1 GiB" in row.found
    assert "--shm-size" in row.cure


def test_a_broken_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'Failed to initialize NVML: Driver mismatch'\nexit 18\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (row,) = rows_of(doctor_probes.gpus)
    assert row.status == FAIL
    assert "Driver mismatch" in row.found


def test_gpus_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    line = "NVIDIA H20, 97871 MiB, 9.0, 570.86"
    program.write_text(f"#!/bin/sh\necho '{line}'\necho '{line}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    listed, unseen = rows_of(doctor_probes.gpus)
    assert (listed.status, listed.found) == (OK, f"2 × {line}")
    assert (unseen.status, unseen.found) == (FAIL, "torch sees 0 of 2")


def test_kernels_row_is_what_the_registry_says() -> None:
    rows = rows_of(doctor_probes.kernels)
    assert len(rows) >= 2
    assert all(row.status == OK and row.found.strip() for row in rows)


def test_tuning_tables_of_hopper_cards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from sglang_w4afp8.kernels.hopper import tables

    assert rows_of(doctor_probes.tuning) == []
    names = ["NVIDIA H100 80GB HBM3", "NVIDIA L40S", "NVIDIA H100 80GB HBM3", "NVIDIA H20"]
    monkeypatch.setenv("SGLANG_W4AFP8_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(names))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: names[device.index])
    ada = {"NVIDIA L40S": (8, 9)}
    monkeypatch.setattr(
        "torch.cuda.get_device_capability", lambda device: ada.get(names[device.index], (9, 0))
    )
    h100, h20 = rows_of(doctor_probes.tuning)
    assert h100.status == h20.status == OK
    assert str(tables.committed_path(names[0])) in h100.found and "yours" not in h100.found
    assert "no table for NVIDIA H20: built-in limits" in h20.found
    path = tables.user_path(names[0])
    path.parent.mkdir()
    path.write_text("{}")
    broken, h100, _ = rows_of(doctor_probes.tuning)
    assert (broken.status, h100.status) == (WARN, OK)
    assert str(path) in broken.found and "bench tune" in broken.cure


def test_json_and_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> Iterator[Row]:
        yield Row(FAIL, "thing", "broken", "mend it")

    monkeypatch.setattr(doctor_probes, "PROBES", (doctor_probes.python, fails))
    assert cli.main(["doctor", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is False
    assert told["rows"][1] == {
        "status": "FAIL",
        "topic": "thing",
        "found": "broken",
        "cure": "mend it",
    }
    monkeypatch.setattr(doctor_probes, "PROBES", (doctor_probes.python,))
    assert cli.main(["doctor"]) == 0
    assert "[ok  ] Python: 3." in capsys.readouterr().out


def test_everything_but_the_standard_library_may_be_missing() -> None:
    """No third-party package can be imported: rows and an exit code, no traceback."""
    root = Path(doctor.__file__).parents[2]
    code = f"import sys; sys.path.insert(0, {str(root)!r}); from sglang_w4afp8 import cli; "
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code + "sys.exit(cli.main(['doctor', '--quick']))"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == ""
    failures = [line for line in done.stdout.splitlines() if line.startswith("[FAIL]")]
    assert {line.split()[1].rstrip(":") for line in failures} >= {"torch", "sglang", "kernels"}
    assert "not ready" in done.stdout
