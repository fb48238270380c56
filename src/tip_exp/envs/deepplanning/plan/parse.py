"""Extracts the plan from a model's answer and parses it into the official JSON layout.

Rules parse the text. The official benchmark uses a model, which may add a budget that the plan does not state.
"""

from __future__ import annotations

import re

from tip_exp.envs.deepplanning.plan.lines import amount, price, read_details, take_price
from tip_exp.envs.deepplanning.plan.schema import Day, Kind, Plan, cities_of

MAX_LINE = 2000  # characters; longer lines are skipped
BUDGET_LABELS = {
    "transportation": ("transportation", "transport", "交通", "交通费用"),
    "accommodation": ("accommodation", "住宿", "住宿费用"),
    "meals": ("meals", "meal", "餐饮", "餐饮费用"),
    "attractions_and_tickets": (
        *("attractions & tickets", "attractions and tickets", "attractions", "tickets"),
        *("门票", "景点", "景点门票"),
    ),
    "other": ("other", "others", "其他"),
    "total_estimated_budget": (
        *("total estimated budget", "total budget", "total cost", "total"),
        *("总估算预算", "总预算", "总计", "合计", "总费用"),
    ),
}
_TAG = re.compile(r"<(/?)plan>", re.IGNORECASE)
_THINK = re.compile(r"<(/?)think>", re.IGNORECASE)
_DAY_WORDS = {word: number for number, word in enumerate(["one", "two", "three", "four", "five", "six", "seven"], 1)}
_DAY_WORDS |= {word: number for number, word in enumerate("一二三四五六七", 1)}
_DAY = re.compile(
    rf"(?:day|第)\s*([0-9]{{1,3}}|{'|'.join(_DAY_WORDS)})\s*[天日]?\s*(?:(?:[*:：(（\-–—,，]|[|｜](?!.*[|｜]))(.*))?",
    re.IGNORECASE,
)
_CITY = re.compile(r"(?:current city|city|当前城市|所在城市|城市)\s*\**\s*[:：](.*)", re.IGNORECASE)
_FROM_TO = re.compile("从(.+?)[到至](.+)")
_STAY = re.compile(r"(?:accommodation|住宿)\s*\**\s*[:：](.*)", re.IGNORECASE)
_BUDGET = re.compile("budget summary|cost summary|预算总结|预算汇总|费用汇总", re.IGNORECASE)
_LABELLED = re.compile(
    r"([a-z][a-z &]{2,40}|[\u4e00-\u9fff]{2,10})\s*(?:[(（][^)）]*[)）]\s*)?\**\s*[:：|｜](.*)", re.IGNORECASE
)
_TIMES = re.compile(
    r"([0-9]{1,2})[:：]([0-9]{2})\s*(?:[-–—~～至到]|to)\s*(?:次日|next day)?\s*([0-9]{1,2})[:：]([0-9]{2})",
    re.IGNORECASE,
)
_TYPE_SYNONYMS = {  # as models write them
    **dict.fromkeys(("travel_intercity", "intercity_travel", "跨市公共交通", "跨城交通", "城际交通"), Kind.INTERCITY),
    **dict.fromkeys(("city_travel", "travel_intracity", "城市内交通", "市内交通"), Kind.CITY_RIDE),
    **dict.fromkeys(("attractions", "景点", "景点游览"), Kind.ATTRACTION),
    **dict.fromkeys(("meals", "dining", "用餐", "餐饮"), Kind.MEAL),
    **dict.fromkeys(("accommodation", "酒店", "酒店活动"), Kind.HOTEL),
    "缓冲": Kind.BUFFER,
}
_NO_STAY = frozenset(("", "-", "–", "—", "--", "/", "none", "n/a", "无"))


