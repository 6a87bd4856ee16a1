"""What ``doctor`` looks at, one function per topic; see :mod:`sglang_w4afp8.tools.doctor`.

A probe yields rows and may raise: the caller turns that into a row. Heavy or fragile imports stay
inside the probes.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator

from sglang_w4afp8.tools import doctor_machine
from sglang_w4afp8.tools.doctor import FAIL, OK, WARN, Probe, Row

_GROUP = "sglang.srt.plugins"
_ENTRY_POINT = "w4afp8"
_OWN_PLATFORM = "w4afp8_cpu"
_NVIDIA_SMI = (
    "nvidia-smi",
    "--query-gpu=name,memory.total,compute_cap,driver_version",
    "--format=csv,noheader",
)
_IMPORT_LIMIT_S = 300
_ENOUGH_SHM_GIB = 8
_ENOUGH_FILES = 65535  # what SGLang asks for at start

# Runs in a process of its own: SGLang's imports are slow and may abort.
_REGISTER = """
import json
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang_w4afp8 import plugin
from sglang.srt.layers.quantization import get_quantization_config
status, found = plugin.status(), get_quantization_config("w4afp8")
print("\\n@" + json.dumps([status.state, status.detail, found.__name__]))
"""


def python() -> Iterator[Row]:
    """The interpreter."""
    yield Row(OK, "Python", f"{platform.python_version()} at {sys.executable}")


def package() -> Iterator[Row]:
    """This package: what is imported is what is installed."""
    from sglang_w4afp8 import __file__ as imported_from
    from sglang_w4afp8 import __version__

    where = os.path.dirname(imported_from or "")
    try:
        installed = importlib.metadata.version("sglang-w4afp8")
    except importlib.metadata.PackageNotFoundError:
        yield Row(
            FAIL,
            "sglang-w4afp8",
            f"{__version__} at {where} is not installed, so SGLang cannot find its entry point",
            "pip install sglang-w4afp8   (or: pip install --no-deps -e . in a checkout)",
        )
        return
    if installed != __version__:
        yield Row(
            WARN,
            "sglang-w4afp8",
            f"installed {installed}, imported {__version__} from {where}",
            "pip install --force-reinstall --no-deps sglang-w4afp8",
        )
    else:
        yield Row(OK, "sglang-w4afp8", f"{installed} at {where}")


def torch() -> Iterator[Row]:
    """PyTorch, and whether it was built for CUDA."""
    try:
        import torch as library
    except ImportError as error:
        yield Row(FAIL, "torch", f"cannot be imported: {error}", 'pip install "sglang==0.5.23"')
        return
    cuda = library.version.cuda
    yield Row(OK, "torch", f"{library.__version__}, {f'CUDA {cuda}' if cuda else 'without CUDA'}")


def sglang() -> Iterator[Row]:
    """SGLang's version and the names this package relies on, read without importing it."""
    from sglang_w4afp8 import compat

    report = compat.check_for_registration(thorough=True)
    where = f"{report.version or 'not found'} at {report.label}"
    for warning in report.warnings:
        yield Row(WARN, "sglang", warning, f'pip install "sglang=={compat.TESTED[-1]}"')
    for problem in report.problems:
        yield Row(
            FAIL,
            "sglang",
            f"{where}: {problem}",
            f'pip install "sglang=={compat.TESTED[-1]}"   (supported: {compat.SUPPORTED_SGLANG})',
        )
    if report.ok:
        yield Row(OK, "sglang", f"{where}, all names and signatures as expected")


def entry_point() -> Iterator[Row]:
    """Whether SGLang's plugin loader would come to us, by its own rules."""
    names = [e.name for e in importlib.metadata.entry_points(group=_GROUP)]
    if _ENTRY_POINT not in names:
        yield Row(
            FAIL,
            "entry point",
            f"none called {_ENTRY_POINT!r} in group {_GROUP}",
            "pip install --force-reinstall --no-deps sglang-w4afp8",
        )
        return
    allowed = [n.strip() for n in os.environ.get("SGLANG_PLUGINS", "").split(",") if n.strip()]
    if allowed and _ENTRY_POINT not in allowed:
        yield Row(
            FAIL,
            "entry point",
            f"SGLANG_PLUGINS={','.join(allowed)} leaves {_ENTRY_POINT!r} out",
            f"export SGLANG_PLUGINS={','.join([*allowed, _ENTRY_POINT])}",
        )
        return
    chosen = os.environ.get("SGLANG_PLATFORM", "")
    if chosen not in ("", _OWN_PLATFORM):
        # SGLang skips the plugins of every distribution that offers a platform not chosen.
        yield Row(
            FAIL,
            "entry point",
            f"SGLANG_PLATFORM={chosen}: SGLang then skips the plugins of packages that offer "
            "another platform, and this one does (for the CPU)",
            "python -m sglang_w4afp8.run sglang.launch_server …   registers by itself",
        )
        return
    yield Row(OK, "entry point", f"{_GROUP}: {_ENTRY_POINT}")


