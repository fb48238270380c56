"""Where the teacher is while it does not read: its backbone can leave the device, its head stays for the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tip_exp.losses.head import Head

Placement = Literal["resident", "offload", "two_phase"]


class TeacherOffloader:
    """A frozen module that is on the device for as long as `present` lasts.

    resident   always.
    offload    between uses in pinned host memory. On a CPU that is the memory it is in: the same as resident.
    two_phase  between uses nowhere: each use loads it anew from its files, which safetensors maps into memory. While
               it is there, what `others` gives (the student's weights and optimizer) is in host memory, so that the
               device never holds both. On a CPU there is one memory, and the others stay where they are.
    The numbers are the same bit for bit. `head` is never moved. `reload` gives an equal module on the device.
    """

    def __init__(
        self,
        module: PreTrainedModel,
        head: Head,
        placement: Placement,
        device: torch.device,
        reload: Callable[[], PreTrainedModel] | None,
    ) -> None:
        assert placement != "two_phase" or reload is not None, "two_phase needs to know where from to load"
        self.placement, self._device, self._reload = placement, device, reload
        self._moving = placement == "two_phase" or (placement == "offload" and device.type != "cpu")
        staying = {id(head.weight), id(head.bias)}
        named = module.named_parameters() if self._moving else ()
        self._parameters = {name: p for name, p in named if id(p) not in staying}
        self._in_host: dict[str, Tensor] = {}
        self._here = True

    def __str__(self) -> str:
        told = f"pair.teacher.placement={self.placement}"
        if self.placement == "offload" and not self._moving:
            return f"{told}: there is nowhere to go to from a CPU, so the teacher stays resident"
        if self.placement == "two_phase" and self._device.type == "cpu":
            return (
                f"{told}: the teacher is loaded for each step and then freed; from a CPU the student has nowhere to go"
            )
        return told

    @contextmanager
    def on_device(self, others: Callable[[], Iterable[Tensor]]) -> Iterator[None]:
        """The module's weights are on the device inside of the block."""
        aside = list(others()) if self.placement == "two_phase" and self._device.type != "cpu" else []
        _move(aside, torch.device("cpu"))
        self._arrive()
        try:
            yield
        finally:
            self._leave()
            _move(aside, self._device)

    def _arrive(self) -> None:
        if self._here:
            return
        if self.placement == "offload":
            for name, parameter in self._parameters.items():
                parameter.data = self._in_host[name].to(self._device, non_blocking=True)
        else:
            assert self._reload is not None, "checked when made"
            fresh = dict(self._reload().named_parameters())
            for name, parameter in self._parameters.items():
                parameter.data = fresh[name].data
        self._here = True

    def _leave(self) -> None:
        if not self._moving:
            return
        if self.placement == "offload" and not self._in_host:  # frozen: copied once, later only forgotten
            self._in_host = {name: p.detach().cpu().pin_memory() for name, p in self._parameters.items()}
        for name, parameter in self._parameters.items():
            parameter.data = self._in_host[name] if self.placement == "offload" else parameter.data.new_empty(0)
        self._here = False


def _move(tensors: list[Tensor], device: torch.device) -> None:
    """Move what the tensors hold; the tensors themselves, which the optimizer knows them by, stay."""
    for tensor in tensors:
        tensor.data = tensor.data.to(device)
