from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest

from tip_exp.envs.deepplanning.data import find_databases, load_tasks, task_folder
from tip_exp.envs.deepplanning.plan.parse import extract_plan, parse_plan
from tip_exp.envs.deepplanning.plan.schema import MALFORMED
from tip_exp.envs.deepplanning.score.clock import clock, slot, within_hours
from tip_exp.envs.deepplanning.score.score import (
    CHECKS,
    DIMENSIONS,
    PlanScore,
    check_commonsense,
    dimension_scores,
    score_plan,
)
from tip_exp.envs.deepplanning.score.tables import TaskTables

FOLDER = Path(__file__).parent / "world" / "database" / "database_en" / "id_0"

# edits (old text, new text) of a plan that passes all checks, and the checks that then fail
EDITS: list[tuple[str, list[tuple[str, str]], set[str]]] = [
    ("nothing", [], set()),
    (
        "two days in one",  # the return is not stated, and the last day has a hotel
        [("Day 2:\nCurrent City: from Marwick to Lindon\nAccommodation: -\n", "")],
        {"valid_trip_duration", "closed_loop_route_structure", "traceable_accommodation", "no_time_overlaps",
         "reasonable_transfer_time", "cost_calculation_correctness", "essential_meal_coverage"},  # two lunches at once
    ),
    (
        "ends elsewhere",
        [("from Marwick to Lindon", "from Marwick to Overton")],
        {"closed_loop_route_structure", "seamless_intercity_transfers"},
    ),
    ("begins elsewhere", [("from Lindon to Marwick", "from Overton to Marwick")],
        {"closed_loop_route_structure", "seamless_intercity_transfers"}),
    ("leg from no station", [("Marwick Station - Lindon Station", "Gull Cafe - Lindon Station")],
        {"seamless_intercity_transfers"}),
    ("hotel price off", [("East Wing, ¥300", "East Wing, ¥310")], {"validated_accommodation"}),
    ("hotel of an activity unknown", [("Rest, Harbour House", "Rest, Harbor House")], {"validated_accommodation"}),
    ("ticket off", [("Salt Museum, ¥40", "Salt Museum, ¥45")], {"validated_attractions"}),
    ("ticket missing", [("Salt Museum, ¥40/person", "Salt Museum")], {"validated_attractions"}),
    ("meal price off", [("Tide Kitchen, ¥80", "Tide Kitchen, ¥90")], {"validated_meals"}),
    ("meal price rounded", [("Gull Cafe, ¥60/person", "Gull Cafe, ¥60.4/person")], set()),  # 60.4 on record
    ("unknown train", [("train G12", "train G99")], {"validated_transportation"}),
    ("fare off", [("Lindon Station, ¥110", "Lindon Station, ¥112")], {"validated_transportation"}),
    ("leg without a fare", [("Lindon Station, ¥110/person", "Lindon Station")],
        {"validated_transportation", "cost_calculation_correctness"}),  # 1055 against 1275
    (
        "no hotel at night",
        [("18:30-24:00 | hotel | Rest, Harbour House, East Wing", "18:30-24:00 | buffer | Sleep")],
        {"traceable_accommodation", "ends_with_accommodation"},
    ),
    ("night of the last day", [("Accommodation: -", "Accommodation: Gull Inn, ¥100/room/night")],
        {"traceable_accommodation"}),
    ("one meal on a day with two", [("| meal | Dinner, Tide Kitchen, ¥80/person", "| buffer | Sit")],
        {"essential_meal_coverage", "cost_calculation_correctness"}),  # 1115 against 1275, 12.5 %
    ("no sight on arrival", [("09:45-11:30 | attraction | Salt Museum, ¥40/person", "09:45-11:30 | buffer | Sit")],
        {"essential_attraction_coverage"}),
    ("overlap", [("09:20-11:20 | attraction", "09:20-11:25 | attraction")], {"no_time_overlaps"}),
    ("20-minute road, 50 minutes", [("12:50-15:30 | buffer", "13:20-15:30 | buffer")], {"reasonable_transfer_time"}),
    ("20-minute road, 25 minutes", [("12:50-15:30 | buffer", "12:55-15:30 | buffer")], set()),
    ("closed in the morning", [("| attraction | Dune Park, ¥0/person", "| attraction | Lamp Tower, ¥0/person")],
        {"attraction_visit_within_opening_hours"}),
    (
        "dinner after closing",
        [("12:40-17:00", "12:40-21:00"), ("17:00-17:20", "21:00-21:20"), ("17:20-18:20", "21:20-22:20"),
         ("18:20-18:30", "22:20-22:30"), ("18:30-24:00", "22:30-24:00")],
        {"dining_within_service_hours"},
    ),
    ("short visit", [("09:45-11:30 | attraction | Salt Museum, ¥40/person",
                      "09:45-10:30 | attraction | Salt Museum, ¥40/person\n10:30-11:30 | buffer | Sit")],
        {"reasonable_duration_at_attractions"}),
    ("short meal", [("17:20-18:20 | meal | Dinner, Tide Kitchen, ¥80/person",
                     "17:20-17:45 | meal | Dinner, Tide Kitchen, ¥80/person\n17:45-18:20 | buffer | Sit")],
        {"reasonable_meal_duration"}),
    ("total 15 % off", [("1,275 RMB", "1,500 RMB")], {"cost_calculation_correctness"}),
    ("total 8.9 % off", [("1,275 RMB", "1,400 RMB")], set()),
    ("total missing", [("   **Total Estimated Budget: 1,275 RMB**\n", "")], {"cost_calculation_correctness"}),
    ("one restaurant twice", [("Gull Cafe, ¥60", "Tide Kitchen, ¥80")], {"diverse_meal_options"}),
    ("one sight twice", [("attraction | Dune Park, ¥0", "attraction | Salt Museum, ¥40")],
        {"diverse_attraction_options"}),
]  # fmt: skip


