"""Rules of other papers, by their presets: values and kept tokens worked out by hand."""

from __future__ import annotations

from math import log, sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.selector.test_selector import random_statistics, seeded, tokens_of
from torch import Tensor

from tip_exp.api.select import make_selector
from tip_exp.selector import lookup, published, scores
from tip_exp.selector.selector import Selection
from tip_exp.utils.paths import conf_dir

PRESETS = sorted(path.stem for path in (conf_dir() / "selector").glob("*.yaml") if path.stem != "rule")


def select(name: str, statistics: dict[str, list[float]], *lengths: int, **changes: Any) -> Selection:
    """What the preset selects; tokens of one rollout unless `lengths` says otherwise."""
    rule = make_selector(name, **changes)
    values = {key: torch.tensor(value, dtype=torch.float64) for key, value in statistics.items()}
    num_tokens = len(next(iter(values.values()))) if values else sum(lengths)
    assert values.keys() == rule.required_stats
    return rule(values, tokens_of(*(lengths or (num_tokens,))), seeded())


def kept(selection: Selection) -> list[int]:
    return selection.kept_mask.nonzero().squeeze(-1).tolist()


def log_probs(p: list[float], q: list[float]) -> dict[str, list[float]]:
    return {"student_logprob": [log(x) for x in p], "teacher_logprob": [log(x) for x in q]}


def test_dial_at_both_ends_of_beta_and_between() -> None:
    """p = .1 and q = .4: beta 1 |q - p| = .3; beta 0 ln 4; beta .5 sqrt(.3 / ln 4) ln 4 = sqrt(.3 ln 4). p = q: 0."""
    statistics = log_probs([0.1, 0.4, 0.2], [0.4, 0.1, 0.2])
    for beta, expected in ((1.0, 0.3), (0.0, log(4)), (0.5, sqrt(0.3 * log(4)))):
        scores = select("dial", statistics, parameters={"beta": beta}).score.tolist()
        assert scores == pytest.approx([expected, expected, 0.0], rel=1e-6), beta
    assert kept(select("dial", statistics)) == [0]  # 40 % of three tokens


def test_dial_of_a_token_that_the_student_hardly_samples() -> None:
    """e^-150 vanishes beside q = .9: |q - p| = .9. In float32 sinh and exp alone would overflow."""
    log_p, log_q = torch.tensor([-150.0, -900.0]), torch.tensor([log(0.9), log(0.9)])
    torch.testing.assert_close(published.dial(log_p, log_q, beta=1.0), torch.tensor([0.9, 0.9]).double())


RATIOS = [3.0, -1.0, 2.0, -5.0, 0.0, 1.0]  # log q / p, with log p = -6


def ratios(values: list[float]) -> dict[str, list[float]]:
    return {"student_logprob": [-6.0] * len(values), "teacher_logprob": [value - 6 for value in values]}


@pytest.mark.parametrize(
    ("name", "lengths", "expected"),
    [
        ("sparse_opd_mintok", (3, 3), [0, 5]),
        ("sparse_opd_maxtok", (3, 3), [1, 3]),
        ("sparse_opd_minmaxtok", (3, 3), [0, 1, 3, 5]),
        ("sparse_opd_pctltail", (3, 3), [0]),  # at least one of the batch; the highest comes first of two equals
        ("sampled_rkl", (3, 3), [3]),  # ceil(.1 x 6) = 1: the lowest
    ],
)
def test_rules_of_the_log_ratio(name: str, lengths: tuple[int, ...], expected: list[int]) -> None:
    assert kept(select(name, ratios(RATIOS), *lengths)) == expected


def test_both_tails_share_the_budget() -> None:
    """Four of six tokens: the two highest, 3 and 2, and the two lowest, -5 and -1."""
    assert kept(select("sparse_opd_pctltail", ratios(RATIOS), retention=0.67)) == [0, 1, 2, 3]


def test_position_rules() -> None:
    """Rollouts of 5, 1 and 2 tokens: 1 - position / (length - 1) is 1, .75, .5, .25, 0; 1; 1, 0."""
    assert select("prefix", {}, 5, 1, 2).score.tolist() == [1, 0.75, 0.5, 0.25, 0, 1, 1, 0]
    assert kept(select("prefix", {}, 5, 1, retention=0.5)) == [0, 1, 5]
    assert kept(select("first_n", {}, 5, 1, parameters={"n": 2})) == [0, 1, 5]
    # shares 0, .2, .4, .6, .8 and 0; the end is excluded
    assert kept(select("window", {}, 5, 1, parameters={"start": 0.2, "end": 0.8})) == [1, 2, 3]


