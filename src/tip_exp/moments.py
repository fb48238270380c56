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

from tip_exp.tiles import Workspace


@dataclass(frozen=True, slots=True)
class Moments:
    """One model's sums, weighted by its own unnormalised probabilities e^(z - top); each (n,).

    `other_top` and `other` are of the other model's logits under this model's weights; None where it was not projected.
    """

    top: Tensor
    total: Tensor  # sum of e^(z - top)
    own: Tensor  # sum of e^(z - top) (z - top)
    other_top: Tensor | None
    other: Tensor | None  # sum of e^(z - top) (t - other_top)

    def merged(self, more: Moments) -> Moments:
        """The sums over two disjoint parts of the vocabulary."""
        top = torch.maximum(self.top, more.top)
        other_top = None
        if self.other_top is not None and more.other_top is not None:
            other_top = torch.maximum(self.other_top, more.other_top)
        a, b = self._relative_to(top, other_top), more._relative_to(top, other_top)
        other = None if a.other is None or b.other is None else a.other + b.other
        return Moments(top, a.total + b.total, a.own + b.own, other_top, other)

    def _relative_to(self, top: Tensor, other_top: Tensor | None) -> Moments:
        scale = torch.exp(self.top - top)
        own = scale * (self.own + (self.top - top) * self.total)
        other = None
        if self.other is not None and self.other_top is not None and other_top is not None:
            other = scale * (self.other + (self.other_top - other_top) * self.total)
        return Moments(top, scale * self.total, own, other_top, other)

    @property
    def log_normalizer(self) -> Tensor:
        return self.top + self.total.log()

    @property
    def entropy(self) -> Tensor:
        return self.total.log() - self.own / self.total

    def kl(self, other: Moments) -> Tensor:
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


def normalizers(student: Moments, teacher: Moments) -> Normalizers:
    return Normalizers(student.log_normalizer, teacher.log_normalizer, student.kl(teacher), teacher.kl(student))


def joined(parts: list[Normalizers]) -> Normalizers:
    """The normalisers of consecutive tokens, in order; at least one part."""
    fields = zip(*((part.student, part.teacher, part.reverse_kl, part.forward_kl) for part in parts), strict=True)
    return Normalizers(*(torch.cat(field) for field in fields))


def of_tile(
    z: Tensor, t: Tensor | None, work: Workspace, *, jsd_beta: float | None = None
) -> tuple[Moments, Moments | None, Tensor | None]:
    """Moments of one tile of student logits (n, c) and, if given, teacher logits; both end relative to their tops.

    With `jsd_beta`, the teacher's weight in the mixture, also the JSD, (n,), of rows that must then be whole.
    """
    n = len(z)
    found = z.new_empty(9, n)
    top, total, own, other, t_top, t_total, t_own, t_other, mixed = found.unbind()
    for rows in work.blocks(n):
        block = z[rows]
        weight = work.spare(0, block)
        block.sub_(torch.amax(block, -1, out=top[rows])[:, None])
        torch.exp(block, out=weight)
        torch.sum(weight, -1, out=total[rows])
        torch.linalg.vecdot(weight, block, out=own[rows])
        if t is None:
            continue
        theirs = t[rows]
        theirs.sub_(torch.amax(theirs, -1, out=t_top[rows])[:, None])
        torch.linalg.vecdot(weight, theirs, out=other[rows])
        t_weight = weight if jsd_beta is None else work.spare(1, block)
        torch.exp(theirs, out=t_weight)
        torch.sum(t_weight, -1, out=t_total[rows])
        torch.linalg.vecdot(t_weight, theirs, out=t_own[rows])
        torch.linalg.vecdot(t_weight, block, out=t_other[rows])
        if jsd_beta is not None:
            share = jsd_beta / (1 - jsd_beta) * total[rows] / t_total[rows]
            _mixed(block, weight, t_weight, share, mixed[rows])
    # What follows cancels large numbers, so it is done in float64: a few numbers a row.
    top, total, own, other, t_top, t_total, t_own, t_other, mixed = found.double().unbind()
    student = Moments(top, total, own, None if t is None else t_top, None if t is None else other)
    if t is None:
        return student, None, None
    teacher = Moments(t_top, t_total, t_own, top, t_other)
    if jsd_beta is None:
        return student, teacher, None
    # With m = beta q + (1 - beta) p, JSD = beta KL(q || p) - sum of m log(m / p).
    return student, teacher, jsd_beta * teacher.kl(student) - (1 - jsd_beta) * mixed / total - math.log1p(-jsd_beta)


def _mixed(z: Tensor, p: Tensor, q: Tensor, share: Tensor, out: Tensor) -> None:
    """Fill `out` with the sum of m (log m - z), m = p + share q, all unnormalised; `p` and `q` are overwritten."""
    p.addcmul_(q, share[:, None])
    p.clamp_(min=torch.finfo(p.dtype).tiny)  # where both vanish the log is merely finite: it has no weight
    torch.log(p, out=q)
    torch.linalg.vecdot(p, q.sub_(z), out=out)
