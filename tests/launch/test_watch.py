"""`tip-exp watch` on folders written by hand, as a sweep has them while it runs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tests import synthetic_runs
from tests.synthetic_runs import append_rows

from tip_exp.config.schema import RunConfig
from tip_exp.launch import watch as module
from tip_exp.launch.lock import lock_or_holder
from tip_exp.launch.watch import table, watch
from tip_exp.records.folder import RunFolder
from tip_exp.records.integrity import describe_files, with_checksum
from tip_exp.utils.io import to_json


def row(step: int, **more: float) -> dict[str, float]:
    return {"step": step, "train/loss": 1 / (step + 1), "rollout/tokens_per_s": 1234.4, "time/step_s": 10.0, **more}


@pytest.fixture
def sweep(tmp_path: Path, compose_run: Callable[..., RunConfig]) -> Path:
    """A finished run, one at step 4 of 40 whose newest line is torn, one that has not written its config whole."""
    for name in ("a", "b"):
        synthetic_runs.write_config(compose_run(f"name={name}"), tmp_path / name)
    synthetic_runs.finish(compose_run("name=a"), tmp_path / "a", 0.8)
    metrics = RunFolder(tmp_path / "b").metrics
    evaluated = {"eval/word_sums/mean@4": 0.615, "eval/word_sums/mean@4_se": 0.01}
    append_rows(metrics, [row(step, **(evaluated if step == 2 else {})) for step in range(1, 5)])
    with metrics.open("a") as file:
        file.write('{"step": 5, "train/lo')
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.yaml").write_text("")
    return tmp_path


def cells(lines: list[str], name: str) -> list[str]:
    (line,) = [line for line in lines if line.startswith(f"{name} ")]
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_a_row_says_how_far_a_run_is(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = RunFolder(sweep / "a")
    result = json.loads(done.result.read_text())
    done.result.write_text(to_json(with_checksum(result | {"files": describe_files(done)})))
    os.utime(done.config, (0, 0))  # older than result.json: a redraw does not read all its bytes
    monkeypatch.setattr("tip_exp.records.integrity.checksum", lambda path: pytest.fail(f"{path} is read"))
    files = sorted(sweep.rglob("*"))
    with lock_or_holder(RunFolder(sweep / "b").lock):
        lines, all_done = table(sweep)
    assert lines[0] == f"1 of 3 done, 1 running in {sweep}" and not all_done
    assert cells(lines, "run") == ["run", "state", "step", "accuracy", "loss", "tokens/s", "left"]
    assert cells(lines, "a")[1] == "done"
    # 36 steps of 10 s are left
    newest = ["running", "4 of 40", "word_sums/mean@4 61.5 % (step 2)", "0.2", "1,234", "6.0 min"]
    assert cells(lines, "b") == ["b", *newest]
    assert cells(lines, "c") == ["c", "unread", "config.yaml is empty"]
    assert cells(table(sweep)[0], "b")[1] == "stopped"
    assert sorted(sweep.rglob("*")) == files, "nothing is written"
    (sweep / "b" / "worker.log").write_text("1 02 tip_exp ERROR the run failed: no space\n")
    assert cells(table(sweep)[0], "b")[1] == "failed"


def test_without_a_terminal_the_table_is_printed_once(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watch([str(sweep)])
    assert capsys.readouterr().out.count("tokens/s") == 1


def test_on_a_terminal_it_is_renewed_until_all_runs_are_done(
    sweep: Path,
    compose_run: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def finish(_seconds: float) -> None:
        for name in ("b", "c"):
            synthetic_runs.write_config(compose_run(f"name={name}"), sweep / name)
            synthetic_runs.finish(compose_run(f"name={name}"), sweep / name, 0.7)

    monkeypatch.setattr(module.time, "sleep", finish)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    watch([str(sweep)])
    first, last = capsys.readouterr().out.split(module.CLEAR)[1:]
    assert "1 of 3 done" in first and "3 of 3 done" in last


def test_a_folder_that_does_not_exist_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        watch([str(tmp_path / "none")])
    assert "is not a folder" in capsys.readouterr().err
