#!/usr/bin/env python3
"""Applies the patch series to a SGLang checkout or an installed package, and takes it off again.

    python patches/apply.py check|apply|revert|status [TARGET] [--series NAME] [--upto N]

TARGET is a git checkout of SGLang, a folder that holds the package ``sglang``, or that package;
without it, the one that this Python would import. In a package the patches' tests and documents are
left out, because a package has no place for them.

Nothing but the standard library is used, and neither ``git`` nor ``patch``: inside a virtual
environment that lies in a git repository, ``git apply`` skips every file and reports success.
Context must match exactly. Everything is worked out in memory first; then a record of the change is
written beside the package, then each file is replaced as a whole. Every file is thereby always
either the original or the patched one, the record knows the hash of both, and an interrupted run
can be finished or taken back. After ``revert`` each file has its original hash again.

Exit code 0: done, or nothing to do. 1: refused, nothing was changed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from unified_diff import PatchError, Series, reversed_patch, sha256_of

HERE = Path(__file__).resolve().parent
RECORD = ".sglang-w4afp8-patches.json"


def all_series() -> dict[str, Series]:
    """Every series beside this script, by folder name."""
    return {path.parent.name: Series.read(path.parent) for path in sorted(HERE.glob("*/series"))}


@dataclass(frozen=True)
class Target:
    """A tree to patch.

    Attributes:
        root: paths of ``files`` are relative to it.
        is_checkout: whether ``root`` is a repository (``python/sglang``, tests and documents) or
            the folder around an installed ``sglang``.
    """

    root: Path
    is_checkout: bool

    @classmethod
    def find(cls, given: Path | None) -> Target:
        """Recognise ``given``, or find the package that this Python would import."""
        if given is None:
            spec = importlib.util.find_spec("sglang")
            if spec is None or not spec.submodule_search_locations:
                raise _no_target("this Python has no package sglang")
            given = Path(next(iter(spec.submodule_search_locations)))
        given = given.resolve()
        if given.name == "sglang" and (given / "srt").is_dir():
            given = given.parent
        if (given / "python/sglang/srt").is_dir():
            return cls(given, True)
        if (given / "sglang/srt").is_dir():
            # python/ of a checkout: take the whole of it, as a record there says it was patched.
            record = _read(given / "sglang" / RECORD)
            is_inside = given.name == "python" and (
                json.loads(record)["checkout"] if record else (given / "pyproject.toml").is_file()
            )
            return cls(given.parent if is_inside else given, is_inside)
        raise _no_target(f"{given} holds neither python/sglang/srt nor sglang/srt")

    @property
    def package(self) -> Path:
        """The package's folder."""
        return self.root / ("python/sglang" if self.is_checkout else "sglang")

    @property
    def version(self) -> str | None:
        """The release as the package's files tell it; a checkout's do not."""
        for info in self.package.parent.glob("sglang-*.dist-info"):
            return info.name.removeprefix("sglang-").removesuffix(".dist-info")
        return None

    def place(self, path: str) -> Path | None:
        """Where the repository's ``path`` lies here; None if it has no place here."""
        if self.is_checkout:
            return self.root / path
        inside = path.removeprefix("python/")
        return None if inside == path else self.root / inside

    @property
    def record(self) -> Path:
        """The note of what was changed; exists while patches are applied."""
        return self.package / RECORD


def _no_target(found: str) -> PatchError:
    return PatchError(
        found,
        "there is no SGLang to patch",
        ["name one: a checkout, a site-packages folder or the package's own folder"],
    )


def choose(target: Target, wanted: str | None) -> Series:
    """The series for ``target``: the one asked for, of its release, or the only one that applies.

    Raises:
        PatchError: no series fits.
    """
    known = all_series()
    if wanted is not None:
        if wanted not in known:
            raise PatchError(
                f"--series {wanted}", "there is no such series", [f"--series {n}" for n in known]
            )
        return known[wanted]
    reasons = []
    for series in known.values():
        if target.version == series.release:
            return series
        if target.version is None:
            try:
                plan(target, series, len(series.patches))
                return series
            except PatchError as error:
                reasons.append(str(error).splitlines()[0])
    found = f"{target.package} is sglang {target.version or 'of an unknown release'}"
    releases = ", ".join(series.release for series in known.values())
    raise PatchError(
        "; ".join([found, *reasons]),
        f"there are series for {releases}",
        [f"pip install sglang=={s.release}" for s in reversed(known.values())]
        + ["--series NAME tries one all the same; it applies only if every line matches"],
    )


