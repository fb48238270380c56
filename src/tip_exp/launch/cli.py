"""`tip-exp`: compose one run (or a sweep), check it, and finish it in a child process.

`tip-exp --dry …` computes the shapes and memory of one step instead: no weights, no network, nothing written.
`tip-exp --help …` prints groups, options and keys. torch loads for `--dry` and in child processes only.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tip_exp.config.resolvers import register_resolvers
from tip_exp.utils import termination
from tip_exp.utils.errors import INTERRUPTED, TERMINATED, ConfigError, RunFailedError, exit_code, format_error
from tip_exp.utils.paths import conf_dir
from tip_exp.utils.termination import Terminated

DRY = "--dry"
ERRORS = (ConfigError, HydraException, OmegaConfBaseException, RunFailedError, OSError)
HELP = """\
usage: tip-exp [group=option …] [key=value …]        one run
       tip-exp -cd sweeps -cn NAME [key=value …]     every run of sweeps/NAME.yaml
       tip-exp -m key=1,2 …                          every combination of the values
       tip-exp score --help                          statistics of the tokens of a file, without training
The same command again resumes what is unfinished.

  --dry        compute the shapes and memory of one step, without weights; start nothing
  --cfg job    print the composed config only
  --help       this text, with the config that the other arguments give
  ranks=N                          processes of one run, one per GPU (default: all GPUs, or 1 on a CPU)
  hydra.sweeper.jobs=N             runs of a sweep at a time (default: GPUs / ranks, or one per core if memory allows)
  hydra/launcher=slurm|…           start the runs of a sweep another way (docs/clusters.md)

groups (group=option)
{groups}

keys (key=value) and their values
{keys}"""


def _run(raw: DictConfig) -> None:
    from tip_exp.config.parse import parse
    from tip_exp.launch.launch import launch
    from tip_exp.records.folder import RunFolder

    config = parse(raw)
    if note := launch(config, RunFolder(Path(HydraConfig.get().runtime.output_dir))):
        print(f"{config.name}: {note}")


def _dry_run(raw: DictConfig) -> None:
    from tip_exp.config.parse import parse
    from tip_exp.estimate.dry_run import dry_run

    print("\n".join(dry_run(parse(raw, with_weights=False))))


def _help(raw: DictConfig) -> None:
    options: dict[str, set[str]] = {}
    for source in GlobalHydra.instance().config_loader().get_sources():
        for group in source.list("", ObjectType.GROUP) if source.available() else []:
            options.setdefault(group, set()).update(source.list(group, ObjectType.CONFIG))
    groups = [f"  {group}: {', '.join(sorted(names))}" for group, names in sorted(options.items()) if group != "hydra"]
    keys = "".join(f"  {line}\n" for line in OmegaConf.to_yaml(raw).splitlines())
    print(HELP.format(groups="\n".join(groups), keys=keys), end="")


def main() -> None:
    """An error that a user can cause is one message without a traceback (HYDRA_FULL_ERROR=1 shows it)."""
    if sys.argv[1:2] == ["score"]:
        from tip_exp.api.command import main as score

        return score(sys.argv[2:])
    register_resolvers()
    flags, body = set(sys.argv[1:]), _run
    if flags & {"--help", "-h"}:
        body = _help
    elif DRY in flags:
        body = _dry_run
    if body is not _run:
        sys.argv = [arg for arg in sys.argv if arg not in {DRY, "--help", "-h", "-m", "--multirun"}]
        sys.argv += ["hydra.mode=RUN", "hydra.run.dir=.", "hydra.output_subdir=null"]  # write nothing
    show_traceback = "HYDRA_FULL_ERROR" in os.environ
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises errors instead of printing them

    @hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
    def task(raw: DictConfig) -> None:
        try:
            body(raw)
        except ERRORS as error:
            if show_traceback:
                raise
            code = _print_error(error)
            if HydraConfig.get().mode is RunMode.MULTIRUN:
                raise  # Hydra finishes the other runs, then raises the first error
            sys.exit(code)  # raised, Hydra would print a line of its own

    try:
        termination.handle()
        if body is _dry_run and flags & {"-m", "--multirun"}:
            raise ConfigError(f"{DRY} computes one run; `tip-plan sweeps/x.yaml` checks a sweep")
        task()
    except KeyboardInterrupt as stop:
        sys.exit(TERMINATED if isinstance(stop, Terminated) else INTERRUPTED)
    except ERRORS as error:
        if show_traceback:
            raise
        sys.exit(_print_error(error))


def _print_error(error: Exception) -> int:
    print(format_error(error), file=sys.stderr)
    return exit_code(error)
