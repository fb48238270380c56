"""Time of a step and a run, and forecasts: measured from the same shape, scaled from the same pair, else computed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from tests import synthetic_runs

from tip_exp.config.schema import RunConfig
from tip_exp.estimate.cards import CARDS, RANKS
from tip_exp.estimate.forecast import NO_TIME, TOO_LARGE, Forecaster
from tip_exp.estimate.memory import RankMemory
from tip_exp.estimate.tables import TIMED_AS_VLLM, format_hours, time_tables
from tip_exp.estimate.time import flops, num_evaluations, run_time, step_seconds
from tip_exp.launch.plan import plan
from tip_exp.launch.sweep import SweepRun
from tip_exp.utils.paths import conf_dir

Compose = Callable[..., RunConfig]
H100 = CARDS[80]
SWEEPS = conf_dir().parent / "sweeps"


@pytest.fixture
def forecast(tmp_path: Path, compose_run: Compose) -> Forecaster:
    """From one finished run of the default config, which took 41.6 s and 0.603 GiB."""
    config = compose_run()
    synthetic_runs.write_config(config, tmp_path / "run")
    synthetic_runs.finish(config, tmp_path / "run", 0.5)
    return Forecaster(tmp_path, H100)


def test_another_seed_selector_or_name_takes_what_was_measured(forecast: Forecaster, compose_run: Compose) -> None:
    measured = forecast(compose_run("seed=5", "selector=full", "name=other"))
    assert (measured.seconds, measured.gib, measured.basis) == (41.6, 0.603, "measured")


def test_the_memory_of_a_gpu_is_taken_where_it_was_measured(tmp_path: Path, compose_run: Compose) -> None:
    config = compose_run()
    synthetic_runs.write_config(config, tmp_path / "run")
    synthetic_runs.finish(config, tmp_path / "run", 0.5)
    path = tmp_path / "run" / "result.json"
    path.write_text(path.read_text().replace('"memory/learner_peak_gib": 0.5', '"memory/device_used_peak_gib": 70.5'))
    assert Forecaster(tmp_path, H100)(config).gib == 70.5


def test_another_length_is_scaled_by_its_operations(forecast: Forecaster, compose_run: Compose) -> None:
    longer = compose_run("learner.num_steps=80")
    scaled = forecast(longer)
    assert scaled.basis == "scaled" and scaled.gib == pytest.approx(RankMemory(longer, None).peak()[1])
    assert 41.6 < scaled.seconds <= 2 * 41.6  # twice the steps, but evaluations at step 0 take their part


def test_without_a_finished_run_of_the_pair_time_is_computed_for_the_gpus_it_needs(
    forecast: Forecaster, compose_run: Compose
) -> None:
    config = compose_run("experiment=tip_qwen3")
    computed = forecast(config)
    assert (computed.basis, computed.cards) == ("computed for 2 x H100", 2)
    assert computed.seconds == run_time(config, H100, 2).run_s
    assert computed.gib == RankMemory(config, H100.gib, 2).peak()[1] < H100.gib


def test_what_has_no_time_says_why(forecast: Forecaster, compose_run: Compose) -> None:
    small = forecast(compose_run("experiment=self_word_sums"))
    assert (small.seconds, small.basis) == (None, NO_TIME)  # a CPU's speed is not known
    share = "rollout.vllm.gpu_memory_utilization=0.05"  # 4 GiB for weights of 7.5
    large = forecast(compose_run("experiment=tip_qwen3", share))
    assert (large.seconds, large.basis) == (None, TOO_LARGE)


def test_operations_of_the_papers_run(compose_run: Compose) -> None:
    """Training alone: 2 P per token forward of the 8 B teacher, 8 P of sampling and training the 4 B student."""
    config = compose_run("experiment=tip_qwen3", "eval.every=0", "eval.max_tokens=1")
    tokens = 1739 * 128 * (205 + 1966)  # a tenth of 2,048 prompt tokens and 24 % of 8,192
    assert flops(config.model_dump()) == pytest.approx(tokens * (2 * 8.19e9 + 8 * 4.02e9), rel=0.02)


@pytest.mark.parametrize(("mode", "parameters"), [("eval", 4.02e9), ("teacher", 8.19e9)])
def test_operations_of_an_evaluation_alone(compose_run: Compose, mode: str, parameters: float) -> None:
    """2 P per token of 16 answers to 560 problems, 24 % of 8,192 tokens each."""
    values = compose_run("experiment=tip_qwen3", f"mode={mode}").model_dump()
    assert flops(values) == pytest.approx(560 * 16 * 1966 * 2 * parameters, rel=0.01)


def test_both_models_read_what_an_evaluation_measures(compose_run: Compose) -> None:
    """eval.sequence_kl: prompts of 205 tokens and answers of 1,966, 16 to each of 560 problems; by no teacher alone."""
    tokens, parameters = 560 * 16 * (205 + 1966), 8.19e9 + 4.02e9
    for mode, expected in (("eval", tokens * 2 * parameters), ("teacher", 0.0)):
        with_kl, without = (
            compose_run("experiment=tip_qwen3", f"mode={mode}", f"eval.sequence_kl={value}") for value in (True, False)
        )
        assert flops(with_kl.model_dump()) - flops(without.model_dump()) == pytest.approx(expected, rel=0.01)
        seconds = [run_time(config, H100, 8).evaluation_s for config in (with_kl, without)]
        assert seconds[0] - seconds[1] == pytest.approx(expected / (8 * 0.4 * 989e12), rel=0.01)


def test_evaluations_are_counted_as_a_run_does_them(compose_run: Compose) -> None:
    """Before step 1 and after steps 20, 40 and 50."""
    assert [num_evaluations(50, every) for every in (20, 50, 0)] == [4, 2, 2] and num_evaluations(0, 20) == 1
    by_every = [flops(compose_run("learner.num_steps=50", f"eval.every={every}").model_dump()) for every in (20, 50, 0)]
    assert by_every[0] > by_every[1] == by_every[2]


def test_a_step_of_the_main_setting_by_hand(compose_run: Compose) -> None:
    """8 x H100: the longest response takes 8,192 x (8.04e9 / (0.8 x 3.35e12) + 1e-3) = 32.8 s of about 42."""
    step = step_seconds(compose_run("experiment=tip_qwen3"), H100, 8)
    assert step["longest response"] == pytest.approx(32.8, rel=0.01)
    tokens, rate = 128 * 2171 / 8, 0.4 * 989e12
    assert step["teacher"] == pytest.approx(2 * 8.19e9 * tokens / rate, rel=0.01)  # 1.4 s
    assert step["learner"] == pytest.approx(10 * 4.02e9 * tokens / rate, rel=0.01)  # 3.5 s
    # 16 responses of 1,966 tokens read a context of 2,171 x 147,456 bytes each
    assert step["KV cache"] == pytest.approx(16 * 1966 * 2171 * 147_456 / 2.68e12, rel=0.01)  # 3.8 s
    assert sum(step.values()) == pytest.approx(42, rel=0.02)


@pytest.mark.parametrize(
    ("override", "notes"), [("rollout=auto", 0), ("rollout.backend=hf", 1), ("rollout.staleness=1", 1)]
)
def test_what_the_times_do_not_count_is_said(compose_run: Compose, override: str, notes: int) -> None:
    assert time_tables(compose_run("experiment=tip_qwen3", override), H100)[:-2] == [TIMED_AS_VLLM] * notes


def test_the_model_is_near_what_others_measured(compose_run: Compose) -> None:
    """TIP's main setting re-run on 4 x H200: 27.9 s for rollouts. Qwen3-4B alone on an RTX 4090: 10.3 ms a token."""
    config = compose_run("experiment=tip_qwen3")
    step = step_seconds(config, CARDS[141], 4)
    assert step["longest response"] + step["KV cache"] == pytest.approx(27.9, rel=0.1)
    assert step_seconds(config, CARDS[24], 8)["longest response"] / 8192 == pytest.approx(10.3e-3, rel=0.1)


