"""``sglang-w4afp8 doctor``: is this machine ready, and if not, which command cures it.

Every row is ``[ok  ]``, ``[warn]`` or ``[FAIL]``; whatever is not ok names its cure. The probes are
in ``doctor_probes`` (software) and ``doctor_machine``; ``doctor_cluster`` asks other nodes. At
module level all four import the standard library only, and a probe that raises becomes a row, so
the command works in the environments that need it most: broken ones.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

OK, WARN, FAIL = "ok", "warn", "FAIL"


@dataclass(frozen=True)
class Row:
    """One finding.

    Attributes:
        status: :data:`OK`, :data:`WARN` or :data:`FAIL`.
        topic: what was looked at, one word or two.
        found: what was found, with versions and numbers.
        cure: the command or setting that helps; empty only where nothing is wrong.
    """

    status: str
    topic: str
    found: str
    cure: str = ""


Probe = Callable[[], Iterable[Row]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="also look at this checkpoint")
    parser.add_argument(
        "--cluster",
        type=Path,
        metavar="FILE",
        help="ask all hosts of this file over ssh (one a line), and compare them",
    )
    parser.add_argument(
        "--remote-python", metavar="PATH", help="interpreter on those hosts (default: this one)"
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="do not start a process that imports SGLang (saves about ten seconds)",
    )


def run(args: argparse.Namespace) -> int:
    """Look, print, and tell: 0 if nothing failed, 1 otherwise."""
    from sglang_w4afp8.tools import doctor_cluster, doctor_machine, doctor_probes

    probes = [
        probe for probe in doctor_probes.PROBES if not (args.quick and probe in doctor_probes.SLOW)
    ]
    if args.model is not None:
        probes.append(functools.partial(doctor_machine.checkpoint, args.model))
    if args.cluster is not None:
        python = args.remote_python or sys.executable
        probes.append(
            functools.partial(
                doctor_cluster.check, args.cluster, args.model, python, quick=args.quick
            )
        )
    rows: list[Row] = []
    for probe in probes:
        found = run_probe(probe)
        rows += found
        if not args.json:
            for row in found:
                print(render(row), flush=True)
    failed = [row for row in rows if row.status == FAIL]
    if args.json:
        told = {"ok": not failed, "rows": [asdict(row) for row in rows]}
        told["facts"] = doctor_machine.facts(args.model)
        # Last of all: whoever asked over ssh compares it with the moment the answer arrives.
        told["clock"] = time.time()
        print(json.dumps(told, indent=2))
    else:
        print(summary(rows))
    return 1 if failed else 0


def run_probe(probe: Probe) -> list[Row]:
    """The probe's rows; what it raises is a row too."""
    try:
        return list(probe())
    except ModuleNotFoundError as error:
        cure = f"pip install {(error.name or 'NAME').partition('.')[0]}"
        return [Row(FAIL, _topic(probe), f"cannot look: {error}", cure)]
    except Exception as error:
        return [
            Row(
                FAIL,
                _topic(probe),
                f"looking raised {type(error).__name__}: {error}",
                "pip install --force-reinstall the package that the message names",
            )
        ]


def _topic(probe: Probe) -> str:
    inner = probe.func if isinstance(probe, functools.partial) else probe
    return getattr(inner, "__name__", "probe").replace("_", " ")


def render(row: Row) -> str:
    """``[FAIL] topic: found`` and the cure beneath."""
    lines = [f"[{row.status:<4}] {row.topic}: {row.found}"]
    if row.cure:
        lines += [f"         → {line}" for line in row.cure.splitlines()]
    return "\n".join(lines)


def summary(rows: list[Row]) -> str:
    """The last line."""
    counts = {status: sum(row.status == status for row in rows) for status in (OK, WARN, FAIL)}
    verdict = "not ready: follow the arrows" if counts[FAIL] else "ready"
    return f"{verdict} ({counts[OK]} ok, {counts[WARN]} warnings, {counts[FAIL]} failures)"
