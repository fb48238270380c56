"""The benchmarks: columns of their CSVs, agreement of the implementations, and runs without the optional libraries."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import coverage, e2e, loss, measuring, rollout, step, tiny
from benchmarks.__main__ import main
from benchmarks.implementations import (
    IMPLEMENTATIONS,
    NO_GRADIENT,
    REQUIRES,
    exact_gradients,
    make_case,
    random_mask,
    relative_error,
)

OWN = [name for name in IMPLEMENTATIONS if name not in REQUIRES]
SMALL = ["--rounds", "2", "--hidden", "16", "--teacher-hidden", "16", "--tile-mib", "1"]


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def no_optional_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "missing", list)  # every library that is looked for is missing


def test_help_lists_every_benchmark_and_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert all(f"\n    {name} " in text for name in ("loss", "step", "e2e", "rollout", "coverage"))
    for name in ("loss", "step", "e2e", "rollout", "coverage"):
        with pytest.raises(SystemExit):
            main([name, "--help"])
        text = capsys.readouterr().out
        assert "--quick" in text and "--out" in text


@pytest.mark.parametrize(
    ("arguments", "out"),
    [
        ("coverage --quick", "outputs/bench/coverage.md"),
        ("coverage", "results/coverage.md"),
        ("loss --quick", "outputs/bench/loss.csv"),
        ("loss --quick --out results/bench/loss.csv", "results/bench/loss.csv"),
    ],
)
def test_a_quick_one_does_not_replace_published_numbers(
    arguments: str, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    for module in (coverage, loss):
        monkeypatch.setattr(module, "main", lambda options: written.append(options.out))
    main(arguments.split())
    assert written == [Path(out)]


@pytest.mark.parametrize("retention", [1.0, 0.3])
@pytest.mark.parametrize("name", [name for name in OWN if name not in NO_GRADIENT])
def test_own_implementations_give_the_float64_gradient(name: str, retention: float) -> None:
    case = replace(make_case(20, 150, 8, 8, 10_000), kept_mask=random_mask(20, retention))
    exact = exact_gradients(case, rows_per_chunk=7)
    case.student_weight.grad = None
    assert relative_error(IMPLEMENTATIONS[name](case), exact) < 2e-6


def test_random_mask_keeps_the_floor_of_retention_times_tokens_but_one_at_least() -> None:
    assert [int(random_mask(20, retention).sum()) for retention in (1.0, 0.3, 0.29, 0.01)] == [20, 6, 5, 1]


def test_relative_error_of_a_wrong_gradient() -> None:
    exact = exact_gradients(make_case(4, 10, 3, 3, 1000))
    wrong = replace(exact, weight=exact.weight * 1.01)
    assert relative_error(wrong, exact) == pytest.approx(0.01)


def test_loss_writes_one_row_per_repetition_and_keeps_rows_of_other_sizes(tmp_path: Path) -> None:
    out = tmp_path / "bench" / "loss.csv"
    common = ["loss", "--vocab", "200", *SMALL, "--out", str(out), "--implementations", "fused", "floor"]
    main([*common, "--tokens", "24", "--retention", "1", "0.25"])
    rows = read_rows(out)
    assert list(rows[0]) == [
        "implementation",
        "tokens",
        "vocab",
        "retention",
        "peak_extra_mib",
        "cpu_s",
        "wall_s",
        "grad_rel_err",
    ]
    assert len(rows) == 2 * 2 * 2  # implementations x retentions x rounds
    for row in rows:
        assert float(row["cpu_s"]) >= 0 and float(row["wall_s"]) > 0 and float(row["peak_extra_mib"]) >= 0
        assert (row["grad_rel_err"] == "") == (row["implementation"] == "floor")  # GEMMs alone: no gradient
        assert row["grad_rel_err"] == "" or float(row["grad_rel_err"]) < 2e-6
    main([*common, "--tokens", "12", "--retention", "1"])
    assert [row["tokens"] for row in read_rows(out)] == ["24"] * 8 + ["12"] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vocab", "9"], "given together"),
        (["--vocab", "9", "--tokens", "9", "--retention", "1.5"], "--retention 1.5"),
        (["--implementations", "liger"], r"liger_kernel is not installed; pip install 'tip_exp\[bench\]'"),
    ],
)
@pytest.mark.usefixtures("no_optional_libraries")
def test_impossible_requests_end_with_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        main(["loss", *arguments, "--out", str(tmp_path / "loss.csv")])


@pytest.mark.usefixtures("no_optional_libraries")
def test_missing_libraries_are_reported_and_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    point = loss.drop_missing(loss.QUICK[0], requested=None)
    assert set(point.implementations[1.0]) == set(OWN) - {"fused_grad_norm"}
    assert "not installed: liger_kernel, trl (pip install 'tip_exp[bench]')" in capsys.readouterr().err


def test_peak_memory_counts_what_is_held_at_once() -> None:
    def three_allocations() -> int:
        for _ in range(3):
            torch.ones(8 << 20)  # 32 MiB, freed before the next
        return 1

    cost, result = measuring.cost_of(three_allocations)
    assert result == 1 and 30 < cost.peak_extra_mib < 40


def test_step_rows_of_the_embedded_pair() -> None:
    rows = step.measure_pair("tiny", 3, 2, (("fused", 1.0), ("materialized", 0.2)), rounds=2)
    assert [(row["implementation"], row["retention"]) for row in rows] == [("fused", 1.0), ("materialized", 0.2)] * 2
    columns = ["implementation", "pair", "tokens", "vocab", "retention", "peak_extra_mib", "cpu_s", "wall_s"]
    assert all(list(row) == columns for row in rows)
    assert len({row["tokens"] for row in rows}) == 1


def test_random_rollouts_have_the_requested_response_tokens() -> None:
    assert sum(rollout.num_response_tokens for rollout in step.random_rollouts(64)) == 64


def test_training_changes_the_student() -> None:
    pair = tiny.load()
    before = pair.student.head.weight.detach().clone()
    e2e.train(pair, tiny.learner_config(num_steps=2, prompts_per_step=4), tiny.prompts(8, 0), 0.2, seed=0)
    assert not pair.student.head.weight.equal(before)


def test_accuracy_of_the_untrained_student_agrees_with_its_record() -> None:
    """training.json says 0.377 greedy on 512 problems; 64 of them give a standard error of 0.06."""
    accuracy = tiny.accuracy(tiny.load(), num_problems=64, samples=1)
    assert accuracy.greedy == pytest.approx(0.377, abs=0.18)
    assert accuracy.sampled == pytest.approx(0.37, abs=0.18) and 0.05 < accuracy.sampled_se < 0.07


@pytest.mark.usefixtures("no_optional_libraries")
def test_rollout_quick_measures_hf_where_vllm_is_not_installed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rollout.csv"
    main(["rollout", "--quick", "--device", "cpu", "--out", str(out)])
    (row,) = read_rows(out)
    assert list(row) == ["backend", "model", "prompts", "samples", "max_tokens", "tokens_per_s", "startup_s"]
    assert (row["backend"], row["model"], row["prompts"], row["max_tokens"]) == ("hf", "tiny", "8", "16")
    assert float(row["tokens_per_s"]) > 0
    assert "not installed: vllm" in capsys.readouterr().err


def test_questions_share_the_solved_problems_as_prefix() -> None:
    plain, with_shots = rollout.questions(3, shots=0), rollout.questions(3, shots=2)
    prefixes = {long.removesuffix(short) for long, short in zip(with_shots, plain, strict=True)}
    assert len(prefixes) == 1 and prefixes.pop().count("\\boxed{") == 2
