"""The embedded world: running-total word problems with worked steps, generated from seeds.

    Max has 25 eggs. He gives 5. He finds 9. How many eggs?  ->  Begin at 25. Next 25-5=20. Now 20+9=29. \\boxed{29}

The opener and the link words are drawn at random, so those tokens are truly uncertain (high entropy, no divergence).
`slip` plants a misconception, "the smaller digit from the larger", where a subtraction has to borrow: a model that was
trained on it is confidently wrong there (low entropy, high divergence), which only a teacher can reveal.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator

from tip_exp.types import Problem

NAMES = ("Tom", "Amy", "Ben", "Eva", "Max", "Zoe", "Leo", "Mia")
ITEMS = ("apples", "books", "coins", "cards", "pens", "eggs", "cups", "stamps")
GAINS = ("buys", "finds", "gets", "wins")
LOSSES = ("gives", "loses", "sells", "uses")
OPENERS = ("We start with {}.", "Start: {}.", "First there are {}.", "Begin at {}.")
LINKS = ("Then", "Next", "So", "Now")
MAX_TOTAL = 39
MIN_STEPS, MAX_STEPS = 2, 5  # additions and subtractions in a problem; the embedded pair was trained on these
SPLITS = ("train", "validation", "test")


def split_of(question: str) -> str:
    """The split a question belongs to, by its content alone: 5 % validation, 5 % test, so no question is in two."""
    bucket = hashlib.blake2b(question.encode(), digest_size=4).digest()[0] * 100 // 256
    return "validation" if bucket < 5 else "test" if bucket < 10 else "train"


def subtract_with_slip(total: int, n: int) -> int:
    """Column subtraction by somebody who never borrows: 42 - 7 -> 45, as |2 - 7| = 5."""
    tens, units = divmod(total, 10)
    return tens * 10 + abs(units - n)


def _draw(rng: random.Random, slip: float) -> tuple[str, str, int]:
    """Question, worked solution (wrong wherever a slip happened) and the true answer."""
    item = rng.choice(ITEMS)
    true = believed = rng.randint(5, 25)
    question = [f"{rng.choice(NAMES)} has {true} {item}."]
    solution = [rng.choice(OPENERS).format(true)]
    for _ in range(rng.randint(MIN_STEPS, MAX_STEPS)):
        n = rng.randint(2, 9)
        gain = rng.random() < 0.5
        gain = (gain and true + n <= MAX_TOTAL) or true - n < 0
        question.append(f"He {rng.choice(GAINS if gain else LOSSES)} {n}.")
        true = true + n if gain else true - n
        if gain:
            result = believed + n
        elif believed % 10 < n and rng.random() < slip:
            result = subtract_with_slip(believed, n)
        else:
            result = max(0, believed - n)
        solution.append(f"{rng.choice(LINKS)} {believed}{'+' if gain else '-'}{n}={result}.")
        believed = result
    question.append(f"How many {item}?")
    solution.append(f"\\boxed{{{believed}}}")
    return " ".join(question), " ".join(solution), true


def stream(split: str, seed: int, *, slip: float = 0.0) -> Iterator[Problem]:
    """Endless problems of one split; the same seed gives the same problems. `answer` is always the true one."""
    if split not in SPLITS:
        raise ValueError(f"word_sums has the splits {', '.join(SPLITS)}; got {split!r}")
    rng = random.Random(f"word_sums/{split}/{seed}")
    number = 0
    while True:
        question, solution, answer = _draw(rng, slip)
        if split_of(question) == split:
            yield Problem(f"word_sums/{split}/{number}", question, str(answer), solution)
            number += 1
