"""Rules that are scored beside the one that trains: their numbers, and that the training stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.helpers import sample_rollouts, train_step
from tests.learner.test_diagnostics import SOFT_OR, one_rollout

from tip_exp.config.schema import RunConfig
from tip_exp.learner import learner as learner_module
from tip_exp.learner.diagnostics import shadow_metrics
from tip_exp.learner.learner import Learner, StepReport
from tip_exp.learner.selectors import draws, make_selector, make_shadows
from tip_exp.models.load import load_pair
from tip_exp.records.meter import Meter
from tip_exp.selector.scores import DIAGNOSTICS

Compose = Callable[..., RunConfig]
CPU = torch.device("cpu")


def test_numbers_of_a_shadow_by_hand() -> None:
    """Four tokens. Trained on: 0 and 1. The shadow keeps the two of the highest entropy, 1 and 3."""
    statistics = {
        "entropy": torch.tensor([0.0, 1.0, 0.1, 2.0]),
        "reverse_kl": torch.tensor([4.0, 3.0, 1.0, 0.0]),
        "grad_norm": torch.tensor([0.5, 0.2, 0.2, 0.1]),
    }
    shadow = replace(SOFT_OR, score="entropy", normalizer="none")
    kept_mask = torch.tensor([True, True, False, False])
    metrics = shadow_metrics({"e@0.5": shadow}, statistics, one_rollout(4), kept_mask, lambda _: torch.Generator())
    assert metrics == pytest.approx(
        {
            "shadow/e@0.5/overlap": 1 / 3,  # token 1 of 0, 1 and 3
            "shadow/e@0.5/kept_frac": 0.5,
            "shadow/e@0.5/gradient_mass": 0.3,
            "shadow/e@0.5/kl_mass": 3 / 8,
            "shadow/e@0.5/q1_kept_frac": 1.0,  # token 1
            "shadow/e@0.5/q2_kept_frac": 1.0,  # token 3
            "shadow/e@0.5/q3_kept_frac": 0.0,  # tokens 0 and 2; no token is in Q4
        }
    )


def test_a_rule_whose_statistics_are_not_finite_is_left_out() -> None:
    statistics = {"entropy": torch.tensor([1.0, 0.0]), "reverse_kl": torch.tensor([torch.nan, 1.0])}
    rules = {"a": SOFT_OR, "b": replace(SOFT_OR, score="entropy")}
    metrics = shadow_metrics(rules, statistics, one_rollout(2), torch.ones(2).bool(), lambda _: torch.Generator())
    assert {name.split("/")[1] for name in metrics} == {"b"} and metrics["shadow/b/overlap"] == 0.5


SHADOWS = "selector.shadows=[random,random@0.2,entropy_sample,ier,q3@0.3,full,grad_norm]"


def trained(config: RunConfig, **changes: Any) -> tuple[list[StepReport], dict[str, torch.Tensor]]:
    """Two steps from the embedded pair: their reports, and the weights after them."""
    pair, settings = load_pair(config.pair, CPU), config.learner.model_copy(update=changes)
    shadows = make_shadows(config)
    learner = Learner(pair, make_selector(config), settings, seed=0, meter=Meter(CPU), shadows=shadows)
    rollouts = sample_rollouts(pair)
    return [train_step(learner, rollouts, step) for step in (1, 2)], pair.student.module.state_dict()


@pytest.mark.parametrize("selector", ["random", "soft_or"])
def test_training_is_bit_for_bit_what_it_is_without_shadows(compose_run: Compose, selector: str) -> None:
    reports, weights = trained(compose_run(f"selector={selector}"), micro_batch_tokens=300)
    with_shadows, same_weights = trained(compose_run(f"selector={selector}", SHADOWS), micro_batch_tokens=300)
    assert all(value.equal(same_weights[name]) for name, value in weights.items())
    for report, other in zip(reports, with_shadows, strict=True):
        assert report.selection.kept_mask.equal(other.selection.kept_mask)
        added = other.metrics.keys() - report.metrics.keys()
        assert {name for name in added if name.startswith("shadow/")} == added - {"score/ier_mean"}
        assert {name: other.metrics[name] for name in report.metrics} == report.metrics


def test_each_shadow_has_its_retention_and_draws_of_its_own(compose_run: Compose) -> None:
    """The training rule keeps a random half of each response, floor(0.5 x length)."""
    (first, second), _ = trained(compose_run("selector=random", SHADOWS))
    assert len([name for name in first.metrics if name.endswith("/overlap")]) == 7
    kept = {name: first.metrics[f"shadow/{name}/kept_frac"] for name in ("random", "random@0.2", "q3@0.3", "ier")}
    assert kept["random"] == first.metrics["select/kept_frac"]
    assert kept["random@0.2"] == pytest.approx(0.2, abs=0.02) and kept["q3@0.3"] == pytest.approx(0.3, abs=0.02)
    assert kept["ier"] == pytest.approx(0.1, abs=0.01)  # the retention of its option
    assert first.metrics["shadow/full/kept_frac"] == first.metrics["shadow/full/gradient_mass"] == 1.0
    # A Jaccard index of 1/3 by chance; 1 if both had the same draws.
    assert 0.2 < first.metrics["shadow/random/overlap"] < 0.5
    assert first.metrics["shadow/random/overlap"] != second.metrics["shadow/random/overlap"]
    numbers = [torch.rand(4, generator=draws(3, 5, name)).tolist() for name in ("", "random", "random@0.2")]
    assert numbers[0] != numbers[1] != numbers[2] != numbers[0]
    assert numbers[1] == torch.rand(4, generator=draws(3, 5, "random")).tolist()


def test_shadows_are_scored_at_the_steps_with_diagnostics_in_one_pass(
    compose_run: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: list[frozenset[str]] = []
    token_stats = learner_module.token_stats

    def recorded(*args: Any, **options: Any) -> Any:
        wanted.append(options["wanted"])
        return token_stats(*args, **options)

    monkeypatch.setattr(learner_module, "token_stats", recorded)
    config = compose_run("selector=entropy", "selector.shadows=[ier,propose_verify,soft_or]")
    (first, second), _ = trained(config, diagnostics_every=2)
    assert wanted == [{"entropy", "student_logprob"}, DIAGNOSTICS | {"ier", "teacher_rank"}]
    assert not any(name.startswith("shadow/") for name in first.metrics)
    assert "shadow/ier/overlap" in second.metrics


def test_the_settings_of_shadows(compose_run: Compose) -> None:
    """Only the retention comes from the selector; an option's own and one after @ go before it."""
    shadows = "selector.shadows=[soft_or,q3,soft_or_clipped@0.05,full]"
    config = compose_run("selector=entropy", "selector.retention=0.3", "selector.scope=batch", shadows)
    rules = make_shadows(config)
    assert {name: rule.retention for name, rule in rules.items()} == {
        "soft_or": 0.3, "q3": 0.1, "soft_or_clipped@0.05": 0.05, "full": 1.0,
    }  # fmt: skip
    assert rules["soft_or"] == replace(make_selector(compose_run("selector=soft_or")), retention=0.3)
    assert rules["soft_or_clipped@0.05"].clip == {"entropy": 0.98, "reverse_kl": 0.95}
