"""DeepPlanning's travel tasks as an environment: nine tools over a task's tables; the plan is scored without tables."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from tip_exp.envs.base import Call, Start
from tip_exp.envs.deepplanning.data import Task, task_folder
from tip_exp.envs.deepplanning.plan.parse import extract_plan, parse_plan
from tip_exp.envs.deepplanning.score.score import score_plan
from tip_exp.envs.deepplanning.tools.sandbox import TravelSandbox
from tip_exp.envs.deepplanning.tools.schemas import tool_schemas


class TravelEnvironment:
    """One trip. `databases`: folder of task folders by language. `system`: system prompt by language, may be empty.

    `corrected` are names of tools.sandbox.UPSTREAM_BUGS.
    """

    def __init__(
        self,
        databases: Mapping[str, Path],
        system: Mapping[str, str],
        *,
        corrected: Collection[str] = (),
        show_schemas: bool = True,
        official_join: bool = False,
    ) -> None:
        self._databases, self._system, self._corrected = databases, system, corrected
        self._show_schemas, self._official_join = show_schemas, official_join

    def reset(self, task: Task) -> Start:
        self._task = task
        folder = task_folder(self._databases[task.lang], task.id)
        self._sandbox = TravelSandbox(folder, task.lang, self._corrected)
        system = self._system.get(task.lang, "")
        messages = [{"role": "system", "content": system}] if system else []
        tools = tool_schemas(task.lang) if self._show_schemas else []
        return Start([*messages, {"role": "user", "content": task.query}], tools)

    def step(self, calls: list[Call]) -> list[str]:
        return [self._sandbox.call(call.name, call.arguments) for call in calls]

    def score(self, text: str) -> dict[str, float]:
        """`fraction` is the paper's metric, `personalized` the official 0/1; an undelivered plan satisfies nothing."""
        plan = parse_plan(extract_plan(text, self._official_join))
        score = score_plan(plan, self._task.meta)
        return {
            "fraction": score.fraction,
            "personalized": score.personalized_score,
            "fraction_without_budget": score.fraction_without_budget,
            "delivered": float(plan is not None),
        }
