"""Verdicts on the paper's claims follow from intervals, and rows appear where both sides have runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.synthetic_runs import finish, write_config

from tip_exp.config.schema import RunConfig
from tip_exp.records.reader import read_runs
from tip_exp.report.arms import summarize
from tip_exp.report.claims import CLAIMS, FULL, TINY, Claim, claims, verdict, what_would_change
from tip_exp.report.significance import Estimate
from tip_exp.utils.paths import conf_dir

Compose = Callable[..., RunConfig]
Z90, Z95 = 1.645, 1.960  # normal quantiles of two-sided 90 and 95 % intervals


@pytest.mark.parametrize(
    ("expected", "mean", "se", "outcome"),
    [  # points; the margin of "equal" and "at least" is 2
        ("equal", 0.5, 0.9, "supported"),  # 0.5 + 1.645 x 0.9 = 1.98
        ("equal", 0.5, 0.92, "not resolved"),  # 2.01
        ("equal", -4.0, 1.0, "contradicted"),  # -4 + 1.96 = -2.04
        ("equal", 4.0, 1.0, "contradicted"),
        ("equal", 4.0, 1.1, "not resolved"),
        ("at least", -0.5, 0.9, "supported"),
        ("at least", 9.0, 1.0, "supported"),
        ("at least", -0.5, 0.92, "not resolved"),
        ("at least", -4.0, 1.0, "contradicted"),
        ("at least", -4.0, 1.1, "not resolved"),
        ("higher", 2.0, 1.0, "supported"),
        ("higher", 1.9, 1.0, "not resolved"),
        ("higher", -2.0, 1.0, "contradicted"),
        ("lower", -2.0, 1.0, "supported"),
        ("lower", -1.9, 1.0, "not resolved"),
        ("lower", 2.0, 1.0, "contradicted"),
    ],
)
def test_the_verdict_follows_from_the_interval(expected: Any, mean: float, se: float, outcome: str) -> None:
    claim = Claim("", "", TINY, ("soft_or", 0.5), expected, FULL, "")
    assert verdict(claim, Estimate(mean / 100, se / 100, over_seeds=True)) == outcome
    assert verdict(claim, Estimate(mean / 100, se / 100)) == "one seed: none"


@pytest.mark.parametrize(
    ("expected", "mean", "se", "text"),
    [  # points; the 95 % interval is the mean ± 1.96 se
        ("lower", -1.9, 1.0, "more seeds, or more problems where those decide the interval; another pair"),
        ("lower", -2.3, 1.0, "other seeds: the interval ends 0.3 points from 0; another pair"),  # a quarter: 0.49
        ("lower", -2.5, 1.0, "another pair"),
        ("higher", 2.3, 1.0, "other seeds: the interval ends 0.3 points from 0; another pair"),
        ("higher", -9.0, 1.0, "another pair"),
        ("at least", -4.0, 1.0, "other seeds: the interval ends 0.0 points from -2; another pair"),
        ("at least", 3.0, 1.0, "another pair"),
        ("equal", 4.2, 1.0, "other seeds: the interval ends 0.2 points from 2; another pair"),
        ("equal", 0.0, 0.5, "another pair"),
        # decided by the end of the 90 % interval, at -1.95: the 95 % interval ends below the margin
        ("at least", -0.7, 0.76, "other seeds: the interval ends 0.0 points from -2; another pair"),
    ],
)
def test_what_would_change_a_verdict_follows_from_it(expected: Any, mean: float, se: float, text: str) -> None:
    claim = Claim("", "", TINY, ("soft_or", 0.5), expected, FULL, "another pair")
    assert what_would_change(claim, Estimate(mean / 100, se / 100, over_seeds=True)) == text
    assert what_would_change(claim, Estimate(mean / 100, se / 100)) == "a second seed; another pair"


def test_rows_compare_the_arms_of_one_setting(tmp_path: Path, compose_run: Compose) -> None:
    runs = {"selector=full": 0.8, "selector=q3 selector.retention=0.1": 0.6, "selector=q4": 0.35}
    for overrides, final in runs.items():
        for seed in (0, 1):
            config = compose_run(*overrides.split(), f"seed={seed}")
            folder = tmp_path / config.name
            write_config(config, folder)
            finish(config, folder, final + 0.05 * seed, seq_kl=2.0 if overrides == "selector=full" else 4.0)
    rank = compose_run("selector=q3", "selector.retention=0.1", "selector.normalizer=rank", "name=rank")
    write_config(rank, tmp_path / "rank")
    finish(rank, tmp_path / "rank", 0.9)
    for overrides, final in {"selector=full": 0.5, "selector=q3 selector.retention=0.1": 0.7}.items():
        for seed in (0, 1):
            config = compose_run(
                *overrides.split(), f"seed={seed}", "learner.eps=1", "name=eps.${selector.label}.${seed}"
            )
            write_config(config, tmp_path / config.name)
            finish(config, tmp_path / config.name, final)
    fast = compose_run("selector=q3", "selector.retention=0.1", "learner.lr=1e-2", "name=fast")
    write_config(fast, tmp_path / "fast")
    finish(fast, tmp_path / "fast", 0.9)
    other = compose_run("selector=q3", "selector.retention=0.1", "seed=0", "learner.num_steps=20", "name=other")
    write_config(other, tmp_path / "other")
    finish(other, tmp_path / "other", 0.9)
    table, with_eps_1 = claims(summarize(read_runs([tmp_path])))
    rows = {row[2]: dict(zip(table.headings, row, strict=True)) for row in table.rows}
    assert rows.keys() == {"q3 10 % at least full 100 % (tiny)", "q4 100 % equal to step 0 (tiny)"}
    q3 = rows["q3 10 % at least full 100 % (tiny)"]
    assert q3["difference, points [95 %]"].startswith("-20.0 [") and q3["KL, ratio [95 %]"].startswith("× 2.00 [")
    assert q3["seeds"] == "2" and q3["verdict"] == "contradicted"
    assert q3["what would change it"].endswith("here a few tokens hold the divergence")
    assert rows["q4 100 % equal to step 0 (tiny)"]["difference, points [95 %]"].startswith("+2.5 [")
    assert with_eps_1.title == "AdamW, eps 1, lr 0.002" and [row[3][:5] for row in with_eps_1.rows] == ["+20.0"]


def test_every_claim_is_about_arms_of_a_demo_sweep() -> None:
    demos = sorted((conf_dir().parent / "sweeps").glob("demo*.yaml"))
    designs = [path.with_name(path.name.removeprefix("demo_")) for path in demos]  # which most of them start from
    text = "".join(path.read_text() for path in {*demos, *designs} if path.exists())
    for claim in CLAIMS:
        for selector, retention in filter(None, (claim.arm, claim.baseline)):
            line = f"selector={selector}" + ("" if retention == 1 else f" selector.retention={retention:g}")
            assert f"- {line}\n" in text, line
