"""Attention over packed rows, whose sequences do not attend to each other, and activation checkpointing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer

from tip_exp.losses.tiling import to_device
from tip_exp.models.micro_batch import micro_batches
from tip_exp.types import Rollout
from tip_exp.utils.errors import ConfigError

if TYPE_CHECKING:
    from tip_exp.models.pair import Model

BY_SEQUENCE = "sdpa_by_sequence"
MIXING_ERROR, MIXING_ERROR_16_BIT = 1e-3, 0.1  # of a token's hidden state, over the mean norm; 16 bits round


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


@torch.no_grad()
def check_packing(model: Model, key: str) -> None:
    """Raise ConfigError if the hidden states of two sequences change when they share a row.

    Recurrent layers and attention that ignores the sequences' boundaries mix them. `key`: the model's config key. Costs
    forward passes of 32 tokens.
    """
    ids = torch.linspace(0, model.head.vocab_size - 1, 16).long().split([6, 10])
    rollouts = [Rollout(part.tolist(), [False] + [True] * (len(part) - 1), "stop", []) for part in ids]
    together = micro_batches(rollouts, 16, 0, packing=True)
    alone = [batch for rollout in rollouts for batch in micro_batches([rollout], 16, 0)]
    packed, apart = (
        torch.cat([model.hidden(batch.to(model.module.device)) for batch in batches]) for batches in (together, alone)
    )
    limit = MIXING_ERROR if packed.dtype == torch.float32 else MIXING_ERROR_16_BIT
    error = float((packed - apart).float().norm(dim=-1).amax() / apart.float().norm(dim=-1).mean())
    if not error <= limit:
        raise ConfigError(
            f"{key}: {type(model.module).__name__} mixes the sequences of a packed row (hidden states change by "
            f"{100 * error:.2g} %); set learner.packing=false"
        )


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
