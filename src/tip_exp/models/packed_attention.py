"""How a backbone is run: packed rows whose sequences do not see each other, layers that recompute activations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer

BY_SEQUENCE = "sdpa_by_sequence"


def packed_inputs(module: PreTrainedModel, lengths: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    """What a backbone has to be told beside the tokens of one row in which sequences of `lengths` follow each other.

    Flash attention knows such rows; for scaled dot products `by_sequence` takes its place, for a mask of the whole row
    would be quadratic in the row, and so would be the work.
    """
    ends = list(accumulate(lengths))
    position_ids = torch.cat([torch.arange(length, device=device) for length in lengths])[None]
    if module.config._attn_implementation == "sdpa":
        AttentionInterface.register(BY_SEQUENCE, by_sequence)
        AttentionMaskInterface.register(BY_SEQUENCE, sdpa_mask)  # for rows that are not packed
        module.set_attn_implementation(BY_SEQUENCE)
    if module.config._attn_implementation == BY_SEQUENCE:
        unused = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)  # a ready mask: none is made
        return {"attention_mask": unused, "position_ids": position_ids, "sequence_lengths": lengths}
    bounds = torch.tensor([0, *ends], dtype=torch.int32, device=device)
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
    """Causal attention of each sequence of a packed row (1, heads, T, d) by itself; else what `sdpa` is."""
    if sequence_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    parts = zip(*(tensor.split(sequence_lengths, dim=2) for tensor in (query, key, value)), strict=True)
    found = [sdpa_attention_forward(module, q, k, v, _band(q, sliding_window), **options)[0] for q, k, v in parts]
    return torch.cat(found, dim=1), None


def _band(query: Tensor, window: int | None) -> Tensor | None:
    """The mask of a sliding window that is shorter than the sequence; None: plain causal attention."""
    length = query.shape[2]
    if window is None or length <= window:
        return None
    at = torch.arange(length, device=query.device)
    behind = at[:, None] - at[None, :]
    return ((behind >= 0) & (behind < window))[None, None]


@contextmanager
def activation_checkpointing(module: PreTrainedModel) -> Iterator[None]:
    """Inside, the module's layers keep their inputs alone for backward.

    transformers asks for training mode: the layers alone get it, what is in them (dropout) does not.
    """
    module.gradient_checkpointing_enable({"use_reentrant": False})
    layers = [layer for layer in module.modules() if isinstance(layer, GradientCheckpointingLayer)]
    try:
        for layer in layers:
            layer.training = True
        yield
    finally:
        for layer in layers:
            layer.training = False