def test_prefix_weights_fall_with_the_log_ratio_before_a_token() -> None:
    """|a| = 1, 2, 1 and 4, 4: shares before are 0, 1/4, 3/4 and 0, 1/2; weights 1 + .5 (1 - share)."""
    weights = select("prefix_weight", ratios([1.0, -2.0, 1.0, 4.0, 4.0]), 3, 2).weights
    assert weights is not None and weights.tolist() == pytest.approx([1.5, 1.375, 1.125, 1.5, 1.25])


def test_prefix_weights_do_not_depend_on_the_order_of_the_tokens() -> None:
    rollout, position = torch.tensor([1, 0, 1, 0, 0]), torch.tensor([1, 2, 0, 0, 1])
    ratio = torch.tensor([4.0, 1, 4, 1, -2])
    weights = published.prefix_weight(ratio, rollout, position, gamma=0.5)
    assert weights.tolist() == pytest.approx([1.25, 1.125, 1.5, 1.5, 1.375])


# Of five tokens; 0 and 1 are the 5th and 95th percentile of 101 values, so these scores are their own quantile scale.
LADDER = [i / 100 for i in range(101)]


def scaled(x: float) -> float:
    """The quantile normalizer on LADDER: from .05 to .95."""
    return min(1.0, max(0.0, (x - 0.05) / 0.9))


def test_teachability_and_its_soft_or_with_entropy() -> None:
    h, d, c = LADDER, LADDER[::-1], [0.5 + x / 2 for x in LADDER]
    statistics = {"entropy": h, "forward_kl": d, "teacher_mass_topk": c}
    teachable = [scaled(y) * scaled(x) for x, y in zip(h, d, strict=True)]
    scores = select("teachability", {name: statistics[name] for name in ("forward_kl", "teacher_mass_topk")}).score
    assert scores.tolist() == pytest.approx(teachable, abs=1e-6)
    expected = [scaled(x) + s - scaled(x) * s for x, s in zip(h, teachable, strict=True)]
    assert select("ca_softor", statistics).score.tolist() == pytest.approx(expected, abs=1e-6)


def test_ier_fusions_take_the_rank_of_ier_and_the_scale_of_the_others() -> None:
    """Ranks .0 to 1 whatever the size of IER; u = h + d - h d."""
    statistics = {"entropy": LADDER, "forward_kl": [0.2] * 101, "ier": [1.5**i for i in range(101)]}
    useful, rank = [scaled(x) for x in LADDER], LADDER  # equal forward KLs are 0
    fused = {name: select(name, statistics).score.tolist() for name in ("tip_ier_or", "tip_ier_and")}
    assert fused["tip_ier_and"] == pytest.approx([u * r for u, r in zip(useful, rank, strict=True)], abs=1e-6)
    expected = [u + r - u * r for u, r in zip(useful, rank, strict=True)]
    assert fused["tip_ier_or"] == pytest.approx(expected, abs=1e-6)
    without = {name: statistics[name] for name in ("entropy", "forward_kl")}
    assert select("tip_ier_opd", without).score.tolist() == pytest.approx(useful, abs=1e-6)
    assert kept(select("ier", {"ier": [1.0, 7.0, 3.0]}, 1, 2)) == [1]  # ceil(.1 x 3)


def test_entropy_draws_by_micro_batch() -> None:
    """Rollouts 0 and 1 share a micro-batch of 4 tokens, 2 has one of 1: floor(.5 x 4) and at least 1."""
    selection = select("tip_opsd", {"entropy": [0.0, 0.0, 1.0, 2.0, 0.0]}, 1, 3, 1)
    assert kept(selection) == [2, 3, 4] and selection.score.tolist() == [0, 0, 1, 4, 0]


def test_entropy_over_the_batch() -> None:
    assert kept(select("entropy_batch", {"entropy": [5.0, 4, 1, 2, 3, 0, 0, 0, 0, 0]}, 2, 8)) == [0, 1]


def test_a_clipped_divergence_keeps_outliers_from_squeezing_the_others() -> None:
    """KL 0 … 99 and an outlier of 10,000: clipped at the 95th percentile, 95, KL 19 is .2 instead of .0019."""
    statistics = {"entropy": [0.0] * 101, "reverse_kl": [*map(float, range(100)), 10_000.0]}
    assert float(select("soft_or_clipped", statistics).score[19]) == pytest.approx(0.2)
    assert float(select("soft_or", statistics).score[19]) == pytest.approx(0.0019)


def test_the_eopd_gate_and_low_log_probabilities() -> None:
    assert kept(select("eopd_gate", {"teacher_entropy": [0.7, 0.8, 0.9]})) == [2]
    assert kept(select("low_logprob", {"student_logprob": [-1.0, -9.0, -2.0, -3.0, -4.0]})) == [1]


def test_propose_verify_weighs_rejected_tokens_by_a_hundredth() -> None:
    selection = select("propose_verify", {"teacher_rank": [0.0, 4.0, 5.0]})
    assert selection.weights is not None and selection.weights.tolist() == pytest.approx([1, 1, 0.01])
    assert kept(selection) == [0, 1, 2]


