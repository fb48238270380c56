"""Is a test problem in the training set? By its whole text, and by 13 words in a row, as it is commonly checked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tip_exp.types import Problem

NGRAM = 13  # Brown et al. 2020 (GPT-3), App. C
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True, slots=True)
class Overlap:
    """Ids of test problems that are in the training set word for word, and of those that share an n-gram with it."""

    exact: list[str]
    ngram: list[str]


def overlap(train: Iterable[Problem], test: Iterable[Problem], suffix: str = "") -> Overlap:
    """Compare on lower-cased words and signs; `suffix` is an instruction at the end of every prompt, left out."""
    whole: set[tuple[str, ...]] = set()
    grams: set[int] = set()
    for problem in train:
        words = _words(problem.prompt, suffix)
        whole.add(words)
        grams.update(_ngrams(words))
    exact, ngram = [], []
    for problem in test:
        words = _words(problem.prompt, suffix)
        if words in whole:
            exact.append(problem.id)
        elif any(gram in grams for gram in _ngrams(words)):
            ngram.append(problem.id)
    return Overlap(exact, ngram)


def _words(text: str, suffix: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.removesuffix(suffix).lower()))


def _ngrams(words: tuple[str, ...]) -> Iterator[int]:
    """Hashes of the n-grams, for a training set has millions."""
    return (hash(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1))
