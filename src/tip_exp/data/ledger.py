"""Generated ledgers: owners of accounts pay each other coins; the worked solution carries every balance forward.

    Ledger: Maldora A 12, Tibane B 7, Corvil C 9. First Maldora A pays 3 to Corvil C. Second Corvil C pays 2 to
    Tibane B. How many coins does Corvil C have?
    ->  Start. First Maldora A pays 3 to Corvil C. A has 12 - 3 = 9, C has 9 + 3 = 12. Now Maldora A 9, Tibane B 7,
        Corvil C 12. Second Corvil C pays 2 to Tibane B. C has 12 - 2 = 10, ... So Corvil C 10. \\boxed{10}

Names are drawn from 4,000, so a model has to read them from the question; balances are looked up by the letter of an
account. `slip` is the probability of a stale balance: that of an account which paid or got coins before is read from
the first line instead of the last change. A model trained on such solutions is confidently wrong at a lookup, not in
arithmetic as in word_sums.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import product

from tip_exp.data import generated
from tip_exp.types import Problem

_FIRST = ("Al", "Bar", "Cor", "Dan", "El", "Fer", "Gal", "Han", "Il", "Jor", "Kal", "Lem", "Mal", "Nor", "Os", "Per")
_FIRST += ("Ros", "Sel", "Tib", "Ver")
_MIDDLE = ("a", "ba", "cu", "do", "e", "fi", "go", "hu", "i", "ka", "la", "me", "ni", "o", "pu", "ra", "se", "ti", "u")
_MIDDLE += ("ve",)
_LAST = ("bel", "dra", "fin", "gor", "lan", "mir", "nos", "ric", "ton", "vas")
NAMES = tuple("".join(parts) for parts in product(_FIRST, _MIDDLE, _LAST))  # 20 x 20 x 10
ORDINALS = ("First", "Second", "Third")
OPENERS = ("Start.", "Begin.", "Solution.", "Read.")
LINKS = ("Now", "Then", "Next", "After")
LETTERS = ("A", "B", "C")  # of the accounts, in the order of the first line
MAX_BALANCE, MAX_PAYMENT = 19, 5
MIN_PAYMENTS, MAX_PAYMENTS = 2, 3  # in a problem; the pair tiny_ledger is trained on these


def _draw(rng: random.Random, slip: float) -> tuple[str, str, int]:
    """Question, worked solution (wrong from the first slip on) and the right answer."""
    names = rng.sample(NAMES, len(LETTERS))
    owner = {letter: f"{name} {letter}" for letter, name in zip(LETTERS, names, strict=True)}
    first = {letter: rng.randint(5, 14) for letter in LETTERS}
    right, written = dict(first), dict(first)
    question = ["Ledger: " + ", ".join(f"{owner[letter]} {balance}" for letter, balance in first.items()) + "."]
    solution = [rng.choice(OPENERS)]
    for ordinal in ORDINALS[: rng.randint(MIN_PAYMENTS, MAX_PAYMENTS)]:
        pairs = [(a, b) for a in LETTERS for b in LETTERS if a != b and right[a] > 0 and right[b] < MAX_BALANCE]
        payer, payee = rng.choice(pairs)
        n = rng.randint(1, min(MAX_PAYMENT, right[payer], MAX_BALANCE - right[payee]))
        right[payer], right[payee] = right[payer] - n, right[payee] + n
        sentence = f"{ordinal} {owner[payer]} pays {n} to {owner[payee]}."
        stale = {letter: first[letter] if rng.random() < slip else written[letter] for letter in (payer, payee)}
        written[payer] = max(0, stale[payer] - n)
        written[payee] = min(MAX_BALANCE, stale[payee] + n)
        question.append(sentence)
        balances = ", ".join(f"{owner[letter]} {balance}" for letter, balance in written.items())
        solution.append(
            f"{sentence} {payer} has {stale[payer]} - {n} = {written[payer]}, {payee} has {stale[payee]} + {n} = "
            f"{written[payee]}. {rng.choice(LINKS)} {balances}."
        )
    asked = rng.choice(LETTERS)
    question.append(f"How many coins does {owner[asked]} have?")
    solution.append(f"So {owner[asked]} {written[asked]}. \\boxed{{{written[asked]}}}")
    return " ".join(question), " ".join(solution), right[asked]


def stream(split: str, seed: int, *, slip: float = 0.0) -> Iterator[Problem]:
    """Endless problems of one split, a function of the seed. `answer` is right whatever `slip` is."""
    return generated.stream("ledger", lambda rng: _draw(rng, slip), split, seed)
