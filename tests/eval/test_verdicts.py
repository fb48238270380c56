"""Verdicts of shown training rollouts: what the grader of the training data says, and none where it says nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest

from tip_exp.config.schema import RunConfig
from tip_exp.envs.episodes import Episode, truncate_rollout
from tip_exp.envs.sampler import EpisodeSampler
from tip_exp.eval import verdicts
from tip_exp.eval.verdicts import grade_rollouts
from tip_exp.grading import Verdict, boxed
from tip_exp.types import Problem, Rollout, Sampler

Compose = Callable[..., RunConfig]
NO_SAMPLER = cast(Sampler, None)  # only tool tasks ask it


def rollout(number: int, length: int = 1) -> Rollout:
    return Rollout([0, *[number] * length], [False, *[True] * length], "stop", [])


def grade(config: Any, texts: list[str], answers: list[str]) -> dict[str, list[Any]]:
    shown = [(rollout(i), Problem(f"p{i}", "", answer)) for i, answer in enumerate(answers)]
    return grade_rollouts(config, shown, NO_SAMPLER, lambda ids: texts[ids[0]])


def test_word_sums_are_graded_as_integers_in_a_box(tiny_config: RunConfig) -> None:
    texts, answers = [r"So \boxed{7}.", r"So \boxed{07}.", r"So \boxed{8}.", "So 7."], ["7"] * 4
    graded = grade(tiny_config.data.train, texts, answers)
    assert graded == {"right": [True, True, False, False], "extracted": ["7", "07", "8", None]}
    assert graded["right"] == [boxed.grade(*pair).right for pair in zip(texts, answers, strict=True)]


@pytest.mark.parametrize(("grader", "half_is_right"), [("math", True), ("strict", False), ("boxed_integer", None)])
def test_a_table_is_graded_by_its_own_grader(compose_run: Compose, grader: str, half_is_right: bool | None) -> None:
    table = compose_run("data=gsm8k", f"data.train.grader={grader}").data.train
    texts = [r"\boxed{\frac{2}{4}}", r"\boxed{3}", r"\boxed{3}"]
    graded = grade(table, texts, ["1/2", "3", ""])
    # an integer cannot be compared with 1/2; the last problem has no answer
    assert graded["right"] == [half_is_right, True, None] and graded["extracted"][1:] == ["3", "3"]


def test_a_comparison_without_a_result_is_no_verdict(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boxed, "grade", lambda text, answer: Verdict(False, "9^9", "timeout"))
    assert grade(tiny_config.data.train, ["x"], ["7"]) == {"right": [None], "extracted": ["9^9"]}


def test_a_grader_that_fails_ends_no_run(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(name: str, workers: int) -> None:
        raise RuntimeError("a grading worker did not start within 120 s")

    monkeypatch.setattr(verdicts, "open_grader", fail)
    assert grade(tiny_config.data.train, ["x"], ["7"]) == {}
    assert "the shown rollouts have no verdicts: a grading worker did not start" in capsys.readouterr().out


def test_tool_tasks_have_the_scores_of_their_own_episodes(compose_run: Compose) -> None:
    played = EpisodeSampler.__new__(EpisodeSampler)
    episode = Episode(rollout(1, 5), "", 1, 0, 0, 0, "final", {"main": 0.25, "other": 1.0})
    played.last = [episode, replace(episode, rollout=rollout(2, 5), score={"main": 1.0})]
    shown = [(truncate_rollout(rollout(1, 5), 3), Problem("a", "", "")), (rollout(3, 5), Problem("b", "", ""))]
    config = compose_run("data=mini_travel", "eval=mini_travel", "agent=default").data.train
    graded = grade_rollouts(config, shown, played, lambda ids: "")
    assert graded == {"right": [0.25, None]}  # the second rollout is of an episode before
    played.last = []
    assert grade_rollouts(config, shown, played, lambda ids: "") == {"right": [None, None]}