def registration() -> Iterator[Row]:
    """A registration as in a server, in a process of its own."""
    variables = os.environ | {"SGLANG_W4AFP8_STRICT": "0"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _REGISTER],
            env=variables,
            capture_output=True,
            text=True,
            timeout=_IMPORT_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        yield Row(
            FAIL,
            "registration",
            f"importing SGLang took more than {_IMPORT_LIMIT_S} s",
            f"{sys.executable} -m compileall -q -j 0 $(dirname $(python -c 'import sglang; "
            "print(sglang.__file__)'))",
        )
        return
    marked = [line for line in done.stdout.splitlines() if line.startswith("@")]
    if not marked:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        yield Row(
            FAIL,
            "registration",
            f"importing SGLang ended with {done.returncode}: {last}",
            f"{sys.executable} -c 'import sglang.srt.layers.quantization'   shows all of it",
        )
        return
    state, detail, class_name = json.loads(marked[-1][1:])
    first = detail.splitlines()[0] if detail else ""
    if state == "registered" and class_name == "ShardedW4AFp8Config":
        yield Row(OK, "registration", first)
    elif state == "disabled":
        yield Row(WARN, "registration", first, "unset SGLANG_W4AFP8_ENABLE")
    else:
        yield Row(
            FAIL,
            "registration",
            f"{state}, 'w4afp8' is {class_name} {first}".strip(),
            "see the rows above; SGLANG_W4AFP8_STRICT=1 makes a server stop instead of going on",
        )


def gpus() -> Iterator[Row]:
    """What the driver sees, and whether torch sees the same."""
    listed: list[str] = []
    if shutil.which(_NVIDIA_SMI[0]):
        done = subprocess.run(_NVIDIA_SMI, capture_output=True, text=True, timeout=60, check=False)
        listed = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        if done.returncode:
            message = (done.stdout + done.stderr).strip().splitlines() or ["no message"]
            yield Row(
                FAIL, "GPU", f"nvidia-smi: {message[-1]}", "repair the NVIDIA driver, then reboot"
            )
            return
    import torch as library

    seen = library.cuda.device_count() if library.cuda.is_available() else 0
    if not listed and not seen:
        yield Row(
            WARN,
            "GPU",
            "none; models can be served on the CPU platform, for tests and slowly",
            f"export SGLANG_PLATFORM={_OWN_PLATFORM}",
        )
        return
    for name in dict.fromkeys(listed):
        yield Row(OK, "GPU", f"{listed.count(name)} × {name}")
    if seen < len(listed):
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        yield Row(
            WARN if hidden is not None else FAIL,
            "GPU",
            f"torch sees {seen} of {len(listed)}"
            + (f" (CUDA_VISIBLE_DEVICES={hidden})" if hidden is not None else ""),
            "unset CUDA_VISIBLE_DEVICES"
            if hidden is not None
            else "install a torch build for this driver's CUDA version",
        )


def kernels() -> Iterator[Row]:
    """What each expert kernel says of DeepSeek-R1's layer at tp 8, on each kind of GPU here."""
    import torch as library

    from sglang_w4afp8.kernels import registry
    from sglang_w4afp8.layer import Device, MoEProblem
    from sglang_w4afp8.sharding import AxisShard
    from sglang_w4afp8.spec import ActivationScheme

    count = library.cuda.device_count() if library.cuda.is_available() else 0
    kinds = {Device.of(library.device("cuda", i)) for i in range(count)} or {Device("cpu")}
    for device in sorted(kinds, key=lambda d: d.name):
        for scheme in (ActivationScheme.STATIC, ActivationScheme.DYNAMIC_PER_TOKEN):
            problem = MoEProblem(
                num_experts=256,
                hidden_size=7168,
                columns=AxisShard.even(2048, 128, 0, 8),
                group_size=128,
                top_k=8,
                scheme=scheme,
                device=device,
            )
            verdicts = registry.explain(problem)
            usable = [v.backend for v in verdicts if v.reason is None]
            refused = "; ".join(f"{v.backend}: {v.reason}" for v in verdicts if v.reason)
            topic = f"kernels on {device.name}, {scheme}"
            if usable:
                yield Row(OK, topic, f"{usable[0]}" + (f"   ({refused})" if refused else ""))
            else:
                yield Row(FAIL, topic, refused, "serve another quantization of the model here")


