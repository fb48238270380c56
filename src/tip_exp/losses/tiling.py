"""How N tokens x V logits are cut: into tiles of both models' logits within a byte budget, and into blocks of those.

Matrix products want large tiles; what is done element by element is bound by memory, and wants what a product wrote to
lie still in the last cache when it is read, and all its own temporaries in a nearer one.
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
# Logits that one product writes before they are read: 4 MiB of float32, of which a CPU's last cache holds two. A GPU's
# products are limited by the budget alone.
PRODUCT_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 40}
# Elements of a block: 1 MiB of float32, of which four stay in a CPU's caches. On a GPU a block is a kernel's worth.
BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 23}
# Columns that are never in two products of the same whole rows.
GROUP = 64
LOG2_E = 1 / math.log(2)


@dataclass(frozen=True, slots=True)
class Tiling:
    """N x V cut into `height` rows and, of those, `width` columns at a time; `whole_rows` are held all together."""

    num_rows: int
    vocab_size: int
    height: int
    width: int
    whole_rows: bool

    @property
    def area(self) -> int:
        """Logits of one model that are held."""
        return self.height * (self.vocab_size if self.whole_rows else self.width)

    def rows(self) -> Iterator[slice]:
        return _slices(self.num_rows, self.height)

    def columns(self) -> Iterator[slice]:
        return _slices(self.vocab_size, self.width)


def tiling(
    num_rows: int, vocab_size: int, dtype: torch.dtype, tile_bytes: int, *, whole_rows: bool, device: str = "cpu"
) -> Tiling:
    """Tiles of two models' logits that stay within `tile_bytes` together (at least one logit, or one whole row)."""
    elements, at_once = max(1, tile_bytes // (TILES_ALIVE * dtype.itemsize)), PRODUCT_ELEMENTS[device]
    if whole_rows:
        height = max(1, min(num_rows, MOST_ROWS, elements // vocab_size))
        width = max(GROUP, at_once // height // GROUP * GROUP)
    else:
        elements = min(elements, at_once)
        height = max(1, min(num_rows, MOST_ROWS, math.isqrt(elements)))
        width = elements // height
    return Tiling(num_rows, vocab_size, height, min(vocab_size, width), whole_rows)


def exp(x: Tensor, out: Tensor) -> Tensor:
    """e^x; on a CPU by way of 2^x, whose kernel is torch's own: MKL's for e^x takes three times as long on AMD's."""
    return torch.mul(x, LOG2_E, out=out).exp2_() if x.device.type == "cpu" else torch.exp(x, out=out)


class Workspace:
    """The memory of one pass, taken once: two tiles and `spare` blocks, handed out again and again."""

    def __init__(self, cut: Tiling, like: Tensor, dtype: torch.dtype, *, spare: int, tiles: int = TILES_ALIVE) -> None:
        def empty(size: int) -> Tensor:
            return torch.empty(size, dtype=dtype, device=like.device)

        self._cut = cut
        longest = cut.vocab_size if cut.whole_rows else cut.width
        self._block = BLOCK_ELEMENTS[like.device.type]
        # One piece: glibc maps what is above 32 MiB, so that it goes back to the system as soon as the pass is over.
        self._tiles = empty(tiles * cut.area).split(cut.area)
        self._spare = [empty(min(cut.area, max(self._block, longest))) for _ in range(spare)]

    def tile(self, which: int, height: int, columns: slice) -> Tensor:
        """0: the student's, 1: the teacher's. The columns' place in whole rows, or else the tile's own."""
        width = columns.stop - columns.start
        if not self._cut.whole_rows:
            return self._tiles[which][: height * width].view(height, width)
        rows = self._tiles[which][: height * self._cut.vocab_size].view(height, self._cut.vocab_size)
        return rows[:, columns]

    def spare(self, which: int, block: Tensor) -> Tensor:
        """A block of the same shape, its content left over."""
        return self._spare[which][: block.numel()].view(block.shape)

    def blocks(self, tile: Tensor) -> Iterator[slice]:
        """Rows of a tile whose full width fits a block."""
        return _slices(len(tile), max(1, self._block // tile.shape[-1]))


def _slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
