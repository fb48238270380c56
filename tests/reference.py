"""Naive reference implementations that tests compare the package with: whole logits, float64, autograd, plain loops."""

from __future__ import annotations

import itertools

# ---- eval ----


def expected_maximum_of_draws(samples: list[float]) -> float:
    """Mean of the maximum over all k^k ways to draw k times from k samples with replacement."""
    draws = list(itertools.product(samples, repeat=len(samples)))
    return sum(map(max, draws)) / len(draws)
