"""What samples.jsonl holds: every token's numbers, and what both models would have written there."""

from __future__ import annotations

import pytest
import torch

from tip_exp.config.schema import RunConfig
from tip_exp.learner.learner import Learner
from tip_exp.learner.samples import NUM_TOP_TOKENS, measure_top_tokens, sample_rows
from tip_exp.learner.selectors import make_selector
from tip_exp.learner.teacher import Teacher
from tip_exp.models.pair import Pair
from tip_exp.records.meter import Meter
from tip_exp.rollout.hf import HfSampler
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
        positions = [t - 1 for t, is_response in enumerate(rollout.response_mask) if is_response]
        with torch.no_grad():
            naive.append(
                {
                    name: model.module(torch.tensor([rollout.token_ids])).logits[0, positions].softmax(-1)
                    for name, model in (("student", tiny_pair.student), ("teacher", tiny_pair.teacher))
                }
            )
    settings = tiny_config.learner.model_copy(
        update={"micro_batch_tokens": micro_batch_tokens, "lr": 0.1, "warmup_steps": 0}
    )
    learner = Learner(tiny_pair, make_selector(tiny_config), settings, seed=0, meter=Meter(torch.device("cpu")))
    problems = [Problem(id=f"p{i}", prompt=q, answer="0") for i, q in enumerate(questions)]
    teacher, shown = Teacher(tiny_pair, settings, learner.meter), list(zip(rollouts, problems, strict=True))[:2]
    top_tokens = measure_top_tokens(teacher, shown)
    report = learner.step(1, rollouts, teacher.hidden(rollouts))
    rows = list(sample_rows(teacher, shown, report, top_tokens))
    assert [row["problem_id"] for row in rows] == ["p0", "p1"]
    for row, rollout, expected in zip(rows, rollouts, naive, strict=False):
        length = rollout.num_response_tokens
        assert len(row["tokens"]) == len(row["entropy"]) == len(row["student_top"]) == length
        for name, probabilities in expected.items():
            values, ids = probabilities.topk(NUM_TOP_TOKENS)
            for position in range(length):
                shown = row[f"{name}_top"][position]
                assert [p for _, p in shown] == pytest.approx(values[position].tolist(), rel=0.02, abs=1e-5)
                assert shown[0][0] == tiny_pair.decode([int(ids[position, 0])], with_special=True)
