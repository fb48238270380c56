"""The device of a rank, and the CPU threads of its process."""

from __future__ import annotations

import os

import torch

from tip_exp.learner.distributed import local_device
from tip_exp.models.pair import Pair
from tip_exp.utils.errors import ConfigError
from tip_exp.utils.gpus import visible_gpus

# Below this many parameters one CPU thread is faster than two.
SINGLE_THREAD_PARAMETERS = 10_000_000


def pick_device(name: str) -> torch.device:
    """The device of a config's `device`, for this rank; auto takes CUDA where there is one and never skips a GPU."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("device=cuda, but torch finds no CUDA device; use device=cpu or device=auto")
    if name == "auto" and not available and (gpus := visible_gpus(os.environ)):
        raise ConfigError(
            f"device=auto: this machine has GPU {', '.join(gpus)}, but torch {torch.__version__} cannot use it; "
            "install its CUDA build (constraints-cuda.txt) with a driver that supports it, or choose device=cpu"
        )
    device = local_device(("cuda" if available else "cpu") if name == "auto" else name)
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise ConfigError(
            f"rank {device.index} of this node has no GPU: torch sees {count}; lower ranks, or name each slice of a "
            "MIG machine in CUDA_VISIBLE_DEVICES (docs/clusters.md)"
        )
    return device


def pick_threads(num_threads: int | None, pair: Pair) -> int:
    """`num_threads` if given, else one for small models, else torch's default."""
    size = sum(parameter.numel() for parameter in pair.teacher.module.parameters())
    return num_threads or (1 if size < SINGLE_THREAD_PARAMETERS else torch.get_num_threads())
