"""The JSON schema of `tip-exp schema` accepts every YAML file of the package and names wrong keys and values."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator
from omegaconf import OmegaConf

from tip_exp.launch.cli import main
from tip_exp.launch.schema import json_schema, schema
from tip_exp.utils.paths import conf_dir, sweeps_dir

GROUPS = ("agent", "data", "dataset", "eval", "learner", "logger", "pair", "rollout", "selector")


@cache
def validator(section: str | None = None) -> Draft7Validator:
    return Draft7Validator(json_schema(section))


def errors(section: str | None, values: Any) -> list[str]:
    return [error.message for error in validator(section).iter_errors(values)]


def content(path: Path) -> Any:
    return OmegaConf.to_container(OmegaConf.load(path))


def is_whole(path: Path) -> bool:
    return path.parent.name not in GROUPS or "@package _global_" in path.read_text()


def test_every_file_with_keys_of_a_run_is_accepted() -> None:
    files = [path for folder in (conf_dir(), sweeps_dir()) for path in folder.rglob("*.yaml") if is_whole(path)]
    files = [path for path in files if "hydra" not in path.relative_to(path.parents[2]).parts]
    assert len(files) > 35
    for path in files:
        assert errors(None, content(path)) == [], path


@pytest.mark.parametrize("group", GROUPS)
def test_every_option_of_a_group_is_accepted(group: str) -> None:
    for path in (conf_dir() / group).glob("*.yaml"):
        if not is_whole(path):
            assert errors(group, content(path)) == [], path


def unexplained(node: Any, key: str = "") -> Iterator[str]:
    """Keys without a meaning, neither their own nor that of the section they stand in."""
    if "description" in node:
        return
    values: list[tuple[str, Any]] = []
    for part in (node, *node.get("anyOf", [])):
        values += part.get("properties", {}).items()
        if key == "eval.benchmarks" and "additionalProperties" in part:
            values.append(("NAME", part["additionalProperties"]))
    if not values and key:
        yield key
    for name, value in values:
        yield from unexplained(value, f"{key}.{name}".lstrip("."))


def test_every_key_is_explained() -> None:
    assert set(unexplained(json_schema())) == {"hydra"}


def test_wrong_keys_and_values_are_named_and_references_are_not() -> None:
    assert errors(None, {"selector": {"retenton": 0.5}}) == [
        "Additional properties are not allowed ('retenton' was unexpected)"
    ]
    assert errors("selector", {"retention": 1.5}) and errors("selector", {"order": "upwards"})
    assert errors("learner", {"betas": [0.9, 1.0]}) and errors(None, {"eval": {"max_problems": 1}})
    assert errors("dataset", {"kind": "tables"})
    assert not errors("selector", {"retention": "${oc.env:SHARE}", "order": "${x}", "score": "my_module:my_rule"})


def test_keys_have_their_meaning_from_conf_and_the_command_prints_the_schema(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["tip-exp", "schema"])
    main()
    printed = json.loads(capsys.readouterr().out)
    Draft7Validator.check_schema(printed)
    selector = printed["properties"]["selector"]["properties"]
    assert selector["retention"]["description"] == "kept / response tokens"
    assert "top" in selector["order"]["anyOf"][0]["enum"]
    kinds = printed["properties"]["data"]["properties"]["train"]["anyOf"]
    (table,) = [kind["properties"] for kind in kinds if "hub" in kind.get("properties", {})]
    assert table["hub"]["description"]
    schema(["learner"])
    assert "grad_clip" in json.loads(capsys.readouterr().out)["properties"]
