"""Hydra's basic sweeper with single runs beside the grid, and every run checked before the first starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from omegaconf import open_dict

from tip_exp.config import ConfigError, parse
from tip_exp.sweeping import expand


class RunsSweeper(BasicSweeper):
    def __init__(self, max_batch_size: int | None, params: dict[str, str], runs: list[str]) -> None:
        super().__init__(max_batch_size, params)
        self.runs = list(runs)
        self._jobs: list[list[str]] = []

    def sweep(self, arguments: list[str]) -> Any:
        self._jobs = expand(self.runs, self.params, arguments)
        return super().sweep(arguments)

    def split_arguments(self, overrides: Any, max_batch_size: int | None) -> list[list[list[str]]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return list(self.split_overrides_to_chunks(self._jobs, max_batch_size))

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        assert self.hydra_context is not None and self.config is not None
        problems: list[str] = []
        for overrides in batch:
            composed = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
            with open_dict(composed):
                del composed["hydra"]
            try:
                parse(composed)
            except ConfigError as error:
                problems.append(f"{' '.join(overrides)}: {error}")
        if problems:
            raise ConfigError("no run of this sweep was started:\n" + "\n".join(problems))


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
