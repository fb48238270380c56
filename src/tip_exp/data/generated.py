"""Generated problems: an endless stream for each split, which depends on a seed alone."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import TYPE_CHECKING

from tip_exp.data.dataset import Dataset
from tip_exp.types import Problem

if TYPE_CHECKING:
    from tip_exp.config.datasets import GeneratedConfig

DATA_SEED = 0  # of data sets, which are the same in every run
SPLITS = ("train", "validation", "test")


def load(problems: Callable[[str, int], Iterator[Problem]], config: GeneratedConfig) -> Dataset:
    """The first `num_problems` of the stream that `problems` makes for the configured split."""
    first = list(islice(problems(config.split, DATA_SEED), config.num_problems))
    return Dataset.generated(first, f"{config.kind}, seed {DATA_SEED}")


def split_of(question: str) -> str:
    """The split of a question, by a hash of its text: 5 % validation, 5 % test. No question is in two splits."""
    bucket = hashlib.blake2b(question.encode(), digest_size=4).digest()[0] * 100 // 256
    return "validation" if bucket < 5 else "test" if bucket < 10 else "train"


def stream(
    name: str, draw: Callable[[random.Random], tuple[str, str, int]], split: str, seed: int
) -> Iterator[Problem]:
    """Endless problems of one split. `draw` returns a question, its worked solution and the right answer."""
    if split not in SPLITS:
        raise ValueError(f"{name} has the splits {', '.join(SPLITS)}; got {split!r}")
    rng = random.Random(f"{name}/{split}/{seed}")
    numbers = count()
    while True:
        question, solution, answer = draw(rng)
        if split_of(question) == split:
            yield Problem(f"{name}/{split}/{next(numbers)}", question, str(answer), solution)
