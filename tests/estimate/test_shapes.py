"""Shapes without weights: parameters as transformers counts them, and a guess where there is no config."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from tip_exp.estimate.shapes import TABLE, model_config, shape_of
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


def test_a_model_without_a_config_is_guessed_by_its_name() -> None:
    assert model_config("nobody/Odd-3B", None) is None
    assert shape_of("nobody/Odd-3B", None).parameters == 3e9
