"""Accuracy with its uncertainty: sample k responses a problem, grade each, one row a response."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tip_exp.data.load import load
from tip_exp.data.prompts import prompt_ids, with_tools
from tip_exp.eval.episodes import evaluate_episodes
from tip_exp.eval.metrics import Graded, summarize
from tip_exp.grading import GradeAll, Verdict, open_grader, string_match
from tip_exp.records.metrics import NO_TOOL_BASELINE
from tip_exp.types import Problem, Rollout, Sampler, Sampling

if TYPE_CHECKING:
    from tip_exp.config.schema import AgentConfig, EvalConfig
    from tip_exp.models.pair import Pair
    from tip_exp.records.meter import Meter
    from tip_exp.records.writer import RunLogger


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
            player = with_tools(sampler, self._pair, loaded, self._agent, evaluating=True)
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
        return greedy | ({NO_TOOL_BASELINE: summary[NO_TOOL_BASELINE]} if NO_TOOL_BASELINE in summary else {})
    return summary


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


def _graded(problem: Problem, sample: int, rollout: Rollout, text: str, verdict: Verdict) -> Graded:
    return Graded(
        problem_id=problem.id,
        sample=sample,
        answer=problem.answer,
        text=text,
        right=verdict.right,
        extracted=verdict.extracted,
        rule=verdict.rule,
        strict_right=string_match.grade(text, problem.answer).right,
        truncated=rollout.truncated,
        num_tokens=rollout.num_response_tokens,
    )
