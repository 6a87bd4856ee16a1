"""The server commands of ``launch`` and of every example, read by SGLang's own argument parser.

Each example runs as a user would run it, with a stand-in for what would start something: the
command it prints is compared with what ``launch`` prints for the same cluster, and every flag has
to be one that this SGLang has, spelt in full.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")
pytest.importorskip("sglang")

from sglang_w4afp8.tools import launch_plan  # noqa: E402
from sglang_w4afp8.tools.launch_plan import Wanted  # noqa: E402

pytestmark = pytest.mark.sglang

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
MODEL = "/models/DeepSeek-R1-W4AFP8"
MASTER = "127.0.0.1"
GRAPHS = ("--cuda-graph-max-bs-decode", "128")
RAY = """
def init(**options):
    import os
    assert options["runtime_env"]["worker_process_setup_hook"].__module__ == "sglang_w4afp8"
    assert options["runtime_env"]["env_vars"] == {"SGLANG_W4AFP8_STRICT": "1"}
"""
SERVER = "import json, sys\nprint(json.dumps(sys.argv[1:]))\n"


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    from sglang.srt.server_args import ServerArgs

    made = argparse.ArgumentParser()
    ServerArgs.add_cli_args(made)
    return made


def read(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """Parse as SGLang does; a flag that is only the beginning of a real one is an error here."""
    known = parser._option_string_actions
    flags = [word.partition("=")[0] for word in arguments if word.startswith("--")]
    unknown = [flag for flag in flags if flag not in known]
    assert not unknown, f"{unknown} are no arguments of this SGLang"
    return parser.parse_args(arguments)


@pytest.fixture
def example(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Run an example; the nodes that its ``launch`` calls print as JSON."""
    programs = tmp_path / "bin"
    programs.mkdir()
    # Before the "--" that ends launch's own options, wherever it stands.
    insert = (
        "words=(); done=0\n"
        "for word; do [[ $word == -- && $done == 0 ]] && words+=(--dry-run --json) && done=1\n"
        'words+=("$word"); done\n'
        "[[ $done == 1 ]] || words+=(--dry-run --json)\n"
        f'exec {sys.executable} -m sglang_w4afp8.cli "${{words[@]}}"\n'
    )
    # Every node of the allocation, one after the other.
    srun = (
        "while [[ $1 == --* ]]; do shift; done\n"
        'for id in 0 1 2 3; do SLURM_NODEID=$id SLURM_LOCALID=0 "$@"; done\n'
    )
    for name, text in (("sglang-w4afp8", insert), ("srun", srun)):
        (programs / name).write_text(f"#!/usr/bin/env bash\nset -eu\n{text}")
        (programs / name).chmod(0o755)
    (programs / "python3").symlink_to(sys.executable)

    def run(path: str, *words: str, **variables: str) -> list[dict[str, Any]]:
        environ = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"} | variables
        done = subprocess.run(
            [EXAMPLES / path, *words], env=environ, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        decoder, text, nodes = json.JSONDecoder(), done.stdout.strip(), []
        while text:
            found, end = decoder.raw_decode(text)
            nodes += found["nodes"]
            text = text[end:].lstrip()
        return nodes

    return run


def arguments_of(node: dict[str, Any]) -> list[str]:
    command: list[str] = node["command"]
    assert command[1:3] == ["-m", "sglang.launch_server"]
    assert node["environment"]["SGLANG_W4AFP8_STRICT"] == "1"
    return command[3:]


def launched(tp: int, nnodes: int, rank: int, *more: str) -> list[str]:
    """What ``launch`` itself would run."""
    wanted = Wanted(MODEL, tp=tp, nnodes=nnodes, master=MASTER, passed_on=more)
    return [word for flag in launch_plan.node_flags(wanted, rank) for word in flag.words]


@pytest.mark.parametrize(
    ("path", "gpus", "nnodes"),
    [
        ("two-nodes-8gpu.sh", 8, 2),
        ("four-nodes-8gpu-tp32.sh", 8, 4),
        ("eight-nodes-4gpu-tp32.sh", 4, 8),
    ],
)
def test_nodes(
    example: Callable[..., list[dict[str, Any]]],
    parser: argparse.ArgumentParser,
    path: str,
    gpus: int,
    nnodes: int,
) -> None:
    for rank in (0, nnodes - 1):
        (node,) = example(path, MODEL, MASTER, str(rank))
        found = arguments_of(node)
        assert found == launched(gpus * nnodes, nnodes, rank, *GRAPHS)
        args = read(parser, found)
        assert (args.tp_size, args.nnodes, args.node_rank) == (gpus * nnodes, nnodes, rank)
        assert args.dist_init_addr == f"{MASTER}:5000"
        assert args.quantization == "w4afp8"
        assert node["environment"]["GLOO_SOCKET_IFNAME"] == "lo"


def test_one_node(
    example: Callable[..., list[dict[str, Any]]], parser: argparse.ArgumentParser
) -> None:
    (node,) = example("one-node-8gpu.sh", MODEL)
    assert arguments_of(node) == launched(8, 1, 0)
    read(parser, arguments_of(node))
    (node,) = example("one-node-8gpu.sh", MODEL, "--port", "1234", "--ep", "8")
    args = read(parser, arguments_of(node))
    assert (args.port, args.ep_size) == (1234, 8)


def test_mtp(example: Callable[..., list[dict[str, Any]]], parser: argparse.ArgumentParser) -> None:
    (node,) = example("mtp.sh", MODEL)
    args = read(parser, arguments_of(node))
    assert args.speculative_algorithm == "NEXTN"
    assert args.speculative_num_draft_tokens == args.speculative_num_steps + 1
    (action,) = [a for a in parser._actions if a.dest == "speculative_algorithm"]
    assert "NEXTN" in str(action.help), "the algorithm is one that this SGLang names"


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_disaggregation(
    example: Callable[..., list[dict[str, Any]]], parser: argparse.ArgumentParser, mode: str
) -> None:
    (node,) = example(f"pd/{mode}.sh", MODEL, "mlx5_0")
    args = read(parser, arguments_of(node))
    assert (args.disaggregation_mode, args.disaggregation_ib_device) == (mode, "mlx5_0")
    # The port that pd/router.sh names.
    assert args.disaggregation_bootstrap_port == 8998


def test_slurm(
    example: Callable[..., list[dict[str, Any]]], parser: argparse.ArgumentParser
) -> None:
    nodes = example(
        "slurm/tp32.sbatch",
        MODEL,
        SLURM_JOB_NODELIST="gpu[1-2,07-08]",
        SLURM_NNODES="4",
    )
    assert [node["rank"] for node in nodes] == [0, 1, 2, 3]
    for rank, node in enumerate(nodes):
        args = read(parser, arguments_of(node))
        assert (args.tp_size, args.nnodes, args.node_rank) == (32, 4, rank)
        assert args.dist_init_addr == "gpu1:5000"


def test_kubernetes(tmp_path: Path, parser: argparse.ArgumentParser) -> None:
    text = (EXAMPLES / "kubernetes/lws-tp32.yaml").read_text()
    template = next(yaml.safe_load_all(text))["spec"]["leaderWorkerTemplate"]
    (container,) = template["workerTemplate"]["spec"]["containers"]
    assert container["command"] == ["sglang-w4afp8", "launch"]
    words = list(container["args"])
    words[words.index("--") : words.index("--")] = ["--dry-run", "--json"]
    for rank in range(template["size"]):
        node = cli(
            *words,
            LWS_WORKER_INDEX=str(rank),
            LWS_GROUP_SIZE=str(template["size"]),
            LWS_LEADER_ADDRESS="r1-0.r1.serving",
        )
        args = read(parser, arguments_of(node))
        assert (args.tp_size, args.nnodes, args.node_rank) == (32, 4, rank)
        assert args.dist_init_addr == "r1-0.r1.serving:5000"
        assert args.port == container["ports"][0]["containerPort"]


def cli(*words: str, **variables: str) -> dict[str, Any]:
    """One node that ``launch`` prints."""
    done = subprocess.run(
        [sys.executable, "-m", "sglang_w4afp8.cli", "launch", *words],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    (node,) = json.loads(done.stdout)["nodes"]
    return dict(node)


def test_compose(parser: argparse.ArgumentParser) -> None:
    """Compose's own replacement of ``${NAME:-default}`` is bash's too."""
    service = yaml.safe_load((EXAMPLES / "docker/compose.yaml").read_text())["services"]["server"]
    assert service["command"][:2] == ["sglang-w4afp8", "launch"]
    quoted = " ".join(f'"{word}"' for word in service["command"][2:])
    for variables, nnodes in (
        ({}, 1),
        ({"TP": "32", "NNODES": "4", "MASTER": "127.0.0.1", "NODE_RANK": "3"}, 4),
    ):
        done = subprocess.run(
            ["bash", "-euc", f"printf '%s\\n' {quoted}"],
            env=os.environ | {"MODEL": MODEL, **variables},
            capture_output=True,
            text=True,
            check=True,
        )
        node = cli(*done.stdout.split(), "--dry-run", "--json")
        tp = int(variables.get("TP", "8"))
        assert arguments_of(node) == launched(tp, nnodes, nnodes - 1)
        read(parser, arguments_of(node))


def test_ray(tmp_path: Path, parser: argparse.ArgumentParser) -> None:
    """Node-specific arguments are Ray's business; the rest is launch's."""
    stubs = tmp_path / "sglang"
    stubs.mkdir()
    (stubs / "__init__.py").touch()
    (stubs / "launch_server.py").write_text(SERVER)
    (tmp_path / "ray.py").write_text(RAY)
    (tmp_path / "python3").symlink_to(sys.executable)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [EXAMPLES / "ray/serve.sh", MODEL, "--log-level", "info"],
        env=os.environ | {"PYTHONPATH": path, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    args = read(parser, found)
    assert args.use_ray
    assert (args.tp_size, args.nnodes) == (32, 4)
    own = launched(32, 4, 0, *GRAPHS)
    for flag in ("--node-rank", "--dist-init-addr"):
        at = own.index(flag)
        del own[at : at + 2]
    assert found == [*own, "--log-level", "info", "--use-ray"]


def test_an_invented_flag_would_be_told(parser: argparse.ArgumentParser) -> None:
    for words in (["--model-path", "m", "--tp", "8"], ["--model-path", "m", "--cuda-graph-max"]):
        with pytest.raises(AssertionError, match="no arguments of this SGLang"):
            read(parser, shlex.split(" ".join(words)))
