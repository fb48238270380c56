"""`tip-plan sweeps/x.yaml [key=value …]`: every run of a sweep, checked, with its state; nothing is started."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from tip_exp.config import ConfigError, RunConfig, parse, register_resolvers
from tip_exp.launch import State, changes, state_of
from tip_exp.paths import RunFolder, conf_dir
from tip_exp.sweeping import expand


@dataclass(frozen=True, slots=True)
class Planned:
    """One run of a sweep: its overrides and either its config and folder, or why it cannot run."""

    overrides: list[str]
    config: RunConfig | None
    folder: RunFolder | None
    error: str | None


def plan(sweep: Path, arguments: list[str]) -> list[Planned]:
    """Compose and check every run of a sweep file, as `tip-exp -cd sweeps -cn NAME` would run it."""
    with initialize_config_dir(str(sweep.resolve().parent), version_base="1.3"):
        search = [f"hydra.searchpath=[file://{conf_dir()}]"]
        whole = compose(sweep.stem, overrides=search, return_hydra_config=True)
        sweeper = whole.hydra.sweeper
        runs = expand(OmegaConf.to_object(sweeper.runs), OmegaConf.to_object(sweeper.params), arguments)  # pyright: ignore[reportArgumentType]
        return [_planned(sweep.stem, search, overrides) for overrides in runs]


def _planned(sweep: str, search: list[str], overrides: list[str]) -> Planned:
    try:
        raw = compose(sweep, overrides=search + overrides, return_hydra_config=True)
        with open_dict(raw):
            raw.hydra.job.config_name = sweep
            root = Path(raw.hydra.sweep.dir)
            del raw["hydra"]
        config = parse(raw)
    except (ConfigError, HydraException, OmegaConfBaseException) as error:
        return Planned(overrides, None, None, str(error))
    return Planned(overrides, config, RunFolder(root / config.name), None)


def main() -> None:
    parser = argparse.ArgumentParser(description="Check every run of a sweep and tell its state.")
    parser.add_argument("sweep", type=Path, help="a file of sweeps/")
    parser.add_argument("overrides", nargs="*", help="as for tip-exp, for example seed=7")
    arguments = parser.parse_args()
    if not arguments.sweep.is_file():
        sys.exit(f"error: {arguments.sweep} is not a file; sweeps are the files of sweeps/, such as sweeps/demo.yaml")
    register_resolvers()
    try:
        planned = plan(arguments.sweep, arguments.overrides)
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {error}")
    states: Counter[str] = Counter()
    for one in planned:
        if one.config is None or one.folder is None:
            states["cannot run"] += 1
            print(f"cannot run      {' '.join(one.overrides)}: {one.error}")
            continue
        state = state_of(one.config, one.folder)
        states[state] += 1
        note = f"  ({'; '.join(changes(one.config, one.folder))})" if state is State.CHANGED else ""
        print(f"{state:<14}  {one.config.name}{note}")
    print(f"{len(planned)} runs: {', '.join(f'{count} {state}' for state, count in states.items())}")
    if states["cannot run"] or states[State.CHANGED]:
        sys.exit(2)


if __name__ == "__main__":
    main()
