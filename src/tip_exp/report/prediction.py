"""Two plots of held-out divergence: against the share of tokens kept, and against what is known before training."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import plotly.graph_objects as go
from scipy.stats import rankdata, spearmanr

from tip_exp.records import metrics
from tip_exp.report.arms import ArmResult
from tip_exp.report.figures import GREY, KEPT, TICKS, by_selector, kept_percent, symbols_of, with_axes
from tip_exp.report.run_files import RunFiles

DIVERGENCE = "KL of a held-out response, nats (geometric mean)"
MIN_ARMS = 3  # with fewer there is no rank correlation to speak of
NUM_LABELS = 8  # arms named in the plot: those whose rank is predicted worst


def divergence(arms: list[ArmResult], colours: dict[str, str]) -> go.Figure | None:
    """Held-out KL against the share of tokens kept, both logarithmic; bars: 95 % interval of the ratio to full.

    None if no arm measured it.
    """
    arms = [arm for arm in arms if arm.seeds and arm.kl_scores is not None]
    if not arms:
        return None
    figure, symbols = go.Figure(), symbols_of(colours)
    for selector, curve in by_selector(arms).items():
        widths = [arm.kl_difference.half_width() if arm.kl_difference else 0.0 for arm in curve]
        means = [_geometric_kl(arm) for arm in curve]
        above, below = ([mean * abs(math.expm1(sign * width)) for mean, width in zip(means, widths, strict=True)]
                        for sign in (1, -1))  # fmt: skip
        figure.add_scatter(
            x=[kept_percent(arm) for arm in curve], y=means, mode="lines+markers", name=selector,
            line_color=colours[selector], marker={"size": 9, "symbol": symbols[selector]},
            error_y={"array": above, "arrayminus": below, "thickness": 1},
            customdata=[[arm.seeds] for arm in curve],
            hovertemplate=f"{selector}, %{{x:.3g}} % of tokens: %{{y:.3g}} nats (n=%{{customdata[0]}})<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(type="log", tickvals=TICKS)
    means = [_geometric_kl(arm) for arm in arms]
    # The points fill the axis: the interval of two seeds can span a factor of a million.
    figure.update_yaxes(type="log", range=[math.log10(min(means) / 2), math.log10(2 * max(means))])
    return with_axes(figure, KEPT, DIVERGENCE)


def prediction(arms: list[ArmResult], runs: list[RunFiles], colours: dict[str, str]) -> go.Figure | None:
    """Held-out KL at the end against the share of the gradient that the arm keeps of the first step's tokens.

    The first step's rollouts are the untrained student's. Weights of kept tokens are not in this share. The arms
    furthest from the order by this share are named. None with fewer than MIN_ARMS arms that have both.
    """
    masses = first_step_masses(runs)
    points = [(arm, masses[arm.name]) for arm in arms if arm.name in masses and arm.kl_scores is not None]
    if len(points) < MIN_ARMS:
        return None
    x, y = [mass for _, mass in points], [_geometric_kl(arm) for arm, _ in points]
    symbols, names = symbols_of(colours), [arm.name for arm, _ in points]
    named = np.argsort(-np.abs(rankdata([-mass for mass in x]) - rankdata(y)), kind="stable")[:NUM_LABELS]
    # The names of neighbours stand at three heights in turn, on the side towards the middle.
    by_place = enumerate(sorted(named.tolist(), key=lambda i: (x[i], y[i])))
    turns = {i: ("top", "middle", "bottom")[turn % 3] for turn, i in by_place}
    positions = [f"{turns.get(i, 'top')} {'left' if mass > 0.5 else 'right'}" for i, mass in enumerate(x)]
    figure = go.Figure(
        go.Scatter(
            x=[100 * mass for mass in x], y=y, mode="markers+text", showlegend=False, customdata=names,
            text=[name if i in turns else "" for i, name in enumerate(names)], textposition=positions,
            textfont_color=GREY,
            marker={
                "size": 9, "color": [colours[arm.selector] for arm, _ in points],
                "symbol": [symbols[arm.selector] for arm, _ in points],
            },
            hovertemplate="%{customdata}: %{x:.3g} % of the gradient, %{y:.3g} nats<extra></extra>",
        )
    )  # fmt: skip
    ranked: Any = spearmanr(x, y) if len({*x}) > 1 and len({*y}) > 1 else None
    correlation = math.nan if ranked is None else ranked.statistic
    figure.add_annotation(
        text=f"Spearman {correlation:+.2f}, {len(points)} arms", x=0.99, y=0.98, xref="paper", yref="paper",
        showarrow=False, xanchor="right", font_color=GREY,
    )  # fmt: skip
    figure.update_yaxes(type="log")
    return with_axes(figure, "share of the first step's gradient that is kept, %", DIVERGENCE)


def first_step_masses(runs: list[RunFiles]) -> dict[str, float]:
    """select/gradient_mass of step 1 by arm, the mean over its seeds; arms that did not measure it are absent."""
    masses: dict[str, list[float]] = {}
    for run in runs:
        for row in run.metrics:
            if row["step"] == 1 and row.get(metrics.GRADIENT_MASS) is not None:
                masses.setdefault(run.arm, []).append(row[metrics.GRADIENT_MASS])
    return {arm: float(np.mean(values)) for arm, values in masses.items()}


def _geometric_kl(arm: ArmResult) -> float:
    assert arm.kl_scores is not None
    return math.exp(float(arm.kl_scores.scores.mean()))
