"""Generated ledgers: people pay each other coins, and the worked solution carries every balance forward.

    Ledger: Maldora 12, Tibane 7, Corvil 9. First Maldora pays 3 to Corvil. Second Corvil pays 2 to Tibane.
    How many coins does Corvil have?
    ->  Start. First Maldora pays 3 to Corvil. Maldora 12 - 3 = 9, Corvil 9 + 3 = 12. Now Maldora 9, Corvil 12.
        Second Corvil pays 2 to Tibane. Corvil 12 - 2 = 10, … So Corvil 10. \\boxed{10}

Names are drawn from 4,000, so a model has to read them from the question. `slip` is the probability of a stale balance:
the balance of somebody who paid or got coins before is read from the first line instead of the last change. A model
trained on such solutions is confidently wrong at a lookup, not in arithmetic as in word_sums.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import count, islice, product
from typing import TYPE_CHECKING

from tip_exp.data.dataset import DATA_SEED, Dataset
from tip_exp.data.word_sums import SPLITS, split_of
from tip_exp.types import Problem

if TYPE_CHECKING:
    from tip_exp.config.datasets import LedgerConfig

_FIRST = ("Al", "Bar", "Cor", "Dan", "El", "Fer", "Gal", "Han", "Il", "Jor", "Kal", "Lem", "Mal", "Nor", "Os", "Per")
_FIRST += ("Ros", "Sel", "Tib", "Ver")
_MIDDLE = ("a", "ba", "cu", "do", "e", "fi", "go", "hu", "i", "ka", "la", "me", "ni", "o", "pu", "ra", "se", "ti", "u")
_MIDDLE += ("ve",)
_LAST = ("bel", "dra", "fin", "gor", "lan", "mir", "nos", "ric", "ton", "vas")
NAMES = tuple("".join(parts) for parts in product(_FIRST, _MIDDLE, _LAST))  # 20 x 20 x 10
ORDINALS = ("First", "Second", "Third")
OPENERS = ("Start.", "Begin.", "Solution.", "Read.")
LINKS = ("Now", "Then", "Next", "After")
NUM_PEOPLE, MAX_BALANCE, MAX_PAYMENT = 3, 19, 5
MIN_PAYMENTS, MAX_PAYMENTS = 2, 3  # in a problem; the pair tiny_ledger is trained on these


def load(config: LedgerConfig) -> Dataset:
    """The first `num_problems` of the configured stream."""
    problems = list(islice(stream(config.split, DATA_SEED), config.num_problems))
    return Dataset.generated(problems, f"ledger, seed {DATA_SEED}")


def _draw(rng: random.Random, slip: float) -> tuple[str, str, int]:
    """Question, worked solution (wrong from the first slip on) and the right answer."""
    people = rng.sample(NAMES, NUM_PEOPLE)
    first = {name: rng.randint(5, 14) for name in people}
    right, written = dict(first), dict(first)
    question = ["Ledger: " + ", ".join(f"{name} {balance}" for name, balance in first.items()) + "."]
    solution = [rng.choice(OPENERS)]
    for ordinal in ORDINALS[: rng.randint(MIN_PAYMENTS, MAX_PAYMENTS)]:
        pairs = [(a, b) for a in people for b in people if a != b and right[a] > 0 and right[b] < MAX_BALANCE]
        payer, payee = rng.choice(pairs)
        n = rng.randint(1, min(MAX_PAYMENT, right[payer], MAX_BALANCE - right[payee]))
        right[payer], right[payee] = right[payer] - n, right[payee] + n
        sentence = f"{ordinal} {payer} pays {n} to {payee}."
        stale = {name: first[name] if rng.random() < slip else written[name] for name in (payer, payee)}
        written[payer] = max(0, stale[payer] - n)
        written[payee] = min(MAX_BALANCE, stale[payee] + n)
        question.append(sentence)
        solution.append(
            f"{sentence} {payer} {stale[payer]} - {n} = {written[payer]}, {payee} {stale[payee]} + {n} = "
            f"{written[payee]}. {rng.choice(LINKS)} {payer} {written[payer]}, {payee} {written[payee]}."
        )
    asked = rng.choice(people)
    question.append(f"How many coins does {asked} have?")
    solution.append(f"So {asked} {written[asked]}. \\boxed{{{written[asked]}}}")
    return " ".join(question), " ".join(solution), right[asked]


def stream(split: str, seed: int, *, slip: float = 0.0) -> Iterator[Problem]:
    """Endless problems of one split, a function of the seed. `answer` is right whatever `slip` is."""
    if split not in SPLITS:
        raise ValueError(f"ledger has the splits {', '.join(SPLITS)}; got {split!r}")
    rng = random.Random(f"ledger/{split}/{seed}")
    numbers = count()
    while True:
        question, solution, answer = _draw(rng, slip)
        if split_of(question) == split:
            yield Problem(f"ledger/{split}/{next(numbers)}", question, str(answer), solution)
