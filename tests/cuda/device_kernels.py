"""losses/kernels.py without a GPU: in Triton's interpreter, or the torch operators that are its reference."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tip_exp import losses
from tip_exp.losses import online_softmax
from tip_exp.losses.divergence import COLUMN_GRADS
from tip_exp.losses.online_softmax import LogNormalizers
from tip_exp.losses.tiling import Workspace, tiling

HAS_TRITON = importlib.util.find_spec("triton") is not None


def load_kernels(*, interpreted: bool) -> ModuleType:
    """A copy of losses/kernels.py whose kernels run on CPU tensors, or can be compiled; needs Triton."""
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # Triton 3.9 warns if it is unset
    os.environ["TRITON_INTERPRET"] = str(int(interpreted))  # read by the decorator
    source = Path(losses.__file__).with_name("kernels.py")
    spec = importlib.util.spec_from_file_location(f"kernels_{interpreted}", source)
    assert spec is not None and spec.loader is not None, "the file exists"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def workspace_for(tile: Tensor) -> Workspace:
    """Scratch blocks for one tile."""
    return Workspace(tiling(*tile.shape, tile.dtype, 1 << 24, whole_rows=True), tile.dtype, tile.device, num_scratch=3)


def add_tile(running: Tensor | None, z: Tensor, t: Tensor | None = None, *, group_maxima: Tensor | None) -> Tensor:
    tiles = [z] if t is None else [z, t]
    sums = [] if running is None else online_softmax._as_stats(running, len(tiles))
    rows = online_softmax._as_rows(online_softmax.add_tile(sums, tiles, workspace_for(z), group_maxima))
    assert rows is not None, "a tile was added"
    return rows


def mixture_sum(z: Tensor, t: Tensor, z_max: Tensor, t_max: Tensor, ratio: Tensor) -> Tensor:
    return online_softmax._mixture_sum(z, t, z_max, t_max, ratio, workspace_for(z))


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


TORCH_KERNELS = SimpleNamespace(add_tile=add_tile, mixture_sum=mixture_sum, kl_grad=kl_grad)
