from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tip_exp.envs.deepplanning.__main__ import main
from tip_exp.envs.deepplanning.data import load_tasks
from tip_exp.envs.deepplanning.split import split_to_yaml

KEYS = ["constraints", "passed", "total", "fraction", "personalized_score"]
WITH_TABLES = [*KEYS, "commonsense", "commonsense_score", "composite_score", "case_acc"]


@pytest.fixture
def lines(tmp_path: Path) -> Any:
    """Writes records (or raw lines) to a file and returns its path."""

    def write(*records: Any) -> str:
        file = tmp_path / "in.jsonl"
        file.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records), encoding="utf-8")
        return str(file)

    return write


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a subcommand: exit code, printed objects, stderr."""

    def run(*args: str) -> tuple[int, list[dict[str, Any]], str]:
        monkeypatch.setattr(sys, "argv", ["deepplanning", *args])
        code: Any = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code
        out, err = capsys.readouterr()
        return code, [json.loads(line) for line in out.splitlines()], err

    return run


@pytest.mark.parametrize("queries", [".", "data"])
@pytest.mark.parametrize("database", [".", "database"])
def test_scores_of_text_in_both_languages(queries: str, database: str, world: Path, lines: Any, command: Any) -> None:
    texts = {lang: (world / f"plan_{lang}.txt").read_text("utf-8") for lang in ("en", "zh")}
    inner = texts["en"].replace("<plan>", "").replace("</plan>", "")
    file = lines(
        {"lang": "en", "id": "0", "plan": texts["en"]},
        {"lang": "zh", "id": 0, "plan": f"<think>…</think>{texts['zh']}"},
        "",
        {"lang": "en", "id": "id_0", "plan": inner},
        {"lang": "en", "id": "0", "plan": None},
        {"lang": "en", "id": "0", "plan": "I could not find one."},
    )
    code, scores, _ = command("score", file, "--queries", str(world / queries), "--database", str(world / database))
    assert code == 0
    assert all(list(score) == WITH_TABLES for score in scores)
    assert [(score["passed"], score["total"]) for score in scores] == [(5, 5), (5, 5), (5, 5), (0, 5), (0, 5)]
    assert [score["case_acc"] for score in scores] == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_scores_of_json_need_no_tables(world: Path, lines: Any, command: Any) -> None:
    plan = {"daily_plans": [{"activities": [{"type": "meal", "details": {"name": "Pier Noodles - Old Port"}}]}]}
    code, (score,), err = command("score", lines({"lang": "en", "id": "0", "plan": plan}), "--queries", str(world))
    assert (code, err) == (0, "")
    assert list(score) == KEYS
    assert (score["passed"], score["fraction"], score["personalized_score"]) == (2, 0.4, 0.0)  # the meal and the budget
    assert score["constraints"]["restaurant_must_eat_named"] is True


def test_answers_to_calls(world: Path, command: Any) -> None:
    code, answers, _ = command("call", str(world / "answers.jsonl"), "--database", str(world))
    recorded = [json.loads(line) for line in (world / "answers.jsonl").read_text("utf-8").splitlines()]
    assert code == 0
    assert answers == [{"result": record["result"]} for record in recorded]


def test_tables_of_the_other_language_are_used_with_a_note(world: Path, lines: Any, command: Any) -> None:
    call = {"id": "0", "tool": "search_location", "args": {"place_name": "Nowhere"}}
    english = str(world / "database" / "database_en")
    code, (chinese, plain), err = command("call", lines(call | {"lang": "zh"}, call), "--database", english)
    assert code == 0 and "has no tables in zh; using those in en" in err
    assert chinese["result"].startswith("未找到地点 Nowhere") and plain["result"].startswith("Coordinate information")


SCORE = {"lang": "en", "id": "0", "plan": None}
CALL = {"lang": "en", "id": "0", "tool": "search_location", "args": {}}


def without(record: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != key}


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("score", "{", "not JSON in UTF-8"),
        ("score", "[1]", "expected an object; got list"),
        ("score", SCORE | {"lang": "fr"}, "'lang' must be en or zh; got 'fr'"),
        ("score", without(SCORE, "lang"), "'lang' must be en or zh; got none"),
        ("score", without(SCORE, "id"), "'id' must be a task id such as \"0\"; got None"),
        ("score", SCORE | {"id": "../0"}, "letters, digits, - and _; got '../0'"),
        ("score", SCORE | {"id": "7"}, "no task '7' among the 2 of en"),
        ("score", SCORE | {"id": True}, "got True"),
        ("score", without(SCORE, "plan"), "'plan' is missing; expected an object, text or null"),
        ("score", SCORE | {"plan": [1]}, "'plan' must be an object, text or null; got list"),
        ("call", without(CALL, "tool"), "'tool' must be the name of a tool; got None"),
        ("call", without(CALL, "args"), "'args' is missing"),
        ("call", CALL | {"id": "7"}, "no folder id_7/ in"),
    ],
)
def test_a_wrong_line_stops_the_command_with_a_one_line_error(
    name: str, record: Any, message: str, world: Path, lines: Any, command: Any
) -> None:
    valid = SCORE if name == "score" else CALL
    file = lines(valid, record)
    folders = ["--queries", str(world)] if name == "score" else ["--database", str(world)]
    code, printed, err = command(name, file, *folders)
    assert code == 2 and printed == []  # not even the valid line: the whole file is checked first
    assert err.count("\n") == 1 and message in err
    assert err.startswith("error: ") and (f"{file}, line 2: " in err or "id_7" in err)


@pytest.mark.parametrize("module", ["tip_exp.deepplanning", "tip_exp.envs.deepplanning"])
def test_an_error_is_an_exit_code_of_the_process(module: str, tmp_path: Path, world: Path) -> None:
    line = [sys.executable, "-m", module, "score", str(tmp_path / "none.jsonl"), "--queries", str(world)]
    process = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert process.returncode == 1 and process.stderr.startswith("error: [Errno 2] No such file or directory: ")
    read_end, write_end = os.pipe()
    os.close(read_end)  # as of `… | head`, with a reader that has closed
    line[3:] = ["split", "--queries", str(world), "--test-frac", "0.5", "--seed", "1"]
    ended = subprocess.run(line, stdout=write_end, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(write_end)
    assert (ended.returncode, ended.stderr) == (1, "")


def test_missing_folders_and_files_are_reported(tmp_path: Path, world: Path, lines: Any, command: Any) -> None:
    file = lines(SCORE)
    for args, expected, message in (
        (("score", file, "--queries", str(tmp_path)), 2, "no travelplanning_query_en.json"),
        (("score", file, "--queries", str(world), "--database", str(tmp_path)), 2, "no database_en/"),
        (("score", str(tmp_path / "none.jsonl"), "--queries", str(world)), 1, "No such file or directory"),
    ):
        code, printed, err = command(*args)
        assert (code, printed) == (expected, []) and err.count("\n") == 1 and message in err


def test_the_split_as_yaml(world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["", "split", "--queries", str(world), "--test-frac", "0.5", "--seed", "1"])
    main()
    tasks = [*load_tasks(world, "en"), *load_tasks(world, "zh")]
    assert capsys.readouterr().out == split_to_yaml(tasks, 0.5, 1)


def test_as_a_program_on_an_ascii_terminal(world: Path, lines: Any) -> None:
    call = {"lang": "zh", "id": "0", "tool": "search_location", "args": {"place_name": "沙丘公园"}}
    argv = [sys.executable, "-m", "tip_exp.deepplanning", "call", lines(call), "--database", str(world)]
    done = subprocess.run(argv, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"}, check=True)
    answer = json.loads(done.stdout.decode("utf-8"))["result"]
    assert json.loads(answer) == {"place_name": "沙丘公园", "latitude": "30.040000", "longitude": "120.040000"}
    wrong = subprocess.run([*argv[:3], "score"], capture_output=True, text=True, check=False)
    assert wrong.returncode != 0 and "--queries" in wrong.stderr


@pytest.mark.data
def test_official_files(official: Path, official_records: Any, command: Any) -> None:
    fixtures, mini = official / "fixtures", str(official / "mini_world")
    code, scores, _ = command("score", str(fixtures / "official_hard_verdicts.jsonl"), "--queries", str(official))
    records = official_records("official_hard_verdicts.jsonl")
    assert code == 0 and [score["constraints"] for score in scores] == [record["official"] for record in records]
    file = str(fixtures / "mini_world_official_verdicts.jsonl")  # lines without a language
    code, scores, _ = command("score", file, "--queries", mini, "--database", f"{mini}/database")
    records = official_records("mini_world_official_verdicts.jsonl")
    same = ["passed", "total", "fraction", "commonsense", "commonsense_score", "composite_score", "case_acc"]
    assert code == 0 and [[s[k] for k in same] for s in scores] == [[r[k] for k in same] for r in records]
    for lang in ("en", "zh"):
        name = f"mini_world_tool_results_{lang}.jsonl"
        code, answers, _ = command("call", str(fixtures / name), "--database", mini)
        assert code == 0 and [a["result"] for a in answers] == [r["result"] for r in official_records(name)]
