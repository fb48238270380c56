"""The embedded pair as the benchmarks use it: shipped settings, training prompts in a run's order, accuracy after."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice

import torch
from omegaconf import OmegaConf

from tip_exp.config.schema import LearnerConfig, PairConfig, SelectorConfig
from tip_exp.data import word_sums
from tip_exp.grading import boxed
from tip_exp.models.load import load_pair
from tip_exp.models.pair import Pair
from tip_exp.rollout.hf import HfSampler
from tip_exp.selector.selector import Quadrants, Selector
from tip_exp.types import Sampling
from tip_exp.utils.paths import conf_dir

MAX_RESPONSE_TOKENS = 72  # as conf/eval/word_sums.yaml


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Of word sums: `greedy`, and the mean over `samples` responses at temperature 1 with its standard error."""

    greedy: float
    sampled: float
    sampled_se: float


def load() -> Pair:
    return load_pair(PairConfig.model_validate(_shipped("pair", "tiny")), torch.device("cpu"))


def learner_settings(**changed: object) -> LearnerConfig:
    """conf/learner/tiny.yaml without diagnostics, but for what is changed."""
    settings = LearnerConfig.model_validate(_shipped("learner", "tiny"))
    return settings.model_copy(update={"diagnostics_every": 0, **changed})


def selector(retention: float) -> Selector:
    """Every token, or Soft-OR's share of them."""
    shipped = _shipped("selector", "full" if retention == 1 else "soft_or")
    shipped["retention"] = retention
    settings = SelectorConfig.model_validate(shipped)
    return Selector(**settings.model_dump(exclude={"label"}), quadrants=Quadrants(entropy=0.3, divergence=0.3))


def prompts(count: int, seed: int) -> list[str]:
    return [problem.prompt for problem in islice(word_sums.stream("train", seed), count)]


def sampler_of(pair: Pair) -> HfSampler:
    return HfSampler(pair.student.module, stop_ids=pair.stop_ids, pad_id=pair.pad_id, batch_size=256)


def training_sampling() -> Sampling:
    return Sampling(1, 1.0, 1.0, 0, MAX_RESPONSE_TOKENS)


def accuracy(pair: Pair, num_problems: int = 256, samples: int = 4) -> Accuracy:
    """On the first test problems; the standard error is over problems."""
    problems = list(islice(word_sums.stream("test", 0), num_problems))
    ids = [pair.prompt_ids(problem.prompt, evaluating=True) for problem in problems]

    def right(sampling: Sampling) -> torch.Tensor:
        rollouts = sampler_of(pair).generate(ids, sampling, seed=0)
        answers = [problem.answer for problem in problems for _ in range(sampling.samples)]
        verdicts = [
            boxed.grade(pair.decode(rollout.response_ids), answer).right
            for rollout, answer in zip(rollouts, answers, strict=True)
        ]
        return torch.tensor(verdicts, dtype=torch.float64).view(num_problems, -1).mean(1)

    greedy = right(Sampling(1, 0.0, 1.0, 0, MAX_RESPONSE_TOKENS))
    sampled = right(Sampling(samples, 1.0, 1.0, 0, MAX_RESPONSE_TOKENS))
    return Accuracy(float(greedy.mean()), float(sampled.mean()), float(sampled.std()) / math.sqrt(num_problems))


def _shipped(group: str, option: str) -> dict[str, object]:
    """An option's values over those that conf/config.yaml has for its group."""
    common = OmegaConf.load(conf_dir() / "config.yaml")
    option_values = OmegaConf.create({group: OmegaConf.load(conf_dir() / group / f"{option}.yaml")})
    values = OmegaConf.to_container(OmegaConf.select(OmegaConf.merge(common, option_values), group), resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}
