"""Cosine and signal to noise of a step's masked gradient, against a gradient per prompt by autograd on whole logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.helpers import in_float64, make_learner, sample_rollouts, train_step
from tests.reference import divergence
from torch import Tensor

from tip_exp.config.schema import RunConfig
from tip_exp.learner.distributed import start
from tip_exp.learner.gradient_signal import GradientSums, cosine
from tip_exp.learner.learner import StepReport
from tip_exp.learner.sharding import make_sharding
from tip_exp.losses import BACKENDS
from tip_exp.losses.head import Head
from tip_exp.models.load import load_pair
from tip_exp.models.pair import Pair
from tip_exp.types import Rollout

CPU, PER_PROMPT = torch.device("cpu"), 2
NAMES = ("select/gradient_cosine", "select/gradient_snr", "select/gradient_snr_full")
SHARE = "select/influence_share"


def flat_gradients(
    pair: Pair, rollouts: list[Rollout], report: StepReport, average: str, weight: str, *, everything: bool
) -> Tensor:
    """(prompts, parameters): the prompts' parts of the step's gradient, of the kept tokens or of all, unweighted."""
    parameters = list(pair.student.module.parameters())
    sums, masses = [], []
    for i, rollout in enumerate(rollouts):
        ids = torch.tensor([rollout.token_ids])
        positions = [t - 1 for t, is_response in enumerate(rollout.response_mask) if is_response]
        p = pair.student.module(ids).logits[0, positions].softmax(-1)
        q = pair.teacher.module(ids).logits[0, positions].softmax(-1).detach()
        rows = report.tokens.rollout == i
        order = report.tokens.position[rows].argsort()
        weights = torch.ones(len(positions), dtype=torch.float64)
        if not everything:
            weights = report.selection.kept_mask[rows][order].double()
            if weight == "score":
                weights = weights * report.selection.score[rows][order].double()
        if average == "rollout" and weights.sum() > 0:
            weights = weights / weights.sum()
        grads = torch.autograd.grad((divergence("reverse_kl", p, q) * weights).sum(), parameters)
        sums.append(torch.cat([grad.flatten() for grad in grads]))
        masses.append(float(weights.sum()))
    return torch.stack(sums).view(-1, PER_PROMPT, sums[0].numel()).sum(1) / sum(masses)


def naive_snr(parts: Tensor) -> float:
    """|E g|^2 / Var g of g, the sum of P independent parts."""
    count = len(parts)
    variance = float((parts - parts.mean(0)).square().sum()) / (count - 1) * count
    return (float(parts.sum(0).square().sum()) - variance) / variance


def test_the_runs_backend_computes_the_gradients(
    tiny_pair: Pair, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKENDS, "fused", None)
    changes = {"gradient_every": 1, "samples_per_prompt": PER_PROMPT, "loss_backend": "materialized"}
    learner = make_learner(tiny_pair, tiny_config.learner, "soft_or", 0.1, "none", **changes)
    assert set(NAMES) <= train_step(learner, sample_rollouts(tiny_pair)).metrics.keys()


@pytest.mark.parametrize(
    ("average", "weight", "budget", "packing"),
    [("rollout", "none", 100_000, True), ("token", "score", 130, False), ("token", "none", 300, True)],
)
def test_against_gradients_by_autograd(
    tiny_pair: Pair, tiny_config: RunConfig, average: str, weight: Any, budget: int, packing: bool
) -> None:
    pair, rollouts = in_float64(tiny_pair), sample_rollouts(tiny_pair)
    changes = {"gradient_every": 1, "samples_per_prompt": PER_PROMPT, "average": average, "lr": 1e-30}
    changes |= {"micro_batch_tokens": budget, "packing": packing}
    learner = make_learner(pair, tiny_config.learner, "soft_or", 0.1, weight, **changes)
    report = train_step(learner, rollouts)
    kept, full = (
        flat_gradients(pair, rollouts, report, average, weight, everything=everything) for everything in (False, True)
    )
    expected = float(torch.cosine_similarity(kept.sum(0), full.sum(0), dim=0)), naive_snr(kept), naive_snr(full)
    assert [report.metrics[name] for name in NAMES] == pytest.approx(expected, rel=1e-4)
    assert expected[0] < 0.9 and abs(expected[1] - expected[2]) > 0.05 * abs(expected[2])  # a mask that loses signal


def test_the_training_stays_as_it_is(tiny_config: RunConfig) -> None:
    reports, weights = [], []
    for every in (0, 2):
        pair = load_pair(tiny_config.pair, CPU)
        rollouts = sample_rollouts(pair)
        learner = make_learner(pair, tiny_config.learner, gradient_every=every)
        reports.append([train_step(learner, rollouts, step).metrics for step in (1, 2, 3)])
        weights.append(pair.student.module.state_dict())
    assert all(value.equal(weights[1][name]) for name, value in weights[0].items())
    for step, (without, measured) in enumerate(zip(*reports, strict=True), 1):
        assert measured.keys() - without.keys() == ({*NAMES, SHARE} if step == 2 else set())
        assert {name: measured[name] for name in without} == without


def test_all_tokens_have_the_gradient_of_all_tokens(tiny_pair: Pair, tiny_config: RunConfig) -> None:
    rollouts = sample_rollouts(tiny_pair)
    metrics = train_step(make_learner(tiny_pair, tiny_config.learner, "full", 1.0, gradient_every=1), rollouts).metrics
    assert metrics[NAMES[0]] == pytest.approx(1.0) and metrics[NAMES[1]] == metrics[NAMES[2]]
    assert metrics[SHARE] == pytest.approx(1.0)


def test_without_kept_tokens_nothing_is_measured(tiny_pair: Pair, tiny_config: RunConfig) -> None:
    learner = make_learner(tiny_pair, tiny_config.learner, retention=0.001, gradient_every=1)
    assert not {*NAMES, SHARE} & train_step(learner, sample_rollouts(tiny_pair)).metrics.keys()


def test_one_rollout_has_a_cosine_and_no_variance(tiny_pair: Pair, tiny_config: RunConfig) -> None:
    learner = make_learner(tiny_pair, tiny_config.learner, gradient_every=1, samples_per_prompt=1)
    metrics = train_step(learner, sample_rollouts(tiny_pair)[:1]).metrics
    assert 0 < metrics[NAMES[0]] < 1 and math.isnan(metrics[NAMES[1]]) and math.isnan(metrics[NAMES[2]])


def test_influence_is_measured_in_tiles_of_tile_mib(
    tiny_pair: Pair, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight rows of 406 logits in float32 for each token: 80 tokens in a MiB."""
    rows, logits = [], Head.logits

    def recorded(head: Head, hidden: Tensor) -> Tensor:
        rows.append(len(hidden))
        return logits(head, hidden)

    monkeypatch.setattr(Head, "logits", recorded)
    train_step(make_learner(tiny_pair, tiny_config.learner, gradient_every=1, tile_mib=1), sample_rollouts(tiny_pair))
    assert len(rows) >= 6 and set(rows[:-2]) == {80}


