"""Dealing: every rank knows every share, and together the shares are the step of one process."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tests.helpers import sample_rollouts

from tip_exp.learner.data_parallel import DataParallelSampler, StepTokens, deal, share_batches
from tip_exp.learner.distributed import ALONE, Ranks
from tip_exp.models.pair import Pair
from tip_exp.rollout.hf import HfSampler
from tip_exp.types import Part, PartSampler, Rollout, Sampling


def rank_of(size: int, rank: int) -> Ranks:
    ranks = Ranks(alone=True)
    ranks.size, ranks.rank = size, rank
    return ranks


def rollouts_of(*lengths: int) -> list[Rollout]:
    """One prompt token each; the response is the rest."""
    return [
        Rollout([7] + [i] * (n - 1), [False] + [True] * (n - 1), "stop", [-1.0] * (n - 1))
        for i, n in enumerate(lengths)
    ]


def test_the_longest_go_first_to_the_rank_with_the_fewest_tokens() -> None:
    # 9 -> rank 0; 7 -> rank 1; 5 -> rank 1 (7 < 9); 4 -> rank 0 (9 < 12); 2 -> rank 1 (12 < 13)
    assert deal([5, 9, 4, 7, 2], 2) == [[1, 2], [0, 3, 4]]
    assert deal([3, 3], 3) == [[0], [1], []]
    assert deal([4, 6, 5], 1) == [[0, 1, 2]]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("computed", [12, 9])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_shares_make_the_step_of_one_process(size: int, computed: int, packing: bool) -> None:
    """In its order too where micro-batches are smaller than those that number the tokens; packed, they reorder them."""
    rollouts = rollouts_of(5, 9, 4, 7)
    alone = share_batches(rollouts, ALONE, 12, 0, packing=packing)
    expected = StepTokens.of(rollouts, ALONE, 12, packing=packing)
    for name in ("rollout", "position"):
        assert getattr(expected.tokens, name).equal(torch.cat([getattr(batch, name) for batch in alone]))
    labels = [torch.full_like(batch.rollout, i) for i, batch in enumerate(alone)]
    assert expected.tokens.micro_batch.equal(torch.cat(labels))
    gathered, num_batches = [], set()
    for rank in range(size):
        ranks = rank_of(size, rank)
        batches = share_batches(rollouts, ranks, computed, 0, packing=packing)
        num_batches.add(len(batches))
        share = StepTokens.of(rollouts, ranks, 12, packing=packing, computed=computed)
        for name in ("rollout", "micro_batch", "position"):
            assert getattr(share.tokens, name).equal(getattr(expected.tokens, name))
        for name in ("rollout", "position"):  # this rank's rows are its micro-batches' tokens
            local = torch.cat([getattr(batch, name) for batch in batches])
            assert getattr(share.tokens, name)[share.rows].equal(local)
        gathered.append(torch.cat([batch.rollout * 100 + batch.position for batch in batches]))
        assert all(batch.num_positions >= 1 for batch in batches), "an empty micro-batch has a forward pass"
    assert len(num_batches) == 1, "every rank makes as many passes"
    in_order = share.in_order(torch.cat(gathered))
    assert in_order.equal(expected.tokens.rollout * 100 + expected.tokens.position)


def test_an_empty_micro_batch_has_zero_gradients(tiny_pair: Pair) -> None:
    for packing in (False, True):
        batch = share_batches(rollouts_of(5), rank_of(2, 1), 12, 0, packing=packing)[0]
        hidden = tiny_pair.student.hidden(batch)
        assert batch.num_tokens == 0 and hidden.shape == (0, 64)
        hidden.backward(torch.zeros_like(hidden))
        layers = tiny_pair.student.module.base_model.layers  # pyright: ignore[reportAttributeAccessIssue]
        assert all(p.grad is not None and not p.grad.any() for p in layers.parameters())


def test_privileged_prompts_are_dealt_like_the_students(tiny_pair: Pair) -> None:
    rollouts, longer = rollouts_of(5, 9, 4), rollouts_of(30, 9, 40)
    for rank in range(2):
        shares = [
            {
                int(i)
                for batch in share_batches(r, rank_of(2, rank), 50, 0, packing=True, dealt_by=by)
                for i in batch.rollout
            }
            for r, by in ((rollouts, None), (longer, rollouts))
        ]
        assert shares[0] == shares[1]


@pytest.mark.parametrize("batch_size", [256, 4])
def test_any_number_of_ranks_samples_the_same(tiny_pair: Pair, batch_size: int) -> None:
    """Five prompts with two samples each: batches of four that ranks share, and ranks without a prompt among seven."""
    prompts = [rollout.token_ids[:30] for rollout in sample_rollouts(tiny_pair)[:5]]
    stop_ids, pad_id = tiny_pair.stop_ids, tiny_pair.pad_id
    sampler = HfSampler(tiny_pair.student.module, stop_ids=stop_ids, pad_id=pad_id, batch_size=batch_size)
    sampling = Sampling(2, 1.0, 1.0, 0, 20)
    expected = sampler.generate(prompts, sampling, 3)
    assert len({tuple(rollout.response_ids) for rollout in expected}) > 5
    assert DataParallelSampler(sampler, ALONE, tiny_pair.student.gathered).generate(prompts, sampling, 3) == expected
    for size in (2, 3, 7):
        rollouts = gathered_from(size, sampler, prompts, sampling)
        assert [r.token_ids for r in rollouts] == [r.token_ids for r in expected]


def gathered_from(
    size: int, sampler: PartSampler, prompts: list[list[int]], sampling: Sampling, indices: list[int] | None = None
) -> list[Rollout]:
    """What `size` ranks generate together: each in turn generates its part, and the last gathers all parts."""
    parts: list[Any] = []

    def gather(part: Any) -> list[Any]:
        parts.append(part)
        return parts if len(parts) == size else [[None] * 99] * size

    rollouts: list[Rollout] = []
    for rank in range(size):
        ranks = rank_of(size, rank)
        ranks.gather_objects = gather
        rollouts = DataParallelSampler(sampler, ranks, nullcontext).generate(prompts, sampling, 3, indices)
    return rollouts


class Echo:
    """Answers each prompt with its index, its limit, its position in the batch and the batch's size."""

    def __init__(self) -> None:
        self.calls: list[Sequence[int]] = []

    def generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        seed: int,
        indices: Sequence[int] | None = None,
        part: Part | None = None,
    ) -> list[Rollout]:
        assert indices is not None and part is not None and sampling.limits is not None
        self.calls.append(indices)
        rows = zip(prompts, indices, sampling.limits, part.positions, strict=True)
        return [Rollout([p[0], *row, part.total], [False] + [True] * 4, "stop", []) for p, *row in rows]

    def rest(self) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


def test_a_turn_stays_on_the_rank_of_its_episode() -> None:
    """Episodes 1, 4 and 5 are still running: of two ranks, rank 0 has the turn of 4 alone."""
    sampling, echo = Sampling(1, 1.0, 1.0, 0, 30, limits=(10, 20, 30)), Echo()
    rollouts = gathered_from(2, echo, [[7], [8], [9]], sampling, [1, 4, 5])
    assert echo.calls == [[4], [1, 5]]
    assert [rollout.token_ids for rollout in rollouts] == [[7, 1, 10, 0, 3], [8, 4, 20, 1, 3], [9, 5, 30, 2, 3]]
