"""Runs a Python module with the plugin registered, in that process and in those it spawns.

SGLang loads plugins in ``launch_server``, ``sglang serve``, ``Engine`` and its scheduler processes,
but not in tools that build a model runner themselves::

    python -m sglang_w4afp8.run sglang.bench_one_batch --model-path M --tp 8 …

How the children learn of it: a process that ``multiprocessing`` spawns imports its parent's main
module again, by name, as ``__mp_main__``. Here that name is this module's, not the target's. The
child therefore comes through the bottom of this file, registers, and then loads the target just as
it would have been without us, so that the target's functions unpickle as usual.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
import types
from collections.abc import Sequence
from importlib.abc import InspectLoader

from sglang_w4afp8.errors import HostError

# Not a setting: how the name of the target reaches spawned children, at any depth.
_TARGET = "_SGLANG_W4AFP8_RUN_TARGET"
_NAME = "sglang_w4afp8.run"


def main(argv: Sequence[str]) -> None:
    """Register, then run ``argv[0]`` as ``python -m`` would, with the rest as its arguments."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: python -m {_NAME} MODULE [ARGUMENT ...]\n\n{(__doc__ or '').strip()}")
        raise SystemExit(0 if argv else 2)
    _register_or_exit()
    target = argv[0]
    code, origin = _load(target)
    os.environ[_TARGET] = target
    sys.argv = [origin, *argv[1:]]

    # The target's functions must be attributes of __main__ (they are pickled by that name), while
    # __main__'s spec must lead spawned children here.
    module = types.ModuleType("__main__")
    module.__file__ = origin
    module.__spec__ = importlib.util.find_spec(_NAME)
    sys.modules["__main__"] = module
    exec(code, module.__dict__)


def _register_or_exit() -> None:
    from sglang_w4afp8 import plugin

    plugin.register()
    if plugin.status().state is plugin.State.REFUSED:
        # Whoever starts this asked for the plugin; the reason was logged.
        raise SystemExit(1)


def _load(target: str) -> tuple[types.CodeType, str]:
    """The code and file of a module, or of a package's ``__main__``."""
    try:
        spec = importlib.util.find_spec(target)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{target}.__main__")
    except ModuleNotFoundError:
        spec = None
    loader = spec.loader if spec is not None else None
    code = loader.get_code(spec.name) if spec and isinstance(loader, InspectLoader) else None
    if spec is None or code is None:
        raise SystemExit(
            str(
                HostError(
                    f"python -m {_NAME} {target}",
                    f"there is no module {target!r} in this environment",
                    [
                        f"{sys.executable} -m {_NAME} sglang.bench_one_batch --help",
                        "newer SGLang releases keep their benchmarks in sglang.benchmark",
                    ],
                )
            )
        )
    return code, spec.origin or target


def _be_spawned_main() -> dict[str, object]:
    """In a spawned child: register, then the namespace the target's main module would have had."""
    _register_or_exit()
    content = runpy.run_module(os.environ[_TARGET], run_name="__mp_main__", alter_sys=True)
    # Without its dunders: __spec__ must stay ours, for this child's own children.
    return {name: value for name, value in content.items() if not name.startswith("__")}


if __name__ == "__main__":
    main(sys.argv[1:])
elif __name__ == "__mp_main__":
    globals().update(_be_spawned_main())
