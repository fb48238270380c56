"""Reads tool calls in the Hermes format, which Qwen writes, out of one turn of the model.

    <think>…</think>
    <tool_call>
    {"name": "calculate", "arguments": {"expression": "2+3"}}
    </tool_call>
Only what follows the last </think> counts: a call that is quoted while thinking, or in thinking that never ended, is
not meant.
"""

from __future__ import annotations

import json
import re

from tip_exp.envs.base import Call

_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)


def after_thinking(text: str) -> str:
    """A turn without its thinking; "" where thinking has begun and not ended."""
    _, ended, said = text.rpartition("</think>")
    if not ended:
        said = text
    return said.partition("<think>")[0] if "<think>" in said else said


def parse_calls(text: str) -> list[Call]:
    """All calls of one turn, in order; one that cannot be read is a Call with an error, not a fault of the loop."""
    return [_call(match[1], match[0].endswith("</tool_call>")) for match in _CALL.finditer(after_thinking(text))]


def _call(body: str, closed: bool) -> Call:
    if not closed:
        return Call("", None, "the tool call has no closing </tool_call>")
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        return Call("", None, f"the tool call is not valid JSON: {str(error).splitlines()[0]}")
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return Call("", None, 'a tool call is a JSON object with "name" and "arguments"')
    return Call(value["name"], value.get("arguments", {}))
