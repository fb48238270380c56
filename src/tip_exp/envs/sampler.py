"""Whole episodes behind a sampler's interface, so that the loop of a run and the learner need not know of tools."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from tip_exp.envs.base import ToolTasks
from tip_exp.envs.chat import Chat
from tip_exp.envs.episodes import Episode, Limits, cut_tail, play
from tip_exp.types import Rollout, Sampler, Sampling
from tip_exp.utils.errors import ConfigError

if TYPE_CHECKING:
    from tip_exp.config.schema import AgentConfig

STOPS = ("final", "turns", "context", "length")


class EpisodeSampler:
    """Plays the tasks whose prompts it is given; `sampling.max_tokens` bounds a response with its tools' tokens.

    `last` are the newest episodes, whole; what `generate` returns has lost its tail above `agent.max_train_tokens`.
    """

    def __init__(self, sampler: Sampler, chat: Chat, tools: ToolTasks, names: list[str], agent: AgentConfig) -> None:
        self.sampler, self.chat, self.tools, self.agent = sampler, chat, tools, agent
        self.limits = Limits(**agent.model_dump(exclude={"label", "thinking", "max_train_tokens"}))
        self.last: list[Episode] = []
        self._names: dict[tuple[int, ...], str] = {}
        for name in names:
            key = tuple(chat.prompt_ids(tools.start(name)))
            if key in self._names:
                raise ConfigError(f"the tool tasks {self._names[key]} and {name} have one and the same prompt")
            self._names[key] = name

    def generate(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[Rollout]:
        tasks = [self.tools.tasks[self._names[tuple(prompt)]] for prompt in prompts]
        make = self.tools.make_environment
        self.last = play(self.sampler, tasks, make, self.chat, sampling, self.limits, seed)
        if (longest := self.agent.max_train_tokens) is None:
            return [episode.rollout for episode in self.last]
        return [cut_tail(episode.rollout, longest) for episode in self.last]

    def sync(self) -> None:
        self.sampler.sync()

    def close(self) -> None:
        self.sampler.close()

    def metrics(self) -> dict[str, float]:
        """Of the newest episodes: means a task's score, turns and calls, how they stopped, how many lost their tail."""
        found = means_of(self.last)
        longest = self.agent.max_train_tokens
        cut = [longest is not None and len(one.rollout.token_ids) > longest for one in self.last]
        found["tail_cut_frac"] = sum(cut) / len(cut)
        return {f"episode/{name}": value for name, value in found.items()}


def episode_metrics(sampler: Sampler) -> dict[str, float]:
    """Metrics of the newest episodes, where the sampler plays such."""
    return sampler.metrics() if isinstance(sampler, EpisodeSampler) else {}


def means_of(episodes: list[Episode]) -> dict[str, float]:
    """Every score by name, turns, calls, failed calls, cut observations, and the share of each stop reason."""
    count, stops = len(episodes), Counter(one.stop for one in episodes)
    found = {name: sum(one.score[name] for one in episodes) / count for name in episodes[0].score}
    for name in ("turns", "calls", "failed_calls", "cut_observations"):
        found[name] = sum(getattr(one, name) for one in episodes) / count
    return found | {f"stop_{reason}_frac": stops[reason] / count for reason in STOPS}


def episode_row(problem_id: str, sample: int, episode: Episode) -> dict[str, Any]:
    """For eval.jsonl: the text of the model alone, its scores and how it went."""
    return {
        "problem_id": problem_id,
        "sample": sample,
        "text": episode.text,
        "right": next(iter(episode.score.values())),  # the main score, a fraction: what mean@k averages
        **episode.score,
        "turns": episode.turns,
        "calls": episode.calls,
        "stop": episode.stop,
        "num_tokens": episode.rollout.num_response_tokens,
    }
