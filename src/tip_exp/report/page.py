"""One self-contained HTML page with the plots and the token viewer; it needs no server and no network."""

from __future__ import annotations

import base64
import gzip
import html
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from tip_exp.records import metrics
from tip_exp.records.reader import RunRecord
from tip_exp.report import figures
from tip_exp.report.arms import ArmResult, group_by, setting_names
from tip_exp.report.colours import colour_of
from tip_exp.report.columns import LEGEND
from tip_exp.report.leaderboard import leaderboards
from tip_exp.report.overlaps import Overlaps, overlaps
from tip_exp.report.overview import csv_text, overview, overviews
from tip_exp.report.prediction import divergence, prediction
from tip_exp.report.results_page import SINGLE, run_facts
from tip_exp.report.run_files import RunFiles, read_files
from tip_exp.report.shadows import shadow_tables
from tip_exp.report.tables import Table
from tip_exp.report.viewer import reference_rollouts, viewer_rollouts
from tip_exp.selector.scores import STATISTICS
from tip_exp.utils.io import without_nan
from tip_exp.utils.paths import PACKAGE

MANY_ARMS = 8  # with more arms, plots that list arms take the whole width
# figure -> its title and its caption
CAPTIONS = {
    "accuracy": (
        "Accuracy against kept tokens",
        "Dashed line: all tokens. Bands: 95 % interval of the difference from it; the table says whether it covers "
        "seeds. Small dots: seeds.",
    ),
    "divergence": (
        "Held-out divergence against kept tokens",
        "KL(student || teacher) of a sampled response. Bars: 95 % interval of the ratio to full.",
    ),
    "prediction": (
        "Gradient kept before training, and the outcome",
        "Horizontal: gradient norms at the logits, summed over the kept tokens of step 1, divided by the sum over all.",
    ),
    "memory": (
        "Memory against kept tokens",
        "Peak allocation of the masked loss, without weights and activations. At 100 % there is no scoring pass, so "
        "the loss computes the log-normalizers itself.",
    ),
    "curves": ("Learning curves", "Mean over seeds; band: lowest to highest seed; grey: the other selectors' arms."),
    "plane": (
        "Entropy and divergence",
        "Tokens of the first evaluation as the selector of the menu would keep them. A click shows one in the viewer.",
    ),
    "quadrants": ("Kept tokens by quadrant", "Fraction of a quadrant's tokens, over all steps and seeds."),
    "overlap": (
        "Overlap of selectors on the same tokens",
        "Jaccard index: 1 if two selectors keep the same tokens. Arms whose rule has changed or is gone are left out.",
    ),
}


@dataclass(frozen=True)
class Setting:
    """All arms that differ in the selector only, with their finished runs and figures ("accuracy-math500", …)."""

    name: str
    arms: list[ArmResult]
    records: list[RunRecord]
    runs: list[RunFiles]
    tokens: Overlaps  # the tokens of `reference_rollouts` and what each arm keeps of them
    figures: dict[str, go.Figure]
    unread: list[list[str]]  # folder and damage of finished runs whose rows cannot be read


def page(records: list[RunRecord], arms: list[ArmResult], damaged: Table | None = None) -> str:
    """The whole page as text, with one section per setting; runs whose rows are damaged join the table `damaged`."""
    plots: dict[str, Any] = {}
    sections: list[str] = []
    rollouts: list[dict[str, Any]] = []
    downloads: list[dict[str, str]] = []
    unread: list[list[str]] = []
    for number, setting in enumerate(settings(records, arms)):
        by_id = {f"s{number}-{kind}": figure for kind, figure in setting.figures.items()}
        plots |= {plot_id: json.loads(figure.to_json() or "") for plot_id, figure in by_id.items()}
        rollouts += [row | {"setting": setting.name} for row in viewer_rollouts(setting.runs, setting.tokens)]
        sections.append(_section(setting, number, by_id))
        configs = {arm.name: arm.config for arm in setting.arms}
        downloads.append({"csv": csv_text(setting.arms), "json": json.dumps(configs, indent=2)})
        unread += setting.unread
    for table in overviews([arm for arm in arms if not arm.is_trained]):
        sections.append(f"<section><h2>{html.escape(table.title)}</h2>{_table(table.headings, table.rows)}</section>")
    if damaged or unread:
        rows = [*(damaged.rows if damaged else []), *unread]
        sections.append(f"<section><h2>Damaged runs</h2>{_table(['folder', 'state'], rows)}</section>")
    sections.append(f"<section>{_paragraphs(LEGEND.values())}</section>")
    data = {"plots": plots, "rollouts": rollouts, "statistics": list(STATISTICS), "downloads": downloads}
    return render(sections, data)


def render(sections: list[str], data: dict[str, Any]) -> str:
    """The page of some sections; `data`: plots by the id of their element, rollouts of the viewer, statistics."""
    parts = {
        "<!--sections-->": "\n".join(sections),
        "<!--data-->": _packed(json.dumps(without_nan(data))),
        "<!--plotly-->": _packed(get_plotlyjs()),
    }
    text = (PACKAGE / "report" / "page.html").read_text(encoding="utf-8")
    for mark, part in parts.items():
        text = text.replace(mark, part, 1)
    return text


