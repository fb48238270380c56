"""Splits N tokens x V logits into tiles within a byte budget, and tiles into blocks that fit the cache.

GEMMs want large tiles; elementwise ops should read tiles that still fit in L3 and write temporaries that fit in L2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LIVE_TILES = 2  # student logits and teacher logits
MAX_ROWS = 1024  # more rows do not speed up a GEMM, but the hidden-state gradient grows with them
# Logits per tile that need not hold whole rows. CPU: 4 MiB of float32, so both models' logits stay in L3.
GEMM_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 40}
# Rows and columns of a tile that the byte budget limits are a multiple of this, where it allows as many: a thread block
# of a tensor-core GEMM computes 128 x 128 or more, and rows of logits start at 16-byte boundaries.
MULTIPLE = {"cpu": 1, "cuda": 128}
# Logits per block of elementwise ops. CPU: 1 MiB of float32, so four blocks stay in cache. CUDA: what autograd keeps
# per block, for divergences without a kernel.
BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 23}
GROUP = 64  # columns per group whose maximum is kept
MAX_NORM_WIDTH = 2048  # columns; torch.linalg.vector_norm adds a row in a few lanes, one number after the other
LOG2_E = 1 / math.log(2)


@dataclass(frozen=True, slots=True)
class Tiling:
    """N x V in tiles of `height` rows and `width` columns, which with `whole_rows` are all."""

    num_rows: int
    vocab_size: int
    height: int
    width: int
    whole_rows: bool

    @property
    def held_elements(self) -> int:
        """Logits of one model that are in memory at a time."""
        return self.height * self.width

    def rows(self) -> Iterator[slice]:
        return _slices(self.num_rows, self.height)

    def columns(self) -> Iterator[slice]:
        return _slices(self.vocab_size, self.width)


def tiling(
    num_rows: int, vocab_size: int, dtype: torch.dtype, tile_bytes: int, *, whole_rows: bool, device: str = "cpu"
) -> Tiling:
    """Tiles of both models' logits that take at most `tile_bytes` together (at least one logit, or one whole row)."""
    elements, gemm_elements = max(1, tile_bytes // (LIVE_TILES * dtype.itemsize)), GEMM_ELEMENTS[device]
    if whole_rows:
        height = max(1, min(num_rows, MAX_ROWS, _round_down(elements // vocab_size, MULTIPLE[device])))
        width = vocab_size
    else:
        elements = min(elements, gemm_elements)
        height = max(1, min(num_rows, MAX_ROWS, _round_down(math.isqrt(elements), MULTIPLE[device])))
        width = _round_down(elements // height, MULTIPLE[device])
    return Tiling(num_rows, vocab_size, height, min(vocab_size, width), whole_rows)


def kernels(logits: Tensor) -> Any:
    """losses/kernels.py, which needs Triton, for tensors on CUDA; None elsewhere: torch operators do the same."""
    if not logits.is_cuda:
        return None
    from tip_exp.losses import kernels

    return kernels


def tile_columns(z: Tensor, t: Tensor) -> tuple[int, int]:
    """Width and row stride of both models' tiles, for a kernel."""
    assert z.stride() == t.stride() and z.stride(1) == 1, "tiles of one workspace"
    return z.shape[1], z.stride(0)


def block_width(z: Tensor, largest: int) -> int:
    """Columns of a kernel's program: a power of two, at least one group."""
    return max(GROUP, min(largest, 1 << (z.shape[1] - 1).bit_length()))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; from the host to CUDA through pinned memory, so that the host does not wait."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def exp(x: Tensor, out: Tensor) -> Tensor:
    """e^x. On CPU as 2^(x log2 e): MKL's exp takes three times as long on AMD processors."""
    return torch.mul(x, LOG2_E, out=out).exp2_() if x.device.type == "cpu" else torch.exp(x, out=out)


def row_dot(a: Tensor, b: Tensor, product: Tensor, out: Tensor) -> Tensor:
    """Dot product of each row of two blocks, (n,), by way of the scratch block `product`."""
    return torch.sum(torch.mul(a, b, out=product), -1, out=out)


def row_squares(a: Tensor, product: Tensor, out: Tensor) -> Tensor:
    """Sum of squares of each row of a block, (n,): a norm writes no product, but over long rows it loses digits."""
    if a.shape[1] > MAX_NORM_WIDTH:
        return row_dot(a, a, product, out)
    return torch.linalg.vector_norm(a, dim=-1, out=out).square_()


class Workspace:
    """The buffers of one pass, allocated once and reused: `tiles` logit tiles and `num_scratch` scratch blocks.

    On CUDA there are no scratch blocks: kernels keep temporaries in registers.
    """

    def __init__(
        self, cut: Tiling, dtype: torch.dtype, device: torch.device, *, num_scratch: int, tiles: int = LIVE_TILES
    ) -> None:
        self.cut = cut
        self._block_elements = BLOCK_ELEMENTS[device.type]
        # One allocation: glibc maps sizes above 32 MiB and returns them to the system as soon as the pass ends.
        buffer = torch.empty(tiles * cut.held_elements, dtype=dtype, device=device)
        self._buffers = buffer.split(cut.held_elements)
        scratch_elements = min(cut.held_elements, max(self._block_elements, cut.width))
        num_scratch = 0 if device.type == "cuda" else num_scratch
        self._scratch = [torch.empty(scratch_elements, dtype=dtype, device=device) for _ in range(num_scratch)]

    def tiles(self, height: int, columns: slice) -> list[Tensor]:
        """Each model's tile, (height, columns)."""
        width = columns.stop - columns.start
        return [buffer[: height * width].view(height, width) for buffer in self._buffers]

    def scratch(self, index: int, block: Tensor) -> Tensor:
        """Uninitialized buffer of the block's shape."""
        return self._scratch[index][: block.numel()].view(block.shape)

    def blocks(self, tile: Tensor) -> Iterator[slice]:
        """Row ranges of a tile, each small enough for one block."""
        return _slices(len(tile), max(1, self._block_elements // tile.shape[-1]))


def _round_down(size: int, multiple: int) -> int:
    """The largest multiple that is at most `size`, or `size` if it is smaller than one."""
    return size // multiple * multiple or size


def _slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
