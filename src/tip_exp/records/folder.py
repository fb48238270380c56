"""The files of one run."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Records of worker.log: their time, and the error.
LOG_STARTS = re.compile(r"^(\S+ \S+) tip_exp INFO the run starts$", re.MULTILINE)
LOG_FAILED = re.compile(r"^(\S+ \S+) tip_exp ERROR the run failed: (.*)$", re.MULTILINE)
LOG_TAIL_BYTES = 1 << 16  # more than a traceback and what libraries print around it


def _nothing() -> None:
    """A run that was started without a launcher has no lock to check."""


@dataclass
class RunFolder:
    """Paths of one run's files. `result` is written last: a run without it is not finished.

    `check_held` raises RunFailedError if this process no longer holds the folder's lock; called before every write.
    """

    root: Path
    check_held: Callable[[], None] = _nothing

    def __post_init__(self) -> None:
        self.config = self.root / "config.yaml"
        self.overrides = self.root / ".hydra" / "overrides.yaml"  # what was typed
        self.metrics = self.root / "metrics.jsonl"
        self.eval_rows = self.root / "eval.jsonl"
        self.samples = self.root / "samples.jsonl"
        self.rows = self.metrics, self.eval_rows, self.samples
        self.prompts = self.root / "first_prompts.json"
        self.checkpoints = self.root / "checkpoint"
        self.model = self.root / "model"
        self.card = self.model / "README.md"
        self.log = self.root / "worker.log"
        self.lock = self.root / "lock"
        self.wandb = self.root / "wandb"
        self.wandb_id = self.root / "wandb_id"
        self.tensorboard = self.root / "tensorboard"
        self.mlflow_id = self.root / "mlflow_id"
        self.teacher = self.root / "teacher"  # link to the folder of the teacher's evaluation, if there is one
        self.micro_batches = self.root / "micro_batch_tokens.json"  # learner/out_of_memory.py
        self.result = self.root / "result.json"

    def log_of(self, rank: int) -> Path:
        """worker.log of rank 0, worker.1.log of rank 1, …"""
        return self.log if rank == 0 else self.log.with_name(f"worker.{rank}.log")

    def batch_of(self, step: int) -> Path:
        """The rollouts of a step whose numbers were not finite."""
        return self.root / f"non_finite_{step:05d}.json"


def last_error(folder: RunFolder) -> str:
    """The error of the first rank that failed since rank 0 started last, from their logs; "" if none did."""
    start = max(LOG_STARTS.findall(_tail(folder.log)), default="")
    failures = [found for log in folder.root.glob("worker*.log") for found in LOG_FAILED.findall(_tail(log))]
    return min(((time, error) for time, error in failures if time >= start), default=("", ""))[1]


def _tail(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - LOG_TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def read_budgets(path: Path) -> dict[int, int]:
    """micro_batch_tokens.json: step -> the most tokens of a micro-batch from this step on; {} if memory sufficed."""
    try:
        budgets = {int(step): int(tokens) for step, tokens in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
    return budgets


def numbered_checkpoints(checkpoints: Path) -> dict[int, Path]:
    """step -> folder in ascending order. Only step_ and digits: a user's copy such as step_00005_backup is ignored."""
    matches = {path: re.fullmatch(r"step_(\d+)", path.name) for path in checkpoints.glob("step_*")}
    return dict(sorted((int(match[1]), path) for path, match in matches.items() if match))
