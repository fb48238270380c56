"""The proof that rollouts are on-policy: its arithmetic, its limits, and that hf rollouts pass it as well."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tests.helpers import train_step

from tip_exp.config.schema import RunConfig
from tip_exp.learner.learner import Learner
from tip_exp.learner.on_policy import (
    MismatchCheck,
    MismatchLimits,
    SyncError,
    limits_for,
    mismatch_metrics,
    model_mismatch,
)
from tip_exp.learner.on_policy import sampler_logprobs as lined_up
from tip_exp.learner.selectors import make_selector
from tip_exp.models.pair import Pair
from tip_exp.records.meter import Meter
from tip_exp.records.metrics import MISMATCH_MAX, MISMATCH_MEAN, MISMATCH_P999
from tip_exp.rollout.hf import HfSampler
from tip_exp.types import Rollout, Sampling

QUESTIONS = [f"Tom has {n} pens. He finds {n % 7 + 2}. He gives {n % 5 + 1}. How many pens?" for n in range(8, 16)]


def test_log_probs_line_up_with_tokens_in_any_order() -> None:
    rollouts = [Rollout([1, 2, 3], [False, True, True], "stop", [-0.1, -0.2])]
    rollouts += [Rollout([1, 4, 9, 5], [False, True, False, True], "stop", [-0.3, -0.4])]  # a tool spoke in between
    rollout, position = torch.tensor([1, 0, 0, 1]), torch.tensor([1, 0, 1, 0])
    assert lined_up(rollouts, rollout, position).tolist() == [-0.4, -0.1, -0.2, -0.3]


def test_metrics() -> None:
    """Gaps 0.00, 0.01 … 19.99 of 2000 tokens: mean 9.995, the 1998th smallest is 19.97, the largest 19.99."""
    gap = torch.arange(2000, dtype=torch.float64) / 100
    metrics = mismatch_metrics(-1 - gap, torch.full((2000,), -1.0, dtype=torch.float64))
    assert metrics == pytest.approx({MISMATCH_MEAN: 9.995, MISMATCH_P999: 19.97, MISMATCH_MAX: 19.99})
    assert set(mismatch_metrics(gap[1:2], gap[:1]).values()) == {0.01}  # of one token
    assert mismatch_metrics(gap[:0], gap[:0]) == {}


@pytest.mark.parametrize(
    ("mean", "p999", "stops"),
    [(0.05, 0.5, False), (0.06, 0.1, True), (0.01, 0.6, True), (math.nan, 0.1, True), (0.01, math.nan, True)],
)
def test_mean_and_percentile_stop_the_run(mean: float, p999: float, stops: bool) -> None:
    check = MismatchCheck(MismatchLimits(mean=0.05, p999=0.5, max=1.0))
    metrics = {MISMATCH_MEAN: mean, MISMATCH_P999: p999, MISMATCH_MAX: 0.9}
    if not stops:
        return check(metrics, step=3)
    with pytest.raises(SyncError, match=r"step 3: sampler and learner disagree .*\.mean and \.p999$"):
        check(metrics, step=3)


def test_the_maximum_is_logged_once_and_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    check = MismatchCheck(MismatchLimits(mean=0.05, p999=0.5, max=1.0))
    for step, largest in enumerate((1.0, 3.25, 7.0), start=1):
        check({MISMATCH_MEAN: 0.01, MISMATCH_P999: 0.1, MISMATCH_MAX: largest}, step)
    (record,) = caplog.records
    assert record.getMessage().startswith("step 2: a sampled token's log-prob differs by 3.2 nats")


def test_the_coarsest_type_sets_the_limits_unless_they_are_given() -> None:
    assert limits_for("float32", "bfloat16") == limits_for("bfloat16") == limits_for("bfloat16", "float16")
    for name in ("mean", "p999", "max"):
        ascending = [getattr(limits_for(dtype), name) for dtype in ("float32", "float16", "bfloat16")]
        assert ascending == sorted(set(ascending))
    in_float16 = MismatchLimits(mean=0.01, p999=0.15, max=0.5)  # as conf/config.yaml says
    assert limits_for("float16") == in_float16 and limits_for("bfloat16") == MismatchLimits(0.06, 1.0, 4.0)
    assert limits_for("float32") == MismatchLimits(5e-4, 0.01, 0.02)
    assert limits_for("float32", mean=0.3, p999=None) == replace(limits_for("float32"), mean=0.3)


def test_older_weights_are_checked_at_the_first_step_and_later_against_given_limits() -> None:
    """As build.py makes the check for rollout.staleness=1: after step 1 the weights differ by an update."""
    metrics = {MISMATCH_MEAN: 0.1, MISMATCH_P999: 5.0, MISMATCH_MAX: 9.0}
    check = MismatchCheck(limits_for("float32"), later=limits_for(mean=None, p999=None, max=None))
    with pytest.raises(SyncError, match="step 1"):
        check(metrics, step=1)
    check(metrics, step=2)
    with pytest.raises(SyncError, match="nan"):
        check(metrics | {MISMATCH_MEAN: math.nan}, step=2)
    with pytest.raises(SyncError, match=r"step 2: .* allowed are 0\.05 and inf"):
        MismatchCheck(limits_for("float32"), later=limits_for(mean=0.05, p999=None, max=None))(metrics, step=2)


def test_a_sampler_without_log_probs_has_nothing_to_check() -> None:
    MismatchCheck(limits_for("float32"))({"train/loss": 1.0}, step=1)


@pytest.mark.parametrize("budget", [16384, 300])  # one micro-batch, whose graph is kept, and several
@pytest.mark.parametrize(
    ("selector", "measured"),
    [("soft_or", {"entropy", "reverse_kl"}), ("full", set()), ("low_logprob", {"student_logprob"})],
)
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
    assert 0 < report.metrics[MISMATCH_MEAN] <= report.metrics[MISMATCH_P999] <= report.metrics[MISMATCH_MAX] < 2e-4
    assert set(report.statistics) == measured
    stale = train_step(learner, rollouts, 2).metrics  # the same rollouts, after an update
    with pytest.raises(SyncError):
        MismatchCheck(limits_for("float32"))(stale, step=2)


@pytest.mark.parametrize("packing", [True, False])
def test_an_evaluation_compares_the_weights_of_its_engine(
    tiny_pair: Pair, tiny_config: RunConfig, packing: bool
) -> None:
    settings = tiny_config.learner.model_copy(update={"micro_batch_tokens": 300, "packing": packing})
    sampler = HfSampler(tiny_pair.student.module, stop_ids=tiny_pair.stop_ids, pad_id=tiny_pair.pad_id, batch_size=8)
    prompts = [tiny_pair.prompt_ids(question) for question in QUESTIONS]
    rollouts = sampler.generate(prompts, Sampling(1, 1.0, 1.0, 0, 72), seed=0)
    same = model_mismatch(tiny_pair.student, rollouts, tiny_pair, settings)
    assert 0 < same[MISMATCH_MEAN] <= same[MISMATCH_MAX] < 2e-4
    with pytest.raises(SyncError, match="step 0: sampler and learner disagree"):
        MismatchCheck(limits_for("float32"))(model_mismatch(tiny_pair.teacher, rollouts, tiny_pair, settings), step=0)
