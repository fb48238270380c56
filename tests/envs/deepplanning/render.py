"""Writes a plan in the official JSON layout as text; parse_plan reads it back to an equal plan."""

from __future__ import annotations

from tip_exp.envs.deepplanning.plan.parse import BUDGET_LABELS
from tip_exp.envs.deepplanning.plan.schema import Activity, Kind, Plan, details


def render_plan(plan: Plan, lang: str = "en") -> str:
    """The plan as a model is asked to write it, with tags."""
    comma, sign, unit = (", ", "¥", "RMB") if lang == "en" else ("，", "￥", "元")
    person, night = ("/person", "/room/night") if lang == "en" else ("/人", "/间/晚")

    def fields(*parts: str, cost: float | None = None, per: str = "") -> str:
        return comma.join([part for part in parts if part] + ([] if cost is None else [f"{sign}{cost}{per}"]))

    def line(act: Activity) -> str:
        it = details(act)
        way = f"{it.get('from')} - {it.get('to')}"
        bodies = {
            Kind.INTERCITY: lambda: fields(f"{it['mode']} {it['number']}", way, cost=it["cost"], per=person),
            Kind.CITY_RIDE: lambda: fields(way, it["distance"], it["duration"], cost=it["cost"]),
            Kind.ATTRACTION: lambda: fields(it["name"], cost=it["cost"], per=person),
            Kind.MEAL: lambda: fields(it["meal_type"], it["name"], cost=it["cost"], per=person),
            Kind.HOTEL: lambda: fields(it["activity"], it["name"]),
            Kind.BUFFER: lambda: it["description"],
        }
        return f"{act['time_slot']} | {act['type']} | {bodies[act['type']]()}"

    lines = ["<plan>"]
    for day in plan["daily_plans"]:
        stay = day.get("accommodation")
        hotel = fields(stay["name"], cost=stay["price_per_night"], per=night) if stay else "-"
        lines += [f"Day {day['day_number']}:", f"Current City: {day['current_city']}", f"Accommodation: {hotel}"]
        lines += [*map(line, day["activities"]), ""]
    if budget := plan.get("budget_summary"):
        lines.append("**Budget Summary**:")
        for key, labels in BUDGET_LABELS.items():
            if key in budget:
                lines.append(f"   **{labels[0].title()}: {budget[key]} {unit}**")
    return "\n".join([*lines, "</plan>"])
