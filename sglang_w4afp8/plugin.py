"""The plugin's entry point: check the host, install the config class, say so once.

SGLang's ``load_plugins()`` calls :func:`register` in the launcher and in every scheduler process.
It logs an exception of a plugin and goes on with its own method, so a failure here is easily
overlooked. Therefore everything is checked before anything is changed, a refusal is one ERROR with
the reason and the cure, and with ``SGLANG_W4AFP8_STRICT=1`` the process ends after it. Processes
for which SGLang calls no plugins are served by :mod:`sglang_w4afp8.run` or call :func:`register`
themselves.
"""

from __future__ import annotations

import logging
import multiprocessing
import sys
import threading
from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module

from sglang_w4afp8 import __version__, compat, env
from sglang_w4afp8.errors import ConfigError, HostError, W4AFp8Error

logger = logging.getLogger(__name__)

_INSTALLER = "sglang_w4afp8.srt.install"


class State(StrEnum):
    """What became of the registration in this process."""

    NOT_CALLED = "not called"
    IN_PROGRESS = "in progress"
    REGISTERED = "registered"
    DISABLED = "disabled"
    REFUSED = "refused"


@dataclass(frozen=True)
class Status:
    """See :func:`status`.

    Attributes:
        state: the outcome.
        detail: the log line or the error's text.
        sglang_version: None if SGLang was not looked at or has no version.
    """

    state: State
    detail: str = ""
    sglang_version: str | None = None


_status = Status(State.NOT_CALLED)
# Re-entrant: importing SGLang may run its plugins, and us among them, on this very thread.
_lock = threading.RLock()


def status() -> Status:
    """What :func:`register` did in this process so far."""
    return _status


def register() -> None:
    """Install the W4AFP8 method into this process's SGLang; calling it again does nothing.

    Raises:
        SystemExit: it cannot, and ``SGLANG_W4AFP8_STRICT`` is 1. Not an ``Exception``, because
            SGLang catches those. The text is in the log.
    """
    global _status
    with _lock:
        if _status.state in (State.REGISTERED, State.IN_PROGRESS):
            return
        _status = Status(State.IN_PROGRESS)
        try:
            _status = _register()
        except W4AFp8Error as error:
            _status = _refused(error)
        except Exception as error:
            # Nothing was installed: install() checks first and then only assigns.
            logger.debug("registration failed", exc_info=True)
            _status = _refused(_unexpected(error))
        finally:
            if _status.state is State.IN_PROGRESS:
                _status = Status(State.REFUSED, "interrupted")
        if _status.state is State.REFUSED:
            logger.error("%s", _status.detail)
            if _is_strict():
                raise SystemExit(1)


def _register() -> Status:
    if not env.ENABLE.is_on():
        detail = f"sglang-w4afp8 {__version__}: {env.ENABLE.name}=0, SGLang's own method stays"
        _announce(logging.INFO, detail)
        return Status(State.DISABLED, detail)
    report = compat.check_for_registration()
    if not report.ok:
        raise report.error()
    import_module(_INSTALLER).install()
    for warning in report.warnings:
        _announce(logging.WARNING, f"sglang-w4afp8 {__version__}: {warning}")
    detail = (
        f"sglang-w4afp8 {__version__}: registered quantization 'w4afp8' "
        f"(sglang {report.version}, hooks ok)"
    )
    _announce(logging.INFO, detail)
    return Status(State.REGISTERED, detail, report.version)


def _announce(level: int, text: str) -> None:
    """Log one line that a user will see, once per node.

    SGLang loads plugins before it sets logging up, so an ordinary INFO record would be dropped.
    Until then it goes to stderr in SGLang's format; a library that has set up a handler in the
    meantime, at the default level, counts as "not yet". The children of a server (one per rank)
    stay silent then: what their launcher said holds for them, and a refusal is an ERROR, which each
    process shows in any case.
    """
    if logging.getLogger().handlers and logger.isEnabledFor(level):
        logger.log(level, "%s", text)
    elif not _is_spawned_child():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%Y-%m-%d %H:%M:%S"))
        handler.handle(logger.makeRecord(logger.name, level, __file__, 0, text, (), None))


def _is_spawned_child() -> bool:
    # While a child re-imports its main module, it has no parent_process() yet.
    return multiprocessing.parent_process() is not None or "--multiprocessing-fork" in sys.orig_argv


def _refused(error: W4AFp8Error) -> Status:
    return Status(State.REFUSED, f"sglang-w4afp8 {__version__}: not registered: {error}")


def _unexpected(error: Exception) -> HostError:
    return HostError(
        f"{type(error).__name__} while importing SGLang's quantization: {error}",
        "nothing was installed, and SGLang's own w4afp8 method reads neither group sizes nor every "
        "tensor-parallel degree correctly",
        [
            "sglang-w4afp8 doctor shows which part of the environment is broken",
            f"export {env.ENABLE.name}=0 to serve with SGLang's own method",
        ],
    )


def _is_strict() -> bool:
    try:
        return env.STRICT.is_on()
    except ConfigError:
        # Somebody wrote "true" or "yes": strictness was wanted.
        return True
