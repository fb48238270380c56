"""The GPUs that this process may use, without loading torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """CUDA_VISIBLE_DEVICES if it is set, else the NVIDIA devices of this machine, as "0", "1", …"""
    if "CUDA_VISIBLE_DEVICES" in environment:
        names = [name.strip() for name in environment["CUDA_VISIBLE_DEVICES"].split(",")]
        return [name for name in names if name not in ("", "-1")]  # -1 hides all
    suffixes = [path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*")]
    return sorted((suffix for suffix in suffixes if suffix.isdigit()), key=int)
