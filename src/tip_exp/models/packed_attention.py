"""Attention over packed rows, whose sequences do not attend to each other, and activation checkpointing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer

from tip_exp.losses.tiling import to_device

BY_SEQUENCE = "sdpa_by_sequence"


def packed_inputs(module: PreTrainedModel, lengths: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    """Keyword arguments of a backbone for one row of packed sequences, beside the tokens.

    Flash attention takes the boundaries itself. With sdpa the module is switched to `by_sequence`: a mask over the
    whole row would cost memory and time quadratic in the row's length.
    """
    position_ids = torch.cat([torch.arange(length, device=device) for length in lengths])[None]
    if module.config._attn_implementation == "sdpa":
        AttentionInterface.register(BY_SEQUENCE, by_sequence)
        AttentionMaskInterface.register(BY_SEQUENCE, sdpa_mask)  # for padded rows
        module.set_attn_implementation(BY_SEQUENCE)
    if module.config._attn_implementation == BY_SEQUENCE:
        unused = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)  # a 4-D mask stops transformers making one
        return {"attention_mask": unused, "position_ids": position_ids, "sequence_lengths": lengths}
    bounds = to_device(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device)
    varlen = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    varlen |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    return {"attention_mask": None, "position_ids": position_ids, **varlen}


def by_sequence(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sequence_lengths: tuple[int, ...] | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal sdpa of each sequence of a packed row, (1, heads, T, d); plain sdpa without `sequence_lengths`."""
    if sequence_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    sequences = zip(*(tensor.split(sequence_lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [_causal_sdpa(module, q, k, v, sliding_window, **options) for q, k, v in sequences]
    return torch.cat(outputs, dim=1), None


def _causal_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, window: int | None, **options: Any
) -> Tensor:
    """Causal attention within one sequence, (1, T, heads, d)."""
    mask = _window_mask(query, window)
    if mask is None and query.is_cuda and query.dtype == torch.float32:
        # Flash attention takes no float32, memory-efficient attention no groups of heads: what is left holds T x T.
        key, value = (repeat_kv(tensor, query.shape[1] // tensor.shape[1]) for tensor in (key, value))
    return sdpa_attention_forward(module, query, key, value, mask, **options)[0]


def _window_mask(query: Tensor, window: int | None) -> Tensor | None:
    """(1, 1, T, T) mask of a sliding window shorter than the sequence; None means plain causal attention."""
    length = query.shape[2]
    if window is None or length <= window:
        return None
    position = torch.arange(length, device=query.device)
    distance = position[:, None] - position[None, :]
    return ((distance >= 0) & (distance < window))[None, None]


@contextmanager
def activation_checkpointing(module: PreTrainedModel) -> Iterator[None]:
    """Inside the block each layer keeps only its input for backward and recomputes the rest.

    transformers checkpoints only layers in training mode, so the flag is set on the layers themselves and not on their
    submodules, which stay in eval mode.
    """
    # Before transformers 5.24 it is called gradient_checkpointing_enable.
    enable = getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    module.disable_input_require_grads()  # each call adds a hook to the embedding, for reentrant checkpointing only
    layers = [layer for layer in module.modules() if isinstance(layer, GradientCheckpointingLayer)]
    try:
        for layer in layers:
            layer.training = True
        yield
    finally:
        for layer in layers:
            layer.training = False
