"""Rollouts to micro-batches: padded or packed ids for the backbone, and where each response token is predicted."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tip_exp.types import Rollout


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What goes through a backbone at once, with N response tokens: sequences padded on the right to T, one a row, or
    packed one behind the other into one row, whose `lengths` then tell them apart.

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
    lengths: tuple[int, ...] | None = None  # of a packed row's sequences

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_places(self) -> int:
        """What the backbone has to work through, padding included."""
        return self.input_ids.numel()

    def to(self, device: torch.device) -> MicroBatch:
        values = {name: getattr(self, name) for name in self.__slots__}
        return replace(self, **{name: one.to(device) for name, one in values.items() if isinstance(one, Tensor)})


def micro_batches(
    rollouts: list[Rollout], token_budget: int, pad_id: int, *, packing: bool = False
) -> list[MicroBatch]:
    """Split a step into micro-batches of at most `token_budget` tokens each, the longest rollouts in the first.

    Padded, like lengths come together, and padding counts; packed, each rollout goes where the first room is.
    A single rollout longer than the budget is an error of the caller: the config bounds prompt plus response.
    """
    lengths = [len(rollout.token_ids) for rollout in rollouts]
    batches: list[list[int]] = []
    for index in sorted(range(len(rollouts)), key=lengths.__getitem__, reverse=True):
        if packing:
            room = (b for b in batches if sum(lengths[i] for i in b) + lengths[index] <= token_budget)
        else:
            room = (b for b in batches[-1:] if lengths[b[0]] * (len(b) + 1) <= token_budget)
        if (batch := next(room, None)) is None:
            batches.append([index])
        else:
            batch.append(index)
    collate = _pack if packing else _pad
    return [collate([rollouts[i] for i in sorted(b)], torch.tensor(sorted(b)), pad_id) for b in batches]


def cut(batch: MicroBatch, kept: Tensor) -> MicroBatch:
    """The least of a micro-batch that the gradient of its `kept` tokens, (N,) bool, needs; at least one is kept.

    Attention looks to the left, so nothing behind the state that predicts a sequence's last kept token matters, nor do
    sequences without one. The result holds the kept tokens alone.
    """
    rows, columns = batch.rows[kept], batch.columns[kept]
    device, width = batch.input_ids.device, batch.input_ids.shape[1]
    if batch.lengths is None:
        last = torch.full((len(batch.input_ids),), -1, device=device).scatter_reduce(0, rows, columns, "amax")
        used, longest = last >= 0, int(last.max()) + 1
        row_of, column_of = used.cumsum(0) - 1, torch.arange(width, device=device)
        input_ids = batch.input_ids[used, :longest]
        attention_mask, lengths = batch.attention_mask[used, :longest], None
    else:
        sizes = torch.tensor(batch.lengths, device=device)
        sequence, place = (
            torch.arange(len(sizes), device=device).repeat_interleave(sizes),
            torch.arange(width).to(device),
        )
        last = torch.full_like(sizes, -1).scatter_reduce(0, sequence[columns], columns, "amax")
        used = place <= last[sequence]
        row_of, column_of = torch.zeros(1, dtype=torch.long, device=device), used.cumsum(0) - 1
        input_ids, attention_mask = batch.input_ids[:, used], batch.attention_mask[:, used]
        lengths = tuple(n for n in sequence[used].bincount(minlength=len(sizes)).tolist() if n)
    return MicroBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        rows=row_of[rows],
        columns=column_of[columns],
        token_ids=batch.token_ids[kept],
        rollout=batch.rollout[kept],
        position=batch.position[kept],
        lengths=lengths,
    )


def _pad(rollouts: list[Rollout], numbers: Tensor, pad_id: int) -> MicroBatch:
    width = max(len(rollout.token_ids) for rollout in rollouts)
    input_ids = torch.full((len(rollouts), width), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    response = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, rollout in enumerate(rollouts):
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
        rollout=numbers[rows],
        position=place[rows, columns],
    )


def _pack(rollouts: list[Rollout], numbers: Tensor, pad_id: int) -> MicroBatch:
    """One row without a pad token."""
    lengths = tuple(len(rollout.token_ids) for rollout in rollouts)
    input_ids = torch.tensor([token for rollout in rollouts for token in rollout.token_ids])
    response = torch.tensor([mine for rollout in rollouts for mine in rollout.response_mask])
    (columns,) = response.nonzero(as_tuple=True)
    return MicroBatch(
        input_ids=input_ids[None],
        attention_mask=torch.ones_like(input_ids)[None],
        rows=torch.zeros_like(columns),
        columns=columns - 1,  # never into the sequence before: a rollout starts with its prompt
        token_ids=input_ids[columns],
        rollout=numbers.repeat_interleave(torch.tensor(lengths))[columns],
        position=torch.cat([torch.arange(rollout.num_response_tokens) for rollout in rollouts]),
        lengths=lengths,
    )
