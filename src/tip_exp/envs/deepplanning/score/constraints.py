"""Personalized hard constraints: does the plan contain the names that the task's data gives as the answer?

A constraint key is GROUP_KIND ("hotel_cheapest_brand") or the budget. The kind only says how the answer was chosen when
the task was made; a plan is checked by group alone, by exact names anywhere in it. Same verdicts as the official
`eval_hard`.
"""

from __future__ import annotations

from typing import Any

from tip_exp.envs.deepplanning.data import BUDGET
from tip_exp.envs.deepplanning.plan.schema import MALFORMED, Kind, Plan, total_cost

_KINDS = {
    "flight": Kind.INTERCITY,
    "train": Kind.INTERCITY,
    "hotel": Kind.HOTEL,
    "restaurant": Kind.MEAL,
    "attraction": Kind.ATTRACTION,
}
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
        group, underscore, _ = key.partition("_")
        if key != BUDGET and not (underscore and group in _KINDS):
            continue
        try:
            if key == BUDGET:
                verdicts[key] = _within_budget(plan or {}, constraint, meta)
            else:
                verdicts[key] = _contains(plan or {}, constraint, group)
        except MALFORMED:
            verdicts[key] = False
    return verdicts


def _within_budget(plan: Plan, constraint: dict[str, Any], meta: dict[str, Any]) -> bool:
    limit = float(constraint["max_budget"])
    days = plan.get("daily_plans", [])
    return bool(days) and total_cost(days, meta) <= limit


def _contains(plan: Plan, constraint: dict[str, Any], group: str) -> bool:
    """Whether the plan has all numbers or names of the constraint. Without any, only a flight or train is satisfied.

    A hotel counts as the accommodation of a day, not in an activity. Null activities or details raise.
    """
    days = plan.get("daily_plans", [])
    if group == "hotel":
        entries = [stay for day in days if (stay := day.get("accommodation"))]
    else:
        acts = [act for day in days for act in day.get("activities", [])]
        entries = [act.get("details", {}) for act in acts if act.get("type") == _KINDS[group]]
    if group in _MODES:
        numbers = {leg.get("number", "") for leg in entries if leg.get("mode", "").lower() in _MODES[group]}
        fields = (f"outbound_{group}_no", f"inbound_{group}_no")
        return all(constraint[field] in numbers for field in fields if field in constraint)
    names = {entry.get("name", "") for entry in entries}
    if group == "attraction":
        required = constraint.get("attraction_names")
        return bool(required) and all(name in names for name in required)
    required = constraint.get(f"{group}_name")
    return bool(required) and required in names
