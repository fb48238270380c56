"""What a run tells: JSON lines on disk first, W&B as a listener. Metric names are `<stage>/<what>[_unit]`."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from tip_exp.config import RunConfig
from tip_exp.paths import RunFolder

SAMPLE_COLUMNS = ("step", "problem", "answer", "response", "finish", "tokens", "kept", "mean_entropy", "most_divergent")


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


class WandbListener:
    """A W&B run, online or offline, that goes on under its own id when the run is resumed."""

    def __init__(self, config: RunConfig, folder: RunFolder) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb
        from wandb.errors import Error

        id_file = folder.root / "wandb_id"
        run_id = id_file.read_text().strip() if id_file.exists() else secrets.token_hex(4)
        try:
            self._run = wandb.init(
                mode="online" if config.logger.wandb == "online" else "offline",
                project=config.logger.project,
                entity=config.logger.entity,
                id=run_id,
                resume="allow" if id_file.exists() and config.logger.wandb == "online" else None,
                name=config.name,
                group=config.sweep,
                tags=[config.pair.label, config.data.label, config.selector.label],
                config=config.model_dump(),
                dir=str(folder.root),
                settings=wandb.Settings(silent=True, console="off", disable_git=True),
            )
        except Error as error:
            raise OSError(
                f"logger.wandb={config.logger.wandb}: W&B did not start: {str(error).splitlines()[0]}"
            ) from error
        id_file.write_text(run_id + "\n")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """A table of rollouts; every token's numbers are in samples.jsonl and the HTML report."""
        import wandb

        table = wandb.Table(columns=list(SAMPLE_COLUMNS), data=[sample_cells(row) for row in rows])
        self._run.log({"samples": table}, step=step)

    def finish(self, summary: dict[str, Any]) -> None:
        """The result, with the peaks of memory at the top, where a dashboard's axes find them."""
        told = {key: value for key, value in summary.items() if key not in ("outcomes", "datasets", "memory")}
        self._run.summary.update(told | summary.get("memory", {}))
        self._run.finish()

    def abort(self) -> None:
        self._run.finish(exit_code=1)


def sample_cells(row: dict[str, Any]) -> list[Any]:
    """A row of samples.jsonl as SAMPLE_COLUMNS; what was not measured is None."""
    entropy, divergence = row.get("entropy"), row.get("reverse_kl")
    worst = row["tokens"][max(range(len(divergence)), key=divergence.__getitem__)] if divergence else None
    mean = sum(entropy) / len(entropy) if entropy else None
    text, length = "".join(row["tokens"]), len(row["tokens"])
    return [row["step"], row["prompt"], row["answer"], text, row["finish"], length, sum(row["kept"]), mean, worst]


def make_listeners(config: RunConfig, folder: RunFolder) -> list[Listener]:
    return [] if config.logger.wandb == "off" else [WandbListener(config, folder)]


def append_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append JSON lines in one write, so that a kill leaves at most one torn line, the last."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """JSON lines of a file, without a torn last one; no file, no rows."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]  # a whole line ends in \n, so what follows the last one is torn


def keep_rows_upto(path: Path, step: int) -> None:
    """Drop the rows of later steps, through a rename."""
    rows = [row for row in read_rows(path) if row["step"] <= step]
    aside = path.with_suffix(".writing")
    aside.write_text("", encoding="utf-8")
    append_rows(aside, rows)
    aside.replace(path)
