"""Metrics, evaluations and samples of a run: JSON lines on disk, and W&B online or offline."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tip_exp.records.folder import RunFolder
from tip_exp.records.metrics import TEACHER
from tip_exp.records.tracker import Tracker
from tip_exp.utils.io import append_rows, read_rows, to_json_lines, write_atomic

SAMPLE_COLUMNS = ("step", "problem", "answer", "response", "finish", "tokens", "kept", "mean_entropy", "most_divergent")


class RunLogger(AbstractContextManager):
    """Writes metrics.jsonl, eval.jsonl and samples.jsonl of a run; with a W&B run, sends metrics and samples there."""

    def __init__(
        self, folder: RunFolder, wandb_run: Tracker | None, *, resume_at: int | None, writes: bool = True
    ) -> None:
        """`resume_at`: step of the checkpoint; rows of later steps are dropped. None: drop all rows.

        `writes`: False on every rank but the main one: nothing is written.
        """
        self._folder, self._wandb_run, self._writes = folder, wandb_run, writes
        for path in (folder.metrics, folder.eval_rows, folder.samples) if writes else ():
            keep_rows_upto(path, -1 if resume_at is None else resume_at)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._append(self._folder.metrics, [{"step": step, **metrics}])
        if self._wandb_run is not None:
            self._wandb_run.log(metrics, step=step)

    def eval_rows(self, step: int, model: str, benchmark: str, rows: Iterable[dict[str, Any]]) -> None:
        head = {"step": step, "model": model, "benchmark": benchmark}
        self._append(self._folder.eval_rows, [head | row for row in rows])

    def copy_teacher(self, source: RunFolder) -> dict[str, float]:
        """Copy the graded rows of a teacher's evaluation (mode=teacher); returns its accuracies."""
        append_rows(self._folder.eval_rows, read_rows(source.eval_rows))
        return {name: value for name, value in read_rows(source.metrics)[0].items() if name.startswith(TEACHER)}

    def samples(self, step: int, rows: Iterable[dict[str, Any]]) -> None:
        """W&B gets a table of the rollouts; the statistics of each token are in samples.jsonl and the HTML report."""
        numbered = [{"step": step, **row} for row in rows]
        self._append(self._folder.samples, numbered)
        if self._wandb_run is not None:
            self._wandb_run.table("samples", list(SAMPLE_COLUMNS), [sample_cells(row) for row in numbered], step)

    def finish(self, result: dict[str, Any]) -> None:
        """Make W&B's summary of the result; memory peaks become top-level keys, which plots can use as axes."""
        if self._wandb_run is not None:
            fields = {key: value for key, value in result.items() if key not in ("outcomes", "datasets", "memory")}
            self._wandb_run.summary.update(fields | result["memory"])
            self._wandb_run.finish()
            self._wandb_run = None

    def _append(self, path: Path, rows: list[dict[str, Any]]) -> None:
        if self._writes:
            append_rows(path, rows)

    def __exit__(self, *exception: object) -> None:
        if self._wandb_run is not None:
            self._wandb_run.finish(exit_code=1)


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
