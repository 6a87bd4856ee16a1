from __future__ import annotations

import errno
import hashlib
import os
import resource

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from sglang_w4afp8.checkpoint import stream
from sglang_w4afp8.checkpoint.index import DTYPE_NAMES, DTYPES, read_header
from sglang_w4afp8.checkpoint.reader import TensorReader
from sglang_w4afp8.checkpoint.stream import (
    OutTensor,
    ShardWriter,
    file_order,
    remove_stale_temps,
    tensor_bytes,
    write_atomic,
)
from sglang_w4afp8.errors import CheckpointError

_READABLE = [name for name in DTYPES if name not in ("U16", "U32", "U64", "F8_E8M0")]


def announce(name: str, tensor: torch.Tensor) -> OutTensor:
    return OutTensor(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))


def write(path, tensors):
    order = file_order([announce(name, tensor) for name, tensor in tensors.items()])
    with ShardWriter(path, order) as writer:
        for item in order:
            writer.write(item.name, tensors[item.name])
        return writer.commit()


@st.composite
def tensor_sets(draw):
    made = {}
    for i in range(draw(st.integers(0, 6))):
        dtype = DTYPES[draw(st.sampled_from(_READABLE))]
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        count = 1
        for extent in shape:
            count *= extent
        raw = torch.randint(0, 2, (count * dtype.itemsize,), dtype=torch.uint8)
        made[f"t{i}"] = raw.view(dtype).view(shape)
    return made


@settings(max_examples=60, deadline=None)
@given(tensors=tensor_sets())
def test_what_is_written_is_what_the_library_reads(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("shard") / "model.safetensors"
    digest = write(path, tensors)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            read = file.get_tensor(name)
            assert read.dtype == tensor.dtype
            assert read.shape == tensor.shape
            assert bytes(tensor_bytes(read)) == bytes(tensor_bytes(tensor))
    _, entries = read_header(path)
    with TensorReader(path.parent) as reader:
        for entry in entries:
            mine = reader.read(entry)
            assert bytes(tensor_bytes(mine)) == bytes(tensor_bytes(tensors[entry.name]))
            copied = b"".join(bytes(chunk) for chunk in reader.chunks(entry, size=7))
            assert copied == bytes(tensor_bytes(mine))


def test_awkward_sizes_go_last_and_stay_aligned(tmp_path):
    tensors = {
        "scale": torch.ones(1, dtype=torch.bfloat16),
        "odd": torch.ones(3, dtype=torch.int8),
        "big": torch.ones(4, dtype=torch.float64),
        "half": torch.ones(3, dtype=torch.float32),
    }
    path = tmp_path / "model.safetensors"
    write(path, tensors)
    _, entries = read_header(path)
    assert [entry.name for entry in entries] == ["big", "half", "scale", "odd"]
    for entry in entries:
        assert entry.start % entry.torch_dtype.itemsize == 0


def test_nothing_is_visible_before_commit(tmp_path):
    path = tmp_path / "model.safetensors"
    item = OutTensor("x", "F32", (2,))
    with pytest.raises(RuntimeError, match="stop"), ShardWriter(path, [item]) as writer:
        writer.write("x", torch.zeros(2))
        assert not path.exists()
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_announced_and_written_must_agree(tmp_path):
    item = OutTensor("x", "F32", (2,))
    with ShardWriter(tmp_path / "m.safetensors", [item]) as writer, pytest.raises(AssertionError):
        writer.write("x", torch.zeros(3))
    with ShardWriter(tmp_path / "m.safetensors", [item]) as writer, pytest.raises(AssertionError):
        writer.commit()


def test_full_disk_while_writing(tmp_path, monkeypatch):
    def full(descriptor, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    item = OutTensor("x", "F32", (2,))
    with ShardWriter(tmp_path / "m.safetensors", [item]) as writer:
        monkeypatch.setattr(stream.os, "write", full)
        with pytest.raises(CheckpointError, match="full"):
            writer.write("x", torch.zeros(2))
            writer.commit()
        monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_full_disk_shows_before_the_work(tmp_path):
    # A limit on the file size is the one full disk that needs no privileges: fallocate fails.
    import signal

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(CheckpointError, match="full"):
            ShardWriter(tmp_path / "m.safetensors", [OutTensor("x", "U8", (2 << 20,))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert list(tmp_path.iterdir()) == []


def test_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    write(path, {"x": torch.arange(1000, dtype=torch.int64)})
    _, entries = read_header(path)
    with TensorReader(tmp_path) as reader:
        os.truncate(path, 500)
        with pytest.raises(CheckpointError, match="ends inside x"):
            reader.read(entries[0])


@pytest.mark.parametrize("fault", ["removed", "read error"])
@pytest.mark.parametrize("copied", [False, True])
def test_file_that_fails_while_it_is_read(tmp_path, fault, copied):
    path = tmp_path / "model.safetensors"
    write(path, {"x": torch.arange(1000, dtype=torch.int64)})
    _, (entry,) = read_header(path)
    path.unlink()
    if fault == "read error":
        path.mkdir()  # can be opened, not read
    order = [OutTensor("x", "I64", (1000,))]
    with TensorReader(tmp_path) as reader, pytest.raises(CheckpointError) as caught:
        if copied:
            with ShardWriter(tmp_path / "copy", order) as writer:
                writer.write_raw("x", reader.chunks(entry))
        else:
            reader.read(entry)
    assert str(path) in str(caught.value) and "the bytes of x" in str(caught.value)


def test_reader_keeps_few_files_open(tmp_path):
    for i in range(5):
        write(tmp_path / f"{i}.safetensors", {f"x{i}": torch.tensor([i])})
    with TensorReader(tmp_path, max_open=2) as reader:
        for i in (0, 1, 2, 3, 4, 0):
            _, (entry,) = read_header(tmp_path / f"{i}.safetensors")
            assert reader.read(entry).item() == i
            assert len(reader._files) <= 2


def test_prefetched_tensors_are_the_same(tmp_path):
    tensors = {f"x{i}": torch.full((100,), i, dtype=torch.int32) for i in range(6)}
    write(tmp_path / "a.safetensors", tensors)
    _, entries = read_header(tmp_path / "a.safetensors")
    with TensorReader(tmp_path) as reader:
        reader.prefetch(entries[:4])
        for entry in entries:
            assert torch.equal(reader.read(entry), tensors[entry.name])
        reader.prefetch(entries)  # left over when the reader closes


def test_many_tensors_wait_for_the_disk(tmp_path, monkeypatch):
    import time

    real = os.write

    def slow(descriptor, data):
        time.sleep(0.002)
        return real(descriptor, data)

    monkeypatch.setattr(stream.os, "write", slow)
    tensors = {f"x{i}": torch.full((64,), i, dtype=torch.int64) for i in range(50)}
    digest = write(tmp_path / "a.safetensors", tensors)
    assert digest == hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor)


def test_small_files_are_atomic(tmp_path):
    path = tmp_path / "config.json"
    write_atomic(path, b"old")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert [item.name for item in tmp_path.iterdir()] == ["config.json"]


def test_stale_temporaries_are_found(tmp_path):
    (tmp_path / f"model.safetensors.123{stream.TEMP_SUFFIX}").write_bytes(b"x")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert remove_stale_temps(tmp_path) == 1
    assert [item.name for item in tmp_path.iterdir()] == ["model.safetensors"]
