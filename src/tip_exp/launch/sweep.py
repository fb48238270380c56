"""Which runs a sweep has: its `runs` (a line = one run's overrides) times the grid of its `params`.

    hydra.sweeper.runs: ["selector=full", "selector=random selector.retention=0.2"]   (pairs that form no grid)
    hydra.sweeper.params: {seed: "range(3)"}                                          (what Hydra itself sweeps)

A value on the command line for a swept key takes its place in both: `seed=7` runs seed 7 alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tip_exp.utils.paths import conf_dir


def expand(runs: Sequence[str], params: Mapping[str, str], arguments: Sequence[str]) -> list[list[str]]:
    """The overrides of every run, in order; two lines that become equal under `arguments` are one run.

    expand(["a=1 b=2", "a=3"], {"seed": "0,1"}, ["b=9"]) ->
        [["a=1", "b=9", "seed=0"], …]   is written  [["a=1", "seed=0", "b=9"], ["a=1", "seed=1", "b=9"], ["a=3", …], …]
    """
    parser = OverridesParser.create()
    given = {override.get_key_element() for override in parser.parse_overrides(list(arguments))}
    grid_overrides = [f"{key}={value}" for key, value in params.items()] + list(arguments)
    grid = BasicSweeper.split_arguments(parser.parse_overrides(grid_overrides), None)[0]
    lines: list[list[str]] = []
    for line in runs or [""]:
        own = [text for text in line.split() if parser.parse_override(text).get_key_element() not in given]
        if own not in lines:
            lines.append(own)
    return [[*line, *point] for line in lines for point in grid]


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
