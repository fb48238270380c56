"""Checkpoints: written to a temporary folder, checksummed, flushed, renamed; an incomplete one is skipped on reading.

checkpoint/step_00040/ is a Hugging Face folder of the student (weights, tokenizer, generation config) plus learner.pt
(optimizer state) and checksums.json, written last. For a LoRA student the weights are merged and adapter/ holds the
adapter. No random state is saved: every draw is a function of the run's seed and the step.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tip_exp.models.lora import FOLDER, has_adapters, merged_tensors, save_adapter

log = logging.getLogger(__name__)
NUM_KEPT = 2  # newest checkpoints that stay on disk
_CHECKSUMS, _LEARNER = "checksums.json", "learner.pt"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    path: Path
    step: int

    def learner_state(self) -> dict[str, Any]:
        return torch.load(self.path / _LEARNER, map_location="cpu", weights_only=True)


class CheckpointError(OSError):
    """A checkpoint could not be written; the one before it is intact."""


def save(
    folder: Path,
    step: int,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    state: dict[str, Any],
    tensors: dict[str, Tensor] | None = None,
    adapter: dict[str, Tensor] | None = None,
) -> Checkpoint:
    """Write a checkpoint, then delete all but the newest NUM_KEPT. `state`: tensors, numbers, strings, containers.

    `tensors`, `adapter`: the student's whole weights and adapters, if its own are sharded.
    """
    final, temporary = folder / f"step_{step:05d}", folder / f".writing_{step:05d}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        if has_adapters(student):  # merged weights for users; a resumed run loads the adapter
            student.save_pretrained(temporary, state_dict=tensors or dict(merged_tensors(student)))
            save_adapter(student, temporary / FOLDER, adapter)
        else:
            student.save_pretrained(temporary, state_dict=tensors)
        tokenizer.save_pretrained(temporary)
        torch.save(state, temporary / _LEARNER)
        files = [path for path in sorted(temporary.rglob("*")) if path.is_file()]
        checksums = {path.relative_to(temporary).as_posix(): _checksum(path) for path in files}
        (temporary / _CHECKSUMS).write_text(json.dumps(checksums, indent=2))
        for path in [*temporary.rglob("*"), temporary]:
            _flush(path)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _flush(folder)
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"the checkpoint of step {step} could not be written to {folder}: {error}") from error
    for old in sorted(folder.glob("step_*"))[:-NUM_KEPT]:
        shutil.rmtree(old)
    return Checkpoint(final, step)


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint whose files match its checksums."""
    for path in sorted(folder.glob("step_*"), reverse=True):
        if _is_complete(path):
            return Checkpoint(path, int(path.name.removeprefix("step_")))
        log.warning("%s is incomplete (a checksum does not match); using the one before it", path)
    return None


def _is_complete(path: Path) -> bool:
    try:
        checksums = json.loads((path / _CHECKSUMS).read_text())
        return bool(checksums) and all(_checksum(path / name) == expected for name, expected in checksums.items())
    except (OSError, ValueError):
        return False


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
