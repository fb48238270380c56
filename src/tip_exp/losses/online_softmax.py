"""Sums over the vocabulary, gathered tile by tile, from which entropies, KLs and normalisers of every token follow.

With logits z (student) and t (teacher), p and q their softmaxes: log-normalisers and E_p z, E_p t, E_q t, E_q z give
    H(p) = log Z_p - E_p z       KL(p || q) = (E_p z - log Z_p) - (E_p t - log Z_q)       and both with p, q exchanged.
All are kept relative to the largest logit seen so far, so that a peaked row loses no digits, and in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tip_exp.losses.tiling import GROUP, Workspace, exp


@dataclass(frozen=True, slots=True)
class OnlineSoftmaxStats:
    """One model's sums, weighted by its own unnormalised probabilities e^(z - top); each (n,).

    `other_top` and `other` are of the other model's logits under this model's weights; None where it was not projected.
    """

    top: Tensor
    total: Tensor  # sum of e^(z - top)
    own: Tensor  # sum of e^(z - top) (z - top)
    other_top: Tensor | None
    other: Tensor | None  # sum of e^(z - top) (t - other_top)

    def merged(self, more: OnlineSoftmaxStats) -> OnlineSoftmaxStats:
        """The sums over two disjoint parts of the vocabulary."""
        top = torch.maximum(self.top, more.top)
        other_top = None
        if self.other_top is not None and more.other_top is not None:
            other_top = torch.maximum(self.other_top, more.other_top)
        a, b = self._relative_to(top, other_top), more._relative_to(top, other_top)
        other = None if a.other is None or b.other is None else a.other + b.other
        return OnlineSoftmaxStats(top, a.total + b.total, a.own + b.own, other_top, other)

    def _relative_to(self, top: Tensor, other_top: Tensor | None) -> OnlineSoftmaxStats:
        scale = torch.exp(self.top - top)
        own = scale * (self.own + (self.top - top) * self.total)
        other = None
        if self.other is not None and self.other_top is not None and other_top is not None:
            other = scale * (self.other + (self.other_top - other_top) * self.total)
        return OnlineSoftmaxStats(top, scale * self.total, own, other_top, other)

    @property
    def log_normalizer(self) -> Tensor:
        return self.top + self.total.log()

    @property
    def entropy(self) -> Tensor:
        return self.total.log() - self.own / self.total

    def kl(self, other: OnlineSoftmaxStats) -> Tensor:
        """KL(this || other), nats; rounding can take it a hair below zero."""
        assert self.other is not None, "both models must have been projected"
        return self.own / self.total - self.total.log() - (self.other / self.total - other.total.log())


@dataclass(frozen=True, slots=True)
class Normalizers:
    """What scoring learned about N tokens and the loss need not learn again; each (N,), float64, nats."""

    student: Tensor  # log Z_p
    teacher: Tensor  # log Z_q
    reverse_kl: Tensor
    forward_kl: Tensor

    def __getitem__(self, rows: Tensor | slice) -> Normalizers:
        return Normalizers(self.student[rows], self.teacher[rows], self.reverse_kl[rows], self.forward_kl[rows])


def normalizers(student: OnlineSoftmaxStats, teacher: OnlineSoftmaxStats) -> Normalizers:
    return Normalizers(student.log_normalizer, teacher.log_normalizer, student.kl(teacher), teacher.kl(student))


def joined(parts: list[Normalizers]) -> Normalizers:
    """The normalisers of consecutive tokens, in order; at least one part."""
    fields = zip(*((part.student, part.teacher, part.reverse_kl, part.forward_kl) for part in parts), strict=True)
    return Normalizers(*(torch.cat(field) for field in fields))


def of_tile(
    z: Tensor, t: Tensor | None = None, *, work: Workspace, maxima: tuple[Tensor, ...] | None = None
) -> tuple[OnlineSoftmaxStats, OnlineSoftmaxStats | None]:
    """OnlineSoftmaxStats of one tile of student logits (n, c) and, if given, teacher logits; takes three spare blocks.

    `maxima`, (n, c // GROUP) of each model, are filled with the largest logit of each whole group of columns.
    """
    found = z.new_empty(8, len(z))
    top, total, own, other, t_top, t_total, t_own, t_other = found.unbind()
    for rows in work.blocks(z):
        block = z[rows]
        ours, weight = work.spare(0, block), work.spare(1, block)
        _largest(block, top[rows], None if maxima is None else maxima[0][rows])
        torch.sub(block, top[rows, None], out=ours)
        torch.sum(exp(ours, out=weight), -1, out=total[rows])
        torch.linalg.vecdot(weight, ours, out=own[rows])
        if t is None:
            continue
        block, theirs = t[rows], work.spare(2, block)
        _largest(block, t_top[rows], None if maxima is None else maxima[1][rows])
        torch.sub(block, t_top[rows, None], out=theirs)
        torch.linalg.vecdot(weight, theirs, out=other[rows])
        torch.sum(exp(theirs, out=weight), -1, out=t_total[rows])
        torch.linalg.vecdot(weight, theirs, out=t_own[rows])
        torch.linalg.vecdot(weight, ours, out=t_other[rows])
    # What follows cancels large numbers, so it is done in float64: a few numbers a row.
    top, total, own, other, t_top, t_total, t_own, t_other = found.double().unbind()
    if t is None:
        return OnlineSoftmaxStats(top, total, own, None, None), None
    return OnlineSoftmaxStats(top, total, own, t_top, other), OnlineSoftmaxStats(t_top, t_total, t_own, top, t_other)


def _largest(block: Tensor, out: Tensor, maxima: Tensor | None) -> None:
    """Fill `out`, (n,), with each row's largest, and `maxima` with those of whole groups of columns."""
    if maxima is None or maxima.shape[1] == 0:
        torch.amax(block, -1, out=out)
        return
    groups = maxima.shape[1]
    torch.amax(block[:, : groups * GROUP].unflatten(-1, (groups, GROUP)), -1, out=maxima)
    torch.amax(maxima, -1, out=out)
    if groups * GROUP < block.shape[1]:
        torch.maximum(out, block[:, groups * GROUP :].amax(-1), out=out)


def jsd(
    z: Tensor, t: Tensor, student: OnlineSoftmaxStats, teacher: OnlineSoftmaxStats, beta: float, work: Workspace
) -> Tensor:
    """JSD of whole rows of logits (n, V) whose moments are known, (n,); `beta` is the teacher's weight in the mixture.

    With m = beta q + (1 - beta) p, it is beta KL(q || p) - sum of m log(m / p). Takes three spare blocks.
    """
    found = torch.empty_like(z[:, 0])
    top, t_top = student.top.to(z.dtype), teacher.top.to(z.dtype)
    share = (beta / (1 - beta) * student.total / teacher.total).to(z.dtype)
    for rows in work.blocks(z):
        block = z[rows]
        ours, m, q = (work.spare(i, block) for i in range(3))  # m and q not yet normalised, nor is p
        exp(torch.sub(t[rows], t_top[rows, None], out=m), out=q)
        exp(torch.sub(block, top[rows, None], out=ours), out=m)
        m.addcmul_(q, share[rows, None])
        m.clamp_(min=torch.finfo(m.dtype).tiny)  # where both vanish the log is merely finite: it has no weight
        torch.linalg.vecdot(m, torch.log(m, out=q).sub_(ours), out=found[rows])
    return beta * teacher.kl(student) - (1 - beta) * found / student.total - math.log1p(-beta)
