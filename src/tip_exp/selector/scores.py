"""Score rules: arithmetic on per-token statistics, one function per rule.

A rule's parameters name the statistics it reads, clipped and normalized as the selector's config says; `high_entropy`
and `high_divergence` are booleans, thresholded at the config's `quadrants`. The signature therefore lists what a run
must measure. Keyword-only parameters are numbers that the config sets in `selector.parameters`. TIP's rules are here,
those of other papers in `published`; `lookup` finds a rule by its name, also a user's own. This module does not import
torch. CONTRIBUTING.md says how to add a rule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from tip_exp.selector import published

if TYPE_CHECKING:
    from torch import Tensor

# What `token_stats` can measure at a response token; in nats unless its comment says otherwise.
STATISTICS = (
    "entropy",  # H(P_S)
    "teacher_entropy",  # H(P_T)
    "reverse_kl",  # KL(P_S || P_T): TIP, Eq. 3
    "forward_kl",  # KL(P_T || P_S)
    "grad_norm",  # norm of d reverse_kl / d student logits
    "jsd",  # generalized Jensen-Shannon divergence with learner.jsd_beta
    "student_logprob",  # log P_S of the sampled token
    "teacher_logprob",  # log P_T of the sampled token
    "topk_overlap",  # fraction of the student's top-k tokens that are in the teacher's top-k
    "teacher_mass_topk",  # P_T of the student's 16 likeliest tokens together
    "teacher_rank",  # number of tokens that the teacher finds likelier than the student's likeliest
    "ier",  # signal over noise of the sampled reverse-KL gradient, without a unit (2609.24432)
)
# What a step with diagnostics measures: the others cost more, and only the rules that read them need them.
DIAGNOSTICS = frozenset(STATISTICS) - {"teacher_mass_topk", "teacher_rank", "ier"}
# Statistics of the student alone: a rule that reads no others projects the teacher on kept tokens only.
STUDENT_STATISTICS = frozenset({"entropy", "student_logprob"})
# Inputs that are clipped and normalized.
NORMALIZED = (*STATISTICS, "log_ratio")  # log P_T - log P_S of the sampled token
# What a rule's positional parameters may be called.
INPUTS = (
    *NORMALIZED,
    "high_entropy",  # bool: entropy at or above quadrants.entropy
    "high_divergence",  # bool: reverse_kl at or above quadrants.divergence
    "noise",  # uniform in [0, 1), from the run's seed and step
    "ones",
    "rollout",  # index of the response in the step: 0, 1, ...
    "position",  # in the response: 0, 1, ...
    "response_length",  # number of response tokens of the token's rollout
)

Rule = Callable[..., "Tensor"]


class RuleError(ValueError):
    """A rule raised an error or returned no scores; the message names the rule."""


class RuleIsNaN(FloatingPointError):
    """A rule returned NaN for statistics that are finite; the message names the rule and the first token."""


# What a selector's settings may be; `Selector` and the configuration share these types.
Normalizer = Literal["minmax", "quantile", "rank", "none"]
Group = Literal["batch", "micro_batch", "rollout"]
Order = Literal["top", "bottom", "sample", "positive"]
Rounding = Literal["floor", "ceil", "at_least_one"]
Scope = Literal["rollout", "micro_batch", "batch"]
Weight = Literal["none", "score", "inverse_gradient", "sqrt"]
# Weights that fall with the gradient's norm: their offset unless selector.weight_offset is set, measured on one pair.
FALLING = {"inverse_gradient": 0.1, "sqrt": 0.05}


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


def grad_norm(grad_norm: Tensor) -> Tensor:
    return grad_norm  # |P_S (log P_S/P_T - KL)|; not in the paper


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
SCORES: dict[str, Rule] = {
    "soft_or": soft_or,
    "q3": q3,
    "entropy": entropy,
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "grad_norm": grad_norm,
    "jsd": jsd,
    "teacher_entropy": teacher_entropy,
    "q1": quadrant_1,
    "q2": quadrant_2,
    "q3_quadrant": quadrant_3,
    "q4": quadrant_4,
    "random": random,
    "full": full,
    **published.RULES,
}
# Rules that are defined for inputs in [0, 1] only, and rules that read raw values, whose normalizer must be none.
UNIT_INTERVAL = frozenset({"soft_or", "q3"}) | published.UNIT_INTERVAL
UNNORMALIZED = published.UNNORMALIZED
SIGNED = published.SIGNED  # with negative values, unless a normalizer maps them to [0, 1]
# Rules that decide per token; a budget does not apply to them.
UNBUDGETED = frozenset({"q1", "q2", "q3_quadrant", "q4", "full"}) | published.UNBUDGETED
