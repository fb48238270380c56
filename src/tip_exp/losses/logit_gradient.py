"""Norm of a token's reverse-KL gradient at the student's logits, from sums accumulated tile by tile.

With probabilities p, q and u = z - t, the gradient is delta = p (log p/q - KL) = p (u - E_p u): the log-normalizers
cancel. Hence |delta|^2 = S_2 - 2 e S_1 + e^2 S_0  with  S_k = sum p^2 u^k  and  e = E_p u. Here u is relative to a
center near its mean in the tile of the student's likeliest token, so that nothing cancels where p -> 1 (e -> 0), and
sums are merged in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tip_exp.losses.tiling import row_dot, row_squares


@dataclass(frozen=True, slots=True)
class LogitGradientSums:
    """Sums over the columns seen so far; each (n,), float64. w = e^(z - max) and d = u - center."""

    max: Tensor  # max z
    total: Tensor  # sum of w
    center: Tensor
    gap_sum: Tensor  # sum of w d
    square_sum: Tensor  # sum of w^2
    square_gap_sum: Tensor  # sum of w^2 d
    square_gap2_sum: Tensor  # sum of w^2 d^2

    @classmethod
    def of_rows(cls, rows: Tensor) -> LogitGradientSums:
        """From rows as `block_sums` fills them, (7, n)."""
        return cls(*rows.double().unbind())

    def merge(self, sums: LogitGradientSums) -> LogitGradientSums:
        """The sums over the union of two disjoint sets of columns."""
        new_max = torch.maximum(self.max, sums.max)
        center = torch.where(sums.max > self.max, sums.center, self.center)
        a, b = self._rescaled(new_max, center), sums._rescaled(new_max, center)
        return LogitGradientSums(
            new_max,
            a.total + b.total,
            center,
            a.gap_sum + b.gap_sum,
            a.square_sum + b.square_sum,
            a.square_gap_sum + b.square_gap_sum,
            a.square_gap2_sum + b.square_gap2_sum,
        )

    def _rescaled(self, new_max: Tensor, center: Tensor) -> LogitGradientSums:
        """The same sums relative to another maximum and center."""
        scale, shift = torch.exp(self.max - new_max), self.center - center
        square_gap2_sum = self.square_gap2_sum + 2 * shift * self.square_gap_sum + shift**2 * self.square_sum
        return LogitGradientSums(
            new_max,
            scale * self.total,
            center,
            scale * (self.gap_sum + shift * self.total),
            scale**2 * self.square_sum,
            scale**2 * (self.square_gap_sum + shift * self.square_sum),
            scale**2 * square_gap2_sum,
        )

    @property
    def norm(self) -> Tensor:
        """|dKL(p || q) / dz|, nats, (n,)."""
        e = self.gap_sum / self.total
        squared = self.square_gap2_sum - 2 * e * self.square_gap_sum + e**2 * self.square_sum
        return squared.clamp(min=0).sqrt() / self.total


def block_sums(z: Tensor, t: Tensor, weights: Tensor, rows: Tensor, scratch: tuple[Tensor, Tensor]) -> None:
    """Fill `rows` (7, n): max z, sum of `weights`, the center c, and four sums with d = u - c.

    z, t: logits (n, c); weights = e^(z - max z). The first two rows are filled already, and so is c, E_p u rounded: far
    from it, a sum of squares would be a small difference of large ones.
    """
    _, _, center, gap_sum, square_sum, square_gap_sum, square_gap2_sum = rows.unbind()
    product, weighted_gap = scratch
    torch.sub(z, t, out=weighted_gap).sub_(center[:, None]).mul_(weights)
    torch.sum(weighted_gap, -1, out=gap_sum)
    row_dot(weights, weighted_gap, product, out=square_gap_sum)
    row_squares(weights, product, out=square_sum)
    row_squares(weighted_gap, product, out=square_gap2_sum)
