"""A model built on the meta device and filled from its files is the model that from_pretrained loads."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.helpers import save_random
from tests.learner.ranks_worker import state_of
from transformers import AutoConfig, AutoModelForCausalLM

from tip_exp.config.schema import RunConfig
from tip_exp.learner.distributed import Ranks, start
from tip_exp.learner.sharding import Sharding
from tip_exp.models.weight_files import WeightFiles, empty_model
from tip_exp.utils.paths import resolve_model

CPU = torch.device("cpu")


@pytest.fixture
def folder(tiny_config: RunConfig) -> Path:
    return Path(resolve_model(tiny_config.pair.student.path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_filled_model_is_that_of_from_pretrained(folder: Path, dtype: torch.dtype) -> None:
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    empty = empty_model(AutoConfig.from_pretrained(folder), str(folder), "main", dtype, "sdpa")
    assert empty is not None
    module, files = empty
    assert all(parameter.is_meta for parameter in module.parameters())
    with start(CPU, alone=True):
        Sharding(Ranks().mesh(CPU, 1), CPU)(module, files)
        state, expected_state = state_of(module), state_of(expected)
    assert state.keys() == expected_state.keys()
    for name, value in expected_state.items():
        assert state[name].equal(value) and state[name].dtype == value.dtype, name
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert module.generation_config.to_dict() == expected.generation_config.to_dict()
    different = {key for key, value in expected.config.to_dict().items() if module.config.to_dict()[key] != value}
    assert different <= {"dtype"}, different
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("change", "is_read"),
    [
        (lambda tensors: tensors, True),
        (lambda tensors: {name.removeprefix("model."): tensor for name, tensor in tensors.items()}, True),
        (lambda tensors: {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up" not in name}, False),
        (lambda tensors: {name: tensor[:40] if "embed" in name else tensor for name, tensor in tensors.items()}, False),
    ],
)
def test_files_that_do_not_fit_are_left_to_from_pretrained(
    tmp_path: Path, folder: Path, change: Callable[[dict], dict], is_read: bool
) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    save_file(change(load_file(folder / "model.safetensors")), tmp_path / "model.safetensors")
    empty = empty_model(AutoConfig.from_pretrained(folder), str(tmp_path), "main", torch.float32, "sdpa")
    assert (empty is not None) == is_read


@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral"])
def test_experts_are_put_together_from_their_files(tmp_path: Path, family: str) -> None:
    """Files have three tensors for each expert, the module two for all; Mixtral's have other names as well."""
    folder = save_random(family, tmp_path / "model")
    empty = empty_model(AutoConfig.from_pretrained(folder), str(folder), "main", torch.float32, "sdpa")
    assert empty is not None
    files = empty[1]
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, value in expected.named_parameters():
        assert files.read(name).equal(value), name
    experts = expected.get_parameter("model.layers.1.mlp.experts.gate_up_proj")
    before = files.bytes_read
    assert files.read("model.layers.1.mlp.experts.gate_up_proj", slice(1, 3)).equal(experts[1:3])
    assert files.bytes_read - before == experts[1:3].nbytes
    assert files.read("model.layers.1.mlp.experts.gate_up_proj", slice(4, 4)).shape == (0, *experts.shape[1:])


def test_only_the_rows_asked_for_are_read(folder: Path) -> None:
    empty = empty_model(AutoConfig.from_pretrained(folder), str(folder), "main", torch.float32, "sdpa")
    assert empty is not None
    files: WeightFiles = empty[1]
    whole = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert files.read("model.embed_tokens.weight", slice(3, 10)).equal(whole[3:10])
    assert files.read("model.embed_tokens.weight", slice(406, 406)).shape == (0, 64)
    assert files.bytes_read == 7 * 64 * 4
