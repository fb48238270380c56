"""Grade a file of responses: one JSON verdict a line, and the counts in the last line.

    python -m tip_exp.grading responses.jsonl --text response --answer answer

Each line of the file is a JSON object; --text names the field with the response, --answer the one with the reference
answer. Both graders grade every response: --grader selects the verdicts to print, the last line says how often the two
agree.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tip_exp.grading import cores, string_match
from tip_exp.grading.pool import TIME_LIMIT_S, GradingPool
from tip_exp.grading.types import FAILURES, Verdict

BAD_INPUT, INTERRUPTED = 2, 130

_KINDS = {"unparsed": "unparsed", "timeout": "timeout"} | dict.fromkeys(FAILURES, "failed")  # by rule, else "wrong"


class InputError(ValueError):
    """The file cannot be graded; the message is one line that says where and why."""


def main() -> None:
    try:
        options = _options()
        pairs = read_pairs(options.file, options.text, options.answer)
        _print_verdicts(pairs, options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # `... | head` has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def read_pairs(file: Path, text_field: str, answer_field: str) -> list[tuple[str, str]]:
    """All (response, reference answer) pairs of a JSON-lines file. Raises InputError at the first invalid line."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 (byte {error.start})") from None
    pairs = [
        _pair(line, f"{file}, line {number}", text_field, answer_field)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not pairs:
        raise InputError(f"{file} has no lines to grade")
    return pairs


def count(verdicts: list[Verdict], agreements: list[bool]) -> dict[str, float | int]:
    """The last line. total = right + wrong + unparsed + timeout + failed; rules of failed ones are FAILURES."""
    kinds = Counter("right" if verdict.right else _KINDS.get(verdict.rule, "wrong") for verdict in verdicts)
    return {
        "total": len(verdicts),
        **{kind: kinds[kind] for kind in ("right", "wrong", "unparsed", "timeout", "failed")},
        "strict_agreement": sum(agreements) / len(agreements),
        "strict_disagreements": agreements.count(False),
    }


def _print_verdicts(pairs: list[tuple[str, str]], options: argparse.Namespace) -> None:
    verdicts: list[Verdict] = []
    agreements: list[bool] = []
    with GradingPool(min(options.workers, len(pairs)), time_limit=options.time_limit) as pool:
        for (text, answer), by_value in zip(pairs, pool.stream(pairs), strict=True):
            start = time.perf_counter()
            by_string = string_match.grade(text, answer)
            seconds = time.perf_counter() - start
            verdict = by_value if options.grader == "math" else replace(by_string, seconds=seconds)
            print(json.dumps(asdict(verdict) | {"seconds": round(verdict.seconds, 6)}), flush=True)
            verdicts.append(verdict)
            agreements.append(by_value.right == by_string.right)
    print(json.dumps(count(verdicts, agreements)), flush=True)


def _pair(line: str, location: str, text_field: str, answer_field: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{location} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise InputError(f"{location} is {_type_name(row)}, not a JSON object")
    for field in (text_field, answer_field):
        if field not in row:
            raise InputError(f"{location} has no field {field!r}; it has {', '.join(map(repr, row)) or 'none'}")
    text, answer = row[text_field], row[answer_field]
    if not isinstance(text, str):
        raise InputError(f"{location}: {text_field!r} is {_type_name(text)}, not a string")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise InputError(f"{location}: {answer_field!r} is {_type_name(answer)}, neither a string nor a number")
    return text, str(answer)


def _type_name(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return kinds.get(type(value), "null")


def _options() -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m tip_exp.grading", allow_abbrev=False, description=__doc__.partition("\n")[0]
    )
    parser.add_argument("file", type=Path, help="JSON lines")
    parser.add_argument("--text", required=True, metavar="FIELD", help="field with the response")
    parser.add_argument("--answer", required=True, metavar="FIELD", help="field with the reference answer")
    parser.add_argument(
        "--grader",
        choices=("math", "strict"),
        default="math",
        help="verdicts to print (math)",
    )
    parser.add_argument("--time-limit", type=float, default=TIME_LIMIT_S, metavar="S", help="seconds a response (5)")
    parser.add_argument("--workers", type=int, default=cores(), metavar="N", help="processes (one a core)")
    options = parser.parse_args()
    for name, value in (("--time-limit", options.time_limit), ("--workers", options.workers)):
        if not 0 < value < math.inf:
            parser.error(f"argument {name}: {value} is not a finite number above 0")
    return options


if __name__ == "__main__":
    main()
