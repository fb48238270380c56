"""Problems from one table file (jsonl, parquet or csv): on the Hugging Face Hub, in a folder, or named directly."""

from __future__ import annotations

import csv
import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tip_exp.data.dataset import Dataset
from tip_exp.data.fields import BOX, value_of, with_fields
from tip_exp.grading.extract import extract
from tip_exp.types import Problem
from tip_exp.utils.errors import DataError, first_line
from tip_exp.utils.io import checksum, json_objects

if TYPE_CHECKING:
    from tip_exp.config.datasets import TableConfig

SHUFFLE_SEED = 42  # the part [0.0, 0.8] of DAPO-Math-17k is then what the paper's base code trains on
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can write one, UTF-8 and tokenizers cannot


def load(config: TableConfig, section: str = "data.train") -> Dataset:
    """Locate the file, map its fields to problems, and take the configured part.

    Of training problems with one prompt the first is kept; benchmarks are read as published. Messages name keys of
    `section`, the data set's place in the run's config.
    """
    path, source = _locate(config)
    sha256 = checksum(path)
    if config.file is not None and not sha256.startswith(config.sha256 or ""):
        raise DataError(f"{path} has changed since this run was configured (SHA-256 {config.sha256}): restore it")
    rows = read_rows(path)
    config = with_fields(config, rows, path, section)
    problems = [_problem(config, row, number, path, section) for number, row in enumerate(rows, 1)]
    if (part := config.part) is not None:
        problems = [problems[i] for i in part_of(len(problems), *part)]
    if config.split == "train":
        problems = _distinct(problems)
    problems = problems[: config.num_problems]
    if config.split != "train":
        _check_ids(problems, path, section)
    if not problems:
        where = "" if config.part is None else f" in part={list(config.part)}"
        raise DataError(f"data set {config.label}: {path} has no rows{where}")
    return Dataset(problems, source, sha256)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a jsonl, parquet or csv file; its extension decides the format."""
    extension = path.suffix.lower()
    if extension == ".jsonl":
        return [row for _, row in json_objects(path)]
    if extension == ".parquet":
        import pyarrow.parquet as parquet

        with _named(path):
            return parquet.read_table(path).to_pylist()
    if extension == ".csv":
        csv.field_size_limit(2**31 - 1)  # characters of a cell, by default 131,072
        with path.open(encoding="utf-8-sig", newline="") as file, _named(path):
            rows = list(csv.DictReader(file))
        for number, row in enumerate(rows, 1):
            if None in row:
                raise DataError(f"{path}, row {number}: more cells than the header; quote values that contain commas")
        return rows
    raise DataError(f"{path}: a data set is a .jsonl, .parquet or .csv file; got {extension or 'no extension'}")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Raise a DataError that names the file if its content cannot be read."""
    try:
        yield
    except (ValueError, OSError, csv.Error) as error:  # pyarrow's errors are of the first two
        remedy = "; text must be in UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        raise DataError(f"{path} cannot be read ({first_line(error)}){remedy}") from None


def part_of(length: int, start: float, stop: float) -> list[int]:
    """Indices of the fractions [start, stop) of a shuffled table: part_of(17398, 0.0, 0.8) has 13,918.

    The shuffle is numpy's default_rng(seed).permutation, as in the `datasets` library.
    """
    order = np.random.default_rng(SHUFFLE_SEED).permutation(length)
    return order[int(length * start) : int(length * stop)].tolist()


def _locate(config: TableConfig) -> tuple[Path, str]:
    """Path and provenance of the file: `file` if set, else `hub` ("repo@revision:file name")."""
    if config.file is not None:
        return Path(config.file).expanduser(), config.file
    from huggingface_hub import hf_hub_download

    assert config.hub is not None, "rules.py requires hub or file"
    repo, _, revision_and_name = config.hub.partition("@")
    revision, _, name = revision_and_name.partition(":")
    try:
        path = hf_hub_download(repo, name, repo_type="dataset", revision=revision)
    except (OSError, ValueError) as error:  # base classes of all errors of huggingface_hub
        raise DataError(
            f"{config.label}: {repo} cannot be loaded from the hub ({str(error).splitlines()[0]}); "
            "set data.root to a folder that holds the data files"
        ) from error
    return Path(path), config.hub


def _problem(config: TableConfig, row: dict[str, Any], number: int, path: Path, section: str) -> Problem:
    """Map a row; `number` counts rows from 1."""
    fields, location = config.fields, f"{path}, row {number}"
    prompt = _text(row, fields.prompt, location)
    for wrapper in config.strip:
        prompt = prompt.removeprefix(wrapper).removesuffix(wrapper)
    answer = _text(row, fields.answer, location) if fields.answer else ""
    if config.answer_after == BOX:
        solution, answer = answer, extract(answer).answer or ""
    elif config.answer_after is not None:
        solution, mark, answer = answer.rpartition(config.answer_after)
        if not mark:
            raise DataError(f"{location}: {fields.answer} has no {config.answer_after!r}")
    else:
        otherwise = f", or set {section}.fields.solution to null"
        solution = _text(row, fields.solution, location, otherwise) if fields.solution else ""
    if not prompt.strip():
        raise DataError(f"{location}: field {fields.prompt!r} is empty")
    if not answer.strip() and config.split != "train":  # training does not compare answers
        after = f" after {config.answer_after!r}" if config.answer_after else ""
        raise DataError(f"{location}: field {fields.answer!r} is empty{after}")
    otherwise = f", or set {section}.fields.id to null"
    row_id = _text(row, fields.id, location, otherwise) if fields.id else str(number - 1)
    return Problem(f"{config.label}/{row_id}", prompt.strip() + config.suffix, answer.strip(), solution)


def _distinct(problems: list[Problem]) -> list[Problem]:
    first: dict[str, Problem] = {}
    for problem in problems:
        first.setdefault(problem.prompt, problem)
    return list(first.values())


def _check_ids(problems: list[Problem], path: Path, section: str) -> None:
    """Raise DataError if two problems have one id: their responses would be counted as those of one problem."""
    for problem_id, count in Counter(problem.id for problem in problems).items():
        if count > 1:
            repeated = problem_id.partition("/")[2]  # after the data set's label
            raise DataError(
                f"{path}: {count} rows have the id {repeated!r}; make ids unique, or set {section}.fields.id to null"
            )


def _text(row: dict[str, Any], field: str, location: str, otherwise: str = "") -> str:
    """A text or number as text; DataError, whose remedy ends with `otherwise`, for another value."""
    value = value_of(row, field, location)
    if isinstance(value, dict | list):
        part: Any = 0
        if isinstance(value, dict):
            part = "content" if "content" in value else next(iter(value), "name")
        held = type(value).__name__
        raise DataError(
            f"{location}: field {field!r} holds a {held}; name a part of it, such as {field}.{part}{otherwise}"
        )
    if isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
        raise DataError(f"{location}: field {field!r} holds {value}; a text or a finite number is allowed{otherwise}")
    text = str(value)
    if lone := _LONE_SURROGATE.search(text):
        raise DataError(
            f"{location}: field {field!r} holds a lone surrogate ({lone[0]!r}) after {lone.start()} characters; remove "
            "or replace it"
        )
    return text
