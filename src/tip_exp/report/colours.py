"""Colours of the plots, distinct for any number of selectors, on a white and on a black background."""

from __future__ import annotations

import colorsys
import itertools
import math
from collections.abc import Sequence

# Okabe and Ito (2008) without black and yellow, which are invisible on one of the two backgrounds; then mixed colours.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8A7A2F", "#7F6BB3")


def colour_of(selectors: Sequence[str]) -> dict[str, str]:
    """One colour per selector, the same in all plots; after the first ones, the candidate farthest from all others."""
    names = list(dict.fromkeys(selectors))
    grid = itertools.product(range(24), (0.3, 0.4, 0.5), (0.5, 0.9))
    channels_of = [colorsys.hls_to_rgb(hue / 24, lightness, saturation) for hue, lightness, saturation in grid]
    candidates = [
        "#" + "".join(f"{round(255 * channel):02x}" for channel in (r, g, b))
        for r, g, b in channels_of
        if 0.2 < 0.21 * r + 0.72 * g + 0.07 * b < 0.55  # luma: neither black nor white
    ]
    chosen: list[str] = list(COLOURS[: len(names)])
    while len(chosen) < len(names):
        chosen.append(max(candidates, key=lambda colour: min(distance(colour, taken) for taken in chosen)))
    return dict(zip(names, chosen, strict=True))


def distance(first: str, second: str) -> float:
    """How different two colours look, 0 to 765: the "redmean" of Riemersma (2019)."""
    (r, g, b), (r2, g2, b2) = channels(first), channels(second)
    mean = (r + r2) / 2
    return math.sqrt((2 + mean / 256) * (r - r2) ** 2 + 4 * (g - g2) ** 2 + (2 + (255 - mean) / 256) * (b - b2) ** 2)


def channels(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
