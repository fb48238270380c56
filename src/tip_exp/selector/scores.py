"""Score rules: arithmetic on per-token statistics, one function per rule.

A rule's parameters name the statistics it reads, clipped and normalized as the selector's config says; `high_entropy`
and `high_divergence` are booleans, thresholded at the config's `quadrants`. The signature therefore lists what a run
must measure. This module does not import torch. CONTRIBUTING.md says how to add a rule.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

# What `token_stats` can measure at a response token; in nats except the overlap.
STATISTICS = (
    "entropy",  # H(P_S)
    "teacher_entropy",  # H(P_T)
    "reverse_kl",  # KL(P_S || P_T): TIP, Eq. 3
    "forward_kl",  # KL(P_T || P_S)
    "jsd",  # generalized Jensen-Shannon divergence with learner.jsd_beta
    "student_logprob",  # log P_S of the sampled token
    "teacher_logprob",  # log P_T of the sampled token
    "topk_overlap",  # fraction of the student's top-k tokens that are in the teacher's top-k
)
# Statistics of the student alone: a rule that reads no others projects the teacher on kept tokens only.
STUDENT_STATISTICS = frozenset({"entropy", "student_logprob"})

# What a selector's settings may be; `Selector` and the configuration share these types.
Normalizer = Literal["minmax", "quantile", "rank", "none"]
Group = Literal["batch", "micro_batch", "rollout"]
Order = Literal["top", "bottom", "sample", "positive"]
Rounding = Literal["floor", "ceil", "at_least_one"]
Scope = Literal["rollout", "batch"]


def soft_or(entropy: Tensor, reverse_kl: Tensor) -> Tensor:
    return entropy + reverse_kl - entropy * reverse_kl  # TIP, Eq. 7: h + d - h d; h, d in [0, 1]


def q3(entropy: Tensor, forward_kl: Tensor) -> Tensor:
    return forward_kl * (1 - entropy)  # TIP, Sec. 7.3: ranked by forward KL, trained on reverse KL


def entropy(entropy: Tensor) -> Tensor:
    return entropy  # TIP, Sec. 4 and Table 3


def reverse_kl(reverse_kl: Tensor) -> Tensor:
    return reverse_kl  # TIP, App. B.2


def forward_kl(forward_kl: Tensor) -> Tensor:
    return forward_kl


def jsd(jsd: Tensor) -> Tensor:
    return jsd


def teacher_entropy(teacher_entropy: Tensor) -> Tensor:
    return teacher_entropy  # TIP, App. B.1


def quadrant_1(high_entropy: Tensor, high_divergence: Tensor) -> Tensor:
    return high_entropy & high_divergence  # TIP, Table 1


def quadrant_2(high_entropy: Tensor, high_divergence: Tensor) -> Tensor:
    return high_entropy & ~high_divergence


def quadrant_3(high_entropy: Tensor, high_divergence: Tensor) -> Tensor:
    return ~high_entropy & high_divergence


def quadrant_4(high_entropy: Tensor, high_divergence: Tensor) -> Tensor:
    return ~high_entropy & ~high_divergence


def random(noise: Tensor) -> Tensor:
    return noise  # uniform in [0, 1), from the run's seed and step


def full(ones: Tensor) -> Tensor:
    return ones  # TIP, Eq. 1


QUADRANTS = {"q1": quadrant_1, "q2": quadrant_2, "q3": quadrant_3, "q4": quadrant_4}
SCORES: dict[str, Callable[..., Tensor]] = {
    "soft_or": soft_or,
    "q3": q3,
    "entropy": entropy,
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jsd": jsd,
    "teacher_entropy": teacher_entropy,
    "q1": quadrant_1,
    "q2": quadrant_2,
    "q3_quadrant": quadrant_3,
    "q4": quadrant_4,
    "random": random,
    "full": full,
}
# Rules that are defined for inputs in [0, 1] only.
UNIT_INTERVAL = frozenset({"soft_or", "q3"})
# Rules that decide per token; a budget does not apply to them.
UNBUDGETED = frozenset({"q1", "q2", "q3_quadrant", "q4", "full"})


def required_stats(score: str) -> frozenset[str]:
    """Names of the statistics that a rule reads."""
    names = set(inspect.signature(SCORES[score]).parameters)
    if names & {"high_entropy", "high_divergence"}:
        names |= {"entropy", "reverse_kl"}
    return frozenset(names & set(STATISTICS))
