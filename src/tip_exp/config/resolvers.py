"""Functions that conf/ calls; apart from `parse`, so that composing a config needs no schema."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf


def register_resolvers() -> None:
    """`${percent:0.5}` -> 50: names spell a ratio one way (1, 1.0 and 1.00 are all r100)."""

    def percent(ratio: Any) -> str:
        return f"{100 * ratio:g}" if isinstance(ratio, int | float) else str(ratio)  # parse() reports other types

    OmegaConf.register_new_resolver("percent", percent, replace=True)
