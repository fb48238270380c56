"""The generated tasks, held against the package's own tools and scorer: oracles are right, floors are what they say."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tip_exp.config.schema import AgentConfig
from tip_exp.envs.base import Call
from tip_exp.envs.chat import Chat
from tip_exp.envs.deepplanning.data import Task, find_databases, load_tasks, read_table, task_folder
from tip_exp.envs.deepplanning.environment import TravelEnvironment
from tip_exp.envs.deepplanning.mini import errands
from tip_exp.envs.deepplanning.mini import files as mini_files
from tip_exp.envs.deepplanning.mini import trips as mini_world
from tip_exp.envs.deepplanning.plan.parse import extract_plan, parse_plan, render_plan
from tip_exp.envs.deepplanning.prompts import compact_prompt, official_prompt
from tip_exp.envs.deepplanning.score.constraints import answers
from tip_exp.envs.deepplanning.score.score import score_in_world
from tip_exp.envs.deepplanning.score.tables import World
from tip_exp.envs.deepplanning.split import no_tool_floor
from tip_exp.envs.episodes import Episode, play
from tip_exp.envs.scripted import Policy, ScriptedSampler
from tip_exp.types import Sampling
from tip_exp.utils.paths import resolve_model

NUM_TRIPS = 24
LIMITS = AgentConfig(
    label="test",
    max_turns=10,
    max_turn_tokens=None,
    max_calls_per_turn=8,
    surplus_calls="tell",
    max_observation=None,
    observation_unit="tokens",
    observation_cut="rows",
    max_train_tokens=None,
)


@pytest.fixture(scope="module")
def trips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mini") / "trips"
    mini_files.write(root, (mini_world.make(number, 0) for number in range(NUM_TRIPS)))
    return root


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mini") / "errands"
    mini_files.write(root, errands.stream("test", 60))
    return root


def oracle(root: Path, task: Task) -> str:
    return (root / "oracle" / f"id_{task.id}.txt").read_text(encoding="utf-8")


def played(root: Path, policy: Policy, *, system: str = "", schemas: bool = False) -> list[Episode]:
    chat = Chat(AutoTokenizer.from_pretrained(resolve_model("package:tiny/student")))
    make = partial(TravelEnvironment, find_databases(root), {"en": system}, show_schemas=schemas)
    sampling = Sampling(1, 1.0, 1.0, 0, 100_000)
    return play(ScriptedSampler(policy, chat), load_tasks(root, "en"), make, chat, sampling, LIMITS, seed=0)


def mean_fraction(episodes: list[Episode]) -> float:
    return sum(episode.score["fraction"] for episode in episodes) / len(episodes)


def test_oracle_plans_pass_every_check_and_constraint(trips: Path) -> None:
    database = find_databases(trips)["en"]
    for task in load_tasks(trips, "en"):
        plan = parse_plan(extract_plan(oracle(trips, task)))
        assert plan is not None and render_plan(plan) == oracle(trips, task)
        score = score_in_world(plan, task.meta, World.load(task_folder(database, task.id)))
        assert all(score.commonsense.values()) and len(score.commonsense) == 21, (task.id, score.commonsense)
        assert all(score.personalized.constraints.values()), (task.id, score.personalized.constraints)
        assert score.case_acc == 1.0


def test_trips_show_many_kinds_and_one_lacks_a_table(trips: Path) -> None:
    tasks = load_tasks(trips, "en")
    assert {task.days for task in tasks} == {2, 3, 4}
    assert len({key for task in tasks for key in task.constraints}) == 16
    database = find_databases(trips)["en"]
    without = [read_table(task_folder(database, task.id), "flights") is None for task in tasks]
    assert sum(without) == NUM_TRIPS // 4


BEST: dict[str, tuple[str, str, Callable[[list[float]], float]]] = {
    "hotel_highest_rated": ("hotels", "score", max),
    "hotel_newest_decoration": ("hotels", "decoration_time", max),
    "train_cheapest_direct": ("trains", "price", min),
    "flight_cheapest_direct": ("flights", "price", min),
}
NAMES = {"hotels": "name", "trains": "train_no", "flights": "flight_no"}


def test_answers_are_the_only_ones(trips: Path) -> None:
    database, found = find_databases(trips)["en"], 0
    for task in load_tasks(trips, "en"):
        for key in BEST.keys() & task.constraints.keys():
            table, column, best = BEST[key]
            rows = read_table(task_folder(database, task.id), table) or []
            rows = [row for row in rows if row.get("origin_city", task.meta["org"]) == task.meta["org"]]
            values = [float(row[column] or "") for row in rows]
            winners = [row[NAMES[table]] for row, value in zip(rows, values, strict=True) if value == best(values)]
            assert winners == list(answers(task.constraints[key])), (task.id, key)
            found += 1
    assert found >= 20


def test_the_same_seed_gives_the_same_files(tmp_path: Path, small: Path) -> None:
    again, other = tmp_path / "again", tmp_path / "other"
    mini_files.write(again, errands.stream("test", 60))
    mini_files.write(other, errands.stream("train", 60))
    files = sorted(path.relative_to(small) for path in small.rglob("*.*") if path.is_file())
    assert len(files) == 60 * 3 + 1
    assert all((small / file).read_bytes() == (again / file).read_bytes() for file in files)
    queries = [(root / "data" / "travelplanning_query_en.json").read_bytes() for root in (small, other)]
    assert queries[0] != queries[1]
    mini_files.write(again, errands.stream("train", 60))  # what is there stays
    assert (again / "data" / "travelplanning_query_en.json").read_bytes() == queries[0]
    assert not list(tmp_path.glob(".*"))


def test_scripts_reach_the_ceiling_and_the_floor(small: Path) -> None:
    tasks = load_tasks(small, "en")
    assert no_tool_floor(tasks) == pytest.approx(1 / 3)
    episodes = played(small, errands.respond)
    assert mean_fraction(episodes) == 1.0
    assert {(episode.turns, episode.calls, episode.stop) for episode in episodes} == {(3, 2, "final")}
    copied = played(small, errands.copy_the_query)
    assert mean_fraction(copied) == pytest.approx(1 / 3)
    # a lookup is left out with probability 0.85: 1/3 + 2/3 * 0.15 = 0.43, and a guess is right once in 64
    assert mean_fraction(played(small, partial(errands.respond, slip=0.85))) == pytest.approx(0.43, abs=0.1)


def test_a_trip_with_tools_end_to_end(trips: Path) -> None:
    plans = {task.query: oracle(trips, task) for task in load_tasks(trips, "en")}
    queries = {task.query: task for task in load_tasks(trips, "en")}

    def policy(history: str) -> str:
        query = next(query for query in plans if query in history)
        if "<tool_response>" in history:
            return f"<think>Now I know.</think>\n{plans[query]}"
        meta = queries[query].meta
        arguments = {"origin": meta["org"], "destination": meta["dest"][0], "depDate": meta["depart_date"]}
        calls = [("query_train_info", arguments), ("query_flight_info", arguments), ("recommend_attractions", {})]
        marks = [json.dumps({"name": name, "arguments": given}) for name, given in calls]
        return "".join(f"<tool_call>\n{mark}\n</tool_call>" for mark in marks)

    episodes = played(trips, policy, system=compact_prompt("en"), schemas=True)
    assert [episode.score["fraction"] for episode in episodes] == [1.0] * NUM_TRIPS
    assert all(episode.score["personalized"] == episode.score["delivered"] == 1.0 for episode in episodes)
    assert {episode.calls for episode in episodes} == {3}


def test_tools_answer_over_a_generated_trip(trips: Path) -> None:
    (task, *_) = load_tasks(trips, "en")
    environment = TravelEnvironment(find_databases(trips), {})
    start = environment.reset(task)
    assert len(start.tools) == 9 and [m["role"] for m in start.messages] == ["user"]
    hotels, unknown = environment.step(
        [
            Call("query_hotel_info", {"destination": "x", "checkinDate": "x", "checkoutDate": "x"}),
            Call("fly_to_moon", {}),
        ]
    )
    assert len(json.loads(hotels)) == 6
    assert json.loads(unknown) == {"error": "tool 'fly_to_moon' not found"}


def test_an_undelivered_plan_counts_nothing(small: Path) -> None:
    for text in ("no plan", "<plan>nothing</plan>", "<think><plan>Day 1:\n</plan>"):
        scores = [episode.score for episode in played(small, lambda history, text=text: text)]
        assert all(score["fraction"] == score["delivered"] == 0.0 for score in scores)


def test_official_prompts_are_read_not_run(tmp_path: Path) -> None:
    path = tmp_path / "travelplanning" / "agent" / "prompts.py"
    path.parent.mkdir(parents=True)
    path.write_text('raise SystemExit\nSYSTEM_PROMPT_EN = """Plan."""\nSYSTEM_PROMPT_ZH = f"{1}"\n', encoding="utf-8")
    assert official_prompt(tmp_path, "en") == "Plan."
    with pytest.raises(ValueError, match="no text called SYSTEM_PROMPT_ZH"):
        official_prompt(tmp_path, "zh")
    with pytest.raises(ValueError, match=r"no official prompts in"):
        official_prompt(tmp_path / "travelplanning", "en")


def test_compact_prompts_show_a_plan_that_is_read() -> None:
    for lang in ("en", "zh"):
        plan = parse_plan(compact_prompt(lang))
        assert plan is not None and plan["daily_plans"][0]["day_number"] == 1
