"""Problems from a table: a file on the hub, a local jsonl, parquet or csv, or a folder of such files."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tip_exp.data.dataset import Dataset
from tip_exp.types import Problem
from tip_exp.utils.errors import DataError

SHUFFLE_SEED = 42  # of a part; with it 0.0 to 0.8 of DAPO-Math-17k are the rows that the paper's base code trains on

if TYPE_CHECKING:
    from tip_exp.config.schema import TableConfig


def load(dataset: TableConfig) -> Dataset:
    """Find the file, map its fields, take the configured part."""
    path, source = _locate(dataset)
    rows = read_rows(path)
    problems = [_problem(dataset, row, number, path) for number, row in enumerate(rows)]
    if dataset.part is not None:
        start, stop = dataset.part
        problems = [problems[i] for i in part_of(len(problems), SHUFFLE_SEED, start, stop)]
    if dataset.num_problems is not None:
        problems = problems[: dataset.num_problems]
    if not problems:
        raise DataError(f"{dataset.label}: {path} has no rows in the configured part")
    return Dataset(problems, source, hashlib.sha256(path.read_bytes()).hexdigest())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a jsonl, parquet or csv file, by its ending."""
    ending = path.suffix.lower()
    if ending == ".jsonl":
        return [
            _json_row(line, number, path)
            for number, line in enumerate(path.read_bytes().splitlines(), 1)
            if line.strip()
        ]
    if ending == ".parquet":
        import pyarrow.parquet as parquet

        return parquet.read_table(path).to_pylist()
    if ending == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file))
    raise DataError(f"{path}: a data set is a .jsonl, .parquet or .csv file; got {ending or 'no ending'}")


def part_of(length: int, seed: int, start: float, stop: float) -> list[int]:
    """Indices of a share of a shuffled table: numpy's default_rng(seed).permutation, as the datasets library shuffles.

    part_of(17398, 42, 0.0, 0.8) has 13,918 indices, part_of(17398, 42, 0.8, 1.0) the other 3,480.
    """
    order = np.random.default_rng(seed).permutation(length)
    return order[int(length * start) : int(length * stop)].tolist()


def _locate(dataset: TableConfig) -> tuple[Path, str]:
    """The local file if one is set, else the hub's; the string says which it was."""
    if dataset.file is not None:
        return Path(dataset.file).expanduser(), dataset.file
    from huggingface_hub import hf_hub_download

    assert dataset.hub is not None, "a table without hub and file is refused with the config"
    repo, _, revision_and_name = dataset.hub.partition("@")
    revision, _, name = revision_and_name.partition(":")
    try:
        path = hf_hub_download(repo, name, repo_type="dataset", revision=revision)
    except (OSError, ValueError) as error:  # every error of the hub's library is one of these
        raise DataError(
            f"{dataset.label}: {repo} cannot be loaded from the hub ({str(error).splitlines()[0]}); "
            "set data.root to a folder that holds the data files"
        ) from error
    return Path(path), dataset.hub


def _problem(dataset: TableConfig, row: dict[str, Any], number: int, path: Path) -> Problem:
    fields = dataset.fields
    prompt = _text(row, fields.prompt, number, path)
    for wrapper in dataset.strip:
        prompt = prompt.removeprefix(wrapper).removesuffix(wrapper)
    answer = _text(row, fields.answer, number, path)
    if dataset.answer_after is not None:
        solution, found, answer = answer.rpartition(dataset.answer_after)
        if not found:
            raise DataError(f"{path}, row {number + 1}: {fields.answer} has no {dataset.answer_after!r}")
    else:
        solution = _text(row, fields.solution, number, path) if fields.solution else ""
    name = _text(row, fields.id, number, path) if fields.id else str(number)
    return Problem(f"{dataset.label}/{name}", prompt.strip() + dataset.suffix, answer.strip(), solution)


def _text(row: dict[str, Any], field: str, number: int, path: Path) -> str:
    """A field by its dotted path: "reward_model.ground_truth", "prompt.0.content"."""
    value: Any = row
    for part in field.split("."):
        try:
            value = value[int(part)] if isinstance(value, list) else value[part]
        except (KeyError, IndexError, TypeError, ValueError):
            there = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
            raise DataError(f"{path}, row {number + 1}: no field {field!r} (at {part!r} there is: {there})") from None
    if value is None:
        raise DataError(f"{path}, row {number + 1}: field {field!r} is empty")
    return str(value)


def _json_row(line: bytes, number: int, path: Path) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}, line {number}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {number}: a row is a JSON object; got {type(row).__name__}")
    return row
