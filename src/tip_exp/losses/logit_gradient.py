"""Norm of a token's reverse-KL gradient at the student's logits, from sums accumulated tile by tile.

With probabilities p, q and u = z - t, the gradient is delta = p (log p/q - KL) = p (u - E_p u): the log-normalizers
cancel. Hence |delta|^2 = S_2 - 2 e S_1 + e^2 S_0  with  S_k = sum p^2 u^k  and  e = E_p u. Here u is relative to its
value at the student's likeliest token, so that nothing cancels where p -> 1 (e -> 0), and sums are merged in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tip_exp.losses.tiling import row_dot

LOWERING = 1e6  # argmax takes as long as all sums together


@dataclass(frozen=True, slots=True)
class LogitGradientSums:
    """Sums over the columns seen so far; each (n,), float64. w = e^(z - max) and d = u - top_gap."""

    max: Tensor  # max z
    top_gap: Tensor  # u where z is largest
    total: Tensor  # sum of w
    gap_sum: Tensor  # sum of w d
    square_sum: Tensor  # sum of w^2
    square_gap_sum: Tensor  # sum of w^2 d
    square_gap2_sum: Tensor  # sum of w^2 d^2

    @classmethod
    def of_rows(cls, rows: Tensor) -> LogitGradientSums:
        """From rows as `block_sums` fills them, (8, n)."""
        z_max, total, top_gap, center, *sums = rows.double().unbind()
        return cls(z_max, center, total, *sums)._rescaled(z_max, top_gap)

    def merge(self, sums: LogitGradientSums) -> LogitGradientSums:
        """The sums over the union of two disjoint sets of columns."""
        new_max, top_gap = (
            torch.maximum(self.max, sums.max),
            torch.where(sums.max > self.max, sums.top_gap, self.top_gap),
        )
        a, b = self._rescaled(new_max, top_gap), sums._rescaled(new_max, top_gap)
        return LogitGradientSums(
            new_max,
            top_gap,
            a.total + b.total,
            a.gap_sum + b.gap_sum,
            a.square_sum + b.square_sum,
            a.square_gap_sum + b.square_gap_sum,
            a.square_gap2_sum + b.square_gap2_sum,
        )

    def _rescaled(self, new_max: Tensor, top_gap: Tensor) -> LogitGradientSums:
        """The same sums relative to another maximum and gap."""
        scale, shift = torch.exp(self.max - new_max), self.top_gap - top_gap
        square_gap2_sum = self.square_gap2_sum + 2 * shift * self.square_gap_sum + shift**2 * self.square_sum
        return LogitGradientSums(
            new_max,
            top_gap,
            scale * self.total,
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


def block_sums(
    z: Tensor, t: Tensor, z_shifted: Tensor, weights: Tensor, rows: Tensor, scratch: tuple[Tensor, Tensor]
) -> None:
    """Fill `rows` (8, n): max z, sum of `weights`, u at the largest z, the center c, and four sums with d = u - c.

    z, t: logits (n, c); z_shifted = z - max z, weights = e^z_shifted. The first two rows are filled already, and so is
    c, E_p u rounded: far from it, a sum of squares would be a small difference of large ones.
    """
    z_max, _, top_gap, center, gap_sum, square_sum, square_gap_sum, square_gap2_sum = rows.unbind()
    product, weighted_gap = scratch
    # t at the largest z: any other token is lowered, except where it is as likely: then any gap will do.
    torch.sub(z_max, torch.add(t, z_shifted, alpha=LOWERING, out=product).amax(-1), out=top_gap)
    torch.sub(z, t, out=weighted_gap).sub_(center[:, None]).mul_(weights)
    torch.sum(weighted_gap, -1, out=gap_sum)
    row_dot(weights, weights, product, out=square_sum)
    row_dot(weights, weighted_gap, product, out=square_gap_sum)
    row_dot(weighted_gap, weighted_gap, product, out=square_gap2_sum)
