"""Metrics, evaluations and samples of a run: JSON lines on disk, and W&B online or offline."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tip_exp.config.schema import RunConfig
from tip_exp.records.folder import RunFolder
from tip_exp.utils.errors import first_line
from tip_exp.utils.io import append_rows, read_rows, to_json_lines, write_atomic

SAMPLE_COLUMNS = ("step", "problem", "answer", "response", "finish", "tokens", "kept", "mean_entropy", "most_divergent")


class RunLogger(AbstractContextManager):
    """Writes metrics.jsonl, eval.jsonl and samples.jsonl of a run, and passes metrics and samples to the listeners."""

    def __init__(self, folder: RunFolder, listeners: list[WandbListener], *, resume_at: int | None) -> None:
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

    def __exit__(self, *exception: object) -> None:
        for listener in self._listeners:
            listener.abort()


class WandbListener:
    """A W&B run, online or offline, which keeps its id when the run is resumed."""

    def __init__(self, config: RunConfig, folder: RunFolder) -> None:
        """Raises OSError if W&B does not start."""
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb
        from wandb.errors import Error

        run_id = folder.wandb_id.read_text().strip() if folder.wandb_id.exists() else secrets.token_hex(4)
        online = config.logger.wandb == "online"
        try:
            self._run = wandb.init(
                mode="online" if online else "offline",
                project=config.logger.project,
                id=run_id,
                resume="allow" if online else None,
                name=config.name,
                group=config.sweep,
                tags=[config.pair.label, config.data.label, config.selector.label],
                config=config.model_dump(),
                dir=str(folder.root),
                settings=wandb.Settings(silent=True, console="off", disable_git=True),
            )
        except Error as error:
            raise OSError(f"logger.wandb={config.logger.wandb}: W&B did not start: {first_line(error)}") from error
        folder.wandb_id.write_text(run_id + "\n")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Log a table of rollouts; the statistics of each token are in samples.jsonl and the HTML report."""
        import wandb

        table = wandb.Table(columns=list(SAMPLE_COLUMNS), data=[sample_cells(row) for row in rows])
        self._run.log({"samples": table}, step=step)

    def finish(self, summary: dict[str, Any]) -> None:
        """Set W&B's summary to the result; memory peaks become top-level keys, which plots can use as axes."""
        fields = {key: value for key, value in summary.items() if key not in ("outcomes", "datasets", "memory")}
        self._run.summary.update(fields | summary.get("memory", {}))
        self._run.finish()

    def abort(self) -> None:
        self._run.finish(exit_code=1)


def make_listeners(config: RunConfig, folder: RunFolder) -> list[WandbListener]:
    return [] if config.logger.wandb == "off" else [WandbListener(config, folder)]


def sample_cells(row: dict[str, Any]) -> list[Any]:
    """Values of SAMPLE_COLUMNS for a row of samples.jsonl; None for a statistic that was not measured."""
    tokens, entropy, divergence = row["tokens"], row.get("entropy"), row.get("reverse_kl")
    most_divergent = tokens[max(range(len(divergence)), key=divergence.__getitem__)] if divergence else None
    mean_entropy = sum(entropy) / len(entropy) if entropy else None
    head = [row["step"], row["prompt"], row["answer"], "".join(tokens), row["finish"]]
    return [*head, len(tokens), sum(row["kept"]), mean_entropy, most_divergent]


def keep_rows_upto(path: Path, step: int) -> None:
    """Drop the rows of later steps and a torn last line."""
    write_atomic(path, to_json_lines([row for row in read_rows(path) if row["step"] <= step]))
