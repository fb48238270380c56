"""Real weights on a CPU: a few steps on GSM8K bring the thinned SmolLM2-135M nearer to the whole one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAIR = ROOT / "models" / "smollm2"  # made by python -m tip_exp.smollm2 --out models/smollm2
DATA = ROOT.parent / "shared" / "data"


@pytest.mark.slow
@pytest.mark.skipif(not PAIR.is_dir(), reason="models/smollm2 has not been made")
@pytest.mark.skipif(not DATA.is_dir(), reason="the real data sets are not beside this checkout")
def test_six_steps_lower_the_divergence(tmp_path: Path) -> None:
    """The same four problems each step, so that what falls is not the problems' difficulty."""
    settings = ["learner.lr=1e-4", "data.train.num_problems=4", "logger=files", f"data.root={DATA}"]
    line = [sys.executable, "-m", "tip_exp", "experiment=smollm2_gsm8k", *settings, f"hydra.run.dir={tmp_path}"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=1800, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(row) for row in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["step"] > 0]
    divergence = [row["score/reverse_kl_mean"] for row in steps]
    assert len(steps) == 6 and sum(divergence[-2:]) < 0.95 * sum(divergence[:2]), divergence
    shares = [sum(row[f"quadrant/q{n}_share"] for n in (1, 2, 3, 4)) for row in steps]
    assert shares == pytest.approx([1.0] * 6)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["memory"]["memory/process_peak_gib"] > 1.0 and result["totals"]["wall_s"] > 0
