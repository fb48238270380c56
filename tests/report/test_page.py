"""The HTML page: one file without network access; in a browser, all plots and the token viewer work in both themes."""

from __future__ import annotations

import base64
import gzip
import html
import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from plotly.offline import get_plotlyjs
from tests.synthetic_runs import append_rows, finish, write_config

from tip_exp.config.schema import RunConfig
from tip_exp.records.reader import read_runs
from tip_exp.report import figures
from tip_exp.report.arms import summarize
from tip_exp.report.colours import COLOURS, colour_of, distance
from tip_exp.report.overlaps import overlaps
from tip_exp.report.page import page, render
from tip_exp.report.pictures import write_pictures
from tip_exp.report.significance import Estimate
from tip_exp.selector.scores import STATISTICS
from tip_exp.selector.selector import Selector
from tip_exp.utils.errors import DataError

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TOKENS = ["Now", " 1", "2", "-", "8", "=", "</script><b>", "4"]


def sample(step: int, kept: list[bool]) -> dict[str, Any]:
    """Token i has entropy i / 10, but the last one has low entropy and high divergence (Q3). Step 20 has no verdict."""
    statistics: dict[str, Any] = {name: [0.1 * i for i in range(8)] for name in STATISTICS}
    statistics["entropy"] = [0.1 * i for i in range(7)] + [0.001]
    statistics["reverse_kl"] = [0.01] * 7 + [5.0]
    statistics["forward_kl"] = [0.01] * 7 + [3.0]
    tops = {f"{name}_top": [[[name[0], 0.9], ["b", 0.05]]] * 8 for name in ("student", "teacher")}
    head = {"step": step, "problem_id": f"p{step}", "prompt": "Max has 12.", "answer": "4", "finish": "stop"}
    verdict = {} if step == 20 else {"right": False, "extracted": "<i>5"}
    return head | {"tokens": TOKENS, "kept": kept, "score": statistics["entropy"]} | statistics | tops | verdict


@pytest.fixture
def folder(tmp_path: Path, compose_run: Callable[..., RunConfig]) -> Path:
    """full, entropy at two retentions and q3, with two seeds each, metrics and samples."""
    for selector, retention in (("full", 1.0), ("entropy", 0.25), ("entropy", 0.5), ("q3", 0.125)):
        for seed in (0, 1):
            run = tmp_path / f"{selector}.r{100 * retention:g}.s{seed}"
            config = compose_run(f"selector={selector}", f"selector.retention={retention}", f"seed={seed}")
            write_config(config, run)
            finish(config, run, 0.4 + 0.1 * seed)
            shares = {f"quadrant/q{i}_share": 0.25 for i in (1, 2, 3, 4)}
            kept = {f"quadrant/q{i}_kept_frac": retention for i in (1, 2, 3, 4)}
            for step in (0, 20):
                row = {"step": step, "eval/word_sums/mean@4": 0.3 + step / 200, "select/response_tokens": 100}
                append_rows(run / "metrics.jsonl", [row | shares | kept])
            append_rows(run / "samples.jsonl", [sample(step, [i % 2 == 0 for i in range(8)]) for step in (20, 80)])
    return tmp_path


def page_of(folder: Path) -> str:
    records = read_runs([folder])
    return page(records, summarize(records))


def page_data(text: str) -> dict[str, Any]:
    packed = re.search(r'<script id="data" type="application/gzip">(.*?)</script>', text, flags=re.DOTALL)
    assert packed
    return json.loads(gzip.decompress(base64.b64decode(packed[1])))


def test_the_page_is_one_file_without_addresses(folder: Path) -> None:
    text = page_of(folder)
    packed = re.search(r'<script id="plotly" type="application/gzip">(.*?)</script>', text, flags=re.DOTALL)
    assert packed and gzip.decompress(base64.b64decode(packed[1])).decode() == get_plotlyjs()
    without_plotly = text.replace(packed[1], "")
    assert len(without_plotly) < 100_000 and len(text) < 2_500_000
    assert not re.search(r"""(src|href)\s*=\s*["']?https?:""", without_plotly)


