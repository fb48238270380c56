"""`tip-plan sweeps/x.yaml [key=value …]`: every run of a sweep, checked, with its state and what it will take.

Nothing is started. Runs that another sweep has finished are named; `tip-exp` links them instead of running them.
"""

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

from tip_exp.config.parse import parse, register_resolvers
from tip_exp.config.schema import RunConfig
from tip_exp.estimate.time import Forecast, Forecaster
from tip_exp.launch.launch import State, changes, state_of
from tip_exp.launch.reuse import find_twin, finished_digests
from tip_exp.launch.sweep import RunComposer, expand
from tip_exp.records.folder import RunFolder
from tip_exp.records.reader import read_runs
from tip_exp.utils.errors import ConfigError
from tip_exp.utils.paths import OUTPUTS, conf_dir


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
        composer = RunComposer(lambda chosen: compose(sweep.stem, overrides=search + chosen, return_hydra_config=True))
        return [_planned(sweep.stem, composer, overrides) for overrides in runs]


def _planned(sweep: str, composer: RunComposer, overrides: list[str]) -> Planned:
    try:
        raw = composer(overrides)
        with open_dict(raw):
            raw.hydra.job.config_name = sweep
            root = Path(raw.hydra.sweep.dir)
            del raw["hydra"]
        config = parse(raw)
    except (ConfigError, HydraException, OmegaConfBaseException) as error:
        return Planned(overrides, None, None, str(error))
    return Planned(overrides, config, RunFolder(root / config.name), None)


def told(planned: list[Planned], outputs: Path) -> tuple[list[str], Counter[str]]:
    """A line a run, the total, and how many runs are in which state."""
    forecast = Forecaster([record for record in read_runs([outputs]) if record.is_done] if outputs.is_dir() else [])
    finished = finished_digests(outputs)
    lines: list[str] = []
    states: Counter[str] = Counter()
    left: list[Forecast] = []
    for one in planned:
        if one.config is None or one.folder is None:
            states["cannot run"] += 1
            lines.append(f"cannot run      {' '.join(one.overrides)}: {one.error}")
            continue
        state, expected = state_of(one.config, one.folder), forecast(one.config)
        note = f"{expected.gib:8.2f} GiB {clock(expected.seconds):>9}  {expected.basis}"
        name = str(state)
        if state is State.CHANGED:
            note = f"({'; '.join(changes(one.config, one.folder))})"
        elif state is State.TO_DO and (twin := find_twin(one.config, one.folder, finished)):
            name, note = "done elsewhere", f"(in {twin.root}; will be linked)"
        elif state in (State.TO_DO, State.UNFINISHED):
            left.append(expected)
        states[name] += 1
        lines.append(f"{name:<14}  {one.config.name:<44} {note}")
    lines.append(f"{len(planned)} runs: {', '.join(f'{count} {state}' for state, count in states.items())}")
    if left:
        bases = ", ".join(f"{count} {basis}" for basis, count in Counter(one.basis for one in left).items())
        most = max(one.gib for one in left)
        lines.append(
            f"left to run: about {clock(sum(one.seconds for one in left))} one after the other, "
            f"at most {most:.2f} GiB ({bases})"
        )
    return lines, states


def clock(seconds: float) -> str:
    """Seconds as a person says them: 48 s, 12 min, 3.5 h, 12 d."""
    for size, unit in ((172_800, "d"), (5_400, "h"), (120, "min")):
        if seconds >= size:
            value = seconds / {"d": 86_400, "h": 3_600, "min": 60}[unit]
            return f"{value:.1f} {unit}" if value < 10 else f"{value:,.0f} {unit}"
    return f"{seconds:.0f} s"


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
    lines, states = told(planned, OUTPUTS)
    print("\n".join(lines))
    if states["cannot run"] or states[State.CHANGED]:
        sys.exit(2)


if __name__ == "__main__":
    main()
