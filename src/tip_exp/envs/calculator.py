"""A small tool task: evaluate a formula with a calculator that runs one operation a call.

"Work out (12 + 7) * 3."  ->  calculate {"expression": "12 + 7"} -> 19, calculate {"expression": "19 * 3"} -> 57,
"\\boxed{57}"
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from itertools import count

from tip_exp.envs.base import Call, Start, error_observation
from tip_exp.grading import boxed
from tip_exp.types import Problem

SCHEMA = {
    "type": "function",
    "function": {
        "name": "calculate",
        "description": "The value of one sum, difference or product of two whole numbers.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string", "description": "for example 12 + 7 or 19 * 3"}},
            "required": ["expression"],
        },
    },
}
_OPERATION = re.compile(r"\s*(-?\d{1,9})\s*([-+*])\s*(-?\d{1,9})\s*", re.ASCII)


class CalculatorEnvironment:
    """Has one tool, `calculate`. The main score is 1 if the last box holds the right value, else 0."""

    def reset(self, task: Problem) -> Start:
        self._answer = task.answer
        question = f"Work out {task.prompt}. Put the answer within \\boxed{{}}."
        return Start([{"role": "user", "content": question}], [SCHEMA])

    def step(self, calls: list[Call]) -> list[str]:
        return [_observation(call) for call in calls]

    def score(self, text: str) -> dict[str, float]:
        verdict = boxed.grade(text, self._answer)
        return {"right": float(verdict.right), "delivered": float(verdict.extracted is not None)}


def calculate(expression: str) -> int:
    """The value of one operation on two whole numbers. Raises ValueError for anything else."""
    match = _OPERATION.fullmatch(expression)
    if not match:
        raise ValueError(f"one +, - or * between two whole numbers of at most 9 digits; got {expression[:80]!r}")
    a, b = int(match[1]), int(match[3])
    return a + b if match[2] == "+" else a - b if match[2] == "-" else a * b


def stream(split: str, seed: int) -> Iterator[Problem]:
    """Endless formulas of two or three operations, a function of split and seed.

    Problem(id="calculator/test/0", prompt="(12 + 7) * 3", answer="57")
    """
    rng = random.Random(f"calculator/{split}/{seed}")
    for number in count():
        value = rng.randint(2, 99)
        text = str(value)
        for operation in range(rng.randint(2, 3)):
            sign, n = rng.choice("+-*"), rng.randint(2, 9)
            text = f"{f'({text})' if operation else text} {sign} {n}"
            value = calculate(f"{value} {sign} {n}")
        yield Problem(f"calculator/{split}/{number}", text, str(value))


def _observation(call: Call) -> str:
    if call.name != "calculate":
        return error_observation(f"tool '{call.name}' not found")
    try:
        arguments = json.loads(call.arguments) if isinstance(call.arguments, str) else call.arguments
    except (ValueError, RecursionError):
        return error_observation("the arguments are not valid JSON")
    if not isinstance(arguments, dict) or not isinstance(arguments.get("expression"), str):
        return error_observation('calculate takes {"expression": string}')
    try:
        return str(calculate(arguments["expression"]))
    except ValueError as error:
        return error_observation(str(error))
