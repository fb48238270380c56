"""The HTML page: one file, no network, every plot drawn in a browser in both themes, the token viewer alive."""

from __future__ import annotations

import base64
import gzip
import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from plotly.offline import get_plotlyjs
from tests import synthetic_runs

from tip_exp.config.schema import RunConfig
from tip_exp.records.reader import read_runs
from tip_exp.report import figures
from tip_exp.report.arms import Measured, runs_frame, summarize
from tip_exp.report.overlaps import overlaps
from tip_exp.report.page import page
from tip_exp.report.pictures import write_pictures
from tip_exp.selector.scores import STATISTICS
from tip_exp.utils.io import append_rows

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TOKENS = ["Now", " 1", "2", "-", "8", "=", "</script><b>", "4"]


def sample(step: int, kept: list[bool]) -> dict[str, Any]:
    """Token i has entropy i / 10; the last one is confident and wrong (Q3)."""
    numbers: dict[str, Any] = {name: [0.1 * i for i in range(8)] for name in STATISTICS}
    numbers["entropy"] = [0.1 * i for i in range(7)] + [0.001]
    numbers["reverse_kl"] = [0.01] * 7 + [5.0]
    numbers["forward_kl"] = [0.01] * 7 + [3.0]
    tops = {f"{name}_top": [[[name[0], 0.9], ["b", 0.05]]] * 8 for name in ("student", "teacher")}
    head = {"step": step, "problem_id": f"p{step}", "prompt": "Max has 12.", "answer": "4", "finish": "stop"}
    return head | {"tokens": TOKENS, "kept": kept, "score": numbers["entropy"]} | numbers | tops


@pytest.fixture
def folder(tmp_path: Path, compose_run: Callable[..., RunConfig]) -> Path:
    """full, entropy and q3 at two ratios, two seeds each, with metrics and samples."""
    for selector, ratios in (("full", [1.0]), ("entropy", [0.25, 0.5]), ("q3", [0.125])):
        for ratio in ratios:
            for seed in (0, 1):
                run = tmp_path / f"{selector}{ratio}{seed}"
                config = compose_run(f"selector={selector}", f"selector.retention={ratio}", f"seed={seed}")
                synthetic_runs.write_config(config, run)
                synthetic_runs.finish(config, run, 0.4 + 0.1 * seed)
                shares = {f"quadrant/q{i}_share": 0.25 for i in (1, 2, 3, 4)}
                kept = {f"quadrant/q{i}_kept_frac": ratio for i in (1, 2, 3, 4)}
                rows = [
                    {"step": step, "eval/word_sums/mean@4": 0.3 + step / 200, "select/response_tokens": 100}
                    | shares
                    | kept
                    for step in (0, 20)
                ]
                append_rows(run / "metrics.jsonl", rows)
                append_rows(run / "samples.jsonl", [sample(step, [i % 2 == 0 for i in range(8)]) for step in (20, 80)])
    return tmp_path


def written(folder: Path) -> str:
    records = read_runs([folder])
    return page(records, summarize(runs_frame(records)))


def test_the_page_is_one_file_without_addresses(folder: Path) -> None:
    text = written(folder)
    packed = re.search(r'<script id="plotly" type="application/gzip">(.*?)</script>', text, flags=re.DOTALL)
    assert packed and gzip.decompress(base64.b64decode(packed[1])).decode() == get_plotlyjs()
    without_plotly = text.replace(packed[1], "")
    assert len(without_plotly) < 100_000 and len(text) < 2_500_000
    assert not re.search(r"""(src|href)\s*=\s*["']?https?:""", without_plotly)
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, flags=re.DOTALL)
    assert found
    data = json.loads(found[1])  # a token that closes a script element does not close this one
    assert {key.split("-")[1] for key in data["plots"]} == {
        "accuracy", "curves", "memory", "quadrants", "plane", "overlap",
    }  # fmt: skip
    assert {rollout["run"] for rollout in data["rollouts"]} == {
        "full 100 %, seed 0", "entropy 25 %, seed 0", "entropy 50 %, seed 0", "q3 12.5 %, seed 0",
    }  # fmt: skip
    accuracy = data["plots"]["s0-accuracy-word_sums"]["data"]
    lines = {trace["name"]: trace for trace in accuracy if trace.get("name")}
    assert set(lines) == {"full (all tokens)", "entropy", "q3"}
    assert [round(y, 3) for y in lines["entropy"]["y"]] == [45.0, 45.0]  # seeds at 40 and 50 %


