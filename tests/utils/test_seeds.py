"""Derived seeds: no two draws of a run, or of two runs, share one."""

from __future__ import annotations

from typing import Literal

from hypothesis import given
from hypothesis import strategies as st

from tip_exp.utils.seeds import seed_for

Draw = tuple[Literal["rollout", "select"], int, int]
DRAWS = st.tuples(st.sampled_from(["rollout", "select"]), st.integers(0, 1000), st.integers(1, 1_000_000))


@given(DRAWS, DRAWS)
def test_two_draws_share_a_seed_only_if_they_are_the_same(first: Draw, second: Draw) -> None:
    assert (seed_for(*first) == seed_for(*second)) == (first == second)


def test_steps_seeds_and_purposes_have_seeds_of_their_own() -> None:
    draws: list[Draw] = [("rollout", 0, 1), ("rollout", 0, 2), ("rollout", 1, 1), ("select", 0, 1)]
    assert len({seed_for(*draw) for draw in draws}) == len(draws)


def test_a_seed_fits_torch() -> None:
    assert 0 < seed_for("select", 1000, 1_000_000) < 2**63
