"""The functions of losses/kernels.py by the torch operators of the CPU path, for where there is no Triton."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tip_exp.losses import online_softmax
from tip_exp.losses.divergence import COLUMN_GRADS
from tip_exp.losses.online_softmax import LogNormalizers
from tip_exp.losses.tiling import Workspace, tiling


def workspace_for(tile: Tensor) -> Workspace:
    """Scratch blocks for one tile."""
    return Workspace(tiling(*tile.shape, tile.dtype, 1 << 24, whole_rows=True), tile.dtype, tile.device, num_scratch=5)


def add_tile(running: Tensor | None, z: Tensor, t: Tensor | None = None, *, group_maxima: Tensor | None) -> Tensor:
    tiles = [z] if t is None else [z, t]
    sums = [] if running is None else online_softmax._as_stats(running, len(tiles))
    rows = online_softmax._as_rows(online_softmax.add_tile(sums, tiles, workspace_for(z), group_maxima))
    assert rows is not None, "a tile was added"
    return rows


def logit_gradient_sums(z: Tensor, t: Tensor) -> Tensor:
    (stats, _) = online_softmax.tile_stats([z, t], workspace_for(z), with_gradient=True)
    sums = stats.gradient
    assert sums is not None, "they are wanted"
    squares = sums.square_sum, sums.square_gap_sum, sums.square_gap2_sum
    return torch.stack([sums.max, sums.total, sums.center, sums.gap_sum, *squares])


def mixture_sum(z: Tensor, t: Tensor, z_max: Tensor, t_max: Tensor, ratio: Tensor) -> Tensor:
    z_shifted, t_shifted = z - z_max[:, None], t - t_max[:, None]
    m = (z_shifted.exp() + ratio[:, None] * t_shifted.exp()).clamp(min=torch.finfo(z.dtype).tiny)
    return (m * (m.log() - z_shifted)).sum(-1)


def kl_grad(
    kl: str, z: Tensor, t: Tensor, normalizers: LogNormalizers, weights: Any, softcap: float | None, *, out: Tensor
) -> None:
    grad = z.clone()
    COLUMN_GRADS[kl](grad, t.clone(), torch.empty_like(z), normalizers)
    if weights is not None:
        grad *= weights[:, None]
    if softcap is not None:
        grad *= 1 - (z / softcap) ** 2
    out.copy_(grad)
