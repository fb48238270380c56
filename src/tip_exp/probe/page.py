"""Tables of the two commands as Markdown, curves over the kept share, and the page with the token viewer."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
from tabulate import tabulate

from tip_exp.learner.learner import StepReport
from tip_exp.learner.samples import measure_top_tokens, sample_rows
from tip_exp.probe.batches import Probe
from tip_exp.report.colours import colour_of
from tip_exp.report.page import render
from tip_exp.report.tables import Table, markdown, write

if TYPE_CHECKING:
    from tip_exp.probe.influence import Measured

SHOWN_ROLLOUTS = 8  # in the viewer


def write_tables(path: Path, title: str, head: str, tables: list[Table]) -> None:
    """Print them, and write them as Markdown."""
    text = "\n\n".join([head, *map(markdown, tables)])
    print(text)
    write(path, f"# {title}\n\n{text}\n")


def curves(points: list[dict[str, Any]], value: str, label: str) -> go.Figure:
    """A value of each rule against the share of tokens that it kept, on a logarithmic axis."""
    figure, colours = go.Figure(), colour_of(list(dict.fromkeys(point["selector"] for point in points)))
    for name, colour in colours.items():
        of_rule = [point for point in points if point["selector"] == name and point["kept"] > 0]
        figure.add_scatter(
            x=[100 * point["kept"] for point in of_rule], y=[point[value] for point in of_rule],
            mode="lines+markers", name=name, line_color=colour, hovertemplate=f"{name}, %{{x:.3g}} %: %{{y:.3g}}",
        )  # fmt: skip
    figure.update_xaxes(type="log", title_text="kept, % of response tokens")
    figure.update_yaxes(title_text=label)
    return figure.update_layout(template="none", margin={"l": 60, "r": 16, "t": 16, "b": 48})


def influence_page(
    measured: Measured, probe: Probe, points: list[dict[str, Any]], head: str, tables: list[Table]
) -> str:
    """Tables, the curve of captured influence, and the first rollouts with their tokens coloured by influence."""
    figure = curves(points, "positive", "share of the positive influence")
    batch, values = measured.batches[0], measured.values[0]
    selection = probe.select(probe.parts.learner.selector, batch)
    report = StepReport({}, batch.tokens, batch.statistics | {"influence": values}, selection)
    shown = list(zip(batch.rollouts, batch.problems, strict=True))[:SHOWN_ROLLOUTS]
    fields = measure_top_tokens(probe.parts.teacher, shown) | probe.parts.verdicts(shown)
    labels: dict[str, Any] = {"step": batch.step, "run": probe.config.selector.label, "setting": probe.config.name}
    labels["thresholds"] = probe.config.quadrants.model_dump()
    rows = [row | labels for row in sample_rows(probe.parts.teacher, shown, report, fields)]
    return _page("Token influence", head, tables, figure, rows, ["influence", *batch.statistics])


def advice_page(points: list[dict[str, Any]], head: str, tables: list[Table]) -> str:
    figure = curves(points, "snr", "gradient signal to noise between batches")
    return _page("Selectors before training", head, tables, figure, [], [])


def _page(
    title: str, head: str, tables: list[Table], figure: go.Figure, rows: list[dict[str, Any]], statistics: list[str]
) -> str:
    sections = [f"<section><h2>{html.escape(title)}</h2><p>{html.escape(head)}</p>"]
    sections += ['<figure class="whole"><div class="plot" style="height:460px" id="curves"></div></figure></section>']
    for table in tables:
        text = tabulate(table.rows, table.headings, tablefmt="html", disable_numparse=True)
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in table.notes)
        sections.append(f'<section><h3>{html.escape(table.title)}</h3><div class="wide">{text}</div>{notes}</section>')
    plots = {"curves": json.loads(figure.to_json() or "")}
    return render(sections, {"plots": plots, "rollouts": rows, "statistics": statistics})
