"""Metrics, evaluations and samples of a run: JSON lines on disk, and the trackers that the run has."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tip_exp.records.folder import RunFolder
from tip_exp.records.metrics import TEACHER
from tip_exp.records.tracker import Listener
from tip_exp.utils.errors import RunFailedError
from tip_exp.utils.io import flush, read_rows, to_json, to_json_lines, write_atomic
from tip_exp.utils.space import when_there_is_space

# File name -> [bytes, SHA-256 of these bytes] of the rows that a checkpoint follows.
RowsRecord = dict[str, list[Any]]
NOT_SUMMARIZED = ("outcomes", "datasets", "memory", "files", "sha256")  # fields of result.json
SAMPLE_COLUMNS = (
    "step", "problem", "answer", "response", "verdict", "extracted", "finish", "tokens", "kept", "mean_entropy",
    "most_divergent",
)  # fmt: skip


class RunLogger(AbstractContextManager):
    """Writes metrics.jsonl, eval.jsonl and samples.jsonl of a run; sends metrics and samples to its trackers."""

    def __init__(
        self, folder: RunFolder, trackers: Sequence[Listener] | None, *, rows: RowsRecord | None, writes: bool = True
    ) -> None:
        """`rows`: those of the checkpoint that the run resumes from; later ones are dropped. None: drop all.

        `writes`: False on every rank but the main one: nothing is written.
        """
        self._folder, self._trackers, self._writes = folder, list(trackers or ()), writes
        self._sizes: dict[str, int] = {}
        self._hashes: dict[str, hashlib._Hash] = {}
        if not writes:
            return
        folder.check_held()
        for path in folder.rows:
            self._sizes[path.name] = size = (rows or {}).get(path.name, [0])[0]
            self._hashes[path.name] = _hash(path, size) if size else hashlib.sha256()
            _truncate(path, size)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._append(self._folder.metrics, [{"step": step, **metrics}])
        for tracker in self._trackers:
            tracker.log(metrics, step)

    def eval_rows(self, step: int, model: str, benchmark: str, rows: Iterable[dict[str, Any]]) -> None:
        head = {"step": step, "model": model, "benchmark": benchmark}
        self._append(self._folder.eval_rows, [head | row for row in rows])

    def copy_teacher(self, source: RunFolder) -> dict[str, float]:
        """Copy the graded rows of a teacher's evaluation (mode=teacher); returns its accuracies."""
        self._append(self._folder.eval_rows, read_rows(source.eval_rows))
        return {name: value for name, value in read_rows(source.metrics)[0].items() if name.startswith(TEACHER)}

    def samples(self, step: int, rows: Iterable[dict[str, Any]]) -> None:
        """Trackers get a table of the rollouts; samples.jsonl and the token viewer have each token's statistics."""
        numbered = [{"step": step, **row} for row in rows]
        self._append(self._folder.samples, numbered)
        for tracker in self._trackers:
            tracker.table("samples", list(SAMPLE_COLUMNS), [sample_cells(row) for row in numbered], step)

    def non_finite(self, step: int, rollouts: list[Any], fault: str) -> None:
        """Write the rollouts of a step whose numbers are not finite, with what is not."""
        if self._writes:
            batch = {"step": step, "fault": fault, "rollouts": [asdict(rollout) for rollout in rollouts]}
            write_atomic(self._folder.batch_of(step), to_json(batch) + "\n")

    def finish(self, result: dict[str, Any]) -> None:
        """Make the trackers' summary of the result; memory peaks become top-level keys, which plots can use as axes."""
        fields = {key: value for key, value in result.items() if key not in NOT_SUMMARIZED}
        while self._trackers:
            tracker = self._trackers.pop(0)
            tracker.summarize(fields | result["memory"])
            tracker.finish()

    def record(self) -> RowsRecord:
        """Flush all rows to disk; returns what was written: a checkpoint never refers to rows that a crash can take."""
        for path in (*self._folder.rows, self._folder.root) if self._writes else ():
            flush(path)
        return {name: [size, self._hashes[name].hexdigest()] for name, size in self._sizes.items()}

    def _append(self, path: Path, rows: list[dict[str, Any]]) -> None:
        if not self._writes:
            return
        data = to_json_lines(rows).encode()
        when_there_is_space(lambda: self._write(path, data), path)
        self._sizes[path.name] += len(data)
        self._hashes[path.name].update(data)

    def _write(self, path: Path, data: bytes) -> None:
        """Append `data`, or nothing. Raises RunFailedError if the file is not as this process left it."""
        self._folder.check_held()
        size, rest = self._sizes[path.name], memoryview(data)
        with path.open("ab", buffering=0) as file:
            if file.tell() != size:
                raise RunFailedError(
                    f"{path} has {file.tell()} bytes, but this process wrote {size}: another process changed it; this "
                    "one stops"
                )
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                file.truncate(size)
                raise

    def __exit__(self, *exception: object) -> None:
        for tracker in self._trackers:
            tracker.finish(exit_code=1)


def sample_cells(row: dict[str, Any]) -> list[Any]:
    """Values of SAMPLE_COLUMNS for a row of samples.jsonl; None for a statistic that was not measured."""
    tokens, entropy, divergence = row["tokens"], row.get("entropy"), row.get("reverse_kl")
    most_divergent = tokens[max(range(len(divergence)), key=divergence.__getitem__)] if divergence else None
    mean_entropy = round(sum(entropy) / len(entropy), 4) if entropy else None  # nats; a table shows all digits
    graded = [_verdict(row.get("right")), row.get("extracted"), row["finish"]]
    head = [row["step"], row["prompt"], row["answer"], "".join(tokens), *graded]
    return [*head, len(tokens), sum(row["kept"]), mean_entropy, most_divergent]


def _verdict(right: float | bool | None) -> str:
    """A text in every row, as the token viewer has it: a tracker's column has one type."""
    if right is None:
        return "not graded"
    return {1.0: "right", 0.0: "wrong"}.get(float(right), f"score {float(right):.3f}")


def missing_rows(folder: RunFolder, rows: RowsRecord) -> str:
    """Which of a checkpoint's rows are no longer in the folder; "" if all are."""
    for name, (size, digest) in rows.items():
        path = folder.root / name
        if not size:
            continue
        if not path.exists() or path.stat().st_size < size:
            return f"{name} has {path.stat().st_size if path.exists() else 0} of {size} bytes"
        if _hash(path, size).hexdigest() != digest:
            return f"the first {size} bytes of {name} were changed"
    return ""


def _truncate(path: Path, size: int) -> None:
    """Keep the first `size` bytes, in a file that no other run shares (launch/reuse.py links rows)."""
    if path.exists() and path.stat().st_nlink > 1:
        copy = path.with_name(f".{path.name}")
        shutil.copyfile(path, copy)
        copy.replace(path)
    with path.open("ab") as file:
        file.truncate(size)


def _hash(path: Path, size: int) -> hashlib._Hash:
    """SHA-256 of the first `size` bytes of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while size and (data := file.read(min(size, 2**20))):
            digest.update(data)
            size -= len(data)
    return digest
