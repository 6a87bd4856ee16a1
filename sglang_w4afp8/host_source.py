"""Looks up names in SGLang's source without importing it.

Importing the modules that this package relies on takes seconds and torch; parsing them takes a few
hundredths of a second and works as well on a wheel that is not installed. This module owns finding
the text (:class:`InstalledSource`, :class:`WheelSource`) and the definition in it
(:class:`Resolver`). Which names matter, and what they should look like, is
:mod:`sglang_w4afp8.compat`'s business. Standard library only.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

PACKAGE = "sglang"
_MAX_REEXPORTS = 6

Function = ast.FunctionDef | ast.AsyncFunctionDef


class HostSource(Protocol):
    """Where SGLang's text comes from."""

    label: str
    """For messages: a path or file name."""
    version: str | None
    """The release, None when it cannot be told."""

    def read(self, module: str) -> str | None:
        """The source of a dotted module name, None if there is no such module."""
        ...


class InstalledSource:
    """The ``sglang`` that this interpreter would import.

    Raises:
        ModuleNotFoundError: there is none.
    """

    def __init__(self) -> None:
        # A top-level name: find_spec does not import anything for it.
        spec = importlib.util.find_spec(PACKAGE)
        locations = list(spec.submodule_search_locations or ()) if spec else []
        if not locations:
            raise ModuleNotFoundError(f"no package named {PACKAGE!r}", name=PACKAGE)
        self._root = Path(locations[0])
        self.label = str(self._root)
        self.version = self._find_version()

    def read(self, module: str) -> str | None:
        """See :class:`HostSource`."""
        for relative in _candidates(module):
            path = self._root.parent / relative
            if path.is_file():
                return path.read_text(encoding="utf-8")
        return None

    def _find_version(self) -> str | None:
        try:
            return importlib.metadata.version(PACKAGE)
        except importlib.metadata.PackageNotFoundError:
            # A source tree on PYTHONPATH has no metadata, but usually this generated file.
            return _literal_version(self.read(f"{PACKAGE}._version"))


class WheelSource:
    """A released wheel file, read in place.

    Raises:
        OSError, zipfile.BadZipFile: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.label = path.name
        self._archive = zipfile.ZipFile(path)
        self._names = frozenset(self._archive.namelist())
        # {distribution}-{version}-{python tag}-{abi}-{platform}.whl
        parts = path.name.split("-")
        self.version = parts[1] if len(parts) > 2 else None

    def read(self, module: str) -> str | None:
        """See :class:`HostSource`."""
        for relative in _candidates(module):
            if relative in self._names:
                return self._archive.read(relative).decode("utf-8")
        return None


def _candidates(module: str) -> tuple[str, str]:
    base = module.replace(".", "/")
    return f"{base}.py", f"{base}/__init__.py"


def _literal_version(source: str | None) -> str | None:
    for node in ast.parse(source or "").body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            if "__version__" in names and isinstance(node.value.value, str):
                return node.value.value
    return None


@dataclass(frozen=True)
class Definition:
    """Where a target leads: the module that really defines it, and the node."""

    module: str
    node: ast.AST


class Resolver:
    """Finds ``package.module:Name.attribute`` in a source, through re-exports and base classes."""

    def __init__(self, source: HostSource) -> None:
        self.source = source
        self._trees: dict[str, ast.Module | None] = {}

    def __call__(self, target: str) -> Definition | None:
        """The definition of ``target``, None if there is none.

        Raises:
            SyntaxError: the module cannot be parsed by this Python.
        """
        module, _, path = target.partition(":")
        names = path.split(".")
        found = self._in_module(module, names[0], _MAX_REEXPORTS)
        for name in names[1:]:
            if found is None or not isinstance(found.node, ast.ClassDef):
                return None
            found = self._in_class(found, name, _MAX_REEXPORTS)
        return found

    def _tree(self, module: str) -> ast.Module | None:
        if module not in self._trees:
            source = self.source.read(module)
            self._trees[module] = None if source is None else ast.parse(source)
        return self._trees[module]

    def _in_module(self, module: str, name: str, depth: int) -> Definition | None:
        tree = self._tree(module)
        if tree is None or depth == 0:
            return None
        found: Definition | None = None
        stars: list[str] = []
        # The last definition wins, as at run time.
        for node in _statements(tree.body):
            if _defines(node, name):
                found = Definition(module, node)
            elif isinstance(node, ast.ImportFrom):
                origin = _absolute(node, module, self._is_package(module))
                for alias in node.names:
                    if alias.name == "*":
                        stars.append(origin)
                    elif (alias.asname or alias.name) == name:
                        found = self._in_module(origin, alias.name, depth - 1) or found
        for origin in stars:
            found = found or self._in_module(origin, name, depth - 1)
        return found

    def _in_class(self, owner: Definition, name: str, depth: int) -> Definition | None:
        assert isinstance(owner.node, ast.ClassDef)
        found: Definition | None = None
        for node in _statements(owner.node.body):
            if _defines(node, name):
                found = Definition(owner.module, node)
        if found is None:
            found = _set_on_self(owner, name)
        for base in owner.node.bases:
            if found is None and depth and isinstance(base, ast.Name):
                parent = self._in_module(owner.module, base.id, _MAX_REEXPORTS)
                if parent is not None and isinstance(parent.node, ast.ClassDef):
                    found = self._in_class(parent, name, depth - 1)
        return found

    def _is_package(self, module: str) -> bool:
        # A package's own __init__ is read under the package's name; only relative imports care.
        return self.source.read(f"{module}.__init__") is not None


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module or class, into ``if`` and ``try`` but not ``if TYPE_CHECKING``."""
    for node in body:
        yield node
        if isinstance(node, ast.If):
            if "TYPE_CHECKING" not in ast.unparse(node.test):
                yield from _statements(node.body)
            yield from _statements(node.orelse)
        elif isinstance(node, ast.Try):
            yield from _statements(node.body)
            yield from _statements([s for handler in node.handlers for s in handler.body])
            yield from _statements(node.orelse)


