"""DeepPlanning's travel tasks as an environment: nine tools over a task's tables; the plan is scored without tables."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tip_exp.envs.base import Call, Start
from tip_exp.envs.deepplanning.data import TABLES, Task, task_folder
from tip_exp.envs.deepplanning.plan.parse import extract_plan, parse_plan
from tip_exp.envs.deepplanning.score.score import score_plan
from tip_exp.envs.deepplanning.tools.sandbox import TravelSandbox
from tip_exp.envs.deepplanning.tools.schemas import tool_schemas
from tip_exp.utils.errors import DataError


@dataclass
class TravelEnvironment:
    """One trip. `corrected` are names of tools.sandbox.UPSTREAM_BUGS.

    `digests`: path -> SHA-256 of each table of generated tasks, which are checked when an episode starts.
    """

    databases: Mapping[str, Path]  # language -> folder of task folders
    system: Mapping[str, str]  # language -> system prompt, may be empty
    corrected: Collection[str] = ()
    show_schemas: bool = True
    official_join: bool = False
    digests: Mapping[Path, str] = field(default_factory=dict)

    def reset(self, task: Task) -> Start:
        self._task = task
        folder = task_folder(self.databases[task.lang], task.id)
        if self.digests:
            self._check(folder)
        self._sandbox = TravelSandbox(folder, task.lang, self.corrected)
        system = self.system.get(task.lang, "")
        messages = [{"role": "system", "content": system}] if system else []
        tools = tool_schemas(task.lang) if self.show_schemas else []
        return Start([*messages, {"role": "user", "content": task.query}], tools)

    def _check(self, folder: Path) -> None:
        for table, _ in TABLES.values():
            path = folder / table
            digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
            if digest != self.digests.get(path):
                raise DataError(f"{path} has changed since the run started; the same command writes it again")

    def step(self, calls: list[Call]) -> list[str]:
        return [self._sandbox.call(call.name, call.arguments) for call in calls]

    def score(self, text: str) -> dict[str, float]:
        """`fraction` is the paper's metric, `personalized` the official 0/1; an undelivered plan satisfies nothing.

        `text` holds all turns, as in the base code; upstream reads the last one only.
        """
        plan = parse_plan(extract_plan(text, self.official_join))
        score = score_plan(plan, self._task.meta)
        return {
            "fraction": score.fraction,
            "personalized": score.personalized_score,
            "fraction_without_budget": score.fraction_without_budget,
            "delivered": float(plan is not None),
        }
