"""Metrics of k responses a problem: mean@k with its standard error, pass@k, maj@k; of tool tasks best@k."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np

from tip_exp.envs.episodes import Episode
from tip_exp.envs.sampler import episode_means
from tip_exp.grading import UNGRADED, GroupAll
from tip_exp.records.metrics import (
    FINISHED_ACCURACY,
    LENGTH,
    LOG_SEQ_KL,
    NO_TOOL_BASELINE,
    REPETITION_RATE,
    SEQ_KL,
    STRICT_AGREEMENT,
    TRUNCATED,
    TRUNCATED_ACCURACY,
    UNGRADED_FRAC,
    UNPARSED,
    best_at,
    bootstrap,
    log_kl,
    maj_at,
    mean_at,
    pass_at,
    standard_error_of,
    strict,
)

_STRATA = {FINISHED_ACCURACY: False, TRUNCATED_ACCURACY: True}  # metric: were its responses truncated?


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
    repetition: float  # repetition_rate() of its token ids

    @property
    def ungraded(self) -> bool:
        """Its answer was compared without a result; it counts as wrong."""
        return self.rule in UNGRADED


def summarize(by_problem: list[list[Graded]], group_all: GroupAll) -> dict[str, float]:
    """Metrics of k responses to each problem. Needs two problems, for the standard error.

    The standard error is over the problems' means: k responses to one problem are not k independent samples.
    The accuracy of finished (truncated) responses is left out if there are none.
    """
    k = len(by_problem[0])
    right = np.array([[response.right for response in responses] for responses in by_problem], dtype=float)
    all_responses = [response for responses in by_problem for response in responses]
    return {
        mean_at(k): float(right.mean()),
        standard_error_of(mean_at(k)): standard_error(right.mean(axis=1)),
        **{pass_at(j): pass_at_j(right.sum(axis=1), k, j) for j in sorted({k, *(2**i for i in range(k.bit_length()))})},
        maj_at(k): float(np.mean(majority_is_right(by_problem, group_all))),
        strict(mean_at(k)): float(np.mean([response.strict_right for response in all_responses])),
        STRICT_AGREEMENT: float(np.mean([response.strict_right == response.right for response in all_responses])),
        LENGTH: float(np.mean([response.num_tokens for response in all_responses])),
        TRUNCATED: float(np.mean([response.truncated for response in all_responses])),
        UNPARSED: float(np.mean([response.extracted is None for response in all_responses])),
        UNGRADED_FRAC: float(np.mean([response.ungraded for response in all_responses])),
        REPETITION_RATE: float(np.mean([response.repetition for response in all_responses])),
        **_accuracy_by_stratum(all_responses),
    }


def standard_error(means: np.ndarray) -> float:
    """Standard error of the mean of independent problems' means."""
    return float(means.std(ddof=1) / math.sqrt(len(means)))


def pass_at_j(num_right: Sequence[int] | np.ndarray, k: int, j: int) -> float:
    """Mean over problems of the chance that j of its k responses, drawn without replacement, hold a right one.

    1 - C(k - c, j) / C(k, j) for c right of k: unbiased for pass@j (Chen et al. 2021, arXiv 2107.03374, Eq. 1).
    """
    return float(np.mean([1 - math.comb(k - int(c), j) / math.comb(k, j) for c in num_right]))


def repetition_rate(token_ids: Sequence[int]) -> float:
    """1 - distinct / all 4-grams; 0 for less than 4 tokens. seq-rep-4 of Welleck et al. 2020, arXiv 1908.04319."""
    ngrams = list(zip(*(token_ids[i:] for i in range(4)), strict=False))
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _accuracy_by_stratum(responses: list[Graded]) -> dict[str, float]:
    strata = {name: [r.right for r in responses if r.truncated == cut] for name, cut in _STRATA.items()}
    return {name: float(np.mean(right)) for name, right in strata.items() if right}


def majority_is_right(by_problem: list[list[Graded]], group_all: GroupAll) -> list[bool]:
    """For each problem: is the most frequent answer right? Answers are counted by value; the earliest wins a tie.

    All right answers have the value of the reference. Wrong answers are grouped only where there are right
    ones that they could outvote. Unparsed responses do not vote; ungraded ones are counted by their string.
    """
    voters = [[response for response in responses if response.extracted is not None] for responses in by_problem]
    num_right = [sum(response.right for response in problem_voters) for problem_voters in voters]
    undecided = [i for i, c in enumerate(num_right) if 0 < c <= len(voters[i]) - c]
    groups = group_all([[r.extracted or "" for r in voters[i] if _is_compared(r)] for i in undecided])
    results = [c > 0 for c in num_right]
    for i, group_numbers in zip(undecided, map(iter, groups), strict=True):
        values = [  # equal for answers that count as one
            next(group_numbers) if _is_compared(response) else "right" if response.right else [response.extracted]
            for response in voters[i]
        ]
        winner, _ = Counter(map(str, values)).most_common(1)[0]  # equal counts are ordered by first appearance
        results[i] = winner == "right"
    return results


def _is_compared(response: Graded) -> bool:
    return not response.right and not response.ungraded


def summarize_sequence_kl(values: list[float], samples: int) -> dict[str, float]:
    """Mean of the responses' reverse KL (nats, prompt-major) with its standard error over problems, and mean log.

    The logarithm weighs responses that are nearly right; it tells selectors apart with a fraction of the seeds.
    """
    by_problem = np.array(values).reshape(-1, samples).mean(axis=1)
    return {
        SEQ_KL: float(by_problem.mean()),
        standard_error_of(SEQ_KL): standard_error(by_problem),
        LOG_SEQ_KL: mean(map(log_kl, values)),
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
        standard_error_of(mean_at(k)): standard_error(np.array(task_means)),
        best_at(k): best_at_k(scores),
        bootstrap(best_at(k)): best_at_k_bootstrap(scores),
        NO_TOOL_BASELINE: no_tool_baseline,
        LENGTH: mean(episode.rollout.num_response_tokens for episode in episodes),
        TRUNCATED: mean(float(episode.rollout.truncated) for episode in episodes),
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
