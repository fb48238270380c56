"""Composing the many runs of a sweep quickly: what groups give is composed once, plain values are set on a copy.

Hydra applies values after all groups, so that the result is the same; 100 runs of eight selections with five seeds
take eight compositions instead of 100. Whatever is not a plain value of a known key goes through Hydra itself, which
also words the errors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tip_exp.paths import conf_dir


class RunComposer:
    """Calls `compose(overrides)` of Hydra no more often than needed; returns configs that the caller may change."""

    def __init__(self, compose: Callable[[list[str]], DictConfig]) -> None:
        self._compose = compose
        self._parser = OverridesParser.create()
        self._composed: dict[tuple[str, ...], DictConfig] = {}

    def __call__(self, overrides: Sequence[str]) -> DictConfig:
        parsed = self._parser.parse_overrides(list(overrides))
        groups = tuple(override.input_line or "" for override in parsed if not _is_value(override))
        if groups not in self._composed:
            self._composed[groups] = self._compose(list(groups))
        config = copy.deepcopy(self._composed[groups])
        try:
            for override in parsed:
                if _is_value(override):
                    OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
        except OmegaConfBaseException:
            return self._compose(list(overrides))
        return config


def _is_value(override: Override) -> bool:
    """key=value of an existing key, neither a group's choice nor an addition, a deletion or another package."""
    simple = not (override.is_add() or override.is_delete() or override.is_sweep_override() or override.package)
    return simple and not (conf_dir() / override.key_or_group).is_dir() and "/" not in override.key_or_group
