"""Released wheels of SGLang for the contract tests, and fresh processes for the import tests.

Wheels come from ``.whl/`` (git-ignored; ``.ci/run`` and ``make test`` fill it) and are downloaded
there by pip when they are missing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from sglang_w4afp8.compat import TESTED

ROOT = Path(__file__).resolve().parents[2]
WHEELS = ROOT / ".whl"
_TIMEOUT_S = 300


def _find_wheel(version: str) -> Path | None:
    return next(iter(sorted(WHEELS.glob(f"sglang-{version}-*.whl"))), None)


def _download(version: str) -> None:
    pip = [sys.executable, "-m", "pip"]
    if subprocess.run([*pip, "--version"], capture_output=True, check=False).returncode:
        # uv makes environments without pip; any pip can fetch a wheel.
        pip = [shutil.which("pip") or shutil.which("pip3") or "pip"]
    command = [*pip, "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run(
        [*command, "--dest", str(WHEELS), f"sglang=={version}"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.fail(
            f"no wheel of sglang {version} in .whl/ and pip cannot fetch it:\n{done.stderr}"
        )


@pytest.fixture(scope="session")
def wheel() -> Callable[[str], Path]:
    """The path of a released wheel by version; missing ones are fetched, never skipped."""

    def get(version: str) -> Path:
        if _find_wheel(version) is None:
            _download(version)
        found = _find_wheel(version)
        assert found is not None
        return found

    return get


@pytest.fixture(params=TESTED)
def tested_wheel(request: pytest.FixtureRequest, wheel: Callable[[str], Path]) -> Path:
    """Each tested release in turn."""
    return wheel(request.param)


@pytest.fixture
def fresh(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python code in a new interpreter; variables are added to a cleaned environment."""

    def run(
        code: str = "", *, args: list[str] | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        script = tmp_path / "scenario.py"
        script.write_text(textwrap.dedent(code))
        clean = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SGLANG_", "_SGLANG_"))
            # Without byte code every process would compile SGLang anew, half a minute each.
            and name not in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")
        }
        return subprocess.run(
            [sys.executable, *(args or [str(script)])],
            cwd=tmp_path,
            env=clean | {"OMP_NUM_THREADS": "1"} | variables,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )

    return run
