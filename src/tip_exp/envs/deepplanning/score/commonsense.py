"""Commonsense score: 21 checks in 8 dimensions of one eighth each; a dimension counts only if all its checks pass.

Same verdicts as the official `eval_commonsense`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tip_exp.envs.deepplanning.plan.schema import Plan
from tip_exp.envs.deepplanning.score import journey, records
from tip_exp.envs.deepplanning.score.tables import TaskTables, Trip

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


def check_commonsense(plan: Plan | None, meta: dict[str, Any], tables: TaskTables) -> dict[str, bool]:
    """Check -> passed, in the order of CHECKS. No plan, or a plan without days, passes none.

    Raises one of MALFORMED if a field of the plan has the wrong type.
    """
    trip = Trip(plan or {}, meta, tables)
    return {name: bool(trip.days) and check(trip) for name, check in CHECKS.items()}


def dimension_scores(checks: dict[str, bool]) -> dict[str, float]:
    """Dimension -> 1.0 if all its checks passed, else 0.0."""
    return {name: float(all(checks[check.__name__] for check in dimension)) for name, dimension in DIMENSIONS.items()}


def commonsense_score(checks: dict[str, bool]) -> float:
    """Mean of the 8 dimensions, in [0, 1]."""
    return sum(dimension_scores(checks).values()) / len(DIMENSIONS)
