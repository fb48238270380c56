"""The travel environment: errands and generated trips played by scripts, and the prompts."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Barrier
from unittest.mock import Mock

import pytest
from tests.envs.deepplanning import trips
from tests.envs.deepplanning.render import render_plan
from transformers import AutoTokenizer

from scripts.make_pairs.scripted import Policy, ScriptedSampler, respond
from tip_exp.config.schema import AgentConfig, RunConfig
from tip_exp.data.load import load
from tip_exp.envs.base import Call
from tip_exp.envs.chat import Chat
from tip_exp.envs.deepplanning import errands
from tip_exp.envs.deepplanning.data import Task, find_databases, load_tasks, task_folder
from tip_exp.envs.deepplanning.environment import TravelEnvironment
from tip_exp.envs.deepplanning.plan.parse import extract_plan, parse_plan
from tip_exp.envs.deepplanning.plan.schema import cities_of
from tip_exp.envs.deepplanning.prompts import COMPACT_PROMPTS, official_prompt
from tip_exp.envs.deepplanning.score.score import score_plan
from tip_exp.envs.deepplanning.score.tables import TaskTables
from tip_exp.envs.deepplanning.split import no_tool_baseline
from tip_exp.envs.episodes import Episode, play
from tip_exp.types import Sampling
from tip_exp.utils.errors import ConfigError, DataError
from tip_exp.utils.paths import resolve_model

NUM_TRIPS = 24
LIMITS = AgentConfig(
    max_turns=10,
    max_calls_per_turn=8,
    surplus_calls="tell",
    max_observation=None,
    observation_unit="tokens",
    observation_cut="rows",
    max_train_tokens=None,
)


@pytest.fixture(scope="module")
def trips_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("generated") / "trips"
    errands.write(root, [trips.make(number, 0)[0] for number in range(NUM_TRIPS)])
    return root


@pytest.fixture(scope="module")
def errands_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("generated") / "errands"
    errands.write(root, errands.stream("test", 60))
    return root


def oracle(task: Task) -> str:
    return trips.make(int(task.id), 0)[1]


def played(root: Path, policy: Policy, *, system: str = "", schemas: bool = False) -> list[Episode]:
    chat = Chat(AutoTokenizer.from_pretrained(resolve_model("package:tiny/student")))
    make = partial(TravelEnvironment, find_databases(root), {"en": system}, show_schemas=schemas)
    sampling = Sampling(1, 1.0, 1.0, 0, 100_000)
    return play(ScriptedSampler(policy, chat), load_tasks(root, "en"), make, chat, sampling, LIMITS, seed=0)


def mean_fraction(episodes: list[Episode]) -> float:
    return sum(episode.score["fraction"] for episode in episodes) / len(episodes)


def copy_the_query(history: str) -> str:
    """A policy without tool calls: a plan with only the attraction that the query names."""
    named = history.partition("Must see: ")[2].partition(".")[0]
    return f"<plan>\nDay 1:\n09:00-11:00 | attraction | {named}\n</plan>"


def test_oracle_plans_pass_every_check_and_constraint(trips_root: Path) -> None:
    database = find_databases(trips_root)["en"]
    for task in load_tasks(trips_root, "en"):
        plan = parse_plan(extract_plan(oracle(task)))
        assert plan is not None and render_plan(plan) == oracle(task)
        score = score_plan(plan, task.meta, TaskTables.load(task_folder(database, task.id)))
        assert all(score.commonsense.values()) and len(score.commonsense) == 21, (task.id, score.commonsense)
        assert all(score.constraints.values()), (task.id, score.constraints)
        assert score.case_acc == 1.0


def test_the_same_seed_writes_the_same_files(tmp_path: Path, errands_root: Path) -> None:
    same, different = tmp_path / "same", tmp_path / "different"
    errands.write(same, errands.stream("test", 60))
    errands.write(different, errands.stream("train", 60))
    files = sorted(path.relative_to(errands_root) for path in errands_root.rglob("*.*") if path.is_file())
    assert len(files) == 60 * 2 + 1
    assert all((errands_root / file).read_bytes() == (same / file).read_bytes() for file in files)
    queries = [(root / "data" / "travelplanning_query_en.json").read_bytes() for root in (errands_root, different)]
    assert queries[0] != queries[1]
    errands.write(same, errands.stream("train", 60))  # other files are replaced
    assert (same / "data" / "travelplanning_query_en.json").read_bytes() == queries[1]
    assert not list(tmp_path.glob(".*"))


def damage(root: Path, how: str) -> None:
    table = root / "database" / "database_en" / "id_3" / "hotels" / "hotels.csv"
    if how == "a deleted table":
        table.unlink()
    elif how == "a changed table":
        table.write_bytes(table.read_bytes().replace(b"2", b"3"))
    elif how == "a further file":
        (root / "database" / "database_en" / "id_3" / "trains.csv").write_text("x")
    elif how == "a linked table":
        copy = root.with_name("copy.csv")
        table.rename(copy)
        table.symlink_to(copy)
    else:  # the whole world is a link to another, which must stay as it is
        root.rename(root.with_name("elsewhere"))
        root.symlink_to("elsewhere")


@pytest.mark.parametrize(
    "how", ["a deleted table", "a changed table", "a further file", "a linked table", "a link in its place"]
)
def test_a_damaged_world_is_written_again(tmp_path: Path, how: str) -> None:
    root = tmp_path / "world"
    digests = errands.write(root, errands.stream("test", 5))
    files = {path: path.read_bytes() for path in root.rglob("*.*") if path.is_file()}
    assert len(digests) == 10
    damage(root, how)
    assert errands.write(root, errands.stream("test", 5)) == digests
    assert not root.is_symlink()
    assert {path: path.read_bytes() for path in root.rglob("*.*") if not path.is_dir()} == files
    assert not any(path.is_symlink() for path in root.rglob("*"))
    assert (tmp_path / "elsewhere").is_dir() == (how == "a link in its place")


@pytest.mark.parametrize("how", ["nothing there", "a deleted table", "a changed table", "a link in its place"])
def test_several_writers_meet_a_damaged_world(tmp_path: Path, how: str) -> None:
    root = tmp_path / "folder" / "world"
    tasks = errands.stream("test", 5)
    if how != "nothing there":
        errands.write(root, tasks)
        damage(root, how)
    start = Barrier(8)

    def write_and_read() -> None:
        start.wait()
        for path, digest in errands.write(root, tasks).items():
            assert hashlib.sha256(path.read_bytes()).hexdigest() == digest

    with ThreadPoolExecutor(8) as pool:
        for written in [pool.submit(write_and_read) for _ in range(8)]:
            written.result()
    assert not root.is_symlink()
    assert {path.name for path in root.parent.iterdir()} - {"elsewhere"} == {"world"}
    assert errands.write(root, tasks).keys() == {path for path in root.rglob("*.csv")}


def test_a_world_that_cannot_be_replaced_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "world"
    root.mkdir()
    monkeypatch.setattr(Path, "rename", Mock(side_effect=PermissionError("not yours")))
    with pytest.raises(PermissionError, match="not yours"):
        errands.write(root, errands.stream("test", 1))
    assert list(tmp_path.iterdir()) == [root]


@pytest.mark.parametrize("how", ["a deleted table", "a changed table"])
def test_a_table_that_changes_during_a_run_ends_it(tmp_path: Path, how: str) -> None:
    root = tmp_path / "world"
    digests = errands.write(root, errands.stream("test", 5))
    environment = TravelEnvironment(find_databases(root), {}, digests=digests)
    tasks = load_tasks(root, "en")
    damage(root, how)
    assert environment.reset(tasks[2]).messages
    with pytest.raises(DataError, match=r"id_3/hotels/hotels\.csv has changed since the run started"):
        environment.reset(tasks[3])


def test_generated_worlds_are_in_a_folder_of_this_user_alone(
    compose_run: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    config = compose_run("data=mini_travel", "agent=default", "data.train.num_problems=2").data.train
    load(config)
    (folder,) = tmp_path.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    load(config)
    assert folder.stat().st_mode & 0o777 == 0o700
    shutil.rmtree(folder)
    (tmp_path / "theirs").mkdir()
    folder.symlink_to("theirs")
    with pytest.raises(ConfigError, match="is a link or belongs to another user; set TMPDIR"):
        load(config)


def test_another_version_of_the_generator_leaves_the_world_of_a_live_run(
    compose_run: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    config = compose_run("data=mini_travel", "agent=default", "data.train.num_problems=2").data.train
    sources = [load(config).source, load(config).source]
    files = {path: path.read_bytes() for path in Path(sources[0]).rglob("*.*")}
    monkeypatch.setattr(errands, "HOTELS", ("Hostel",))
    sources.append(load(config).source)
    assert sources[0] == sources[1] != sources[2]
    assert {path: path.read_bytes() for path in Path(sources[0]).rglob("*.*")} == files


def test_scripted_policies_score_as_computed(errands_root: Path) -> None:
    assert no_tool_baseline(load_tasks(errands_root, "en")) == pytest.approx(1 / 3)
    episodes = played(errands_root, respond)
    assert mean_fraction(episodes) == 1.0
    assert {(episode.turns, episode.calls, episode.stop) for episode in episodes} == {(3, 2, "final")}
    assert mean_fraction(played(errands_root, copy_the_query)) == pytest.approx(1 / 3)
    # a look-up is skipped with probability 0.85: 1/3 + 2/3 * 0.15 = 0.43, and a guess is right once in 64
    assert mean_fraction(played(errands_root, partial(respond, slip=0.85))) == pytest.approx(0.43, abs=0.1)


def test_a_trip_with_tools_end_to_end(trips_root: Path) -> None:
    tasks = {task.query: task for task in load_tasks(trips_root, "en")}

    def policy(history: str) -> str:
        task = next(task for query, task in tasks.items() if query in history)
        if "<tool_response>" in history:
            return f"<think>Now I know.</think>\n{oracle(task)}"
        arguments = {"origin": task.meta["org"], "destination": task.meta["dest"][0], "depDate": "2025-11-12"}
        calls = [("query_train_info", arguments), ("query_flight_info", arguments), ("recommend_attractions", {})]
        texts = [json.dumps({"name": name, "arguments": arguments}) for name, arguments in calls]
        return "".join(f"<tool_call>\n{text}\n</tool_call>" for text in texts)

    episodes = played(trips_root, policy, system=COMPACT_PROMPTS["en"], schemas=True)
    assert [episode.score["fraction"] for episode in episodes] == [1.0] * NUM_TRIPS
    assert all(episode.score["personalized"] == episode.score["delivered"] == 1.0 for episode in episodes)
    assert {episode.calls for episode in episodes} == {3}


def test_tools_answer_over_a_generated_trip(trips_root: Path) -> None:
    environment = TravelEnvironment(find_databases(trips_root), {})
    start = environment.reset(load_tasks(trips_root, "en")[0])
    assert len(start.tools) == 9 and [m["role"] for m in start.messages] == ["user"]
    stay = {"destination": "x", "checkinDate": "x", "checkoutDate": "x"}
    hotels, unknown = environment.step([Call("query_hotel_info", stay), Call("fly_to_moon", {})])
    assert len(json.loads(hotels)) == 6
    assert json.loads(unknown) == {"error": "tool 'fly_to_moon' not found"}


def test_an_undelivered_plan_satisfies_nothing(errands_root: Path) -> None:
    for text in ("no plan", "<plan>nothing</plan>", "<think><plan>Day 1:\n</plan>"):
        scores = [episode.score for episode in played(errands_root, lambda history, text=text: text)]
        assert all(score["fraction"] == score["delivered"] == 0.0 for score in scores)


def test_official_prompts_are_read_without_executing_the_file(tmp_path: Path) -> None:
    path = tmp_path / "travelplanning" / "agent" / "prompts.py"
    path.parent.mkdir(parents=True)
    path.write_text('raise SystemExit\nSYSTEM_PROMPT_EN = """Plan."""\nSYSTEM_PROMPT_ZH = f"{1}"\n', encoding="utf-8")
    assert official_prompt(tmp_path, "en") == "Plan."
    with pytest.raises(ValueError, match="no string constant SYSTEM_PROMPT_ZH"):
        official_prompt(tmp_path, "zh")
    with pytest.raises(ValueError, match=r"no official prompts in"):
        official_prompt(tmp_path / "travelplanning", "en")


def test_compact_prompts_show_a_plan_that_can_be_parsed() -> None:
    for lang in ("en", "zh"):
        plan = parse_plan(COMPACT_PROMPTS[lang])
        assert plan is not None and plan["daily_plans"][0]["day_number"] == 1
        assert "from A to B" in COMPACT_PROMPTS[lang] and cities_of(plan["daily_plans"][0]) == ("A", "B")


def test_each_language_needs_its_tables(
    compose_run: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: Path
) -> None:
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "database" / "database_zh")
    monkeypatch.setattr("tip_exp.data.tool_tasks.read_split", lambda: {"train": ["0"], "test": ["1"]})
    overrides = ["data=deepplanning", f"data.root={tmp_path}", "learner.micro_batch_tokens=32768"]
    with pytest.raises(
        DataError, match=r"data\.train\.langs=\['en', 'zh'\]: there is no folder database_zh beside .*en;"
    ):
        load(compose_run(*overrides).data.train)
    assert load(compose_run(*overrides, "data.train.langs=[en]").data.train).tools is not None
