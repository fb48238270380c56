"""Finds a score rule by its name, and what it reads, from its signature.

A rule need not be in this package: "my_module:rule" names a function by its module, and an installed package can name
one in the entry-point group `tip_exp.selector_scores` (docs/library.md). This module does not import torch.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection
from functools import cache
from typing import Any

from tip_exp.selector.imports import import_function, source_digest
from tip_exp.selector.scores import INPUTS, SCORES, STATISTICS, Rule

ENTRY_POINTS = "tip_exp.selector_scores"


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
    module, dot, function = name.removesuffix(".py").rpartition(".")
    close = [f"{module}:{function}"] if dot else close
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
