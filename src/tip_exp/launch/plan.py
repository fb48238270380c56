"""`tip-plan sweeps/x.yaml [key=value …]`: check every run of a sweep; print its state, memory and time.

Starts nothing. Lists the runs that another sweep has finished; `tip-exp` links them instead of running them.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tip_exp.config.resolvers import register_resolvers
from tip_exp.estimate.time import H200_GIB, TOO_LARGE, Forecast, Forecaster
from tip_exp.launch.launch import State, changes, state_of
from tip_exp.launch.reuse import find_duplicate, finished_digests
from tip_exp.launch.sweep import RefusedRun, RunComposer, SweepRun, expand
from tip_exp.utils.errors import BAD_CONFIG, ConfigError, format_error
from tip_exp.utils.paths import OUTPUTS, conf_dir

CANNOT_RUN, DONE_ELSEWHERE = "cannot run", "done elsewhere"  # beside the states of launch.State


def plan(sweep: Path, arguments: list[str]) -> list[SweepRun | RefusedRun]:
    """Compose and check every run of a sweep file, as `tip-exp -cd sweeps -cn NAME` would run it."""
    with initialize_config_dir(str(sweep.resolve().parent), version_base="1.3"):
        search = [f"hydra.searchpath=[file://{conf_dir()}]"]
        sweeper = compose(sweep.stem, overrides=search, return_hydra_config=True).hydra.sweeper
        runs = expand(OmegaConf.to_object(sweeper.runs), OmegaConf.to_object(sweeper.params), arguments)  # pyright: ignore[reportArgumentType]
        composer = RunComposer(lambda chosen: compose(sweep.stem, overrides=search + chosen, return_hydra_config=True))
        return [composer.check(sweep.stem, overrides) for overrides in runs]


def format_plan(runs: list[SweepRun | RefusedRun], outputs: Path) -> tuple[list[str], Counter[str]]:
    """One line per run, then the totals; and the number of runs in each state."""
    forecast = Forecaster(outputs)
    finished = finished_digests(outputs)
    lines: list[str] = []
    states: Counter[str] = Counter()
    to_run: list[Forecast] = []
    for run in runs:
        if isinstance(run, RefusedRun):
            states[CANNOT_RUN] += 1
            lines.append(f"{CANNOT_RUN:<14}  {' '.join(run.overrides)}: {run.error}")
            continue
        try:
            state, expected = state_of(run.config, run.folder), forecast(run.config)
        except ConfigError as error:  # a model whose config names no sizes
            states[CANNOT_RUN] += 1
            lines.append(f"{CANNOT_RUN:<14}  {run.config.name}: {error}")
            continue
        name, note = str(state), _format_forecast(expected)
        if state is State.CHANGED:
            note = f"({'; '.join(changes(run.config, run.folder))})"
        elif state is State.TO_DO and (duplicate := find_duplicate(run.config, run.folder, finished)):
            name, note = DONE_ELSEWHERE, f"(in {duplicate.root}; will be linked)"
        elif state in (State.TO_DO, State.UNFINISHED):
            to_run.append(expected)
        states[name] += 1
        lines.append(f"{name:<14}  {run.config.name:<44} {note}")
    lines.append(f"{len(runs)} runs: {', '.join(f'{count} {state}' for state, count in states.items())}")
    if to_run and (too_large := sum(expected.seconds is None for expected in to_run)):
        lines.append(f"left, but too large: {too_large} runs that need several GPUs, which training cannot use")
        to_run = [expected for expected in to_run if expected.seconds is not None]
    if to_run:
        bases = Counter(expected.basis for expected in to_run)
        duration = format_duration(sum(expected.seconds or 0 for expected in to_run))
        lines.append(
            f"left to run: about {duration} one after another, at "
            f"most {max(expected.gib for expected in to_run):.2f} GiB each "
            f"({', '.join(f'{count} {basis}' for basis, count in bases.items())})"
        )
    return lines, states


def _format_forecast(expected: Forecast) -> str:
    if expected.seconds is None:
        return f"{TOO_LARGE}: {expected.gib:,.0f} GiB, an H200 has {H200_GIB}"
    return f"{expected.gib:8.2f} GiB {format_duration(expected.seconds):>9}  {expected.basis}"


def format_duration(seconds: float) -> str:
    """48 s, 12 min, 3.5 h, 12 d"""
    for limit, size, unit in ((172_800, 86_400, "d"), (5_400, 3_600, "h"), (120, 60, "min")):
        if seconds >= limit:
            value = seconds / size
            return f"{value:.1f} {unit}" if value < 10 else f"{value:,.0f} {unit}"
    return f"{seconds:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description="Check every run of a sweep; print its state, memory and time.")
    parser.add_argument("sweep", type=Path, help="a file of sweeps/")
    parser.add_argument("overrides", nargs="*", help="as for tip-exp, for example seed=7")
    arguments = parser.parse_args()
    if not arguments.sweep.is_file():
        sys.exit(f"error: {arguments.sweep} is not a file; sweeps are the files of sweeps/, such as sweeps/demo.yaml")
    register_resolvers()
    try:
        runs = plan(arguments.sweep, arguments.overrides)
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(format_error(error))
    lines, states = format_plan(runs, OUTPUTS)
    print("\n".join(lines))
    if states[CANNOT_RUN] or states[State.CHANGED]:
        sys.exit(BAD_CONFIG)


if __name__ == "__main__":
    main()