def test_an_evaluation_alone_has_a_table_and_is_in_no_plot(folder: Path, compose_run: Callable[..., RunConfig]) -> None:
    before = page_of(folder)
    config = compose_run("mode=eval", "selector=soft_or")
    write_config(config, folder / "evaluated")
    finish(config, folder / "evaluated", 0.7)
    text = page_of(folder)
    assert "<h2>Evaluations without training</h2>" in text and "<td>evaluated</td>" in text
    assert page_data(text)["plots"] == page_data(before)["plots"]


def test_the_data_of_the_page(folder: Path) -> None:
    data = page_data(page_of(folder))
    assert "</script>" in json.dumps(data)  # a token that would close the script element
    plots = data["plots"]
    assert {plot_id.split("-")[1] for plot_id in plots} == {
        "accuracy", "curves", "memory", "quadrants", "plane", "overlap",
    }  # fmt: skip
    compared = [row for row in data["rollouts"] if "reference" in row]
    assert [row["reference"] for row in compared] == list(range(len(compared))) and compared[0]["step"] == 20
    assert [i for i, kept in enumerate(compared[0]["kept_by"]["q3 12.5 %"]) if kept] == [7]
    plane = plots["s0-plane"]["data"][1]  # the tokens that the first arm keeps
    places = {tuple(place) for place in plane["customdata"]}
    kept = {(row["reference"], i) for row in compared for i, kept in enumerate(row["kept_by"]["entropy 25 %"]) if kept}
    assert places and places <= kept
    assert data["downloads"][0]["csv"].startswith("pair,data,") and "q3 12.5 %" in data["downloads"][0]["json"]
    assert {rollout["run"] for rollout in data["rollouts"] if "reference" not in rollout} == {
        "full 100 %, seed 0", "entropy 25 %, seed 0", "entropy 50 %, seed 0", "q3 12.5 %, seed 0",
    }  # fmt: skip
    verdicts = {(row["step"], row.get("right"), row.get("extracted")) for row in data["rollouts"]}
    assert verdicts == {(20, None, None), (80, False, "<i>5")}
    curves = {trace["name"]: trace for trace in plots["s0-accuracy-word_sums"]["data"] if trace.get("name")}
    assert set(curves) == {"full (all tokens)", "entropy", "q3"}
    assert [round(y, 3) for y in curves["entropy"]["y"]] == [45.0, 45.0]  # mean of 40 and 50 %
    steps = {trace["name"]: trace for trace in plots["s0-curves-word_sums"]["data"] if trace.get("name")}
    assert steps["q3 12.5 %"]["x"] == [0, 20] and steps["q3 12.5 %"]["y"] == pytest.approx([30, 40])
    assert "100 % of tokens" in steps  # the legend says which dash is which retention
    (quadrants,) = plots["s0-quadrants"]["data"]
    shares = dict(zip(quadrants["y"], quadrants["z"], strict=True))
    assert shares["entropy 25 %"] == pytest.approx([25] * 4) and shares["full 100 %"] == pytest.approx([100] * 4)


def test_selectors_are_compared_on_the_same_tokens(compose_run: Callable[..., RunConfig]) -> None:
    arms = {
        "full": compose_run("selector=full"),
        "entropy": compose_run("selector=entropy", "selector.retention=0.25"),
        "q3": compose_run("selector=q3", "selector.retention=0.125"),
    }
    compared = overlaps([sample(20, [True] * 8)], {name: config.model_dump() for name, config in arms.items()})
    # of 8 tokens, 5 and 6 have the highest entropy; 7 has low entropy and high divergence
    assert [i for i, kept in enumerate(compared.kept["entropy"]) if kept] == [5, 6]
    assert [i for i, kept in enumerate(compared.kept["q3"]) if kept] == [7]
    assert compared.matrix == [[1, 2 / 8, 1 / 8], [2 / 8, 1, 0], [1 / 8, 0, 1]]  # full keeps all 8


