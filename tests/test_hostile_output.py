"""Whatever a model writes, every parser answers: graders, tool calls, tools, plans, truncation and JSON rows."""

# ruff: noqa: E501 (tables)
from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.synthetic_runs import append_rows
from tip_exp.envs.base import Call, error_observation
from tip_exp.envs.calculator import CalculatorEnvironment
from tip_exp.envs.deepplanning import errands
from tip_exp.envs.deepplanning.data import find_databases, load_tasks
from tip_exp.envs.deepplanning.environment import TravelEnvironment
from tip_exp.envs.tool_calls import parse_calls
from tip_exp.envs.truncate import truncate
from tip_exp.grading import boxed, string_match
from tip_exp.grading.extract import BOX_CHARS, extract
from tip_exp.grading.pool import GradingPool
from tip_exp.types import Problem
from tip_exp.utils.io import read_rows

ANSWERS = ("5", "-12", "1/2", "", "x" * 100, "9" * 5000, r"\frac{1}{2}", "nan", "5.0", "１２")
DEEP = 100_000
PIECES = [
    *("\\boxed{", "\\boxed{5}", "\\fbox{", "}", "{", "\\", "$", "$$", "\\(", "\\]", "####", "the answer is ", "not ", "Answer: "),
    *("<tool_call>", "</tool_call>", "<think>", "</think>", "<plan>", "</plan>", "<|im_end|>", "</script><script>", "<!--<script>"),
    *('{"name": "calculate", "arguments": ', '{"expression": "', '"}', "}", "[", "]", '{"a":', "null", "NaN", "1e999", '"\\ud83d"'),
    *("2+3", "9" * 30, "-", "+", "*", "1/0", "^", "_", ",", ".", "\n", "\r\n", "\u2028", "\x00", "\x1b[2J", "\ud83d", "\udc00", "😀", "中", "é" * 20),
    *("Day 1:", "Current City: ", "09:00-10:00 | ", "第1天", "预算总结", "Accommodation: ", "Total: ¥", "=cmd|' /C calc'!A0", "%s%n", "{0}", "${x}"),
]  # fmt: skip
CORPUS = {
    "brackets": "[" * DEEP,
    "braces": "{" * DEEP,
    "boxes": "\\boxed{" * (DEEP // 7),
    "digits in a box": f"\\boxed{{{'9' * 5000}}}",
    "zeros in a box": f"\\boxed{{{'0' * 5000}5}}",
    "wide digits": "\\boxed{１２}",
    "calls": "<tool_call>" * (DEEP // 11),
    "a nested call": f"<tool_call>{'[' * DEEP}</tool_call>",
    "a call with nested arguments": '<tool_call>{"name": "calculate", "arguments": "' + "[" * DEEP + '"}</tool_call>',
    "a call with a long number": '<tool_call>{"name": "calculate", "arguments": {"expression": ' + "9" * 5000 + "}}</tool_call>",
    "a call with half a character": '<tool_call>{"name": "\\ud83d", "arguments": {"expression": "\\ud83d"}}</tool_call>',
    "a call of a list": '<tool_call>[1, 2]</tool_call><tool_call>{"name": ["x"]}</tool_call><tool_call>7</tool_call>',
    "thoughts": "<think>" * 5000 + "</think>" * 5000,
    "plans": "<plan>" * 5000 + "</plan>" * 5000,
    "days": "<plan>" + "Day 999: x\n" * 2000 + "</plan>",
    "phrases": "the answer is " * 5000,
    "denials": "not 5 " * 5000,
    "backslashes": "\\" * DEEP,
    "dollars": "$" * DEEP,
    "blanks": " " * DEEP,
    "nothing": "",
}  # fmt: skip


def completions(count: int, seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    yield from CORPUS.values()
    for _ in range(count):
        yield "".join(rng.choice(PIECES) * rng.choice((1, 1, 1, 2, 5)) for _ in range(rng.randrange(1, 25)))


@pytest.fixture(scope="module")
def travel(tmp_path_factory: pytest.TempPathFactory) -> TravelEnvironment:
    root = tmp_path_factory.mktemp("world") / "errands"
    errands.write(root, errands.stream("test", 1))
    environment = TravelEnvironment(find_databases(root), {})
    environment.reset(load_tasks(root, "en")[0])
    return environment


def check_graders(text: str, answer: str) -> None:
    extraction = extract(text)
    assert (extraction.answer is None) == (extraction.rule == "unparsed")
    assert extraction.answer is None or len(extraction.answer) <= 2 * BOX_CHARS
    for grade in (boxed.grade, string_match.grade):
        verdict = grade(text, answer)
        assert (verdict.extracted is None) == (verdict.rule == "unparsed")
        assert not (verdict.right and verdict.extracted is None)


def check_tools(text: str, travel: TravelEnvironment) -> None:
    calculator = CalculatorEnvironment()
    calculator.reset(Problem("p", "2 + 3", "5"))
    calls = [call for call in parse_calls(text) if call.error is None]
    calls.append(Call("calculate", text))
    for environment in (calculator, travel):
        observations = environment.step(calls)
        assert len(observations) == len(calls)
        for observation in observations:
            observation.encode()  # a tokenizer takes it
            truncate(observation, 50, len, "rows")
        values = environment.score(text).values()
        assert all(0 <= value <= 1 for value in values) if environment is travel else {*values} <= {0.0, 1.0}


def test_two_thousand_completions_get_an_answer_from_every_parser(travel: TravelEnvironment) -> None:
    for number, text in enumerate(completions(2000, seed=0)):
        check_graders(text, ANSWERS[number % len(ANSWERS)])
        check_tools(text, travel)


@given(st.text(max_size=300) | st.lists(st.sampled_from(PIECES), max_size=12).map("".join), st.sampled_from(ANSWERS))
def test_any_text_gets_a_verdict(text: str, answer: str) -> None:
    check_graders(text, answer)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda v: st.lists(v) | st.dictionaries(st.text(), v),
    )
)
def test_any_arguments_get_an_observation(arguments: object) -> None:
    calculator = CalculatorEnvironment()
    for given_arguments in (arguments, json.dumps(arguments), {"expression": arguments}):
        (observation,) = calculator.step([Call("calculate", given_arguments)])
        observation.encode()


@pytest.mark.slow
def test_completions_get_a_verdict_of_the_algebra_in_bounded_time() -> None:
    texts = list(completions(300, seed=1))
    with GradingPool(2, time_limit=1.0) as pool:
        verdicts = pool.grade_all((text, ANSWERS[number % len(ANSWERS)]) for number, text in enumerate(texts))
    assert len(verdicts) == len(texts)


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("\\boxed{" + "9" * 5000 + "}", "9" * 5000, True),
        ("\\boxed{" + "9" * 5000 + "}", "5", False),
        ("\\boxed{" + "0" * 5000 + "5}", "5", True),
        ("\\boxed{-0}", "0", True),
        ("\\boxed{5}", "5.0", False),
        ("\\boxed{5}", "+5", True),
        ("\\boxed{-5}", "5", False),
    ],
)
def test_integers_of_any_length_are_compared(text: str, answer: str, right: bool) -> None:
    assert boxed.grade(text, answer).right is right


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is not 5.", None),
        ("The answer isn't 5", None),
        ("The answer can't be equal to $5$.", None),
        ("The answer is 7, not 5.", "7"),
        ("The answer is not 5 but 7.", "7"),
        ("The answer is not 5; it is 7.", "7"),
        ("We get 7. The answer is not 5.", "7"),
        ("The answer cannot be negative so it is 5", "5"),
        ("The answer is 5. It is not 7.", "5"),
    ],
)
def test_a_denied_number_is_not_the_answer(text: str, answer: str | None) -> None:
    assert extract(text).answer == answer


def test_half_characters_become_rows_and_observations(tmp_path: Path) -> None:
    row = {"step": 0, "text": "a\ud83d"}
    append_rows(tmp_path / "eval.jsonl", [row])
    assert read_rows(tmp_path / "eval.jsonl") == [row]
    assert json.loads(error_observation("a\ud83d")) == {"error": "a?"}
