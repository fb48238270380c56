from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tip_exp.envs.deepplanning.data import load_tasks
from tip_exp.envs.deepplanning.plan.parse import extract_plan, parse_plan
from tip_exp.envs.deepplanning.plan.schema import Party, total_cost
from tip_exp.envs.deepplanning.score.constraints import CONSTRAINTS, KINDS, answers, check_constraints
from tip_exp.envs.deepplanning.score.score import score_plan

# edit of the plan that keeps all five constraints of task 0: old text, new text, constraints broken
EDITS = [
    ("", "", set()),
    ("train G11", "train G13", {"train_cheapest_direct"}),
    ("train G11", "flight G11", {"train_cheapest_direct"}),  # the number counts in its own mode only
    ("train G11", "高铁 G11", set()),
    ("train G11, Lindon Station - Marwick Station", "train G11, Marwick Station - Lindon Station", set()),
    ("Accommodation: Harbour House, East Wing", "Accommodation: Harbour House", {"hotel_highest_rated"}),
    ("Rest, Harbour House, East Wing", "Rest, Gull Inn", set()),  # activities at a hotel do not count
    ("Lunch, Pier Noodles - Old Port", "Lunch, Pier Noodles", {"restaurant_must_eat_named"}),
    ("| attraction | Dune Park", "| attraction | Dunes", {"attraction_must_visit_named"}),
    ("| attraction | Dune Park", "| meal | Lunch, Dune Park", {"attraction_must_visit_named"}),
    ("Dinner, Tide Kitchen, ¥80/person", "Dinner, Tide Kitchen, ¥93/person", {"budget_constraint"}),  # 1275 + 2 * 13
    ("Dinner, Tide Kitchen, ¥80/person", "Dinner, Tide Kitchen, ¥92/person", set()),  # 1299, at most 1300
]


@pytest.mark.parametrize(("old", "new", "broken"), EDITS)
def test_an_edit_breaks_what_it_touches(old: str, new: str, broken: set[str], world: Path, plan_text: str) -> None:
    assert old in plan_text
    meta = load_tasks(world, "en")[0].meta
    verdicts = check_constraints(parse_plan(extract_plan(plan_text.replace(old, new))), meta)
    assert list(verdicts) == list(meta["hard_constraints"])
    assert {name for name, kept in verdicts.items() if not kept} == broken


def plan_of(*activities: dict[str, Any], **day: Any) -> dict[str, Any]:
    return {"daily_plans": [{"activities": list(activities)} | day]}


def leg(mode: Any, number: str) -> dict[str, Any]:
    return {"type": "travel_intercity_public", "details": {"mode": mode, "number": number}}


def place(kind: str, name: str) -> dict[str, Any]:
    return {"type": kind, "details": {"name": name}}


# constraint data and a plan that keeps it, by group
GROUPS = {
    "train": ({"outbound_train_no": "G1", "inbound_train_no": "G2"}, plan_of(leg("Train", "G2"), leg("火车", "G1"))),
    "flight": ({"inbound_flight_no": "X9"}, plan_of(leg("PLANE", "X9"))),
    "hotel": ({"hotel_name": "Inn"}, plan_of(accommodation={"name": "Inn"})),
    "restaurant": ({"restaurant_name": "Pot"}, plan_of(place("meal", "Pot"))),
    "attraction": ({"attraction_names": ["A", "B"]}, plan_of(place("attraction", "B"), place("attraction", "A"))),
}


def test_there_are_38_kinds() -> None:
    assert len(CONSTRAINTS) == 38 == len(set(CONSTRAINTS))


@pytest.mark.parametrize("key", [key for key in CONSTRAINTS if key != "budget_constraint"])
def test_every_kind_is_kept_by_its_names_and_broken_without(key: str) -> None:
    data, plan = GROUPS[key.split("_")[0]]
    meta = {"hard_constraints": {key: data}}
    assert check_constraints(plan, meta) == {key: True}
    assert check_constraints(plan_of(), meta) == {key: False}
    assert check_constraints(None, meta) == {key: False}
    assert set(answers(data)) == {
        name for value in data.values() for name in ([value] if isinstance(value, str) else value)
    }


