"""``doctor --cluster hosts.txt``: the doctor on every node, over ssh, and what has to be equal.

Each host runs ``python -m sglang_w4afp8.cli doctor --json`` with its own standard library; nothing
is copied there. A host that cannot be reached, has no package or answers something else is a row
with the command that shows why.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from sglang_w4afp8.tools.doctor import FAIL, OK, WARN, Row
from sglang_w4afp8.tools.launch_place import read_hosts

# Seconds; a log line of one node is compared with one of another by the clock.
_SKEW_LIMIT_S = 2.0
_CONNECT_LIMIT_S = 15
_LIMIT_S = 180
_SSH = ("ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_LIMIT_S}")
_CURES = {
    "Python": "make the environment anew with the other nodes' Python",
    "NCCL": "pip install the same torch, which pins its NCCL",
    "sglang-w4afp8": "pip install --no-deps .   (in the same checkout of sglang-w4afp8)",
    "RoCE GID index": "export NCCL_IB_GID_INDEX=N   on each node; launch does so by itself",
    "MODEL's config.json": "rsync -a FIRST-NODE:MODEL/ MODEL/",
    "driver": "install the same driver, then reboot",
    "GPUs": "a tensor-parallel server needs the same number of the same GPU on every node",
}


@dataclass
class Answer:
    """What one host said.

    Attributes:
        host: its name in the file.
        rows: its doctor's rows.
        facts: what has to be equal, by name; empty when it said nothing of use.
        problem: why it said nothing of use.
        skew_s: its clock less this machine's, too large by the time the answer took to arrive.
    """

    host: str
    rows: list[Row] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    problem: Row | None = None
    skew_s: float = 0.0


def check(file: Path, model: str | None, python: str, *, quick: bool) -> Iterator[Row]:
    """Ask every host of a file at once; one row a problem, one for each thing that is equal.

    Args:
        file: host names, one a line.
        model: checkpoint path to look for on each, or None.
        python: interpreter there.
        quick: leave the slow probe out there too.
    """
    hosts = read_hosts(file)
    words = [python, "-m", "sglang_w4afp8.cli", "doctor", "--json", *(["--quick"] if quick else [])]
    words += [model] if model else []
    with ThreadPoolExecutor(max_workers=min(32, len(hosts))) as pool:
        answers = list(pool.map(lambda host: ask(host, words), hosts))
    for answer in answers:
        if answer.problem is not None:
            yield answer.problem
            continue
        for row in answer.rows:
            if row.status != OK:
                yield Row(row.status, f"{answer.host}: {row.topic}", row.found, row.cure)
        failed = sum(row.status == FAIL for row in answer.rows)
        passed = sum(row.status == OK for row in answer.rows)
        if not failed:
            yield Row(OK, answer.host, f"{passed} of {len(answer.rows)} rows ok, none failed")
        if abs(answer.skew_s) > _SKEW_LIMIT_S:
            yield Row(
                WARN,
                f"{answer.host}: clock",
                f"{answer.skew_s:+.1f} s from this machine's",
                f"ssh {answer.host} systemctl restart chronyd   (or systemd-timesyncd)",
            )
    heard = [answer for answer in answers if answer.problem is None]
    if len(heard) > 1:
        yield from compare(heard)


def compare(answers: Sequence[Answer]) -> Iterator[Row]:
    """One row for everything that is equal, one for each fact that is not."""
    equal: list[str] = []
    for name in answers[0].facts:
        groups: dict[str, list[str]] = {}
        for answer in answers:
            groups.setdefault(answer.facts.get(name, "not told"), []).append(answer.host)
        if len(groups) == 1:
            equal.append(f"{name} {next(iter(groups))}")
            continue
        cure = _CURES.get(name)
        # What pip installs is cured where it is missing, even if that is on most nodes.
        most = max(
            groups,
            key=lambda value: (cure is None and value[:1].isdigit(), len(groups[value])),
        )
        others = [host for value, hosts in groups.items() if value != most for host in hosts]
        cure = cure or f"pip install {name}" + (f"=={most}" if most[:1].isdigit() else "")
        yield Row(
            FAIL,
            f"same {name}",
            "; ".join(f"{value} on {', '.join(hosts)}" for value, hosts in groups.items()),
            f"on {', '.join(others)}: {cure}",
        )
    yield Row(OK, f"same on {len(answers)} nodes", ", ".join(equal) or "nothing")


def ask(host: str, words: Sequence[str]) -> Answer:
    """Run the doctor on one host."""
    command = [*_SSH, host, shlex.join(words)]
    shown = f"ssh {host} {shlex.join(words)}"
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
            check=False,
        )
    except FileNotFoundError:
        return _silent(host, "there is no ssh on this machine", "apt-get install openssh-client")
    except subprocess.TimeoutExpired:
        return _silent(host, f"no answer within {_LIMIT_S} s", shown)
    arrived = time.time()
    start = done.stdout.find("{")  # a login message may come first
    try:
        told = json.loads(done.stdout[start:] if start >= 0 else "")
        return Answer(
            host,
            [Row(**row) for row in told["rows"]],
            told["facts"],
            skew_s=float(told["clock"]) - arrived,
        )
    except (ValueError, KeyError, TypeError):
        pass
    last = (done.stderr.strip().splitlines() or done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode == 255:  # ssh's own failures
        return _silent(host, f"ssh: {last}", f"ssh {host} true   must work without a password")
    if "No module named" in last:
        install = f"ssh {host} {shlex.quote(words[0])} -m pip install --no-deps CHECKOUT"
        return _silent(host, f"sglang-w4afp8 is not installed there: {last}", install)
    return _silent(host, f"ended with {done.returncode}: {last}", shown)


def _silent(host: str, found: str, cure: str) -> Answer:
    return Answer(host, problem=Row(FAIL, host, found, cure))
