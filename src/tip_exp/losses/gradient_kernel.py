"""Triton kernel for the sums of logit_gradient.py, launched only where `grad_norm` is wanted: 8 bytes read per pair."""

# pyright: reportMissingImports=false, reportMissingModuleSource=false, reportIndexIssue=false

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from tip_exp.losses.tiling import block_width, tile_columns

LOW = tl.constexpr(-3.0e38)  # below any logit; finite, so that LOW - LOW is 0
GAP_BLOCK, GAP_WARPS = 1024, 8  # columns in registers at a time: 4 a thread


@no_type_check
@triton.jit
def _recentered(total, gap_sum, square_sum, square_gap_sum, square_gap2_sum, scale, shift):
    """LogitGradientSums._rescaled; shift: old center - new center."""
    square_gap2_sum = scale * scale * (square_gap2_sum + shift * (2 * square_gap_sum + shift * square_sum))
    square_gap_sum = scale * scale * (square_gap_sum + shift * square_sum)
    return scale * total, scale * (gap_sum + shift * total), scale * scale * square_sum, square_gap_sum, square_gap2_sum


@no_type_check
@triton.jit
def logit_gradient_kernel(Z, T, SUMS, num_columns, stride, BLOCK: tl.constexpr):
    """One program a row. Each lane keeps the sums of every BLOCK-th column, relative to u at its own largest z."""
    row, num_rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    lane = tl.arange(0, BLOCK)
    dtype: tl.constexpr = Z.dtype.element_ty
    z_max, top_gap = tl.full([BLOCK], LOW, dtype), tl.zeros([BLOCK], dtype)
    total, gap_sum, s0 = tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype)
    s1, s2 = tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype)
    for start in range(0, num_columns, BLOCK):
        inside = start + lane < num_columns
        z = tl.load(Z + row * stride + start + lane, mask=inside, other=LOW)
        gap = z - tl.load(T + row * stride + start + lane, mask=inside, other=LOW)
        new_max, new_gap = tl.maximum(z_max, z), tl.where(z > z_max, gap, top_gap)
        scale, shift = tl.exp(z_max - new_max), top_gap - new_gap
        total, gap_sum, s0, s1, s2 = _recentered(total, gap_sum, s0, s1, s2, scale, shift)
        z_max, top_gap = new_max, new_gap
        p = tl.where(inside, tl.exp(z - z_max), 0.0)
        weighted_gap = p * (gap - top_gap)
        total, gap_sum, s0 = total + p, gap_sum + weighted_gap, s0 + p * p
        s1, s2 = s1 + p * weighted_gap, s2 + weighted_gap * weighted_gap
    row_max = tl.max(z_max, 0)
    row_gap = tl.sum(tl.where(lane == tl.argmax(z_max, 0), top_gap, 0.0), 0).to(tl.float64)
    scale, shift = tl.exp(z_max - row_max).to(tl.float64), top_gap.to(tl.float64) - row_gap
    total, gap_sum, s0, s1, s2 = _recentered(
        total.to(tl.float64),
        gap_sum.to(tl.float64),
        s0.to(tl.float64),
        s1.to(tl.float64),
        s2.to(tl.float64),
        scale,
        shift,
    )
    tl.store(SUMS + row, row_max)
    tl.store(SUMS + row + num_rows, tl.sum(total, 0))
    tl.store(SUMS + row + 2 * num_rows, row_gap)
    tl.store(SUMS + row + 3 * num_rows, tl.sum(gap_sum, 0))
    tl.store(SUMS + row + 4 * num_rows, tl.sum(s0, 0))
    tl.store(SUMS + row + 5 * num_rows, tl.sum(s1, 0))
    tl.store(SUMS + row + 6 * num_rows, tl.sum(s2, 0))


def logit_gradient_sums(z: Tensor, t: Tensor) -> Tensor:
    """The rows that `LogitGradientSums.of_rows` takes, (7, n) float64, of one tile of logits (n, c)."""
    sums = torch.empty(7, len(z), dtype=torch.float64, device=z.device)
    block = block_width(z, GAP_BLOCK)
    with torch.cuda.device_of(z):
        logit_gradient_kernel[(len(z),)](z, t, sums, *tile_columns(z, t), BLOCK=block, num_warps=GAP_WARPS)
    return sums
