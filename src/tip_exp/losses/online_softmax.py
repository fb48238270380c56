"""Softmax sums accumulated tile by tile, from which entropies, KLs and log-normalizers of every token follow.

With student logits z, teacher logits t and their softmaxes p, q, the sums log Z_p, E_p z, E_p t, log Z_q, E_q t, E_q z
give  H(p) = log Z_p - E_p z  and  KL(p || q) = (E_p z - log Z_p) - (E_p t - log Z_q), and both with p and q exchanged.
All sums are relative to the largest logit so far (a peaked row loses no digits) and merged in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from tip_exp.losses.logit_gradient import LogitGradientSums, block_sums
from tip_exp.losses.tiling import GROUP, Workspace, exp, kernels, row_dot


@dataclass(frozen=True, slots=True)
class OnlineSoftmaxStats:
    """One model's sums over the columns seen so far, weighted by e^(z - max); each (n,), float64.

    x are the other model's logits, or z itself if no other model was projected.
    """

    max: Tensor  # max z
    cross_max: Tensor  # max x
    total: Tensor  # sum of e^(z - max)
    self_sum: Tensor  # sum of e^(z - max) (z - max)
    cross_sum: Tensor  # sum of e^(z - max) (x - cross_max)
    gradient: LogitGradientSums | None = None  # of the student, where wanted
    mixture_sum: Tensor | None = None  # of the student's whole row, where wanted: see `jsd`

    def merge(self, stats: OnlineSoftmaxStats) -> OnlineSoftmaxStats:
        """The sums over the union of two disjoint sets of columns."""
        maxima = torch.maximum(self.max, stats.max), torch.maximum(self.cross_max, stats.cross_max)
        a, b = self._rescaled(*maxima), stats._rescaled(*maxima)
        totals = a.total + b.total, a.self_sum + b.self_sum, a.cross_sum + b.cross_sum
        if self.gradient is None or stats.gradient is None:
            return OnlineSoftmaxStats(*maxima, *totals)
        return OnlineSoftmaxStats(*maxima, *totals, self.gradient.merge(stats.gradient))

    def _rescaled(self, new_max: Tensor, new_cross_max: Tensor) -> OnlineSoftmaxStats:
        """The same sums relative to new maxima."""
        scale = torch.exp(self.max - new_max)
        self_sum = scale * (self.self_sum + (self.max - new_max) * self.total)
        cross_sum = scale * (self.cross_sum + (self.cross_max - new_cross_max) * self.total)
        return OnlineSoftmaxStats(new_max, new_cross_max, scale * self.total, self_sum, cross_sum)

    @property
    def log_normalizer(self) -> Tensor:
        """log Z = log sum e^z, (n,)."""
        return self.max + self.total.log()

    @property
    def entropy(self) -> Tensor:
        """H(p) = log Z - E_p z, nats, (n,)."""
        return self.total.log() - self.self_sum / self.total

    def kl(self, target: OnlineSoftmaxStats) -> Tensor:
        """KL(self || target), nats, (n,); rounding can make it slightly negative. `target`: the other model's sums."""
        return self.self_sum / self.total - self.total.log() - (self.cross_sum / self.total - target.total.log())


class LogNormalizers(NamedTuple):
    """Log-normalizers and KLs of N tokens, computed with the statistics and reused by the loss; (N,), float64, nats."""

    student: Tensor  # log Z_p
    teacher: Tensor  # log Z_q
    reverse_kl: Tensor
    forward_kl: Tensor

    @classmethod
    def of(cls, student: OnlineSoftmaxStats, teacher: OnlineSoftmaxStats) -> LogNormalizers:
        return cls(student.log_normalizer, teacher.log_normalizer, student.kl(teacher), teacher.kl(student))

    def at(self, rows: Tensor | slice) -> LogNormalizers:
        """The log-normalizers of the tokens at `rows`."""
        return LogNormalizers(*(values[rows] for values in self))


def add_tile(
    sums: list[OnlineSoftmaxStats],
    tiles: Sequence[Tensor],
    workspace: Workspace,
    group_maxima: Tensor | None = None,
    *,
    with_gradient: bool = False,
    jsd_beta: float | None = None,
) -> list[OnlineSoftmaxStats]:
    """Each model's sums after one more tile of columns; `sums` is empty before the first. Else as `tile_stats`."""
    if device_kernels := kernels(tiles[0]):
        rows = device_kernels.add_tile(_as_rows(sums), *tiles, group_maxima=group_maxima)
        merged = _as_stats(rows, len(tiles))
        if with_gradient:
            gradient = LogitGradientSums.of_rows(device_kernels.logit_gradient_sums(*tiles))
            previous = sums[0].gradient if sums else None
            merged[0] = replace(merged[0], gradient=previous.merge(gradient) if previous else gradient)
        if jsd_beta is not None:
            maxima = (part.max.to(tiles[0].dtype) for part in merged)
            ratio = _mixture_ratio(merged[0].total, merged[1].total, jsd_beta).to(tiles[0].dtype)
            merged[0] = replace(merged[0], mixture_sum=device_kernels.mixture_sum(*tiles, *maxima, ratio))
        return merged
    tile_sums = tile_stats(tiles, workspace, group_maxima, with_gradient=with_gradient, jsd_beta=jsd_beta)
    return [a.merge(b) for a, b in zip(sums, tile_sums, strict=True)] if sums else tile_sums


