"""The table of shadow selectors: means over steps and runs, in the report, the results and the page."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.synthetic_runs import append_rows, finish, write_config

from tip_exp.config.schema import RunConfig
from tip_exp.records.reader import read_runs
from tip_exp.report import cli
from tip_exp.report.arms import summarize
from tip_exp.report.page import page
from tip_exp.report.results_page import write_results
from tip_exp.report.shadows import shadow_tables
from tip_exp.report.tables import Table

Compose = Callable[..., RunConfig]
SHADOWS = "selector.shadows=[soft_or@0.2,full]"
# Overlap of soft_or@0.2 by seed and step with diagnostics: mean 35 %, standard deviation of 20, 30, 40, 50: 12.9.
OVERLAPS = {0: (0.2, 0.3), 1: (0.4, 0.5)}


@pytest.fixture
def root(tmp_path: Path, compose_run: Compose) -> Path:
    """q3 with two finished seeds and an unfinished one, whose numbers do not count; full without shadows."""
    for seed, overlaps in (OVERLAPS | {2: (0.0, 0.0)}).items():
        run = tmp_path / f"q3{seed}"
        config = compose_run("selector=q3", "selector.retention=0.1", SHADOWS, f"seed={seed}", "sweep=demo")
        write_config(config, run)
        rows = [{"step": 0}, {"step": 3, "select/kept_frac": 0.9}]  # steps without diagnostics
        for step, overlap in enumerate(overlaps):
            row = {"step": step + 1, "select/kept_frac": 0.1, "select/gradient_mass": 0.9, "quadrant/q3_kept_frac": 1.0}
            row |= {"shadow/soft_or@0.2/overlap": overlap, "shadow/soft_or@0.2/kept_frac": 0.2}
            row |= {"shadow/soft_or@0.2/kl_mass": None if step else 0.75, "shadow/soft_or@0.2/q3_kept_frac": 0.5}
            rows.append(row)
        append_rows(run / "metrics.jsonl", rows)
        (run / "samples.jsonl").touch()
        if seed in OVERLAPS:
            finish(config, run, 0.8)
    config = compose_run("selector=full")
    write_config(config, tmp_path / "full")
    append_rows(tmp_path / "full" / "metrics.jsonl", [{"step": 1, "select/kept_frac": 1.0}])
    (tmp_path / "full" / "samples.jsonl").touch()
    finish(config, tmp_path / "full", 0.7)
    return tmp_path


def tables_of(root: Path) -> list[Table]:
    records = read_runs([root])
    return shadow_tables(summarize(records), records)


def test_means_and_spread_are_over_the_steps_with_diagnostics_of_finished_runs(root: Path) -> None:
    (table,) = tables_of(root)
    assert table.title == "Shadow selectors: tiny, word_sums"
    q3, soft_or, full = (dict(zip(table.headings, row, strict=True)) for row in table.rows)
    counts = {"trained on": "q3 10 %", "runs": "2", "steps": "4"}
    assert q3 == counts | {
        "rule": "itself", "overlap": "-", "kept": "10.0 ± 0.0", "gradient mass": "90.0 ± 0.0", "KL mass": "-",
        "Q3 kept": "100.0 ± 0.0",
    }  # fmt: skip
    assert soft_or == counts | {
        "rule": "soft_or@0.2", "overlap": "35.0 ± 12.9", "kept": "20.0 ± 0.0", "gradient mass": "-",
        "KL mass": "75.0 ± 0.0", "Q3 kept": "50.0 ± 0.0",
    }  # fmt: skip
    assert full == counts | {"rule": "full"} | dict.fromkeys(table.headings[4:], "-")  # its statistics were not finite


def test_a_damaged_run_is_a_note_and_runs_without_shadows_have_no_table(root: Path) -> None:
    (root / "q30" / "metrics.jsonl").write_text('{"step"\n')
    (table,) = tables_of(root)
    assert table.rows[0][table.headings.index("runs")] == "1"
    assert "q30 is left out: metrics.jsonl is torn" in table.notes[-1]
    for run in root.glob("q3*"):
        (run / "metrics.jsonl").write_text('{"step": 0}\n')
    assert tables_of(root) == []


def test_the_command_the_results_and_the_page_have_it(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["tip-report", str(root)])
    cli.main()
    assert "### Shadow selectors: tiny, word_sums" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["tip-report", str(root), "--where", "selector=full"])
    cli.main()
    assert "Shadow" not in capsys.readouterr().out
    records = read_runs([root])
    assert "<summary>Shadow selectors: tiny, word_sums</summary>" in page(records, summarize(records))
    write_results(records, root / "out", "command")
    assert "Shadow selectors: tiny, word_sums" in (root / "out" / "demo" / "demo.md").read_text()
