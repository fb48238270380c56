"""From a data set to what the models read: prompt ids, and for tool tasks a sampler that plays episodes."""

from __future__ import annotations

from tip_exp.config.schema import AgentConfig
from tip_exp.data.dataset import Dataset
from tip_exp.envs.chat import Chat
from tip_exp.envs.sampler import EpisodeSampler
from tip_exp.models.pair import ChatTokenizer
from tip_exp.types import Sampler


def prompt_ids(tokenizer: ChatTokenizer, dataset: Dataset, *, evaluating: bool = False) -> list[list[int]]:
    """One rendered prompt a problem; a tool task's prompt includes its system message and tool schemas."""
    if dataset.tools is None:
        return [tokenizer.prompt_ids(problem.prompt, evaluating=evaluating) for problem in dataset.problems]
    chat = _chat(tokenizer, evaluating)
    return [chat.prompt_ids(dataset.tools.start(problem.id)) for problem in dataset.problems]


def with_tools(
    sampler: Sampler,
    tokenizer: ChatTokenizer,
    dataset: Dataset,
    agent: AgentConfig | None,
    *,
    evaluating: bool = False,
) -> Sampler:
    """For tool tasks an `EpisodeSampler` around `sampler`; otherwise `sampler` itself."""
    if dataset.tools is None:
        return sampler
    assert agent is not None, "rules.py requires limits for tool tasks"
    problem_ids = [problem.id for problem in dataset.problems]
    return EpisodeSampler(sampler, _chat(tokenizer, evaluating), dataset.tools, problem_ids, agent)


def _chat(tokenizer: ChatTokenizer, evaluating: bool) -> Chat:
    return Chat(tokenizer.tokenizer, thinking=tokenizer.chat.eval_thinking if evaluating else tokenizer.chat.thinking)
