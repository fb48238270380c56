"""How the ranks share a step: prompts by index among the samplers, rollouts by length among the learners.

Every rank has all rollouts, so that each knows, without asking, which tokens the others measure.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from tip_exp.learner.distributed import Ranks
from tip_exp.models.micro_batch import MicroBatch, collate, empty_micro_batch, group
from tip_exp.selector.selector import Tokens
from tip_exp.types import IndexedSampler, Rollout, Sampling


def deal(lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Indices for each rank, ascending: the longest goes first, to the rank with the fewest tokens so far."""
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    totals = [(0, rank) for rank in range(num_ranks)]
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        total, rank = heapq.heappop(totals)
        shares[rank].append(index)
        heapq.heappush(totals, (total + lengths[index], rank))
    return [sorted(share) for share in shares]


def share_batches(
    rollouts: list[Rollout],
    ranks: Ranks,
    budget: int,
    pad_id: int,
    *,
    packing: bool,
    dealt_by: list[Rollout] | None = None,
) -> list[MicroBatch]:
    """This rank's micro-batches of a step; rollouts keep their numbers in the step.

    All ranks get the same number of micro-batches, the last ones empty, because a sharded model's forward and backward
    passes are collective. `dealt_by`: deal by the lengths of these, the same rollouts with other prompts.
    """
    lengths = [len(rollout.token_ids) for rollout in rollouts]
    shares = deal([len(rollout.token_ids) for rollout in dealt_by or rollouts], ranks.size)
    groups = [group(lengths, budget, packing=packing, indices=share) for share in shares]
    batches = [collate(rollouts, indices, pad_id, packing=packing) for indices in groups[ranks.rank]]
    missing = max(map(len, groups)) - len(batches)
    return batches + [empty_micro_batch(pad_id, packing=packing) for _ in range(missing)]


@dataclass(frozen=True, slots=True)
class StepTokens:
    """The response tokens of a step as one process orders and numbers them, and which of them this rank measures."""

    tokens: Tokens
    rows: slice | Tensor  # of this rank's tokens, in the order of its micro-batches
    counts: list[int]  # tokens of each rank
    _order: Tensor | None  # rows of the tokens of all ranks, concatenated in rank order; None for one rank

    @classmethod
    def of(
        cls, rollouts: list[Rollout], ranks: Ranks, budget: int, device: torch.device, *, packing: bool
    ) -> StepTokens:
        lengths = [len(rollout.token_ids) for rollout in rollouts]
        counts = [rollout.num_response_tokens for rollout in rollouts]
        batches = group(lengths, budget, packing=packing, indices=range(len(rollouts)))
        order = [index for batch in batches for index in batch]
        labels = [label for label, batch in enumerate(batches) for _ in batch]
        repeats = torch.tensor([counts[index] for index in order])
        tokens = Tokens(
            rollout=torch.tensor(order).repeat_interleave(repeats).to(device),
            micro_batch=torch.tensor(labels).repeat_interleave(repeats).to(device),
            position=torch.cat([torch.arange(counts[index]) for index in order]).to(device),
        )
        if ranks.size == 1:
            return cls(tokens, slice(None), [len(tokens)], None)
        starts = dict(zip(order, (repeats.cumsum(0) - repeats).tolist(), strict=True))
        rows = []
        for share in deal(lengths, ranks.size):
            indices = [index for batch in group(lengths, budget, packing=packing, indices=share) for index in batch]
            parts = [torch.arange(starts[index], starts[index] + counts[index]) for index in indices]
            rows.append(torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long))
        return cls(tokens, rows[ranks.rank].to(device), list(map(len, rows)), torch.cat(rows).to(device))

    def in_order(self, gathered: Tensor) -> Tensor:
        """Values of all ranks' tokens, concatenated in rank order, in the order of `tokens`."""
        return gathered if self._order is None else torch.empty_like(gathered).index_copy_(0, self._order, gathered)


class SharedSampler:
    """Deals prompts to the ranks' samplers; every rank gets all rollouts, in the order of one process.

    By index, except that the next turns of episodes stay with the ranks that sampled the turns before and cache them.
    """

    def __init__(
        self, sampler: IndexedSampler, ranks: Ranks, gathered: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """`gathered`: a context in which `sampler` has whole weights; every rank enters it."""
        self.sampler, self.ranks, self.gathered = sampler, ranks, gathered
        self._last: list[tuple[list[int], int]] = []  # the newest rollouts' ids and ranks

    def generate(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[Rollout]:
        size, samples = self.ranks.size, sampling.samples
        dealt = continued(prompts, self._last) or [i % size for i in range(len(prompts))]
        indices = [i for i, rank in enumerate(dealt) if rank == self.ranks.rank]
        with self.gathered():
            share = [prompts[i] for i in indices]
            rollouts = self.sampler.generate(share, sampling, seed, indices, len(prompts)) if share else []
        by_rank = [iter(of_rank) for of_rank in self.ranks.gather_objects(rollouts)]
        rollouts = [next(by_rank[rank]) for rank in dealt for _ in range(samples)]
        self._last = [(rollouts[i * samples].token_ids, rank) for i, rank in enumerate(dealt)] if samples == 1 else []
        return rollouts

    def sync(self) -> None:
        self._last = []
        self.sampler.sync()

    def close(self) -> None:
        self.sampler.close()


def continued(prompts: list[list[int]], last: list[tuple[list[int], int]]) -> list[int] | None:
    """The rank of each prompt if all prompts go on from rollouts of `last`, some of which may have ended; else None."""
    ranks: list[int] = []
    rest = iter(last)
    for prompt in prompts:
        rank = next((rank for ids, rank in rest if prompt[: len(ids)] == ids), None)
        if rank is None:
            return None
        ranks.append(rank)
    return ranks
