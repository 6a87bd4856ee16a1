"""``patches/apply.py`` as a module, and released wheels unpacked as a checkout would look."""

from __future__ import annotations

import hashlib
import importlib
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATCHES = ROOT / "patches"


@pytest.fixture(scope="session")
def apply() -> ModuleType:
    """The script, imported."""
    sys.path.insert(0, str(PATCHES))
    try:
        return importlib.import_module("apply")
    finally:
        sys.path.remove(str(PATCHES))


@pytest.fixture(scope="session")
def base_wheel() -> Callable[[str], Path]:
    """The wheel of a release that a series is made for; it must be the pinned one."""

    def find(release: str) -> Path:
        base = (PATCHES / f"sglang-{release}" / "BASE").read_text().split()
        wheel = next(iter(sorted((ROOT / ".whl").glob(f"sglang-{release}-*.whl"))), None)
        assert wheel is not None, f"no wheel of {release} in .whl/: make wheels"
        # A wheel for another platform has the same Python files and another hash.
        if wheel.name == base[2]:
            assert f"sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}" == base[3]
        return wheel

    return find


@pytest.fixture
def unpack(tmp_path: Path, base_wheel: Callable[[str], Path]) -> Callable[..., Path]:
    """Unpack a wheel under ``python/``, all of it that a server needs or only some files."""

    def unpacked(release: str, only: set[str] | None = None) -> Path:
        with zipfile.ZipFile(base_wheel(release)) as archive:
            names = [
                name
                for name in archive.namelist()
                # Image and video generation: a third of the package, and nothing imports it.
                if name.startswith("sglang/")
                and not name.startswith("sglang/multimodal_gen/")
                and (only is None or name in only)
            ]
            archive.extractall(tmp_path / "tree/python", names)
        return tmp_path / "tree"

    return unpacked


@pytest.fixture(scope="session")
def digest() -> Callable[[Path], dict[str, str]]:
    """Relative path -> hash of every file in a tree; empty folders count too."""

    def digest_of(root: Path) -> dict[str, str]:
        return {
            str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
            if path.is_file()
            else "folder"
            for path in root.rglob("*")
        }

    return digest_of
