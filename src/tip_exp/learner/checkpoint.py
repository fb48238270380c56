"""Checkpoints to resume from.

checkpoint/step_00040/ is a torch.distributed.checkpoint (DCP) folder of the trainable weights and the optimizer's state
by parameter name, so that any number of ranks resumes it; backend.json; with rollout.staleness=1 the
next step's rollouts.json; and checksums.json of all files, written last.
A checkpoint is written in the background to a temporary folder, checksummed, flushed and renamed; an incomplete one is
skipped on reading. No random state is saved: every draw is a function of the run's seed and the step.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import warnings
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future as TorchFuture

from tip_exp.learner.distributed import Ranks
from tip_exp.types import Rollout
from tip_exp.utils.errors import ConfigError

log = logging.getLogger(__name__)
NUM_KEPT = 2  # newest checkpoints that stay on disk
_CHECKSUMS, _BACKEND, _ROLLOUTS = "checksums.json", "backend.json", "rollouts.json"
_WEIGHTS = "model"  # keys are SLOT.PARAMETER: model, or a slot of the optimizer's state such as exp_avg
warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # DCP says so for every single process


class CheckpointError(OSError):
    """A checkpoint or model folder could not be written; the one before it is intact."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    path: Path
    step: int
    ranks: Ranks

    @property
    def backend(self) -> str:
        """Sampling backend of the run that wrote it."""
        return json.loads((self.path / _BACKEND).read_text())

    @property
    def rollouts(self) -> list[Rollout] | None:
        """Those of the next step, if they were written before it."""
        path = self.path / _ROLLOUTS
        return [Rollout(*row) for row in json.loads(path.read_text())] if path.exists() else None

    def load(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Overwrite trainable weights and optimizer state in place; raises ConfigError if names or shapes differ."""
        reader = FileSystemReader(self.path)
        saved: dict[str, Any] = reader.read_metadata().state_dict_metadata
        parameters = trainable(module)
        state = {f"{_WEIGHTS}.{name}": parameter.detach() for name, parameter in parameters.items()}
        saved_shapes = {key: entry.size for key, entry in saved.items() if key.startswith(f"{_WEIGHTS}.")}
        if saved_shapes != {key: tensor.shape for key, tensor in state.items()}:
            raise ConfigError(
                f"{self.path} holds weights of other names or shapes than pair.student trains; resume with the model "
                "and pair.student.lora that the run started with, or start a run under another name"
            )
        optimizer.state.clear()
        for key, entry in saved.items():
            slot, _, name = key.partition(".")
            if slot != _WEIGHTS:
                parameter, dtype = parameters[name], entry.properties.dtype
                if entry.size == parameter.shape:
                    state[key] = torch.zeros_like(parameter, dtype=dtype)  # a moment, sharded as its parameter
                else:
                    state[key] = torch.zeros(entry.size, dtype=dtype, device=parameter.device)  # AdamW's step
                optimizer.state[parameter][slot] = state[key]
        load(state, storage_reader=reader, process_group=self.ranks.background, no_dist=self.ranks.size == 1)


class Checkpoints:
    """The checkpoints of a run. Writes one at a time in the background; all ranks make the same calls."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self.folder, self.ranks = folder, ranks
        self._writing: tuple[int, Future[Any]] | None = None

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint whose files match its checksums; each rank reads its share of the files."""
        for path in sorted(self.folder.glob("step_*"), reverse=True):
            if all(self.ranks.gather_objects(self._is_complete(path))):
                return Checkpoint(path, int(path.name.removeprefix("step_")), self.ranks)
            log.warning("%s is incomplete (a checksum does not match); using the one before it", path)
        return None

    def save(
        self,
        step: int,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        backend: str,
        rollouts: list[Rollout] | None = None,
    ) -> None:
        """Copy the state to host memory and start to write it, once the checkpoint before is written.

        `rollouts`: the next step's, if they exist already.
        Then all but the newest NUM_KEPT are deleted. Raises CheckpointError if the one before could not be written.
        """
        self.wait()
        temporary = self.folder / f".writing_{step:05d}"
        if self.ranks.is_main:
            shutil.rmtree(temporary, ignore_errors=True)  # other ranks write only once this rank has planned
        state: dict[str, dict[str, Tensor]] = {}
        for name, parameter in trainable(module).items():
            for slot, tensor in {_WEIGHTS: parameter.detach(), **optimizer.state.get(parameter, {})}.items():
                state.setdefault(slot, {})[name] = tensor
        with closing(DefaultStager(StagingOptions(False, False, False, False))) as stager:  # copies at once, keeps none
            future = async_save(
                state,
                storage_writer=_Writer(temporary, self.folder / f"step_{step:05d}", backend, rollouts),
                async_stager=stager,
                process_group=self.ranks.background,
                no_dist=self.ranks.size == 1,
            )
        assert isinstance(future, Future), "the staging is synchronous"
        self._writing = step, future

    def wait(self) -> None:
        """Wait until the last checkpoint is written; raises CheckpointError if it could not be."""
        if self._writing is None:
            return
        (step, future), self._writing = self._writing, None
        try:
            future.result()
        except (CheckpointException, OSError, RuntimeError) as error:
            if self.ranks.is_main:
                shutil.rmtree(self.folder / f".writing_{step:05d}", ignore_errors=True)
            failures = error.failures if isinstance(error, CheckpointException) else {}
            cause = next((failure for failure, _ in failures.values()), error)
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self.folder}: {cause}"
            ) from error

    def _is_complete(self, path: Path) -> bool:
        try:
            checksums: dict[str, str] = json.loads((path / _CHECKSUMS).read_text())
            share = sorted(checksums)[self.ranks.rank :: self.ranks.size]
            return bool(checksums) and all(_checksum(path / name) == checksums[name] for name in share)
        except (OSError, ValueError):
            return False


def trainable(module: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters by name, a tied one once.

    From state_dict(), which reshards FSDP2 modules: after an evaluation some parameters are whole, in compute dtype.
    """
    names: dict[Tensor, str] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if tensor.requires_grad:
            names.setdefault(tensor, name)
    return {name: parameter for parameter, name in names.items()}


@dataclass(frozen=True)
class _Checksummed(WriteResult):
    """What a rank tells the main rank of a tensor that it wrote, with the checksum of the whole file."""

    checksum: str


class _Writer(FileSystemWriter):
    """DCP's files, checksummed by the rank that writes them; the main rank publishes them when all are written."""

    def __init__(self, temporary: Path, final: Path, backend: str, rollouts: list[Rollout] | None) -> None:
        # Copying ahead is for tensors on a device; these are staged. It would open a CUDA context on device 0.
        super().__init__(temporary, per_thread_copy_ahead=0)
        self.temporary, self.final, self.backend, self.rollouts = temporary, final, backend, rollouts

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        try:
            results = super().write_data(plan, planner).wait()
        except RuntimeError as error:  # torch.save reports a failed write as an unexpected position in its file
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        files = {result.storage_data.relative_path for result in results}
        checksums = {file: _checksum(self.temporary / file) for file in files}
        future: TorchFuture[list[WriteResult]] = TorchFuture()
        future.set_result(
            [
                _Checksummed(r.index, r.size_in_bytes, r.storage_data, checksums[r.storage_data.relative_path])
                for r in results
            ]
        )
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        extra: dict[str, Any] = {_BACKEND: self.backend}
        if self.rollouts is not None:
            extra[_ROLLOUTS] = [[getattr(r, field.name) for field in fields(r)] for r in self.rollouts]
        for name, value in extra.items():
            (self.temporary / name).write_text(json.dumps(value))
        checksums = {
            result.storage_data.relative_path: result.checksum
            for rank_results in results
            for result in rank_results
            if isinstance(result, _Checksummed)
        }
        checksums |= {name: _checksum(self.temporary / name) for name in (".metadata", *extra)}
        (self.temporary / _CHECKSUMS).write_text(json.dumps(checksums, indent=2))
        publish(self.temporary, self.final)
        for old in sorted(self.final.parent.glob("step_*"))[:-NUM_KEPT]:
            shutil.rmtree(old)


def publish(temporary: Path, final: Path) -> None:
    """Flush all files of `temporary`, then rename it to `final`, replacing what is there."""
    for path in [*temporary.rglob("*"), temporary]:
        _flush(path)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    _flush(final.parent)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """fsync a file or folder, so that a rename never reaches the disk before the data it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
