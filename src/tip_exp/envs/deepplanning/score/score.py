"""Score of one plan: the paper's fraction of satisfied constraints and the official 0/1 scores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tip_exp.envs.deepplanning.data import BUDGET
from tip_exp.envs.deepplanning.plan.schema import MALFORMED, Plan
from tip_exp.envs.deepplanning.score.commonsense import CHECKS, check_commonsense, commonsense_score
from tip_exp.envs.deepplanning.score.constraints import check_constraints
from tip_exp.envs.deepplanning.score.tables import TaskTables


@dataclass(frozen=True, slots=True)
class PlanScore:
    """One plan against its task's personalized constraints and, with the task's tables, the commonsense checks.

    PlanScore(constraints={"train_seat_status": True, "hotel_highest_rated": False, "budget_constraint": True})
        -> passed 2, total 3, fraction 0.667, personalized_score 0.0, fraction_without_budget 0.5
    """

    constraints: dict[str, bool]
    commonsense: dict[str, bool] = field(default_factory=dict)
    malformed: bool = False  # not in the official layout; officially the whole task scores 0

    @property
    def passed(self) -> int:
        return sum(self.constraints.values())

    @property
    def total(self) -> int:
        return len(self.constraints)

    @property
    def fraction(self) -> float:
        """Fraction of satisfied constraints, in [0, 1] (TIP §7.5); 0 for a task without constraints."""
        return self.passed / self.total if self.total else 0.0

    @property
    def personalized_score(self) -> float:
        """The official score: 1.0 if every constraint is satisfied, else 0.0."""
        return float(self.total > 0 and self.passed == self.total)

    @property
    def fraction_without_budget(self) -> float:
        """The fraction without the budget, which a plan that names no costs always satisfies."""
        return PlanScore({key: verdict for key, verdict in self.constraints.items() if key != BUDGET}).fraction

    @property
    def commonsense_score(self) -> float:
        return commonsense_score(self.commonsense)

    @property
    def composite_score(self) -> float:
        return 0.0 if self.malformed else (self.commonsense_score + self.personalized_score) / 2

    @property
    def case_acc(self) -> float:
        """1.0 if all checks and constraints pass, else 0.0."""
        return float(self.composite_score == 1.0)


def score_plan(plan: Plan | None, meta: dict[str, Any], tables: TaskTables | None = None) -> PlanScore:
    """Scores a plan in the official JSON layout; None, an undelivered plan, satisfies nothing."""
    constraints = check_constraints(plan, meta)
    if tables is None:
        return PlanScore(constraints)
    try:
        return PlanScore(constraints, check_commonsense(plan, meta, tables))
    except MALFORMED:
        return PlanScore(constraints, dict.fromkeys(CHECKS, False), malformed=True)
