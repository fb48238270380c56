"""Gradients added in place into `.grad`, so that a parameter as large as a head never has a second gradient buffer."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


def grad_buffer(parameter: Tensor) -> Tensor:
    """`parameter.grad`, set to zeros of `parameter.grad_dtype` where it is None."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
    return parameter.grad


def is_plain_embedding(embedding: nn.Module) -> bool:
    """Whether an embedding is a table lookup and nothing else, so that `embed` can replace it."""
    return (
        type(embedding) is nn.Embedding
        and embedding.max_norm is None
        and not embedding.scale_grad_by_freq
        and not embedding.sparse
        and not embedding._forward_hooks
        and not embedding._forward_pre_hooks
        and not embedding._backward_hooks
    )


def embed(embedding: nn.Embedding, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape d"]:
    """embedding(ids) whose backward adds rows into `embedding.weight.grad`; autograd would allocate a dense gradient.

    A token's gradients are summed in float32 or wider and rounded to the gradient's dtype once.
    """
    weight = embedding.weight
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return nn.functional.embedding(ids, weight)  # not detached, which would drop a forward-mode tangent
    output = nn.functional.embedding(ids, weight.detach())

    def add_rows(output_grad: Tensor) -> None:
        if ids.is_cuda:  # the host would wait for the number of unique ids: rows of repeated ids stay 0 instead
            token_ids = ids.flatten().sort().values
            row_of_id = torch.searchsorted(token_ids, ids.flatten())
        else:
            token_ids, row_of_id = ids.flatten().unique(return_inverse=True)
        sum_dtype = torch.promote_types(weight.dtype, torch.float32)
        rows = torch.zeros(len(token_ids), weight.shape[1], dtype=sum_dtype, device=weight.device)
        rows.index_add_(0, row_of_id, output_grad.flatten(0, -2).to(sum_dtype))
        if embedding.padding_idx is not None:
            rows[token_ids == embedding.padding_idx] = 0  # as nn.Embedding does
        buffer = grad_buffer(weight)
        buffer.index_add_(0, token_ids, rows.to(buffer.dtype))

    def clear_grad(leaf: Tensor) -> None:
        leaf.grad = None

    output.requires_grad_()
    output.register_hook(add_rows)
    output.register_post_accumulate_grad_hook(clear_grad)
    return output
