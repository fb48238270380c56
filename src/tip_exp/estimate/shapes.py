"""Sizes of a model from its config.json: in a folder, in the hub's cache, or in model_shapes.yaml beside this file.

No network and no torch, because `tip-plan` answers without importing torch. Hence parameters are counted by a formula
here; a test compares it with `num_parameters()` of the model built on the meta device.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tip_exp.config.schema import RunConfig
from tip_exp.utils.errors import ConfigError
from tip_exp.utils.paths import resolve_model

TABLE = Path(__file__).with_name("model_shapes.yaml")
DEFAULT_VOCAB_SIZE = 152_000  # Qwen's, for models without a config
# Keys of a size; GPT-2, GPT-J and MPT name them otherwise than Llama.
KEYS = {
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads"),
    "vocab_size": ("vocab_size",),
    "intermediate_size": ("intermediate_size", "n_inner"),
}
SIZE = r"(?:(?<![a-z\d.])(a)|(?<![a\d.]))(\d+(?:\.\d+)?)([mb])(?![a-z\d])"  # in a model's name
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")
COUNTED = ("llama", "mistral", "qwen2", "qwen3")  # model types with the parameters that `shape_of` counts


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a decoder; `query` and `key` are the widths of those projections over all heads."""

    parameters: float
    active: float  # parameters that one token is multiplied with: in a mixture of experts those of its experts
    hidden: float
    intermediate: float
    layers: float
    query: float
    key: float
    qk_norm: bool
    vocab_size: int
    matrices: int  # of vocabulary size: embedding and output head, or 1 if they are tied

    @property
    def head(self) -> float:
        """Parameters of the output head."""
        return self.vocab_size * self.hidden

    @property
    def vocabulary(self) -> float:
        """Parameters of embedding and output head."""
        return self.matrices * self.head

    @property
    def layer(self) -> float:
        """Parameters of one layer."""
        return (self.parameters - self.vocabulary) / self.layers

    @property
    def cached(self) -> float:
        """Numbers in the KV cache per token."""
        return 2 * self.layers * self.key


def model_config(path: str, revision: str | None) -> tuple[dict[str, Any], str] | None:
    """A model's config.json, or its entry in model_shapes.yaml, with the name of the source; None if there is none."""
    file = Path(resolve_model(path)).expanduser() / "config.json"
    if not file.is_file() and (cached := _hub_cache(path, revision)):
        file = cached
    if file.is_file():
        try:
            return json.loads(file.read_text(encoding="utf-8")), str(file)
        except ValueError as error:
            raise ConfigError(f"{file} is no JSON: {error}") from error
    table = _table()
    return (table[path], TABLE.name) if path in table else None


def shape_of(path: str, revision: str | None) -> ModelShape:
    """The shape by the model's config; without one, guessed from "…-8B" in its name.

    Raises ConfigError if the config names no sizes.
    """
    config_and_source = model_config(path, revision)
    if config_and_source is None:
        return _guess(path)
    config = config_and_source[0].get("text_config", config_and_source[0])
    sizes: dict[str, Any] = {
        name: next((config[key] for key in keys if config.get(key)), None) for name, keys in KEYS.items()
    }
    if missing := [name for name, size in sizes.items() if size is None and name != "intermediate_size"]:
        raise ConfigError(
            f"pair: {config_and_source[1]} of {path} has no {', '.join(missing)}, so its memory and time cannot be "
            "computed; choose a decoder-only language model"
        )
    hidden, layers, heads, vocab_size, intermediate = sizes.values()
    intermediate = intermediate or 4 * hidden
    head_dim = config.get("head_dim") or hidden // heads
    query, key = heads * head_dim, (config.get("num_key_value_heads") or heads) * head_dim
    qk_norm = config["model_type"] == "qwen3"
    matrices = 1 if _is_tied(config, config_and_source[0]) else 2
    if config["model_type"] in COUNTED:
        layer = 2 * hidden * query + 2 * hidden * key + 3 * hidden * intermediate + 2 * hidden
        if config["model_type"] == "qwen2":  # biases of query, key and value
            layer += query + 2 * key
        if qk_norm:
            layer += 2 * head_dim
        parameters = layers * layer + hidden + matrices * vocab_size * hidden
    else:
        parameters = _parameters_by_file_size(path, config_and_source[0])
    active = parameters - _idle_experts(config, hidden, intermediate, layers)
    return ModelShape(parameters, active, hidden, intermediate, layers, query, key, qk_norm, vocab_size, matrices)


def _idle_experts(config: dict[str, Any], hidden: int, intermediate: int, layers: int) -> int:
    """Parameters of the experts that one token is not sent to, each of three projections; 0 in a dense model."""
    experts = next((config[key] for key in EXPERT_KEYS if config.get(key)), 0)
    chosen, width = config.get("num_experts_per_tok") or experts, config.get("moe_intermediate_size") or intermediate
    return (layers - config.get("first_k_dense_replace", 0)) * (experts - chosen) * 3 * hidden * width


def _is_tied(config: dict[str, Any], whole: dict[str, Any]) -> bool:
    """Whether embedding and output head are one matrix; the model type's default if config.json does not say it.

    `config`: the part of the `whole` that describes the language model.
    """
    for section in (config, whole):
        if "tie_word_embeddings" in section:
            return bool(section["tie_word_embeddings"])
    if config["model_type"] in COUNTED:
        return False
    from transformers import AutoConfig  # imports torch, which takes seconds

    try:
        return getattr(AutoConfig.for_model(config["model_type"]), "tie_word_embeddings", True)
    except ValueError:  # a type that transformers does not have
        return False


def guess_note(config: RunConfig) -> str:
    """Names the models without a config.json, whose shape is guessed; "" if there is none."""
    models = dict.fromkeys((model.path, model.revision) for model in (config.pair.teacher, config.pair.student))
    guessed = [path for path, revision in models if model_config(path, revision) is None]
    return f"no config.json found, so the shape is guessed from the name: {', '.join(guessed)}" if guessed else ""


def _parameters_by_file_size(path: str, config: dict[str, Any]) -> float:
    """Bytes of the safetensors files over bytes per weight; without files, guessed from the name."""
    files = Path(resolve_model(path)).expanduser().glob("*.safetensors")
    size = sum(file.stat().st_size for file in files)
    if not size:
        return _guess(path).parameters
    return size / (4 if (config.get("dtype") or config.get("torch_dtype")) in ("float32", None) else 2)


def _guess(path: str) -> ModelShape:
    # The last size in the name; A3B in 30B-A3B are the active parameters.
    named = re.findall(SIZE, path.rpartition("/")[2].lower())
    whole, active = ([float(n) * {"b": 1e9, "m": 1e6}[unit] for a, n, unit in named if a == x] for x in ("", "a"))
    parameters = whole[-1] if whole else 1e9
    hidden = (100 * parameters / 12) ** (1 / 3)  # P = 12 L h^2 with L = h / 100 layers
    sizes = hidden, 3 * hidden, hidden / 100, hidden, hidden / 4
    return ModelShape(parameters, active[-1] if active else parameters, *sizes, False, DEFAULT_VOCAB_SIZE, 1)


def _hub_cache(path: str, revision: str | None) -> Path | None:
    """config.json in the hub's local cache; no request is sent."""
    if path.count("/") != 1 or path.startswith(("/", ".", "~")):
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(path, "config.json", revision=revision or "main")
    return Path(cached) if isinstance(cached, str) else None


@cache
def _table() -> dict[str, dict[str, Any]]:
    return yaml.safe_load(TABLE.read_text(encoding="utf-8"))
