"""Scores of k episodes a task: the mean, the best, and what went on in them."""

from __future__ import annotations

from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from tip_exp.envs.episodes import Episode
from tip_exp.envs.sampler import EpisodeSampler, episode_row, means_of
from tip_exp.eval.metrics import best_at_k, best_at_k_bootstrap
from tip_exp.types import Sampler, Sampling

if TYPE_CHECKING:
    from tip_exp.data.dataset import Dataset


def evaluate_episodes(
    player: Sampler, loaded: Dataset, prompts: list[list[int]], sampling: Sampling, seed: int
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """`sampling.samples` episodes of each task: a row an episode, and their summary."""
    assert isinstance(player, EpisodeSampler) and loaded.tools is not None, "tool tasks are played"
    player.generate(prompts, sampling, seed)
    k = sampling.samples
    rows = [episode_row(loaded.problems[i // k].id, i % k, one) for i, one in enumerate(player.last)]
    by_task = [player.last[i : i + k] for i in range(0, len(player.last), k)]
    return rows, summarize_episodes(by_task, loaded.tools.no_tool_baseline)


def summarize_episodes(episodes: list[list[Episode]], no_tool_baseline: float) -> dict[str, float]:
    """mean@k of the environment's main score (the paper's Avg@k) with its standard error over tasks, best@k, baseline.

    best@k is the true maximum, best@k_bootstrap what verl reports under that name. Needs two tasks.
    """
    k = len(episodes[0])
    main = next(iter(episodes[0][0].score))
    scores = [[one.score[main] for one in of_task] for of_task in episodes]
    means = [mean(of_task) for of_task in scores]
    flat = [one for of_task in episodes for one in of_task]
    found = {
        f"mean@{k}": mean(means),
        f"mean@{k}_se": stdev(means) / len(means) ** 0.5,
        f"best@{k}": best_at_k(scores),
        f"best@{k}_bootstrap": best_at_k_bootstrap(scores),
        "no_tool_baseline": no_tool_baseline,
        "response_len": mean(one.rollout.num_response_tokens for one in flat),
        "truncated_frac": mean(float(one.rollout.truncated) for one in flat),
    }
    return found | means_of(flat)
