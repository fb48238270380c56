"""The embedded world: answers are right, splits are disjoint, the slip is where it was planted and nowhere else."""

from __future__ import annotations

import re
from itertools import islice

import pytest

from tip_exp.data import word_sums
from tip_exp.data.dataset import ShuffledOrder
from tip_exp.data.word_sums import GAINS, split_of, stream, subtract_with_slip


def solve(question: str) -> int:
    """An independent reader of the question: start, then each verb's sign and number."""
    total = int(re.findall(r"has (\d+)", question)[0])
    for verb, n in re.findall(r"He (\w+) (\d+)\.", question):
        total += int(n) if verb in GAINS else -int(n)
    return total


def test_answers_are_what_the_question_says() -> None:
    for problem in islice(stream("train", seed=0), 500):
        assert int(problem.answer) == solve(problem.prompt)
        assert problem.solution.endswith(f"\\boxed{{{problem.answer}}}")
        assert 0 <= int(problem.answer) <= word_sums.MAX_TOTAL


def test_every_step_of_a_clean_solution_is_right() -> None:
    for problem in islice(stream("test", seed=1), 200):
        steps = re.findall(r"(\d+)([+-])(\d+)=(\d+)\.", problem.solution)
        assert 2 <= len(steps) <= 5
        for a, sign, b, result in steps:
            assert int(a) + (int(b) if sign == "+" else -int(b)) == int(result)


def test_splits_are_disjoint_by_content() -> None:
    questions = {split: {p.prompt for p in islice(stream(split, seed=0), 2000)} for split in word_sums.SPLITS}
    assert not questions["train"] & questions["test"]
    assert not questions["train"] & questions["validation"]
    assert not questions["validation"] & questions["test"]
    assert all(split_of(question) == split for split, asked in questions.items() for question in asked)


def test_the_same_seed_gives_the_same_problems_and_another_seed_others() -> None:
    first, again, other = (list(islice(stream("train", seed=s), 50)) for s in (3, 3, 4))
    assert first == again
    assert {p.prompt for p in first}.isdisjoint({p.prompt for p in other})


def test_slip_is_only_in_borrowing_subtractions_and_at_its_rate() -> None:
    borrows = slips = 0
    for problem in islice(stream("train", seed=0, slip=0.8), 2000):
        for a, sign, b, result in re.findall(r"(\d+)([+-])(\d+)=(\d+)\.", problem.solution):
            true = int(a) + (int(b) if sign == "+" else -int(b))
            if sign == "-" and int(a) % 10 < int(b):
                borrows += 1
                slips += int(result) != max(0, true)
            else:
                assert int(result) == true
    # 0.8 of the borrows, but a slip on 5 - 8 gives |5 - 8| = 3 where max(0, -3) = 0 would be right
    assert borrows > 1000
    assert 0.77 < slips / borrows < 0.83


def test_slip_arithmetic() -> None:
    assert subtract_with_slip(42, 7) == 45  # |2 - 7| = 5
    assert subtract_with_slip(20, 9) == 29


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="train, validation, test; got 'dev'"):
        next(stream("dev", seed=0))


def test_order_is_epochs_of_every_problem_once_and_needs_no_state() -> None:
    order = ShuffledOrder(num_problems=10, seed=5)
    batches = [order.batch(step, 4) for step in range(1, 6)]  # 20 places: two epochs
    flat = [index for batch in batches for index in batch]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]
    assert ShuffledOrder(num_problems=10, seed=5).batch(5, 4) == batches[4]  # as a resumed run asks
    assert ShuffledOrder(num_problems=10, seed=6).batch(1, 4) != batches[0]
