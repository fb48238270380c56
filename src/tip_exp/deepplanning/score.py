"""Scores of plans and of sets of plans: the paper's fraction of constraints, the official 0/1 scores, Avg@k, Best@k."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tip_exp.deepplanning.commonsense import (
    DIMENSIONS,
    MalformedPlan,
    check_commonsense,
    commonsense_score,
)
from tip_exp.deepplanning.constraints import BUDGET, check_constraints
from tip_exp.deepplanning.itinerary import Plan
from tip_exp.deepplanning.world import World


@dataclass(frozen=True, slots=True)
class PlanScore:
    """One plan against its task's personalized constraints.

    PlanScore(constraints={"train_seat_status": True, "hotel_highest_rated": False, "budget_constraint": True})
        -> passed 2, total 3, fraction 0.667, personalized_score 0.0, fraction_without_budget 0.5
    """

    constraints: dict[str, bool]

    @property
    def passed(self) -> int:
        return sum(self.constraints.values())

    @property
    def total(self) -> int:
        return len(self.constraints)

    @property
    def fraction(self) -> float:
        """Share of constraints kept, in [0, 1]. # TIP §7.5; 0 for a task without constraints"""
        return self.passed / self.total if self.total else 0.0

    @property
    def personalized_score(self) -> float:
        """The official score: 1.0 if every constraint is kept, else 0.0."""
        return float(self.total > 0 and self.passed == self.total)

    @property
    def fraction_without_budget(self) -> float:
        """The fraction over the other constraints, since a plan that names no costs keeps any budget."""
        kept = [verdict for key, verdict in self.constraints.items() if key != BUDGET]
        return sum(kept) / len(kept) if kept else 0.0


@dataclass(frozen=True, slots=True)
class FullScore:
    """One plan against its task's constraints and, with the task's tables, against common sense."""

    personalized: PlanScore
    commonsense: dict[str, bool]
    malformed: bool = False  # not in the official layout: officially such a task counts 0 as a whole

    @property
    def commonsense_score(self) -> float:
        return commonsense_score(self.commonsense)

    @property
    def composite_score(self) -> float:
        return 0.0 if self.malformed else (self.commonsense_score + self.personalized.personalized_score) / 2

    @property
    def case_acc(self) -> float:
        """1.0 if common sense and all constraints are met in full, else 0.0."""
        return float(self.composite_score == 1.0)


def score_plan(plan: Plan | None, meta: dict[str, Any]) -> PlanScore:
    """Score one plan in the official JSON layout; None, an undelivered plan, keeps nothing. Needs no tables."""
    return PlanScore(check_constraints(plan, meta))


def score_in_world(plan: Plan | None, meta: dict[str, Any], world: World) -> FullScore:
    """Score one plan with its task's tables, as the official evaluator does."""
    personalized = score_plan(plan, meta)
    try:
        return FullScore(personalized, check_commonsense(plan, meta, world))
    except MalformedPlan:
        nothing = {check: False for dimension in DIMENSIONS.values() for check in dimension}
        return FullScore(personalized, nothing, malformed=True)


def best_at_k(scores: Sequence[Sequence[float]]) -> float:
    """Mean over tasks of the best of the k samples."""
    return _mean([max(samples) for samples in scores])


def best_at_k_bootstrap(scores: Sequence[Sequence[float]]) -> float:
    """Mean over tasks of the expected best of k draws with replacement from the task's k samples.

    This is what verl reports as best@k/mean, there from 1,000 random draws, here exactly. Sorted upwards, the i-th of
    k samples is the best of the draws with probability (i/k)^k - ((i-1)/k)^k. It lies below best_at_k, as a given
    sample is drawn at all with probability 1 - (1 - 1/k)^k only, 64 % for k = 16.
    """

    def expected(samples: Sequence[float]) -> float:
        k = len(samples)
        chances = (((i + 1) / k) ** k - (i / k) ** k for i in range(k))
        return sum(value * chance for value, chance in zip(sorted(samples), chances, strict=True))

    return _mean([expected(samples) for samples in scores])


def _mean(values: Sequence[float]) -> float:
    if not values:
        raise ValueError("a mean needs at least one score; got none")
    return sum(values) / len(values)
