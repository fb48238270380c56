"""The paper's claims as rows: what the runs of the embedded pairs say of each, and what would change the verdict."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from tip_exp.config.parse import flatten
from tip_exp.config.presets import selector_options, selector_preset
from tip_exp.report.arms import ArmResult, group_by
from tip_exp.report.columns import MARGIN, points, ratio
from tip_exp.report.significance import LEVEL, Estimate, compare
from tip_exp.report.tables import Table

Arm = tuple[str, float]  # selector's label, retention
SUPPORTED, UNRESOLVED, CONTRADICTED = "supported", "not resolved", "contradicted"
VERDICTS = (
    f"equal: the difference is within ± {MARGIN:g} points at 95 % (two one-sided tests); contradicted if its 95 % "
    f"interval lies beyond. at least: it is above -{MARGIN:g} points by a one-sided 5 % test; contradicted if its 95 % "
    "interval lies below. higher, lower: its 95 % interval excludes 0 on that side; contradicted if on the other. With "
    "one seed there is no verdict. Verdicts are not corrected for the number of claims, and the ten seeds of "
    "demo_seeds were run after a look at the first five. All arms of a table share one learning rate, which need not "
    "be the best of each: registered.md searches rates for some. A verdict from fewer than five seeds is provisional "
    "(docs/statistics.md). A row uses all seeds of both arms, unpaired if their seeds differ, so that it can differ "
    "from the sweeps' tables. Intervals cover training seeds and problems, not other pretrained students, of which "
    "demo_students has three. The test queries of the tools follow the templates of the training queries, over other "
    "tables with other answers. These are verdicts on the embedded pairs, not on the paper's."
)

STEPS = (
    "Adam divides the running mean of gradients by sqrt(v) + eps, with v the running mean of their squares: with a "
    "small eps the size of a step does not depend on the gradient's, with a large one it is in proportion to it, as in "
    "SGD with momentum."
)


@dataclass(frozen=True, slots=True)
class Claim:
    """`arm` against `baseline` on the accuracy of a pair; None as baseline: the student at step 0."""

    text: str
    source: str
    pair: str
    arm: Arm
    expected: Literal["equal", "at least", "higher", "lower"]
    baseline: Arm | None
    change: str  # other circumstances that would change a verdict


CLOSE = 0.25  # of an interval's half-width: other seeds can move its end as far
FULL = ("full", 1.0)
TINY, TOOLS = "tiny", "tiny_tools"
RELATIONS = {"higher": "higher than", "lower": "lower than", "equal": "equal to", "at least": "at least"}
MORE_SEEDS = "more seeds, or more problems where those decide the interval"
CONFIDENT = "a pair with another share of confident mistakes, which entropy misses"
SPREAD = "a pair whose divergence is spread over more or fewer tokens"
PAIR = "a pair whose errors are spread over more tokens: here a few tokens hold the divergence"
STEPS_SIZE = "another size of steps: Adam enlarges them where the gradient is small"
CUTS = f"other cuts (`quadrants`), or {STEPS_SIZE}"
CLAIMS = (
    Claim("Half of the tokens, drawn by entropy, match all tokens", "Table 3", TINY, ("entropy_sample", 0.5),
          "at least", FULL, "a longer training, in which all tokens gain more"),
    Claim("A tenth of the tokens, drawn by entropy, is worse than all", "Table 3, Qwen3 on MATH-500", TINY,
          ("entropy_sample", 0.1), "lower", FULL, "a student whose entropy marks its errors"),
    Claim("A tenth of the tokens, overconfident and wrong, nearly matches all", "Table 4, not AIME25", TINY,
          ("q3", 0.1), "at least", FULL, PAIR),
    Claim("… and is worth more than as many random tokens", "Sec. 3", TINY, ("q3", 0.1), "higher",
          ("random", 0.1), PAIR),
    Claim("Soft-OR beats entropy at half of the tokens", "Table 5", TINY, ("soft_or", 0.5), "higher",
          ("entropy_sample", 0.5), CONFIDENT),
    Claim("Soft-OR beats entropy at a fifth of the tokens", "Table 5", TINY, ("soft_or", 0.2), "higher",
          ("entropy_sample", 0.2), CONFIDENT),
    Claim("… also if tokens are ranked by entropy, not drawn", "control", TINY, ("soft_or", 0.2), "higher",
          ("entropy", 0.2), CONFIDENT),
    Claim("Half of the tokens by Soft-OR beat all tokens", "Table 5", TINY, ("soft_or", 0.5), "higher", FULL,
          CONFIDENT),
    Claim("The lowest half of Soft-OR is far worse than the highest", "Table 6", TINY, ("soft_or_bottom", 0.5),
          "lower", ("soft_or", 0.5), "a pair with signal in the tokens on which both models agree"),
    Claim("… and leaves the student where it was", "Prop. 1: Q4 has no weight", TINY, ("soft_or_bottom", 0.5),
          "equal", None, "a smaller learner.eps: at 1e-8 Adam's normalized steps destroy the student"),
    Claim("Our reading: training on low entropy and divergence (Q4) alone changes nothing", "Table 1", TINY,
          ("q4", 1.0), "equal", None, CUTS),
    Claim("Our reading: training on uncertain tokens on which the teacher agrees (Q2) alone does no harm", "Table 1",
          TINY, ("q2", 1.0), "at least", None, CUTS),
    Claim("Divergence alone is worse than all tokens at a tenth", "Table 8", TINY, ("divergence", 0.1), "lower", FULL,
          SPREAD),
    Claim("The teacher's entropy is no better than random tokens", "App. B.1", TINY, ("teacher_entropy", 0.2), "lower",
          ("random", 0.2), f"a teacher that is uncertain at the student's errors, or {STEPS_SIZE}"),
    Claim("A fifth of the tokens by Q3 beats all tokens on tool tasks", "Table 7", TOOLS, ("q3", 0.2), "higher", FULL,
          "DeepPlanning itself, with the paper's pairs"),
)  # fmt: skip


def claims(arms: list[ArmResult]) -> list[Table]:
    """A table for each learner.eps and lr, which decide how Adam's steps follow the gradient, the longest first.

    One row per claim, of the first setting with finished runs of both sides; a claim without any has none.
    """
    headings = ["claim", "source", "tested", "difference, points [95 %]", "KL, ratio [95 %]", "seeds", "verdict"]
    by_step: dict[tuple[float, float], list[ArmResult]] = {}
    for arm in (arm for arm in arms if arm.is_trained):
        by_step.setdefault((arm.config["learner.eps"], arm.config["learner.lr"]), []).append(arm)
    tables = [
        Table(f"AdamW, eps {eps:g}, lr {lr:g}", [*headings, "what would change it"], rows)
        for (eps, lr), of_step in by_step.items()
        if (rows := [row for claim in CLAIMS if (row := _row(claim, of_step))])
    ]
    tables.sort(key=lambda table: -len(table.rows))
    if tables:
        tables[-1].notes.extend([STEPS, VERDICTS])
    return tables


def verdict(claim: Claim, difference: Estimate) -> str:
    """The verdict on a difference in accuracy (a fraction); VERDICTS states the rules."""
    if math.isnan(difference.p):
        return "one seed: none"
    margin = MARGIN / 100
    if claim.expected in ("higher", "lower"):
        low, high = difference.low, difference.high
        if claim.expected == "lower":
            low, high = -high, -low
        return SUPPORTED if low > 0 else CONTRADICTED if high < 0 else UNRESOLVED
    lower_bound = difference.mean - difference.half_width(0.90)
    holds = difference.margin <= margin if claim.expected == "equal" else lower_bound > -margin
    fails = difference.high < -margin or (claim.expected == "equal" and difference.low > margin)
    return SUPPORTED if holds else CONTRADICTED if fails else UNRESOLVED


def what_would_change(claim: Claim, difference: Estimate) -> str:
    """More seeds where the interval decides nothing, other seeds where it barely does, and the claim's own words."""
    outcome = verdict(claim, difference)
    if outcome not in (SUPPORTED, CONTRADICTED):
        return f"{MORE_SEEDS if outcome == UNRESOLVED else 'a second seed'}; {claim.change}"
    margin = MARGIN / 100
    bounds = {"equal": (-margin, margin), "at least": (-margin,)}.get(claim.expected, (0.0,))
    by_one_side = outcome == SUPPORTED and claim.expected in ("equal", "at least")  # as in `verdict`
    half_width = difference.half_width(0.90 if by_one_side else LEVEL)
    ends = difference.mean - half_width, difference.mean + half_width
    gaps = [(abs(end - bound), bound) for end in ends for bound in bounds]
    gap, bound = min(gaps)
    if gap > CLOSE * difference.half_width():
        return claim.change
    return f"other seeds: the interval ends {100 * gap:.1f} points from {100 * bound:g}; {claim.change}"


