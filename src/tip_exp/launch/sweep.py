"""The runs of a sweep: its `runs` (a line = the overrides of one run, or a grid of its own) times its `params`.

    hydra.sweeper.runs: ["selector=full", "selector=random,q3 selector.retention=0.2"]   (what forms no grid)
    hydra.sweeper.params: {seed: "range(3)"}                                             (Hydra's own sweep syntax)

A value on the command line replaces a swept key in both: `seed=7` runs seed 7 only.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from tip_exp.config.parse import check_positions, parse
from tip_exp.config.schema import RunConfig
from tip_exp.data.load import check_files
from tip_exp.launch.help import unknown_name
from tip_exp.records.folder import RunFolder
from tip_exp.utils.errors import ConfigError, first_line
from tip_exp.utils.paths import conf_dir

# A quoted value may hold spaces. A quote without its end is left for Hydra to refuse.
_WORD = re.compile(r"""(?:[^\s'"]|'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|['"])+""")
MAIN_CONFIG = "config"  # conf/config.yaml: the command names no sweep file


@dataclass(frozen=True, slots=True)
class SweepRun:
    """One accepted run of a sweep."""

    overrides: list[str]
    config: RunConfig
    folder: RunFolder


@dataclass(frozen=True, slots=True)
class RefusedRun:
    """One run of a sweep that cannot start, and why."""

    overrides: list[str]
    error: str


def expand(runs: Sequence[str], params: Mapping[str, str], arguments: Sequence[str]) -> list[list[str]]:
    """The overrides of every run, in order; equal ones are one run.

    expand(["a=1 b=2,4", "a=3"], {"seed": "0"}, ["c=9"]) ->
        [["a=1", "b=2", "seed=0", "c=9"], ["a=1", "b=4", "seed=0", "c=9"], ["a=3", "seed=0", "c=9"]]
    """
    parser = OverridesParser.create()
    replaced = {override.get_key_element() for override in parser.parse_overrides(list(arguments))}
    grid_overrides = [f"{key}={value}" for key, value in params.items()] + list(arguments)
    grid: list[list[str]] = []
    for point in BasicSweeper.split_arguments(parser.parse_overrides(grid_overrides), None)[0]:
        if point not in grid:
            grid.append(point)
    lines: list[list[str]] = []
    for line in runs or [""]:
        try:
            overrides = [parser.parse_override(text) for text in _WORD.findall(line)]
        except HydraException as error:
            raise ConfigError(f"hydra.sweeper.runs: {line!r}: {first_line(error)}") from error
        kept = [override for override in overrides if override.get_key_element() not in replaced]
        for of_run in BasicSweeper.split_arguments(kept, None)[0]:
            if of_run not in lines:
                lines.append(of_run)
    return [[*line, *point] for line in lines for point in grid]


class RunComposer:
    """Composes runs, with one call of Hydra for all runs that choose the same groups."""

    def __init__(self, compose: Callable[[list[str]], DictConfig]) -> None:
        self._compose = compose
        self._parser = OverridesParser.create()
        self._composed: dict[tuple[str, ...], DictConfig] = {}

    def __call__(self, overrides: Sequence[str]) -> DictConfig:
        """A config that the caller may change."""
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
            return self._compose(list(overrides))  # for Hydra's error message
        return config

    def check_all(self, sweep: str, runs: Sequence[list[str]]) -> list[SweepRun | RefusedRun]:
        """`check` of each run. Runs that would share a folder have the overrides in which they differ in their names.

        Of learner.lr=1e-3,2e-3: NAME.lr0.001 and NAME.lr0.002.
        """
        checked = [self.check(sweep, overrides) for overrides in runs]
        sharing: dict[str, list[int]] = {}
        for i, run in enumerate(checked):
            if isinstance(run, SweepRun):
                sharing.setdefault(run.config.name, []).append(i)
        for name, places in sharing.items():
            common = set.intersection(*(set(runs[i]) for i in places))
            for i in places:
                if differing := [override for override in runs[i] if override not in common]:
                    own_name = f"{name}.{'.'.join(map(_short, differing))}".replace("'", r"\'")
                    checked[i] = self.check(sweep, [*runs[i], f"name='{own_name}'"])
        return checked

    def check(self, sweep: str, overrides: list[str]) -> SweepRun | RefusedRun:
        """Compose and validate one run of the sweep file named `sweep`."""
        try:
            raw = self(overrides)
            with open_dict(raw):
                raw.hydra.job.config_name = sweep
                folder = Path(raw.hydra.sweep.dir) / raw.hydra.sweep.subdir
                del raw["hydra"]
            config = parse(raw)
            check_positions(config)
            check_files(config)
            return SweepRun(overrides, config, RunFolder(folder))
        except (ValueError, OSError, HydraException, OmegaConfBaseException) as error:  # also a ConfigError
            return RefusedRun(overrides, unknown_name(error) or str(error))


def write_overrides(folder: RunFolder, overrides: list[str]) -> None:
    """Write down what was typed for the run; the report reads it."""
    folder.overrides.parent.mkdir(parents=True, exist_ok=True)
    folder.overrides.write_text(yaml.safe_dump(overrides), encoding="utf-8")


def folder_name(config_name: str, overrides: Sequence[str]) -> str:
    """The folder of a sweep: its file's name, or without a file `sweep=NAME`, else the swept keys.

    folder_name("config", ["selector=full,q3", "selector.retention=0.2,0.5", "seed=1"]) -> "selector-retention"
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    if config_name != MAIN_CONFIG:
        return config_name
    named = [str(override.value()) for override in parsed if override.key_or_group == "sweep"]
    if named and not any(override.key_or_group == "sweep" and override.is_sweep_override() for override in parsed):
        return named[-1]
    swept = [override.key_or_group.rpartition(".")[2] for override in parsed if override.is_sweep_override()]
    return "-".join(dict.fromkeys(swept)) or config_name


def _short(override: str) -> str:
    """An override as part of a file's name: learner.lr=0.001 -> lr0.001."""
    key, _, value = override.partition("=")
    return re.sub(r"[^\w.+-]+", "-", key.rpartition(".")[2] + value)


def _is_value(override: Override) -> bool:
    """True for key=value of an existing key; False for a choice of a group, an addition, a deletion or a package."""
    simple = not (override.is_add() or override.is_delete() or override.is_sweep_override() or override.package)
    return simple and not (conf_dir() / override.key_or_group).is_dir() and "/" not in override.key_or_group
