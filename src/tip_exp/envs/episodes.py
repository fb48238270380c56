"""Plays a batch of episodes over any sampler, in lock-step: model turn, tool turn, model turn, …

Token ids are only appended: the sampler's as it returned them, the tools' as `Chat` encodes them. No text is tokenized
twice, so the learner reads exactly the ids that the sampler saw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from tip_exp.envs.base import Call, Environment, error_observation
from tip_exp.envs.chat import Chat
from tip_exp.envs.tool_calls import parse_calls
from tip_exp.envs.truncate import truncate
from tip_exp.types import Rollout, Sampler, Sampling

if TYPE_CHECKING:
    from tip_exp.config.schema import AgentConfig

Stop = Literal["final", "turns", "context", "length"]
"""A turn without a call; the limit on turns; no room for the next observation; a turn without an end token."""


@dataclass(frozen=True, slots=True)
class Episode:
    """A finished episode. `text` is everything the model wrote, one turn after another, without tool output."""

    rollout: Rollout
    text: str
    turns: int
    calls: int
    failed_calls: int  # not parseable, or above the limit a turn
    cut_observations: int  # truncated to the limit
    stop: Stop
    score: dict[str, float]

    @property
    def main_score(self) -> float:
        return next(iter(self.score.values()))


@dataclass(slots=True)
class _Live:
    """An episode in progress."""

    index: int  # among the episodes of all ranks
    environment: Environment
    ids: list[int]
    mask: list[bool]
    room: int  # tokens left for the response, tool output included
    logprobs: list[float]
    texts: list[str]
    calls: int = 0
    failed_calls: int = 0
    cut_observations: int = 0
    stop: Stop | None = None


def play(
    sampler: Sampler,
    tasks: Sequence[Any],
    make_environment: Callable[[], Environment],
    chat: Chat,
    sampling: Sampling,
    limits: AgentConfig,
    seed: int,
    indices: Sequence[int] | None = None,
) -> list[Episode]:
    """`sampling.samples` episodes of each task, task-major, each in its own environment.

    `sampling.max_tokens` bounds a whole response, tool output included; `limits` bounds turns, calls and observations.
    `indices`: of the tasks among those of all ranks; None: 0, 1, …
    """
    numbered = zip(range(len(tasks)) if indices is None else indices, tasks, strict=True)
    episodes = [
        _begin(index * sampling.samples + sample, task, make_environment(), chat, sampling)
        for index, task in numbered
        for sample in range(sampling.samples)
    ]
    for turn in range(1, limits.max_turns + 1):
        running = [episode for episode in episodes if episode.stop is None]
        if not running:
            break
        _model_turn(sampler, running, sampling, limits, seed * 1009 + turn)
        for episode in running:
            _tool_turn(episode, chat, limits, last_turn=turn == limits.max_turns)
    return [_finish(episode) for episode in episodes]


def truncate_rollout(rollout: Rollout, max_tokens: int) -> Rollout:
    """The first `max_tokens` tokens of a longer rollout; the prompt is never truncated."""
    prompt = rollout.response_mask.index(True) if any(rollout.response_mask) else len(rollout.response_mask)
    length = max(max_tokens, prompt)
    if len(rollout.token_ids) <= length:
        return rollout
    mask = rollout.response_mask[:length]
    return Rollout(rollout.token_ids[:length], mask, "length", rollout.sampler_logprobs[: sum(mask)])


def _begin(index: int, task: Any, environment: Environment, chat: Chat, sampling: Sampling) -> _Live:
    prompt = chat.prompt_ids(environment.reset(task))
    return _Live(index, environment, prompt, [False] * len(prompt), sampling.max_tokens, [], [])


def _model_turn(sampler: Sampler, running: list[_Live], sampling: Sampling, limits: AgentConfig, seed: int) -> None:
    """Sample the next turn of all running episodes in one batch, each up to its own room.

    A sampler that takes one limit a batch writes up to the largest room; each turn is then truncated to its own.
    """
    rooms = tuple(episode.room for episode in running)
    turn = replace(sampling, samples=1, max_tokens=max(rooms), limits=rooms)
    rollouts = sampler.generate(
        [episode.ids for episode in running], turn, seed, indices=[episode.index for episode in running]
    )
    for episode, rollout in zip(running, rollouts, strict=True):
        assert rollout.token_ids[: len(episode.ids)] == episode.ids, "the sampler continues the ids it was given"
        turn_ids = rollout.response_ids[: episode.room]
        complete = rollout.finish == "stop" and len(turn_ids) == rollout.num_response_tokens
        episode.ids = episode.ids + turn_ids
        episode.mask = episode.mask + [True] * len(turn_ids)
        episode.logprobs += rollout.sampler_logprobs[: len(turn_ids)]
        episode.room -= len(turn_ids)
        episode.stop = None if complete else "length"


def _tool_turn(episode: _Live, chat: Chat, limits: AgentConfig, *, last_turn: bool) -> None:
    """Run the calls of the newest model turn and append the observations, or stop the episode."""
    start = len(episode.mask) - episode.mask[::-1].index(False)
    text = chat.decode(episode.ids[start:])
    episode.texts.append(text)
    if episode.stop is not None:
        return
    calls = parse_calls(text)
    if not calls or episode.ids[-1] != chat.turn_end:  # any other stop token ends the dialogue
        episode.stop = "final"
        return
    if last_turn:
        episode.stop = "turns"
        return
    observations = [_truncated(episode, text, chat, limits) for text in _observe(episode, calls, limits)]
    boundary = chat.boundary_ids(observations)
    if len(boundary) >= episode.room:  # the next turn needs at least one token
        episode.stop = "context"
        return
    episode.ids = episode.ids + boundary
    episode.mask = episode.mask + [False] * len(boundary)
    episode.room -= len(boundary)


def _observe(episode: _Live, calls: list[Call], limits: AgentConfig) -> list[str]:
    """Run the calls: one observation a call, in order; none for surplus calls if limits.surplus_calls is "drop"."""
    limit = len(calls) if limits.max_calls_per_turn is None else limits.max_calls_per_turn
    runnable = [call for call in calls[:limit] if call.error is None]
    results = iter(episode.environment.step(runnable))
    observations = [next(results) if call.error is None else error_observation(call.error) for call in calls[:limit]]
    assert next(results, None) is None, "an environment returns one observation a call"
    if limits.surplus_calls == "tell":
        note = error_observation(f"not executed: at most {limit} tool calls a turn")
        observations += [note] * len(calls[limit:])
    episode.calls += len(calls)
    episode.failed_calls += len(calls) - len(runnable)
    return observations


def _truncated(episode: _Live, text: str, chat: Chat, limits: AgentConfig) -> str:
    if limits.max_observation is None:
        return text
    in_tokens = limits.observation_unit == "tokens"
    length: Callable[[str], int] = (lambda part: len(chat.plain_ids(part))) if in_tokens else len
    observation = truncate(text, limits.max_observation, length, limits.observation_cut)
    episode.cut_observations += observation != text
    return observation


def _finish(episode: _Live) -> Episode:
    assert episode.stop is not None, "the last turn stops every episode"
    rollout = Rollout(
        token_ids=episode.ids,
        response_mask=episode.mask,
        finish="stop" if episode.stop == "final" else "length",
        sampler_logprobs=episode.logprobs if len(episode.logprobs) == sum(episode.mask) else [],
    )
    text = "\n".join(episode.texts)
    return Episode(
        rollout,
        text,
        turns=len(episode.texts),
        calls=episode.calls,
        failed_calls=episode.failed_calls,
        cut_observations=episode.cut_observations,
        stop=episode.stop,
        score=episode.environment.score(text),
    )
