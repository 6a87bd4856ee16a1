"""What goes wrong during a long conversion: kills, full disks, damaged or wrong files."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_w4afp8.checkpoint import stream
from sglang_w4afp8.errors import CheckpointError, ConfigError, HostError
from sglang_w4afp8.testing.checkpoints import MoeShape, bytes_of_files, write_bf16, write_fp8
from sglang_w4afp8.tools import rewrite
from sglang_w4afp8.tools.convert import convert_checkpoint

KILLS = 24


@pytest.fixture
def source(tmp_path):
    return write_fp8(tmp_path / "src", shards=4, scales_apart=True)


@pytest.fixture(scope="module")
def server():
    """Processes that have torch already, so that a kill hits the work and not the import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sglang_w4afp8.tools.convert"])
    return context


def test_kill_nine_at_random_points(tmp_path, server):
    source = write_fp8(tmp_path / "src", MoeShape(512, 512, 8), shards=12, scales_apart=True)
    before = bytes_of_files(source)
    run = server.Process(target=convert_checkpoint, args=(source, tmp_path / "straight"))
    run.start()
    run.join()  # warms the server up
    shutil.rmtree(tmp_path / "straight")
    start = time.monotonic()
    run = server.Process(target=convert_checkpoint, args=(source, tmp_path / "straight"))
    run.start()
    run.join()
    whole = time.monotonic() - start
    assert run.exitcode == 0
    expected = bytes_of_files(tmp_path / "straight")

    rng = random.Random(2026)
    kills = finished = resumed = 0
    while kills < KILLS or not finished:
        target = tmp_path / f"dst{finished}"
        run = server.Process(target=convert_checkpoint, args=(source, target))
        run.start()
        run.join(timeout=rng.uniform(0.0, whole))
        if run.exitcode is None:
            run.kill()
            run.join()
        if run.exitcode == 0:
            assert bytes_of_files(target) == expected
            finished += 1
            continue
        assert run.exitcode == -signal.SIGKILL
        kills += 1
        # Whatever the moment: what has a final name is final, and nothing looks like a model
        # before it is one.
        if target.is_dir():
            shards = list(target.glob("*.safetensors"))
            resumed += bool(shards)
            for path in shards:
                assert path.read_bytes() == expected[path.name]
            if (target / "config.json").is_file():
                assert set(expected) <= set(bytes_of_files(target))
    assert resumed >= 5, "too few kills hit the middle of the work"
    final = tmp_path / f"dst{finished}"
    convert_checkpoint(source, final)
    assert bytes_of_files(final) == expected
    assert bytes_of_files(source) == before


