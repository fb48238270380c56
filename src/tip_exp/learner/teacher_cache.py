"""The teacher's final hidden states of one step, off the device: far fewer numbers a token than its logits are."""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from tip_exp.utils.units import MIB


class TeacherCache:
    """One (n, E) tensor a micro-batch, in order; reading brings it back to the device it came from.

    CUDA's are copied to pinned host memory. What goes beyond `limit_bytes` goes into a memory-mapped file in `folder`
    (None: the system's own for temporary files) that has no name from the moment it is made, so that it is gone with
    the cache, or with the process however that ends. A disk without room is an OSError at `append`.
    """

    def __init__(self, limit_bytes: int, folder: Path | None) -> None:
        self._limit, self._folder = limit_bytes, folder
        self._held: list[Tensor] = []
        self._devices: list[torch.device] = []
        self._file_end = 0
        self.num_bytes = self.spilled_bytes = 0

    def append(self, hidden: Float[Tensor, "n e"]) -> None:
        size = hidden.numel() * hidden.element_size()
        spills = size > 0 and self.num_bytes - self.spilled_bytes + size > self._limit
        self.num_bytes += size
        if spills:
            self.spilled_bytes += size
            held = self._mapped(hidden.shape, hidden.dtype, size).copy_(hidden)
        elif hidden.is_cuda:
            held = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True).copy_(hidden, non_blocking=True)
        else:
            held = hidden
        self._held.append(held)
        self._devices.append(hidden.device)

    def metrics(self, vocab_size: int) -> dict[str, float]:
        """What a token takes here, beside what its logits would, in the same type."""
        found = {"memory/teacher_cache_spilled_mib": self.spilled_bytes / MIB}
        if num_tokens := sum(len(hidden) for hidden in self._held):
            found["memory/teacher_cache_bytes_per_token"] = self.num_bytes / num_tokens
            found["memory/teacher_logits_bytes_per_token"] = float(vocab_size * self._held[0].element_size())
        return found

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, index: int) -> Float[Tensor, "n e"]:
        return self._held[index].to(self._devices[index], non_blocking=True)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def _mapped(self, shape: torch.Size, dtype: torch.dtype, size: int) -> Tensor:
        """An empty tensor in a new part of the file."""
        if self._file_end == 0:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
            weakref.finalize(self, self._file.close)  # what is mapped stays until the last tensor in it is forgotten
        start, part = self._file_end, -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        os.posix_fallocate(self._file.fileno(), start, part)  # a full disk is an error here, not a fault when written
        self._file_end += part
        place = mmap.mmap(self._file.fileno(), part, offset=start)
        return torch.frombuffer(place, dtype=dtype, count=shape.numel()).view(shape)