def test_fire_weights_and_the_responses_it_drops() -> None:
    """Five responses of one token; the fourth has the lowest log q. Maxima of H_q and H_p are 2 and 4.

    (1 + (1 - H_q / 2)) (1 + H_p / 4): 2 x 2, 1 x 1, 1.5 x 1.5, dropped, 2 x 1
    """
    statistics = {
        "teacher_entropy": [0.0, 2.0, 1.0, 0.0, 0.0],
        "entropy": [4.0, 0.0, 2.0, 4.0, 0.0],
        "teacher_logprob": [-1.0, -2.0, -3.0, -4.0, -3.5],
    }
    weights = select("fire", statistics, 1, 1, 1, 1, 1).weights
    assert weights is not None and weights.tolist() == pytest.approx([4, 1, 2.25, 0, 2])


def test_fire_does_not_count_responses_without_tokens() -> None:
    """Responses 0 and 2 of four are empty: half of the two others is dropped."""
    ones, log_q = torch.ones(4), torch.tensor([-5.0, -5.0, -1.0, -1.0])
    weights = published.fire(ones, ones, log_q, torch.tensor([1, 1, 3, 3]), alpha=0.0, beta=0.0, dropped=0.5)
    assert weights.tolist() == [0, 0, 1, 1]


def test_fire_drops_by_the_mean_of_a_response() -> None:
    """Means -3, -4, -1: of three responses the share .5 drops the second, though the first has the lowest token."""
    ones = torch.ones(5)
    log_q, rollout = torch.tensor([-5.0, -1.0, -4.0, -4.0, -1.0]), torch.tensor([0, 0, 1, 1, 2])
    weights = published.fire(ones, ones, log_q, rollout, alpha=0.0, beta=0.0, dropped=0.5)
    assert weights.tolist() == [1, 1, 0, 0, 1]


# --- presets and settings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("lengths", [(), (1,), (3, 9, 20)])
def test_every_preset_selects_from_what_it_says_it_reads(name: str, lengths: tuple[int, ...]) -> None:
    rule = make_selector(name)
    statistics = {key: v for key, v in random_statistics(sum(lengths)).items() if key in rule.required_stats}
    selection = rule(statistics, tokens_of(*lengths), seeded())
    assert selection.kept_mask.shape == selection.score.shape == (sum(lengths),)
    assert selection.weights is None or float(selection.weights.min() if lengths else 0) >= 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parameters": {}}, "selector.parameters lacks beta, a parameter of the rule dial"),
        (
            {"parameters": {"beta": 1.0, "b": 2.0}},
            "selector.parameters.b: the rule dial has no such parameter; it has beta",
        ),
        (
            {"normalizer": "minmax"},
            "selector.score=dial reads values in nats: selector.normalizer must be none, not minmax",
        ),
        ({"normalizer_of": {"ier": "rank"}}, "selector.normalizer_of.ier has no effect: selector.score=dial does not"),
    ],
)
def test_settings_that_do_not_fit_the_rule_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_selector("dial", **changes)


def test_a_normalizer_of_one_statistic_can_break_the_unit_interval() -> None:
    with pytest.raises(ValueError, match=r"selector\.score=soft_or needs statistics in \[0, 1\]"):
        make_selector("soft_or", normalizer_of={"entropy": "none"})


def test_a_rule_of_a_user_takes_parameters() -> None:
    def above(entropy: Tensor, *, nats: float) -> Tensor:
        return entropy - nats

    rule = make_selector(above, normalizer="none", parameters={"nats": 1.0})
    assert rule({"entropy": torch.tensor([0.5, 3.0])}, tokens_of(2), seeded()).score.tolist() == [-0.5, 2.0]
    assert lookup.rule_inputs(above) == ["entropy"]


# --- docs/selectors.md -----------------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[2] / "docs" / "selectors.md"


def table_rows() -> dict[str, list[str]]:
    """Preset -> the cells of its row."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {cells[0].strip("` "): cells[1:] for cells in rows if len(cells) == 6}


def test_every_preset_has_a_row_and_every_row_a_preset() -> None:
    assert list(table_rows()) == PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_a_row_names_the_statistics_and_the_tokens_that_the_teacher_must_read(name: str) -> None:
    _, _, reads, teacher, depth = table_rows()[name]
    rule = make_selector(name)
    inputs = [f"`{key}`" for key in scores.STATISTICS if key in rule.required_stats]
    positional = set(lookup.rule_inputs(lookup.find_rule(rule.score)))
    inputs += [f"`{key}`" for key in ("position", "response_length", "rollout") if key in positional]
    assert reads == (", ".join(inputs) or "-")
    needs_teacher = rule.required_stats - scores.STUDENT_STATISTICS
    assert teacher == ("all" if needs_teacher else "kept")
    assert depth in {"text", "code", "note", "ours"}
