"""A strict reader and applier of ``git format-patch`` files; the standard library only.

Every context line must match exactly. A hunk may have moved within its file if its lines occur
exactly once. Files are changed or created, never deleted or renamed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")


class PatchError(Exception):
    """A refusal: what was found, why it cannot work, numbered ways out."""

    def __init__(self, found: str, why: str, ways: Sequence[str]) -> None:
        lines = [found, f"  Why this cannot work: {why}", "  Ways out:"]
        super().__init__("\n".join(lines + [f"    ({i}) {w}" for i, w in enumerate(ways, 1)]))


@dataclass(frozen=True)
class Hunk:
    """``before`` at 1-based line ``start`` becomes ``after``."""

    start: int
    before: tuple[str, ...]
    after: tuple[str, ...]


@dataclass(frozen=True)
class FilePatch:
    """What one patch does to one file; ``creates`` means that the file must not exist before."""

    path: str
    creates: bool
    hunks: tuple[Hunk, ...]

    def run(self, text: str | None, patch: str) -> str:
        """The file's text after this patch.

        Args:
            text: its text before, None if there is no such file.
            patch: the patch's name, for messages.

        Raises:
            PatchError: the file is missing, is there already, or reads differently.
        """
        if self.creates:
            if text is not None:
                raise _mismatch(patch, self.path, "exists already, and this patch creates it")
            return "\n".join(self.hunks[0].after) + "\n"
        if text is None:
            raise _mismatch(patch, self.path, "does not exist, and this patch changes it")
        lines = text.split("\n")
        shift = 0
        for number, hunk in enumerate(self.hunks, 1):
            at = hunk.start - 1 + shift
            size = len(hunk.before)
            if tuple(lines[at : at + size]) != hunk.before:
                places = [i for i in range(len(lines)) if tuple(lines[i : i + size]) == hunk.before]
                if len(places) != 1:
                    raise _mismatch(
                        patch,
                        self.path,
                        f"hunk {number} of {len(self.hunks)}: its {size} lines are found "
                        f"{len(places)} times, and not at line {at + 1}",
                    )
                shift += places[0] - at
                at = places[0]
            lines[at : at + size] = hunk.after
            shift += len(hunk.after) - size
        return "\n".join(lines)


def _mismatch(patch: str, path: str, what: str) -> PatchError:
    return PatchError(
        f"{patch}: {path} {what}",
        "the series was made for one release, and applied elsewhere it could change the wrong "
        "lines; nothing was changed",
        [
            "python patches/apply.py status TARGET shows what TARGET is",
            "install the release that the series names, or choose the other series with --series",
            "serve without patches: the plugin does not need them",
        ],
    )


@dataclass(frozen=True)
class Patch:
    """One file of a series."""

    name: str
    subject: str
    sha256: str
    files: tuple[FilePatch, ...]

    @classmethod
    def read(cls, path: Path) -> Patch:
        """Parse a file as ``git format-patch`` writes it: text files, changed or created."""
        text = path.read_text(encoding="utf-8")
        header, _, body = text.partition("\ndiff --git ")
        subject = re.search(r"^Subject: (.*(?:\n .*)*)", header, re.M)
        files = tuple(_parse_file(part) for part in ("\n" + body).split("\ndiff --git "))
        name = re.sub(r"\s+", " ", subject[1]) if subject else path.name
        return cls(path.name, name, sha256_of(text), files)


def _parse_file(text: str) -> FilePatch:
    lines = text.split("\n")
    old = next(line[4:] for line in lines if line.startswith("--- "))
    new = next(line[4:] for line in lines if line.startswith("+++ "))
    if not new.startswith("b/"):
        raise ValueError(f"deletes {old}: not supported")
    hunks = []
    position = 0
    while position < len(lines):
        match = _HUNK.match(lines[position])
        position += 1
        if not match:
            continue
        start, before_size, after_size = (int(match[i] or 1) for i in (1, 2, 4))
        before: list[str] = []
        after: list[str] = []
        while len(before) < before_size or len(after) < after_size:
            mark, content = lines[position][:1], lines[position][1:]
            if mark not in "+- ":
                raise ValueError(f"{new}: unexpected line {lines[position]!r}")
            if mark in "- ":
                before.append(content)
            if mark in "+ ":
                after.append(content)
            position += 1
        hunks.append(Hunk(start, tuple(before), tuple(after)))
    return FilePatch(new[2:], old == "/dev/null", tuple(hunks))


@dataclass(frozen=True)
class Series:
    """The patches of one folder for one release, in order."""

    name: str
    release: str
    patches: tuple[Patch, ...]

    @classmethod
    def read(cls, folder: Path) -> Series:
        """Read ``BASE`` (the release) and the files that ``series`` lists."""
        release = (folder / "BASE").read_text().split()[1]
        names = (folder / "series").read_text().split()
        return cls(folder.name, release, tuple(Patch.read(folder / name) for name in names))

    def count_upto(self, number: int | None) -> int:
        """How many patches those numbered up to ``number`` are; all for None.

        Raises:
            PatchError: no patch has this number.
        """
        if number is None:
            return len(self.patches)
        numbers = [int(patch.name[:4]) for patch in self.patches]
        if number not in numbers:
            raise PatchError(
                f"--upto {number}",
                f"{self.name} has the patches {numbers[0]} to {numbers[-1]}",
                [f"--upto {n}" for n in numbers],
            )
        return numbers.index(number) + 1


def reversed_patch(change: FilePatch) -> FilePatch:
    """What takes ``change`` back, for a file that existed before it."""
    shift = 0
    hunks = []
    for hunk in change.hunks:
        hunks.append(Hunk(hunk.start + shift, hunk.after, hunk.before))
        shift += len(hunk.after) - len(hunk.before)
    return FilePatch(change.path, False, tuple(hunks))


def sha256_of(text: str) -> str:
    """Hex digest of the text as UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()
