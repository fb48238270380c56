"""Derived seeds: every random draw of a run is a function of the run's seed, its purpose and the step."""

from __future__ import annotations

from typing import Literal

# One stream per purpose, 2^48 apart; a run uses the first num_seeds x 1,000,003 of its stream.
STREAMS = {"rollout": 0, "select": 1 << 48}


def seed_for(purpose: Literal["rollout", "select"], seed: int, step: int) -> int:
    """Seed of step `step` of the run with seed `seed`; a resumed run draws the same as an undisturbed one."""
    return STREAMS[purpose] + seed * 1_000_003 + step
