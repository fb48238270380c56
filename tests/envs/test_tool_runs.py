"""Tool tasks through the parts of a run: prompts, episodes as rollouts, metrics, one learner step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.envs.deepplanning.test_environment import copy_the_query
from tests.helpers import train_step

from scripts.make_pairs.scripted import Policy, ScriptedSampler, respond
from tip_exp.config.schema import RunConfig
from tip_exp.data.dataset import Dataset
from tip_exp.data.load import load
from tip_exp.data.prompts import prompt_ids, with_tools
from tip_exp.envs.chat import Chat
from tip_exp.envs.sampler import EpisodeSampler, episode_metrics
from tip_exp.eval.evaluate import grade_episodes
from tip_exp.learner.learner import Learner
from tip_exp.learner.selectors import make_selector
from tip_exp.models.pair import Pair
from tip_exp.records.folder import RunFolder
from tip_exp.records.meter import Meter
from tip_exp.rollout.hf import HfSampler
from tip_exp.run import run
from tip_exp.types import Sampling
from tip_exp.utils.errors import ConfigError
from tip_exp.utils.io import read_rows

Compose = Callable[..., RunConfig]
TOOLS = ["data=mini_travel", "eval=mini_travel", "agent=default", "data.train.num_problems=12"]
FREE = Sampling(2, 1.0, 1.0, 0, 5000)


@pytest.fixture
def config(compose_run: Compose) -> RunConfig:
    return compose_run(*TOOLS)


@pytest.fixture
def train(config: RunConfig) -> Dataset:
    return load(config.data.train)


def scripted(config: RunConfig, pair: Pair, dataset: Dataset, policy: Policy) -> EpisodeSampler:
    sampler = with_tools(ScriptedSampler(policy, Chat(pair.tokenizer)), pair, dataset, config.agent)
    assert isinstance(sampler, EpisodeSampler)
    return sampler


def test_evaluation_of_a_perfect_policy_and_of_one_that_calls_no_tool(
    config: RunConfig, tiny_pair: Pair, train: Dataset
) -> None:
    prompts = prompt_ids(tiny_pair, train)
    summaries = []
    for policy in (respond, copy_the_query):
        player = scripted(config, tiny_pair, train, policy)
        player.generate(prompts, FREE, seed=0)
        rows, summary = grade_episodes(player.last, train, FREE.samples)
        summaries.append(summary)
        assert [(row["problem_id"], row["sample"]) for row in rows[:3]] == [
            ("mini_travel/en/0", 0),
            ("mini_travel/en/0", 1),
            ("mini_travel/en/1", 0),
        ]
    perfect, no_tool = summaries
    assert perfect["mean@2"] == perfect["best@2"] == perfect["best@2_bootstrap"] == 1.0
    assert perfect["turns"] == 3.0 and perfect["stop_final_frac"] == 1.0
    # one of the three constraints of an errand is in the question itself
    assert no_tool["mean@2"] == pytest.approx(1 / 3) and no_tool["no_tool_baseline"] == pytest.approx(1 / 3)
    assert no_tool["mean@2_se"] == pytest.approx(0.0)


def test_long_episodes_are_truncated_for_the_learner_but_scored_whole(
    compose_run: Compose, tiny_pair: Pair, train: Dataset
) -> None:
    config = compose_run(*TOOLS, "data.max_prompt_tokens=200", "agent.max_train_tokens=300")
    prompts = prompt_ids(tiny_pair, train)
    sampler = scripted(config, tiny_pair, train, respond)
    rollouts = sampler.generate(prompts, FREE, seed=0)
    assert all(len(rollout.token_ids) == 300 for rollout in rollouts)  # every errand takes more tokens
    for rollout, prompt in zip(rollouts[::2], prompts, strict=True):
        assert rollout.token_ids[: len(prompt)] == prompt and rollout.truncated
    assert episode_metrics(sampler)["episode/tail_cut_frac"] == 1.0
    assert episode_metrics(sampler)["episode/fraction"] == 1.0
    assert episode_metrics(sampler.sampler) == {}


@pytest.mark.parametrize(("evaluating", "thinking"), [(False, False), (True, True)])
def test_tool_prompts_follow_the_thinking_switches_of_the_pair(
    config: RunConfig, tiny_pair: Pair, train: Dataset, evaluating: bool, thinking: bool
) -> None:
    tiny_pair.tokenizer.chat_template = "{{ messages[-1]['content'] }} thinking={{ enable_thinking }}"
    chat = tiny_pair.chat.model_copy(update={"thinking": False, "eval_thinking": True})
    pair = replace(tiny_pair, chat=chat)
    prompts = prompt_ids(pair, train, evaluating=evaluating)
    assert all(pair.decode(prompt).endswith(f" thinking={thinking}") for prompt in prompts)
    script = ScriptedSampler(respond, Chat(pair.tokenizer))
    sampler = with_tools(script, pair, train, config.agent, evaluating=evaluating)
    rollouts = sampler.generate(prompts[:1], FREE, seed=0)  # a KeyError if it rendered other prompts
    assert rollouts[0].token_ids[: len(prompts[0])] == prompts[0]


def test_without_a_thinking_switch_the_template_decides(config: RunConfig, tiny_pair: Pair, train: Dataset) -> None:
    tiny_pair.tokenizer.chat_template = "{{ enable_thinking is defined }}"
    assert tiny_pair.decode(prompt_ids(tiny_pair, train)[0]) == "False"


def test_the_learner_takes_a_step_on_sampled_episodes(config: RunConfig, tiny_pair: Pair, train: Dataset) -> None:
    """The word_sums student was never trained on tools; its text is still an episode."""
    student, stops, pad = tiny_pair.student.module, tiny_pair.stop_ids, tiny_pair.pad_id
    sampler = HfSampler(student, stop_ids=stops, pad_id=pad, batch_size=config.rollout.batch_size)
    sampler = with_tools(sampler, tiny_pair, train, config.agent)
    prompts = prompt_ids(tiny_pair, train)[:4]
    rollouts = sampler.generate(prompts, Sampling(2, 1.0, 1.0, 0, 24), seed=0)
    assert len(rollouts) == 8 and all(rollout.num_response_tokens <= 24 for rollout in rollouts)
    meter = Meter(torch.device("cpu"))
    report = train_step(Learner(tiny_pair, make_selector(config), config.learner, seed=0, meter=meter), rollouts)
    assert report.metrics["select/response_tokens"] == sum(rollout.num_response_tokens for rollout in rollouts)
    assert report.metrics["train/grad_norm"] > 0


def test_two_tasks_with_the_same_prompt_are_an_error(config: RunConfig, tiny_pair: Pair, train: Dataset) -> None:
    repeated = Dataset([train.problems[0]] * 2, train.source, train.sha256, train.tools)
    with pytest.raises(ConfigError, match="have the same prompt"):
        scripted(config, tiny_pair, repeated, respond)


@pytest.mark.slow
def test_a_short_run_teaches_the_student_to_call_tools(tmp_path: Path, compose_run: Compose) -> None:
    few = ["pair=tiny_tools", "learner.num_steps=12", "learner.prompts_per_step=16", "learner.warmup_steps=2"]
    few += ["eval.every=0", "eval.samples=1", "eval.teacher=false", "logger=files", "learner.schedule=constant"]
    folder = RunFolder(tmp_path)
    run(compose_run(*TOOLS[:3], *few), folder)
    rows = read_rows(folder.metrics)
    before, after = rows[0]["eval/mini_travel/mean@1"], rows[-1]["eval/mini_travel/mean@1"]
    assert rows[-1]["eval/mini_travel/no_tool_baseline"] == pytest.approx(1 / 3)
    assert after > before + 0.1
    assert rows[-1]["episode/calls"] > rows[1]["episode/calls"]
