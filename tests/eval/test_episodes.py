"""Summary of episodes, by hand."""

from __future__ import annotations

import pytest

from tip_exp.envs.episodes import Episode, Stop
from tip_exp.eval.episodes import summarize_episodes
from tip_exp.types import Rollout


def episode(score: float, num_tokens: int = 2, stop: Stop = "final") -> Episode:
    finish = "stop" if stop == "final" else "length"
    rollout = Rollout([1] * (1 + num_tokens), [False] + [True] * num_tokens, finish, [])
    scores = {"fraction": score, "delivered": 1.0}
    return Episode(rollout, "", turns=3, calls=2, failed_calls=0, cut_observations=0, stop=stop, score=scores)


def test_summary_of_two_tasks() -> None:
    # task means 0.5 and 0.9; their standard error is 0.4 / sqrt(2) / sqrt(2) = 0.2
    by_task = [[episode(0.2), episode(0.8)], [episode(1.0, num_tokens=6, stop="turns"), episode(0.8)]]
    summary = summarize_episodes(by_task, no_tool_baseline=0.25)
    assert summary["mean@2"] == pytest.approx(0.7) and summary["mean@2_se"] == pytest.approx(0.2)
    assert summary["best@2"] == pytest.approx(0.9)  # (0.8 + 1.0) / 2
    assert summary["best@2_bootstrap"] == pytest.approx(0.8)  # (3/4 · 0.8 + 1/4 · 0.2 + 3/4 · 1.0 + 1/4 · 0.8) / 2
    assert summary["no_tool_baseline"] == 0.25 and summary["response_len"] == 3.0
    assert summary["truncated_frac"] == summary["stop_turns_frac"] == 0.25 and summary["stop_final_frac"] == 0.75
    assert (summary["fraction"], summary["delivered"], summary["turns"]) == (pytest.approx(0.7), 1.0, 3.0)
