"""Rollouts that are one update behind: those of a sequential loop, whichever thread is faster, also after a resume."""

from __future__ import annotations

import copy
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3Config

from tip_exp.config.schema import RunConfig
from tip_exp.data.load import load as load_data
from tip_exp.data.training_set import TrainingSet
from tip_exp.learner.learner import Learner
from tip_exp.learner.selectors import make_selector
from tip_exp.learner.teacher import Teacher
from tip_exp.models.load import load_pair
from tip_exp.models.lora import merged_tensors
from tip_exp.models.pair import Pair
from tip_exp.records.folder import RunFolder
from tip_exp.records.meter import Meter
from tip_exp.rollout.ahead import RolloutsAhead
from tip_exp.rollout.hf import CopySampler, HfSampler
from tip_exp.run import run
from tip_exp.types import Rollout, Sampling
from tip_exp.utils.io import read_rows
from tip_exp.utils.seeds import seed_for

Compose = Callable[..., RunConfig]
CPU, STEPS, TIMEOUT_S = torch.device("cpu"), 4, 60
SMALL = ["logger=files", f"learner.num_steps={STEPS}", "learner.warmup_steps=1", "learner.prompts_per_step=4"]
SMALL += ["data.train.num_problems=40", "eval.every=2", "eval.samples=0", "eval.sequence_kl=false"]
SMALL += ["eval.teacher=false", "eval.benchmarks.word_sums.num_problems=3", "logger.rollouts_per_eval=1"]
SMALL += ["data.max_response_tokens=40", "eval.max_tokens=40", "rollout.staleness=1", "learner.checkpoint_every=2"]


@pytest.fixture(scope="module")
def config(compose_run: Compose) -> RunConfig:
    return compose_run(*SMALL)


@pytest.fixture(scope="module")
def sequential(config: RunConfig) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Metrics of each step, and the last weights, of a loop without threads that keeps the student of every step."""
    pair = load_pair(config.pair, CPU)
    learner = Learner(pair, make_selector(config), config.learner, seed=config.seed, meter=Meter(CPU))
    teacher, train = Teacher(pair, config.learner, Meter(CPU)), TrainingSet(config, pair, load_data(config.data.train))
    students = [copy.deepcopy(pair.student.module)]  # after 0, 1, 2 … updates
    rows: list[dict[str, float]] = []
    for step in range(1, STEPS + 1):
        writer = students[0] if step < 3 else students[step - 2]
        sampler = HfSampler(writer, stop_ids=pair.stop_ids, pad_id=pair.pad_id, batch_size=256)
        prompts, problems = train.batch(step)
        sampling = Sampling(config.learner.samples_per_prompt, 1.0, 1.0, 0, 40)
        rollouts = sampler.generate(prompts, sampling, seed_for("rollout", config.seed, step))
        rows.append(learner.step(step, rollouts, teacher.hidden(rollouts, problems)).metrics)
        students.append(copy.deepcopy(pair.student.module))
    return rows, dict(pair.student.module.named_parameters())


def in_order(monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    """Let the "sampler" have written the next step's rollouts before an update, or the "learner" update before."""
    written: dict[int, threading.Event] = defaultdict(threading.Event)
    updated: dict[int, threading.Event] = defaultdict(threading.Event)
    sample, update = RolloutsAhead._sample, Learner.step

    def sample_in_order(self: RolloutsAhead, step: int) -> Any:
        if first == "learner" and step > 1:
            assert updated[step - 1].wait(TIMEOUT_S)
        result = sample(self, step)
        written[step].set()
        return result

    def update_in_order(self: Learner, step: int, *args: Any) -> Any:
        if first == "sampler" and step < STEPS:
            assert written[step + 1].wait(TIMEOUT_S)
        report = update(self, step, *args)
        updated[step].set()
        return report

    monkeypatch.setattr(RolloutsAhead, "_sample", sample_in_order)
    monkeypatch.setattr(Learner, "step", update_in_order)


def assert_sequential(folder: RunFolder, sequential: tuple[list[dict[str, float]], dict[str, Any]]) -> None:
    rows, expected_weights = sequential
    for row, expected in zip(read_rows(folder.metrics)[1:], rows, strict=True):
        assert {key: (row[key], value) for key, value in expected.items() if row[key] != value} == {}
    weights = load_file(folder.model / "model.safetensors")
    assert weights.keys() == expected_weights.keys() and all(weights[k].equal(v) for k, v in expected_weights.items())


