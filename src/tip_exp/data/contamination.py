"""Test problems that also occur in the training set: by their whole text, and by a shared 13-gram of words.

N-grams are of words and numbers alone: the `$`, `{` and `,` of formulas would make almost any two formulas overlap.
Chinese has no spaces, so each of its characters is a word. Kana and Hangul make words of many characters: Japanese has
Chinese characters between them, Korean has spaces.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tip_exp.config.schema import RunConfig
from tip_exp.data.dataset import Dataset
from tip_exp.types import Problem

NGRAM = 13  # Brown et al. 2020 (GPT-3), App. C
BOILERPLATE = 10
"""An n-gram of more training problems than this is a common phrase, such as "m and n are relatively prime"."""

_CHINESE = "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_CHINESE}]|[^\W{_CHINESE}]+")
_TOKEN = re.compile(rf"{_WORD.pattern}|[^\w\s]")


@dataclass(frozen=True, slots=True)
class Overlap:
    """Ids of test problems: `exact` have the text of a training problem, `ngram` only share an n-gram with one."""

    exact: list[str]
    ngram: list[str]

    def warning(self, benchmark: str, num_problems: int) -> str:
        """A line for the terminal; "" without overlap."""
        counts = {"word for word": len(self.exact), f"by a shared {NGRAM}-gram": len(self.ngram)}
        if not any(counts.values()):
            return ""
        counted = " and ".join(f"{count} {how}" for how, count in counts.items() if count)
        return (
            f"warning: the training set holds problems of {benchmark}: {counted}, of {num_problems} "
            f"(ids: datasets.{benchmark}.in_train_… in result.json)"
        )


class TrainingTexts:
    """An index of the training problems, to be compared with test problems.

    Prompts are compared in lower case and without `suffix`, the instruction at their end: whole texts with their
    punctuation (3 + 4 is not 3 - 4), n-grams without. An n-gram of more than BOILERPLATE training problems does not
    count.
    """

    def __init__(self, problems: Iterable[Problem], suffix: str = "") -> None:
        self._texts: set[tuple[str, ...]] = set()
        self._num_problems: Counter[int] = Counter()  # of each n-gram
        for problem in problems:
            text = problem.prompt.removesuffix(suffix).lower()
            self._texts.add(tuple(_TOKEN.findall(text)))
            self._num_problems.update(_ngrams(text))

    def overlap(self, test: Iterable[Problem], suffix: str = "") -> Overlap:
        """The test problems, whose prompts end with `suffix`, that the training set holds."""
        exact, ngram = [], []
        for problem in test:
            text = problem.prompt.removesuffix(suffix).lower()
            if tuple(_TOKEN.findall(text)) in self._texts:
                exact.append(problem.id)
            elif any(0 < self._num_problems[gram] <= BOILERPLATE for gram in _ngrams(text)):
                ngram.append(problem.id)
        return Overlap(exact, ngram)


def _ngrams(text: str) -> set[int]:
    """Hashes instead of tuples: a training set has millions of n-grams."""
    words = tuple(_WORD.findall(text))
    return {hash(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)}


def describe_data(config: RunConfig, train: Dataset | None, tests: dict[str, Dataset]) -> dict[str, Any]:
    """For result.json: source, hash and size of each data set, and the test problems that the training set holds.

    The last are also printed, one line per benchmark.
    """
    described: dict[str, Any] = {
        name: {"source": dataset.source, "sha256": dataset.sha256, "rows": len(dataset.problems)}
        for name, dataset in (tests | ({"train": train} if train else {})).items()
    }
    if train is None:
        return described
    index = TrainingTexts(train.problems, getattr(config.data.train, "suffix", ""))
    for name, test in tests.items():
        leaked = index.overlap(test.problems, getattr(config.eval.benchmarks.get(name), "suffix", ""))
        described[name] |= {"in_train_exact": leaked.exact, "in_train_13gram": leaked.ngram}
        if warning := leaked.warning(name, len(test.problems)):
            print(warning)
    return described
