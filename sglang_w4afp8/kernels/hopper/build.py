"""Compiles ``csrc/*.cu`` to sm_90a at first use and keeps the result on disk.

NVRTC comes with every CUDA build of torch, so no toolkit is needed; where it is missing, ``nvcc``
is tried. A cubin's file name is a hash of all sources, the options and the compiler's version:
stale files are never loaded, and processes that build the same kernel at the same time do no harm.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from sglang_w4afp8 import env
from sglang_w4afp8.errors import HostError
from sglang_w4afp8.kernels.hopper.plan import Kernel

ARCH = "sm_90a"
WAYS_AROUND = (
    "export SGLANG_W4AFP8_MOE_BACKEND=cutlass (SGLang's own kernel)",
    "report it with the lines above: sglang-w4afp8 doctor prints the versions",
)
CSRC = Path(__file__).resolve().parent.parent / "csrc"


def cache_dir() -> Path:
    """Where cubins are kept."""
    base = env.CACHE_DIR.get()
    return (Path(base) if base else Path.home() / ".cache" / "sglang-w4afp8") / "kernels"


@lru_cache
def _sources() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(CSRC.glob("*.cu*"))}


@lru_cache
def _nvrtc() -> ctypes.CDLL | None:
    names = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []
    found = [
        str(path)
        for root in roots
        for folder in ("cu13/lib", "cuda_nvrtc/lib")
        for path in sorted((root / folder).glob("libnvrtc.so.*"))
        if "alt" not in path.name
    ]
    for name in found + names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


@lru_cache
def compiler() -> str:
    """The compiler that will be used, with its version.

    Raises:
        HostError: there is none.
    """
    library = _nvrtc()
    if library is not None:
        major, minor = ctypes.c_int(), ctypes.c_int()
        library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        return f"nvrtc {major.value}.{minor.value}"
    if shutil.which("nvcc"):
        text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
        return "nvcc " + text.strip().splitlines()[-1]
    raise HostError(
        "no CUDA compiler",
        "neither libnvrtc (part of torch's CUDA wheels) nor nvcc was found",
        ["pip install nvidia-cuda-nvrtc", "put nvcc on PATH"],
    )


def cubin_path(kernel: Kernel) -> Path:
    """The cache file of ``kernel``."""
    digest = hashlib.sha256()
    for name, text in _sources().items():
        digest.update(name.encode() + b"\0" + text + b"\0")
    digest.update(repr((kernel, ARCH, compiler(), _options(kernel))).encode())
    return cache_dir() / f"{kernel.entry}-{digest.hexdigest()[:24]}.cubin"


def _options(kernel: Kernel) -> list[str]:
    every_lane = (("W4_EVERY_LANE", 1),) if env.EVERY_LANE.is_on() else ()
    return ["-std=c++17", *(f"-D{name}={value}" for name, value in (*kernel.defines, *every_lane))]


def _compile_nvrtc(library: ctypes.CDLL, kernel: Kernel) -> bytes:
    sources = _sources()
    headers = [name for name in sources if name.endswith(".cuh")]
    texts = (ctypes.c_char_p * len(headers))(*(sources[name] for name in headers))
    names = (ctypes.c_char_p * len(headers))(*(name.encode() for name in headers))
    program = ctypes.c_void_p()

    def check(code: int) -> None:
        if code:
            library.nvrtcGetErrorString.restype = ctypes.c_char_p
            text = library.nvrtcGetErrorString(code).decode()
            raise HostError(f"nvrtc on {kernel}", text, WAYS_AROUND)

    check(
        library.nvrtcCreateProgram(
            ctypes.byref(program),
            sources[kernel.source],
            kernel.source.encode(),
            len(headers),
            texts,
            names,
        )
    )
    try:
        # Without the second option NVRTC takes a generic lambda for a host function.
        options = [f"--gpu-architecture={ARCH}", "-default-device", *_options(kernel)]
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        size = ctypes.c_size_t()
        if library.nvrtcCompileProgram(program, len(options), array):
            library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            library.nvrtcGetProgramLog(program, log)
            text = log.value.decode(errors="replace")
            raise HostError(f"nvrtc failed on {kernel}", text, WAYS_AROUND)
        check(library.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        cubin = ctypes.create_string_buffer(size.value)
        check(library.nvrtcGetCUBIN(program, cubin))
        return cubin.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _compile_nvcc(kernel: Kernel) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "kernel.cubin"
        arch = ARCH.removeprefix("sm_")
        command = ["nvcc", "-cubin", f"-gencode=arch=compute_{arch},code={ARCH}"]
        command += [*_options(kernel), "-o", str(target), str(CSRC / kernel.source)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise HostError(f"nvcc failed on {kernel}", done.stderr, WAYS_AROUND)
        return target.read_bytes()


def cubin(kernel: Kernel) -> bytes:
    """The machine code of ``kernel``, compiled now if it is not in the cache.

    Raises:
        HostError: no compiler, or it failed; the message holds its log.
    """
    path = cubin_path(kernel)
    if path.is_file():
        return path.read_bytes()
    library = _nvrtc()
    code = _compile_nvrtc(library, kernel) if library is not None else _compile_nvcc(kernel)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(code)
    os.replace(temporary, path)
    return code


def build_all(kernels: Iterable[Kernel]) -> None:
    """Compile what the cache lacks, several at a time."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(cubin, kernels))
