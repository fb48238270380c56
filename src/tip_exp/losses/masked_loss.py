"""The masked loss: summed divergence of kept tokens, and its gradient, by two backends.

Sums, not means: the learner divides once by the number of kept tokens of the whole optimizer step (TIP, Eq. 8), so any
split into micro-batches gives the same gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tip_exp.losses.divergence import COLUMN_GRADS, Divergence
from tip_exp.losses.estimators import Objective
from tip_exp.losses.head import LazyLogits, check_same_tokens, project
from tip_exp.losses.online_softmax import LogNormalizers, OnlineSoftmaxStats, add_tile
from tip_exp.losses.tiling import Tiling, Workspace, kernels, tiling, to_device

# Tiles of whole rows need no first pass for the log-normalizers, but read the head (on a CPU its gradient too) once a
# tile. If a tile has fewer rows than this, that costs more than the first pass, after which tiles may have any shape.
# CUDA: 4 GEMMs bound by reading the weight against 6 bound by arithmetic (H100, bfloat16, 200 FLOP a byte), not run.
MIN_WHOLE_ROWS = {"cpu": 48, "cuda": 128}


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
    """Only kept rows pass through the heads, one tile at a time: memory is one tile, time proportional to their number.

    Four GEMMs of kept rows x V x D: both models' logits, the gradients of hidden states and head. The head's gradient
    is added into `student.head.weight.grad`. `weights` (N,) multiply each token's divergence. Tiles hold whole rows;
    for the two KLs, `log_normalizers` of all N tokens (from `token_stats`) allow tiles of any shape.
    `kept_mask` and `weights` may be in host memory; with a mask on CUDA the host waits for the number of kept tokens.
    """
    assert len(student) == len(teacher) == len(kept_mask), "one hidden state per token and model"
    check_same_tokens(student.head, teacher.head)
    head, device = student.head, student.hidden.device
    kept_rows = None if bool(kept_mask.all()) else to_device(kept_mask.nonzero().squeeze(-1), device)
    weights = None if weights is None else to_device(weights, device)
    num_kept = len(kept_mask) if kept_rows is None else len(kept_rows)
    size = num_kept, head.vocab_size, head.dtype, tile_bytes
    kl = objective.name if isinstance(objective, Divergence) and objective.name in COLUMN_GRADS else None
    cut = tiling(*size, whole_rows=True, device=device.type)
    whole_rows = kl is None or (log_normalizers is None and cut.height >= min(MIN_WHOLE_ROWS[device.type], num_kept))
    if not whole_rows:
        cut = tiling(*size, whole_rows=False, device=device.type)
    row_tiles = [rows if kept_rows is None else kept_rows[rows] for rows in cut.rows()]
    tile_normalizers: list[LogNormalizers] = []
    if not whole_rows and log_normalizers is not None:
        tile_normalizers = [log_normalizers.at(rows) for rows in row_tiles]
    elif not whole_rows:
        tile_normalizers = _first_pass(student, teacher, row_tiles, cut)
    num_scratch = 0 if kl is None else 4 if whole_rows else 1
    workspace = Workspace(cut, head.dtype, device, num_scratch=num_scratch)
    value = torch.zeros((), dtype=head.dtype, device=device)
    hidden_grad = torch.zeros_like(student.hidden)
    for i, rows in enumerate(row_tiles):
        tile = [LazyLogits(student.hidden[rows].to(head.dtype), head), teacher[rows]]
        tile_weights = None if weights is None else weights[rows]
        tile_grad = torch.zeros_like(tile[0].hidden)
        if kl is None:
            per_token = _whole_rows(tile, objective.at(rows), tile_weights, tile_grad, workspace)
        else:
            normalizers = _log_normalizers(tile, workspace) if whole_rows else tile_normalizers[i]
            _columns(tile, kl, normalizers, tile_weights, tile_grad, workspace)
            per_token = getattr(normalizers, kl)
        value += (per_token if tile_weights is None else per_token * tile_weights).sum()
        hidden_grad[rows] = tile_grad.to(hidden_grad.dtype)
    return LossAndGrad(value, hidden_grad)


def materialized(
    student: LazyLogits,
    teacher: LazyLogits,
    kept_mask: Bool[Tensor, " n"],
    objective: Objective,
    tile_bytes: int,
    *,
    log_normalizers: LogNormalizers | None = None,
    weights: Float[Tensor, " n"] | None = None,
) -> LossAndGrad:
    """`fused` up to rounding, by autograd over all N x V logits, as in the paper's memory table.

    Logits are float32, as in `token_stats`. Rounded to bfloat16, as the forward pass of a bfloat16 model leaves them,
    they change reverse KL by 0.1 % and gradients by 3 % (logits of standard deviation 3) to 7 % (20).
    `tile_bytes` and `log_normalizers` are ignored. All logits live until their kept rows are copied, so peak memory
    falls with retention from five times all logits to little more than all logits once (estimate/memory.py).
    """
    check_same_tokens(student.head, teacher.head)
    hidden = student.hidden.detach().requires_grad_()
    value = _sum_over_kept(LazyLogits(hidden, student.head), teacher, kept_mask, objective, weights)
    value.backward()
    assert hidden.grad is not None, "every hidden state is an input of the loss"
    return LossAndGrad(value.detach(), hidden.grad)


def _whole_rows(
    models: list[LazyLogits], objective: Objective, weights: Tensor | None, hidden_grad: Tensor, workspace: Workspace
) -> Tensor:
    """Gradients of one tile's rows by autograd on its logits, block by block; returns the objective per token, (n,)."""
    head, columns = models[0].head, slice(0, models[0].head.vocab_size)
    z, t = project(models, columns, workspace)
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
    head.backward(models[0].hidden, z, hidden_grad, columns)
    return torch.cat(values)


