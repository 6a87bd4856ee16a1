"""Imports go one way: ``docs/architecture.md`` and the table here say which.

The one deliberate exception is not an import: ``kernels/registry.py`` names the ``cutlass`` backend
of ``srt/`` as a string and loads it when it is first asked for.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sglang_w4afp8

PACKAGE = Path(sglang_w4afp8.__file__).parent
NAME = PACKAGE.name

_PURE = {"errors", "env", "spec", "sharding"}
_TENSORS = {*_PURE, "packing", "layer", "reference"}
# Module or folder -> what else of this package it may import. ``__init__`` is the version.
ALLOWED: dict[str, set[str]] = {
    "__init__": {"plugin"},
    "errors": set(),
    "env": {"errors"},
    "spec": {"errors"},
    "sharding": {"errors", "spec"},
    "packing": {"errors"},
    "layer": {"sharding", "spec"},
    "reference": _TENSORS,
    "checkpoint": _TENSORS,
    "quantize": _TENSORS,
    "kernels": _TENSORS,
    "srt": {*_TENSORS, "checkpoint", "quantize", "kernels"},
    "host_source": set(),
    "contract": {"host_source"},
    "hooks": {"contract", "hooks_deepep", "hooks_weights"},
    "hooks_deepep": {"contract"},
    "hooks_weights": {"contract"},
    "compat": {"contract", "errors", "hooks", "host_source"},
    "plugin": {"__init__", "compat", "env", "errors"},
    "run": {"errors", "plugin"},
    "testing": {*_TENSORS, "checkpoint", "quantize"},
    "tools": {*_TENSORS, "__init__", "checkpoint", "quantize", "kernels", "testing", "compat"},
    "cli": {"__init__", "errors"},
}
# Which outside packages may be imported at all; sglang in one folder only.
OUTSIDE: dict[str, set[str]] = {
    **{part: {"torch"} for part in ("packing", "layer", "reference", "quantize", "kernels")},
    "checkpoint": {"torch", "safetensors"},
    "srt": {"torch", "safetensors", "sglang"},
    "compat": {"packaging"},
    "testing": {"torch", "safetensors", "transformers", "tokenizers", "numpy"},
    "tools": {"torch", "safetensors", "transformers", "numpy"},
}
# Kernel libraries may be missing or broken; inside functions only, where they are needed.
LAZY_OUTSIDE = {"triton", "cuda", "flashinfer", "humming", "vllm", "PIL", "huggingface_hub"}
# Imported before SGLang has decided anything, or in broken environments.
WITHOUT_TORCH = (
    "",
    ".cli",
    ".env",
    ".plugin",
    ".run",
    ".sharding",
    ".spec",
    ".tools.doctor_probes",
)


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def is_own_module(dotted: str) -> bool:
    path = PACKAGE.parent / dotted.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports_of(path: Path) -> list[tuple[str, bool]]:
    """``(dotted name, at module level)`` of every import but those for type checkers."""
    tree = ast.parse(path.read_text())
    inner = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = [ast.Pass()]
    found: list[tuple[str, bool]] = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                deeper = f"{node.module}.{alias.name}"
                names.append(deeper if is_own_module(deeper) else str(node.module))
        found += [(name, id(node) not in inner) for name in names]
    return found


MODULES = sorted(PACKAGE.rglob("*.py"))


def test_the_table_lists_every_part() -> None:
    assert {part_of(path) for path in MODULES} == set(ALLOWED)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    part = part_of(path)
    for name, at_module_level in imports_of(path):
        top, _, rest = name.partition(".")
        if top == NAME:
            target = rest.partition(".")[0] or "__init__"
            assert target == part or target in ALLOWED[part], f"{part} must not import {name}"
        elif top not in sys.stdlib_module_names:
            known = top in OUTSIDE.get(part, set())
            lazy = top in LAZY_OUTSIDE and part in ("kernels", "quantize", "srt", "tools")
            assert known or (lazy and not at_module_level), f"{part} must not import {name}"


def test_the_table_has_no_cycle() -> None:
    """What may be imported may not import back, except the version in ``__init__``."""

    def reachable(part: str, seen: set[str]) -> set[str]:
        for target in ALLOWED[part] - {"__init__"} - seen:
            seen |= {target}
            reachable(target, seen)
        return seen

    for part in ALLOWED:
        others = ALLOWED[part] - {part, "__init__"}
        assert not any(part in reachable(target, set()) for target in others), part


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_light_modules_import_nothing_heavy(module: str) -> None:
    code = (
        f"import sys, {NAME}{module}; "
        "print([m for m in ('torch', 'sglang', 'triton', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
