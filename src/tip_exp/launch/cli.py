"""`tip-exp`: compose one run (or a sweep), check it, and finish it in a child process.

`tip-exp --dry …` computes the shapes and memory of one step instead: no weights, no network, nothing written.
`tip-exp --help …` prints groups, options and keys; `tip-exp COMMAND …` is one of COMMANDS. torch loads for `--dry`,
`replay`, `score`, a rule of the user's own and in child processes only.
"""

from __future__ import annotations

import os
import sys
import traceback
from importlib.metadata import version
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from tip_exp.config.resolvers import register_resolvers
from tip_exp.launch.words import misread
from tip_exp.probe.command import PROBES, command
from tip_exp.utils import termination
from tip_exp.utils.errors import (
    BAD_CONFIG,
    FAILED,
    ConfigError,
    DataError,
    RunFailedError,
    end_without_output,
    exit_code,
    first_line,
    format_error,
    quiet_when_reader_closes,
)
from tip_exp.utils.paths import conf_dir, sweeps_dir

DRY = "--dry"
HELP = {"--help", "-h"}
ERRORS = (ConfigError, DataError, HydraException, OmegaConfBaseException, RunFailedError, OSError)


# name -> (the function that takes its arguments, imported when it is called; what it does)
COMMANDS = {
    "show": ("tip_exp.launch.show:show", "configuration, state and results of a run, or of each run of a folder"),
    "watch": (
        "tip_exp.launch.watch:watch",
        "a table of the runs of a folder while they run: step, accuracy, loss, time left",
    ),
    "compare": ("tip_exp.launch.show:compare", "how two runs or sweeps differ: configuration and results"),
    "push": ("tip_exp.launch.push:push", "a finished run's model, with a card, on the Hugging Face hub"),
    "schema": ("tip_exp.launch.schema:schema", "the JSON schema of YAML files, for editors"),
    "replay": (
        "tip_exp.probe.command:replay",
        "repeat a step with NaN or infinity; show which rollouts and which module produce it",
    ),
    "score": ("tip_exp.api.command:main", "statistics of the tokens of a file, without training"),
}


def _run(raw: DictConfig) -> None:
    from tip_exp.config.parse import parse
    from tip_exp.launch.announce import closing, opening
    from tip_exp.launch.launch import State, launch, state_of
    from tip_exp.launch.sweep import write_overrides
    from tip_exp.records.folder import RunFolder

    hydra_config = HydraConfig.get()
    os.chdir(hydra_config.runtime.cwd)  # a task of Ray starts elsewhere; paths of models and outputs/ may be relative
    config = parse(raw)
    folder = RunFolder(Path(hydra_config.runtime.output_dir))
    state = state_of(config, folder)
    if state in (State.TO_DO, State.UNFINISHED):
        print(opening(config, folder, "writes" if state is State.TO_DO else "resumes"), flush=True)
        write_overrides(folder, list(hydra_config.overrides.task))
    if note := launch(config, folder):
        print(f"{config.name}: {note}")
    print(closing(config, folder))


def _dry_run(raw: DictConfig) -> None:
    from tip_exp.config.parse import parse
    from tip_exp.data.load import check_files
    from tip_exp.estimate.dry_run import dry_run

    config = parse(raw, with_weights=False)
    check_files(config)
    print("\n".join(dry_run(config)))


def _help(raw: DictConfig) -> None:
    from tip_exp.launch.help import help_text

    print(help_text(raw, {name: meaning for name, (_, meaning) in COMMANDS.items()} | PROBES))


