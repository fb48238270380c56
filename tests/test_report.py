"""Tables from run folders: exact text, seeds averaged, unlike configs kept apart, missing runs shown."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from tip_exp.config import RunConfig
from tip_exp.report import csv_frame, find_runs, read_run, summarize, table

Write = Callable[[RunConfig, Path], None]
Run = Callable[..., RunConfig]


def finish(folder: Path, final: float, kept: int = 1000) -> None:
    def scores(value: float) -> dict[str, float]:
        errors = {"word_sums/mean@4_se": 0.015, "word_sums/greedy_se": 0.01}
        return {"word_sums/mean@4": value, "word_sums/greedy": value + 0.05, **errors}

    result = {
        "teacher": scores(0.99), "start": scores(0.35), "final": scores(final),
        "totals": {"kept_tokens": kept, "wall_s": 41.6},
        "memory": {"memory/loss_extra_mib": 13.52, "memory/process_peak_gib": 0.603},
        "hardware": "test", "git_revision": "abc",
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))


@pytest.fixture
def runs(tmp_path: Path, compose_run: Run, write_config: Write) -> Path:
    """soft_or with seeds 0 and 1 done and 2 not; full with seed 0 done."""
    for seed, final in ((0, 0.84), (1, 0.88), (2, None)):
        folder = tmp_path / f"soft{seed}"
        write_config(compose_run(f"seed={seed}"), folder)
        if final:
            finish(folder, final)
    write_config(compose_run("selector=full"), tmp_path / "full")
    finish(tmp_path / "full", 0.81, kept=2000)
    return tmp_path


def summary(root: Path) -> pd.DataFrame:
    return summarize(pd.DataFrame([read_run(folder) for folder in find_runs([root])]))


def test_the_table(runs: Path) -> None:
    shown = table(summary(runs)).to_dict("records")
    assert shown[0] == {
        "selector": "full", "retention": "100 %", "seeds": 1, "teacher": "99.0 ± 1.5", "step 0": "35.0 ± 1.5",
        "final": "81.0 ± 1.5", "greedy": "86.0 ± 1.0", "kept tokens": "2,000", "loss MiB": "13.5",
        "process GiB": "0.60", "wall s": "42", "state": "done",
    }  # fmt: skip
    # two seeds: mean 86, standard deviation 2.83 over the root of 2 = 2.0
    assert shown[1]["final"] == "86.0 ± 2.0" and shown[1]["seeds"] == 2
    assert shown[1]["state"] == "1 of 3 unfinished"


def test_csv_has_fractions_and_errors(runs: Path) -> None:
    frame = csv_frame(summary(runs)).set_index("selector")
    assert frame.loc["soft_or", "final"] == pytest.approx(0.86) and frame.loc["soft_or", "final_se"] == pytest.approx(
        0.02
    )


def test_unlike_configs_are_never_averaged(runs: Path, compose_run: Run, write_config: Write) -> None:
    write_config(compose_run("seed=5", "learner.lr=1e-3"), runs / "other")
    finish(runs / "other", 0.5)
    assert len(summary(runs)) == 3


def test_a_run_without_any_result_is_shown_as_missing(tmp_path: Path, compose_run: Run, write_config: Write) -> None:
    write_config(compose_run(), tmp_path / "started")
    (row,) = table(summary(tmp_path)).to_dict("records")
    assert row["final"] == "-" and row["kept tokens"] == "-" and row["state"] == "1 of 1 unfinished"


def test_the_command_prints_writes_and_refuses(runs: Path) -> None:
    def report(*arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "tip_exp.report", *arguments]
        return subprocess.run(line, capture_output=True, text=True, timeout=60)

    done = report(str(runs), "--markdown", str(runs / "out" / "t.md"), "--csv", str(runs / "out" / "t.csv"))
    assert done.returncode == 0, done.stderr
    assert (runs / "out" / "t.md").read_text().strip() == done.stdout.strip()
    assert list(pd.read_csv(runs / "out" / "t.csv")["selector"]) == ["full", "soft_or"]
    missing = report(str(runs / "nowhere"))
    assert missing.returncode == 1 and "nowhere is not a folder" in missing.stderr and "Traceback" not in missing.stderr
    (runs / "empty").mkdir()
    assert "no run (a folder with config.yaml)" in report(str(runs / "empty")).stderr
