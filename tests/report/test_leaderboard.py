"""Arms ranked by held-out KL, their groups, and plots of KL against kept tokens and against the gradient kept."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.synthetic_runs import append_rows, finish, write_config

from tip_exp.config.schema import RunConfig
from tip_exp.records.reader import read_runs
from tip_exp.report import cli
from tip_exp.report.arms import ArmResult, summarize
from tip_exp.report.colours import colour_of
from tip_exp.report.leaderboard import FEW_SEEDS, indistinguishable, leaderboards
from tip_exp.report.page import page
from tip_exp.report.prediction import divergence, first_step_masses, prediction
from tip_exp.report.results_page import sweep_tables
from tip_exp.report.run_files import RunFiles
from tip_exp.report.significance import ArmScores

# selector -> (retention, KL of a response by seed, gradient mass of step 1 by seed)
ARMS = {
    "full": (1.0, (5.0, 5.3, 4.8), (1.0, 1.0, 1.0)),
    "q3": (0.1, (5.2, 4.8, 5.3), (0.9, 0.94, 0.98)),
    "random": (0.1, (30.0, 33.0, 31.0), (0.1, 0.1, 0.1)),
    "grad_norm": (0.1, (2.0, 2.1, 2.05), (0.99, 0.99, 0.99)),
}


@pytest.fixture
def root(tmp_path: Path, compose_run: Callable[..., RunConfig]) -> Path:
    for selector, (retention, kls, masses) in ARMS.items():
        for seed, (kl, mass) in enumerate(zip(kls, masses, strict=True)):
            run = tmp_path / f"{selector}{seed}"
            overrides = [f"selector={selector}", f"selector.retention={retention}", f"seed={seed}"]
            config = compose_run(*overrides, "sweep=demo_leaderboard")
            write_config(config, run)
            finish(config, run, 0.8 - kl / 100, seq_kl=kl, kept=int(1000 * retention), totals={"response_tokens": 1000})
            rows = [{"step": step, "select/gradient_mass": mass / step} for step in (1, 2)]
            append_rows(run / "metrics.jsonl", rows)
            (run / "samples.jsonl").touch()
    return tmp_path


@pytest.fixture
def arms(root: Path) -> list[ArmResult]:
    return summarize(read_runs([root]))


def files() -> list[RunFiles]:
    return [
        RunFiles(f"{selector} {100 * retention:g} %", {}, [{"step": 1, "select/gradient_mass": mass}, {"step": 2}], [])
        for selector, (retention, _, masses) in ARMS.items()
        for mass in masses
    ]


def test_arms_are_ranked_by_kl_and_grouped(arms: list[ArmResult]) -> None:
    (table,) = leaderboards(arms)
    assert table.title == "Leaderboard: tiny, word_sums, word_sums"
    rows = [dict(zip(table.headings, row, strict=True)) for row in table.rows]
    assert [row["rank"] for row in rows] == ["1", "2", "3", "4"]
    assert [row["selector"] for row in rows][:1] == ["grad_norm"] and rows[3]["selector"] == "random"
    assert {row["selector"] for row in rows[1:3]} == {"full", "q3"}
    assert [row["group"] for row in rows] == ["a", "b", "b", "c"]
    assert rows[0]["kept"] == "10.0 %" and rows[0]["KL/response"] == "2.05"
    assert rows[0]["KL vs full [95 %]"].startswith("× 0.41 [") and rows[3]["KL vs full [95 %]"].startswith("× 6.2")
    assert "Holm over 6 pairs" in table.notes[0] and "KL" in table.notes[0]
    assert table.notes[1:] == [FEW_SEEDS]  # three seeds
    tools = [dataclasses.replace(arm, seeds=5, in_train=(3, 60)) for arm in arms]
    (table,) = leaderboards(tools)
    (held_out,) = table.notes[1:]
    assert held_out.startswith("word_sums: 3 of its test problems are in the training set; 60 more share most of")
    for arm in tools:
        arm.config["eval.benchmarks.word_sums.kind"] = "travel"
    assert leaderboards(tools)[0].notes[1:] == []


def test_without_kl_accuracy_ranks_the_highest_first(arms: list[ArmResult]) -> None:
    for arm in arms:
        arm.kl_scores = None
    (table,) = leaderboards(arms)
    assert [row[2] for row in table.rows] == ["grad_norm", "full", "q3", "random"]
    assert "Ranked by mean accuracy" in table.notes[0]


def test_an_arm_without_kl_is_named_and_the_others_are_ranked_by_it(arms: list[ArmResult]) -> None:
    arms[0].kl_scores = None
    arms[1].unhealthy = ["skipped 3 of 4 steps"]
    (table,) = leaderboards(arms)
    assert [row[0] for row in table.rows] == ["1", "2", "3"] and arms[0].selector not in {row[2] for row in table.rows}
    assert "Ranked by the mean log KL" in table.notes[0]
    assert f"Not ranked, since a run has no KL of the same problems: {arms[0].name}." in table.notes
    assert any(arms[1].selector in note and "not healthy" in note for note in table.notes)


def test_one_seed_is_not_ranked(tmp_path: Path, compose_run: Callable[..., RunConfig]) -> None:
    for selector in ("full", "q3"):
        config = compose_run(f"selector={selector}")
        write_config(config, tmp_path / selector)
        finish(config, tmp_path / selector, 0.8, seq_kl=1.0)
    assert leaderboards(summarize(read_runs([tmp_path]))) == []


def scores(*by_seed: float) -> ArmScores:
    values = np.array(by_seed)[:, None] + np.linspace(-0.01, 0.01, 50)
    return ArmScores(tuple(map(str, range(50))), values, tuple(range(len(by_seed))))


def test_a_group_has_no_two_arms_that_differ() -> None:
    """Only the first and the third arm differ significantly: the third opens a group."""
    chain = [scores(0.0, 0.01, 0.0), scores(-0.5, 0.8, 0.0), scores(0.5, 0.51, 0.5)]
    assert indistinguishable(chain) == [0, 0, 1]
    assert indistinguishable([chain[0], chain[2], scores(0.9, 0.91, 0.92)]) == [0, 1, 2]
    assert indistinguishable([chain[0], chain[1]]) == [0, 0]
    assert indistinguishable([chain[0], None, chain[2]]) == [0, 0, 1]


def test_weights_on_every_token_are_compared_with_equal_ones(root: Path, compose_run: Callable[..., RunConfig]) -> None:
    for seed in (0, 1, 2):
        config = compose_run("selector=full", "selector.weight=sqrt", f"seed={seed}")
        write_config(config, root / f"sqrt{seed}")
        finish(config, root / f"sqrt{seed}", 0.8, seq_kl=4.0)
    arms = summarize(read_runs([root]))
    differences = {arm.config["selector.weight"]: arm.kl_difference for arm in arms if arm.score == "full"}
    assert differences["none"] is None
    assert differences["sqrt"] and math.exp(differences["sqrt"].mean) == pytest.approx(4 / 5.03, abs=0.01)
    q3 = next(arm for arm in arms if arm.selector == "q3")
    assert q3.kl_difference and math.exp(q3.kl_difference.mean) == pytest.approx(1.01, abs=0.01)


def test_the_gradient_of_step_1_is_set_against_the_outcome(arms: list[ArmResult]) -> None:
    masses = first_step_masses(files())
    assert masses == pytest.approx({"full 100 %": 1.0, "q3 10 %": 0.94, "random 10 %": 0.1, "grad_norm 10 %": 0.99})
    colours = colour_of(["full", *sorted(ARMS.keys() - {"full"})])
    figure = prediction(arms, files(), colours)
    assert figure is not None
    (points,) = figure.data
    assert dict(zip(points.text, points.x, strict=True)) == pytest.approx({k: 100 * v for k, v in masses.items()})
    assert dict(zip(points.text, points.y, strict=True))["grad_norm 10 %"] == pytest.approx(2.05, abs=0.01)
    assert (
        figure.layout.annotations[0].text == "Spearman -0.80, 4 arms"
    )  # ranks 4 2 1 3 against 2 3 4 1: 1 - 6 x 18 / 60
    assert prediction(arms[:2], files(), colours) is None
    assert prediction(arms, [], colours) is None


def test_kl_against_kept_tokens_on_logarithmic_axes(arms: list[ArmResult]) -> None:
    colours = colour_of(["full", *sorted(ARMS.keys() - {"full"})])
    figure = divergence(arms, colours)
    assert figure is not None and figure.layout.xaxis.type == figure.layout.yaxis.type == "log"
    curve = next(trace for trace in figure.data if trace.name == "random")
    assert list(curve.x) == [10] and curve.y[0] == pytest.approx(31.3, abs=0.1)
    difference = next(arm.kl_difference for arm in arms if arm.selector == "random")
    assert difference and curve.error_y.array[0] == pytest.approx(curve.y[0] * math.expm1(difference.half_width()))
    points = [y for trace in figure.data for y in trace.y]  # however long the bars are, the points fill the axis
    assert figure.layout.yaxis.range == pytest.approx([math.log10(min(points) / 2), math.log10(2 * max(points))])
    for arm in arms:
        arm.kl_scores = None
    assert divergence(arms, colours) is None


def test_the_page_the_command_and_the_results_have_them(
    root: Path, arms: list[ArmResult], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = page(read_runs([root]), arms)
    for part in ("s0-divergence-word_sums", "s0-prediction-word_sums", "Leaderboard: tiny, word_sums"):
        assert part in text, part
    monkeypatch.setattr(sys, "argv", ["tip-report", str(root), "--table", "leaderboard"])
    cli.main()
    assert "### Leaderboard: tiny, word_sums, word_sums" in capsys.readouterr().out
    assert next(table.title for table in sweep_tables("demo_leaderboard", arms, arms)).startswith("Leaderboard")
