from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tip_exp.envs.deepplanning.data import load_tasks
from tip_exp.envs.deepplanning.plan.parse import extract_plan, parse_plan
from tip_exp.envs.deepplanning.plan.schema import total_cost
from tip_exp.envs.deepplanning.score.constraints import answers, check_constraints
from tip_exp.envs.deepplanning.score.score import score_plan

# edits of a plan that satisfies all five constraints of task 0: old text, new text, violated constraints
EDITS = [
    ("", "", set()),
    ("train G11", "train G13", {"train_cheapest_direct"}),
    ("train G11", "flight G11", {"train_cheapest_direct"}),  # a number counts only with its mode
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


@pytest.mark.parametrize(("old", "new", "violated"), EDITS)
def test_an_edit_violates_exactly_what_it_affects(
    old: str, new: str, violated: set[str], world: Path, plan_text: str
) -> None:
    assert old in plan_text
    meta = load_tasks(world, "en")[0].meta
    verdicts = check_constraints(parse_plan(extract_plan(plan_text.replace(old, new))), meta)
    assert list(verdicts) == list(meta["hard_constraints"])
    assert {name for name, satisfied in verdicts.items() if not satisfied} == violated


def plan_of(*activities: dict[str, Any], **day: Any) -> dict[str, Any]:
    return {"daily_plans": [{"activities": list(activities)} | day]}


def leg(mode: Any, number: str) -> dict[str, Any]:
    return {"type": "travel_intercity_public", "details": {"mode": mode, "number": number}}


def place(kind: str, name: str) -> dict[str, Any]:
    return {"type": kind, "details": {"name": name}}


# group -> constraint data, plans that satisfy it, plans that violate it
VERDICTS: dict[str, tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]] = {
    "train": (
        {"outbound_train_no": "G1", "inbound_train_no": "G2"},
        [
            plan_of(leg("Train", "G2"), leg("火车", "G1")),
            plan_of(leg("railway", "G1"), leg("高铁", "G2"), leg("train", "G3")),
        ],
        [plan_of(leg("train", "G1")), plan_of(leg("train", "G1"), leg("flight", "G2")), plan_of(leg("train", "G1 G2"))],
    ),
    "flight": (
        {"inbound_flight_no": "X9"},
        [plan_of(leg("PLANE", "X9")), plan_of(leg("飞机", "X9"))],
        [plan_of(leg("flight", "X")), plan_of(leg("train", "X9")), plan_of(leg("flight", "x9"))],
    ),
    "hotel": (
        {"hotel_name": "Inn"},
        [plan_of(accommodation={"name": "Inn"})],
        [plan_of(accommodation={"name": "Inn, East"}), plan_of(accommodation=None), plan_of(place("hotel", "Inn"))],
    ),
    "restaurant": (
        {"restaurant_name": "Pot", "attraction_name": "Fort"},  # the attraction only says where
        [plan_of(place("meal", "Pot"))],
        [plan_of(place("meal", "pot")), plan_of(place("attraction", "Pot")), plan_of(place("meal", "Fort"))],
    ),
    "attraction": (
        {"attraction_names": ["A", "B"]},
        [plan_of(place("attraction", "B"), place("attraction", "C"), place("attraction", "A"))],
        [
            plan_of(place("attraction", "A")),
            plan_of(place("attraction", "A"), place("meal", "B")),
            plan_of(place("attraction", "A"), place("attraction", "B, East")),
        ],
    ),
}


@pytest.mark.parametrize("group", VERDICTS)
def test_a_group_is_checked_by_exact_names_whatever_its_kind(group: str) -> None:
    data, satisfying, violating = VERDICTS[group]
    for key in (f"{group}_cheapest_direct", f"{group}_x"):
        meta = {"hard_constraints": {key: data}}
        assert [check_constraints(plan, meta)[key] for plan in satisfying] == [True] * len(satisfying)
        assert [check_constraints(plan, meta)[key] for plan in violating] == [False] * len(violating)
        assert check_constraints(plan_of(), meta) == check_constraints(None, meta) == {key: False}


def test_answers_are_the_names_and_numbers_of_a_constraint() -> None:
    expected = {
        "train": {"G1", "G2"},
        "flight": {"X9"},
        "hotel": {"Inn"},
        "restaurant": {"Pot"},
        "attraction": {"A", "B"},
    }
    assert {group: set(answers(data)) for group, (data, _, _) in VERDICTS.items()} == expected
    assert answers({"max_budget": 3000}) == ()


@pytest.mark.parametrize("group", VERDICTS)
@pytest.mark.parametrize("days", ["x", [None], [{"activities": None, "accommodation": "x"}], {"a": 1}, 5])
def test_a_malformed_plan_violates_and_does_not_raise(group: str, days: Any) -> None:
    meta = {"hard_constraints": {f"{group}_x": VERDICTS[group][0]}}
    assert check_constraints({"daily_plans": days}, meta) == {f"{group}_x": False}


def test_one_leg_without_a_mode_violates_the_constraint() -> None:
    plan = plan_of(leg("train", "G1"), leg(None, "G3"))  # as upstream, where None.lower() raises
    meta = {"hard_constraints": {"train_seat_class": {"outbound_train_no": "G1"}}}
    assert check_constraints(plan, meta) == {"train_seat_class": False}


def test_constraints_without_answers_and_unknown_groups() -> None:
    meta = {"hard_constraints": {"train_x": {}, "hotel_x": {}, "attraction_x": {"attraction_names": []}, "zoo_x": {}}}
    assert check_constraints(plan_of(), meta) == {"train_x": True, "hotel_x": False, "attraction_x": False}


def paid(kind: str, cost: Any) -> dict[str, Any]:
    return {"type": kind, "details": {"cost": cost}}


def test_cost_of_a_trip() -> None:
    first = {
        "accommodation": {"price_per_night": "300"},  # a number as text counts
        "activities": [
            paid("travel_intercity_public", None),  # not a number: the next leg counts as the first
            paid("travel_intercity_public", 100),
            paid("travel_intercity_public", 100),  # second leg of a connection: the fare of the whole route again
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
    }  # the last day has no night
    # 5 people, 3 rooms, 2 taxis: 5 * 100 + 3 * 300 + 5 * 20 + 5 * 7.5 + 2 * (30 + 10) = 1617.5
    assert total_cost([first, last], {"people_number": 5, "room_number": 3}) == 1617.5
    assert total_cost([last], {"people_number": 4}) == 10  # 4 people fit one taxi


@pytest.mark.parametrize("limit", [None, "much", "1600"])
def test_a_budget_needs_a_numeric_limit_and_a_day(limit: Any) -> None:
    meta = {"people_number": 1, "room_number": 1, "hard_constraints": {"budget_constraint": {"max_budget": limit}}}
    assert check_constraints(plan_of(), meta) == {"budget_constraint": limit == "1600"}  # no costs
    assert check_constraints({"daily_plans": []}, meta) == {"budget_constraint": False}


@pytest.mark.data
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
        assert total_cost(record["plan"]["daily_plans"], meta) == record["total_cost"]
