"""`tip-exp replay` finds the rollouts and the module in which a planted NaN appears, from any older checkpoint."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tip_exp.config.schema import RunConfig
from tip_exp.data.load import load as load_data
from tip_exp.data.training_set import TrainingSet
from tip_exp.models.sources import load_tokenizer
from tip_exp.probe.command import replay
from tip_exp.records.folder import RunFolder
from tip_exp.run import run
from tip_exp.utils.paths import resolve_model

STEPS = ["logger=files", "learner.num_steps=4", "learner.warmup_steps=0", "learner.prompts_per_step=3"]
STEPS += ["learner.samples_per_prompt=1", "learner.checkpoint_every=1", "data.max_response_tokens=30", "eval.every=0"]
STEPS += ["eval.teacher=false", "eval.samples=0", "eval.sequence_kl=false", "eval.benchmarks.word_sums.num_problems=2"]
PROBE_IDS = set(torch.linspace(0, 405, 16).long().tolist())  # which the check of the output head reads


def teacher_with_nan(folder: Path, source: Path, token: int) -> None:
    """A copy of the teacher, untied, that returns NaN after `token`."""
    shutil.copytree(source, folder)
    tied = AutoModelForCausalLM.from_pretrained(source)
    weights = {name: weight.clone() for name, weight in tied.state_dict().items()}
    weights["model.embed_tokens.weight"][token] = torch.nan
    tied.config.tie_word_embeddings = False
    module = AutoModelForCausalLM.from_config(tied.config)
    module.load_state_dict(weights)
    module.save_pretrained(folder)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, compose_run: Callable[..., RunConfig]) -> tuple[RunFolder, str]:
    """A run that ends in step 3, where one prompt, whose problem is returned, has a token that no earlier text has."""
    config, base = compose_run(*STEPS), tmp_path_factory.mktemp("stopped")
    train = TrainingSet(config, load_tokenizer(config.pair), load_data(config.data.train))
    prompts = {step: train.batch(step) for step in (1, 2, 3)}
    earlier = {token for step in (1, 2) for prompt in prompts[step][0] for token in prompt}
    rare = [set(prompt) - earlier - PROBE_IDS for prompt in prompts[3][0]]
    number, token = next(
        (i, token)
        for i, tokens in enumerate(rare)
        for token in sorted(tokens)
        if not any(token in other for j, other in enumerate(prompts[3][0]) if j != i)
    )
    teacher_with_nan(base / "teacher", Path(resolve_model(config.pair.teacher.path)), token)
    config, folder = compose_run(*STEPS, f"pair.teacher.path={base / 'teacher'}"), RunFolder(base / "run")
    folder.root.mkdir()
    folder.config.write_text(json.dumps(config.model_dump()))  # JSON is YAML
    with pytest.raises(FloatingPointError, match=r"^step 3: .* is not finite at .* `tip-exp replay FOLDER`"):
        run(config, folder)
    return folder, prompts[3][1][number].id


@pytest.mark.parametrize("lost", [None, "step_00002"])  # a checkpoint before the step: a step is repeated
def test_a_planted_nan_is_found(stopped: tuple[RunFolder, str], tmp_path: Path, capsys: Any, lost: str | None) -> None:
    folder, problem = stopped
    copy = RunFolder(Path(shutil.copytree(folder.root, tmp_path / "run")))
    if lost:
        shutil.rmtree(copy.checkpoints / lost)
    else:  # as of a run on two ranks that a tracker has followed: one process replays it and tracks nothing
        config = json.loads(copy.config.read_text())
        config["ranks"], config["learner"]["replicas"], config["logger"]["tracker"] = 2, 2, "mlflow"
        copy.config.write_text(json.dumps(config))
    replay([str(copy.root)])
    printed = capsys.readouterr().out
    fault = json.loads(copy.batch_of(3).read_text())["fault"]
    assert f"run, step 3: {fault}\n" in printed and f"\nthe step again: {fault}\n" in printed
    weights = "checkpoint/step_00001, then 1 more of the run's steps" if lost else "checkpoint/step_00002"
    assert f"\nweights: {weights}\n" in printed
    assert "\nweights that are not finite: teacher: model.embed_tokens.weight\n" in printed
    first, *others = [line.split("|")[1:-1] for line in printed.splitlines() if re.match(r"\|\s*\d", line)]
    assert [cell.strip() for cell in first[1:]][:1] == [problem]
    assert [cell.strip() for cell in first[3:5]] == ["nan", "nan"]
    assert first[5].strip() == "teacher: model.embed_tokens (Embedding)"
    assert len(others) == 2 and all(float(row[3]) > 0 and float(row[4]) > 0 and not row[5].strip() for row in others)
    assert "1 of 3 rollouts not finite" in printed


def test_what_cannot_be_replayed_is_one_line(stopped: tuple[RunFolder, str], tmp_path: Path, capsys: Any) -> None:
    for arguments, message in (
        ([str(tmp_path)], "holds no non_finite_"),
        ([str(stopped[0].root), "--step", "7"], "--step 7: .* holds the batches of steps 3"),
    ):
        with pytest.raises(SystemExit) as ended:
            replay(arguments)
        assert ended.value.code == 2 and re.search(message, capsys.readouterr().err)
