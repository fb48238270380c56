"""`tip-exp show` and `tip-exp compare` on synthetic run folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests import synthetic_runs
from tests.synthetic_runs import append_rows

from tip_exp.config.schema import RunConfig
from tip_exp.launch.show import compare, show
from tip_exp.records.folder import RunFolder

Make = Callable[..., RunFolder]
Printed = pytest.CaptureFixture[str]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compose_run: Callable[..., RunConfig]) -> Make:
    monkeypatch.chdir(tmp_path)

    def made(folder: str, *overrides: str, final: float | None = None) -> RunFolder:
        """A run with these overrides: finished with this accuracy, or unfinished."""
        config, root = compose_run(*overrides), Path(folder)
        synthetic_runs.write_config(config, root)
        if final is not None:
            synthetic_runs.finish(config, root, final)
        return RunFolder(root)

    return made


def table_row(printed: str, first: str) -> list[str]:
    (line,) = [line for line in printed.splitlines() if line.startswith(f"| {first} ")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_finished_run_is_shown_in_full(make: Make, capsys: Printed) -> None:
    run = make("outputs/runs/a", "selector=q3", "name=a", final=0.8)
    append_rows(run.metrics, [{"step": 40, "train/loss": 0.25, "time/step_s": 9.0, "eval/word_sums/greedy": 0.5,
                               "eval/word_sums/greedy_se": 0.1}])  # fmt: skip
    show([str(run.root)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        "a: student package:tiny/student learns from package:tiny/teacher on word_sums, 40 steps"
    )
    assert "q3 keeps 10 % of the tokens" in lines[1] and lines[1].endswith("in outputs/runs/a")
    assert lines[2] == "state: done"
    assert "step    40   word_sums/greedy 50.0 %" in lines and "  train/loss  0.25" in lines
    assert lines[-1].endswith("next: tip-report outputs/runs/a")


def test_a_rule_without_a_budget_and_a_teachers_evaluation_are_shown(make: Make, capsys: Printed) -> None:
    show([str(make("outputs/runs/a", "selector=q1").root)])
    assert "  q1 keeps every token with a positive score; " in capsys.readouterr().out
    run = make("outputs/teachers/t", "mode=teacher", final=0.5)
    result = json.loads(run.result.read_text())
    result |= {"start": {}, "final": {}, "totals": result["totals"] | {"steps": 0}}
    run.result.write_text(json.dumps(result))
    show(["outputs"])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.split() == ["outputs/teachers/t", "done", "word_sums/mean@4", "99.0", "%"]


def test_shadows_are_a_table_of_the_newest_step_that_scored_them(make: Make, capsys: Printed) -> None:
    run = make("outputs/runs/a", "selector=q3", "name=a", "selector.shadows=[soft_or@0.2,full]")
    scored = {"select/kept_frac": 0.1, "select/gradient_mass": 0.95, "shadow/soft_or@0.2/kept_frac": 0.19}
    scored |= {"shadow/soft_or@0.2/overlap": 0.123, "quadrant/q3_kept_frac": 1.0, "shadow/soft_or@0.2/q3_kept_frac": 0}
    append_rows(run.metrics, [{"step": 0}, {"step": 2, **scored}, {"step": 3, "select/kept_frac": 0.1}])
    show([str(run.root)])
    printed = capsys.readouterr().out
    assert "Shadow selectors at step 2" in printed and "Overlap: Jaccard index with the tokens that q3" in printed
    headings = table_row(printed, "selector")
    rows = {name: dict(zip(headings, table_row(printed, name), strict=True)) for name in ("q3", "soft_or@0.2", "full")}
    assert (rows["q3"]["overlap"], rows["q3"]["kept"], rows["q3"]["gradient mass"]) == ("-", "10.0 %", "95.0 %")
    assert (rows["soft_or@0.2"]["overlap"], rows["soft_or@0.2"]["kept"]) == ("12.3 %", "19.0 %")
    assert (rows["q3"]["Q3 kept"], rows["soft_or@0.2"]["Q3 kept"]) == ("100.0 %", "0.0 %")
    assert set(rows["full"].values()) == {"full", "-"}  # its statistics were not finite


def test_several_runs_are_a_line_each(make: Make, capsys: Printed) -> None:
    make("outputs/runs/a", "name=a", final=0.8)
    stopped = make("outputs/runs/b", "name=b")
    append_rows(stopped.metrics, [{"step": step} for step in range(8)])
    (stopped.checkpoints / "step_00005").mkdir(parents=True)
    (stopped.checkpoints / "step_00006_v2").mkdir()  # a user's copy
    show([])
    first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ["outputs/runs/a", "done", "word_sums/mean@4", "35.0", "%", "->", "80.0", "%"]
    assert second.split(maxsplit=1)[1] == "stopped at step 7 of 40, resumes from step 5  "
    stopped.log.write_text("1 02 tip_exp INFO the run starts\n")
    stopped.log_of(2).write_text("1 01 tip_exp ERROR the run failed: of an earlier start\n")
    stopped.log_of(1).write_text("1 03 tip_exp ERROR the run failed: no space\nTraceback …\n")
    show([])
    assert capsys.readouterr().out.splitlines()[1].endswith("failed at step 7 of 40, resumes from step 5: no space  ")


def test_two_runs_differ_in_their_keys_and_results(make: Make, capsys: Printed) -> None:
    a, b = make("a", "name=a", final=0.6), make("b", "name=b", "learner.lr=1e-3", "selector=q3", final=0.7)
    compare([str(a.root), str(b.root)])
    printed = capsys.readouterr().out
    assert table_row(printed, "learner.lr") == ["learner.lr", "0.002", "0.001"]
    assert table_row(printed, "selector.score") == ["selector.score", "soft_or", "q3"]
    assert "| name " not in printed and "learner.eps" not in printed
    row = table_row(printed, "soft_or 50 % -> q3 10 %")
    assert row[1:4] == ["word_sums", "60.0 ± 1.5", "70.0 ± 1.5"]
    assert row[4].startswith("+10.0 [") and row[5:] == ["50.0 % -> 50.0 %", "13.5 -> 13.5", "42 -> 42"]


def test_two_sweeps_compare_the_arms_that_both_have(make: Make, capsys: Printed) -> None:
    for sweep, lr, final in (("x", "2e-3", 0.6), ("y", "1e-3", 0.5)):
        for selector in ("entropy", "random"):
            for seed in (0, 1):
                settings = [f"selector={selector}", f"seed={seed}", f"learner.lr={lr}"]
                make(f"{sweep}/{selector}{seed}", *settings, f"name={selector}{seed}", final=final)
    make("x/q3", "selector=q3", "name=q3", final=0.9)
    compare(["x", "y"])
    printed = capsys.readouterr().out
    assert table_row(printed, "key")[1:] == ["A: x (5 runs)", "B: y (4 runs)"]
    assert table_row(printed, "learner.lr")[1:] == ["0.002", "0.001"]
    assert "| seed " not in printed
    for selector in ("entropy", "random"):
        assert table_row(printed, f"{selector} 50 %")[4].startswith("-10.0 [")
    assert "| q3 10 % " not in printed and printed.splitlines()[-1] == "Finished in A alone: q3 10 % on word_sums."


def test_arms_that_look_alike_are_compared_by_the_keys_that_both_sides_have(make: Make, capsys: Printed) -> None:
    for side, steps, rates in (("x", 40, ("1e-3", "2e-3")), ("y", 20, ("1e-3", "2e-3", "4e-3"))):
        for lr in rates:
            settings = [f"learner.lr={lr}", f"learner.num_steps={steps}", f"name=lr{lr}"]
            make(f"{side}/{lr}", *settings, final=0.5 + 100 * float(lr))
    compare(["x", "y"])
    printed = capsys.readouterr().out
    assert table_row(printed, "soft_or 50 % (learner.lr=0.001)")[1:4] == ["word_sums", "60.0 ± 1.5", "60.0 ± 1.5"]
    assert table_row(printed, "soft_or 50 % (learner.lr=0.002)")[2:4] == ["70.0 ± 1.5", "70.0 ± 1.5"]
    assert printed.splitlines()[-1] == "Finished in B alone: soft_or 50 % (learner.lr=0.004) on word_sums."
    compare(["x", "y/4e-3"])  # no rate in common
    printed = capsys.readouterr().out
    assert table_row(printed, "soft_or 50 % (learner.lr=0.001) -> soft_or 50 %")[2:4] == ["60.0 ± 1.5", "90.0 ± 1.5"]


def test_a_damaged_run_and_one_of_another_version_do_not_hide_the_others(make: Make, capsys: Printed) -> None:
    make("outputs/a", "name=a", final=0.8)
    torn, other = make("outputs/b", "name=b"), make("outputs/c", "name=c", final=0.7)
    torn.metrics.write_text('{"step"\n{"step": 2}\n')
    other.config.write_text(other.config.read_text() + "key_of_another_version: 1\n")
    show([])
    first, second, third = (line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines())
    assert first.startswith("done ") and first.endswith("-> 80.0 %") and third.endswith("-> 70.0 %")
    assert second.startswith("damaged: metrics.jsonl is torn")
    show([str(other.root)])
    printed = capsys.readouterr().out
    assert printed.startswith("outputs/c: this configuration cannot run: key_of_another_version")
    assert "\nstate: done\n" in printed and "next: tip-report outputs/c" in printed
    show([str(torn.root)])
    assert "state: damaged: metrics.jsonl is torn" in capsys.readouterr().out
    other.config.write_text("")
    with pytest.raises(SystemExit):
        compare(["outputs/a", "outputs/c"])
    assert capsys.readouterr().err == "error: outputs/c is damaged: config.yaml is empty\n"


def test_a_folder_without_runs_is_one_message(make: Make, capsys: Printed) -> None:
    for folder, message in (
        ("nowhere", "nowhere is not a folder"),
        (".", "no run (a folder with config.yaml) below ."),
    ):
        with pytest.raises(SystemExit) as ended:
            show([folder])
        assert ended.value.code == 2 and message in capsys.readouterr().err


def test_a_metric_that_was_not_finite_is_a_dash(make: Make, capsys: Printed) -> None:
    run = make("run", final=0.5)
    append_rows(run.metrics, [{"step": 99, "train/loss": None, "select/kept": 3.0}])
    show([str(run.root)])
    assert "  train/loss   -\n" in capsys.readouterr().out
