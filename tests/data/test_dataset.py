"""The order in which a run draws its problems, and the fingerprint of generated data."""

from __future__ import annotations

import hashlib

from tip_exp.data.dataset import Dataset, ShuffledOrder
from tip_exp.types import Problem


def test_an_epoch_holds_every_problem_once_and_needs_no_state() -> None:
    order = ShuffledOrder(num_problems=10, seed=5)
    batches = [order.batch(step, 4) for step in range(1, 6)]  # 20 draws: two epochs
    drawn = [index for batch in batches for index in batch]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]
    assert ShuffledOrder(num_problems=10, seed=5).batch(5, 4) == batches[4]  # as a resumed run draws it
    assert ShuffledOrder(num_problems=10, seed=6).batch(1, 4) != batches[0]


def test_a_batch_may_be_larger_than_two_epochs() -> None:
    drawn = ShuffledOrder(num_problems=3, seed=0).batch(1, 12)
    assert [sorted(drawn[i : i + 3]) for i in range(0, 12, 3)] == [[0, 1, 2]] * 4


def test_the_fingerprint_of_generated_data_covers_prompts_and_answers() -> None:
    problems = [Problem("a", "1+1?", "2"), Problem("b", "2+2?", "4")]
    assert Dataset.generated(problems, "sums").sha256 == hashlib.sha256(b"1+1?\t2\n2+2?\t4").hexdigest()
