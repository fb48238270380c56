"""Finds the plan in what a model wrote, reads it into the official JSON layout, and writes such JSON as text again.

No model is asked to convert: officially one is, and it has been seen to fill in a budget that the plan lacks.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from tip_exp.envs.deepplanning.plan.lines import Number, amount, price, read_details, take_price
from tip_exp.envs.deepplanning.plan.schema import (
    ATTRACTION,
    BUFFER,
    CITY_RIDE,
    HOTEL,
    INTERCITY,
    MEAL,
    TYPES,
    Activity,
    Day,
    Plan,
    details,
)
from tip_exp.envs.deepplanning.score.journey import cities_of

MAX_LINE = 2000  # characters; longer lines are no lines of a plan
BUDGET_LABELS = {
    "transportation": ("transportation", "transport", "交通", "交通费用"),
    "accommodation": ("accommodation", "住宿", "住宿费用"),
    "meals": ("meals", "meal", "餐饮", "餐饮费用"),
    "attractions_and_tickets": (
        "attractions & tickets",
        "attractions and tickets",
        "attractions",
        "tickets",
        "门票",
        "景点",
        "景点门票",
    ),
    "other": ("other", "others", "其他"),
    "total_estimated_budget": (
        *("total estimated budget", "total budget", "total cost", "total"),
        *("总估算预算", "总预算", "总计", "合计", "总费用"),
    ),
}
_TAG = re.compile(r"<(/?)plan>", re.IGNORECASE)
_THINK = re.compile(r"<(/?)think>", re.IGNORECASE)
_BULLETS = "*#>•· \t"
_DAY = re.compile(r"(?:day|第)\s*([0-9]{1,3})\s*[天日]?\s*(?:[*:：(（\-–—,，](.*))?", re.IGNORECASE)
_CITY = re.compile(r"(?:current city|city|当前城市|所在城市|城市)\s*\**\s*[:：](.*)", re.IGNORECASE)
_STAY = re.compile(r"(?:accommodation|住宿)\s*\**\s*[:：](.*)", re.IGNORECASE)
_BUDGET = re.compile("budget summary|cost summary|预算总结|预算汇总|费用汇总", re.IGNORECASE)
_LABELLED = re.compile(
    r"([a-z][a-z &]{2,40}|[\u4e00-\u9fff]{2,10})\s*(?:[(（][^)）]*[)）]\s*)?\**\s*[:：|｜](.*)", re.IGNORECASE
)
_TIMES = re.compile(
    r"([0-9]{1,2})[:：]([0-9]{2})\s*(?:[-–—~～至到]|to)\s*(?:次日|next day)?\s*([0-9]{1,2})[:：]([0-9]{2})",
    re.IGNORECASE,
)
_OTHER_TYPES = {  # what models write beside the official names
    **dict.fromkeys(("travel_intercity", "intercity_travel", "跨市公共交通", "跨城交通", "城际交通"), INTERCITY),
    **dict.fromkeys(("city_travel", "travel_intracity", "城市内交通", "市内交通"), CITY_RIDE),
    **dict.fromkeys(("attractions", "景点", "景点游览"), ATTRACTION),
    **dict.fromkeys(("meals", "dining", "用餐", "餐饮"), MEAL),
    **dict.fromkeys(("accommodation", "酒店", "酒店活动"), HOTEL),
    "缓冲": BUFFER,
}
_NO_STAY = frozenset(("", "-", "–", "—", "--", "/", "none", "n/a", "无"))


def extract_plan(text: str, official_join: bool = False) -> str:
    """The text of the plan in a model's answer, "" where it delivers none.

    Thinking does not count, whether it was ended or not; an unclosed <plan> is none; of several plans the last stands.
    With `official_join` as upstream: all plans one below the other, and a plan in thinking that was never ended.
    """
    ends = [match for match in _THINK.finditer(text) if match[1]]
    text = text[ends[-1].end() :] if ends else text
    if not official_join and (open_ := _THINK.search(text)):
        text = text[: open_.start()]
    plans: list[str] = []
    start: int | None = None
    for tag in _TAG.finditer(text):
        if not tag[1]:
            start = tag.end() if start is None or not official_join else start
        elif start is not None:
            plans.append(text[start : tag.start()].strip())
            start = None
    plans = [plan for plan in plans if plan]
    return "\n\n".join(plans if official_join else plans[-1:])


def parse_plan(text: str, known_names: Collection[str] = ()) -> Plan | None:
    """A plan's text in the official JSON layout; None where it has not one day.

    `known_names` help to cut routes such as "Jixian Hotel - Restaurant - Old Town", besides the names that the plan
    itself gives elsewhere. What a line lacks is "" or, for costs, None; lines of no known form are passed over.
    """
    lines = [line for line in text.splitlines() if len(line) <= MAX_LINE]
    reader = _Reader(frozenset(known_names) | _names(lines))
    for line in lines:
        reader.read(line)
    return {"budget_summary": reader.budget, "daily_plans": reader.days} if reader.days else None


def render_plan(plan: Plan, lang: str = "en") -> str:
    """The plan as a model should write it, tags included; parse_plan reads it back to an equal plan."""
    comma, sign, unit = (", ", "¥", "RMB") if lang == "en" else ("，", "￥", "元")
    person, night = ("/person", "/room/night") if lang == "en" else ("/人", "/间/晚")

    def fields(*parts: str, cost: Number | None = None, per: str = "") -> str:
        return comma.join([part for part in parts if part] + ([] if cost is None else [f"{sign}{cost}{per}"]))

    def line(act: Activity) -> str:
        it = details(act)
        way = f"{it.get('from')} - {it.get('to')}"
        bodies = {
            INTERCITY: lambda: fields(f"{it['mode']} {it['number']}", way, cost=it["cost"], per=person),
            CITY_RIDE: lambda: fields(way, it["distance"], it["duration"], cost=it["cost"]),
            ATTRACTION: lambda: fields(it["name"], cost=it["cost"], per=person),
            MEAL: lambda: fields(it["meal_type"], it["name"], cost=it["cost"], per=person),
            HOTEL: lambda: fields(it["activity"], it["name"]),
            BUFFER: lambda: it["description"],
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


class _Reader:
    """Takes a plan's lines one after the other; days and budget are what it has understood."""

    def __init__(self, known: frozenset[str]) -> None:
        self.known = known
        self.days: list[Day] = []
        self.budget: dict[str, Number] = {}
        self._in_budget = False

    def read(self, line: str) -> None:
        bare = line.strip().lstrip(_BULLETS + "-").rstrip("* \t")
        if activity := _activity(line):
            if self.days:
                self._add(*activity)
        elif (day := _DAY.fullmatch(bare)) and not (self._in_budget and self._counts(day)):
            self.days.append({"day_number": int(day[1]), "current_city": "", "activities": []})
            self._in_budget = False
            self._set_field((day[2] or "").strip())
        elif _BUDGET.search(bare):
            self._in_budget = True
        elif self._in_budget or not (self.days and self._set_field(bare)):
            self._set_budget(bare)

    def _counts(self, day: re.Match[str]) -> bool:
        """Whether "Day 1: 300 RMB", below the budget's heading, is a sum and not a second first day."""
        return any(int(day[1]) == known["day_number"] for known in self.days) and bool((day[2] or "").strip(" *"))

    def _add(self, slot: str, kind: str, text: str) -> None:
        day = self.days[-1]
        way = cities_of(day)
        arrived = any(act["type"] == INTERCITY for act in day["activities"])
        city = day["current_city"] if way is None else way[arrived]
        found = read_details(kind, text, city, self.known)
        day["activities"].append({"time_slot": slot, "type": kind, "details": found})

    def _set_field(self, bare: str) -> bool:
        if match := _CITY.fullmatch(bare):
            self.days[-1]["current_city"] = match[1].strip(" *`")
        elif (match := _STAY.fullmatch(bare)) and price(match[1].strip(" *`")) is None:
            name, cost = take_price(match[1].strip(" *`"))
            self.days[-1].pop("accommodation", None)
            if name.lower() not in _NO_STAY:
                self.days[-1]["accommodation"] = {"name": name, "price_per_night": cost}
        else:
            return False
        return True

    def _set_budget(self, bare: str) -> None:
        """Below its heading any sum counts; elsewhere only a line that is nothing but a label and a price."""
        match = _LABELLED.fullmatch(bare.strip("|｜ "))
        if not match:
            return
        label, text = match[1].strip().lower(), match[2].strip(" *`|｜")
        key = next((key for key, labels in BUDGET_LABELS.items() if label in labels), None)
        stated = amount(text) if self._in_budget else price(text)
        if key is not None and stated is not None and key not in self.budget:
            self.budget[key] = stated


