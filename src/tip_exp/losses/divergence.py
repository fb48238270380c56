"""Teacher-student divergences over the full vocabulary, per token. CONTRIBUTING.md says how to add one.

In nats, except `tv` (no unit) and `sqrt_kl` (nats^(1/2)).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tip_exp.losses.online_softmax import LogNormalizers
from tip_exp.losses.tiling import exp

LogProbs = Float[Tensor, "n v"]
PerToken = Float[Tensor, " n"]
SQRT_KL_SCALE = 0.1  # c of sqrt_kl, in nats^(1/2)


def reverse_kl(student_logprobs: LogProbs, teacher_logprobs: LogProbs) -> PerToken:
    """KL(P_S || P_T): TIP, Eq. 3."""
    return (student_logprobs.exp() * (student_logprobs - teacher_logprobs)).sum(-1)


def forward_kl(student_logprobs: LogProbs, teacher_logprobs: LogProbs) -> PerToken:
    """KL(P_T || P_S)."""
    return reverse_kl(teacher_logprobs, student_logprobs)


def jsd(student_logprobs: LogProbs, teacher_logprobs: LogProbs, jsd_beta: float) -> PerToken:
    """beta KL(P_T || M) + (1 - beta) KL(P_S || M), M = beta P_T + (1 - beta) P_S (Agarwal et al. 2024, GKD)."""
    mixture = _mixture(student_logprobs, teacher_logprobs, jsd_beta)
    return jsd_beta * reverse_kl(teacher_logprobs, mixture) + (1 - jsd_beta) * reverse_kl(student_logprobs, mixture)


def skew_reverse_kl(student_logprobs: LogProbs, teacher_logprobs: LogProbs, skew: float) -> PerToken:
    """KL(P_S || skew P_S + (1 - skew) P_T) (Ko et al. 2024, DistiLLM)."""
    return reverse_kl(student_logprobs, _mixture(student_logprobs, teacher_logprobs, 1 - skew))


def skew_forward_kl(student_logprobs: LogProbs, teacher_logprobs: LogProbs, skew: float) -> PerToken:
    """KL(P_T || skew P_T + (1 - skew) P_S) (Ko et al. 2024, DistiLLM)."""
    return reverse_kl(teacher_logprobs, _mixture(student_logprobs, teacher_logprobs, skew))


def tv(student_logprobs: LogProbs, teacher_logprobs: LogProbs) -> PerToken:
    """Total variation, sum |P_S - P_T| / 2, in [0, 1]: its gradient is bounded."""
    return 0.5 * (student_logprobs.exp() - teacher_logprobs.exp()).abs().sum(-1)


def sqrt_kl(student_logprobs: LogProbs, teacher_logprobs: LogProbs) -> PerToken:
    """sqrt(KL(P_S || P_T) + c^2) - c. Its gradient is reverse KL's times 1 / (2 sqrt(KL + c^2))."""
    return (reverse_kl(student_logprobs, teacher_logprobs) + SQRT_KL_SCALE**2).sqrt() - SQRT_KL_SCALE


def clipped_kl(student_logprobs: LogProbs, teacher_logprobs: LogProbs, kl_clip: float) -> PerToken:
    """min(KL(P_S || P_T), kl_clip): a token above the limit has no gradient, so the largest divergences do not train.

    The sum over the vocabulary is clipped, not its terms as in the code of OPSD (2601.18734).
    """
    return reverse_kl(student_logprobs, teacher_logprobs).clamp(max=kl_clip)


def _mixture(student_logprobs: Tensor, teacher_logprobs: Tensor, teacher_weight: float) -> Tensor:
    """Log-probabilities of teacher_weight P_T + (1 - teacher_weight) P_S, (n, v)."""
    return torch.logaddexp(teacher_logprobs + math.log(teacher_weight), student_logprobs + math.log1p(-teacher_weight))


# Parameters beyond the two log-probabilities are fields of `Divergence`, passed by name.
DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jsd": jsd,
    "skew_reverse_kl": skew_reverse_kl,
    "skew_forward_kl": skew_forward_kl,
    "tv": tv,
    "sqrt_kl": sqrt_kl,
    "clipped_kl": clipped_kl,
}


@dataclass(frozen=True, slots=True)
class Divergence:
    """An entry of DIVERGENCES with its parameters: the objective of a run that uses the full vocabulary.

    `jsd_beta` is the teacher's weight in the mixture of the JSD; `skew` is the weight of a skewed KL's first argument
    in the mixture that is its second; `kl_clip`, in nats, is the limit of clipped_kl.
    """

    name: str
    jsd_beta: float = 0.5
    skew: float = 0.1
    kl_clip: float = 1.0

    def __post_init__(self) -> None:
        assert self.name in DIVERGENCES, f"{self.name} is not one of {', '.join(DIVERGENCES)}"

    def at(self, rows: Tensor | slice) -> Divergence:
        """The objective of some rows: a divergence is the same for all."""
        return self

    def value(self, student_logprobs: LogProbs, teacher_logprobs: LogProbs) -> PerToken:
        """Divergence per token, nats, differentiable by autograd."""
        function = DIVERGENCES[self.name]
        parameters = list(inspect.signature(function).parameters)[2:]
        return function(student_logprobs, teacher_logprobs, **{name: getattr(self, name) for name in parameters})


def reverse_kl_grad_(z: Tensor, t: Tensor, p: Tensor, stats: LogNormalizers) -> None:
    """d KL(p || q) / dz = p (log p/q - KL), where log p/q = (z - log Z_p) - (t - log Z_q)."""
    torch.sub(z, t, out=t)
    # The three large terms are added in float64 and rounded once.
    t.sub_((stats.student - stats.teacher + stats.reverse_kl).to(z.dtype)[:, None])
    torch.mul(exp(z.sub_(stats.student.to(z.dtype)[:, None]), out=p), t, out=z)


def forward_kl_grad_(z: Tensor, t: Tensor, p: Tensor, stats: LogNormalizers) -> None:
    """d KL(q || p) / dz = p - q: TIP, App. A.1."""
    exp(z.sub_(stats.student.to(z.dtype)[:, None]), out=p)
    t.sub_(stats.teacher.to(z.dtype)[:, None])
    torch.sub(p, exp(t, out=t), out=z)


# Gradients at some columns from the rows' log-normalizers alone, so that tiles need not hold whole rows.
# (z, t, p, stats): z, student logits (n, c), becomes the gradient; t, teacher logits, and p, scratch, are overwritten.
ColumnGrad = Callable[[Tensor, Tensor, Tensor, LogNormalizers], None]
COLUMN_GRADS: dict[str, ColumnGrad] = {"reverse_kl": reverse_kl_grad_, "forward_kl": forward_kl_grad_}
