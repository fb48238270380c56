"""The calculator environment, by itself and in the episode loop."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import islice

import pytest

from scripts.make_pairs.scripted import ScriptedSampler
from tip_exp.config.schema import AgentConfig
from tip_exp.envs.base import Call
from tip_exp.envs.calculator import CalculatorEnvironment, calculate, stream
from tip_exp.envs.chat import Chat
from tip_exp.envs.episodes import play
from tip_exp.types import Problem, Sampling


@pytest.mark.parametrize(("expression", "value"), [("12 + 7", 19), ("3*-4", -12), (" 5 - 8 ", -3)])
def test_one_operation(expression: str, value: int) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize("expression", ["1+2+3", "2**9", "__import__('os')", "1/2", "", "9" * 10 + "+1", "１+1"])
def test_other_expressions_are_a_value_error(expression: str) -> None:
    with pytest.raises(ValueError, match="between two whole numbers"):
        calculate(expression)


@pytest.mark.parametrize(
    ("call", "observation"),
    [
        (Call("calculate", {"expression": "2+3"}), "5"),
        (Call("calculate", '{"expression": "2+3"}'), "5"),
        (Call("calculate", "{"), "not valid JSON"),
        (Call("calculate", {"x": 1}), "calculate takes"),
        (Call("eval", {"expression": "2+3"}), "tool 'eval' not found"),
        (Call("calculate", {"expression": "2+3+4"}), "got '2+3+4'"),
    ],
)
def test_every_call_gets_an_observation(call: Call, observation: str) -> None:
    environment = CalculatorEnvironment()
    environment.reset(Problem("f", "2 + 3", "5"))
    (answer,) = environment.step([call])
    assert observation in (answer if answer == "5" else json.loads(answer)["error"])


def by_steps(history: str) -> str:
    """Evaluates a formula from the innermost parentheses, one call a turn."""
    formula = re.search(r"Work out (.+?)\. Put", history)
    assert formula
    text = formula[1]
    for result in re.findall(r"<tool_response>\n(-?\d+)\n</tool_response>", history):
        text = re.sub(r"\((-?\d+ [-+*] -?\d+)\)|^(-?\d+ [-+*] -?\d+)$", result, text, count=1)
    if re.fullmatch(r"-?\d+", text):
        return f"\\boxed{{{text}}}"
    inner = re.search(r"\((-?\d+ [-+*] -?\d+)\)", text)
    arguments = {"expression": inner[1] if inner else text}
    return f"<tool_call>\n{json.dumps({'name': 'calculate', 'arguments': arguments})}\n</tool_call>"


def test_a_policy_that_calculates_scores_one_and_one_that_does_not_zero(
    chat: Chat, limits: Callable[..., AgentConfig]
) -> None:
    tasks = list(islice(stream("test", 0), 20))
    scores = []
    for policy in (by_steps, lambda history: "I cannot."):
        sampler = ScriptedSampler(policy, chat)
        episodes = play(sampler, tasks, CalculatorEnvironment, chat, Sampling(1, 1.0, 1.0, 0, 5000), limits(), seed=0)
        scores.append([episode.score["right"] for episode in episodes])
        assert {episode.stop for episode in episodes} == {"final"}
    assert scores == [[1.0] * 20, [0.0] * 20]


def test_formulas_are_a_function_of_split_and_seed() -> None:
    test, test_again, train = (list(islice(stream(split, 3), 5)) for split in ("test", "test", "train"))
    assert test == test_again and test != train and test != list(islice(stream("test", 4), 5))
    assert all(int(formula.answer) == eval(formula.prompt) for formula in test)
