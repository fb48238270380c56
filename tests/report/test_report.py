"""Tables from run folders: exact text, seeds averaged, different configs kept apart, missing runs shown."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tests.reference import anova_variances
from tests.synthetic_runs import finish, write_config

from tip_exp.config.parse import digest
from tip_exp.config.schema import RunConfig
from tip_exp.records.reader import RunRecord, read_runs
from tip_exp.report import cli, columns
from tip_exp.report.arms import ArmResult, differing_keys, summarize
from tip_exp.report.columns import select_arms, sort_arms
from tip_exp.report.leaderboard import leaderboards
from tip_exp.report.overview import csv_text, overview, overviews
from tip_exp.report.paper import LAYOUTS, METHODS, paper_numbers, paper_tables
from tip_exp.report.run_files import read_records
from tip_exp.report.significance import Estimate
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


def finish_again(root: Path, compose_run: Compose, *, full: dict | None = None, soft_or: dict | None = None) -> None:
    """The runs of the fixture with more in their results; full with the seeds 0 and 1."""
    for seed in (0, 1):
        make_run(compose_run, root / f"full{seed}", 0.81, "selector=full", f"seed={seed}", **(full or {}))
        finish(compose_run(f"seed={seed}"), root / f"soft{seed}", 0.84 + 0.04 * seed, **(soft_or or {}))
    (root / "full" / "result.json").unlink()
    (root / "full" / "config.yaml").unlink()


def test_the_table(runs: Path) -> None:
    table = overview(arms_of(runs))
    full, soft_or = cells(table)
    assert full == {
        "selector": "full", "retention": "100 %", "kept": "50.0 %", "seeds": "1", "final ± se": "81.0 ± 1.5",
        "greedy ± se": "86.0 ± 1.0", "gap closed": "72 %", "vs full [95 %]": "-", "errors cover": "problems, not seeds",
        "loss MiB": "13.5", "seconds": "42", "state": "done",
    }  # fmt: skip
    assert soft_or["seeds"] == "2" and soft_or["state"] == "1 of 3 unfinished"
    # 40 problems x 4: 134 and 141 correct against 130: (137.5 - 130) / 160; full has one seed, so there is no p
    assert soft_or["vs full [95 %]"].startswith("+4.7 [")
    assert soft_or["errors cover"] == "problems and seeds; vs full: problems, not seeds"
    assert table.notes == ["All rows: teacher 99.0 ± 1.5, step 0 35.0 ± 1.5 (% ± standard error over problems)."]


def test_the_error_of_several_seeds_is_over_seeds_and_problems(runs: Path) -> None:
    """final: 33 problems right and 2 of 4 responses, then 35 and 1 of 4; greedy: 36 problems right, then 37."""
    (soft_or,) = [arm for arm in arms_of(runs) if arm.selector == "soft_or"]
    tables = {
        "final": [[1.0] * 33 + [0.5] + [0.0] * 6, [1.0] * 35 + [0.25] + [0.0] * 4],
        "greedy": [[1.0] * 36 + [0.0] * 4, [1.0] * 37 + [0.0] * 3],
    }
    for name, table in tables.items():
        accuracy, (problems, seeds, residual) = getattr(soft_or, name), anova_variances(table)
        assert accuracy.mean == pytest.approx(np.mean(table)) and accuracy.over_seeds
        assert accuracy.se == pytest.approx(math.sqrt(max(problems + seeds - residual, problems, seeds)))
        assert accuracy.se > np.std(np.mean(table, axis=1), ddof=1) / math.sqrt(2)  # that of the seeds alone
    assert soft_or.teacher == Estimate(0.99, 0.015) and not soft_or.teacher.over_seeds


def test_rows_with_other_teachers_or_starts_show_them(runs: Path, compose_run: Compose) -> None:
    path = runs / "full" / "result.json"
    path.write_text(path.read_text().replace("0.99", "0.97"))
    table = overview(arms_of(runs))
    assert [row["teacher ± se"] for row in cells(table)] == ["97.0 ± 1.5", "99.0 ± 1.5"]
    assert table.notes[0].startswith("All rows: step 0 35.0 ± 1.5 (")


def test_with_seeds_on_both_sides_there_is_a_p_and_a_statement_of_equivalence(runs: Path, compose_run: Compose) -> None:
    finish_again(runs, compose_run)
    soft_or = arms_of(runs)[-1]
    table = overview([soft_or])
    row = cells(table)[0]
    assert soft_or.difference and soft_or.difference.over_seeds and 0 < soft_or.difference.p == soft_or.p_holm < 1
    assert row["p (Holm)"] == f"{soft_or.p_holm:.3f}" and "errors cover" not in row
    assert table.notes[-1] == "Errors and intervals cover problems and seeds."
    assert row["within ± 2"] == f"not shown (± {100 * soft_or.difference.margin:.1f})"
    soft_or.difference = Estimate(0.001, 0.001, 100, over_seeds=True)
    # 0.1 + 1.66 x 0.1
    assert cells(overview([soft_or]))[0]["within ± 2"] == "yes (± 0.3)"
    soft_or.difference = Estimate(-0.03, 0.005, 100, over_seeds=True)  # the 95 % interval ends at -2.008
    assert cells(overview([soft_or]))[0]["within ± 2"] == "no (± 3.8)"


def test_the_held_out_kl_is_compared_as_a_ratio_of_geometric_means(runs: Path, compose_run: Compose) -> None:
    finish_again(runs, compose_run, full={"seq_kl": 1.999}, soft_or={"seq_kl": 0.999})
    table = overview(arms_of(runs))
    full, _, soft_or = [cells(table)[i] for i in (0, 0, 1)]
    assert (full["KL/response"], full["KL vs full [95 %]"], full["KL p (Holm)"]) == ("2", "-", "-")
    # the same ratio for every problem and seed
    assert (soft_or["KL/response"], soft_or["KL vs full [95 %]"]) == ("0.999", "× 0.50 [0.50, 0.50]")
    assert soft_or["KL p (Holm)"] == "< 0.001"
    frame = pd.read_csv(io.StringIO(csv_text(arms_of(runs)))).set_index("selector")
    assert frame.loc["soft_or", "kl_difference"] == pytest.approx(math.log(0.5))
    make_run(compose_run, runs / "old", 0.5, "selector=random")  # a run without the KL is still shown
    assert cells(overview(arms_of(runs)))[-2]["selector"] == "random"
    assert [row["KL/response"] for row in cells(overview(arms_of(runs)))] == ["2", "-", "0.999"]


def test_what_was_kept_overall_and_of_q3(runs: Path, compose_run: Compose) -> None:
    assert "Q3 kept" not in overview(arms_of(runs)).headings
    finish(compose_run("seed=0"), runs / "soft0", 0.84, kept=100, totals={"q3_tokens": 40, "q3_kept_tokens": 4})
    finish(
        compose_run("seed=1"), runs / "soft1", 0.84, kept=100,
        totals={"response_tokens": 300, "q3_tokens": 60, "q3_kept_tokens": 9},
    )  # fmt: skip
    full, soft_or = cells(overview(arms_of(runs)))
    assert (full["kept"], full["Q3 kept"]) == ("50.0 %", "-")
    assert (soft_or["kept"], soft_or["Q3 kept"]) == ("40.0 %", "13.0 %")  # 200 of 500; 13 of 100


def test_a_selector_that_keeps_the_tokens_of_top_entropy_is_named(tmp_path: Path, compose_run: Compose) -> None:
    overlaps = {"soft_or": 0.99, "entropy": 1.0, "random": 0.88, "q3": 0.95}
    for selector, overlap in overlaps.items():
        overrides = [f"selector={selector}", "selector.retention=0.1"]
        make_run(compose_run, tmp_path / selector, 0.5, *overrides, totals={"overlap_entropy": overlap})
    for name, kept in (("random", 980), ("q2", 100)):  # two random sets of 98 % share 96 %; q2 has no budget
        totals = {"overlap_entropy": 0.96, "response_tokens": 1000}
        make_run(compose_run, tmp_path / f"{name}_wide", 0.5, f"selector={name}", kept=kept, totals=totals)
    notes = [note for note in overview(arms_of(tmp_path)).notes if "ranking by entropy" in note]
    assert [note.split(" (Jaccard")[0] for note in notes] == [
        "q2 at 100 % (0.96) keeps almost the same tokens as ranking by entropy",
        "q3 at 10 % (0.95) keeps almost the same tokens as ranking by entropy",
        "soft_or at 10 % (0.99) keeps almost the same tokens as ranking by entropy",
    ]
    assert ["min-max" in note for note in notes] == [False, False, True]


def test_test_problems_in_the_training_set_are_said(runs: Path, compose_run: Compose) -> None:
    assert not any("training set" in note for note in overview(arms_of(runs)).notes)
    in_train = {"in_train_exact": ["p1", "p2"], "in_train_13gram": ["p7"]}
    finish(compose_run("seed=0"), runs / "soft0", 0.84, in_train=in_train)
    (note,) = [note for note in overview(arms_of(runs)).notes if "training set" in note]
    assert note.startswith(
        "word_sums: 2 of its test problems are in the training set; 1 more share most of their 13-grams"
    )


def test_outcomes_without_samples_are_not_compared(runs: Path) -> None:
    path = runs / "full" / "result.json"
    result = json.loads(path.read_text())
    result["outcomes"]["word_sums"] = {"samples": 0, "right": {"p0": 0}}
    path.write_text(json.dumps(result))
    full, soft_or = arms_of(runs)
    assert full.scores is None and soft_or.difference is None and full.final.mean == 0.81


def test_tool_tasks_show_their_baseline_without_tools(runs: Path) -> None:
    assert "no-tool baseline" not in overview(arms_of(runs)).headings
    path = runs / "full" / "result.json"
    result = json.loads(path.read_text())
    result["final"]["word_sums/no_tool_baseline"] = 1 / 3
    path.write_text(json.dumps(result))
    table = overview(arms_of(runs))
    assert [row["no-tool baseline"] for row in cells(table)] == ["33.3", "-"]
    assert table.headings.index("no-tool baseline") == table.headings.index("final ± se") - 1


def test_csv_has_fractions_and_errors(runs: Path) -> None:
    frame = pd.read_csv(io.StringIO(csv_text(arms_of(runs)))).set_index("selector")
    assert frame.loc["soft_or", "final"] == pytest.approx((134 + 141) / 320)
    assert 0.02 < frame.loc["soft_or", "final_se"] < 0.06
    assert frame.loc["soft_or", "difference"] == pytest.approx(7.5 / 160)
    assert frame.loc["soft_or", "difference_low"] <= 7.5 / 160 <= frame.loc["soft_or", "difference_high"]
    assert str(frame.loc["soft_or", "difference_over_seeds"]) == "False"
    assert frame.loc["full", ["difference", "difference_p", "no_tool_baseline", "seq_kl"]].isna().all()
    assert frame.loc["soft_or", ["difference_p", "difference_margin", "p_holm"]].isna().all()  # full has one seed
    assert frame.loc["full", "selector.score"] == "full" and frame.loc["soft_or", "selector.normalizer"] == "minmax"
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


def test_a_table_names_what_tells_its_own_rows_apart(tmp_path: Path, compose_run: Compose) -> None:
    for steps in (40, 20):
        for weight in ("none", "sqrt"):
            for seed in (0, 1):
                overrides = [f"selector.weight={weight}", f"learner.num_steps={steps}", f"seed={seed}"]
                make_run(compose_run, tmp_path / f"{weight}{steps}{seed}", 0.5, *overrides)
    arms = arms_of(tmp_path)
    assert {arm.differs for arm in arms} == {
        f"learner.num_steps={steps}, selector.weight={weight}" for steps in (20, 40) for weight in ("none", "sqrt")
    }
    weights = {"selector.weight=none", "selector.weight=sqrt"}
    for table in [*overviews(arms), *leaderboards(arms)]:
        assert {row["differs in"] for row in cells(table)} == weights, table.title


def test_a_value_of_several_lines_stays_in_one_cell(runs: Path, compose_run: Compose) -> None:
    make_run(compose_run, runs / "other", 0.5, "seed=5", 'pair.chat.system="Be brief.\nUse a box."')
    differs = [arm.differs for arm in arms_of(runs) if arm.differs]
    assert "pair.chat.system=Be brief.\\nUse a box." in differs and not any("\n" in text for text in differs)


def test_keys_that_cannot_change_numbers_do_not_part_arms(runs: Path, compose_run: Compose) -> None:
    unlike = ["learner.checkpoint_every=7", "num_threads=2", "logger=files", "name=x", "ignore_memory=true"]
    make_run(compose_run, runs / "other", 0.85, "seed=5", *unlike)
    (soft_or,) = [arm for arm in arms_of(runs) if arm.selector == "soft_or"]
    assert soft_or.seeds == 3 and soft_or.differs == ""
    assert digest(compose_run("seed=5", *unlike)) == digest(compose_run("seed=5"))
    assert digest(compose_run("seed=5", "learner.lr=1e-3")) != digest(compose_run("seed=5"))


def test_keys_that_only_log_do_not_part_arms_and_keys_of_later_versions_have_their_defaults(
    runs: Path, compose_run: Compose
) -> None:
    logged = ["selector.shadows=[q3]", "learner.gradient_every=2", "learner.diagnostics_every=2"]
    make_run(compose_run, runs / "logged", 0.85, "seed=5", *logged)
    make_run(compose_run, runs / "older", 0.85, "seed=6")
    path = runs / "older" / "config.yaml"
    lines = path.read_text().splitlines()
    kept = [line for line in lines if line.split(":")[0].strip() not in ("kl_clip", "gradient_every", "shadows")]
    assert len(kept) == len(lines) - 3
    path.write_text("\n".join(kept))
    make_run(compose_run, runs / "clipped", 0.85, "seed=7", "learner.kl_clip=0.5")
    clipped, soft_or = sorted((arm for arm in arms_of(runs) if arm.selector == "soft_or"), key=lambda arm: arm.seeds)
    assert soft_or.seeds == 4 and soft_or.differs == "learner.kl_clip=1.0"
    assert clipped.seeds == 1 and clipped.differs == "learner.kl_clip=0.5"


def test_each_setting_has_a_table_and_evaluations_have_one(runs: Path, compose_run: Compose) -> None:
    make_run(compose_run, runs / "other", 0.5, "seed=5", "learner.lr=1e-3")
    make_run(compose_run, runs / "evaluated", 0.7, "experiment=evaluate", "pair.student.path=package:tiny/teacher")
    slow, fast, evaluations = overviews(arms_of(runs))
    assert (slow.title, fast.title) == ("tiny, word_sums, learner.lr=0.002", "tiny, word_sums, learner.lr=0.001")
    assert [row["selector"] for row in cells(slow)] == ["full", "soft_or"] and len(fast.rows) == 1
    for table in (slow, fast):  # the title says it
        assert "differs in" not in table.headings
    assert evaluations.title == "Evaluations without training"
    assert cells(evaluations) == [
        {"run": "evaluated", "student": "package:tiny/teacher", "benchmark": "word_sums", "teacher ± se": "99.0 ± 1.5",
         "final ± se": "70.0 ± 1.5", "greedy ± se": "75.0 ± 1.0", "state": "done"}
    ]  # fmt: skip


def test_settings_that_differ_in_data_or_pair_have_different_names(runs: Path, compose_run: Compose) -> None:
    make_run(compose_run, runs / "short", 0.5, "data.max_response_tokens=64")
    make_run(compose_run, runs / "adapters", 0.5, "pair.student.lora={rank: 2, alpha: 4, target_modules: all-linear}")
    titles = [table.title for table in overviews(arms_of(runs))]
    assert len(set(titles)) == 3 and sum("data.max_response_tokens=64" in title for title in titles) == 1
    assert sum("pair.student.lora.rank=2" in title for title in titles) == 1


def test_one_token_is_less_than_one_percent(runs: Path, compose_run: Compose) -> None:
    for retention in ("0.02", "1e-9"):
        overrides = ["selector=q3", f"selector.retention={retention}", "selector.rounding=at_least_one"]
        make_run(compose_run, runs / retention, 0.5, *overrides)
    arms = [arm for arm in sort_arms(arms_of(runs), "retention") if arm.selector == "q3"]
    assert [arm.retention for arm in arms] == [1e-9, 0.02]


def test_rows_and_columns_are_chosen(runs: Path, compose_run: Compose) -> None:
    make_run(compose_run, runs / "q3", 0.2, "selector=q3", "selector.retention=0.1")
    arms = arms_of(runs)
    (table,) = overviews(sort_arms(arms, "final"), ("selector", "final", "vs full"))
    assert table.headings == ["selector", "final ± se", "vs full [95 %]"]
    assert [row[0] for row in table.rows] == ["q3", "full", "soft_or"]
    assert [arm.selector for arm in sort_arms(arms, "final", descending=True)] == ["soft_or", "full", "q3"]
    for descending in (False, True):
        assert [arm.selector for arm in sort_arms(arms, "vs full", descending=descending)][-1] == "full"  # it has none
    for condition in ("selector=q3", "retention=0.1", "selector.score=q3"):
        assert [arm.selector for arm in select_arms(arms, [condition])] == ["q3"]
    assert select_arms(arms, ["selector=q3", "retention=0.5"]) == []
    assert len(select_arms(arms, ["learner.lr=2e-3"])) == len(arms)  # as an override is read
    assert select_arms(arms, ["selector=none", "learner.lr=2e-3"]) == []  # no arm is left, but the key exists
    with pytest.raises(DataError, match=r"--where selector=\[a: "):
        select_arms(arms, ["selector=[a"])
    with pytest.raises(DataError, match=r"--where lr=1: give KEY=VALUE.*"):
        select_arms(arms, ["lr=1"])
    with pytest.raises(DataError, match="did you mean selector"):
        select_arms(arms, ["selectr=q3"])
    for call in (lambda: sort_arms(arms, "accuracy"), lambda: overviews(arms, ["accuracy"])):
        with pytest.raises(DataError, match="columns are pair, benchmark, selector, retention"):
            call()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--html file/r.html", "--html: {here}/file is no folder to write into"),
        ("--csv .", "--csv .: this is a folder; name a file"),
        ("--markdown locked/new/r.md", "--markdown: {here}/locked is no folder to write into"),
        ("--png file", "--png file: this is a file; name a folder"),
        ("results --out file/new", "--out: {here}/file is no folder to write into"),
        ("--descending", "--descending needs --sort COLUMN"),
        ("--table table5 --sort final", "--table has its own rows and columns; leave out --sort and --columns"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_runs_are_read(
    arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("locked").mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != "locked")  # root may write everywhere
    monkeypatch.setattr(sys, "argv", ["tip-report", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and capsys.readouterr().err == f"error: {message.format(here=tmp_path)}\n"


def test_an_error_of_the_system_while_writing_is_one_message(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(sys, "argv", ["tip-report", str(runs), "--csv", str(runs / "r.csv")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1 and capsys.readouterr().err == "error: [Errno 28] No space left on device\n"


def test_a_terminal_in_ascii_gets_the_table(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "argv", ["tip-report", str(runs)])
    cli.main()
    assert b"\\xb1" in terminal.buffer.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_a_number_with_an_exponent_is_sorted_by_its_value() -> None:
    """1,234 nats are written 1.23e+03."""
    assert columns.first_number("1.23e+03 ± 4") == 1230 and columns.first_number("not a number") is None


def test_a_seed_of_two_sweeps_counts_once_and_the_finished_run_is_preferred(runs: Path, compose_run: Compose) -> None:
    make_run(compose_run, runs / "again", 0.84, "seed=0", "sweep=other", "name=again")
    make_run(compose_run, runs / "begun", None, "seed=1", "sweep=other", "name=begun")
    (soft_or,) = [arm for arm in arms_of(runs) if arm.selector == "soft_or"]
    assert (soft_or.seeds, soft_or.runs) == (2, 3)
    assert [Path(folder).name for folder in soft_or.folders] == ["again", "soft1", "soft2"]


def test_runs_that_are_unlike_the_others_are_named(runs: Path, compose_run: Compose) -> None:
    before = overview(arms_of(runs)).notes
    make_run(compose_run, runs / "soft0_copy", 0.84, "seed=0")
    assert overview(arms_of(runs)).notes == before
    make_run(compose_run, runs / "soft0_other", 0.5, "seed=0")
    make_run(compose_run, runs / "full1", 0.81, "selector=full", "seed=1", hardware="1 x NVIDIA H200")
    make_run(compose_run, runs / "full2", 0.81, "selector=full", "seed=2")
    arms = arms_of(runs)
    notes = overview(arms).notes
    assert "These runs are of several machines: 1 x NVIDIA H200; test." in notes
    assert any(note.startswith("Runs left out of soft_or 50 % (word_sums): 1.") for note in notes)
    assert any(note.startswith("Compared with all tokens without pairing") and "soft_or 50 %" in note for note in notes)
    assert [arm.final.mean for arm in arms if arm.selector == "soft_or"] == [pytest.approx(0.86, abs=0.01)]


def test_a_number_that_one_seed_lacks_is_no_mean_of_the_others(runs: Path) -> None:
    path = runs / "soft0" / "result.json"
    result = json.loads(path.read_text())
    del result["memory"]["memory/loss_extra_mib"]
    path.write_text(json.dumps(result))
    assert cells(overview(arms_of(runs)))[1]["loss MiB"] == "-"


def test_an_unfinished_run_has_a_row_without_numbers(tmp_path: Path, compose_run: Compose) -> None:
    make_run(compose_run, tmp_path / "started", None)
    table = overview(arms_of(tmp_path))
    (row,) = cells(table)
    assert row["final ± se"] == "-" and row["kept"] == "-" and row["state"] == "1 of 1 unfinished"
    assert not table.notes


def test_runs_with_other_problems_are_not_compared(runs: Path, compose_run: Compose) -> None:
    finish(compose_run("seed=1"), runs / "soft1", 0.88, problems=30)
    full, soft_or = arms_of(runs)
    assert full.scores is not None and soft_or.scores is None and soft_or.difference is None
    finish(compose_run("seed=0"), runs / "soft0", 0.84, problems=30)
    assert arms_of(runs)[1].scores is not None and arms_of(runs)[1].difference is None  # 30 problems against 40


def test_holm_is_over_all_comparisons_with_one_baseline(tmp_path: Path, compose_run: Compose) -> None:
    for seed in (0, 1):
        of_seed = [f"seed={seed}"]
        make_run(compose_run, tmp_path / f"full{seed}", 0.5, "selector=full", *of_seed)
        for selector, final in (("entropy", 0.55), ("soft_or", 0.6), ("random", 0.4)):
            final += 0.02 * seed
            make_run(compose_run, tmp_path / f"{selector}{seed}", final, f"selector={selector}", *of_seed)
        make_run(compose_run, tmp_path / f"lone{seed}", 0.9, "learner.num_steps=40", *of_seed)  # no full run of 40
    make_run(compose_run, tmp_path / "single", 0.9, "selector=q3")  # one seed: no p
    compared = [arm for arm in arms_of(tmp_path) if not math.isnan(arm.p_holm)]
    p_values = [arm.difference.p for arm in compared if arm.difference]
    assert sorted(arm.selector for arm in compared) == ["entropy", "random", "soft_or"] and len(p_values) == 3
    ascending = np.argsort(p_values)
    expected = np.maximum.accumulate(np.minimum(1, np.array(p_values)[ascending] * [3, 2, 1]))
    assert [compared[i].p_holm for i in ascending] == pytest.approx(list(expected))
    assert [arm.difference is not None for arm in arms_of(tmp_path) if arm.selector == "q3"] == [True]


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
    arms = arms_of(tmp_path)
    table, differences = paper_tables("table5", arms, arms)
    assert table.title == "Table 5 and Figure 1: entropy against Soft-OR. qwen3_8b_to_4b"
    assert table.headings == ["method", "ρ", "source", "seeds", "MATH-500", "AIME 2024", "AIME 2025"]
    strict, printed = ["", "", "ours, string grader", ""], ["", "", "paper ± as printed", ""]
    assert [row[:5] for row in table.rows] == [
        ["Full (all tokens)", "100 %", "ours ± se", "1", "70.0 ± 1.5"], [*strict, "68.0"], [*printed, "76.7 ± 0.7"],
        ["Entropy sampling", "50 %", "ours ± se", "0", "missing"], [*printed, "78.6 ± 0.6"],
        ["Entropy sampling", "20 %", "ours ± se", "0", "missing"], [*printed, "74.1 ± 0.9"],
        ["Soft-OR", "50 %", "ours ± se", "1", "80.0 ± 1.5"], [*strict, "78.0"], [*printed, "79.1 ± 0.8"],
        ["Soft-OR", "20 %", "ours ± se", "0 of 1", "unfinished"], [*printed, "77.6 ± 0.7"],
    ]  # fmt: skip
    assert any("by the string comparison of the paper's base code" in note for note in table.notes)
    assert table.best == {(7, 4), (7, 5), (7, 6)}
    assert table.lines == {3, 7}
    assert [row[:3] for row in differences.rows] == [
        ["Soft-OR", "50 %", name] for name in ("MATH-500", "AIME 2024", "AIME 2025")
    ]
    for row in differences.rows:
        assert row[3].startswith("+10.0 [") and row[4:] == ["problems, not seeds", "-", "-", "-", "-"]
    text = latex(table)
    assert r"\toprule" in text and r"\bottomrule" in text and r"\textbf{80.0 $\pm$ 1.5}" in text
    assert r"Soft-OR & 50 \% & ours $\pm$ se & 1 &" in text and "8 x H200" in text and r"qwen3\_8b\_to\_4b" in text


def test_memory_columns_come_from_the_memory_sweeps_alone(tmp_path: Path, compose_run: Compose) -> None:
    make_run(compose_run, tmp_path / "full", 0.7, "selector=full", *PAPER_PAIR)
    make_run(compose_run, tmp_path / "half", 0.7, "selector=entropy_sample", *PAPER_PAIR)
    without = paper_tables("table3", arms_of(tmp_path), [])[0]
    assert without.headings[-3:] == ["loss MiB, fused", "loss MiB, materialized", "peak GB of the paper"]
    assert all(row[-3:] == ["-"] * 3 for row in without.rows if row[2].startswith("ours"))
    assert any("no such run is among these records" in note for note in without.notes)
    for backend in ("fused", "materialized"):
        overrides = [
            "selector=entropy_sample",
            *PAPER_PAIR,
            "experiment=tip_backends",
            f"learner.loss_backend={backend}",
        ]
        make_run(compose_run, tmp_path / backend, 0.1, *overrides, "sweep=memory", f"name={backend}")
    arms = arms_of(tmp_path)
    table, *others = [table for table in paper_tables("table3", arms, arms) if "difference" not in table.title]
    assert not others  # the runs of twenty steps have no accuracies to show
    memory = {tuple(row[:2]): row[-3:] for row in table.rows if row[2] == "ours ± se"}
    assert memory["Entropy sampling", "50 %"] == ["13.5", "13.5", "-"]
    assert memory["Entropy sampling", "20 %"] == memory["Full (all tokens)", "100 %"] == ["-", "-", "-"]
    assert [row[-3:] for row in table.rows if row[2].startswith("paper")][:2] == [["-", "-", "72"], ["-", "-", "38.1"]]
    assert not any("no such run" in note for note in table.notes)


def test_each_setting_has_its_table_and_the_title_says_what_differs(tmp_path: Path, compose_run: Compose) -> None:
    for steps in (40, 20):
        for selector in ("full", "soft_or"):
            overrides = [f"selector={selector}", f"learner.num_steps={steps}"]
            make_run(compose_run, tmp_path / f"{selector}{steps}", 0.5, *overrides)
    arms = arms_of(tmp_path)
    titles = [table.title for table in paper_tables("table6", arms, arms) if "difference" not in table.title]
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
    with pytest.raises(DataError, match=r"there is no .*nowhere; give folders of runs, "):
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
    assert process.stderr.splitlines() == [f"{out / name} written" for name in ("t.md", "t.tex", "t.csv")]
    assert list(pd.read_csv(out / "t.csv")["selector"]) == ["full", "soft_or"]
    assert r"\bottomrule" in (out / "t.tex").read_text()


def test_errors_of_the_command_are_one_line_and_exit_code_2(runs: Path) -> None:
    for arguments, message in (
        ([str(runs / "nowhere")], "nowhere; give folders of runs"),
        ([str(runs), "--table", "table8", "--where", "pair=tiny"], "with pair=tiny belongs to table8"),
        ([str(runs), "--table", "leaderboard"], "a leaderboard needs two arms with two finished seeds each"),
    ):
        process = report(*arguments)
        assert process.returncode == 2 and message in process.stderr
        assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1


def test_students_of_several_seeds_are_one_arm(compose_run: Compose) -> None:
    """With pair.student.per_seed the student's path may differ between the seeds of an arm; else arms differ."""

    def records(per_seed: bool) -> list[RunRecord]:
        configs = [compose_run(f"seed={seed}").model_dump() for seed in (0, 1)]
        for config in configs:
            config["pair"]["student"] |= {"per_seed": per_seed, "path": f"./students/{config['seed']}"}
        return [RunRecord(str(config["seed"]), [], config, None, {}, []) for config in configs]

    assert [arm.runs for arm in summarize(records(per_seed=True))] == [2]
    assert [arm.runs for arm in summarize(records(per_seed=False))] == [1, 1]