@pytest.mark.parametrize("group", KINDS)
@pytest.mark.parametrize("spoilt", ["x", [None], [{"activities": None, "accommodation": "x"}], {"a": 1}, 5])
def test_a_malformed_plan_breaks_and_does_not_raise(group: str, spoilt: Any) -> None:
    key = f"{group}_{KINDS[group][0]}"
    assert check_constraints({"daily_plans": spoilt}, {"hard_constraints": {key: GROUPS[group][0]}}) == {key: False}


def test_one_leg_without_a_mode_spoils_all_legs() -> None:
    data, plan = GROUPS["train"]
    spoilt = plan_of(*plan["daily_plans"][0]["activities"], leg(None, "G3"))  # as upstream, where None.lower() raises
    assert check_constraints(spoilt, {"hard_constraints": {"train_seat_class": data}}) == {"train_seat_class": False}


def test_unnamed_ways_are_kept_unnamed_places_are_not_and_unknown_keys_are_left_out() -> None:
    meta = {"hard_constraints": {"train_x": {}, "hotel_x": {}, "attraction_x": {"attraction_names": []}, "zoo_x": {}}}
    assert check_constraints(plan_of(), meta) == {"train_x": True, "hotel_x": False, "attraction_x": False}


def paid(kind: str, cost: Any) -> dict[str, Any]:
    return {"type": kind, "details": {"cost": cost}}


def test_what_a_trip_costs() -> None:
    first = {
        "accommodation": {"price_per_night": "300"},  # a number as text counts
        "activities": [
            paid("travel_intercity_public", None),  # no number, so the next leg is the first
            paid("travel_intercity_public", 100),
            paid("travel_intercity_public", 100),  # a connection shows the whole fare again
            paid("meal", 20),
            paid("meal", "dear"),
            paid("attraction", 7.5),
            paid("travel_city", 30),
            paid("buffer", 1000),
        ],
    }
    last = {
        "accommodation": {"price_per_night": 999},
        "activities": [paid("travel_city", 10)],
    }  # the last night is none
    # 5 people, 3 rooms, 2 taxis: 5 * 100 + 3 * 300 + 5 * 20 + 5 * 7.5 + 2 * (30 + 10) = 1617.5
    assert total_cost([first, last], Party(5, 3)) == 1617.5
    assert total_cost([last], Party(4, 1)) == 10  # 4 people fit one taxi


@pytest.mark.parametrize("limit", [None, "much", "1600"])
def test_a_budget_needs_a_number_and_a_day(limit: Any) -> None:
    meta = {"people_number": 1, "room_number": 1, "hard_constraints": {"budget_constraint": {"max_budget": limit}}}
    assert check_constraints(plan_of(), meta) == {"budget_constraint": limit == "1600"}  # a plan without costs keeps it
    assert check_constraints({"daily_plans": []}, meta) == {"budget_constraint": False}


def test_official_verdicts(official: Path, official_records: Any) -> None:
    tasks = {lang: {task.id: task for task in load_tasks(official, lang)} for lang in ("en", "zh")}
    records = official_records("official_hard_verdicts.jsonl")
    paper = json.loads((official / "fixtures" / "en0_paper_example.json").read_text("utf-8"))["cases"]
    assert records and len(paper) == 9
    for record in records + paper:
        score = score_plan(record["plan"], tasks[record["lang"]][record["id"]].meta)
        assert score.constraints == record["official"]
        assert (score.passed, score.total, score.fraction) == (record["passed"], record["total"], record["fraction"])
        assert score.personalized_score == record["official_personalized_score"]
    for record in paper:
        meta = tasks["en"]["0"].meta
        assert total_cost(record["plan"]["daily_plans"], Party.of(meta)) == record["total_cost"]
