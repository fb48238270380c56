"""The materialized backend of the masked loss: whole logits of every row, then the mask (the paper's memory)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tip_exp.losses.estimators import Objective
from tip_exp.losses.fused import LossAndGrad
from tip_exp.losses.head import Head
from tip_exp.losses.online_softmax import Normalizers


def materialized(
    student_hidden: Float[Tensor, "n d"],
    teacher_hidden: Float[Tensor, "n e"],
    kept: Bool[Tensor, " n"],
    student_head: Head,
    teacher_head: Head,
    divergence: Objective,
    tile_bytes: int,
    *,
    normalizers: Normalizers | None = None,
    weights: Float[Tensor, " n"] | None = None,
) -> LossAndGrad:
    """Logits of every token at once, then the mask, then autograd; `tile_bytes` and `normalizers` are not used.

    Whole logits live until their kept rows are copied, so memory falls with retention from some six times kept rows
    of logits to little more than once all of them, which is what the student's gradient takes.
    """
    hidden = student_hidden.detach().requires_grad_()
    value = _sum_over_kept(hidden, teacher_hidden, kept, student_head, teacher_head, divergence, weights)
    value.backward()
    assert hidden.grad is not None, "every hidden state is an input of the loss"
    return LossAndGrad(value.detach(), hidden.grad)


def _sum_over_kept(
    hidden: Tensor,
    teacher_hidden: Tensor,
    kept: Tensor,
    student_head: Head,
    teacher_head: Head,
    divergence: Objective,
    weights: Tensor | None,
) -> Tensor:
    """Differentiable. A function of its own: once it has returned the graph alone holds what backward lets go of."""
    rows = kept.nonzero().squeeze(-1)
    with torch.no_grad():
        teacher_logprobs = teacher_head.logits(teacher_hidden).index_select(0, rows).log_softmax(-1)
    student_logprobs = student_head.logits(hidden).index_select(0, rows).log_softmax(-1)
    per_token = divergence.at(kept).value(student_logprobs, teacher_logprobs)
    return (per_token if weights is None else per_token * weights[kept]).sum()
