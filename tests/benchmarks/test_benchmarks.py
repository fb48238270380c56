"""`tip-bench`: its tables have the columns promised, implementations agree, and a missing peer is told, not fatal."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import e2e, loss, measuring, plotting, step, tiny
from benchmarks.__main__ import COMMANDS, main
from benchmarks.implementations import IMPLEMENTATIONS, NEEDS, exact, keep, make_case, relative_error

OURS = [name for name in IMPLEMENTATIONS if name not in NEEDS]
SMALL = ["--rounds", "2", "--hidden", "16", "--teacher-hidden", "16", "--tile-mib", "1"]


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert set(COMMANDS) == {
        "loss",
        "step",
        "e2e",
        "rollout",
    }


@pytest.mark.parametrize("retention", [1.0, 0.3])
@pytest.mark.parametrize("name", [name for name in IMPLEMENTATIONS if name != "floor"])
def test_every_implementation_gives_the_float64_gradient(name: str, retention: float) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    case = replace(make_case(20, 150, 8, 8, 10_000), kept=keep(20, retention))
    truth = exact(case, rows_at_once=7)
    case.weight.grad = None
    assert relative_error(IMPLEMENTATIONS[name](case), truth) < 2e-6
    assert int(case.kept.sum()) == (20 if retention == 1 else 6)


def test_the_error_of_a_wrong_gradient_is_seen() -> None:
    case = make_case(4, 10, 3, 3, 1000)
    truth = exact(case)
    wrong = replace(truth, weight=truth.weight * 1.01)
    assert relative_error(wrong, truth) == pytest.approx(0.01)


def test_one_row_a_run_and_other_sizes_stay(tmp_path: Path) -> None:
    out = tmp_path / "bench" / "loss.csv"
    common = ["loss", "--vocab", "200", *SMALL, "--out", str(out), "--implementations", "fused", "floor"]
    main([*common, "--tokens", "24", "--retention", "1", "0.25"])
    rows = table(out)
    assert tuple(rows[0]) == loss.COLUMNS
    assert len(rows) == 2 * 2 * 2  # implementations x retentions x rounds
    for row in rows:
        assert float(row["cpu_s"]) >= 0 and float(row["wall_s"]) > 0 and float(row["peak_extra_mib"]) >= 0
        assert (row["grad_rel_err"] == "") == (row["implementation"] == "floor")  # products alone: no gradient
        assert row["grad_rel_err"] == "" or float(row["grad_rel_err"]) < 2e-6
    main([*common, "--tokens", "12", "--retention", "1"])
    assert [row["tokens"] for row in table(out)] == ["24"] * 8 + ["12"] * 4


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--vocab", "9"], "belong together"),
        (["--vocab", "9", "--tokens", "9", "--retention", "1.5"], "--retention 1.5"),
        (["--implementations", "liger"], "liger_kernel is not installed; pip install 'tip_exp[bench]'"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    arguments: list[str], told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(measuring, "missing", list)  # as where no peer is installed
    with pytest.raises(SystemExit, match=told.replace("[", r"\[")):
        main(["loss", *arguments, "--out", str(tmp_path / "loss.csv")])


def test_without_peers_ours_are_measured_and_the_rest_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measuring, "missing", list)
    (point,) = (loss.available(point, None) for point in loss.QUICK)
    assert set(point.at[1.0]) == set(OURS)
    assert "not installed: liger_kernel, trl (pip install 'tip_exp[bench]')" in capsys.readouterr().err


def test_memory_of_a_piece_of_work_is_what_it_held_at_once() -> None:
    def work() -> int:
        for _ in range(3):
            torch.ones(8 << 20)  # 32 MiB, thrice, one after the other
        return 1

    cost, result = measuring.cost_of(work)
    assert result == 1 and 30 < cost.peak_extra_mib < 40
    assert cost.wall_s > 0


def test_a_step_of_the_embedded_pair() -> None:
    rows = step.measure("tiny", 3, 2, (("fused", 1.0), ("materialized", 0.2)), 2, 1)
    assert [(row["implementation"], row["retention"]) for row in rows] == [("fused", 1.0), ("materialized", 0.2)] * 2
    assert all(tuple(row) == step.COLUMNS for row in rows)


def test_the_random_pair_has_as_many_tokens_as_asked() -> None:
    assert sum(rollout.num_response_tokens for rollout in step.random_rollouts(64)) == 64


def test_a_training_of_the_embedded_pair_moves_it() -> None:
    pair = tiny.load()
    before = pair.student.head.weight.detach().clone()
    e2e.train(pair, tiny.learner_settings(num_steps=2, prompts_per_step=4), tiny.prompts(8, 0), 0.2, seed=0)
    assert not pair.student.head.weight.equal(before)
    found = tiny.accuracy(pair, num_problems=4, samples=2)
    assert 0 <= found.greedy <= 1 and 0 <= found.sampled <= 1


def test_both_trainers_get_the_same_prompts_and_learning_rates() -> None:
    pytest.importorskip("trl")
    pair, prompts = tiny.load(), tiny.prompts(8, 0)
    settings = tiny.learner_settings(num_steps=2, prompts_per_step=4)
    trainer = e2e.trl_trainer(pair, settings, prompts, seed=0)
    rendered = [row["prompt"] for row in trainer.train_dataset]
    assert [pair.tokenizer(text)["input_ids"] for text in rendered] == [pair.prompt_ids(one) for one in prompts]
    # Warm-up is linear over 5 steps: the first has a fifth of the rate.
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(settings.lr / 5)


def test_a_plot_beside_the_table(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        dict(zip(loss.COLUMNS, ("fused", n, 100, retention, 1.5, 0.1, 0.2, 1e-7), strict=True))
        for n in (8, 16)
        for retention in (1.0, 0.2)
    ]
    measuring.write_csv(rows, loss.COLUMNS, tmp_path / "loss.csv")
    drawn = plotting.loss(tmp_path / "loss.csv")
    assert drawn == tmp_path / "loss.svg" and drawn.read_text().startswith("<?xml")
