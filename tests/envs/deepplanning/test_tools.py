from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tip_exp.envs.deepplanning.data import find_databases, task_folder
from tip_exp.envs.deepplanning.tools.sandbox import UPSTREAM_BUGS, TravelSandbox
from tip_exp.envs.deepplanning.tools.schemas import TOOLS, parameters, tool_schemas
from tip_exp.utils.errors import DataError

HERE = Path(__file__).parent
ANSWERS = [json.loads(line) for line in (HERE / "world" / "answers.jsonl").read_text("utf-8").splitlines()]
FOLDER = HERE / "world" / "database" / "database_en" / "id_0"
TRIP = {"origin": "Lindon", "destination": "Marwick", "depDate": "2025-11-12"}
STAY = {"destination": "Marwick", "checkinDate": "2025-11-12", "checkoutDate": "2025-11-13"}


@pytest.mark.parametrize("record", ANSWERS, ids=lambda r: f"{r['lang']}-{r['id']}-{r['tool']}")
def test_answers_equal_those_of_the_official_tools(record: dict[str, Any], world: Path) -> None:
    """answers.jsonl holds what the official tools print over the tables in world/."""
    folder = task_folder(find_databases(world)[record["lang"]], record["id"])
    assert TravelSandbox(folder, record["lang"]).call(record["tool"], record["args"]) == record["result"]


@pytest.mark.data
@pytest.mark.parametrize("lang", ["en", "zh"])
def test_official_answers(lang: str, official: Path, official_records: Any) -> None:
    database = find_databases(official / "mini_world")["en"]
    records = official_records(f"mini_world_tool_results_{lang}.jsonl")
    assert records
    for record in records:
        sandbox = TravelSandbox(task_folder(database, record["id"]), lang)
        assert sandbox.call(record["tool"], record["args"]) == record["result"], record["tool"]


def test_the_second_city_of_a_connection_comes_from_the_station_name() -> None:
    routes = json.loads(TravelSandbox(FOLDER, "en").call("query_train_info", TRIP))
    numbers = [[part["marketingTransportNo"] for name, part in r[0].items() if name != "price"] for r in routes]
    assert numbers == [["G11"], ["G13"], ["G21", "G22"]]  # routes 1, 10, 2: sorted as text
    assert routes[2][0]["Segment 2"]["depCityName"] == "Overton"
    assert routes[1][0]["Segment 1"]["Remaining Seats"] == "Available"  # an empty cell


def _first_line(answer: str) -> str:
    return json.loads(answer)["error"].split("\n")[0]


# bug, tool, arguments, text in the upstream answer, text in the corrected answer
BUGS = [
    (
        "flight_not_found",
        "query_flight_info",
        TRIP | {"depDate": "x"},
        "missing 1 required positional",
        "No flight info",
    ),
    (
        "hotel_city",
        "query_hotel_info",
        STAY | {"destination": "Lindon"},
        "Gull Inn",
        "No hotel information found in Lind",
    ),
    (
        "attraction_city",
        "recommend_attractions",
        {"city": "Lindon"},
        "Salt Museum",
        "No attraction recommendations found",
    ),
    ("empty_cells", "query_attraction_details", {"attraction_name": "Dune Park"}, "Address：nan\n", "Address：\n"),
    ("empty_cells", "query_restaurant_details", {"restaurant_name": "Gull Cafe"}, '"cuisine": NaN', '"cuisine": ""'),
    ("bad_json", "search_location", "{x", "'place_name' is a required property", "the arguments are not valid JSON"),
    ("schema_dump", "search_location", {}, "Failed validating", '{"error": "\'place_name\' is a required property"}'),
    ("restaurant_alias", "recommend_around_restaurants", {"latitude": "1", "longitude": "2"}, 'not found"}', "(1, 2)"),
    ("train_nesting", "query_train_info", TRIP, "[\n  [\n", "[\n  {\n"),
    ("route_order", "query_train_info", TRIP, "G13", "G22"),
]


@pytest.mark.parametrize(("bug", "tool", "arguments", "upstream", "corrected"), BUGS)
def test_upstream_bugs_are_kept_unless_corrected(
    bug: str, tool: str, arguments: Any, upstream: str, corrected: str
) -> None:
    before = TravelSandbox(FOLDER, "en").call(tool, arguments)
    after = TravelSandbox(FOLDER, "en", corrected=[bug]).call(tool, arguments)
    assert upstream in before and corrected in after and before != after


def test_corrected_route_order_sorts_numbers() -> None:
    routes = json.loads(TravelSandbox(FOLDER, "en", corrected=["route_order"]).call("query_train_info", TRIP))
    assert [r[0]["Segment 1"]["marketingTransportNo"] for r in routes] == ["G11", "G21", "G13"]  # routes 1, 2, 10


def test_every_upstream_bug_is_tested() -> None:
    assert {bug for bug, *_ in BUGS} == set(UPSTREAM_BUGS)


def test_arguments_may_be_json_text_even_nested() -> None:
    sandbox = TravelSandbox(FOLDER, "en")
    plain = sandbox.call("search_location", {"place_name": "Dune Park"})
    text = json.dumps({"place_name": "Dune Park"})
    assert sandbox.call("search_location", text) == plain
    assert sandbox.call("search_location", json.dumps(text)) == plain
    assert sandbox.call("search_location", json.dumps(f"```json\n{text}\n```")) == plain
    assert (
        _first_line(sandbox.call("search_location", '"Dune Park"')) == "Parameters must be formatted as a valid JSON!"
    )
    for arguments in (None, "", "not json", "[" * 100_000):
        assert _first_line(sandbox.call("search_location", arguments)) == "'place_name' is a required property"


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from([*TOOLS, "recommend_around_restaurants", "", "__init__", "call"]) | JSON_VALUES
PARAMETERS = st.sampled_from(sorted({name for tool in TOOLS.values() for name in (*tool.required, *tool.optional)}))
ARGUMENTS = st.dictionaries(PARAMETERS, JSON_VALUES | st.text(), max_size=5) | JSON_VALUES


