"""What this package needs from SGLang, and the gate that compares it with what is installed.

The contract is :data:`HOOKS`: every upstream name that ``srt/`` subclasses, calls or reads, with
the signature it was written against. :func:`check_for_registration` compares them in every process
before anything is installed, by reading SGLang's source (see :mod:`sglang_w4afp8.host_source`), so
an upstream refactor ends in one message with the reason and not in wrong output. A version in
:data:`SUPPORTED_SGLANG` that nobody tested but whose hooks fit is a warning.

``python -m sglang_w4afp8.compat [WHEEL]`` prints the comparison for the installed SGLang or for a
wheel file; exit code 1 on a mismatch. Standard library and ``packaging`` only.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from sglang_w4afp8.errors import HostError
from sglang_w4afp8.hooks import HOOKS, Hook, Kind
from sglang_w4afp8.host_source import (
    Definition,
    Function,
    HostSource,
    InstalledSource,
    Parameters,
    Resolver,
    WheelSource,
    assigned_attributes,
    find_calls,
)

# Repeated in pyproject.toml as the extra "sglang"; a test compares the two.
SUPPORTED_SGLANG = ">=0.5.16,<0.6"
TESTED = ("0.5.16", "0.5.23")

_SHOWN = 8  # mismatches in one message, so that it stays one screen
_COMMAND = "python -m sglang_w4afp8.compat"

Resolve = Callable[[str], Definition | None]


@dataclass(frozen=True)
class Report:
    """What the gate found.

    Attributes:
        label: which SGLang was looked at.
        version: its version, None if there is none.
        problems: why this package must not register; empty when it may.
        warnings: what a user should know although it may.
    """

    label: str
    version: str | None
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether registering is safe."""
        return not self.problems

    def error(self) -> HostError:
        """The problems as one error of one screen."""
        shown = list(self.problems[:_SHOWN])
        if len(self.problems) > _SHOWN:
            shown.append(f"and {len(self.problems) - _SHOWN} more: {_COMMAND}")
        tested = " and ".join(TESTED)
        return HostError(
            f"sglang {self.version or 'not found'} ({self.label}) does not fit this package:"
            + "".join(f"\n    {line}" for line in shown),
            f"it was written for sglang{SUPPORTED_SGLANG} (tested: {tested}); on another one it "
            "could load weights wrongly without a message, so nothing was registered",
            [
                f'pip install "sglang=={TESTED[-1]}", on every node',
                "pip install --upgrade sglang-w4afp8, on every node",
                "export SGLANG_W4AFP8_ENABLE=0 to serve with SGLang's own w4afp8 method",
            ],
        )


def check_for_registration(source: HostSource | None = None, *, thorough: bool = False) -> Report:
    """Compare an SGLang with what this package needs. Costs about 0.1 s and imports nothing.

    Args:
        source: which SGLang; None takes the installed one.
        thorough: also look at the hooks that a running process has proved already.
    """
    if source is None:
        try:
            source = InstalledSource()
        except ModuleNotFoundError as error:
            return Report("this environment", None, (str(error),))
    warnings: list[str] = []
    problems = version_problems(source.version)
    if not problems:
        # Outside the range every hook may differ; listing them would bury the reason.
        problems = hook_problems(Resolver(source), source.version, thorough=thorough)
    if not problems and source.version not in TESTED:
        warnings.append(
            f"sglang {source.version} was not tested (tested: {', '.join(TESTED)}); all names and "
            "signatures this package relies on are as expected"
        )
    return Report(source.label, source.version, tuple(problems), tuple(warnings))


def version_problems(version: str | None) -> list[str]:
    """Why ``version`` lies outside :data:`SUPPORTED_SGLANG`; empty if it does not."""
    if version is None:
        return ["its version cannot be told: no package metadata and no _version.py"]
    try:
        parsed = Version(version)
    except InvalidVersion:
        return [f"its version {version!r} is not a version number"]
    if not SpecifierSet(SUPPORTED_SGLANG).contains(parsed, prereleases=True):
        return [f"version {version} lies outside the supported range {SUPPORTED_SGLANG}"]
    return []