def test_sums_scale_their_observations() -> None:
    """Observations 2 x 1 and 1 x 4 of w: mean 3, variance 2, |E g|^2 = 9 - 2 / 2 = 8; v is 0 in the first."""
    sums, first = GradientSums(), {"w": torch.tensor([1.0])}
    sums.add(first, 2.0)
    assert math.isnan(sums.signal_to_noise())
    sums.add({"w": torch.tensor([4.0])})
    assert sums.signal_to_noise() == pytest.approx(8 / 2) and first["w"].tolist() == [1.0]
    assert cosine(sums.total, {"w": torch.tensor([-1.0])}) == pytest.approx(-1.0)
    assert cosine(sums.total, {}) == 0.0


def test_sums_of_16_bit_gradients_are_float32() -> None:
    sums = GradientSums()
    for _ in range(257):  # 256 + 1 = 256 in bfloat16
        sums.add({"w": torch.ones(1, dtype=torch.bfloat16)})
    assert sums.total["w"].tolist() == [257.0]


def test_equal_observations_have_no_signal_to_noise() -> None:
    """Without variance; of 0.5 and 1.0 the mean is 0.75, the variance 0.125, |E g|^2 = 0.5625 - 0.125 / 2 = 0.5."""
    for second, expected in ((0.5, math.nan), (1.0, 0.5 / 0.125)):
        sums = GradientSums()
        sums.add({"w": torch.tensor([0.5])})
        sums.add({"w": torch.tensor([second])})
        assert sums.signal_to_noise() == pytest.approx(expected, nan_ok=True)


