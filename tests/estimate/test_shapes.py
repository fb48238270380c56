"""Shapes without weights: parameters as transformers counts them, and a guess where there is no config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tip_exp.estimate.shapes import TABLE, model_config, shape_of
from tip_exp.utils.errors import ConfigError
from tip_exp.utils.paths import resolve_model

MODELS = [*yaml.safe_load(TABLE.read_text()), "package:tiny/teacher", "package:tiny/student"]


@pytest.mark.parametrize("path", MODELS)
def test_shapes_are_those_of_the_built_model(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # models/ of the checkout is out of reach
    config_and_source = model_config(path, None)
    assert config_and_source is not None
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config_and_source[0]))
    shape, attention = shape_of(path, None), module.base_model.layers[0].self_attn
    assert shape.parameters == module.num_parameters()
    assert (shape.query, shape.key) == (attention.q_proj.out_features, attention.k_proj.out_features)
    assert shape.qk_norm == hasattr(attention, "q_norm")
    assert (shape.vocab_size, shape.hidden) == tuple(module.get_input_embeddings().weight.shape)


@pytest.mark.parametrize(
    ("path", "billions"),
    [("Qwen/Qwen3-8B", 8.2), ("Qwen/Qwen3-4B", 4.0), ("meta-llama/Llama-3.3-70B-Instruct", 70.6)],
)
def test_the_table_agrees_with_the_model_cards(path: str, billions: float) -> None:
    assert shape_of(path, None).parameters / 1e9 == pytest.approx(billions, rel=0.01)


def test_a_model_of_another_type_is_counted_by_its_files(tmp_path: Path) -> None:
    source = Path(resolve_model("package:tiny/student"))
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((source / name).read_bytes().replace(b'"qwen3"', b'"qwen9"'))
    counted = shape_of("package:tiny/student", None).parameters
    assert shape_of(str(tmp_path), None).parameters == pytest.approx(counted, rel=0.03)  # the file has a header


def test_a_token_uses_some_of_the_experts(tmp_path: Path) -> None:
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"intermediate_size": 64, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
    module = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts, vocab_size=100))
    module.save_pretrained(tmp_path)
    idle = sum(p.numel() for name, p in module.named_parameters() if ".experts." in name) * 6 // 8
    shape = shape_of(str(tmp_path), None)
    assert idle > 0 and shape.parameters - shape.active == idle
    assert shape_of("package:tiny/student", None).active == shape_of("package:tiny/student", None).parameters
    named = shape_of("org/Any-30B-A3B-Instruct", None)
    assert (named.parameters, named.active) == (30e9, 3e9)


def test_sizes_are_read_under_the_names_of_gpt2(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=48, n_layer=3, n_head=4, vocab_size=100)
    module = GPT2LMHeadModel(config)
    module.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    written.pop("tie_word_embeddings", None)  # as in the hub's config.json of GPT-2
    (tmp_path / "config.json").write_text(json.dumps(written))
    shape, counted = shape_of(str(tmp_path), None), module.num_parameters()
    assert shape.matrices == 1 and shape.layer > 0
    assert (shape.hidden, shape.layers, shape.query, shape.key, shape.vocab_size) == (48, 3, 48, 48, 100)
    assert shape.intermediate == 4 * 48 and shape.parameters == pytest.approx(counted, rel=0.05)


def test_the_head_of_a_nested_config_is_the_language_models(tmp_path: Path) -> None:
    text = {
        "model_type": "mistral",
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 9,
    }
    text |= {"intermediate_size": 16, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral3", "text_config": text}))
    assert shape_of(str(tmp_path), None).matrices == 2


def test_a_config_without_sizes_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "resnet", "vocab_size": 5, "hidden_size": 8}')
    with pytest.raises(ConfigError, match=r"config\.json of \S+ has no num_hidden_layers, num_attention_heads"):
        shape_of(str(tmp_path), None)


def test_a_model_without_a_config_is_guessed_by_its_name() -> None:
    assert model_config("nobody/Odd-3B", None) is None
    sizes = {"Odd-3B": 3e9, "Odd-70m": 7e7, "odd-7b-it": 7e9, "Odd-1.5": 1e9, "Odd-30B-A3B": 3e10, "Odd-8bit": 1e9}
    sizes |= {"Distilled-70B-Odd-8B": 8e9, "3f12b4c": 1e9, "Odd-8x7B": 7e9}
    assert {name: shape_of(f"nobody/{name}", None).parameters for name in sizes} == sizes
