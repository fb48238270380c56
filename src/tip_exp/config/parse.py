"""Where YAML becomes a typed run, with everything that is wrong with it told at once; and how two runs differ."""

from __future__ import annotations

import difflib
import hashlib
import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from tip_exp.config.rules import broken_rules, missing_folder
from tip_exp.config.schema import TOOL_TASKS, AgentConfig, RunConfig, TableConfig, WordSumsConfig
from tip_exp.utils.errors import ConfigError


def parse(raw: DictConfig, *, with_weights: bool = True) -> RunConfig:
    """Turn a composed config into a typed one, or raise one ConfigError that lists everything wrong with it.

    `with_weights`: local models have to be there; a dry run does without.
    """
    try:
        values = OmegaConf.to_container(raw, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, ValueError) as error:
        raise _config_error([str(error).splitlines()[0]]) from error
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        raise _config_error([_told(detail) for detail in error.errors()]) from None
    problems = list(broken_rules(config))
    if with_weights:
        for role in ("teacher", "student"):
            problems += missing_folder(f"pair.{role}.path", getattr(config.pair, role).path)
    if problems:
        raise _config_error(problems)
    return config


def load(path: Path) -> RunConfig:
    """Read the config.yaml that a run wrote."""
    raw = OmegaConf.load(path)
    assert isinstance(raw, DictConfig)
    return parse(raw)


def deciding_values(config: RunConfig) -> dict[str, Any]:
    """Everything that decides a run's numbers, flat: where it logs and what it is called do not."""
    return flatten(config.model_dump(exclude={"name", "sweep", "logger", "ignore_memory"}))


def digest(config: RunConfig) -> str:
    """12 hex digits of `deciding_values`."""
    return hashlib.sha256(json.dumps(deciding_values(config), sort_keys=True).encode()).hexdigest()[:12]


def differences(before: RunConfig, after: RunConfig) -> list[str]:
    """What decides the numbers and differs: ["learner.lr: 1e-06 -> 2e-06"]."""
    old, new = deciding_values(before), deciding_values(after)
    keys = sorted(old.keys() | new.keys())
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys if old.get(key) != new.get(key)]


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"learner": {"lr": 1}} -> {"learner.lr": 1}"""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _config_error(problems: list[str]) -> ConfigError:
    if len(problems) == 1:
        return ConfigError(f"this configuration cannot run: {problems[0]}")
    return ConfigError("this configuration cannot run:\n" + "\n".join(f"  - {problem}" for problem in problems))


def _told(detail: Any) -> str:
    """One pydantic error as: key, what is allowed, what came."""
    path = _without_kind([str(part) for part in detail["loc"] if part != "[key]"])
    key, message = ".".join(path), detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "missing":
        return f"{key} is missing"
    if detail["type"] == "extra_forbidden":
        siblings = _fields_at(path[:-1])
        close = difflib.get_close_matches(path[-1], siblings, n=1)
        hint = f"did you mean {'.'.join([*path[:-1], close[0]])}?" if close else f"there are {', '.join(siblings)}"
        return f"{key} is not a key; {hint}"
    return f"{key}: {message[0].lower()}{message[1:]}; got {detail['input']!r}"


def _without_kind(path: list[str]) -> list[str]:
    """pydantic puts a data set's kind into the path of an error: data.train.word_sums.seed is data.train.seed."""
    if path[:2] == ["data", "train"]:
        return path[:2] + path[3:]
    return path[:3] + path[4:] if path[:2] == ["eval", "benchmarks"] else path


def _fields_at(path: list[str]) -> list[str]:
    """Names of the keys beside a wrong one."""
    if path[:2] in (["data", "train"], ["eval", "benchmarks"]):
        kinds = (WordSumsConfig, TableConfig, *TOOL_TASKS)
        return sorted({field for kind in kinds for field in kind.model_fields})
    if path == ["agent"]:
        return list(AgentConfig.model_fields)
    model: Any = RunConfig
    for part in path:
        model = model.model_fields[part].annotation
    return list(model.model_fields)
