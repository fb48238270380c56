"""From a composed YAML to a `RunConfig`, with all its errors in one message; and how two runs differ."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from pathlib import Path
from typing import Any, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import ValidationError
from yaml import YAMLError

from tip_exp.config.datasets import DATASETS, FieldsConfig
from tip_exp.config.machine_rules import missing_models, missing_packages, too_few_positions
from tip_exp.config.rules import broken_rules
from tip_exp.config.schema import RunConfig, SelectorConfig
from tip_exp.utils.errors import ConfigError, first_line

EVAL_SHORTCUTS = ("only", "max_problems", "file")
JSONL = "jsonl"  # the benchmark that eval.file is for
MAX_PROBLEMS, MAX_LENGTH, MAX_SHOWN = 6, 600, 100  # errors listed; characters of each, and of a value in it


def parse(raw: DictConfig, *, with_weights: bool = True) -> RunConfig:
    """Turn a composed config into a typed one, or raise one ConfigError that lists every error in it.

    `with_weights=False` accepts local models and trackers that do not exist, as a dry run does.
    """
    return accept(_resolved(raw), with_weights=with_weights)


def accept(values: Any, *, with_weights: bool = True) -> RunConfig:
    """`parse` for plain values, without interpolations."""
    config = _typed(values)
    missing = [*missing_models(config), *missing_packages(config)] if with_weights else []
    problems = [*broken_rules(config), *missing]
    if problems:
        raise config_error(problems)
    return config


def check_positions(config: RunConfig) -> None:
    """Raise ConfigError if a model of a local folder cannot hold the lengths; reads its config.json alone.

    Before a run starts: the run itself checks again with its prompts, after the evaluation of its teacher.
    """
    if problems := list(too_few_positions(config)):
        raise config_error(problems)


def load(path: Path) -> RunConfig:
    """Read the config.yaml that a run wrote. Its types are checked; the rules were checked when it was written.

    So a run whose model or selection rule has gone since can still be read and compared. Raises ConfigError if the file
    is torn or holds something else, OSError if it cannot be read.
    """
    try:
        raw = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, ValueError, AssertionError) as error:  # OmegaConf asserts
        raise ConfigError(f"{path} is damaged: {first_line(error)}") from error
    if not isinstance(raw, DictConfig) or not raw:
        raise ConfigError(f"{path} is damaged: it holds no configuration")
    return _typed(_resolved(raw))


def _resolved(raw: DictConfig) -> Any:
    """Plain values, every interpolation replaced by what it names."""
    try:
        return OmegaConf.to_container(raw, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, ValueError, RecursionError) as error:
        key = getattr(error, "full_key", None) or "a value"
        if missing := re.search(r"[Mm]issing mandatory value: ([\w.]+)", str(error)):
            if not isinstance(error, MissingMandatoryValue):  # an interpolation of that value
                key = missing[1]
            raise config_error([f"{key} has no value (???); set {key}=VALUE"]) from None
        remedy = "name an existing key in ${…}, or write the value itself"
        raise config_error([f"{key} cannot be resolved: {first_line(error)}; {remedy}"]) from None


def _typed(values: Any) -> RunConfig:
    try:
        return RunConfig.model_validate(_without_shortcuts(values))
    except ValidationError as error:
        raise config_error([_format_error(detail) for detail in error.errors()]) from None


def _without_shortcuts(values: Any) -> Any:
    """Apply eval.only, eval.max_problems and eval.file to the benchmarks, and remove these three keys."""
    section = values.get("eval")
    benchmarks = section.get("benchmarks") if isinstance(section, dict) else None
    if not isinstance(section, dict) or not isinstance(benchmarks, dict):
        return values  # the types are checked next
    shortcuts = EVAL_SHORTCUTS if JSONL in benchmarks else EVAL_SHORTCUTS[:-1]
    section = {key: value for key, value in section.items() if key not in shortcuts}
    only, limit = (values["eval"].get(key) for key in ("only", "max_problems"))
    names = list(benchmarks) if only is None else [only] if isinstance(only, str) else only
    if not isinstance(names, list) or not names or any(name not in list(benchmarks) for name in names):
        raise config_error([f"eval.only: this eval has {', '.join(map(str, benchmarks))}; got {_shown(only)}"])
    if limit is not None:
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 2:
            raise config_error([f"eval.max_problems: at least 2, for a standard error, or null; got {limit}"])
        benchmarks = {name: _limited(benchmark, limit) for name, benchmark in benchmarks.items()}
    return values | {"eval": section | {"benchmarks": {name: benchmarks[name] for name in benchmarks if name in names}}}


def _limited(benchmark: Any, limit: int) -> Any:
    """The benchmark with at most `limit` problems."""
    if not isinstance(benchmark, dict):
        return benchmark
    number = benchmark.get("num_problems")
    return benchmark | {"num_problems": min(number, limit) if isinstance(number, int) else limit}


def typed_selector(values: dict[str, Any]) -> SelectorConfig:
    """The `selector` section of a config alone; its types are checked, its rules are not."""
    try:
        return SelectorConfig.model_validate(values)
    except ValidationError as error:
        details: list[Any] = error.errors()
        problems = [_format_error(detail | {"loc": ("selector", *detail["loc"])}) for detail in details]
        raise config_error(problems) from None


# Keys that decide the numbers of mode=teacher; the student's path and revision count because its tokenizer is used.
_TEACHER_KEYS: Any = {
    **dict.fromkeys(("mode", "device", "agent"), True),
    "pair": {
        "attention": True,
        "chat": True,
        "teacher": {"path", "revision", "dtype"},
        "student": {"path", "revision"},
    },
    "rollout": {"backend", "batch_size", "vllm"},
    "eval": {"greedy", "samples", "temperature", "top_p", "top_k", "max_tokens", "seed", "benchmarks"},
}


# They change a run's name, place or cost, and its numbers by rounding at most. Keys whose cost a sweep compares are not
# among them: runs that differ in learner.loss_backend, for example, are different runs.
NOT_DECIDING = (
    "name.", "sweep.", "logger.", "ignore_memory.", "ranks.", "nodes.", "num_threads.", "learner.checkpoint_every.",
    "rollout.vllm.gpu_memory_utilization.", "rollout.vllm.sleep_level.",
)  # fmt: skip


def deciding_values(config: RunConfig) -> dict[str, Any]:
    """All keys but NOT_DECIDING, flat; of an evaluation of the teacher those that it reads."""
    return deciding(flatten(config.model_dump(include=_TEACHER_KEYS if config.mode == "teacher" else None)))


def deciding(flat: dict[str, Any]) -> dict[str, Any]:
    """A flat config without NOT_DECIDING."""
    return {key: value for key, value in flat.items() if not f"{key}.".startswith(NOT_DECIDING)}


def digest(config: RunConfig) -> str:
    """12 hex digits of the SHA-256 of `deciding_values`."""
    return hashlib.sha256(json.dumps(deciding_values(config), sort_keys=True).encode()).hexdigest()[:12]


def differences(before: RunConfig, after: RunConfig) -> list[str]:
    """The deciding values that differ: ["learner.lr: 1e-06 -> 2e-06"]."""
    old, new = deciding_values(before), deciding_values(after)
    keys = sorted(old.keys() | new.keys())
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys if old.get(key) != new.get(key)]


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"learner": {"lr": 1}} -> {"learner.lr": 1}"""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def config_error(problems: list[str]) -> ConfigError:
    """One error that lists the first MAX_PROBLEMS, each of at most MAX_LENGTH characters."""
    listed = [_cut(problem, MAX_LENGTH) for problem in problems[:MAX_PROBLEMS]]
    if len(problems) == 1:
        return ConfigError(f"this configuration cannot run: {listed[0]}")
    if len(problems) > MAX_PROBLEMS:
        listed.append(f"{len(problems) - MAX_PROBLEMS} more errors; correct these first")
    return ConfigError("this configuration cannot run:\n" + "\n".join(f"  - {problem}" for problem in listed))


