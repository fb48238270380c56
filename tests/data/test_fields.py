"""Own tables: the fields that their rows have are guessed, printed, and can be set."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tip_exp.config.datasets import TableConfig
from tip_exp.config.schema import RunConfig
from tip_exp.data.load import check_files, load
from tip_exp.types import Problem
from tip_exp.utils.errors import ConfigError, DataError

Compose = Callable[..., RunConfig]


@pytest.fixture
def own(tmp_path: Path, compose_run: Compose) -> Callable[..., TableConfig]:
    def composed(rows: list[dict[str, Any]], *overrides: str) -> TableConfig:
        """data=jsonl of a file with these rows."""
        path = tmp_path / "my.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        train = compose_run("data=jsonl", f"data.train.file={path}", "data.train.suffix=''", *overrides).data.train
        assert isinstance(train, TableConfig)
        return train

    return composed


CASES = {
    "usual names": ({"question": "1+1?", "answer": 2}, ("1+1?", "2", "")),
    "a solution beside the answer": (
        {"problem": "1+1?", "solution": "One and one.", "answer": "2"},
        ("1+1?", "2", "One and one."),
    ),
    "a worked solution with a box": (
        {"problem": "1+1?", "solution": r"One: $\boxed{1}$. Two: $\boxed{2}$."},
        ("1+1?", "2", r"One: $\boxed{1}$. Two: $\boxed{2}$."),
    ),
    "a worked solution without a box": ({"problem": "1+1?", "solution": "One and one."}, ("1+1?", "", "One and one.")),
    "no answer": ({"prompt": "1+1?"}, ("1+1?", "", "")),
    "verl": (
        {"prompt": [{"role": "user", "content": "1+1?"}], "reward_model": {"style": "rule", "ground_truth": "2"}},
        ("1+1?", "2", ""),
    ),
    "a name with a dot": ({"prompt": "1+1?", "reward_model.ground_truth": "2"}, ("1+1?", "2", "")),
    "target": ({"prompt": "1+1?", "target": "2"}, ("1+1?", "2", "")),
    "one chat message": ({"prompt": [{"role": "user", "content": "1+1?"}], "label": "2"}, ("1+1?", "2", "")),
    "GSM8K's mark": ({"question": "1+1?", "answer": "So.\n#### 2"}, ("1+1?", "2", "So.\n")),
    "its mark without a blank": ({"question": "1+1?", "answer": "So.\n####2"}, ("1+1?", "2", "So.\n")),
}


@pytest.mark.parametrize(("row", "expected"), CASES.values(), ids=CASES.keys())
def test_fields_are_guessed(own: Callable[..., TableConfig], row: dict[str, Any], expected: tuple[str, ...]) -> None:
    second = row | {"question": "2+2?"} if "question" in row else row
    problem = load(own([row, second])).problems[0]
    assert (problem.prompt, problem.answer, problem.solution) == expected
    assert problem.id == "my/0"


def test_a_field_is_no_id_if_its_values_repeat(own: Callable[..., TableConfig]) -> None:
    rows = [{"id": number // 2, "question": f"{number}+1?", "answer": number} for number in range(4)]
    assert [problem.id for problem in load(own(rows)).problems] == ["my/0", "my/0", "my/1", "my/1"]
    test = own(rows).model_copy(update={"split": "test"})
    assert [problem.id for problem in load(test).problems] == ["my/0", "my/1", "my/2", "my/3"]


def test_the_guess_is_printed_and_can_be_set(
    own: Callable[..., TableConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"uuid": "a", "question": "1+1?", "text": "Sum 1 and 1.", "answer": "2"}]
    assert load(own(rows)).problems == [Problem("my/a", "1+1?", "2")]
    printed = capsys.readouterr().out
    assert (
        "my.jsonl: prompt from 'question', answer from 'answer', id from 'uuid' (data.train.fields.prompt=FIELD"
        in printed
    )
    assert load(own(rows, "data.train.fields.prompt=text")).problems[0].prompt == "Sum 1 and 1."
    assert "prompt from" not in capsys.readouterr().out


def test_a_field_must_be_in_every_row(own: Callable[..., TableConfig]) -> None:
    rows = [{"question": "1+1?", "answer": "2", "target": "2"}, {"question": "1+2?", "answer": None, "target": "3"}]
    assert [problem.answer for problem in load(own(rows)).problems] == ["2", "3"]


def test_rows_without_usual_names_are_refused_with_their_fields(own: Callable[..., TableConfig]) -> None:
    rows = [{"q": "1+1?", "a": {"b": "2"}, "c": [{"content": "3"}]}]
    with pytest.raises(DataError, match=r"set data.train.fields.prompt to one of q, a.b, c.0.content$"):
        load(own(rows))


ANSWERS = {
    "worked solutions": (
        [{"problem": "1+1?", "solution": "One and one."}],
        "field 'solution' of some rows has neither .*boxed nor ####, .*; set eval.benchmarks.shop.fields.answer to the",
    ),
    "one without a mark": (
        [{"problem": "1+1?", "answer": "So. ####2"}, {"problem": "1+2?", "answer": "3"}],
        "row 2: answer has no '####', which 1 of 2 rows have; add it$",
    ),
    "none": ([{"problem": "1+1?", "x": "2"}], "set eval.benchmarks.shop.fields.answer to one of problem, x$"),
    "an id of several parts": (
        [{"problem": "1+1?", "answer": "2", "id": {"n": 1}}],
        r"such as id.n, or set eval.benchmarks.shop.fields.id to null$",
    ),
}


@pytest.mark.parametrize(("rows", "message"), ANSWERS.values(), ids=ANSWERS.keys())
def test_a_benchmark_needs_answers(own: Callable[..., TableConfig], rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(own(rows).model_copy(update={"split": "test"}), "eval.benchmarks.shop")


def test_a_row_without_an_answer_is_named(own: Callable[..., TableConfig]) -> None:
    rows: list[dict[str, Any]] = [{"question": "1+1?", "answer": "2"}, {"question": "1+2?"}]
    for without in ({}, {"answer": None}):
        with pytest.raises(DataError, match=r"my.jsonl, row 2: no 'answer', which 1 of 2 rows have; add it$"):
            load(own([rows[0], rows[1] | without]))


def test_another_file_under_the_same_name_is_another_run(own: Callable[..., TableConfig], tmp_path: Path) -> None:
    train = own([{"question": "1+1?", "answer": "2"}])
    assert own([{"question": "1+1?", "answer": "2"}]).sha256 == train.sha256
    assert own([{"question": "1+1?", "answer": "3"}]).sha256 != train.sha256
    with pytest.raises(DataError, match=r"my.jsonl has changed since this run was configured"):
        load(train)
    with pytest.raises(ConfigError, match=r"data.train.sha256=0123456789ab: .*has another SHA-256; restore it"):
        own([{"question": "1+1?", "answer": "2"}], "data.train.sha256=0123456789ab")


def test_files_are_checked_before_a_run(own: Callable[..., TableConfig], compose_run: Compose) -> None:
    path = own([{"question": "1+1?", "answer": "2"}, {"question": "1+2?"}]).file
    with pytest.raises(DataError, match=r"row 2: no 'answer'"):
        check_files(compose_run("data=jsonl", f"data.train.file={path}"))
    check_files(compose_run())


def test_a_run_on_own_files_is_named_after_them(own: Callable[..., TableConfig], compose_run: Compose) -> None:
    path = str(own([{"question": "1+1?", "answer": "2"}]).file)
    config = compose_run("data=jsonl", f"data.train.file={path}", "eval=jsonl", f"eval.file={path}")
    assert config.name == "tiny.my.soft_or.r50.s0" and config.eval.label == "my"
    benchmark = config.eval.benchmarks["jsonl"]
    assert isinstance(benchmark, TableConfig) and (benchmark.file, benchmark.split) == (path, "test")
    assert benchmark.hub is None


@pytest.mark.parametrize("overrides", [["data=jsonl"], ["eval=jsonl"]])
def test_without_a_file_the_message_names_the_key(compose_run: Compose, overrides: list[str]) -> None:
    key = "data.train.file" if overrides == ["data=jsonl"] else "eval.file"
    with pytest.raises(ConfigError, match=rf"names no data: set {key} to a .jsonl, .parquet or .csv file$"):
        compose_run(*overrides)


def test_prompts_are_texts_or_messages_in_all_rows(own: Callable[..., TableConfig]) -> None:
    user = {"role": "user", "content": "1+1?"}
    with pytest.raises(DataError, match="field 'prompt' is a text in some rows and a message in others"):
        load(own([{"prompt": [user], "answer": "2"}, {"prompt": "1+1?", "answer": "2"}]))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (
            [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1?"}],
            "a list of 2; set data.train.fields.prompt to a part of it, such as prompt.1.content",
        ),
        ([{"role": "user", "text": "1+1?"}], "a list of 1; set data.train.fields.prompt to .* such as prompt.0"),
        (["1+1?", "2+2?"], "a list of 2; set data.train.fields.prompt to .* such as prompt.0"),
        ([], "an empty list"),
    ],
)
def test_the_hint_for_a_list_names_a_part_that_it_has(
    own: Callable[..., TableConfig], prompt: list[Any], message: str
) -> None:
    first = {"prompt": [{"role": "user", "content": "3+3?"}], "answer": "6"}
    with pytest.raises(DataError, match=rf"my\.jsonl, row 2: field 'prompt' holds {message}$"):
        load(own([first, {"prompt": prompt, "answer": "2"}]))


@pytest.mark.parametrize("mark", ["", "So.\n#### "])
def test_without_a_guess_there_is_no_hint(
    own: Callable[..., TableConfig], capsys: pytest.CaptureFixture[str], mark: str
) -> None:
    given = "data.train.fields={id:null,prompt:question,answer:answer,solution:null}"
    assert load(own([{"question": "1+1?", "answer": f"{mark}2"}], given)).problems[0].answer == "2"
    printed = capsys.readouterr().out
    assert printed.endswith("my.jsonl: the answer after '####'\n" if mark else "") and "changes it" not in printed


def test_the_mark_is_found_in_a_nested_answer(own: Callable[..., TableConfig]) -> None:
    rows = [{"question": "1+1?", "r": {"a": "So.\n#### 2"}}]
    assert load(own(rows, "data.train.fields.answer=r.a")).problems == [Problem("my/0", "1+1?", "2", "So.\n")]
