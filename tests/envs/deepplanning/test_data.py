from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tip_exp.envs.deepplanning.data import find_databases, find_queries, load_tasks, read_table, task_folder
from tip_exp.utils.errors import DataError


@pytest.mark.parametrize("folder", [".", "data", "travelplanning/data", "benchmark/deepplanning/travelplanning/data"])
def test_queries_are_found_in_every_official_folder(folder: str, world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "data", tmp_path / folder, dirs_exist_ok=True)
    assert set(find_queries(tmp_path)) == {"en", "zh"}
    assert [task.id for task in load_tasks(tmp_path, "zh")] == ["0", "1"]


@pytest.mark.parametrize("folder", [".", "database", "travelplanning/database"])
def test_databases_are_found_in_every_official_folder(folder: str, tmp_path: Path) -> None:
    (tmp_path / folder / "database_zh" / "id_3").mkdir(parents=True)
    assert set(find_databases(tmp_path)) == {"zh"}
    assert task_folder(find_databases(tmp_path)["zh"], "3").name == "id_3"


def test_root_may_be_the_database_of_one_language(world: Path) -> None:
    assert find_databases(world / "database" / "database_en") == {"en": world / "database" / "database_en"}


def test_a_task_has_query_answers_and_length(world: Path) -> None:
    task = load_tasks(world, "en")[0]
    assert (task.id, task.lang, task.days) == ("0", "en", 2)
    assert task.query.startswith("Two of us go from Lindon")
    assert task.constraints["train_cheapest_direct"] == {"outbound_train_no": "G11"}


def test_cells_are_text_without_bom_and_a_missing_table_is_none(world: Path) -> None:
    folder = task_folder(find_databases(world)["en"], "1")
    (row,) = read_table(folder, "trains") or []
    assert row["origin_city"] == "Lindon" and row["price"] == "100"  # a BOM would be part of the first column's name
    assert read_table(folder, "hotels") is None


def test_short_lines_are_filled_with_empty_cells_and_long_ones_truncated(tmp_path: Path) -> None:
    file = tmp_path / "hotels" / "hotels.csv"
    file.parent.mkdir()
    file.write_text('city,name,price\n\nX,"Inn, East"\nX,Hut,30,40\n', encoding="utf-8")
    assert read_table(tmp_path, "hotels") == [
        {"city": "X", "name": "Inn, East", "price": ""},
        {"city": "X", "name": "Hut", "price": "30"},
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"city,name\nX,Inn\n", "no column 'price'"), (b"city,name,price\nX,\xff\xfe,3\n", "not a CSV in UTF-8")],
)
def test_an_unreadable_table_is_reported_with_its_file(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "hotels" / "hotels.csv"
    file.parent.mkdir()
    file.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_table(tmp_path, "hotels")
    assert str(file) in str(error.value)


@pytest.mark.parametrize("task_id", ["../id_0", "..", "a/b", "", "0\n", "C:\\x"])
def test_an_id_cannot_be_a_path_outside_the_database(task_id: str, world: Path) -> None:
    with pytest.raises(DataError, match="letters, digits"):
        task_folder(find_databases(world)["en"], task_id)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("{}", "expected a list of tasks, got dict"),
        ("[3]", "task 0: expected an object, got int"),
        ('[{"id": "0", "meta_info": {}}]', "'query' is missing"),
        ('[{"id": "0", "query": "q", "meta_info": {"days": 2}}]', "hard_constraints is missing"),
        ('[{"id": "0", "query": "q", "meta_info": {"hard_constraints": {}}}]', "days is missing"),
    ],
)
def test_a_malformed_query_file_is_reported_with_file_and_task(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "travelplanning_query_en.json").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message) as error:
        load_tasks(tmp_path, "en")
    assert "travelplanning_query_en.json" in str(error.value)


def test_missing_files_and_languages_are_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no travelplanning_query_en\.json"):
        find_queries(tmp_path)
    with pytest.raises(DataError, match="no database_en/"):
        find_databases(tmp_path)
    (tmp_path / "travelplanning_query_en.json").write_text("[]", encoding="utf-8")
    with pytest.raises(DataError, match=r"no travelplanning_query_zh\.json"):
        load_tasks(tmp_path, "zh")


@pytest.mark.data
def test_official_tasks(official: Path) -> None:
    english, chinese = load_tasks(official, "en"), load_tasks(official, "zh")
    assert [task.id for task in english] == [task.id for task in chinese] == [str(i) for i in range(120)]
    assert sum(len(task.constraints) for task in english) == 496
    assert (
        sum(len(task.constraints) for task in chinese) == 497
    )  # English task 79 has its budget outside hard_constraints
