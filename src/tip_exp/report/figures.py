"""The page's plots as plotly figures, without colours of paper and text: the page sets those for dark and light."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# (pandas types a column of a frame as a Series, a frame or anything)
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go

from tip_exp.report.overlaps import Overlaps

# Okabe and Ito (2008), but for black and yellow, which vanish on one of the two backgrounds; then tints between them.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8A7A2F", "#7F6BB3", "#7A7A7A")
DASHES = ("solid", "dash", "dot", "dashdot")  # arms of one selector share its colour
MAX_POINTS = 900  # tokens of the plane: each arm draws them anew
FLOOR = 1e-5  # nats; what is below lies on the axis of a logarithmic plot
Z95 = 1.96


def colour_of(selectors: Sequence[str]) -> dict[str, str]:
    """One colour a selector, the same in every plot."""
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(dict.fromkeys(selectors))}


def accuracy(summary: pd.DataFrame, colours: dict[str, str]) -> go.Figure:
    """Final accuracy against retention; a band is ± 1.96 standard errors, the line across is training on all tokens."""
    figure = go.Figure()
    for selector, arms in _curves(summary):
        means = [100 * one.mean for one in arms["final"]]
        errors = [0.0 if math.isnan(one.se) else 100 * Z95 * one.se for one in arms["final"]]
        seeds = list(arms["seeds"])
        if selector == "full":
            _across(figure, means[0], errors[0], colours[selector], seeds[0])
            continue
        ratios = [100 * ratio for ratio in arms["retention"]]
        _band(figure, ratios, means, errors, colours[selector], selector)
        figure.add_scatter(
            x=ratios, y=means, mode="lines+markers", name=selector, legendgroup=selector,
            line_color=colours[selector], marker_size=9, customdata=list(zip(errors, seeds, strict=True)),
            error_y={"array": errors, "visible": len(ratios) == 1},
            hovertemplate="%{x:g} % of tokens: %{y:.1f} ± %{customdata[0]:.1f} (n=%{customdata[1]})",
        )  # fmt: skip
    _cut_what_is_far_below(figure, summary)
    return _labelled(figure, "retention, % of response tokens", "accuracy, %")


def memory(summary: pd.DataFrame, colours: dict[str, str]) -> go.Figure:
    """What the masked loss allocates at its peak, against retention; all tokens are the point at 100 %."""
    figure = go.Figure()
    for selector, arms in _curves(summary):
        figure.add_scatter(
            x=[100 * ratio for ratio in arms["retention"]], y=list(arms["loss_mib"]), mode="lines+markers",
            name=selector, line_color=colours[selector], marker_size=9,
            customdata=[[value] for value in arms["peak_gib"]],
            hovertemplate="%{x:g} %: loss %{y:.1f} MiB, learner's peak %{customdata[0]:.2f} GiB",
        )  # fmt: skip
    figure.update_yaxes(rangemode="tozero")
    return _labelled(figure, "retention, % of response tokens", "peak of the loss, MiB")


def learning_curves(
    curves: dict[str, dict[int, list[float]]], selectors: dict[str, str], colours: dict[str, str]
) -> go.Figure:
    """Accuracy by step of each arm ({step: one value a seed}): mean over seeds, and the seeds' range as a band."""
    figure = go.Figure()
    drawn: Counter[str] = Counter()
    for arm, by_step in curves.items():
        dash = DASHES[drawn[selectors[arm]] % len(DASHES)]
        drawn[selectors[arm]] += 1
        steps = sorted(by_step)
        means = [100 * sum(by_step[step]) / len(by_step[step]) for step in steps]
        low, high = ([100 * pick(by_step[step]) for step in steps] for pick in (min, max))
        colour = colours[selectors[arm]]
        figure.add_scatter(
            mode="lines", x=[*steps, *reversed(steps)], y=[*high, *reversed(low)], fill="toself",
            fillcolor=_faint(colour), line_width=0, hoverinfo="skip", showlegend=False, legendgroup=arm,
        )  # fmt: skip
        figure.add_scatter(
            x=steps, y=means, mode="lines+markers", name=arm, legendgroup=arm, line={"color": colour, "dash": dash},
            customdata=[[len(by_step[step])] for step in steps],
            hovertemplate="step %{x}: %{y:.1f} % (n=%{customdata[0]})",
        )  # fmt: skip
    return _labelled(figure, "step", "accuracy, %")


