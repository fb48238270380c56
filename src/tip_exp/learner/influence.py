"""Influence of every token on a direction: I_n = <g_n, P g>, g_n the gradient of token n's divergence.

I_n is the derivative of token n's divergence when the weights move along P g: one forward-mode pass measures all tokens
of a micro-batch, without a gradient per token. Where g is the gradient of a validation batch and P g a step of the
optimizer, I_n > 0 says to first order that a step on token n lowers the validation loss (Pruthi et al. 2020, TracIn).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from tip_exp.learner.backward import Backward
from tip_exp.learner.objective import ObjectiveOf
from tip_exp.learner.teacher import TeacherHidden
from tip_exp.losses.estimators import Objective
from tip_exp.losses.head import Head
from tip_exp.models.lora import whole_tensor
from tip_exp.models.micro_batch import MicroBatch
from tip_exp.models.pair import Model
from tip_exp.selector.selector import Selection

Direction = dict[str, Tensor]  # trainable parameter's name -> tensor of its shape; a parameter left out is 0
DUAL_TILES = 8  # logits, tangents, log-probabilities and gradients of one tile that are in memory at a time


def parameters_of(model: Model) -> dict[str, nn.Parameter]:
    """The trainable parameters by name, a tied one once. Raises ValueError if there is none."""
    parameters = {name: parameter for name, parameter in model.module.named_parameters() if parameter.requires_grad}
    if not parameters:
        raise ValueError("student: no parameter has requires_grad=True, so there is no gradient to measure")
    return parameters


def gradient(
    backward: Backward,
    student: Model,
    teacher: Head,
    batches: Sequence[MicroBatch],
    teacher_hidden: TeacherHidden | Sequence[Tensor],
    selection: Selection,
    objective_of: ObjectiveOf,
    *,
    mass: float | None = None,
) -> Direction:
    """Gradient of the kept tokens' weighted mean divergence, as an update divides it; `.grad` stays as it is.

    `selection` is of the tokens of all micro-batches in order; `teacher_hidden` has a tensor (n, E) for each of them.
    With sharded weights every rank calls this inside `whole`, with as many micro-batches as the others. The result is
    the sum over the ranks, as DTensors; `mass` is that of the kept tokens of all ranks.
    """
    parameters = parameters_of(student)
    with _without_grads(parameters), torch.enable_grad():
        backward(student, teacher, batches, teacher_hidden, selection, objective_of)
        summed = (lambda p: p.grad) if student.shards is None else student.shards.summed_gradient
        gradients = {name: summed(parameter) for name, parameter in parameters.items()}
        mass = mass or selection.mass or 1.0
        return {name: grad.div_(mass) for name, grad in gradients.items() if grad is not None}


def influence(
    student: Model,
    teacher: Head,
    batches: Sequence[MicroBatch],
    teacher_hidden: Iterable[Tensor],
    direction: Direction,
    objective_of: ObjectiveOf,
    tile_bytes: int,
) -> Float[Tensor, " n"]:
    """<g_n, direction> of every token of the micro-batches, in order, float64.

    To first order a step along -direction lowers token n's divergence by it.

    Costs about two forward passes. Beside weights and direction, memory is one layer's activations of a micro-batch and
    `tile_bytes` of vocabulary size. Attention runs as plain matrix products: fused kernels have no forward mode.
    """
    parameters, values = parameters_of(student), []
    call = _Hidden(student)
    for batch, hidden_of_teacher in zip(batches, teacher_hidden, strict=True):
        with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            dual = {
                n: forward_ad.make_dual(p.detach(), direction[n].to(p.dtype))
                for n, p in parameters.items()
                if n in direction
            }
            hidden = functional_call(call, {f"module.{name}": tensor for name, tensor in dual.items()}, (batch,))
            by_parameter: dict[Tensor, Tensor] = {parameters[name]: tensor for name, tensor in dual.items()}
            head, objective = _with_tangents(student.head, by_parameter), objective_of(batch.token_ids)
            height = max(1, tile_bytes // (DUAL_TILES * head.vocab_size * head.dtype.itemsize))
            for rows in torch.arange(len(hidden), device=hidden.device).split(height):
                teacher_logits = teacher.logits(hidden_of_teacher[rows])
                with torch.enable_grad():  # as for a gradient: logits of a 16-bit head out of place
                    logits, tangent = forward_ad.unpack_dual(head.logits(hidden[rows]))
                if tangent is None:  # nothing that the direction moves
                    values.append(torch.zeros(len(rows), dtype=torch.float64, device=hidden.device))
                    continue
                delta = _logit_gradient(logits, teacher_logits, objective.at(rows))
                values.append(delta.mul_(tangent).sum(-1, dtype=torch.float64))  # sum_v dKL_n/dz_v dz_v
    return torch.cat(values) if values else torch.zeros(0, dtype=torch.float64)


def preconditioned(direction: Direction, second_moments: Direction, eps: float) -> Direction:
    """P g with Adam's P = 1 / (sqrt(v) + eps); a parameter without v, which no step has moved, is left out."""
    return {
        name: tensor / (second_moments[name].sqrt() + eps)
        for name, tensor in direction.items()
        if name in second_moments
    }


