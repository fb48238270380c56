"""Disturb small runs at random and check that each ends like an undisturbed one, or refuses with one clear line.

python -m scripts.chaos --cases 500 --seed 0 --out results/chaos.md      (`make chaos`; --seconds N stops earlier)

A case is a run that is killed, interrupted, moved, launched twice or damaged once to three times and then launched
until it ends. Launchers and workers are forked from this process, which has loaded torch, so that a run takes seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from hydra import compose, initialize_config_dir

import tip_exp.run  # noqa: F401  (loaded once, for all workers)
from tip_exp.config.parse import parse
from tip_exp.config.resolvers import register_resolvers
from tip_exp.config.schema import RunConfig
from tip_exp.launch import launch as launching
from tip_exp.launch import worker
from tip_exp.launch.lock import holder
from tip_exp.records.folder import RunFolder
from tip_exp.utils import termination
from tip_exp.utils.errors import INTERRUPTED, TERMINATED, ConfigError, RunFailedError, exit_code, format_error
from tip_exp.utils.io import read_rows
from tip_exp.utils.paths import conf_dir

SMALL = ["device=cpu", "logger=files", "learner.num_steps=6", "learner.warmup_steps=0", "learner.prompts_per_step=2"]
SMALL += ["learner.checkpoint_every=2", "eval.every=3", "eval.teacher=false", "eval.samples=1", "eval.greedy=false"]
SMALL += ["eval.benchmarks.word_sums.num_problems=2", "logger.rollouts_per_sample=1", "data.max_response_tokens=8"]
KILL_AT_WRITE = "TIP_CHAOS_KILL_AT_WRITE"  # number of the fsync, rename or removal at which a worker kills itself
LAUNCHES = 6  # until a case counts as failed


class Forked:
    """A worker process, forked instead of started: what launch.py uses of subprocess.Popen."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self.returncode: int | None = None
        self.pid = fork(lambda: self._work(command, env))

    @staticmethod
    def _work(command: list[str], env: dict[str, str]) -> int:
        os.environ.update(env)
        sys.argv = command[2:]
        if at := os.environ.get(KILL_AT_WRITE):
            kill_at_write(int(at))
        worker.main()
        return 0

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)


