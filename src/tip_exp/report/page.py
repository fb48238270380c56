"""One self-contained HTML page with the plots and the token viewer; it needs no server and no network."""

from __future__ import annotations

import base64
import gzip
import html
import json
import re
import shutil
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from tip_exp.records import metrics
from tip_exp.records.folder import RunFolder
from tip_exp.records.reader import RunRecord
from tip_exp.report import figures
from tip_exp.report.arms import ArmResult, differing_keys, group_by
from tip_exp.report.colours import colour_of
from tip_exp.report.overlaps import overlaps
from tip_exp.report.overview import NOTES, overview
from tip_exp.selector.scores import STATISTICS
from tip_exp.utils.errors import DataError
from tip_exp.utils.io import read_rows
from tip_exp.utils.paths import PACKAGE

SHOWN_SAMPLES = 2  # rollouts of an arm in the viewer from its first evaluation, and as many from its last
MANY_ARMS = 8  # with more arms, plots that list arms take the whole width
MAX_REFERENCE = 64  # rollouts on which the selectors are compared
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTH, HEIGHT = 1000, 620  # of a picture, pixels
BROWSER_OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=10000"]
TIMEOUT_S = 120  # for one picture
MAX_NAME = 60  # characters of a setting's name in a file name
# figure -> its title and its caption
CAPTIONS = {
    "accuracy": (
        "Accuracy against retention",
        "Dashed: all tokens. Bands: 95 % interval of the difference to it; it covers what the table says.",
    ),
    "memory": ("Memory against retention", "Peak allocation of the masked loss, without weights and activations."),
    "curves": ("Learning curves", "Mean over seeds; band: lowest to highest seed; grey: the other selectors' arms."),
    "plane": ("Entropy and divergence", "Tokens of the first evaluation as the selector of the menu would keep them."),
    "quadrants": ("Kept tokens by quadrant", "Fraction of a quadrant's tokens, over all steps and seeds."),
    "overlap": (
        "Overlap of selectors on the same tokens",
        "Jaccard index: 1 if two selectors keep the same tokens. Arms whose rule has changed or is gone are left out.",
    ),
}


@dataclass(frozen=True)
class RunFiles:
    """A finished run with the rows of its files."""

    arm: str  # "entropy 50 %"
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]


@dataclass(frozen=True)
class Setting:
    """All arms that differ in the selector only, with their finished runs and figures ("accuracy-math500", …)."""

    name: str
    arms: list[ArmResult]
    runs: list[RunFiles]
    figures: dict[str, go.Figure]


def page(records: list[RunRecord], arms: list[ArmResult]) -> str:
    """The whole page as text, with one section per setting."""
    plots: dict[str, Any] = {}
    sections: list[str] = []
    rollouts: list[dict[str, Any]] = []
    for number, setting in enumerate(settings(records, arms)):
        by_id = {f"s{number}-{kind}": figure for kind, figure in setting.figures.items()}
        plots |= {plot_id: json.loads(figure.to_json() or "") for plot_id, figure in by_id.items()}
        rollouts += _viewer_rollouts(setting)
        sections.append(_section(setting, by_id))
    sections.append(f"<section>{_paragraphs(NOTES.splitlines())}</section>")
    data = {"plots": plots, "rollouts": rollouts, "statistics": list(STATISTICS)}
    return render(sections, data)


def render(sections: list[str], data: dict[str, Any]) -> str:
    """The page of some sections; `data`: plots by the id of their element, rollouts of the viewer, statistics."""
    parts = {
        "<!--sections-->": "\n".join(sections),
        "<!--data-->": _packed(json.dumps(data)),
        "<!--plotly-->": _packed(get_plotlyjs()),
    }
    text = (PACKAGE / "report" / "page.html").read_text(encoding="utf-8")
    for mark, part in parts.items():
        text = text.replace(mark, part, 1)
    return text


