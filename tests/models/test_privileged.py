"""Self-distillation: the teacher reads the response after a prompt with the solution; only the teacher sees it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.helpers import train_step
from torch import Tensor

from tip_exp.config.schema import RunConfig
from tip_exp.data.dataset import Dataset
from tip_exp.data.load import load
from tip_exp.data.training_set import TrainingSet
from tip_exp.learner.learner import Learner
from tip_exp.learner.selectors import make_selector
from tip_exp.learner.teacher import Teacher
from tip_exp.models.load import load_pair
from tip_exp.models.micro_batch import micro_batches
from tip_exp.models.pair import ChatTokenizer, Pair
from tip_exp.models.privileged import align_teacher_hidden, render, with_prompt
from tip_exp.records.folder import RunFolder
from tip_exp.records.meter import Meter
from tip_exp.rollout.hf import HfSampler
from tip_exp.run import run
from tip_exp.types import Problem, Rollout, Sampling
from tip_exp.utils.errors import ConfigError
from tip_exp.utils.io import read_rows

Compose = Callable[..., RunConfig]
F, T = False, True


@pytest.fixture(scope="module")
def config(compose_run: Compose) -> RunConfig:
    return compose_run("pair=self", "pair.teacher.path=package:tiny/teacher", "data.train.num_problems=64")


@pytest.fixture
def pair(config: RunConfig) -> Pair:
    return load_pair(config.pair, torch.device("cpu"))


def step_of(config: RunConfig, pair: Pair) -> tuple[list[Problem], list[Rollout], list[Rollout]]:
    """Two rollouts of each of four problems: their problems, the rollouts, and these with the teacher's prompts."""
    problems = load(config.data.train).problems[:4]
    sampler = HfSampler(pair.student.module, stop_ids=pair.stop_ids, pad_id=pair.pad_id, batch_size=8)
    rollouts = sampler.generate([pair.prompt_ids(p.prompt) for p in problems], Sampling(2, 1.0, 1.0, 0, 24), seed=0)
    problems = [problem for problem in problems for _ in range(2)]
    reads = [with_prompt(rollout, pair.privileged_ids(p)) for p, rollout in zip(problems, rollouts, strict=True)]
    return problems, rollouts, reads


def test_a_template_is_filled_and_braces_in_the_texts_stay() -> None:
    problem = Problem("x/1", "Set {answer}?", "7", "So \\boxed{7}, {prompt}.")
    assert render("{prompt} | {solution} | {answer} {other}", problem) == (
        "Set {answer}? | So \\boxed{7}, {prompt}. | 7 {other}"
    )
    with pytest.raises(ConfigError, match=r"asks for \{solution\}, but the problem x/2 has none"):
        render("{prompt}{solution}", Problem("x/2", "?", "7"))


def test_another_prompt_leaves_the_response_unchanged() -> None:
    rollout = Rollout([5, 6, 7, 8, 9], [F, F, T, F, T], "stop", [-0.1, -0.2])  # tool output in the middle
    changed = with_prompt(rollout, [1, 2, 3])
    assert changed.token_ids == [1, 2, 3, 7, 8, 9] and changed.response_mask == [F, F, F, T, F, T]
    assert changed.response_ids == rollout.response_ids and changed.sampler_logprobs == [-0.1, -0.2]


def test_the_teacher_reads_the_solution_and_the_student_never_does(config: RunConfig, pair: Pair) -> None:
    problems, rollouts, reads = step_of(config, pair)
    for i, (rollout, read) in enumerate(zip(rollouts, reads, strict=True)):
        problem = problems[i]
        steps = problem.solution.rsplit(" ", 1)[0]
        start = rollout.response_mask.index(True)
        assert rollout.token_ids[:start] == pair.prompt_ids(problem.prompt)
        assert steps not in pair.decode(rollout.token_ids[:start])
        assert steps in pair.decode(read.token_ids[: read.response_mask.index(True)])
        assert read.response_ids == rollout.response_ids
    train = TrainingSet(config, pair, load(config.data.train))
    first, prompts = train.problems[0], train.first_prompts(pair)
    assert first.solution in pair.decode(prompts["teacher"])
    assert first.solution not in pair.decode(prompts["training"])


def test_answers_that_a_privileged_prompt_shows_must_be_there(compose_run: Compose) -> None:
    config = compose_run(
        "pair=self", "pair.teacher.path=package:tiny/teacher", "pair.privileged.template='{prompt} {answer}'"
    )
    pair = load_pair(config.pair, torch.device("cpu"))
    problems = [Problem("a", "1+1?", "2"), Problem("b", "1+2?", "")]
    with pytest.raises(ConfigError, match=r"template needs \{answer\}, which 1 of 2 training problems lack \(b\)"):
        TrainingSet(config, pair, Dataset(problems, "", ""))


@pytest.mark.parametrize("budget", [100_000, 500, 330])
def test_teacher_hidden_states_are_in_the_students_token_order(config: RunConfig, pair: Pair, budget: int) -> None:
    """For any micro-batches, each gives the logits of the teacher's forward pass over that rollout alone."""
    _, rollouts, reads = step_of(config, pair)
    student, teacher = (micro_batches(r, budget, pair.pad_id) for r in (rollouts, reads))
    with torch.no_grad():
        hidden = align_teacher_hidden(student, teacher, [pair.teacher.hidden(batch) for batch in teacher])
        for batch, states in zip(student, hidden, strict=True):
            logits = pair.teacher.head.logits(states)
            expected: list[Tensor] = []
            for rollout, position in zip(batch.rollout.tolist(), batch.position.tolist(), strict=True):
                read = reads[rollout]
                column = read.response_mask.index(True) + position - 1
                expected.append(pair.teacher.module(torch.tensor([read.token_ids])).logits[0, column])
            torch.testing.assert_close(logits, torch.stack(expected), rtol=1e-4, atol=1e-3)


