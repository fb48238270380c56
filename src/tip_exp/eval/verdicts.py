"""Whether some training rollouts of a step are right, for their rows in samples.jsonl."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tip_exp.config.datasets import TOOL_TASKS, DatasetConfig
from tip_exp.envs.sampler import EpisodeSampler
from tip_exp.grading import UNGRADED, boxed, open_grader
from tip_exp.types import Problem, Rollout, Sampler
from tip_exp.utils.errors import first_line

# "right" and "extracted", as in eval.jsonl -> a value of each rollout; right is None for one that is not graded
Verdicts = dict[str, list[Any]]


def grade_rollouts(
    config: DatasetConfig, shown: list[tuple[Rollout, Problem]], sampler: Sampler, decode: Callable[[list[int]], str]
) -> Verdicts:
    """Verdicts of the data set's grader; of tool tasks the main scores of their episodes, the newest of `sampler`.

    A rollout is not graded if the grader cannot compare its problem's answer, or if the comparison had no result.
    Empty if the grader itself fails.
    """
    if isinstance(config, TOOL_TASKS):
        return {"right": _scores([rollout for rollout, _ in shown], sampler)}
    pairs = [(decode(rollout.response_ids), problem.answer) for rollout, problem in shown]
    try:
        with open_grader(config.grader, workers=len(pairs)) as grader:
            verdicts = grader.grade_all(pairs)
    except Exception as error:  # training goes on without verdicts, whatever the error is
        print(f"warning: the shown rollouts have no verdicts: {first_line(error)}")
        return {}
    is_comparable = boxed.is_integer if config.grader == "boxed_integer" else bool
    graded = [v.rule not in UNGRADED and is_comparable(answer) for v, (_, answer) in zip(verdicts, pairs, strict=True)]
    return {
        "right": [verdict.right if done else None for verdict, done in zip(verdicts, graded, strict=True)],
        "extracted": [verdict.extracted for verdict in verdicts],
    }


def _scores(rollouts: list[Rollout], sampler: Sampler) -> list[float | None]:
    """The main score of each rollout's episode; None if later episodes have replaced it (rollout.staleness=1)."""
    episodes = sampler.last if isinstance(sampler, EpisodeSampler) else []
    scores: list[float | None] = [None] * len(rollouts)
    for i, (rollout, episode) in enumerate(zip(rollouts, episodes, strict=False)):
        if episode.rollout.token_ids[: len(rollout.token_ids)] == rollout.token_ids:
            scores[i] = episode.main_score
    return scores
