"""The materialized backend of the masked loss: logits of every row, then the mask, as the paper's memory table."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tip_exp.losses.estimators import Objective
from tip_exp.losses.fused import LossAndGrad
from tip_exp.losses.head import LazyLogits
from tip_exp.losses.online_softmax import LogNormalizers


def materialized(
    student: LazyLogits,
    teacher: LazyLogits,
    kept_mask: Bool[Tensor, " n"],
    objective: Objective,
    tile_bytes: int,
    *,
    log_normalizers: LogNormalizers | None = None,
    weights: Float[Tensor, " n"] | None = None,
) -> LossAndGrad:
    """Same values and gradients as `fused`, by autograd over all N x V logits; ignores tile_bytes and log_normalizers.

    All logits live until their kept rows are copied, so peak memory falls with retention from about six times the kept
    rows' logits to little more than all logits once, the size of the student's logit gradient.
    """
    hidden = student.hidden.detach().requires_grad_()
    value = _sum_over_kept(LazyLogits(hidden, student.head), teacher, kept_mask, objective, weights)
    value.backward()
    assert hidden.grad is not None, "every hidden state is an input of the loss"
    return LossAndGrad(value.detach(), hidden.grad)


def _sum_over_kept(
    student: LazyLogits, teacher: LazyLogits, kept_mask: Tensor, objective: Objective, weights: Tensor | None
) -> Tensor:
    """Differentiable. Separate function so its locals are freed before backward; only autograd keeps activations."""
    kept_rows = kept_mask.nonzero().squeeze(-1)
    with torch.no_grad():
        teacher_logprobs = teacher.head.logits(teacher.hidden).index_select(0, kept_rows).log_softmax(-1)
    student_logprobs = student.head.logits(student.hidden).index_select(0, kept_rows).log_softmax(-1)
    per_token = objective.at(kept_mask).value(student_logprobs, teacher_logprobs)
    return (per_token if weights is None else per_token * weights[kept_mask]).sum()
