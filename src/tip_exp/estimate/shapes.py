"""What a model looks like before its weights are there: its config from a folder, the hub's cache or our own table.

Nothing here asks the network, and nothing needs torch: forecasts and dry runs work on a machine that has neither.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tip_exp.utils.paths import resolve_model

TABLE = Path(__file__).with_name("model_shapes.yaml")
VOCABULARY = 152_000  # where nothing is known of a model; Qwen's
COUNTED = ("llama", "mistral", "qwen2", "qwen3")  # whose parameters follow from their config by `_parameters`


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a decoder; `query` and `key` are the widths of those projections over all heads."""

    parameters: float
    hidden: float
    intermediate: float
    layers: float
    query: float
    key: float
    qk_norm: bool
    vocabulary: int


def model_config(path: str, revision: str | None) -> tuple[dict[str, Any], str] | None:
    """A model's config.json, or the part of it that our table holds, and where it is from; None if nobody knows."""
    file = Path(resolve_model(path)).expanduser() / "config.json"
    if not file.is_file() and (cached := _cached(path, revision)):
        file = cached
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8")), str(file)
    known = _table()
    return (known[path], TABLE.name) if path in known else None


def shape_of(path: str, revision: str | None) -> ModelShape:
    """From the model's config; else guessed from "…-8B" in its name."""
    found = model_config(path, revision)
    if found is None:
        return _guessed(path)
    shape = found[0].get("text_config", found[0])
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    width = shape.get("head_dim") or hidden // heads
    query, key = heads * width, (shape.get("num_key_value_heads") or heads) * width
    kind = shape["model_type"]
    return ModelShape(
        parameters=_parameters(shape, query, key) if kind in COUNTED else _stored(path),
        hidden=hidden,
        intermediate=shape.get("intermediate_size") or 4 * hidden,
        layers=shape["num_hidden_layers"],
        query=query,
        key=key,
        qk_norm=kind == "qwen3",
        vocabulary=shape["vocab_size"],
    )


def _parameters(shape: dict[str, Any], query: int, key: int) -> int:
    """Embedding (and head, unless tied), and in each layer attention, gated MLP and norms."""
    hidden, kind = shape["hidden_size"], shape["model_type"]
    layer = 2 * hidden * query + 2 * hidden * key + 3 * hidden * shape["intermediate_size"] + 2 * hidden
    if kind == "qwen2":  # biases of query, key and value
        layer += query + 2 * key
    if kind == "qwen3":  # norms of a query's and of a key's head
        layer += 2 * (shape.get("head_dim") or hidden // shape["num_attention_heads"])
    matrices = 1 if shape.get("tie_word_embeddings") else 2
    return shape["num_hidden_layers"] * layer + hidden + matrices * shape["vocab_size"] * hidden


def _stored(path: str) -> float:
    """Parameters by the size of the weights' files, else by the model's name."""
    folder = Path(resolve_model(path)).expanduser()
    config = folder / "config.json"
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if not size:
        return _guessed(path).parameters
    shape = json.loads(config.read_text(encoding="utf-8"))
    return size / (4 if (shape.get("dtype") or shape.get("torch_dtype")) in ("float32", None) else 2)


def _guessed(path: str) -> ModelShape:
    named = re.findall(r"(\d+(?:\.\d+)?)B", path)
    parameters = float(named[-1]) * 1e9 if named else 1e9
    hidden = (100 * parameters / 12) ** (1 / 3)  # P = 12 L h^2 with layers about a hundred units wide each
    return ModelShape(parameters, hidden, 3 * hidden, hidden / 100, hidden, hidden / 4, False, VOCABULARY)


def _cached(path: str, revision: str | None) -> Path | None:
    """The config.json that the hub's library keeps of a model, without asking the hub."""
    if path.count("/") != 1 or path.startswith(("/", ".", "~")):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(path, "config.json", revision=revision or "main")
    return Path(found) if isinstance(found, str) else None


@cache
def _table() -> dict[str, dict[str, Any]]:
    return yaml.safe_load(TABLE.read_text(encoding="utf-8"))
