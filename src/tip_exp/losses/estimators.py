"""Estimates of a divergence from few tokens per position: the top k tokens, or the sampled token alone.

They need only what a remote teacher returns; here both models' logits are available, so they serve as controls for the
full divergence. The losses accept them wherever they accept a `Divergence`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from tip_exp.losses.divergence import Divergence, LogProbs, PerToken

Support = Literal["student", "teacher"]
Remainder = Literal["tail", "renormalize", "drop"]


@dataclass(frozen=True, slots=True)
class TopK:
    """A divergence over the `k` most likely tokens of the `support` model; `rest` is the treatment of all others.

    tail         they form one more event. Merging events never increases a divergence, and the student still gets a
                 gradient for mass that leaves the k tokens.
    renormalize  both distributions are restricted to the k tokens and renormalized; mass outside has no effect.
    drop         their terms are left out. Only for forward KL, whose terms are weighted by the teacher's mass; reverse
                 KL's sum would be unbounded below, since the student could move its mass outside.
    The bias is smallest if the support is the distribution that the divergence averages over: the student for reverse
    KL, the teacher for forward KL. With a vocabulary of at most k tokens this is the full divergence.
    """

    divergence: Divergence
    k: int
    support: Support
    rest: Remainder

    def __post_init__(self) -> None:
        assert self.rest != "drop" or self.divergence.name == "forward_kl", "unbounded below"

    def at(self, rows: Tensor | slice) -> TopK:
        """The objective of some rows: the same for all."""
        return self

    def value(self, student_logprobs: LogProbs, teacher_logprobs: LogProbs) -> PerToken:
        """Estimate per token, nats, differentiable by autograd."""
        if self.k >= student_logprobs.shape[-1]:
            return self.divergence.value(student_logprobs, teacher_logprobs)
        support_logprobs = student_logprobs if self.support == "student" else teacher_logprobs
        top_ids = support_logprobs.topk(self.k).indices
        return self.divergence.value(self._events(student_logprobs, top_ids), self._events(teacher_logprobs, top_ids))

    def _events(self, logprobs: Tensor, top_ids: Tensor) -> Tensor:
        """Log-probabilities of the k tokens, (n, k); with rest="tail" also of all other tokens together, (n, k + 1)."""
        inside = logprobs.gather(-1, top_ids)
        if self.rest == "drop":
            return inside
        if self.rest == "renormalize":
            return inside.log_softmax(-1)
        # log(1 - sum of the k) would be rounding error where the k tokens hold almost all mass.
        outside = logprobs.scatter(-1, top_ids, float("-inf")).logsumexp(-1, keepdim=True)
        return torch.cat([inside, outside], -1)


@dataclass(frozen=True, slots=True)
class SampledK1:
    """Reverse KL estimated from the token y that the student sampled: policy gradient with reward -r.

    With y ~ P_S and r = log P_S(y) - log P_T(y), E[r] = KL(P_S || P_T) and E[r grad log P_S(y)] is its gradient,
    because E[grad log P_S(y)] = 0. Both are unbiased with the variance of one sample; r can be negative. This requires
    that y was drawn from P_S itself (temperature 1, no truncation) and that the selection does not depend on y.
    """

    token_ids: Int[Tensor, " n"]

    def at(self, rows: Tensor | slice) -> SampledK1:
        """The objective of some rows."""
        return SampledK1(self.token_ids[rows])

    def value(self, student_logprobs: LogProbs, teacher_logprobs: LogProbs) -> PerToken:
        """r per token, nats; its autograd gradient is r grad log P_S(y), not the gradient of r."""
        ids = self.token_ids[:, None]
        student_logprob = student_logprobs.gather(-1, ids)[:, 0]
        teacher_logprob = teacher_logprobs.gather(-1, ids)[:, 0]
        ratio = (student_logprob - teacher_logprob).detach()
        return ratio + ratio * (student_logprob - student_logprob.detach())


Objective = Divergence | TopK | SampledK1
