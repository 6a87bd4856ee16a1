"""Tests marked ``gpu`` are skipped where there is none, and the last lines say so.

In CI everything else that tests need is there, so any other skip than those in ``_MAY_SKIP`` fails
the run: a broken installation must not pass for a test that has nothing to do.

Where the tests run in several processes (``pytest -n``), one process takes a whole file, so that
its fixtures are made once. Files whose tests each take long are taken apart.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest

# File name -> what of a test's id names the tests that belong together: the whole id, where each
# test starts processes of its own, or the parameters, where the fixture of a case is dear.
_TAKEN_APART = {"test_registration.py": "test", "test_server.py": "case"}

# Parts of the reasons that a complete environment may have.
_MAY_SKIP = (
    "no CUDA device",
    "needs a GPU",
    "needs a Hopper GPU",
    "network namespaces are NOT PERMITTED here",
    "ran in two network namespaces instead",
    "the rule of SGLang 0.5.16",
    "runs in the environment of SGLang",
    "this SGLang has no pplx",
    "does not take it",
    "is not applied to this release",
)

# Functions of kernels.hopper whose results are kept.
_PLANS = (
    "plan.plan", "plan_prefill.plan_prefill", "plan_rows.plan_tokens", "plan_rows.plan_slots",
)  # fmt: skip

_skipped = pytest.StashKey[int]()
_unexpected = pytest.StashKey[list[str]]()


def _has_gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _no_plans_of_other_tests() -> None:
    """Plans are kept, and tests change the constants that they are made from."""
    for name in _PLANS:
        module, function = name.split(".")
        loaded = sys.modules.get(f"sglang_w4afp8.kernels.hopper.{module}")
        if loaded is not None:
            getattr(loaded, function).cache_clear()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items or _has_gpu():
        return
    for item in gpu_items:
        item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    config.stash[_skipped] = len(gpu_items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand out tests by ``_unit``, in the order in which they were collected."""
    from xdist.scheduler import LoadScopeScheduling

    class ByUnit(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _unit(nodeid)

    config.option.loadscopereorder = False  # it would put the files with most tests first
    return ByUnit(config, log)


def _unit(nodeid: str) -> str:
    """Name of the group of tests that one process takes together."""
    file = nodeid.partition("::")[0]
    apart = _TAKEN_APART.get(file.rpartition("/")[2])
    if apart == "case":
        return f"{file} {nodeid.partition('[')[2]}"
    return nodeid if apart == "test" else file


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Look for skips that hide something; the process of an xdist worker has no reporter."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or not os.environ.get("CI"):
        return
    found = []
    for report in reporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not any(part in reason for part in _MAY_SKIP):
            found.append(f"{report.nodeid}: {reason}")
    if found:
        session.config.stash[_unexpected] = found
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    unexpected = config.stash.get(_unexpected, [])
    if unexpected:
        terminalreporter.section("skipped for no accepted reason", red=True, bold=True)
        for text in unexpected:
            terminalreporter.write_line(text)
    count = config.stash.get(_skipped, 0)
    if count:
        terminalreporter.section("GPU tests NOT RUN", yellow=True, bold=True)
        terminalreporter.write_line(f"{count} tests need a CUDA device and this machine has none.")
