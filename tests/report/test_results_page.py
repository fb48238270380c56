"""results/README.md from synthetic run folders: what is filled, from which runs, by which command, and what is not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from tests.synthetic_runs import finish, write_config

from tip_exp.config.schema import RunConfig
from tip_exp.records.reader import read_runs
from tip_exp.report.arms import runs_frame, summarize
from tip_exp.report.results_page import command_of, sweep_tables, unfilled_cells

Run = Callable[..., RunConfig]
VERSIONS = {"tip_exp": "0.1.0", "torch": "2.13.0"}


def make(compose_run: Run, folder: Path, final: float | None, *overrides: str, **settings) -> None:
    config = compose_run(*overrides)
    write_config(config, folder)
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "overrides.yaml").write_text("".join(f"- {one}\n" for one in overrides if "sweep=" not in one))
    if final is not None:
        finish(config, folder, final, **settings)
        result = json.loads((folder / "result.json").read_text()) | {"versions": VERSIONS}
        (folder / "result.json").write_text(json.dumps(result | {"git_revision": "0123456789abcdef" * 2 + "+"}))


@pytest.fixture
def runs(tmp_path: Path, compose_run: Run) -> Path:
    """table5 on a pair of the paper, two arms of five and one begun; demo_table6 whole, two seeds; one single run."""
    root, gpu = tmp_path / "outputs", "8 x NVIDIA H200"
    for name, final, selector in (("full", 0.7, "full"), ("soft", 0.8, "soft_or"), ("begun", None, "entropy_sample")):
        overrides = ["sweep=table5", "experiment=tip_qwen3", f"selector={selector}"]
        make(compose_run, root / "table5" / name, final, *overrides, hardware=gpu)
    for selector in ("full", "soft_or", "soft_or_bottom"):
        for seed in (0, 1):
            overrides = ["sweep=demo_table6", f"selector={selector}", f"seed={seed}", "num_threads=1"]
            make(compose_run, root / "demo_table6" / f"{selector}{seed}", 0.5 + seed / 10, *overrides)
    make(compose_run, root / "single", 0.9)
    return root


def test_readme(runs: Path) -> None:
    out = runs.parent / "results"
    line = [sys.executable, "-m", "tip_exp.report.cli", "results", str(runs), "--out", str(out)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    text = (out / "README.md").read_text()
    table5, demo, single, rest = (part.split("\n## ")[0] for part in text.split("\n## ")[1:])
    assert f"Generated from run folders by `tip-report results {runs} --out {out}`" in text
    # ours over the paper's, what is missing, and where it was made
    for cells in (
        ["Full (all tokens)", "100 %", "ours", "1", "70.0 ± 1.5"], ["", "", "paper", "", "76.7 ± 0.7"],
        ["Entropy sampling", "50 %", "ours", "0 of 1", "unfinished"],
        ["Entropy sampling", "20 %", "ours", "0", "missing"], ["Soft-OR", "50 %", "ours", "1", "**80.0 ± 1.5**"],
    ):  # fmt: skip
        rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table5.splitlines()]
        assert cells in [row[:5] for row in rows], cells
    for told in ("runs: 2 of 3 finished", "hardware: 8 x NVIDIA H200", "versions: tip_exp 0.1.0, torch 2.13.0"):
        assert f"- {told}" in table5
    assert "- git revision: 0123456789ab+\n" in table5 and "- finished: 2026-01-01\n" in table5
    assert "- command: `tip-exp -cd sweeps -cn table5 seed=0 experiment=tip_qwen3`" in table5.replace(
        "sweep=table5 ", ""
    )
    assert demo.startswith("demo_table6\n") and "55.0 ± 5.0" in demo and "- seeds: 0, 1\n" in demo
    assert "single runs\n" in single and ".hydra/overrides.yaml" in single
    assert "GPUs among the machines of these runs: 8 x NVIDIA H200." in rest
    for sweep, place in (("table5", "paper"), ("demo_table6", "demo")):
        assert (out / place / f"{sweep}.md").read_text().startswith("### Table")
        assert r"\toprule" in (out / place / f"{sweep}.tex").read_text()
    assert list(pd.read_csv(out / "demo" / "demo_table6.csv")["seeds"]) == [2, 2, 2]


def test_what_remains_unfilled_is_counted_by_cell(runs: Path) -> None:
    table = unfilled_cells(summarize(runs_frame(read_runs([runs]))))
    rows = {(row[0].split(":")[0], row[1]): row[2:] for row in table.rows}
    # three benchmarks a row of a table; done are full and Soft-OR 50 %, begun is entropy sampling 50 %
    assert rows["Table 5 and Figure 1", "qwen3_8b_to_4b"] == [
        "6 of 15",
        "no run of Entropy sampling 20 %, Soft-OR 20 %; unfinished: Entropy sampling 50 %",
        "`tip-exp -cd sweeps -cn table5`",
    ]
    assert rows["Table 6", "qwen3_8b_to_4b"][:2] == ["6 of 9", "no run of Soft-OR, lowest 50 %"]
    assert rows["Table 3", "llama3_70b_to_8b"][:2] == ["0 of 12", "no run of this pair and data was found"]
    assert rows["Table 7", "qwen3_14b_to_1p7b"][0] == "0 of 6"
    # Tables 3 to 6 of three pairs, Table 7 of its two, Table 8 of one
    assert len(rows) == 4 * 3 + 2 + 1


def test_a_filled_table_is_not_listed(tmp_path: Path, compose_run: Run) -> None:
    for selector in ("selector=full", "selector=soft_or", "selector=soft_or_bottom"):
        make(compose_run, tmp_path / selector, 0.5, "experiment=tip_qwen3", selector)
    rows = unfilled_cells(summarize(runs_frame(read_runs([tmp_path])))).rows
    assert not [row for row in rows if row[0].startswith("Table 6") and row[1] == "qwen3_8b_to_4b"]


def test_deepplanning_stands_over_the_papers_avg16(tmp_path: Path, compose_run: Run) -> None:
    data = ["data=deepplanning", f"data.root={tmp_path}", "agent=base_code", "eval=deepplanning", "learner=paper"]
    for selector, final in (("full", 0.1), ("q3", 0.2)):
        given = ["selector.retention=0.2"] if selector == "q3" else []
        make(compose_run, tmp_path / selector, final, "pair=qwen3_14b_to_1p7b", *data, f"selector={selector}", *given)
    summary = summarize(runs_frame(read_runs([tmp_path])))
    table = sweep_tables("table7", summary)[0]
    assert table.headings[4] == "DeepPlanning"
    assert [row[2:5] for row in table.rows[6:8]] == [["ours", "1", "20.0 ± 1.5"], ["paper", "", "12.6 ± 0.07"]]
    (row,) = [row for row in unfilled_cells(summary).rows if row[1] == "qwen3_14b_to_1p7b"]
    assert row[2] == "2 of 6"


def test_command_without_what_the_sweep_itself_gives(runs: Path) -> None:
    records = read_runs([runs / "demo_table6"])
    assert "num_threads=1" in command_of("demo_table6", records) and "selector" not in command_of(
        "demo_table6", records
    )
