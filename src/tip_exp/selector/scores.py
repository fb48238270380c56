"""Score rules: arithmetic on per-token statistics, one function per rule.

A rule's parameters name the statistics it reads, clipped and normalized as the selector's config says; `high_entropy`
and `high_divergence` are booleans, thresholded at the config's `quadrants`. The signature therefore lists what a run
must measure. A rule need not be in this package: "my_module:rule" names a function by its module, and an installed
package can name one in the entry-point group `tip_exp.selector_scores` (docs/library.md). This module does not import
torch. CONTRIBUTING.md says how to add a rule here.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

# What `token_stats` can measure at a response token; in nats except the overlap.
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
)
# Statistics of the student alone: a rule that reads no others projects the teacher on kept tokens only.
STUDENT_STATISTICS = frozenset({"entropy", "student_logprob"})
# What a rule's parameters may be called: a statistic, normalized, or one of
INPUTS = (
    *STATISTICS,
    "high_entropy",  # bool: entropy at or above quadrants.entropy
    "high_divergence",  # bool: reverse_kl at or above quadrants.divergence
    "noise",  # uniform in [0, 1), from the run's seed and step
    "ones",
)
ENTRY_POINTS = "tip_exp.selector_scores"

Rule = Callable[..., "Tensor"]
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
}
# Rules that are defined for inputs in [0, 1] only.
UNIT_INTERVAL = frozenset({"soft_or", "q3"})
# Rules that decide per token; a budget does not apply to them.
UNBUDGETED = frozenset({"q1", "q2", "q3_quadrant", "q4", "full"})


def required_stats(score: str | Rule) -> frozenset[str]:
    """Names of the statistics that a rule reads. Raises ValueError as `find_rule` does."""
    names = set(rule_inputs(find_rule(score)))
    if names & {"high_entropy", "high_divergence"}:
        names |= {"entropy", "reverse_kl"}
    return frozenset(names & set(STATISTICS))


def rule_inputs(rule: Rule) -> list[str]:
    """The parameters of a rule, in order. Raises ValueError if one is not in INPUTS."""
    names = list(inspect.signature(rule).parameters)
    for name in names:
        if name not in INPUTS:
            close = difflib.get_close_matches(name, INPUTS, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(
                f"the rule {getattr(rule, '__name__', rule)} has the parameter {name}, which is no statistic; "
                f"parameters can be {', '.join(INPUTS)}{hint}"
            )
    return names


@cache
def find_rule(score: str | Rule) -> Rule:
    """The function that `score` names: an entry of SCORES, "module:function", or an entry point; a function is itself.

    "@" and the digest of its code may follow, as `with_code` adds it. Modules are also searched in the working
    directory. Raises ValueError if there is no such function, if its code is not that of the digest, or if a parameter
    is not in INPUTS.
    """
    if callable(score):
        rule_inputs(score)
        return score
    name, _, digest = score.partition("@")
    if name in SCORES:
        return SCORES[name]
    rule = _imported(_import_path(name))
    rule_inputs(rule)
    if digest and digest != (current := _code_digest(name, rule)):
        raise ValueError(
            f"the code of {name} is not that of this run: its digest is {current}, the run's {digest}. Restore it, or "
            f"start a run of another name with selector.score={name}"
        )
    return rule


def with_code(score: str) -> str:
    """A rule outside of this package with the digest of its module's source: "my_module:rule@3f0a96c1d2b4".

    A name in SCORES and a score that has a digest are returned unchanged. Raises ValueError as `find_rule` does.
    """
    return score if score in SCORES or "@" in score else f"{score}@{_code_digest(score, find_rule(score))}"


def _import_path(name: str) -> str:
    """ "module:function" as it is, or that of the entry point `name`."""
    if ":" in name:
        return name
    from importlib.metadata import entry_points

    paths = {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}
    if name in paths:
        return paths[name]
    names = [*SCORES, *paths]
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ValueError(f"should be {', '.join(names)}, or a function as my_module:my_rule{hint}")


def _imported(path: str) -> Rule:
    """The function of "module:function"; the working directory is searched as by `python -m`."""
    module_name, _, function_name = path.partition(":")
    if (folder := os.getcwd()) not in sys.path:
        sys.path.insert(0, folder)
    importlib.invalidate_caches()
    rule: Rule | None
    try:
        rule = getattr(importlib.import_module(module_name), function_name, None)
    except Exception as error:
        absent = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
        reason = f"it is neither in {folder} nor installed" if absent else f"{type(error).__name__}: {error}"
        raise ValueError(f"cannot import the module {module_name} of {path}: {reason}") from error
    if rule is None or not callable(rule):
        raise ValueError(f"the module {module_name} has no function of the name {function_name!r}")
    return rule


def _code_digest(name: str, rule: Rule) -> str:
    """12 hex digits of the SHA-256 of the source of the module that is named, and of the one that defines the rule."""
    modules = dict.fromkeys([_import_path(name).partition(":")[0], getattr(rule, "__module__", "")])
    digest = hashlib.sha256()
    for module in modules:
        try:
            digest.update(inspect.getsource(sys.modules[module]).encode())
        except (OSError, TypeError, KeyError) as error:
            raise ValueError(
                f"the source of {module or rule} cannot be read, so a change of {name} would go unseen"
            ) from error
    return digest.hexdigest()[:12]
