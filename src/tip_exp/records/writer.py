"""Metrics, evaluations and samples of a run: JSON lines on disk, and listeners such as W&B."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from tip_exp.config.schema import RunConfig
from tip_exp.records.folder import RunFolder
from tip_exp.utils.io import append_rows, read_rows, to_json_lines, write_atomic


class Listener(Protocol):
    def log(self, step: int, metrics: dict[str, float]) -> None: ...
    def samples(self, step: int, rows: list[dict[str, Any]]) -> None: ...
    def finish(self, summary: dict[str, Any]) -> None: ...
    def abort(self) -> None: ...


class RunLogger:
    """Writes metrics.jsonl, eval.jsonl and samples.jsonl of a run, and passes metrics and samples to the listeners."""

    def __init__(self, folder: RunFolder, listeners: list[Listener], *, resume_at: int | None) -> None:
        """`resume_at`: step of the checkpoint; rows of later steps are dropped. None: drop all rows."""
        self._folder, self._listeners = folder, listeners
        for path in (folder.metrics, folder.eval_rows, folder.samples):
            keep_rows_upto(path, -1 if resume_at is None else resume_at)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        append_rows(self._folder.metrics, [{"step": step, **metrics}])
        for listener in self._listeners:
            listener.log(step, metrics)

    def eval_rows(self, step: int, model: str, benchmark: str, rows: Iterable[dict[str, Any]]) -> None:
        head = {"step": step, "model": model, "benchmark": benchmark}
        append_rows(self._folder.eval_rows, [head | row for row in rows])

    def samples(self, step: int, rows: Iterable[dict[str, Any]]) -> None:
        numbered = [{"step": step, **row} for row in rows]
        append_rows(self._folder.samples, numbered)
        for listener in self._listeners:
            listener.samples(step, numbered)

    def finish(self, summary: dict[str, Any]) -> None:
        for listener in self._listeners:
            listener.finish(summary)
        self._listeners = []

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for listener in self._listeners:
            listener.abort()


def make_listeners(config: RunConfig, folder: RunFolder) -> list[Listener]:
    from tip_exp.records.wandb import WandbListener

    return [] if config.logger.wandb == "off" else [WandbListener(config, folder)]


def keep_rows_upto(path: Path, step: int) -> None:
    """Drop the rows of later steps and a torn last line."""
    write_atomic(path, to_json_lines([row for row in read_rows(path) if row["step"] <= step]))
