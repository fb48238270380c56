"""A dry run needs no weights and no network; what it counts on fake tensors agrees with the closed form."""

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
from tip_exp.estimate.activations import kept_for_backward
from tip_exp.estimate.cards import CARDS
from tip_exp.estimate.dry_run import dry_run, format_memory
from tip_exp.estimate.memory import RankMemory, runs_on_cpu
from tip_exp.models.pair import Pair
from tip_exp.utils.errors import ConfigError
from tip_exp.utils.paths import conf_dir
from tip_exp.utils.units import GIB

EXPERIMENTS = sorted(path.stem for path in (conf_dir() / "experiment").glob("*.yaml"))


def without_weights(*overrides: str) -> RunConfig:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return parse(compose("config", overrides=list(overrides)), with_weights=False)


def row(lines: list[str], name: str) -> str:
    (line,) = [line for line in lines if line.split()[0] == name]
    return line


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_dry_runs_without_weights_or_network(
    experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # models/ of the checkout is out of reach
    needed = {
        "quick_tools": ["data=mini_travel", "eval=mini_travel", "agent=default"],
        "tip_deepplanning": [f"data.root={tmp_path}"],  # any folder: its files are not read
        "tip_deepplanning_32b": [f"data.root={tmp_path}"],
    }
    config = without_weights(f"experiment={experiment}", *needed.get(experiment, []))
    lines = dry_run(config)
    what = "one step on fake tensors, " if config.mode == "train" else "an evaluation: shapes and memory alone"
    assert lines[0].startswith(f"{config.name}: dry run of {what}")
    name, gib = RankMemory(config, None if runs_on_cpu(config) else CARDS[80].gib).peak()
    assert lines[-1].startswith("peak ") and f" in {name}" in lines[-1]
    assert float(lines[-1].split()[1]) == pytest.approx(gib, rel=0.1)
    assert (config.mode == "eval") == (not any(line.startswith("  hidden ") for line in lines))
    assert list(tmp_path.iterdir()) == []


def test_the_papers_run_in_numbers() -> None:
    lines = dry_run(without_weights("experiment=tip_qwen3", "selector=soft_or"))
    # The longest rollouts fill 10,240 of 16,384, so that each is a micro-batch; shorter ones fill it.
    assert "128 rollouts of up to 2,048 + 8,192 tokens; at their longest 128 micro-batches" in row(lines, "step")
    assert "1 x 16,384 ids, of which 13,108 response tokens" in row(lines, "micro-batch")
    assert "teacher 13,108 x 4,096 bfloat16, student 13,108 x 2,560 bfloat16" in row(lines, "hidden")
    assert "6,554 of 13,108 response tokens" in row(lines, "kept")
    # 256 MiB for two float32 tiles: 2^25 elements each, 1,024 rows high
    assert "1,024 x 32,768 float32" in row(lines, "logits")
    assert "40,960" in row(lines, "positions")


@pytest.mark.parametrize(
    ("overrides", "ending"),
    [
        (["experiment=tip_llama"], "; fits 8 x H100"),
        (["experiment=tip_llama", "ranks=8"], " in rollout"),
        (["experiment=tip_qwen25"], "; fits 2 x H100"),
    ],
)
def test_the_gpus_that_a_run_needs_are_named(overrides: list[str], ending: str) -> None:
    assert format_memory(without_weights(*overrides), None)[-1].endswith(ending)


def test_vocabularies_are_reduced_to_the_shared_ids() -> None:
    lines = dry_run(without_weights("experiment=tip_qwen25", "learner.loss_backend=materialized"))
    assert "teacher 152,064, student 151,936: 151,936 shared ids" in row(lines, "vocabulary")
    assert "13,108 x 151,936 of each model at once" in row(lines, "logits")


def test_what_cannot_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"= 45056, but the teacher Qwen/Qwen3-8B has 40960 positions"):
        dry_run(
            without_weights(
                "experiment=tip_qwen3", "data.max_response_tokens=43008", "learner.micro_batch_tokens=50000"
            )
        )
    with pytest.raises(ConfigError, match=r"pair\.student\.path: no config\.json for nobody/Odd-3B"):
        dry_run(without_weights("pair.student.path=nobody/Odd-3B"))


@pytest.mark.parametrize(
    ("pair", "checkpointing"),
    [("qwen3_8b_to_4b", "true"), ("qwen25_14b_to_1p5b", "false"), ("llama3_70b_to_8b", "false")],
)
def test_counted_activations_agree_with_the_closed_form(pair: str, checkpointing: str) -> None:
    overrides = ["learner=paper", f"learner.activation_checkpointing={checkpointing}", "data.max_response_tokens=3968"]
    config = without_weights(f"pair={pair}", *overrides)
    counted = float(row(dry_run(config), "activations").split()[1])
    memory = RankMemory(config, CARDS[80].gib)
    options = {"packed": True, "checkpointing": False}
    closed_form, _ = kept_for_backward(memory.student, memory.batch, memory.width, **options)
    assert counted == pytest.approx(closed_form / GIB, rel=0.07)


def test_the_command_writes_nothing_and_says_it_is_one_run(tmp_path: Path) -> None:
    def dry(*overrides: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "tip_exp", "--dry", *overrides]
        return subprocess.run(line, capture_output=True, text=True, timeout=200, cwd=tmp_path)

    done = dry("experiment=smollm2_gsm8k")
    assert done.returncode == 0, done.stderr
    assert "shape from model_shapes.yaml" in done.stdout and "GiB for the backward pass" in done.stdout
    wrong = dry("selector.retention=7")
    assert wrong.returncode == 2 and "selector.retention" in wrong.stderr
    several = dry("-m", "seed=1,2")
    assert several.returncode == 2 and "--dry computes one run" in several.stderr
    assert list(tmp_path.iterdir()) == []


def test_real_models_still_work_after_a_dry_run(compose_run: Callable[..., RunConfig], tiny_pair: Pair) -> None:
    dry_run(compose_run())
    ids = torch.arange(4)[None]
    assert tiny_pair.student.module(ids).logits.isfinite().all()
