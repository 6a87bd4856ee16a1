from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_w4afp8.checkpoint.index import INDEX_NAME, open_index, read_header
from sglang_w4afp8.errors import CheckpointError
from sglang_w4afp8.testing.checkpoints import write_bf16, write_fp8


@pytest.fixture
def source(tmp_path):
    return write_fp8(tmp_path / "src")


def test_index_agrees_with_the_safetensors_library(source):
    index = open_index(source)
    seen = {}
    for file in source.glob("*.safetensors"):
        seen.update(load_file(file))
    assert set(index.tensors) == set(seen)
    for name, tensor in seen.items():
        entry = index.tensors[name]
        assert entry.shape == tuple(tensor.shape)
        assert entry.torch_dtype == tensor.dtype
        assert entry.nbytes == tensor.numel() * tensor.element_size()
    assert index.total_bytes == sum(t.numel() * t.element_size() for t in seen.values())


def test_a_checkpoint_without_index_is_read_too(tmp_path):
    with_index = open_index(write_bf16(tmp_path / "a"))
    without = open_index(write_bf16(tmp_path / "b", with_index=False))
    assert set(with_index.tensors) == set(without.tensors)
    assert with_index.fingerprint() == without.fingerprint()


def test_fingerprint_sees_another_shape(tmp_path):
    a = write_bf16(tmp_path / "a", shards=1)
    before = open_index(a).fingerprint()
    tensors = load_file(a / "model-00001-of-00001.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].contiguous()
    save_file(tensors, a / "model-00001-of-00001.safetensors")
    assert open_index(a).fingerprint() != before


def fails(path, *words):
    with pytest.raises(CheckpointError) as caught:
        open_index(path)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    # The lenient reading reports the same trouble instead of raising.
    assert open_index(path, strict=False).problems


def test_truncated_shard(source):
    shard = source / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    fails(source, shard.name, "truncated")


def test_trailing_bytes(source):
    shard = source / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes() + b"\0" * 8)
    fails(source, shard.name, "foreign bytes")


@pytest.mark.parametrize("content", [b"", b"abc", b"version https://git-lfs.github.com/spec/v1\n"])
def test_not_a_safetensors_file(source, content):
    (source / "model-00001-of-00003.safetensors").write_bytes(content)
    fails(source, "model-00001-of-00003.safetensors")


def test_damaged_header(source):
    shard = source / "model-00001-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[20] ^= 0xFF
    shard.write_bytes(bytes(data))
    fails(source, shard.name)


def test_header_with_wrong_size_for_the_shape(tmp_path):
    header = {"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}
    raw = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"\0" * 8)
    with pytest.raises(CheckpointError, match="another number of bytes"):
        read_header(path)


def test_header_with_a_hole(tmp_path):
    header = {"x": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}}
    raw = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"\0" * 8)
    with pytest.raises(CheckpointError, match="holes"):
        read_header(path)


def test_missing_file(source):
    (source / "model-00003-of-00003.safetensors").unlink()
    fails(source, "model-00003-of-00003.safetensors", "does not exist")


def test_index_entry_without_tensor(source):
    path = source / INDEX_NAME
    index = json.loads(path.read_text())
    ghost = "model.layers.1.mlp.experts.3.up_proj.ghost"
    index["weight_map"][ghost] = "model-00001-of-00003.safetensors"
    path.write_text(json.dumps(index))
    fails(source, ghost)


def test_duplicate_tensor(source):
    shard = source / "model-00003-of-00003.safetensors"
    tensors = load_file(shard)
    tensors["model.embed_tokens.weight"] = torch.zeros(1)
    save_file(tensors, shard)
    fails(source, "model.embed_tokens.weight", "both copies")


def test_tensor_outside_the_index_is_a_note(source):
    shard = source / "model-00003-of-00003.safetensors"
    tensors = load_file(shard)
    tensors["extra.weight"] = torch.zeros(1)
    save_file(tensors, shard)
    index = open_index(source)
    assert "extra.weight" in index.tensors
    assert any("extra.weight" in note for note in index.notes)


def test_no_weights_at_all(tmp_path):
    with pytest.raises(CheckpointError, match="no safetensors file"):
        open_index(tmp_path)
    with pytest.raises(CheckpointError, match="not a directory"):
        open_index(tmp_path / "nowhere")