def plane(found: Overlaps, cuts: dict[str, float], colours: dict[str, str], selectors: dict[str, str]) -> go.Figure:
    """The (entropy, divergence) plane of one set of tokens, with quadrants; a menu chooses whose kept tokens show."""
    figure = go.Figure()
    x = [_drawn(value) for value in found.statistics["entropy"][:MAX_POINTS]]
    y = [_drawn(value) for value in found.statistics["reverse_kl"][:MAX_POINTS]]
    arms = list(found.kept)
    for i, arm in enumerate(arms):
        for is_kept in (False, True):
            inside = [j for j, kept in enumerate(found.kept[arm][:MAX_POINTS]) if kept is is_kept]
            figure.add_scatter(
                x=[x[j] for j in inside], y=[y[j] for j in inside], mode="markers", visible=i == 0,
                name="kept" if is_kept else "left out", text=[repr(found.tokens[j]) for j in inside],
                marker={
                    "size": 7 if is_kept else 5, "opacity": 0.8 if is_kept else 0.35,
                    "color": colours[selectors[arm]] if is_kept else "#888888",
                    "symbol": "circle" if is_kept else "x-thin-open",
                },
                hovertemplate="%{text}<br>entropy %{x:.3g}, reverse KL %{y:.3g}",
            )  # fmt: skip
    menu = [
        {"label": arm, "method": "update", "args": [{"visible": [k // 2 == i for k in range(2 * len(arms))]}]}
        for i, arm in enumerate(arms)
    ]
    figure.update_layout(updatemenus=[{"buttons": menu, "x": 0, "y": 1.16, "xanchor": "left", "yanchor": "top"}])
    figure.add_vline(cuts["entropy"], line_dash="dot", line_color="#888888")
    figure.add_hline(cuts["divergence"], line_dash="dot", line_color="#888888")
    corners = {"Q1": (1, 1), "Q2": (1, 0), "Q3": (0, 1), "Q4": (0, 0)}
    for name, (right, top) in corners.items():
        figure.add_annotation(
            text=name, x=0.98 if right else 0.02, y=0.97 if top else 0.03, xref="paper", yref="paper",
            showarrow=False, font_size=15, opacity=0.7,
        )  # fmt: skip
    figure.update_xaxes(type="log", exponentformat="power", dtick=1)
    figure.update_yaxes(type="log", exponentformat="power", dtick=1, title_standoff=14)
    _labelled(figure, f"student's entropy, nats (below {FLOOR:g} on the axis)", "KL(student ‖ teacher), nats")
    return figure.update_layout(legend={"x": 1, "xanchor": "right"})


def quadrant_shares(shares: dict[str, dict[str, float]]) -> go.Figure:
    """Share of each quadrant's tokens that an arm keeps ({arm: {"q1": 0.9, …}}), mean over its steps and seeds."""
    arms, names = list(shares), ["q1", "q2", "q3", "q4"]
    values = [[100 * shares[arm][name] for name in names] for arm in arms]
    return _heatmap(values, [name.upper() for name in names], arms, "%{y} keeps %{z:.1f} % of %{x}", "%{z:.0f}", 100)


def overlap_matrix(found: Overlaps) -> go.Figure:
    arms = list(found.kept)
    return _heatmap(found.matrix, arms, arms, "%{y} and %{x}: Jaccard %{z:.2f}", "%{z:.2f}", 1)


def _heatmap(values: list[list[float]], x: list[str], y: list[str], hover: str, text: str, top: float) -> go.Figure:
    figure = go.Figure(
        go.Heatmap(
            z=values, x=x, y=y, zmin=0, zmax=top, colorscale="Cividis", texttemplate=text,
            hovertemplate=hover + "<extra></extra>", showscale=False,
        )
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(tickangle=-45 if len(x) > 4 else 0)
    return _labelled(figure, "", "")


def _curves(summary: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    done = summary[summary["seeds"] > 0]
    return [(str(name), arms.sort_values("retention")) for name, arms in done.groupby("selector", sort=False)]


def _cut_what_is_far_below(figure: go.Figure, summary: pd.DataFrame) -> None:
    """Arms below half of the best would press the others into a line: they are named at the bottom instead."""
    arms = summary[summary["seeds"] > 0]
    means = [100 * one.mean for one in arms["final"]]
    names = [f"{name} {100 * ratio:g} %" for name, ratio in zip(arms["selector"], arms["retention"], strict=True)]
    far = [f"{name}: {mean:.1f}" for name, mean in zip(names, means, strict=True) if mean < max(means) / 2]
    if not far:
        return
    near = [mean for mean in means if mean >= max(means) / 2]
    figure.update_yaxes(range=[min(near) - 8, max(near) + 5])
    figure.add_annotation(
        text="below: " + ", ".join(far), x=0.01, y=0.01, xref="paper", yref="paper", showarrow=False, xanchor="left",
        yanchor="bottom",
    )  # fmt: skip


def _drawn(value: float) -> float:
    return float(f"{max(FLOOR, value):.4g}")


def _across(figure: go.Figure, mean: float, error: float, colour: str, seeds: int) -> None:
    figure.add_hrect(mean - error, mean + error, fillcolor=colour, opacity=0.12, line_width=0)
    figure.add_scatter(
        x=[0, 100], y=[mean, mean], mode="lines", name="full (all tokens)", line={"color": colour, "dash": "dash"},
        hovertemplate=f"all tokens: {mean:.1f} ± {error:.1f} (n={seeds})",
    )  # fmt: skip


def _band(figure: go.Figure, x: list[float], means: list[float], errors: list[float], colour: str, group: str) -> None:
    high = [mean + error for mean, error in zip(means, errors, strict=True)]
    low = [mean - error for mean, error in zip(means, errors, strict=True)]
    figure.add_scatter(
        mode="lines", x=[*x, *reversed(x)], y=[*high, *reversed(low)], fill="toself", fillcolor=_faint(colour),
        line_width=0, hoverinfo="skip", showlegend=False, legendgroup=group,
    )  # fmt: skip


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.16)"


def _labelled(figure: go.Figure, x: str, y: str) -> go.Figure:
    figure.update_layout(
        template="none", margin={"l": 60, "r": 16, "t": 40, "b": 48}, hovermode="closest",
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
    )  # fmt: skip
    figure.update_xaxes(title_text=x, automargin=True)
    figure.update_yaxes(title_text=y, automargin=True)
    return figure
