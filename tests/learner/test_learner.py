"""The update: any micro-batching gives the same gradient, only kept tokens contribute, and autograd agrees."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import product
from typing import Any

import pytest
import torch
from tests.helpers import gradients_of_step, in_float64, make_learner, sample_rollouts, train_step
from tests.reference import step_by_autograd
from torch import Tensor

from tip_exp.config.schema import RunConfig
from tip_exp.learner.adamw import update_ratio
from tip_exp.learner.distributed import ALONE
from tip_exp.learner.schedule import learning_rate
from tip_exp.models.pair import Pair
from tip_exp.selector.scores import DIAGNOSTICS
from tip_exp.selector.selector import Selector, Tokens, budgets, keep_top
from tip_exp.utils.errors import RunFailedError

# Qwen3's norms and rotary embedding compute in float32 whatever the weights' dtype, so float64 agrees to 1e-6 or so.
TOLERANCE = 1e-5


def assert_equal_gradients(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float((gradients[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)) < TOLERANCE, name


@pytest.mark.parametrize("backend", ["fused", "materialized"])
@pytest.mark.parametrize("score", ["soft_or", "full", "random"])
def test_any_micro_batching_gives_the_same_gradient(
    tiny_pair: Pair, tiny_config: RunConfig, backend: str, score: str
) -> None:
    rollouts = sample_rollouts(tiny_pair)
    retention = 1.0 if score == "full" else 0.5
    results = []
    for budget in (100_000, 400, 130):  # one micro-batch of 8 rollouts, several, one per rollout
        changes = {"micro_batch_tokens": budget, "grad_clip": 1e9, "lr": 1e-30, "loss_backend": backend}
        learner = make_learner(in_float64(tiny_pair), tiny_config.learner, score, retention, **changes)
        results.append(gradients_of_step(learner, rollouts))
    expected, expected_report = results[0]
    assert expected_report.metrics["train/grad_norm"] > 0.01
    for gradients, report in results[1:]:
        for metric in ("select/kept_tokens", "train/loss"):
            assert report.metrics[metric] == pytest.approx(expected_report.metrics[metric], rel=1e-9)
        assert_equal_gradients(gradients, expected)


class FirstTenth(Selector):
    """Keeps the first tenth of each response, so whole ends of sequences have no kept token."""

    def _choose(self, score: Tensor, tokens: Tokens, generator: torch.Generator) -> Tensor:
        groups = tokens.groups("rollout")
        return keep_top(-tokens.position.double(), groups, budgets(groups, 0.1, "ceil"))


SETTINGS = product(
    ("soft_or", "first tenth", "weighted"), (100_000, 300), (False, True), (False, True), ("rollout", "token")
)
# Half of them, those whose number has an even count of bits: any three of the last four meet with each rule.
HALF = [setting for n, setting in enumerate(SETTINGS) if n.bit_count() % 2 == 0]


@pytest.mark.parametrize(("rule", "budget", "packing", "checkpointing", "average"), HALF)
def test_the_gradient_is_that_of_autograd_on_whole_logits(
    tiny_pair: Pair, tiny_config: RunConfig, rule: str, budget: int, packing: bool, checkpointing: bool, average: str
) -> None:
    pair, rollouts = in_float64(tiny_pair), sample_rollouts(tiny_pair)
    changes: dict[str, Any] = {"micro_batch_tokens": budget, "packing": packing, "average": average}
    changes |= {"activation_checkpointing": checkpointing, "grad_clip": 1e9, "lr": 1e-30}
    weight = "score" if rule == "weighted" else "none"
    learner = make_learner(pair, tiny_config.learner, weight=weight, **changes)
    if rule == "first tenth":
        learner.selector = FirstTenth(**{f.name: getattr(learner.selector, f.name) for f in fields(Selector)})
    gradients, report = gradients_of_step(learner, rollouts)
    expected, loss = step_by_autograd(pair, rollouts, report, average=average, weight=weight)
    assert report.metrics["train/loss"] == pytest.approx(loss, rel=1e-8)
    assert_equal_gradients(gradients, expected)


@pytest.mark.parametrize("average", ["rollout", "token"])
@pytest.mark.parametrize("weight", ["inverse_gradient", "sqrt"])
@pytest.mark.parametrize("score, retention", [("full", 1.0), ("grad_norm", 0.3)])
def test_falling_weights_give_the_gradient_of_a_weighted_loss(
    tiny_pair: Pair, tiny_config: RunConfig, average: str, weight: Any, score: str, retention: float
) -> None:
    """Also of the statistics' own pass: without diagnostics only the gradient's norm is measured."""
    pair, rollouts = in_float64(tiny_pair), sample_rollouts(tiny_pair)
    changes: dict[str, Any] = {"micro_batch_tokens": 300, "average": average, "grad_clip": 1e9, "lr": 1e-30}
    learner = make_learner(pair, tiny_config.learner, score, retention, weight, diagnostics_every=0, **changes)
    gradients, report = gradients_of_step(learner, rollouts)
    assert set(report.statistics) == {"grad_norm"}
    expected, loss = step_by_autograd(pair, rollouts, report, average=average, weight=weight)
    assert report.metrics["train/loss"] == pytest.approx(loss, rel=1e-8)
    assert_equal_gradients(gradients, expected)


def test_full_equals_retention_one(tiny_pair: Pair, tiny_config: RunConfig) -> None:
    rollouts = sample_rollouts(tiny_pair)
    changes: dict[str, Any] = {"grad_clip": 1e9, "lr": 1e-30}
    full, _ = gradients_of_step(
        make_learner(in_float64(tiny_pair), tiny_config.learner, "full", 1.0, **changes), rollouts
    )
    top_all, report = gradients_of_step(
        make_learner(in_float64(tiny_pair), tiny_config.learner, "soft_or", 1.0, **changes), rollouts
    )
    assert report.metrics["select/kept_frac"] == 1.0
    for name, gradient in full.items():
        torch.testing.assert_close(top_all[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("score", "retention", "expected"),
    [("full", 1.0, set()), ("entropy", 0.5, {"entropy"}), ("soft_or", 0.5, {"entropy", "reverse_kl"})],
)
def test_only_required_statistics_are_measured(
    tiny_pair: Pair, tiny_config: RunConfig, score: str, retention: float, expected: set[str]
) -> None:
    rollouts = sample_rollouts(tiny_pair)
    learner = make_learner(tiny_pair, tiny_config.learner, score, retention, diagnostics_every=0)
    assert set(train_step(learner, rollouts).statistics) == expected


def test_a_diagnostic_step_measures_every_statistic(tiny_pair: Pair, tiny_config: RunConfig) -> None:
    learner = make_learner(tiny_pair, tiny_config.learner, "full", 1.0, diagnostics_every=2)
    rollouts = sample_rollouts(tiny_pair)
    assert len(train_step(learner, rollouts, step=1).statistics) == 0
    assert train_step(learner, rollouts, step=2).statistics.keys() == DIAGNOSTICS


def test_if_nothing_is_kept_the_weights_stay(tiny_pair: Pair, tiny_config: RunConfig) -> None:
    before = copy.deepcopy(tiny_pair.student.module.state_dict())
    learner = make_learner(tiny_pair, tiny_config.learner, retention=0.001)  # floor(0.001 x ~45) = 0 per rollout
    metrics = train_step(learner, sample_rollouts(tiny_pair)).metrics
    assert metrics["train/skipped"] == 1.0 and metrics["select/kept_frac"] == 0.0
    assert "train/loss" not in metrics  # 0 would read as a perfect student
    for name, value in tiny_pair.student.module.state_dict().items():
        assert value.equal(before[name])


def test_steps_lower_the_divergence_on_their_own_rollouts(tiny_pair: Pair, tiny_config: RunConfig) -> None:
    rollouts = sample_rollouts(tiny_pair)
    learner = make_learner(tiny_pair, tiny_config.learner, "full", 1.0, warmup_steps=0, lr=3e-4)
    losses = [train_step(learner, rollouts, step).metrics["train/loss"] for step in range(1, 9)]
    assert losses[-1] < 0.8 * losses[0], losses


def test_gradients_are_freed_after_the_update(tiny_pair: Pair, tiny_config: RunConfig) -> None:
    learner = make_learner(tiny_pair, tiny_config.learner)
    train_step(learner, sample_rollouts(tiny_pair))
    assert all(parameter.grad is None for parameter in learner.parameters)


def test_a_nan_gradient_stops_the_run_and_keeps_the_weights(tiny_pair: Pair, tiny_config: RunConfig) -> None:
    before = copy.deepcopy(tiny_pair.student.module.state_dict())
    rollouts = sample_rollouts(tiny_pair)
    with torch.no_grad():
        next(tiny_pair.teacher.module.parameters()).fill_(float("nan"))
    learner = make_learner(tiny_pair, tiny_config.learner, "full", 1.0, diagnostics_every=0)
    with pytest.raises(FloatingPointError, match=r"step 1: the gradient norm is nan, the loss nan\. Its"):
        train_step(learner, rollouts)
    for name, value in tiny_pair.student.module.state_dict().items():
        assert value.equal(before[name])


def test_a_gradient_that_overflows_stops_the_run_though_the_loss_is_finite(
    tiny_pair: Pair, tiny_config: RunConfig
) -> None:
    learner = make_learner(tiny_pair, tiny_config.learner)
    learner.parameters[-1].register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(FloatingPointError, match=r"step 1: the gradient norm is (nan|inf), the loss \d"):
        train_step(learner, sample_rollouts(tiny_pair))


@pytest.mark.parametrize("score", ["full", "soft_or"])  # the gradient is NaN; the selector refuses its statistics
def test_a_step_that_is_not_finite_is_skipped_at_most_five_times_in_a_row(
    tiny_pair: Pair, tiny_config: RunConfig, score: str
) -> None:
    before = copy.deepcopy(tiny_pair.student.module.state_dict())
    rollouts, weight = sample_rollouts(tiny_pair), next(tiny_pair.teacher.module.parameters())
    whole = weight.detach().clone()
    kept: list[int] = []
    changes = {"diagnostics_every": 0} if score == "full" else {}
    learner = make_learner(tiny_pair, tiny_config.learner, score, 0.5, non_finite="skip", **changes)
    learner.keep_batch = lambda step, batch, fault: kept.append(step) if batch is rollouts and fault else None

    def fill(value: float | Tensor) -> None:
        with torch.no_grad():
            weight.copy_(torch.as_tensor(value))

    fill(torch.nan)
    for step in range(1, 6):
        metrics = train_step(learner, rollouts, step).metrics
        assert (metrics["train/skipped"], metrics["train/non_finite"]) == (1, 1)
        assert "rollout/logprob_mismatch_mean" not in metrics
    assert all(value.equal(before[name]) for name, value in tiny_pair.student.module.state_dict().items())
    fill(whole)
    metrics = train_step(learner, rollouts, 6).metrics  # the count starts again
    assert metrics["train/skipped"] == 0 and "train/non_finite" not in metrics
    assert metrics["rollout/logprob_mismatch_mean"] < 1e-4
    fill(torch.nan)
    for step in range(7, 12):
        train_step(learner, rollouts, step)
    with pytest.raises(FloatingPointError, match=r"^step 12: .*skip leaves out at most 5 such steps in a row$"):
        train_step(learner, rollouts, 12)
    assert kept == [1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12]


def test_a_finite_step_that_keeps_nothing_ends_a_row_of_skipped_steps(tiny_pair: Pair, tiny_config: RunConfig) -> None:
    rollouts, weight = sample_rollouts(tiny_pair), next(tiny_pair.teacher.module.parameters())
    learner = make_learner(tiny_pair, tiny_config.learner, non_finite="skip")
    whole, selector = weight.detach().clone(), learner.selector
    for values, retention in ((torch.nan, 0.5), (whole, 1e-9), (torch.nan, 0.5)):
        with torch.no_grad():
            weight.copy_(torch.as_tensor(values))
        learner.selector = replace(selector, retention=retention)
        for step in range(1, 6 if retention == 0.5 else 2):
            metrics = train_step(learner, rollouts, step).metrics
            assert (metrics["train/skipped"], metrics.get("train/non_finite", 0)) == (1, retention == 0.5)


def test_a_selector_that_never_keeps_a_token_ends_the_run(tiny_pair: Pair, tiny_config: RunConfig) -> None:
    rollouts = sample_rollouts(tiny_pair)
    learner = make_learner(tiny_pair, tiny_config.learner, retention=1e-9)
    for step in range(1, 5):
        assert train_step(learner, rollouts, step).metrics["train/skipped"] == 1
    with pytest.raises(RunFailedError, match=r"^step 5: .* has kept no token .* selector.retention \(here 1e-09\)"):
        train_step(learner, rollouts, 5)
    learner.selector = replace(learner.selector, retention=0.5)
    train_step(learner, rollouts, 6)
    learner.selector = replace(learner.selector, retention=1e-9)
    assert train_step(learner, rollouts, 7).metrics["train/skipped"] == 1, "a trained student may need no token"


def test_nan_of_a_rule_is_not_said_to_be_of_the_models(tiny_pair: Pair, tiny_config: RunConfig) -> None:
    def holes(entropy: Tensor) -> Tensor:
        return torch.where(torch.arange(len(entropy)) == 3, torch.nan, entropy)

    learner = make_learner(tiny_pair, tiny_config.learner, "entropy", 0.5)
    learner.selector = replace(learner.selector, score=holes)
    with pytest.raises(FloatingPointError) as ended:
        train_step(learner, sample_rollouts(tiny_pair))
    text = r"step 1: the rule holes returned NaN at 1 of \d+ tokens, first at rollout \d+, position 3 \(entropy "
    assert re.match(text, str(ended.value)) and "replay" not in str(ended.value)


@pytest.mark.parametrize("lr", [1e38, 1e20])  # weights that overflow, and finite ones whose products do
def test_an_update_that_destroys_the_weights_stops_the_run(tiny_pair: Pair, tiny_config: RunConfig, lr: float) -> None:
    learner = make_learner(tiny_pair, tiny_config.learner, lr=lr, warmup_steps=0, eps=1e-8, non_finite="skip")
    with pytest.raises(FloatingPointError, match=r"^step 1, learner.lr=1e\+\d\d: the norm of the updated weights is"):
        train_step(learner, sample_rollouts(tiny_pair))


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("constant", 1, 0.5),  # warm-up of 2 steps: half of 1.0 at step 1
        ("constant", 2, 1.0),
        ("constant", 10, 1.0),
        ("linear", 2, 1.0),
        ("linear", 3, 1.0),  # transformers: progress 0 at the first step after the warm-up, 7/8 at the last
        ("linear", 7, 0.55),  # half way from 1.0 down to 0.1
        ("linear", 10, 0.1 + 0.9 / 8),
        ("cosine", 5, 0.1 + 0.9 * 0.8535533905932737),  # a quarter of the way: (1 + cos(pi / 4)) / 2
        ("cosine", 7, 0.55),
        ("cosine", 10, 0.1 + 0.9 * 0.03806023374435663),  # (1 + cos(7 pi / 8)) / 2
    ],
)
def test_learning_rate(tiny_config: RunConfig, schedule: str, step: int, expected: float) -> None:
    config = tiny_config.learner.model_copy(
        update={"lr": 1.0, "schedule": schedule, "num_steps": 10, "warmup_steps": 2, "final_lr_frac": 0.1}
    )
    assert learning_rate(step, config) == pytest.approx(expected)


def test_the_last_step_of_a_cosine_is_made(compose_run: Callable[..., RunConfig]) -> None:
    config = compose_run("learner=paper").learner
    assert 0 < learning_rate(config.num_steps, config) < 1e-5 * config.lr


def test_the_update_ratio_is_that_of_the_weights(tiny_pair: Pair, tiny_config: RunConfig) -> None:
    """Against weights copied before the step, with weight decay 0; eps is large enough to matter."""
    learner = make_learner(tiny_pair, tiny_config.learner, "full", 1.0, warmup_steps=0, eps=1e-3)
    rollouts = sample_rollouts(tiny_pair)
    for step in (1, 2):
        before = [parameter.detach().double().clone() for parameter in learner.parameters]
        ratio = train_step(learner, rollouts, step).metrics["train/update_ratio"]
        after = [parameter.detach().double() for parameter in learner.parameters]
        update = sum(float((a - b).square().sum()) for a, b in zip(after, before, strict=True)) ** 0.5
        norm = sum(float(a.square().sum()) for a in after) ** 0.5
        assert ratio == pytest.approx(update / norm, rel=1e-3) and ratio > 1e-4


@pytest.mark.parametrize(
    ("weight", "ratio"),
    [(0.0, 0.0), (1e15, 0.0), (1.01e15, None), (float("nan"), None)],
)
def test_the_norm_of_the_weights_is_at_most_1e15(weight: float, ratio: float | None) -> None:
    """A learning rate of 0 leaves the weights."""
    parameter = torch.nn.Parameter(torch.tensor([0.0, weight], dtype=torch.float64))
    optimizer = torch.optim.AdamW([parameter], lr=0.0)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    if ratio is None:
        with pytest.raises(FloatingPointError, match="the norm of the updated weights is"):
            update_ratio(optimizer, ALONE)
    else:
        assert update_ratio(optimizer, ALONE) == ratio


class FirstRollout(Selector):
    """Keeps the tokens of the first rollout."""

    def _choose(self, score: Tensor, tokens: Tokens, generator: torch.Generator) -> Tensor:
        return tokens.rollout == 0


@pytest.mark.parametrize(
    ("score", "checked", "budget", "checkpointing", "passes"),
    [
        ("full", False, 1, False, 8),  # nothing is measured: a pass for the gradient of each of 8 micro-batches
        ("full", True, 1, False, 1 + 8),  # the sampler check needs the first micro-batch's log-probs
        ("first rollout", True, 1, False, 8 + 1),  # all are measured, and one has kept tokens
        ("first rollout", True, 1, True, 8 + 2),  # the backward pass computes the layers again
        ("first rollout", True, 100_000, False, 1),  # the gradient is that of the pass that measured
    ],
)
def test_forward_passes_of_a_step(
    tiny_pair: Pair, tiny_config: RunConfig, score: str, checked: bool, budget: int, checkpointing: bool, passes: int
) -> None:
    rollouts = sample_rollouts(tiny_pair)
    if not checked:
        rollouts = [replace(rollout, sampler_logprobs=[]) for rollout in rollouts]
    changes: dict[str, Any] = {"micro_batch_tokens": budget, "activation_checkpointing": checkpointing}
    rule = "full" if score == "full" else "entropy"
    learner = make_learner(tiny_pair, tiny_config.learner, rule, 1.0, diagnostics_every=0, **changes)
    if score == "first rollout":
        learner.selector = FirstRollout(**{f.name: getattr(learner.selector, f.name) for f in fields(Selector)})
    calls: list[None] = []
    layer = tiny_pair.student.module.base_model.layers[0].mlp  # pyright: ignore[reportAttributeAccessIssue]
    layer.register_forward_pre_hook(lambda *_: calls.append(None))
    train_step(learner, rollouts)
    assert len(calls) == passes


def test_scores_and_loss_are_what_allocations_are_counted_of(tiny_pair: Pair, tiny_config: RunConfig) -> None:
    learner = make_learner(tiny_pair, tiny_config.learner)
    learner.meter.count_allocations = True
    train_step(learner, sample_rollouts(tiny_pair))
    counted = {name: value for name, value in learner.meter.memory().items() if name.endswith("_extra_mib")}
    assert counted.keys() == {"memory/score_extra_mib", "memory/loss_extra_mib"} and min(counted.values()) > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"divergence": "skew_reverse_kl"},
        {"estimator": "topk"},
        {"estimator": "topk", "divergence": "forward_kl"},
        {"estimator": "sampled_k1"},
    ],
    ids=lambda changes: "-".join(changes.values()),
)
def test_both_backends_give_the_same_gradient_for_every_objective(
    tiny_pair: Pair, tiny_config: RunConfig, changes: dict[str, str]
) -> None:
    rollouts = sample_rollouts(tiny_pair)
    settings: dict[str, Any] = {"grad_clip": 1e9, "lr": 1e-30, **changes}
    settings["topk"] = tiny_config.learner.topk.model_copy(update={"k": 8})
    fused, fused_report = gradients_of_step(
        make_learner(in_float64(tiny_pair), tiny_config.learner, **settings), rollouts
    )
    settings |= {"loss_backend": "materialized", "micro_batch_tokens": 300}
    materialized, report = gradients_of_step(
        make_learner(in_float64(tiny_pair), tiny_config.learner, **settings), rollouts
    )
    assert fused_report.metrics["train/loss"] == pytest.approx(report.metrics["train/loss"], rel=1e-9)
    assert_equal_gradients(materialized, fused)