def extract_plan(text: str, official_join: bool = False) -> str:
    """The text of the plan in a model's answer; "" if there is none.

    Thinking is skipped, closed or not. An unclosed <plan> is no plan. The last of several plans counts.
    With `official_join` all plans are joined, and plans inside unclosed thinking count. Upstream does so with the last
    turn alone; `text` may hold all turns, as in the base code.
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


def parse_plan(text: str) -> Plan | None:
    """A plan's text in the official JSON layout; None if it has no day.

    A missing field is "", a missing cost None; lines that match no pattern are skipped.
    """
    lines = [line.replace("**", "") for line in text.splitlines() if len(line) <= MAX_LINE]
    names = _names(lines)
    days: list[Day] = []
    budget: dict[str, float] = {}
    in_budget = False
    for line in lines:
        bare = _bare(line)
        if activity := _activity(line):
            if days:
                _add_activity(days[-1], *activity, names)
        elif (header := _DAY.fullmatch(bare)) and not (in_budget and _is_amount(header, days)):
            days.append({"day_number": _day_number(header), "current_city": "", "activities": []})
            in_budget = False
            _set_field(days[-1], (header[2] or "").strip())
        elif _BUDGET.search(bare):
            in_budget = True
        elif in_budget or not (days and _set_field(days[-1], bare)):
            _set_budget(budget, bare, in_budget)
    return {"budget_summary": budget, "daily_plans": days} if days else None


def _day_number(header: re.Match[str]) -> int:
    return _DAY_WORDS.get(header[1].lower()) or int(header[1])


def _is_amount(header: re.Match[str], days: list[Day]) -> bool:
    """Whether "Day 1: 300 RMB" below the budget's heading states an amount instead of starting a day."""
    return any(_day_number(header) == day["day_number"] for day in days) and bool((header[2] or "").strip(" *"))


def _add_activity(day: Day, slot: str, kind: str, text: str, names: frozenset[str]) -> None:
    cities = cities_of(day)
    arrived = any(act["type"] == Kind.INTERCITY for act in day["activities"])
    city = day["current_city"] if cities is None else cities[arrived]
    details = read_details(kind, text, city, names)
    day["activities"].append({"time_slot": slot, "type": kind, "details": details})


def _set_field(day: Day, bare: str) -> bool:
    """Whether the line is the city or the accommodation of the day, which it then sets."""
    if match := _CITY.fullmatch(bare):
        city = match[1].strip(" *`")
        day["current_city"] = _FROM_TO.sub(r"from \1 to \2", city) if city.startswith("从") else city
    elif (match := _STAY.fullmatch(bare)) and price(match[1].strip(" *`")) is None:
        name, cost = take_price(match[1].strip(" *`"))
        day.pop("accommodation", None)
        if name.lower() not in _NO_STAY:
            day["accommodation"] = {"name": name, "price_per_night": cost}
    else:
        return False
    return True


def _set_budget(budget: dict[str, float], bare: str, in_budget: bool) -> None:
    """Below the heading any amount counts, elsewhere only a line that is a label and a price."""
    match = _LABELLED.fullmatch(bare.strip("|｜ "))
    if not match:
        return
    label, text = match[1].strip().lower(), match[2].strip(" *`|｜")
    key = next((key for key, labels in BUDGET_LABELS.items() if label in labels), None)
    stated = amount(text) if in_budget else price(text)
    if key is not None and stated is not None:
        budget.setdefault(key, stated)


def _bare(line: str) -> str:
    """A line without bullets, headings and bold marks at its ends."""
    return line.strip().lstrip("*#>•· \t-").rstrip("* \t")


def _activity(line: str) -> tuple[str, str, str] | None:
    """Time slot, type and text of "09:00-10:30 | attraction | Laomendong, ¥0", also as a Markdown table row."""
    parts = [part.strip() for part in re.split("[|｜]", line.strip().strip("|｜"), maxsplit=2)]
    times = _TIMES.search(parts[0][:60])
    if not times or len(parts) < 2:
        return None
    kind = parts[1].strip("*`[] ").lower().replace(" ", "_").replace("-", "_")
    kind = _TYPE_SYNONYMS.get(kind, kind)
    if kind not in tuple(Kind):
        return None
    slot = f"{times[1]}:{times[2]}-{times[3]}:{times[4]}"
    return slot, kind, parts[2].rstrip("* ") if len(parts) > 2 else ""


def _names(lines: list[str]) -> frozenset[str]:
    """Names of attractions, restaurants and hotels that have their own line; they help to split routes."""
    names: set[str] = set()
    for line in lines:
        if (activity := _activity(line)) and activity[1] in (Kind.ATTRACTION, Kind.MEAL, Kind.HOTEL):
            names.add(read_details(activity[1], activity[2], "", ())["name"])
        elif match := _STAY.fullmatch(_bare(line)):
            names.add(take_price(match[1].strip(" *`"))[0])
    return frozenset(names - {""})
