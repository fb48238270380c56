"""The fused backend of the masked loss: summed divergence of kept tokens, and its gradient, without whole logits.

Sums, not means: the learner divides once by the number of kept tokens of the whole optimizer step (TIP, Eq. 8), so any
split into micro-batches gives the same gradient. Only kept rows pass through the heads, one tile at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tip_exp.losses.divergence import COLUMN_GRADS, ColumnGrad, Divergence
from tip_exp.losses.estimators import Objective
from tip_exp.losses.head import LazyLogits
from tip_exp.losses.online_softmax import LogNormalizers, OnlineSoftmaxStats, tile_stats
from tip_exp.losses.tiling import Tiling, Workspace, tiling

# Whole-row tiles with fewer rows re-read the head's gradient so often that a first pass for the log-normalizers, which
# allows tiles of any shape, is cheaper.
MIN_WHOLE_ROWS = 48


@dataclass(frozen=True, slots=True)
class LossAndGrad:
    """`value`: summed divergence of kept tokens, nats. `hidden_grad`: (N, D), zero at tokens that are not kept."""

    value: Tensor
    hidden_grad: Tensor


@torch.no_grad()
def fused(
    student: LazyLogits,
    teacher: LazyLogits,
    kept_mask: Bool[Tensor, " n"],
    objective: Objective,
    tile_bytes: int,
    *,
    log_normalizers: LogNormalizers | None = None,
    weights: Float[Tensor, " n"] | None = None,
) -> LossAndGrad:
    """Memory is one tile whatever the retention; time is proportional to the kept tokens.

    Four GEMMs of kept rows x V x D: both models' logits, the gradients of hidden states and head. The head's gradient
    is added into `student.head.weight.grad`. `weights` (N,) multiply each token's divergence. Tiles hold whole rows;
    for the two KLs, `log_normalizers` of all N tokens (from `token_stats`) allow tiles of any shape.
    """
    assert len(student) == len(teacher) == len(kept_mask), "one hidden state per token and model"
    head, device = student.head, student.hidden.device
    kept_rows = None if bool(kept_mask.all()) else kept_mask.nonzero().squeeze(-1)
    num_kept = len(kept_mask) if kept_rows is None else len(kept_rows)
    size = num_kept, head.vocab_size, head.dtype, tile_bytes
    column_grad = COLUMN_GRADS.get(objective.name) if isinstance(objective, Divergence) else None
    row_stats: LogNormalizers | None = None
    if column_grad is not None:
        if log_normalizers is not None:
            row_stats = log_normalizers if kept_rows is None else log_normalizers[kept_rows]
        elif tiling(*size, whole_rows=True, device=device.type).height < min(MIN_WHOLE_ROWS, num_kept):
            row_stats = _first_pass(student, teacher, kept_rows, size)
    cut = tiling(*size, whole_rows=row_stats is None, device=device.type)
    num_scratch = 0 if column_grad is None else 3 if row_stats is None else 1
    workspace = Workspace(cut, head.dtype, device, num_scratch=num_scratch)
    value = torch.zeros((), dtype=head.dtype, device=device)
    hidden_grad = torch.zeros_like(student.hidden)
    for tile_rows in cut.rows():
        rows = tile_rows if kept_rows is None else kept_rows[tile_rows]
        student_tile, teacher_tile = LazyLogits(student.hidden[rows].to(head.dtype), head), teacher[rows]
        tile_weights = None if weights is None else weights[rows]
        tile_grad = torch.zeros_like(student_tile.hidden)
        if column_grad is None:
            per_token = _whole_rows(student_tile, teacher_tile, objective.at(rows), tile_weights, tile_grad, workspace)
        else:
            if row_stats is None:
                stats = _log_normalizers(student_tile, teacher_tile, cut, workspace)
            else:
                stats = row_stats[tile_rows]
            _columns(student_tile, teacher_tile, column_grad, stats, tile_weights, tile_grad, cut, workspace)
            assert isinstance(objective, Divergence), "column gradients are of divergences"
            per_token = stats.reverse_kl if objective.name == "reverse_kl" else stats.forward_kl
        value += (per_token if tile_weights is None else per_token * tile_weights).sum()
        hidden_grad[rows] = tile_grad.to(hidden_grad.dtype)
    return LossAndGrad(value, hidden_grad)


def _whole_rows(
    student: LazyLogits,
    teacher: LazyLogits,
    objective: Objective,
    weights: Tensor | None,
    hidden_grad: Tensor,
    workspace: Workspace,
) -> Tensor:
    """Gradients of one tile's rows by autograd on its logits, block by block; returns the objective per token, (n,)."""
    head, columns = student.head, slice(0, student.head.vocab_size)
    z, t = _project(student, teacher, columns, workspace)
    values: list[Tensor] = []
    for rows in workspace.blocks(z):
        logits = z[rows].requires_grad_()
        with torch.enable_grad():
            value = objective.at(rows).value(logits.log_softmax(-1), t[rows].log_softmax(-1))
        (grad,) = torch.autograd.grad(value, logits, torch.ones_like(value) if weights is None else weights[rows])
        if head.softcap is not None:
            head.softcap_backward_(grad, logits.detach())
        logits.detach().copy_(grad)
        values.append(value.detach())
    head.backward(student.hidden, z, hidden_grad, columns)
    return torch.cat(values)


