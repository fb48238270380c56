"""Tool tasks as data sets: official travel tasks from a folder, generated ones, and the calculator's formulas."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from tip_exp.data.dataset import DATA_SEED, Dataset
from tip_exp.envs import calculator
from tip_exp.envs.base import ToolTasks
from tip_exp.envs.deepplanning.data import Task, find_databases, load_tasks
from tip_exp.envs.deepplanning.environment import TravelEnvironment
from tip_exp.envs.deepplanning.mini import errands
from tip_exp.envs.deepplanning.mini import files as mini_files
from tip_exp.envs.deepplanning.prompts import compact_prompt, official_prompt
from tip_exp.envs.deepplanning.score.constraints import answers
from tip_exp.envs.deepplanning.split import no_tool_baseline, read_split
from tip_exp.types import Problem
from tip_exp.utils.errors import DataError

if TYPE_CHECKING:
    from tip_exp.config.schema import CalculatorConfig, TravelConfig


def load_calculator(dataset: CalculatorConfig) -> Dataset:
    formulas = list(islice(calculator.stream(dataset.split, DATA_SEED), dataset.num_problems))
    problems = [Problem(f"{f.id}", f.text, str(f.value)) for f in formulas]
    tools = ToolTasks({f.id: f for f in formulas}, calculator.CalculatorEnvironment, no_tool_baseline=0.0)
    text = "\n".join(f"{p.prompt}\t{p.answer}" for p in problems)
    return Dataset(problems, f"calculator, seed {DATA_SEED}", hashlib.sha256(text.encode()).hexdigest(), tools)


def load_travel(dataset: TravelConfig) -> Dataset:
    """The tasks of the configured split, in the order of the query file, one language after the other."""
    root = _official(dataset) if dataset.world == "official" else _generated(dataset)
    tasks = [task for lang in dataset.langs for task in load_tasks(root, lang)]
    if dataset.world == "official":
        split = read_split()
        wanted = frozenset(split.train if dataset.split == "train" else split.test)
        tasks = [task for task in tasks if task.id in wanted]
    tasks = tasks[: dataset.num_problems]
    if not tasks:
        raise DataError(f"{dataset.label}: no task of {root} is in the {dataset.split} split")
    problems = [_problem(dataset.label, task) for task in tasks]
    environment = partial(
        TravelEnvironment,
        find_databases(root),
        {lang: _system_prompt(dataset, lang, root) for lang in dataset.langs},
        corrected=dataset.corrected,
        show_schemas=dataset.show_schemas,
        official_join=dataset.official_join,
    )
    named = {problem.id: task for problem, task in zip(problems, tasks, strict=True)}
    text = json.dumps([[task.id, task.lang, task.query, task.meta] for task in tasks], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Dataset(problems, str(root), digest, ToolTasks(named, environment, no_tool_baseline(tasks)))


def _problem(label: str, task: Task) -> Problem:
    wanted = {key: list(answers(constraint)) for key, constraint in task.constraints.items()}
    return Problem(f"{label}/{task.lang}/{task.id}", task.query, json.dumps(wanted, ensure_ascii=False))


def _system_prompt(dataset: TravelConfig, lang: str, root: Path) -> str:
    if dataset.prompt == "none":
        return ""
    return compact_prompt(lang) if dataset.prompt == "compact" else official_prompt(root, lang)


def _official(dataset: TravelConfig) -> Path:
    if dataset.root is None:
        raise DataError(f"{dataset.label}: set data.root to the folder that holds the official queries and databases")
    return Path(dataset.root).expanduser()


def _generated(dataset: TravelConfig) -> Path:
    """The folder of a generated world; made once for each of its settings, and again if the generator changes."""
    assert dataset.num_problems is not None, "the config asks how many tasks to generate"
    seed, count = f"{dataset.split}/{DATA_SEED}", dataset.num_problems
    sources = [Path(module.__file__ or "").read_bytes() for module in (errands, mini_files)]
    version = hashlib.sha256(b"".join(sources)).hexdigest()[:8]
    cache = Path(tempfile.gettempdir()) / f"tip_exp_{os.getuid()}"
    root = cache / f"{dataset.world}-{seed.replace('/', '-')}-{count}-{version}"
    mini_files.write(root, errands.stream(seed, count))
    return root
