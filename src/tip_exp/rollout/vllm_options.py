"""Arguments of vLLM's `LLM`, from rollout.vllm and the model's config; imports nothing of vLLM."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import PretrainedConfig

from tip_exp.config.schema import VllmConfig
from tip_exp.rollout.vllm_worker import WeightSync
from tip_exp.utils.units import GIB

_CPU_BLOCK, _CUDA_BLOCK = 128, 16  # tokens per KV cache block
_CPU_BATCHED_TOKENS = 2048


def engine_options(
    settings: VllmConfig,
    model_config: PretrainedConfig,
    *,
    dtype: str,
    max_model_len: int,
    max_num_seqs: int,
    on_cpu: bool,
    ranks: int = 1,
) -> dict[str, Any]:
    """Keyword arguments of vLLM's `LLM`, the model's folder excepted; `rollout.vllm.engine_args` follow them.

    With several `ranks` vLLM takes the default process group and LOCAL_RANK as it finds them, and splits the group into
    model-parallel groups of one rank, so that every rank has an engine of its own on its own device. The engines are
    built together; afterwards they share no collective.
    """
    options: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "generation_config": "vllm",  # none of the model's own sampling defaults
        "dtype": dtype,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "enforce_eager": on_cpu,  # CUDA graphs and compilation on a GPU
        "enable_sleep_mode": settings.sleep_level > 0 and not on_cpu,
        "logprobs_mode": "raw_logprobs",  # at temperature 1, before top-p and top-k
        "worker_extension_cls": f"{WeightSync.__module__}.{WeightSync.__name__}",
    }
    if ranks > 1:
        options["distributed_executor_backend"] = "external_launcher"
    if on_cpu:
        # Without a size vLLM checks only the memory of NUMA node 0 and may refuse to start.
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        needed = max_num_seqs * _blocks(max_model_len, _CPU_BLOCK) * _CPU_BLOCK * _cached_bytes(model_config, dtype)
        options["kv_cache_memory_bytes"] = min(needed, memory // 4)
        # On a CPU, chunked prefill of a seeded request kills the engine.
        options["enable_chunked_prefill"] = False
        options["max_num_batched_tokens"] = max(_CPU_BATCHED_TOKENS, max_model_len)
    elif _has_full_attention(model_config):
        blocks = max_num_seqs * _blocks(max_model_len, _CUDA_BLOCK)
        if blocks * _CUDA_BLOCK * _cached_bytes(model_config, dtype) < GIB:
            # A small model's share of a card would be millions of blocks, each an object that every step resets.
            options["num_gpu_blocks_override"] = blocks
    return options | settings.engine_args


def _has_full_attention(model_config: PretrainedConfig) -> bool:
    """Whether every layer attends to the whole sequence: other kinds have groups of blocks of their own."""
    config = model_config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return kinds == {"full_attention"} and getattr(config, "sliding_window", None) is None


def _blocks(tokens: int, size: int) -> int:
    """Blocks of the KV cache that a sequence needs, and one more."""
    return -(-tokens // size) + 1


def _cached_bytes(model_config: PretrainedConfig, dtype: str) -> int:
    """Bytes of one token's keys and values."""
    config = model_config.get_text_config()
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * kv_heads * head_dim * getattr(torch, dtype).itemsize
