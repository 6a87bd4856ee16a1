"""``patches/apply.py`` on small trees: both layouts, every refusal, a run that was cut short."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

Digest = Callable[[Path], dict[str, str]]

SOURCE = "".join(f"line {i}\n" for i in range(1, 21))
HEADER = "From 0 Mon Sep 17 00:00:00 2001\nSubject: [PATCH] one\n two\n\nWhy.\n---\n stat\n\n"


def diff(path: str, body: str, old: str | None = None) -> str:
    return (
        f"diff --git a/{path} b/{path}\nindex 0..1\n--- {old or f'a/{path}'}\n+++ b/{path}\n{body}"
    )


FIRST = (
    HEADER
    + diff(
        "python/sglang/srt/x.py",
        "@@ -4,3 +4,4 @@ def f\n line 4\n-line 5\n+line five\n+line five and a half\n line 6\n"
        "@@ -15,3 +16,2 @@\n line 15\n-line 16\n line 17\n",
    )
    + diff("python/sglang/test/new.py", "@@ -0,0 +1,2 @@\n+a = 1\n+\n", "/dev/null")
    + diff("test/registered/test_x.py", "@@ -0,0 +1 @@\n+b = 2\n", "/dev/null")
)
SECOND = HEADER + diff(
    "python/sglang/srt/x.py", "@@ -5,2 +5,2 @@\n-line five\n+line 5.0\n line five and a half\n"
)
PATCHED = (
    SOURCE.replace("line 5\n", "line 5.0\nline five and a half\n").replace("line 16\n", "")
)  # fmt: skip


@pytest.fixture
def series(apply: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A series of two patches in the place of the real ones."""
    folder = tmp_path / "patches/sglang-1.0"
    folder.mkdir(parents=True)
    (folder / "BASE").write_text("sglang 1.0 x.whl sha256:0\n")
    (folder / "series").write_text("0001-a.patch\n0002-b.patch\n")
    (folder / "0001-a.patch").write_text(FIRST)
    (folder / "0002-b.patch").write_text(SECOND)
    monkeypatch.setattr(apply, "HERE", folder.parent)
    return folder


