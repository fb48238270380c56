"""Parses tool calls in the Hermes format, which Qwen uses, from one turn of the model.

    <think>…</think>
    <tool_call>
    {"name": "calculate", "arguments": {"expression": "2+3"}}
    </tool_call>
Only text after the last </think> counts: a call inside thinking, closed or not, is not executed.
"""

from __future__ import annotations

import json
import re

from tip_exp.envs.base import Call

_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)


def after_thinking(text: str) -> str:
    """A turn without its thinking; of unclosed thinking, what precedes it."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


def parse_calls(text: str) -> list[Call]:
    """All calls of one turn, in order; a call that cannot be parsed has its `error` set."""
    return [_parse(match[1], match[0].endswith("</tool_call>")) for match in _CALL.finditer(after_thinking(text))]


def _parse(body: str, closed: bool) -> Call:
    if not closed:
        return Call("", None, "the tool call has no closing </tool_call>")
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        return Call("", None, f"the tool call is not valid JSON: {str(error).splitlines()[0]}")
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return Call("", None, 'a tool call is a JSON object with "name" and "arguments"')
    return Call(value["name"], value.get("arguments", {}))
