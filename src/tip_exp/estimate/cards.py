"""GPUs by their memory in GB, with the numbers that forecasts need; rates are those of NVIDIA's data sheets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Card:
    """`gib`: memory that CUDA reports; `flops`: dense bfloat16 with float32 sums, per second.

    Bytes per second: `bandwidth` of its memory, `link` to another card of its machine in one direction, `host_link`.
    """

    name: str
    gib: float
    flops: float
    bandwidth: float
    link: float
    host_link: float


CARDS = {
    24: Card("RTX 4090", 23.6, 165e12, 1.008e12, 25e9, 25e9),
    48: Card("L40S", 44.4, 362e12, 0.864e12, 25e9, 25e9),
    80: Card("H100", 79.1, 989e12, 3.35e12, 450e9, 50e9),
    141: Card("H200", 139.8, 989e12, 4.8e12, 450e9, 50e9),
}
DEFAULT_CARD = 80
RANKS = (1, 2, 4, 8)  # of the tables: the GPUs of one machine
NODE_LINK = 50e9  # bytes per second and card between machines: 400 Gbit/s InfiniBand
