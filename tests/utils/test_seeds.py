"""Derived seeds: no two draws of a run, or of two runs, share one."""

from __future__ import annotations

from typing import Literal

import torch
from hypothesis import given
from hypothesis import strategies as st

from tip_exp.utils.seeds import seed_for

Draw = tuple[Literal["rollout", "select"], int, int]
PURPOSES: tuple[Literal["rollout", "select"], ...] = ("rollout", "select")
DRAWS = st.tuples(st.sampled_from(["rollout", "select"]), st.integers(0, 1000), st.integers(1, 1_000_000))


@given(DRAWS, DRAWS)
def test_two_draws_share_a_seed_only_if_they_are_the_same(first: Draw, second: Draw) -> None:
    low_bits = seed_for(*first) % 2**32, seed_for(*second) % 2**32  # all that torch's CPU generator uses
    assert (low_bits[0] == low_bits[1]) == (first == second)


def test_steps_seeds_and_purposes_have_seeds_of_their_own() -> None:
    draws: list[Draw] = [("rollout", 0, 1), ("rollout", 0, 2), ("rollout", 1, 1), ("select", 0, 1)]
    assert len({seed_for(*draw) for draw in draws}) == len(draws)


def test_two_purposes_draw_different_numbers() -> None:
    draws = [torch.rand(4, generator=torch.Generator().manual_seed(seed_for(purpose, 3, 5))) for purpose in PURPOSES]
    assert not draws[0].equal(draws[1])


def test_a_seed_fits_torch() -> None:
    assert 0 < seed_for("select", 1000, 1_000_000) < 2**63
