"""The embedded pair `tiny` with its shipped settings: model, learner, selector, prompts in a run's order, accuracy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice

import torch
from hydra import compose, initialize_config_dir

from tip_exp.config.parse import parse
from tip_exp.config.resolvers import register_resolvers
from tip_exp.config.schema import LearnerConfig, RunConfig
from tip_exp.data import word_sums
from tip_exp.grading import boxed
from tip_exp.learner.selectors import make_selector
from tip_exp.models.load import load_pair
from tip_exp.models.pair import Pair
from tip_exp.rollout.hf import HfSampler
from tip_exp.selector.selector import Selector
from tip_exp.types import Sampling
from tip_exp.utils.paths import conf_dir

MAX_RESPONSE_TOKENS = 72  # as in conf/eval/word_sums.yaml
TRAIN_SAMPLING = Sampling(1, 1.0, 1.0, 0, MAX_RESPONSE_TOKENS)


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Fractions of word sums solved: greedy, and sampled at temperature 1 with the standard error over problems."""

    greedy: float
    sampled: float
    sampled_se: float


def compose_run(*overrides: str) -> RunConfig:
    """The config of `tip-exp OVERRIDES`; without overrides, of the embedded pair."""
    register_resolvers()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return parse(compose("config", overrides=list(overrides)))


def load() -> Pair:
    return load_pair(compose_run().pair, torch.device("cpu"))


def learner_config(**changes: object) -> LearnerConfig:
    """conf/learner/tiny.yaml without diagnostics, averaged over tokens as TRL does, and with these changes."""
    return compose_run().learner.model_copy(update={"diagnostics_every": 0, "average": "token", **changes})


def selector(retention: float) -> Selector:
    """Every token at retention 1, else Soft-OR."""
    name = "full" if retention == 1 else "soft_or"
    return make_selector(compose_run(f"selector={name}", f"selector.retention={retention}"))


def prompts(count: int, seed: int) -> list[str]:
    return [problem.prompt for problem in islice(word_sums.stream("train", seed), count)]


def make_sampler(pair: Pair) -> HfSampler:
    return HfSampler(pair.student.module, stop_ids=pair.stop_ids, pad_id=pair.pad_id, batch_size=256)


def accuracy(pair: Pair, num_problems: int = 256, samples: int = 4) -> Accuracy:
    """The student's accuracy on the first test problems."""
    problems = list(islice(word_sums.stream("test", 0), num_problems))
    prompt_ids = [pair.prompt_ids(problem.prompt, evaluating=True) for problem in problems]

    def fractions_right(sampling: Sampling) -> torch.Tensor:  # (num_problems,)
        rollouts = make_sampler(pair).generate(prompt_ids, sampling, seed=0)
        answers = [problem.answer for problem in problems for _ in range(sampling.samples)]
        right = [
            boxed.grade(pair.decode(rollout.response_ids), answer).right
            for rollout, answer in zip(rollouts, answers, strict=True)
        ]
        return torch.tensor(right, dtype=torch.float64).view(num_problems, -1).mean(1)

    greedy = fractions_right(Sampling(1, 0.0, 1.0, 0, MAX_RESPONSE_TOKENS))
    sampled = fractions_right(Sampling(samples, 1.0, 1.0, 0, MAX_RESPONSE_TOKENS))
    return Accuracy(float(greedy.mean()), float(sampled.mean()), float(sampled.std()) / math.sqrt(num_problems))