def _columns(
    student: LazyLogits,
    teacher: LazyLogits,
    column_grad: ColumnGrad,
    stats: LogNormalizers,
    weights: Tensor | None,
    hidden_grad: Tensor,
    cut: Tiling,
    workspace: Workspace,
) -> None:
    """Gradients of one tile's rows from their log-normalizers, some columns at a time."""
    head = student.head
    for columns in cut.columns():
        if cut.whole_rows:  # _log_normalizers has left the logits in the tiles
            z, t = (workspace.tile(model, len(student), columns) for model in (0, 1))
        else:
            z, t = _project(student, teacher, columns, workspace)
        for rows in workspace.blocks(z):
            logits = z[rows]
            capped = logits.clone() if head.softcap is not None else None
            column_grad(logits, t[rows], workspace.scratch(0, logits), stats[rows])
            if weights is not None:
                logits.mul_(weights[rows, None])
            if capped is not None:
                head.softcap_backward_(logits, capped)
        head.backward(student.hidden, z, hidden_grad, columns)


def _project(student: LazyLogits, teacher: LazyLogits, columns: slice, workspace: Workspace) -> tuple[Tensor, Tensor]:
    """Both models' logits of some columns, (n, c), in their tiles."""
    z, t = (workspace.tile(model, len(student), columns) for model in (0, 1))
    student.into(z, columns)
    teacher.into(t, columns)
    return z, t


def _first_pass(
    student: LazyLogits, teacher: LazyLogits, kept_rows: Tensor | None, size: tuple[int, int, torch.dtype, int]
) -> LogNormalizers:
    """The log-normalizers of kept rows, by two more GEMMs."""
    device = student.hidden.device
    cut = tiling(*size, whole_rows=False, device=device.type)
    workspace = Workspace(cut, student.head.dtype, device, num_scratch=3)
    tiles = [tile_rows if kept_rows is None else kept_rows[tile_rows] for tile_rows in cut.rows()]
    parts = [_log_normalizers(student[rows], teacher[rows], cut, workspace) for rows in tiles]
    return LogNormalizers.concatenate(parts)


def _log_normalizers(student: LazyLogits, teacher: LazyLogits, cut: Tiling, workspace: Workspace) -> LogNormalizers:
    """The log-normalizers of one tile's rows; if tiles hold whole rows, they hold these rows' logits afterwards."""
    sums: tuple[OnlineSoftmaxStats, OnlineSoftmaxStats] | None = None
    for columns in cut.columns():
        z, t = _project(student, teacher, columns, workspace)
        student_sums, teacher_sums = tile_stats(z, t, workspace=workspace)
        assert teacher_sums is not None, "the teacher was projected"
        if sums is not None:
            student_sums, teacher_sums = sums[0].merge(student_sums), sums[1].merge(teacher_sums)
        sums = student_sums, teacher_sums
    assert sums is not None, "a vocabulary has at least one column"
    return LogNormalizers.of(*sums)
