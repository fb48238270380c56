"""Teacher-student divergences of log-probabilities: value, and gradient with respect to the student's logits.

Every one is a sum over the vocabulary of g(p, q), p the student's and q the teacher's probabilities, so with f = dg/dp
    d D / d logits = p (f - E_p f):
one formula, five f's. `gradient_` works in place on whole rows; `streamed_gradient_` on any columns of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tip_exp.losses.online_softmax import Normalizers
from tip_exp.losses.tiling import exp

Kind = Literal["reverse_kl", "forward_kl", "jsd", "skew_reverse_kl", "skew_forward_kl"]


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
    """The divergence a run trains on, over the full vocabulary.

    `beta` is the teacher's weight in JSD's mixture. `skew` is the weight that a skewed KL's own side has in the mixture
    it is measured against (Ko et al. 2024, DistiLLM): KL(P_T || skew P_T + (1 - skew) P_S); P_S, P_T exchanged.
    """

    kind: Kind
    beta: float = 0.5
    skew: float = 0.1

    @property
    def streams(self) -> bool:
        """Whether scoring's normalisers are enough for the gradient at some columns without the rest of the row."""
        return self.kind in ("reverse_kl", "forward_kl")

    def at(self, rows: Tensor | slice) -> Divergence:
        """What the objective is for some rows: a divergence is the same for all."""
        return self

    def value(
        self, student_logprobs: Float[Tensor, "n v"], teacher_logprobs: Float[Tensor, "n v"]
    ) -> Float[Tensor, " n"]:
        """Divergence per token, nats, differentiable by autograd."""
        if self.kind == "reverse_kl":
            return reverse_kl(student_logprobs, teacher_logprobs)
        if self.kind == "forward_kl":
            return forward_kl(student_logprobs, teacher_logprobs)
        if self.kind == "jsd":
            return jsd(student_logprobs, teacher_logprobs, self.beta)
        if self.kind == "skew_reverse_kl":
            return reverse_kl(student_logprobs, mixture(student_logprobs, teacher_logprobs, 1 - self.skew))
        return reverse_kl(teacher_logprobs, mixture(student_logprobs, teacher_logprobs, self.skew))

    def value_and_logit_grad(
        self, student_logprobs: Float[Tensor, "n v"], teacher_logprobs: Float[Tensor, "n v"]
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, "n v"]]:
        """Divergence per token and its gradient with respect to the student's logits; the arguments stay."""
        grad = student_logprobs.clone()
        value = self.gradient_(grad, student_logprobs.exp(), teacher_logprobs.clone(), teacher_logprobs.exp())
        return value, grad

    def gradient_(
        self, logp: Float[Tensor, "n v"], p: Float[Tensor, "n v"], logq: Float[Tensor, "n v"], q: Float[Tensor, "n v"]
    ) -> Float[Tensor, " n"]:
        """The divergence per token; `logp` becomes the gradient at the student's logits, the rest is scratch.

        With m the mixture, f is  log p/q (reverse),  -q/p (forward: p - q, TIP, App. A.1),  (1 - beta) log p/m (JSD),
        log p/m - skew p/m (skewed reverse),  -(1 - skew) q/m (skewed forward), each but for a constant.
        """
        if self.kind == "reverse_kl":
            torch.sub(logp, logq, out=logq)
            value = torch.linalg.vecdot(p, logq)
            torch.mul(p, logq.sub_(value[:, None]), out=logp)
            return value
        if self.kind == "forward_kl":
            value = torch.linalg.vecdot(q, logq.sub_(logp))
            torch.sub(p, q, out=logp)
            return value
        if self.kind == "jsd":
            logm = _log_mixture(p, q, self.beta)
            ours, theirs = torch.linalg.vecdot(p, logp.sub_(logm)), torch.linalg.vecdot(q, logq.sub_(logm))
            logp.sub_(ours[:, None]).mul_(p).mul_(1 - self.beta)
            return self.beta * theirs + (1 - self.beta) * ours
        if self.kind == "skew_reverse_kl":
            logm = _log_mixture(p, q, 1 - self.skew)
            value = torch.linalg.vecdot(p, logp.sub_(logm))
            logp.addcmul_(p, logm.neg_().exp_(), value=-self.skew)
        else:
            logm = _log_mixture(p, q, self.skew)
            value = torch.linalg.vecdot(q, logq.sub_(logm))
            torch.mul(q, logm.neg_().exp_(), out=logp).mul_(self.skew - 1)
        logp.sub_(torch.linalg.vecdot(p, logp)[:, None]).mul_(p)
        return value

    def streamed_gradient_(
        self, z: Float[Tensor, "n c"], t: Float[Tensor, "n c"], p: Float[Tensor, "n c"], known: Normalizers
    ) -> None:
        """Some columns of student and teacher logits: `z` becomes the gradient there, the rest is scratch."""
        student = known.student.to(z.dtype)[:, None]
        if self.kind == "reverse_kl":
            torch.sub(z, t, out=t)
            # log p/q - KL = z - t - constant; of three large numbers the small sum is rounded, once.
            t.sub_((known.student - known.teacher + known.reverse_kl).to(z.dtype)[:, None])
            torch.mul(exp(z.sub_(student), out=p), t, out=z)
        else:
            exp(z.sub_(student), out=p)
            t.sub_(known.teacher.to(z.dtype)[:, None])
            torch.sub(p, exp(t, out=t), out=z)

    def known_value(self, known: Normalizers) -> Float[Tensor, " n"]:
        """The divergence per token, from scoring."""
        return known.reverse_kl if self.kind == "reverse_kl" else known.forward_kl


def _log_mixture(p: Tensor, q: Tensor, beta: float) -> Tensor:
    """log(beta q + (1 - beta) p); where both vanish the log is merely finite, and nothing depends on it."""
    return torch.mul(p, 1 - beta).add_(q, alpha=beta).clamp_(min=torch.finfo(p.dtype).tiny).log_()
