"""Lists of pairs sorted by expert, which the kernels of the ``prefill`` path share."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

from sglang_w4afp8.kernels.hopper.plan import Layer

TILE_TOKENS = 128
"""Most tokens of a tile where CTAs of down own outputs; else plan_prefill.SORTED_TOKENS."""
SORT_PAIRS = 4_096
"""Pairs that a CTA of route sorts."""
ALIGNMENT = 1024
"""Of a stage: the swizzle of its tokens repeats after so many bytes."""


@dataclass(frozen=True)
class Lists:
    """Runs of tokens whose pairs are sorted by expert, each on its own.

    Attributes:
        count: how many.
        tokens: of a list; the last may have fewer.
        max_tiles: room for tiles in a list.
        together: an expert has a multiple of so many tiles, the last perhaps without tokens.
        tile_tokens: most of a tile.
        parts: CTAs of route that sort a list; the last list may need fewer.
    """

    count: int
    tokens: int
    max_tiles: int
    parts: int
    together: int = 1
    tile_tokens: int = TILE_TOKENS

    @classmethod
    def of(
        cls, layer: Layer, tokens: int, most_pairs: int, together: int = 1, part_tokens: int = 0
    ) -> Lists:
        """Lists of about ``most_pairs`` pairs for ``tokens`` tokens; whole CTAs sort a list.

        Args:
            layer: the sizes.
            tokens: M.
            most_pairs: of a list.
            together: see the class.
            part_tokens: that a CTA sorts; 0: as many as have :data:`SORT_PAIRS` pairs, if need be
                with a token's pairs in two CTAs.
        """
        step = part_tokens or SORT_PAIRS // gcd(SORT_PAIRS, layer.top_k)
        part_pairs = part_tokens * layer.top_k or SORT_PAIRS
        most = max(step, most_pairs // layer.top_k // step * step)
        # Of about the same size: the tiles of a short last list would be the emptiest.
        share = -(-tokens // -(-tokens // most))
        size = min(tokens, -(-share // step) * step)
        pairs = size * layer.top_k
        most_tiles = min(pairs * together, layer.experts * together + pairs // TILE_TOKENS)
        return cls(-(-tokens // size), size, most_tiles, -(-pairs // part_pairs), together)
