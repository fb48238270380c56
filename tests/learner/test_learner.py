"""The update: any micro-batching gives the same gradient, only kept tokens give any, and it follows plain autograd."""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from tip_exp.config.schema import LearnerConfig, RunConfig
from tip_exp.learner.learner import Learner, StepReport
from tip_exp.learner.schedule import learning_rate
from tip_exp.models.load import make_head
from tip_exp.models.pair import Model, Pair
from tip_exp.records.meter import Meter
from tip_exp.rollout.hf import HfSampler
from tip_exp.selector.selector import Quadrants, Selector, Tokens, budgets, keep_top
from tip_exp.types import Rollout, Sampling

QUESTIONS = [
    f"{who} has {n} pens. He finds 2. He gives {n % 5 + 2}. How many pens?"
    for n, who in enumerate(["Tom", "Amy", "Ben", "Eva"], 8)
]


def doubled(pair: Pair) -> Pair:
    """The pair in float64, so that sums in another order agree to many digits."""
    teacher, student = copy.deepcopy(pair.teacher.module).double(), copy.deepcopy(pair.student.module).double()
    models = [Model(module, make_head(module, 406)) for module in (teacher, student)]
    return Pair(pair.tokenizer, models[0], models[1], pair.stop_ids, pair.pad_id, pair.chat)


def sampled(pair: Pair) -> list[Rollout]:
    sampler = HfSampler(pair.student.module, stop_ids=pair.stop_ids, pad_id=pair.pad_id, batch_size=8)
    return sampler.generate([pair.prompt_ids(q) for q in QUESTIONS], Sampling(2, 1.0, 1.0, 0, 72), seed=0)


def make(
    pair: Pair,
    settings: LearnerConfig,
    score: str = "soft_or",
    retention: float = 0.5,
    weight_by_score: bool = False,
    **changes: Any,
) -> Learner:
    rule = Selector(
        score=score,
        normalizer="none" if score in ("full", "random") else "minmax",
        normalize_over="batch",
        clip={"entropy": 0.98} if score == "soft_or" else {},
        order="positive" if score == "full" else "top",
        rounding="floor",
        scope="rollout",
        retention=retention,
        quadrants=Quadrants(0.3, 0.3),
        weight_by_score=weight_by_score,
    )
    return Learner(pair, rule, settings.model_copy(update=changes), seed=0, meter=Meter(torch.device("cpu")))


def gradients(learner: Learner, rollouts: list[Rollout]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients of one step's mean per kept token; a huge clip and hardly any lr leave them and the weights alone."""
    metrics = learner.step(rollouts, step=1).metrics
    named = learner.pair.student.module.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}, metrics


def by_autograd(pair: Pair, rollouts: list[Rollout], report: StepReport) -> tuple[dict[str, Tensor], float]:
    """Naively: each rollout alone, whole logits, reverse KL of kept tokens, averaged with the selection's weights."""
    pair.student.module.zero_grad()
    total, mass = torch.zeros((), dtype=torch.float64), 0.0
    for i, rollout in enumerate(rollouts):
        ids = torch.tensor([rollout.token_ids])
        places = [t - 1 for t, mine in enumerate(rollout.response_mask) if mine]
        z = pair.student.module(ids).logits[0, places].log_softmax(-1)
        with torch.no_grad():
            t = pair.teacher.module(ids).logits[0, places].log_softmax(-1)
        own = report.tokens.rollout == i
        order = report.tokens.position[own].argsort()
        weight = report.selection.kept[own][order].double()
        if report.selection.weights is not None:
            weight = weight * report.selection.weights[own][order]
        total = total + ((z.exp() * (z - t)).sum(-1) * weight).sum()
        mass += float(weight.sum())
    (total / mass).backward()
    named = pair.student.module.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}, float(total.detach()) / mass


