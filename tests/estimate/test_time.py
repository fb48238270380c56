"""Forecasts of memory and time: measured where a run of the same shape is finished, else scaled, else a bound."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open
from tests import synthetic_runs

from tip_exp.config.schema import RunConfig
from tip_exp.estimate.shapes import shape_of
from tip_exp.estimate.time import Forecaster, learner_gib, memory
from tip_exp.records.reader import read_runs
from tip_exp.utils.paths import resolve_model

GIB = 2**30


def test_a_forecast_measures_scales_or_bounds(tmp_path: Path, compose_run: Callable[..., RunConfig]) -> None:
    config = compose_run()
    synthetic_runs.write_config(config, tmp_path / "run")
    synthetic_runs.finish(config, tmp_path / "run", 0.5)  # its result has 41.6 s and 0.603 GiB
    forecast = Forecaster(read_runs([tmp_path]))
    measured = forecast(compose_run("seed=5", "selector=full", "name=other"))
    assert (measured.seconds, measured.gib, measured.basis) == (41.6, 0.603, "measured")
    # From 80 to 160 and 320 steps without further evaluations: training doubles, and the evaluations stay.
    few, more, most = (forecast(compose_run(f"learner.num_steps={n}", f"eval.every={n // 4}")) for n in (80, 160, 320))
    assert few.basis == "measured" and (more.basis, most.basis) == ("scaled", "scaled")
    assert few.seconds < more.seconds < 2 * few.seconds
    assert most.seconds - more.seconds == pytest.approx(2 * (more.seconds - few.seconds))
    assert Forecaster([])(compose_run("experiment=tip_qwen3")).basis == "lower bound on one H200"


def stored_bytes(path: str) -> int:
    with safe_open(f"{resolve_model(path)}/model.safetensors", "pt") as file:
        return sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118


def test_weights_and_optimizer_states_are_those_of_the_files(compose_run: Callable[..., RunConfig]) -> None:
    config = compose_run()
    parts = memory(config)
    assert parts["teacher weights"] * GIB == stored_bytes(config.pair.teacher.path)
    student = stored_bytes(config.pair.student.path)
    assert parts["student weights"] * GIB == parts["gradients"] * GIB == student
    assert parts["AdamW"] * GIB == 2 * student  # two moments per parameter
    assert learner_gib(config) == pytest.approx(sum(parts.values()))
    evaluation = memory(compose_run("experiment=evaluate"))
    assert evaluation.keys() == {"Python and torch", "teacher weights", "student weights"}


def test_parts_grow_with_what_they_hold(compose_run: Callable[..., RunConfig]) -> None:
    """The step has more tokens than a micro-batch, so that its size and the number of rollouts act separately."""

    def parts(*overrides: str) -> dict[str, float]:
        return memory(compose_run("learner.micro_batch_tokens=2000", "learner.loss_backend=materialized", *overrides))

    base = parts()
    assert parts("learner.micro_batch_tokens=4000")["activations"] == pytest.approx(2 * base["activations"])
    more_prompts = parts("learner.prompts_per_step=128")
    assert more_prompts["hidden states"] == pytest.approx(2 * base["hidden states"])
    assert more_prompts["activations"] == base["activations"]
    # values and gradients in float32 of two rows of the vocabulary per kept token, of which half are kept
    vocabulary = shape_of("package:tiny/student", None).vocabulary
    assert base["logits"] * GIB == 2 * 4 * 1000 * vocabulary
    assert parts("selector=full")["logits"] == 2 * base["logits"]


def test_a_pair_of_the_paper(compose_run: Callable[..., RunConfig]) -> None:
    parts = memory(compose_run("experiment=tip_qwen3"))
    # Qwen3-8B has 8.19 billion parameters (2 bytes each), Qwen3-4B 4.02 billion (4 bytes each)
    assert parts["teacher weights"] == pytest.approx(8.19e9 * 2 / GIB, rel=1e-3)
    assert parts["student weights"] == pytest.approx(4.022e9 * 4 / GIB, rel=1e-3)
    # 128 responses x 8,192 tokens x (4,096 x 2 bytes of the teacher + 2,560 x 4 bytes of the student)
    assert parts["hidden states"] == 18.0


def test_an_offloaded_teacher_makes_room(compose_run: Callable[..., RunConfig]) -> None:
    """Qwen3-8B in bfloat16 beside a Qwen3-4B that trains in float32: only the teacher's head stays on the GPU."""

    def weights(placement: str, device: str = "auto") -> float:
        config = compose_run("experiment=tip_qwen3", f"pair.teacher.placement={placement}", f"device={device}")
        return memory(config)["teacher weights"]

    head = 151_936 * 4096 * 2 / GIB
    resident = weights("resident")
    assert resident == pytest.approx(8.19e9 * 2 / GIB, rel=0.01)
    assert weights("offload") == weights("two_phase") == pytest.approx(head)  # gradients alone take 15 GiB
    assert weights("offload", "cpu") == resident and weights("two_phase", "cpu") == pytest.approx(head)