def test_kill_nine_of_a_run_with_workers(tmp_path):
    source = write_fp8(tmp_path / "src", MoeShape(512, 512, 8), shards=12)
    convert_checkpoint(source, tmp_path / "straight")
    target = tmp_path / "dst"
    command = [sys.executable, "-m", "sglang_w4afp8.cli", "convert", str(source), str(target),
               "--workers", "2"]  # fmt: skip
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(target.glob("*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.01)
    run.kill()
    run.wait()
    time.sleep(1.5)  # orphaned workers notice their parent's death
    shards = {path: path.stat().st_mtime_ns for path in target.glob("*.safetensors")}
    time.sleep(0.5)
    assert shards == {path: path.stat().st_mtime_ns for path in target.glob("*.safetensors")}
    report = convert_checkpoint(source, target)
    assert report.shards_resumed >= 1
    assert bytes_of_files(target) == bytes_of_files(tmp_path / "straight")


def interrupt_after(monkeypatch, shards: int):
    """Let ``shards`` shards finish, then raise as an interrupted process would."""
    real = rewrite.run_job
    count = iter(range(10_000))

    def stop(*args):
        if next(count) >= shards:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(rewrite, "run_job", stop)


def start_and_stop(source, target, monkeypatch, shards=2, **options):
    with monkeypatch.context() as patch:
        interrupt_after(patch, shards)
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint(source, target, **options)


@pytest.mark.parametrize("damage", ["record", "shard", "short shard", "garbled record", "temp"])
def test_resume_repairs_what_is_missing(tmp_path, source, monkeypatch, damage):
    convert_checkpoint(source, tmp_path / "straight")
    target = tmp_path / "dst"
    start_and_stop(source, target, monkeypatch)
    work = target / rewrite.WORK_DIR
    shard = sorted(target.glob("*.safetensors"))[0]
    record = work / f"{shard.name}.json"
    expected_resumed = 1
    if damage == "record":
        record.unlink()
    elif damage == "shard":
        shard.unlink()
    elif damage == "short shard":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "garbled record":
        record.write_text("{")
    else:
        (target / f"x.1{stream.TEMP_SUFFIX}").write_bytes(b"x")
        expected_resumed = 2
    report = convert_checkpoint(source, target)
    assert report.shards_resumed == expected_resumed
    assert bytes_of_files(target) == bytes_of_files(tmp_path / "straight")


STATES = ("absent", "whole", "no record", "no shard", "short shard", "foreign record")


@settings(max_examples=25, deadline=None)
@given(states=st.lists(st.sampled_from(STATES), min_size=4, max_size=4), temp=st.booleans())
def test_resume_from_any_state_ends_in_the_same_bytes(finished, states, temp):
    """Whatever a crash, a full disk or a person left behind, shard by shard."""
    source, straight, work = finished
    target = straight.with_name("again")
    shutil.rmtree(target, ignore_errors=True)
    (target / rewrite.WORK_DIR).mkdir(parents=True)
    shutil.copy(work / "fingerprint", target / rewrite.WORK_DIR)
    names = sorted(path.name for path in straight.glob("*.safetensors"))
    for name, state in zip(names, states, strict=True):
        shard, record = target / name, target / rewrite.WORK_DIR / f"{name}.json"
        if state not in ("absent", "no shard"):
            shutil.copy(straight / name, shard)
        if state not in ("absent", "no record"):
            shutil.copy(work / f"{name}.json", record)
        if state == "short shard":
            os.truncate(shard, shard.stat().st_size - 1)
        if state == "foreign record":
            shutil.copy(work / f"{names[names.index(name) - 1]}.json", record)
    if temp:
        (target / f"{names[0]}.9{stream.TEMP_SUFFIX}").write_bytes(b"half")
    report = convert_checkpoint(source, target)
    assert report.shards_resumed == states.count("whole")
    assert bytes_of_files(target) == bytes_of_files(straight)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A source, its straight conversion, and the records as they are just before the end."""
    root = tmp_path_factory.mktemp("resume")
    source = write_fp8(root / "src", MoeShape(128, 128, 2), shards=4, scales_apart=True)
    kept = root / "records"
    with pytest.MonkeyPatch.context() as patch:
        real = Path.replace

        def keep(self, other):
            if self.name == rewrite.WORK_DIR:
                shutil.copytree(self, kept)
            return real(self, other)

        patch.setattr(Path, "replace", keep)
        convert_checkpoint(source, root / "straight")
    return source, root / "straight", kept


def test_unfinished_work_with_other_options_is_not_mixed(tmp_path, source, monkeypatch):
    target = tmp_path / "dst"
    start_and_stop(source, target, monkeypatch)
    with pytest.raises(ConfigError, match="other options"):
        convert_checkpoint(source, target, group_size=64)
    convert_checkpoint(source, target, group_size=64, overwrite=True)
    convert_checkpoint(source, tmp_path / "straight", group_size=64)
    assert bytes_of_files(target) == bytes_of_files(tmp_path / "straight")


def test_changed_source_is_noticed(tmp_path, source, monkeypatch):
    target = tmp_path / "dst"
    start_and_stop(source, target, monkeypatch)
    shutil.rmtree(source)
    write_fp8(source, shards=5)
    with pytest.raises(ConfigError, match="another source"):
        convert_checkpoint(source, target)


def test_foreign_target_is_refused_and_overwritten_only_on_demand(tmp_path, source):
    target = tmp_path / "dst"
    target.mkdir()
    (target / "precious.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        convert_checkpoint(source, target)
    assert bytes_of_files(target) == {"precious.txt": b"mine"}
    convert_checkpoint(source, target, overwrite=True)
    assert (target / "precious.txt").read_text() == "mine"
    assert (target / "config.json").is_file()


def test_a_worker_that_dies(tmp_path, source, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(rewrite, "init_worker", os._exit)  # wrong arguments: each worker ends
        with pytest.raises(HostError, match="smaller --workers"):
            convert_checkpoint(source, tmp_path / "dst", workers=2)
    assert not (tmp_path / "dst" / "config.json").exists()
    convert_checkpoint(source, tmp_path / "dst")
    convert_checkpoint(source, tmp_path / "straight")
    assert bytes_of_files(tmp_path / "dst") == bytes_of_files(tmp_path / "straight")


def test_target_that_is_a_file(tmp_path, source):
    (tmp_path / "dst").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        convert_checkpoint(source, tmp_path / "dst")


@pytest.mark.parametrize("where", ["same", "inside", "around", "link"])
def test_target_must_not_touch_the_source(tmp_path, source, where):
    before = bytes_of_files(source)
    link = tmp_path / "link"
    link.symlink_to(source)
    target = {"same": source, "inside": source / "w4", "around": source.parent, "link": link}[where]
    with pytest.raises(ConfigError, match="inside the other"):
        convert_checkpoint(source, target, overwrite=True)
    assert bytes_of_files(source) == before


def test_second_writer_is_refused(tmp_path, source, monkeypatch):
    target = tmp_path / "dst"
    start_and_stop(source, target, monkeypatch)
    with rewrite._lock(target), pytest.raises(ConfigError, match="another process"):
        convert_checkpoint(source, target)


def test_too_little_space_shows_before_the_work(tmp_path, source, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(rewrite.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match="free"):
        convert_checkpoint(source, tmp_path / "dst")
    assert not list((tmp_path / "dst").glob("*.safetensors"))


def test_disk_that_fills_up_halfway(tmp_path, source, monkeypatch):
    convert_checkpoint(source, tmp_path / "straight")
    target = tmp_path / "dst"
    written = 0
    real = os.write

    def limited(descriptor, data):
        nonlocal written
        written += len(data)
        if written > 1_000_000:
            raise OSError(28, "No space left on device")
        return real(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(stream.os, "write", limited)
        with pytest.raises(CheckpointError, match="full") as caught:
            convert_checkpoint(source, target)
    assert "run the same command again" in str(caught.value)
    done = list(target.glob("*.safetensors"))
    assert done
    assert not list(target.glob(f"*{stream.TEMP_SUFFIX}"))
    assert not (target / "config.json").exists()
    report = convert_checkpoint(source, target)
    assert report.shards_resumed == len(done)
    assert bytes_of_files(target) == bytes_of_files(tmp_path / "straight")


def test_read_only_target(tmp_path, source, monkeypatch):
    # Root ignores permission bits, so the refusal is played by the system call.
    def refuse(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(CheckpointError, match="read-only"):
        convert_checkpoint(source, tmp_path / "dst")


@pytest.mark.parametrize("workers", [1, 2])
def test_shard_that_goes_bad_after_planning(tmp_path, source, monkeypatch, workers):
    # NaN in the last shard: the others are kept, the message names the tensor, nothing is final.
    from safetensors.torch import load_file, save_file

    shard = source / "model-00004-of-00004.safetensors"
    tensors = load_file(shard)
    name = next(n for n in tensors if ".experts." in n and n.endswith("proj.weight"))
    tensors[name].view(torch.uint8)[0, 0] = 0x7F
    save_file(tensors, shard)
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(source, tmp_path / "dst", workers=workers)
    assert name.removesuffix(".weight") in str(caught.value)
    assert not (tmp_path / "dst" / "config.json").exists()
    assert not (tmp_path / "dst" / shard.name).exists()
    assert not list((tmp_path / "dst").glob(f"*{stream.TEMP_SUFFIX}"))


def test_missing_scale_is_found_before_anything_is_written(tmp_path):
    from safetensors.torch import load_file, save_file

    source = write_fp8(tmp_path / "src", with_index=False, shards=2)
    shard = source / "model-00002-of-00002.safetensors"
    tensors = load_file(shard)
    name = next(n for n in tensors if ".experts." in n and n.endswith("_scale_inv"))
    del tensors[name]
    save_file(tensors, shard)
    with pytest.raises(CheckpointError, match="weight_scale_inv is missing"):
        convert_checkpoint(source, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_memory_stays_bounded(tmp_path):
    # 16 MB a matrix, 200 MB of source: the peak above the start must not grow with the source.
    peaks = []
    for experts in (2, 6):
        shape = MoeShape(hidden=2048, inner=4096, experts=experts, layers=2, mtp=0)
        source = write_bf16(tmp_path / f"src{experts}", shape, shards=2)
        # The kernel's own high-water mark; getrusage would start from this process's.
        script = (
            "import sys\n"
            "from sglang_w4afp8.tools.convert import convert_checkpoint\n"
            "def peak():\n"
            "    lines = open('/proc/self/status').read().splitlines()\n"
            "    return int(next(l for l in lines if l.startswith('VmHWM')).split()[1])\n"
            "before = peak()\n"
            "convert_checkpoint(sys.argv[1], sys.argv[2])\n"
            "print(peak() - before)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, str(source), str(tmp_path / f"dst{experts}")],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        peaks.append(int(done.stdout.split()[-1]) * 1024)
    matrix = 2 * 2048 * 4096
    assert peaks[1] < peaks[0] + matrix
    assert peaks[1] < 10 * matrix
