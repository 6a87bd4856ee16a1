"""A checkpoint seen through its headers: which tensor lies where, without reading any of them.

Owns the safetensors header format and the consistency of ``model.safetensors.index.json`` with the
files. SGLang decides from the index which *files* to read and then reads every tensor in them, so
a tensor that the index lists and the file lacks goes missing silently at serving time; here it is
an error before the first byte is converted.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sglang_w4afp8.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies.

    Attributes:
        name: tensor name.
        dtype: safetensors spelling, e.g. ``F8_E4M3``.
        shape: as stored.
        shard: file name inside the checkpoint directory.
        start: first byte in the file (absolute).
        nbytes: length in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    start: int
    nbytes: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The matching torch dtype.

        Raises:
            CheckpointError: torch has none (sub-byte floats).
        """
        if self.dtype not in DTYPES:
            raise CheckpointError(
                f"{self.name} in {self.shard} has dtype {self.dtype}",
                "this dtype cannot be read into a torch tensor",
                ["sglang-w4afp8 inspect CKPT  lists every dtype of the checkpoint"],
            )
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class ShardInfo:
    """One file: its size, the hash of its header and the tensor names in file order."""

    name: str
    size_bytes: int
    header_sha256: str
    names: tuple[str, ...]


@dataclass
class CheckpointIndex:
    """All tensors of a checkpoint directory.

    Attributes:
        root: the directory.
        tensors: name → entry, in shard and file order.
        shards: file name → info, sorted.
        config: parsed ``config.json``, empty when there is none.
        has_index_file: whether ``model.safetensors.index.json`` exists.
        notes: harmless irregularities, in words.
        problems: what :func:`open_index` found wrong with ``strict=False``.
    """

    root: Path
    tensors: dict[str, TensorEntry]
    shards: dict[str, ShardInfo]
    config: dict[str, Any]
    has_index_file: bool
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())

    def __iter__(self) -> Iterator[TensorEntry]:
        return iter(self.tensors.values())

    def fingerprint(self) -> str:
        """Hash of names, dtypes, shapes, offsets and sizes: equal means the same source layout."""
        digest = hashlib.sha256()
        for shard in sorted(self.shards.values(), key=lambda item: item.name):
            digest.update(f"{shard.name}:{shard.size_bytes}:{shard.header_sha256}\n".encode())
        return digest.hexdigest()


def _bad_file(path: Path, found: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {found}",
        why,
        [
            f"copy or download {path.name} again and compare its size with the origin's",
            f"sglang-w4afp8 inspect {path.parent}  checks every header of the checkpoint",
        ],
    )


