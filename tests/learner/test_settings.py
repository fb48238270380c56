"""What a learner takes from its config and its seed: AdamW's settings, and draws of its own for each step."""

from __future__ import annotations

import pytest
import torch
from tests.helpers import make_learner, sample_rollouts, train_step

from tip_exp.config.schema import RunConfig
from tip_exp.learner.adamw import update_ratio
from tip_exp.models.pair import Pair


def test_adamw_has_the_settings_of_the_config(tiny_pair: Pair, tiny_config: RunConfig) -> None:
    settings = {"betas": [0.8, 0.95], "weight_decay": 0.3, "eps": 1e-3, "lr": 1e-5}
    learner = make_learner(tiny_pair, tiny_config.learner, schedule="constant", warmup_steps=2, **settings)
    assert type(learner.optimizer) is torch.optim.AdamW
    assert update_ratio(learner.optimizer, learner.ranks) == 0.0  # no parameter has been updated
    train_step(learner, sample_rollouts(tiny_pair), step=1)
    (group,) = learner.optimizer.param_groups
    assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.8, 0.95), 0.3, 1e-3)
    assert group["lr"] == pytest.approx(5e-6)  # half of the warm-up
    assert group["fused"]  # an update has no temporary copies of the weights


def test_each_step_draws_its_own_tokens(tiny_pair: Pair, tiny_config: RunConfig) -> None:
    learner = make_learner(tiny_pair, tiny_config.learner, "random", lr=1e-30)
    rollouts = sample_rollouts(tiny_pair)
    step_1, step_2, step_1_again = (train_step(learner, rollouts, step).selection.kept_mask for step in (1, 2, 1))
    assert step_1.equal(step_1_again) and not step_1.equal(step_2)
