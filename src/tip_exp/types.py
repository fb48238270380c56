"""Values that cross package borders: problems, rollouts (token ids, never text), sampling settings and samplers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


@dataclass(frozen=True, slots=True)
class Problem:
    """One question with its reference answer.

    Problem(id="word_sums/test/3", prompt="Tom has 7 pens. He finds 2. How many pens?", answer="9",
            solution="Start: 7. So 7+2=9. \\boxed{9}")
    """

    id: str
    prompt: str  # the user's message, before any chat template
    answer: str
    solution: str = ""  # worked steps, if the data set has them


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled response with its prompt.

    Prompt "2+2=" and response "4<eos>":
        Rollout(token_ids=[50, 10, 50, 28, 52, 2], response_mask=[F, F, F, F, T, T], finish="stop",
                sampler_logprobs=[-0.1, -0.02])
    The mask need not be a suffix: in a dialogue with tools, tool output is False.
    """

    token_ids: list[int]
    response_mask: list[bool]  # True on tokens the student wrote
    finish: str  # "stop" (ended with a stop token) or "length" (truncated)
    sampler_logprobs: list[float]  # nats, one per response token, at temperature 1 before top-p and top-k; may be empty

    def __post_init__(self) -> None:
        assert len(self.token_ids) == len(self.response_mask), "one mask entry per token"
        assert not self.response_mask[0], "a rollout starts with its prompt"
        assert len(self.sampler_logprobs) in (0, sum(self.response_mask)), "one log-prob per response token"

    @property
    def response_ids(self) -> list[int]:
        return [token for token, written in zip(self.token_ids, self.response_mask, strict=True) if written]

    @property
    def num_response_tokens(self) -> int:
        return sum(self.response_mask)

    @property
    def truncated(self) -> bool:
        return self.finish == "length"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to draw responses. temperature 0 is greedy; top_k 0 and top_p 1 are off."""

    samples: int  # per prompt
    temperature: float
    top_p: float
    top_k: int
    max_tokens: int  # of a response
    limits: tuple[int, ...] | None = None  # longest response to each prompt; None: max_tokens; hf ignores it


class Sampler(Protocol):
    """A rollout backend: prompt ids in, rollouts out, prompt-major (all samples of the first prompt first)."""

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, seed: int, indices: Sequence[int] | None = None
    ) -> list[Rollout]:
        """`indices`: each prompt's number among the prompts of all ranks, for its random draws; None: 0, 1, …"""
        ...

    def rest(self) -> None:
        """Free the device's memory for teacher and learner until the next `sync` or `generate`."""
        ...

    def sync(self) -> None:
        """Sample from the learner's current weights from now on."""
        ...

    def close(self) -> None: ...


class Part(NamedTuple):
    """Which prompts of a batch a rank samples: their positions among `total`."""

    positions: Sequence[int]
    total: int


class PartSampler(Sampler, Protocol):
    """A sampler that can sample part of a batch, with the random draws of the whole batch."""

    def generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        seed: int,
        indices: Sequence[int] | None = None,
        part: Part | None = None,
    ) -> list[Rollout]:
        """`part`: where these prompts stand in the whole batch; None: they are the whole batch.

        The hf sampler's draws depend on `part`, those of vLLM's on `indices`.
        """
        ...
