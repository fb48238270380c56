"""Tables from run folders: exact text, seeds averaged, unlike configs kept apart, missing runs shown, no waiting."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tests.synthetic_runs import finish, write_config

from tip_exp.config.schema import RunConfig
from tip_exp.records import outcomes as outcomes_module
from tip_exp.records.outcomes import final_outcomes
from tip_exp.records.reader import INDEX, find_runs, read_runs
from tip_exp.report.arms import differing_keys, runs_frame, summarize
from tip_exp.report.overview import csv_frame, overview
from tip_exp.report.paper import LAYOUTS, METHODS, paper_numbers, paper_tables
from tip_exp.report.tables import Table, latex, markdown

Run = Callable[..., RunConfig]
PAPER_PAIR = ["experiment=tip_qwen3"]


def make(compose_run: Run, folder: Path, final: float | None, *overrides: str, **settings) -> None:
    config = compose_run(*overrides)
    write_config(config, folder)
    if final is not None:
        finish(config, folder, final, **settings)


@pytest.fixture
def runs(tmp_path: Path, compose_run: Run) -> Path:
    """soft_or with seeds 0 and 1 done and 2 not; full with seed 0 done."""
    for seed, final in ((0, 0.84), (1, 0.88), (2, None)):
        make(compose_run, tmp_path / f"soft{seed}", final, f"seed={seed}")
    make(compose_run, tmp_path / "full", 0.81, "selector=full", kept=2000)
    return tmp_path


def summary(root: Path) -> pd.DataFrame:
    return summarize(runs_frame(read_runs([root])))


def records(table: Table) -> list[dict[str, str]]:
    return [dict(zip(table.headings, row, strict=True)) for row in table.rows]


def test_the_table(runs: Path) -> None:
    shown = records(overview(summary(runs)))
    assert shown[0] == {
        "selector": "full", "retention": "100 %", "seeds": "1", "teacher": "99.0 ± 1.5", "step 0": "35.0 ± 1.5",
        "final": "81.0 ± 1.5", "greedy": "86.0 ± 1.0", "vs full": "-", "p (Holm)": "-", "kept tokens": "2,000",
        "loss MiB": "13.5", "process GiB": "0.60", "wall s": "42", "state": "done",
    }  # fmt: skip
    # two seeds: mean 86, standard deviation 2.83 over the root of 2 = 2.0
    assert shown[1]["final"] == "86.0 ± 2.0" and shown[1]["seeds"] == "2"
    assert shown[1]["state"] == "1 of 3 unfinished"
    # 40 problems x 4: 134 and 141 right against 130: (137.5 - 130) / 160; full has one seed, hence the star
    assert shown[1]["vs full"].startswith("+4.7 [") and shown[1]["vs full"].endswith("]*")


def test_the_floor_stands_beside_results_of_tool_tasks_alone(runs: Path) -> None:
    found = summary(runs)
    assert "no-tool baseline" not in records(overview(found))[0]
    path = runs / "full" / "result.json"
    result = json.loads(path.read_text())
    (benchmark,) = set(found["benchmark"])
    result["final"][f"{benchmark}/no_tool_baseline"] = 1 / 3
    path.write_text(json.dumps(result))
    assert [row["no-tool baseline"] for row in records(overview(summary(runs)))] == ["33.3", "-"]


def test_csv_has_fractions_and_errors(runs: Path) -> None:
    frame = csv_frame(summary(runs)).set_index("selector")
    assert frame.loc["soft_or", "final"] == pytest.approx(0.86)
    assert frame.loc["soft_or", "final_se"] == pytest.approx(0.02)
    assert frame.loc["soft_or", "difference"] == pytest.approx(7.5 / 160)
    assert frame.loc["soft_or", "difference_low"] <= 7.5 / 160 <= frame.loc["soft_or", "difference_high"]
    assert math.isnan(frame.loc["full", "difference"])


def test_unlike_configs_are_never_averaged_and_the_key_is_named(runs: Path, compose_run: Run) -> None:
    make(compose_run, runs / "other", 0.5, "seed=5", "learner.lr=1e-3")
    found = summary(runs)
    assert len(found) == 3
    assert list(found["differs"]) == ["", "learner.lr=0.001", "learner.lr=0.002"]  # by folder: full, other, soft0
    assert "learner.lr=0.001" in markdown(overview(found))


def test_a_key_that_a_later_version_added_keeps_nothing_apart(runs: Path, compose_run: Run) -> None:
    make(compose_run, runs / "old", 0.86, "seed=3")
    text = (runs / "old" / "config.yaml").read_text()
    assert "mode: train\n" in text and "  root: null\n" in text
    (runs / "old" / "config.yaml").write_text(text.replace("mode: train\n", "").replace("  root: null\n", ""))
    assert list(summary(runs)["seeds"]) == [1, 3]


def test_a_seed_that_two_sweeps_share_counts_once(runs: Path, compose_run: Run) -> None:
    make(compose_run, runs / "again", 0.84, "seed=0", "sweep=other", "name=again")
    make(compose_run, runs / "begun", None, "seed=1", "sweep=other", "name=begun")
    found = summary(runs).set_index("selector")
    assert (found.loc["soft_or", "seeds"], found.loc["soft_or", "runs"]) == (2, 3)


def test_a_run_without_any_result_is_shown_as_missing(tmp_path: Path, compose_run: Run) -> None:
    make(compose_run, tmp_path / "started", None)
    (row,) = records(overview(summary(tmp_path)))
    assert row["final"] == "-" and row["kept tokens"] == "-" and row["state"] == "1 of 1 unfinished"


def test_holm_is_over_all_comparisons_with_one_baseline(tmp_path: Path, compose_run: Run) -> None:
    make(compose_run, tmp_path / "full", 0.5, "selector=full")
    for selector, final in (("entropy", 0.55), ("soft_or", 0.6), ("random", 0.4)):
        make(compose_run, tmp_path / selector, final, f"selector={selector}")
    make(compose_run, tmp_path / "lone", 0.9, "learner.num_steps=40")  # no full run of 40 steps: no comparison
    found = summary(tmp_path)
    compared = found[[one is not None for one in found["difference"]]]
    ordered = compared.assign(p=[one.p for one in compared["difference"]]).sort_values("p")
    assert list(ordered["p_holm"]) == pytest.approx(
        list(np.maximum.accumulate(np.minimum(1, ordered["p"].to_numpy() * [3, 2, 1])))
    )


def test_paper_numbers_are_whole() -> None:
    frame = pd.read_csv(Path(__file__).parents[2] / "results" / "paper_numbers.csv")
    assert list(frame.columns) == ["table", "page", "pair", "benchmark", "method", "retention", "mean", "std", "unit"]
    assert len(frame) == len(paper_numbers()) == 121
    # every row of every layout has numbers of the paper, for Qwen3 or, agentic, for 14B -> 1.7B
    for name, layout in LAYOUTS.items():
        pair, benchmark = ("qwen3-14b-1.7b", "deepplanning_avg16") if name == "table7" else ("qwen3-8b-4b", "math500")
        assert all((pair, benchmark, *row) in paper_numbers() for row in layout.rows), name
        assert {selector for selector, _ in layout.rows} <= METHODS.keys()


def test_table5_has_our_number_over_the_papers_in_its_order(tmp_path: Path, compose_run: Run) -> None:
    make(compose_run, tmp_path / "full", 0.7, "selector=full", *PAPER_PAIR, hardware="8 x H200")
    make(compose_run, tmp_path / "soft", 0.8, "selector=soft_or", *PAPER_PAIR, hardware="8 x H200")
    make(compose_run, tmp_path / "begun", None, "selector=soft_or", "selector.retention=0.2", *PAPER_PAIR)
    table, differences = paper_tables("table5", summary(tmp_path))
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
    assert [row[:4] for row in differences.rows] == [
        ["Soft-OR", "50 %", name, "+10.0"] for name in ("MATH-500", "AIME 2024", "AIME 2025")
    ]
    text = latex(table)
    assert r"\toprule" in text and r"\bottomrule" in text and r"\textbf{80.0 $\pm$ 1.5}" in text
    assert r"Soft-OR & 50 \% & ours & 1 &" in text and "8 x H200" in text and r"qwen3\_8b\_to\_4b" in text


def test_settings_get_a_table_each_and_the_heading_says_what_differs(tmp_path: Path, compose_run: Run) -> None:
    for steps in (80, 20):
        for selector in ("full", "soft_or"):
            make(
                compose_run, tmp_path / f"{selector}{steps}", 0.5, f"selector={selector}", f"learner.num_steps={steps}"
            )
    titles = [table.title for table in paper_tables("table6", summary(tmp_path)) if "difference" not in table.title]
    assert [title.split("(")[1] for title in titles] == ["learner.num_steps=20)", "learner.num_steps=80)"]


def test_markdown_bold_and_latex_rules() -> None:
    table = Table("T", ["a", "b", "c"], [["x", "1", "2"], ["y", "3", "4"]], frozenset({(1, 2)}), frozenset({1}))
    assert "| y" in markdown(table) and "**4**" in markdown(table)
    assert latex(table).splitlines()[6:10] == [r"x & 1 & 2 \\", r"\midrule", r"y & 3 & \textbf{4} \\", r"\bottomrule"]


def test_differing_keys() -> None:
    assert differing_keys([{"a": 1, "b": None}, {"a": 1}, {"a": 1, "c": 2}]) == ["c"]
    assert differing_keys([]) == []


@pytest.mark.parametrize("block", [1 << 20, 57])
def test_outcomes_are_those_of_the_last_evaluation(
    tmp_path: Path, compose_run: Run, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(outcomes_module, "BLOCK", block)
    make(compose_run, tmp_path / "run", 0.5, outcomes=False)
    with (tmp_path / "run" / "eval.jsonl").open("a") as file:
        file.write('{"step": 80, "torn')
    right = final_outcomes(tmp_path / "run" / "eval.jsonl")["word_sums"]
    assert right["samples"] == 4 and list(right["right"].values()) == [4] * 20 + [0] * 20  # 0.5 x 40 problems
    assert final_outcomes(tmp_path / "nowhere") == {}
    (record,) = read_runs([tmp_path])
    assert record.outcomes["word_sums"] == right


def test_the_index_notices_every_change(runs: Path, compose_run: Run) -> None:
    before = read_runs([runs])
    stamp = (runs / INDEX).stat().st_mtime_ns
    assert read_runs([runs]) == before and (runs / INDEX).stat().st_mtime_ns == stamp  # nothing new: not written
    finish(compose_run("seed=2"), runs / "soft2", 0.9)
    assert [record.is_done for record in read_runs([runs])] == [True] * 4
    make(compose_run, runs / "new", 0.7, "selector=entropy")
    (runs / "full" / "result.json").unlink()
    assert [(Path(r.folder).name, r.is_done) for r in read_runs([runs])] == [
        ("full", False), ("new", True), ("soft0", True), ("soft1", True), ("soft2", True),
    ]  # fmt: skip
    (runs / INDEX).write_text((runs / INDEX).read_text()[:-40])  # torn
    assert len(read_runs([runs])) == 5 and json.loads((runs / INDEX).read_text().splitlines()[-1])
    moved = runs.rename(runs.with_name("moved"))
    assert {Path(record.folder).parent for record in read_runs([moved])} == {moved}


def test_nothing_below_a_run_is_a_run(runs: Path) -> None:
    for inner in (".hydra", "checkpoint/step_00080"):
        (runs / "full" / inner).mkdir(parents=True)
        (runs / "full" / inner / "config.yaml").write_text("")
    assert [folder.root.name for folder in find_runs([runs, runs / "full"])] == ["full", "soft0", "soft1", "soft2"]


def test_two_thousand_runs_in_ten_seconds(tmp_path: Path, compose_run: Run) -> None:
    """256 problems and 5 seeds each, cold and with the index; 10 s is for the cold one."""
    patterns = {}
    for selector in ("full", "soft_or"):
        config = compose_run(f"selector={selector}")
        write_config(config, tmp_path / "pattern" / selector)
        finish(config, tmp_path / "pattern" / selector, 0.8, problems=256)
        folder = tmp_path / "pattern" / selector
        patterns[selector] = ((folder / "config.yaml").read_text(), (folder / "result.json").read_text())
    for i in range(2000):
        config_text, result_text = patterns["full" if i < 5 else "soft_or"]
        folder = tmp_path / "runs" / f"run{i:04}"
        folder.mkdir(parents=True)
        arm = config_text.replace("seed: 0\ndevice", f"seed: {i % 5}\ndevice")
        arm = arm.replace("warmup_steps: 5", f"warmup_steps: {5 + i // 250}")
        (folder / "config.yaml").write_text(arm.replace("retention: 0.5", f"retention: {0.1 + i // 5 / 1000:.3f}"))
        (folder / "result.json").write_text(result_text)
    seconds = []
    for _ in ("cold", "indexed"):
        began = time.process_time()
        found = summary(tmp_path / "runs")
        text = markdown(overview(found))
        seconds.append(time.process_time() - began)
    assert len(found) == 400 and set(found["seeds"]) == {5} and text.count("\n") == 401
    print(f"2,000 runs: {seconds[0]:.1f} s cold, {seconds[1]:.1f} s with the index")
    assert seconds[0] < 10 and seconds[1] < 10


def test_the_command_prints_writes_and_refuses(runs: Path) -> None:
    def report(*arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "tip_exp.report.cli", *arguments]
        return subprocess.run(line, capture_output=True, text=True, timeout=60)

    out = runs.parent / "out"
    files = ["--markdown", str(out / "t.md"), "--csv", str(out / "t.csv"), "--latex", str(out / "t.tex")]
    done = report(str(runs), *files)
    assert done.returncode == 0, done.stderr
    assert (out / "t.md").read_text() == done.stdout
    assert list(pd.read_csv(out / "t.csv")["selector"]) == ["full", "soft_or"]
    assert r"\bottomrule" in (out / "t.tex").read_text()
    missing = report(str(runs / "nowhere"))
    assert missing.returncode == 1 and "nowhere is not a folder" in missing.stderr and "Traceback" not in missing.stderr
    (runs / "empty").mkdir()
    assert "no run (a folder with config.yaml)" in report(str(runs / "empty")).stderr
    assert "belongs to table8" in report(str(runs), "--table", "table8").stderr
