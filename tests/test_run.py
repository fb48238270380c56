"""The loop learns: twenty steps lift the embedded student, and what lifts it is in the tokens that were kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from tip_exp import inputs
from tip_exp.config.parse import load
from tip_exp.config.schema import RunConfig
from tip_exp.data.load import load as load_data
from tip_exp.data.training_set import TrainingSet
from tip_exp.grading import boxed
from tip_exp.learner.learner import Learner
from tip_exp.learner.on_policy import SyncError
from tip_exp.learner.teacher import Teacher
from tip_exp.models.load import load_pair
from tip_exp.records.folder import RunFolder
from tip_exp.rollout.backends import Backend
from tip_exp.rollout.hf import HfSampler
from tip_exp.run import run, run_eval
from tip_exp.types import Rollout, Sampling
from tip_exp.utils.errors import ConfigError, RunFailedError
from tip_exp.utils.io import read_rows

Run = Callable[..., RunConfig]
QUICK = ["logger=files", "learner.num_steps=20", "learner.schedule=constant", "eval.every=0", "eval.samples=0"]
QUICK += ["eval.teacher=false", "eval.benchmarks.word_sums.num_problems=200"]


TINIEST = ["learner.num_steps=1", "learner.warmup_steps=0", "learner.prompts_per_step=2"]
TINIEST += ["eval.benchmarks.word_sums.num_problems=2", "eval.max_tokens=2", "logger.rollouts_per_eval=0"]


def train(compose_run: Run, folder: Path, *overrides: str) -> list[dict]:
    run_folder = RunFolder(folder)
    folder.mkdir()
    run(compose_run(*QUICK, *overrides), run_folder)
    return read_rows(run_folder.metrics)


def test_shown_rollouts_have_the_verdicts_of_the_grader(tmp_path: Path, compose_run: Run) -> None:
    few = ["learner.num_steps=1", "learner.warmup_steps=0", "learner.prompts_per_step=8"]
    few += ["eval.benchmarks.word_sums.num_problems=2", "logger.rollouts_per_eval=8"]
    train(compose_run, tmp_path / "run", *few)
    rows = read_rows(RunFolder(tmp_path / "run").samples)
    graded = [boxed.grade("".join(row["tokens"]), row["answer"]) for row in rows]
    assert [(row["right"], row["extracted"]) for row in rows] == [(v.right, v.extracted) for v in graded]
    assert {row["right"] for row in rows} == {True, False}


def test_without_its_result_a_run_writes_its_model_again(tmp_path: Path, compose_run: Run) -> None:
    """What a launch advises for a finished run whose model/ is damaged."""
    few = ["learner.num_steps=1", "learner.warmup_steps=0", "learner.prompts_per_step=1"]
    few += ["eval.benchmarks.word_sums.num_problems=2", "data.max_response_tokens=2", "eval.max_tokens=2"]
    config, folder = compose_run(*QUICK, *few), RunFolder(tmp_path)
    run(config, folder)
    files = {path: path.read_bytes() for path in (*folder.model.iterdir(), *folder.rows) if path.is_file()}
    result = json.loads(folder.result.read_text())
    (folder.model / "model.safetensors").write_bytes(b"damaged")
    (folder.model / "config.json").unlink()
    folder.result.unlink()
    run(config, folder)
    assert files == {path: path.read_bytes() for path in files}
    again = json.loads(folder.result.read_text())
    changing = ("finished_at", "sha256")
    assert {key: again[key] for key in again if key not in changing} == {
        key: result[key] for key in result if key not in changing
    }


def test_rollouts_of_other_weights_end_the_run(
    tmp_path: Path, compose_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = HfSampler.generate

    def shifted(self: HfSampler, *arguments: Any) -> list[Rollout]:
        rollouts = generate(self, *arguments)
        return [replace(r, sampler_logprobs=[logprob - 1 for logprob in r.sampler_logprobs]) for r in rollouts]

    monkeypatch.setattr(HfSampler, "generate", shifted)
    with pytest.raises(SyncError):
        train(compose_run, tmp_path / "run", *TINIEST)
    assert not RunFolder(tmp_path / "run").checkpoints.exists()


def test_the_rows_of_a_step_are_those_of_its_rollouts(
    tmp_path: Path, compose_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Rollout] = []
    generate = HfSampler.generate

    def recording(self: HfSampler, prompts: Any, sampling: Sampling, *rest: Any) -> list[Rollout]:
        rollouts = generate(self, prompts, sampling, *rest)
        written.extend(rollouts if sampling.temperature > 0 else [])  # evaluations are greedy here
        return rollouts

    monkeypatch.setattr(HfSampler, "generate", recording)
    few = ["learner.prompts_per_step=7", "data.max_response_tokens=48"]
    row = train(compose_run, tmp_path / "run", *TINIEST, *few)[1]
    lengths = [sum(rollout.response_mask) for rollout in written]
    assert row["rollout/response_len"] == sum(lengths) / len(lengths)
    assert row["select/response_tokens"] == sum(lengths)
    assert row["rollout/truncated_frac"] == sum(rollout.finish == "length" for rollout in written) / len(written)
    assert row["rollout/truncated_frac"] not in (0, 0.5, 1)
    assert row["rollout/tokens_per_s"] == pytest.approx(sum(lengths) / row["time/rollout_s"])


def test_a_run_resumes_with_its_backend_and_its_rows_alone(
    tmp_path: Path, compose_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, config = RunFolder(tmp_path), compose_run(*QUICK, *TINIEST)
    run(config, folder)
    folder.result.unlink()
    with monkeypatch.context() as patched:
        patched.setattr(inputs, "choose", lambda *_: Backend("vllm", "", "", "float32"))
        patched.setattr("tip_exp.build.load_pair_or_offload", None)  # refused before weights load
        with pytest.raises(ConfigError, match=r"rollouts were sampled by hf, but here rollout\.backend is vllm"):
            run(config, folder)
    folder.metrics.write_bytes(folder.metrics.read_bytes()[:-5])
    with pytest.raises(RunFailedError, match="the rows before them are damaged"):
        run(config, folder)


def test_prompts_of_evaluations_fit_the_engine(
    tmp_path: Path, compose_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = ["eval.max_tokens=150", "data.max_prompt_tokens=80", "data.max_response_tokens=48"]
    config = compose_run(*QUICK, *TINIEST, *lengths, "rollout.vllm.max_model_len=151")
    monkeypatch.setattr(inputs, "choose", lambda *_: Backend("vllm", "", "", "float32"))
    monkeypatch.setattr("tip_exp.build.load_pair_or_offload", None)  # refused before weights load
    with pytest.raises(
        ConfigError, match=r"rollout\.vllm\.max_model_len=151, but the longest prompt and response take"
    ):
        run(config, RunFolder(tmp_path))


def test_twenty_steps_of_soft_or_teach(tmp_path: Path, compose_run: Run) -> None:
    rows = train(compose_run, tmp_path / "run")
    before, after = rows[0]["eval/word_sums/greedy"], rows[-1]["eval/word_sums/greedy"]
    assert 0.25 < before < 0.5  # se 0.034
    assert after > before + 0.15
    assert rows[-1]["score/reverse_kl_mean"] < 0.6 * rows[1]["score/reverse_kl_mean"]


def test_both_backends_walk_the_same_path(tmp_path: Path, compose_run: Run) -> None:
    few = ["learner.num_steps=4", "learner.warmup_steps=1", "learner.prompts_per_step=16"]
    few += ["eval.benchmarks.word_sums.num_problems=2"]
    fused, materialized = (
        train(compose_run, tmp_path / b, f"learner.loss_backend={b}", *few) for b in ("fused", "materialized")
    )
    for one, other in zip(fused[1:], materialized[1:], strict=True):
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=1e-4)
        assert one["select/kept_tokens"] == other["select/kept_tokens"]


@pytest.fixture(scope="module")
def update_ratio_of_all_tokens(tmp_path_factory: pytest.TempPathFactory, compose_run: Run) -> float:
    few = ["selector=full", "learner.num_steps=6", "learner.warmup_steps=1"]
    folder = tmp_path_factory.mktemp("full") / "run"
    return train(compose_run, folder, *few, "eval.benchmarks.word_sums.num_problems=2")[-1]["train/update_ratio"]


@pytest.mark.parametrize(
    "selector", ["selector=q4 quadrants={entropy: 0.01, divergence: 0.01}", "selector=soft_or_bottom"]
)
def test_tokens_without_signal_leave_the_student_where_it_was(
    tmp_path: Path, compose_run: Run, update_ratio_of_all_tokens: float, selector: str
) -> None:
    """With a small eps Adam makes full-size steps from gradients a thousand times smaller: the student is destroyed."""
    rows = train(compose_run, tmp_path / "run", *selector.split(" ", 1))
    before, after = rows[0]["eval/word_sums/greedy"], rows[-1]["eval/word_sums/greedy"]
    assert abs(after - before) < 0.06
    assert rows[-1]["train/update_ratio"] < 0.2 * update_ratio_of_all_tokens


def test_each_step_samples_with_a_seed_of_its_own(
    tmp_path: Path, compose_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []
    generate = HfSampler.generate

    def recording(self: HfSampler, prompts: Any, sampling: Sampling, seed: int, *part: Any) -> Any:
        if sampling.temperature > 0:  # evaluations are greedy here
            seeds.append(seed)
        return generate(self, prompts, sampling, seed, *part)

    monkeypatch.setattr(HfSampler, "generate", recording)
    few = ["learner.num_steps=2", "learner.warmup_steps=0", "learner.prompts_per_step=2"]
    for seed in (0, 1):
        train(compose_run, tmp_path / str(seed), *few, "eval.benchmarks.word_sums.num_problems=2", f"seed={seed}")
    assert len(set(seeds)) == len(seeds) == 4


def test_the_sampler_rests_while_teacher_and_learner_work_and_only_then(
    tmp_path: Path, compose_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def record(owner: type, name: str) -> None:
        original = getattr(owner, name)

        def recording(self: object, *args: object, **options: object) -> object:
            calls.append(name)
            return original(self, *args, **options)

        monkeypatch.setattr(owner, name, recording)

    for name in ("generate", "rest", "sync"):
        record(HfSampler, name)
    for name in ("hidden", "sequence_kl"):
        record(Teacher, name)
    record(Learner, "step")
    few = [
        "learner.num_steps=1",
        "learner.warmup_steps=0",
        "learner.prompts_per_step=2",
        "logger.rollouts_per_eval=0",
        "eval.samples=1",
    ]
    train(compose_run, tmp_path / "run", *few, "eval.benchmarks.word_sums.num_problems=2", "eval.sequence_kl=true")
    evaluation = ["generate", "rest", "sequence_kl", "generate"]  # sampled, divergences, greedy
    assert calls == [*evaluation, "generate", "rest", "hidden", "step", "sync", *evaluation]


def test_evaluation_alone_leaves_a_result_for_the_same_table(tmp_path: Path, compose_run: Run) -> None:
    folder = RunFolder(tmp_path)
    small = "eval.benchmarks.word_sums.num_problems=40"
    run_eval(compose_run("experiment=evaluate", "logger=files", "eval.samples=1", small), folder)
    (row,) = read_rows(folder.metrics)
    result = json.loads(folder.result.read_text())
    assert result["final"] == result["start"] and result["totals"]["steps"] == 0
    assert result["final"]["word_sums/greedy"] == row["eval/word_sums/greedy"] < result["teacher"]["word_sums/greedy"]
    assert json.loads(folder.prompts.read_text())["word_sums"].startswith("<|im_start|>user\n")
    assert not folder.checkpoints.exists()


def test_prompts_that_are_too_long_are_left_out_or_refused(compose_run: Run) -> None:
    config = compose_run("data.max_prompt_tokens=30")
    pair = load_pair(config.pair, torch.device("cpu"))
    dataset = load_data(config.data.train)
    train = TrainingSet(config, pair, dataset)
    assert 0 < len(train.problems) == len(train.prompts) < config.data.train.num_problems
    assert max(map(len, train.prompts)) <= 30
    with pytest.raises(ValueError, match=r"data\.max_prompt_tokens=5 leaves no prompt: the shortest has"):
        TrainingSet(compose_run("data.max_prompt_tokens=5"), pair, dataset)


def test_data_is_refused_before_weights_load(tmp_path: Path, compose_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("tip_exp.build.load_pair_or_offload", never)
    with pytest.raises(ValueError, match=r"data\.max_prompt_tokens=5 leaves no prompt"):
        run(compose_run(*QUICK, "data.max_prompt_tokens=5"), RunFolder(tmp_path))


def test_a_run_can_be_replayed_from_its_own_config(tmp_path: Path, compose_run: Run) -> None:
    config = compose_run(*QUICK)
    path = tmp_path / "config.yaml"
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(config.model_dump())))
    assert load(path) == config


def test_vllm_may_not_replace_the_learners_operators(
    tmp_path: Path, compose_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "choose", lambda *_: Backend("vllm", "", "", "bfloat16"))
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(ConfigError, match=r"^VLLM_BATCH_INVARIANT: .* unset it$"):
        run(compose_run(), RunFolder(tmp_path))


@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
def test_a_run_on_cuda_is_in_a_process_group(
    tmp_path: Path, compose_run: Run, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """Of one process too: vLLM would make a group of NCCL alone, with which asynchronous checkpoints are refused."""
    asked: list[bool] = []

    def start(_device: torch.device, *, alone: bool) -> Any:
        asked.append(alone)
        raise InterruptedError

    monkeypatch.setattr(inputs, "start", start)
    monkeypatch.setattr(inputs, "pick_device", lambda _name: torch.device(device))
    with pytest.raises(InterruptedError):
        run(compose_run(), RunFolder(tmp_path))
    assert asked == [device == "cuda:0"]