@pytest.fixture(params=["checkout", "package"])
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkout, or a folder with an installed package."""
    root = tmp_path / "tree"
    package = root / ("python/sglang" if request.param == "checkout" else "sglang")
    (package / "srt").mkdir(parents=True)
    (package / "srt/x.py").write_text(SOURCE)
    (package / "test").mkdir()
    (package / "test/old.py").write_text("")
    if request.param == "package":
        (root / "sglang-1.0.dist-info").mkdir()
    return root


def x_of(tree: Path) -> Path:
    return next(tree.rglob("x.py"))


def test_there_and_back(
    apply: ModuleType,
    series: Path,
    tree: Path,
    digest: Digest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = digest(tree)
    assert apply.main(["check", str(tree)]) == 0
    assert "2 patches fit" in capsys.readouterr().out
    assert digest(tree) == before, "check must not write"
    assert apply.main(["apply", str(tree)]) == 0
    assert x_of(tree).read_text() == PATCHED
    assert next(tree.rglob("new.py")).read_text() == "a = 1\n\n"
    # Tests have a place in a checkout only.
    assert len(list(tree.rglob("test_x.py"))) == (tree / "python").is_dir()
    applied = digest(tree)
    capsys.readouterr()
    for command, said in (("apply", "applied already"), ("status", "sglang-1.0: applied")):
        assert apply.main([command, str(tree)]) == 0
        assert said in capsys.readouterr().out
    assert apply.main(["check", str(tree)]) == 0
    assert digest(tree) == applied
    # Any folder of the tree will do.
    assert apply.main(["revert", str(x_of(tree).parents[1])]) == 0
    assert digest(tree) == before
    assert apply.main(["revert", str(tree)]) == 0
    assert "no patches are applied" in capsys.readouterr().out


def test_only_the_first(apply: ModuleType, series: Path, tree: Path, digest: Digest) -> None:
    before = digest(tree)
    assert apply.main(["apply", str(tree), "--upto", "1"]) == 0
    assert "line five\n" in x_of(tree).read_text()
    assert apply.main(["apply", str(tree)]) == 1, "another number needs a revert first"
    assert apply.main(["revert", str(tree)]) == 0
    assert digest(tree) == before
    assert apply.main(["apply", str(tree), "--upto", "3"]) == 1


def test_lines_that_moved_are_found(apply: ModuleType, series: Path, tree: Path) -> None:
    original = "new first line\n" + SOURCE
    x_of(tree).write_text(original)
    assert apply.main(["apply", str(tree)]) == 0
    assert x_of(tree).read_text() == "new first line\n" + PATCHED
    assert apply.main(["revert", str(tree)]) == 0
    assert x_of(tree).read_text() == original


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SOURCE.replace("line 15", "line XV"), "hunk 2 of 2: its 3 lines are found 0 times"),
        ("\n" + SOURCE + SOURCE, "hunk 1 of 2: its 3 lines are found 2 times"),
        (SOURCE.replace("\n", "\r\n"), "found 0 times"),
        (None, "does not exist"),
    ],
)
def test_other_contents_are_refused(
    apply: ModuleType,
    series: Path,
    tree: Path,
    digest: Digest,
    capsys: pytest.CaptureFixture[str],
    text: str | None,
    message: str,
) -> None:
    path = x_of(tree)
    if text is None:
        path.unlink()
    else:
        path.write_bytes(text.encode())
    before = digest(tree)
    for command in ("check", "apply"):
        assert apply.main([command, str(tree)]) == 1
        said = capsys.readouterr().err
        assert message in said and "Ways out:\n    (1) " in said
    assert digest(tree) == before


def test_a_file_in_the_way_is_refused(
    apply: ModuleType, series: Path, tree: Path, digest: Digest
) -> None:
    (x_of(tree).parents[1] / "test/new.py").write_text("mine\n")
    before = digest(tree)
    assert apply.main(["apply", str(tree)]) == 1
    assert digest(tree) == before


def test_other_releases_are_refused(
    apply: ModuleType, series: Path, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (tree / "python").is_dir():
        (tree / "sglang-1.0.dist-info").rename(tree / "sglang-1.1.dist-info")
        assert apply.main(["apply", str(tree)]) == 1
        assert "is sglang 1.1" in capsys.readouterr().err
        assert apply.main(["apply", str(tree), "--series", "sglang-1.0"]) == 0
    assert apply.main(["check", str(tree), "--series", "other"]) == 1
    assert apply.main(["check", str(series)]) == 1
    assert "holds neither" in capsys.readouterr().err


def test_later_edits_are_not_lost(
    apply: ModuleType, series: Path, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert apply.main(["apply", str(tree)]) == 0
    edited = PATCHED + "mine\n"
    x_of(tree).write_text(edited)
    for command in ("revert", "apply", "status"):
        assert apply.main([command, str(tree)]) == 1
        assert "were changed since" in capsys.readouterr().err
    assert x_of(tree).read_text() == edited
    x_of(tree).write_text(PATCHED)
    assert apply.main(["revert", str(tree)]) == 0


def test_other_patches_cannot_take_it_back(apply: ModuleType, series: Path, tree: Path) -> None:
    assert apply.main(["apply", str(tree)]) == 0
    (series / "0002-b.patch").write_text(SECOND.replace("5.0", "5.1"))
    assert apply.main(["revert", str(tree)]) == 1
    assert x_of(tree).read_text() == PATCHED


@pytest.mark.parametrize("survivors", [1, 2])
def test_a_failed_write_takes_everything_back(
    apply: ModuleType,
    series: Path,
    tree: Path,
    digest: Digest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    survivors: int,
) -> None:
    before = digest(tree)
    replace, calls = os.replace, []

    def failing(source: str, destination: Path) -> None:
        calls.append(destination)
        if len(calls) == survivors + 1:
            raise OSError(28, "No space left on device", str(destination))
        replace(source, destination)

    monkeypatch.setattr(os, "replace", failing)
    assert apply.main(["apply", str(tree)]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert digest(tree) == before


@pytest.mark.parametrize("finish", ["revert", "apply"])
def test_a_killed_run_can_be_taken_back(
    apply: ModuleType,
    series: Path,
    tree: Path,
    digest: Digest,
    capsys: pytest.CaptureFixture[str],
    finish: str,
) -> None:
    before = digest(tree)
    assert apply.main(["apply", str(tree)]) == 0
    next(tree.rglob("new.py")).unlink()  # as if the process had ended before it wrote this one
    assert apply.main(["status", str(tree)]) == 0
    assert "interrupted: " in capsys.readouterr().out
    if finish == "apply":
        assert apply.main(["apply", str(tree)]) == 1
        assert "revert" in capsys.readouterr().err
    assert apply.main(["revert", str(tree)]) == 0
    assert digest(tree) == before


def test_a_shared_file_is_replaced_and_not_written_into(
    apply: ModuleType, series: Path, tree: Path, tmp_path: Path
) -> None:
    """Installers link files from their cache into every environment."""
    cached = tmp_path / "cached.py"
    os.link(x_of(tree), cached)
    x_of(tree).chmod(0o640)
    assert apply.main(["apply", str(tree)]) == 0
    assert cached.read_text() == SOURCE
    assert x_of(tree).stat().st_mode & 0o777 == 0o640


def test_an_environment_inside_a_repository(series: Path, tmp_path: Path) -> None:
    """Where ``git apply`` says nothing, does nothing and exits 0. As the command, in a process."""
    repository = tmp_path / "repository"
    package = repository / ".venv/site-packages/sglang"
    (package / "srt").mkdir(parents=True)
    (package / "srt/x.py").write_text(SOURCE)
    (package / "__init__.py").write_text("")
    (package.parent / "sglang-1.0.dist-info").mkdir()
    subprocess.run(["git", "init", "-q", repository], check=True)
    (repository / ".gitignore").write_text(".venv\n")
    for name in ("apply.py", "unified_diff.py"):
        source = Path(__file__).resolve().parents[2] / "patches" / name
        (series.parent / name).write_text(source.read_text())
    command = [sys.executable, str(series.parent / "apply.py"), "apply"]
    environment = os.environ | {"PYTHONPATH": str(package.parent)}
    done = subprocess.run(command, env=environment, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (package / "srt/x.py").read_text() == PATCHED
