"""Doors for anyone's files: score plans, call tools, draw the split.

    python -m tip_exp.deepplanning score PLANS.jsonl --queries DIR [--database DIR]
    python -m tip_exp.deepplanning call CALLS.jsonl --database DIR
    python -m tip_exp.deepplanning split --queries DIR --test-frac 0.2 --seed 0
Every input line gives one line of JSON; a wrong line stops the command with one line that says where and what.
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
from tip_exp.envs.deepplanning.score.score import PlanScore, score_in_world, score_plan
from tip_exp.envs.deepplanning.score.tables import World
from tip_exp.envs.deepplanning.split import split_to_yaml
from tip_exp.envs.deepplanning.tools.sandbox import TravelSandbox

TASKS_IN_MEMORY = 8  # a task's distance table has tens of thousands of rows

SCORE_HELP = """Score plans, one JSON object a line: {"lang": "en", "id": "0", "plan": …}.
`plan` is an object in the official layout, or text: a model's answer with <plan>…</plan>, or what stands between
the tags; null is an undelivered plan. `lang` may be left out where DIR holds one language only."""
CALL_HELP = """Answer tool calls, one JSON object a line: {"lang": "en", "id": "0", "tool": "search_location",
"args": {"place_name": "Laomendong"}}; `args` may also be JSON as text. `lang` chooses the language of the tools and
the tables; where DIR holds the tables of one language only, these are used."""


class InputError(ValueError):
    """A line of an input file that cannot be used; the message names file and line, what came, what is allowed."""


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # Chinese text, whatever the terminal's encoding
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        for line in args.run(args):
            print(line)
    except OSError as error:
        print(f"error: {error.filename or 'output'}: {error.strerror}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def score(args: argparse.Namespace) -> Iterator[str]:
    """Verdicts and scores of every plan; with tables also the commonsense checks."""
    tasks = {lang: {task.id: task for task in load_tasks(args.queries, lang)} for lang in find_queries(args.queries)}
    databases = find_databases(args.database) if args.database else {}
    world = lru_cache(TASKS_IN_MEMORY)(World.load)
    jobs: list[tuple[Task, dict[str, Any] | None, Path | None]] = []
    for where, record in _records(args.file):
        lang = _lang(record, list(tasks), where)
        if lang not in tasks:
            raise InputError(f"{where}: lang is {lang!r}, but {args.queries} has only the tasks of {', '.join(tasks)}")
        task = tasks[lang].get(_task_id(record, where))
        if task is None:
            raise InputError(f"{where}: no task {record['id']!r} among the {len(tasks[lang])} of {lang}")
        if databases and lang not in databases:
            raise InputError(
                f"{where}: lang is {lang!r}, but {args.database} has only the tables of {', '.join(databases)}"
            )
        jobs.append((task, _plan(record, where), task_folder(databases[lang], task.id) if databases else None))
    for task, plan, folder in jobs:
        if folder is None:
            yield json.dumps(_verdict(score_plan(plan, task.meta)), ensure_ascii=False)
            continue
        full = score_in_world(plan, task.meta, world(folder))
        verdict = _verdict(full.personalized) | {
            "commonsense": full.commonsense,
            "commonsense_score": full.commonsense_score,
            "composite_score": full.composite_score,
            "case_acc": full.case_acc,
        }
        yield json.dumps(verdict, ensure_ascii=False)


def call(args: argparse.Namespace) -> Iterator[str]:
    """What the model would read for every call."""
    databases = find_databases(args.database)
    sandbox = lru_cache(TASKS_IN_MEMORY)(TravelSandbox)
    jobs: list[tuple[Path, str, str, Any]] = []
    foreign: set[str] = set()
    for where, record in _records(args.file):
        lang = _lang(record, list(databases), where)
        if lang not in databases:
            foreign.add(lang)
        if not isinstance(record.get("tool"), str):
            raise InputError(f"{where}: 'tool' is to be a tool's name; got {record.get('tool')!r}")
        if "args" not in record:
            raise InputError(f"{where}: 'args' is missing; an object with the tool's arguments is expected")
        folder = task_folder(databases.get(lang) or next(iter(databases.values())), _task_id(record, where))
        jobs.append((folder, lang, record["tool"], record["args"]))
    for lang in sorted(foreign):
        print(
            f"note: {args.database} has no tables of {lang}; those of {', '.join(databases)} are used", file=sys.stderr
        )
    for folder, lang, tool, arguments in jobs:
        yield json.dumps({"result": sandbox(folder, lang).call(tool, arguments)}, ensure_ascii=False)


def split(args: argparse.Namespace) -> Iterator[str]:
    """The split as a YAML file."""
    tasks = [task for lang in find_queries(args.queries) for task in load_tasks(args.queries, lang)]
    yield split_to_yaml(tasks, args.test_frac, args.seed).rstrip("\n")


def _verdict(personalized: PlanScore) -> dict[str, Any]:
    return {
        "constraints": personalized.constraints,
        "passed": personalized.passed,
        "total": personalized.total,
        "fraction": personalized.fraction,
        "personalized_score": personalized.personalized_score,
    }


def _records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where a line stands and what it holds; empty lines are passed over."""
    for number, line in enumerate(file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        where = f"{file}, line {number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: no JSON in UTF-8 ({error})") from None
        if not isinstance(record, dict):
            raise InputError(f"{where}: an object is expected; got {type(record).__name__}")
        yield where, record