@pytest.fixture(scope="module")
def tables() -> TaskTables:
    return TaskTables.load(FOLDER)


@pytest.fixture
def meta(world: Path) -> dict[str, Any]:
    return dict(load_tasks(world, "en")[0].meta)


def edited(plan_text: str, edits: list[tuple[str, str]]) -> dict[str, Any]:
    for old, new in edits:
        assert plan_text.count(old) == 1, old
        plan_text = plan_text.replace(old, new)
    plan = parse_plan(extract_plan(plan_text))
    assert plan is not None
    return plan


def failed(checks: dict[str, bool]) -> set[str]:
    assert list(checks) == list(CHECKS)
    return {check for check, passed in checks.items() if not passed}


@pytest.mark.parametrize(("edits", "wanted"), [row[1:] for row in EDITS], ids=[row[0] for row in EDITS])
def test_an_edit_fails_exactly_the_checks_it_affects(
    edits: list[tuple[str, str]], wanted: set[str], plan_text: str, meta: dict[str, Any], tables: TaskTables
) -> None:
    assert failed(check_commonsense(edited(plan_text, edits), meta, tables)) == wanted


@pytest.mark.parametrize(("weekday", "wanted"), [(1, {"avoidance_of_closure_days"}), (7, set()), (None, set())])
def test_closing_days_count_from_the_weekday_of_departure(
    weekday: int | None, wanted: set[str], plan_text: str, meta: dict[str, Any], tables: TaskTables
) -> None:
    meta["depart_weekday"] = weekday  # the museum, closed on Mondays, is visited on the first day
    assert failed(check_commonsense(edited(plan_text, []), meta, tables)) == wanted


def test_the_edits_cover_every_check() -> None:
    assert len(CHECKS) == 21 and len(DIMENSIONS) == 8
    assert set().union(*(row[2] for row in EDITS)) == set(CHECKS) - {"avoidance_of_closure_days"}  # weekday test