def tuning() -> Iterator[Row]:
    """Which tables say, on each Hopper card here, which path runs which number of tokens."""
    import torch as library

    from sglang_w4afp8.errors import ConfigError
    from sglang_w4afp8.kernels.hopper import tables
    from sglang_w4afp8.layer import Device

    count = library.cuda.device_count() if library.cuda.is_available() else 0
    cards = (Device.of(library.device("cuda", i)) for i in range(count))
    for name in sorted({card.name for card in cards if card.capability == (9, 0)}):
        found = []
        for whose, path in (
            ("yours", tables.user_path(name)),
            ("committed", tables.committed_path(name)),
        ):
            if not path.exists():
                continue
            try:
                found.append(f"{whose}, {len(tables.read(path, name).layers)} layers: {path}")
            except ConfigError as error:
                why = f"{error.found}: {error.why}; it is left out"
                yield Row(WARN, "tuning", why, "\n".join(error.ways))
        told = "; ".join(found) or f"no table for {name}: built-in limits"
        yield Row(OK, "tuning", f"{told}   ({tables.RETUNE} measures another)")


def shared_memory() -> Iterator[Row]:
    """``/dev/shm``, through which ranks of one machine talk; containers often get 64 MB."""
    usage = shutil.disk_usage("/dev/shm")
    total_gib, free_gib = usage.total / 2**30, usage.free / 2**30
    found = f"{total_gib:.1f} GiB, {free_gib:.1f} GiB free"
    if total_gib < _ENOUGH_SHM_GIB:
        yield Row(
            WARN,
            "/dev/shm",
            f"{found}; NCCL and SGLang want {_ENOUGH_SHM_GIB} GiB for a multi-GPU server",
            "docker run --shm-size 32g …   (or --ipc=host; Kubernetes: emptyDir medium: Memory)",
        )
    else:
        yield Row(OK, "/dev/shm", found)


def limits() -> Iterator[Row]:
    """Limits of this shell that a server inherits."""
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < _ENOUGH_FILES:
        yield Row(WARN, "open files", f"at most {files}", f"ulimit -Hn {_ENOUGH_FILES} (as root)")
    else:
        shown = "unlimited" if files == resource.RLIM_INFINITY else str(files)
        yield Row(OK, "open files", f"at most {shown}")
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    has_rdma = os.path.isdir("/sys/class/infiniband") and os.listdir("/sys/class/infiniband")
    if has_rdma and locked != resource.RLIM_INFINITY:
        yield Row(
            WARN,
            "locked memory",
            f"at most {locked // 1024} KiB; RDMA between nodes needs to lock buffers",
            "ulimit -l unlimited   (docker run --ulimit memlock=-1)",
        )


def variables() -> Iterator[Row]:
    """Our environment variables in effect, misspelt ones, and those that steer SGLang or NCCL."""
    from sglang_w4afp8 import env
    from sglang_w4afp8.errors import ConfigError

    known = {variable.name: variable for variable in env.VARIABLES}
    for name, variable in known.items():
        if not os.environ.get(name):
            continue
        try:
            yield Row(OK, name, variable.get())
        except ConfigError as error:
            yield Row(FAIL, name, f"{error.found}: {error.why}", error.ways[0])
    for name in sorted(os.environ):
        if name.startswith("SGLANG_W4AFP8_") and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            cure = f"export {near[0]}={os.environ[name]}" if near else f"unset {name}"
            yield Row(WARN, name, "is not a variable of this package and has no effect", cure)
        elif name.startswith(("NCCL_", "GLOO_", "SGLANG_")) and name not in known:
            yield Row(OK, name, os.environ[name])
    if not env.STRICT.is_on():
        yield Row(
            WARN,
            env.STRICT.name,
            "0: should the plugin ever refuse to register, SGLang goes on with its own method",
            f"export {env.STRICT.name}=1 in service",
        )


PROBES: tuple[Probe, ...] = (
    python,
    package,
    torch,
    sglang,
    entry_point,
    registration,
    gpus,
    kernels,
    tuning,
    shared_memory,
    limits,
    doctor_machine.processes,
    doctor_machine.interfaces,
    doctor_machine.rdma,
    doctor_machine.clock,
    doctor_machine.disk,
    variables,
)
SLOW: frozenset[Probe] = frozenset((registration,))
