"""Hydra's basic sweeper, with single runs beside the grid. Checks every run first and leaves out finished ones.

With Hydra's basic launcher, runs are started here, `jobs` at a time; other launchers start them their own way.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.utils import env_override
from omegaconf import open_dict


def check_jobs(jobs: Any, *, is_basic: bool) -> None:
    """Raise ConfigError if `hydra.sweeper.jobs` is no number of runs, or of no use to the launcher."""
    from tip_exp.utils.errors import ConfigError

    if jobs is not None and (not isinstance(jobs, int) or jobs < 1 or not is_basic):
        raise ConfigError(
            f"hydra.sweeper.jobs={jobs}: must be null or a whole number from 1, and null with any but the basic "
            "launcher"
        )


class RunsSweeper(BasicSweeper):
    def __init__(self, max_batch_size: int | None, params: dict[str, str], runs: list[str], jobs: int | None) -> None:
        super().__init__(max_batch_size, params)
        self.runs, self.jobs = list(runs), jobs
        self._unfinished: list[list[str]] = []

    def sweep(self, arguments: list[str]) -> Any:
        # Hydra imports this module for every command, so what a sweep alone needs is imported here.
        from tip_exp.launch.launch import State, state_of
        from tip_exp.launch.parallel import choose_jobs, run_all
        from tip_exp.launch.sweep import RefusedRun, RunComposer, SweepRun, expand, folder_name
        from tip_exp.utils.errors import ConfigError

        assert self.hydra_context is not None and self.config is not None
        loader, config = self.hydra_context.config_loader, self.config
        is_basic = isinstance(self.launcher, BasicLauncher)
        check_jobs(self.jobs, is_basic=is_basic)
        composer = RunComposer(lambda chosen: loader.load_sweep_config(config, chosen))
        runs = expand(self.runs, self.params, arguments)
        name = folder_name(config.hydra.job.config_name, arguments)
        checked = composer.check_all(name, runs)
        if refused := [run for run in checked if isinstance(run, RefusedRun)]:
            problems = "\n".join(f"{' '.join(run.overrides)}: {run.error}" for run in refused)
            raise ConfigError(f"no run of this sweep was started:\n{problems}")
        accepted = [run for run in checked if isinstance(run, SweepRun)]
        to_run = [run for run in accepted if state_of(run.config, run.folder) is not State.DONE]
        if finished := len(accepted) - len(to_run):
            print(f"{finished} of {len(accepted)} runs are already finished in {accepted[0].folder.root.parent}")
        if not to_run:
            return []
        if is_basic:
            with env_override(config.hydra.job.env_set):
                run_all(to_run, choose_jobs([run.config for run in to_run], self.jobs))
            return []
        named = config.copy()
        with open_dict(named), open_dict(config):
            named.hydra.job.config_name = name
            # Absolute, as a task of another machine may have another working directory.
            config.hydra.sweep.dir = str(Path(named.hydra.sweep.dir).absolute())
        self._unfinished = [[*run.overrides, f"hydra.sweep.dir='{config.hydra.sweep.dir}'"] for run in to_run]
        return super().sweep(arguments)

    def split_arguments(self, overrides: Any, max_batch_size: int | None) -> list[list[list[str]]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return list(self.split_overrides_to_chunks(self._unfinished, max_batch_size))

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """`sweep` has checked every run."""


ConfigStore.instance().store(
    group="hydra/sweeper",
    name="runs",
    node={
        "_target_": "hydra_plugins.tip_exp_sweeper.RunsSweeper",
        "max_batch_size": None,
        "params": {},
        "runs": [],
        "jobs": None,
    },
    provider="tip_exp",
)
