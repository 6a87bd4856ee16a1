"""The contract between a layer and a kernel.

A backend says of a :class:`~sglang_w4afp8.layer.MoEProblem` why it cannot run it, or None; turns
the weights, once, into whatever order it reads; and runs. Choosing among backends is
:mod:`sglang_w4afp8.kernels.registry`'s work. Nothing here knows SGLang.
"""

from __future__ import annotations

from typing import Protocol

import torch

from sglang_w4afp8.layer import Device, MoEProblem, MoEWeights

__all__ = ["Device", "MoEBackend", "MoEProblem", "MoEWeights"]


class MoEBackend(Protocol):
    """A kernel for whole MoE layers. One instance serves all; a layer's state is its weights."""

    name: str

    def supports(self, problem: MoEProblem) -> str | None:
        """None if it can run ``problem``, else the reason, with numbers, as half a sentence."""
        ...

    def prepare(self, problem: MoEProblem, weights: MoEWeights) -> MoEWeights:
        """Bring the loaded weights into the kernel's order, once. May reuse their storage."""
        ...

    def run(
        self,
        problem: MoEProblem,
        weights: MoEWeights,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        routed_scaling_factor: float,
        x_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the layer.

        Args:
            problem: as given to ``prepare``.
            weights: what ``prepare`` returned.
            x: ``(T, K)`` hidden states, T may be 0.
            topk_weights: ``(T, top_k)`` float32.
            topk_ids: ``(T, top_k)`` int32 or int64 local expert ids, −1 for experts elsewhere.
            routed_scaling_factor: multiplies the result.
            x_scale: ``(T, K/128)`` float32 for ``x`` in float8_e4m3fn, which is then used as it is;
                only where ``problem.dispatched``.

        Returns:
            ``(T, K)`` in ``x``'s dtype, ``problem.dtype`` for E4M3: this rank's partial sum.
        """
        ...

    def run_masked(
        self,
        problem: MoEProblem,
        weights: MoEWeights,
        rows: torch.Tensor,
        row_scale: torch.Tensor | None,
        masked_m: torch.Tensor,
        expected_m: int,
    ) -> torch.Tensor:
        """Run each expert on the rows that a dispatcher has put into its slots.

        Called only where ``problem.dispatched``. Nothing waits for ``masked_m``, so that a CUDA
        graph can hold the call.

        Args:
            problem: as given to ``prepare``.
            weights: what ``prepare`` returned.
            rows: ``(E, M, K)`` contiguous, ``problem.dtype`` or float8_e4m3fn; anything, NaN as
                well, behind an expert's count.
            row_scale: ``(E, M, K/128)`` float32 of any strides for rows in float8_e4m3fn, which are
                then used as they are; else None.
            masked_m: ``(E,)`` int32, rows of each expert.
            expected_m: about how many rows an expert gets; affects speed alone.

        Returns:
            ``(E, M, K)`` in ``problem.dtype``, without router weights; undefined behind the counts.
        """
        ...
