"""Whole episodes behind the `Sampler` interface, so that run loop and learner are the same with and without tools."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

from tip_exp.envs.base import ToolTasks
from tip_exp.envs.chat import Chat
from tip_exp.envs.episodes import Episode, Stop, play, truncate_rollout
from tip_exp.types import Rollout, Sampler, Sampling
from tip_exp.utils.errors import ConfigError

if TYPE_CHECKING:
    from tip_exp.config.schema import AgentConfig


class EpisodeSampler:
    """Plays the tasks whose prompts it is given; `sampling.max_tokens` bounds a response, tool output included.

    `last` holds the newest episodes in full; `generate` returns their rollouts, truncated to `agent.max_train_tokens`.
    """

    def __init__(
        self, sampler: Sampler, chat: Chat, tools: ToolTasks, problem_ids: list[str], agent: AgentConfig
    ) -> None:
        self.sampler, self.chat, self.tools, self.agent = sampler, chat, tools, agent
        self.last: list[Episode] = []
        self._problem_of: dict[tuple[int, ...], str] = {}  # prompt ids → problem id
        for problem_id in problem_ids:
            prompt = tuple(chat.prompt_ids(tools.start(problem_id)))
            if prompt in self._problem_of:
                raise ConfigError(f"the tool tasks {self._problem_of[prompt]} and {problem_id} have the same prompt")
            self._problem_of[prompt] = problem_id

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, seed: int, indices: Sequence[int] | None = None
    ) -> list[Rollout]:
        tasks = [self.tools.tasks[self._problem_of[tuple(prompt)]] for prompt in prompts]
        make_environment, chat, agent = self.tools.make_environment, self.chat, self.agent
        self.last = play(self.sampler, tasks, make_environment, chat, sampling, agent, seed, indices)
        rollouts = [episode.rollout for episode in self.last]
        if (max_tokens := self.agent.max_train_tokens) is not None:
            rollouts = [truncate_rollout(rollout, max_tokens) for rollout in rollouts]
        return rollouts

    def rest(self) -> None:
        self.sampler.rest()

    def sync(self) -> None:
        self.sampler.sync()

    def close(self) -> None:
        self.sampler.close()


def episode_metrics(sampler: Sampler) -> dict[str, float]:
    """Means over the newest episodes of an EpisodeSampler, and the fraction that `agent.max_train_tokens` truncates."""
    if not isinstance(sampler, EpisodeSampler):
        return {}
    limit = sampler.agent.max_train_tokens or math.inf
    truncated = [len(episode.rollout.token_ids) > limit for episode in sampler.last]
    means = episode_means(sampler.last) | {"tail_cut_frac": sum(truncated) / len(truncated)}
    return {f"episode/{name}": value for name, value in means.items()}


def episode_means(episodes: list[Episode]) -> dict[str, float]:
    """Means of every score, of turns, calls, failed calls and truncated observations; the fraction of each stop."""
    means = {name: _mean([episode.score[name] for episode in episodes]) for name in episodes[0].score}
    for name in ("turns", "calls", "failed_calls", "cut_observations"):
        means[name] = _mean([getattr(episode, name) for episode in episodes])
    stops = Counter(episode.stop for episode in episodes)
    return means | {f"stop_{stop}_frac": stops[stop] / len(episodes) for stop in get_args(Stop)}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
