"""Evaluation of tool tasks: k episodes a task, summarized over the environment's main score."""

from __future__ import annotations

from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from tip_exp.envs.episodes import Episode
from tip_exp.envs.sampler import EpisodeSampler, episode_means, episode_row
from tip_exp.eval.metrics import best_at_k, best_at_k_bootstrap
from tip_exp.records.metrics import NO_TOOL_BASELINE, best_at, mean_at, standard_error_of
from tip_exp.types import Sampler, Sampling

if TYPE_CHECKING:
    from tip_exp.data.dataset import Dataset


def evaluate_episodes(
    sampler: Sampler, dataset: Dataset, prompts: list[list[int]], sampling: Sampling, seed: int
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Play `sampling.samples` episodes of each task: one row an episode, and their summary."""
    assert isinstance(sampler, EpisodeSampler) and dataset.tools is not None, "tool tasks need an EpisodeSampler"
    sampler.generate(prompts, sampling, seed)
    episodes, k = sampler.last, sampling.samples
    rows = [episode_row(dataset.problems[i // k].id, i % k, episode) for i, episode in enumerate(episodes)]
    by_task = [episodes[i : i + k] for i in range(0, len(episodes), k)]
    return rows, summarize_episodes(by_task, dataset.tools.no_tool_baseline)


def summarize_episodes(by_task: list[list[Episode]], no_tool_baseline: float) -> dict[str, float]:
    """mean@k of the main score (the paper's Avg@k) with its standard error over tasks, best@k, and episode means.

    best@k is the maximum of the k samples; best@k_bootstrap is what verl reports as best@k. Needs two tasks.
    """
    k = len(by_task[0])
    main_score = next(iter(by_task[0][0].score))
    scores = [[episode.score[main_score] for episode in task_episodes] for task_episodes in by_task]
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
