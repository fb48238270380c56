"""The smollm2 pair: removing layers, and a few training steps on GSM8K with real weights on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from scripts.make_pairs.smollm2 import drop_layers

ROOT = Path(__file__).resolve().parents[2]
PAIR = ROOT / "models" / "smollm2"
DATA = ROOT.parent / "shared" / "data"


def test_removed_layers_are_gone_and_generation_uses_the_kv_cache_of_the_kept_ones() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=5,
            num_attention_heads=2,
            pad_token_id=0,
        )
    ).eval()
    kept_weights = [model.model.layers[i].self_attn.q_proj.weight.clone() for i in (0, 2, 4)]
    drop_layers(model, (1, 3))
    assert model.config.num_hidden_layers == 3
    assert all(
        layer.self_attn.q_proj.weight.equal(weight)
        for layer, weight in zip(model.model.layers, kept_weights, strict=True)
    )
    ids = torch.tensor([[3, 4, 5]])
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert model.generate(ids, use_cache=True, **options).equal(model.generate(ids, use_cache=False, **options))


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.skipif(not PAIR.is_dir(), reason="needs `python -m scripts.make_pairs smollm2 --out models/smollm2`")
@pytest.mark.skipif(not DATA.is_dir(), reason="needs GSM8K in ../shared/data")
def test_six_steps_lower_the_divergence(tmp_path: Path) -> None:
    """Every step uses the same four problems, so their difficulty cannot explain the change."""
    settings = ["learner.lr=1e-4", "data.train.num_problems=4", "logger=files", f"data.root={DATA}"]
    command = [sys.executable, "-m", "tip_exp", "experiment=smollm2_gsm8k", *settings, f"hydra.run.dir={tmp_path}"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=1800, cwd=ROOT)
    assert process.returncode == 0, process.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["step"] > 0]
    divergence = [row["score/reverse_kl_mean"] for row in steps]
    assert len(steps) == 6 and sum(divergence[-2:]) < 0.95 * sum(divergence[:2]), divergence
    shares = [sum(row[f"quadrant/q{n}_share"] for n in (1, 2, 3, 4)) for row in steps]
    assert shares == pytest.approx([1.0] * 6)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["memory"]["memory/process_peak_gib"] > 1.0
