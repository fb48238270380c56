"""How the ranks share a step: prompts by index among the samplers, rollouts by length among the learners.

Every rank has all rollouts, so that each knows, without asking, which tokens the others measure.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tip_exp.learner.distributed import Ranks
from tip_exp.models.micro_batch import MicroBatch, collate, empty_micro_batch, group
from tip_exp.selector.selector import Tokens
from tip_exp.types import Part, PartSampler, Rollout, Sampling


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
    among: Collection[int] | None = None,
) -> list[MicroBatch]:
    """This rank's micro-batches of a step; rollouts keep their numbers in the step.

    All ranks get the same number of micro-batches, the last ones empty, because a sharded model's forward and backward
    passes are collective. `dealt_by`: the student's rollouts, if `rollouts` have the teacher's prompts: their lengths
    decide the rank, so that both models' tokens of a rollout are on one. `among`: batches of these indices only; each
    stays on the rank that it has in the whole step.
    """
    lengths = [len(rollout.token_ids) for rollout in rollouts]
    shares = deal([len(rollout.token_ids) for rollout in dealt_by or rollouts], ranks.size)
    if among is not None:
        shares = [[index for index in share if index in among] for share in shares]
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
    _order: Tensor | None  # rows of the tokens of all ranks, concatenated in rank order; None: in this order already

    @classmethod
    def of(
        cls, rollouts: list[Rollout], ranks: Ranks, budget: int, *, packing: bool, computed: int | None = None
    ) -> StepTokens:
        """Tokens are ordered and numbered by micro-batches of at most `budget` tokens.

        `computed`: the limit of the passes, which is lower after an error for lack of memory.
        """
        lengths, computed = [len(rollout.token_ids) for rollout in rollouts], computed or budget
        counts = [rollout.num_response_tokens for rollout in rollouts]
        batches = group(lengths, budget, packing=packing, indices=range(len(rollouts)))
        order = [index for batch in batches for index in batch]
        labels = [label for label, batch in enumerate(batches) for _ in batch]
        repeats = torch.tensor([counts[index] for index in order])
        tokens = Tokens(
            rollout=torch.tensor(order).repeat_interleave(repeats),
            micro_batch=torch.tensor(labels).repeat_interleave(repeats),
            position=torch.cat([torch.arange(counts[index]) for index in order]),
        )
        if ranks.size == 1 and computed == budget:
            return cls(tokens, slice(None), [len(tokens)], None)
        starts = dict(zip(order, (repeats.cumsum(0) - repeats).tolist(), strict=True))
        rows = []
        for share in deal(lengths, ranks.size):
            indices = [index for batch in group(lengths, computed, packing=packing, indices=share) for index in batch]
            parts = [torch.arange(starts[index], starts[index] + counts[index]) for index in indices]
            rows.append(torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long))
        return cls(tokens, rows[ranks.rank], list(map(len, rows)), torch.cat(rows))

    def in_order(self, gathered: Tensor) -> Tensor:
        """Values of all ranks' tokens, concatenated in rank order, in the order of `tokens`."""
        if self._order is None:
            return gathered
        return torch.empty_like(gathered).index_copy_(0, self._order.to(gathered.device), gathered)


class DataParallelSampler:
    """Deals prompts to the ranks' samplers by index; every rank gets all rollouts, in the order of one process.

    Turns of an episode have the episode's index, so that they stay on the rank whose sampler has its prefix cached.
    """

    def __init__(
        self, sampler: PartSampler, ranks: Ranks, gathered: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """`gathered`: a context in which `sampler` has whole weights; every rank enters it."""
        self.sampler, self.ranks, self.gathered = sampler, ranks, gathered

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, seed: int, indices: Sequence[int] | None = None
    ) -> list[Rollout]:
        numbers = range(len(prompts)) if indices is None else indices
        dealt = [number % self.ranks.size for number in numbers]
        positions = [i for i, rank in enumerate(dealt) if rank == self.ranks.rank]
        limits = None if sampling.limits is None else tuple(sampling.limits[i] for i in positions)
        part = Part(positions, len(prompts))
        share, indices = [prompts[i] for i in positions], [numbers[i] for i in positions]
        with self.gathered():  # without a prompt too: an engine that wakes may gather weights
            rollouts = self.sampler.generate(share, replace(sampling, limits=limits), seed, indices, part)
        by_rank = [iter(of_rank) for of_rank in self.ranks.gather_objects(rollouts)]
        return [next(by_rank[rank]) for rank in dealt for _ in range(sampling.samples)]

    def rest(self) -> None:
        self.sampler.rest()

    def sync(self) -> None:
        self.sampler.sync()

    def close(self) -> None:
        self.sampler.close()
