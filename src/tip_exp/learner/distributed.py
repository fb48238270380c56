"""Several processes that share a step: each holds some of its rollouts, together they make one selection and gradient.

With one process every operation is the identity, so there is no second code path.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from tip_exp.models.micro_batch import MicroBatch
from tip_exp.selector.selector import Tokens


class Ranks:
    """The default process group if torch.distributed is initialised, else this process alone."""

    def __init__(self) -> None:
        initialized = dist.is_available() and dist.is_initialized()
        self.size, self.rank = (dist.get_world_size(), dist.get_rank()) if initialized else (1, 0)

    @cached_property
    def background(self) -> dist.ProcessGroup | None:
        """A gloo group for a background thread, as two threads would mix up the collectives of one group."""
        if self.size == 1:
            return None
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup), "all ranks are members"
        return group

    def counts(self, count: int, device: torch.device) -> list[int]:
        """The `count` of each rank, in rank order."""
        if self.size == 1:
            return [count]
        gathered = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(self.size)]
        dist.all_gather(gathered, torch.tensor([count], device=device))
        return [int(tensor) for tensor in gathered]

    def gather(self, rows: Tensor) -> Tensor:
        """Rows of all ranks, concatenated in rank order; the ranks may differ in their number of rows."""
        if self.size == 1:
            return rows
        counts = self.counts(len(rows), rows.device)
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(gathered, padded)
        return torch.cat([tensor[:count] for tensor, count in zip(gathered, counts, strict=True)])

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks; all ranks pass the same shapes in the same order."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)


def response_tokens(batches: list[MicroBatch]) -> Tokens:
    """Rollout, micro-batch and position of every response token of this rank, in the order of the micro-batches."""
    return Tokens(
        rollout=torch.cat([batch.rollout for batch in batches]),
        micro_batch=torch.cat([torch.full_like(batch.rollout, i) for i, batch in enumerate(batches)]),
        position=torch.cat([batch.position for batch in batches]),
    )


def gather_tokens(ranks: Ranks, tokens: Tokens, num_rollouts: int, num_batches: int) -> tuple[Tokens, slice]:
    """Tokens of all ranks, numbered as one process would number them, and the slice of them that is this rank's."""
    first_rollout, first_batch, first_token = (
        sum(ranks.counts(count, tokens.rollout.device)[: ranks.rank])
        for count in (num_rollouts, num_batches, len(tokens))
    )
    gathered = Tokens(
        rollout=ranks.gather(tokens.rollout + first_rollout),
        micro_batch=ranks.gather(tokens.micro_batch + first_batch),
        position=ranks.gather(tokens.position),
    )
    return gathered, slice(first_token, first_token + len(tokens))
