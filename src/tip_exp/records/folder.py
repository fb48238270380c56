"""The files of one run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


class _File:
    """An attribute of RunFolder: the path of a file or folder below its root."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, folder: RunFolder, owner: type[RunFolder]) -> Path:
        return folder.root / self._name


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of one run's files. `result` is written last: a run without it is not finished."""

    root: Path

    config = _File("config.yaml")
    metrics = _File("metrics.jsonl")
    eval_rows = _File("eval.jsonl")
    samples = _File("samples.jsonl")
    prompts = _File("first_prompts.json")
    checkpoints = _File("checkpoint")
    log = _File("worker.log")
    lock = _File("lock")
    wandb = _File("wandb")
    wandb_id = _File("wandb_id")
    result = _File("result.json")
