"""Properties of the plan parser: rendered plans read back equal, and no text raises or takes more than linear time."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.envs.deepplanning.render import render_plan

from tip_exp.envs.deepplanning.data import load_tasks, task_folder
from tip_exp.envs.deepplanning.plan.parse import extract_plan, parse_plan
from tip_exp.envs.deepplanning.score.constraints import check_constraints
from tip_exp.envs.deepplanning.score.score import check_commonsense
from tip_exp.envs.deepplanning.score.tables import TaskTables

FIRST = st.sampled_from(["Jixian Hotel", "Home Inn", "China Knife, Scissors", "故宫博物院", "O'Brien & Co", "Hall 3"])
LAST = st.sampled_from(["East Wing", "and Sword Museum", "798 Art Zone", "No. 2", "老港店"])  # never starts a name
ENDS = st.sampled_from(["", " (Palace Branch)", "（王府井店）", "·King's"])
NAMES = st.builds(
    lambda first, glue, last, end: first + (glue + last if glue else "") + end,
    FIRST,
    st.sampled_from(["", ", ", " - ", "，", " "]),
    LAST,
    ENDS,
)
PLAIN = st.sampled_from(["Hefei Station", "Nanjing South Station", "上海虹桥站", "Old Town"])  # no dash, no comma
COSTS = st.integers(0, 20_000) | st.integers(1, 9999).map(lambda n: n + 0.5)
TIMES = st.builds(
    lambda h, m, k, n: f"{h:02d}:{m:02d}-{k:02d}:{n:02d}", *([st.integers(0, 23), st.integers(0, 59)] * 2)
)
CITIES = st.sampled_from(["Hefei", "Nanjing", "北京"])


@pytest.fixture
def cpu_limit() -> Iterator[None]:
    """Interrupts a test after 60 s of CPU time, so that endless backtracking fails instead of hanging."""

    def stop(*_: Any) -> None:
        raise AssertionError("60 s of CPU time: a pattern backtracks without end")

    previous = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, 60)
    yield
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, previous)


@st.composite
def plans(draw: st.DrawFn) -> dict[str, Any]:
    """Plans as the parser returns them: routes between places that have their own line, or between plain names.

    A route "A - B - C" is ambiguous in a plan with the places "A", "B - C", "A - B" and "C".
    """
    places = draw(st.lists(NAMES, min_size=2, max_size=5, unique=True))
    days = []
    for count in range(1, draw(st.integers(1, 3)) + 1):
        origin, destination = draw(CITIES), draw(CITIES)
        moves = origin != destination
        acts: list[dict[str, Any]] = []

        def add(kind: str, details: dict[str, Any], acts: list[dict[str, Any]] = acts) -> None:
            acts.append({"time_slot": draw(TIMES), "type": kind, "details": details})

        ends = st.sampled_from(places) | PLAIN
        ride = {"from": draw(ends), "to": draw(ends), "distance": "1.2km", "duration": "7min", "cost": draw(COSTS)}
        for place in places:
            label = draw(st.sampled_from(["Lunch", "晚餐"]))
            add("meal", {"meal_type": label, "name": place, "cost": draw(COSTS | st.none())})
            add("attraction", {"name": draw(NAMES), "city": origin, "cost": draw(COSTS | st.none())})
        add("travel_city", ride)
        add("hotel", {"activity": draw(st.sampled_from(["Check-in", "休息"])), "name": draw(NAMES)})
        add("buffer", {"description": draw(st.sampled_from(["Rest, walk - and wait", "安检，候机", ""]))})
        if moves:
            mode, number = draw(st.sampled_from([("train", "G1"), ("flight", "MU5131"), ("flight", "G56803")]))
            stations = {"from": draw(PLAIN), "to": draw(PLAIN)}
            add("travel_intercity_public", {"mode": mode, "number": number} | stations | {"cost": draw(COSTS)})
            add("attraction", {"name": draw(NAMES), "city": destination, "cost": 0})
        day = {
            "day_number": count,
            "current_city": f"from {origin} to {destination}" if moves else origin,
            "activities": acts,
        }
        if draw(st.booleans()):
            day["accommodation"] = {"name": draw(NAMES), "price_per_night": draw(COSTS | st.none())}
        days.append(day)
    keys = ["transportation", "accommodation", "meals", "attractions_and_tickets", "other", "total_estimated_budget"]
    return {"budget_summary": draw(st.dictionaries(st.sampled_from(keys), COSTS)), "daily_plans": days}


@settings(max_examples=150)
@given(plan=plans(), lang=st.sampled_from(["en", "zh"]))
def test_a_rendered_plan_reads_back_equal(plan: dict[str, Any], lang: str) -> None:
    text = render_plan(plan, lang)
    assert parse_plan(text) == plan
    assert parse_plan(extract_plan("<think>hm</think>" + text)) == plan


@settings(max_examples=200)
@given(st.text())
def test_any_text_gives_a_plan_or_none(text: str) -> None:
    extract_plan(text, official_join=True)
    plan = parse_plan("Day 1:\n" + text)
    assert plan is not None and plan["daily_plans"]


def test_ten_thousand_broken_plans(world: Any) -> None:
    """Lines cut, swapped, doubled and edited always give a plan or None that the scorers accept."""
    rng = random.Random(0)
    texts = [(world / f"plan_{lang}.txt").read_text("utf-8") for lang in ("en", "zh")]
    bits = ["|", "｜", ",", "，", " - ", "-", "¥", "￥", "<plan>", "</plan>", "</think>", "<think>", "\n", "\r\n", "**"]
    bits += ["(", "0", "99999999999", "24:00", "from", "Day 3:", "Day 1: 5", "=", "\u2028", "\x00", "元", "/", "meal"]
    bits += ["²", "٣"]
    meta = load_tasks(world, "en")[0].meta
    tables = TaskTables.load(task_folder(world / "database" / "database_en", "0"))
    num_plans = 0
    for index in range(10_000):
        lines = rng.choice(texts).splitlines(keepends=True)
        start = rng.randrange(len(lines))
        lines = lines[start : start + rng.randint(4, 14)]
        for _ in range(rng.randint(1, 4)):
            target = rng.randrange(len(lines))
            line = lines[target]
            cut = rng.randrange(len(line) + 1)
            lines[target] = rng.choice(
                [line[:cut], line[cut:], line[:cut] + rng.choice(bits) + line[cut:], line + line, rng.choice(lines)]
            )
        text = "Day 1:\n" * (index % 2) + "".join(lines)
        extract_plan(f"<plan>{text}</plan>", official_join=index % 3 == 0)
        plan = parse_plan(text)
        num_plans += plan is not None
        check_constraints(plan, meta)
        check_commonsense(plan, meta, tables)  # raises if the layout is wrong
    assert num_plans > 5_000


@pytest.mark.parametrize(
    "line",
    [
        "09:00-10:00 | travel_city | " + " - " * 600,
        "09:00-10:00 | meal | " + "1,111" * 390,
        "09:00-10:00 | attraction | " + ",111" * 490,
        "09:00-10:00 | travel_intercity_public | " + "A1" * 900,
        "Current City: from " + " " * 1900,
        "Current City: " + "from a to " * 190,
        "Accommodation: " + "¥" * 1900,
        "Transportation: " + "(" * 1900 + "=",
        "a" * 2000 + ":",
    ],
)
def test_no_line_makes_a_pattern_backtrack_without_end(line: str, cpu_limit: None) -> None:
    assert parse_plan("Day 1:\nBudget Summary\nDay 2:\n" + f"{line}\n" * 5) is not None


def test_many_tags_do_not_take_quadratic_time(cpu_limit: None) -> None:
    assert extract_plan("<plan>" * 50_000) == extract_plan("<think>" * 50_000, official_join=True) == ""
