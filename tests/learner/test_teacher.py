"""The teacher's hidden states: one tensor per micro-batch, returned bit for bit, in the learner's order of tokens."""

from __future__ import annotations

import pytest
import torch
from tests.helpers import sample_rollouts

from tip_exp.config.schema import RunConfig
from tip_exp.learner.distributed import ALONE
from tip_exp.learner.teacher import Teacher, TeacherHidden, split
from tip_exp.models.pair import Pair
from tip_exp.records.meter import Meter
from tip_exp.types import Problem, Rollout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_hidden_states_are_returned_bit_for_bit(dtype: torch.dtype) -> None:
    tensors = [torch.randn(n, 8).to(dtype) for n in (3, 0, 5, 700)]
    hidden_states = TeacherHidden(tensors)
    assert len(hidden_states) == 4 and hidden_states[2].equal(tensors[2])
    assert all(a.equal(b) and a.dtype == dtype for a, b in zip(hidden_states, tensors, strict=True))


@pytest.mark.parametrize("budget", [100_000, 300])
def test_each_response_token_has_the_state_that_predicts_it(
    tiny_pair: Pair, tiny_config: RunConfig, budget: int
) -> None:
    config = tiny_config.learner.model_copy(update={"micro_batch_tokens": budget})
    rollouts = sample_rollouts(tiny_pair)
    hidden_states = Teacher(tiny_pair, config, Meter(torch.device("cpu"))).hidden(rollouts)
    backbone = tiny_pair.teacher.module.base_model
    for batch, hidden in zip(split(rollouts, tiny_pair, config, ALONE), hidden_states, strict=True):
        for index in set(batch.rollout.tolist()):
            rollout = rollouts[index]
            predicting = [t - 1 for t, is_response in enumerate(rollout.response_mask) if is_response]
            with torch.no_grad():
                alone = backbone(torch.tensor([rollout.token_ids])).last_hidden_state[0, predicting]
            torch.testing.assert_close(hidden[batch.rollout == index], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("at_once", [100, 3])
def test_the_sequence_kl_is_the_sum_over_the_whole_vocabulary(
    tiny_pair: Pair, tiny_config: RunConfig, at_once: int
) -> None:
    """Against each rollout alone, whole logits; measured three rollouts at a time, in several micro-batches."""
    rollouts = sample_rollouts(tiny_pair)
    problems = [Problem("p", "", "")] * len(rollouts)
    changes = {"micro_batch_tokens": 300, "prompts_per_step": at_once, "samples_per_prompt": 1}
    meter = Meter(torch.device("cpu"))
    teacher = Teacher(tiny_pair, tiny_config.learner.model_copy(update=changes), meter)
    sums = teacher.sequence_kl(rollouts, problems)
    assert not meter.drain_seconds(), "the teacher's seconds are those of training"
    for rollout, measured in zip(rollouts, sums, strict=True):
        positions = [t - 1 for t, is_response in enumerate(rollout.response_mask) if is_response]
        ids = torch.tensor([rollout.token_ids])
        with torch.no_grad():
            logp, logq = (
                model.module(ids).logits[0, positions].double().log_softmax(-1)
                for model in (tiny_pair.student, tiny_pair.teacher)
            )
        assert measured == pytest.approx(float((logp.exp() * (logp - logq)).sum()), rel=1e-4, abs=1e-5)


def test_a_rollout_with_an_id_that_only_one_model_has_is_refused(tiny_pair: Pair, tiny_config: RunConfig) -> None:
    rollout = Rollout([1, 50, tiny_pair.vocab_size], [False, True, True], "stop", [])
    with pytest.raises(ValueError, match="token id 406 is not one of the 406 ids that both models have"):
        split([rollout], tiny_pair, tiny_config.learner, ALONE)
