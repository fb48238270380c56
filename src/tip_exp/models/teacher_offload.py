"""Keep the teacher's backbone in host memory while it is not used; its head stays on the device for the loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tip_exp.losses.head import Head

Placement = Literal["resident", "offload"]


class TeacherOffloader:
    """Holds a frozen model; its weights are on the device at least inside `on_device()`.

    resident  Always on the device.
    offload   In pinned host memory outside `on_device()`, the head excepted. The same as resident on a CPU.
    Both give the same numbers bit for bit.
    """

    def __init__(self, module: PreTrainedModel, head: Head, placement: Placement, device: torch.device) -> None:
        self._device = device
        offloads = placement == "offload" and device.type != "cpu"
        self._backbone = backbone_of(module, head) if offloads else {}
        move_to_host(self._backbone)
        self._host_copies = {name: p.detach() for name, p in self._backbone.items()}  # weights never change

    @contextmanager
    def on_device(self) -> Iterator[None]:
        try:
            for name, parameter in self._backbone.items():
                parameter.data = self._host_copies[name].to(self._device, non_blocking=True)
            yield
        finally:
            for name, parameter in self._backbone.items():
                parameter.data = self._host_copies[name]


def backbone_of(module: PreTrainedModel, head: Head) -> dict[str, Tensor]:
    """The parameters by name, those of the head excepted."""
    head_ids = {id(head.weight), id(head.bias)}
    return {name: p for name, p in module.named_parameters() if id(p) not in head_ids}


def move_to_host(parameters: dict[str, Tensor]) -> None:
    """Replace their data by pinned copies in host memory, where they are not there yet."""
    for parameter in parameters.values():
        if not parameter.is_pinned():
            parameter.data = parameter.detach().cpu().pin_memory()
