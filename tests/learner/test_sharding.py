"""Sharding on a group of one process: which weights are whole when, what is spread how, and what cannot be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.helpers import sample_rollouts
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers import LlamaConfig, LlamaForCausalLM

from tip_exp.config.schema import RunConfig
from tip_exp.learner.data_parallel import share_batches
from tip_exp.learner.distributed import ALONE, Ranks, start
from tip_exp.learner.sharding import Sharding, make_sharding
from tip_exp.models.lora import whole_tensor
from tip_exp.models.pair import Model, Pair
from tip_exp.utils.errors import ConfigError

CPU = torch.device("cpu")


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    with start(CPU, alone=True) as ranks:
        yield ranks.mesh(CPU, replicas=1)


def sharded_names(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if isinstance(parameter, DTensor)}


@pytest.mark.parametrize("offload", [False, True])
def test_weights_are_whole_inside_the_contexts_alone(tiny_pair: Pair, mesh: DeviceMesh, offload: bool) -> None:
    module = tiny_pair.student.module
    (batch,) = share_batches(sample_rollouts(tiny_pair)[:1], ALONE, 1000, tiny_pair.pad_id, packing=True)
    with torch.no_grad():
        expected = tiny_pair.student.hidden(batch)
        weights = Sharding(mesh, CPU, offload=offload)(module)
        model = Model(module, tiny_pair.student.loaded_head, weights)
        every = sharded_names(module)
        assert every == {name for name, _ in module.named_parameters()}
        for _ in range(2):
            with weights.whole():
                with weights.whole():  # changes nothing
                    pass
                assert sharded_names(module) == {name for name in every if "embed_tokens" not in name}
                torch.testing.assert_close(model.hidden(batch), expected)
            assert sharded_names(module) == every  # also those that the forward pass gathered
            with weights.gathered():
                for _ in range(2):
                    assert not sharded_names(module)
                    torch.testing.assert_close(model.hidden(batch), expected)
            assert sharded_names(module) == every
        assert all(parameter.grad is None for parameter in module.parameters())


def test_gradients_are_those_of_whole_weights(tiny_pair: Pair, mesh: DeviceMesh) -> None:
    module = tiny_pair.student.module
    (batch,) = share_batches(sample_rollouts(tiny_pair)[:1], ALONE, 1000, tiny_pair.pad_id, packing=True)
    tiny_pair.student.hidden(batch).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in module.named_parameters()}
    module.zero_grad()
    weights = Sharding(mesh, CPU)(module)
    with weights.whole(trains=True):
        Model(module, tiny_pair.student.loaded_head, weights).hidden(batch).square().sum().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(whole_tensor(parameter.grad), expected[name])


def test_a_layer_fetches_the_one_before_it_in_the_backward_pass(
    tiny_pair: Pair, mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: dict[Any, list[Any]] = {}
    monkeypatch.setattr(FSDPModule, "set_modules_to_backward_prefetch", lambda *call: fetched.update([call]))
    Sharding(mesh, CPU)(tiny_pair.student.module)
    backbone: Any = tiny_pair.student.module.base_model
    layers = list(backbone.layers)
    later = zip([*layers[1:], backbone], layers, strict=True)  # the backbone's own weights are used last
    assert fetched == {module: [before] for module, before in later} | {layers[0]: [layers[0]]}


@pytest.mark.parametrize("case", ["no layers", "no head", "a weight outside of the backbone"])
def test_a_model_that_cannot_be_sharded_is_refused(mesh: DeviceMesh, case: str) -> None:
    sizes: Any = {"vocab_size": 8, "hidden_size": 4, "intermediate_size": 4, "num_attention_heads": 1}
    model: Any = LlamaForCausalLM(LlamaConfig(num_hidden_layers=0 if case == "no layers" else 1, **sizes))
    if case == "a weight outside of the backbone":
        model.register_parameter("scale", nn.Parameter(torch.ones(1)))
    with pytest.raises(ConfigError, match=r"^Llama\w+ cannot be sharded: it needs decoder layers in a backbone"):
        Sharding(mesh, CPU)(model.base_model if case == "no head" else model)


@pytest.mark.parametrize(("replicas", "size"), [(None, 3), (2, 3), (3, 1), (1, 2)])
def test_rows_are_those_of_chunk_whatever_the_copies(replicas: int | None, size: int) -> None:
    shape = (size,) if replicas is None else (replicas, size)
    for place, length in product(product(*map(range, shape)), (0, 1, 6, 7)):
        mesh: Any = SimpleNamespace(ndim=len(shape), size=shape.__getitem__, get_local_rank=place.__getitem__)
        sharding, tensor = Sharding(mesh, CPU), torch.arange(length)
        chunks = [*tensor.chunk(size), *[tensor[:0]] * size]
        assert tensor[sharding._rows(length)].equal(chunks[place[-1]])
        assert sharding._placements == ([Shard(0)] if replicas is None else [Replicate(), Shard(0)])


@pytest.mark.parametrize("placement", ["resident", "offload"])
def test_the_teacher_alone_is_offloaded_and_is_whole_on_one_rank(
    compose_run: Callable[..., RunConfig], placement: str
) -> None:
    in_float32 = compose_run(f"pair.teacher.placement={placement}")
    in_bfloat16 = compose_run(f"pair.teacher.placement={placement}", "learner.compute_dtype=bfloat16")
    ranks: Any = Ranks(alone=True)
    ranks.mesh = lambda *_: SimpleNamespace()
    assert make_sharding(in_float32, ranks, CPU) is None
    assert set(make_sharding(in_bfloat16, ranks, CPU) or ()) == {"student"}
    ranks.size = 2
    for config in (in_float32, in_bfloat16):
        shard: Any = make_sharding(config, ranks, CPU)
        assert {role: shard[role].offload for role in shard} == {"student": False, "teacher": placement == "offload"}
