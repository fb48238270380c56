"""p values of one arm's seeds against each other."""

from __future__ import annotations

import numpy as np

from scripts.null_splits import null_p_values
from tip_exp.report.significance import ArmScores


def test_each_split_comes_once() -> None:
    """Of 5 seeds, 5 choices of 4, each split 2 against 2 in 3 ways; seeds that differ alike are rarely significant."""
    rng = np.random.default_rng(0)
    scores = ArmScores(tuple(map(str, range(60))), rng.normal(size=(5, 60)), tuple(range(5)))
    p_values = null_p_values(scores, 2)
    assert len(p_values) == 15 and len(set(p_values)) == 15
    assert np.mean(np.array(p_values) < 0.05) < 0.4
    shifted = ArmScores(scores.problems, scores.scores + np.array([0, 0, 9, 9, 9])[:, None], scores.seeds)
    assert min(null_p_values(shifted, 2)) < 0.01 and max(null_p_values(shifted, 2)) > 0.5