def test_weights_that_compute_in_bfloat16(compose_run: Callable[..., RunConfig], tiny_pair: Pair) -> None:
    """Gradients are those of weights in bfloat16; influence needs weights that are not converted."""
    metrics, rollouts = {}, sample_rollouts(tiny_pair)
    for dtype in ("float32", "bfloat16"):
        config = compose_run(f"pair.student.dtype={dtype}", "learner.compute_dtype=bfloat16")
        with start(CPU, alone=True) as ranks:
            pair = load_pair(config.pair, CPU, shard=make_sharding(config, ranks, CPU))
            assert (pair.student.shards is None) == (dtype == "bfloat16")
            learner = make_learner(pair, config.learner, gradient_every=1, samples_per_prompt=PER_PROMPT)
            metrics[dtype] = train_step(learner, rollouts).metrics
    names = [*NAMES, "train/grad_norm"]
    of_float32, of_bfloat16 = ([metrics[dtype][name] for name in names] for dtype in ("float32", "bfloat16"))
    assert of_float32 == pytest.approx(of_bfloat16, rel=0.05)
    assert SHARE in metrics["bfloat16"] and SHARE not in metrics["float32"]


@pytest.mark.parametrize("average", ["rollout", "token"])
def test_the_share_of_influence_is_that_of_a_gradient_per_token(
    tiny_pair: Pair, tiny_config: RunConfig, average: Any
) -> None:
    """At step 1 Adam's v is the square of the step's gradient, at step 2 the optimizer's; lr leaves the weights."""
    pair, rollouts = in_float64(tiny_pair), sample_rollouts(tiny_pair)[:4]
    changes = {"gradient_every": 1, "samples_per_prompt": PER_PROMPT, "average": average, "lr": 1e-30, "eps": 1e-3}
    learner = make_learner(pair, tiny_config.learner, "soft_or", 0.2, **changes | {"micro_batch_tokens": 200})
    of_tokens = token_gradients(pair, rollouts)
    scales = [1 / len(gradients) if average == "rollout" else 1.0 for gradients in of_tokens]
    mass = sum(scale * len(gradients) for scale, gradients in zip(scales, of_tokens, strict=True))
    mean = sum(scale * gradients.sum(0) for scale, gradients in zip(scales, of_tokens, strict=True)) / mass
    for step in (1, 2):
        states = [learner.optimizer.state.get(p) for p in pair.student.module.parameters()]
        v = mean.square()
        if step == 2:
            v = torch.cat([state["exp_avg_sq"].flatten() for state in states if state]) / (1 - learner.config.betas[1])
        report = train_step(learner, rollouts, step)
        influence = [gradients @ (mean / (v.sqrt() + 1e-3)) for gradients in of_tokens]
        pairs = zip(report.tokens.rollout.tolist(), report.tokens.position.tolist(), strict=True)
        positive = torch.stack([influence[i][position] for i, position in pairs]).clamp(min=0)
        expected = float(positive[report.selection.kept_mask].sum() / positive.sum())
        assert report.metrics[SHARE] == pytest.approx(expected, rel=1e-5)
        assert 0.05 < expected < 0.999  # a mask that loses influence


def token_gradients(pair: Pair, rollouts: list[Rollout]) -> list[Tensor]:
    """Of each rollout (tokens, parameters): a backward pass for each token's divergence on whole logits."""
    parameters, gradients = list(pair.student.module.parameters()), []
    for rollout in rollouts:
        ids = torch.tensor([rollout.token_ids])
        positions = [t - 1 for t, is_response in enumerate(rollout.response_mask) if is_response]
        p = pair.student.module(ids).logits[0, positions].softmax(-1)
        q = pair.teacher.module(ids).logits[0, positions].softmax(-1).detach()
        by_token = [torch.autograd.grad(kl, parameters, retain_graph=True) for kl in divergence("reverse_kl", p, q)]
        gradients.append(torch.stack([torch.cat([grad.flatten() for grad in grads]) for grads in by_token]))
    return gradients