def _row(claim: Claim, arms: list[ArmResult]) -> list[str]:
    for setting in group_by((arm for arm in arms if arm.pair == claim.pair), "setting", "benchmark").values():
        # Of arms with equal names, such as those of other normalizers, the one as conf/selector has it comes last.
        by_arm = {(arm.selector, arm.retention): arm for arm in sorted(setting, key=_is_preset) if arm.scores}
        arm, baseline = by_arm.get(claim.arm), by_arm.get(claim.baseline or claim.arm)
        if arm is None or baseline is None:
            continue
        difference, kl_difference = arm.change, None
        if claim.baseline is not None:
            difference = compare(arm.scores, baseline.scores)
            kl_difference = compare(arm.kl_scores, baseline.kl_scores)
        if difference is not None:
            against = "step 0" if claim.baseline is None else _name(claim.baseline)
            tested = f"{_name(claim.arm)} {RELATIONS[claim.expected]} {against} ({claim.pair})"
            seeds = " and ".join(dict.fromkeys([str(arm.seeds), str(baseline.seeds)]))
            texts = [points(difference), ratio(kl_difference), seeds, verdict(claim, difference)]
            return [claim.text, claim.source, tested, *texts, what_would_change(claim, difference)]
    return []


def _is_preset(arm: ArmResult) -> bool:
    """Whether the selector is an option of conf/selector with another retention at most."""
    if arm.selector not in selector_options():
        return False
    preset = flatten({"selector": selector_preset(arm.selector)})
    return all(arm.config.get(key) == value for key, value in preset.items() if key != "selector.retention")


def _name(arm: Arm) -> str:
    return f"{arm[0]} {100 * arm[1]:g} %"
