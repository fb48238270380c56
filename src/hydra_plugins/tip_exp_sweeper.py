"""Hydra's basic sweeper with single runs beside the grid; every run is checked first, and finished ones stay out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, open_dict

from tip_exp.config.parse import parse
from tip_exp.launch.launch import State, state_of
from tip_exp.launch.sweep import RunComposer, expand
from tip_exp.records.folder import RunFolder
from tip_exp.utils.errors import ConfigError


class RunsSweeper(BasicSweeper):
    def __init__(self, max_batch_size: int | None, params: dict[str, str], runs: list[str]) -> None:
        super().__init__(max_batch_size, params)
        self.runs = list(runs)
        self._jobs: list[list[str]] = []

    def sweep(self, arguments: list[str]) -> Any:
        self._jobs = expand(self.runs, self.params, arguments)
        return super().sweep(arguments)

    def split_arguments(self, overrides: Any, max_batch_size: int | None) -> list[list[list[str]]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """All runs are checked here, before the first starts, and those that are finished are not launched again."""
        assert self.hydra_context is not None and self.config is not None
        loader, master = self.hydra_context.config_loader, self.config
        compose = RunComposer(lambda chosen: loader.load_sweep_config(master, chosen))
        root = Path(master.hydra.sweep.dir)
        problems: list[str] = []
        left: list[list[str]] = []
        for job in self._jobs:
            try:
                if not _is_done(compose(job), root):
                    left.append(job)
            except ConfigError as error:
                problems.append(f"{' '.join(job)}: {error}")
        if problems:
            raise ConfigError("no run of this sweep was started:\n" + "\n".join(problems))
        if finished := len(self._jobs) - len(left):
            print(f"{finished} of {len(self._jobs)} runs are already finished in {root}")
        return list(self.split_overrides_to_chunks(left, max_batch_size)) if left else []

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Done for all batches in `split_arguments`."""


def _is_done(composed: DictConfig, root: Path) -> bool:
    subdir = composed.hydra.sweep.subdir
    with open_dict(composed):
        del composed["hydra"]
    config = parse(composed)
    return state_of(config, RunFolder(root / subdir)) is State.DONE


ConfigStore.instance().store(
    group="hydra/sweeper",
    name="runs",
    node={
        "_target_": "hydra_plugins.tip_exp_sweeper.RunsSweeper",
        "max_batch_size": None,
        "params": {},
        "runs": [],
    },
    provider="tip_exp",
)
