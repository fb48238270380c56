"""Grade your own files: score plans, answer tool calls, draw the split.

    python -m tip_exp.deepplanning score PLANS.jsonl --queries DIR [--database DIR]
    python -m tip_exp.deepplanning call CALLS.jsonl --database DIR
    python -m tip_exp.deepplanning split --queries DIR --test-frac 0.2 --seed 0
Every input line gives one line of JSON. A wrong line stops the command before any output, with a one-line error that
names file, line and fault.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from tip_exp.envs.deepplanning.data import LANGS, Task, find_databases, find_queries, load_tasks, task_folder
from tip_exp.envs.deepplanning.plan.parse import extract_plan, parse_plan
from tip_exp.envs.deepplanning.score.score import score_plan
from tip_exp.envs.deepplanning.score.tables import TaskTables
from tip_exp.envs.deepplanning.split import split_to_yaml
from tip_exp.envs.deepplanning.tools.sandbox import TravelSandbox
from tip_exp.utils.errors import DataError, exit_on_error, quiet_when_reader_closes
from tip_exp.utils.io import json_objects

TASKS_IN_MEMORY = 8  # the distance table of a task has tens of thousands of rows
PRINTED = ("constraints", "passed", "total", "fraction", "personalized_score")
PRINTED_WITH_TABLES = (*PRINTED, "commonsense", "commonsense_score", "composite_score", "case_acc")

SCORE_HELP = """Score plans, one JSON object per line: {"lang": "en", "id": "0", "plan": …}.
`plan` is an object in the official layout, or text: a model's answer with <plan>…</plan>, or only the text between
the tags; null is an undelivered plan. `lang` is optional if DIR has one language only."""
CALL_HELP = """Answer tool calls, one JSON object per line: {"lang": "en", "id": "0", "tool": "search_location",
"args": {"place_name": "Laomendong"}}; `args` may also be JSON as text. `lang` chooses the language of the tools and
the tables; if DIR has the tables of one language only, those are used."""


@quiet_when_reader_closes
def main() -> None:
    args = _arguments().parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):  # Chinese text on a terminal of any encoding
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    with exit_on_error(ValueError, OSError):
        for line in args.run(args):
            print(line)


def score(args: argparse.Namespace) -> Iterator[str]:
    """Verdicts and scores of every plan; with tables also the commonsense checks."""
    tasks = {lang: {task.id: task for task in load_tasks(args.queries, lang)} for lang in find_queries(args.queries)}
    databases = find_databases(args.database) if args.database else {}
    load_tables = lru_cache(TASKS_IN_MEMORY)(TaskTables.load)
    jobs: list[tuple[Task, dict[str, Any] | None, Path | None]] = []
    for where, record, lang, task_id in _records(args.file, list(tasks)):
        if lang not in tasks:
            raise DataError(f"{where}: lang is {lang!r}, but {args.queries} has only tasks in {', '.join(tasks)}")
        task = tasks[lang].get(task_id)
        if task is None:
            raise DataError(f"{where}: no task {record['id']!r} among the {len(tasks[lang])} of {lang}")
        if databases and lang not in databases:
            raise DataError(f"{where}: lang is {lang!r}, but {args.database} has only tables in {', '.join(databases)}")
        jobs.append((task, _plan(record, where), task_folder(databases[lang], task.id) if databases else None))
    for task, plan, folder in jobs:
        verdict = score_plan(plan, task.meta, load_tables(folder) if folder else None)
        fields = PRINTED_WITH_TABLES if folder else PRINTED
        yield json.dumps({name: getattr(verdict, name) for name in fields}, ensure_ascii=False)


def call(args: argparse.Namespace) -> Iterator[str]:
    """The text that the model reads after every call."""
    databases = find_databases(args.database)
    sandbox = lru_cache(TASKS_IN_MEMORY)(TravelSandbox)
    jobs: list[tuple[Path, str, str, Any]] = []
    for where, record, lang, task_id in _records(args.file, list(databases)):
        if not isinstance(record.get("tool"), str):
            raise DataError(f"{where}: 'tool' must be the name of a tool; got {record.get('tool')!r}")
        if "args" not in record:
            raise DataError(f"{where}: 'args' is missing; expected an object with the tool's arguments")
        folder = task_folder(databases.get(lang) or next(iter(databases.values())), task_id)
        jobs.append((folder, lang, record["tool"], record["args"]))
    for lang in sorted({lang for _, lang, _, _ in jobs} - databases.keys()):
        print(f"note: {args.database} has no tables in {lang}; using those in {', '.join(databases)}", file=sys.stderr)
    for folder, lang, tool, arguments in jobs:
        yield json.dumps({"result": sandbox(folder, lang).call(tool, arguments)}, ensure_ascii=False)


def split(args: argparse.Namespace) -> Iterator[str]:
    """The split as a YAML file."""
    tasks = [task for lang in find_queries(args.queries) for task in load_tasks(args.queries, lang)]
    yield split_to_yaml(tasks, args.test_frac, args.seed).rstrip("\n")


def _records(file: Path, available: list[str]) -> Iterator[tuple[str, dict[str, Any], str, str]]:
    """("FILE, line N", record, its language, its task id) for every line that is not empty.

    The language may be missing if only one is available. The id is that of the folder: "7", 7 and "id_7" are the same.
    """
    for where, record in json_objects(file):
        lang = record.get("lang", available[0] if len(available) == 1 else None)
        if lang not in LANGS:
            value = repr(lang) if "lang" in record else "none"
            raise DataError(f"{where}: 'lang' must be {' or '.join(LANGS)}; got {value}")
        task_id = record.get("id")
        if isinstance(task_id, bool) or not isinstance(task_id, str | int):
            raise DataError(f"{where}: 'id' must be a task id such as \"0\"; got {task_id!r}")
        if not re.fullmatch(r"[A-Za-z0-9_-]+", str(task_id)):
            raise DataError(f"{where}: a task id consists of letters, digits, - and _; got {task_id!r}")
        yield where, record, lang, str(task_id).removeprefix("id_")


def _plan(record: dict[str, Any], where: str) -> dict[str, Any] | None:
    if "plan" not in record:
        raise DataError(f"{where}: 'plan' is missing; expected an object, text or null")
    plan = record["plan"]
    if isinstance(plan, str):
        has_tags = re.search("<plan>|</think>", plan, re.IGNORECASE)
        return parse_plan(extract_plan(plan) if has_tags else plan)
    if plan is not None and not isinstance(plan, dict):
        raise DataError(f"{where}: 'plan' must be an object, text or null; got {type(plan).__name__}")
    return plan


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tip_exp.deepplanning",
        allow_abbrev=False,
        description="DeepPlanning's travel tasks: grade your own files.",
    )
    commands = parser.add_subparsers(required=True, metavar="score | call | split")
    plain = argparse.RawDescriptionHelpFormatter
    queries = {"type": Path, "required": True, "metavar": "DIR", "help": "official folder, or one with the query files"}
    tables = {"type": Path, "metavar": "DIR", "help": "official folder, or one with database_en/ or database_zh/"}
    command = commands.add_parser(
        "score", allow_abbrev=False, help="score plans", description=SCORE_HELP, formatter_class=plain
    )
    command.add_argument("file", type=Path, metavar="PLANS.jsonl")
    command.add_argument("--queries", **queries)
    command.add_argument("--database", **tables)
    command.set_defaults(run=score)
    command = commands.add_parser(
        "call", allow_abbrev=False, help="answer tool calls", description=CALL_HELP, formatter_class=plain
    )
    command.add_argument("file", type=Path, metavar="CALLS.jsonl")
    command.add_argument("--database", required=True, **tables)
    command.set_defaults(run=call)
    command = commands.add_parser(
        "split", allow_abbrev=False, help="draw training and test ids", description="Write the split as YAML."
    )
    command.add_argument("--queries", **queries)
    command.add_argument("--test-frac", type=float, required=True, metavar="FRACTION", help="of each trip length: 0.2")
    command.add_argument("--seed", type=int, required=True)
    command.set_defaults(run=split)
    return parser


if __name__ == "__main__":
    main()