Change = tuple[Path, str | None, str]


def plan(target: Target, series: Series, count: int) -> list[Change]:
    """(file, text before or None, text after) for the first ``count`` patches together.

    Raises:
        PatchError: a patch does not fit.
    """
    before: dict[Path, str | None] = {}
    after: dict[Path, str] = {}
    for patch in series.patches[:count]:
        for change in patch.files:
            place = target.place(change.path)
            if place is None:
                continue
            if place not in before:
                before[place] = _read(place)
            after[place] = change.run(after.get(place, before[place]), patch.name)
    return [(place, before[place], after[place]) for place in after]


def apply(target: Target, series: Series, count: int) -> str:
    """Apply the first ``count`` patches, all or nothing; returns what was done."""
    record = _record(target)
    if record is not None:
        _check_record(target, record)
        same = record["series"] == series.name and record["patches"] == _names(series, count)
        if same and all(_hash_of(p) == new for p, _, new in _recorded(target, record)):
            return f"{series.name}: patches {_span(record)} are applied already"
        raise PatchError(
            f"{record['series']}: patches {_span(record)} are applied to {target.package}, in part "
            "or in another number than asked for",
            "a series is applied as a whole to the original files",
            [f"python patches/apply.py revert {target.root}, then apply again"],
        )
    changes = plan(target, series, count)
    files = {
        str(place.relative_to(target.root)): [
            sha256_of(old) if old is not None else None,
            sha256_of(new),
        ]
        for place, old, new in changes
    }
    note = {
        "series": series.name,
        "checkout": target.is_checkout,
        "patches": _names(series, count),
        "files": files,
    }
    _write(target.record, json.dumps(note, indent=1) + "\n")
    _write_all(target, [(place, new) for place, _, new in changes])
    return f"{series.name}: applied {count} patches to {len(changes)} files of {target.package}"


def revert(target: Target) -> str:
    """Take the recorded patches off again, all or nothing; returns what was done."""
    record = _record(target)
    if record is None:
        return f"no patches are applied to {target.package}"
    _check_record(target, record)
    series = all_series().get(record["series"])
    count = len(record["patches"])
    if series is None or _names(series, count) != record["patches"]:
        raise PatchError(
            f"the patches applied to {target.package} are not those of {HERE / record['series']}",
            "taking back a change needs the very patches that made it",
            ["use the apply.py and patches of that time", "reinstall SGLang"],
        )
    restored: list[tuple[Path, str | None]] = []
    for place, old, new in _recorded(target, record):
        if _hash_of(place) == old:
            continue
        text = _read(place) if old is not None else None
        for patch in reversed(series.patches[:count]):
            for change in patch.files:
                if text is not None and target.place(change.path) == place:
                    text = reversed_patch(change).run(text, patch.name)
        if (None if text is None else sha256_of(text)) != old:
            raise AssertionError(f"{place}: taking back {new} does not give {old}")
        restored.append((place, text))
    _write_all(target, restored)
    target.record.unlink()
    return f"{series.name}: {count} patches taken off {len(restored)} files of {target.package}"


def status(target: Target) -> Iterator[str]:
    """Lines about ``target``: release, what is applied, what is not as it should be."""
    yield f"{target.package}: {'checkout' if target.is_checkout else 'package'}, " + (
        f"sglang {target.version}" if target.version else "release unknown"
    )
    record = _record(target)
    if record is None:
        yield "no patches applied"
        return
    _check_record(target, record)
    states = [_hash_of(p) == new for p, _, new in _recorded(target, record)]
    done = "applied" if all(states) else f"interrupted: {sum(states)} of {len(states)} files"
    yield f"{record['series']}: {done}"
    yield from (f"  {patch['name']}" for patch in record["patches"])


