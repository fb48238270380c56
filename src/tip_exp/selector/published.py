"""Token rules of papers other than TIP; docs/selectors.md lists their formulas, sources and presets.

p is the student's distribution, q the teacher's, a = log q - log p of the sampled token (`log_ratio`). As in `scores`,
positional parameters name what is measured, keyword-only ones are numbers that the preset sets. No torch import.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_TINY = 1e-12  # keeps 0 / 0 at 0


def dial(student_logprob: Tensor, teacher_logprob: Tensor, *, beta: float) -> Tensor:
    """DIAL (2610.11659): L^beta |a| with the logarithmic mean L = (q - p) / (log q - log p) of the sampled token.

    L = sqrt(p q) sinh(a / 2) / (a / 2), which does not cancel where p and q are close.
    """
    log_p, log_q = student_logprob.double(), teacher_logprob.double()
    half = (log_q - log_p) / 2
    log_mean = ((log_p + log_q) / 2).exp() * (half.sinh() / half).where(half != 0, 1.0)
    return log_mean**beta * (2 * half).abs()


def log_ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio  # Sparse-OPD (2609.04565) keeps its largest or smallest; IER-OPD's sampled_rkl is -a


def tails(log_ratio: Tensor) -> Tensor:
    return (log_ratio - 0.5).abs()  # of ranks in [0, 1]: both tails alike (Sparse-OPD, pctltail)


def extremes(log_ratio: Tensor, rollout: Tensor) -> Tensor:
    """The largest and the smallest a of each response (Sparse-OPD, minmaxtok)."""
    largest, smallest = (_by_rollout(log_ratio, rollout, reduce) for reduce in ("amax", "amin"))
    return (log_ratio == largest) | (log_ratio == smallest)


def student_logprob(student_logprob: Tensor) -> Tensor:
    return student_logprob  # OPSA (2608.31046) trains on the lowest 20 %


def prefix(position: Tensor, response_length: Tensor) -> Tensor:
    return 1 - position / (response_length - 1).clamp(min=1)  # IER-OPD, code


def first_n(position: Tensor, *, n: float) -> Tensor:
    return position < n  # ESR (2605.27028)


def window(position: Tensor, response_length: Tensor, *, start: float, end: float) -> Tensor:
    """Tokens from the share `start` of the response up to the share `end`."""
    share = position / response_length
    return (share >= start) & (share < end)


def prefix_weight(log_ratio: Tensor, rollout: Tensor, position: Tensor, *, gamma: float) -> Tensor:
    """IW-OPD (2606.22600): 1 + gamma (1 - sum of |a| before the token / sum of |a| of the response)."""
    size = log_ratio.abs().double()
    order = (rollout * (position.max() + 1) + position).argsort() if len(position) else position
    before = size.new_zeros(len(size)).index_copy(0, order, size[order].cumsum(0) - size[order])
    before = before - _by_rollout(before, rollout, "amin")
    return 1 + gamma * (1 - before / _by_rollout(size, rollout, "sum").clamp(min=_TINY))


def soft_or_forward(entropy: Tensor, forward_kl: Tensor) -> Tensor:
    return entropy + forward_kl - entropy * forward_kl  # `tip` in IER-OPD's code


def teachability(forward_kl: Tensor, teacher_mass_topk: Tensor) -> Tensor:
    return forward_kl * teacher_mass_topk  # TA-OPD (2605.26844): disagreement x compatibility


def ca_softor(entropy: Tensor, forward_kl: Tensor, teacher_mass_topk: Tensor) -> Tensor:
    return soft_or_forward(entropy, forward_kl * teacher_mass_topk)  # TA-OPD + entropy


def ier(ier: Tensor) -> Tensor:
    return ier  # 2609.24432


def tip_ier_or(entropy: Tensor, forward_kl: Tensor, ier: Tensor) -> Tensor:
    useful = soft_or_forward(entropy, forward_kl)
    return useful + ier - useful * ier  # IER, OR fusion; ier as its rank


def tip_ier_and(entropy: Tensor, forward_kl: Tensor, ier: Tensor) -> Tensor:
    return soft_or_forward(entropy, forward_kl) * ier  # IER, AND fusion; ier as its rank


def teacher_entropy_gate(teacher_entropy: Tensor, *, threshold: float) -> Tensor:
    return teacher_entropy > threshold  # EOPD (2603.07079), nats


def propose_verify(teacher_rank: Tensor, *, k: float, rejected: float) -> Tensor:
    """SelecTKD (2510.24021): 1 where the student's likeliest token is in the teacher's top k, else `rejected`."""
    return rejected + (1 - rejected) * (teacher_rank < k)


def fire(
    entropy: Tensor,
    teacher_entropy: Tensor,
    teacher_logprob: Tensor,
    rollout: Tensor,
    *,
    alpha: float,
    beta: float,
    dropped: float,
) -> Tensor:
    """FiRe (2606.02684): (1 + alpha (1 - H_q / max H_q)) (1 + beta H_p / max H_p), the maxima over the batch.

    0 in the share `dropped` of the responses whose mean log q is lowest.
    """
    if not len(rollout):
        return entropy
    certain = 1 - teacher_entropy / teacher_entropy.max().clamp(min=_TINY)
    weights = (1 + alpha * certain) * (1 + beta * entropy / entropy.max().clamp(min=_TINY))
    rollout = rollout.unique(return_inverse=True)[1]  # a response without tokens is none to drop
    means = _reduced(teacher_logprob, rollout, "mean")
    kept = means.new_ones(len(means))
    kept[means.argsort(stable=True)[: int(dropped * len(means) + 1e-9)]] = 0
    return weights * kept[rollout]


def entropy_power(entropy: Tensor, *, power: float) -> Tensor:
    return entropy**power  # drawn in proportion to H^power


def _by_rollout(values: Tensor, rollout: Tensor, reduce: str) -> Tensor:
    """The sum, mean, amax or amin over its response, at each token: (n,)."""
    return _reduced(values, rollout, reduce)[rollout]


def _reduced(values: Tensor, rollout: Tensor, reduce: str) -> Tensor:
    size = int(rollout.max()) + 1 if len(rollout) else 0
    return values.new_zeros(size).scatter_reduce(0, rollout, values, reduce, include_self=False)


RULES: dict[str, Callable[..., Tensor]] = {
    "dial": dial,
    "log_ratio": log_ratio,
    "tails": tails,
    "extremes": extremes,
    "student_logprob": student_logprob,
    "prefix": prefix,
    "first_n": first_n,
    "window": window,
    "prefix_weight": prefix_weight,
    "soft_or_forward": soft_or_forward,
    "teachability": teachability,
    "ca_softor": ca_softor,
    "ier": ier,
    "tip_ier_or": tip_ier_or,
    "tip_ier_and": tip_ier_and,
    "teacher_entropy_gate": teacher_entropy_gate,
    "propose_verify": propose_verify,
    "fire": fire,
    "entropy_power": entropy_power,
}
UNIT_INTERVAL = frozenset({"tails", "soft_or_forward", "teachability", "ca_softor", "tip_ier_or", "tip_ier_and"})
UNNORMALIZED = frozenset({"dial", "prefix_weight", "teacher_entropy_gate", "propose_verify", "fire"})
SIGNED = frozenset({"log_ratio", "student_logprob"})
UNBUDGETED = frozenset({"extremes", "first_n", "window", "teacher_entropy_gate"})
