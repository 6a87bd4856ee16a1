"""SGLang's ``DeepEPMoE`` and dispatcher in one process, over something that plays DeepEP's buffer.

The DeepEP library needs GPUs that see each other, and SGLang asserts DeepGEMM beside it. Within
:func:`virtual_deepep` layers are built and run as with ``--moe-a2a-backend deepep``, whatever of
that is installed; what SGLang would send through ``deep_ep.Buffer`` goes to the object given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from sglang_w4afp8.srt.virtual_ranks import virtual_rank

Quantize = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@contextmanager
def virtual_deepep(buffer: Any, quantize: Quantize, rank: int, ranks: int) -> Iterator[None]:
    """Look like expert-parallel ``rank`` of ``ranks`` behind DeepEP.

    Args:
        buffer: has the methods of ``deep_ep.Buffer`` that SGLang's dispatcher calls, see
            :class:`sglang_w4afp8.testing.dispatch.OneBatch`.
        quantize: rows to E4M3 and their scales, in the place of SGLang's Triton kernel.
        rank: 0 … ranks − 1.
        ranks: all ranks.
    """
    from sglang.srt.layers import deep_gemm_wrapper
    from sglang.srt.layers.moe.fused_moe_triton import layer
    from sglang.srt.layers.moe.token_dispatcher import deepep
    from sglang.srt.layers.moe.utils import DeepEPMode, MoeA2ABackend
    from sglang.srt.runtime_context import get_flags

    moe = get_flags().moe
    config = SimpleNamespace(normal_dispatch_config=None, normal_combine_config=None)
    # Object, attribute, value; what an absent library leaves undefined is created.
    changes: list[tuple[Any, str, Any]] = [
        (layer, "_get_deepep_comm_group", lambda backend: None),
        (deepep, "use_deepep", True),
        (deepep, "Buffer", SimpleNamespace(capture=lambda: None)),
        (deepep.DeepEPConfig, "get_instance", lambda: config),
        (deepep, "sglang_per_token_group_quant_fp8", lambda x, group, **_: quantize(x)),
        (deep_gemm_wrapper, "ENABLE_JIT_DEEPGEMM", True),
        (deep_gemm_wrapper, "DEEPGEMM_SCALE_UE8M0", False),
        (deep_gemm_wrapper, "DEEPGEMM_BLACKWELL", False),
        *(
            (mode, "_get_buffer", lambda self: buffer)
            for mode in (
                deepep._DeepEPDispatcherImplNormal,
                deepep._DeepEPDispatcherImplLowLatency,
            )
        ),
    ]
    with ExitStack() as stack:
        # The flags exist, perhaps as slots, which patch restores only without create.
        for name, flag in (("a2a_backend", MoeA2ABackend.DEEPEP), ("deepep_mode", DeepEPMode.AUTO)):
            stack.enter_context(patch.object(moe, name, flag))
        for target, name, value in changes:
            stack.enter_context(patch.object(target, name, value, create=True))
        stack.enter_context(virtual_rank(rank, ranks, ep_size=ranks))
        yield


def run_through_deepep(
    layer: Any,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    low_latency: bool,
) -> torch.Tensor:
    """The layer's forward, dispatch and combine included: what the buffer's combine returned.

    Args:
        layer: a ``DeepEPMoE`` that was built within :func:`virtual_deepep`, which is still open.
        x: ``(T, K)``.
        topk_weights: ``(T, top_k)``.
        topk_ids: ``(T, top_k)``, the checkpoint's.
        low_latency: as for decoding, else as for prefill.
    """
    from sglang.srt.layers.dp_attention import set_is_extend_in_batch
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    set_is_extend_in_batch(not low_latency)
    logits = x.new_zeros(x.shape[0], layer.num_experts)
    return layer(x, StandardTopKOutput(topk_weights, topk_ids, logits))
