"""Finish one run: skip it if it is done, refuse it if another process holds it, else run it in a child process.

One process per run: a sampling engine frees its memory only when its process ends, and a crash stops one run alone.
"""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from threading import Event
from typing import IO

from omegaconf import OmegaConf

from tip_exp.config.parse import differences, digest, load
from tip_exp.config.schema import RunConfig
from tip_exp.launch.gpu_lock import locked_gpus, try_lock
from tip_exp.launch.reuse import (
    find_duplicate,
    finished_digests,
    link_from,
    read_result,
    remove_stale,
    teacher_config,
)
from tip_exp.records.folder import RunFolder
from tip_exp.utils.errors import ConfigError, RunFailedError, first_line
from tip_exp.utils.io import write_atomic
from tip_exp.utils.paths import OUTPUTS

TEACHERS = OUTPUTS / "teachers"

# Environment of a run's process; the user's own environment overrides it.
CHILD_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "KINETO_LOG_LEVEL": "99",  # silences the profiler that counts allocations
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads cost 2.7 x the time where another process wants a core
}
POLL_S = 0.2


class State(StrEnum):
    DONE = "done"
    RUNNING = "running"
    UNFINISHED = "unfinished"
    TO_DO = "to do"
    CHANGED = "config changed"


class HeldError(RunFailedError):
    """Another process writes to the run's folder."""


@dataclass(frozen=True, slots=True)
class Background:
    """For a run that shares the terminal with others: its output goes to worker.log, and `stop` interrupts it."""

    environment: dict[str, str] = field(default_factory=dict)  # the user's own environment overrides it
    stop: Event = field(default_factory=Event)


def state_of(config: RunConfig, folder: RunFolder) -> State:
    """What `folder` holds of the run that `config` describes."""
    if folder.lock.exists():
        with folder.lock.open(encoding="utf-8") as lock:
            if not try_lock(lock, shared=True):
                return State.RUNNING
    return _state_on_disk(config, folder)


def changes(config: RunConfig, folder: RunFolder) -> list[str]:
    """How the config differs from the one that produced the numbers in `folder`."""
    try:
        return differences(load(folder.config), config)
    except (OSError, ConfigError) as error:
        return [f"its config.yaml cannot be read by this version ({first_line(error)})"]


def launch(config: RunConfig, folder: RunFolder, background: Background | None = None) -> str:
    """Finish the run; returns why no process was started, or "".

    Raises ConfigError, RunFailedError, OSError or KeyboardInterrupt.
    """
    folder.root.mkdir(parents=True, exist_ok=True)
    with _locked(folder) as lock:
        state = _state_on_disk(config, folder)
        if state is State.DONE:
            return f"already finished ({folder.result})"
        if state is State.CHANGED:
            raise ConfigError(
                f"{folder.root} holds a run with another config: {'; '.join(changes(config, folder))}. "
                "Give this run another name (name=…), or remove the folder"
            )
        header = f"# resolved config of this run, digest {digest(config)}\n"
        write_atomic(folder.config, header + OmegaConf.to_yaml(OmegaConf.create(config.model_dump())))
        # Sweeps share runs; a single run under another name always runs.
        if state is State.TO_DO and config.sweep:
            duplicate = find_duplicate(config, folder, finished_digests(OUTPUTS))
            if duplicate is not None:
                link_from(duplicate, config, folder)
                return f"linked from {duplicate.root}, which holds the same run"
        if state is State.TO_DO and config.eval.teacher and config.mode != "teacher":
            _evaluate_teacher(config, folder, background)
        log_size = folder.log.stat().st_size if folder.log.exists() else 0
        with locked_gpus(os.environ) as gpus:
            code = _run_in_child(folder, lock, gpus, background)
    if code < 0:
        raise RunFailedError(f"{config.name}: killed by {signal.Signals(-code).name}; the same command resumes it")
    if code > 0:
        message = _error_in_log(folder, log_size) if background else ""
        raise RunFailedError(f"{config.name}: {message or f'failed with exit code {code}; see {folder.log}'}")
    return ""


def _evaluate_teacher(config: RunConfig, folder: RunFolder, background: Background | None) -> None:
    """Finish the evaluation of the run's teacher, which all runs that evaluate it alike share, and link `folder` to it.

    Waits while another run does it; a GPU is locked only while this run does.
    """
    teacher = teacher_config(config)
    source = RunFolder(TEACHERS / digest(teacher))
    remove_stale(teacher, source)
    while not source.result.exists():
        try:
            launch(teacher, source, background)
        except HeldError:
            time.sleep(POLL_S)
            if background is not None and background.stop.is_set():
                raise
    link = folder.teacher.with_name(f"teacher.{os.getpid()}")
    link.symlink_to(os.path.relpath(source.root.resolve(), folder.root.resolve()))
    link.replace(folder.teacher)


def _run_in_child(folder: RunFolder, lock: IO[str], gpus: dict[str, str], background: Background | None) -> int:
    """Exit code of the run's process, which inherits the lock and keeps it if this process is killed."""
    command = [sys.executable, "-m", "tip_exp.launch.worker", str(folder.root), str(os.getpid())]
    environment = CHILD_ENVIRONMENT | (background.environment if background else {}) | os.environ | gpus
    if background is None:
        child = subprocess.Popen(command, pass_fds=[lock.fileno()], env=environment)
        try:
            return child.wait()
        except KeyboardInterrupt:
            child.wait()  # the terminal interrupts the child as well
            raise
    with folder.log.open("a", encoding="utf-8") as log:
        child = subprocess.Popen(
            command,
            pass_fds=[lock.fileno()],
            env=environment,
            stdout=log,
            stderr=log,
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
    result = read_result(folder) if folder.config.exists() else None
    if result and result["digest"] == digest(config):
        return State.DONE
    started = folder.result.exists() or any(folder.checkpoints.glob("step_*"))
    if not started:
        return State.TO_DO
    if changes(config, folder):
        return State.CHANGED
    return State.DONE if folder.result.exists() else State.UNFINISHED


@contextmanager
def _locked(folder: RunFolder) -> Iterator[IO[str]]:
    """Lock the folder for this process and its child; the kernel releases the lock when both have ended."""
    with folder.lock.open("a+", encoding="utf-8") as lock:
        if not try_lock(lock):
            lock.seek(0)
            raise HeldError(f"{folder.root} is held by {lock.read() or 'another process'}; wait for it, or stop it")
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()} since {datetime.now().isoformat(timespec='seconds')}")
        lock.flush()
        yield lock