def fork(body: Callable[[], int]) -> int:
    """Run `body` in a child with default signals; its exit code is what `body` returns."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        for number in (*termination.SIGNALS, signal.SIGINT):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        code = body()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def kill_at_write(at: int) -> None:
    """Kill this process before its `at`-th operation that orders writes."""
    count = 0

    def counting(operation: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*arguments, **options)

        return counted

    for name in ("fsync", "rename", "replace", "unlink"):
        setattr(os, name, counting(getattr(os, name)))


class Launched:
    """`tip-exp` in a process group of its own, with its output in a file."""

    def __init__(self, config: RunConfig, folder: RunFolder, **environment: str) -> None:
        self.output = folder.root.with_name("output.txt")
        self.pid = fork(lambda: self._launch(config, folder, environment))
        self.code: int | None = None

    def _launch(self, config: RunConfig, folder: RunFolder, environment: dict[str, str]) -> int:
        os.setsid()
        handle = os.open(self.output, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.environ.update(environment)
        termination.handle()
        launching.subprocess = SimpleNamespace(Popen=Forked)  # pyright: ignore[reportAttributeAccessIssue]
        try:
            launching.launch(config, folder)
        except KeyboardInterrupt as stop:
            return TERMINATED if isinstance(stop, termination.Terminated) else INTERRUPTED
        except (ConfigError, RunFailedError, OSError) as error:
            print(format_error(error), file=sys.stderr)
            return exit_code(error)
        return 0

    def wait(self, seconds: float = 600) -> int | None:
        """The exit code; None if it runs for longer."""
        end = time.monotonic() + seconds
        while self.code is None and time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
            time.sleep(0.005)
        return self.code


def numbers_of(folder: RunFolder) -> Any:
    """What must not depend on disturbances: result, rows without times and memory, weights."""
    result = json.loads(folder.result.read_text())
    rows = [
        {key: value for key, value in row.items() if not key.startswith(("time/", "memory/")) and "_per_s" not in key}
        for row in read_rows(folder.metrics)
    ]
    weights = hashlib.sha256((folder.model / "model.safetensors").read_bytes()).hexdigest()
    parts = [{key: result[key] for key in ("start", "final", "outcomes", "health")}, rows, weights]
    return [*parts, read_rows(folder.eval_rows), read_rows(folder.samples)]


def wait_until_free(folder: RunFolder) -> None:
    while holder(folder.lock):
        time.sleep(0.02)


def worker_of(folder: RunFolder) -> int | None:
    try:
        processes = json.loads(folder.lock.read_text())["processes"]
    except (OSError, ValueError):
        return None
    return int(processes[1][0]) if len(processes) > 1 else None


def disturb(kind: str, config: RunConfig, folder: RunFolder, seconds: float, draw: random.Random) -> None:
    """Start the run and disturb it within `seconds`, the time of an undisturbed one; returns when all have ended."""
    environment = {KILL_AT_WRITE: str(draw.randint(1, 150))} if kind == "kill in a write" else {}
    launched = Launched(config, folder, **environment)
    if kind == "kill in a write" or launched.wait(draw.uniform(0, 1.1 * seconds)) is not None:
        launched.wait()
    elif kind in ("SIGKILL", "SIGTERM", "SIGINT"):
        number = getattr(signal, kind)
        target = "group" if kind == "SIGINT" else draw.choice(["group", "launcher", "worker"])
        pid = worker_of(folder) if target == "worker" else launched.pid
        if pid is not None:
            (os.killpg if target == "group" else os.kill)(pid, number)
    elif kind == "two launches":
        Launched(config, folder).wait()
    elif kind == "move":
        moved = folder.root.with_name("moved")
        folder.root.rename(moved)
        Launched(config, folder).wait()
        launched.wait()
        shutil.rmtree(moved)
    elif kind.startswith("damage"):
        os.killpg(launched.pid, signal.SIGKILL)
    launched.wait()
    wait_until_free(folder)
    if kind.startswith("damage"):
        damage(folder, draw)


def damage(folder: RunFolder, draw: random.Random) -> None:
    files = sorted(path for path in folder.root.rglob("*") if path.is_file() and path.suffix != ".log")
    if not files:
        return
    path = draw.choice(files)
    how, data = draw.choice(["remove", "empty", "cut", "flip"]), bytearray(path.read_bytes())
    if how == "remove":
        return path.unlink()
    place = draw.randrange(len(data)) if data else 0
    if how == "flip" and data:
        data[place] ^= 1 << draw.randrange(8)
    path.write_bytes(data if how == "flip" else data[:place] if how == "cut" else b"")


def case(config: RunConfig, root: Path, expected: Any, seconds: float, kind: str, draw: random.Random) -> str:
    """ "equal", "refused" (one clear line), or what is wrong."""
    folder = RunFolder(root / "run")
    for _ in range(draw.randint(1, 3)):
        disturb(kind, config, folder, seconds, draw)
    launched = Launched(config, folder)
    code = launched.wait()
    output = launched.output.read_text()
    if "Traceback" in output:
        return f"traceback: {output[-600:]}"
    if code == 0:
        if numbers_of(folder) == expected:
            return "equal"
        return "other numbers"
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    is_clear = 1 <= len(errors) <= 2 and all(len(line) <= 600 for line in errors)
    return "refused" if is_clear and kind.startswith("damage") else f"exit code {code}: {output[-600:]}"


KINDS = ("SIGKILL", "kill in a write", "SIGTERM", "SIGINT", "two launches", "move", "damage of a file")


def table(counts: Counter[tuple[str, str]], seed: int, seconds: float) -> str:
    head = [
        "| disturbance | cases | equal to the undisturbed run | refused with one line | wrong |",
        "|---|---|---|---|---|",
    ]
    for kind in KINDS:
        total, equal, refused = (
            sum(n for (k, outcome), n in counts.items() if k == kind and (want is None or outcome == want))
            for want in (None, "equal", "refused")
        )
        head.append(f"| {kind} | {total} | {equal} | {refused} | {total - equal - refused} |")
    command = (
        f"`python -m scripts.chaos --cases {sum(counts.values())} --seed {seed}`, {seconds:.0f} s on two slow cores"
    )
    return "\n".join(["# Runs that are disturbed at random", "", f"{command}.", "", *head, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no case after this time")
    parser.add_argument("--out", type=Path, help="file for the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    register_resolvers()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = parse(compose("config", overrides=SMALL))
    start, counts, wrong = time.monotonic(), Counter[tuple[str, str]](), 0
    with tempfile.TemporaryDirectory() as scratch:
        whole = RunFolder(Path(scratch) / "whole" / "run")
        whole.root.mkdir(parents=True)
        launched = Launched(config, whole)
        assert launched.wait() == 0, launched.output.read_text()
        seconds, expected = time.monotonic() - start, numbers_of(whole)
        for number in range(arguments.cases):
            if time.monotonic() - start > arguments.seconds:
                break
            draw, kind = random.Random(f"{arguments.seed}.{number}"), KINDS[number % len(KINDS)]
            root = Path(scratch) / str(number)
            (root / "run").mkdir(parents=True)
            outcome = case(config, root, expected, seconds, kind, draw)
            counts[kind, outcome if outcome in ("equal", "refused") else "wrong"] += 1
            if outcome not in ("equal", "refused"):
                wrong += 1
                print(f"case {number} ({kind}): {outcome}", file=sys.stderr, flush=True)
            shutil.rmtree(root)
    text = table(counts, arguments.seed, time.monotonic() - start)
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
