"""What a tool task looks like to the episode loop: three methods, none of which knows of tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

T_contra = TypeVar("T_contra", contravariant=True)


@dataclass(frozen=True, slots=True)
class Call:
    """One tool call as the model wrote it; `error` says why it cannot be read.

    Call(name="calculate", arguments={"expression": "2+3"})
    Call(name="", arguments=None, error="the tool call is not valid JSON: …")
    """

    name: str
    arguments: Any  # an object, or the JSON text of one
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Start:
    """How an episode begins: chat messages, and the tools' schemas as OpenAI writes them."""

    messages: list[dict[str, str]]
    tools: list[dict[str, Any]] = field(default_factory=list)


class Environment(Protocol[T_contra]):
    """One episode's world; `reset` comes first and once."""

    def reset(self, task: T_contra) -> Start:
        """Take the task and say what the model reads first."""
        ...

    def step(self, calls: list[Call]) -> list[str]:
        """Run the calls in order; one observation a call. A wrong call is answered, never raised."""
        ...

    def score(self, text: str) -> dict[str, float]:
        """Numbers of the finished episode, from all that the model wrote (no tool text); the first is the main one."""
        ...


@dataclass(frozen=True, slots=True)
class ToolTasks:
    """The tasks by problem id, and what plays them.

    `no_tool_baseline` is the mean main score that needs no tool call; results are to be compared with it.
    """

    tasks: dict[str, Any]
    make_environment: Callable[[], Environment[Any]]
    no_tool_baseline: float

    def start(self, problem_id: str) -> Start:
        """What the model reads first."""
        return self.make_environment().reset(self.tasks[problem_id])


def error_observation(message: str) -> str:
    """What the model reads when a call could not be run."""
    return json.dumps({"error": message}, ensure_ascii=False)
