"""Naive reference implementations that tests compare the package with: whole logits, float64, autograd, plain loops."""

from __future__ import annotations

import torch
from torch import Tensor

from tip_exp.learner.learner import StepReport
from tip_exp.models.pair import Pair
from tip_exp.types import Rollout

# --- learner: one step -----------------------------------------------------------------------------------------------


def step_by_autograd(pair: Pair, rollouts: list[Rollout], report: StepReport) -> tuple[dict[str, Tensor], float]:
    """Gradients and loss of a step: each rollout alone, whole logits, reverse KL averaged over the kept tokens."""
    pair.student.module.zero_grad()
    total, mass = torch.zeros((), dtype=torch.float64), 0.0
    for i, rollout in enumerate(rollouts):
        ids = torch.tensor([rollout.token_ids])
        positions = [t - 1 for t, is_response in enumerate(rollout.response_mask) if is_response]
        logp = pair.student.module(ids).logits[0, positions].log_softmax(-1)
        with torch.no_grad():
            logq = pair.teacher.module(ids).logits[0, positions].log_softmax(-1)
        rows = report.tokens.rollout == i
        order = report.tokens.position[rows].argsort()
        weight = report.selection.kept[rows][order].double()
        if report.selection.weights is not None:
            weight = weight * report.selection.weights[rows][order]
        total = total + ((logp.exp() * (logp - logq)).sum(-1) * weight).sum()
        mass += float(weight.sum())
    (total / mass).backward()
    named = pair.student.module.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}, float(total.detach()) / mass
