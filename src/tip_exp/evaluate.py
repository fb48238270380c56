"""Accuracy with its uncertainty: sample k responses a problem, grade each, one row a response."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tip_exp.agent.sampler import prompt_ids, with_tools
from tip_exp.agent.summary import evaluate_episodes
from tip_exp.data import Problem, load
from tip_exp.grading import GradeAll, Verdict, open_grader, strict
from tip_exp.rollout.types import Rollout, Sampler, Sampling

if TYPE_CHECKING:
    from tip_exp.config import AgentConfig, EvalConfig
    from tip_exp.logger import RunLogger
    from tip_exp.meter import Meter
    from tip_exp.models import Pair


class Evaluations:
    """The benchmarks of a run: rendered once, then asked of the teacher and of the student at some steps."""

    def __init__(
        self, settings: EvalConfig, pair: Pair, meter: Meter, logger: RunLogger, agent: AgentConfig | None
    ) -> None:
        self._settings, self._pair, self._meter, self._logger, self._agent = settings, pair, meter, logger, agent
        self.loaded = {name: load(dataset) for name, dataset in settings.benchmarks.items()}
        self._problems = {name: loaded.problems for name, loaded in self.loaded.items()}
        self._prompts = {name: prompt_ids(pair, loaded, agent, evaluating=True) for name, loaded in self.loaded.items()}

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with the longest response that it may get."""
        return max(len(ids) for prompts in self._prompts.values() for ids in prompts) + self._settings.max_tokens

    def __call__(self, sampler: Sampler, *, model: str, step: int) -> dict[str, float]:
        """{"eval/word_sums/mean@4": …}; of the teacher: {"teacher/word_sums/mean@4": …}. Rows go to eval.jsonl."""
        found: dict[str, float] = {}
        stage = "eval" if model == "student" else model
        with self._meter.span("eval"):
            for name in self._problems:
                for protocol, sampling in self._protocols().items():
                    rows, summary = self._ask(sampler, name, sampling)
                    self._logger.eval_rows(step, model, name, [row | {"protocol": protocol} for row in rows])
                    found |= {f"{stage}/{name}/{key}": value for key, value in _named(protocol, summary).items()}
        return found

    def first_prompts(self) -> dict[str, list[int]]:
        """The first prompt of each benchmark."""
        return {name: prompts[0] for name, prompts in self._prompts.items()}

    def _protocols(self) -> dict[str, Sampling]:
        s = self._settings
        protocols = {"sampled": Sampling(s.samples, s.temperature, s.top_p, s.top_k, s.max_tokens)} if s.samples else {}
        return protocols | ({"greedy": Sampling(1, 0.0, 1.0, 0, s.max_tokens)} if s.greedy else {})

    def _ask(self, sampler: Sampler, name: str, sampling: Sampling) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """A row a response, and their summary."""
        dataset, loaded = self._settings.benchmarks[name], self.loaded[name]
        if loaded.tools is not None:
            player = with_tools(sampler, self._pair, loaded, self._agent)
            return evaluate_episodes(player, loaded, self._prompts[name], sampling, self._settings.seed)
        assert dataset.kind == "table" or dataset.kind == "word_sums", "the others have tools"
        with open_grader(dataset.grader) as grade_all:
            graded = evaluate(
                sampler,
                self._problems[name],
                self._prompts[name],
                sampling,
                seed=self._settings.seed,
                decode=self._pair.decode,
                grade_all=grade_all,
            )
        return [one.row() for of_problem in graded for one in of_problem], summarize(graded)


def _named(protocol: str, summary: dict[str, float]) -> dict[str, float]:
    """Of the greedy response the accuracy alone is of interest: {"greedy": …, "greedy_se": …}."""
    if protocol == "greedy":
        greedy = {"greedy": summary["mean@1"], "greedy_se": summary["mean@1_se"]}
        return greedy | ({"floor": summary["floor"]} if "floor" in summary else {})
    return summary


@dataclass(frozen=True, slots=True)
class Graded:
    """One response to one problem, graded."""

    problem_id: str
    sample: int
    answer: str
    text: str
    right: bool
    extracted: str | None
    rule: str
    strict_right: bool  # what the base code's string comparison says
    truncated: bool
    num_tokens: int

    def row(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    sampler: Sampler,
    problems: list[Problem],
    prompts: list[list[int]],
    sampling: Sampling,
    *,
    seed: int,
    decode: Callable[[list[int]], str],
    grade_all: GradeAll,
) -> list[list[Graded]]:
    """`sampling.samples` graded responses to each problem."""
    rollouts = sampler.generate(prompts, sampling, seed)
    asked = [problem for problem in problems for _ in range(sampling.samples)]
    texts = [decode(rollout.response_ids) for rollout in rollouts]
    verdicts = grade_all((text, problem.answer) for text, problem in zip(texts, asked, strict=True))
    graded = [
        _graded(problem, i % sampling.samples, rollout, text, verdict)
        for i, (problem, rollout, text, verdict) in enumerate(zip(asked, rollouts, texts, verdicts, strict=True))
    ]
    return [graded[i : i + sampling.samples] for i in range(0, len(graded), sampling.samples)]


def summarize(graded: list[list[Graded]]) -> dict[str, float]:
    """mean@k, its standard error over problems, pass@k, maj@k, and how the responses look.

    The problems are what was sampled from the world, so the standard error is over their means: k responses to one
    problem are not k independent items. Needs two problems, for one has no standard error.
    """
    k = len(graded[0])
    right = np.array([[one.right for one in of_problem] for of_problem in graded], dtype=float)
    flat = [one for of_problem in graded for one in of_problem]
    return {
        f"mean@{k}": float(right.mean()),
        f"mean@{k}_se": standard_error(right.mean(axis=1)),
        f"pass@{k}": float(np.mean([pass_at_k(k, int(row.sum()), k) for row in right])),
        f"maj@{k}": float(np.mean([majority_is_right(of_problem) for of_problem in graded])),
        f"strict_mean@{k}": float(np.mean([one.strict_right for one in flat])),
        "strict_agreement": float(np.mean([one.strict_right == one.right for one in flat])),
        "response_len": float(np.mean([one.num_tokens for one in flat])),
        "truncated_frac": float(np.mean([one.truncated for one in flat])),
        "unparsed_frac": float(np.mean([one.extracted is None for one in flat])),
    }


def standard_error(values: np.ndarray) -> float:
    """Standard deviation (n - 1) over the square root of n; n of at least 2."""
    assert len(values) > 1, "the config asks for two problems"
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased chance that k of n responses, drawn without replacement, hold a right one (Chen et al. 2021, Codex)."""
    return 1.0 if n - right < k else 1.0 - math.comb(n - right, k) / math.comb(n, k)


def majority_is_right(of_problem: list[Graded]) -> bool:
    """Is the most frequent extracted answer right? Ties go to the earliest; responses without an answer do not vote."""
    votes = Counter(one.extracted for one in of_problem if one.extracted is not None)
    if not votes:
        return False
    winner = votes.most_common(1)[0][0]  # Counter keeps the order of first appearance among equals
    return next(one.right for one in of_problem if one.extracted == winner)


def _graded(problem: Problem, sample: int, rollout: Rollout, text: str, verdict: Verdict) -> Graded:
    return Graded(
        problem_id=problem.id,
        sample=sample,
        answer=problem.answer,
        text=text,
        right=verdict.right,
        extracted=verdict.extracted,
        rule=verdict.rule,
        strict_right=strict.grade(text, problem.answer).right,
        truncated=rollout.truncated,
        num_tokens=rollout.num_response_tokens,
    )
