"""The problems that a run trains on, in the order in which its steps read them."""

from __future__ import annotations

from tip_exp.config.schema import RunConfig
from tip_exp.data.dataset import Dataset, ShuffledOrder
from tip_exp.data.prompts import prompt_ids
from tip_exp.models.pair import ChatTokenizer
from tip_exp.types import Problem
from tip_exp.utils.errors import ConfigError


class TrainingSet:
    """The training problems whose prompts are within the limits, drawn in shuffled epochs."""

    def __init__(self, config: RunConfig, tokenizer: ChatTokenizer, dataset: Dataset) -> None:
        """Render the prompts; a ConfigError if none is left."""
        rendered = list(zip(dataset.problems, prompt_ids(tokenizer, dataset, config.agent), strict=True))
        limit = config.data.max_prompt_tokens
        fitting = [(problem, ids) for problem, ids in rendered if len(ids) <= limit]
        if not fitting:
            shortest = min(len(ids) for _, ids in rendered)
            raise ConfigError(f"data.max_prompt_tokens={limit} leaves no prompt: the shortest has {shortest} tokens")
        if left_out := len(rendered) - len(fitting):
            print(f"data.max_prompt_tokens={limit} leaves out {left_out} of {len(rendered)} training problems")
        if tokenizer.privileged is not None:
            limit = tokenizer.privileged.max_tokens
            rendered = fitting
            fitting = [(problem, ids) for problem, ids in rendered if len(tokenizer.privileged_ids(problem)) <= limit]
            if not fitting:
                raise ConfigError(
                    f"pair.privileged.max_tokens={limit} leaves no problem: every privileged prompt is longer"
                )
            if left_out := len(rendered) - len(fitting):
                print(f"pair.privileged.max_tokens={limit} leaves out {left_out} of {len(rendered)} training problems")
        self.problems = [problem for problem, _ in fitting]
        self.prompts = [ids for _, ids in fitting]
        self._order, self._learner = ShuffledOrder(len(fitting), config.seed), config.learner

    def batch(self, step: int) -> tuple[list[list[int]], list[Problem]]:
        """Prompts of step `step` (from 1), and the problem of each of their rollouts (prompt-major)."""
        indices = self._order.batch(step, self._learner.prompts_per_step)
        problems = [self.problems[i] for i in indices for _ in range(self._learner.samples_per_prompt)]
        return [self.prompts[i] for i in indices], problems

    def first_prompts(self, tokenizer: ChatTokenizer) -> dict[str, list[int]]:
        """The first problem as the student reads it, and as the teacher does where that differs."""
        privileged = {} if tokenizer.privileged is None else {"teacher": tokenizer.privileged_ids(self.problems[0])}
        return {"training": self.prompts[0]} | privileged
