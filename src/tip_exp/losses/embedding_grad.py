"""Gradients added in place into `.grad`: of a parameter as large as a head there is never a second copy."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def grad_of(parameter: Tensor) -> Tensor:
    """The parameter's gradient buffer, made of zeros where there is none yet."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def is_plain(embedding: nn.Module) -> bool:
    """Whether an embedding is a look-up and nothing else, so that `embedded` may stand for it."""
    return (
        type(embedding) is nn.Embedding
        and embedding.max_norm is None
        and not embedding.scale_grad_by_freq
        and not embedding.sparse
        and not embedding._forward_hooks
        and not embedding._forward_pre_hooks
        and not embedding._backward_hooks
    )


def embedded(embedding: nn.Embedding, ids: Tensor) -> Tensor:
    """embedding(ids), whose backward adds rows into `embedding.weight.grad`; autograd's own makes all of it anew.

    A token's gradients are summed in float32 or wider before they are rounded to the weight's dtype, once.
    """
    weight = embedding.weight
    found = nn.functional.embedding(ids, weight.detach())
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return found

    def add_rows(gradient: Tensor) -> None:
        tokens, place = ids.flatten().unique(return_inverse=True)
        wide = torch.promote_types(weight.dtype, torch.float32)
        rows = torch.zeros(len(tokens), weight.shape[1], dtype=wide, device=weight.device)
        rows.index_add_(0, place, gradient.flatten(0, -2).to(wide))
        if embedding.padding_idx is not None:
            rows[tokens == embedding.padding_idx] = 0  # as nn.Embedding does
        grad_of(weight).index_add_(0, tokens, rows.to(weight.dtype))

    found.requires_grad_()
    found.register_hook(add_rows)
    found.register_post_accumulate_grad_hook(_forget)
    return found


def _forget(leaf: Tensor) -> None:
    leaf.grad = None
