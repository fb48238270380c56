"""Rollouts to micro-batches: padded or packed ids for the backbone, and where each response token is predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tip_exp.losses.tiling import to_device
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
        """On `device`, apart from `rollout` and `position`: selection and its metrics read them on the host."""
        names = ("input_ids", "attention_mask", "rows", "columns", "token_ids")
        return replace(self, **{name: to_device(getattr(self, name), device) for name in names})


def micro_batches(
    rollouts: list[Rollout], token_budget: int, pad_id: int, *, packing: bool = False
) -> list[MicroBatch]:
    """Split a step into micro-batches of at most `token_budget` positions, the longest rollouts first."""
    lengths = [len(rollout.token_ids) for rollout in rollouts]
    groups = group(lengths, token_budget, packing=packing, indices=range(len(rollouts)))
    return [collate(rollouts, indices, pad_id, packing=packing) for indices in groups]


def group(lengths: Sequence[int], token_budget: int, *, packing: bool, indices: Sequence[int]) -> list[list[int]]:
    """The rollouts at `indices` by micro-batch, each micro-batch in ascending order.

    Padded: rollouts of similar length share a batch, and padding counts. Packed: first fit, longest first.
    A rollout longer than the budget gets a batch of its own; the config rules exclude that.
    """
    groups: list[list[int]] = []
    positions: list[int] = []  # of each group, padding included
    for index in sorted(indices, key=lengths.__getitem__, reverse=True):
        candidates = range(len(groups)) if packing else range(len(groups))[-1:]
        added = lengths[index] if packing or not groups else lengths[groups[-1][0]]
        first = next((i for i in candidates if positions[i] + added <= token_budget), None)
        if first is None:
            groups.append([index])
            positions.append(lengths[index])
        else:
            groups[first].append(index)
            positions[first] += added
    return [sorted(members) for members in groups]


def empty_micro_batch(pad_id: int, *, packing: bool) -> MicroBatch:
    """One padding token and no response token: a forward and backward pass of a rank that has no rollouts left."""
    none, one_token = torch.zeros(0, dtype=torch.long), torch.full((1, 1), pad_id)
    return MicroBatch(one_token, torch.ones_like(one_token), *[none] * 5, lengths=(1,) if packing else None)


def collate(rollouts: list[Rollout], indices: list[int], pad_id: int, *, packing: bool) -> MicroBatch:
    """The micro-batch of the rollouts at `indices`; `pad_id` is not used in a packed row."""
    ids = [torch.tensor(rollouts[i].token_ids) for i in indices]
    masks = [torch.tensor(rollouts[i].response_mask) for i in indices]
    if packing:
        input_ids, response_mask = torch.cat(ids)[None], torch.cat(masks)[None]
        attention_mask = torch.ones_like(input_ids)
    else:
        input_ids = pad_sequence(ids, batch_first=True, padding_value=pad_id)
        response_mask = pad_sequence(masks, batch_first=True)
        attention_mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    rows, columns = response_mask.nonzero(as_tuple=True)
    counts = [rollouts[i].num_response_tokens for i in indices]
    return MicroBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        rows=rows,
        columns=columns - 1,  # never in the previous sequence of a packed row: a rollout starts with its prompt
        token_ids=input_ids[rows, columns],
        rollout=torch.tensor(indices).repeat_interleave(torch.tensor(counts)),
        position=torch.cat([torch.arange(count) for count in counts]),
        lengths=tuple(map(len, ids)) if packing else None,
    )
