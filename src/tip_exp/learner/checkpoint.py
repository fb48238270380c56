"""Checkpoints to resume from.

checkpoint/step_00040/ is a torch.distributed.checkpoint (DCP) folder of the trainable weights and the optimizer's state
by parameter name, so that any number of ranks resumes it; backend.json; rows.json, the run's rows up to this step
(records/writer.py); with rollout.staleness=1 the next step's rollouts.json; and checksums.json of all files, written
last.
A checkpoint is written in the background to a temporary folder, checksummed, flushed and renamed; an incomplete one is
skipped on reading. No random state is saved: every draw is a function of the run's seed and the step.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from tip_exp.learner.adamw import local_part
from tip_exp.learner.checkpoint_files import CHECKSUMS, CheckpointWriter, keep_newest
from tip_exp.learner.distributed import Ranks
from tip_exp.records.folder import numbered_checkpoints
from tip_exp.types import Rollout
from tip_exp.utils.errors import ConfigError, RunFailedError
from tip_exp.utils.io import checksum
from tip_exp.utils.termination import Terminated

log = logging.getLogger(__name__)
_BACKEND, _ROWS, _ROLLOUTS = "backend.json", "rows.json", "rollouts.json"
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
    def rows(self) -> dict[str, list[Any]]:
        """The run's rows up to this step, as RunLogger.record gives them."""
        return json.loads((self.path / _ROWS).read_text())

    @property
    def rollouts(self) -> list[Rollout] | None:
        """Those of the next step, if they were written before it."""
        path = self.path / _ROLLOUTS
        return [Rollout(*row) for row in json.loads(path.read_text())] if path.exists() else None

    def load(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Overwrite trainable weights and optimizer state in place.

        Raises ConfigError if names or shapes differ, else the first rank's error, KeyboardInterrupt included.
        """
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
        try:
            load(state, storage_reader=reader, process_group=self.ranks.background, no_dist=self.ranks.size == 1)
        except CheckpointException as error:  # no Exception; it holds signals too
            raise _cause(error) from error


class Checkpoints:
    """The checkpoints of a run. Writes one at a time in the background; all ranks make the same calls."""

    def __init__(self, folder: Path, ranks: Ranks, check_held: Callable[[], None] = lambda: None) -> None:
        """`check_held` raises if the run's folder is no longer this process's; the main rank calls it."""
        self.folder, self.ranks, self.check_held = folder, ranks, check_held
        self._writing: tuple[int, Future[Any]] | None = None

    def newest(
        self, missing_rows: Callable[[dict[str, list[Any]]], str] = lambda _: "", *, before: float = math.inf
    ) -> Checkpoint | None:
        """The newest checkpoint whose files match its checksums; each rank reads its share of the files.

        `before`: only those of steps below this one.

        `missing_rows` says which of a checkpoint's rows the folder lacks: such a checkpoint gives way to an older one.
        Raises RunFailedError if no whole checkpoint is left that has its rows.
        """
        refused = ""
        numbered = self.ranks.broadcast(numbered_checkpoints(self.folder))  # nodes may see a shared folder differently
        saved = {step: path for step, path in numbered.items() if step < before}
        for step, path in reversed(saved.items()):
            if not all(self.ranks.gather_objects(self._is_complete(path))):
                log.warning("%s is incomplete (a checksum does not match); using the one before it", path)
                continue
            checkpoint = Checkpoint(path, step, self.ranks)
            missing = self.ranks.broadcast(missing_rows(checkpoint.rows) if self.ranks.is_main else "")
            if not missing:
                return checkpoint
            log.warning("%s: %s; using the one before it", path, missing)
            refused = refused or f"{path.name}: {missing}"
        if refused:
            raise RunFailedError(
                f"{self.folder} holds whole checkpoints, but the rows before them are damaged ({refused}). Restore the "
                "file from a copy, or start the run under another name"
            )
        return None

    def save(
        self,
        step: int,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        backend: str,
        rows: dict[str, list[Any]] | None = None,
        rollouts: list[Rollout] | None = None,
    ) -> None:
        """Copy the state to host memory and start to write it, once the checkpoint before is written.

        Then all but the newest NUM_KEPT (checkpoint_files.py) are deleted. `rows`: the main rank's
        `RunLogger.record`; `rollouts`: the next step's, if they exist already. Raises CheckpointError if the one before
        could not be written, FloatingPointError if the state is not finite, and `check_held`'s error.
        """
        self.wait()
        if self.ranks.is_main:
            self.check_held()
        temporary = self.folder / f".writing_{step:05d}"
        if self.ranks.is_main:
            shutil.rmtree(temporary, ignore_errors=True)  # other ranks write only once this rank has planned
        state: dict[str, dict[str, Tensor]] = {}
        for name, parameter in trainable(module).items():
            for slot, tensor in {_WEIGHTS: parameter.detach(), **optimizer.state.get(parameter, {})}.items():
                state.setdefault(slot, {})[name] = tensor
        if not all(self.ranks.gather_objects(_is_finite(state))):
            raise FloatingPointError(
                f"a weight or an optimizer state is not finite after step {step}; no checkpoint of it is written"
            )
        final = self.folder / f"step_{step:05d}"
        records: dict[str, Any] = {_BACKEND: backend, _ROWS: rows or {}}
        if rollouts is not None:
            records[_ROLLOUTS] = [[getattr(r, field.name) for field in fields(r)] for r in rollouts]
        with closing(DefaultStager(StagingOptions(False, False, False, False))) as stager:  # copies at once, keeps none
            future = async_save(
                state,
                storage_writer=CheckpointWriter(temporary, final, records, self.check_held),
                async_stager=stager,
                process_group=self.ranks.background,
                no_dist=self.ranks.size == 1,
            )
        assert isinstance(future, Future), "the staging is synchronous"
        self._writing = step, future

    def wait(self) -> None:
        """Wait until the last checkpoint is written; raises CheckpointError if it could not be.

        Raises Terminated if it was still waiting for space when the process was asked to end.
        """
        if self._writing is None:
            return
        (step, future), self._writing = self._writing, None
        try:
            future.result()
        except (CheckpointException, OSError, RuntimeError, Terminated) as error:
            if self.ranks.is_main:
                shutil.rmtree(self.folder / f".writing_{step:05d}", ignore_errors=True)
            cause = _cause(error) if isinstance(error, CheckpointException) else error
            if isinstance(cause, Terminated):  # while it waited for space
                raise cause from None
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self.folder}: {cause}"
            ) from error

    def finish(self) -> None:
        """Wait until the last checkpoint is written, and remove those before it."""
        self.wait()
        if self.ranks.is_main:
            keep_newest(self.folder, 1)

    def _is_complete(self, path: Path) -> bool:
        try:
            checksums: dict[str, str] = json.loads((path / CHECKSUMS).read_text())
            share = sorted(checksums)[self.ranks.rank :: self.ranks.size]
            return {_BACKEND, _ROWS} <= checksums.keys() and all(
                checksum(path / name) == checksums[name] for name in share
            )
        except (OSError, ValueError):
            return False


def _cause(error: CheckpointException) -> BaseException:
    """What a rank raised, the first of several."""
    return next((cause for cause, _ in error.failures.values()), error)


def _is_finite(state: dict[str, dict[str, Tensor]]) -> bool:
    """Whether this rank's tensors are finite. Copies none of them and waits for the device once."""
    tensors = [local_part(tensor) for of_slot in state.values() for tensor in of_slot.values()]
    largest = [torch.linalg.vector_norm(tensor, math.inf).double() for tensor in tensors if tensor.numel()]
    return not largest or bool(torch.stack([norm.to(largest[0].device) for norm in largest]).isfinite().all())


def trainable(module: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters by name, a tied one once.

    From state_dict(), which reshards FSDP2 modules: after an evaluation some parameters are whole, in compute dtype.
    """
    names: dict[Tensor, str] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if tensor.requires_grad:
            names.setdefault(tensor, name)
    return {name: parameter for parameter, name in names.items()}
