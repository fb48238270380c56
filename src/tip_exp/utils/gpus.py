"""The GPUs that this process may use, without loading torch."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path

DEVICES = Path("/dev")


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """CUDA_VISIBLE_DEVICES if it is set, else the numbers that CUDA gives to the NVIDIA devices: "0", "1", …

    Of the variable each name once, up to the first -1, where CUDA stops. The numbers count the devices: a container
    with /dev/nvidia3 alone has the GPU 0.
    """
    if "CUDA_VISIBLE_DEVICES" in environment:
        names = [name.strip() for name in environment["CUDA_VISIBLE_DEVICES"].split(",")]
        return [name for name in dict.fromkeys(takewhile(lambda name: name != "-1", names)) if name]
    return [str(number) for number in range(len(list(DEVICES.glob("nvidia[0-9]*"))))]


def gpu_numbers(names: list[str]) -> dict[str, str]:
    """The number of each GPU that is named by its UUID or the start of it; of other names the name."""
    listed: list[list[str]] = []
    if any(name.startswith("GPU-") for name in names):
        query = ["nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"]
        try:
            output = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout
            listed = [line.split(", ") for line in output.splitlines()]
        except (OSError, subprocess.SubprocessError):
            pass  # then the name itself
    return {name: next((row[0] for row in listed if row[-1].startswith(name)), name) for name in names}
