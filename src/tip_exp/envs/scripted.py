"""A sampler that follows a script instead of a model: for supervised examples and for bounds on scores."""

from __future__ import annotations

from collections.abc import Callable

from tip_exp.envs.chat import Chat
from tip_exp.types import Rollout, Sampling

Policy = Callable[[str], str]
"""From the dialogue so far, control tokens included, to the text of the next turn."""


class ScriptedSampler:
    """Writes every turn with `policy`; a turn above `sampling.max_tokens` is truncated."""

    def __init__(self, policy: Policy, chat: Chat) -> None:
        self.policy, self.chat = policy, chat

    def generate(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[Rollout]:
        return [self._rollout(prompt, sampling) for prompt in prompts for _ in range(sampling.samples)]

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
