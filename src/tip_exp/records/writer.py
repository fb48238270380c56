"""What a run tells: JSON lines on disk first, W&B as a listener. Metric names are `<stage>/<what>[_unit]`."""

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
    """metrics.jsonl, eval.jsonl and samples.jsonl of a run, and whoever listens to its metrics."""

    def __init__(self, folder: RunFolder, listeners: list[Listener], *, resume_at: int | None) -> None:
        """`resume_at`: the checkpoint's step. Rows after it, which a killed run left, are dropped; None: start anew."""
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
        told = [{"step": step, **row} for row in rows]
        append_rows(self._folder.samples, told)
        for listener in self._listeners:
            listener.samples(step, told)

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
    """Drop the rows of later steps, through a rename."""
    write_atomic(path, to_json_lines([row for row in read_rows(path) if row["step"] <= step]))
