"""Finish one run: skip it if it is done, refuse it if another process holds it, else run it in child processes.

Each run has processes of its own: a sampling engine frees its memory only when its process ends, and a crash stops one
run alone. With several ranks they are children of torch.distributed.run; with several nodes each node launches the
run, and node 0 alone locks and writes the folder.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path
from threading import Event

from omegaconf import OmegaConf

from tip_exp.config.parse import check_positions, differences, digest, load
from tip_exp.config.schema import RunConfig
from tip_exp.launch.gpu_lock import locked_gpus
from tip_exp.launch.lock import HeldError, holder, lock_or_holder
from tip_exp.launch.ranks import check_machine, cores, ranks_per_node, this_node, torchrun_options
from tip_exp.launch.reuse import (
    changed_models,
    check_models,
    find_duplicate,
    finished_digests,
    link_from,
    parse_result,
)
from tip_exp.launch.teacher import evaluate_teacher, wait_for_node_0
from tip_exp.records.folder import RunFolder, numbered_checkpoints
from tip_exp.records.integrity import damage, remedy
from tip_exp.utils import termination
from tip_exp.utils.errors import RESTARTS, TERMINATED, ConfigError, RunFailedError, first_line
from tip_exp.utils.io import write_atomic
from tip_exp.utils.paths import OUTPUTS
from tip_exp.utils.termination import Terminated

# Environment of a run's process; the user's own environment overrides it.
CHILD_ENVIRONMENT = {
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # the numbers of nvidia-smi, which vLLM asks, are then CUDA's
    "TOKENIZERS_PARALLELISM": "false",
    "KINETO_LOG_LEVEL": "99",  # silences the profiler that counts allocations
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads cost 2.7 x the time where another process wants a core
}
# Set by torch.distributed.run for its ranks, and by some clusters for their own; a run of one process ignores them.
RANK_VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}
POLL_S = 0.2
HEADER = "# resolved config of this run"  # how a run's config.yaml begins
# What may be there before config.yaml, also of other nodes.
EARLY = re.compile(r"\..*|lock|(worker(\.\d+)?|torchrun)\.log")


class State(StrEnum):
    DONE = "done"
    RUNNING = "running"
    UNFINISHED = "unfinished"
    TO_DO = "to do"
    CHANGED = "config changed"
    DAMAGED = "damaged"


@dataclass(frozen=True, slots=True)
class Background:
    """For a run that shares the terminal with others: its output goes to worker.log, and `stop` interrupts it."""

    environment: dict[str, str] = field(default_factory=dict)  # the user's own environment overrides it
    stop: Event = field(default_factory=Event)


def state_of(config: RunConfig, folder: RunFolder) -> State:
    """What `folder` holds of the run that `config` describes."""
    return State.RUNNING if holder(folder.lock) else _state_on_disk(config, folder)


def changes(config: RunConfig, folder: RunFolder) -> list[str]:
    """How the config differs from the one that produced the numbers in `folder`."""
    try:
        return differences(load(folder.config), config)
    except (OSError, ConfigError) as error:
        return [f"its config.yaml cannot be read by this version ({first_line(error)})"]


def check_folder(folder: RunFolder) -> None:
    """Raise ConfigError if the folder holds files of something else than a run, which a run would replace."""
    paths = folder.root.iterdir() if folder.root.is_dir() else ()
    names = [path.name for path in paths if not EARLY.fullmatch(path.name)]
    if not names or folder.result.exists() or numbered_checkpoints(folder.checkpoints):
        return
    with suppress(OSError):
        if folder.config.read_bytes().startswith(HEADER.encode()):
            return
    raise ConfigError(
        f"{folder.root} holds files that do not belong to a run, such as {min(names)}; choose a new or empty folder"
    )


def launch(config: RunConfig, folder: RunFolder, background: Background | None = None) -> str:
    """Finish the run; returns why no process was started, or "".

    Raises ConfigError, RunFailedError, OSError or KeyboardInterrupt.
    """
    if not folder.result.exists():  # else it says that the run is finished
        check_machine(config, os.environ)
    node, ranks = this_node(config.nodes, os.environ), ranks_per_node(config, os.environ)
    is_first, stop = node.rank == 0, background.stop if background else None
    folder.root.mkdir(parents=True, exist_ok=True)
    with lock_or_holder(folder.lock) if is_first else nullcontext("") as refused:
        if refused:
            raise HeldError(f"{folder.root} is held by {refused}")
        check_folder(folder)
        state = _state_on_disk(config, folder)
        if state is State.DONE:
            changed = changed_models(config, folder)
            hint = f"; {', '.join(changed)} has changed since: for its numbers choose another name" if changed else ""
            return f"already finished ({folder.result}){hint}"
        if state is State.CHANGED:
            raise ConfigError(
                f"{folder.root} holds a run with another config: {'; '.join(changes(config, folder))}. "
                "Give this run another name (name=…), or move the folder away"
            )
        if state is State.DAMAGED:
            damaged = damage(folder, parse_result(folder) or {})
            raise RunFailedError(f"{folder.root}: {damaged}. {remedy(folder, damaged)}")
        check_models(config)
        check_positions(config)
        if is_first:
            header = f"{HEADER}, digest {digest(config)}\n"
            write_atomic(folder.config, header + OmegaConf.to_yaml(OmegaConf.create(config.model_dump())))
        # Sweeps share runs; a single run under another name always runs.
        if state is State.TO_DO and config.sweep:
            duplicate = find_duplicate(config, folder, finished_digests(OUTPUTS))
            if duplicate is not None:
                if is_first:
                    link_from(duplicate, config, folder)
                return f"linked from {duplicate.root}, which holds the same run"
        if state is State.TO_DO and config.eval.teacher and config.mode != "teacher":
            if is_first:
                evaluate_teacher(config, folder, partial(launch, background=background), stop)
            else:
                wait_for_node_0(config, folder, stop)
        log_size = folder.log.stat().st_size if folder.log.exists() else 0
        with locked_gpus(0 if config.device == "cpu" else ranks, os.environ) as gpus:
            locks = [*([folder.lock] if is_first else []), *gpus.values()]
            environment = _environment(ranks, list(gpus), background)
            if ranks * config.nodes == 1:
                module, options = "worker", []
            else:
                module, options = "torchrun", [*torchrun_options(ranks, config.nodes, node, digest(config)), "--"]
            command = ["-m", f"tip_exp.launch.{module}", folder.root, os.getpid(), *options, *locks]
            child = [sys.executable, *map(str, command)], environment, folder.log, background
            code = _run_in_child(*child)
            while code == RESTARTS and config.nodes == 1:  # a node does not know why the others have ended
                code = _run_in_child(*child)
    if code == TERMINATED or -code in termination.SIGNALS:
        if background is None:  # its process has said so on the terminal
            raise Terminated
        raise RunFailedError(f"{config.name}: terminated; the same command resumes it")
    if code < 0 or code == RESTARTS:
        how = "out of memory" if code == RESTARTS else f"killed by {signal.Signals(-code).name}"
        raise RunFailedError(f"{config.name}: {how}; the same command resumes it")
    if code > 0:
        message = _error_in_log(folder, log_size) if background else ""
        raise RunFailedError(f"{config.name}: {message or f'failed with exit code {code}; see {folder.log}'}")
    return ""


def _environment(ranks: int, gpus: list[str], background: Background | None) -> dict[str, str]:
    """Environment of a run's processes; ranks share the CPU threads that one process would take."""
    environment = CHILD_ENVIRONMENT | (background.environment if background else {})
    if ranks > 1:
        threads = int(environment.get("OMP_NUM_THREADS", cores())) // ranks
        environment["OMP_NUM_THREADS"] = str(max(1, threads))
    environment |= {key: value for key, value in os.environ.items() if key not in RANK_VARIABLES}
    return environment | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})