def _activity(line: str) -> tuple[str, str, str] | None:
    """Time slot, type and the rest of "09:00-10:30 | attraction | Laomendong, ¥0", also as a row of a table."""
    parts = [part.strip() for part in re.split("[|｜]", line.strip().strip("|｜"), maxsplit=2)]
    times = _TIMES.search(parts[0][:60])
    if not times or len(parts) < 2:
        return None
    kind = parts[1].strip("*`[] ").lower().replace(" ", "_").replace("-", "_")
    kind = _OTHER_TYPES.get(kind, kind)
    if kind not in TYPES:
        return None
    slot = f"{times[1]}:{times[2]}-{times[3]}:{times[4]}"
    return slot, kind, parts[2].rstrip("* ") if len(parts) > 2 else ""


def _names(lines: list[str]) -> frozenset[str]:
    """Names of the places that the plan gives by themselves, to cut its routes with."""
    names: set[str] = set()
    for line in lines:
        if (activity := _activity(line)) and activity[1] in (ATTRACTION, MEAL, HOTEL):
            found: dict[str, Any] = read_details(activity[1], activity[2], "", ())
            names.add(found["name"])
        elif match := _STAY.fullmatch(line.strip().lstrip(_BULLETS + "-").rstrip("* \t")):
            names.add(take_price(match[1].strip(" *`"))[0])
    return frozenset(names - {""})
