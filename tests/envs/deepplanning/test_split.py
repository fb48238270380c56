from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tip_exp.envs.deepplanning.data import Task, load_tasks
from tip_exp.envs.deepplanning.split import (
    SHIPPED_SPLIT,
    constraints_without_tools,
    no_tool_baseline,
    read_split,
    split_by_days,
    split_to_yaml,
)
from tip_exp.utils.errors import DataError


def tasks(num: int, lang: str = "en") -> list[Task]:
    """20 tasks per length as in the official data: ids 0 to 19 last 2 days, 20 to 39 last 3, …"""
    return [Task(str(i), lang, "", {"days": 2 + i // 20, "hard_constraints": {}}) for i in range(num)]


def test_every_trip_length_contributes_its_fraction_of_test_ids() -> None:
    split = split_by_days(tasks(120), 0.2, seed=7)
    assert len(split["test"]) == 24 and len(split["train"]) == 96
    assert sorted(int(i) // 20 for i in split["test"]) == [length for length in range(6) for _ in range(4)]
    assert {*split["train"], *split["test"]} == {str(i) for i in range(120)}
    assert list(split["test"]) == sorted(split["test"], key=int)


def test_the_draw_depends_only_on_seed_and_ids() -> None:
    split = split_by_days(tasks(120), 0.2, seed=0)
    assert split == split_by_days(tasks(120)[::-1] + tasks(120, "zh"), 0.2, seed=0)
    assert split != split_by_days(tasks(120), 0.2, seed=1)
    shorter = split_by_days(tasks(40), 0.2, seed=0)
    assert shorter["test"] == split["test"][:8]  # tasks of other lengths change nothing


def test_conflicting_languages_and_fractions_out_of_range_are_refused() -> None:
    with pytest.raises(DataError, match="task 0 lasts 2 days in one language and 3 in the other"):
        split_by_days([*tasks(1), Task("0", "zh", "", {"days": 3, "hard_constraints": {}})], 0.2, 0)
    with pytest.raises(DataError, match="between 0 and 1; got 1"):
        split_by_days(tasks(20), 1, 0)


def test_the_yaml_reads_back_equal() -> None:
    text = split_to_yaml(tasks(120), 0.2, 3)
    assert yaml.safe_load(text) == split_by_days(tasks(120), 0.2, 3)
    assert text.splitlines()[0].endswith("split --queries DIR --test-frac 0.2 --seed 3")


def test_answers_in_the_query_need_no_tool(world: Path) -> None:
    trip, second = load_tasks(world, "en")
    # in the query: the restaurant and both attractions, not the train number or the hotel; the budget always counts
    assert constraints_without_tools(trip) == [
        "restaurant_must_eat_named",
        "attraction_must_visit_named",
        "budget_constraint",
    ]
    assert constraints_without_tools(second) == ["attraction_top_rated_must_visit"]
    assert no_tool_baseline([trip, second]) == pytest.approx((3 / 5 + 1 / 2) / 2)
    chinese = load_tasks(world, "zh")
    assert no_tool_baseline(chinese) == pytest.approx((3 / 5 + 0 / 2) / 2)


@pytest.mark.data
def test_the_shipped_split_is_the_output_of_the_command(official: Path) -> None:
    both = [*load_tasks(official, "en"), *load_tasks(official, "zh")]
    assert SHIPPED_SPLIT.read_text(encoding="utf-8") == split_to_yaml(both, 0.2, 0)


def test_the_shipped_split_has_four_test_ids_of_each_length() -> None:
    split = read_split()
    assert split == split_by_days(tasks(120), 0.2, 0)
    assert len(split["test"]) == 24


@pytest.mark.data
def test_official_no_tool_baselines(official: Path) -> None:
    for lang, baseline, num_tasks in (("en", 0.08875, 40), ("zh", 0.11875, 51)):
        all_tasks = load_tasks(official, lang)
        assert no_tool_baseline(all_tasks) == pytest.approx(baseline)
        assert sum(bool(constraints_without_tools(task)) for task in all_tasks) == num_tasks
