"""The masked loss: divergence of kept tokens, summed, with its gradient at the hidden states and in the head.

Sums, not means: the learner divides once by the number of kept tokens of the whole optimizer step (TIP, Eq. 8), so that
any split into micro-batches gives the same gradient. Both backends return the same values and gradients:
    fused         kept rows alone go through the heads, a tile at a time; the gradient is formed while the tile lives
    materialized  whole logits of every row, then the mask: the memory behaviour the paper measured
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tip_exp.divergence import Divergence
from tip_exp.heads import Head


@dataclass(frozen=True, slots=True)
class LossAndGrad:
    """`value`: sum of the divergence over kept tokens, nats. `hidden_grad`: (N, D), zero where nothing is kept."""

    value: Tensor
    hidden_grad: Tensor


@torch.no_grad()
def fused(
    student_hidden: Float[Tensor, "n d"],
    teacher_hidden: Float[Tensor, "n e"],
    kept: Bool[Tensor, " n"],
    student_head: Head,
    teacher_head: Head,
    divergence: Divergence,
    tile_bytes: int,
) -> LossAndGrad:
    """Select before the head: memory is one tile whatever the retention, time falls with it.

    Adds the head's gradient into `student_head.weight.grad`.
    """
    value = torch.zeros((), dtype=student_head.dtype, device=student_hidden.device)
    hidden_grad = torch.zeros_like(student_hidden)
    kept_rows = kept.nonzero().squeeze(-1)
    for tile in student_head.row_tiles(len(kept_rows), tile_bytes):
        rows = kept_rows[tile]
        hidden = student_hidden[rows]
        logits = student_head.logits(hidden)
        per_token, logit_grad = divergence.value_and_logit_grad(
            logits.log_softmax(-1), teacher_head.logprobs(teacher_hidden[rows])
        )
        value += per_token.sum()
        hidden_grad[rows] = student_head.backward(hidden, logit_grad, logits)
    return LossAndGrad(value, hidden_grad)


def materialized(
    student_hidden: Float[Tensor, "n d"],
    teacher_hidden: Float[Tensor, "n e"],
    kept: Bool[Tensor, " n"],
    student_head: Head,
    teacher_head: Head,
    divergence: Divergence,
    tile_bytes: int,
) -> LossAndGrad:
    """Logits of every token at once, then the mask, then autograd; `tile_bytes` is not used."""
    hidden = student_hidden.detach().requires_grad_()
    with torch.no_grad():
        teacher_logits = teacher_head.logits(teacher_hidden)
    student_logits = student_head.logits(hidden)
    value = divergence.value(student_logits[kept].log_softmax(-1), teacher_logits[kept].log_softmax(-1)).sum()
    value.backward()
    assert hidden.grad is not None, "every hidden state is an input of the loss"
    return LossAndGrad(value.detach(), hidden.grad)


BACKENDS = {"fused": fused, "materialized": materialized}
