"""Generated running-total word problems with worked steps.

    Max has 25 eggs. He gives 5. He finds 9. How many eggs?  ->  Begin at 25. Next 25-5=20. Now 20+9=29. \\boxed{29}

Opener and link words are drawn at random, so those tokens have high entropy and no teacher-student divergence.
`slip` is the probability of a subtraction error where a subtraction has to borrow. A model trained on such solutions is
confidently wrong there: low entropy, high divergence.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from tip_exp.data import generated
from tip_exp.types import Problem

NAMES = ("Tom", "Amy", "Ben", "Eva", "Max", "Zoe", "Leo", "Mia")
ITEMS = ("apples", "books", "coins", "cards", "pens", "eggs", "cups", "stamps")
GAINS = ("buys", "finds", "gets", "wins")
LOSSES = ("gives", "loses", "sells", "uses")
OPENERS = ("We start with {}.", "Start: {}.", "First there are {}.", "Begin at {}.")
LINKS = ("Then", "Next", "So", "Now")
MAX_TOTAL = 39
MIN_STEPS, MAX_STEPS = 2, 5  # additions and subtractions in a problem; the embedded pair was trained on these


def subtract_with_slip(total: int, n: int) -> int:
    """Column subtraction without borrowing: 42 - 7 -> 45, as |2 - 7| = 5."""
    tens, units = divmod(total, 10)
    return tens * 10 + abs(units - n)


def _draw(rng: random.Random, slip: float) -> tuple[str, str, int]:
    """Question, worked solution (wrong from the first slip on) and the right answer."""
    item = rng.choice(ITEMS)
    total = written = rng.randint(5, 25)  # the right total; the total in the worked solution
    question = [f"{rng.choice(NAMES)} has {total} {item}."]
    solution = [rng.choice(OPENERS).format(total)]
    for _ in range(rng.randint(MIN_STEPS, MAX_STEPS)):
        n = rng.randint(2, 9)
        gain = rng.random() < 0.5
        gain = (gain and total + n <= MAX_TOTAL) or total - n < 0
        question.append(f"He {rng.choice(GAINS if gain else LOSSES)} {n}.")
        total = total + n if gain else total - n
        if gain:
            result = written + n
        elif written % 10 < n and rng.random() < slip:
            result = subtract_with_slip(written, n)
        else:
            result = max(0, written - n)
        solution.append(f"{rng.choice(LINKS)} {written}{'+' if gain else '-'}{n}={result}.")
        written = result
    question.append(f"How many {item}?")
    solution.append(f"\\boxed{{{written}}}")
    return " ".join(question), " ".join(solution), total


def stream(split: str, seed: int, *, slip: float = 0.0) -> Iterator[Problem]:
    """Endless problems of one split, a function of the seed. `answer` is right whatever `slip` is."""
    return generated.stream("word_sums", lambda rng: _draw(rng, slip), split, seed)
