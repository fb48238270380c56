"""What the teacher of a self pair reads: the student's response behind a prompt that holds the solution.

The two read other prompts and so other positions, but the same response ids: token n of a response is matched with
token n of the same response, wherever batching has put either.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from tip_exp.models.micro_batch import MicroBatch
from tip_exp.types import Problem, Rollout
from tip_exp.utils.errors import ConfigError

_FIELD = re.compile(r"\{(prompt|solution|answer)\}")


def render(template: str, problem: Problem) -> str:
    """The template with the problem's texts; in one pass, so that braces in those texts are left alone."""

    def text(match: re.Match[str]) -> str:
        found: str = getattr(problem, match.group(1))
        if not found:
            raise ConfigError(
                f"pair.privileged.template asks for {match.group()}, but the problem {problem.id} has none; "
                "use {answer}, or a data set with solutions"
            )
        return found

    return _FIELD.sub(text, template)


def behind(prompt: list[int], rollout: Rollout) -> Rollout:
    """The rollout with another prompt: everything from the first token the student wrote stays."""
    start = rollout.response_mask.index(True)
    return Rollout(
        token_ids=prompt + rollout.token_ids[start:],
        response_mask=[False] * len(prompt) + rollout.response_mask[start:],
        finish=rollout.finish,
        sampler_logprobs=rollout.sampler_logprobs,
    )


def aligned(student: list[MicroBatch], teacher: list[MicroBatch], hidden: list[Tensor]) -> list[Tensor]:
    """The teacher's hidden states, one tensor a batch of the teacher, in the order of the student's batches.

    Both sides hold the same tokens, each known by its rollout and its place in the response.
    """
    ours, theirs = _keys(student), _keys(teacher)
    place = torch.empty_like(ours)
    place[ours.argsort()] = theirs.argsort()
    ids = torch.cat([batch.token_ids for batch in teacher])[place]
    assert ids.equal(torch.cat([batch.token_ids for batch in student])), "teacher and student read the same responses"
    everything = torch.cat(hidden)
    return list(everything[place.to(everything.device)].split([batch.num_tokens for batch in student]))


def _keys(batches: list[MicroBatch]) -> Tensor:
    """A number for each token that tells its rollout and its place in the response."""
    rollout, position = (torch.cat([getattr(b, name) for b in batches]).long() for name in ("rollout", "position"))
    return (rollout << 32) + position