@pytest.mark.parametrize("backend", ["fused", "materialized"])
@pytest.mark.parametrize("score", ["soft_or", "full", "random"])
def test_any_micro_batching_gives_the_same_gradient(
    tiny_pair: Pair, tiny_config: RunConfig, backend: str, score: str
) -> None:
    rollouts = sampled(tiny_pair)
    found = []
    for budget in (100_000, 400, 130):  # one micro-batch of 8, several, one rollout each
        pair = doubled(tiny_pair)
        retention = 1.0 if score == "full" else 0.5
        learner = make(
            pair,
            tiny_config.learner,
            score,
            retention,
            micro_batch_tokens=budget,
            grad_clip=1e9,
            lr=1e-30,
            loss_backend=backend,
        )
        found.append(gradients(learner, rollouts))
    reference, reference_metrics = found[0]
    assert reference_metrics["train/grad_norm"] > 0.01
    for other, metrics in found[1:]:
        assert metrics["select/kept_tokens"] == reference_metrics["select/kept_tokens"]
        assert metrics["train/loss"] == pytest.approx(reference_metrics["train/loss"], rel=1e-9)
        for name, gradient in reference.items():
            difference = (other[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
            assert float(difference) < 1e-5, name


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("score", ["soft_or", "first"])
def test_packed_cut_and_recomputed_the_gradient_is_autograds(
    tiny_pair: Pair, tiny_config: RunConfig, packing: bool, recomputed: bool, score: str
) -> None:
    """In one micro-batch and in several; `first` keeps the first tenth of each response, so most can be cut."""
    pair, rollouts = doubled(tiny_pair), sampled(tiny_pair)
    for budget in (100_000, 300):
        settings = {"micro_batch_tokens": budget, "packing": packing, "activation_checkpointing": recomputed}
        learner = make(pair, tiny_config.learner, grad_clip=1e9, lr=1e-30, **settings)
        if score == "first":
            learner.selector = FirstTenth(**{f.name: getattr(learner.selector, f.name) for f in fields(Selector)})
        report = learner.step(rollouts, step=1)
        got = {name: p.grad.clone() for name, p in pair.student.module.named_parameters() if p.grad is not None}
        expected, loss = by_autograd(pair, rollouts, report)
        assert report.metrics["train/loss"] == pytest.approx(loss, rel=1e-8)
        for name, gradient in expected.items():
            assert float((got[name] - gradient).norm() / gradient.norm()) < 1e-5, name
        cut = report.metrics["train/backbone_cut_frac"]
        assert cut > 0.4 if score == "first" else (cut == 0 if budget == 100_000 else 0 < cut < 0.4)


class FirstTenth(Selector):
    def _choose(self, score: Tensor, tokens: Tokens, generator: torch.Generator) -> Tensor:
        groups = tokens.groups("rollout")
        return keep_top(-tokens.position.double(), groups, budgets(groups, 0.1, "ceil"))


@pytest.mark.parametrize("weight_by_score", [False, True])
def test_gradient_is_that_of_the_mean_over_kept_tokens_by_plain_autograd(
    tiny_pair: Pair, tiny_config: RunConfig, weight_by_score: bool
) -> None:
    pair, rollouts = doubled(tiny_pair), sampled(tiny_pair)
    learner = make(pair, tiny_config.learner, weight_by_score=weight_by_score, grad_clip=1e9, lr=1e-30)
    report = learner.step(rollouts, step=1)
    got = {name: p.grad.clone() for name, p in pair.student.module.named_parameters() if p.grad is not None}
    expected, loss = by_autograd(pair, rollouts, report)
    assert report.metrics["train/loss"] == pytest.approx(loss, rel=1e-8)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        # Qwen3's norms and rotary embedding compute in float32 whatever the weights are: 1e-6, not 1e-12
        assert float((got[name] - gradient).norm() / gradient.norm()) < 1e-5, name


def test_full_is_retention_one(tiny_pair: Pair, tiny_config: RunConfig) -> None:
    rollouts = sampled(tiny_pair)
    settings: dict[str, Any] = {"grad_clip": 1e9, "lr": 1e-30}
    full, _ = gradients(make(doubled(tiny_pair), tiny_config.learner, "full", 1.0, **settings), rollouts)
    everything, metrics = gradients(make(doubled(tiny_pair), tiny_config.learner, "soft_or", 1.0, **settings), rollouts)
    assert metrics["select/kept_frac"] == 1.0
    for name, gradient in full.items():
        torch.testing.assert_close(everything[name], gradient, rtol=1e-9, atol=1e-12)


def test_statistics_are_measured_only_when_somebody_reads_them(tiny_pair: Pair, tiny_config: RunConfig) -> None:
    rollouts = sampled(tiny_pair)
    for score, retention, expected in (
        ("full", 1.0, set()),
        ("entropy", 0.5, {"entropy"}),
        ("soft_or", 0.5, {"entropy", "reverse_kl"}),
    ):
        report = make(tiny_pair, tiny_config.learner, score, retention, diagnostics_every=0).step(rollouts, step=1)
        assert set(report.statistics) == expected
    assert (
        len(make(tiny_pair, tiny_config.learner, "full", 1.0, diagnostics_every=2).step(rollouts, step=2).statistics)
        == 8
    )


def test_nothing_kept_leaves_the_weights_alone(tiny_pair: Pair, tiny_config: RunConfig) -> None:
    before = copy.deepcopy(tiny_pair.student.module.state_dict())
    learner = make(tiny_pair, tiny_config.learner, retention=0.001)  # floor(0.001 x ~45) = 0 of every rollout
    metrics = learner.step(sampled(tiny_pair), step=1).metrics
    assert metrics["train/skipped"] == 1.0 and metrics["train/loss"] == 0.0 and metrics["select/kept_frac"] == 0.0
    for name, value in tiny_pair.student.module.state_dict().items():
        assert value.equal(before[name])


def test_a_step_lowers_the_divergence_on_its_own_rollouts(tiny_pair: Pair, tiny_config: RunConfig) -> None:
    rollouts = sampled(tiny_pair)
    learner = make(tiny_pair, tiny_config.learner, "full", 1.0, warmup_steps=0, lr=3e-4)
    losses = [learner.step(rollouts, step).metrics["train/loss"] for step in range(1, 9)]
    assert losses[-1] < 0.8 * losses[0], losses


def test_a_nan_gradient_stops_the_run_and_keeps_the_weights(tiny_pair: Pair, tiny_config: RunConfig) -> None:
    before = copy.deepcopy(tiny_pair.student.module.state_dict())
    with torch.no_grad():
        next(tiny_pair.teacher.module.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="gradient norm of step 1 is nan"):
        make(tiny_pair, tiny_config.learner, "full", 1.0, diagnostics_every=0).step(sampled(tiny_pair), step=1)
    for name, value in tiny_pair.student.module.state_dict().items():
        assert value.equal(before[name])


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("constant", 1, 0.5),  # warm-up of 2: half of 1.0 at step 1
        ("constant", 2, 1.0),
        ("constant", 10, 1.0),
        ("linear", 6, 0.55),  # half way from 1.0 down to 0.1
        ("linear", 10, 0.1),
        ("cosine", 6, 0.55),
        ("cosine", 10, 0.1),
    ],
)
def test_learning_rate(tiny_config: RunConfig, schedule: str, step: int, expected: float) -> None:
    settings = tiny_config.learner.model_copy(
        update={"lr": 1.0, "schedule": schedule, "num_steps": 10, "warmup_steps": 2, "final_lr_frac": 0.1}
    )
    assert learning_rate(step, settings) == pytest.approx(expected)


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
def test_every_objective_gives_both_backends_the_same_gradient(
    tiny_pair: Pair, tiny_config: RunConfig, changes: dict[str, str]
) -> None:
    rollouts = sampled(tiny_pair)
    settings: dict[str, Any] = {"grad_clip": 1e9, "lr": 1e-30, **changes}
    settings["topk"] = tiny_config.learner.topk.model_copy(update={"k": 8})
    one, metrics = gradients(make(doubled(tiny_pair), tiny_config.learner, **settings), rollouts)
    settings |= {"loss_backend": "materialized", "micro_batch_tokens": 300}
    other, other_metrics = gradients(make(doubled(tiny_pair), tiny_config.learner, **settings), rollouts)
    assert metrics["train/loss"] == pytest.approx(other_metrics["train/loss"], rel=1e-9)
    for name, gradient in one.items():
        assert float((other[name] - gradient).norm() / gradient.norm()) < 1e-5, name
