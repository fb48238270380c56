"""`tip-plan`: memory, time and state of runs before they start. Starts nothing.

tip-plan SWEEP [key=value …]          Check every run of a sweep; print its state, memory and time. Lists the runs that
                                      another sweep has finished; `tip-exp` links them instead of running them.
tip-plan memory [key=value …]         The memory of one run, configured as for `tip-exp`, by GPUs and their memory.
tip-plan time [key=value …]           Its time.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from tip_exp.config.parse import check_positions, digest, parse
from tip_exp.config.resolvers import register_resolvers
from tip_exp.config.schema import RunConfig
from tip_exp.estimate.cards import CARDS, DEFAULT_CARD, Card
from tip_exp.estimate.forecast import COMPUTED, Forecast, Forecaster
from tip_exp.estimate.memory import total_ranks
from tip_exp.estimate.shapes import guess_note
from tip_exp.estimate.tables import format_hours, memory_tables, time_tables
from tip_exp.launch.cli import ERRORS, cannot_compose, print_error
from tip_exp.launch.launch import State, changes, state_of
from tip_exp.launch.reuse import find_duplicate, finished_digests, parse_result, read_result
from tip_exp.launch.sweep import RefusedRun, RunComposer, SweepRun, expand
from tip_exp.launch.teacher import TEACHERS, teacher_config
from tip_exp.records.folder import RunFolder
from tip_exp.records.integrity import damage
from tip_exp.utils.errors import BAD_CONFIG, FAILED, ConfigError, quiet_when_reader_closes
from tip_exp.utils.paths import OUTPUTS, conf_dir, sweeps_dir
from tip_exp.utils.units import format_duration

CANNOT_RUN, DONE_ELSEWHERE = "cannot run", "done elsewhere"  # beside the states of launch.State
NO_DURATION = "-"
TABLES = ("memory", "time")  # instead of a sweep


def plan(sweep: Path, arguments: list[str]) -> list[SweepRun | RefusedRun]:
    """Compose and check every run of a sweep file, as `tip-exp -cd sweeps -cn NAME` would run it."""
    with initialize_config_dir(str(sweep.resolve().parent), version_base="1.3"):
        search = [f"hydra.searchpath=[file://{conf_dir()}]"]
        of_sweeper = [argument for argument in arguments if argument.lstrip("+~").startswith(("hydra.", "hydra/"))]
        sweeper = compose(sweep.stem, overrides=search + of_sweeper, return_hydra_config=True).hydra.sweeper
        of_runs = [argument for argument in arguments if argument not in of_sweeper]
        runs = expand(OmegaConf.to_object(sweeper.runs), OmegaConf.to_object(sweeper.params), of_runs)  # pyright: ignore[reportArgumentType]
        composer = RunComposer(lambda chosen: compose(sweep.stem, overrides=search + chosen, return_hydra_config=True))
        return composer.check_all(sweep.stem, runs)


def format_plan(
    runs: list[SweepRun | RefusedRun], outputs: Path, card: Card = CARDS[DEFAULT_CARD]
) -> tuple[list[str], Counter[str]]:
    """One line per run, then the totals; and the number of runs in each state. Computed times are those of `card`."""
    forecast = Forecaster(outputs, card)
    finished = finished_digests(outputs)
    teachers: set[str] = set()  # digests of the evaluations that are counted already
    lines: list[str] = []
    states: Counter[str] = Counter()
    to_run: list[tuple[RunConfig, Forecast]] = []
    for run in runs:
        if isinstance(run, RefusedRun):
            states[CANNOT_RUN] += 1
            lines.append(f"{CANNOT_RUN:<14}  {' '.join(run.overrides)}: {run.error}")
            continue
        config = _without_shared_teacher(run.config, teachers)
        try:
            state, expected = state_of(run.config, run.folder), forecast(config)
        except ConfigError as error:  # a model whose config names no sizes
            states[CANNOT_RUN] += 1
            lines.append(f"{CANNOT_RUN:<14}  {run.config.name}: {error}")
            continue
        name, note = str(state), _format_forecast(run.config, expected)
        if state is State.CHANGED:
            note = f"({'; '.join(changes(run.config, run.folder))})"
        elif state is State.DAMAGED:
            note = f"({damage(run.folder, parse_result(run.folder) or {})})"
        elif state is State.TO_DO and (duplicate := find_duplicate(run.config, run.folder, finished)):
            name, note = DONE_ELSEWHERE, f"(in {duplicate.root}; will be linked)"
        elif state in (State.TO_DO, State.UNFINISHED):
            to_run.append((config, expected))
        states[name] += 1
        lines.append(f"{name:<14}  {run.config.name:<44} {note}")
    lines.append(f"{len(runs)} runs: {', '.join(f'{count} {state}' for state, count in states.items())}")
    return [*lines, *_format_totals(to_run, card)], states


def _without_shared_teacher(config: RunConfig, teachers: set[str]) -> RunConfig:
    """The run without its teacher's evaluation if one of `teachers` is the same or it is finished; else adds it."""
    if not config.eval.teacher or config.mode == "teacher":
        return config
    teacher = digest(teacher_config(config))
    if teacher not in teachers and read_result(RunFolder(TEACHERS / teacher)) is None:
        teachers.add(teacher)
        return config
    return config.model_copy(update={"eval": config.eval.model_copy(update={"teacher": False})})


