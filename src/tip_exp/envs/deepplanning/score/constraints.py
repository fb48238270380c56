"""Personalized hard constraints: does the plan contain the names that the task's data gives as the answer?

A constraint key is GROUP_KIND ("hotel_cheapest_brand") or the budget. The kind only says how the answer was chosen when
the task was made; a plan is checked by group alone, by exact names anywhere in it. Same verdicts as the official
`eval_hard`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tip_exp.envs.deepplanning.data import BUDGET
from tip_exp.envs.deepplanning.plan.schema import ATTRACTION, INTERCITY, MALFORMED, MEAL, Party, Plan, total_cost

_MODES = {
    "flight": frozenset(("flight", "飞机", "airplane", "plane")),
    "train": frozenset(("train", "火车", "railway", "高铁", "gaotie")),
}


def answers(constraint: dict[str, Any]) -> tuple[str, ...]:
    """Names and numbers that a plan must contain; empty for the budget."""
    fields = [f"{direction}_{mode}_no" for mode in _MODES for direction in ("outbound", "inbound")]
    single = [constraint[field] for field in (*fields, "hotel_name", "restaurant_name") if constraint.get(field)]
    return (*single, *(constraint.get("attraction_names") or ()))


def check_constraints(plan: Plan | None, meta: dict[str, Any]) -> dict[str, bool]:
    """Constraint -> satisfied, in the order of the task. No plan (None) satisfies none.

    Keys of an unknown group are left out, as officially. A check that fails on a malformed plan is not satisfied.
    """
    verdicts: dict[str, bool] = {}
    for key, constraint in (meta.get("hard_constraints") or {}).items():
        check = _within_budget if key == BUDGET else _CHECKS.get(key.split("_", 1)[0]) if "_" in key else None
        if check is None:
            continue
        try:
            verdicts[key] = check(plan or {}, constraint, meta)
        except MALFORMED:
            verdicts[key] = False
    return verdicts


def _travels_by(mode: str) -> Callable[[Plan, dict[str, Any], dict[str, Any]], bool]:
    """A check that the plan uses every flight or train number of the constraint; with no number it passes."""

    def check(plan: Plan, constraint: dict[str, Any], _: dict[str, Any]) -> bool:
        legs = [leg for leg in _details_of(plan, INTERCITY) if leg.get("mode", "").lower() in _MODES[mode]]
        numbers = {leg.get("number", "") for leg in legs}
        fields = (f"outbound_{mode}_no", f"inbound_{mode}_no")
        return all(constraint[field] in numbers for field in fields if field in constraint)

    return check


def _has_hotel(plan: Plan, constraint: dict[str, Any], _: dict[str, Any]) -> bool:
    """Only the accommodation of a day counts, not activities at a hotel."""
    stays = [day.get("accommodation") for day in plan.get("daily_plans", [])]
    names = {stay.get("name", "") for stay in stays if stay}
    return bool(constraint.get("hotel_name")) and constraint["hotel_name"] in names


def _has_restaurant(plan: Plan, constraint: dict[str, Any], _: dict[str, Any]) -> bool:
    names = {meal.get("name", "") for meal in _details_of(plan, MEAL)}
    return bool(constraint.get("restaurant_name")) and constraint["restaurant_name"] in names


def _has_attractions(plan: Plan, constraint: dict[str, Any], _: dict[str, Any]) -> bool:
    names = {visit.get("name", "") for visit in _details_of(plan, ATTRACTION)}
    required = constraint.get("attraction_names", [])
    return bool(required) and all(name in names for name in required)


def _within_budget(plan: Plan, constraint: dict[str, Any], meta: dict[str, Any]) -> bool:
    limit = float(constraint["max_budget"])
    days = plan.get("daily_plans", [])
    return bool(days) and total_cost(days, Party.of(meta)) <= limit


def _details_of(plan: Plan, kind: str) -> list[dict[str, Any]]:
    """Details of all activities of one type. Unlike in Trip.activities, null activities or details raise."""
    return [
        activity.get("details", {})
        for day in plan.get("daily_plans", [])
        for activity in day.get("activities", [])
        if activity.get("type") == kind
    ]


_CHECKS = {
    "flight": _travels_by("flight"),
    "train": _travels_by("train"),
    "hotel": _has_hotel,
    "restaurant": _has_restaurant,
    "attraction": _has_attractions,
}