def test_a_rule_that_fails_on_few_tokens_is_left_out(
    compose_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    select = Selector.__call__

    def fails(self: Selector, *arguments: Any) -> Any:
        if self.score == "entropy":
            raise FloatingPointError("the score is not finite")
        return select(self, *arguments)

    monkeypatch.setattr(Selector, "__call__", fails)
    arms = {name: compose_run(f"selector={name}").model_dump() for name in ("full", "entropy")}
    assert list(overlaps([sample(20, [True] * 8)], arms).kept) == ["full"]


def test_numbers_that_are_not_finite_do_not_break_the_page() -> None:
    text = render(["<p></p>"], {"plots": {}, "rollouts": [{"score": [math.inf, math.nan, 1.0]}], "statistics": []})
    assert page_data(text)["rollouts"] == [{"score": [None, None, 1.0]}]


def test_arms_that_look_alike_are_not_averaged(tmp_path: Path, compose_run: Callable[..., RunConfig]) -> None:
    for number, normalizer in enumerate(("minmax", "rank")):
        config = compose_run("selector=entropy", f"selector.normalizer={normalizer}", f"name={normalizer}")
        write_config(config, tmp_path / normalizer)
        finish(config, tmp_path / normalizer, 0.4)
        row = {"step": 20, "eval/word_sums/mean@4": 0.3 + 0.4 * number, "select/response_tokens": 100}
        shares = {f"quadrant/q{i}_share": 0.25 for i in (1, 2, 3, 4)}
        kept = {f"quadrant/q{i}_kept_frac": 0.2 + 0.5 * number for i in (1, 2, 3, 4)}
        append_rows(tmp_path / normalizer / "metrics.jsonl", [row | shares | kept])
        append_rows(tmp_path / normalizer / "samples.jsonl", [sample(20, [True] * 8)])
    data = page_data(page_of(tmp_path))
    names = [f"entropy 50 % (selector.normalizer={normalizer})" for normalizer in ("minmax", "rank")]
    plots = data["plots"]
    curves = {trace["name"]: trace["y"] for trace in plots["s0-curves-word_sums"]["data"] if trace.get("name")}
    assert [curves[name] for name in names] == [pytest.approx([30]), pytest.approx([70])]
    (quadrants,) = plots["s0-quadrants"]["data"]
    assert dict(zip(quadrants["y"], quadrants["z"], strict=True)) == {
        names[0]: pytest.approx([20] * 4), names[1]: pytest.approx([70] * 4),
    }  # fmt: skip
    assert list(data["rollouts"][0]["kept_by"]) == names == list(json.loads(data["downloads"][0]["json"]))


DRIVER = """
<script>
const report = {errors: window.failures};
const timer = setInterval(() => {
  if ([...document.querySelectorAll(".plot")].some(p => !p.querySelector(".main-svg"))) return;
  clearInterval(timer);
  report.plots = [...document.querySelectorAll(".plot")].map(p => p.querySelectorAll(".main-svg").length);
  report.theme = getComputedStyle(document.body).backgroundColor;
  report.tokens = document.querySelectorAll("#text .token").length;
  report.kept = document.querySelectorAll("#text .kept").length;
  document.getElementById("colour").value = "reverse_kl";
  document.getElementById("colour").dispatchEvent(new Event("change"));
  const last = [...document.querySelectorAll("#text .token")].at(-1);
  report.share = last.dataset.share;
  last.focus();
  report.tip = document.getElementById("tip").innerText;
  const press = key => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key, cancelable: true}));
  const place = () => [...document.querySelectorAll("#text .token")].indexOf(document.activeElement);
  const stops = () => [...document.querySelectorAll("#text .token")].map(token => token.tabIndex).join();
  report.moves = [place(), ...["ArrowRight", "ArrowLeft", "Home", "ArrowLeft", "ArrowRight", "End", "x"].map(key => {
    press(key);
    return place();
  })];
  document.querySelectorAll("#text .token")[2].focus();
  report.stops = stops();
  const choose = (id, value) => {
    const input = document.getElementById(id);
    input.value = value;
    input.dispatchEvent(new Event(input.tagName === "INPUT" ? "input" : "change"));
  };
  choose("colour", "quadrant");
  report.quadrants = [...document.querySelectorAll("#text .token")].map(t => t.className.match(/q\\d/)[0]).join();
  choose("order", "q3");
  const buttons = () => [...document.querySelectorAll("#list button")];
  report.listed = buttons().map(b => b.textContent);
  choose("order", "entropy"); choose("search", "1");
  report.found = buttons().map(b => b.textContent);
  buttons()[0].click();
  report.focused = document.activeElement.textContent;
  choose("keeper", "q3 12.5 %");
  report.keptByQ3 = [...document.querySelectorAll("#text .token")].findIndex(t => t.classList.contains("kept"));
  const heading = [...document.querySelectorAll("thead th")].find(th => th.textContent === "retention");
  heading.focus(); heading.dispatchEvent(new KeyboardEvent("keydown", {key: "Enter"}));
  report.sorted = [...heading.closest("table").tBodies[0].rows].map(row => row.cells[heading.cellIndex].textContent);
  const run = document.getElementById("run");
  run.value = "q3 12.5 %, seed 0"; run.dispatchEvent(new Event("change"));
  const rollout = document.getElementById("rollout"), verdict = document.getElementById("verdict");
  report.run = run.value; report.rollouts = [...rollout.options].map(option => option.text);
  report.verdicts = [verdict.textContent];
  choose("rollout", "1");
  report.verdicts.push(verdict.textContent);
  const row = selectedRollouts()[1];
  for (const [right, extracted] of [[true, "4"], [false, null], [null, "9^9"], [1, undefined], [0.25, undefined]]) {
    Object.assign(row, {right, extracted}); choose("rollout", "1");
    report.verdicts.push(verdict.textContent);
  }
  const out = document.createElement("pre"); out.id = "report"; out.textContent = JSON.stringify(report);
  document.body.append(out);
}, 200);
</script>
"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs a Chromium")
@pytest.mark.parametrize(("theme", "background"), [("light", "rgb(255, 255, 255)"), ("dark", "rgb(20, 23, 27)")])
def test_in_a_browser(folder: Path, theme: str, background: str) -> None:
    catch = "<script>window.failures = []; window.onerror = message => window.failures.push(String(message));</script>"
    text = page_of(folder).replace("<head>", "<head>" + catch, 1)
    path = folder / "page.html"
    path.write_text(text.replace("</body>\n</html>", DRIVER + "</body></html>"), encoding="utf-8")
    assert BROWSER
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += ["--window-size=1400,2200", "--virtual-time-budget=20000", f"--user-data-dir={folder}/browser"]
    dom = subprocess.run(
        [*command, "--dump-dom", f"file://{path}?theme={theme}"], capture_output=True, text=True, timeout=180
    ).stdout
    match = re.search(r'<pre id="report">(.*?)</pre>', dom, flags=re.DOTALL)
    assert match, dom[-2000:]
    report = json.loads(html.unescape(match[1]))
    assert report["errors"] == []
    assert len(report["plots"]) == 6 and min(report["plots"]) >= 2
    assert report["theme"] == background
    assert (report["tokens"], report["kept"]) == (8, 4)
    assert report["share"] == "1.000"  # the largest divergence
    assert report["moves"] == [7, 7, 6, 0, 0, 1, 7, 7], "arrow keys move along the tokens"
    assert report["stops"] == "-1,-1,0,-1,-1,-1,-1,-1", "the Tab key stops at one token of a response"
    for part in ('"4"', "token 8 of 8", "left out", "reverse_kl", "5.000", "student", "teacher", '"s"', '"t"', "0.900"):
        assert part in report["tip"], part
    assert report["quadrants"] == "q4,q4,q4,q2,q2,q2,q2,q3"
    assert report["listed"] == ['"4"'] * 2 and report["found"] == ['" 1"'] * 2  # of steps 20 and 80
    assert report["focused"] == " 1" and report["keptByQ3"] == 7
    assert report["sorted"] == ["12.5 %", "25 %", "50 %", "100 %"]
    assert (report["run"], report["rollouts"]) == ("q3 12.5 %, seed 0", ["step 20: p20", "step 80: p80, wrong"])
    assert report["verdicts"] == [
        "Verdict: not graded; known answer: 4",
        "Verdict: wrong; answer in the response: <i>5; known answer: 4",
        "Verdict: right; answer in the response: 4; known answer: 4",
        "Verdict: wrong; no answer in the response; known answer: 4",
        "Verdict: not graded; answer in the response: 9^9; known answer: 4",
        "Verdict: right; known answer: 4",
        "Verdict: score 0.250; known answer: 4",
    ]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs a Chromium")
def test_pictures(folder: Path) -> None:
    records = read_runs([folder])
    paths = write_pictures(records, summarize(records), folder / "png")
    kinds = {"accuracy-word_sums", "curves-word_sums", "memory", "quadrants", "plane", "overlap"}
    assert {path.name for path in paths} == {f"0_tiny_word_sums.{kind}.png" for kind in kinds}
    for path in paths:
        # an empty page of this size is 4 kB as PNG
        assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 8_000, path


def test_pictures_without_a_browser(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    records = read_runs([folder])
    with pytest.raises(DataError, match="pictures need one of chromium"):
        write_pictures(records, summarize(records), folder / "png")


def test_a_browser_that_draws_nothing_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    browser = folder / "bin" / "chromium"
    browser.parent.mkdir()
    browser.write_text("#!/bin/sh\necho no display >&2\nexit 1\n")
    browser.chmod(0o755)
    monkeypatch.setenv("PATH", f"{browser.parent}{os.pathsep}/bin{os.pathsep}/usr/bin")
    records = read_runs([folder])
    old = folder / "png" / "0_tiny_word_sums.accuracy-word_sums.png"
    old.parent.mkdir()
    old.touch()
    with pytest.raises(DataError, match=r"did not draw 0_tiny_word_sums\.accuracy-word_sums\.png: \['no display'\]"):
        write_pictures(records, summarize(records), folder / "png")


def test_arms_far_below_the_best_are_named_and_outside_of_the_axis(folder: Path) -> None:
    arms = summarize(read_runs([folder]))
    colours = colour_of([arm.selector for arm in arms])
    assert figures.accuracy(arms, colours).layout.yaxis.range is None  # all are at 45 %
    for arm in arms:
        if arm.selector == "q3":
            arm.final = Estimate(0.02, 0.01)
    layout = figures.accuracy(arms, colours).layout
    assert layout.yaxis.range == (37, 50)  # 45 - 8, 45 + 5
    assert [note.text for note in layout.annotations] == ["not in the plot: q3, 50 % kept: 2.0 %"]


def test_arms_stand_at_what_they_kept_on_a_logarithmic_axis(folder: Path) -> None:
    arms = [arm for arm in summarize(read_runs([folder])) if arm.selector in ("full", "q3")]
    (q3,) = [arm for arm in arms if arm.selector == "q3"]
    for kept, drawn in ((0.004, 0.4), (0.088, 8.8), (math.nan, 12.5)):
        q3.kept_frac = kept
        for draw in (figures.accuracy, figures.memory):
            figure = draw(arms, colour_of(["full", "q3"]))
            (curve,) = [trace for trace in figure.data if trace.name == "q3" and trace.mode == "lines+markers"]
            assert curve.x == pytest.approx([drawn])
        axis = figures.accuracy(arms, colour_of(["full", "q3"])).layout.xaxis
        assert axis.type == "log" and 10 ** axis.range[0] < drawn < 100 < 10 ** axis.range[1]


def test_weighted_arms_of_all_tokens_are_points_beside_the_line_of_equal_weights(
    folder: Path, compose_run: Callable[..., RunConfig]
) -> None:
    for seed in (0, 1):
        config = compose_run("selector=full", "selector.weight=sqrt", f"seed={seed}")
        write_config(config, folder / f"a_weighted{seed}")  # before the others
        finish(config, folder / f"a_weighted{seed}", 0.1)
    arms = summarize(read_runs([folder]))
    traces = figures.accuracy(arms, colour_of(sorted({arm.selector for arm in arms}))).data
    line, *_ = [trace for trace in traces if trace.line.dash == "dash"]
    assert list(line.y) == [pytest.approx(45.0, abs=0.1)] * 2
    (points,) = [trace for trace in traces if trace.name == "full"]
    assert list(points.y) == [pytest.approx(10.0)]


def test_each_seed_is_a_dot(folder: Path) -> None:
    arms = [arm for arm in summarize(read_runs([folder])) if arm.selector in ("full", "q3")]
    (dots,) = [trace for trace in figures.accuracy(arms, colour_of(["full", "q3"])).data if trace.mode == "markers"]
    assert list(dots.y) == pytest.approx([40, 50])


def test_bands_are_t_intervals_of_the_difference_to_all_tokens(folder: Path) -> None:
    arms = [arm for arm in summarize(read_runs([folder])) if arm.selector in ("full", "q3")]
    (q3,) = [arm for arm in arms if arm.selector == "q3"]
    q3.difference = Estimate(0.05, 0.01, df=2, over_seeds=True)

    def half_width() -> float:
        (band,) = [trace for trace in figures.accuracy(arms, {"full": "#000000", "q3": "#0072B2"}).data if trace.fill]
        return (max(band.y) - min(band.y)) / 2

    assert half_width() == pytest.approx(4.303, abs=1e-3)  # t of 2 degrees of freedom, 97.5 %; not 1.96
    q3.difference, q3.final = None, Estimate(0.5, 0.02, df=4)
    assert half_width() == pytest.approx(2 * 2.776, abs=1e-3)


def test_learning_curves_have_one_panel_per_selector_with_the_other_arms_in_grey() -> None:
    curves = {arm: {0: [0.3, 0.3], 20: [0.5, end]} for arm, end in (("full 100 %", 0.6), ("q3 10 %", 0.4))}
    curves |= {"q3 50 %": {0: [0.3, 0.3], 20: [0.5, 0.9]}}
    selectors = {"full 100 %": "full", "q3 10 %": "q3", "q3 50 %": "q3"}
    colours = colour_of(["full", "q3"])
    figure = figures.learning_curves(curves, selectors, colours)
    assert [note.text for note in figure.layout.annotations] == ["full", "q3"]
    drawn = {
        (trace.name, trace.xaxis, trace.line.color, trace.line.dash): list(trace.y)
        for trace in figure.data
        if trace.name in curves
    }
    assert drawn == {
        ("full 100 %", "x", colours["full"], "solid"): pytest.approx([30, 55]),
        ("q3 10 %", "x2", colours["q3"], "dash"): pytest.approx([30, 45]),
        ("q3 50 %", "x2", colours["q3"], "dot"): pytest.approx([30, 70]),
    }
    grey = {trace.xaxis: [y for y in trace.y if y is not None] for trace in figure.data if trace.line.width == 1}
    assert grey["x"] == pytest.approx([30, 45, 30, 70]) and grey["x2"] == pytest.approx([30, 55])
    bands = {trace.xaxis: (min(trace.y), max(trace.y)) for trace in figure.data if trace.fill and trace.xaxis == "x"}
    assert bands == {"x": pytest.approx((30, 60))}  # the range of the seeds


def test_many_selectors_have_distinct_colours() -> None:
    names = [f"s{i}" for i in range(24)]
    colours = colour_of(names)
    assert list(colours.values())[: len(COLOURS)] == list(COLOURS)
    nearest = min(distance(a, b) for i, a in enumerate(colours.values()) for b in list(colours.values())[:i])
    assert nearest > 60  # of 765
    assert {name: colours[name] for name in names[:12]} == colour_of(names[:12])
