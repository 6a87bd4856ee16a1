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
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from sglang_w4afp8.contract import Hook, check
from sglang_w4afp8.errors import HostError
from sglang_w4afp8.hooks import HOOKS
from sglang_w4afp8.host_source import (
    Definition,
    HostSource,
    InstalledSource,
    Resolver,
    WheelSource,
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
        problems = hook_problems(Resolver(source), thorough=thorough)
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
    *,
    hooks: Sequence[Hook] = HOOKS,
    thorough: bool = True,
) -> list[str]:
    """How the hooks differ from what :data:`HOOKS` says, one line each.

    Args:
        resolve: finds the definition of ``module:Name.attribute``; see ``host_source.Resolver``.
        hooks: the table.
        thorough: also check those marked ``every_process=False``.
    """
    problems: list[str] = []
    for hook in hooks:
        if not (thorough or hook.every_process):
            continue
        try:
            found = resolve(hook.target)
            if found is None and (hook.optional or (hook.or_else and resolve(hook.or_else))):
                continue
            problem = "is missing" if found is None else check(hook, found)
        except (SyntaxError, OSError, UnicodeDecodeError) as error:
            problem = f"cannot be read: {error}"
        if problem is not None:
            problems.append(f"{hook.target} {problem} (used by {hook.used_by}: {hook.why})")
    return problems


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
        print(f"[ok  ] {len(HOOKS)} hooks as expected, version in {SUPPORTED_SGLANG}")
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