def hook_problems(
    resolve: Resolve,
    version: str | None = None,
    *,
    hooks: Sequence[Hook] = HOOKS,
    thorough: bool = True,
) -> list[str]:
    """How the hooks differ from what :data:`HOOKS` says, one line each.

    Args:
        resolve: finds the definition of ``module:Name.attribute``; see ``host_source.Resolver``.
        version: leaves out hooks that belong to other versions; None checks all.
        hooks: the table.
        thorough: also check those marked ``every_process=False``.
    """
    problems: list[str] = []
    for hook in hooks:
        if not (thorough or hook.every_process) or not hook.applies_to(version):
            continue
        try:
            found = resolve(hook.target)
            problem = "is missing" if found is None else _CHECKS[hook.kind](hook, found)
        except (SyntaxError, OSError, UnicodeDecodeError) as error:
            problem = f"cannot be read: {error}"
        if problem is not None:
            problems.append(f"{hook.target} {problem} (used by {hook.used_by}: {hook.why})")
    return problems


def _check_override(hook: Hook, found: Definition) -> str | None:
    parameters = _parameters(hook, found)
    if parameters is None:
        return "is not a function"
    if parameters.names != hook.names:
        return f"takes ({', '.join(parameters.names)}), expected ({', '.join(hook.names)})"
    return None


def _check_call(hook: Hook, found: Definition) -> str | None:
    parameters = _parameters(hook, found)
    if parameters is None:
        return "is not a function"
    unknown = [n for n in hook.names if n not in parameters.names]
    if unknown and "**" not in parameters.names:
        return f"does not take {', '.join(unknown)} but ({', '.join(parameters.names)})"
    missing = [n for n in parameters.required if n not in hook.names]
    if missing:
        return f"now also requires {', '.join(missing)}"
    return None


def _check_attribute(hook: Hook, found: Definition) -> str | None:
    if not hook.names:
        return None
    if isinstance(found.node, ast.ClassDef):
        members = {
            target.id
            for node in found.node.body
            if isinstance(node, ast.Assign | ast.AnnAssign)
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name)
        }
        missing = [n for n in hook.names if n not in members]
        return f"has no {', '.join(missing)}" if missing else None
    value = getattr(found.node, "value", None)
    if not isinstance(value, ast.Dict):
        return "is not a dict literal any more"
    keys = {key.value for key in value.keys if isinstance(key, ast.Constant)}
    missing = [n for n in hook.names if n not in keys]
    return f"has no key {', '.join(missing)}" if missing else None


def _check_source(hook: Hook, found: Definition) -> str | None:
    calls = find_calls(found.node, hook.callee)
    if not calls:
        return f"does not call {hook.callee}() any more"
    for call in calls:
        passed = {keyword.arg for keyword in call.keywords}
        missing = [n for n in hook.names if n not in passed]
        if missing:
            return f"calls {hook.callee}() without the keywords {', '.join(missing)}"
    first = min(call.lineno for call in calls)
    before = {
        name
        for node in ast.walk(found.node)
        if getattr(node, "lineno", first) < first
        for name in assigned_attributes(node)
    }
    late = [n for n in hook.after if n not in before]
    if late:
        return f"does not set self.{', self.'.join(late)} before it calls {hook.callee}()"
    return None


_CHECKS: dict[Kind, Callable[[Hook, Definition], str | None]] = {
    Kind.OVERRIDE: _check_override,
    Kind.CALL: _check_call,
    Kind.ATTRIBUTE: _check_attribute,
    Kind.SOURCE: _check_source,
}


def _parameters(hook: Hook, found: Definition) -> Parameters | None:
    is_method = "." in hook.target.partition(":")[2]
    if isinstance(found.node, Function):
        return Parameters.of(found.node, is_method=is_method)
    if isinstance(found.node, ast.ClassDef):
        return _constructor(found.node)
    return None


def _constructor(node: ast.ClassDef) -> Parameters | None:
    for member in node.body:
        if isinstance(member, Function) and member.name == "__init__":
            return Parameters.of(member, is_method=True)
    # A dataclass or NamedTuple: its annotated fields, in order.
    fields = [
        (member.target.id, member.value)
        for member in node.body
        if isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name)
    ]
    if not fields:
        return None
    return Parameters(
        tuple(name for name, _ in fields), tuple(name for name, value in fields if value is None)
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the comparison; 0 if this package can register, 1 if not."""
    parser = argparse.ArgumentParser(prog=_COMMAND, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheel", nargs="?", type=Path, help="a wheel file; default: the installed")
    arguments = parser.parse_args(argv)
    source = WheelSource(arguments.wheel) if arguments.wheel else None
    report = check_for_registration(source, thorough=True)
    print(f"sglang {report.version or 'not found'} ({report.label})")
    for warning in report.warnings:
        print(f"[warn] {warning}")
    for problem in report.problems:
        print(f"[FAIL] {problem}")
    if report.ok:
        count = sum(hook.applies_to(report.version) for hook in HOOKS)
        print(f"[ok  ] {count} hooks as expected, version in {SUPPORTED_SGLANG}")
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
