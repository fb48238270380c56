"""AdamW with the learner's settings, and the size of its updates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tip_exp.config.schema import LearnerConfig
from tip_exp.learner.distributed import Ranks
from tip_exp.models.lora import whole_tensor
from tip_exp.utils.errors import RunFailedError, first_line, is_out_of_memory

LARGEST_NORM = 1e15  # of the weights: products of two such numbers are still finite in float32 and bfloat16


def make_optimizer(parameters: Sequence[Tensor], config: LearnerConfig) -> torch.optim.AdamW:
    beta1, beta2 = config.betas
    options = {"lr": config.lr, "betas": (beta1, beta2), "eps": config.eps, "weight_decay": config.weight_decay}
    return torch.optim.AdamW(list(parameters), fused=True, **options)


def divide_gradients(parameters: Sequence[Tensor], mass: float) -> Tensor:
    """Divide the gradients by `mass`; returns their norm.

    Separate function so its list of gradients is gone when `zero_grad` frees them.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for gradient in gradients:
        gradient.div_(mass)
    return whole_tensor(torch.nn.utils.get_total_norm(gradients))


def update(optimizer: torch.optim.AdamW, lr: float, ranks: Ranks) -> float:
    """Step with the learning rate `lr` and free the gradients; returns `update_ratio`, and raises its errors.

    Raises RunFailedError if memory does not suffice, as weights and states may then be updated in part.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    try:
        optimizer.step()
        optimizer.zero_grad()
        return update_ratio(optimizer, ranks)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunFailedError(
            f"out of memory in the optimizer's update, which smaller micro-batches do not change: {first_line(error)}. "
            "The same command resumes from the newest checkpoint; more ranks or pair.teacher.placement=offload, under "
            "another name, need less"
        ) from error


@torch.no_grad()
def update_ratio(optimizer: torch.optim.AdamW, ranks: Ranks) -> float:
    """|update| / |weights| of the step just made, L2 norms over all parameters with a state; without weight decay.

    Sharded parameters count on every rank that holds them, replicas too, which leaves the ratio as it is.

    The update is computed from the moments, lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps), so that no second
    copy of the weights is kept: one parameter-sized temporary at a time.

    Raises FloatingPointError if the weights or the update are not finite, or the weights' norm exceeds LARGEST_NORM.
    """
    squares: list[Tensor] = []
    for group in optimizer.param_groups:
        (beta1, beta2), lr, eps = group["betas"], group["lr"], group["eps"]
        for parameter in group["params"]:
            if state := optimizer.state.get(parameter):
                step = state["step"].double()  # a tensor: nothing waits for the device before the end
                weight, mean, mean_square = map(local_part, (parameter, state["exp_avg"], state["exp_avg_sq"]))
                denominator = (mean_square / (1 - beta2**step)).sqrt_().add_(eps)
                update = denominator.reciprocal_().mul_(mean)
                norms = torch.stack([torch.linalg.vector_norm(t, dtype=torch.float64) for t in (update, weight)])
                norms[0] *= lr / (1 - beta1**step)
                squares.append(norms.square())
    if not squares:
        return 0.0
    total = torch.stack(squares).sum(0)
    ranks.sum_([total])
    update_norm, weight_norm = total.sqrt().tolist()
    if not (math.isfinite(update_norm) and weight_norm <= LARGEST_NORM):
        raise FloatingPointError(
            f"the norm of the updated weights is {weight_norm:.3g}, of the update {update_norm:.3g}; both must be "
            f"finite, the weights' at most {LARGEST_NORM:g}"
        )
    return update_norm / weight_norm if weight_norm else 0.0


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor itself."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()