def _record(target: Target) -> dict | None:
    text = _read(target.record)
    return None if text is None else json.loads(text)


def _recorded(target: Target, record: dict) -> Iterator[tuple[Path, str | None, str]]:
    for path, (old, new) in record["files"].items():
        yield target.root / path, old, new


def _check_record(target: Target, record: dict) -> None:
    changed = [p for p, old, new in _recorded(target, record) if _hash_of(p) not in (old, new)]
    if changed:
        raise PatchError(
            f"{len(changed)} of {len(record['files'])} patched files were changed since, the first "
            f"is {changed[0]}",
            "they are neither the original nor the patched ones, so this change would be lost",
            [
                "undo the change",
                f"after SGLang was installed anew, delete the record that stayed: {target.record}",
            ],
        )


def _names(series: Series, count: int) -> list[dict[str, str]]:
    return [{"name": p.name, "sha256": p.sha256} for p in series.patches[:count]]


def _span(record: dict) -> str:
    return f"{record['patches'][0]['name'][:4]}…{record['patches'][-1]['name'][:4]}"


def _hash_of(path: Path) -> str | None:
    text = _read(path)
    return None if text is None else sha256_of(text)


def _read(path: Path) -> str | None:
    try:
        return path.read_bytes().decode()
    except FileNotFoundError:
        return None


def _write(path: Path, text: str) -> None:
    """Replace a file as a whole. Not in place: installers may share it with their cache."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, name)
        else:
            os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _write_all(target: Target, changes: Sequence[tuple[Path, str | None]]) -> None:
    """Write or, for None, remove every file; put all of them back if one fails."""
    done: list[tuple[Path, str | None]] = []
    try:
        for path, text in changes:
            before = _read(path)
            if text is None:
                _remove(target, path)
            else:
                _write(path, text)
            done.append((path, before))
    except BaseException:
        for path, before in done:
            _remove(target, path) if before is None else _write(path, before)
        raise


def _remove(target: Target, path: Path) -> None:
    """Remove a file that a patch had created, and the folders that this leaves empty."""
    path.unlink()
    folder = path.parent
    while folder != target.root and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent


def _refusal(target: Target, error: OSError) -> PatchError:
    return PatchError(
        f"{error}",
        f"the files of {target.package} must be writable; what was written is taken back",
        ["run as the owner of the environment", "patch a copy: an unpacked wheel on PYTHONPATH"],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=("check", "apply", "revert", "status"))
    parser.add_argument("target", nargs="?", type=Path, help="default: this Python's sglang")
    parser.add_argument("--series", help="folder name; default: the one of the target's release")
    parser.add_argument("--upto", type=int, metavar="N", help="only the patches up to number N")
    options = parser.parse_args(arguments)
    try:
        target = Target.find(options.target)
        for line in _run(target, options):
            print(line)
    except PatchError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _run(target: Target, options: argparse.Namespace) -> Iterator[str]:
    if options.command == "status":
        yield from status(target)
        return
    if options.command == "revert":
        try:
            yield revert(target)
        except OSError as error:
            raise _refusal(target, error) from error
        return
    record = _record(target)
    series = choose(target, options.series or (record and record["series"]))
    count = series.count_upto(options.upto)
    if options.command == "apply":
        try:
            yield apply(target, series, count)
        except OSError as error:
            if not _is_touched(target):
                target.record.unlink(missing_ok=True)
            raise _refusal(target, error) from error
        return
    if record is not None:
        yield from status(target)
        return
    changes = plan(target, series, count)
    yield f"{series.name}: {count} patches fit {target.package} ({len(changes)} files)"
    yield from (f"  {patch.name}: {patch.subject}" for patch in series.patches[:count])


def _is_touched(target: Target) -> bool:
    record = _record(target)
    return record is not None and any(_hash_of(p) != old for p, old, _ in _recorded(target, record))


if __name__ == "__main__":
    sys.exit(main())
