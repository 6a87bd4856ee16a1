"""Experts behind a token dispatcher that sends rows: DeepEP and what speaks like it.

SGLang's ``DeepEPMoE`` hands such rows to ``apply_deepep_normal`` and ``apply_deepep_ll`` of the
quantization method and their result to the dispatcher's combine. Layouts are those of
``layers/moe/token_dispatcher/deepep.py`` and ``layers/moe/ep_moe/layer.py`` in SGLang
0.5.16 … 0.5.23:

* normal: ``(T, K)`` received tokens, ``topk_ids`` local and −1 elsewhere; the weighted sum of each
  token over the local experts goes back;
* low latency: ``(E, M, K)`` rows sorted to experts, ``masked_m`` of them valid; each row's result
  goes back unweighted, and combine weighs it.

Rows are BF16, or E4M3 with one float32 scale per 128 columns, which every backend uses as they are.
``routed_scaling_factor`` is not applied here: the models do so after combine. What goes back is
BF16 whatever came and however few rows there were, because DeepEP's combine knows nothing else;
SGLang 0.5.16's own method fails in both (issue 33660), from 0.5.20 on it does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sglang_w4afp8.errors import BackendError
from sglang_w4afp8.kernels.base import MoEBackend, MoEProblem
from sglang_w4afp8.layer import MoEWeights
from sglang_w4afp8.reference import ROW_GROUP

if TYPE_CHECKING:
    from sglang.srt.layers.moe.token_dispatcher import (
        CombineInput,
        DeepEPLLDispatchOutput,
        DeepEPNormalDispatchOutput,
    )

DISPATCHERS = ("deepep", "mooncake", "nixl", "pplx")
"""Values of ``--moe-a2a-backend`` whose rows come through ``DeepEPMoE``'s entry points."""

_DTYPE_OPTION = "--deepep-dispatcher-output-dtype"


def row_dtypes(problem: MoEProblem) -> dict[str, str]:
    """In which form the dispatcher is asked to send rows, as it wants to be told.

    E4M3 halves the traffic of decoding, and its scales are finer than any of the activation
    schemes'. For prefill BF16 is asked for: the kernels for many tokens are faster with it, and do
    not take E4M3 with every layer (``takes_row_scales`` of ``plan_prefill``). Without E4M3 on the
    card, or where DeepGEMM packs its scales to powers of two (Blackwell), always BF16.

    Returns:
        SGLang 0.5.16 knows the last key alone and uses it for both modes; 0.5.23 looks for that of
        the mode first.
    """
    device = problem.device
    takes_fp8 = device.type != "cuda" or (8, 9) <= device.capability < (10, 0)
    decoding = "fp8" if takes_fp8 and problem.hidden_size % ROW_GROUP == 0 else "bf16"
    return {
        "normal_dispatcher_output_dtype": "bf16",
        "low_latency_dispatcher_output_dtype": decoding,
        "dispatcher_output_dtype": decoding,
    }