def test_the_chinese_plan_passes_every_check(world: Path) -> None:
    tables = TaskTables.load(task_folder(find_databases(world)["zh"], "0"))
    plan = parse_plan(extract_plan((world / "plan_zh.txt").read_text("utf-8")))
    assert failed(check_commonsense(plan, load_tasks(world, "zh")[0].meta, tables)) == set()


@pytest.mark.parametrize("plan", [None, {}, {"daily_plans": []}, {"daily_plans": None}])
def test_no_plan_passes_nothing(plan: Any, meta: dict[str, Any], tables: TaskTables) -> None:
    assert failed(check_commonsense(plan, meta, tables)) == set(CHECKS)


# table file, checks that fail without it
TABLES = [
    ("hotels", {"validated_accommodation"}),
    ("attractions", {"validated_attractions", "attraction_visit_within_opening_hours", "avoidance_of_closure_days",
                     "reasonable_duration_at_attractions"}),
    ("restaurants", {"validated_meals", "dining_within_service_hours"}),
    ("trains", {"validated_transportation", "seamless_intercity_transfers"}),
    ("flights", set()),
    ("locations", set()),  # roads that are not recorded are not checked
    ("transportation", set()),
]  # fmt: skip


@pytest.mark.parametrize(("table", "wanted"), TABLES)
def test_a_missing_table_fails_the_checks_that_need_it(
    table: str, wanted: set[str], plan_text: str, meta: dict[str, Any], tmp_path: Path
) -> None:
    shutil.copytree(FOLDER, tmp_path / "id_0")
    shutil.rmtree(tmp_path / "id_0" / table)
    assert failed(check_commonsense(edited(plan_text, []), meta, TaskTables.load(tmp_path / "id_0"))) == wanted


def middle_day(*times: str, sights: int = 2, meals: tuple[str, ...] = ("11:00-12:00", "18:00-19:00")) -> dict[str, Any]:
    acts = [{"type": "meal", "time_slot": slot, "details": {"name": f"m{slot}"}} for slot in meals]
    acts += [{"type": "attraction", "time_slot": t, "details": {"name": f"s{t}"}} for t in times[:sights]]
    return {"current_city": "Marwick", "activities": acts}


@pytest.mark.parametrize(
    ("day", "meals_ok", "sights_ok"),
    [
        (middle_day("09:00-10:00", "13:00-14:00"), True, True),
        (middle_day("09:00-10:00"), True, False),  # one hour at one attraction
        (middle_day("13:00-17:00"), True, True),  # four hours
        (middle_day("09:00-10:00", "13:00-14:00", meals=("11:00-12:00",)), False, True),
        (middle_day("09:00-10:00", "13:00-14:00", meals=("16:01-17:00", "18:59-20:00")), False, True),  # 119 minutes
        (middle_day("09:00-10:00", "13:00-14:00", meals=("16:00-17:00", "19:00-20:00")), True, True),
    ],
)
def test_a_full_day_needs_two_meals_and_enough_sightseeing(
    day: dict[str, Any], meals_ok: bool, sights_ok: bool, plan_text: str, meta: dict[str, Any], tables: TaskTables
) -> None:
    plan = edited(plan_text, [])
    plan["daily_plans"].insert(1, day)
    checks = check_commonsense(plan, meta, tables)
    assert (checks["essential_meal_coverage"], checks["essential_attraction_coverage"]) == (meals_ok, sights_ok)


# departure of the leg home, number of meals -> whether the meals suffice
@pytest.mark.parametrize(
    ("departure", "num_meals", "enough"),
    [("08:59", 0, True), ("08:59", 1, False), ("09:00", 0, True), ("14:59", 1, True), ("14:59", 2, False),
     ("15:00", 0, False), ("15:00", 2, True)],
)  # fmt: skip
def test_meals_on_the_day_of_return(
    departure: str, num_meals: int, enough: bool, plan_text: str, meta: dict[str, Any], tables: TaskTables
) -> None:
    plan = edited(plan_text, [])
    acts = plan["daily_plans"][1]["activities"]
    acts[-1]["time_slot"] = f"{departure}-23:00"
    kept = [act for act in acts if act["type"] != "meal"]
    plan["daily_plans"][1]["activities"] = middle_day(sights=0)["activities"][:num_meals] + kept
    assert check_commonsense(plan, meta, tables)["essential_meal_coverage"] == enough


