"""The SGLang platform that serves real models on a machine without an accelerator.

SGLang's in-tree CPU engine needs AMX instructions, pads shards that do not divide and takes other
code paths than a GPU does, so it says little about how a model will load on GPUs. This platform is
an out-of-tree one: plain torch on the CPU, gloo between ranks, the same sharding as on GPUs. It is
slow and meant for tests, demonstrations and trying how a checkpoint loads at a given TP degree.

It owns everything that SGLang needs to know about such a device:

* defaults, so that ``SGLANG_PLATFORM=w4afp8_cpu python -m sglang.launch_server --model-path X``
  works with no further option,
* the KV-pool and allocator classes (SGLang 0.5.16 to 0.5.20 ask the platform for them),
* DeepSeek's MLA attention over the ``torch_native`` backend,
* FP8 weights without FP8 kernels (see ``cpu_fp8``).

Nothing here is imported unless ``SGLANG_PLATFORM`` asks for the platform by name.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.interface import PlatformEnum, SRTPlatform

from sglang_w4afp8.errors import BackendError
from sglang_w4afp8.srt import cpu_fp8

ATTENTION_BACKEND = "torch_native"
# Enough for a demonstration; without a limit SGLang would give 88 % of the host's memory to every
# rank's KV cache, and size its request table for thousands of requests.
DEFAULT_KV_TOKENS = 16384
DEFAULT_RUNNING_REQUESTS = 32


class CpuPlatform(CpuDeviceMixin, SRTPlatform):
    """Plain torch on the CPU, presented to SGLang as an out-of-tree device.

    The device type is ``"cpu"``, but ``is_cpu()`` is False: SGLang reads that as "the AMX engine".
    """

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def get_device(self, device_id: int = 0) -> str:
        """The device string; SGLang puts it into ``server_args.device``, which must be a str."""
        return "cpu"

    def get_default_attention_backend(self) -> str:
        """The only in-tree attention backend that needs neither Triton nor AMX."""
        return ATTENTION_BACKEND

    def get_compile_backend(self, mode: str | None = None) -> str:
        """``eager``: inductor would compile C++ for half a minute on the first request."""
        return "eager"

    def get_quantization_config(self, quantization: str) -> type | None:
        """No own configs (None), but the moment at which all FP8 classes are importable."""
        cpu_fp8.install()
        return None

    # -------------------------------------------------------------- server arguments and backend

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Set what a CPU server needs and the user did not say. Runs in the launcher.

        Environment variables set here reach the ranks, which the launcher spawns later.
        """
        # SGLang demands a CPU list per rank as soon as ranks outnumber NUMA nodes. The lists
        # themselves are only read by the AMX engine.
        lists = "|".join(["0"] * _cpu_lists(server_args))
        os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", lists)
        # Ranks share the cores; spinning OpenMP threads cost a factor of two to six in latency.
        os.environ.setdefault("OMP_NUM_THREADS", "1")

        server_args.disable_custom_all_reduce = True
        # SGLang fills in "intel_amx" before it asks the platform.
        if server_args.attention_backend in (None, "intel_amx"):
            server_args.attention_backend = ATTENTION_BACKEND
        if server_args.max_total_tokens is None:
            server_args.max_total_tokens = DEFAULT_KV_TOKENS
        if server_args.max_running_requests is None:
            server_args.max_running_requests = DEFAULT_RUNNING_REQUESTS * server_args.dp_size

    def init_backend(self) -> None:
        """Prepare a rank; called while ``model_executor.model_runner`` is being imported."""
        # A CUDA build of torch brings libnccl, and up to 0.5.20 SGLang would open it for CPU ranks.
        os.environ.setdefault("SGLANG_NCCL_SO_PATH", "/nonexistent/libnccl.so")
        _keep_model_sizes()
        _wrap_attention_factory()

    # ------------------------------------------------------------------------------ KV-pool hooks
    # SGLang 0.5.16 to 0.5.20 have no default for these; later versions use the in-tree classes
    # unasked and warn about a platform that still defines them.
    if not hasattr(SRTPlatform, "get_kv_pool_cls"):

        def get_mha_kv_pool_cls(self) -> type:
            """The in-tree pool for multi-head attention."""
            from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

            return MHATokenToKVPool

        def get_mla_kv_pool_cls(self) -> type:
            """The in-tree pool for latent attention, deaf to an argument it does not know."""
            from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

            class MlaPool(MLATokenToKVPool):
                def __init__(self, *args: Any, index_head_dim: Any = None, **kwargs: Any) -> None:
                    if index_head_dim is not None:
                        raise BackendError(
                            "a model with a sparse-attention indexer (index_head_dim = "
                            f"{index_head_dim})",
                            "the CPU platform's KV pool stores no indexer keys",
                            ["unset SGLANG_PLATFORM to serve it on a GPU"],
                        )
                    super().__init__(*args, **kwargs)

            return MlaPool

        def get_paged_allocator_cls(self) -> type:
            """The in-tree allocator (torch operations at page size 1)."""
            from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator

            return PagedTokenToKVPoolAllocator