def _run_in_child(command: list[str], environment: dict[str, str], log: Path, background: Background | None) -> int:
    """Exit code of a run's process, which joins the locks and keeps them if this process is killed."""
    if background is None:
        with termination.without_interrupt() as end:
            child = subprocess.Popen(command, env=environment)
            try:
                end()
                with termination.saves_before_handlers(child):
                    return child.wait()
            except BaseException:
                child.terminate()  # a terminal has interrupted it as well: it ends at the first interrupt
                try:
                    child.wait()  # until it has written a checkpoint
                except KeyboardInterrupt:  # a second interrupt: do not wait for it
                    child.kill()
                    child.wait()
                raise
    with log.open("a", encoding="utf-8") as log_file:
        child = subprocess.Popen(
            command,
            env=environment,
            stdout=log_file,
            stderr=log_file,
            process_group=0,  # out of the terminal's reach, so that `stop` sends the only signal
        )
    while not background.stop.is_set():
        try:
            return child.wait(timeout=POLL_S)
        except subprocess.TimeoutExpired:
            pass
    child.terminate()
    return child.wait()


def _error_in_log(folder: RunFolder, start: int) -> str:
    """The last error that the worker printed after byte `start` of its log, without "error: "; "" if there is none."""
    with folder.log.open("rb") as log:
        log.seek(start)
        written = "\n" + log.read().decode(errors="replace")
    _, separator, message = written.rpartition("\nerror: ")
    return message.strip() if separator else ""


def _state_on_disk(config: RunConfig, folder: RunFolder) -> State:
    result = parse_result(folder)
    damaged = damage(folder, result) if result else ""  # of model/ the sizes and what is newer than result.json
    if result and result["digest"] == digest(config) and folder.config.exists():
        return State.DAMAGED if damaged else State.DONE
    started = folder.result.exists() or numbered_checkpoints(folder.checkpoints)
    if not started:
        return State.TO_DO
    if changes(config, folder):
        return State.CHANGED
    return State.DAMAGED if damaged else State.UNFINISHED  # also if result.json is empty or torn
