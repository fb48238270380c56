"""Triton kernels for tiles of logits on CUDA; imported there only, where torch's wheel brings Triton.

Per (token, vocabulary id) pair of float32 logits, `add_tile` and `mixture_sum` move 8 bytes: each logit is read once.
`kl_grad` reads 8 and writes the gradient, 4 bytes or 2. The torch operators of online_softmax.py and divergence.py are
their reference. Triton's interpreter runs them in tests/cuda, which also compiles them for sm_80 and sm_90; they have
not run on a GPU.
"""

# pyright: reportMissingImports=false, reportMissingModuleSource=false, reportIndexIssue=false

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from tip_exp.losses.gradient_kernel import logit_gradient_sums as logit_gradient_sums
from tip_exp.losses.online_softmax import LogNormalizers
from tip_exp.losses.tiling import GROUP, block_width, tile_columns

LOW = tl.constexpr(-3.0e38)  # below any logit; finite, so that LOW - LOW is 0
ROW_BLOCK, GRAD_BLOCK = 2048, 1024  # columns in registers at a time: 8 a thread
ROW_WARPS, GRAD_WARPS = 8, 4


@no_type_check
@triton.jit
def _rescaled(total, self_sum, cross_sum, shift, cross_shift):
    """OnlineSoftmaxStats._rescaled; shift: old maximum - new maximum."""
    scale = tl.exp(shift)
    return scale * total, scale * (self_sum + shift * total), scale * (cross_sum + cross_shift * total)


@no_type_check
@triton.jit
def _load_rescaled(sums, num_rows, shift, cross_shift):
    total, self_sum = tl.load(sums + num_rows), tl.load(sums + 2 * num_rows)
    return _rescaled(total, self_sum, tl.load(sums + 3 * num_rows), shift, cross_shift)


@no_type_check
@triton.jit
def _store_sums(sums, num_rows, maximum, total, self_sum, cross_sum):
    tl.store(sums, maximum)
    tl.store(sums + num_rows, total)
    tl.store(sums + 2 * num_rows, self_sum)
    tl.store(sums + 3 * num_rows, cross_sum)


