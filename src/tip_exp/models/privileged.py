"""Self-distillation: the teacher reads the student's response after a prompt that contains the solution.

Prompts and positions differ between the two models, but response ids are the same: token n of the teacher's response
is token n of the student's, whichever micro-batches hold them.
"""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from torch import Tensor

from tip_exp.losses.tiling import to_device
from tip_exp.models.micro_batch import MicroBatch
from tip_exp.types import Problem, Rollout
from tip_exp.utils.errors import ConfigError

_FIELD = re.compile(r"\{(prompt|solution|answer)\}")


def render(template: str, problem: Problem) -> str:
    """Fill {prompt}, {solution} and {answer} in one pass, so that braces in the problem's own texts stay."""

    def fill(match: re.Match[str]) -> str:
        text: str = getattr(problem, match.group(1))
        if not text:
            raise ConfigError(
                f"pair.privileged.template asks for {match.group()}, but the problem {problem.id} has none; "
                "use {answer}, or a data set with solutions"
            )
        return text

    return _FIELD.sub(fill, template)


def with_prompt(rollout: Rollout, prompt: list[int]) -> Rollout:
    """The rollout with `prompt` in place of its own: everything from the first response token on stays."""
    start = rollout.response_mask.index(True)
    mask = [False] * len(prompt) + rollout.response_mask[start:]
    return replace(rollout, token_ids=prompt + rollout.token_ids[start:], response_mask=mask)


def align_teacher_hidden(
    student_batches: list[MicroBatch], teacher_batches: list[MicroBatch], teacher_hidden: list[Tensor]
) -> list[Tensor]:
    """Reorder teacher hidden states, one (N, D) tensor per teacher batch, to the tokens of the student's batches.

    Both lists of batches hold the same response tokens, identified by rollout and position in the response.
    """
    student_keys, teacher_keys = _token_keys(student_batches), _token_keys(teacher_batches)
    order = torch.empty_like(student_keys)  # order[i]: index in the teacher's order of the student's token i
    order[student_keys.argsort()] = teacher_keys.argsort()
    order = to_device(order, teacher_hidden[0].device)
    teacher_ids = torch.cat([batch.token_ids for batch in teacher_batches])[order]
    student_ids = torch.cat([batch.token_ids for batch in student_batches])
    assert teacher_ids.equal(student_ids), "teacher and student read the same responses"
    hidden = torch.cat(teacher_hidden)
    return list(hidden[order].split([batch.num_tokens for batch in student_batches]))


def _token_keys(batches: list[MicroBatch]) -> Tensor:
    """One number per token, unique in the step: rollout in the upper 32 bits, position in the lower."""
    rollout, position = (torch.cat([getattr(b, name) for b in batches]).long() for name in ("rollout", "position"))
    return (rollout << 32) + position