def _cut(text: str, length: int) -> str:
    """The text on one line; of a longer one its beginning and its end."""
    text = text.replace("\n", " ")
    half = length // 2
    return text if len(text) <= length else f"{text[:half]} … {text[len(text) - half + 3 :]}"


def _shown(value: Any) -> str:
    """A value in a message, in at most MAX_SHOWN characters."""
    try:
        return _cut(repr(value), MAX_SHOWN)
    except (ValueError, RecursionError):  # more digits than Python prints
        return f"a value of the type {type(value).__name__} that is too long to show"


TAGS = ("[key]", "[number]", "[quantile]")  # of pydantic, in the place of an error


def _format_error(detail: Any) -> str:
    """One pydantic error as key, what is allowed, and the value given."""
    path = _without_kind([_cut(str(part), MAX_SHOWN) for part in detail["loc"] if part not in TAGS])
    key, message, value = ".".join(path), detail["msg"].removeprefix("Value error, "), detail["input"]
    if detail["type"] == "missing":
        return f"{key} is missing; set +{key}=VALUE"
    if detail["type"] == "extra_forbidden":
        siblings = _sibling_keys(path)
        close = difflib.get_close_matches(path[-1], siblings, n=1)
        hint = f"did you mean {'.'.join([*path[:-1], close[0]])}?" if close else f"there are {', '.join(siblings)}"
        return f"{key} is not a key; {hint}"
    allowed = re.findall(r"'(\w+)'", message) if detail["type"] == "literal_error" else []
    close = difflib.get_close_matches(value, allowed, n=1) if isinstance(value, str) else []
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"{key or 'the configuration'}: {message[0].lower()}{message[1:]}; got {_shown(value)}{hint}"


def _without_kind(path: list[str]) -> list[str]:
    """Remove a data set's kind, which pydantic inserts: data.train.word_sums.split -> data.train.split."""
    if path[:2] == ["data", "train"]:
        return path[:2] + path[3:]
    return path[:3] + path[4:] if path[:2] == ["eval", "benchmarks"] else path


def _sibling_keys(path: list[str]) -> list[str]:
    """The keys allowed beside the last one of `path`."""
    parents = path[:-1]
    if parents[-1:] == ["fields"]:
        return list(FieldsConfig.model_fields)
    if parents[:2] in (["data", "train"], ["eval", "benchmarks"]):
        return sorted({field for kind in DATASETS for field in kind.model_fields})
    model: Any = RunConfig
    for part in parents:
        annotation = model.model_fields[part].annotation
        model = next(kind for kind in (annotation, *get_args(annotation)) if hasattr(kind, "model_fields"))
    return list(model.model_fields)
