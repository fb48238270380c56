"""What crosses the border between sampling and learning: token ids, never text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Problem:
    """One question with its known answer.

    Problem(id="word_sums/test/3", prompt="Tom has 7 pens. He finds 2. How many pens?", answer="9",
            solution="Start: 7. So 7+2=9. \\boxed{9}")
    """

    id: str
    prompt: str  # the user's message, before any chat template
    answer: str
    solution: str = ""  # worked steps, where the source has them


@dataclass(frozen=True, slots=True)
class Rollout:
    """One response with its prompt, as the student sampled it.

    Prompt "2+2=" and response "4<eos>":
        Rollout(token_ids=[50, 10, 50, 28, 52, 2], response_mask=[F, F, F, F, T, T], finish="stop",
                sampler_logprobs=[-0.1, -0.02])
    The mask need not be a suffix: in a dialogue with tools, the tools' tokens are False.
    """

    token_ids: list[int]
    response_mask: list[bool]  # True on tokens the student wrote
    finish: str  # "stop" (ended by itself) or "length" (cut)
    sampler_logprobs: list[float]  # nats, of each response token at temperature 1, before top-p and top-k; may be empty

    def __post_init__(self) -> None:
        assert len(self.token_ids) == len(self.response_mask), "one mask entry a token"
        assert not self.response_mask[0], "a rollout starts with its prompt"
        assert len(self.sampler_logprobs) in (0, sum(self.response_mask)), "one log-prob a response token"

    @property
    def response_ids(self) -> list[int]:
        return [token for token, written in zip(self.token_ids, self.response_mask, strict=True) if written]

    @property
    def num_response_tokens(self) -> int:
        return sum(self.response_mask)

    def upto_response(self, place: int) -> Rollout:
        """What stood there when response token number `place` (from 0) had been written."""
        end = [at for at, written in enumerate(self.response_mask) if written][place] + 1
        logprobs = self.sampler_logprobs[: place + 1]
        return Rollout(self.token_ids[:end], self.response_mask[:end], self.finish, logprobs)

    @property
    def truncated(self) -> bool:
        return self.finish == "length"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to draw responses: `samples` per prompt, temperature 0 is greedy, top_k 0 is off."""

    samples: int
    temperature: float
    top_p: float
    top_k: int
    max_tokens: int


class Sampler(Protocol):
    """A backend: token ids in, rollouts out, prompt-major (all samples of the first prompt, then of the second)."""

    def generate(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[Rollout]: ...

    def sync(self) -> None:
        """Take the learner's newest weights."""
        ...

    def close(self) -> None: ...
