"""2,000 steps in one process: memory, handles and processes; then many readers of run folders beside two writers."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scripts.chaos.campaign import warm_up
from scripts.chaos.forked import Launched, descendants
from scripts.chaos.readers import readers_beside_writers
from scripts.chaos.settings import composed, one_run
from tip_exp.records.folder import RunFolder
from tip_exp.records.result import git_revision
from tip_exp.utils.io import read_rows

SHORTEST = ["learner.prompts_per_step=1", "data.max_response_tokens=2", "eval.max_tokens=2", "eval.every=100"]
SHORTEST += ["learner.checkpoint_every=100", "selector=full", "eval.sequence_kl=false"]
WARM_UP = 300  # steps: caches of torch and of the allocator fill
MAX_SLOPE = 0.2  # MB over 100 steps
READERS, READS = 64, 20


@dataclass(frozen=True)
class Sample:
    step: int
    rss_mb: float
    handles: int
    processes: int
    cpu_s: float


def soak(steps: int, every_s: float = 1.0) -> tuple[str, bool]:
    """Markdown of both measurements, and whether they are as wanted."""
    warm_up()
    with tempfile.TemporaryDirectory(prefix="tip_exp_soak_") as scratch:
        samples = long_run(Path(scratch), steps, every_s)
        torn = readers_beside_writers(Path(scratch) / "read", composed(), READERS, READS)
    revision, first = str(git_revision())[:10], min(WARM_UP, steps // 4)
    later = [sample for sample in samples if sample.step >= first]
    slope = 100 * float(np.polyfit([s.step for s in later], [s.rss_mb for s in later], 1)[0])
    handles, processes = ({getattr(s, name) for s in later} for name in ("handles", "processes"))
    fewest = [min(s.handles for s in half) for half in (later[: len(later) // 2], later[len(later) // 2 :])]
    text = "\n".join(
        [
            "## A long run\n",
            f"`python -m scripts.chaos soak --steps {steps}`, revision {revision}: {samples[-1].step} steps",
            f"of the embedded pair in {samples[-1].cpu_s / 60:.1f} CPU minutes, with a checkpoint and an",
            "evaluation every 100 steps.\n",
            "| measured after warm-up | value | wanted |",
            "|---|---|---|",
            f"| resident memory, slope over 100 steps | {slope:+.3f} MB | <= {MAX_SLOPE} MB |",
            f"| the same at step {later[0].step} and last | {later[0].rss_mb:.0f}, {later[-1].rss_mb:.0f} MB | |",
            f"| open handles, smallest and largest | {min(handles)}, {max(handles)} | |",
            f"| open handles, smallest of the first and of the second half | {fewest[0]}, {fewest[1]} | no growth |",
            f"| child processes, smallest and largest | {min(processes)}, {max(processes)} | constant |",
            f"| {READERS} readers with {READS} reads each beside 2 writers: torn reads | {len(torn)} | 0 |",
            *(f"\n{text}" for text in torn[:5]),
            "",
        ]
    )
    return text, slope <= MAX_SLOPE and fewest[1] <= fewest[0] and len(processes) == 1 and not torn


def long_run(root: Path, steps: int, every_s: float) -> list[Sample]:
    """Samples of the worker's process, at its steps."""
    folder, samples = RunFolder(root / "run"), []
    body = one_run(*SHORTEST, f"learner.num_steps={steps}")
    launched = Launched(lambda: body(root, []), root / "output.txt")
    while launched.wait(every_s) is None:
        with suppress(OSError, IndexError, ValueError):
            (worker, *_), *below = descendants(launched.pid)
            row = read_rows(folder.metrics)[-1]
            samples.append(sample(worker, row["step"], sum(map(len, below))))
    assert launched.code == 0, launched.text()
    return samples


def sample(pid: int, step: int, processes: int) -> Sample:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks = int(times[11]) + int(times[12])  # user and system: fields 14 and 15 of proc_pid_stat(5)
    handles = len(os.listdir(f"/proc/{pid}/fd"))
    return Sample(step, int(status["VmRSS"].split()[0]) / 1024, handles, processes, ticks / os.sysconf("SC_CLK_TCK"))
