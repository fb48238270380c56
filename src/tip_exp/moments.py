"""Sums over the vocabulary, gathered tile by tile, from which entropies, KLs and normalisers of every token follow.

With logits z (student) and t (teacher), p and q their softmaxes: log-normalisers and E_p z, E_p t, E_q t, E_q z give
    H(p) = log Z_p - E_p z       KL(p || q) = (E_p z - log Z_p) - (E_p t - log Z_q)       and both with p, q exchanged.
All are kept relative to the largest logit seen so far, so that a peaked row loses no digits.
"""

from __future__ import annotations

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
    """What scoring learned about N tokens and the loss need not learn again; each (N,), nats."""

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


def of_tile(z: Tensor, t: Tensor | None, work: Workspace) -> tuple[Moments, Moments | None]:
    """Moments of one tile of student logits (n, c) and, if given, teacher logits; both end relative to their tops."""
    n = len(z)
    top, total, own, other, t_top, t_total, t_own, t_other = z.new_empty(8, n).unbind()
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
        torch.exp(theirs, out=weight)
        torch.sum(weight, -1, out=t_total[rows])
        torch.linalg.vecdot(weight, theirs, out=t_own[rows])
        torch.linalg.vecdot(weight, block, out=t_other[rows])
    if t is None:
        return Moments(top, total, own, None, None), None
    return Moments(top, total, own, t_top, other), Moments(t_top, t_total, t_own, top, t_other)
