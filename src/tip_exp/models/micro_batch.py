"""Rollouts to micro-batches: padded or packed ids for the backbone, and where each response token is predicted."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tip_exp.types import Rollout


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward pass of a backbone, with N response tokens.

    Padded: one sequence per row, padded on the right to T. Packed: all sequences in one row, `lengths` in order.
    The hidden state at [rows[n], columns[n]] predicts response token `token_ids[n]`, which stands one column to the
    right. Positions are explicit because tool output may stand in the middle of a response.
    """

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T)
    rows: Tensor  # (N,)
    columns: Tensor  # (N,)
    token_ids: Tensor  # (N,)
    rollout: Tensor  # (N,) index of the token's rollout in the step
    position: Tensor  # (N,) index of the token in its response: 0, 1, ...
    lengths: tuple[int, ...] | None = None  # of a packed row's sequences; None: padded

    @property
    def num_tokens(self) -> int:
        """Number N of response tokens."""
        return len(self.token_ids)

    @property
    def num_positions(self) -> int:
        """Positions that the backbone computes, B x T, padding included."""
        return self.input_ids.numel()

    def to(self, device: torch.device) -> MicroBatch:
        values = {name: getattr(self, name) for name in self.__slots__}
        return replace(self, **{name: v.to(device) for name, v in values.items() if isinstance(v, Tensor)})


def micro_batches(
    rollouts: list[Rollout], token_budget: int, pad_id: int, *, packing: bool = False
) -> list[MicroBatch]:
    """Split a step into micro-batches of at most `token_budget` positions, the longest rollouts first.

    Padded: rollouts of similar length share a batch, and padding counts. Packed: first fit, longest first.
    A rollout longer than the budget gets a batch of its own; the config rules exclude that.
    """
    lengths = [len(rollout.token_ids) for rollout in rollouts]
    groups: list[list[int]] = []  # indices of rollouts
    for index in sorted(range(len(rollouts)), key=lengths.__getitem__, reverse=True):
        if packing:
            fitting = (g for g in groups if sum(lengths[i] for i in g) + lengths[index] <= token_budget)
        else:
            fitting = (g for g in groups[-1:] if lengths[g[0]] * (len(g) + 1) <= token_budget)
        if (group := next(fitting, None)) is None:
            groups.append([index])
        else:
            group.append(index)
    collate = _pack if packing else _pad
    return [collate([rollouts[i] for i in sorted(g)], torch.tensor(sorted(g)), pad_id) for g in groups]


def _pad(rollouts: list[Rollout], indices: Tensor, pad_id: int) -> MicroBatch:
    """`indices`: (B,) of the rollouts in the step."""
    width = max(len(rollout.token_ids) for rollout in rollouts)
    input_ids = torch.full((len(rollouts), width), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    response_mask = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, rollout in enumerate(rollouts):
        length = len(rollout.token_ids)
        input_ids[row, :length] = torch.tensor(rollout.token_ids)
        attention_mask[row, :length] = 1
        response_mask[row, :length] = torch.tensor(rollout.response_mask)
    rows, columns = response_mask.nonzero(as_tuple=True)
    position = response_mask.cumsum(1) - 1
    return MicroBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        rows=rows,
        columns=columns - 1,
        token_ids=input_ids[rows, columns],
        rollout=indices[rows],
        position=position[rows, columns],
    )


def _pack(rollouts: list[Rollout], indices: Tensor, pad_id: int) -> MicroBatch:
    """`indices`: (B,) of the rollouts in the step; `pad_id` is not used."""
    lengths = tuple(len(rollout.token_ids) for rollout in rollouts)
    input_ids = torch.tensor([token for rollout in rollouts for token in rollout.token_ids])
    response_mask = torch.tensor([written for rollout in rollouts for written in rollout.response_mask])
    (columns,) = response_mask.nonzero(as_tuple=True)
    return MicroBatch(
        input_ids=input_ids[None],
        attention_mask=torch.ones_like(input_ids)[None],
        rows=torch.zeros_like(columns),
        columns=columns - 1,  # never in the previous sequence: a rollout starts with its prompt
        token_ids=input_ids[columns],
        rollout=indices.repeat_interleave(torch.tensor(lengths))[columns],
        position=torch.cat([torch.arange(rollout.num_response_tokens) for rollout in rollouts]),
        lengths=lengths,
    )
