"""The page's plots as plotly figures. They set no background and text colours: the page does, for dark and light."""

from __future__ import annotations

import math
from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tip_exp.records.metrics import QUADRANTS
from tip_exp.report.arms import ArmResult, group_by
from tip_exp.report.colours import channels
from tip_exp.report.overlaps import Overlaps

GREY = "#888888"
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")  # by retention in the learning curves
SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "triangle-down", "star")  # by selector
PANEL_COLUMNS, PANEL_HEIGHT = 3, 230  # of the learning curves; pixels
MAX_POINTS = 900  # tokens in the plane; each arm draws all of them
MIN_LOG = 1e-5  # nats; smaller values are drawn here on logarithmic axes
FAR_PER_LINE, AXIS_HEIGHT = 3, 64  # arms outside of the axis, in one line; pixels of the x axis with its title
KEPT, ACCURACY = "kept, % of response tokens", "accuracy, %"
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)  # of the logarithmic axis of kept tokens, %


def accuracy(arms: list[ArmResult], colours: dict[str, str]) -> go.Figure:
    """Final accuracy against the share of tokens kept, on a logarithmic axis; dashed: training on all tokens.

    A band is the 95 % interval of the difference to that line, around the arm's mean: all arms answer the same
    problems, whose scatter would hide differences. Without such a run it is the interval of the mean.
    """
    figure, symbols = go.Figure(), symbols_of(colours)
    lowest = min([kept_percent(arm) for arm in arms if arm.seeds and kept_percent(arm) > 0], default=10.0) / 1.5
    for selector, curve in by_selector(arms).items():
        colour = colours[selector]
        for baseline in (arm for arm in curve if arm.is_baseline):
            mean = 100 * baseline.final.mean
            figure.add_scatter(
                x=[lowest, 100], y=[mean, mean], mode="lines", name=f"{selector} (all tokens)",
                line={"color": colour, "dash": "dash"}, hovertemplate=f"all tokens: {mean:.1f} (n={baseline.seeds})",
            )  # fmt: skip
        if not (curve := [arm for arm in curve if not arm.is_baseline]):
            continue
        means = [100 * arm.final.mean for arm in curve]
        half_widths = [100 * (arm.difference or arm.final).half_width() for arm in curve]
        errors = [0.0 if math.isnan(half_width) else half_width for half_width in half_widths]
        low = [mean - error for mean, error in zip(means, errors, strict=True)]
        high = [mean + error for mean, error in zip(means, errors, strict=True)]
        shares = [kept_percent(arm) for arm in curve]
        _add_band(figure, shares, low, high, colour, selector)
        seeds = [
            (x, 100 * y) for x, arm in zip(shares, curve, strict=True) if arm.scores for y in arm.scores.scores.mean(1)
        ]
        figure.add_scatter(
            x=[x for x, _ in seeds], y=[y for _, y in seeds], mode="markers", marker={"size": 4, "color": colour},
            opacity=0.6, showlegend=False, legendgroup=selector, hoverinfo="skip",
        )  # fmt: skip
        figure.add_scatter(
            x=shares, y=means, mode="lines+markers", name=selector, legendgroup=selector, line_color=colour,
            marker={"size": 9, "symbol": symbols[selector]},
            customdata=[[error, arm.seeds] for error, arm in zip(errors, curve, strict=True)],
            error_y={"array": errors, "visible": len(shares) == 1},
            hovertemplate="%{x:.3g} % of tokens: %{y:.1f} ± %{customdata[0]:.1f} (n=%{customdata[1]})",
        )  # fmt: skip
    figure.update_xaxes(type="log", range=[math.log10(lowest), math.log10(120)], tickvals=TICKS)
    _limit_axis(with_axes(figure, KEPT, ACCURACY), arms)
    return figure


def memory(arms: list[ArmResult], colours: dict[str, str]) -> go.Figure:
    """Peak allocation of the masked loss against the share of tokens kept."""
    figure, symbols = go.Figure(), symbols_of(colours)
    for selector, curve in by_selector(arms).items():
        figure.add_scatter(
            x=[kept_percent(arm) for arm in curve], y=[arm.loss_mib for arm in curve], mode="lines+markers",
            name=selector, line_color=colours[selector], marker={"size": 9, "symbol": symbols[selector]},
            hovertemplate="%{x:.3g} %: loss %{y:.1f} MiB",
        )  # fmt: skip
    figure.update_yaxes(rangemode="tozero")
    return with_axes(figure, KEPT, "peak of the loss, MiB")