def _format_totals(to_run: list[tuple[RunConfig, Forecast]], card: Card) -> list[str]:
    """What is left: runs without a time, then time and memory of the others, and computed hours by number of GPUs."""
    lines: list[str] = []
    for reason, count in Counter(expected.basis for _, expected in to_run if expected.seconds is None).items():
        lines.append(f"left, but without a time: {count} run{'s' * (count > 1)} ({reason})")
    timed = [(config, expected) for config, expected in to_run if expected.seconds is not None]
    if timed:
        bases = Counter(expected.basis for _, expected in timed)
        duration = format_duration(sum(expected.seconds or 0 for _, expected in timed))
        lines.append(
            f"left to run: about {duration} one after another, at most "
            f"{max(expected.gib for _, expected in timed):.2f} GiB each "
            f"({', '.join(f'{count} {basis}' for basis, count in bases.items())})"
        )
    if computed := [config for config, expected in timed if expected.basis.startswith(COMPUTED)]:
        lines.append(f"the {len(computed)} computed by number of GPUs: {format_hours(computed, card)}")
    return lines


def _format_forecast(config: RunConfig, expected: Forecast) -> str:
    """Memory, time and basis; a fixed number of ranks that is too small is named."""
    duration = NO_DURATION if expected.seconds is None else format_duration(expected.seconds)
    note = ""
    if config.ranks != "auto" and expected.cards > (ranks := total_ranks(config)):
        note = f"; {ranks} do not hold it"
    return f"{expected.gib:8.2f} GiB {duration:>9}  {expected.basis}{note}"


def tables(kind: str, overrides: list[str], card: Card) -> list[str]:
    """The tables of one run: `kind` is one of TABLES."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        try:
            raw = compose("config", overrides=overrides)
        except ERRORS:
            raise
        except (ValueError, RecursionError) as error:
            raise cannot_compose(error) from error
        config = parse(raw, with_weights=False)
    check_positions(config)
    note = guess_note(config)
    of_kind = memory_tables if kind == "memory" else time_tables
    return [*([note] if note else []), *of_kind(config, card)]


@quiet_when_reader_closes
def main() -> None:
    parser = argparse.ArgumentParser(
        description="Memory, time and state of runs before they start.", allow_abbrev=False
    )
    parser.add_argument(
        "sweep", type=Path, help="a file, or a name of sweeps/; or memory, or time: the tables of one run"
    )
    parser.add_argument("overrides", nargs="*", help="as for tip-exp, for example seed=7")
    parser.add_argument(
        "--card",
        type=int,
        choices=CARDS,
        default=DEFAULT_CARD,
        help="GB of the GPU in times and phases (80)",
    )
    arguments = parser.parse_intermixed_args()
    register_resolvers()
    card, kind, sweep = CARDS[arguments.card], str(arguments.sweep), arguments.sweep
    if not sweep.is_file():
        sweep = sweeps_dir() / f"{kind}.yaml"
    if kind not in TABLES and not sweep.is_file():
        files = sorted(sweeps_dir().glob("*.yaml"))
        names = ", ".join(str(path) if path.stem in TABLES else path.stem for path in files)
        message = f"{arguments.sweep} is no sweep; give a file, or a name of {sweeps_dir()}: {names}"
        if arguments.sweep.is_dir():
            message = f"{arguments.sweep} is a folder; its runs are shown by `tip-exp show {arguments.sweep}`"
        sys.exit(print_error(ConfigError(message)))
    try:
        if kind in TABLES:
            print("\n\n".join(tables(kind, arguments.overrides, card)))
            return
        lines, states = format_plan(plan(sweep, arguments.overrides), OUTPUTS, card)
    except BrokenPipeError:
        raise
    except ERRORS as error:
        sys.exit(print_error(error))
    print("\n".join(lines))
    if states[CANNOT_RUN] or states[State.CHANGED]:
        sys.exit(BAD_CONFIG)
    if states[State.DAMAGED]:
        sys.exit(FAILED)


if __name__ == "__main__":
    main()