def tile_stats(
    tiles: Sequence[Tensor],
    workspace: Workspace,
    group_maxima: Tensor | None = None,
    *,
    with_gradient: bool = False,
    jsd_beta: float | None = None,
) -> list[OnlineSoftmaxStats]:
    """Each model's sums over one tile of logits (n, c): the student's and, if given, the teacher's.

    `group_maxima`, (models, n, c // GROUP or 0), receives the largest logit of each full group of columns.
    `with_gradient` adds the sums of the student's gradient; `jsd_beta`, the teacher's weight in a mixture, adds the sum
    of `jsd` and needs whole rows. Uses scratch blocks 0 to 3, and 4 for either of them.
    """
    z, t = tiles if len(tiles) == 2 else (tiles[0], None)
    if group_maxima is None:
        group_maxima = z.new_empty(2, len(z), 0)
    sums = z.new_empty(8, len(z))
    z_max, z_total, z_self, z_cross, t_max, t_total, t_self, t_cross = sums.unbind()
    gradient_sums = z.new_empty(7, len(z)) if with_gradient else None
    mixture_sum = None if jsd_beta is None else z.new_empty(len(z))
    for rows in workspace.blocks(z):
        block = z[rows]
        z_shifted, p, product = (workspace.scratch(i, block) for i in range(3))
        _row_max(block, z_max[rows], group_maxima[0][rows])
        torch.sub(block, z_max[rows, None], out=z_shifted)
        torch.sum(exp(z_shifted, out=p), -1, out=z_total[rows])
        row_dot(p, z_shifted, product, out=z_self[rows])
        if t is None:
            continue
        block, t_shifted = t[rows], workspace.scratch(3, block)
        _row_max(block, t_max[rows], group_maxima[1][rows])
        torch.sub(block, t_max[rows, None], out=t_shifted)
        row_dot(p, t_shifted, product, out=z_cross[rows])
        if gradient_sums is not None:
            gradient_sums[:2, rows] = sums[:2, rows]
            gradient_sums[2, rows] = z_max[rows] - t_max[rows] + (z_self[rows] - z_cross[rows]) / z_total[rows]
            block_sums(z[rows], block, p, gradient_sums[:, rows], (product, workspace.scratch(4, block)))
        q = p if mixture_sum is None else workspace.scratch(4, block)
        torch.sum(exp(t_shifted, out=q), -1, out=t_total[rows])
        row_dot(q, t_shifted, product, out=t_self[rows])
        row_dot(q, z_shifted, product, out=t_cross[rows])
        if mixture_sum is not None and jsd_beta is not None:
            ratio = _mixture_ratio(z_total[rows].double(), t_total[rows].double(), jsd_beta).to(z.dtype)
            m = p.addcmul_(q, ratio[:, None])
            m.clamp_(min=torch.finfo(m.dtype).tiny)  # keeps log finite where p and q underflow; m log m is 0 there
            row_dot(m, torch.log(m, out=q).sub_(z_shifted), product, out=mixture_sum[rows])
    # float64 from here: KLs are small differences of large sums, and there are only eight numbers per row.
    stats = _as_stats(sums.double(), len(tiles))
    if gradient_sums is not None:
        stats[0] = replace(stats[0], gradient=LogitGradientSums.of_rows(gradient_sums))
    return stats if mixture_sum is None else [replace(stats[0], mixture_sum=mixture_sum), stats[1]]


def _as_stats(rows: Tensor, num_models: int) -> list[OnlineSoftmaxStats]:
    """The eight rows of sums, (8, n): the maximum, total, self sum and cross sum of the student, then the teacher's."""
    z_max, z_total, z_self, z_cross, t_max, t_total, t_self, t_cross = rows.unbind()
    if num_models == 1:
        return [OnlineSoftmaxStats(z_max, z_max, z_total, z_self, z_self)]
    student = OnlineSoftmaxStats(z_max, t_max, z_total, z_self, z_cross)
    return [student, OnlineSoftmaxStats(t_max, z_max, t_total, t_self, t_cross)]


def _as_rows(sums: list[OnlineSoftmaxStats]) -> Tensor | None:
    """The inverse of `_as_stats`; None if there are no sums yet."""
    if not sums:
        return None
    student, teacher = sums[0], sums[-1]
    return torch.stack([values for s in (student, teacher) for values in (s.max, s.total, s.self_sum, s.cross_sum)])


def _row_max(block: Tensor, out: Tensor, group_maxima: Tensor) -> None:
    """Write each row's maximum to `out` (n,) and the maxima of full groups of columns to `group_maxima` (n, g)."""
    num_groups = group_maxima.shape[1]
    if num_groups == 0:
        torch.amax(block, -1, out=out)
        return
    torch.amax(block[:, : num_groups * GROUP].unflatten(-1, (num_groups, GROUP)), -1, out=group_maxima)
    torch.amax(group_maxima, -1, out=out)
    if num_groups * GROUP < block.shape[1]:
        torch.maximum(out, block[:, num_groups * GROUP :].amax(-1), out=out)


def jsd(student: OnlineSoftmaxStats, teacher: OnlineSoftmaxStats, beta: float) -> Tensor:
    """JSD from whole rows' sums, nats, (n,); `beta` is the teacher's weight in the mixture m.

    JSD = beta KL(q || p) - sum of m log(m / p)  with  m = beta q + (1 - beta) p. `mixture_sum` is this sum for
    m = e^(z - max z) + ratio e^(t - max t), which is the mixture times total / (1 - beta), and unnormalized p.
    """
    assert student.mixture_sum is not None, "it is wanted"
    return beta * teacher.kl(student) - (1 - beta) * student.mixture_sum / student.total - math.log1p(-beta)


def _mixture_ratio(student_total: Tensor, teacher_total: Tensor, beta: float) -> Tensor:
    """The weight of unnormalized q beside unnormalized p in the mixture, (n,)."""
    return beta / (1 - beta) * student_total / teacher_total
