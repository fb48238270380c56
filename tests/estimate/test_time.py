"""Forecasts of time: measured from the same shape, scaled from the same pair, else a lower bound."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests import synthetic_runs

from tip_exp.config.schema import RunConfig
from tip_exp.estimate.memory import memory_gib
from tip_exp.estimate.time import Forecaster, flops

Compose = Callable[..., RunConfig]


@pytest.fixture
def forecast(tmp_path: Path, compose_run: Compose) -> Forecaster:
    """From one finished run of the default config, which took 41.6 s and 0.603 GiB."""
    config = compose_run()
    synthetic_runs.write_config(config, tmp_path / "run")
    synthetic_runs.finish(config, tmp_path / "run", 0.5)
    return Forecaster(tmp_path)


def test_another_seed_selector_or_name_takes_what_was_measured(forecast: Forecaster, compose_run: Compose) -> None:
    measured = forecast(compose_run("seed=5", "selector=full", "name=other"))
    assert (measured.seconds, measured.gib, measured.basis) == (41.6, 0.603, "measured")


def test_another_length_is_scaled_by_its_operations(forecast: Forecaster, compose_run: Compose) -> None:
    longer = compose_run("learner.num_steps=80")
    scaled = forecast(longer)
    assert scaled.basis == "scaled" and scaled.gib == pytest.approx(sum(memory_gib(longer).values()))
    assert 41.6 < scaled.seconds <= 2 * 41.6  # twice the steps, but evaluations at step 0 take their part


def test_without_a_finished_run_of_the_pair_there_is_a_lower_bound(forecast: Forecaster, compose_run: Compose) -> None:
    bound = forecast(compose_run("experiment=tip_qwen3"))
    assert bound.basis == "lower bound on one H200" and bound.seconds > 0


def test_a_run_that_no_gpu_holds_has_no_time(forecast: Forecaster, compose_run: Compose) -> None:
    """Llama 70 B in bfloat16 is 131 GiB, weights, gradients and Adam's moments of 8 B in float32 are 120 GiB."""
    llama = forecast(compose_run("experiment=tip_llama"))
    assert (llama.seconds, llama.basis) == (None, "does not fit one GPU") and llama.gib > 251
    offloaded = forecast(compose_run("experiment=tip_llama", "pair.teacher.placement=offload"))
    assert offloaded.seconds is None  # the student alone takes 120 GiB, and the teacher comes back for its forward pass
    # 148 GiB, 54 of which are hidden states in host memory
    deepplanning = ["experiment=tip_deepplanning", "pair=qwen3_32b_to_1p7b", "data.root=."]
    assert forecast(compose_run(*deepplanning)).seconds is not None


def test_operations_of_the_papers_run(compose_run: Compose) -> None:
    """Training alone: 2 P per token forward of the 8 B teacher, 8 P of sampling and training the 4 B student."""
    config = compose_run("experiment=tip_qwen3", "eval.every=0", "eval.max_tokens=1")
    learner, data = config.learner, config.data
    tokens = learner.num_steps * learner.prompts_per_step * learner.samples_per_prompt
    tokens *= data.max_prompt_tokens + data.max_response_tokens / 2
    assert flops(config.model_dump()) == pytest.approx(tokens * (2 * 8.19e9 + 8 * 4.02e9), rel=0.02)
