"""W&B behind a thread of its own, so that training never waits for it: at the start and the end a bounded time.

If W&B refuses or is silent, the run goes on and says so once; metrics.jsonl has every number in any case.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from queue import Empty, Full, Queue
from threading import Thread
from typing import TYPE_CHECKING, Any

from tip_exp.config.schema import RunConfig
from tip_exp.records.folder import RunFolder
from tip_exp.utils.errors import first_line
from tip_exp.utils.io import write_atomic

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)

START_S, FINISH_S = 30, 60  # the longest that a run waits for W&B as it starts and as it ends
WAITING_CALLS = 10_000  # further ones are dropped


class Tracker:
    """The methods of a W&B run that a run uses; they return at once, and an error of W&B ends the tracking alone."""

    def __init__(self, run: wandb.Run, folder: Path) -> None:
        """`folder`: of the run's W&B files, which can be uploaded later."""
        self._run, self._folder, self._stopped = run, folder, False
        self._calls: Queue[Callable[[], Any] | None] = Queue(WAITING_CALLS)
        self._thread = Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()
        self.summary = self  # for `summary.update`

    def log(self, values: dict[str, Any], step: int) -> None:
        self._send(lambda: self._run.log(values, step=step))

    def table(self, name: str, columns: list[Any], rows: list[Any], step: int) -> None:
        import wandb

        self._send(lambda: self._run.log({name: wandb.Table(columns=columns, data=rows)}, step=step))

    def update(self, values: dict[str, Any]) -> None:
        self._send(lambda: self._run.summary.update(values))

    def finish(self, exit_code: int = 0) -> None:
        """Wait until W&B has everything, at most FINISH_S."""
        self._send(lambda: self._run.finish(exit_code=exit_code))
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
                except Exception as error:  # of W&B, its service or the network
                    log.warning("W&B failed", exc_info=True)
                    self._stop(first_line(error))

    def _stop(self, reason: str) -> None:
        if not self._stopped:
            self._stopped = True
            say(f"W&B: {reason}; the run goes on without it. Upload it later: wandb sync {self._folder}")


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
        say(f"W&B: {first_line(error)}; the run goes on without it. metrics.jsonl has every number")
        return None


def _started(config: RunConfig, folder: RunFolder, run_id: str, mode: str) -> Tracker:
    """Raises what W&B raises, TimeoutError after START_S."""
    outcome: Queue[Any] = Queue()

    def start() -> None:
        try:
            import wandb

            limits: dict[str, Any] = {"init_timeout": START_S, "login_timeout": START_S, "finish_timeout": FINISH_S}
            accepted = getattr(wandb.Settings, "model_fields", ())  # older versions lack some
            limits = {name: seconds for name, seconds in limits.items() if name in accepted}
            outcome.put(
                wandb.init(
                    mode=mode,  # pyright: ignore[reportArgumentType]
                    project=config.logger.project,
                    id=run_id,
                    resume="allow" if mode == "online" else None,
                    name=config.name,
                    group=config.sweep,
                    tags=[config.pair.label, config.data.label, config.selector.label],
                    config=config.model_dump(),
                    dir=str(folder.root),
                    settings=wandb.Settings(silent=True, console="off", disable_git=True, **limits),
                )
            )
        except BaseException as error:
            outcome.put(error)

    Thread(target=start, name="wandb-start", daemon=True).start()
    try:
        run = outcome.get(timeout=START_S + 5)  # W&B keeps to init_timeout only once its service answers
    except Empty:
        raise TimeoutError(f"it did not answer within {START_S + 5} s") from None
    if isinstance(run, BaseException):
        raise run
    write_atomic(folder.wandb_id, run_id + "\n")
    return Tracker(run, Path(run.dir).parent)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