def _columns(
    models: list[LazyLogits],
    kl: str,
    normalizers: LogNormalizers,
    weights: Tensor | None,
    hidden_grad: Tensor,
    workspace: Workspace,
) -> None:
    """Gradients of one tile's rows from their log-normalizers, some columns at a time; `kl`: a key of COLUMN_GRADS."""
    head, column_grad = models[0].head, COLUMN_GRADS[kl]
    for columns in workspace.cut.columns():
        if workspace.cut.whole_rows:  # _log_normalizers has left the logits in the tiles
            z, t = workspace.tiles(len(hidden_grad), columns)
        else:
            z, t = project(models, columns, workspace)
        if device_kernels := kernels(z):
            grad = z if head.grad_dtype == z.dtype else torch.empty_like(z, dtype=head.grad_dtype)
            device_kernels.kl_grad(kl, z, t, normalizers, weights, head.softcap, out=grad)
            head.backward(models[0].hidden, grad, hidden_grad, columns)
            continue
        for rows in workspace.blocks(z):
            logits = z[rows]
            capped = logits.clone() if head.softcap is not None else None
            column_grad(logits, t[rows], workspace.scratch(0, logits), normalizers.at(rows))
            if weights is not None:
                logits.mul_(weights[rows, None])
            if capped is not None:
                head.softcap_backward_(logits, capped)
        head.backward(models[0].hidden, z, hidden_grad, columns)


def _first_pass(
    student: LazyLogits, teacher: LazyLogits, row_tiles: list[slice | Tensor], cut: Tiling
) -> list[LogNormalizers]:
    """The log-normalizers of each tile's rows, by two more GEMMs."""
    workspace = Workspace(cut, student.head.dtype, student.hidden.device, num_scratch=4)
    return [_log_normalizers([student[rows], teacher[rows]], workspace) for rows in row_tiles]


def _log_normalizers(models: list[LazyLogits], workspace: Workspace) -> LogNormalizers:
    """The log-normalizers of one tile's rows; if tiles hold whole rows, they hold these rows' logits afterwards."""
    sums: list[OnlineSoftmaxStats] = []
    for columns in workspace.cut.columns():
        sums = add_tile(sums, project(models, columns, workspace), workspace)
    return LogNormalizers.of(*sums)


def _sum_over_kept(
    student: LazyLogits, teacher: LazyLogits, kept_mask: Tensor, objective: Objective, weights: Tensor | None
) -> Tensor:
    """Differentiable. Separate function so its locals are freed before backward; only autograd keeps activations."""
    device = student.hidden.device
    kept_rows = to_device(kept_mask.nonzero().squeeze(-1), device)
    with torch.no_grad():
        teacher_logprobs = teacher.head.logits(teacher.hidden).index_select(0, kept_rows).log_softmax(-1)
    student_logprobs = student.head.logits(student.hidden).index_select(0, kept_rows).log_softmax(-1)
    per_token = objective.at(kept_rows).value(student_logprobs, teacher_logprobs)
    return (per_token if weights is None else per_token * to_device(weights, device)[kept_rows]).sum()
