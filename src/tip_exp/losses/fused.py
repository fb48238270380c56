"""The masked loss: divergence of kept tokens, summed, with its gradient at the hidden states and in the head.

Sums, not means: the learner divides once by the number of kept tokens of the whole optimizer step (TIP, Eq. 8), so that
any split into micro-batches gives the same gradient. Both backends return the same values and gradients:
    fused         kept rows alone go through the heads, a tile at a time; the gradient is formed while the tile lives
    materialized  whole logits of every row, then the mask: the memory behaviour the paper measured
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tip_exp.losses import online_softmax as moments
from tip_exp.losses.divergence import Divergence
from tip_exp.losses.estimators import Objective
from tip_exp.losses.head import Head
from tip_exp.losses.online_softmax import Normalizers
from tip_exp.losses.tiling import Tiling, Workspace, tiling

# Lower tiles of whole rows read and write the head's gradient so often that knowing the normalisers first is cheaper.
FEWEST_ROWS = 48


@dataclass(frozen=True, slots=True)
class LossAndGrad:
    """`value`: sum of the divergence over kept tokens, nats. `hidden_grad`: (N, D), zero where nothing is kept."""

    value: Tensor
    hidden_grad: Tensor


@torch.no_grad()
def fused(
    student_hidden: Float[Tensor, "n d"],
    teacher_hidden: Float[Tensor, "n e"],
    kept: Bool[Tensor, " n"],
    student_head: Head,
    teacher_head: Head,
    divergence: Objective,
    tile_bytes: int,
    *,
    normalizers: Normalizers | None = None,
    weights: Float[Tensor, " n"] | None = None,
) -> LossAndGrad:
    """Select before the head: memory is one tile whatever the retention, time falls with it.

    Four products of kept rows x V x D: both logits, both gradients. With scoring's `normalizers` (of all N tokens)
    tiles may be cut anywhere; without, they are whole rows. `weights` multiply each kept token's divergence.
    Adds the head's gradient into `student_head.weight.grad`.
    """
    rows = None if bool(kept.all()) else kept.nonzero().squeeze(-1)
    num_kept = len(kept) if rows is None else len(rows)
    size = num_kept, student_head.vocab_size, student_head.dtype, tile_bytes
    device = student_hidden.device.type
    known, streamed = None, divergence if isinstance(divergence, Divergence) and divergence.streams else None
    if streamed is not None:
        if normalizers is not None:
            known = normalizers if rows is None else normalizers[rows]
        elif tiling(*size, whole_rows=True, device=device).height < min(FEWEST_ROWS, num_kept):
            known = _first_pass(student_hidden, teacher_hidden, rows, student_head, teacher_head, size)
    cut = tiling(*size, whole_rows=known is None, device=device)
    work = Workspace(cut, student_hidden, student_head.dtype, spare=1 if known else 3)
    value = torch.zeros((), dtype=student_head.dtype, device=student_hidden.device)
    hidden_grad = torch.zeros_like(student_hidden)
    for tile in cut.rows():
        chosen = tile if rows is None else rows[tile]
        hidden, other = student_hidden[chosen].to(student_head.dtype), teacher_hidden[chosen]
        weight = None if weights is None else weights[chosen]
        grad = torch.zeros_like(hidden)
        if streamed is None:
            everywhere = slice(0, cut.vocab_size)
            z, t = _logits(hidden, other, student_head, teacher_head, everywhere, work)
            value += _whole_rows(z, t, student_head, divergence.at(chosen), weight, work)
            student_head.backward(hidden, z, grad, everywhere)
        else:
            here = known[tile] if known is not None else _sums(hidden, other, student_head, teacher_head, cut, work)
            for columns in cut.columns():
                if known is None:  # they are there
                    z, t = (work.tile(i, len(hidden), columns) for i in (0, 1))
                else:
                    z, t = _logits(hidden, other, student_head, teacher_head, columns, work)
                _some_columns(z, t, student_head, streamed, weight, here, work)
                student_head.backward(hidden, z, grad, columns)
            per_token = streamed.known_value(here)
            value += (per_token if weight is None else per_token * weight).sum()
        hidden_grad[chosen] = grad.to(hidden_grad.dtype)
    return LossAndGrad(value, hidden_grad)


def _logits(
    hidden: Tensor, other: Tensor, student_head: Head, teacher_head: Head, columns: slice, work: Workspace
) -> tuple[Tensor, Tensor]:
    """Both models' logits of some columns, in their tiles."""
    z, t = (work.tile(i, len(hidden), columns) for i in (0, 1))
    student_head.logits_into(z, hidden, columns)
    teacher_head.logits_into(t, other, columns)
    return z, t


