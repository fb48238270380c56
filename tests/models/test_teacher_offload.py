"""Offloading the teacher changes no number and moves the backbone only."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tip_exp.config.schema import RunConfig
from tip_exp.learner.teacher import Teacher
from tip_exp.models.pair import Pair
from tip_exp.models.teacher_offload import TeacherOffloader
from tip_exp.records.meter import Meter

GPU = torch.device("cuda")


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Addresses of pinned tensors. A clone stands in for each copy between host and GPU, so that no GPU is needed."""
    addresses: set[int] = set()

    def pin(tensor: Tensor) -> Tensor:
        pinned = tensor.clone()
        addresses.add(pinned.data_ptr())
        return pinned

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "to", lambda tensor, *_args, **_options: tensor.clone())
    return addresses


def in_host(pair: Pair, host: set[int]) -> list[bool]:
    """For each backbone parameter: is it one of the pinned tensors?"""
    return [p.data_ptr() in host for p in pair.teacher.module.parameters() if p is not pair.teacher.head.weight]


def test_the_backbone_is_on_the_device_inside_the_block_only(tiny_pair: Pair, host: set[int]) -> None:
    module, head = tiny_pair.teacher.module, tiny_pair.teacher.head
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    head_address = head.weight.data_ptr()
    offloader = TeacherOffloader(module, head, "offload", GPU)
    assert all(in_host(tiny_pair, host))
    for _ in range(3):
        with offloader.on_device():
            assert not any(in_host(tiny_pair, host))
            assert all(p.equal(before[name]) for name, p in module.named_parameters())
        assert all(in_host(tiny_pair, host))
        assert all(p.equal(before[name]) for name, p in module.named_parameters())
        assert head.weight.data_ptr() == head_address
    assert len(host) == len(before) - 1, "each parameter but the head is copied to the host once"
    assert not any(p.requires_grad for p in module.parameters())


def test_the_backbone_leaves_the_device_after_an_error(tiny_pair: Pair, host: set[int]) -> None:
    offloader = TeacherOffloader(tiny_pair.teacher.module, tiny_pair.teacher.head, "offload", GPU)
    with pytest.raises(KeyboardInterrupt), offloader.on_device():
        raise KeyboardInterrupt
    assert all(in_host(tiny_pair, host))


def test_on_a_cpu_offload_is_resident(tiny_pair: Pair, tiny_config: RunConfig) -> None:
    teacher = Teacher(replace(tiny_pair, placement="offload"), tiny_config.learner, Meter(torch.device("cpu")))
    weights = [p.data_ptr() for p in tiny_pair.teacher.module.parameters()]
    with teacher.offloader.on_device():
        pass
    assert [p.data_ptr() for p in tiny_pair.teacher.module.parameters()] == weights
