"""Training and test ids of the travel tasks, and the score that a set of tasks allows without a tool call."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import yaml

from tip_exp.envs.deepplanning.data import BUDGET, Task
from tip_exp.envs.deepplanning.score.constraints import answers
from tip_exp.utils.errors import DataError

SHIPPED_SPLIT = Path(__file__).with_name("split.yaml")  # the ids that runs use; its first line is the command

Split = dict[str, list[str]]  # "train" and "test" -> ids, the same for both languages: they describe the same trips


def split_by_days(tasks: Sequence[Task], test_frac: float, seed: int) -> Split:
    """Draws `test_frac` of the ids of every trip length: 4 of 20 in the official data, 24 test ids in all.

    `tasks` are those of one language or of both. Ids are ranked by a hash of seed and id, so the draw needs no random
    number generator, and a task never changes the draw among trips of another length.
    """
    if not 0 < test_frac < 1:
        raise DataError(f"the test fraction must be between 0 and 1; got {test_frac}")
    days: dict[str, int] = {}
    for task in tasks:
        if days.setdefault(task.id, task.days) != task.days:
            raise DataError(f"task {task.id} lasts {days[task.id]} days in one language and {task.days} in the other")
    test: set[str] = set()
    for length in set(days.values()):
        ids = sorted((i for i in days if days[i] == length), key=lambda i: _rank(seed, i))
        test.update(ids[: round(test_frac * len(ids))])
    return {"train": sorted(days.keys() - test, key=_by_number), "test": sorted(test, key=_by_number)}


def read_split() -> Split:
    return yaml.safe_load(SHIPPED_SPLIT.read_text(encoding="utf-8"))


def split_to_yaml(tasks: Sequence[Task], test_frac: float, seed: int) -> str:
    """The split of these tasks as YAML; two comment lines give the command and the no-tool baselines by language."""
    split = split_by_days(tasks, test_frac, seed)
    command = f"python -m tip_exp.deepplanning split --queries DIR --test-frac {test_frac} --seed {seed}"
    baselines = [
        f"{100 * no_tool_baseline(test_tasks):.1f} % {lang}"
        for lang in sorted({task.lang for task in tasks})
        if (test_tasks := [task for task in tasks if task.lang == lang and task.id in split["test"]])
    ]
    what = "budgets and constraints that the query answers"
    lines = [
        f"# DeepPlanning travel tasks for training and test, drawn within each trip length. Command: {command}",
        f"# No-tool baseline of the test tasks ({what}): {', '.join(baselines)}",
    ]
    for part, ids in split.items():
        rows = [", ".join(f'"{i}"' for i in ids[start : start + 16]) for start in range(0, len(ids), 16)]
        lines += [f"{part}:", "  [", *(f"    {row}," for row in rows), "  ]"]
    return "\n".join(lines) + "\n"


def constraints_without_tools(task: Task) -> list[str]:
    """Constraints that a plan can satisfy without a tool call: the query names the answer, or it is the budget.

    A plan that names no costs satisfies every budget.
    """
    keys: list[str] = []
    for key, constraint in task.constraints.items():
        names = answers(constraint)
        if key == BUDGET or (names and all(name in task.query for name in names)):
            keys.append(key)
    return keys


def no_tool_baseline(tasks: Sequence[Task]) -> float:
    """Mean fraction of constraints that need no tool call: 8.9 % over all English tasks, 11.9 % over all Chinese."""
    return sum(len(constraints_without_tools(task)) / max(1, len(task.constraints)) for task in tasks) / len(tasks)


def _rank(seed: int, task_id: str) -> bytes:
    return hashlib.blake2b(f"deepplanning/split/{seed}/{task_id}".encode(), digest_size=16).digest()


def _by_number(task_id: str) -> tuple[int, str]:
    return (int(task_id), "") if task_id.isdecimal() else (-1, task_id)
