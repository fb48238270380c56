"""Which tasks train and which test, and how much of a set of tasks can be had without one tool call."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from tip_exp.envs.deepplanning.data import Task
from tip_exp.envs.deepplanning.score.constraints import BUDGET, answers
from tip_exp.utils.errors import DataError


@dataclass(frozen=True, slots=True)
class Split:
    """Ids to train on and ids to test on; the same for both languages, as a translation would leak the trip."""

    train: tuple[str, ...]
    test: tuple[str, ...]


def split_by_days(tasks: Sequence[Task], test_frac: float, seed: int) -> Split:
    """`test_frac` of the ids of every trip length, drawn by `seed` alone: officially 4 of each 20, 24 test ids.

    Give the tasks of one language or of both. Ids are ranked by a hash of seed and id, so the draw depends on no
    library's random numbers, and a task never changes the draw among trips of another length.
    """
    if not 0 < test_frac < 1:
        raise DataError(f"the test share lies between 0 and 1; got {test_frac}")
    days: dict[str, int] = {}
    for task in tasks:
        if days.setdefault(task.id, task.days) != task.days:
            raise DataError(f"task {task.id} lasts {days[task.id]} days in one language and {task.days} in the other")
    test: set[str] = set()
    for length in set(days.values()):
        ids = sorted((i for i in days if days[i] == length), key=lambda i: _rank(seed, i))
        test.update(ids[: round(test_frac * len(ids))])
    return Split(tuple(sorted(days.keys() - test, key=_by_number)), tuple(sorted(test, key=_by_number)))


def read_split(path: Path) -> Split:
    """A split as split_to_yaml writes it."""
    record = yaml.safe_load(path.read_text(encoding="utf-8"))
    for part in ("train", "test"):
        ids = record.get(part) if isinstance(record, dict) else None
        if not isinstance(ids, list) or not all(isinstance(i, str) for i in ids):
            raise DataError(f"{path}: {part!r} is to be a list of quoted ids; got {ids!r}")
    if both := sorted(set(record["train"]) & set(record["test"]), key=_by_number):
        raise DataError(f"{path}: task {both[0]} is both in train and in test")
    return Split(tuple(record["train"]), tuple(record["test"]))


def split_to_yaml(tasks: Sequence[Task], test_frac: float, seed: int) -> str:
    """The split of these tasks as a file, with its origin and its floors by language in the first two lines."""
    split = split_by_days(tasks, test_frac, seed)
    command = f"python -m tip_exp.deepplanning split --queries DIR --test-frac {test_frac} --seed {seed}"
    floors = [
        f"{100 * no_tool_floor(chosen):.1f} % {lang}"
        for lang in sorted({task.lang for task in tasks})
        if (chosen := [task for task in tasks if task.lang == lang and task.id in split.test])
    ]
    lines = [
        f"# DeepPlanning travel tasks to train and to test on, drawn within each trip length; made by: {command}",
        f"# No-tool floor of the test tasks (constraints that the query answers, and budgets): {', '.join(floors)}",
    ]
    for part, ids in (("train", split.train), ("test", split.test)):
        rows = [", ".join(f'"{i}"' for i in ids[start : start + 16]) for start in range(0, len(ids), 16)]
        lines += [f"{part}:", "  [", *(f"    {row}," for row in rows), "  ]"]
    return "\n".join(lines) + "\n"


def spelled_out(task: Task) -> list[str]:
    """Constraints a plan can satisfy without one tool call: the query says the answer, or it is the budget.

    A plan that names no costs keeps every budget.
    """
    told: list[str] = []
    for key, constraint in task.constraints.items():
        names = answers(constraint)
        if key == BUDGET or (names and all(name in task.query for name in names)):
            told.append(key)
    return told


def no_tool_floor(tasks: Sequence[Task]) -> float:
    """Mean over tasks of the fraction of constraints that need no tools; over all tasks 8.9 % in English, 11.9 % zh."""
    if not tasks:
        raise DataError("the no-tool floor is a mean over tasks; got none")
    return sum(len(spelled_out(task)) / max(1, len(task.constraints)) for task in tasks) / len(tasks)


def _rank(seed: int, task_id: str) -> bytes:
    return hashlib.blake2b(f"deepplanning/split/{seed}/{task_id}".encode(), digest_size=16).digest()


def _by_number(task_id: str) -> tuple[int, str]:
    return (int(task_id), "") if task_id.isdecimal() else (-1, task_id)
