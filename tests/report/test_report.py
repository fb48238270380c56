"""Tables from run folders: exact text, seeds averaged, different configs kept apart, missing runs shown."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tests.synthetic_runs import finish, write_config

from tip_exp.config.schema import RunConfig
from tip_exp.records.reader import read_runs
from tip_exp.report.arms import ArmResult, differing_keys, read_records, summarize
from tip_exp.report.overview import csv_text, overview
from tip_exp.report.paper import LAYOUTS, METHODS, paper_numbers, paper_tables
from tip_exp.report.tables import Table, latex, markdown
from tip_exp.utils.errors import DataError

Compose = Callable[..., RunConfig]
PAPER_PAIR = ["experiment=tip_qwen3"]


def make_run(compose_run: Compose, folder: Path, final: float | None, *overrides: str, **settings) -> None:
    """A run that ended at the accuracy `final`; None: it is unfinished."""
    config = compose_run(*overrides)
    write_config(config, folder)
    if final is not None:
        finish(config, folder, final, **settings)


@pytest.fixture
def runs(tmp_path: Path, compose_run: Compose) -> Path:
    """soft_or with seeds 0 and 1 finished and 2 not; full with seed 0 finished."""
    for seed, final in ((0, 0.84), (1, 0.88), (2, None)):
        make_run(compose_run, tmp_path / f"soft{seed}", final, f"seed={seed}")
    make_run(compose_run, tmp_path / "full", 0.81, "selector=full", kept=2000)
    return tmp_path


def arms_of(root: Path) -> list[ArmResult]:
    return summarize(read_runs([root]))


def cells(table: Table) -> list[dict[str, str]]:
    return [dict(zip(table.headings, row, strict=True)) for row in table.rows]


def test_the_table(runs: Path) -> None:
    full, soft_or = cells(overview(arms_of(runs)))
    assert full == {
        "selector": "full", "retention": "100 %", "seeds": "1", "teacher": "99.0 ± 1.5", "step 0": "35.0 ± 1.5",
        "final": "81.0 ± 1.5", "greedy": "86.0 ± 1.0", "vs full": "-", "p (Holm)": "-", "kept tokens": "2,000",
        "loss MiB": "13.5", "process GiB": "0.60", "wall s": "42", "state": "done",
    }  # fmt: skip
    # two seeds: mean 86, standard deviation 2.83 over the root of 2 = 2.0
    assert soft_or["final"] == "86.0 ± 2.0" and soft_or["seeds"] == "2"
    assert soft_or["state"] == "1 of 3 unfinished"
    # 40 problems x 4: 134 and 141 correct against 130: (137.5 - 130) / 160; full has one seed, hence the star
    assert soft_or["vs full"].startswith("+4.7 [") and soft_or["vs full"].endswith("]*")


def test_tool_tasks_show_their_baseline_without_tools(runs: Path) -> None:
    assert "no-tool baseline" not in overview(arms_of(runs)).headings
    path = runs / "full" / "result.json"
    result = json.loads(path.read_text())
    result["final"]["word_sums/no_tool_baseline"] = 1 / 3
    path.write_text(json.dumps(result))
    table = overview(arms_of(runs))
    assert [row["no-tool baseline"] for row in cells(table)] == ["33.3", "-"]
    assert table.headings.index("no-tool baseline") == table.headings.index("teacher") - 1


def test_csv_has_fractions_and_errors(runs: Path) -> None:
    frame = pd.read_csv(io.StringIO(csv_text(arms_of(runs)))).set_index("selector")
    assert frame.loc["soft_or", "final"] == pytest.approx(0.86)
    assert frame.loc["soft_or", "final_se"] == pytest.approx(0.02)
    assert frame.loc["soft_or", "difference"] == pytest.approx(7.5 / 160)
    assert frame.loc["soft_or", "difference_low"] <= 7.5 / 160 <= frame.loc["soft_or", "difference_high"]
    assert str(frame.loc["soft_or", "difference_with_seeds"]) == "False"
    assert frame.loc["full", ["difference", "difference_p", "no_tool_baseline"]].isna().all()
    assert frame.loc["full", "wall_s"] == 41.6 and frame.loc["full", "hardware"] == "test"


def test_different_configs_are_never_averaged_and_the_key_is_named(runs: Path, compose_run: Compose) -> None:
    make_run(compose_run, runs / "other", 0.5, "seed=5", "learner.lr=1e-3")
    arms = arms_of(runs)
    assert [arm.differs for arm in arms] == [
        "",
        "learner.lr=0.001",
        "learner.lr=0.002",
    ]  # by folder: full, other, soft0
    assert "learner.lr=0.001" in markdown(overview(arms))


def test_a_value_of_several_lines_stays_in_one_cell(runs: Path, compose_run: Compose) -> None:
    make_run(compose_run, runs / "other", 0.5, "seed=5", 'pair.chat.system="Be brief.\nUse a box."')
    differs = [arm.differs for arm in arms_of(runs) if arm.differs]
    assert "pair.chat.system=Be brief.\\nUse a box." in differs and not any("\n" in text for text in differs)


def test_a_seed_of_two_sweeps_counts_once_and_the_finished_run_is_preferred(runs: Path, compose_run: Compose) -> None:
    make_run(compose_run, runs / "again", 0.84, "seed=0", "sweep=other", "name=again")
    make_run(compose_run, runs / "begun", None, "seed=1", "sweep=other", "name=begun")
    (soft_or,) = [arm for arm in arms_of(runs) if arm.selector == "soft_or"]
    assert (soft_or.seeds, soft_or.runs) == (2, 3)
    assert [Path(folder).name for folder in soft_or.folders] == ["again", "soft1", "soft2"]


def test_an_unfinished_run_has_a_row_without_numbers(tmp_path: Path, compose_run: Compose) -> None:
    make_run(compose_run, tmp_path / "started", None)
    (row,) = cells(overview(arms_of(tmp_path)))
    assert row["final"] == "-" and row["kept tokens"] == "-" and row["state"] == "1 of 1 unfinished"


def test_runs_with_other_problems_are_not_compared(runs: Path, compose_run: Compose) -> None:
    finish(compose_run("seed=1"), runs / "soft1", 0.88, problems=30)
    full, soft_or = arms_of(runs)
    assert full.scores is not None and soft_or.scores is None and soft_or.difference is None
    finish(compose_run("seed=0"), runs / "soft0", 0.84, problems=30)
    assert arms_of(runs)[1].scores is not None and arms_of(runs)[1].difference is None  # 30 problems against 40


def test_holm_is_over_all_comparisons_with_one_baseline(tmp_path: Path, compose_run: Compose) -> None:
    make_run(compose_run, tmp_path / "full", 0.5, "selector=full")
    for selector, final in (("entropy", 0.55), ("soft_or", 0.6), ("random", 0.4)):
        make_run(compose_run, tmp_path / selector, final, f"selector={selector}")
    make_run(compose_run, tmp_path / "lone", 0.9, "learner.num_steps=40")  # no full run of 40 steps: no comparison
    compared = [arm for arm in arms_of(tmp_path) if arm.difference]
    p_values = [arm.difference.p for arm in compared if arm.difference]
    assert len(compared) == 3
    ascending = np.argsort(p_values)
    expected = np.maximum.accumulate(np.minimum(1, np.array(p_values)[ascending] * [3, 2, 1]))
    assert [compared[i].p_holm for i in ascending] == pytest.approx(list(expected))
    assert all(math.isnan(arm.p_holm) for arm in arms_of(tmp_path) if not arm.difference)


def test_differing_keys(runs: Path) -> None:
    (first, second) = arms_of(runs)
    first.config, second.config = {"a": 1, "b": None, "x.d": 3}, {"a": 1, "c": 2}
    assert differing_keys([first, second]) == ["c", "x.d"]
    assert differing_keys([first, second], ignored=("x.", "y.")) == ["c"]
    assert differing_keys([]) == []


def test_every_row_of_every_layout_has_numbers_of_the_paper() -> None:
    frame = pd.read_csv(Path(__file__).parents[2] / "results" / "paper_numbers.csv")
    assert list(frame.columns) == ["table", "page", "pair", "benchmark", "method", "retention", "mean", "std", "unit"]
    assert len(frame) == len(paper_numbers()) == 121
    assert paper_numbers()["qwen3_8b_to_4b", "math500", "soft_or", 0.5] == ("table5", "79.1 ± 0.8")
    for name, layout in LAYOUTS.items():
        pair, benchmark = ("qwen3_14b_to_1p7b", "deepplanning") if name == "table7" else ("qwen3_8b_to_4b", "math500")
        assert all((pair, benchmark, *row) in paper_numbers() for row in layout.rows), name
        assert {selector for selector, _ in layout.rows} <= METHODS.keys()


def test_table5_has_our_number_over_the_papers_in_its_order(tmp_path: Path, compose_run: Compose) -> None:
    make_run(compose_run, tmp_path / "full", 0.7, "selector=full", *PAPER_PAIR, hardware="8 x H200")
    make_run(compose_run, tmp_path / "soft", 0.8, "selector=soft_or", *PAPER_PAIR, hardware="8 x H200")
    make_run(compose_run, tmp_path / "begun", None, "selector=soft_or", "selector.retention=0.2", *PAPER_PAIR)
    table, differences = paper_tables("table5", arms_of(tmp_path))
    assert table.title == "Table 5 and Figure 1: entropy against Soft-OR. qwen3_8b_to_4b"
    assert table.headings == ["method", "ρ", "", "n", "MATH-500", "AIME 2024", "AIME 2025"]
    assert [row[:5] for row in table.rows] == [
        ["Full (all tokens)", "100 %", "ours", "1", "70.0 ± 1.5"],
        ["", "", "paper", "", "76.7 ± 0.7"],
        ["Entropy sampling", "50 %", "ours", "0", "missing"],
        ["", "", "paper", "", "78.6 ± 0.6"],
        ["Entropy sampling", "20 %", "ours", "0", "missing"],
        ["", "", "paper", "", "74.1 ± 0.9"],
        ["Soft-OR", "50 %", "ours", "1", "80.0 ± 1.5"],
        ["", "", "paper", "", "79.1 ± 0.8"],
        ["Soft-OR", "20 %", "ours", "0 of 1", "unfinished"],
        ["", "", "paper", "", "77.6 ± 0.7"],
    ]
    assert table.best == {(6, 4), (6, 5), (6, 6)}
    assert table.lines == {2, 6}
    assert [row[:4] for row in differences.rows] == [
        ["Soft-OR", "50 %", name, "+10.0"] for name in ("MATH-500", "AIME 2024", "AIME 2025")
    ]
    text = latex(table)
    assert r"\toprule" in text and r"\bottomrule" in text and r"\textbf{80.0 $\pm$ 1.5}" in text
    assert r"Soft-OR & 50 \% & ours & 1 &" in text and "8 x H200" in text and r"qwen3\_8b\_to\_4b" in text


def test_the_memory_column_has_the_learners_peak(tmp_path: Path, compose_run: Compose) -> None:
    make_run(compose_run, tmp_path / "q3", 0.7, "selector=q3", "selector.retention=0.2", *PAPER_PAIR)
    make_run(compose_run, tmp_path / "begun", None, "selector=q3", "selector.retention=0.1", *PAPER_PAIR)
    table = paper_tables("table4", arms_of(tmp_path))[0]
    assert table.headings[-1] == "peak GiB (paper: GB)"
    assert [row[-1] for row in table.rows if row[2] == "ours"] == ["missing", "0.50", "unfinished"]


def test_each_setting_has_its_table_and_the_title_says_what_differs(tmp_path: Path, compose_run: Compose) -> None:
    for steps in (40, 20):
        for selector in ("full", "soft_or"):
            overrides = [f"selector={selector}", f"learner.num_steps={steps}"]
            make_run(compose_run, tmp_path / f"{selector}{steps}", 0.5, *overrides)
    titles = [table.title for table in paper_tables("table6", arms_of(tmp_path)) if "difference" not in table.title]
    assert [title.split("(")[1] for title in titles] == ["learner.num_steps=20)", "learner.num_steps=40)"]


def test_markdown_and_latex_of_a_table() -> None:
    rows = [["x", "1", "2"], ["y_z", "3", "4"]]
    table = Table("T", ["a", "b", "c"], rows, frozenset({(1, 2)}), frozenset({1}), ["50 % more"])
    assert [line.replace(" ", "") for line in markdown(table).splitlines()] == [
        "###T", "", "|a|b|c|", "|:----|:----|:------|", "|x|1|2|", "|y_z|3|**4**|", "", "50%more",
    ]  # fmt: skip
    assert latex(table).splitlines() == [
        r"\begin{table}", r"\centering", r"\begin{tabular}{llc}", r"\toprule", r"a & b & c \\", r"\midrule",
        r"x & 1 & 2 \\", r"\midrule", r"y\_z & 3 & \textbf{4} \\", r"\bottomrule", r"\end{tabular}",
        r"\caption{T. 50 \% more}", r"\end{table}",
    ]  # fmt: skip


def test_a_root_without_runs_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere is not a folder; give folders that hold runs"):
        read_records([tmp_path, tmp_path / "nowhere"])
    with pytest.raises(DataError, match=r"no run \(a folder with config\.yaml\) below"):
        read_records([tmp_path])


def report(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "tip_exp.report.cli", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=60)


def test_the_command_prints_and_writes(runs: Path) -> None:
    out = runs.parent / "out"
    files = ["--markdown", str(out / "t.md"), "--csv", str(out / "t.csv"), "--latex", str(out / "t.tex")]
    process = report(str(runs), *files)
    assert process.returncode == 0, process.stderr
    assert (out / "t.md").read_text() == process.stdout
    assert list(pd.read_csv(out / "t.csv")["selector"]) == ["full", "soft_or"]
    assert r"\bottomrule" in (out / "t.tex").read_text()


def test_errors_of_the_command_are_one_line_and_exit_code_1(runs: Path) -> None:
    for arguments, message in (
        ([str(runs / "nowhere")], "nowhere is not a folder"),
        ([str(runs), "--table", "table8"], "belongs to table8"),
    ):
        process = report(*arguments)
        assert process.returncode == 1 and message in process.stderr
        assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1
