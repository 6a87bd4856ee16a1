"""A model as ``plan`` sees it: its matrices, which axis of each is cut, and in what format it is.

:mod:`plan_config` makes one of a config.json. Norms, biases and scales of one number are not
counted; they are below a thousandth.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sglang_w4afp8.errors import ShardError
from sglang_w4afp8.sharding import AxisShard, ExpertShard, LinearShard, nearest_divisors
from sglang_w4afp8.spec import QuantSpec

VOCAB_PADDING = 64
"""SGLang pads the vocabulary to a multiple of this (``vocab_parallel_embedding.py``)."""


@dataclass(frozen=True)
class Linear:
    """One linear outside the experts, as SGLang builds it, in every layer that has it.

    Attributes:
        path: name below ``model.layers.N``.
        kind: class of tensor for the table.
        rows: size of each logical output (gate and up; q, k, v).
        columns: input size.
        cut: ``rows``, ``columns`` or ``none`` (every rank holds all of it).
        parts: checkpoint names of the outputs, last component.
        layers: indices of the layers that have it.
        fp8: how many of them are block FP8; the others are BF16.
        kv_heads: of a qkv projection: key heads, which ranks share when they are fewer.
    """

    path: str
    kind: str
    rows: tuple[int, ...]
    columns: int
    cut: str
    parts: tuple[str, ...]
    layers: range
    fp8: int
    kv_heads: int = 0

    def shard(self, rank: int, tp: int, block: tuple[int, int]) -> LinearShard:
        """A rank's part.

        Args:
            rank: 0 … tp − 1.
            tp: ranks that cut it.
            block: FP8 block, or any block for a BF16 linear.

        Raises:
            ShardError: a size does not divide.
        """
        ranks = 1 if self.cut == "none" else tp
        rank = 0 if self.cut == "none" else rank
        columns = AxisShard.even(
            self.columns, block[1], rank if self.cut == "columns" else 0,
            ranks if self.cut == "columns" else 1, self.path,
        )  # fmt: skip
        rows = []
        for index, size in enumerate(self.rows):
            if self.cut != "rows":
                rows.append(AxisShard(size, 0, size, block[0]))
            elif index > 0 and self.kv_heads and self.kv_heads < tp:
                head, copies = size // self.kv_heads, tp // self.kv_heads
                rows.append(AxisShard.copied(head, block[0], rank, tp, copies))
            else:
                rows.append(AxisShard.even(size, block[0], rank, ranks, self.path))
        return LinearShard(tuple(rows), columns)


@dataclass(frozen=True)
class Model:
    """What ``plan`` needs of a config.json.

    Attributes:
        name: as asked for.
        source: where the config came from.
        model_type: config.json's.
        attention: ``MLA`` or ``GQA``.
        hidden: hidden size.
        layers: decoder layers, MTP layers not among them.
        mtp: MTP layers.
        heads: query heads.
        kv_heads: key heads (GQA).
        kv_width: elements of one token's cache in one layer: the latent and its rotary part (MLA),
            or key and value of one head (GQA).
        index_head_dim: width of the sparse-attention indexer's keys, 0 without one.
        absorbed_rows: rows of ``kv_b_proj``, which MLA keeps a second time, in BF16.
        vocab: vocabulary.
        tied: whether embedding and lm_head are one tensor.
        context: longest context.
        experts: routed experts of a layer.
        top_k: of them chosen per token.
        expert_width: intermediate size of one.
        moe_layers: layers with experts.
        linears: everything else that is quantised or large.
        spec: the quantization config.
        states_block: whether config.json itself names a ``weight_block_size``.
        quant_method: config.json's; empty for an unquantised checkpoint.
        notes: what a reader should know.
        problems: what would keep the checkpoint from loading.
    """

    name: str
    source: str
    model_type: str
    attention: str
    hidden: int
    layers: int
    mtp: int
    heads: int
    kv_heads: int
    kv_width: int
    index_head_dim: int
    absorbed_rows: int
    vocab: int
    tied: bool
    context: int
    experts: int
    top_k: int
    expert_width: int
    moe_layers: range
    linears: tuple[Linear, ...]
    spec: QuantSpec
    states_block: bool
    quant_method: str
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def is_w4afp8(self) -> bool:
        """Whether it is a W4AFP8 checkpoint already."""
        return self.quant_method == "w4afp8"

    @property
    def block(self) -> tuple[int, int]:
        """FP8 block of the linears; what BF16 linears are given, too, has no effect."""
        return self.spec.weight_block_size or (128, 128)

    @property
    def expert_parameters(self) -> int:
        """Weights of all routed experts."""
        return len(self.moe_layers) * self.experts * 3 * self.hidden * self.expert_width

    @property
    def parameters(self) -> int:
        """Weights of the model without MTP; DeepSeek-R1: 671 billion."""
        linears = sum(sum(x.rows) * x.columns * len(x.layers) for x in self.linears)
        ends = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.expert_parameters + linears + ends + self.router_parameters

    @property
    def router_parameters(self) -> int:
        """Weights of the gates, BF16 and whole on every rank."""
        return len(self.moe_layers) * self.experts * self.hidden

    def check(self, tp: int, ep: int = 1) -> None:
        """Raise if SGLang and this package cannot cut the model that way.

        Raises:
            ShardError: with the nearest degrees that work.
        """
        if ep < 1 or tp % ep:
            raise ShardError(
                f"--tp {tp} --ep {ep}",
                "the ranks of one expert-parallel group must divide the tensor-parallel ones",
                [f"--ep {d}" for d in nearest_divisors(tp, max(1, ep))],
            )
        if self.experts % ep or tp > self.experts:
            raise ShardError(
                f"{self.experts} experts at --tp {tp} --ep {ep}",
                "SGLang wants whole experts in every expert-parallel group and no more ranks than "
                "experts",
                [f"--ep {d}" for d in nearest_divisors(self.experts, ep)] if self.experts % ep
                else [f"--tp {self.experts}"],
            )  # fmt: skip
        for what, count in (
            ("num_attention_heads", self.heads),
            ("padded vocabulary", self.padded_vocab),
        ):
            if count % tp:
                raise ShardError(
                    f"{what} {count} over {tp} tensor-parallel ranks",
                    f"{count} / {tp} = {count / tp:.2f} is not a whole number",
                    [f"--tp {d}" for d in nearest_divisors(count, tp)],
                )
        if self.attention == "GQA" and self.kv_heads % tp and tp % self.kv_heads:
            raise ShardError(
                f"num_key_value_heads {self.kv_heads} over {tp} tensor-parallel ranks",
                "one number must divide the other: heads are either cut or copied",
                [f"--tp {d}" for d in nearest_divisors(self.heads, tp)],
            )
        ExpertShard.plan(
            self.hidden, self.expert_width, self.spec.group_size, 0, tp // ep, "routed experts"
        )
        for linear in self.linears:
            linear.shard(0, tp, self.block)

    def degrees(self, ep: int = 1, largest: int = 512) -> list[int]:
        """Every tensor-parallel degree up to ``largest`` that :meth:`check` lets pass."""
        found = []
        for tp in range(1, largest + 1):
            try:
                self.check(tp, ep)
            except ShardError:
                continue
            found.append(tp)
        return found

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding as SGLang allocates it."""
        return -(-self.vocab // VOCAB_PADDING) * VOCAB_PADDING
