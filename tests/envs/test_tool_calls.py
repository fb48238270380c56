"""Parsing of tool calls: only after the last </think>, and every malformed call has an error."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tip_exp.envs.base import Call
from tip_exp.envs.tool_calls import after_thinking, parse_calls

ADD = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
CALL = Call("add", {"a": 1})


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("no call", []),
        (ADD, [CALL]),
        (f"{ADD}\n{ADD}", [CALL, CALL]),
        (f"<think>I could {ADD}</think>The answer is 3.", []),
        (f"<think>a</think><think>{ADD}</think>{ADD}", [CALL]),
        (f"<think>never ended {ADD}", []),
        (f"<think>a</think>x<think>again {ADD}", []),
        ('<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', [Call("add", '{"a": 1}')]),
        ('<tool_call>{"name": "add"}</tool_call>', [Call("add", {})]),
    ],
)
def test_calls(text: str, calls: list[Call]) -> None:
    assert parse_calls(text) == calls


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{name: add}</tool_call>", "not valid JSON"),
        ("</tool_call>", "not valid JSON"),
        ("[1]</tool_call>", 'JSON object with "name"'),
        ('{"name": 3}</tool_call>', 'JSON object with "name"'),
        ('{"name": "add"}', "no closing"),
        ("[" * 100_000 + "</tool_call>", "not valid JSON"),
    ],
)
def test_a_malformed_call_has_an_error(body: str, message: str) -> None:
    (call,) = parse_calls(f"<tool_call>{body}")
    assert call.error is not None and message in call.error


@given(st.lists(st.sampled_from(["<think>", "</think>", "<tool_call>", "</tool_call>", "{", '{"name": "a"}', "x"])))
def test_tags_in_any_order_parse(pieces: list[str]) -> None:
    text = "".join(pieces)
    assert len(parse_calls(text)) <= after_thinking(text).count("<tool_call>")
