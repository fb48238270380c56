"""The GPU check, rehearsed on a CPU: every part of it runs, and a failure does not stop the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.gpu_check import CHECKS, Check, attempt, attempt_in_child, checks, report

CLAIMS = {name: check.claim for name, check in CHECKS.items()}
ROOT = Path(__file__).parents[2]


def rehearse(out: Path, *only: str) -> dict[str, str]:
    """State of each check in the report."""
    main(["gpu_check", "--device", "cpu", "--tiny", "--out", str(out), "--only", *only])
    (path,) = [path for path in out.glob("*.md") if path.name != "README.md"]
    rows = [line.strip("| ").split(" | ") for line in path.read_text().splitlines() if line.startswith("| ")]
    return {row[0]: row[2] for row in reversed(rows) if row[0] in CHECKS}  # the first table wins


def test_a_rehearsal_passes_and_leaves_its_numbers(tmp_path: Path) -> None:
    names = ["loss", "memory", "engine", "run", "run_ranks", "forecast"]
    states = rehearse(tmp_path, *names)
    needs = "not yet run: needs two GPUs"
    assert states == dict.fromkeys(CHECKS, report.NOT_RUN) | dict.fromkeys(names, "passed") | {"run_ranks": needs}
    (path,) = [path for path in tmp_path.glob("*.md") if path.name != "README.md"]
    text = path.read_text()
    for column in (
        "times cuBLAS alone",
        "materialized MiB",
        "log-prob mismatch",
        "sync s",
        "rollout_s",
        "forecast / measured",
    ):
        assert column in text, column
    overview = (tmp_path / "README.md").read_text()
    assert f"| loss | {CLAIMS['loss']} | [{path.stem}]({path.name}): passed |" in overview
    assert f"| tests | {CLAIMS['tests']} | not yet run |" in overview


def test_a_failure_is_a_line_of_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(settings: checks.Settings) -> list[str]:
        raise RuntimeError("out of memory | 80 GiB\nat line 2")

    monkeypatch.setitem(CHECKS, "loss", Check("it fails", 1, fail))
    with pytest.raises(SystemExit) as stopped:
        rehearse(tmp_path, "loss", "forecast")
    assert stopped.value.code == 1
    (path,) = [path for path in tmp_path.glob("*.md") if path.name != "README.md"]
    assert "| loss | it fails | failed: out of memory / 80 GiB | 0 |" in path.read_text()
    assert "| forecast | " in path.read_text() and "failed: no run above has finished" in path.read_text()
    assert "RuntimeError: out of memory" in path.read_text()


def test_a_child_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHECKS, "forecast", Check("", 0, checks.forecast))
    result = attempt_in_child("forecast", checks.Settings("cpu", True, 1, tmp_path))
    assert result.state == "failed: not finished after 0 s"


def test_a_child_reports_what_the_check_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHECKS, "forecast", Check("", 500, checks.forecast))
    settings = checks.Settings("cpu", True, 1, tmp_path)
    child = attempt_in_child("forecast", settings)
    assert child.state == attempt("forecast", settings).state == "failed: no run above has finished"


def test_the_committed_overview_lists_every_check() -> None:
    """Claims of the documentation point to its lines."""
    assert (ROOT / "results" / "gpu" / "README.md").read_text() == report.overview(ROOT / "results" / "gpu", CLAIMS)
