"""Data sets from table files: fields, wrappers, parts, fingerprints, errors."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tip_exp.config.datasets import TableConfig
from tip_exp.data.load import load
from tip_exp.data.table import part_of, read_rows
from tip_exp.types import Problem
from tip_exp.utils.errors import DataError

ROWS = [{"q": " What is 1+1? ", "gold": {"a": "2"}, "n": 7}, {"q": "What is 2+3?", "gold": {"a": "5"}, "n": 8}]


def table(path: Path, **changes: Any) -> TableConfig:
    fields = {"id": "n", "prompt": "q", "answer": "gold.a", "solution": None} | changes.pop("fields", {})
    hub = f"nobody/nothing@{'0' * 40}:x.jsonl"
    values = {"kind": "table", "label": "sums", "split": "test", "hub": hub}
    values |= {"file": str(path), "fields": fields, "answer_after": None, "strip": [], "suffix": " Box it."}
    return TableConfig(**{**values, "part": None, "num_problems": None, "grader": "math", **changes})


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_fields_are_mapped_and_the_file_is_fingerprinted(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", ROWS)
    dataset = load(table(path))
    assert dataset.problems[0] == Problem("sums/7", "What is 1+1? Box it.", "2")
    assert dataset.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() and dataset.source == str(path)


def test_parquet_and_csv_give_the_same_problems_as_jsonl(tmp_path: Path) -> None:
    pd.DataFrame(ROWS).to_parquet(tmp_path / "x.parquet")
    assert load(table(tmp_path / "x.parquet")).problems == load(table(write(tmp_path / "x.jsonl", ROWS))).problems
    flat = pd.DataFrame([{"q": row["q"], "a": row["gold"]["a"], "n": row["n"]} for row in ROWS])
    flat.to_csv(tmp_path / "x.csv", index=False, encoding="utf-8-sig")
    assert load(table(tmp_path / "x.csv", fields={"answer": "a"})).problems[1].answer == "5"


def test_wrappers_are_stripped_and_the_answer_follows_its_mark(tmp_path: Path) -> None:
    rows = [{"q": "Solve: 1+1? Thank you.", "a": "#### 1\nOne and one.\n#### 2"}]
    problem = load(
        table(
            write(tmp_path / "x.jsonl", rows),
            strip=["Solve: ", " Thank you."],
            answer_after="#### ",
            fields={"id": None, "answer": "a"},
        )
    ).problems[0]
    assert (problem.id, problem.prompt, problem.answer) == ("sums/0", "1+1? Box it.", "2")
    assert problem.solution == "#### 1\nOne and one.\n"


def test_repeated_prompts_of_a_training_set_are_dropped(tmp_path: Path) -> None:
    rows = [{"q": question, "gold": {"a": str(n)}, "n": n} for n, question in enumerate(["b", "a", " b ", "c", "a"])]
    path = write(tmp_path / "x.jsonl", rows)
    assert [problem.id for problem in load(table(path, split="train")).problems] == ["sums/0", "sums/1", "sums/3"]
    assert len(load(table(path, split="train", num_problems=3)).problems) == 3
    assert len(load(table(path)).problems) == 5  # a benchmark stays as published


def test_rows_that_are_not_read_may_repeat_an_id(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [*ROWS, ROWS[0] | {"q": "Again?"}])
    assert len(load(table(path, num_problems=2)).problems) == 2
    assert len(load(table(path, split="train")).problems) == 3


def test_parts_are_disjoint_and_complete() -> None:
    assert [len(part_of(7, *part)) for part in ((0.0, 0.8), (0.8, 1.0))] == [5, 2]
    train, held_out = part_of(17398, 0.0, 0.8), part_of(17398, 0.8, 1.0)
    assert (len(train), len(held_out)) == (13918, 3480)
    assert sorted(train + held_out) == list(range(17398))
    assert train != sorted(train)


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        ("{bad\n", {}, "x.jsonl, line 1: not JSON"),
        ("[1]\n", {}, "line 1: expected an object; got list"),
        ('{"q": "a"}\n', {}, "row 1: no field 'gold.a' (at 'gold' there is: q)"),
        ('{"q": null, "gold": {"a": 1}, "n": 1}\n', {}, "row 1: field 'q' is empty"),
        ('{"q": " ", "gold": {"a": 1}, "n": 1}\n', {}, "row 1: field 'q' is empty"),
        ('{"q": "1+1?", "gold": {"a": ""}, "n": 1}\n', {"split": "test"}, "row 1: field 'gold.a' is empty"),
        (
            '{"q": "1+1?", "gold": {"a": "1 and 1. #### "}, "n": 1}\n',
            {"split": "test", "answer_after": "####"},
            "row 1: field 'gold.a' is empty after '####'",
        ),
        (
            "".join(json.dumps({"q": f"{n}?", "gold": {"a": n}, "n": n // 2}) + "\n" for n in range(4)),
            {"split": "test"},
            "2 rows have the id '0'; make ids unique, or set data.train.fields.id to null",
        ),
        (
            '{"q": "a", "gold": {"a": ["2"]}, "n": 1}\n',
            {},
            "field 'gold.a' holds a list; name a part of it, such as gold.a.0",
        ),
        (
            '{"q": "a", "gold": {"a": 2}, "n": 1}\n',
            {"fields": {"answer": "gold"}},
            "'gold' holds a dict; name a part of it, such as gold.a",
        ),
        (
            '{"q": {"role": "user", "content": "a"}, "gold": {"a": 2}, "n": 1}\n',
            {},
            "'q' holds a dict; name a part of it, such as q.content",
        ),
        (
            '{"q": "Max has 5 \\ud800 eggs", "gold": {"a": 2}, "n": 1}\n',
            {},
            "row 1: field 'q' holds a lone surrogate ('\\ud800') after 10 characters; remove or replace it",
        ),
        ('{"q": "a", "gold": {"a": "\\udfff"}, "n": 1}\n', {}, "row 1: field 'gold.a' holds a lone surrogate"),
        (
            '{"q": "a", "gold": {"a": NaN}, "n": 1}\n',
            {},
            "row 1: field 'gold.a' holds nan; a text or a finite number is allowed",
        ),
        (
            '{"q": "a", "gold": {"a": true}, "n": 1}\n',
            {},
            "row 1: field 'gold.a' holds True; a text or a finite number",
        ),
        (
            '{"q": "a", "gold": {"a": 1}, "n": -Infinity}\n',
            {},
            "row 1: field 'n' holds -inf; a text or a finite number",
        ),
        (
            '{"q": "a", "gold": {"a": 1}, "n": [1]}\n',
            {},
            "row 1: field 'n' holds a list; name a part of it, such as n.0, or set data.train.fields.id to null",
        ),
        (
            '{"q": "a", "gold": {"a": 1}, "n": 1, "s": {"steps": "b"}}\n',
            {"fields": {"solution": "s"}},
            "field 's' holds a dict; name a part of it, such as s.steps, or set data.train.fields.solution to null",
        ),
        ("", {}, "x.jsonl has no rows"),
        (json.dumps(ROWS[0]) + "\n", {"answer_after": "####"}, "row 1: gold.a has no '####'"),
    ],
)
def test_an_error_names_the_row(tmp_path: Path, content: str, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(DataError) as caught:
        load(table(tmp_path / "x.jsonl", **changes))
    assert message in str(caught.value)


def test_a_csv_row_with_more_cells_than_the_header_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('q,a\n"1, 2 or 3?",2\n1, 2 or 4?,2\n')
    with pytest.raises(
        DataError, match=r"x\.csv, row 2: more cells than the header; quote values that contain commas$"
    ):
        read_rows(path)


def test_bytes_are_read_as_utf8(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pd.DataFrame([{"q": "1+1 €?".encode(), "a": b"2", "n": b"7"}]).to_parquet(path)
    assert load(table(path, fields={"answer": "a"})).problems == [Problem("sums/7", "1+1 €? Box it.", "2")]
    pd.DataFrame([{"q": b"1+1?", "a": b"2", "n": 7}, {"q": b"2+2?", "a": b"\xff", "n": 8}]).to_parquet(path)
    with pytest.raises(DataError, match=r"x\.parquet, row 2: field 'a' holds bytes that are no text in UTF-8$"):
        load(table(path, fields={"answer": "a"}))


def test_unknown_extensions_and_an_unreachable_hub_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is a \.jsonl, \.parquet or \.csv file; got \.txt"):
        read_rows(tmp_path / "x.txt")
    with pytest.raises(DataError, match=r"cannot be loaded from the hub .*; set data\.root to a folder"):
        load(table(tmp_path, file=None))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes("q,a\né?,2\n".encode("cp1252"))
    with pytest.raises(DataError, match=r"x.csv cannot be read \(.*utf-8.*\); text must be in UTF-8"):
        read_rows(tmp_path / "x.csv")
    (tmp_path / "x.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match=r"x\.parquet cannot be read \([^;]*\)$"):
        read_rows(tmp_path / "x.parquet")
    path = tmp_path / "damaged.parquet"
    pd.DataFrame({"q": [str(number) for number in range(1000)]}).to_parquet(path)
    content = bytearray(path.read_bytes())
    content[4:400] = b"\xff" * 396
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"damaged\.parquet cannot be read \([^;]*\)$"):
        read_rows(path)


def test_a_cell_may_be_long(tmp_path: Path) -> None:
    (tmp_path / "long.csv").write_text(f"q,a\n{'x' * 200_000},2\n")
    assert len(read_rows(tmp_path / "long.csv")[0]["q"]) == 200_000
