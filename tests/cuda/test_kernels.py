"""Runs the checks of losses/kernels.py, each in a process of its own: Triton's decorators read their mode once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="torch's CUDA wheels and vLLM bring Triton; `make test-vllm` runs this")


@pytest.mark.parametrize("checks, interpret", [("check_kernels.py", "1"), ("check_compile.py", "0")])
def test_kernels_without_a_gpu(checks: str, interpret: str, tmp_path: Path) -> None:
    environment = {"TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    path = Path(__file__).with_name(checks)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(path)]
    result = subprocess.run(command, cwd=path.parents[2], env=os.environ | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr[-5_000:]
