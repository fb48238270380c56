"""Rollouts with every token's numbers, for reading: what samples.jsonl holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from tip_exp.learner.learner import StepReport, TopTokens
from tip_exp.models.pair import Pair
from tip_exp.types import Problem, Rollout


def sample_rows(
    pair: Pair, problems: list[Problem], rollouts: list[Rollout], report: StepReport, count: int
) -> Iterator[dict[str, Any]]:
    """A row for each of the first `count` rollouts (problems[i] is rollouts[i]'s): tokens as text, numbers as lists."""
    for index, (problem, rollout) in enumerate(zip(problems[:count], rollouts[:count], strict=True)):
        mine = (report.tokens.rollout == index).nonzero().squeeze(-1)
        of_shown = report.tokens.rollout[report.tokens.rollout < count]  # likeliest has those rows alone
        shown = (of_shown == index).nonzero().squeeze(-1)
        yield {
            "problem_id": problem.id,
            "prompt": problem.prompt,
            "answer": problem.answer,
            "finish": rollout.finish,
            "tokens": [pair.decode([token], with_special=True) for token in rollout.response_ids],
            "kept": report.selection.kept_mask[mine].tolist(),
            "score": _rounded(report.selection.score[mine].tolist()),
            **{name: _rounded(values[mine].tolist()) for name, values in report.statistics.items()},
            **{f"{name}_top": _as_text(pair, top, shown) for name, top in report.likeliest.items()},
        }


def _as_text(pair: Pair, top: TopTokens, rows: Tensor) -> list[list[list[Any]]]:
    """Per position [["=", 0.98], ["+", 0.01], …]."""
    return [
        [[pair.decode([token], with_special=True), float(f"{p:.3g}")] for token, p in zip(ids, shares, strict=True)]
        for ids, shares in zip(top.ids[rows].tolist(), top.probabilities[rows].tolist(), strict=True)
    ]


def _rounded(values: list[float]) -> list[float]:
    return [float(f"{value:.5g}") for value in values]