def _whole_rows(
    z: Tensor, t: Tensor, head: Head, divergence: Objective, weight: Tensor | None, work: Workspace
) -> Tensor:
    """Logits of whole rows to the gradient at the student's, in `z`; returns the summed divergence."""
    value = z.new_zeros(())
    for rows in work.blocks(z):
        logits, theirs = z[rows], t[rows]
        capped = logits.clone() if head.softcap is not None else None
        p, q = work.spare(0, logits), work.spare(1, logits)
        _normalize_(logits, p)
        _normalize_(theirs, q)
        per_token = divergence.at(rows).gradient_(logits, p, theirs, q)
        if weight is not None:
            per_token = per_token * weight[rows]
            logits.mul_(weight[rows, None])
        if capped is not None:
            head.slope_(logits, capped)
        value += per_token.sum()
    return value


def _some_columns(
    z: Tensor,
    t: Tensor,
    head: Head,
    divergence: Divergence,
    weight: Tensor | None,
    known: Normalizers,
    work: Workspace,
) -> None:
    """Logits of some columns to the gradient at the student's, in `z`."""
    for rows in work.blocks(z):
        logits = z[rows]
        capped = logits.clone() if head.softcap is not None else None
        divergence.streamed_gradient_(logits, t[rows], work.spare(0, logits), known[rows])
        if weight is not None:
            logits.mul_(weight[rows, None])
        if capped is not None:
            head.slope_(logits, capped)


def _normalize_(logits: Tensor, probabilities: Tensor) -> None:
    """Logits become log-probabilities in place; the other argument is filled with the probabilities."""
    logits.sub_(logits.amax(-1, keepdim=True))
    total = torch.exp(logits, out=probabilities).sum(-1, keepdim=True)
    logits.sub_(total.log())
    probabilities.div_(total)


def _first_pass(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    rows: Tensor | None,
    student_head: Head,
    teacher_head: Head,
    size: tuple[int, int, torch.dtype, int],
) -> Normalizers:
    """The normalisers of kept rows by two products of their own."""
    cut = tiling(*size, whole_rows=False, device=student_hidden.device.type)
    work = Workspace(cut, student_hidden, student_head.dtype, spare=3)
    chosen = [tile if rows is None else rows[tile] for tile in cut.rows()]
    return moments.joined(
        [_sums(student_hidden[at], teacher_hidden[at], student_head, teacher_head, cut, work) for at in chosen]
    )


def _sums(
    hidden: Tensor, other: Tensor, student_head: Head, teacher_head: Head, cut: Tiling, work: Workspace
) -> Normalizers:
    """The normalisers of one tile's rows; if it is of whole rows it ends up full of their logits."""
    sums = None
    for columns in cut.columns():
        z, t = _logits(hidden, other, student_head, teacher_head, columns, work)
        ours, theirs = moments.of_tile(z, t, work=work)
        assert theirs is not None, "the teacher was projected"
        sums = (ours, theirs) if sums is None else (sums[0].merged(ours), sums[1].merged(theirs))
    assert sums is not None, "a vocabulary has at least one column"
    return moments.normalizers(*sums)