def _packed(text: str) -> str:
    """Base64 of the gzip of a text: without a `<`, so that no text can end the script element that holds it."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def write_pictures(records: list[RunRecord], arms: list[ArmResult], out: Path) -> list[Path]:
    """The figures as PNG files for a README or a slide, named by the setting's number and name and by the figure.

    A headless Chromium draws them; plotly's own export (kaleido) needs one as well, and one more package. Raises
    DataError without a Chromium on the PATH, or if it draws nothing.
    """
    browser = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    if browser is None:
        raise DataError(f"--png: pictures need one of {', '.join(CHROMIUMS)} on the PATH")
    out.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "figure.html"
        for number, setting in enumerate(settings(records, arms)):
            slug = f"{number}_{re.sub('[^a-z0-9]+', '_', setting.name.lower())[:MAX_NAME]}"
            for kind, figure in setting.figures.items():
                path = out.resolve() / f"{slug}.{kind}.png"
                height = figure.layout.height or HEIGHT
                figure.update_layout(paper_bgcolor="white", plot_bgcolor="white", width=WIDTH, height=height)
                source.write_text(figure.to_html(config={"displayModeBar": False}), encoding="utf-8")
                command = [browser, *BROWSER_OPTIONS, f"--user-data-dir={scratch}/browser"]
                command += [f"--window-size={WIDTH + 16},{height + 16}"]  # a page has a margin of 8 pixels
                command += [f"--screenshot={path}", f"file://{source}"]
                try:
                    process = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
                except subprocess.TimeoutExpired as error:
                    raise DataError(f"--png: {browser} took more than {TIMEOUT_S} s to draw {path.name}") from error
                if not path.is_file():
                    last_line = process.stderr.strip().splitlines()[-1:]
                    raise DataError(f"--png: {browser} did not draw {path.name}: {last_line}")
                written.append(path)
    return written


def settings(records: list[RunRecord], arms: list[ArmResult]) -> Iterator[Setting]:
    """The settings in the order of the arms; the files of the runs are read here."""
    by_folder = {record.folder: record for record in records}
    colours = colour_of(sorted({arm.selector for arm in arms}, key=lambda name: (name != "full", name)))
    groups = list(group_by(arms, "setting").values())
    for group in groups:
        first = group[0]
        similar = [peer[0] for peer in groups if (peer[0].pair, peer[0].data) == (first.pair, first.data)]
        keys = differing_keys(similar, ignored=("selector.", "pair.", "data."))
        name = ", ".join([first.pair, first.data, *first.values_of(keys)])
        folders = dict.fromkeys(folder for arm in group for folder in arm.folders if by_folder[folder].is_done)
        runs = [_run_files(by_folder[folder]) for folder in folders]
        yield Setting(name, group, runs, _figures(group, runs, colours))


def _run_files(record: RunRecord) -> RunFiles:
    folder, selector = RunFolder(Path(record.folder)), record.config["selector"]
    arm = f"{selector['label']} {100 * selector['retention']:g} %"
    return RunFiles(arm, record.config, read_rows(folder.metrics), read_rows(folder.samples))


def _figures(arms: list[ArmResult], runs: list[RunFiles], colours: dict[str, str]) -> dict[str, go.Figure]:
    drawn: dict[str, go.Figure] = {}
    selectors = {run.arm: run.config["selector"]["label"] for run in runs}
    for benchmark, of_benchmark in group_by(arms, "benchmark").items():
        drawn[f"accuracy-{benchmark}"] = figures.accuracy(of_benchmark, colours)
        drawn[f"curves-{benchmark}"] = figures.learning_curves(_curves(runs, benchmark), selectors, colours)
    drawn["memory"] = figures.memory([of_arm[0] for of_arm in group_by(arms, "identity").values()], colours)
    if shares := _quadrant_shares(runs):
        drawn["quadrants"] = figures.quadrant_shares(shares)
    reference = _reference_rollouts(runs)
    if reference and (tokens := overlaps(reference, {run.arm: run.config for run in runs})).kept:
        drawn["plane"] = figures.plane(tokens, runs[0].config["quadrants"], colours, selectors)
        drawn["overlap"] = figures.overlap_matrix(tokens)
    return drawn


def _curves(runs: list[RunFiles], benchmark: str) -> dict[str, dict[int, list[float]]]:
    """{arm: {step: accuracy of each seed}}"""
    curves: dict[str, dict[int, list[float]]] = {}
    for run in runs:
        key = metrics.EVAL + metrics.main_accuracy(benchmark, run.config["eval"]["samples"])
        for row in run.metrics:
            if key in row:
                curves.setdefault(run.arm, {}).setdefault(row["step"], []).append(row[key])
    return curves


def _quadrant_shares(runs: list[RunFiles]) -> dict[str, dict[str, float]]:
    """{arm: {quadrant: kept tokens over all tokens, both summed over steps and seeds}}"""
    kept: dict[str, Counter[str]] = defaultdict(Counter)
    totals: dict[str, Counter[str]] = defaultdict(Counter)
    for run in runs:
        for row in run.metrics:
            for name in metrics.QUADRANTS:
                if metrics.quadrant_share(name) in row:
                    tokens = row[metrics.quadrant_share(name)] * row[metrics.RESPONSE_TOKENS]
                    totals[run.arm][name] += tokens
                    kept[run.arm][name] += tokens * row[metrics.quadrant_kept_frac(name)]
    return {
        arm: {name: kept[arm][name] / total[name] if total[name] else 0.0 for name in metrics.QUADRANTS}
        for arm, total in totals.items()
    }


def _reference_rollouts(runs: list[RunFiles]) -> list[dict[str, Any]]:
    """Rollouts of the first evaluation that have all statistics, of full-token runs if there are any."""
    rows: list[dict[str, Any]] = []
    for run in sorted(runs, key=lambda run: run.config["selector"]["score"] != "full"):
        complete = [row for row in run.samples if all(name in row for name in STATISTICS)]
        rows += [row for row in complete if row["step"] == complete[0]["step"]]
    return rows[:MAX_REFERENCE]


def _viewer_rollouts(setting: Setting) -> list[dict[str, Any]]:
    """Some rollouts of one seed of each arm, from its first and its last evaluation.

    The seed is the lowest one whose samples have the most likely tokens, else the lowest.
    """
    rollouts: list[dict[str, Any]] = []
    for arm in dict.fromkeys(run.arm for run in setting.runs):
        run = min(
            (run for run in setting.runs if run.arm == arm),
            key=lambda run: ("student_top" not in (run.samples or [{}])[0], run.config["seed"]),
        )
        labels = {"run": f"{arm}, seed {run.config['seed']}", "setting": setting.name}
        for step in sorted({row["step"] for row in (*run.samples[:1], *run.samples[-1:])}):
            rollouts += [row | labels for row in run.samples if row["step"] == step][:SHOWN_SAMPLES]
    return rollouts


def _section(setting: Setting, plots_by_id: dict[str, go.Figure]) -> str:
    table = overview(setting.arms)
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in table.headings)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    notes = _paragraphs(table.notes)
    plots = "".join(_plot(plot_id, figure, len(table.rows)) for plot_id, figure in plots_by_id.items())
    return (
        f'<section><h2>{html.escape(setting.name)}</h2><div class="wide"><table><thead><tr>{head}</tr></thead>'
        f'<tbody>{body}</tbody></table></div>{notes}<div class="grid">{plots}</div></section>'
    )


def _paragraphs(texts: list[str]) -> str:
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
