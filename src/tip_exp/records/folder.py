"""The files of one run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass
class RunFolder:
    """Paths of one run's files. `result` is written last: a run without it is not finished."""

    root: Path

    def __post_init__(self) -> None:
        self.config = self.root / "config.yaml"
        self.metrics = self.root / "metrics.jsonl"
        self.eval_rows = self.root / "eval.jsonl"
        self.samples = self.root / "samples.jsonl"
        self.prompts = self.root / "first_prompts.json"
        self.checkpoints = self.root / "checkpoint"
        self.model = self.root / "model"
        self.log = self.root / "worker.log"
        self.lock = self.root / "lock"
        self.wandb = self.root / "wandb"
        self.wandb_id = self.root / "wandb_id"
        self.teacher = self.root / "teacher"  # link to the folder of the teacher's evaluation, if there is one
        self.result = self.root / "result.json"

    def log_of(self, rank: int) -> Path:
        """worker.log of rank 0, worker.1.log of rank 1, …"""
        return self.log if rank == 0 else self.log.with_name(f"worker.{rank}.log")
