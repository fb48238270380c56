from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.envs.deepplanning.render import render_plan

from tip_exp.envs.deepplanning.plan.lines import amount, price, read_details, route, take_price
from tip_exp.envs.deepplanning.plan.parse import extract_plan, parse_plan
from tip_exp.envs.deepplanning.plan.schema import cities_of

DAY = "Day 1:\nCurrent City: from Lindon to Marwick\n"


def only_activity(line: str, head: str = DAY) -> dict[str, Any]:
    plan = parse_plan(head + line)
    assert plan is not None
    (activity,) = plan["daily_plans"][0]["activities"]
    return activity


def test_a_whole_plan(plan_text: str) -> None:
    plan = parse_plan(extract_plan(plan_text))
    assert plan is not None
    assert plan["budget_summary"] == {
        "transportation": 515,
        "accommodation": 300,
        "meals": 380,
        "attractions_and_tickets": 80,
        "total_estimated_budget": 1275,
    }
    first, last = plan["daily_plans"]
    assert first["accommodation"] == {"name": "Harbour House, East Wing", "price_per_night": 300}
    assert "accommodation" not in last
    assert [len(day["activities"]) for day in (first, last)] == [11, 7]
    assert first["activities"][0] == {
        "time_slot": "08:00-09:00",
        "type": "travel_intercity_public",
        "details": {
            "mode": "train",
            "number": "G11",
            "from": "Lindon Station",
            "to": "Marwick Station",
            "cost": 100,
        },
    }
    assert first["activities"][7]["details"] == {  # the dash inside the name does not split it
        "from": "Pier Noodles - Old Port",
        "to": "Tide Kitchen",
        "distance": "7.6km",
        "duration": "20min",
        "cost": 25,
    }
    assert last["activities"][1]["details"] == {
        "name": "Dune Park",
        "city": "Marwick",
        "cost": 0,
    }  # before leaving


def test_the_chinese_plan_equals_the_english_one(world: Path) -> None:
    texts = [(world / f"plan_{lang}.txt").read_text("utf-8") for lang in ("en", "zh")]
    english, chinese = (parse_plan(extract_plan(text)) for text in texts)
    assert english is not None and chinese is not None
    assert english["budget_summary"] == chinese["budget_summary"]
    for english_day, chinese_day in zip(english["daily_plans"], chinese["daily_plans"], strict=True):
        pairs = list(zip(english_day["activities"], chinese_day["activities"], strict=True))
        assert [(a["time_slot"], a["type"], a["details"].get("cost")) for a, _ in pairs] == [
            (b["time_slot"], b["type"], b["details"].get("cost")) for _, b in pairs
        ]
    assert chinese["daily_plans"][0]["accommodation"] == {"name": "海港之家（东翼店）", "price_per_night": 300}
    assert chinese["daily_plans"][0]["activities"][5]["details"]["name"] == "码头面馆（老港店）"


A, B = "Day 1:\nA", "Day 1:\nB"


@pytest.mark.parametrize(
    ("text", "last", "joined"),
    [
        ("", "", ""),
        ("no plan", "", ""),
        (f"<plan>{A}</plan>", A, A),
        (f"<PLAN>\n{A}\n</Plan> done", A, A),
        (f"<plan>{A}</plan> better: <plan>{B}</plan>", B, f"{A}\n\n{B}"),
        (f"<plan>{A}</plan><plan>  </plan>", A, A),  # an empty plan is skipped
        (f"<think><plan>{A}</plan></think><plan>{B}</plan>", B, B),
        (f"<think>…</think><plan>{A}</plan><think>x</think><plan>{B}</plan>", B, B),
        (f"<think><plan>{A}</plan></think>", "", ""),
        (f"<think><plan>{A}</plan>", "", A),  # a plan in unclosed thinking counts only upstream
        (f"<plan>{A}", "", ""),  # not closed
        (f"{A}</plan>", "", ""),
        (f"the <plan> tag: <plan>{A}</plan>", A, f"tag: <plan>{A}"),
    ],
)
def test_which_plan_counts(text: str, last: str, joined: str) -> None:
    assert extract_plan(text) == last
    assert extract_plan(text, official_join=True) == joined


