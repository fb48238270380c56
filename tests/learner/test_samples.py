"""What samples.jsonl holds: every token's numbers, and what both models would have written there."""

from __future__ import annotations

import pytest
import torch

from tip_exp.config.schema import RunConfig
from tip_exp.learner.learner import SHOWN_TOKENS, Learner
from tip_exp.learner.samples import sample_rows
from tip_exp.models.pair import Pair
from tip_exp.records.meter import Meter
from tip_exp.rollout.hf import HfSampler
from tip_exp.run import make_selector
from tip_exp.types import Problem, Sampling


@pytest.mark.parametrize("micro_batch_tokens", [16384, 200])  # one micro-batch; one for each rollout or two
def test_rows_hold_both_models_top_tokens_before_the_update(
    tiny_pair: Pair, tiny_config: RunConfig, micro_batch_tokens: int
) -> None:
    questions = [f"Tom has {n} pens. He finds 2. How many pens?" for n in (8, 17, 23)]
    sampler = HfSampler(tiny_pair.student.module, stop_ids=tiny_pair.stop_ids, pad_id=tiny_pair.pad_id, batch_size=8)
    rollouts = sampler.generate([tiny_pair.prompt_ids(q) for q in questions], Sampling(1, 1.0, 1.0, 0, 72), seed=0)
    naive: list[dict[str, torch.Tensor]] = []
    for rollout in rollouts[:2]:
        places = [t - 1 for t, mine in enumerate(rollout.response_mask) if mine]
        with torch.no_grad():
            naive.append(
                {
                    name: model.module(torch.tensor([rollout.token_ids])).logits[0, places].softmax(-1)
                    for name, model in (("student", tiny_pair.student), ("teacher", tiny_pair.teacher))
                }
            )
    settings = tiny_config.learner.model_copy(
        update={"micro_batch_tokens": micro_batch_tokens, "lr": 0.1, "warmup_steps": 0}
    )
    learner = Learner(tiny_pair, make_selector(tiny_config), settings, seed=0, meter=Meter(torch.device("cpu")))
    report = learner.step(rollouts, 1, show=2)
    problems = [Problem(id=f"p{i}", prompt=q, answer="0") for i, q in enumerate(questions)]
    rows = list(sample_rows(tiny_pair, problems, rollouts, report, 2))
    assert len(rows) == 2
    for row, rollout, expected in zip(rows, rollouts, naive, strict=False):
        length = rollout.num_response_tokens
        assert len(row["tokens"]) == len(row["entropy"]) == len(row["student_top"]) == length
        for name, probabilities in expected.items():
            values, ids = probabilities.topk(SHOWN_TOKENS)
            for place in range(length):
                shown = row[f"{name}_top"][place]
                assert [p for _, p in shown] == pytest.approx(values[place].tolist(), rel=0.02, abs=1e-5)
                assert shown[0][0] == tiny_pair.decode([int(ids[place, 0])], with_special=True)
    assert learner.step(rollouts, 2).likeliest == {}