@pytest.mark.parametrize("first", ["sampler", "learner"])
def test_a_run_is_the_sequential_loop_bit_for_bit_in_any_order(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: RunConfig,
    sequential: tuple[list[dict[str, float]], dict[str, Any]],
    first: str,
) -> None:
    """Each order also shows that neither thread waits for the other: else its event would not come."""
    in_order(monkeypatch, first)
    run(config, RunFolder(tmp_path))
    assert_sequential(RunFolder(tmp_path), sequential)
    mismatch = [row["rollout/logprob_mismatch_mean"] for row in read_rows(RunFolder(tmp_path).metrics)[1:]]
    assert mismatch[0] < 1e-5 and all(value > 1e-3 for value in mismatch[1:])  # from step 2 on an update apart


@pytest.mark.parametrize("first", ["sampler", "learner"])
def test_a_resumed_run_trains_on_the_rollouts_of_the_stopped_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: RunConfig,
    sequential: tuple[list[dict[str, float]], dict[str, Any]],
    first: str,
) -> None:
    update, folder = Learner.step, RunFolder(tmp_path)

    def stopped(self: Learner, step: int, *args: Any) -> Any:
        if step == 3:
            raise KeyboardInterrupt
        return update(self, step, *args)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Learner, "step", stopped)
        run(config, folder)
    end = time.monotonic() + 60
    while (folder.checkpoints / ".writing_00002").exists() and time.monotonic() < end:  # in the background
        time.sleep(0.01)
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step_00002"]
    in_order(monkeypatch, first)
    run(config, folder)
    assert_sequential(folder, sequential)
    assert not (folder.checkpoints / "step_00004" / "rollouts.json").exists()  # there is no fifth step


def test_a_failed_rollout_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: RunConfig) -> None:
    generate, calls = CopySampler.generate, []

    def failing(self: CopySampler, *args: Any) -> list[Rollout]:
        if threading.current_thread() is not threading.main_thread():
            calls.append(args)
            if len(calls) == 3:
                raise MemoryError("no memory for the KV cache")
        return generate(self, *args)

    monkeypatch.setattr(CopySampler, "generate", failing)
    with pytest.raises(MemoryError, match="no memory for the KV cache"):
        run(config, RunFolder(tmp_path))


LORA = "pair.student.lora={rank: 4, alpha: 8, target_modules: all-linear}"


@pytest.mark.parametrize("overrides", [[], [LORA]])
def test_a_copy_has_the_weights_of_the_last_sync(compose_run: Compose, overrides: list[str]) -> None:
    if overrides:
        pytest.importorskip("peft")
    pair: Pair = load_pair(compose_run(*overrides).pair, CPU)
    options = {"stop_ids": pair.stop_ids, "pad_id": pair.pad_id, "batch_size": 8}
    module, prompts, sampling = pair.student.module, [pair.prompt_ids("Tom has 7 pens.")], Sampling(4, 1.0, 1.0, 0, 30)
    copied = CopySampler(module, CPU, torch.float32, **options)
    before = copied.generate(prompts, sampling, seed=0)
    assert [r.token_ids for r in before] == [
        r.token_ids for r in HfSampler(module, **options).generate(prompts, sampling, seed=0)
    ]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    assert copied.generate(prompts, sampling, seed=0) == before
    copied.sync()
    after = copied.generate(prompts, sampling, seed=0)
    assert after != before
    for name, tensor in merged_tensors(module):
        assert copied.model.get_parameter(name).equal(tensor)
    assert not copied.model.training


def test_a_copy_keeps_tied_and_untied_heads_and_computed_buffers() -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    sizes |= {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": 40}
    for tied in (True, False):
        source = AutoModelForCausalLM.from_config(Qwen3Config(**sizes, tie_word_embeddings=tied)).eval()
        copied = CopySampler(source, CPU, torch.float32, stop_ids=[2], pad_id=0, batch_size=8).model
        ids = torch.tensor([[5, 9, 11]])
        assert copied(ids).logits.equal(source(ids).logits)
        weights = [copied.get_parameter(name) for name in ("model.embed_tokens.weight", "lm_head.weight")]
        assert (weights[0] is weights[1]) == tied