def _defines(node: ast.stmt, name: str) -> bool:
    if isinstance(node, Function | ast.ClassDef):
        return node.name == name
    if isinstance(node, ast.Assign):
        return any(isinstance(t, ast.Name) and t.id == name for t in node.targets)
    # An annotation alone declares a type, not a value.
    if isinstance(node, ast.AnnAssign) and node.value is not None:
        return isinstance(node.target, ast.Name) and node.target.id == name
    return False


def _absolute(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + (1 if is_package else 0)]
    return ".".join([*parts, node.module] if node.module else parts)


def _set_on_self(owner: Definition, name: str) -> Definition | None:
    for node in ast.walk(owner.node):
        if name in assigned_attributes(node):
            return Definition(owner.module, node)
    return None


def assigned_attributes(node: ast.AST) -> list[str]:
    """The names x for which this one statement assigns ``self.x``."""
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign) and node.value is not None:
        targets = [node.target]
    flat = [e for t in targets for e in (t.elts if isinstance(t, ast.Tuple) else [t])]
    return [
        t.attr
        for t in flat
        if isinstance(t, ast.Attribute) and isinstance(t.value, ast.Name) and t.value.id == "self"
    ]


@dataclass(frozen=True)
class Parameters:
    """A function's parameters, without ``self`` or ``cls``.

    Attributes:
        names: all that can be passed by keyword, in order, ``**`` last if it takes any keyword.
        required: those of them without a default.
    """

    names: tuple[str, ...]
    required: tuple[str, ...]

    @classmethod
    def of(cls, node: Function, *, is_method: bool) -> Parameters:
        """Read them from a ``def``."""
        args = node.args
        positional = [*args.posonlyargs, *args.args]
        defaults = [None] * (len(positional) - len(args.defaults)) + list(args.defaults)
        pairs = [(arg.arg, default) for arg, default in zip(positional, defaults, strict=True)]
        decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
        if is_method and "staticmethod" not in decorators:
            pairs = pairs[1:]
        pairs += [
            (arg.arg, default)
            for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)
        ]
        names = [name for name, _ in pairs] + (["**"] if args.kwarg else [])
        return cls(tuple(names), tuple(name for name, default in pairs if default is None))


def find_calls(node: ast.AST, callee: str) -> list[ast.Call]:
    """The calls of ``callee``, spelt as there (``self.method``, ``a.b.c``), inside ``node``."""
    return [
        call
        for call in ast.walk(node)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == callee
    ]
