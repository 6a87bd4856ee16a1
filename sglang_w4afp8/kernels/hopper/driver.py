"""The CUDA driver through ctypes: load a cubin, launch with programmatic dependence.

Nothing of torch's C++ interface is used, so one installation serves every torch release.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

from sglang_w4afp8.errors import HostError
from sglang_w4afp8.kernels.hopper.build import WAYS_AROUND, cubin
from sglang_w4afp8.kernels.hopper.plan import Kernel, Launch

_ATTRIBUTE_PROGRAMMATIC_SERIALIZATION = 6
_FUNCTION_MAX_DYNAMIC_SHARED = 8
_FUNCTION_SHARED_CARVEOUT = 9


class _Attribute(ctypes.Structure):
    """``CUlaunchAttribute``: an id, then a 64-byte union at offset 8."""

    _fields_ = (
        ("id", ctypes.c_int),
        ("pad", ctypes.c_int),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_byte * 60),
    )


class _Config(ctypes.Structure):
    """``CUlaunchConfig``."""

    _fields_ = (
        ("grid_x", ctypes.c_uint),
        ("grid_y", ctypes.c_uint),
        ("grid_z", ctypes.c_uint),
        ("block_x", ctypes.c_uint),
        ("block_y", ctypes.c_uint),
        ("block_z", ctypes.c_uint),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    )


@lru_cache
def _driver() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise HostError(
            "libcuda.so.1",
            f"the CUDA driver cannot be loaded: {error}",
            ["in a container: start it with --gpus all", "nvidia-smi says whether there is one"],
        ) from error
    library.cuLaunchKernelEx.argtypes = [
        ctypes.POINTER(_Config),
        ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_void_p),
        ctypes.c_void_p,
    ]
    return library


def _check(code: int, what: str) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        error = f"CUDA error {code}: {(text.value or b'?').decode()}"
        raise HostError(what, error, WAYS_AROUND)


class Function:
    """A kernel loaded on the current device.

    Args:
        kernel: what to load; compiled first if the cache lacks it.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self._code = cubin(kernel)
        self._module = ctypes.c_void_p()
        self.handle = ctypes.c_void_p()
        driver = _driver()
        _check(driver.cuModuleLoadData(ctypes.byref(self._module), self._code), f"load {kernel}")
        _check(
            driver.cuModuleGetFunction(
                ctypes.byref(self.handle), self._module, kernel.entry.encode()
            ),
            f"find {kernel.entry}",
        )
        self._shared_limit = -1

    def _allow_shared(self, size: int) -> None:
        if size <= self._shared_limit:
            return
        driver = _driver()
        what = f"{size} bytes of shared memory for {self.kernel}"
        _check(driver.cuFuncSetAttribute(self.handle, _FUNCTION_MAX_DYNAMIC_SHARED, size), what)
        # All of the SM's memory as shared memory, or a second CTA may not fit.
        _check(driver.cuFuncSetAttribute(self.handle, _FUNCTION_SHARED_CARVEOUT, 100), what)
        self._shared_limit = size

    def launch(
        self, launch: Launch, parameters: ctypes.Structure, stream: int, dependent: bool = True
    ) -> None:
        """Start the kernel.

        Args:
            launch: grid, threads and shared memory.
            parameters: the kernel's one argument.
            stream: ``cudaStream_t``.
            dependent: may start before the kernel in front of it in the stream has ended; ours wait
                for it themselves.
        """
        self._allow_shared(launch.shared_bytes)
        attribute = _Attribute(id=_ATTRIBUTE_PROGRAMMATIC_SERIALIZATION, value=1)
        config = _Config(
            launch.grid[0],
            launch.grid[1],
            1,
            launch.threads,
            1,
            1,
            launch.shared_bytes,
            stream,
            ctypes.pointer(attribute),
            1 if dependent else 0,
        )
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(parameters))
        _check(
            _driver().cuLaunchKernelEx(ctypes.byref(config), self.handle, arguments, None),
            f"launch {self.kernel}",
        )


_loaded: dict[tuple[int, Kernel], Function] = {}


def function(device: int, kernel: Kernel) -> Function:
    """``kernel`` on device number ``device``, which must be the current one."""
    key = (device, kernel)
    if key not in _loaded:
        _loaded[key] = Function(kernel)
    return _loaded[key]
