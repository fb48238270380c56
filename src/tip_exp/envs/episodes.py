"""Plays episodes over any sampler, all of a batch in lock-step: the model's turn, the tools' turn, and again.

The model's ids are kept as the sampler returned them and the tools' ids are appended; nothing is decoded and encoded
again. So what the learner reads is what the sampler saw, token for token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from tip_exp.envs.base import Call, Environment, error_observation
from tip_exp.envs.chat import Chat
from tip_exp.envs.tool_calls import parse_calls
from tip_exp.envs.truncate import Cut, shorten
from tip_exp.types import Rollout, Sampler, Sampling

T = TypeVar("T")
Stop = Literal["final", "turns", "context", "length"]
"""A turn without a call; the limit on turns; no room for the next observation; a turn that did not end by itself."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What an episode may take. The response as a whole, tools' tokens included, is bounded by Sampling.max_tokens."""

    max_turns: int
    max_calls_per_turn: int | None
    surplus_calls: Literal["tell", "drop"]  # calls above the limit get an observation that says so, or nothing
    max_observation: int | None
    observation_unit: Literal["tokens", "characters"]
    observation_cut: Cut


@dataclass(frozen=True, slots=True)
class Episode:
    """A rollout with what happened in it; `text` is all that the model wrote, turn below turn, and nothing else."""

    rollout: Rollout
    text: str
    turns: int
    calls: int
    failed_calls: int  # that could not be read, or came above the limit
    cut_observations: int
    stop: Stop
    score: dict[str, float]


@dataclass(slots=True)
class _Live:
    """An episode under way."""

    environment: Environment
    ids: list[int]
    mask: list[bool]
    room: int  # tokens the response may still take
    logprobs: list[float]
    texts: list[str]
    calls: int = 0
    failed_calls: int = 0
    cut_observations: int = 0
    stop: Stop | None = None


def play(
    sampler: Sampler,
    tasks: Sequence[T],
    make_environment: Callable[[], Environment[T]],
    chat: Chat,
    sampling: Sampling,
    limits: Limits,
    seed: int,
) -> list[Episode]:
    """`sampling.samples` episodes of each task, task-major, each in an environment of its own."""
    live = [_begin(task, make_environment(), chat, sampling) for task in tasks for _ in range(sampling.samples)]
    for turn in range(1, limits.max_turns + 1):
        playing = [one for one in live if one.stop is None]
        if not playing:
            break
        _turn(sampler, playing, sampling, limits, seed * 1009 + turn)
        for one in playing:
            _respond(one, chat, limits, last_turn=turn == limits.max_turns)
    return [_finish(one) for one in live]


def cut_tail(rollout: Rollout, max_tokens: int) -> Rollout:
    """The first `max_tokens` of a rollout that is longer; a prompt is never cut, whatever its length."""
    prompt = rollout.response_mask.index(True) if any(rollout.response_mask) else len(rollout.response_mask)
    length = max(max_tokens, prompt)
    if len(rollout.token_ids) <= length:
        return rollout
    mask = rollout.response_mask[:length]
    return Rollout(rollout.token_ids[:length], mask, "length", rollout.sampler_logprobs[: sum(mask)])


def _begin(task: T, environment: Environment[T], chat: Chat, sampling: Sampling) -> _Live:
    prompt = chat.prompt_ids(environment.reset(task))
    return _Live(environment, list(prompt), [False] * len(prompt), sampling.max_tokens, [], [])


def _turn(sampler: Sampler, playing: list[_Live], sampling: Sampling, limits: Limits, seed: int) -> None:
    """All live episodes' turns in one batch. A sampler has one limit a batch: turns above their own room are cut."""
    widest = max(one.room for one in playing)
    prompts = [one.ids for one in playing]
    sampled = sampler.generate(prompts, replace(sampling, samples=1, max_tokens=widest), seed)
    for one, rollout in zip(playing, sampled, strict=True):
        assert rollout.token_ids[: len(one.ids)] == one.ids, "the sampler went on from the very ids it was given"
        written = rollout.response_ids[: one.room]
        whole = rollout.finish == "stop" and len(written) == rollout.num_response_tokens
        one.ids = one.ids + written
        one.mask = one.mask + [True] * len(written)
        one.logprobs += rollout.sampler_logprobs[: len(written)]
        one.room -= len(written)
        one.stop = None if whole else "length"


def _respond(one: _Live, chat: Chat, limits: Limits, *, last_turn: bool) -> None:
    """Run the calls of the turn just written and append what the tools said, or stop the episode."""
    start = len(one.mask) - one.mask[::-1].index(False)
    text = chat.decode(one.ids[start:])
    one.texts.append(text)
    if one.stop is not None:
        return
    calls = parse_calls(text)
    if not calls or one.ids[-1] != chat.turn_end:  # another stop token ends the dialogue
        one.stop = "final"
        return
    if last_turn:
        one.stop = "turns"
        return
    observations = [_shortened(one, text, chat, limits) for text in _observe(one, calls, limits)]
    boundary = chat.boundary_ids(observations)
    if len(boundary) >= one.room:  # at least one token of an answer has to fit behind
        one.stop = "context"
        return
    one.ids = one.ids + boundary
    one.mask = one.mask + [False] * len(boundary)
    one.room -= len(boundary)


def _observe(one: _Live, calls: list[Call], limits: Limits) -> list[str]:
    """One observation a call, in the calls' order."""
    most = len(calls) if limits.max_calls_per_turn is None else limits.max_calls_per_turn
    runnable = [call for call in calls[:most] if call.error is None]
    answers = iter(one.environment.step(runnable))
    observations = [next(answers) if call.error is None else error_observation(call.error) for call in calls[:most]]
    assert next(answers, None) is None, "an environment gives one observation a call"
    surplus = calls[most:]
    if limits.surplus_calls == "tell":
        note = error_observation(f"not executed: at most {most} tool calls a turn")
        observations += [note] * len(surplus)
    one.calls += len(calls)
    one.failed_calls += len(calls) - len(runnable)
    return observations


def _shortened(one: _Live, text: str, chat: Chat, limits: Limits) -> str:
    if limits.max_observation is None:
        return text
    in_tokens = limits.observation_unit == "tokens"
    length: Callable[[str], int] = (lambda part: len(chat.plain_ids(part))) if in_tokens else len
    kept = shorten(text, limits.max_observation, length, limits.observation_cut)
    one.cut_observations += kept != text
    return kept


def _finish(one: _Live) -> Episode:
    assert one.stop is not None, "the last turn stops whatever has not stopped"
    written = sum(one.mask)
    rollout = Rollout(
        token_ids=one.ids,
        response_mask=one.mask,
        finish="stop" if one.stop == "final" else "length",
        sampler_logprobs=one.logprobs if len(one.logprobs) == written else [],
    )
    text = "\n".join(one.texts)
    return Episode(
        rollout,
        text,
        turns=len(one.texts),
        calls=one.calls,
        failed_calls=one.failed_calls,
        cut_observations=one.cut_observations,
        stop=one.stop,
        score=one.environment.score(text),
    )
