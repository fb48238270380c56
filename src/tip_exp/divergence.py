"""Teacher-student divergences of one chunk of log-probabilities: value, and gradient with respect to student logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Kind = Literal["reverse_kl", "forward_kl", "jsd"]


def entropy(logprobs: Float[Tensor, "n v"]) -> Float[Tensor, " n"]:
    """Shannon entropy, nats."""
    return -(logprobs.exp() * logprobs).sum(-1)


def reverse_kl(student_logprobs: Float[Tensor, "n v"], teacher_logprobs: Float[Tensor, "n v"]) -> Float[Tensor, " n"]:
    """KL(P_S || P_T), nats: TIP, Eq. 3."""
    return (student_logprobs.exp() * (student_logprobs - teacher_logprobs)).sum(-1)


def forward_kl(student_logprobs: Float[Tensor, "n v"], teacher_logprobs: Float[Tensor, "n v"]) -> Float[Tensor, " n"]:
    """KL(P_T || P_S), nats."""
    return reverse_kl(teacher_logprobs, student_logprobs)


def mixture(
    student_logprobs: Float[Tensor, "n v"], teacher_logprobs: Float[Tensor, "n v"], beta: float
) -> Float[Tensor, "n v"]:
    """Log of M = beta P_T + (1 - beta) P_S."""
    return torch.logaddexp(teacher_logprobs + math.log(beta), student_logprobs + math.log1p(-beta))


def jsd(
    student_logprobs: Float[Tensor, "n v"], teacher_logprobs: Float[Tensor, "n v"], beta: float
) -> Float[Tensor, " n"]:
    """beta KL(P_T || M) + (1 - beta) KL(P_S || M), nats; M as in `mixture` (Agarwal et al. 2024, GKD)."""
    middle = mixture(student_logprobs, teacher_logprobs, beta)
    return beta * reverse_kl(teacher_logprobs, middle) + (1 - beta) * reverse_kl(student_logprobs, middle)


@dataclass(frozen=True, slots=True)
class Divergence:
    """The divergence a run trains on. `beta` is the teacher's weight in JSD's mixture, unused by the two KLs."""

    kind: Kind
    beta: float = 0.5

    def value(
        self, student_logprobs: Float[Tensor, "n v"], teacher_logprobs: Float[Tensor, "n v"]
    ) -> Float[Tensor, " n"]:
        """Divergence per token, nats, differentiable by autograd."""
        if self.kind == "reverse_kl":
            return reverse_kl(student_logprobs, teacher_logprobs)
        if self.kind == "forward_kl":
            return forward_kl(student_logprobs, teacher_logprobs)
        return jsd(student_logprobs, teacher_logprobs, self.beta)

    def value_and_logit_grad(
        self, student_logprobs: Float[Tensor, "n v"], teacher_logprobs: Float[Tensor, "n v"]
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, "n v"]]:
        """Divergence per token and its gradient with respect to the student's logits.

        With p, q the student's and teacher's probabilities, m their mixture and z the student's logits:
            d KL(p||q) / dz = p (log p/q - KL(p||q))
            d KL(q||p) / dz = p - q                                (TIP, App. A.1)
            d JSD / dz      = (1 - beta) p (log p/m - KL(p||m))
        """
        student = student_logprobs.exp()
        if self.kind == "forward_kl":
            return forward_kl(student_logprobs, teacher_logprobs), student - teacher_logprobs.exp()
        if self.kind == "reverse_kl":
            log_ratio = student_logprobs - teacher_logprobs
            value = torch.linalg.vecdot(student, log_ratio)
            return value, log_ratio.sub_(value[:, None]).mul_(student)
        middle = mixture(student_logprobs, teacher_logprobs, self.beta)
        log_ratio = student_logprobs - middle
        to_middle = torch.linalg.vecdot(student, log_ratio)
        value = self.beta * reverse_kl(teacher_logprobs, middle) + (1 - self.beta) * to_middle
        return value, log_ratio.sub_(to_middle[:, None]).mul_(student).mul_(1 - self.beta)
