"""The settings and verdicts of the registered test, from folders of runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.synthetic_runs import finish, write_config

from scripts.registered import main, verdict_of
from tip_exp.config.schema import RunConfig
from tip_exp.report.significance import Estimate

W = ["selector=full", "selector.weight=sqrt"]


def add_run(folder: Path, config: RunConfig, kl: float, accuracy: float = 0.5) -> None:
    write_config(config, folder)
    finish(config, folder, accuracy, seq_kl=kl)


def test_the_best_setting_of_a_search_has_the_lowest_mean_log_kl(
    tmp_path: Path,
    compose_run: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for seed in (0, 1):
        for lr, kl in ((1e-3, 2.0), (2e-3, 1.0), (3e-3, 3.0)):
            config = compose_run("experiment=demo", "selector=full", f"learner.lr={lr}", f"seed={seed}")
            add_run(tmp_path / f"{lr}_{seed}", config, kl)
    monkeypatch.setattr("sys.argv", ["", str(tmp_path)])
    main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| F")]
    assert [row.split("|")[2].strip() for row in rows] == ["0.002", "0.001", "0.003"]
    assert ["best" in row for row in rows] == [True, False, False]


def test_differences_are_paired_with_those_of_all_tokens(
    tmp_path: Path,
    compose_run: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for seed in (0, 1, 2):
        arms = {"F": (["selector=full"], 4.0, 0.5), "W": (W, 2.0 + 0.1 * seed, 0.6)}
        for name, (overrides, kl, accuracy) in arms.items():
            config = compose_run("experiment=demo", *overrides, f"seed={seed}")
            add_run(tmp_path / f"{name}_{seed}", config, kl, accuracy)
    for options, verdict in (([], "confirmed"), (["--hypotheses", "R"], "")):
        monkeypatch.setattr("sys.argv", ["", str(tmp_path), *options])
        main()
        row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| W"))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        # t(0.975, 2 degrees of freedom) = 4.303 x 0.1 / sqrt(3) = 0.248 around 2.1 - 4
        assert cells[4] == "2.10, -1.90 [-2.15, -1.65]" and cells[6].startswith("× 0.52 [")
        assert cells[8].startswith("+10.0 [") and cells[-1] == verdict and bool(cells[7]) == bool(verdict)


@pytest.mark.parametrize(
    ("log_kl", "accuracy", "verdict"),
    [
        (Estimate(-0.2, 0.05), Estimate(0.0, 0.005), "confirmed"),
        (Estimate(-0.2, 0.05), Estimate(-0.02, 0.005), "not resolved"),
        (Estimate(-0.05, 0.05), Estimate(0.0, 0.005), "not resolved"),
        (Estimate(0.2, 0.05), Estimate(0.0, 0.005), "contradicted"),
    ],
)
def test_verdicts(log_kl: Estimate, accuracy: Estimate, verdict: str) -> None:
    assert verdict_of(log_kl, accuracy) == verdict
