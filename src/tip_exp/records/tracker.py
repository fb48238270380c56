"""Trackers, each in its own thread: training waits for them only at the start and the end, for a bounded time.

If a tracker refuses or is silent, the run goes on and says so once; metrics.jsonl has every number in any case. W&B is
here, the others are in records/dashboards.py.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from queue import Empty, Full, Queue
from threading import Thread
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from tip_exp.config.schema import RunConfig
from tip_exp.records.dashboards import DASHBOARDS, labels
from tip_exp.records.folder import RunFolder
from tip_exp.utils.errors import first_line, say
from tip_exp.utils.io import write_atomic

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)

START_S, FINISH_S = 30, 60  # time limits of a tracker's start and end
WAITING_CALLS = 10_000  # further ones are dropped
EVERY_NUMBER = "metrics.jsonl has every number"
Result = TypeVar("Result")


class Listener(Protocol):
    """Receives what a run reports. Its methods may take long or fail: a run calls them through a `Tracker`."""

    def log(self, values: dict[str, float], step: int) -> None: ...

    def table(self, name: str, columns: list[str], rows: list[list[Any]], step: int) -> None: ...

    def summarize(self, values: dict[str, Any]) -> None: ...

    def finish(self, exit_code: int = 0) -> None: ...


class Tracker:
    """Passes calls to a listener and returns at once; if the listener fails, tracking stops and the run goes on."""

    def __init__(self, listener: Listener, name: str = "W&B", remedy: str = "") -> None:
        """`remedy`: what the user can do if it fails."""
        self._listener, self._name, self._remedy, self._stopped = listener, name, remedy, False
        self._calls: Queue[Callable[[], Any] | None] = Queue(WAITING_CALLS)
        self._thread = Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def log(self, values: dict[str, float], step: int) -> None:
        self._send(lambda: self._listener.log(values, step))

    def table(self, name: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
        self._send(lambda: self._listener.table(name, columns, rows, step))

    def summarize(self, values: dict[str, Any]) -> None:
        self._send(lambda: self._listener.summarize(values))

    def finish(self, exit_code: int = 0) -> None:
        """Wait until the tracker has everything, at most FINISH_S."""
        self._send(lambda: self._listener.finish(exit_code))
        self._send(None)
        self._thread.join(FINISH_S)
        if self._thread.is_alive():
            self._stop(f"it has not taken everything within {FINISH_S} s")

    def _send(self, call: Callable[[], Any] | None) -> None:
        try:
            self._calls.put_nowait(call)
        except Full:
            self._stop("it does not answer")

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            if not self._stopped:
                try:
                    call()
                except Exception as error:  # of the tracker, its service or the network
                    log.warning("%s failed", self._name, exc_info=True)
                    self._stop(first_line(error))

    def _stop(self, reason: str) -> None:
        if not self._stopped:
            self._stopped = True
            say(f"{self._name}: {reason}; the run goes on without it. {self._remedy or EVERY_NUMBER}")


def start_trackers(config: RunConfig, folder: RunFolder, step: int = 0) -> list[Tracker]:
    """The trackers of `logger.wandb` and `logger.tracker` that start; `step`: of the checkpoint to resume from."""
    trackers = start_wandb(config, folder), start_dashboard(config, folder, step)
    return [tracker for tracker in trackers if tracker is not None]


def start_dashboard(config: RunConfig, folder: RunFolder, step: int = 0) -> Tracker | None:
    """The tracker of `logger.tracker`; None if there is none or it fails."""
    name = config.logger.tracker
    if name is None:
        return None
    try:
        return Tracker(in_time(lambda: DASHBOARDS[name](config, folder, step)), name)
    except Exception as error:
        log.warning("%s did not start", name, exc_info=True)
        say(f"{name}: {first_line(error)}; the run goes on without it. {EVERY_NUMBER}")
        return None


def start_wandb(config: RunConfig, folder: RunFolder) -> Tracker | None:
    """The W&B run, which keeps its id on resume, offline if it does not start online; None if it is off or fails."""
    mode = config.logger.wandb
    if mode == "off":
        return None
    os.environ.setdefault("WANDB_SILENT", "true")
    run_id = folder.wandb_id.read_text().strip() if folder.wandb_id.exists() else secrets.token_hex(4)
    if mode == "online":
        try:
            return _started(config, folder, run_id, mode)
        except Exception as error:
            log.warning("W&B did not start", exc_info=True)
            say(f"W&B: {first_line(error)}; the run goes on offline. Upload it later: tip-report sync {folder.root}")
    try:
        return _started(config, folder, run_id, "offline")
    except Exception as error:
        log.warning("W&B did not start offline", exc_info=True)
        say(f"W&B: {first_line(error)}; the run goes on without it. {EVERY_NUMBER}")
        return None


class WandbListener:
    """A W&B run as a listener."""

    def __init__(self, run: wandb.Run) -> None:
        self._run = run

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def table(self, name: str, columns: list[Any], rows: list[Any], step: int) -> None:
        import wandb

        self._run.log({name: wandb.Table(columns=columns, data=rows)}, step=step)

    def summarize(self, values: dict[str, Any]) -> None:
        self._run.summary.update(values)

    def finish(self, exit_code: int = 0) -> None:
        self._run.finish(exit_code=exit_code)


def _started(config: RunConfig, folder: RunFolder, run_id: str, mode: str) -> Tracker:
    """Raises what W&B raises, TimeoutError as `in_time`."""

    def start() -> wandb.Run:
        import wandb

        limits: dict[str, Any] = {"init_timeout": START_S, "login_timeout": START_S, "finish_timeout": FINISH_S}
        accepted = getattr(wandb.Settings, "model_fields", ())  # older versions lack some
        limits = {name: seconds for name, seconds in limits.items() if name in accepted}
        return wandb.init(
            mode=mode,  # pyright: ignore[reportArgumentType]
            project=config.logger.project,
            id=run_id,
            resume="allow" if mode == "online" else None,
            name=config.name,
            group=config.sweep,
            tags=[label[:64] for label in labels(config)],  # W&B refuses longer ones
            config=config.model_dump(),
            dir=str(folder.root),
            settings=wandb.Settings(silent=True, console="off", disable_git=True, **limits),
        )

    run = in_time(start)
    write_atomic(folder.wandb_id, run_id + "\n")
    return Tracker(WandbListener(run), "W&B", f"Upload it later: wandb sync {Path(run.dir).parent}")


def in_time(start: Callable[[], Result]) -> Result:
    """The result of `start`. Raises what it raises, TimeoutError after START_S + 5 seconds."""
    outcome: Queue[Any] = Queue()

    def work() -> None:
        try:
            outcome.put(start())
        except BaseException as error:
            outcome.put(error)

    Thread(target=work, name="tracker-start", daemon=True).start()
    try:
        result = outcome.get(timeout=START_S + 5)  # W&B keeps to init_timeout only once its service answers
    except Empty:
        raise TimeoutError(f"it did not answer within {START_S + 5} s") from None
    if isinstance(result, BaseException):
        raise result
    return result
