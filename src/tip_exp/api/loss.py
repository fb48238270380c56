"""The masked divergence of two models as a differentiable loss that never holds whole logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tip_exp.api.models import lazy_logits
from tip_exp.losses import fused
from tip_exp.losses.divergence import DIVERGENCES, Divergence
from tip_exp.losses.embedding_grad import grad_buffer
from tip_exp.losses.head import Head, LazyLogits
from tip_exp.selector.selector import Selection, Tokens
from tip_exp.utils.units import MIB

Average = Literal["token", "rollout", "sum"]


def loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    student: Any,
    teacher: Any,
    kept_mask: Tensor | None = None,
    *,
    sequence: Tensor | None = None,
    weights: Tensor | None = None,
    average: Average = "token",
    divergence: str = "reverse_kl",
    jsd_beta: float = 0.5,
    skew: float = 0.1,
    kl_clip: float = 1.0,
    tile_mib: int = 64,
) -> Tensor:
    """Divergence of student and teacher at the kept tokens, nats, a scalar whose `backward` trains the student.

    student_hidden, teacher_hidden, student, teacher  as in `tip_exp.statistics`: hidden states (N, D) or (B, T, D)
        that predict the tokens, and the models or their heads.
    kept_mask  (N,) or (B, T): True on the tokens that count, aligned with the hidden states; None: all.
    weights  of the same shape, at least 0: multiply the tokens' divergences, as `select` returns them.
    average  "token": mean over the kept tokens (with weights, a weighted mean). "rollout": mean in each sequence, then
        over the sequences with kept tokens, as training runs do by default; rows of (B, T), or `sequence` (N,).
        "sum": the sum, to be divided by a number that several micro-batches share.
    divergence  reverse_kl = KL(student || teacher), forward_kl, jsd, skew_reverse_kl, skew_forward_kl, tv,
        sqrt_kl or clipped_kl = min(reverse_kl, kl_clip).

    Gradients go to `student_hidden` and to the student's head (weight and bias), not to the teacher. They are computed
    with the value, tile by tile: vocabulary-sized memory is the head's gradient and `tile_mib`, and only kept tokens
    pass through the heads. Without kept tokens the loss is 0. Raises ValueError or TypeError that names the argument.
    """
    shape = student_hidden.shape[:-1]
    kept_mask = torch.ones(shape, dtype=torch.bool, device=student_hidden.device) if kept_mask is None else kept_mask
    for name, tensor in (("kept_mask", kept_mask), ("weights", weights), ("sequence", sequence)):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, the hidden states {tuple(shape)}")
    if average not in get_args(Average):
        raise ValueError(f"average: {', '.join(get_args(Average))}; got {average!r}")
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence: {', '.join(DIVERGENCES)}; got {divergence!r}")
    for name, value in (("jsd_beta", jsd_beta), ("skew", skew)):
        if not 0 < value < 1:
            raise ValueError(f"{name}: between 0 and 1; got {value}")
    if not kl_clip > 0:
        raise ValueError(f"kl_clip: a number of nats above 0; got {kl_clip}")
    if sequence is None and average == "rollout":
        if len(shape) != 2:
            raise ValueError("average='rollout' of hidden states (N, D) needs sequence=, each token's sequence")
        sequence = torch.arange(shape[0], device=student_hidden.device)[:, None].expand(shape)
    student_logits, teacher_logits = lazy_logits(
        student_hidden.reshape(-1, student_hidden.shape[-1]),
        teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]),
        student,
        teacher,
    )
    head = student_logits.head
    flat_weights = None if weights is None else weights.detach().reshape(-1).to(head.dtype)
    kept = kept_mask.reshape(-1).bool()
    selection = Selection(kept, torch.ones_like(kept, dtype=head.dtype), flat_weights)
    if average == "rollout":
        assert sequence is not None, "checked above"
        rollout = torch.unique(sequence.reshape(-1), return_inverse=True)[1]
        selection = selection.mean_by_rollout(Tokens(rollout, rollout, rollout))
    return _MaskedLoss.apply(
        student_logits.hidden,
        head.weight,
        head.bias,
        head,
        teacher_logits,
        replace(selection, weights=None if selection.weights is None else selection.weights.to(head.dtype)),
        Divergence(divergence, jsd_beta, skew, kl_clip),
        tile_mib * MIB,
        1.0 if average == "sum" else selection.mass or 1.0,
        torch.is_grad_enabled(),
    )


class _MaskedLoss(torch.autograd.Function):
    """Computes value and gradients at once; `backward` hands the gradients out."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        teacher: LazyLogits,
        selection: Selection,
        objective: Divergence,
        tile_bytes: int,
        divisor: float,
        needs_grad: bool,
    ) -> Tensor:
        # The head's gradient goes to copies of the parameters that share their storage, not to `.grad` of the model.
        weight = weight.detach().requires_grad_(needs_grad and ctx.needs_input_grad[1])
        if bias is not None:
            bias = bias.detach().requires_grad_(needs_grad and ctx.needs_input_grad[2])
        student = LazyLogits(hidden.detach(), replace(head, weight=weight, bias=bias))
        with torch.autocast(hidden.device.type, enabled=False):
            result = fused(student, teacher, selection.kept_mask, objective, tile_bytes, weights=selection.weights)
        parameters = [parameter for parameter in (weight, bias) if parameter is not None and parameter.requires_grad]
        for grad in (result.hidden_grad, *map(grad_buffer, parameters)):
            grad.div_(divisor)
        ctx.save_for_backward(result.hidden_grad, weight.grad, None if bias is None else bias.grad)
        return result.value / divisor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Without a copy if the loss itself is differentiated, for the head's gradient is as large as the head."""
        factor, grads = grad_outputs[0], ctx.saved_tensors
        if float(factor) != 1.0:
            grads = [None if grad is None else grad * factor.to(grad.dtype) for grad in grads]
        return (*grads, *[None] * 7)