class DispatchedRows:
    """The entry points of ``DeepEPMoE``, mixed into our method."""

    prefix: str
    backend: MoEBackend
    problem: MoEProblem

    def _current(self, layer: torch.nn.Module) -> MoEWeights:
        raise NotImplementedError

    def ask_for_rows(self, layer: torch.nn.Module) -> None:
        """Tell the layer's dispatcher in which form to send; the user's option goes before it."""
        dispatcher = getattr(layer, "dispatcher", None)
        if dispatcher is not None:
            dispatcher.set_quant_config(row_dtypes(self.problem))

    def apply_deepep_normal(
        self, layer: torch.nn.Module, dispatch_output: DeepEPNormalDispatchOutput
    ) -> torch.Tensor:
        """Received tokens through this rank's experts.

        Args:
            layer: the ``DeepEPMoE``.
            dispatch_output: ``hidden_states`` ``(T, K)``, T may be 0; ``hidden_states_scale``
                ``(T, K/128)`` or None; ``topk_ids`` and ``topk_weights`` ``(T, top_k)``.

        Returns:
            ``(T, K)`` in the model's dtype, weighted and summed.

        Raises:
            BackendError: rows in a form that no backend takes.
        """
        rows, scale = dispatch_output.hidden_states, dispatch_output.hidden_states_scale
        self._check(layer, rows, scale)
        return self.backend.run(
            self.problem,
            self._current(layer),
            rows,
            dispatch_output.topk_weights,
            dispatch_output.topk_ids,
            1.0,
            x_scale=scale,
        )

    def apply_deepep_ll(
        self, layer: torch.nn.Module, dispatch_output: DeepEPLLDispatchOutput
    ) -> torch.Tensor:
        """Rows that are sorted to experts already.

        Args:
            layer: the ``DeepEPMoE``.
            dispatch_output: ``hidden_states`` ``(E, M, K)``; ``hidden_states_scale``
                ``(E, M, K/128)`` of any strides, or None; ``masked_m`` ``(E,)`` int32;
                ``expected_m``.

        Returns:
            ``(E, M, K)`` in the model's dtype, unweighted, undefined behind ``masked_m``.

        Raises:
            BackendError: rows in a form that no backend takes, or a combine that waits for signals.
        """
        rows, scale = dispatch_output.hidden_states, dispatch_output.hidden_states_scale
        self._check(layer, rows, scale)
        return self.backend.run_masked(
            self.problem,
            self._current(layer),
            rows,
            scale,
            dispatch_output.masked_m,
            dispatch_output.expected_m,
        )

    def apply_dispatched(self, layer: torch.nn.Module, dispatch_output: Any) -> CombineInput | None:
        """For layers whose rows come to ``apply``; None for standard ones.

        ``DeepEPMoE`` does so under ``SGLANG_DEEPEP_BF16_DISPATCH``.
        """
        from sglang.srt.layers.moe.token_dispatcher import (
            DeepEPLLCombineInput,
            DeepEPNormalCombineInput,
        )

        form = dispatch_output.format
        combine: type[CombineInput]
        if form.is_deepep_normal():
            run, combine = self.apply_deepep_normal, DeepEPNormalCombineInput
        elif form.is_deepep_ll():
            run, combine = self.apply_deepep_ll, DeepEPLLCombineInput
        else:
            return None
        return combine(
            hidden_states=run(layer, dispatch_output),
            topk_ids=dispatch_output.topk_ids,
            topk_weights=dispatch_output.topk_weights,
        )

    def _check(
        self, layer: torch.nn.Module, rows: torch.Tensor, scale: torch.Tensor | None
    ) -> None:
        """Host-side facts only; nothing here may wait for the GPU."""
        if getattr(layer, "down_gemm_overlap_args", None) is not None:
            raise BackendError(
                f"{self.prefix}: --enable-single-batch-overlap with a runner that signals",
                "the dispatcher's combine would wait for a signal after each block of rows, which "
                "the W4AFP8 kernels do not send",
                ["--moe-runner-backend auto", "without --enable-single-batch-overlap"],
            )
        groups = rows.shape[-1] / ROW_GROUP
        if rows.dtype == self.problem.dtype and scale is None:
            return
        if rows.dtype == torch.float8_e4m3fn and scale is not None:
            fits = scale.dtype == torch.float32 and tuple(scale.shape) == (*rows.shape[:-1], groups)
            if fits:
                return
        scales = "no scales" if scale is None else f"scales {scale.dtype} {tuple(scale.shape)}"
        raise BackendError(
            f"{self.prefix}: rows {rows.dtype} {tuple(rows.shape)} with {scales} from the "
            "dispatcher",
            f"the W4AFP8 kernels take {self.problem.dtype} without scales, or float8_e4m3fn with "
            f"a float32 scale per {ROW_GROUP} columns",
            [f"{_DTYPE_OPTION} bf16", "--moe-a2a-backend none"],
        )
