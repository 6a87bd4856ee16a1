"""The examples' files: headers, shellcheck, and YAML against the schemas of what reads it.

Kubernetes' and Compose's schemas come with ``kubernetes-validate`` and ``check-jsonschema``. For
LeaderWorkerSet no package carries one: ``scripts/lws_schema.py`` made it from its definition.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(p for p in EXAMPLES.rglob("*") if p.suffix in (".sh", ".sbatch"))
FILES = sorted(p for p in EXAMPLES.rglob("*") if p.is_file() and p.suffix not in (".md", ".pyc"))
OWN_SHELL = sorted([*SCRIPTS, *ROOT.glob("scripts/*.sh"), *ROOT.glob("benchmarks/*.sh")])


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tool(name: str) -> str:
    """A program of requirements/dev.txt, beside this interpreter or on PATH."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.fail(f"{name} is not installed: pip install -r requirements/dev.txt")
    return found


def test_every_example_is_there() -> None:
    names = {str(path.relative_to(EXAMPLES)) for path in FILES}
    readme = (EXAMPLES / "README.md").read_text()
    for name in names:
        assert name in readme or f"({Path(name).parent})" in readme, f"README.md lacks {name}"
    assert {
        "one-node-8gpu.sh",
        "two-nodes-8gpu.sh",
        "four-nodes-8gpu-tp32.sh",
        "eight-nodes-4gpu-tp32.sh",
        "mtp.sh",
        "bench-serving.sh",
        "slurm/tp32.sbatch",
        "kubernetes/lws-tp32.yaml",
        "docker/Dockerfile",
        "docker/compose.yaml",
        "ray/serve.sh",
        "pd/prefill.sh",
        "pd/decode.sh",
        "clients/chat.py",
    } <= names


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_headers(path: Path) -> None:
    if path.name == "serve.py":  # its header is serve.sh's
        return
    head = path.read_text()[:2000]
    for word in ("Needs:", "Prints:", "Hangs:"):
        assert re.search(rf"^(# )?{word} ", head, re.M), f"no {word} in {path.name}"


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_strict_in_both_senses(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert path.stat().st_mode & 0o111, "not executable"
    strict, plugin = text.index("\nset -euo pipefail\n"), text.index("SGLANG_W4AFP8_STRICT=1")
    first = next(line for line in text.splitlines() if line and not line.startswith("#"))
    assert first == "set -euo pipefail"
    assert strict < plugin


def test_shellcheck() -> None:
    paths = [*map(str, OWN_SHELL), str(ROOT / ".ci/run")]
    done = subprocess.run(
        [tool("shellcheck"), "--severity=style", "--shell=bash", *paths],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_shellcheck_would_tell(tmp_path: Path) -> None:
    bad = tmp_path / "bad.sh"
    bad.write_text("#!/usr/bin/env bash\nset -e\nrm -rf $1/*\n")
    done = subprocess.run([tool("shellcheck"), str(bad)], capture_output=True, check=False)
    assert done.returncode == 1


# ------------------------------------------------------------------------------------- Kubernetes

LEADER_WORKER_SET = json.loads(
    (Path(__file__).parent / "golden" / "leaderworkerset.schema.json").read_text()
)


def documents() -> dict[str, dict[str, Any]]:
    text = (EXAMPLES / "kubernetes/lws-tp32.yaml").read_text()
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def check_kubernetes(document: dict[str, Any]) -> None:
    import kubernetes_validate

    version = kubernetes_validate.latest_version()
    kubernetes_validate.validate(document, version, strict=True)


def pod_template(document: dict[str, Any]) -> dict[str, Any]:
    """An LWS worker as the core API's PodTemplate, which has a schema."""
    template = document["spec"]["leaderWorkerTemplate"]["workerTemplate"]
    return {
        "apiVersion": "v1",
        "kind": "PodTemplate",
        "metadata": {"name": "x"},
        "template": template,
    }


def test_kubernetes() -> None:
    found = documents()
    assert set(found) == {"LeaderWorkerSet", "Service"}
    jsonschema.validate(found["LeaderWorkerSet"], LEADER_WORKER_SET)
    check_kubernetes(pod_template(found["LeaderWorkerSet"]))
    check_kubernetes(found["Service"])
    name = found["LeaderWorkerSet"]["metadata"]["name"]
    selector = found["Service"]["spec"]["selector"]
    assert selector["leaderworkerset.sigs.k8s.io/name"] == name
    assert selector["leaderworkerset.sigs.k8s.io/worker-index"] == "0"


@pytest.mark.parametrize("where", ["set", "pod", "probe"])
def test_misspelt_fields_would_be_told(where: str) -> None:
    document = documents()["LeaderWorkerSet"]
    template = document["spec"]["leaderWorkerTemplate"]
    if where == "set":
        template["restartpolicy"] = template.pop("restartPolicy")
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(document, LEADER_WORKER_SET)
        return
    container = template["workerTemplate"]["spec"]["containers"][0]
    if where == "pod":
        container["volumemounts"] = container.pop("volumeMounts")
    else:
        container["readinessProbe"]["httpGet"]["port"] = {"name": "http"}
    with pytest.raises(Exception, match=r"volumemounts|port|http") as caught:
        check_kubernetes(pod_template(document))
    assert "alid" in type(caught.value).__name__


# ----------------------------------------------------------------------------------------- Compose


def check_compose(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_compose(tmp_path: Path) -> None:
    path = EXAMPLES / "docker/compose.yaml"
    done = check_compose(path)
    assert done.returncode == 0, done.stdout + done.stderr
    bad = tmp_path / "compose.yaml"
    bad.write_text(path.read_text().replace("shm_size", "shmsize"))
    assert "shmsize" in check_compose(bad).stdout


def test_docker_run_passes_the_launch_on(tmp_path: Path) -> None:
    """The command that ``docker`` would get, from a stand-in that prints its arguments."""
    fake = tmp_path / "docker"
    fake.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    fake.chmod(0o755)
    done = subprocess.run(
        [EXAMPLES / "docker/run.sh", "/m", "--tp", "8"],
        env={"PATH": "/usr/bin:/bin", "DOCKER": str(fake)},
        capture_output=True,
        text=True,
        check=True,
    )
    words = json.loads(done.stdout)
    assert words[0] == "run"
    assert words[-5:] == ["launch", "/m", "--run", "--tp", "8"]
    options = words[: words.index("sglang-w4afp8")]
    for wanted in ("--gpus", "--shm-size", "--network", "--cap-add"):
        assert wanted in options