def test_more_gpus_shorten_what_is_shared_and_not_the_longest_response(compose_run: Compose) -> None:
    config = compose_run("experiment=tip_qwen3")
    steps = [step_seconds(config, H100, ranks) for ranks in RANKS]
    assert len({step["longest response"] for step in steps}) == 1
    for part in ("teacher", "learner", "KV cache"):
        assert [step[part] for step in steps] == pytest.approx([steps[0][part] / ranks for ranks in RANKS])
    # Ranks above the number of prompts sample nothing, but the learner's work is shared by all.
    half, all_prompts = (step_seconds(config, H100, ranks) for ranks in (16, 8))
    assert half["KV cache"] == all_prompts["KV cache"] and half["learner"] == pytest.approx(all_prompts["learner"] / 2)
    assert steps[0]["collectives"] == 0 < steps[1]["collectives"]


def test_slow_links_are_paid_for(compose_run: Compose) -> None:
    """Two nodes exchange layers over the network, unless each holds all shards."""
    seconds = {
        key: step_seconds(compose_run("experiment=tip_qwen3", *overrides), H100, 16)["collectives"]
        for key, overrides in {"one": [], "two": ["nodes=2"], "hsdp": ["nodes=2", "learner.replicas=2"]}.items()
    }
    assert seconds["two"] == pytest.approx(9 * seconds["one"])  # 450 GB/s against 50
    assert seconds["hsdp"] < seconds["one"]
    offload = step_seconds(compose_run("experiment=tip_qwen3", "pair.teacher.placement=offload"), H100, 16)
    assert offload["collectives"] > seconds["one"]


