"""The problems that a run trains on, in the order in which its steps read them."""

from __future__ import annotations

from collections.abc import Callable

from tip_exp.config.schema import RunConfig
from tip_exp.data.dataset import Dataset, ShuffledOrder
from tip_exp.data.prompts import prompt_ids
from tip_exp.models.pair import ChatTokenizer
from tip_exp.types import Problem
from tip_exp.utils.errors import ConfigError

Rendered = tuple[Problem, list[int]]  # a problem and its prompt's ids


class TrainingSet:
    """The training problems whose prompts are within the limits, drawn in shuffled epochs."""

    def __init__(self, config: RunConfig, tokenizer: ChatTokenizer, dataset: Dataset) -> None:
        """Render the prompts; a ConfigError if none is left, or if a privileged prompt shows an absent answer."""
        rendered = list(zip(dataset.problems, prompt_ids(tokenizer, dataset), strict=True))
        rendered = _within("data.max_prompt_tokens", config.data.max_prompt_tokens, rendered, lambda row: len(row[1]))
        if (privileged := tokenizer.privileged) is not None:
            without = [problem.id for problem in dataset.problems if not problem.answer]
            if without and "{answer}" in privileged.template:
                raise ConfigError(
                    f"pair.privileged.template needs {{answer}}, which {len(without)} of {len(dataset.problems)} "
                    f"training problems lack ({without[0]}); add them, or set data.train.fields.answer to their field"
                )
            rendered = _within(
                "pair.privileged.max_tokens",
                privileged.max_tokens,
                rendered,
                lambda row: len(tokenizer.privileged_ids(row[0])),
            )
        self.problems = [problem for problem, _ in rendered]
        self.prompts = [ids for _, ids in rendered]
        self._order, self._learner = ShuffledOrder(len(rendered), config.seed), config.learner

    def batch(self, step: int) -> tuple[list[list[int]], list[Problem]]:
        """Prompts of step `step` (from 1), and the problem of each of their rollouts (prompt-major)."""
        indices = self._order.batch(step, self._learner.prompts_per_step)
        problems = [self.problems[i] for i in indices for _ in range(self._learner.samples_per_prompt)]
        return [self.prompts[i] for i in indices], problems

    def first_prompts(self, tokenizer: ChatTokenizer) -> dict[str, list[int]]:
        """The first problem as the student reads it, and as the teacher does where that differs."""
        privileged = {} if tokenizer.privileged is None else {"teacher": tokenizer.privileged_ids(self.problems[0])}
        return {"training": self.prompts[0]} | privileged


def _within(key: str, limit: int, rendered: list[Rendered], length_of: Callable[[Rendered], int]) -> list[Rendered]:
    """The problems whose prompts have at most `limit` tokens, and a line for the terminal if that leaves some out."""
    lengths = [length_of(row) for row in rendered]
    fitting = [row for row, length in zip(rendered, lengths, strict=True) if length <= limit]
    if not fitting:
        raise ConfigError(f"{key}={limit} leaves no prompt: the shortest has {min(lengths)} tokens")
    if left_out := len(rendered) - len(fitting):
        print(f"{key}={limit} leaves out {left_out} of {len(rendered)} training problems")
    return fitting