def test_selectors_on_the_same_tokens(compose_run: Callable[..., RunConfig]) -> None:
    arms = {
        "full": compose_run("selector=full"),
        "entropy": compose_run("selector=entropy", "selector.retention=0.25"),
        "q3": compose_run("selector=q3", "selector.retention=0.125"),
    }
    found = overlaps([sample(20, [True] * 8)], {name: config.model_dump() for name, config in arms.items()})
    assert found
    # 8 tokens: the two highest entropies are 5 and 6; the confident and wrong one is 7
    assert [i for i, kept in enumerate(found.kept["entropy"]) if kept] == [5, 6]
    assert [i for i, kept in enumerate(found.kept["q3"]) if kept] == [7]
    assert found.matrix == [[1.0, 0.25, 0.125], [0.25, 1.0, 0.0], [0.125, 0.0, 1.0]]
    lacking = {key: value for key, value in sample(20, [True] * 8).items() if key != "forward_kl"}
    assert overlaps([lacking], {"q3": arms["q3"].model_dump()}) is None


DRIVER = """
<script>
const told = {errors: window.failures};
setTimeout(() => {
  told.plots = [...document.querySelectorAll(".plot")].map(p => p.querySelectorAll(".main-svg").length);
  told.theme = getComputedStyle(document.body).backgroundColor;
  told.tokens = document.querySelectorAll("#text .token").length;
  told.kept = document.querySelectorAll("#text .kept").length;
  document.getElementById("colour").value = "reverse_kl";
  document.getElementById("colour").dispatchEvent(new Event("change"));
  const last = [...document.querySelectorAll("#text .token")].at(-1);
  told.share = last.dataset.share;
  last.focus();
  told.tip = document.getElementById("tip").innerText;
  const run = document.getElementById("run");
  run.selectedIndex = 3; run.dispatchEvent(new Event("change"));
  told.run = run.value; told.rollouts = document.getElementById("rollout").options.length;
  const out = document.createElement("pre"); out.id = "told"; out.textContent = JSON.stringify(told);
  document.body.append(out);
}, 3000);
</script>
"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs a Chromium")
@pytest.mark.parametrize(("theme", "ground"), [("light", "rgb(255, 255, 255)"), ("dark", "rgb(20, 23, 27)")])
def test_in_a_browser(folder: Path, theme: str, ground: str) -> None:
    catch = "<script>window.failures = []; window.onerror = message => window.failures.push(String(message));</script>"
    text = written(folder).replace("<head>", "<head>" + catch, 1)
    place = folder / "page.html"
    place.write_text(text.replace("</body>\n</html>", DRIVER + "</body></html>"), encoding="utf-8")
    assert BROWSER
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += ["--window-size=1400,2200", "--virtual-time-budget=20000", f"--user-data-dir={folder}/browser"]
    dom = subprocess.run(
        [*command, "--dump-dom", f"file://{place}?theme={theme}"], capture_output=True, text=True, timeout=180
    ).stdout
    found = re.search(r'<pre id="told">(.*?)</pre>', dom, flags=re.DOTALL)
    assert found, dom[-2000:]
    told = json.loads(html.unescape(found[1]))
    assert told["errors"] == []
    assert len(told["plots"]) == 6 and min(told["plots"]) >= 2
    assert told["theme"] == ground
    assert (told["tokens"], told["kept"]) == (8, 4)
    assert told["share"] == "1.000"  # the largest divergence
    for part in ('"4"', "token 8 of 8", "left out", "reverse_kl", "5.000", "student", "teacher", '"s"', '"t"', "0.900"):
        assert part in told["tip"], part
    assert (told["run"], told["rollouts"]) == ("q3 12.5 %, seed 0", 2)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs a Chromium")
def test_pictures(folder: Path) -> None:
    records = read_runs([folder])
    written = write_pictures(records, summarize(runs_frame(records)), folder / "png")
    kinds = {"accuracy-word_sums", "curves-word_sums", "memory", "quadrants", "plane", "overlap"}
    assert {path.name for path in written} == {f"0_tiny_word_sums.{kind}.png" for kind in kinds}
    for path in written:
        # an empty page of this size is 4 kB as PNG
        assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 8_000, path


def test_pictures_without_a_browser(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    records = read_runs([folder])
    with pytest.raises(FileNotFoundError, match="pictures need one of chromium"):
        write_pictures(records, summarize(runs_frame(records)), folder / "png")


def test_arms_far_below_are_named_and_do_not_press_the_others_together(folder: Path) -> None:
    summary = summarize(runs_frame(read_runs([folder])))
    shown = figures.accuracy(summary, figures.colour_of(list(summary["selector"])))
    assert shown.layout.yaxis.range is None  # all at 45 %
    low = summary.copy()
    low["final"] = [
        Measured(0.02, 0.01) if name == "q3" else one for name, one in zip(low["selector"], low["final"], strict=True)
    ]
    shown = figures.accuracy(low, figures.colour_of(list(low["selector"])))
    assert shown.layout.yaxis.range == (37, 50)  # 45 - 8, 45 + 5
    assert [note.text for note in shown.layout.annotations] == ["below: q3 12.5 %: 2.0"]
