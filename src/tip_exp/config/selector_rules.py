"""Rules on a selector's settings that involve several keys; `tip_exp.select` checks its arguments by them as well."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tip_exp.selector.lookup import find_rule, parameter_errors, rule_inputs
from tip_exp.selector.scores import (
    FALLING,
    NORMALIZED,
    SCORES,
    SIGNED,
    UNBUDGETED,
    UNIT_INTERVAL,
    UNNORMALIZED,
)

GROUPS = ("rollout", "micro_batch", "batch")  # each consists of those before it


def selector_rules(selector: Any) -> Iterator[str]:
    """One message for each rule that a SelectorConfig, or a Selector, breaks."""
    order, normalizer = selector.order, selector.normalizer
    score = str(getattr(selector.score, "__name__", selector.score)).partition("@")[0]
    try:
        inputs = rule_inputs(find_rule(selector.score))
    except ValueError as error:
        yield f"selector.score: {error}"
        return
    read = set(inputs) & set(NORMALIZED)
    normalizers = {selector.normalizer_of.get(name, normalizer) for name in read}
    yield from parameter_errors(find_rule(selector.score), selector.parameters)
    if score not in SCORES and getattr(selector, "label", None) in SCORES:
        yield (
            f"selector.label={selector.label} would name the runs of selector.score={score} after a rule of this "
            f"package; choose selector=rule selector.score={score}, or another selector.label"
        )
    budgeted = score not in UNBUDGETED if score in SCORES else order != "positive"
    if not budgeted and selector.retention != 1.0:
        marks = "of its quadrant" if score in SCORES else "whose score is positive, by selector.order=positive"
        what = "trains on every response token" if score == "full" else f"keeps every token {marks}"
        yield (
            f"selector.score={score} {what}, but selector.retention is {selector.retention}, not 1; "
            "for a baseline of the same budget choose selector=random"
        )
    if not budgeted and order != "positive":
        yield f"selector.score={score} is 0 or 1: selector.order must be positive, not {order}"
    if budgeted and order == "positive":
        yield (
            "selector.order=positive keeps every positive score, so it needs a score that is 0 or 1 "
            f"({', '.join(sorted(UNBUDGETED))}), not {score}; choose top, bottom or sample"
        )
    if selector.weight_offset is not None and selector.weight not in FALLING:
        yield (
            f"selector.weight_offset={selector.weight_offset} has no effect: selector.weight={selector.weight} has no "
            f"offset; {' and '.join(FALLING)} have"
        )
    if selector.weight == "score" and (order != "top" or score == "random" or not budgeted):
        yield (
            "selector.weight=score needs selector.order=top and a ranked score; got "
            f"selector.score={score}, selector.order={order}"
        )
    keys = "selector.normalizer" + " and selector.normalizer_of" * bool(selector.normalizer_of)
    if score in UNIT_INTERVAL and "none" in normalizers:
        yield f"selector.score={score} needs statistics in [0, 1]: {keys} must not be none"
    if score in UNNORMALIZED and normalizers - {"none"}:
        given = ", ".join(sorted(normalizers - {"none"}))
        yield f"selector.score={score} reads values in nats: {keys} must be none, not {given}"
    for statistic in sorted(set(selector.clip) - read):
        yield (
            f"selector.clip.{statistic} has no effect: selector.score={score} does not read {statistic}; "
            f"remove it with ~selector.clip.{statistic}"
        )
    for statistic in sorted(set(selector.normalizer_of) - read):
        yield f"selector.normalizer_of.{statistic} has no effect: selector.score={score} does not read {statistic}"
    if order == "sample" and score in SIGNED and "none" in normalizers:
        yield (
            f"selector.order=sample draws in proportion to the score, but selector.score={score} has negative values; "
            "choose a selector.normalizer, or another selector.order"
        )
    if order == "sample" and "rank" in normalizers:
        yield (
            f"selector.order=sample draws in proportion to the score, but rank, of {keys}, replaces a "
            "statistic by its rank; choose none"
        )
    scope, group = selector.scope, selector.normalize_over
    if GROUPS.index(group) < GROUPS.index(scope) and normalizers - {"none"}:
        yield (
            f"selector.scope={scope} compares scores of a whole {scope}, but selector.normalize_over={group} scales "
            f"each {group} separately; choose selector.normalize_over={scope}"
        )
