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
        self._device, self._offloads = device, placement == "offload" and device.type != "cpu"
        head_ids = {id(head.weight), id(head.bias)}
        self._backbone = {name: p for name, p in module.named_parameters() if id(p) not in head_ids}
        self._host_copies: dict[str, Tensor] = {}  # made once, for the weights never change

    @contextmanager
    def on_device(self) -> Iterator[None]:
        if not self._offloads:
            yield
            return
        for name, host_copy in self._host_copies.items():
            self._backbone[name].data = host_copy.to(self._device, non_blocking=True)
        try:
            yield
        finally:
            if not self._host_copies:
                self._host_copies = {name: p.detach().cpu().pin_memory() for name, p in self._backbone.items()}
            for name, parameter in self._backbone.items():
                parameter.data = self._host_copies[name]
