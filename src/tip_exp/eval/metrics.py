"""Metrics of k responses a problem: mean@k with its standard error, pass@k, maj@k; of tool tasks best@k."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import numpy as np

from tip_exp.envs.episodes import Episode
from tip_exp.envs.sampler import episode_means
from tip_exp.records.metrics import (
    LOG_SEQ_KL,
    NO_TOOL_BASELINE,
    SEQ_KL,
    SEQ_KL_OFFSET,
    best_at,
    maj_at,
    mean_at,
    pass_at,
    standard_error_of,
)


@dataclass(frozen=True, slots=True)
class Graded:
    """One graded response to one problem."""

    problem_id: str
    sample: int
    answer: str  # the reference answer
    text: str
    right: bool
    extracted: str | None
    rule: str
    strict_right: bool  # by the string comparison of the paper's base code
    truncated: bool
    num_tokens: int


def summarize(by_problem: list[list[Graded]]) -> dict[str, float]:
    """Metrics of k responses to each problem. Needs two problems, for the standard error.

    The standard error is over the problems' means: k responses to one problem are not k independent samples.
    """
    k = len(by_problem[0])
    right = np.array([[response.right for response in responses] for responses in by_problem], dtype=float)
    all_responses = [response for responses in by_problem for response in responses]
    return {
        mean_at(k): float(right.mean()),
        standard_error_of(mean_at(k)): float(right.mean(axis=1).std(ddof=1) / math.sqrt(len(right))),
        pass_at(k): float(right.any(axis=1).mean()),
        maj_at(k): float(np.mean([majority_is_right(responses) for responses in by_problem])),
        f"strict_{mean_at(k)}": float(np.mean([response.strict_right for response in all_responses])),
        "strict_agreement": float(np.mean([response.strict_right == response.right for response in all_responses])),
        "response_len": float(np.mean([response.num_tokens for response in all_responses])),
        "truncated_frac": float(np.mean([response.truncated for response in all_responses])),
        "unparsed_frac": float(np.mean([response.extracted is None for response in all_responses])),
    }


def majority_is_right(responses: list[Graded]) -> bool:
    """Is the most frequent extracted answer right? The earliest wins a tie; unparsed responses do not vote."""
    votes = Counter(response.extracted for response in responses if response.extracted is not None)
    if not votes:
        return False
    winner = votes.most_common(1)[0][0]  # Counter orders equal counts by first appearance
    return next(response.right for response in responses if response.extracted == winner)


def summarize_sequence_kl(values: list[float], samples: int) -> dict[str, float]:
    """Mean of the responses' reverse KL (nats, prompt-major) with its standard error over problems, and mean log.

    The logarithm weighs responses that are nearly right; it tells selectors apart with a fraction of the seeds.
    """
    by_problem = np.array(values).reshape(-1, samples).mean(axis=1)
    return {
        SEQ_KL: float(by_problem.mean()),
        standard_error_of(SEQ_KL): float(by_problem.std(ddof=1) / math.sqrt(len(by_problem))),
        LOG_SEQ_KL: float(np.log(np.array(values) + SEQ_KL_OFFSET).mean()),
    }


def summarize_episodes(by_task: list[list[Episode]], no_tool_baseline: float) -> dict[str, float]:
    """mean@k of the main score (the paper's Avg@k) with its standard error over tasks, best@k, and episode means.

    best@k is the maximum of the k samples; best@k_bootstrap is what verl reports as best@k. Needs two tasks.
    """
    k = len(by_task[0])
    scores = [[episode.main_score for episode in task_episodes] for task_episodes in by_task]
    task_means = [mean(task_scores) for task_scores in scores]
    episodes = [episode for task_episodes in by_task for episode in task_episodes]
    return {
        mean_at(k): mean(task_means),
        standard_error_of(mean_at(k)): stdev(task_means) / len(task_means) ** 0.5,
        best_at(k): best_at_k(scores),
        f"{best_at(k)}_bootstrap": best_at_k_bootstrap(scores),
        NO_TOOL_BASELINE: no_tool_baseline,
        "response_len": mean(episode.rollout.num_response_tokens for episode in episodes),
        "truncated_frac": mean(float(episode.rollout.truncated) for episode in episodes),
        **episode_means(episodes),
    }


def best_at_k(scores: Sequence[Sequence[float]]) -> float:
    """Mean over tasks of the maximum of the k samples; scores[task][sample]."""
    return sum(max(samples) for samples in scores) / len(scores)


def best_at_k_bootstrap(scores: Sequence[Sequence[float]]) -> float:
    """Mean over tasks of the expected maximum of k draws with replacement from the task's k samples.

    This is verl's best@k/mean, computed exactly instead of from 1,000 random draws: of k samples in ascending order,
    the i-th is the maximum with probability (i/k)^k - ((i-1)/k)^k. It is below best_at_k, because a given sample is
    drawn with probability 1 - (1 - 1/k)^k only (64 % for k = 16).
    """
    k = len(scores[0])
    probabilities = [((i + 1) / k) ** k - (i / k) ** k for i in range(k)]
    expected_maxima = [
        sum(value * probability for value, probability in zip(sorted(samples), probabilities, strict=True))
        for samples in scores
    ]
    return sum(expected_maxima) / len(scores)
