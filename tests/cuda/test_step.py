"""Runs check_step.py in a process whose torch has a pretended CUDA device."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cuda.pretend import build_guard


@pytest.mark.skipif(shutil.which("g++") is None, reason="the device guard is C++")
def test_steps_on_a_pretended_cuda_device(tmp_path: Path) -> None:
    checks = Path(__file__).with_name("check_step.py")
    start = f"import ctypes, sys; ctypes.CDLL({str(build_guard(tmp_path))!r}); import pytest; sys.exit(pytest.main())"
    command = [sys.executable, "-c", start, "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(checks)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "TRITON_DEFAULT_FP_FUSION": "1"}
    result = subprocess.run(command, cwd=checks.parents[2], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr[-5_000:]
