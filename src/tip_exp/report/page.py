"""One HTML page of a report: plots and the token viewer, self-contained, for reading without a server or a network."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportReturnType=false
# (pandas types a column of a frame as a Series, a frame or anything)
from __future__ import annotations

import base64
import gzip
import html
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from tip_exp.records.folder import RunFolder
from tip_exp.records.reader import RunRecord
from tip_exp.report import figures
from tip_exp.report.arms import differing_keys
from tip_exp.report.overlaps import overlaps
from tip_exp.report.overview import overview
from tip_exp.selector.scores import STATISTICS
from tip_exp.utils.io import read_rows
from tip_exp.utils.paths import PACKAGE

SHOWN_SAMPLES = 2  # rollouts of an arm in the viewer from its first evaluation, and as many from its last
MANY_ARMS = 8  # more than these, and a plot that lists arms takes the whole width
MAX_REFERENCE = 64  # rollouts that the selectors are compared on


def page(records: list[RunRecord], summary: pd.DataFrame) -> str:
    """The whole page as text; a section for each setting (everything but selector and seed) and benchmark."""
    plots: dict[str, Any] = {}
    sections: list[str] = []
    rollouts: list[dict[str, Any]] = []
    for number, (name, setting, runs, made) in enumerate(settings(records, summary)):
        ids = {f"s{number}-{key}": figure for key, figure in made.items()}
        plots |= {key: json.loads(figure.to_json()) for key, figure in ids.items()}
        rollouts += _rollouts(runs, name)
        sections.append(_section(name, list(ids), setting))
    template = (PACKAGE / "report" / "page.html").read_text(encoding="utf-8")
    data = {"plots": plots, "rollouts": rollouts, "statistics": list(STATISTICS)}
    parts = {
        "<!--sections-->": "\n".join(sections),
        "/*data*/": json.dumps(data, ensure_ascii=False).replace("</", "<\\/"),
        "<!--plotly-->": base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode(),
    }
    for mark, text in parts.items():
        template = template.replace(mark, text, 1)
    return template


def settings(
    records: list[RunRecord], summary: pd.DataFrame
) -> Iterator[tuple[str, pd.DataFrame, list[RunRecord], dict[str, go.Figure]]]:
    """Each setting's name, rows of the summary, finished runs, and figures ("accuracy-math500", "plane", …)."""
    by_folder = {record.folder: record for record in records}
    colours = figures.colour_of(sorted(summary["selector"], key=lambda name: (name != "full", name)))
    bases = list(dict.fromkeys(summary["base"]))
    first_of = [summary[summary["base"] == base].iloc[0] for base in bases]
    for first, base in zip(first_of, bases, strict=True):
        config, setting = first["config"], summary[summary["base"] == base]
        alike = [row["config"] for row in first_of if (row["pair"], row["data"]) == (first["pair"], first["data"])]
        apart = [key for key in differing_keys(alike) if not key.startswith("selector.")]
        runs = [by_folder[folder] for folders in setting["folders"] for folder in folders if by_folder[folder].is_done]
        runs = list({record.folder: record for record in runs}.values())
        name = f"{first['pair']}, {first['data']}"
        name += "".join(f", {key}={config.get(key)}" for key in apart if not key.startswith(("pair.", "data.")))
        yield name, setting, runs, _figures(setting, runs, colours)


TITLES = {
    "accuracy": "Accuracy against retention",
    "memory": "Memory against retention",
    "curves": "Learning curves",
    "plane": "Entropy and divergence of the same tokens",
    "quadrants": "What each selector keeps, by quadrant",
    "overlap": "Overlap of selectors on the same tokens",
}
NOTES = {
    "accuracy": "± 1.96 standard errors, over seeds if there are several, else over problems. Dashed: all tokens.",
    "memory": "What the masked loss allocates at its peak above the weights and activations.",
    "curves": "Mean over seeds; the band is from the lowest to the highest seed.",
    "plane": "Tokens of the first evaluation, sent through every selector; the menu chooses whose kept tokens show.",
    "quadrants": "Share of a quadrant's tokens that was trained on, mean over steps and seeds.",
    "overlap": "Jaccard index: 1 where two selectors keep the same tokens.",
}


def _figures(setting: pd.DataFrame, runs: list[RunRecord], colours: dict[str, str]) -> dict[str, go.Figure]:
    found: dict[str, go.Figure] = {}
    selectors = {_arm_name(record.config): record.config["selector"]["label"] for record in runs}
    metrics = {record.folder: read_rows(RunFolder(Path(record.folder)).metrics) for record in runs}
    for benchmark, arms in setting.groupby("benchmark", sort=False):
        found[f"accuracy-{benchmark}"] = figures.accuracy(arms, colours)
        curves = _curves(runs, metrics, str(benchmark))
        found[f"curves-{benchmark}"] = figures.learning_curves(curves, selectors, colours)
    found["memory"] = figures.memory(setting.drop_duplicates("same"), colours)
    if shares := _quadrant_shares(runs, metrics):
        found["quadrants"] = figures.quadrant_shares(shares)
    reference = _reference(runs)
    arms = {_arm_name(record.config): record.config for record in runs}
    common = overlaps(reference, arms) if reference else None
    if common and {"entropy", "reverse_kl"} <= common.statistics.keys():
        found["plane"] = figures.plane(common, runs[0].config["quadrants"], colours, selectors)
        found["overlap"] = figures.overlap_matrix(common)
    return found


