"""Evaluation: sampled responses are matched with their problems and graded."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from tip_exp.config.schema import RunConfig
from tip_exp.data.dataset import Dataset
from tip_exp.data.load import load
from tip_exp.envs.episodes import Episode
from tip_exp.envs.sampler import EpisodeSampler
from tip_exp.eval import evaluate as module
from tip_exp.eval.evaluate import Evaluations, grade, grade_episodes, ungraded_warning
from tip_exp.grading import boxed, open_grader
from tip_exp.models.pair import Pair
from tip_exp.types import Problem, Rollout, Sampling
from tip_exp.utils.errors import ConfigError


def test_responses_are_graded_against_the_answers_of_their_problems() -> None:
    problems, numbers = [Problem("a", "", "5"), Problem("b", "", "8")], [5, 6, 7, 8]
    rollouts = [Rollout([1, number], [False, True], "stop", []) for number in numbers]
    texts = [f"\\boxed{{{number}}}" for number in numbers]
    by_problem = grade(problems, rollouts, texts, lambda pairs: [boxed.grade(*pair) for pair in pairs])
    assert [[response.right for response in responses] for responses in by_problem] == [[True, False], [False, True]]
    assert [[response.sample for response in responses] for responses in by_problem] == [[0, 1], [0, 1]]
    assert [response.problem_id for responses in by_problem for response in responses] == ["a", "a", "b", "b"]
    responses = by_problem[0]
    assert ungraded_warning("shop", responses) == ""
    failed = [*responses, replace(responses[0], rule="timeout"), replace(responses[0], rule="memory")]
    assert ungraded_warning("shop", failed).startswith(
        "warning: shop: 2 of 4 responses could not be compared with the answer and count as wrong (1 timeout, 1 memory)"
    )


def test_a_benchmark_of_one_problem_is_refused(tiny_config: RunConfig, tiny_pair: Pair) -> None:
    dataset = Dataset([Problem("a", "1+1?", "2")], "shop.jsonl", "")
    with pytest.raises(ConfigError, match=r"eval\.benchmarks\.shop: .* at least 2 problems; shop\.jsonl has 1"):
        Evaluations(tiny_config.eval, {"shop": dataset}, tiny_pair, None)


def test_answers_that_the_grader_cannot_find_right_are_refused(tiny_config: RunConfig, tiny_pair: Pair) -> None:
    dataset = Dataset([Problem("a", "1+1?", "2"), Problem("b", "1/2?", "0.5")], "shop.jsonl", "")
    with pytest.raises(ConfigError, match=r"eval\.benchmarks\.word_sums\.grader=boxed_integer .* b has '0\.5'"):
        Evaluations(tiny_config.eval, {"word_sums": dataset}, tiny_pair, None)


def test_the_sequence_kl_of_sampled_responses_is_in_their_rows_and_in_the_metrics(
    tiny_pair: Pair, compose_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two problems, two samples, KLs 0, 1, 2, 3: a mean of 1.5; the problems' means .5 and 2.5 have an error of 1.

    One worker grades the few responses.
    """
    config = compose_run("eval.samples=2", "eval.benchmarks.word_sums.num_problems=2").eval
    dataset = load(config.benchmarks["word_sums"])
    rows: list[dict[str, Any]] = []
    samplings: list[Sampling] = []

    class Fixed:
        def generate(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[Rollout]:
            samplings.append(sampling)
            repeated = [prompt for prompt in prompts for _ in range(sampling.samples)]
            return [Rollout([*prompt, 50], [False] * len(prompt) + [True], "stop", []) for prompt in repeated]

        def sync(self) -> None: ...
        def close(self) -> None: ...

    class Rows:
        def eval_rows(self, _step: int, _model: str, _benchmark: str, new: list[dict[str, Any]]) -> None:
            rows.extend(new)

    def sequence_kl(rollouts: list[Rollout], problems: list[Problem]) -> list[float]:
        assert [problem.id for problem in problems] == [row.id for row in dataset.problems for _ in range(2)]
        return [float(i) for i in range(len(rollouts))]

    asked: list[int] = []
    monkeypatch.setattr(
        module, "open_grader", lambda name, workers: asked.append(workers) or open_grader(name, workers)
    )
    evaluations = Evaluations(config, {"word_sums": dataset}, tiny_pair, None)
    metrics = evaluations(Fixed(), Rows(), model="student", step=0, sequence_kl=sequence_kl)  # pyright: ignore[reportArgumentType]
    sampled = Sampling(2, config.temperature, config.top_p, config.top_k, config.max_tokens)
    assert asked == [1, 1]
    assert samplings == [sampled, Sampling(1, 0.0, 1.0, 0, config.max_tokens)]
    assert [row["seq_kl"] for row in rows if row["protocol"] == "sampled"] == [0, 1, 2, 3]
    assert not any("seq_kl" in row for row in rows if row["protocol"] == "greedy")
    assert metrics["eval/word_sums/seq_kl"] == 1.5 and metrics["eval/word_sums/seq_kl_se"] == pytest.approx(1.0)
    logs = [math.log(value + 1e-3) for value in (0, 1, 2, 3)]
    assert metrics["eval/word_sums/log_seq_kl"] == pytest.approx(sum(logs) / 4)


def test_longest_sequences_and_first_prompts_are_those_of_all_benchmarks(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of 2, 5, 3 and 1 tokens, for a privileged teacher of 1, 4, 7 and 2; a response has up to 40."""
    prompts = {"a": [[1, 2], [3] * 5], "b": [[4] * 3, [5]]}
    lengths = {"a": (1, 4), "b": (7, 2)}
    monkeypatch.setattr(module, "prompt_ids", lambda _, dataset, *__, **___: prompts[dataset.source])
    datasets = {name: Dataset([Problem("", "", "x" * n) for n in lengths[name]], name, "") for name in prompts}
    config = tiny_config.eval.model_copy(update={"benchmarks": dict.fromkeys(prompts), "max_tokens": 40})

    def made(privileged: object) -> Evaluations:
        tokenizer = SimpleNamespace(privileged=privileged, privileged_ids=lambda problem, **_: list(problem.answer))
        return Evaluations(config, datasets, tokenizer, None)  # pyright: ignore[reportArgumentType]

    assert made(None).first_prompts() == {"a": [1, 2], "b": [4, 4, 4]}
    assert (made(None).longest, made(None).longest_privileged()) == (45, 0)
    assert (made(object()).longest, made(object()).longest_privileged()) == (45, 47)


def test_prompts_and_episodes_are_those_of_an_evaluation(
    tiny_pair: Pair, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pair.chat.eval_thinking` holds for them, not `pair.chat.thinking`."""
    player = EpisodeSampler.__new__(EpisodeSampler)
    player.last = []
    monkeypatch.setattr(player, "generate", lambda *_: [])
    seen: list[bool] = []
    monkeypatch.setattr(module, "prompt_ids", lambda *_, evaluating: seen.append(evaluating) or [[1], [2]])
    monkeypatch.setattr(module, "with_tools", lambda *_, evaluating: seen.append(evaluating) or player)
    monkeypatch.setattr(module, "grade_episodes", lambda *_: ([], {"mean@1": 0.5}))
    dataset = Dataset([Problem("a", "", "1"), Problem("b", "", "2")], "", "", tools=object())  # pyright: ignore[reportArgumentType]
    config = tiny_config.eval.model_copy(update={"greedy": False, "samples": 1})
    rows = SimpleNamespace(eval_rows=lambda *_: None)
    metrics = Evaluations(config, {"word_sums": dataset}, tiny_pair, None)(player, rows, model="student", step=0)  # pyright: ignore[reportArgumentType]
    assert metrics == {"eval/word_sums/mean@1": 0.5} and seen == [True, True]


def test_episodes_are_matched_with_their_tasks() -> None:
    """Two tasks, two episodes each: means 0.3 and 0.9, whose standard error is 0.6 / sqrt(2) / sqrt(2)."""

    def episode(score: float) -> Episode:
        rollout = Rollout([1, 2], [False, True], "stop", [])
        return Episode(rollout, "", 1, calls=0, failed_calls=0, cut_observations=0, stop="final", score={"all": score})

    tools = SimpleNamespace(no_tool_baseline=0.1)
    dataset = Dataset([Problem("a", "", ""), Problem("b", "", "")], "", "", tools=tools)  # pyright: ignore[reportArgumentType]
    rows, metrics = grade_episodes([episode(score) for score in (0.2, 0.4, 0.8, 1.0)], dataset, 2)
    assert [(row["problem_id"], row["sample"], row["right"]) for row in rows] == [
        ("a", 0, 0.2), ("a", 1, 0.4), ("b", 0, 0.8), ("b", 1, 1.0)
    ]  # fmt: skip
    assert (metrics["mean@2"], metrics["mean@2_se"]) == (pytest.approx(0.6), pytest.approx(0.3))
