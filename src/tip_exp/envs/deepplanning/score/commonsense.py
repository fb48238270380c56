"""Commonsense score: 21 checks in 8 dimensions of one eighth each; a dimension counts only if all its checks pass.

Same verdicts as the official `eval_commonsense`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tip_exp.envs.deepplanning.plan.schema import MALFORMED, Plan
from tip_exp.envs.deepplanning.score import journey, records
from tip_exp.envs.deepplanning.score.tables import Trip, World

DIMENSIONS: dict[str, dict[str, Callable[[Trip], bool]]] = {
    "Route Consistency": {
        "valid_trip_duration": journey.lasts_as_asked,
        "closed_loop_route_structure": journey.closes_the_loop,
        "seamless_intercity_transfers": journey.changes_city_by_a_leg,
    },
    "Sandbox Compliance": {
        "validated_accommodation": records.hotels_on_record,
        "validated_attractions": records.attractions_on_record,
        "validated_meals": records.meals_on_record,
        "validated_transportation": records.legs_on_record,
    },
    "Itinerary Structure": {
        "traceable_accommodation": journey.nights_are_traceable,
        "ends_with_accommodation": journey.days_end_at_a_hotel,
        "essential_meal_coverage": journey.meals_suffice,
        "essential_attraction_coverage": journey.attractions_suffice,
    },
    "Time Feasibility": {
        "no_time_overlaps": journey.nothing_overlaps,
        "reasonable_transfer_time": journey.gaps_fit_the_roads,
    },
    "Business Hours": {
        "attraction_visit_within_opening_hours": records.visits_while_open,
        "dining_within_service_hours": records.meals_while_open,
        "avoidance_of_closure_days": records.visits_on_open_days,
    },
    "Duration Rationality": {
        "reasonable_duration_at_attractions": records.visits_last_as_advised,
        "reasonable_meal_duration": records.meals_last_as_usual,
    },
    "Cost Calculation Accuracy": {"cost_calculation_correctness": records.total_is_right},
    "Activity Diversity": {
        "diverse_meal_options": records.no_meal_twice,
        "diverse_attraction_options": records.no_attraction_twice,
    },
}


class MalformedPlan(ValueError):
    """A plan whose JSON is not in the official layout; over such a one the official evaluator stops, too."""


def check_commonsense(plan: Plan | None, meta: dict[str, Any], world: World) -> dict[str, bool]:
    """Check -> passed, in the order of DIMENSIONS. No plan, or one without days, passes none.

    Raises MalformedPlan where a part of the plan is wrongly typed; officially such a task counts 0 as a whole.
    """
    checks = {name: check for dimension in DIMENSIONS.values() for name, check in dimension.items()}
    try:
        trip = Trip(plan or {}, meta, world)
        return {name: bool(trip.days) and check(trip) for name, check in checks.items()}
    except MALFORMED as error:
        raise MalformedPlan(f"the plan is not in the official layout: {type(error).__name__}: {error}") from error


def dimension_scores(checks: dict[str, bool]) -> dict[str, float]:
    """Dimension -> 1.0 if all its checks passed, else 0.0."""
    return {name: float(all(checks[check] for check in dimension)) for name, dimension in DIMENSIONS.items()}


def commonsense_score(checks: dict[str, bool]) -> float:
    """Mean of the 8 dimensions, in [0, 1]."""
    return sum(dimension_scores(checks).values()) / len(DIMENSIONS)
