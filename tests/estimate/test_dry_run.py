"""A dry run needs no weights and no network; what it counts on shapes is what torch keeps, and what is forecast."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from tip_exp.config.parse import parse
from tip_exp.config.schema import RunConfig
from tip_exp.estimate.dry_run import activations, walk
from tip_exp.estimate.shapes import model_config, shape_of
from tip_exp.estimate.time import activation_bytes, memory
from tip_exp.models.micro_batch import micro_batches
from tip_exp.models.pair import Pair
from tip_exp.types import Rollout
from tip_exp.utils.errors import ConfigError
from tip_exp.utils.paths import conf_dir

EXPERIMENTS = sorted(path.stem for path in (conf_dir() / "experiment").glob("*.yaml"))
# Parameters by the models' own cards, in billions with the digits they give.
CARDS = {
    "meta-llama/Llama-3.1-8B-Instruct": 8.03,
    "meta-llama/Llama-3.3-70B-Instruct": 70.6,
    "Qwen/Qwen2.5-1.5B-Instruct": 1.54,
    "Qwen/Qwen2.5-14B-Instruct": 14.8,
    "Qwen/Qwen3-0.6B": 0.596,
    "Qwen/Qwen3-1.7B": 1.72,
    "Qwen/Qwen3-4B": 4.02,
    "Qwen/Qwen3-8B": 8.19,
    "Qwen/Qwen3-14B": 14.8,
    "Qwen/Qwen3-32B": 32.8,
    "./models/smollm2/teacher": 0.1345,
    "./models/smollm2/student": 0.1204,
}


def without_weights(*overrides: str) -> RunConfig:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return parse(compose("config", overrides=list(overrides)), with_weights=False)


def row(lines: list[str], name: str) -> str:
    (found,) = [line for line in lines if line.split()[0] == name]
    return found


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_dry_runs_without_weights_or_network(
    experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # models/ of the checkout is out of reach
    tools = ["data=mini_travel", "eval=mini_travel", "agent=default"] if experiment == "quick_tools" else []
    config = without_weights(f"experiment={experiment}", *tools)
    lines = walk(config)
    assert lines[0].startswith(f"{config.name}: dry run") and lines[-1].endswith("together")
    assert float(lines[-1].split()[0]) == pytest.approx(sum(memory(config).values()), abs=0.01)
    assert (config.mode == "eval") == (not any(line.startswith("  hidden ") for line in lines))
    assert list(tmp_path.iterdir()) == []


def test_the_papers_run_in_numbers() -> None:
    lines = walk(without_weights("experiment=tip_qwen3", "selector=soft_or"))
    assert "128 rollouts of 2,048 + 8,192 tokens in 128 micro-batches" in row(lines, "step")  # one fits 16,384
    assert "1 x 10,240 ids, 8,192 of them response tokens" in row(lines, "micro-batch")
    assert "teacher 8,192 x 4,096 bfloat16, student 8,192 x 2,560 float32" in row(lines, "hidden")
    assert "4,096 of 8,192 rows" in row(lines, "kept")  # half of them
    # 256 MiB for two tiles of float32: 2^25 elements each, 1,024 rows high
    assert "1,024 x 32,768 float32" in row(lines, "logits")
    assert "40,960" in row(lines, "positions")


def test_vocabularies_are_cut_to_the_shared_ids() -> None:
    lines = walk(without_weights("experiment=tip_qwen25", "learner.loss_backend=materialized"))
    assert "teacher 152,064, student 151,936: 151,936 shared ids" in row(lines, "vocabulary")
    assert "8,192 x 151,936 of each model at once" in row(lines, "logits")


def test_what_cannot_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"= 45056, but the teacher Qwen/Qwen3-8B has 40960 positions"):
        walk(
            without_weights(
                "experiment=tip_qwen3", "data.max_response_tokens=43008", "learner.micro_batch_tokens=50000"
            )
        )
    with pytest.raises(ConfigError, match=r"pair\.student\.path: the shape of nobody/Odd-3B is not known"):
        walk(without_weights("pair.student.path=nobody/Odd-3B"))


@pytest.mark.parametrize("path", CARDS)
def test_known_shapes_have_the_parameters_of_their_cards(path: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shape_of(path, None).parameters / 1e9 == pytest.approx(CARDS[path], rel=0.004)


def test_parameters_are_counted_as_the_model_has_them(tiny_pair: Pair) -> None:
    for role in ("teacher", "student"):
        module = getattr(tiny_pair, role).module
        assert shape_of(f"package:tiny/{role}", None).parameters == module.num_parameters()


def test_a_model_nobody_knows_is_guessed_by_its_name() -> None:
    assert model_config("nobody/Odd-3B", None) is None
    assert shape_of("nobody/Odd-3B", None).parameters == 3e9


@pytest.mark.parametrize("padded", [True, False])
def test_activations_are_what_torch_keeps_and_what_is_forecast(tiny_pair: Pair, padded: bool) -> None:
    """On real tensors too; without padding there is no mask to keep, so that a token has no share in its length."""
    lengths = [400, 400, 400, 300 if padded else 400]
    rollouts = [Rollout([1] * (100 + n), [False] * 100 + [True] * n, "length", []) for n in lengths]
    (batch,) = micro_batches(rollouts, 2000, 0)
    _, counted = activations(tiny_pair.student, batch)
    forecast = 4 * 500 * 2 * activation_bytes(shape_of("package:tiny/student", None), 4, 500 if padded else 0)
    assert counted == pytest.approx(forecast, rel=0.1)


@pytest.mark.parametrize("pair", ["qwen3_8b_to_4b", "qwen25_14b_to_1p5b", "llama3_70b_to_8b"])
def test_forecast_activations_of_real_shapes_are_near_the_counted(pair: str) -> None:
    overrides = "learner=paper", "learner.activation_checkpointing=false", "data.max_response_tokens=3968"
    config = without_weights(f"pair={pair}", *overrides)
    lines = walk(config)  # 4,096 tokens a rollout, four of them make 16,384
    counted = float(row(lines, "activations").split()[1])
    assert counted == pytest.approx(memory(config)["activations"], rel=0.07)


def test_the_command_writes_nothing_and_says_it_is_one_run(tmp_path: Path) -> None:
    def dry(*overrides: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "tip_exp", "--dry", *overrides]
        return subprocess.run(line, capture_output=True, text=True, timeout=200, cwd=tmp_path)

    done = dry("experiment=smollm2_gsm8k")
    assert done.returncode == 0, done.stderr
    assert "shape from conf/model_shapes.yaml" in done.stdout and "tip-plan's forecast" in done.stdout
    wrong = dry("selector.retention=7")
    assert wrong.returncode == 2 and "selector.retention" in wrong.stderr
    several = dry("-m", "seed=1,2")
    assert several.returncode == 2 and "--dry computes one run" in several.stderr
    assert list(tmp_path.iterdir()) == []


def test_fake_models_leave_no_trace_in_the_next_real_one(
    compose_run: Callable[..., RunConfig], tiny_pair: Pair
) -> None:
    walk(compose_run())
    ids = torch.arange(4)[None]
    assert tiny_pair.student.module(ids).logits.isfinite().all()