@no_type_check
@triton.jit
def add_tile_kernel(
    Z,
    T,
    SUMS,
    MAXIMA,
    num_columns,
    stride,
    num_groups,
    model_stride,
    row_stride,
    HAS_TEACHER: tl.constexpr,
    IS_FIRST: tl.constexpr,
    HAS_MAXIMA: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row. Each lane keeps the sums of every BLOCK-th column; they are merged once at the end."""
    row, num_rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    lane = tl.arange(0, BLOCK)
    dtype: tl.constexpr = Z.dtype.element_ty
    z_max, t_max = tl.full([BLOCK], LOW, dtype), tl.full([BLOCK], LOW, dtype)
    z_total, z_self, z_cross = tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype)
    t_total, t_self, t_cross = tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype)
    for start in range(0, num_columns, BLOCK):
        inside = start + lane < num_columns
        z = tl.load(Z + row * stride + start + lane, mask=inside, other=LOW)
        t = z
        if HAS_TEACHER:
            t = tl.load(T + row * stride + start + lane, mask=inside, other=LOW)
        if HAS_MAXIMA:
            group = start // GROUP + tl.arange(0, BLOCK // GROUP)
            maxima = MAXIMA + row * row_stride + group
            tl.store(maxima, tl.max(tl.reshape(z, (BLOCK // GROUP, GROUP)), 1), mask=group < num_groups)
            if HAS_TEACHER:
                t_maxima = tl.max(tl.reshape(t, (BLOCK // GROUP, GROUP)), 1)
                tl.store(maxima + model_stride, t_maxima, mask=group < num_groups)
        new_z_max, new_t_max = tl.maximum(z_max, z), tl.maximum(t_max, t)
        z_shift, t_shift = z_max - new_z_max, t_max - new_t_max
        z_total, z_self, z_cross = _rescaled(z_total, z_self, z_cross, z_shift, t_shift)
        t_total, t_self, t_cross = _rescaled(t_total, t_self, t_cross, t_shift, z_shift)
        z_max, t_max = new_z_max, new_t_max
        z, t = z - z_max, t - t_max
        p, q = tl.where(inside, tl.exp(z), 0.0), tl.where(inside, tl.exp(t), 0.0)
        z_total, z_self, z_cross = z_total + p, z_self + p * z, z_cross + p * t
        t_total, t_self, t_cross = t_total + q, t_self + q * t, t_cross + q * z
    z_top, t_top = tl.max(z_max, 0), tl.max(t_max, 0)
    z_total, z_self, z_cross = _rescaled(z_total, z_self, z_cross, z_max - z_top, t_max - t_top)
    t_total, t_self, t_cross = _rescaled(t_total, t_self, t_cross, t_max - t_top, z_max - z_top)
    z_top, t_top = z_top.to(tl.float64), t_top.to(tl.float64)
    z_total, t_total = tl.sum(z_total, 0).to(tl.float64), tl.sum(t_total, 0).to(tl.float64)
    z_self, t_self = tl.sum(z_self, 0).to(tl.float64), tl.sum(t_self, 0).to(tl.float64)
    z_cross, t_cross = tl.sum(z_cross, 0).to(tl.float64), tl.sum(t_cross, 0).to(tl.float64)
    z_sums, t_sums = SUMS + row, SUMS + row + 4 * num_rows
    if not IS_FIRST:  # merge with the columns before
        new_z_max, new_t_max = tl.maximum(z_top, tl.load(z_sums)), tl.maximum(t_top, tl.load(t_sums))
        z_shift, t_shift = z_top - new_z_max, t_top - new_t_max
        z_total, z_self, z_cross = _rescaled(z_total, z_self, z_cross, z_shift, t_shift)
        t_total, t_self, t_cross = _rescaled(t_total, t_self, t_cross, t_shift, z_shift)
        z_shift, t_shift = tl.load(z_sums) - new_z_max, tl.load(t_sums) - new_t_max
        total, self_sum, cross_sum = _load_rescaled(z_sums, num_rows, z_shift, t_shift)
        z_total, z_self, z_cross = z_total + total, z_self + self_sum, z_cross + cross_sum
        total, self_sum, cross_sum = _load_rescaled(t_sums, num_rows, t_shift, z_shift)
        t_total, t_self, t_cross = t_total + total, t_self + self_sum, t_cross + cross_sum
        z_top, t_top = new_z_max, new_t_max
    _store_sums(z_sums, num_rows, z_top, z_total, z_self, z_cross)
    _store_sums(t_sums, num_rows, t_top, t_total, t_self, t_cross)


@no_type_check
@triton.jit
def mixture_sum_kernel(Z, T, Z_MAX, T_MAX, RATIO, SUM, num_columns, stride, TINY: tl.constexpr, BLOCK: tl.constexpr):
    """One program a row: sum of m (log m - z + max z) with m = e^(z - max z) + ratio e^(t - max t)."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    dtype: tl.constexpr = Z.dtype.element_ty
    z_max, t_max, ratio = tl.load(Z_MAX + row), tl.load(T_MAX + row), tl.load(RATIO + row)
    total = tl.zeros([BLOCK], dtype)
    for start in range(0, num_columns, BLOCK):
        inside = start + lane < num_columns
        z = tl.load(Z + row * stride + start + lane, mask=inside, other=LOW) - z_max
        t = tl.load(T + row * stride + start + lane, mask=inside, other=LOW) - t_max
        m = tl.maximum(tl.exp(z) + ratio * tl.exp(t), TINY)  # log stays finite; the term is m log m = 0
        total += tl.where(inside, m * (tl.log(m) - z), 0.0)
    tl.store(SUM + row, tl.sum(total, 0))


@no_type_check
@triton.jit
def kl_grad_kernel(
    Z,
    T,
    GRAD,
    STUDENT,
    TEACHER,
    REVERSE_KL,
    WEIGHTS,
    num_columns,
    stride,
    grad_stride,
    softcap,
    IS_REVERSE: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for BLOCK columns of a row; GRAD may be Z."""
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = Z.dtype.element_ty
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < num_columns
    z = tl.load(Z + row * stride + column, mask=inside, other=0.0)
    t = tl.load(T + row * stride + column, mask=inside, other=0.0)
    student, teacher = tl.load(STUDENT + row), tl.load(TEACHER + row)  # log-normalizers, float64
    p = tl.exp(z - student.to(dtype))
    if IS_REVERSE:  # d KL(p || q) / dz = p (log p/q - KL); the three large terms are added in float64
        grad = p * (z - t - (student - teacher + tl.load(REVERSE_KL + row)).to(dtype))
    else:  # d KL(q || p) / dz = p - q
        grad = p - tl.exp(t - teacher.to(dtype))
    if HAS_WEIGHTS:
        grad *= tl.load(WEIGHTS + row)
    if HAS_SOFTCAP:  # d softcap / dx = 1 - (z / c)^2
        grad *= 1.0 - (z / softcap) * (z / softcap)
    tl.store(GRAD + row * grad_stride + column, grad.to(GRAD.dtype.element_ty), mask=inside)


def add_tile(running: Tensor | None, z: Tensor, t: Tensor | None = None, *, group_maxima: Tensor | None) -> Tensor:
    """The eight rows of sums of `online_softmax._as_stats`, (8, n) float64, after one more tile of logits (n, c).

    `running`: the sums before, changed in place. Fills `group_maxima` as `tile_stats` does.
    """
    sums = torch.empty(8, len(z), dtype=torch.float64, device=z.device) if running is None else running
    assert sums.is_contiguous(), "rows of sums are addressed by the number of tokens"
    maxima = z.new_empty(1, 1, 0) if group_maxima is None else group_maxima
    with torch.cuda.device_of(z):
        add_tile_kernel[(len(z),)](
            z,
            z if t is None else t,
            sums,
            maxima,
            *tile_columns(z, z if t is None else t),
            maxima.shape[-1],
            *maxima.stride()[:2],
            HAS_TEACHER=t is not None,
            IS_FIRST=running is None,
            HAS_MAXIMA=maxima.shape[-1] > 0,
            GROUP=GROUP,
            BLOCK=block_width(z, ROW_BLOCK),
            num_warps=ROW_WARPS,
        )
    return sums


def mixture_sum(z: Tensor, t: Tensor, z_max: Tensor, t_max: Tensor, ratio: Tensor) -> Tensor:
    """As `online_softmax._mixture_sum`, (n,)."""
    total, constants = torch.empty_like(z_max), {"TINY": torch.finfo(z.dtype).tiny, "BLOCK": block_width(z, ROW_BLOCK)}
    with torch.cuda.device_of(z):
        mixture_sum_kernel[(len(z),)](
            z, t, z_max, t_max, ratio, total, *tile_columns(z, t), **constants, num_warps=ROW_WARPS
        )
    return total


def kl_grad(
    kl: str,
    z: Tensor,
    t: Tensor,
    normalizers: LogNormalizers,
    weights: Tensor | None,
    softcap: float | None,
    *,
    out: Tensor,
) -> None:
    """Gradient of a KL (a key of divergence.COLUMN_GRADS) at the logits before their soft cap; `out` may be z."""
    block = block_width(z, GRAD_BLOCK)
    with torch.cuda.device_of(z):
        kl_grad_kernel[(len(z), triton.cdiv(z.shape[1], block))](
            z,
            t,
            out,
            *normalizers[:3],
            z if weights is None else weights,
            *tile_columns(z, t),
            out.stride(0),
            softcap or 1.0,
            IS_REVERSE=kl == "reverse_kl",
            HAS_WEIGHTS=weights is not None,
            HAS_SOFTCAP=softcap is not None,
            BLOCK=block,
            num_warps=GRAD_WARPS,
        )
