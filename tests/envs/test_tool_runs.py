"""Tool tasks through a run's own parts: prompts, whole episodes as rollouts, metrics, and one step of the learner."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.envs.deepplanning.test_environment import copy_the_query
from tests.helpers import train_step

from tip_exp.build import make_selector
from tip_exp.config.schema import RunConfig
from tip_exp.data.dataset import Dataset
from tip_exp.data.load import load
from tip_exp.data.prompts import prompt_ids, with_tools
from tip_exp.envs.chat import Chat
from tip_exp.envs.deepplanning.mini import errands
from tip_exp.envs.sampler import EpisodeSampler, episode_metrics
from tip_exp.envs.scripted import ScriptedSampler
from tip_exp.eval.episodes import evaluate_episodes
from tip_exp.learner.learner import Learner
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


def player(config: RunConfig, pair: Pair, loaded: Dataset, policy) -> EpisodeSampler:
    sampler = with_tools(ScriptedSampler(policy, Chat(pair.tokenizer)), pair, loaded, config.agent)
    assert isinstance(sampler, EpisodeSampler)
    return sampler


def test_evaluation_of_a_perfect_policy_and_of_one_without_tools(
    config: RunConfig, tiny_pair: Pair, train: Dataset
) -> None:
    prompts = prompt_ids(tiny_pair, train, config.agent)
    summaries = {}
    for name, policy in (("full", errands.respond), ("no tools", copy_the_query)):
        rows, summaries[name] = evaluate_episodes(
            player(config, tiny_pair, train, policy), train, prompts, FREE, seed=0
        )
        assert [(row["problem_id"], row["sample"]) for row in rows[:3]] == [
            ("mini_travel/en/0", 0),
            ("mini_travel/en/0", 1),
            ("mini_travel/en/1", 0),
        ]
    assert summaries["full"]["mean@2"] == summaries["full"]["best@2"] == summaries["full"]["best@2_bootstrap"] == 1.0
    assert summaries["full"]["turns"] == 3.0 and summaries["full"]["stop_final_frac"] == 1.0
    assert (
        summaries["no tools"]["mean@2"]
        == pytest.approx(summaries["no tools"]["no_tool_baseline"])
        == pytest.approx(1 / 3)
    )
    assert summaries["no tools"]["mean@2_se"] == pytest.approx(0.0)


def test_episodes_that_are_too_long_lose_their_tail_and_are_counted(
    compose_run: Compose, tiny_pair: Pair, train: Dataset
) -> None:
    config = compose_run(*TOOLS, "data.max_prompt_tokens=200", "agent.max_train_tokens=300")
    prompts = prompt_ids(tiny_pair, train, config.agent)
    sampler = player(config, tiny_pair, train, errands.respond)
    rollouts = sampler.generate(prompts, FREE, seed=0)
    assert all(len(one.token_ids) == 300 for one in rollouts)  # in this tokenizer errands take more
    for rollout, prompt in zip(rollouts[::2], prompts, strict=True):
        assert rollout.token_ids[: len(prompt)] == prompt and rollout.truncated
    assert sampler.metrics()["episode/tail_cut_frac"] == 1.0
    assert sampler.metrics()["episode/fraction"] == 1.0  # scored whole
    assert episode_metrics(sampler.sampler) == {}


def test_the_word_sums_student_runs_the_loop_and_learns_a_step(
    config: RunConfig, tiny_pair: Pair, train: Dataset
) -> None:
    """It knows nothing of tools; what it babbles is still an episode to learn from."""
    student, stops, pad = tiny_pair.student.module, tiny_pair.stop_ids, tiny_pair.pad_id
    sampler = HfSampler(student, stop_ids=stops, pad_id=pad, batch_size=config.rollout.batch_size)
    sampler = with_tools(sampler, tiny_pair, train, config.agent)
    prompts = prompt_ids(tiny_pair, train, config.agent)[:4]
    rollouts = sampler.generate(prompts, Sampling(2, 1.0, 1.0, 0, 24), seed=0)
    assert len(rollouts) == 8 and all(rollout.num_response_tokens <= 24 for rollout in rollouts)
    meter = Meter(torch.device("cpu"))
    report = train_step(Learner(tiny_pair, make_selector(config), config.learner, seed=0, meter=meter), rollouts)
    assert report.metrics["select/response_tokens"] == sum(one.num_response_tokens for one in rollouts)
    assert report.metrics["train/grad_norm"] > 0


def test_two_tasks_with_one_prompt_are_refused(config: RunConfig, tiny_pair: Pair, train: Dataset) -> None:
    twice = Dataset([train.problems[0]] * 2, train.source, train.sha256, train.tools)
    with pytest.raises(ConfigError, match="have one and the same prompt"):
        player(config, tiny_pair, twice, errands.respond)


@pytest.mark.slow
def test_a_few_steps_teach_the_student_to_look_things_up(tmp_path: Path, compose_run: Compose) -> None:
    few = ["pair=tiny_tools", "learner.num_steps=12", "learner.prompts_per_step=16", "learner.warmup_steps=2"]
    few += ["eval.every=0", "eval.samples=1", "eval.teacher=false", "logger=files", "learner.schedule=constant"]
    folder = RunFolder(tmp_path)
    run(compose_run(*TOOLS[:3], *few), folder)
    rows = read_rows(folder.metrics)
    before, after = rows[0]["eval/mini_travel/mean@1"], rows[-1]["eval/mini_travel/mean@1"]
    assert rows[-1]["eval/mini_travel/no_tool_baseline"] == pytest.approx(1 / 3)
    assert after > before + 0.1
    assert rows[-1]["episode/calls"] > rows[1]["episode/calls"]