def _packed(text: str) -> str:
    """Base64 of the gzip of a text: without a `<`, so that no text can end the script element that holds it."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def settings(records: list[RunRecord], arms: list[ArmResult]) -> Iterator[Setting]:
    """The settings in the order of the arms; the files of the runs are read here."""
    by_folder = {record.folder: record for record in records}
    colours = colour_of(sorted({arm.selector for arm in arms}, key=lambda name: (name != "full", name)))
    groups = list(group_by([arm for arm in arms if arm.is_trained], "setting").values())
    for group, name in zip(groups, setting_names(groups), strict=True):
        names = {folder: arm.name for arm in group for folder in arm.folders if by_folder[folder].is_done}
        of_setting = [by_folder[folder] for folder in names]
        runs, unread = read_files(of_setting, names)
        tokens = overlaps(reference_rollouts(runs), {run.arm: run.config for run in runs})
        yield Setting(name, group, of_setting, runs, tokens, _figures(group, runs, tokens, colours), unread)


def _figures(
    arms: list[ArmResult], runs: list[RunFiles], tokens: Overlaps, colours: dict[str, str]
) -> dict[str, go.Figure]:
    drawn: dict[str, go.Figure] = {}
    selectors = {run.arm: run.config["selector"]["label"] for run in runs}
    for benchmark, of_benchmark in group_by(arms, "benchmark").items():
        drawn[f"accuracy-{benchmark}"] = figures.accuracy(of_benchmark, colours)
        for kind, figure in (
            ("divergence", divergence(of_benchmark, colours)),
            ("prediction", prediction(of_benchmark, runs, colours)),
        ):
            if figure:
                drawn[f"{kind}-{benchmark}"] = figure
        drawn[f"curves-{benchmark}"] = figures.learning_curves(_curves(runs, benchmark), selectors, colours)
    drawn["memory"] = figures.memory([of_arm[0] for of_arm in group_by(arms, "identity").values()], colours)
    if shares := _quadrant_shares(runs):
        drawn["quadrants"] = figures.quadrant_shares(shares)
    if tokens.kept:
        drawn["plane"] = figures.plane(tokens, runs[0].config["quadrants"], colours, selectors)
        drawn["overlap"] = figures.overlap_matrix(tokens)
    return drawn


def _curves(runs: list[RunFiles], benchmark: str) -> dict[str, dict[int, list[float]]]:
    """{arm: {step: accuracy of each seed}}"""
    curves: dict[str, dict[int, list[float]]] = {}
    for run in runs:
        key = metrics.EVAL + metrics.main_accuracy(benchmark, run.config["eval"]["samples"])
        for row in run.metrics:
            if row.get(key) is not None:
                curves.setdefault(run.arm, {}).setdefault(row["step"], []).append(row[key])
    return curves


def _quadrant_shares(runs: list[RunFiles]) -> dict[str, dict[str, float]]:
    """{arm: {quadrant: kept tokens over all tokens, both summed over steps and seeds}}"""
    kept: dict[str, Counter[str]] = defaultdict(Counter)
    totals: dict[str, Counter[str]] = defaultdict(Counter)
    for run in runs:
        for row in run.metrics:
            for name in metrics.QUADRANTS:
                keys = metrics.quadrant_share(name), metrics.RESPONSE_TOKENS, metrics.quadrant_kept_frac(name)
                share, tokens, kept_frac = (row.get(key) for key in keys)
                if share is not None and tokens is not None and kept_frac is not None:
                    totals[run.arm][name] += share * tokens
                    kept[run.arm][name] += share * tokens * kept_frac
    return {
        arm: {name: kept[arm][name] / total[name] if total[name] else 0.0 for name in metrics.QUADRANTS}
        for arm, total in totals.items()
    }


def _section(setting: Setting, number: int, plots_by_id: dict[str, go.Figure]) -> str:
    table = overview(setting.arms)
    notes = _paragraphs(table.notes)
    folded = "".join(
        f"<details><summary>{html.escape(board.title)}</summary>{_table(board.headings, board.rows)}"
        f"{_paragraphs(board.notes)}</details>"
        for board in leaderboards(setting.arms) + shadow_tables(setting.arms, setting.records)
    )
    plots = "".join(_plot(plot_id, figure, len(table.rows)) for plot_id, figure in plots_by_id.items())
    buttons = "".join(
        f'<button type="button" class="download" data-setting="{number}" data-kind="{kind}">{text}</button>'
        for kind, text in (("csv", "numbers (CSV)"), ("json", "configs (JSON)"))
    )
    by_sweep: dict[str, list[RunRecord]] = {}
    for record in setting.records:
        by_sweep.setdefault(record.config["sweep"] or SINGLE, []).append(record)
    facts = "".join(
        f"<h3>{html.escape(sweep)}</h3>{_paragraphs(run_facts(sweep, records).splitlines())}"
        for sweep, records in by_sweep.items()
    )
    return (
        f"<section><h2>{html.escape(setting.name)}</h2>{_table(table.headings, table.rows)}{notes}{folded}"
        f'<div class="choices">{buttons}</div><details>'
        f'<summary>commands, versions, hardware</summary>{facts}</details><div class="grid">{plots}</div></section>'
    )


def _table(headings: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _paragraphs(texts: Iterable[str]) -> str:
    return "".join(f"<p>{html.escape(text)}</p>" for text in texts)


def _plot(plot_id: str, figure: go.Figure, num_arms: int) -> str:
    kind, _, benchmark = plot_id.split("-", 1)[1].partition("-")
    title, caption = CAPTIONS[kind]
    is_wide = num_arms > MANY_ARMS and kind in ("curves", "overlap")
    height = figure.layout.height or (max(400, 30 * num_arms + 130) if is_wide else 400)
    return (
        f'<figure class="{"whole" if is_wide else "half"}"><figcaption>'
        f"<h3>{html.escape(title + (f': {benchmark}' if benchmark else ''))}</h3><p>{html.escape(caption)}</p>"
        f'</figcaption><div class="plot" style="height:{height}px" id="{html.escape(plot_id)}"></div></figure>'
    )
