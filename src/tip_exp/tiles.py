"""How N tokens x V logits are cut: tiles of both models' logits within a byte budget, and blocks of a tile in a cache.

Matrix products want large tiles; what is done element by element is bound by memory and wants to stay in a cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

TILES_ALIVE = 2  # the student's logits and the teacher's
# More rows make no product faster, but cost gradients of hidden states.
MOST_ROWS = 1024
# Elements of a block: 1 MiB of float32, of which four stay in a CPU's caches. On a GPU a block is a kernel's worth.
BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}


@dataclass(frozen=True, slots=True)
class Tiling:
    """N x V cut into tiles of at most `height` x `width`."""

    num_rows: int
    vocab_size: int
    height: int
    width: int

    def rows(self) -> Iterator[slice]:
        return _slices(self.num_rows, self.height)

    def columns(self) -> Iterator[slice]:
        return _slices(self.vocab_size, self.width)


def tiling(num_rows: int, vocab_size: int, dtype: torch.dtype, tile_bytes: int, *, whole_rows: bool) -> Tiling:
    """Tiles of two models' logits that stay within `tile_bytes` together (at least one logit, or one whole row)."""
    elements = max(1, tile_bytes // (TILES_ALIVE * dtype.itemsize))
    if whole_rows:
        height = max(1, elements // vocab_size)
        return Tiling(num_rows, vocab_size, max(1, min(num_rows, MOST_ROWS, height)), vocab_size)
    height = max(1, min(num_rows, MOST_ROWS, math.isqrt(elements)))
    return Tiling(num_rows, vocab_size, height, min(vocab_size, elements // height))


class Workspace:
    """The memory of one pass, taken once: two tiles and `spare` blocks, handed out again and again."""

    def __init__(self, cut: Tiling, like: Tensor, dtype: torch.dtype, *, spare: int, tiles: int = TILES_ALIVE) -> None:
        def empty(size: int) -> Tensor:
            return torch.empty(size, dtype=dtype, device=like.device)

        area = cut.height * cut.width
        self._per_block = max(1, BLOCK_ELEMENTS[like.device.type] // cut.width)
        # One piece: glibc maps what is above 32 MiB, so that it goes back to the system as soon as the pass is over.
        self._tiles = empty(tiles * area).split(area)
        self._spare = [empty(min(cut.height, self._per_block) * cut.width) for _ in range(spare)]

    def tile(self, which: int, height: int, width: int) -> Tensor:
        """0: the student's, 1: the teacher's."""
        return self._tiles[which][: height * width].view(height, width)

    def spare(self, which: int, block: Tensor) -> Tensor:
        """A block of the same shape, its content left over."""
        return self._spare[which][: block.numel()].view(block.shape)

    def blocks(self, height: int) -> Iterator[slice]:
        """Rows of a tile whose full width fits a block."""
        return _slices(height, self._per_block)


def _slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
