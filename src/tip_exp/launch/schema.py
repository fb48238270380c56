"""`tip-exp schema`: a JSON schema of the package's YAML files, with which an editor completes and checks keys."""

from __future__ import annotations

import argparse
import json
from typing import Any

from tip_exp.config.schema import RunConfig
from tip_exp.launch.help import key_comments

# A value in YAML may name another (${…}), or be one that has to be given (???).
REFERENCE = {"type": "string", "pattern": r"\$\{.*\}|^\?\?\?$"}
# Keys of a file, or of a section, that are not the run's.
FREE: dict[str, Any] = {"defaults": {"type": "array", "description": "options that this file starts from"}}
SHORTCUTS = {  # keys that a config may have and a run's config.yaml does not
    "only": {"type": ["array", "string", "null"]},
    "max_problems": {"type": ["integer", "null"], "minimum": 2},
    "file": {"type": ["string", "null"]},
}


def schema(arguments: list[str]) -> None:
    """Print the schema of a sweep or an experiment, or of one option of a group: tip-exp schema selector."""
    sections = [name for name, field in RunConfig.model_fields.items() if hasattr(field.annotation, "model_fields")]
    parser = argparse.ArgumentParser(prog="tip-exp schema", allow_abbrev=False, description=schema.__doc__)
    parser.add_argument("section", nargs="?", choices=[*sections, "agent", "dataset"], help="default: a whole file")
    print(json.dumps(json_schema(parser.parse_args(arguments).section), indent=1))


def json_schema(section: str | None = None) -> dict[str, Any]:
    """The schema of a file with any keys of a run, or of an option's file, whose keys are those of a section.

    No key is required, since what a file leaves out comes from its defaults; every key has the comment of conf/.
    """
    whole = RunConfig.model_json_schema()
    kinds = whole.pop("$defs")
    comments = key_comments()
    tree = _inlined(whole, kinds, comments, "")
    shortcuts = {name: node | {"description": comments.get(f"eval.{name}", "")} for name, node in SHORTCUTS.items()}
    tree["properties"]["eval"]["properties"] |= shortcuts
    made = tree
    if section == "dataset":
        made = tree["properties"]["data"]["properties"]["train"]
    elif section is not None:
        made = tree["properties"][section]
    for branch in [made, *made.get("anyOf", [])]:
        if "properties" in branch:
            branch["properties"] |= FREE | ({"hydra": {"type": "object"}} if section is None else {})
    return {"$schema": "http://json-schema.org/draft-07/schema#"} | made


def _inlined(node: dict[str, Any], kinds: dict[str, Any], comments: dict[str, str], key: str) -> dict[str, Any]:
    """The node without references, required keys and titles; `key`: its dotted name."""
    if "$ref" in node:
        node = kinds[node["$ref"].rpartition("/")[2]] | {name: node[name] for name in node if name != "$ref"}
    kept = ("enum", "const", "type", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minItems",
            "maxItems", "additionalProperties", "propertyNames")  # fmt: skip
    made: dict[str, Any] = {name: node[name] for name in kept if name in node}
    if comment := comments.get(key):
        made["description"] = comment
    if "properties" in node:
        made["properties"] = {
            name: _or_reference(_inlined(value, kinds, comments, f"{key}.{name}".lstrip(".")))
            for name, value in node["properties"].items()
        }
    if "items" in node:
        made["items"] = _or_reference(_inlined(node["items"], kinds, comments, ""))
    if isinstance(node.get("additionalProperties"), dict):
        key_of_each = "data.train" if key == "eval.benchmarks" else ""
        made["additionalProperties"] = _or_reference(
            _inlined(node["additionalProperties"], kinds, comments, key_of_each)
        )
    # Without required keys several kinds of data set can fit: any, not exactly one.
    if choices := node.get("oneOf") or node.get("anyOf"):
        made["anyOf"] = [_inlined(choice, kinds, comments, key) for choice in choices]
    return made


def _or_reference(node: dict[str, Any]) -> dict[str, Any]:
    """A value may be a reference; a section is written out."""
    if "properties" in node or (node.get("type") == "string" and "enum" not in node):
        return node
    comment = {"description": node["description"]} if "description" in node else {}
    return {"anyOf": [*node.pop("anyOf", [node]), REFERENCE]} | comment
