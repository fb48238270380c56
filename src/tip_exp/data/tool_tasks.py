"""Tool tasks as data sets: DeepPlanning's travel tasks, generated travel tasks, and calculator formulas."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from tip_exp.data.dataset import Dataset
from tip_exp.data.generated import DATA_SEED, split_of
from tip_exp.envs import calculator
from tip_exp.envs.base import ToolTasks
from tip_exp.envs.deepplanning import errands
from tip_exp.envs.deepplanning.data import Task, find_databases, load_tasks
from tip_exp.envs.deepplanning.environment import TravelEnvironment
from tip_exp.envs.deepplanning.prompts import COMPACT_PROMPTS, official_prompt
from tip_exp.envs.deepplanning.score.constraints import answers
from tip_exp.envs.deepplanning.split import no_tool_baseline, read_split
from tip_exp.types import Problem
from tip_exp.utils.distinct import distinct
from tip_exp.utils.errors import DataError
from tip_exp.utils.paths import private_folder

if TYPE_CHECKING:
    from tip_exp.config.datasets import CalculatorConfig, TravelConfig


def load_calculator(config: CalculatorConfig) -> Dataset:
    """The first `num_problems` formulas of the configured stream."""
    stream = calculator.stream(config.split, DATA_SEED)
    of_split = (problem for problem in stream if split_of(problem.prompt) == config.split)  # none is in two splits
    problems = list(islice(distinct(of_split, lambda problem: problem.prompt), config.num_problems))
    if len(problems) < config.num_problems:
        raise DataError(
            f"{config.label}: only {len(problems)} distinct formulas in the {config.split} split; got "
            f"num_problems={config.num_problems}"
        )
    tasks = {problem.id: problem for problem in problems}
    tools = ToolTasks(tasks, calculator.CalculatorEnvironment, no_tool_baseline=0.0)
    return Dataset.generated(problems, f"calculator, seed {DATA_SEED}", tools)


def load_travel(config: TravelConfig, section: str = "data.train") -> Dataset:
    """The tasks of the configured split, language by language, in the order of the query file."""
    digests: dict[Path, str] = {}
    if config.world == "official":
        assert config.root is not None, "rules.py requires data.root for official tasks"
        root = Path(config.root).expanduser()
        task_ids = read_split()[config.split]
        tasks = [task for lang in config.langs for task in load_tasks(root, lang) if task.id in task_ids]
    else:
        root, digests = _generated(config)
        tasks = [task for lang in config.langs for task in load_tasks(root, lang)]
    databases = find_databases(root)
    for lang in config.langs:
        if lang not in databases:
            raise DataError(
                f"{section}.langs={list(config.langs)}: there is no folder database_{lang} beside "
                f"{next(iter(databases.values()))}; add it, or set the key to [{', '.join(databases)}]"
            )
    tasks = tasks[: config.num_problems]
    if not tasks:
        raise DataError(f"{config.label}: no task of {root} is in the {config.split} split")
    tasks_by_id = {f"{config.label}/{task.lang}/{task.id}": task for task in tasks}
    problems = [Problem(problem_id, task.query, _answer(task)) for problem_id, task in tasks_by_id.items()]
    environment = partial(
        TravelEnvironment,
        databases,
        {lang: _system_prompt(config, lang, root) for lang in config.langs},
        corrected=config.corrected,
        show_schemas=config.show_schemas,
        official_join=config.official_join,
        digests=digests,
    )
    text = json.dumps([[task.id, task.lang, task.query, task.meta] for task in tasks], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Dataset(problems, str(root), digest, ToolTasks(tasks_by_id, environment, no_tool_baseline(tasks)))


def _answer(task: Task) -> str:
    answer = {key: list(answers(constraint)) for key, constraint in task.constraints.items()}
    return json.dumps(answer, ensure_ascii=False)


def _system_prompt(config: TravelConfig, lang: str, root: Path) -> str:
    if config.prompt == "none":
        return ""
    return COMPACT_PROMPTS[lang] if config.prompt == "compact" else official_prompt(root, lang)


def _generated(config: TravelConfig) -> tuple[Path, dict[Path, str]]:
    """The folder of generated tasks and databases, and the SHA-256 of its tables.

    Its name has the settings and a digest of the files: another version of the generator leaves it alone.
    """
    assert config.num_problems is not None, "rules.py requires num_problems for generated tasks"
    seed, count = f"{config.split}/{DATA_SEED}", config.num_problems
    folder = private_folder(Path(tempfile.gettempdir()) / f"tip_exp_data_{os.getuid()}")
    tasks = errands.stream(seed, count)
    root = folder / f"{config.world}-{seed.replace('/', '-')}-{count}-{errands.digest(tasks)}"
    return root, errands.write(root, tasks)
