"""500 pages with rollouts that attack them, in a browser: no script runs, no page is dead, no error is in the console."""

# ruff: noqa: E501 (scripts and what attacks them)
from __future__ import annotations

import html
import json
import math
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.synthetic_runs import append_rows, finish, write_config
from tests.test_hostile_output import PIECES

from tip_exp.config.schema import RunConfig
from tip_exp.records.reader import read_runs
from tip_exp.report import page as page_module
from tip_exp.report.arms import summarize
from tip_exp.report.page import page, render
from tip_exp.report.pictures import CHROMIUMS
from tip_exp.report.run_files import read_files
from tip_exp.report.viewer import reference_rollouts, viewer_rollouts
from tip_exp.selector.scores import STATISTICS
from tip_exp.utils.io import without_nan

BROWSER = next(filter(None, map(shutil.which, CHROMIUMS)), None)
PAGES = 500
ATTACKS = [
    "<script>attack()</script>", "</script><script>attack()</script>", "--></script><script>attack()</script><!--",
    "<img src=x onerror=attack()>", '"><svg onload=attack()>', "'><body onload=attack()>", "</textarea><img src=x onerror=attack()>",
    "<iframe srcdoc='<script>parent.attack()</script>'></iframe>", "<a autofocus tabindex=0 onfocus=attack()>x</a>",
    "javascript:attack()", "${attack()}", "`+attack()+`", "'-attack()-'", "\\u003cscript>attack()</script>", "{{constructor.constructor('attack()')()}}",
    "<style>@import 'javascript:attack()';</style>", "<math><mtext></mtext><script>attack()</script></math>", "<base href='javascript:attack()//'>",
    "__proto__", "constructor", "<option selected>", "</option></select><img src=x onerror=attack()>", "<meta http-equiv=refresh content='0;url=javascript:attack()'>",
]  # fmt: skip
# Before all scripts of a page: whatever runs or fails is told to the frame around it.
CATCH = """<script>
const tell = message => parent.postMessage(message, "*");
window.attack = window.alert = () => tell({attack: document.title});
window.onerror = message => tell({error: String(message)});
window.onunhandledrejection = event => tell({error: String(event.reason)});
console.error = console.warn = (...parts) => tell({error: parts.join(" ")});
</script>"""
# After them: shows every rollout in every colour, each token's tip, and the list of tokens.
USE = """<script>
const choose = (id, value) => { element(id).value = value; element(id).dispatchEvent(new Event(id === "search" ? "input" : "change")); };
const waiting = setInterval(() => {
  if (!element("run").options.length || !window.Plotly) return;
  clearInterval(waiting);
  let tokens = 0;
  for (const run of [...element("run").options].map(option => option.value)) {
    choose("run", run);
    for (let number = 0; number < selectedRollouts().length; number++) {
      choose("rollout", String(number));
      for (const colour of [...element("colour").options].map(option => option.value)) choose("colour", colour);
      const row = selectedRollouts()[number], spans = [...element("text").children];
      if (spans.map(span => span.textContent).join("") !== visible(row.tokens.join(""))) tell({error: "other text"});
      spans.forEach(span => { span.onfocus(); });
      tokens += spans.length;
    }
  }
  choose("search", "<");
  for (const button of [...element("list").querySelectorAll("button")].slice(0, 5)) button.click();
  const made = document.querySelectorAll("#viewer :is(img, svg, iframe, script, style, a, base), #tip :is(img, svg, iframe, script)");
  if (made.length) tell({error: `elements of a rollout: ${made[0].outerHTML}`});
  tell({done: true, tokens});
}, 5);
</script>"""
FRAME = """<pre id="report"></pre><iframe id="frame" width="1200" height="900"></iframe><script>
const report = {done: 0, tokens: 0, attacks: [], errors: []}, pages = PAGES;
const next = () => { if (report.done < pages) document.getElementById("frame").src = `${report.done}.html`; };
onmessage = ({data}) => {
  if (data.attack !== undefined) report.attacks.push(report.done);
  if (data.error !== undefined) report.errors.push([report.done, data.error.slice(0, 300)]);
  if (data.done) { report.done += 1; report.tokens += data.tokens; next(); }
  document.getElementById("report").textContent = JSON.stringify(report);
};
next();
</script>"""


def hostile_row(draw: random.Random) -> dict[str, Any]:
    def text() -> str:
        return "".join(draw.choice(ATTACKS if draw.random() < 0.6 else PIECES) for _ in range(draw.randint(1, 3)))

    tokens = [text() for _ in range(draw.randint(1, 12))]
    row: dict[str, Any] = {"step": draw.randint(0, 9), "problem_id": text(), "prompt": text(), "answer": text()}
    row |= {"finish": text(), "extracted": draw.choice([text(), None]), "right": draw.choice([True, False, None, 0.5])}
    for name in (*STATISTICS, "score"):
        if draw.random() < 0.8:
            row[name] = [draw.choice([0.0, draw.random(), -1.0, 1e300, math.nan, math.inf]) for _ in tokens]
    if draw.random() < 0.5:
        row |= {f"{model}_top": [[[text(), 0.5], [text(), 0.1]] for _ in tokens] for model in ("student", "teacher")}
    return row | {"tokens": tokens, "kept": [draw.random() < 0.5 for _ in tokens]}


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs a Chromium")
def test_no_rollout_runs_a_script_or_stops_a_page(
    tmp_path: Path, compose_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last page has the plots as well, with names that attack them; the others have the viewer alone."""
    draw, config = random.Random(0), compose_run("selector=full")
    label = "<img src=x onerror=attack()>"
    hostile = config.model_copy(update={"selector": config.selector.model_copy(update={"label": label})})
    write_config(hostile, tmp_path / "run")
    finish(hostile, tmp_path / "run", 0.5)
    append_rows(tmp_path / "run" / "metrics.jsonl", [{"step": 0, "eval/word_sums/mean@4": 0.5}])
    records = read_runs([tmp_path])
    for number in range(PAGES):
        rows = tmp_path / "run" / "samples.jsonl"
        rows.unlink(missing_ok=True)
        append_rows(rows, [hostile_row(draw) for _ in range(draw.randint(1, 4))])
        if number == PAGES - 1:
            text = page(records, summarize(records))
        else:
            (run,), _ = read_files(records, {records[0].folder: label})
            tokens = page_module.overlaps(reference_rollouts([run]), {run.arm: run.config})
            rollouts = [row | {"setting": draw.choice(ATTACKS)} for row in viewer_rollouts([run], tokens)]
            data = {"plots": {}, "rollouts": rollouts, "statistics": list(STATISTICS), "downloads": []}
            with monkeypatch.context() as patched:
                patched.setattr(page_module, "get_plotlyjs", lambda: "window.Plotly = {};")
                text = render([], without_nan(data))
        text = text.replace("<head>", f"<head>{CATCH}", 1).replace("</body>\n</html>", f"{USE}</body></html>")
        (tmp_path / f"{number}.html").write_text(text, encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.replace("PAGES", str(PAGES)))
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += ["--virtual-time-budget=1000000", f"--user-data-dir={tmp_path}/browser", "--dump-dom", f"file://{frame}"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=1800).stdout
    match = re.search(r'<pre id="report">(.*?)</pre>', dom, flags=re.DOTALL)
    assert match, dom[-2000:]
    report = json.loads(html.unescape(match[1]))
    print(report)
    assert (report["attacks"], report["errors"], report["done"]) == ([], [], PAGES)
    assert report["tokens"] > 2 * PAGES
