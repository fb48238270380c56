"""What is disturbed: one run, one run of two ranks, or a sweep of two runs; and its numbers without a disturbance."""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from scripts.chaos.faults import count_writes
from scripts.chaos.forked import Fault, Launched
from tip_exp.config.parse import parse
from tip_exp.launch import cli, launch
from tip_exp.launch.lock import holder
from tip_exp.records.folder import RunFolder
from tip_exp.utils.io import checksum, read_rows
from tip_exp.utils.paths import conf_dir

SMALL = ["device=cpu", "logger=files", "learner.num_steps=4", "learner.warmup_steps=0", "learner.prompts_per_step=2"]
SMALL += ["learner.checkpoint_every=1", "eval.every=2", "eval.teacher=false", "eval.samples=1", "eval.greedy=false"]
SMALL += ["eval.benchmarks.word_sums.num_problems=2", "logger.rollouts_per_eval=1", "data.max_response_tokens=6"]
SMALL += ["data.train.num_problems=32", "eval.max_tokens=12", "num_threads=1"]
SWEEP = ["-m", *SMALL, "seed=0,1", "eval.teacher=true", "sweep=chaos"]
LIMIT_S = 240  # the longest that a launch may take


@dataclass(frozen=True)
class Setting:
    """`start` does all of it in a working directory; `folders` are those of its runs."""

    name: str
    start: Callable[[Path, list[str]], None]
    folders: Callable[[Path], list[RunFolder]]


@cache
def composed(*overrides: str) -> Any:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return parse(compose("config", overrides=[*SMALL, *overrides]))


def one_run(*overrides: str) -> Callable[[Path, list[str]], None]:
    return lambda root, more: print(launch.launch(composed(*overrides, *more), RunFolder(root / "run")))


def sweep(root: Path, more: list[str]) -> None:
    os.chdir(root)
    sys.argv = ["tip-exp", *SWEEP, *more]
    cli.main()


def sweep_folders(root: Path) -> list[RunFolder]:
    outputs = root / "outputs"
    found = [*outputs.glob("sweeps/chaos/*"), *outputs.glob("teachers/*")]
    return [RunFolder(path) for path in sorted(found) if path.is_dir()]


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("one process", one_run(), lambda root: [RunFolder(root / "run")]),
        Setting("two ranks", one_run("ranks=2"), lambda root: [RunFolder(root / "run")]),
        Setting("vLLM", one_run("rollout=vllm"), lambda root: [RunFolder(root / "run")]),
        Setting("sweep", sweep, sweep_folders),
    )
}


@dataclass(frozen=True)
class Whole:
    """An undisturbed launch: numbers by run, seconds, processor time, and operations that order writes."""

    numbers: dict[str, Any]
    seconds: float
    cpu_s: float
    writes: int


@dataclass
class Trial:
    """One case: a working directory, the launches in it, and what was done to it."""

    setting: Setting
    root: Path
    draw: random.Random
    whole: Whole
    overrides: list[str] = field(default_factory=list)
    launches: list[Launched] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    restore: Callable[[], object] | None = None  # gives a damaged file its content back

    def launch(self, fault: Fault | None = None) -> Launched:
        output = self.root / f"output{len(self.launches)}.txt"
        self.launches.append(Launched(lambda: self.setting.start(self.root, self.overrides), output, fault))
        return self.launches[-1]

    def folder(self) -> RunFolder:
        return self.setting.folders(self.root)[0]

    def moment(self) -> float:
        """Processor time of a launch: at its start, in the run, or after its end, however busy the machine is.

        Early moments are the more probable: a resumed run is shorter.
        """
        return self.draw.triangular(0, 1.05 * self.whole.cpu_s, 0)

    def wait_until_free(self) -> None:
        end = time.monotonic() + LIMIT_S
        while any(holder(folder.lock) for folder in self.setting.folders(self.root)):
            assert time.monotonic() < end, "a run holds its lock although its launcher has ended"
            time.sleep(0.02)


def numbers_of(folder: RunFolder) -> Any:
    """What must not depend on disturbances: result, rows without times and memory, weights."""
    result = json.loads(folder.result.read_text())
    rows = [
        {key: value for key, value in row.items() if not key.startswith(("time/", "memory/")) and "_per_s" not in key}
        for row in read_rows(folder.metrics)
    ]
    weights = {path.name: checksum(path) for path in sorted(folder.model.rglob("*")) if path.is_file()}
    parts = [{key: result[key] for key in ("start", "teacher", "final", "outcomes", "health")}, rows, weights]
    return [*parts, read_rows(folder.eval_rows), read_rows(folder.samples)]


def numbers(setting: Setting, root: Path) -> dict[str, Any]:
    """By the name of a run's folder."""
    return {folder.root.name: numbers_of(folder) for folder in setting.folders(root)}


class Undisturbed:
    """The undisturbed launch of each setting, done when first asked for."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._known: dict[str, Whole] = {}

    def __call__(self, setting: Setting) -> Whole:
        if setting.name not in self._known:
            root = self._scratch / f"undisturbed {setting.name}"
            root.mkdir()
            start, before, log = time.monotonic(), os.times(), root / "writes"
            launched = Launched(lambda: setting.start(root, []), root / "output.txt", count_writes(log))
            assert launched.wait(LIMIT_S) == 0, launched.text()
            seconds, after = time.monotonic() - start, os.times()
            cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
            self._known[setting.name] = Whole(numbers(setting, root), seconds, cpu_s, log.stat().st_size)
        return self._known[setting.name]
