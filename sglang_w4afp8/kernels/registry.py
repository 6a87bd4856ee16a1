"""Which backend runs a problem: an ordered table, one choice, and the reasons against the others.

``auto`` takes the first in :data:`BACKENDS` that supports the problem; a backend named in
``SGLANG_W4AFP8_MOE_BACKEND`` is taken or refused, never replaced. ``doctor``, ``plan`` and the
support table in the README print :func:`explain`, so they cannot say anything else than what
:func:`select` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

from sglang_w4afp8 import env
from sglang_w4afp8.errors import BackendError
from sglang_w4afp8.kernels.base import MoEBackend, MoEProblem

BACKENDS: dict[str, str] = {
    # Fastest first. A value is "module:class"; modules are imported when first asked for, and the
    # libraries behind them when first run.
    "hopper": "sglang_w4afp8.kernels.hopper.backend:HopperBackend",
    "cutlass": "sglang_w4afp8.srt.cutlass:CutlassBackend",
    "torch": "sglang_w4afp8.kernels.torch_reference:TorchBackend",
}

_instances: dict[str, MoEBackend] = {}


@dataclass(frozen=True)
class Verdict:
    """One row of :func:`explain`: a backend's name and why it cannot run the problem, or None."""

    backend: str
    reason: str | None


def get_backend(name: str) -> MoEBackend:
    """The backend called ``name``.

    Raises:
        BackendError: there is none.
    """
    if name not in BACKENDS:
        raise BackendError(
            f"{env.MOE_BACKEND.name}={name!r}",
            f"the known backends are auto, {', '.join(BACKENDS)}",
            [f"export {env.MOE_BACKEND.name}=auto"],
        )
    if name not in _instances:
        module_name, _, class_name = BACKENDS[name].partition(":")
        _instances[name] = getattr(import_module(module_name), class_name)()
    return _instances[name]


def explain(problem: MoEProblem) -> list[Verdict]:
    """What each backend says of ``problem``, in the order ``auto`` tries them."""
    return [Verdict(name, get_backend(name).supports(problem)) for name in BACKENDS]


def select(problem: MoEProblem, wanted: str | None = None) -> MoEBackend:
    """Choose the backend for ``problem``.

    Args:
        problem: the layer.
        wanted: a backend's name or ``auto``; None reads ``SGLANG_W4AFP8_MOE_BACKEND``.

    Raises:
        BackendError: the named backend cannot run the problem, or none can.
    """
    wanted = wanted or env.MOE_BACKEND.get()
    verdicts = explain(problem)
    usable = [verdict.backend for verdict in verdicts if verdict.reason is None]
    if wanted != "auto":
        backend = get_backend(wanted)
        reason = backend.supports(problem)
        if reason is not None:
            raise BackendError(
                f"{env.MOE_BACKEND.name}={wanted}",
                f"{reason} ({_describe(problem)})",
                [f"export {env.MOE_BACKEND.name}={name}" for name in ("auto", *usable)],
            )
        return backend
    if not usable:
        reasons = "; ".join(f"{verdict.backend}: {verdict.reason}" for verdict in verdicts)
        raise BackendError(
            f"no backend for {_describe(problem)}",
            reasons,
            ["another --tp or --ep-size, where the reason is a size: sglang-w4afp8 plan MODEL"],
        )
    return get_backend(usable[0])


def _describe(problem: MoEProblem) -> str:
    return (
        f"{problem.num_experts} experts, hidden {problem.hidden_size}, "
        f"{problem.intermediate_size} columns of {problem.columns.full_size}, "
        f"groups {problem.group_size}/{problem.w2_group_size}, {problem.scheme} activations, "
        f"{problem.dtype}, {'rows of a dispatcher, ' if problem.dispatched else ''}"
        f"{problem.device.name}"
    )
