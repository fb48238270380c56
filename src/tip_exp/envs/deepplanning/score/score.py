"""Score of one plan: the paper's fraction of satisfied constraints and the official scores.

Same verdicts as the official `eval_commonsense` and `eval_hard`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tip_exp.envs.deepplanning.data import BUDGET
from tip_exp.envs.deepplanning.plan.schema import MALFORMED, Plan
from tip_exp.envs.deepplanning.score import journey, records
from tip_exp.envs.deepplanning.score.constraints import check_constraints
from tip_exp.envs.deepplanning.score.tables import TaskTables, Trip

# The commonsense checks; a dimension counts one eighth, and only if all its checks pass.
DIMENSIONS: dict[str, tuple[Callable[[Trip], bool], ...]] = {
    "Route Consistency": (
        journey.valid_trip_duration,
        journey.closed_loop_route_structure,
        journey.seamless_intercity_transfers,
    ),
    "Sandbox Compliance": (
        records.validated_accommodation,
        records.validated_attractions,
        records.validated_meals,
        records.validated_transportation,
    ),
    "Itinerary Structure": (
        journey.traceable_accommodation,
        journey.ends_with_accommodation,
        journey.essential_meal_coverage,
        journey.essential_attraction_coverage,
    ),
    "Time Feasibility": (journey.no_time_overlaps, journey.reasonable_transfer_time),
    "Business Hours": (
        records.attraction_visit_within_opening_hours,
        records.dining_within_service_hours,
        records.avoidance_of_closure_days,
    ),
    "Duration Rationality": (records.reasonable_duration_at_attractions, records.reasonable_meal_duration),
    "Cost Calculation Accuracy": (records.cost_calculation_correctness,),
    "Activity Diversity": (records.diverse_meal_options, records.diverse_attraction_options),
}
CHECKS = {check.__name__: check for dimension in DIMENSIONS.values() for check in dimension}


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
        """Mean of the 8 dimensions, in [0, 1]."""
        return sum(dimension_scores(self.commonsense).values()) / len(DIMENSIONS)

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


def check_commonsense(plan: Plan | None, meta: dict[str, Any], tables: TaskTables) -> dict[str, bool]:
    """Check -> passed, in the order of CHECKS. No plan, or a plan without days, passes none.

    Raises one of MALFORMED if a field of the plan has the wrong type.
    """
    trip = Trip(plan or {}, meta, tables)
    return {name: bool(trip.days) and check(trip) for name, check in CHECKS.items()}


def dimension_scores(checks: dict[str, bool]) -> dict[str, float]:
    """Dimension -> 1.0 if all its checks passed, else 0.0."""
    return {name: float(all(checks[check.__name__] for check in dimension)) for name, dimension in DIMENSIONS.items()}