def read_header(path: Path) -> tuple[ShardInfo, list[TensorEntry]]:
    """Read and check the header of one safetensors file.

    Returns:
        The shard's info and its tensors in file order.

    Raises:
        CheckpointError: not a safetensors file, or shorter or longer than its header says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise _bad_file(path, f"{size} bytes", "a safetensors file starts with 8 length bytes")
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER_BYTES or 8 + length > size:
            raise _bad_file(
                path,
                f"header length {length}, file size {size} bytes",
                "the header does not fit into the file: it is truncated or no safetensors file",
            )
        raw = file.read(length)
    try:
        header = json.loads(raw)
        items = [(name, info) for name, info in header.items() if name != "__metadata__"]
        entries = [
            TensorEntry(
                name=name,
                dtype=info["dtype"],
                shape=tuple(int(n) for n in info["shape"]),
                shard=path.name,
                start=8 + length + int(info["data_offsets"][0]),
                nbytes=int(info["data_offsets"][1]) - int(info["data_offsets"][0]),
            )
            for name, info in items
        ]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise _bad_file(path, f"unreadable header ({error})", "its JSON is damaged") from error
    # An empty tensor shares its offset with the next one and comes first.
    entries.sort(key=lambda entry: (entry.start, entry.nbytes, entry.name))
    expected = 8 + length
    for entry in entries:
        if entry.start != expected or entry.nbytes < 0:
            raise _bad_file(
                path,
                f"{entry.name} starts at byte {entry.start}, expected {expected}",
                "tensors must follow each other without holes or overlaps",
            )
        expected += entry.nbytes
        if entry.dtype in DTYPES:
            count = 1
            for extent in entry.shape:
                count *= extent
            if count * DTYPES[entry.dtype].itemsize != entry.nbytes:
                raise _bad_file(
                    path,
                    f"{entry.name}: {entry.dtype} {list(entry.shape)} in {entry.nbytes} bytes",
                    "dtype and shape ask for another number of bytes",
                )
    if expected != size:
        kind = "truncated" if size < expected else "followed by foreign bytes"
        raise _bad_file(
            path, f"{size} bytes, its header describes {expected}", f"the file is {kind}"
        )
    info = ShardInfo(
        path.name, size, hashlib.sha256(raw).hexdigest(), tuple(entry.name for entry in entries)
    )
    return info, entries


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object from a file; an absent file gives an empty dict.

    Raises:
        CheckpointError: the file is not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(
            f"{path}: {error}", "the file must hold JSON", ["fetch the file again"]
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} holds no JSON object", "a mapping is expected", ["fetch the file again"]
        )
    return value


def open_index(root: str | os.PathLike[str], *, strict: bool = True) -> CheckpointIndex:
    """Describe a checkpoint directory from its headers.

    Args:
        root: directory with ``*.safetensors`` files; the index file is optional.
        strict: raise at the first inconsistency; otherwise collect them in ``problems``.

    Raises:
        CheckpointError: no directory or no safetensors files; with ``strict`` also a missing
            file, an index entry without tensor, a tensor in two files, a damaged header.
    """
    path = Path(root)
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is not a directory",
            "a checkpoint is a local directory of safetensors files",
            ["huggingface-cli download REPO --local-dir DIR  fetches one"],
        )
    index_path = path / INDEX_NAME
    weight_map: Mapping[str, str] = {}
    problems: list[str] = []

    def complain(found: str, why: str, ways: list[str]) -> None:
        error = CheckpointError(found, why, ways)
        if strict:
            raise error
        problems.append(f"{found}: {why}")

    if index_path.is_file():
        weight_map = read_json(index_path).get("weight_map", {})
        files = sorted(set(weight_map.values()))
    else:
        files = sorted(item.name for item in path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{path} holds no safetensors file",
            "weights are read from *.safetensors only",
            ["convert .bin or .pt weights to safetensors first"],
        )
    tensors: dict[str, TensorEntry] = {}
    shards: dict[str, ShardInfo] = {}
    for name in files:
        if not (path / name).is_file():
            complain(
                f"{path / name} does not exist",
                f"{INDEX_NAME} places tensors in it",
                [f"download {name} again"],
            )
            continue
        try:
            info, entries = read_header(path / name)
        except CheckpointError as error:
            if strict:
                raise
            problems.append(f"{error.found}: {error.why}")
            continue
        shards[name] = info
        for entry in entries:
            if entry.name in tensors:
                complain(
                    f"{entry.name} is in {tensors[entry.name].shard} and in {name}",
                    "SGLang reads both copies and keeps whichever comes last",
                    ["remove the stale file, or rebuild the index"],
                )
                continue
            tensors[entry.name] = entry
    absent = [name for name in weight_map if name not in tensors and weight_map[name] in shards]
    if absent:
        complain(
            f"{len(absent)} tensors of {INDEX_NAME} are in no file, first {absent[0]}",
            "a loader would leave these parameters uninitialised without a word",
            [f"download {weight_map[absent[0]]} again", "regenerate the index"],
        )
    notes = []
    if weight_map:
        extra = [name for name in tensors if name not in weight_map]
        if extra:
            notes.append(f"{len(extra)} tensors are in the files but not in the index ({extra[0]})")
        unused = sorted(item.name for item in path.glob("*.safetensors") if item.name not in shards)
        if unused:
            notes.append(f"safetensors files outside the index are ignored: {', '.join(unused)}")
    config = read_json(path / "config.json")
    return CheckpointIndex(
        root=path,
        tensors=tensors,
        shards=shards,
        config=config,
        has_index_file=index_path.is_file(),
        notes=notes,
        problems=problems,
    )
