"""A data set of tool tasks: its problems for tables and logs, and the environment and floor that go with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tip_exp.agent.environment import Environment, Start


@dataclass(frozen=True, slots=True)
class ToolTasks:
    """The tasks by problem id, and what plays them.

    `floor` is the mean of the main score that needs no tool call: with it every result has to be compared.
    """

    tasks: dict[str, Any]
    make_environment: Callable[[], Environment[Any]]
    floor: float

    def start(self, problem_id: str) -> Start:
        """What the model reads first."""
        return self.make_environment().reset(self.tasks[problem_id])
