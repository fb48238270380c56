"""The objective that a configuration names, and the limit of clipped_kl as a quantile of the step's tokens."""

from __future__ import annotations

import math

import pytest
import torch
from tests.helpers import gradients_of_step, make_learner, sample_rollouts

from tip_exp.config.schema import RunConfig
from tip_exp.learner.objective import make_objective, objective_stats
from tip_exp.losses.divergence import Divergence
from tip_exp.models.load import load_pair
from tip_exp.selector.normalize import quantile_of

CPU = torch.device("cpu")


def test_the_limit_is_a_number_or_a_quantile_of_all_tokens(tiny_config: RunConfig) -> None:
    clipped = tiny_config.learner.model_copy(update={"divergence": "clipped_kl", "kl_clip": 0.7})
    assert make_objective(clipped, {})(torch.zeros(1)) == Divergence("clipped_kl", kl_clip=0.7)
    assert objective_stats(clipped) == set()
    quantile = clipped.model_copy(update={"kl_clip": "q0.75"})
    assert objective_stats(quantile) == {"reverse_kl"}
    of_step = {"reverse_kl": torch.tensor([4.0, 0.0, 3.0, 1.0, 2.0])}
    assert make_objective(quantile, of_step)(torch.zeros(1)) == Divergence("clipped_kl", kl_clip=3.0)
    nothing = make_objective(quantile, {"reverse_kl": torch.zeros(0)})(torch.zeros(1))
    assert nothing == Divergence("clipped_kl", kl_clip=math.inf)
    reverse = quantile.model_copy(update={"divergence": "reverse_kl"})  # has no limit
    assert objective_stats(reverse) == set() and isinstance(make_objective(reverse, {})(torch.zeros(1)), Divergence)


def test_a_step_clips_at_the_quantile_of_all_its_tokens(tiny_config: RunConfig) -> None:
    """Also without diagnostics, and where the selector keeps other tokens; micro-batches share the limit."""
    results, limit = [], math.nan
    for clip in ("q0.75", None, 1e9):
        pair = load_pair(tiny_config.pair, CPU)
        changes = {"divergence": "clipped_kl", "kl_clip": clip or limit, "diagnostics_every": 0, "lr": 1e-30}
        learner = make_learner(pair, tiny_config.learner, "random", micro_batch_tokens=300, grad_clip=1e9, **changes)
        results.append(gradients_of_step(learner, sample_rollouts(pair)))
        if clip == "q0.75":
            assert set(results[0][1].statistics) == {"reverse_kl"}
            limit = float(quantile_of(results[0][1].statistics["reverse_kl"], 0.75))
    (gradients, report), (same, _), (unclipped, whole) = results
    for name, gradient in gradients.items():
        torch.testing.assert_close(same[name], gradient, rtol=1e-5, atol=1e-8)
    assert report.metrics["train/loss"] < 0.5 * whole.metrics["train/loss"]
    assert any(not unclipped[name].equal(gradient) for name, gradient in gradients.items())


@pytest.mark.parametrize("estimator", ["topk", "sampled_k1"])
def test_estimators(tiny_config: RunConfig, estimator: str) -> None:
    config = tiny_config.learner.model_copy(update={"estimator": estimator})
    objective = make_objective(config, {})(torch.tensor([3, 4]))
    assert type(objective).__name__ == {"topk": "TopK", "sampled_k1": "SampledK1"}[estimator]
