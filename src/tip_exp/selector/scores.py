"""Score rules: arithmetic on per-token statistics, one function per rule.

A rule's parameters name the statistics it reads, clipped and normalized as the selector's config says; `high_entropy`
and `high_divergence` are booleans, thresholded at the config's `quadrants`. The signature therefore lists what a run
must measure. Keyword-only parameters are numbers that the config sets in `selector.parameters`. TIP's rules are here,
those of other papers in `published`. A rule need not be in this package: "my_module:rule" names a function by its
module, and an installed package can name one in the entry-point group `tip_exp.selector_scores` (docs/library.md).
This module does not import torch. CONTRIBUTING.md says how to add a rule.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from tip_exp.selector import published
from tip_exp.selector.imports import import_function, source_digest

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
# What a rule's parameters may be called: one of these, or
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
ENTRY_POINTS = "tip_exp.selector_scores"

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
# Rules that are defined for inputs in [0, 1] only, and those of values in nats, which no normalizer may change.
UNIT_INTERVAL = frozenset({"soft_or", "q3"}) | published.UNIT_INTERVAL
UNNORMALIZED = published.UNNORMALIZED
SIGNED = published.SIGNED  # with negative values, unless a normalizer maps them to [0, 1]
# Rules that decide per token; a budget does not apply to them.
UNBUDGETED = frozenset({"q1", "q2", "q3_quadrant", "q4", "full"}) | published.UNBUDGETED


def required_stats(score: str | Rule) -> frozenset[str]:
    """Names of the statistics that a rule reads. Raises ValueError as `find_rule` does."""
    names = set(rule_inputs(find_rule(score)))
    if names & {"high_entropy", "high_divergence"}:
        names |= {"entropy", "reverse_kl"}
    if "log_ratio" in names:
        names |= {"student_logprob", "teacher_logprob"}
    return frozenset(names & set(STATISTICS))


def rule_inputs(rule: Rule) -> list[str]:
    """The positional parameters of a rule, in order. Raises ValueError if one is not in INPUTS."""
    parameters = inspect.signature(rule).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind != parameter.KEYWORD_ONLY]
    for name in names:
        if name not in INPUTS:
            close = difflib.get_close_matches(name, INPUTS, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(
                f"the rule {getattr(rule, '__name__', rule)} has the parameter {name}, which is no statistic; "
                f"parameters can be {', '.join(INPUTS)}{hint}; numbers of selector.parameters stand after *"
            )
    return names


def parameter_errors(rule: Rule, values: Collection[str]) -> list[str]:
    """What is wrong with the names in `selector.parameters`: those that the rule lacks, and those that it needs."""
    parameters = inspect.signature(rule).parameters.values()
    names = {p.name: p.default is p.empty for p in parameters if p.kind == p.KEYWORD_ONLY}
    title = getattr(rule, "__name__", rule)
    allowed = ", ".join(names) or "none"
    unknown = [
        f"selector.parameters.{name}: the rule {title} has no such parameter; it has {allowed}"
        for name in values
        if name not in names
    ]
    needed = [
        f"selector.parameters lacks {name}, a parameter of the rule {title}"
        for name, is_needed in names.items()
        if is_needed and name not in values
    ]
    return unknown + needed


def find_rule(score: str | Rule) -> Rule:
    """The function that `score` names: an entry of SCORES, "module:function", or an entry point; a function is itself.

    "@" and the digest of its code may follow, as `with_code` adds it. Modules are also searched in the working
    directory. Raises ValueError if there is no such function, if its code is not that of the digest, or if a parameter
    is not in INPUTS.
    """
    if callable(score):
        rule_inputs(score)
        return score
    return named_rule(score)


@cache
def named_rule(score: str) -> Rule:
    """`find_rule` of a name; the module is searched and its code compared once."""
    name, _, digest = score.partition("@")
    if name in SCORES:
        return SCORES[name]
    rule = import_function(_import_path(name))
    rule_inputs(rule)
    if digest and digest != (current := _code_digest(name, rule)):
        raise ValueError(
            f"the code of {name} is not that of this run: its digest is {current}, the run's {digest}. Restore it, or "
            f"start a run of another name with selector.score={name}"
        )
    return rule


def trial_error(settings: dict[str, Any], quadrants: dict[str, float]) -> str:
    """What one call of a rule outside of this package on random tokens raises, "" if nothing; imports torch.

    `settings`: of the Selector, without its quadrants.
    """
    if settings["score"].partition("@")[0] in SCORES:
        return ""
    from tip_exp.selector import trial

    return trial.trial_error(settings, quadrants)


def with_code(score: str) -> str:
    """A rule outside of this package with the digest of its module's source: "my_module:rule@3f0a96c1d2b4".

    A name in SCORES and a score that has a digest are returned unchanged. Raises ValueError as `find_rule` does.
    """
    return score if score in SCORES or "@" in score else f"{score}@{_code_digest(score, find_rule(score))}"


def _import_path(name: str) -> str:
    """ "module:function" as it is, or that of the entry point `name`."""
    if ":" in name:
        return name
    paths = _entry_points()
    if name in paths:
        return paths[name]
    names = rule_names()
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ValueError(f"no rule {name[:80]!r}; choose {', '.join(names)}, or a function as my_module:my_rule{hint}")


def rule_names() -> list[str]:
    """This package's rules, and those that other installed packages register."""
    return [*SCORES, *_entry_points()]


def _entry_points() -> dict[str, str]:
    from importlib.metadata import entry_points

    return {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}


def _code_digest(name: str, rule: Rule) -> str:
    """Digest of the code of the module that is named and of the one that defines the rule."""
    return source_digest([_import_path(name).partition(":")[0], getattr(rule, "__module__", "")], name)