def _cpu_lists(server_args: Any) -> int:
    """How many CPU lists SGLang wants: one per TP rank, later one per rank of the world."""
    from sglang.srt.utils.numa_utils import init_threads_binding

    if "tp_size" in inspect.signature(init_threads_binding).parameters:
        return server_args.tp_size
    return server_args.dp_size * server_args.tp_size * server_args.pp_size


def _keep_model_sizes() -> None:
    """Stop SGLang from padding intermediate sizes and head counts of a "cpu" device.

    ``adjust_config_with_unaligned_cpu_tp`` rounds the intermediate sizes of the *model* up to a
    multiple of ``tp * block`` for the AMX engine, whose loaders know about the padding. Ours are
    the GPU's loaders: they would cut the checkpoint at the padded places.
    """

    def unchanged(model_config: Any, load_config: Any, tp_size: int) -> Any:
        return model_config

    # model_runner has bound the name already (imports come first in that file), so both places.
    for module in ("sglang.srt.configs.update_config", "sglang.srt.model_executor.model_runner"):
        if module in sys.modules:
            sys.modules[module].adjust_config_with_unaligned_cpu_tp = unchanged  # type: ignore[attr-defined]


def _wrap_attention_factory() -> None:
    """Make the ``torch_native`` factory fix MLA first.

    The factory is the one place that every rank passes after its weights were loaded and before
    its first forward, on all supported versions, with the model at hand.
    """
    from sglang.srt.layers.attention import attention_registry

    original = attention_registry.ATTENTION_BACKENDS[ATTENTION_BACKEND]
    if getattr(original, "_w4afp8_cpu", False):
        return

    def create(runner: Any) -> Any:
        if runner.use_mla_backend:
            _use_absorbed_mla()
            _repair_after_every_load()
            repair_mla_weights(runner.model)
        return original(runner)

    create._w4afp8_cpu = True  # type: ignore[attr-defined]
    attention_registry.ATTENTION_BACKENDS[ATTENTION_BACKEND] = create


def _use_absorbed_mla() -> None:
    """Send every MLA forward through the absorbed form (latent K, one KV head).

    SGLang treats an unknown backend like Triton's, whose prefill expands K and V and then reads
    them back from a pool that holds the latent only.
    """
    from sglang.srt.models.deepseek_common import attention_backend_handler as handlers
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import (
        AttnForwardMethod,
    )

    def absorbed(attn: Any, forward_batch: Any) -> Any:
        return AttnForwardMethod.MLA

    handlers.AttentionBackendRegistry.register(ATTENTION_BACKEND, absorbed)


def _repair_after_every_load() -> None:
    """Repeat ``repair_mla_weights`` when weights are loaded again into a running server."""
    module = importlib.import_module("sglang.srt.models.deepseek_common.deepseek_weight_loader")
    mixin = module.DeepseekV2WeightLoaderMixin
    original = mixin.post_load_weights
    if getattr(original, "_w4afp8_cpu", False):
        return

    def post_load_weights(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        repair_mla_weights(self)

    post_load_weights._w4afp8_cpu = True  # type: ignore[attr-defined]
    mixin.post_load_weights = post_load_weights


def repair_mla_weights(model: torch.nn.Module) -> int:
    """Recompute MLA's absorbed weights from block-FP8 ``kv_b_proj``, without requantising.

    Off CUDA, SGLang squeezes the 128x128 blocks into one FP8 scale per tensor and calls a CUDA
    kernel for the result. On CUDA it dequantises to the model dtype, and so does this.

    Args:
        model: a loaded model (or any module that contains its attention layers).

    Returns:
        How many attention layers were rewritten: ``w_kc`` (heads, nope, kv_lora) and ``w_vc``
        (heads, kv_lora, v), both in the model dtype; 0 if the checkpoint's was not FP8.
    """
    repaired = 0
    for attn in model.modules():
        kv_b_proj = getattr(attn, "kv_b_proj", None)
        if getattr(attn, "w_kc", None) is None or kv_b_proj is None:
            continue
        if kv_b_proj.weight.dtype == torch.float8_e4m3fn:
            weight = cpu_fp8.dequantize_linear(kv_b_proj, kv_b_proj.params_dtype)
        elif attn.w_kc.dtype == torch.float8_e4m3fn:
            # The linear's own method has dequantised it since (a shard of no whole blocks).
            weight = kv_b_proj.weight.data
        else:
            continue
        nope, value = attn.qk_nope_head_dim, attn.v_head_dim
        w_kc, w_vc = weight.unflatten(0, (-1, nope + value)).split([nope, value], dim=1)
        # Strides as SGLang leaves them: the batched matmul reads kv_lora as the fast axis of w_kc.
        attn.w_kc = w_kc.transpose(1, 2).contiguous().transpose(1, 2)
        attn.w_vc = w_vc.contiguous().transpose(1, 2)
        attn.w_scale = 1.0
        repaired += 1
    return repaired
