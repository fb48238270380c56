"""Several processes that share a step: each holds some of its rollouts, together they make one selection and gradient.

With one process everything here is the identity, so there is no second code path.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """The process group, if torch.distributed was initialised, else this process alone."""

    def __init__(self) -> None:
        several = dist.is_available() and dist.is_initialized()
        self.size, self.rank = (dist.get_world_size(), dist.get_rank()) if several else (1, 0)

    def counts(self, mine: int, device: torch.device) -> list[int]:
        """The number that each rank gives."""
        if self.size == 1:
            return [mine]
        every = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(self.size)]
        dist.all_gather(every, torch.tensor([mine], device=device))
        return [int(one) for one in every]

    def gather(self, rows: Tensor) -> Tensor:
        """Rows of all ranks, in rank order; each may bring another number of them."""
        if self.size == 1:
            return rows
        counts = self.counts(len(rows), rows.device)
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        every = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(every, padded)
        return torch.cat([one[:count] for one, count in zip(every, counts, strict=True)])

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks; all ranks must give the same shapes in the same order."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)
