"""The proof that rollouts are on-policy: its arithmetic, its limits, and that hf rollouts pass it as well."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from tests.helpers import train_step

from tip_exp.build import make_selector
from tip_exp.config.schema import RunConfig
from tip_exp.learner.learner import Learner
from tip_exp.learner.on_policy import (
    MismatchLimits,
    SyncError,
    check_logprob_mismatch,
    limits_for,
    mismatch_metrics,
)
from tip_exp.learner.on_policy import sampler_logprobs as lined_up
from tip_exp.models.pair import Pair
from tip_exp.records.meter import Meter
from tip_exp.records.metrics import MISMATCH_MAX, MISMATCH_MEAN, MISMATCH_P99
from tip_exp.rollout.hf import HfSampler
from tip_exp.types import Rollout, Sampling

QUESTIONS = [f"Tom has {n} pens. He finds {n % 7 + 2}. He gives {n % 5 + 1}. How many pens?" for n in range(8, 16)]


def test_log_probs_line_up_with_tokens_in_any_order() -> None:
    rollouts = [Rollout([1, 2, 3], [False, True, True], "stop", [-0.1, -0.2])]
    rollouts += [Rollout([1, 4, 9, 5], [False, True, False, True], "stop", [-0.3, -0.4])]  # a tool spoke in between
    rollout, position = torch.tensor([1, 0, 0, 1]), torch.tensor([1, 0, 1, 0])
    assert lined_up(rollouts, rollout, position).tolist() == [-0.4, -0.1, -0.2, -0.3]


def test_metrics() -> None:
    """Gaps 0.00, 0.01 … 1.99 of 200 tokens: mean 0.995, the 198th smallest is 1.97, the largest 1.99."""
    gap = torch.arange(200, dtype=torch.float64) / 100
    found = mismatch_metrics(-1 - gap, torch.full((200,), -1.0, dtype=torch.float64))
    assert (
        found[MISMATCH_MEAN] == pytest.approx(0.995)
        and found[MISMATCH_P99] == pytest.approx(1.97)
        and found[MISMATCH_MAX] == pytest.approx(1.99)
    )


@pytest.mark.parametrize(
    ("mean", "largest", "stops"),
    [(0.01, 0.1, False), (0.06, 0.1, True), (0.01, 0.6, True), (math.nan, 0.1, True), (0.01, math.inf, True)],
)
def test_limits(mean: float, largest: float, stops: bool) -> None:
    limits = MismatchLimits(mean=0.05, max=0.5)
    if not stops:
        return check_logprob_mismatch({MISMATCH_MEAN: mean, MISMATCH_MAX: largest}, limits, step=3)
    with pytest.raises(SyncError, match="step 3: sampler and learner disagree"):
        check_logprob_mismatch({MISMATCH_MEAN: mean, MISMATCH_MAX: largest}, limits, step=3)


def test_the_coarsest_type_sets_the_limits_unless_they_are_given() -> None:
    assert limits_for("float32", "bfloat16") == limits_for("bfloat16") == limits_for("bfloat16", "float16")
    assert limits_for("float32").mean < limits_for("float16").mean < limits_for("bfloat16").mean
    assert limits_for("float32", mean=0.3) == MismatchLimits(0.3, limits_for("float32").max)


def test_a_sampler_without_log_probs_has_nothing_to_check() -> None:
    check_logprob_mismatch({"train/loss": 1.0}, limits_for("float32"), step=1)


@pytest.mark.parametrize("budget", [16384, 300])  # one micro-batch, whose graph is kept, and several
@pytest.mark.parametrize(("selector", "measured"), [("soft_or", {"entropy", "reverse_kl"}), ("full", set())])
def test_hf_rollouts_pass_and_no_statistic_is_forced_on_the_selector(
    tiny_pair: Pair, compose_run: Callable[..., RunConfig], selector: str, measured: set[str], budget: int
) -> None:
    config = compose_run(f"selector={selector}", "learner.diagnostics_every=0")
    settings = config.learner.model_copy(update={"micro_batch_tokens": budget})
    sampler = HfSampler(tiny_pair.student.module, stop_ids=tiny_pair.stop_ids, pad_id=tiny_pair.pad_id, batch_size=8)
    prompts = [tiny_pair.prompt_ids(question) for question in QUESTIONS]
    rollouts = sampler.generate(prompts, Sampling(1, 1.0, 1.0, 0, 72), seed=0)
    learner = Learner(tiny_pair, make_selector(config), settings, seed=0, meter=Meter(torch.device("cpu")))
    report = train_step(learner, rollouts)
    assert 0 < report.metrics[MISMATCH_MEAN] <= report.metrics[MISMATCH_P99] <= report.metrics[MISMATCH_MAX] < 2e-4
    assert set(report.statistics) == measured
    stale = train_step(learner, rollouts, 2).metrics  # the same rollouts, after an update
    with pytest.raises(SyncError):
        check_logprob_mismatch(stale, limits_for("float32"), step=2)
