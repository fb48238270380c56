"""The files of one checkpoint: DCP's, with checksums, written to a temporary folder and published by a rename."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future as TorchFuture

from tip_exp.records.folder import numbered_checkpoints
from tip_exp.utils.io import checksum, flush, remove_folder
from tip_exp.utils.space import when_there_is_space

NUM_KEPT = 2  # newest checkpoints that stay on disk
CHECKSUMS = "checksums.json"


@dataclass(frozen=True)
class _Checksummed(WriteResult):
    """What a rank tells the main rank of a tensor that it wrote, with the checksum of the whole file."""

    checksum: str


class CheckpointWriter(FileSystemWriter):
    """DCP's files, checksummed by the rank that writes them; the main rank publishes them when all are written."""

    def __init__(self, temporary: Path, final: Path, records: dict[str, Any], check_held: Callable[[], None]) -> None:
        """`records`: file name -> its content."""
        # Copying ahead is for tensors on a device; these are staged. It would open a CUDA context on device 0.
        super().__init__(temporary, per_thread_copy_ahead=0)
        self.temporary, self.final, self.records, self.check_held = temporary, final, records, check_held

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        write = super().write_data

        def attempt() -> list[WriteResult]:
            try:
                return write(plan, planner).wait()
            except RuntimeError as error:  # torch.save reports a failed write as an unexpected position in its file
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None

        results = when_there_is_space(attempt, self.temporary)
        files = {result.storage_data.relative_path for result in results}
        checksums = {file: checksum(self.temporary / file) for file in files}
        future: TorchFuture[list[WriteResult]] = TorchFuture()
        future.set_result(
            [
                _Checksummed(r.index, r.size_in_bytes, r.storage_data, checksums[r.storage_data.relative_path])
                for r in results
            ]
        )
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        when_there_is_space(lambda: self._finish(metadata, results), self.temporary)
        step = int(self.final.name.removeprefix("step_"))
        keep_newest(self.final.parent, NUM_KEPT, up_to=step)

    def _finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        for name, content in self.records.items():
            (self.temporary / name).write_text(json.dumps(content))
        checksums = {
            result.storage_data.relative_path: result.checksum
            for rank_results in results
            for result in rank_results
            if isinstance(result, _Checksummed)
        }
        checksums |= {name: checksum(self.temporary / name) for name in (".metadata", *self.records)}
        (self.temporary / CHECKSUMS).write_text(json.dumps(checksums, indent=2))
        self.check_held()
        publish(self.temporary, self.final)


def keep_newest(checkpoints: Path, count: int, up_to: float = math.inf) -> None:
    """Remove all checkpoints but the newest `count` of those up to step `up_to`.

    Later ones are damaged, or their rows are gone: the run has replaced them.
    """
    saved = numbered_checkpoints(checkpoints)
    kept = [number for number in saved if number <= up_to][-count:]
    for number, path in saved.items():
        if number not in kept:
            remove_folder(path)
    for left in checkpoints.glob(".removing_*"):  # by a kill
        shutil.rmtree(left, ignore_errors=True)


def publish(temporary: Path, final: Path) -> None:
    """Flush all files of `temporary`, then rename it to `final`, replacing what is there."""
    for path in [*temporary.rglob("*"), temporary, final.parent.parent]:  # the last one names the folder of both
        flush(path)
    remove_folder(final)
    temporary.rename(final)
    flush(final.parent)
