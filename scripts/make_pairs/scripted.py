"""Supervised episodes of generated errands: a policy that solves them, and a sampler that follows a policy."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

from tip_exp.envs.chat import Chat
from tip_exp.envs.deepplanning.errands import FIRST, HOTELS, NEXT_DAY, SIGHTS
from tip_exp.types import Rollout, Sampling

Policy = Callable[[str], str]
"""From the dialogue so far, control tokens included, to the text of the next turn."""
OPENERS = ("Let me look.", "First the hotel.", "I plan the day.", "Let me see.")
_QUERY = re.compile(r"City: (.+?), (.+?)\. Hotel: (\d) stars\. Sight of type: (.+?)\. Must see: (.+?)\.")
_HOTEL_ANSWER = re.compile(r'"name": "([^"]+)",\n')  # in a tool call no line end follows
_SIGHT_ANSWER = re.compile(r"Recommended attractions:\n\n(.+?), ")


class ScriptedSampler:
    """Writes every turn with `policy`; a turn above `sampling.max_tokens` is truncated."""

    def __init__(self, policy: Policy, chat: Chat) -> None:
        self.policy, self.chat = policy, chat

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, seed: int, indices: Sequence[int] | None = None
    ) -> list[Rollout]:
        return [self._rollout(prompt, sampling) for prompt in prompts for _ in range(sampling.samples)]

    def rest(self) -> None:
        pass

    def sync(self) -> None:
        pass  # a script has no weights

    def close(self) -> None:
        pass

    def _rollout(self, prompt: list[int], sampling: Sampling) -> Rollout:
        turn = self.chat.encode_turn(self.policy(self.chat.decode(prompt, with_special=True)))
        response = turn[: sampling.max_tokens]
        return Rollout(
            token_ids=prompt + response,
            response_mask=[False] * len(prompt) + [True] * len(response),
            finish="stop" if len(response) == len(turn) else "length",
            sampler_logprobs=[],
        )


def respond(history: str, slip: float = 0.0) -> str:
    """The next turn after `history`, the dialogue so far with its turn marks. Random draws depend on the query alone.

    With probability `slip`, drawn for hotel and attraction separately, a name is made up instead of looked up.
    """
    query = _QUERY.search(history)
    assert query, "the history starts with the query of an errand"
    city, day, stars, kind, named = query.groups()
    rng = random.Random(hashlib.blake2b(f"{query[0]}/{slip}".encode(), digest_size=8).digest())
    opener = f"<think>\n{rng.choice(OPENERS)}\n</think>\n"
    skip_hotel, skip_sight = rng.random() < slip, rng.random() < slip
    invented = f"{rng.choice(FIRST)} {rng.choice(HOTELS)}", f"{rng.choice(FIRST)} {rng.choice(SIGHTS)}"
    said = history[query.end() :]
    begin = opener if "</think>" not in said else ""
    hotel, sight = _HOTEL_ANSWER.search(said), _SIGHT_ANSWER.search(said)
    if not skip_hotel and not hotel:
        arguments = {"destination": city, "checkinDate": day, "checkoutDate": NEXT_DAY, "hotelStar": stars}
        return begin + _call("query_hotel_info", arguments)
    if not skip_sight and not sight:
        return begin + _call("recommend_attractions", {"city": city, "attraction_type": kind})
    return begin + _plan(hotel[1] if hotel else invented[0], named, sight[1] if sight else invented[1])


def _call(name: str, arguments: dict[str, Any]) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def _plan(hotel: str, named: str, sight: str) -> str:
    visits = f"09:00-11:00 | attraction | {named}\n13:00-15:00 | attraction | {sight}"
    return f"<plan>\nDay 1:\nAccommodation: {hotel}\n{visits}\n</plan>"