@pytest.fixture(scope="module")
def sandbox() -> TravelSandbox:
    return TravelSandbox(FOLDER, "zh")


@given(name=NAMES, arguments=ARGUMENTS)
def test_any_call_gets_an_answer(sandbox: TravelSandbox, name: Any, arguments: Any) -> None:
    check_call(sandbox, name, arguments)


PATHS = ["../../../../../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "{0.__class__}", "$(id)", "%n%s", "\x00"]
ESCAPES = st.sampled_from(
    [*PATHS, "__import__('os').system('id')", "'; DROP TABLE x; --", "nan", "9" * 5000, "[" * 5000]
)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, database=None)
@given(name=st.sampled_from([*TOOLS]), arguments=st.dictionaries(PARAMETERS, ESCAPES | JSON_VALUES, max_size=5))
def test_ten_thousand_hostile_calls_get_an_answer(sandbox: TravelSandbox, name: str, arguments: Any) -> None:
    check_call(sandbox, name, arguments)


def check_call(sandbox: TravelSandbox, name: Any, arguments: Any) -> None:
    answer = sandbox.call(name, arguments)
    assert "root:" not in answer and "uid=" not in answer, "an escape from the tables"
    assert isinstance(answer, str)
    answer.encode("utf-8")  # a lone surrogate would break the tokenizer
    assert answer == sandbox.call(name, arguments), "calls must not change state"


def test_a_lone_surrogate_is_replaced() -> None:
    assert "location ?," in TravelSandbox(FOLDER, "en").call("search_location", '{"place_name": "\\ud800"}')


def rewritten(tmp_path: Path, table: str, *edits: tuple[str, str]) -> TravelSandbox:
    """A sandbox over a copy of the tables with one file edited as text."""
    shutil.copytree(FOLDER, tmp_path / "id_0")
    file = tmp_path / "id_0" / table
    text = file.read_text("utf-8")
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    file.write_text(text, encoding="utf-8")
    return TravelSandbox(tmp_path / "id_0", "en")


def test_a_faulty_row_gives_an_error_answer(tmp_path: Path) -> None:
    answer = rewritten(tmp_path, "trains/trains.csv", (",60,", ",an hour,")).call("query_train_info", TRIP)
    assert answer == '{"error": "invalid literal for int() with base 10: \'an hour\'"}'


def test_a_non_numeric_fare_is_0_and_an_empty_one_nan(tmp_path: Path) -> None:
    sandbox = rewritten(tmp_path, "trains/trains.csv", (",9,100,1,1", ",9,cheap,1,1"), (",,120,1,10", ",,,1,10"))
    prices = [route[0]["price"] for route in json.loads(sandbox.call("query_train_info", TRIP))]
    assert prices[0] == 0 and prices[1] != prices[1] and prices[2] == 90.0


def test_the_first_of_two_rows_for_a_road_counts(tmp_path: Path) -> None:
    road = '"30.000001,120.000010","30.030000,120.030000",'
    sandbox = rewritten(
        tmp_path, "transportation/distance_matrix.csv", (f"{road}5000,15,20\n", f"{road}1,2,3\n{road}4,5,6\n")
    )
    answer = sandbox.call("query_road_route_info", {"origin": road[1:21], "destination": road[24:44]})
    assert json.loads(answer)["distance_in_meters"] == 1


def test_segments_without_a_number_are_last(tmp_path: Path) -> None:
    sandbox = rewritten(tmp_path, "trains/trains.csv", (",4,90,1,2", ",4,90,,2"))
    route = json.loads(sandbox.call("query_train_info", TRIP))[2][0]
    assert [route[f"Segment {i}"]["marketingTransportNo"] for i in (1, 2)] == ["G22", "G21"]


def test_a_table_is_read_once_on_first_use(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "id_0")
    sandbox = TravelSandbox(tmp_path / "id_0", "en")
    before = sandbox.call("search_location", {"place_name": "Dune Park"})
    shutil.rmtree(tmp_path / "id_0")
    assert sandbox.call("search_location", {"place_name": "Dune Park"}) == before
    assert sandbox.call("query_hotel_info", STAY) == "Database not loaded"  # was not read before


def test_unknown_bugs_are_refused() -> None:
    with pytest.raises(DataError, match="unknown upstream bug 'hotels'"):
        TravelSandbox(FOLDER, "en", corrected=["hotels"])


def test_schemas_describe_every_tool() -> None:
    for lang in ("en", "zh"):
        functions = [schema["function"] for schema in tool_schemas(lang)]
        assert [function["name"] for function in functions] == list(TOOLS)
        assert all(function["description"] for function in functions)


@pytest.mark.data
@pytest.mark.parametrize("lang", ["en", "zh"])
def test_parameters_are_the_official_ones(lang: str, official: Path) -> None:
    schemas = json.loads((official / f"tool_schema_{lang}.json").read_text("utf-8"))
    expected = {s["function"]["name"]: json.dumps(s["function"]["parameters"]) for s in schemas}
    assert {name: json.dumps(parameters(name, lang)) for name in TOOLS} == expected