@pytest.mark.parametrize(
    ("field", "yuan"),
    [
        ("¥30/person", 30),
        ("￥1,200/间/晚", 1200),
        ("¥ 99.5", 99.5),
        ("RMB 40", 40),
        ("40 RMB per person", 40),
        ("30元/人", 30),
        ("ticket: ¥0", 0),
        ("门票：￥60", 60),
        ("about ¥79/person", 79),
        ("约30元/人", 30),
        ("人均约￥30", 30),
        ("~ 1,200 RMB", 1200),
        ("Free", 0),
        ("free entry", 0),
        ("免费", 0),
        ("0", 0),
        ("¥441/room/night × 2 rooms", 441),
        ("¥30/person (student)", 30),
        ("East Wing", None),
        ("5km", None),
        ("12min", None),
        ("Room 30", None),
        ("12345678901234567890", None),
        ("", None),
    ],
)
def test_prices(field: str, yuan: float | None) -> None:
    assert price(field) == yuan


@pytest.mark.parametrize(
    ("text", "name", "yuan"),
    [
        ("Laomendong, ¥30/person", "Laomendong", 30),
        ("Laomendong，￥1,200/人", "Laomendong", 1200),
        ("China Knife, Scissors, and Sword Museum, ¥0", "China Knife, Scissors, and Sword Museum", 0),
        ("China Knife, Scissors, and Sword Museum", "China Knife, Scissors, and Sword Museum", None),
        ("Laomendong (¥30/person)", "Laomendong", 30),
        ("Laomendong, approx. ¥1,200/person", "Laomendong", 1200),
        ("Laomendong ¥30/person", "Laomendong", 30),
        ("Laomendong, 1,200 RMB", "Laomendong", 1200),
        ("¥30", "¥30", None),  # no name before it
    ],
)
def test_a_price_is_removed_from_the_right_end(text: str, name: str, yuan: float | None) -> None:
    assert take_price(text) == (name, yuan)


@pytest.mark.parametrize(
    ("text", "names", "ends"),
    [
        ("A - B", (), ("A", "B")),
        ("A – B", (), ("A", "B")),
        ("A → B", (), ("A", "B")),
        ("上海虹桥站-北京南站", (), ("上海虹桥站", "北京南站")),
        ("从上海到北京", (), ("上海", "北京")),
        ("A to B", (), ("A", "B")),
        ("Home Inn - East - Old Town", ("Home Inn - East",), ("Home Inn - East", "Old Town")),
        ("Old Town - Home Inn - East", ("Home Inn - East",), ("Old Town", "Home Inn - East")),
        ("A - B - C - D", ("A - B", "C - D"), ("A - B", "C - D")),
        ("A - B - C", ("A", "A - B"), ("A - B", "C")),  # the longer name
        ("Check-point - B", (), ("Check-point", "B")),
        ("nowhere", (), ("nowhere", "")),
    ],
)
def test_routes(text: str, names: tuple[str, ...], ends: tuple[str, str]) -> None:
    assert route(text, names) == ends


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        ("613 RMB", 613),
        ("¥1,338", 1338),
        ("2820 RMB**. Airfare (650+550)*2=2400 RMB; cars 30+30=60 RMB", 2820),
        ("2820 元** 。其中机票 （650+550）*2=2400元", 2820),
        ("**6280** RMB", 6280),
        ("(650+550)*2=2400 RMB", 2400),
        ("613 + 882 + 90 = 1,585 RMB", 1585),
        ("about 99.5 yuan", 99.5),
        ("to be seen", None),
    ],
)
def test_budget_lines(text: str, stated: float | None) -> None:
    assert amount(text) == stated


@pytest.mark.parametrize(
    ("line", "kind", "slot"),
    [
        ("09:00-10:30 | attraction | Fort, ¥0", "attraction", "09:00-10:30"),
        ("09:00-10:30 ｜attraction ｜ Fort，￥0", "attraction", "09:00-10:30"),
        ("- 09:00 – 10:30 | **attraction** | **Fort**, ¥0", "attraction", "09:00-10:30"),
        ("* 9：00~10：30 | `Attraction` | Fort, ¥0**", "attraction", "9:00-10:30"),
        ("| 09:00-10:30 | attraction | Fort, ¥0 |", "attraction", "09:00-10:30"),
        ("**09:00-10:30** | 景点 | Fort, 免费", "attraction", "09:00-10:30"),
        ("09:00至次日10:30 | attraction | Fort, free", "attraction", "09:00-10:30"),
    ],
)
def test_lines_as_models_write_them(line: str, kind: str, slot: str) -> None:
    activity = only_activity(line)
    assert (activity["type"], activity["time_slot"]) == (kind, slot)
    assert (activity["details"]["name"], activity["details"]["cost"]) == ("Fort", 0)


