"""`tip-exp`: compose a run (or a sweep, with -m), check it, and finish it in a process of its own.

`tip-exp --dry …` walks one step of the run through on shapes alone instead: no weights, no network, nothing written.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from tip_exp.config.parse import parse, register_resolvers
from tip_exp.launch.launch import RunFailedError, launch
from tip_exp.records.folder import RunFolder
from tip_exp.utils.errors import ConfigError
from tip_exp.utils.paths import conf_dir

FAILED, BAD_CONFIG, INTERRUPTED = 1, 2, 130
DRY = "--dry"
ERRORS = (ConfigError, HydraException, OmegaConfBaseException, RunFailedError, OSError)


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
def _task(raw: DictConfig) -> None:
    context = HydraConfig.get()
    try:
        launch(parse(raw), RunFolder(Path(context.runtime.output_dir)))
    except ERRORS as error:
        if context.mode is RunMode.MULTIRUN:
            print(_told(error), file=sys.stderr)
            raise  # Hydra runs the others, then raises the first error again
        sys.exit(_tell(error))


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
def _dry_task(raw: DictConfig) -> None:
    from tip_exp.estimate.dry_run import dry_run

    print("\n".join(dry_run(parse(raw, with_weights=False))))


def main() -> None:
    """Every error a user can make is one message without a traceback (HYDRA_FULL_ERROR=1 shows it)."""
    register_resolvers()
    task = _task
    if DRY in sys.argv[1:]:
        task = _dry_task
        sys.argv = [argument for argument in sys.argv if argument != DRY]
        if {"-m", "--multirun"} & set(sys.argv):
            sys.exit(_tell(ConfigError(f"{DRY} walks through one run; `tip-plan sweeps/x.yaml` checks a sweep")))
        sys.argv += ["hydra.mode=RUN", "hydra.run.dir=.", "hydra.output_subdir=null"]  # so that nothing is written
    wants_traceback = "HYDRA_FULL_ERROR" in os.environ
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors through to us instead of printing them
    try:
        task()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except ERRORS as error:
        if wants_traceback:
            raise
        sys.exit(_tell(error))


def _tell(error: Exception) -> int:
    """Print an error; returns the exit code it deserves."""
    print(_told(error), file=sys.stderr)
    return FAILED if isinstance(error, RunFailedError | OSError) else BAD_CONFIG


def _told(error: Exception) -> str:
    cause = f"\n{error.__cause__}" if isinstance(error.__cause__, OmegaConfBaseException) else ""
    return f"error: {error}{cause}"
