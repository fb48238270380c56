"""result.json: first and last evaluation, totals and peaks, and the final scores by problem."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.synthetic_runs import append_rows

from tip_exp.config.schema import RunConfig
from tip_exp.records.folder import RunFolder
from tip_exp.records.metrics import weak_teachers
from tip_exp.records.result import (
    describe_hardware,
    final_outcomes,
    git_revision,
    health,
    model_card,
    totals,
    write_result,
)


def eval_row(step: int, problem: str, right: float, **changes: Any) -> dict[str, Any]:
    row = {"step": step, "model": "student", "benchmark": "word_sums", "protocol": "sampled", "problem_id": problem}
    return row | {"right": right, "text": "a\u2028b\x85c"} | changes


def test_outcomes_are_sums_over_the_sampled_responses_of_the_last_evaluation(tmp_path: Path) -> None:
    rows = [eval_row(0, "a", True), eval_row(0, "b", True)]
    rows += [eval_row(0, "t", 0.125, benchmark="tools", protocol="greedy")]
    rows += [eval_row(80, "a", right) for right in (True, False, True)]
    rows += [eval_row(80, "b", False)] * 3
    rows += [eval_row(80, "a", False, protocol="greedy"), eval_row(80, "a", True, model="teacher")]
    rows += [eval_row(80, "t", score, benchmark="tools", protocol="greedy") for score in (0.25, 0.5)]
    append_rows(tmp_path / "eval.jsonl", rows)
    assert final_outcomes(tmp_path / "eval.jsonl") == {
        "word_sums": {"samples": 3, "right": {"a": 2, "b": 0}, "start": {"a": 1, "b": 1}, "greedy": {"a": False}},
        "tools": {"samples": 2, "right": {"t": 0.75}, "start": {"t": 0.125}},
    }


def test_outcomes_keep_the_mean_log_kl_of_a_problems_sampled_responses(tmp_path: Path) -> None:
    rows = [eval_row(80, "a", True, seq_kl=kl) for kl in (0.999, 0.0)] + [eval_row(80, "b", True, seq_kl=1.999)] * 2
    rows += [eval_row(80, "a", False, protocol="greedy"), eval_row(80, "a", True, model="teacher")]
    append_rows(tmp_path / "eval.jsonl", rows)
    outcomes = final_outcomes(tmp_path / "eval.jsonl")["word_sums"]
    assert outcomes["seq_kl"] == pytest.approx({"a": (math.log(1) + math.log(0.001)) / 2, "b": math.log(2)})
    append_rows(tmp_path / "eval.jsonl", [eval_row(80, "c", True), eval_row(80, "c", True)])  # not measured here
    assert "seq_kl" not in final_outcomes(tmp_path / "eval.jsonl")["word_sums"]


def test_a_teacher_that_is_no_better_than_the_student_is_named() -> None:
    of_step = {"eval/a/mean@4": 0.5, "eval/a/mean@4_se": 0.1, "eval/b/greedy": 0.5, "eval/b/greedy_se": 0.1}
    of_step |= {"eval/a/seq_kl": 9.0, "eval/a/seq_kl_se": 1.0}
    assert weak_teachers(of_step) == []
    assert weak_teachers(of_step | {"teacher/a/mean@4": 0.5, "teacher/b/greedy": 0.6}) == ["a/mean@4"]


def test_totals_have_the_tokens_of_q3_and_the_overlap_with_entropy_of_the_steps_that_measured_them() -> None:
    steps = [{"step": step, "select/response_tokens": 100 * step, "select/kept_tokens": 10} for step in (1, 2, 3)]
    assert totals(steps).keys() == {"steps", "response_tokens", "kept_tokens", "wall_s"}
    for step, share, kept, overlap in ((steps[0], 0.1, 1.0, 0.5), (steps[2], 0.2, 0.25, 1.0)):
        step |= {"quadrant/q3_share": share, "quadrant/q3_kept_frac": kept, "select/overlap_entropy": overlap}
    sums = totals(steps)
    # 10 % of 100 tokens, all kept; 20 % of 300 tokens, a quarter kept
    assert (sums["q3_tokens"], sums["q3_kept_tokens"]) == pytest.approx((10 + 60, 10 + 15))
    assert sums["overlap_entropy"] == 0.75 and sums["response_tokens"] == 600


def test_without_evaluations_there_are_no_outcomes(tmp_path: Path) -> None:
    assert final_outcomes(tmp_path / "eval.jsonl") == {}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path)
    append_rows(
        folder.metrics,
        [
            {"step": 0, "eval/b/greedy": 0.25, "teacher/b/greedy": 0.75, "time/eval_s": 2.0, "memory/x_peak_gib": 3.0},
            {"step": 1, "select/response_tokens": 10, "select/kept_tokens": 4, "time/step_s": 1.0},
            {"step": 2, "select/response_tokens": 20, "select/kept_tokens": 6, "time/step_s": 1.5, "time/eval_s": 0.5}
            | {
                "eval/b/greedy": 0.5,
                "eval/b/truncated_accuracy": 0.1,
                "memory/x_peak_gib": 2.0,
            },  # none truncated before
        ],
    )
    return folder


def test_the_result_has_both_evaluations_totals_and_peaks(folder: RunFolder, tiny_config: RunConfig) -> None:
    result = write_result(tiny_config, folder, {"train": {"rows": 9}}, {"name": "hf"}, "a CPU")
    assert json.loads(folder.result.read_text()) == result
    assert (result["start"], result["teacher"], result["final"]) == (
        {"b/greedy": 0.25}, {"b/greedy": 0.75}, {"b/greedy": 0.5, "b/truncated_accuracy": 0.1},
    )  # fmt: skip
    assert result["totals"] == {"steps": 2, "response_tokens": 30, "kept_tokens": 10, "wall_s": 5.0}
    assert result["memory"] == {"memory/x_peak_gib": 3.0}  # of an earlier process
    assert result["datasets"] == {"train": {"rows": 9}} and result["rollout"] == {"name": "hf"}
    assert [path.name for path in folder.root.iterdir() if path.name.startswith(".")] == []


def test_health_says_what_went_wrong() -> None:
    def rows(*losses: float | None) -> list[dict[str, Any]]:
        steps = [{"step": n, "train/loss": loss, "train/skipped": 0} for n, loss in enumerate(losses, 1)]
        return [{"step": 0}, *steps]

    assert health([{"step": 0}]) == "healthy"
    assert health(rows(1.0, 1.2, 0.9, 1.9, 1.8)) == "healthy"
    rising = [1.0] * 15 + [4.0, 2.0, 3.0, 3.0, 9.0]
    assert health(rows(*rising)) == "loss rose 3.0-fold"  # medians of five steps
    assert health(rows(*rising[1:])) == "healthy"  # too few steps to tell
    skipped, not_finite = {"train/skipped": 1}, {"train/skipped": 1, "train/non_finite": 1}
    assert health([{}, skipped, skipped]) == "skipped 2 of 2 steps (nothing kept)"
    expected = "skipped 1 of 3 steps (not finite); skipped 1 of 3 steps (nothing kept)"
    assert health([*rows(None), skipped, not_finite]) == expected


def test_a_result_is_valid_json_and_has_the_sizes_of_the_rows(folder: RunFolder, tiny_config: RunConfig) -> None:
    append_rows(folder.eval_rows, [eval_row(0, "a", True)])
    result = write_result(tiny_config, folder, {"x": math.nan}, {}, "a CPU")
    read = json.loads(folder.result.read_text(), parse_constant=pytest.fail)
    assert read["datasets"] == {"x": None} and read["health"] == "healthy"
    sizes = {path.name: path.stat().st_size for path in (folder.metrics, folder.eval_rows)}
    assert {name: result["files"][name][0] for name in sizes} == sizes and min(sizes.values()) > 100


def test_the_model_card_has_the_result_and_the_settings(folder: RunFolder, tiny_config: RunConfig) -> None:
    folder.model.mkdir()
    write_result(tiny_config, folder, {}, {}, "a CPU")
    card = folder.card.read_text()
    assert card.startswith("---\nbase_model: package:tiny/student\n")
    assert "10 of 30 response tokens" in card and "| b/greedy | 0.2500 | 0.5000 |" in card and "num_steps: 40" in card
    assert ", a CPU, revision " in card and "truncated_accuracy" not in card, "step 0 has no such number"


def test_a_number_that_was_not_finite_does_not_end_a_finished_run(folder: RunFolder, tiny_config: RunConfig) -> None:
    result = {
        "start": {"b/seq_kl": 1.0},
        "final": {"b/seq_kl": None},
        "digest": "d",
        "hardware": "",
        "git_revision": "",
    }
    card = model_card(tiny_config, result | {"totals": {"steps": 2, "kept_tokens": 1, "response_tokens": 2}})
    assert "after 2 steps" in card and "seq_kl |" not in card


def test_the_hardware_is_what_the_run_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    assert describe_hardware(torch.device("cuda", 0), 8) == "8 x NVIDIA H200"
    assert describe_hardware(torch.device("cpu"), 2).endswith(f", {torch.get_num_threads()} threads")


def test_without_git_there_is_no_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert git_revision() is None
