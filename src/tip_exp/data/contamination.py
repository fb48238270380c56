"""Test problems that also occur in the training set: by their whole text, or by most of their 13-grams of words.

Prompts are compared in lower case, without `$`, `\\(` and the other delimiters of formulas: whole texts with their
punctuation (3 + 4 is not 3 - 4), n-grams of words and numbers alone, since the `{` and `,` of formulas would make
almost any two formulas overlap. One shared n-gram is mostly a stock phrase, so half of a problem's n-grams must occur.
Chinese has no spaces, so each of its characters is a word. Kana and Hangul make words of many characters: Japanese has
Chinese characters between them, Korean has spaces.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from tip_exp.config.datasets import TravelConfig
from tip_exp.config.schema import RunConfig
from tip_exp.data.dataset import Dataset
from tip_exp.types import Problem

NGRAM = 13  # Brown et al. 2020 (GPT-3), App. C
BOILERPLATE = 10
"""An n-gram of more training problems than this is a common phrase, such as "m and n are relatively prime"."""

_CHINESE = "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_CHINESE}]|[^\W{_CHINESE}]+")
_TOKEN = re.compile(rf"{_WORD.pattern}|[^\w\s]")
_DELIMITER = re.compile(r"\$+|\\[()\[\]]")  # of formulas


@dataclass(frozen=True, slots=True)
class Overlap:
    """Ids of test problems: `exact` have the text of a training problem, of `ngram` half of the n-grams occur."""

    exact: list[str]
    ngram: list[str]

    def warning(self, benchmark: str, num_problems: int) -> str:
        """A line for the terminal; "" without overlap."""
        counts = {"word for word": len(self.exact), f"by most of their {NGRAM}-grams": len(self.ngram)}
        if not any(counts.values()):
            return ""
        counted = " and ".join(f"{count} {how}" for how, count in counts.items() if count)
        return (
            f"warning: the training set holds problems of {benchmark}: {counted}, of {num_problems} "
            f"(ids: datasets.{benchmark}.in_train_… in result.json)"
        )


def texts_of(problems: Iterable[Problem], suffix: str = "") -> Iterator[tuple[str, str]]:
    """(id, text to be compared) of problems whose prompts end with `suffix`, which is left out."""
    for problem in problems:
        yield problem.id, _DELIMITER.sub(" ", problem.prompt.removesuffix(suffix)).lower()


def overlaps(train: Iterable[tuple[str, str]], tests: dict[str, list[tuple[str, str]]]) -> dict[str, Overlap]:
    """The problems of each benchmark that the training set holds; both as `texts_of` gives them.

    An n-gram of more than BOILERPLATE training problems does not count. Only what the benchmarks have is stored.
    """
    rows = [row for test in tests.values() for row in test]
    sought = {_whole(text) for _, text in rows}
    num_problems = dict.fromkeys((gram for _, text in rows for gram in _ngrams(text)), 0)  # of the training set
    held: set[tuple[str, ...]] = set()
    for _, text in train:
        held |= {_whole(text)} & sought
        for gram in _ngrams(text) & num_problems.keys():
            num_problems[gram] += 1

    def overlap(test: list[tuple[str, str]]) -> Overlap:
        exact, ngram = [], []
        for problem_id, text in test:
            grams = _ngrams(text)
            if _whole(text) in held:
                exact.append(problem_id)
            elif grams and sum(0 < num_problems[gram] <= BOILERPLATE for gram in grams) >= len(grams) / 2:
                ngram.append(problem_id)
        return Overlap(exact, ngram)

    return {name: overlap(test) for name, test in tests.items()}


def _whole(text: str) -> tuple[str, ...]:
    return tuple(_TOKEN.findall(text))


def _ngrams(text: str) -> set[int]:
    """Hashes, which take less memory than tuples."""
    words = tuple(_WORD.findall(text))
    return {hash(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)}


def describe_data(config: RunConfig, train: Dataset | None, tests: dict[str, Dataset]) -> dict[str, Any]:
    """For result.json: source, hash and size of each data set, and the test problems that the training set holds.

    The last are also printed, one line per benchmark. Travel tasks are not compared: a task's tables, which no other
    task has, decide its answers, and a query of the same words in another world is another problem.
    """
    described: dict[str, Any] = {
        name: {"source": dataset.source, "sha256": dataset.sha256, "rows": len(dataset.problems)}
        for name, dataset in (tests | ({"train": train} if train else {})).items()
    }
    if train is None:
        return described
    texts = {
        name: list(texts_of(test.problems, getattr(benchmark, "suffix", "")))
        for name, test in tests.items()
        if not isinstance(benchmark := config.eval.benchmarks.get(name), TravelConfig)
    }
    train_texts = texts_of(train.problems, getattr(config.data.train, "suffix", ""))
    for name, leaked in overlaps(train_texts, texts).items():
        described[name] |= {"in_train_exact": leaked.exact, "in_train_13gram": leaked.ngram}
        if warning := leaked.warning(name, len(texts[name])):
            print(warning)
    return described
