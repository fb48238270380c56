"""results/README.md from synthetic run folders: tables, the runs and commands behind them, and what is missing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from tests.synthetic_runs import finish, write_config

from tip_exp.config.schema import RunConfig
from tip_exp.records.reader import read_runs, write_archive
from tip_exp.report import cli
from tip_exp.report.arms import summarize
from tip_exp.report.results_page import commands_of, sweep_tables, unfilled_cells

Compose = Callable[..., RunConfig]


def make_run(compose_run: Compose, folder: Path, final: float | None, *overrides: str, **settings: Any) -> None:
    """A run that ended at the accuracy `final` (None: it is unfinished), with the overrides that Hydra records."""
    config = compose_run(*overrides)
    write_config(config, folder)
    (folder / ".hydra").mkdir()
    typed = [override for override in overrides if not override.startswith("sweep=")]
    (folder / ".hydra" / "overrides.yaml").write_text("".join(f"- {override}\n" for override in typed))
    if final is not None:
        finish(config, folder, final, **settings)


@pytest.fixture
def runs(tmp_path: Path, compose_run: Compose) -> Path:
    """table5 on a pair of the paper with two of five arms finished and one begun; all of demo_table6; a single run."""
    root = tmp_path / "outputs"
    for name, final, selector in (("full", 0.7, "full"), ("soft", 0.8, "soft_or"), ("begun", None, "entropy_sample")):
        overrides = ["sweep=table5", "experiment=tip_qwen3", f"selector={selector}"]
        make_run(compose_run, root / "table5" / name, final, *overrides, hardware="8 x NVIDIA H200")
    for selector in ("full", "soft_or", "soft_or_bottom"):
        for seed in (0, 1):
            overrides = ["sweep=demo_table6", f"selector={selector}", f"seed={seed}", "num_threads=1"]
            folder = root / "demo_table6" / f"{selector}{seed}"
            make_run(compose_run, folder, 0.5 + seed / 10, *overrides, in_train={"in_train_exact": ["p0", "p1"]})
    make_run(compose_run, root / "single", 0.9)
    return root


def test_readme(runs: Path) -> None:
    out = runs.parent / "results"
    line = [sys.executable, "-m", "tip_exp.report.cli", "results", str(runs), "--out", str(out)]
    process = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stderr
    text = (out / "README.md").read_text()
    assert f"Generated from run folders by `tip-report results {runs} --out {out}`" in text
    table5, demo, single, missing = (part.split("\n## ")[0] for part in text.split("\n## ")[1:])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]][:5] for line in table5.splitlines()]
    for row in (
        ["Full (all tokens)", "100 %", "ours ± se", "1", "70.0 ± 1.5"],
        ["", "", "paper ± as printed", "", "76.7 ± 0.7"],
        ["Entropy sampling", "50 %", "ours ± se", "0 of 1", "unfinished"],
        ["Entropy sampling", "20 %", "ours ± se", "0", "missing"],
        ["Soft-OR", "50 %", "ours ± se", "1", "**80.0 ± 1.5**"],
    ):  # fmt: skip
        assert row in rows
    for fact in (
        "runs: 2 of 3 finished", "hardware: 8 x NVIDIA H200", "versions: tip_exp 0.1.0, torch 2.13.0",
        "git revision: 0123456789ab+", "finished: 2026-01-01",
        "command: `tip-exp -cd sweeps -cn table5 seed=0 experiment=tip_qwen3`",
    ):  # fmt: skip
        assert f"- {fact}" in table5.splitlines()
    # 20 and 24 of 40 problems right: variances .0057 over problems + .0025 over seeds - .0006 = .087 squared
    assert demo.startswith("demo_table6\n") and "55.0 ± 8.7" in demo and "- seeds: 0, 1\n" in demo
    assert "word_sums: 2 of its test problems are in the training set; 0 more" in demo
    assert "training set" not in table5 and "hold for these trained students only" in text
    assert single.startswith("single runs\n") and ".hydra/overrides.yaml" in single
    assert "Runs on GPUs: 8 x NVIDIA H200." in missing
    claims = (out / "claims.md").read_text()
    # both arms of a seed have the same scores
    assert "soft_or_bottom 50 % lower than soft_or 50 % (tiny)" in claims and "+0.0 [0.0, 0.0]" in claims
    for sweep, folder in (("table5", "paper"), ("demo_table6", "demo")):
        assert (out / folder / f"{sweep}.md").read_text().startswith("### Table")
        assert r"\toprule" in (out / folder / f"{sweep}.tex").read_text()
    assert list(pd.read_csv(out / "demo" / "demo_table6.csv")["seeds"]) == [2, 2, 2]


def test_damaged_runs_are_named_and_a_sweep_may_have_a_dot(
    tmp_path: Path, compose_run: Compose, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = tmp_path / "outputs", tmp_path / "results"
    for sweep in ("v1.1", "v1.2"):
        make_run(compose_run, root / sweep, 0.7, f"sweep={sweep}")
    make_run(compose_run, root / "hurt", 0.7)
    (root / "hurt" / "result.json").write_text("")
    monkeypatch.setattr("sys.argv", ["tip-report", "results", str(root), "--out", str(out)])
    cli.main()
    written = (out / "README.md").read_text()
    assert "### Damaged runs" in written and f"{root / 'hurt'} | damaged: result.json is empty" in written
    assert written.count("- command: in each run's .hydra/overrides.yaml\n") == 2  # sweeps/ has no file of these
    assert {path.name for path in (out / "paper").iterdir()} >= {"v1.1.md", "v1.2.md", "v1.2.csv", "v1.1.tex"}
    for sweep in ("v1.1", "v1.2"):
        (root / sweep / "result.json").write_text("")
    for command in ("results", "wandb"):
        more = ["--out", str(out)] if command == "results" else ["--entity", "e"]
        monkeypatch.setattr("sys.argv", ["tip-report", command, str(root), *more])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr().err
        assert ended.value.code == 2 and f"{root / 'hurt'}: damaged: result.json is empty" in printed
    assert (out / "README.md").read_text() == written


def test_unfilled_cells_are_counted_by_table_and_pair(runs: Path) -> None:
    table = unfilled_cells(summarize(read_runs([runs])))
    rows = {(row[0].split(":")[0], row[1]): row[2:] for row in table.rows}
    # three benchmarks per row of a table; full and Soft-OR 50 % are finished, entropy sampling 50 % is not
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


def test_a_cell_is_filled_by_the_arm_with_the_most_seeds(runs: Path, compose_run: Compose) -> None:
    before = unfilled_cells(summarize(read_runs([runs]))).rows
    overrides = ["sweep=table5", "experiment=tip_qwen3", "selector=full", "learner.lr=2e-6"]
    make_run(compose_run, runs / "table5" / "other_rate", None, *overrides, hardware="8 x NVIDIA H200")
    memory = ["sweep=memory", "experiment=tip_qwen3", "selector=entropy_sample", "learner.loss_backend=materialized"]
    make_run(compose_run, runs / "memory" / "entropy", 0.5, *memory)  # short, for its memory: not a cell of table 5
    assert unfilled_cells(summarize(read_runs([runs]))).rows == before


def test_a_filled_table_is_not_listed(tmp_path: Path, compose_run: Compose) -> None:
    for selector in ("full", "soft_or", "soft_or_bottom"):
        make_run(compose_run, tmp_path / selector, 0.5, "experiment=tip_qwen3", f"selector={selector}")
    listed = {(row[0].split(":")[0], row[1]) for row in unfilled_cells(summarize(read_runs([tmp_path]))).rows}
    assert ("Table 6", "qwen3_8b_to_4b") not in listed and ("Table 8", "qwen3_8b_to_4b") in listed


def test_deepplanning_stands_over_the_papers_avg16(tmp_path: Path, compose_run: Compose) -> None:
    data = ["data=deepplanning", f"data.root={tmp_path}", "agent=base_code", "eval=deepplanning", "learner=paper"]
    for final, selector in ((0.1, ["selector=full"]), (0.2, ["selector=q3", "selector.retention=0.2"])):
        make_run(compose_run, tmp_path / f"run{final}", final, "pair=qwen3_14b_to_1p7b", *data, *selector)
    arms = summarize(read_runs([tmp_path]))
    table = sweep_tables("table7", arms, arms)[0]
    assert table.headings[4] == "DeepPlanning"
    start = [row[0] for row in table.rows].index("Q3-only")
    (our_row, strict_row, paper_row) = (row[2:5] for row in table.rows[start : start + 3])
    assert (our_row, paper_row) == (["ours ± se", "1", "20.0 ± 1.5"], ["paper ± as printed", "", "12.6 ± 0.07"])
    assert strict_row == ["ours, string grader", "", "18.0"]
    (row,) = [row for row in unfilled_cells(arms).rows if row[1] == "qwen3_14b_to_1p7b"]
    assert row[2] == "2 of 6"


def test_the_command_leaves_out_what_the_sweep_varies(runs: Path, tmp_path: Path) -> None:
    records = read_runs([runs / "demo_table6"])
    command = "tip-exp -cd sweeps -cn demo_table6 seed=0,1 num_threads=1"
    assert commands_of("demo_table6", records) == [command]
    write_archive(tmp_path / "a.runs.gz", records)
    assert commands_of("demo_table6", read_runs([tmp_path / "a.runs.gz"])) == [command]


def test_runs_of_other_overrides_have_a_command_of_their_own(runs: Path, compose_run: Compose) -> None:
    overrides = ["sweep=demo_table6", "selector=full", "selector.normalizer=rank", "seed=7"]
    make_run(compose_run, runs / "demo_table6" / "other", 0.5, *overrides)
    commands = commands_of("demo_table6", read_runs([runs / "demo_table6"]))
    assert [command.removeprefix("tip-exp -cd sweeps -cn demo_table6 ") for command in commands] == [
        "seed=0,1 num_threads=1",
        "seed=7 selector.normalizer=rank",
    ]
    for seed, lr in ((1100, 0.002), (1101, 0.002), (1100, 0.001)):
        folder = runs / "registered_second" / f"{seed}_{lr}"
        given = ["sweep=registered_second", "selector=full", f"learner.lr={lr}", "learner.eps=1e-08", "name=x"]
        make_run(compose_run, folder, 0.5, *given, f"seed={seed}")
    assert commands_of("registered_second", read_runs([runs / "registered_second"])) == [
        "tip-exp -cd sweeps -cn registered_second seed=1100,1101"
    ]
    assert commands_of("table5", read_runs([runs / "table5"])) == [
        "tip-exp -cd sweeps -cn table5 seed=0 experiment=tip_qwen3"  # the file sweeps over more pairs
    ]


def test_an_evaluation_alone_fills_no_row_of_a_paper_table(tmp_path: Path, compose_run: Compose) -> None:
    overrides = ["experiment=tip_qwen3", "selector=soft_or", "selector.retention=0.5"]
    make_run(compose_run, tmp_path / "trained", 0.7, *overrides)
    trained = unfilled_cells(summarize(read_runs([tmp_path]))).rows
    make_run(compose_run, tmp_path / "evaluated", 0.1, *overrides, "selector.retention=0.2", "mode=eval")
    assert unfilled_cells(summarize(read_runs([tmp_path]))).rows == trained