def _lang(record: dict[str, Any], present: list[str], where: str) -> str:
    if "lang" not in record and len(present) == 1:
        return present[0]
    if record.get("lang") not in LANGS:
        came = repr(record["lang"]) if "lang" in record else "none"
        raise InputError(f"{where}: 'lang' is to be {' or '.join(LANGS)}; got {came}")
    return record["lang"]


def _task_id(record: dict[str, Any], where: str) -> str:
    """The id as the folders have it; "7", 7 and "id_7" are one task."""
    task_id = record.get("id")
    if isinstance(task_id, bool) or not isinstance(task_id, str | int):
        raise InputError(f"{where}: 'id' is to be a task's id, as \"0\"; got {task_id!r}")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", str(task_id)):
        raise InputError(f"{where}: an id consists of letters, digits, - and _; got {task_id!r}")
    return str(task_id).removeprefix("id_")


def _plan(record: dict[str, Any], where: str) -> dict[str, Any] | None:
    if "plan" not in record:
        raise InputError(f"{where}: 'plan' is missing; an object, text or null is expected")
    plan = record["plan"]
    if isinstance(plan, str):
        answer = re.search("<plan>|</think>", plan, re.IGNORECASE)
        return parse_plan(extract_plan(plan) if answer else plan)
    if plan is not None and not isinstance(plan, dict):
        raise InputError(f"{where}: 'plan' is to be an object, text or null; got {type(plan).__name__}")
    return plan


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tip_exp.envs.deepplanning", description="DeepPlanning, travel half."
    )
    doors = parser.add_subparsers(required=True, metavar="score | call | split")
    plain = argparse.RawDescriptionHelpFormatter
    queries = {"type": Path, "required": True, "metavar": "DIR", "help": "official folder, or the one with the queries"}
    tables = {"type": Path, "metavar": "DIR", "help": "official folder, or the one with database_en/ or database_zh/"}
    door = doors.add_parser("score", help="score plans", description=SCORE_HELP, formatter_class=plain)
    door.add_argument("file", type=Path, metavar="PLANS.jsonl")
    door.add_argument("--queries", **queries)
    door.add_argument("--database", **tables)
    door.set_defaults(run=score)
    door = doors.add_parser("call", help="answer tool calls", description=CALL_HELP, formatter_class=plain)
    door.add_argument("file", type=Path, metavar="CALLS.jsonl")
    door.add_argument("--database", required=True, **tables)
    door.set_defaults(run=call)
    door = doors.add_parser("split", help="draw training and test ids", description="Write the split as YAML.")
    door.add_argument("--queries", **queries)
    door.add_argument("--test-frac", type=float, required=True, metavar="SHARE", help="of each trip length, as 0.2")
    door.add_argument("--seed", type=int, required=True)
    door.set_defaults(run=split)
    return parser


if __name__ == "__main__":
    sys.exit(main())