class RefuseEarly(Callback):
    """Checks a single run before Hydra makes its folder, so that a refused command leaves nothing."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        from tip_exp.config.parse import check_positions, parse
        from tip_exp.data.load import check_files
        from tip_exp.launch.launch import check_folder
        from tip_exp.launch.ranks import check_machine
        from tip_exp.records.folder import RunFolder

        raw = config.copy()
        with open_dict(raw):
            del raw["hydra"]
        try:
            parsed, folder = parse(raw), RunFolder(Path(config.hydra.run.dir))
            if not folder.result.exists():
                check_machine(parsed, os.environ)
            check_folder(folder)
            check_positions(parsed)
            check_files(parsed)
        # Hydra only warns of an exception here, and would start the run.
        except (ConfigError, DataError, OSError) as error:
            sys.exit(print_error(error))
        except Exception:
            traceback.print_exc()
            sys.exit(FAILED)


@quiet_when_reader_closes
def main() -> None:
    """An error that a user can cause is one message without a traceback (HYDRA_FULL_ERROR=1 shows it)."""
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        return resolve_name(COMMANDS[sys.argv[1]][0])(sys.argv[2:])
    body = _run
    if sys.argv[1:2] and sys.argv[1] in PROBES:
        body, overrides = command(sys.argv[1], sys.argv[2:])
        sys.argv = [sys.argv[0], *overrides]
    flags = set(sys.argv[1:])
    if "--version" in flags:
        return print(f"tip_exp {version('tip_exp')}")
    register_resolvers()
    if flags & HELP:
        body = _help
    elif DRY in flags:
        body = _dry_run
    _use_shipped_sweeps()
    if body is _run:
        added = ["+hydra.callbacks.refuse_early._target_=tip_exp.launch.cli.RefuseEarly"]
    else:
        sys.argv = [arg for arg in sys.argv if arg not in {DRY, *HELP, "-m", "--multirun"}]
        added = ["hydra.mode=RUN", "hydra.run.dir=.", "hydra.output_subdir=null"]  # write nothing
    typed = sys.argv[1:]
    sys.argv = with_overrides(sys.argv, added)
    show_traceback = "HYDRA_FULL_ERROR" in os.environ
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises errors instead of printing them

    composed = False

    @hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
    def task(raw: DictConfig) -> None:
        nonlocal composed
        composed = True
        try:
            body(raw)
        except BrokenPipeError:
            end_without_output()  # raised, Hydra would print a line of its own
        except ERRORS as error:
            if show_traceback:
                raise
            code = print_error(error)
            if HydraConfig.get().mode is RunMode.MULTIRUN:
                raise  # Hydra finishes the other runs, then raises the first error
            sys.exit(code)

    try:
        termination.handle()
        if body is _dry_run and flags & {"-m", "--multirun"}:
            raise ConfigError(f"{DRY} computes one run; `tip-plan sweeps/x.yaml` checks a sweep")
        if wrong := misread(typed, [*COMMANDS, *PROBES]):
            raise ConfigError(wrong)
        task()
    except KeyboardInterrupt as stop:
        sys.exit(termination.code_of(stop))
    except BrokenPipeError:
        raise
    except ERRORS as error:
        if show_traceback:
            raise
        sys.exit(print_error(error))
    except (ValueError, RecursionError) as error:  # Hydra raises them for overrides such as selector=null
        if show_traceback or composed:
            raise
        sys.exit(print_error(cannot_compose(error)))


def _use_shipped_sweeps() -> None:
    """`-cd sweeps` means the package's sweeps where the working directory has no folder of that name."""
    for flag, value in enumerate(sys.argv[1:], start=1):
        if value == "sweeps" and sys.argv[flag - 1] in ("-cd", "--config-dir") and not Path(value).is_dir():
            sys.argv[flag] = str(sweeps_dir())


def with_overrides(arguments: list[str], added: list[str]) -> list[str]:
    """More overrides beside the user's: argparse takes overrides in one place of the command line only."""
    given = get_args_parser().parse_known_args(arguments[1:])[0].overrides
    end = arguments.index(given[-1]) + 1 if given else len(arguments)
    return [*arguments[:end], *added, *arguments[end:]]


def cannot_compose(error: Exception) -> ConfigError:
    """The error of overrides that Hydra cannot read and refuses with an error of Python's own."""
    start = f"these overrides cannot be composed: {first_line(error)[:400]}"
    return ConfigError(f"{start}; tip-exp --help lists groups and keys")


def print_error(error: Exception) -> int:
    """Print one message on stderr, without a traceback; returns the exit code."""
    from tip_exp.launch.help import unknown_name

    wrong_name = unknown_name(error) if isinstance(error, HydraException) else ""
    message = f"error: {wrong_name}" if wrong_name else format_error(error).partition("\nConfig search path")[0]
    print(message, file=sys.stderr)
    return BAD_CONFIG if wrong_name else exit_code(error)  # Hydra's error of a missing config is an OSError
