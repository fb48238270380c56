from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tip_exp.envs.deepplanning.score.score import PlanScore
from tip_exp.eval.metrics import best_at_k, best_at_k_bootstrap


def test_fraction_and_official_score() -> None:
    score = PlanScore({"train_seat_status": True, "hotel_highest_rated": False, "budget_constraint": True})
    assert (score.passed, score.total) == (2, 3)
    assert score.fraction == pytest.approx(2 / 3)
    assert score.fraction_without_budget == 1 / 2
    assert score.personalized_score == 0.0
    assert PlanScore({"train_seat_status": True}).personalized_score == 1.0


def test_a_task_without_constraints_scores_0() -> None:
    empty = PlanScore({})
    assert empty.fraction == empty.personalized_score == empty.fraction_without_budget == 0.0
    assert PlanScore({"budget_constraint": True}).fraction_without_budget == 0.0


def test_avg_and_best_by_hand() -> None:
    scores = [[0.0, 1.0], [0.5, 0.5]]
    assert best_at_k(scores) == (1.0 + 0.5) / 2
    # two draws from (0, 1): 00 01 10 11, the best is 1 in three of four
    assert best_at_k_bootstrap(scores) == pytest.approx((0.75 + 0.5) / 2)


def test_the_expected_best_is_the_mean_over_all_draws() -> None:
    samples = [0.2, 0.8, 0.8, 0.0]
    draws = list(itertools.product(samples, repeat=4))  # 4^4 = 256 equally likely draws
    assert best_at_k_bootstrap([samples]) == pytest.approx(sum(map(max, draws)) / len(draws))


def test_the_expected_best_is_what_random_draws_approach() -> None:
    rng = random.Random(0)
    samples = [rng.choice((0.0, 0.2, 0.4, 0.6)) for _ in range(15)] + [1.0]
    drawn = [max(rng.choices(samples, k=16)) for _ in range(20_000)]
    assert best_at_k_bootstrap([samples]) == pytest.approx(sum(drawn) / len(drawn), abs=0.01)
    # the one sample that is 1 is drawn with probability 1 - (15/16)^16 = 64.4 %
    assert best_at_k_bootstrap([[0.0] * 15 + [1.0]]) == pytest.approx(1 - (15 / 16) ** 16)


@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=5))
def test_best_is_never_below_the_expected_best_nor_that_below_the_mean(scores: list[list[float]]) -> None:
    assert best_at_k(scores) >= best_at_k_bootstrap(scores) - 1e-12
    assert best_at_k_bootstrap(scores) >= float(np.mean(scores)) - 1e-12
