"""Rollouts to micro-batches: padded ids for the backbone, and where each response token is predicted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tip_exp.rollout.types import Rollout


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What goes through a backbone at once, B sequences padded on the right to T, with N response tokens.

    The response token `token_ids[n]` is predicted by the hidden state at [rows[n], columns[n]], one to its left; these
    are explicit positions, not a suffix, because a tool may speak in the middle of a response.
    """

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T)
    rows: Tensor  # (N,)
    columns: Tensor  # (N,)
    token_ids: Tensor  # (N,)
    rollout: Tensor  # (N,) index of the token's rollout in the step
    position: Tensor  # (N,) place in its response: 0, 1, ...

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    def to(self, device: torch.device) -> MicroBatch:
        return MicroBatch(*(getattr(self, name).to(device) for name in self.__slots__))


def micro_batches(rollouts: list[Rollout], token_budget: int, pad_id: int) -> list[MicroBatch]:
    """Split a step into micro-batches of at most `token_budget` padded tokens each, like lengths together.

    A single rollout longer than the budget is an error of the caller: the config bounds prompt plus response.
    """
    by_length = sorted(range(len(rollouts)), key=lambda i: len(rollouts[i].token_ids), reverse=True)
    batches: list[list[int]] = []
    for index in by_length:
        longest = len(rollouts[batches[-1][0]].token_ids) if batches else 0
        if not batches or longest * (len(batches[-1]) + 1) > token_budget:
            batches.append([])
        batches[-1].append(index)
    return [_collate(rollouts, sorted(indices), pad_id) for indices in batches]


def _collate(rollouts: list[Rollout], indices: list[int], pad_id: int) -> MicroBatch:
    width = max(len(rollouts[i].token_ids) for i in indices)
    input_ids = torch.full((len(indices), width), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    response = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, index in enumerate(indices):
        rollout = rollouts[index]
        length = len(rollout.token_ids)
        input_ids[row, :length] = torch.tensor(rollout.token_ids)
        attention_mask[row, :length] = 1
        response[row, :length] = torch.tensor(rollout.response_mask)
    rows, columns = response.nonzero(as_tuple=True)
    place = response.cumsum(1) - 1
    return MicroBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        rows=rows,
        columns=columns - 1,
        token_ids=input_ids[rows, columns],
        rollout=torch.tensor(indices)[rows],
        position=place[rows, columns],
    )
