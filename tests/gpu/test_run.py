"""Whole runs by `tip-exp` on CUDA: one rank, and as many ranks as there are GPUs."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tip_exp.records.metrics import DEVICE_USED_PEAK_GIB, GRAD_NORM, LOSS
from tip_exp.utils.io import read_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


def steps(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """Metrics of each step of a small run. A run stops by itself where sampler and learner disagree."""
    line = [sys.executable, "-m", "tip_exp", f"hydra.run.dir={folder}", "experiment=smoke", "logger=files"]
    line += ["eval.teacher=false", "learner.num_steps=3", "learner.warmup_steps=0", *overrides]
    done = subprocess.run(line, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return read_rows(folder / "metrics.jsonl")[1:]


@pytest.mark.parametrize("backend", ["hf", "auto"])
def test_a_run_on_one_gpu(tmp_path: Path, backend: str) -> None:
    rows = steps(tmp_path / "run", "ranks=1", f"rollout.backend={backend}")
    assert all(math.isfinite(row[LOSS]) and row[GRAD_NORM] > 0 for row in rows)
    assert rows[-1][DEVICE_USED_PEAK_GIB] > 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_all_gpus_give_the_numbers_of_one(tmp_path: Path) -> None:
    one, every = (steps(tmp_path / ranks, f"ranks={ranks}", "rollout.backend=hf") for ranks in ("1", "auto"))
    for row, other in zip(one, every, strict=True):
        assert other[LOSS] == pytest.approx(row[LOSS], rel=0.01)