def _arm_name(config: dict[str, Any]) -> str:
    return f"{config['selector']['label']} {100 * config['selector']['retention']:g} %"


def _curves(
    runs: list[RunRecord], metrics: dict[str, list[dict[str, Any]]], benchmark: str
) -> dict[str, dict[int, list[float]]]:
    curves: dict[str, dict[int, list[float]]] = {}
    for record in runs:
        k = record.config["eval"]["samples"]
        key = f"eval/{benchmark}/mean@{k}" if k else f"eval/{benchmark}/greedy"
        for row in metrics[record.folder]:
            if key in row:
                curves.setdefault(_arm_name(record.config), {}).setdefault(row["step"], []).append(row[key])
    return curves


def _quadrant_shares(runs: list[RunRecord], metrics: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Kept tokens over all tokens of a quadrant, both summed over the steps and seeds of an arm."""
    kept: dict[str, dict[str, float]] = {}
    seen: dict[str, dict[str, float]] = {}
    for record in runs:
        arm = _arm_name(record.config)
        for row in metrics[record.folder]:
            for name in ("q1", "q2", "q3", "q4"):
                if f"quadrant/{name}_share" in row:
                    tokens = row[f"quadrant/{name}_share"] * row["select/response_tokens"]
                    counted = seen.setdefault(arm, dict.fromkeys(("q1", "q2", "q3", "q4"), 0.0))
                    counted[name] += tokens
                    of_arm = kept.setdefault(arm, dict.fromkeys(("q1", "q2", "q3", "q4"), 0.0))
                    of_arm[name] += tokens * row[f"quadrant/{name}_kept_frac"]
    return {
        arm: {name: kept[arm][name] / total if total else 0.0 for name, total in totals.items()}
        for arm, totals in seen.items()
    }


def _samples(record: RunRecord) -> list[dict[str, Any]]:
    return read_rows(RunFolder(Path(record.folder)).samples)


def _reference(runs: list[RunRecord]) -> list[dict[str, Any]]:
    """Rollouts of the first evaluation with every statistic, of the full-token runs if there are some."""
    ordered = sorted(runs, key=lambda record: record.config["selector"]["score"] != "full")
    rows: list[dict[str, Any]] = []
    for record in ordered:
        mine = [row for row in _samples(record) if all(name in row for name in STATISTICS)]
        rows += [row for row in mine if row["step"] == mine[0]["step"]]
        if len(rows) >= MAX_REFERENCE:
            break
    return rows[:MAX_REFERENCE]


def _rollouts(runs: list[RunRecord], setting: str) -> list[dict[str, Any]]:
    """For the viewer: some rollouts of each arm's first seed, from its first and its last evaluation."""
    found: list[dict[str, Any]] = []
    for arm in dict.fromkeys(_arm_name(record.config) for record in runs):
        record = min(
            (one for one in runs if _arm_name(one.config) == arm),
            key=lambda one: ("student_top" not in (_samples(one) or [{}])[0], one.config["seed"]),
        )
        rows = _samples(record)
        for step in sorted({row["step"] for row in (*rows[:1], *rows[-1:])}):
            ends = [row for row in rows if row["step"] == step][:SHOWN_SAMPLES]
            found += [row | {"run": f"{arm}, seed {record.config['seed']}", "setting": setting} for row in ends]
    return found


def _section(name: str, ids: list[str], setting: pd.DataFrame) -> str:
    table = overview(setting)
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in table.headings)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    plots = []
    arms = len(table.rows)
    for plot in ids:
        kind, _, benchmark = plot.split("-", 1)[1].partition("-")
        title = TITLES[kind] + (f": {benchmark}" if benchmark else "")
        is_wide = arms > MANY_ARMS and kind in ("curves", "overlap")
        height = max(400, 30 * arms + 130) if is_wide else 400
        plots.append(
            f'<figure class="{"whole" if is_wide else "half"}"><figcaption><h3>{html.escape(title)}</h3>'
            f"<p>{html.escape(NOTES[kind])}</p></figcaption>"
            f'<div class="plot" style="height:{height}px" id="{html.escape(plot)}"></div></figure>'
        )
    return (
        f'<section><h2>{html.escape(name)}</h2><div class="wide"><table><thead><tr>{head}</tr></thead>'
        f'<tbody>{body}</tbody></table></div><div class="grid">{"".join(plots)}</div></section>'
    )
