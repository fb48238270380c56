"""How hidden states are computed: sequences padded or packed end to end, with or without activation checkpointing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer

from tip_exp.batching import MicroBatch
from tip_exp.config import ConfigError
from tip_exp.gradients import embedded, is_plain

PACKED_SDPA = "sdpa_packed"


def enable_packing(module: PreTrainedModel) -> None:
    """Let a model read packed batches; what it reads otherwise (rollouts, probes) it reads as before."""
    config = module.config.get_text_config()
    attention = config._attn_implementation
    if attention == "flash_attention_2" or attention == PACKED_SDPA:
        return
    if attention != "sdpa":
        raise ConfigError(
            f"learner.packing=true needs pair.attention=sdpa or flash_attention_2; {attention} would need a mask of "
            "all packed tokens by all of them"
        )
    if "sliding_attention" in (getattr(config, "layer_types", None) or []):
        raise ConfigError(
            f"learner.packing=true: {type(module).__name__} has layers with a sliding window, which packed sdpa does "
            "not apply; choose pair.attention=flash_attention_2 or learner.packing=false"
        )
    module.set_attn_implementation(PACKED_SDPA)


def last_hidden(module: PreTrainedModel, batch: MicroBatch, *, checkpointing: bool = False) -> Tensor:
    """Hidden states after the final norm, (B, T, D); with `checkpointing` the backward pass computes them again."""
    embedding = module.get_input_embeddings()
    tokens: dict[str, Any] = {"input_ids": batch.input_ids}
    if isinstance(embedding, nn.Embedding) and is_plain(embedding):
        tokens = {"inputs_embeds": embedded(embedding, batch.input_ids)}
    backbone: nn.Module = module.base_model
    with _checkpointed(backbone, checkpointing and torch.is_grad_enabled()):
        output = backbone(
            **tokens,
            attention_mask=batch.attention_mask,
            position_ids=batch.positions,
            use_cache=False,
            **({} if batch.attention_mask is not None else _bounds(batch, module)),
        )
    return output.last_hidden_state


def _bounds(batch: MicroBatch, module: PreTrainedModel) -> dict[str, Any]:
    """Where packed sequences begin and end, as the model's attention wants to be told."""
    if module.config.get_text_config()._attn_implementation == PACKED_SDPA:
        return {"sequence_lengths": batch.lengths}
    lengths = torch.tensor([0, *batch.lengths], device=batch.input_ids.device)
    bounds, longest = lengths.cumsum(0).to(torch.int32), max(batch.lengths)
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def _packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sequence_lengths: tuple[int, ...] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Block-diagonal causal attention without its mask: each sequence of a row, (1, H, T, D), by itself."""
    if sequence_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    parts = zip(*(tensor.split(sequence_lengths, dim=2) for tensor in (query, key, value)), strict=True)
    return torch.cat([sdpa_attention_forward(module, q, k, v, None, **options)[0] for q, k, v in parts], dim=1), None


def _packed_mask(
    batch_size: int, q_length: int, kv_length: int, *args: Any, attention_mask: Tensor | None = None, **options: Any
) -> Tensor | None:
    """No mask where `_packed_sdpa` needs none: a whole row without padding. Else that of sdpa."""
    if attention_mask is None and q_length == kv_length:
        return None
    return sdpa_mask(batch_size, q_length, kv_length, *args, attention_mask=attention_mask, **options)


AttentionInterface.register(PACKED_SDPA, _packed_sdpa)
AttentionMaskInterface.register(PACKED_SDPA, _packed_mask)


@contextmanager
def _checkpointed(backbone: nn.Module, wanted: bool) -> Iterator[None]:
    """Within, every decoder layer keeps its input alone for the backward pass.

    Transformers does so in training mode, which also switches dropout on and the cache of rollouts off; here the
    layers alone are told, and only for one forward pass.
    """
    layers = [layer for layer in backbone.modules() if wanted and isinstance(layer, GradientCheckpointingLayer)]
    if wanted and not layers:
        raise ConfigError(
            f"learner.activation_checkpointing=true: {type(backbone).__name__} has no layers that transformers can "
            "checkpoint"
        )
    for layer in layers:
        layer.training = layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        for layer in layers:
            layer.training = layer.gradient_checkpointing = False
