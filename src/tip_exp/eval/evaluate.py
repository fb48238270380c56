"""Evaluation of a sampler on the benchmarks of a run: sample k responses a problem, grade them, one row a response."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from tip_exp.config.datasets import TOOL_TASKS
from tip_exp.config.schema import AgentConfig, EvalConfig
from tip_exp.data.dataset import Dataset
from tip_exp.data.prompts import prompt_ids, with_tools
from tip_exp.envs.episodes import Episode
from tip_exp.envs.sampler import EpisodeSampler
from tip_exp.eval.metrics import Graded, repetition_rate, summarize, summarize_episodes, summarize_sequence_kl
from tip_exp.grading import GradeAll, boxed, open_grader, string_match
from tip_exp.models.pair import ChatTokenizer
from tip_exp.records.metrics import EVAL, GREEDY, NO_TOOL_BASELINE, SEQ_KL, TEACHER, mean_at, standard_error_of
from tip_exp.records.writer import RunLogger
from tip_exp.types import Problem, Rollout, Sampler, Sampling
from tip_exp.utils.errors import ConfigError

# Reverse KL summed over each response, nats, of rollouts and their problems.
SequenceKl = Callable[[list[Rollout], list[Problem]], list[float]]


@dataclass(frozen=True, slots=True)
class _Sampled:
    """The responses to a benchmark, prompt-major."""

    benchmark: str
    protocol: str  # "sampled" or "greedy"
    samples: int  # of each problem
    rollouts: list[Rollout]
    episodes: list[Episode]  # of tool tasks
    kl: list[float]  # reverse KL summed over each response; [] if it was not measured


class Evaluations:
    """The benchmarks of a run: prompts rendered once, evaluated for the teacher and, at some steps, the student."""

    def __init__(
        self,
        config: EvalConfig,
        datasets: dict[str, Dataset],
        tokenizer: ChatTokenizer,
        agent: AgentConfig | None,
        *,
        grades: bool = True,
    ) -> None:
        """`grades`: False on all ranks but the main one, which sample their share and return no metrics."""
        for name, dataset in datasets.items():
            if len(dataset.problems) < 2:
                raise ConfigError(
                    f"eval.benchmarks.{name}: a standard error needs at least 2 problems; {dataset.source} has "
                    f"{len(dataset.problems)}"
                )
            if getattr(config.benchmarks[name], "grader", None) == "boxed_integer":
                for problem in dataset.problems:
                    if not boxed.is_integer(problem.answer):
                        raise ConfigError(
                            f"eval.benchmarks.{name}.grader=boxed_integer needs whole numbers as answers; {problem.id} "
                            f"has {problem.answer[:80]!r}; choose grader=math"
                        )
        self._config, self._datasets, self._tokenizer, self._agent = config, datasets, tokenizer, agent
        self._grades = grades
        self._prompts = {name: prompt_ids(tokenizer, dataset, evaluating=True) for name, dataset in datasets.items()}

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt together with the longest response allowed."""
        return max(len(ids) for prompts in self._prompts.values() for ids in prompts) + self._config.max_tokens

    def longest_privileged(self) -> int:
        """Tokens of the longest prompt of a privileged teacher together with the longest response; 0 without one."""
        if self._tokenizer.privileged is None:
            return 0
        problems = [problem for dataset in self._datasets.values() for problem in dataset.problems]
        prompts = (self._tokenizer.privileged_ids(problem, evaluating=True) for problem in problems)
        return max(map(len, prompts)) + self._config.max_tokens

    def __call__(
        self, sampler: Sampler, logger: RunLogger, *, model: str, step: int, sequence_kl: SequenceKl | None = None
    ) -> dict[str, float]:
        """{"eval/word_sums/mean@4": …}, or "teacher/…" if `model` is "teacher". Graded rows go to eval.jsonl.

        `sequence_kl` measures the sampled responses. All responses are sampled before any is graded, so that the other
        ranks wait for the main rank's grading only once.
        """
        sampled: list[_Sampled] = []
        for name, dataset in self._datasets.items():
            for protocol, sampling in self._protocols().items():
                generator = with_tools(sampler, self._tokenizer, dataset, self._agent, evaluating=True)
                rollouts = generator.generate(self._prompts[name], sampling, self._config.seed)
                episodes = generator.last if isinstance(generator, EpisodeSampler) else []
                if episodes:  # whole; the generator's rollouts are truncated to agent.max_train_tokens
                    rollouts = [episode.rollout for episode in episodes]
                kl: list[float] = []
                if sequence_kl is not None and protocol == "sampled":
                    problems = [problem for problem in dataset.problems for _ in range(sampling.samples)]
                    kl = sequence_kl(rollouts, problems)
                if self._grades:
                    sampled.append(_Sampled(name, protocol, sampling.samples, rollouts, episodes, kl))
        metrics: dict[str, float] = {}
        stage = EVAL if model == "student" else TEACHER
        for responses in sampled:
            rows, summary = self._grade(responses)
            if responses.kl:
                rows = [row | {SEQ_KL: value} for row, value in zip(rows, responses.kl, strict=True)]
                summary |= summarize_sequence_kl(responses.kl, responses.samples)
            logger.eval_rows(step, model, responses.benchmark, [row | {"protocol": responses.protocol} for row in rows])
            summary = summary if responses.protocol == "sampled" else _greedy_accuracy(summary)
            metrics |= {f"{stage}{responses.benchmark}/{key}": value for key, value in summary.items()}
        return metrics

    def first_prompts(self) -> dict[str, list[int]]:
        """The first prompt of each benchmark."""
        return {name: prompts[0] for name, prompts in self._prompts.items()}

    def _protocols(self) -> dict[str, Sampling]:
        c = self._config
        protocols = {"sampled": Sampling(c.samples, c.temperature, c.top_p, c.top_k, c.max_tokens)} if c.samples else {}
        return protocols | ({"greedy": Sampling(1, 0.0, 1.0, 0, c.max_tokens)} if c.greedy else {})

    def _grade(self, sampled: _Sampled) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """One row for each response, prompt-major, and their summary."""
        benchmark, dataset = self._config.benchmarks[sampled.benchmark], self._datasets[sampled.benchmark]
        if dataset.tools is not None:
            return grade_episodes(sampled.episodes, dataset, sampled.samples)
        assert not isinstance(benchmark, TOOL_TASKS), "their data sets have tools"
        texts = [self._tokenizer.decode(rollout.response_ids) for rollout in sampled.rollouts]
        with open_grader(benchmark.grader, workers=max(1, len(texts) // 8)) as grader:  # a worker takes time to start
            graded = grade(dataset.problems, sampled.rollouts, texts, grader.grade_all)
            summary = summarize(graded, grader.group_all)
        responses = [response for by_problem in graded for response in by_problem]
        if warning := ungraded_warning(sampled.benchmark, responses):
            print(warning)
        return [asdict(response) for response in responses], summary


def ungraded_warning(benchmark: str, responses: list[Graded]) -> str:
    """A line for the terminal if responses count as wrong only because their comparison had no result; else ""."""
    rules = Counter(response.rule for response in responses if response.ungraded)
    counts = ", ".join(f"{count} {rule}" for rule, count in rules.most_common())
    return counts and (
        f"warning: {benchmark}: {rules.total()} of {len(responses)} responses could not be compared with the answer "
        f"and count as wrong ({counts}); `rule` in eval.jsonl says which"
    )


def _greedy_accuracy(summary: dict[str, float]) -> dict[str, float]:
    """Accuracy of the greedy response with its standard error, under their own names; no other metric of it."""
    accuracy = {GREEDY: summary[mean_at(1)], standard_error_of(GREEDY): summary[standard_error_of(mean_at(1))]}
    return accuracy | ({NO_TOOL_BASELINE: summary[NO_TOOL_BASELINE]} if NO_TOOL_BASELINE in summary else {})


def grade_episodes(
    episodes: list[Episode], dataset: Dataset, samples: int
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """One row for each of the `samples` episodes of each task, which are scored already, and their summary."""
    assert dataset.tools is not None, "only tool tasks have episodes"
    rows = [
        {
            "problem_id": dataset.problems[i // samples].id,
            "sample": i % samples,
            "text": episode.text,
            "right": episode.main_score,  # a fraction: mean@k averages it
            **episode.score,
            "turns": episode.turns,
            "calls": episode.calls,
            "stop": episode.stop,
            "num_tokens": episode.rollout.num_response_tokens,
        }
        for i, episode in enumerate(episodes)
    ]
    by_task = [episodes[i : i + samples] for i in range(0, len(episodes), samples)]
    return rows, summarize_episodes(by_task, dataset.tools.no_tool_baseline)


def grade(
    problems: list[Problem], rollouts: list[Rollout], texts: list[str], grade_all: GradeAll
) -> list[list[Graded]]:
    """The graded responses by problem; `rollouts` and their `texts` have equally many of each problem, in order."""
    samples = len(rollouts) // len(problems)
    repeated = [problem for problem in problems for _ in range(samples)]
    verdicts = grade_all((text, problem.answer) for text, problem in zip(texts, repeated, strict=True))
    graded = [
        Graded(
            problem_id=problem.id,
            sample=i % samples,
            answer=problem.answer,
            text=text,
            right=verdict.right,
            extracted=verdict.extracted,
            rule=verdict.rule,
            strict_right=string_match.grade(text, problem.answer).right,
            truncated=rollout.truncated,
            num_tokens=rollout.num_response_tokens,
            repetition=repetition_rate(rollout.response_ids),
        )
        for i, (problem, rollout, text, verdict) in enumerate(zip(repeated, rollouts, texts, verdicts, strict=True))
    ]
    return [graded[i : i + samples] for i in range(0, len(graded), samples)]