def test_different_responses_fail_an_assertion(config: RunConfig, pair: Pair) -> None:
    _, rollouts, reads = step_of(config, pair)
    reads[0].token_ids[-1] += 1
    student, teacher = (micro_batches(r, 10_000, pair.pad_id) for r in (rollouts, reads))
    hidden = [torch.zeros(batch.num_tokens, 2) for batch in teacher]
    with pytest.raises(AssertionError, match="read the same responses"):
        align_teacher_hidden(student, teacher, hidden)


def test_the_teacher_is_a_frozen_copy_of_the_initial_weights(config: RunConfig, pair: Pair) -> None:
    problems, rollouts, _ = step_of(config, pair)
    before = {name: value.clone() for name, value in pair.teacher.module.state_dict().items()}
    learner = Learner(pair, make_selector(config), config.learner, seed=0, meter=Meter(torch.device("cpu")))
    no_solution = replace(pair, privileged=None)  # teacher and student then read the same prompt: nothing to learn
    equal = learner.step(1, rollouts, Teacher(no_solution, config.learner, learner.meter).hidden(rollouts))
    assert equal.metrics["score/reverse_kl_mean"] == pytest.approx(0.0, abs=1e-6)
    privileged = train_step(learner, rollouts, 2, problems)
    assert privileged.metrics["score/reverse_kl_mean"] > 0.01
    assert all(value.equal(before[name]) for name, value in pair.teacher.module.state_dict().items())
    assert not all(value.equal(before[name]) for name, value in pair.student.module.state_dict().items())


def test_problems_whose_privileged_prompt_is_too_long_are_left_out(config: RunConfig, pair: Pair) -> None:
    train = load(config.data.train)
    lengths = sorted(len(pair.privileged_ids(problem)) for problem in train.problems)
    middle = lengths[len(lengths) // 2]
    assert pair.privileged is not None

    def limited(limit: int) -> Pair:
        privileged = config.pair.privileged
        assert privileged is not None
        changed = config.pair.model_copy(update={"privileged": privileged.model_copy(update={"max_tokens": limit})})
        return load_pair(changed, torch.device("cpu"))

    problems = TrainingSet(config, limited(middle), train).problems
    assert len(problems) == sum(length <= middle for length in lengths) < len(train.problems)
    with pytest.raises(ConfigError, match=r"pair\.privileged\.max_tokens=3 leaves no prompt: the shortest has "):
        TrainingSet(config, limited(3), train)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["pair.privileged.template='{prompt} only'"],
            "pair.privileged.template needs {prompt}, and {solution} or {answer}",
        ),
        (["pair.privileged.max_tokens=16384"], "cannot hold the teacher's input of pair.privileged.max_tokens"),
        (["data=calculator", "eval=calculator", "agent=default"], "tool tasks have no solution text"),
    ],
)
def test_unusable_settings_are_refused(compose_run: Compose, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_run("pair=self", *overrides)
    assert message in str(caught.value)


def test_the_divergence_of_a_rollout_is_to_a_teacher_with_its_own_solution(config: RunConfig, pair: Pair) -> None:
    problems, rollouts, _ = step_of(config, pair)

    def divergences(at_once: int) -> list[float]:
        learner = config.learner.model_copy(update={"prompts_per_step": at_once, "samples_per_prompt": 1})
        return Teacher(pair, learner, Meter(torch.device("cpu"))).sequence_kl(rollouts, problems)

    assert divergences(2) == pytest.approx(divergences(100), rel=1e-4)


def test_the_teacher_reads_prompts_of_evaluation_where_the_student_does(
    config: RunConfig, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """chat.thinking and chat.eval_thinking may differ."""
    problems, rollouts, _ = step_of(config, pair)
    prompt_ids, modes = ChatTokenizer.prompt_ids, set[bool]()

    def recording(self: ChatTokenizer, prompt: str, *, evaluating: bool = False) -> list[int]:
        modes.add(evaluating)
        return prompt_ids(self, prompt, evaluating=evaluating)

    monkeypatch.setattr(ChatTokenizer, "prompt_ids", recording)
    teacher = Teacher(pair, config.learner, Meter(torch.device("cpu")))
    teacher.sequence_kl(rollouts, problems)
    assert modes == {True}
    modes.clear()
    teacher.hidden(rollouts, problems)
    assert modes == {False}


def test_a_run_of_a_few_steps_end_to_end(compose_run: Compose, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    few = ["learner.num_steps=3", "learner.warmup_steps=0", "learner.prompts_per_step=8", "eval.every=0"]
    few += ["eval.samples=0", "eval.teacher=false", "eval.benchmarks.word_sums.num_problems=8", "logger=files"]
    run(compose_run("pair=self", *few), folder)
    rows = read_rows(folder.metrics)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(row["score/reverse_kl_mean"] > 0 for row in rows[1:])
    prompts = json.loads(folder.prompts.read_text())
    assert "A reference solution:" in prompts["teacher"] and "A reference solution:" not in prompts["training"]
    assert "A reference solution:" not in prompts["word_sums"] and folder.result.exists()
