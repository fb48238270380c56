"""Ledgers: answers follow from the question, steps are right, and only lookups of a changed balance slip."""

from __future__ import annotations

import re
from itertools import islice, pairwise

import pytest

from tip_exp.data import ledger
from tip_exp.data.generated import SPLITS
from tip_exp.data.ledger import stream

STEP = re.compile(r"([A-C]) has (\d+) ([+-]) (\d+) = (\d+)")
PAYMENT = re.compile(r"([A-C]) pays (\d+) to \w+ ([A-C])\.")


def balances_of(line: str) -> dict[str, int]:
    """Of a list such as "Maldora A 12, Tibane B 7, Corvil C 9", by the letters of the accounts."""
    return {letter: int(balance) for _, letter, balance in (part.split() for part in line.split(", "))}


def first_balances(question: str) -> dict[str, int]:
    return balances_of(question.partition(".")[0].removeprefix("Ledger: "))


def test_names_are_different_words() -> None:
    assert len(set(ledger.NAMES)) == 4000 and all(name.isalpha() and name.istitle() for name in ledger.NAMES)


def test_answers_follow_from_the_question() -> None:
    for problem in islice(stream("train", seed=0), 300):
        balances = first_balances(problem.prompt)
        for payer, amount, payee in PAYMENT.findall(problem.prompt):
            balances[payer] -= int(amount)
            balances[payee] += int(amount)
            assert balances[payer] >= 0 and balances[payee] <= ledger.MAX_BALANCE
        asked = re.findall(r"does (\w+ [A-C]) have", problem.prompt)[0]
        assert int(problem.answer) == balances[asked[-1]]
        assert problem.solution.endswith(f"So {asked} {problem.answer}. \\boxed{{{problem.answer}}}")


def test_a_worked_solution_carries_every_balance_forward() -> None:
    for problem in islice(stream("test", seed=1), 200):
        balances = first_balances(problem.prompt)
        owners = re.findall(r"(\w+ [A-C]) \d+", problem.prompt)
        payments = PAYMENT.findall(problem.prompt)
        assert len(payments) in (2, 3) and len(STEP.findall(problem.solution)) == 2 * len(payments)
        assert PAYMENT.findall(problem.solution) == payments
        lines = re.split(rf"(?:{'|'.join(ledger.LINKS)}) (?=\w+ [A-C] \d)", problem.solution)
        for before_recap, recap in pairwise(lines):
            for letter, before, sign, amount, after in STEP.findall(before_recap):
                assert int(before) == balances[letter]
                balances[letter] = int(after)
                assert int(after) == int(before) + (int(amount) if sign == "+" else -int(amount))
            assert balances_of(recap.partition(".")[0]) == balances
            assert re.findall(r"(\w+ [A-C]) \d+", recap.partition(".")[0]) == owners
        assert len(lines) == len(payments) + 1


def test_slips_are_stale_balances_at_their_rate() -> None:
    """80 % of the lookups of a changed balance give the one of the first line; the arithmetic after it is right."""
    changed = stale = 0
    for problem in islice(stream("train", seed=0, slip=0.8), 1000):
        first = first_balances(problem.prompt)
        balances = dict(first)
        for name, before, sign, amount, after in STEP.findall(problem.solution):
            if balances[name] == first[name]:
                assert int(before) == first[name]
            else:
                changed += 1
                stale += int(before) == first[name]
                assert int(before) in (first[name], balances[name])
            right = int(before) + (int(amount) if sign == "+" else -int(amount))
            assert int(after) == min(ledger.MAX_BALANCE, max(0, right))
            balances[name] = int(after)
    assert changed > 1000 and abs(stale / changed - 0.8) < 0.03


def test_splits_are_disjoint_and_a_function_of_the_seed() -> None:
    questions = {split: {p.prompt for p in islice(stream(split, seed=0), 300)} for split in SPLITS}
    assert sum(map(len, questions.values())) == len(set().union(*questions.values())) == 900
    assert list(islice(stream("train", 3), 20)) == list(islice(stream("train", 3), 20))
    with pytest.raises(ValueError, match="ledger has the splits train, validation, test; got 'dev'"):
        next(stream("dev", 0))
