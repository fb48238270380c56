"""Checkpoints that a crash cannot spoil: written aside, checksummed, renamed; a torn one is passed over.

checkpoint/step_00040/ is a plain Hugging Face folder of the student (weights, tokenizer, generation config) with two
files more: learner.pt (optimizer, random states) and checksums.json, written last. Of a LoRA student the weights are
merged, and adapter/ is the adapter alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tip_exp.models.lora import FOLDER, has_adapters, merged_tensors, save_adapter

log = logging.getLogger(__name__)
KEPT = 2  # newest checkpoints that stay on disk
_CHECKSUMS, _LEARNER = "checksums.json", "learner.pt"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    path: Path
    step: int

    def learner_state(self) -> dict[str, Any]:
        return torch.load(self.path / _LEARNER, map_location="cpu", weights_only=True)


class CheckpointError(OSError):
    """The disk did not take a checkpoint; the one before it stands."""


def save(
    folder: Path, step: int, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, state: dict[str, Any]
) -> Checkpoint:
    """Write a checkpoint and let the newest KEPT stand. `state`: tensors, numbers, strings and containers of them."""
    final, aside = folder / f"step_{step:05d}", folder / f".writing_{step:05d}"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        if has_adapters(student):  # a plain folder all the same; the adapter beside it is what a resumed run takes
            student.save_pretrained(aside, state_dict=dict(merged_tensors(student)))
            save_adapter(student, aside / FOLDER)
        else:
            student.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        torch.save(state, aside / _LEARNER)
        files = [path for path in sorted(aside.rglob("*")) if path.is_file()]
        sums = {path.relative_to(aside).as_posix(): _checksum(path) for path in files}
        (aside / _CHECKSUMS).write_text(json.dumps(sums, indent=2))
        for path in [*aside.rglob("*"), aside]:
            _flush(path)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        _flush(folder)
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(f"the checkpoint of step {step} could not be written to {folder}: {error}") from error
    for old in sorted(folder.glob("step_*"))[:-KEPT]:
        shutil.rmtree(old)
    return Checkpoint(final, step)


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint whose files are what its checksums say."""
    for path in sorted(folder.glob("step_*"), reverse=True):
        if _is_whole(path):
            return Checkpoint(path, int(path.name.removeprefix("step_")))
        log.warning("%s is torn (a checksum does not match); using the one before it", path)
    return None


def random_states() -> dict[str, Any]:
    """State of every random generator a run may touch."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])


def _is_whole(path: Path) -> bool:
    try:
        sums = json.loads((path / _CHECKSUMS).read_text())
        return bool(sums) and all(_checksum(path / name) == expected for name, expected in sums.items())
    except (OSError, ValueError):
        return False


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """fsync a file or a folder, so that a rename never gets to the disk before what it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
