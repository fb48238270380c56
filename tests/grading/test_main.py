"""`python -m tip_exp.grading FILE`: verdicts, counts, and one clear line for bad input."""

from __future__ import annotations

import codecs
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tip_exp.grading.__main__ import InputError, count, read_pairs
from tip_exp.grading.types import Verdict

ROWS = [
    {"response": r"so $\boxed{\frac{2}{4}}$", "known": "0.5"},  # right by value, wrong by string
    {"response": r"\boxed{6}", "known": 6},
    {"response": r"\boxed{7}", "known": "6"},
    {"response": "Hm.", "known": "6"},
    {"response": r"\boxed{9^{9^{9^9}}}", "known": "6"},
]


def grade_file(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tip_exp.grading", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def write(folder: Path, *lines: object) -> Path:
    file = folder / "responses.jsonl"
    file.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return file


def test_one_verdict_a_line_and_the_counts_at_the_end(tmp_path: Path) -> None:
    file = write(tmp_path, *ROWS)
    result = grade_file(file, "--text", "response", "--answer", "known", "--time-limit", "1", "--workers", "2")
    assert (result.returncode, result.stderr) == (0, "")
    *verdicts, counts = map(json.loads, result.stdout.splitlines())
    assert all(set(verdict) == {"right", "extracted", "rule", "seconds"} for verdict in verdicts)
    assert [(verdict["right"], verdict["extracted"], verdict["rule"]) for verdict in verdicts] == [
        (True, r"\frac{2}{4}", "boxed"),
        (True, "6", "boxed"),
        (False, "7", "boxed"),
        (False, None, "unparsed"),
        (False, "9^{9^{9^9}}", "timeout"),
    ]
    # 2 + 1 + 1 + 1 = 5; the graders disagree on 2/4 only
    assert counts == {
        "total": 5,
        "right": 2,
        "wrong": 1,
        "unparsed": 1,
        "timeout": 1,
        "failed": 0,
        "strict_agreement": 0.8,
        "strict_disagreements": 1,
    }


def test_verdicts_of_the_string_grader(tmp_path: Path) -> None:
    result = grade_file(write(tmp_path, *ROWS[:4]), "--text", "response", "--answer", "known", "--grader", "strict")
    *verdicts, counts = map(json.loads, result.stdout.splitlines())
    assert [verdict["right"] for verdict in verdicts] == [False, True, False, False]
    assert (counts["right"], counts["wrong"], counts["unparsed"]) == (1, 2, 1)
    assert counts["strict_disagreements"] == 1


def test_failed_comparisons_are_counted_separately() -> None:
    rules = ["boxed", "memory", "crashed", "uncomparable", "timeout", "unparsed"]
    counts = count([Verdict(False, None, rule) for rule in rules], [True] * 3 + [False] * 3)
    assert counts == {
        "total": 6,
        "right": 0,
        "wrong": 1,
        "unparsed": 1,
        "timeout": 1,
        "failed": 3,
        "strict_agreement": 0.5,
        "strict_disagreements": 3,
    }


GOOD = {"text": "x", "answer": "y"}

BAD = [
    # lines of the file, what the message says
    ([GOOD, "{"], "line 2 is not JSON"),
    ([GOOD, "[1]"], "line 2 is a list, not a JSON object"),
    ([GOOD, "null"], "line 2 is null, not a JSON object"),
    ([GOOD, {"text": "x", "reply": "y"}], "line 2 has no field 'answer'; it has 'text', 'reply'"),
    ([{}], "line 1 has no field 'text'; it has none"),
    ([{"text": None, "answer": "y"}], "line 1: 'text' is null, not a string"),
    ([{"text": "x", "answer": ["y"]}], "line 1: 'answer' is a list, neither a string nor a number"),
    ([{"text": "x", "answer": True}], "line 1: 'answer' is a boolean, neither a string nor a number"),
    ([], "has no lines to grade"),
    (["[" * 100_000], "line 1 is not JSON"),
]


@pytest.mark.parametrize(("lines", "message"), BAD)
def test_an_input_error_names_the_line(tmp_path: Path, lines: list[object], message: str) -> None:
    file = write(tmp_path, *lines)
    with pytest.raises(InputError) as error:
        read_pairs(file, "text", "answer")
    assert message in str(error.value)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_pairs_are_in_order_and_blank_lines_are_skipped(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD, "", {"text": "z\u2028", "answer": 7})
    file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
    assert read_pairs(file, "text", "answer") == [("x", "y"), ("z\u2028", "7")]


def test_bad_input_prints_one_line_and_no_verdict(tmp_path: Path) -> None:
    bad = write(tmp_path, GOOD, "{")
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"text": "caf\xe9"}')
    for file, message in ((bad, "line 2 is not JSON"), (tmp_path / "no.jsonl", "No such file"), (latin, "not UTF-8")):
        result = grade_file(file, "--text", "text", "--answer", "answer")
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith("error: ") and message in result.stderr
        assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--workers", "0", "argument --workers: 0 is not a finite number above 0"),
        ("--workers", "1.5", "argument --workers: invalid int value: '1.5'"),
        ("--time-limit", "inf", "argument --time-limit: inf is not a finite number above 0"),
        ("--time-limit", "soon", "argument --time-limit: invalid float value: 'soon'"),
    ],
)
def test_options_out_of_range_are_an_error(tmp_path: Path, option: str, value: str, message: str) -> None:
    result = grade_file(write(tmp_path, GOOD), "--text", "text", "--answer", "answer", option, value)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr
