"""Rows of samples.jsonl: some rollouts of a step with the numbers of every token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from tip_exp.learner.distributed import ALONE
from tip_exp.learner.learner import StepReport
from tip_exp.learner.teacher import Teacher, split
from tip_exp.losses.head import Head
from tip_exp.losses.token_stats import top_tokens
from tip_exp.types import Problem, Rollout
from tip_exp.utils.units import MIB

NUM_TOP_TOKENS = 5  # most likely next tokens of each model, at each position
# "student_top" and "teacher_top" -> [["=", 0.98], ["+", 0.01], …] at each position of each rollout
TopTokens = dict[str, list[list[Any]]]


@torch.no_grad()
def measure_top_tokens(teacher: Teacher, shown: list[tuple[Rollout, Problem]]) -> TopTokens:
    """Both models' most likely next tokens in some rollouts of a step, before its update; every rank measures all."""
    rollouts, problems = [rollout for rollout, _ in shown], [problem for _, problem in shown]
    pair, tile_bytes = teacher.pair, teacher.config.tile_mib * MIB
    batches = split(rollouts, pair, teacher.config, ALONE)
    rollout = torch.cat([batch.rollout for batch in batches])

    def texts(hidden_states: Iterable[Tensor], head: Head) -> list[list[Any]]:
        ids, probabilities = top_tokens(torch.cat(list(hidden_states)), head, NUM_TOP_TOKENS, tile_bytes)
        rows = [_as_text(pair.decode, *row) for row in zip(ids.tolist(), probabilities.tolist(), strict=True)]
        return [[rows[n] for n in (rollout == i).nonzero().squeeze(-1).tolist()] for i in range(len(rollouts))]

    with pair.student.whole(), pair.teacher.whole():
        return {
            "student_top": texts([pair.student.hidden(batch) for batch in batches], pair.student.head),
            "teacher_top": texts(teacher.hidden(rollouts, problems, shared=False), pair.teacher.head),
        }


def sample_rows(
    teacher: Teacher, shown: list[tuple[Rollout, Problem]], report: StepReport, fields: dict[str, list[Any]]
) -> Iterator[dict[str, Any]]:
    """A row for each of the first rollouts of a step: tokens as text, numbers as lists.

    `fields`: further fields, with the value of each rollout; the models' most likely tokens are among them.
    """
    for index, (rollout, problem) in enumerate(shown):
        rows = (report.tokens.rollout == index).nonzero().squeeze(-1)
        yield {
            "problem_id": problem.id,
            "prompt": problem.prompt,
            "answer": problem.answer,
            "finish": rollout.finish,
            "tokens": [teacher.pair.decode([token], with_special=True) for token in rollout.response_ids],
            "kept": report.selection.kept_mask[rows].tolist(),
            "score": _rounded(report.selection.score[rows].tolist()),
            **{name: _rounded(values[rows].tolist()) for name, values in report.statistics.items()},
            **{name: by_rollout[index] for name, by_rollout in fields.items()},
        }


def _as_text(decode: Any, ids: list[int], probabilities: list[float]) -> list[list[Any]]:
    return [
        [decode([token], with_special=True), float(f"{p:.3g}")] for token, p in zip(ids, probabilities, strict=True)
    ]


def _rounded(values: list[float]) -> list[float]:
    return [float(f"{value:.5g}") for value in values]
