"""A step of a pair whose stop tokens count as one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.helpers import make_learner, train_step
from torch import Tensor

from tip_exp.config.schema import RunConfig
from tip_exp.models.pair import Model, Pair
from tip_exp.records.metrics import MISMATCH_MAX
from tip_exp.types import Rollout


def with_class(pair: Pair, ids: tuple[int, ...]) -> Pair:
    def changed(model: Model) -> Model:
        return replace(model, loaded_head=replace(model.loaded_head, stop_class=ids))

    return replace(pair, student=changed(pair.student), teacher=changed(pair.teacher), stop_class=ids)


def test_a_response_is_scored_by_the_probability_of_ending(tiny_pair: Pair, tiny_config: RunConfig) -> None:
    """Ids 0 and 2 stop; the log-prob of the sampled 2 is that of both, and is not compared with the sampler's."""
    response = [70, 60, 2]
    rollout = Rollout([1, 50, *response], [False, False, True, True, True], "stop", [-9.0, -9.0, 0.0])

    def logprobs(model: Model) -> Tensor:
        with torch.no_grad():
            return model.module(torch.tensor([rollout.token_ids])).logits[0, 1:4].double().log_softmax(-1)

    student, teacher = logprobs(tiny_pair.student), logprobs(tiny_pair.teacher)
    learner = make_learner(with_class(tiny_pair, (0, 2)), tiny_config.learner, "full", diagnostics_every=1)
    report = train_step(learner, [rollout])
    for name, logp in (("student_logprob", student), ("teacher_logprob", teacher)):
        expected = torch.stack([logp[0, 70], logp[1, 60], logp[2, [0, 2]].logsumexp(0)])
        torch.testing.assert_close(report.statistics[name].double(), expected, rtol=1e-5, atol=1e-5)
    compared = [abs(-9 - float(student[0, 70])), abs(-9 - float(student[1, 60]))]
    assert report.metrics[MISMATCH_MAX] == pytest.approx(max(compared), abs=1e-4)
