from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tip_exp.envs.deepplanning.data import find_databases, find_queries, load_tasks, read_table, task_folder
from tip_exp.utils.errors import DataError


@pytest.mark.parametrize("place", [".", "data", "travelplanning/data", "benchmark/deepplanning/travelplanning/data"])
def test_queries_are_found_wherever_a_release_keeps_them(place: str, world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "data", tmp_path / place, dirs_exist_ok=True)
    assert set(find_queries(tmp_path)) == {"en", "zh"}
    assert [task.id for task in load_tasks(tmp_path, "zh")] == ["0", "1"]


@pytest.mark.parametrize("place", [".", "database", "travelplanning/database"])
def test_databases_are_found_wherever_a_release_keeps_them(place: str, tmp_path: Path) -> None:
    (tmp_path / place / "database_zh" / "id_3").mkdir(parents=True)
    assert set(find_databases(tmp_path)) == {"zh"}
    assert task_folder(find_databases(tmp_path)["zh"], "3").name == "id_3"


def test_a_database_of_one_language_may_be_named_itself(world: Path) -> None:
    assert find_databases(world / "database" / "database_en") == {"en": world / "database" / "database_en"}


def test_a_task_holds_query_answers_and_length(world: Path) -> None:
    task = load_tasks(world, "en")[0]
    assert (task.id, task.lang, task.days) == ("0", "en", 2)
    assert task.query.startswith("Two of us go from Lindon")
    assert task.constraints["train_cheapest_direct"] == {"outbound_train_no": "G11"}


def test_cells_are_text_a_bom_is_no_text_and_a_missing_table_is_none(world: Path) -> None:
    folder = task_folder(find_databases(world)["en"], "1")
    (row,) = read_table(folder, "trains") or []
    assert row["origin_city"] == "Lindon" and row["price"] == "100"  # the first column would carry the BOM
    assert read_table(folder, "hotels") is None


def test_short_lines_end_in_none_and_long_ones_are_cut(tmp_path: Path) -> None:
    file = tmp_path / "hotels" / "hotels.csv"
    file.parent.mkdir()
    file.write_text('city,name,price\n\nX,"Inn, East"\nX,Hut,30,40\n', encoding="utf-8")
    assert read_table(tmp_path, "hotels") == [
        {"city": "X", "name": "Inn, East", "price": None},
        {"city": "X", "name": "Hut", "price": "30"},
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"city,name\nX,Inn\n", "no column 'price'"), (b"city,name,price\nX,\xff\xfe,3\n", "not a CSV in UTF-8")],
)
def test_an_unusable_table_names_its_file(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "hotels" / "hotels.csv"
    file.parent.mkdir()
    file.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_table(tmp_path, "hotels")
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("task_id", ["../id_0", "..", "a/b", "", "0\n", "C:\\x"])
def test_an_id_cannot_lead_out_of_the_database(task_id: str, world: Path) -> None:
    with pytest.raises(DataError, match="letters, digits"):
        task_folder(find_databases(world)["en"], task_id)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("{}", "a list of tasks expected, got dict"),
        ("[3]", "task 0: an object expected, got int"),
        ('[{"id": "0", "meta_info": {}}]', "'query' is missing"),
        ('[{"id": "0", "query": "q", "meta_info": {"days": 2}}]', "hard_constraints is missing"),
        ('[{"id": "0", "query": "q", "meta_info": {"hard_constraints": {}}}]', "days is missing"),
    ],
)
def test_a_wrong_query_file_says_where_and_what(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "travelplanning_query_en.json").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        load_tasks(tmp_path, "en")
    assert "travelplanning_query_en.json" in str(caught.value)


def test_empty_folders_and_absent_languages_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no travelplanning_query_en\.json"):
        find_queries(tmp_path)
    with pytest.raises(DataError, match="no database_en/"):
        find_databases(tmp_path)
    (tmp_path / "travelplanning_query_en.json").write_text("[]", encoding="utf-8")
    with pytest.raises(DataError, match=r"no travelplanning_query_zh\.json"):
        load_tasks(tmp_path, "zh")
    with pytest.raises(DataError, match="no known data fault is called 'x'; there are en79_budget"):
        load_tasks(tmp_path, "en", fixes=["x"])


def test_the_budget_of_task_79_is_mended_on_request_only(tmp_path: Path) -> None:
    meta = {"days": 2, "hard_constraints": {}, "budget_constraint": {"max_budget": 9}}
    records = [{"id": i, "query": "q", "meta_info": meta} for i in ("78", "79")]
    (tmp_path / "travelplanning_query_en.json").write_text(json.dumps(records), encoding="utf-8")
    kept = [list(task.constraints) for task in load_tasks(tmp_path, "en")]
    mended = [list(task.constraints) for task in load_tasks(tmp_path, "en", fixes=["en79_budget"])]
    assert kept == [[], []]
    assert mended == [[], ["budget_constraint"]]


def test_official_tasks(official: Path) -> None:
    english, chinese = load_tasks(official, "en"), load_tasks(official, "zh")
    assert [task.id for task in english] == [task.id for task in chinese] == [str(i) for i in range(120)]
    assert sum(len(task.constraints) for task in english) == 496
    assert sum(len(task.constraints) for task in chinese) == 497  # task 79's budget is where it belongs
    assert sum(len(task.constraints) for task in load_tasks(official, "en", ["en79_budget"])) == 497