def second_moments(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], gradients: Sequence[Direction]
) -> Direction:
    """Adam's bias-corrected v; before its first step the mean square of `gradients`."""
    moments: Direction = {}
    for group in optimizer.param_groups:
        beta2, names = group["betas"][1], {parameter: name for name, parameter in parameters.items()}
        for parameter in group["params"]:
            if state := optimizer.state.get(parameter):
                moments[names[parameter]] = state["exp_avg_sq"] / (1 - beta2 ** float(state["step"]))
    return moments or mean_of(gradients, squared=True)


def mean_of(directions: Sequence[Direction], *, squared: bool = False) -> Direction:
    """Mean of gradients, or of their squares: Adam's v before its first step."""
    sums: Direction = {}
    for direction in directions:
        for name, tensor in direction.items():
            tensor = tensor.float() if tensor.dtype.itemsize < 4 else tensor
            term = tensor.square() if squared else tensor
            sums[name] = sums[name] + term if name in sums else term
    return {name: tensor / len(directions) for name, tensor in sums.items()}


def dot(a: Direction, b: Direction) -> float:
    """Inner product over all parameters; the sums of the parameters are added in float64. Of DTensors: collective."""
    products = [(a[name] * b[name].to(a[name].dtype)).sum(dtype=torch.float64) for name in a if name in b]
    return float(whole_tensor(sum(products, torch.zeros_like(products[0])))) if products else 0.0


class _Hidden(nn.Module):
    """`Model.hidden` as a module, whose parameters functional_call can replace."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model, self.module = model, model.module

    def forward(self, batch: MicroBatch) -> Tensor:
        return self.model.hidden(batch)


def _with_tangents(head: Head, dual_of: dict[Tensor, Tensor]) -> Head:
    bias = None if head.bias is None else dual_of.get(head.bias, head.bias.detach())
    return replace(head, weight=dual_of.get(head.weight, head.weight.detach()), bias=bias)


def _logit_gradient(logits: Tensor, teacher_logits: Tensor, objective: Objective) -> Tensor:
    """d objective / d logits of each row, (n, V)."""
    leaf = logits.detach().requires_grad_()
    with torch.enable_grad():
        value = objective.value(leaf.log_softmax(-1), teacher_logits.log_softmax(-1)).sum()
    return torch.autograd.grad(value, leaf)[0]


@contextmanager
def _without_grads(parameters: dict[str, nn.Parameter]) -> Iterator[None]:
    """Inside the block `.grad` starts as None; after it `.grad` is what it was."""
    held = {name: parameter.grad for name, parameter in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.grad = None
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.grad = held[name]
