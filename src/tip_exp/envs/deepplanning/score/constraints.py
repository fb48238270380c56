"""Personalized hard constraints: does the plan name what the task's data says is the answer?

There are 38 kinds in the official data, five groups and the budget. Within a group the kind changes only how the
answer was found when the task was made (cheapest, highest rated, …), never how a plan is checked: by exact names,
wherever in the plan they stand. Same verdicts as the official `eval_hard`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tip_exp.envs.deepplanning.plan.schema import ATTRACTION, INTERCITY, MALFORMED, MEAL, Party, Plan, total_cost

BUDGET = "budget_constraint"
KINDS = {
    "flight": (
        "seat_class",
        "seat_status",
        "cheapest_direct",
        "cheapest_airline_direct",
        "cheapest_manufacturer_direct",
        "earliest_departure_direct",
        "earliest_airline_direct",
        "shortest_duration_direct",
        "departure_time_range",
        "arrival_time_range",
    ),
    "train": (
        "seat_class",
        "seat_status",
        "cheapest_direct",
        "cheapest_train_type",
        "earliest_departure_direct",
        "latest_arrival_direct",
        "shortest_duration_direct",
        "departure_time_range",
    ),
    "hotel": (
        "cheapest_brand",
        "cheapest_star",
        "highest_rated",
        "brand_highest_rated",
        "star_highest_rated",
        "newest_decoration",
        "price_range",
        "star_service_required",
    ),
    "restaurant": (
        "cheapest_nearby_attraction",
        "closest_to_attraction",
        "highest_rated",
        "must_eat_named",
        "specific_cuisine_nearby",
        "specific_tag_nearby",
    ),
    "attraction": (
        "must_visit_named",
        "all_of_type",
        "all_free_attractions",
        "top_rated_must_visit",
        "type_highest_rated",
    ),
}
CONSTRAINTS = (*(f"{group}_{kind}" for group, kinds in KINDS.items() for kind in kinds), BUDGET)

_MODES = {
    "flight": frozenset(("flight", "飞机", "airplane", "plane")),
    "train": frozenset(("train", "火车", "railway", "高铁", "gaotie")),
}


def answers(constraint: dict[str, Any]) -> tuple[str, ...]:
    """Names and numbers a plan has to contain; empty for the budget."""
    fields = [f"{way}_{mode}_no" for mode in _MODES for way in ("outbound", "inbound")]
    single = [constraint[field] for field in (*fields, "hotel_name", "restaurant_name") if constraint.get(field)]
    return (*single, *(constraint.get("attraction_names") or ()))


def check_constraints(plan: Plan | None, meta: dict[str, Any]) -> dict[str, bool]:
    """Constraint -> kept, in the order of the task. No plan (None) keeps none.

    Keys of an unknown group are left out, as officially; a check that trips over a malformed plan is not kept.
    """
    verdicts: dict[str, bool] = {}
    for key, constraint in (meta.get("hard_constraints") or {}).items():
        check = _keeps_budget if key == BUDGET else _CHECKS.get(key.split("_", 1)[0]) if "_" in key else None
        if check is None:
            continue
        try:
            verdicts[key] = check(plan or {}, constraint, meta)
        except MALFORMED:
            verdicts[key] = False
    return verdicts


def _takes(mode: str) -> Callable[[Plan, dict[str, Any], dict[str, Any]], bool]:
    """Every way the constraint names is travelled by the named number; with no way named nothing can be broken."""

    def check(plan: Plan, constraint: dict[str, Any], _: dict[str, Any]) -> bool:
        legs = [leg for leg in _details_of(plan, INTERCITY) if leg.get("mode", "").lower() in _MODES[mode]]
        numbers = {leg.get("number", "") for leg in legs}
        fields = (f"outbound_{mode}_no", f"inbound_{mode}_no")
        return all(constraint[field] in numbers for field in fields if field in constraint)

    return check


def _sleeps(plan: Plan, constraint: dict[str, Any], _: dict[str, Any]) -> bool:
    """Only the day's accommodation line counts, not activities at a hotel."""
    stays = [day.get("accommodation") for day in plan.get("daily_plans", [])]
    names = {stay.get("name", "") for stay in stays if stay}
    return bool(constraint.get("hotel_name")) and constraint["hotel_name"] in names


def _eats(plan: Plan, constraint: dict[str, Any], _: dict[str, Any]) -> bool:
    names = {meal.get("name", "") for meal in _details_of(plan, MEAL)}
    return bool(constraint.get("restaurant_name")) and constraint["restaurant_name"] in names


def _visits(plan: Plan, constraint: dict[str, Any], _: dict[str, Any]) -> bool:
    names = {visit.get("name", "") for visit in _details_of(plan, ATTRACTION)}
    wanted = constraint.get("attraction_names", [])
    return bool(wanted) and all(name in names for name in wanted)


def _keeps_budget(plan: Plan, constraint: dict[str, Any], meta: dict[str, Any]) -> bool:
    limit = float(constraint["max_budget"])
    days = plan.get("daily_plans", [])
    return bool(days) and total_cost(days, Party.of(meta)) <= limit


def _details_of(plan: Plan, kind: str) -> list[dict[str, Any]]:
    """Details of all activities of one type; unlike in itinerary.activities, a null list or null details trips."""
    return [
        activity.get("details", {})
        for day in plan.get("daily_plans", [])
        for activity in day.get("activities", [])
        if activity.get("type") == kind
    ]


_CHECKS = {
    "flight": _takes("flight"),
    "train": _takes("train"),
    "hotel": _sleeps,
    "restaurant": _eats,
    "attraction": _visits,
}
