"""The interface between the episode loop and a tool task: three methods on text, none on tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Call:
    """One tool call as the model wrote it; `error` says why it cannot be parsed.

    Call(name="calculate", arguments={"expression": "2+3"})
    Call(name="", arguments=None, error="the tool call is not valid JSON: …")
    """

    name: str
    arguments: Any  # an object, or its JSON text
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Start:
    """The initial chat messages of an episode, and the tools' schemas in OpenAI's format."""

    messages: list[dict[str, str]]
    tools: list[dict[str, Any]] = field(default_factory=list)


class Environment(Protocol):
    """The state of one episode. `reset` is called once, before the other methods."""

    def reset(self, task: Any) -> Start:
        """Load the task and return the initial messages."""
        ...

    def step(self, calls: list[Call]) -> list[str]:
        """Run the calls in order and return one observation a call. An invalid call yields an error observation."""
        ...

    def score(self, text: str) -> dict[str, float]:
        """Scores of the finished episode. `text` is everything the model wrote; the first score is the main one."""
        ...


@dataclass(frozen=True, slots=True)
class ToolTasks:
    """Tasks by problem id, with a constructor of environments for them."""

    tasks: dict[str, Any]
    make_environment: Callable[[], Environment]
    no_tool_baseline: float  # mean main score that is reachable without any tool call

    def start(self, problem_id: str) -> Start:
        """The initial messages of a task."""
        return self.make_environment().reset(self.tasks[problem_id])


def error_observation(message: str) -> str:
    """The observation of a call that could not run; lone surrogates, which no tokenizer takes, become "?"."""
    return json.dumps({"error": message}, ensure_ascii=False).encode("utf-8", "replace").decode()
