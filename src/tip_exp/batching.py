"""Rollouts to micro-batches: ids for the backbone, padded or packed, and where each response token is predicted."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from tip_exp.rollout.types import Rollout


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What goes through a backbone at once, with N response tokens: B sequences padded on the right to T, or all of
    them end to end in one row (B = 1), which has no attention mask.

    The response token `token_ids[n]` is predicted by the hidden state at [rows[n], columns[n]], one to its left; these
    are explicit positions, not a suffix, because a tool may speak in the middle of a response.
    """

    input_ids: Tensor  # (B, T)
    positions: Tensor  # (B, T) of each token in its sequence
    attention_mask: Tensor | None  # (B, T); None if packed
    rows: Tensor  # (N,)
    columns: Tensor  # (N,)
    token_ids: Tensor  # (N,)
    rollout: Tensor  # (N,) index of the token's rollout in the step
    position: Tensor  # (N,) place in its response: 0, 1, ...
    lengths: tuple[int, ...]  # of the sequences

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def is_packed(self) -> bool:
        return self.attention_mask is None

    def to(self, device: torch.device) -> MicroBatch:
        moved = {f.name: value.to(device) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        return replace(self, **moved)


def micro_batches(
    rollouts: list[Rollout], token_budget: int, pad_id: int, *, packing: bool = False
) -> list[MicroBatch]:
    """Split a step into micro-batches of at most `token_budget` tokens each, padding counted, like lengths together.

    A single rollout longer than the budget is an error of the caller: the config bounds prompt plus response.
    """
    by_length = sorted(range(len(rollouts)), key=lambda i: len(rollouts[i].token_ids), reverse=True)
    batches: list[list[int]] = []
    filled = 0
    for index in by_length:
        length = len(rollouts[index].token_ids)
        takes = length if packing or not batches else len(rollouts[batches[-1][0]].token_ids)
        if not batches or filled + takes > token_budget:
            batches.append([])
            filled, takes = 0, length
        batches[-1].append(index)
        filled += takes
    return [_collate(rollouts, sorted(indices), pad_id, packing) for indices in batches]


def without_tails(
    batch: MicroBatch, rollouts: list[Rollout], kept: Tensor, pad_id: int
) -> tuple[MicroBatch, Tensor] | None:
    """A micro-batch less what comes after each sequence's last kept token, and which of its tokens are left, (N,).

    Exact: in a causal model nothing that is cut has a part in the loss. Sequences without a kept token go whole;
    None if nothing is kept. `kept`: (N,), in the batch's order of tokens.
    """
    last = {int(i): int(batch.position[kept & (batch.rollout == i)].max()) for i in batch.rollout[kept].unique()}
    if not last:
        return None
    shorter = list(rollouts)
    for index, place in last.items():
        shorter[index] = rollouts[index].upto_response(place)
    smaller = _collate(shorter, sorted(last), pad_id, batch.is_packed).to(batch.input_ids.device)
    ends = torch.full((len(rollouts),), -1, device=kept.device)
    ends[list(last)] = torch.tensor(list(last.values()), device=kept.device)
    return smaller, batch.position <= ends[batch.rollout]


def _collate(rollouts: list[Rollout], indices: list[int], pad_id: int, packing: bool) -> MicroBatch:
    chosen = [rollouts[i] for i in indices]
    lengths = tuple(len(rollout.token_ids) for rollout in chosen)
    # (S, longest): a row a sequence, whatever becomes of the padding
    ids, mine = (
        torch.full((len(chosen), max(lengths)), pad_id),
        torch.zeros(len(chosen), max(lengths), dtype=torch.bool),
    )
    for row, rollout in enumerate(chosen):
        ids[row, : lengths[row]] = torch.tensor(rollout.token_ids)
        mine[row, : lengths[row]] = torch.tensor(rollout.response_mask)
    positions = torch.arange(max(lengths)).expand(len(chosen), -1)
    real = positions < torch.tensor(lengths)[:, None]
    sequence, column = mine.nonzero(as_tuple=True)
    rows, columns = sequence, column - 1
    input_ids, mask = ids, real.long()
    if packing:
        starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
        rows, columns = torch.zeros_like(sequence), starts[sequence] + columns
        input_ids, positions, mask = ids[real][None], positions[real][None], None
    return MicroBatch(
        input_ids=input_ids,
        positions=positions,
        attention_mask=mask,
        rows=rows,
        columns=columns,
        token_ids=ids[sequence, column],
        rollout=torch.tensor(indices)[sequence],
        position=(mine.cumsum(1) - 1)[sequence, column],
        lengths=lengths,
    )
