"""Test problems that also occur in the training set: by their whole text, and by a shared 13-gram of words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tip_exp.types import Problem

NGRAM = 13  # Brown et al. 2020 (GPT-3), App. C
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True, slots=True)
class Overlap:
    """Ids of test problems: `exact` have the text of a training problem, `ngram` only share an n-gram with one."""

    exact: list[str]
    ngram: list[str]


def overlap(train: Iterable[Problem], test: Iterable[Problem], suffix: str = "") -> Overlap:
    """Compare prompts as lower-case words and punctuation; `suffix`, the instruction ending each prompt, is ignored."""
    train_texts: set[tuple[str, ...]] = set()
    train_ngrams: set[int] = set()
    for problem in train:
        words = _words(problem.prompt, suffix)
        train_texts.add(words)
        train_ngrams.update(_ngrams(words))
    exact, ngram = [], []
    for problem in test:
        words = _words(problem.prompt, suffix)
        if words in train_texts:
            exact.append(problem.id)
        elif any(gram in train_ngrams for gram in _ngrams(words)):
            ngram.append(problem.id)
    return Overlap(exact, ngram)


def _words(text: str, suffix: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.removesuffix(suffix).lower()))


def _ngrams(words: tuple[str, ...]) -> Iterator[int]:
    """Hashes instead of tuples: a training set has millions of n-grams."""
    return (hash(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1))
