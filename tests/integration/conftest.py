"""Checkpoints and the judge's answers about them, made once for all integration tests.

``checkpoint_of(name)`` writes a tiny checkpoint and converts it with the real converter;
``reference_of(name)`` runs the judge on it. Both do so when first asked, and keep the result in a
folder that parallel test processes share.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sglang_w4afp8.testing import tiny
from sglang_w4afp8.tools.plan_model import Linear

NEW_TOKENS = 16
# The second is longer than 64 tokens, for a radix-cache hit worth the name.
TEXTS = (
    "The capital of France is",
    "Once upon a time there was a king who had three daughters, and the youngest of them asked "
    "questions that nobody could answer. He sent for the wisest people of the country, who came "
    "with their books, and they read and counted and wrote until the night was over.",
    "def main(): return",
)


@dataclass(frozen=True)
class Source:
    """How a named checkpoint is made: the writer, and the converter's group size."""

    write: Callable[[Path], Path]
    group: int = 128


ONLINE = "-online"
"""End of a name: the unconverted source, to be served with ``--quantization w4afp8``."""


def _deepseek(folder: Path) -> Path:
    return tiny.write_deepseek(folder)


def _deepseek_192_320(folder: Path) -> Path:
    shape = tiny.DeepseekShape.unaligned(tp=8, expert=192, dense=320)
    return tiny.write_deepseek(folder, shape)


def _qwen(folder: Path) -> Path:
    return tiny.write_qwen(folder)


def _qwen_176(folder: Path) -> Path:
    return tiny.write_qwen(folder, tiny.QwenShape.unaligned(tp=8, expert=176))


# The numbers behind a name are widths per rank at tp 8: SGLang's own method cuts the scales of
# these wrongly and says nothing.
SOURCES = {
    "deepseek": Source(_deepseek),
    "deepseek-192-320": Source(_deepseek_192_320),
    "qwen": Source(_qwen),
    "qwen-group-32": Source(_qwen, group=32),
    "qwen-176": Source(_qwen_176),
}


@dataclass(frozen=True)
class Reference:
    """What the judge says about a checkpoint, for ``TEXTS``, in float32.

    Attributes:
        prompts: token ids of each text.
        token_ids: greedy continuation of each prompt, ``NEW_TOKENS`` tokens.
        logprobs: of the continuations' tokens.
        forced: of each prompt's tokens after the first.
        texts: the continuations, decoded.
        coarse: the judge's own rounding noise: ``forced`` and ``logprobs`` in one row per prompt,
            for the same tokens, computed in bfloat16.
    """

    prompts: list[list[int]]
    token_ids: list[list[int]]
    logprobs: list[list[float]]
    forced: list[list[float]]
    texts: list[str]
    coarse: list[list[float]] = field(repr=False)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """The judge's small matrices only wait for each other's threads where cores are few."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def sglang_linear() -> Callable[..., Any]:
    """A linear of ``plan`` -> the layer that SGLang's models build for it, without memory.

    To be called within ``virtual_rank``; ``quant_config`` and ``prefix`` are the layer's.
    """
    import torch
    from sglang.srt.layers import linear as layers

    def build(linear: Linear, quant_config: Any, prefix: str) -> Any:
        common = {
            "bias": False,
            "quant_config": quant_config,
            "prefix": prefix,
            "params_dtype": torch.bfloat16,
        }
        columns, rows = linear.columns, linear.rows
        with torch.device("meta"):
            if linear.cut == "columns":
                return layers.RowParallelLinear(columns, rows[0], **common)
            if linear.cut == "none":
                return layers.ReplicatedLinear(columns, sum(rows), **common)
            if linear.kv_heads:
                head = rows[1] // linear.kv_heads
                return layers.QKVParallelLinear(
                    columns, head, rows[0] // head, linear.kv_heads, **common
                )
            if len(rows) > 1:
                return layers.MergedColumnParallelLinear(columns, list(rows), **common)
            return layers.ColumnParallelLinear(columns, rows[0], **common)

    return build


@pytest.fixture(scope="session")
def texts() -> tuple[str, ...]:
    """The texts whose token ids are ``Reference.prompts``."""
    return TEXTS


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for this run of the tests, whatever the number of processes that share it."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = root / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@contextlib.contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Whoever comes second waits until ``path`` has been made."""
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def checkpoint_of(shared_folder: Path) -> Callable[[str], Path]:
    """Name in ``SOURCES`` -> folder of the W4AFP8 checkpoint; ``<folder>-source`` is beside it."""
    from sglang_w4afp8.tools.convert import convert_checkpoint

    def get(name: str) -> Path:
        if name.endswith(ONLINE):
            return get(name.removesuffix(ONLINE)).with_name(f"{name.removesuffix(ONLINE)}-source")
        folder = shared_folder / name
        with _only_one(folder):
            if not folder.exists():
                source = SOURCES[name].write(shared_folder / f"{name}-source")
                convert_checkpoint(source, folder, group_size=SOURCES[name].group)
                config = json.loads((folder / "config.json").read_text())["quantization_config"]
                assert config["quant_method"] == "w4afp8"
                assert config["group_size"] == SOURCES[name].group
        return folder

    return get


@pytest.fixture(scope="session")
def reference_of(
    shared_folder: Path, checkpoint_of: Callable[[str], Path]
) -> Callable[[str], Reference]:
    """Name in ``SOURCES`` -> the judge's answers."""

    def get(name: str) -> Reference:
        name = name.removesuffix(ONLINE)  # the codes are the converter's, so the answers are too
        answers = shared_folder / f"{name}.judge.json"
        with _only_one(answers):
            if not answers.exists():
                answers.write_text(json.dumps(asdict(_ask_judge(checkpoint_of(name)))))
        return Reference(**json.loads(answers.read_text()))

    return get


def _ask_judge(folder: Path) -> Reference:
    import torch
    from transformers import AutoTokenizer

    from sglang_w4afp8.testing.hf_judge import HfJudge

    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    judge, coarse_judge = HfJudge(folder), HfJudge(folder, torch.bfloat16)
    continuations = [judge.greedy(prompt, NEW_TOKENS) for prompt in prompts]
    whole = [prompt + c.token_ids for prompt, c in zip(prompts, continuations, strict=True)]
    return Reference(
        prompts=prompts,
        token_ids=[c.token_ids for c in continuations],
        logprobs=[c.logprobs for c in continuations],
        forced=[judge.forced(prompt) for prompt in prompts],
        texts=[tokenizer.decode(c.token_ids) for c in continuations],
        coarse=[coarse_judge.forced(text) for text in whole],
    )
