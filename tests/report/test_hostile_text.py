"""Text of models and configs in a report: no script, no formula, no dead page, no broken table."""

from __future__ import annotations

import base64
import csv
import gzip
import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.synthetic_runs import append_rows, finish, write_config

from tip_exp.config.schema import RunConfig
from tip_exp.records.reader import read_runs
from tip_exp.report.arms import summarize
from tip_exp.report.overview import csv_text, overview
from tip_exp.report.tables import Table, markdown
from tip_exp.selector.scores import STATISTICS

TOKENS = ["<!--<script>", "</script>", "<img src=x onerror=alert(1)>", "\ud83d", "\x00", "\u2028", "`${1}`", "&lt;"]


def write_run(compose_run: Callable[..., RunConfig], folder: Path, *overrides: str) -> None:
    config = compose_run(*overrides)
    write_config(config, folder)
    finish(config, folder, 0.5)
    append_rows(folder / "metrics.jsonl", [{"step": 0, "eval/word_sums/mean@4": math.nan, "select/response_tokens": 1}])
    values = [math.nan, math.inf, -math.inf, *[0.5] * 5]
    row: dict[str, Any] = {name: values for name in (*STATISTICS, "score")}
    row |= {"step": 1, "problem_id": "p", "prompt": "<!--<script>", "answer": "4", "finish": "stop", "tokens": TOKENS}
    append_rows(folder / "samples.jsonl", [row | {"kept": [True] * 8}])


def no_constant(name: str) -> Any:
    raise AssertionError(f"{name} is not JSON")


def test_a_page_holds_no_script_of_a_model_and_only_json(compose_run: Callable[..., RunConfig], tmp_path: Path) -> None:
    from tip_exp.report.page import page

    write_run(compose_run, tmp_path / "a", "selector=full", "selector.label='<script>x'")
    records = read_runs([tmp_path])
    text = page(records, summarize(records), Table("", [], [["<b>", "damaged: <!--<script>"]]))
    packed = re.search(r'<script id="data" type="application/gzip">(.*?)</script>', text, flags=re.DOTALL)
    assert packed
    data = json.loads(gzip.decompress(base64.b64decode(packed[1])), parse_constant=no_constant)
    assert data["rollouts"][0]["tokens"] == TOKENS
    assert data["rollouts"][0]["entropy"][:4] == [None, None, None, 0.5]
    assert "<!--<script>" not in text and "<script>x" not in text and "<b>" not in text
    text.encode()


def test_a_bar_stays_in_its_cell() -> None:
    lines = markdown(Table("", ["a|b", "c"], [["x|y", "two\nlines"], ["=1", "z"]])).splitlines()
    assert len(lines) == 4
    for line in lines:
        assert len(re.findall(r"(?<!\\)\|", line)) == 3, line


@pytest.mark.parametrize("label", ["=cmd", "+1", "-1", "@x"])
def test_a_cell_of_the_csv_is_no_formula(label: str, compose_run: Callable[..., RunConfig], tmp_path: Path) -> None:
    write_run(compose_run, tmp_path / "a", f"selector.label='{label}'", "seed=3")
    arms = summarize(read_runs([tmp_path]))
    (row,) = csv.DictReader(io.StringIO(csv_text(arms)))
    assert row["selector"] == f"'{label}" and float(row["final"]) == 0.5
    assert label in markdown(overview(arms))