def test_a_run_counts_its_evaluations(compose_run: Compose) -> None:
    """1,739 steps with an evaluation at 0, every 200 and at the end: ten of the student, one of the teacher."""
    with_teacher, without = (
        run_time(compose_run("experiment=tip_qwen3", f"eval.teacher={value}"), H100, 8) for value in ("true", "false")
    )
    assert without.run_s == pytest.approx(1739 * without.step_s + 10 * without.evaluation_s)
    assert with_teacher.run_s > without.run_s
    llama = ["experiment=tip_llama", "eval.teacher=true"]  # 141 GB of teacher: no engine on one card holds it
    assert (
        run_time(compose_run(*llama), H100, 8).run_s
        == run_time(compose_run(*llama[:1], "eval.teacher=false"), H100, 8).run_s
    )


GPU_EXPERIMENTS = sorted(
    path.stem for path in (conf_dir() / "experiment").glob("*.yaml") if " x H100" in path.read_text()
)
CONSUMER = ["consumer", "consumer_lora"]
GPU_SWEEPS = sorted(path for path in SWEEPS.glob("*.yaml") if " x H100" in path.read_text())


@pytest.mark.parametrize("experiment", [*GPU_EXPERIMENTS, *CONSUMER])
def test_the_hours_in_an_experiments_head_are_computed(compose_run: Compose, experiment: str) -> None:
    config = compose_run(f"experiment={experiment}", *(["data.root=."] if "deepplanning" in experiment else []))
    head = (conf_dir() / "experiment" / f"{experiment}.yaml").read_text().partition("\ndefaults:")[0]
    assert format_hours([config], CARDS[24] if experiment in CONSUMER else H100) in head


@pytest.mark.parametrize("path", GPU_SWEEPS, ids=lambda path: path.stem)
def test_the_hours_in_a_sweeps_head_are_computed(path: Path) -> None:
    runs = plan(path, ["data.root=."] if path.stem == "table7" else [])
    configs = [run.config for run in runs if isinstance(run, SweepRun)]
    head = path.read_text().partition("\ndefaults:")[0]
    assert f"{len(runs)} runs" in head and f"measured: {format_hours(configs, H100)}" in head


def test_every_claim_of_hours_on_gpus_is_checked() -> None:
    assert {"tip_qwen3", "tip_qwen25", "tip_llama", "tip_deepplanning", "tip_deepplanning_32b"} <= set(GPU_EXPERIMENTS)
    assert len(GPU_SWEEPS) == 9
    for path in [*(conf_dir() / "experiment").glob("*.yaml"), *(conf_dir() / "pair").glob("*.yaml"), *SWEEPS.glob("*")]:
        assert not re.search(r"GPU-hours|H[12]00-hours", path.read_text()), path
