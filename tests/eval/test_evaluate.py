"""Evaluation: sampled responses are matched with their problems and graded."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tip_exp.config.schema import RunConfig
from tip_exp.data.dataset import Dataset
from tip_exp.eval.evaluate import Evaluations, evaluate, ungraded_warning
from tip_exp.grading import boxed
from tip_exp.models.pair import Pair
from tip_exp.types import Problem, Rollout, Sampling
from tip_exp.utils.errors import ConfigError


def test_evaluate_matches_responses_to_their_problems() -> None:
    class Echo:
        """Responds with the last prompt id plus the number of the sample."""

        def generate(self, prompts, sampling, seed):
            return [
                Rollout([*p, p[-1] + j], [False] * len(p) + [True], "stop", [])
                for p in prompts
                for j in range(sampling.samples)
            ]

        def sync(self) -> None: ...
        def close(self) -> None: ...

    problems = [Problem("a", "", "5"), Problem("b", "", "8")]
    rollouts, by_problem = evaluate(
        Echo(), problems, [[1, 5], [1, 7]], Sampling(2, 1.0, 1.0, 0, 1), seed=0,
        decode=lambda ids: f"\\boxed{{{ids[0]}}}", grade_all=lambda pairs: [boxed.grade(*pair) for pair in pairs],
    )  # fmt: skip
    assert [[response.right for response in responses] for responses in by_problem] == [[True, False], [False, True]]
    assert [rollout.token_ids[-1] for rollout in rollouts] == [5, 6, 7, 8]
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
