"""How a data set is presented to the models: rendered prompts, and episodes for tool tasks."""

from __future__ import annotations

from tip_exp.config.schema import AgentConfig
from tip_exp.data.dataset import Dataset
from tip_exp.envs.chat import Chat
from tip_exp.envs.sampler import EpisodeSampler
from tip_exp.models.pair import ChatTokenizer
from tip_exp.types import Sampler


def prompt_ids(
    pair: ChatTokenizer, loaded: Dataset, agent: AgentConfig | None, *, evaluating: bool = False
) -> list[list[int]]:
    """The prompts of a data set as the models get them; of tool tasks with system prompt and tools."""
    if loaded.tools is None or agent is None:
        return [pair.prompt_ids(problem.prompt, evaluating=evaluating) for problem in loaded.problems]
    chat = Chat(pair.tokenizer, thinking=agent.thinking)
    return [chat.prompt_ids(loaded.tools.start(problem.id)) for problem in loaded.problems]


def with_tools(sampler: Sampler, pair: ChatTokenizer, loaded: Dataset, agent: AgentConfig | None) -> Sampler:
    """`sampler`, or for tool tasks one whose rollouts are whole episodes."""
    if loaded.tools is None or agent is None:
        return sampler
    names = [problem.id for problem in loaded.problems]
    return EpisodeSampler(sampler, Chat(pair.tokenizer, thinking=agent.thinking), loaded.tools, names, agent)