def learning_curves(
    curves: dict[str, dict[int, list[float]]], selectors: dict[str, str], colours: dict[str, str]
) -> go.Figure:
    """Accuracy by step of each arm ({step: one value per seed}), with one panel per selector.

    A panel shows its selector's arms in colour, as the mean over seeds with the seeds' range as a band, and the means
    of all other arms in grey. The dash of a line is its retention.
    """
    names = sorted({selectors[arm] for arm in curves}, key=list(colours).index)
    columns = min(PANEL_COLUMNS, len(names)) or 1
    num_rows = math.ceil(len(names) / columns) or 1
    figure = make_subplots(
        num_rows, columns, subplot_titles=names, shared_xaxes=True, shared_yaxes=True, horizontal_spacing=0.03,
        vertical_spacing=0.28 / num_rows,
    )  # fmt: skip
    means = {arm: {step: 100 * sum(by_step[step]) / len(by_step[step]) for step in sorted(by_step)}
             for arm, by_step in curves.items()}  # fmt: skip
    retentions = {arm: arm.removeprefix(f"{selectors[arm]} ") for arm in curves}
    dashes = {text: DASHES[i % len(DASHES)] for i, text in enumerate(dict.fromkeys(retentions.values()))}
    for i, selector in enumerate(names):
        panel = {"row": i // columns + 1, "col": i % columns + 1}
        remaining = [arm for arm in curves if selectors[arm] != selector]
        figure.add_scatter(  # one trace, with gaps between the arms
            x=[step for arm in remaining for step in (*means[arm], None)],
            y=[mean for arm in remaining for mean in (*means[arm].values(), None)],
            mode="lines", line={"color": GREY, "width": 1}, opacity=0.45, hoverinfo="skip", showlegend=False, **panel,
        )  # fmt: skip
        for arm in (arm for arm in curves if selectors[arm] == selector):
            steps, seeds = list(means[arm]), [curves[arm][step] for step in means[arm]]
            low, high = ([100 * pick(values) for values in seeds] for pick in (min, max))
            _add_band(figure, steps, low, high, colours[selector], arm, **panel)
            figure.add_scatter(
                x=steps, y=list(means[arm].values()), mode="lines", name=arm, showlegend=False,
                line={"color": colours[selector], "dash": dashes[retentions[arm]], "width": 2.5},
                customdata=[[len(values)] for values in seeds],
                hovertemplate=f"{arm}, step %{{x}}: %{{y:.1f}} % (n=%{{customdata[0]}})<extra></extra>", **panel,
            )  # fmt: skip
    for text, dash in dashes.items():
        line = {"color": GREY, "dash": dash, "width": 2.5}
        figure.add_scatter(x=[None], y=[None], mode="lines", name=f"{text} of tokens", line=line, row=1, col=1)
    with_axes(figure, "", "")
    figure.update_xaxes(showticklabels=True, matches="x")
    figure.update_yaxes(matches="y")
    figure.update_xaxes(title_text="step", row=num_rows)
    figure.update_yaxes(title_text=ACCURACY, col=1)
    legend = {"orientation": "h", "y": 1 + 46 / (PANEL_HEIGHT * num_rows), "yanchor": "bottom"}
    return figure.update_layout(height=PANEL_HEIGHT * num_rows + 150, legend=legend, margin_t=90)


def plane(
    tokens: Overlaps, thresholds: dict[str, float], colours: dict[str, str], selectors: dict[str, str]
) -> go.Figure:
    """Tokens by entropy and divergence, with quadrants; a menu chooses the arm whose kept tokens are marked."""
    figure = go.Figure()
    x, y = (
        [float(f"{max(MIN_LOG, value):.4g}") for value in tokens.statistics[name][:MAX_POINTS]]
        for name in ("entropy", "reverse_kl")
    )
    arms = list(tokens.kept)
    for i, arm in enumerate(arms):
        for is_kept in (False, True):
            points = [j for j, kept in enumerate(tokens.kept[arm][:MAX_POINTS]) if kept is is_kept]
            figure.add_scatter(
                x=[x[j] for j in points], y=[y[j] for j in points], mode="markers", visible=i == 0,
                name="kept" if is_kept else "left out", text=[repr(tokens.tokens[j]) for j in points],
                customdata=[tokens.positions[j] for j in points],
                marker={
                    "size": 7 if is_kept else 5, "opacity": 0.8 if is_kept else 0.35,
                    "color": colours[selectors[arm]] if is_kept else GREY,
                    "symbol": "circle" if is_kept else "x-thin-open",
                },
                hovertemplate="%{text}<br>entropy %{x:.3g}, reverse KL %{y:.3g}",
            )  # fmt: skip
    menu = [
        {"label": arm, "method": "update", "args": [{"visible": [k // 2 == i for k in range(2 * len(arms))]}]}
        for i, arm in enumerate(arms)
    ]
    figure.update_layout(updatemenus=[{"buttons": menu, "x": 0, "y": 1.16, "xanchor": "left", "yanchor": "top"}])
    figure.add_vline(thresholds["entropy"], line_dash="dot", line_color=GREY)
    figure.add_hline(thresholds["divergence"], line_dash="dot", line_color=GREY)
    for name, (right, top) in {"Q1": (1, 1), "Q2": (1, 0), "Q3": (0, 1), "Q4": (0, 0)}.items():
        figure.add_annotation(
            text=name, x=0.98 if right else 0.02, y=0.97 if top else 0.03, xref="paper", yref="paper",
            showarrow=False, font_size=15, opacity=0.7,
        )  # fmt: skip
    figure.update_xaxes(type="log", exponentformat="power", dtick=1)
    figure.update_yaxes(type="log", exponentformat="power", dtick=1, title_standoff=14)
    with_axes(figure, f"student's entropy, nats (below {MIN_LOG:g} on the axis)", "KL(student ‖ teacher), nats")
    return figure.update_layout(legend={"x": 1, "xanchor": "right"})


def quadrant_shares(shares: dict[str, dict[str, float]]) -> go.Figure:
    """Fraction of each quadrant's tokens that an arm keeps ({arm: {"q1": 0.9, …}})."""
    values = [[100 * of_arm[name] for name in QUADRANTS] for of_arm in shares.values()]
    headings = [name.upper() for name in QUADRANTS]
    return _heatmap(values, headings, list(shares), "%{y} keeps %{z:.1f} % of %{x}", "%{z:.0f}", 100)


def overlap_matrix(tokens: Overlaps) -> go.Figure:
    arms = list(tokens.kept)
    return _heatmap(tokens.matrix, arms, arms, "%{y} and %{x}: Jaccard %{z:.2f}", "%{z:.2f}", 1)


def _heatmap(values: list[list[float]], x: list[str], y: list[str], hover: str, text: str, top: float) -> go.Figure:
    figure = go.Figure(
        go.Heatmap(
            z=values, x=x, y=y, zmin=0, zmax=top, colorscale="Cividis", texttemplate=text,
            hovertemplate=hover + "<extra></extra>", showscale=False,
        )
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(tickangle=-45 if len(x) > 4 else 0)
    return with_axes(figure, "", "")


def by_selector(arms: list[ArmResult]) -> dict[str, list[ArmResult]]:
    """Arms with a finished run by selector, each sorted by what they kept."""
    curves = group_by((arm for arm in arms if arm.seeds), "selector")
    return {name: sorted(curve, key=kept_percent) for name, curve in curves.items()}


def kept_percent(arm: ArmResult) -> float:
    """% of the response tokens that were kept; the setting, if the run did not record it."""
    return 100 * (arm.retention if math.isnan(arm.kept_frac) else arm.kept_frac)


def _limit_axis(figure: go.Figure, arms: list[ArmResult]) -> None:
    """Leave arms below half of the best outside of the axis, and name them below the plot instead."""
    percents = [(arm, 100 * arm.final.mean) for arm in arms if arm.seeds]
    half = max((percent for _, percent in percents), default=0.0) / 2
    low = [(arm, percent) for arm, percent in percents if percent < half]
    far = [f"{arm.selector}, {kept_percent(arm):.3g} % kept: {percent:.1f} %" for arm, percent in low]
    if not far:
        return
    near = [percent for _, percent in percents if percent >= half]
    figure.update_yaxes(range=[min(near) - 8, max(near) + 5])
    lines = ["; ".join(far[i : i + FAR_PER_LINE]) for i in range(0, len(far), FAR_PER_LINE)]
    figure.add_annotation(
        text="not in the plot: " + ";<br>".join(lines), x=0, y=0, yshift=-AXIS_HEIGHT, xref="paper", yref="paper",
        showarrow=False, align="left", xanchor="left", yanchor="top",
    )  # fmt: skip
    figure.update_layout(margin_b=AXIS_HEIGHT + 20 * len(lines))


def _add_band(
    figure: go.Figure, x: Sequence[float], low: list[float], high: list[float], colour: str, group: str, **panel: int
) -> None:
    red, green, blue = channels(colour)
    figure.add_scatter(
        mode="lines", x=[*x, *reversed(x)], y=[*high, *reversed(low)], fill="toself", line_width=0, hoverinfo="skip",
        fillcolor=f"rgba({red},{green},{blue},0.16)", showlegend=False, legendgroup=group, **panel,
    )  # fmt: skip


def symbols_of(colours: dict[str, str]) -> dict[str, str]:
    """One marker per selector, because colours of many selectors look alike."""
    return {selector: SYMBOLS[i % len(SYMBOLS)] for i, selector in enumerate(colours)}


def with_axes(figure: go.Figure, x: str, y: str) -> go.Figure:
    figure.update_layout(
        template="none", margin={"l": 60, "r": 16, "t": 40, "b": 48}, hovermode="closest",
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
    )  # fmt: skip
    figure.update_xaxes(title_text=x, automargin=True)
    figure.update_yaxes(title_text=y, automargin=True)
    return figure
