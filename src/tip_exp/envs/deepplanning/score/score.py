"""Scores of plans and of sets of plans: the paper's fraction of constraints, the official 0/1 scores, Avg@k, Best@k."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tip_exp.envs.deepplanning.plan.schema import Plan
from tip_exp.envs.deepplanning.score.commonsense import DIMENSIONS, MalformedPlan, check_commonsense, commonsense_score
from tip_exp.envs.deepplanning.score.constraints import BUDGET, check_constraints
from tip_exp.envs.deepplanning.score.tables import World


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
