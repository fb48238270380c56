"""Metrics of a selection from a few tokens, by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tip_exp.learner.diagnostics import token_metrics
from tip_exp.selector.selector import Quadrants, Selection, Selector, Tokens

SOFT_OR = Selector(
    score="soft_or",
    normalizer="minmax",
    normalize_over="batch",
    clip={},
    order="top",
    rounding="floor",
    scope="rollout",
    retention=0.5,
    quadrants=Quadrants(0.3, 0.3),
    weight="none",
    weight_offset=None,
)


def one_rollout(length: int) -> Tokens:
    return Tokens(torch.zeros(length).long(), torch.zeros(length).long(), torch.arange(length))


def test_quadrants_partition_the_tokens() -> None:
    """Thresholds of 0.3; a value at the threshold is high."""
    statistics = {
        "entropy": torch.tensor([0.5, 0.5, 0.1, 0.1, 0.3]),
        "reverse_kl": torch.tensor([0.5, 0.1, 0.5, 0.1, 0.3]),
    }
    masks = Quadrants(0.3, 0.3).masks(statistics)
    tokens = {name: mask.nonzero().squeeze(-1).tolist() for name, mask in masks.items()}
    assert tokens == {"q1": [0, 4], "q2": [1], "q3": [2], "q4": [3]}


def test_token_metrics_of_a_small_step() -> None:
    statistics = {"entropy": torch.tensor([1.0, 0, 0, 0]), "reverse_kl": torch.tensor([0.0, 3, 1, 0])}
    statistics |= {"grad_norm": torch.tensor([0.1, 0.3, 0.6, 0]), "teacher_entropy": torch.tensor([0.4, 0.2, 0, 0])}
    selection = Selection(torch.tensor([True, True, False, False]), torch.tensor([1.0, 0.5, 0.25, 0]))
    metrics = token_metrics(statistics, one_rollout(4), selection, SOFT_OR, vocab_size=50)
    assert metrics["select/kept_tokens"] == 2 and metrics["select/response_tokens"] == 4
    assert metrics["select/kept_frac"] == 0.5
    assert metrics["select/kl_mass"] == 0.75 and metrics["select/gradient_mass"] == pytest.approx(0.4)  # tokens 0 and 1
    assert metrics["score/entropy_mean"] == 0.25
    assert metrics["score/entropy_norm_mean"] == pytest.approx(0.25 / math.log(50))
    assert metrics["score/entropy_gap_mean"] == pytest.approx(0.2)  # 0.6 and 0.2 of four tokens
    assert metrics["quadrant/q3_share"] == 0.5 and metrics["quadrant/q3_kept_frac"] == 0.5
    assert metrics["quadrant/q3_divergence_share"] == 1.0 and metrics["quadrant/q1_share"] == 0.0
    assert "quadrant/q1_kept_frac" not in metrics, "nothing can be kept of an empty quadrant"
    # The two highest entropies, ties to the earlier token, are tokens 0 and 1: the same set.
    assert metrics["select/overlap_entropy"] == 1.0
    assert metrics["select/score_at_0_15"] == pytest.approx(1.75 / 4)
    assert metrics["select/kept_at_0_15"] == 0.5 and "select/kept_at_16_63" not in metrics


@pytest.mark.parametrize(("kept", "overlap"), [([1, 5], 1.0), ([0, 5], 1 / 3), ([], 1.0)])
def test_overlap_compares_with_as_many_tokens_of_each_rollout(kept: list[int], overlap: float) -> None:
    """A quadrant keeps what it holds. Tokens 1 and 5 have the highest entropy of their rollouts, of four and two."""
    q1 = replace(SOFT_OR, score="q1", order="positive", retention=1.0)
    statistics = {"entropy": torch.tensor([2.0, 3, 1, 0, 8, 9])}
    tokens = Tokens(torch.tensor([0, 0, 0, 0, 1, 1]), torch.zeros(6).long(), torch.tensor([0, 1, 2, 3, 0, 1]))
    kept_mask = torch.zeros(6, dtype=torch.bool)
    kept_mask[kept] = True
    metrics = token_metrics(statistics, tokens, Selection(kept_mask, kept_mask.float()), q1, vocab_size=50)
    assert metrics["select/overlap_entropy"] == pytest.approx(overlap)


def test_buckets_of_positions_start_at_16_and_end_at_four_times_their_start() -> None:
    """Each edge with the position before it; what lies beyond the last bucket is in none."""
    position = torch.tensor([0, 15, 16, 63, 64, 255, 256, 1023, 1024, 4095, 4096, 16383, 16384])
    zeros = torch.zeros(len(position))
    kept_mask = torch.tensor([True, False] * 6 + [False])
    tokens = Tokens(zeros.long(), zeros.long(), position)
    metrics = token_metrics({}, tokens, Selection(kept_mask, position.float()), SOFT_OR, vocab_size=50)
    buckets = [(0, 15), (16, 63), (64, 255), (256, 1023), (1024, 4095), (4096, 16383)]
    assert {name: value for name, value in metrics.items() if "_at_" in name} == {
        f"select/{name}_at_{low}_{high}": value
        for low, high in buckets
        for name, value in (("score", (low + high) / 2), ("kept", 0.5))
    }


def test_one_token_has_all_metrics_of_what_is_measured() -> None:
    statistics = {"entropy": torch.tensor([2.0]), "reverse_kl": torch.tensor([0.0])}
    selection = Selection(torch.tensor([True]), torch.ones(1))
    metrics = token_metrics(statistics, one_rollout(1), selection, SOFT_OR, vocab_size=50)
    assert metrics["score/entropy_mean"] == 2.0 and metrics["select/kept_at_0_15"] == 1.0
    assert metrics["select/kept_frac"] == metrics["quadrant/q2_share"] == metrics["quadrant/q2_kept_frac"] == 1.0
    assert metrics["select/kl_mass"] == 0.0  # of a step without divergence nothing is kept
    entropies = {"entropy": torch.tensor([2.0]), "teacher_entropy": torch.tensor([0.5])}
    assert token_metrics(entropies, one_rollout(1), selection, SOFT_OR, vocab_size=50)["score/entropy_gap_mean"] == 1.5


def test_no_tokens_have_no_other_metrics_than_their_number() -> None:
    selection = Selection(torch.zeros(0, dtype=torch.bool), torch.zeros(0))
    metrics = token_metrics({}, one_rollout(0), selection, SOFT_OR, vocab_size=50)
    assert metrics == {"select/kept_tokens": 0, "select/response_tokens": 0, "select/kept_frac": 0}
