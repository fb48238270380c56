"""Stand-ins for a divergence over the whole vocabulary: sums over top-k tokens, and the sampled token alone.

They are what a teacher behind a server allows; here, where both models' logits are at hand, they are the controls that
the full divergence is compared with. Both losses take them wherever they take a `Divergence`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tip_exp.losses.divergence import Divergence

Side = Literal["student", "teacher"]
Rest = Literal["tail", "renormalize", "drop"]


@dataclass(frozen=True, slots=True)
class TopK:
    """A divergence over the `k` tokens that `support` finds likeliest; `rest` says what becomes of all others.

    tail         they are one event more. The divergence of two coarser distributions is never above the full one, and
                 the student still feels mass that leaves the k tokens.
    renormalize  both distributions are cut to the k tokens and sum to one there; mass outside is not felt at all.
    drop         their terms are left out. Of forward KL alone: its terms weigh as the teacher's mass; reverse KL's sum
                 would fall without bound by moving the student's mass outside.
    A divergence's terms weigh as the distribution it averages over, so that one's top-k is the support with the least
    bias: the student's for reverse KL, the teacher's for forward KL. With k tokens or fewer in all it is the full one.
    """

    divergence: Divergence
    k: int
    support: Side
    rest: Rest

    def __post_init__(self) -> None:
        assert self.rest != "drop" or self.divergence.kind == "forward_kl", "unbounded below"

    streams = False

    def at(self, rows: Tensor | slice) -> TopK:
        return self

    def value(
        self, student_logprobs: Float[Tensor, "n v"], teacher_logprobs: Float[Tensor, "n v"]
    ) -> Float[Tensor, " n"]:
        """Per token, nats, differentiable by autograd."""
        if self.k >= student_logprobs.shape[-1]:
            return self.divergence.value(student_logprobs, teacher_logprobs)
        chosen = self._chosen(student_logprobs, teacher_logprobs)
        ours, theirs = self._coarse(student_logprobs, chosen), self._coarse(teacher_logprobs, chosen)
        return self.divergence.value(ours, theirs)

    def gradient_(
        self, logp: Float[Tensor, "n v"], p: Float[Tensor, "n v"], logq: Float[Tensor, "n v"], q: Float[Tensor, "n v"]
    ) -> Float[Tensor, " n"]:
        """The estimate per token; `logp` becomes the gradient at the student's logits, the rest is scratch."""
        if self.k >= logp.shape[-1]:
            return self.divergence.gradient_(logp, p, logq, q)
        chosen = self._chosen(logp, logq)
        ours, theirs = self._coarse(logp, chosen), self._coarse(logq, chosen)
        if self.rest == "drop":
            weight = theirs.exp()
            torch.mul(p, weight.sum(-1, keepdim=True), out=logp)
            logp.scatter_add_(-1, chosen, -weight)
            return torch.linalg.vecdot(weight, theirs - ours)
        value, grad = self.divergence.value_and_logit_grad(ours, theirs)
        if self.rest == "tail":  # the tail's tokens share its gradient by their part in it
            logp.sub_(ours[:, -1:]).exp_().mul_(grad[:, -1:])
        else:
            logp.zero_()
        logp.scatter_(-1, chosen, grad[:, : self.k])
        return value

    def _chosen(self, student: Tensor, teacher: Tensor) -> Int[Tensor, "n k"]:
        return (student if self.support == "student" else teacher).topk(self.k).indices

    def _coarse(self, logprobs: Tensor, chosen: Tensor) -> Tensor:
        """Log-probabilities of the k tokens, and last of the tail if it counts."""
        inside = logprobs.gather(-1, chosen)
        if self.rest == "drop":
            return inside
        if self.rest == "renormalize":
            return inside.log_softmax(-1)
        # Not log(1 - sum): where the k tokens hold nearly everything that difference is rounding.
        outside = logprobs.scatter(-1, chosen, float("-inf")).logsumexp(-1, keepdim=True)
        return torch.cat([inside, outside], -1)


@dataclass(frozen=True, slots=True)
class SampledK1:
    """Reverse KL by the one token the student sampled: the policy gradient of advantage -(log P_S - log P_T).

    With y ~ P_S and r = log P_S(y) - log P_T(y): E[r] is KL(P_S || P_T), and E[r grad log P_S(y)] its gradient, for
    E[grad log P_S(y)] = 0. So both are unbiased at each state, with the variance of one sample; r may be negative.
    True as long as y came from P_S itself and no selection looked at y.
    """

    token_ids: Int[Tensor, " n"]

    streams = False

    def at(self, rows: Tensor | slice) -> SampledK1:
        return SampledK1(self.token_ids[rows])

    def value(
        self, student_logprobs: Float[Tensor, "n v"], teacher_logprobs: Float[Tensor, "n v"]
    ) -> Float[Tensor, " n"]:
        """r per token, nats; autograd finds r grad log P_S(y), not r's own gradient."""
        ours, theirs = self._sampled(student_logprobs), self._sampled(teacher_logprobs)
        ratio = (ours - theirs).detach()
        return ratio + ratio * (ours - ours.detach())

    def gradient_(
        self, logp: Float[Tensor, "n v"], p: Float[Tensor, "n v"], logq: Float[Tensor, "n v"], q: Float[Tensor, "n v"]
    ) -> Float[Tensor, " n"]:
        """r per token; `logp` becomes r (1[y] - p), the rest is scratch."""
        ratio = self._sampled(logp) - self._sampled(logq)
        torch.mul(p, -ratio[:, None], out=logp)
        logp.scatter_add_(-1, self.token_ids[:, None], ratio[:, None])
        return ratio

    def _sampled(self, logprobs: Tensor) -> Tensor:
        return logprobs.gather(-1, self.token_ids[:, None]).squeeze(-1)


Objective = Divergence | TopK | SampledK1