@pytest.mark.parametrize(
    "header",
    [
        *("Day 1:", "**Day 1:**", "### Day 1", "Day 1 (2025-11-12):", "DAY 1 - Arrival", "第1天：", "第 1 天"),
        *("Day 1 | 2025-11-12", "Day One:", "第一天：", "**第一天**｜11月12日"),
    ],
)
def test_day_headers(header: str) -> None:
    plan = parse_plan(f"{header}\nCurrent City: Marwick\n09:00-10:00 | buffer | Rest")
    assert plan is not None
    assert [(day["day_number"], day["current_city"], len(day["activities"])) for day in plan["daily_plans"]] == [
        (1, "Marwick", 1)
    ]


@pytest.mark.parametrize(
    ("line", "stay"),
    [
        ("Accommodation: Inn, ¥99/room/night", {"name": "Inn", "price_per_night": 99}),
        ("**Accommodation**: **Inn**, ¥99", {"name": "Inn", "price_per_night": 99}),
        ("**Accommodation**: Inn", {"name": "Inn", "price_per_night": None}),
        ("- Accommodation：Inn，East，￥99/间/晚", {"name": "Inn，East", "price_per_night": 99}),
        ("住宿：Inn（￥99/间/晚）", {"name": "Inn", "price_per_night": 99}),
        ("Accommodation: -", None),
        ("Accommodation: None", None),
        ("Accommodation: 无", None),
        ("Accommodation: 882 RMB", None),  # a line of the budget
    ],
)
def test_accommodation(line: str, stay: dict[str, Any] | None) -> None:
    plan = parse_plan(f"Day 1:\n{line}")
    assert plan is not None and plan["daily_plans"][0].get("accommodation") == stay


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("meal", "Lunch, Knife, Fork, ¥9/person", {"meal_type": "Lunch", "name": "Knife, Fork", "cost": 9}),
        (
            "meal",
            "Dinner (Birthday), Inn - East",
            {"meal_type": "Dinner (Birthday)", "name": "Inn - East", "cost": None},
        ),
        ("meal", "Lunch at Inn, ¥9", {"meal_type": "Lunch", "name": "Inn", "cost": 9}),
        ("meal", "午餐：老港店，￥9/人", {"meal_type": "午餐", "name": "老港店", "cost": 9}),
        ("meal", "Inn, ¥9", {"meal_type": "", "name": "Inn", "cost": 9}),
        ("meal", "Lunch", {"meal_type": "Lunch", "name": "", "cost": None}),
        ("hotel", "Check-in, Inn, East Wing", {"activity": "Check-in", "name": "Inn, East Wing"}),
        ("hotel", "办理入住，海港之家", {"activity": "办理入住", "name": "海港之家"}),
        ("hotel", "Rest at Inn", {"activity": "Rest", "name": "Inn"}),
        ("hotel", "Rest", {"activity": "Rest", "name": ""}),
        ("travel_city", "A - B, 8.3 km, 12 minutes, ¥31", {"distance": "8.3 km", "duration": "12 minutes", "cost": 31}),
        (
            "travel_city",
            "A - B，1,200米，约1小时20分钟，免费",
            {"distance": "1,200米", "duration": "约1小时20分钟", "cost": 0},
        ),
        ("travel_city", "A - B, taxi, 3km, 12min", {"to": "B", "distance": "3km", "duration": "12min", "cost": None}),
        ("travel_city", "A - B, East, 12min, 3km, ¥4", {"from": "A", "to": "B, East", "duration": "12min"}),
        ("buffer", "Deplaning, baggage, ¥5", {"description": "Deplaning, baggage, ¥5"}),
    ],
)
def test_details(kind: str, text: str, expected: dict[str, Any]) -> None:
    details = read_details(kind, text, "Marwick", ())
    assert {key: details[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("text", "mode", "number"),
    [
        ("train G7798, A - B, ¥67/person", "train", "G7798"),
        ("flight CA1234，A - B，￥67/人", "flight", "CA1234"),
        ("flight 9C8888, A - B", "flight", "9C8888"),
        ("high-speed train G1, Second Class Seat, A - B, ¥67", "train", "G1"),
        ("train G1 A - B, ¥67", "train", "G1"),
        ("train, G1, A - B", "train", "G1"),
        ("airport train G1, A - B", "train", "G1"),
        ("Air China CA1234, A - B", "flight", "CA1234"),
        ("flight CZ 3456, A - B", "flight", "CZ3456"),
        ("flight 9C 8888 A - B", "flight", "9C8888"),
        ("高铁G123次，A - B", "train", "G123"),
        ("航班：MU5131，A → B", "flight", "MU5131"),
        ("G7798 (Second Class), A - B", "train", "G7798"),
        ("G56803, A - B", "flight", "G56803"),  # the airline G5
        ("1461, A - B", "train", "1461"),
        ("ferry, A - B", "ferry", ""),
    ],
)
def test_legs(text: str, mode: str, number: str) -> None:
    leg = read_details("travel_intercity_public", text, "", ())
    assert (leg["mode"], leg["number"], leg["from"], leg["to"]) == (mode, number, "A", "B")


def test_a_budget_may_be_first_last_without_heading_or_absent() -> None:
    day = "Day 1:\nCurrent City: Marwick\n"
    budget = "Transportation: 10 RMB\nAccommodation: 20 RMB\nTotal Estimated Budget: 30 RMB\n"
    expected = {"transportation": 10, "accommodation": 20, "total_estimated_budget": 30}
    head = "**Budget Summary**:\n"
    for text in (head + budget + "---\n" + day, day + head + budget, day + budget, day + "预算总结\n" + budget):
        plan = parse_plan(text)
        assert plan is not None and plan["budget_summary"] == expected and len(plan["daily_plans"]) == 1
    plan = parse_plan(day)
    assert plan is not None and plan["budget_summary"] == {}
    table = parse_plan(day + head + "| Meals | ¥40 |\n| 总计 | 1,040 元 |")
    assert table is not None and table["budget_summary"] == {"meals": 40, "total_estimated_budget": 1040}


def test_a_table_row_that_names_the_day_does_not_start_one() -> None:
    assert parse_plan("Day 1 | 09:00-10:00 | attraction | Fort") is None


@pytest.mark.parametrize("line", ["Current City: from Hefei to Nanjing", "当前城市：从Hefei到Nanjing"])
def test_a_change_of_city(line: str) -> None:
    plan = parse_plan(f"Day 1:\n{line}")
    assert plan is not None and cities_of(plan["daily_plans"][0]) == ("Hefei", "Nanjing")


def test_a_daily_amount_in_the_budget_does_not_start_a_day() -> None:
    plan = parse_plan("Day 1:\nCurrent City: X\n**Budget Summary**:\nDay 1: 300 RMB\nTotal: 300 RMB")
    assert plan is not None and len(plan["daily_plans"]) == 1
    assert plan["budget_summary"] == {"total_estimated_budget": 300}


def test_text_without_a_day_is_not_a_plan() -> None:
    assert parse_plan("") is None
    assert parse_plan("09:00-10:00 | meal | Lunch, Inn, ¥5\nTotal: 5 RMB") is None


def test_unrecognized_lines_are_skipped() -> None:
    noise = "Day 1:\n09:00-10:00 | yoga | Beach\nhave fun!\n" + "x" * 3000 + "\n10:00-11:00 | buffer\n"
    plan = parse_plan(noise)
    assert plan is not None
    assert [act["details"] for act in plan["daily_plans"][0]["activities"]] == [{"description": ""}]


def test_a_name_stated_elsewhere_in_the_plan_is_not_split_into_a_label() -> None:
    stay = "Accommodation: House, East Wing, ¥9\n"
    assert only_activity("18:00-24:00 | hotel | House, East Wing", DAY + stay)["details"]["name"] == "House, East Wing"
    assert only_activity("18:00-24:00 | hotel | House, East Wing")["details"]["name"] == "East Wing"


def test_joined_plans_have_the_days_of_both(plan_text: str) -> None:
    twice = parse_plan(extract_plan(plan_text + plan_text, official_join=True))
    assert twice is not None and [day["day_number"] for day in twice["daily_plans"]] == [1, 2, 1, 2]


def without_city(plan: dict[str, Any] | None) -> dict[str, Any]:
    """The plan without the attractions' city, which the recorded plans set differently and no check reads."""
    bare: dict[str, Any] = json.loads(json.dumps({"budget_summary": {}} | (plan or {})))
    for day in bare["daily_plans"]:
        for activity in day["activities"]:
            activity["details"].pop("city", None)
    return bare


@pytest.mark.data
def test_the_plan_printed_in_the_paper(official: Path) -> None:
    record = json.loads((official / "fixtures" / "en0_paper_example.json").read_text("utf-8"))
    assert without_city(parse_plan(extract_plan(record["plan_text"]))) == without_city(record["cases"][0]["plan"])


@pytest.mark.data
def test_official_plans(official: Path, official_records: Any) -> None:
    records = official_records("mini_world_official_verdicts.jsonl")
    oracles = [record for record in records if record["edit"] == "oracle"]
    assert oracles
    for record in oracles:
        text = (official / "mini_world" / "oracle" / f"id_{record['id']}.txt").read_text("utf-8")
        assert without_city(parse_plan(extract_plan(text))) == without_city(record["plan"])
    for record in records:
        for lang in ("en", "zh"):
            assert without_city(parse_plan(render_plan(record["plan"], lang))) == without_city(record["plan"])
