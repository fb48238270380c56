"""Pairs with random weights in the shapes of public models, as folders that `tip-exp` loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from benchmarks.measuring import in_child
from tip_exp.estimate.shapes import model_config
from tip_exp.utils.paths import resolve_model

TINY_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 512,
}


def write_pair(
    folder: Path, teacher: str, student: str, *, layers: int | None = None, tiny: bool, device: str
) -> list[str]:
    """Write both models (bfloat16, from seed 0) unless they exist; returns the overrides of `tip-exp` that take them.

    `layers`: fewer layers than the models have. The tokenizer is the embedded pair's; the models' vocabularies are
    wider, so responses are mostly ids that it lacks, and end at their limit.
    """
    changes = {"num_hidden_layers": layers} if layers else {}
    # Each in a process of its own, which ends: the memory that it takes of the GPU would count as that of a run.
    missing = [
        (folder / role, name)
        for role, name in (("teacher", teacher), ("student", student))
        if not (folder / role / "config.json").exists()
    ]
    for path, name in missing:
        in_child(_write, path, name, changes, tiny, device)
    paths = [f"pair.{role}.path={folder.resolve() / role}" for role in ("teacher", "student")]
    return [*paths, "pair.teacher.dtype=bfloat16", f"pair.label={folder.name}"]


def _write(folder: Path, name: str, changes: dict[str, int], tiny: bool, device: str) -> None:
    described = model_config(name, None)
    assert described is not None, f"{name} is in model_shapes.yaml"
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("package:tiny/student"))
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    values: dict[str, Any] = described[0] | changes | (TINY_SIZES if tiny else {}) | ids
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=ids["eos_token_id"], pad_token_id=ids["pad_token_id"])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
