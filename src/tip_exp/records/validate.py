"""Checks that a run's files hold the keys and types that tables and plots read; a file that fails is damaged."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any

# Where a dotted key must hold a value of these types.
_CONFIG: dict[str, tuple[type, ...]] = {
    "seed": (int,),
    "pair.label": (str,),
    "data.label": (str,),
    "selector.label": (str,),
    "selector.score": (str,),
    "selector.retention": (int, float),
    "eval.samples": (int,),
    "eval.benchmarks": (dict,),
}
_RESULT: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("start", "teacher", "final", "totals", "memory", "outcomes", "versions"), (dict,)),
    **dict.fromkeys(("digest", "hardware", "finished_at"), (str,)),
    "git_revision": (str, type(None)),
}
_OPTIONAL: dict[str, tuple[type, ...]] = {"datasets": (dict,), "health": (str,), "rollout": (dict,)}
_MEASURED = ("start", "teacher", "final", "totals", "memory")


def check_config(config: Any) -> None:
    """Raise ValueError, which names the key, unless config.yaml holds what every run has."""
    _check_types("config.yaml", config, _CONFIG)


def check_result(result: Any) -> None:
    """Raise ValueError unless result.json is that of a finished run, with finite scores of its problems."""
    _check_types("result.json", result, _RESULT | {key: types for key, types in _OPTIONAL.items() if key in result})
    for part in _MEASURED:
        for name, value in result[part].items():
            if value is not None and not isinstance(value, Real):
                raise ValueError(f"result.json: {part}.{name} is no number")
    for benchmark, outcome in result["outcomes"].items():
        if not isinstance(outcome, dict) or not isinstance(outcome.get("samples"), int):
            raise ValueError(f"result.json: outcomes.{benchmark} has no number of samples")
        for key, scores in outcome.items():
            if key != "samples" and not (isinstance(scores, dict) and _all_finite(scores.values())):
                raise ValueError(f"result.json: outcomes.{benchmark}.{key} holds what is no finite number")


def check_samples(rows: list[Any]) -> None:
    """Raise ValueError unless each row of samples.jsonl is a rollout with as many values as tokens."""
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise ValueError(f"samples.jsonl, line {number}: no step")
        tokens = row.get("tokens")
        if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
            raise ValueError(f"samples.jsonl, line {number}: no tokens")
        if not isinstance(row.get("kept"), list):
            raise ValueError(f"samples.jsonl, line {number}: no list of kept tokens")
        for key, values in row.items():
            if isinstance(values, list) and len(values) != len(tokens):
                raise ValueError(f"samples.jsonl, line {number}: {len(tokens)} tokens, but {len(values)} of {key}")


def check_metrics(rows: list[Any]) -> None:
    """Raise ValueError unless each row of metrics.jsonl has a step and numbers."""
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise ValueError(f"metrics.jsonl, line {number}: no step")
        for name, value in row.items():
            if value is not None and not isinstance(value, Real):
                raise ValueError(f"metrics.jsonl, line {number}: {name} is no number")


def is_finite(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def _all_finite(values: Iterable[Any]) -> bool:
    return all(map(is_finite, values))


def _check_types(name: str, values: Any, types: dict[str, tuple[type, ...]]) -> None:
    for key, allowed in types.items():
        value = values
        for part in key.split("."):
            value = value.get(part, ...) if isinstance(value, dict) else ...
        if not isinstance(value, allowed):
            raise ValueError(f"{name} has no {key}" if value is ... else f"{name}: {key} has the wrong type")