def test_a_malformed_plan_raises_and_scores_0(plan_text: str, meta: dict[str, Any], tables: TaskTables) -> None:
    plan = edited(plan_text, [])
    broken = copy.deepcopy(plan)
    broken["daily_plans"][0]["activities"].append("free time")
    with pytest.raises(MALFORMED):
        check_commonsense(broken, meta, tables)
    score = score_plan(broken, meta, tables)
    assert score.malformed and score.composite_score == score.case_acc == score.commonsense_score == 0.0
    valid = score_plan(plan, meta, tables)
    assert not valid.malformed and valid.composite_score == valid.case_acc == 1.0


def test_a_dimension_counts_only_if_all_its_checks_pass() -> None:
    checks = dict.fromkeys(CHECKS, True) | {"no_time_overlaps": False}
    assert dimension_scores(checks)["Time Feasibility"] == 0.0
    assert PlanScore({}, checks).commonsense_score == 7 / 8
    assert PlanScore({}, dict.fromkeys(CHECKS, False)).commonsense_score == 0.0


def test_times_of_day() -> None:
    assert (clock("08:30"), clock(" 7:05 "), clock("24:00")) == (510, 425, 1439)
    assert [clock(value) for value in ("24:01", "8.30", "12:60", "", None, 830)] == [None] * 6
    assert slot("09:00-10:30") == (540, 630)
    assert slot("23:00 - 01:00") == (1380, 1500)  # past midnight
    assert slot("18:30-24:00") == (1110, 1439)
    assert slot("09:00 to 10:00") is None


@pytest.mark.parametrize(
    ("visit", "hours", "inside"),
    [
        ((600, 660), (540, 1080), True),
        ((600, 1100), (540, 1080), False),
        ((1380, 1500), (540, 1080), False),
        ((1000, 1100), (990, 180), True),  # 16:30 to 03:00
        ((60, 120), (990, 180), True),
        ((1380, 1500), (990, 180), True),
        ((900, 1100), (990, 180), False),
        ((60, 240), (990, 180), False),
    ],
)
def test_business_hours_may_run_past_midnight(visit: tuple[int, int], hours: tuple[int, int], inside: bool) -> None:
    assert within_hours(visit, *hours) == inside


@pytest.mark.data
def test_official_verdicts(official: Path, official_records: Any) -> None:
    root = official / "mini_world"
    tasks = {task.id: task for task in load_tasks(root, "en")}
    tables = {i: TaskTables.load(task_folder(find_databases(root)["en"], i)) for i in tasks}
    records = official_records("mini_world_official_verdicts.jsonl")
    assert records
    for record in records:
        score = score_plan(record["plan"], tasks[record["id"]].meta, tables[record["id"]])
        assert score.commonsense == record["commonsense"], record["edit"]
        assert dimension_scores(score.commonsense) == record["commonsense_dimensions"]
        assert score.commonsense_score == record["commonsense_score"]
        assert score.constraints == record["official"]
        assert score.fraction == record["fraction"]
        assert score.personalized_score == record["official_personalized_score"]
        assert (score.composite_score, score.case_acc) == (record["composite_score"], record["case_acc"])


@pytest.mark.data
def test_official_plans_as_text_pass_every_check(official: Path) -> None:
    root = official / "mini_world"
    for task in load_tasks(root, "en"):
        plan = parse_plan(extract_plan((root / "oracle" / f"id_{task.id}.txt").read_text("utf-8")))
        tables = TaskTables.load(task_folder(find_databases(root)["en"], task.id))
        assert score_plan(plan, task.meta, tables).case_acc == 1.0
