"""A sampler that plays by a script instead of a model: for lessons, for reference scores, and for tests."""

from __future__ import annotations

from collections.abc import Callable

from tip_exp.envs.chat import Chat
from tip_exp.types import Rollout, Sampling

Policy = Callable[[str], str]
"""From the dialogue so far, turns' marks included, to the text of the next turn."""


class ScriptedSampler:
    """Asks `policy` for every turn; a turn longer than the limit is cut like a model's."""

    def __init__(self, policy: Policy, chat: Chat) -> None:
        self.policy, self.chat = policy, chat

    def generate(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[Rollout]:
        return [self._one(prompt, sampling) for prompt in prompts for _ in range(sampling.samples)]

    def sync(self) -> None:
        pass  # there are no weights

    def close(self) -> None:
        pass

    def _one(self, prompt: list[int], sampling: Sampling) -> Rollout:
        turn = self.chat.encode_turn(self.policy(self.chat.decode(prompt, with_special=True)))
        written = turn[: sampling.max_tokens]
        return Rollout(
            token_ids=prompt + written,
            response_mask=[False] * len(prompt) + [True] * len(written),
            finish="stop" if len(written) == len(turn) else "length",
            sampler_logprobs=[],
        )
