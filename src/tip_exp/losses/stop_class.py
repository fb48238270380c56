"""Several token ids as one token of the vocabulary: the event that a response ends, by whichever stop id.

With C the ids and z a model's logits, P(C) = e^(z_C) / Z with z_C = log sum over C of e^z, and Z is unchanged. So the
distribution over the other tokens and C is the softmax of logits in which the column of C's first id holds z_C and its
other columns hold LOWEST, probability 0. A gradient g at z_C is g softmax(z over C) at the logits of the ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

# Stands for a logit of -inf: its probability is 0 as well, but 0 x LOWEST is 0, where 0 x inf is NaN.
LOWEST = -1e9


def merge_ids(token_ids: Tensor, ids: Sequence[int]) -> Tensor:
    """Each of `ids` replaced by the first of them, which stands for the class."""
    if not ids:
        return token_ids
    return torch.where(torch.isin(token_ids, torch.tensor(ids, device=token_ids.device)), ids[0], token_ids)


def merged(logits: Float[Tensor, "n v"], ids: Sequence[int]) -> Float[Tensor, "n v"]:
    """All logits with the class in the column of its first id; differentiable."""
    index = torch.tensor(ids, device=logits.device)
    of_class = logits.index_select(1, index).logsumexp(-1, keepdim=True)
    return logits.index_fill(1, index, LOWEST).index_copy(1, index[:1], of_class)


def merge_tile_(
    tile: Float[Tensor, "n c"], columns: slice, ids: Sequence[int], class_logits: Callable[[], Tensor]
) -> None:
    """`merged` for some columns; `class_logits` gives the logits of all ids, (n, len(ids))."""
    for i in (i for i in ids if columns.start <= i < columns.stop):
        tile[:, i - columns.start] = LOWEST if i != ids[0] else class_logits().logsumexp(-1)


def take_class_gradient_(logit_grad: Float[Tensor, "n c"], columns: slice, ids: Sequence[int]) -> Tensor | None:
    """The gradient at the class's logit, (n,), or None if `columns` lack the first id; the ids' columns become 0."""
    of_class = logit_grad[:, ids[0] - columns.start].clone() if columns.start <= ids[0] < columns.stop else None
    for i in (i for i in ids if columns.start <= i < columns.stop):
        logit_grad[:, i - columns.start] = 0
    return of_class
