"""Everything that only a GPU can show, in about 15 minutes on one card and without the model hub (random weights).

Each check runs in a process of its own with a time limit, so that one failure does not stop the others; the limits
leave room to compile for engines of a new shape. The results go to OUT/<device>.md, and OUT/README.md lists every check
with its state on each device.
--device cpu --tiny rehearses the program itself, in one process, and proves nothing about GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.gpu_check import checks, losses, report
from benchmarks.measuring import in_child
from tip_exp.utils.errors import format_error


@dataclass(frozen=True, slots=True)
class Check:
    """A line of the report: what is claimed, the seconds that it may take, and the function that raises if it fails."""

    claim: str
    limit_s: int
    function: checks.Function


CHECKS = {
    "tests": Check("tests/gpu pass", 900, checks.run_tests),
    "loss": Check("time, memory and error of the loss beside cuBLAS alone and TRL's kernel", 60, losses.loss),
    "memory": Check("loss memory against retention, for both backends (the paper's figure)", 60, losses.memory),
    "engine": Check("the engine is built, sleeps, takes new weights and wakes, three times", 480, checks.engine),
    "run": Check("three steps of 1.7B → 0.6B by tip-exp on one GPU", 240, checks.run_one),
    "run_slice": Check("three steps of 8B → 4B, two layers of each, on one GPU", 240, checks.run_slice),
    "run_ranks": Check("three steps of 1.7B → 0.6B on all GPUs give the metrics of one", 240, checks.run_ranks),
    "forecast": Check("the forecast of device memory is within 10 % of the runs above", 30, checks.forecast),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, as a rehearsal")
    parser.add_argument("--only", nargs="+", choices=list(CHECKS), help="these checks")
    parser.add_argument("--ranks", type=int, help="of run_ranks; default: all GPUs")
    parser.add_argument("--out", type=Path, help="default: results/gpu, or outputs/gpu_check for a rehearsal")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)  # of a child process: where it leaves its lines


def main(arguments: argparse.Namespace) -> None:
    rehearsal = arguments.device == "cpu" or arguments.tiny
    ranks = arguments.ranks or checks.count_gpus()
    if arguments.work is not None:
        result = attempt(arguments.only[0], checks.Settings(arguments.device, arguments.tiny, ranks, arguments.work))
        (arguments.work / f"{arguments.only[0]}.json").write_text(json.dumps(asdict(result)))
        return
    out = arguments.out or Path("outputs/gpu_check" if rehearsal else "results/gpu")
    claims = {name: check.claim for name, check in CHECKS.items()}
    machine = in_child(report.machine, arguments.device)  # a CUDA context here would count as memory of a run
    results: dict[str, report.Result] = {}
    with tempfile.TemporaryDirectory(prefix="tip_exp_gpu_check_") as work:
        settings = checks.Settings(arguments.device, arguments.tiny, ranks, Path(work))
        for name in arguments.only or CHECKS:
            print(f"{name}: {claims[name]} … ", end="", flush=True)
            started = time.monotonic()
            results[name] = attempt(name, settings) if arguments.tiny else attempt_in_child(name, settings)
            results[name].seconds = time.monotonic() - started
            print(f"{results[name].state} ({results[name].seconds:.0f} s)", flush=True)
            path = report.write(out, machine, claims, results)  # after each check, as the next may hang the machine
            print(f"  written to {path}", flush=True)
    if any(result.state.startswith("failed") for result in results.values()):
        sys.exit(1)


def attempt(name: str, settings: checks.Settings) -> report.Result:
    try:
        return report.Result("passed", lines=CHECKS[name].function(settings))
    except checks.NotApplicable as reason:
        return report.Result(f"{report.NOT_RUN}: {reason}")
    except Exception as error:
        return report.Result(f"failed: {format_error(error).removeprefix('error: ')}", log=traceback.format_exc())


def attempt_in_child(name: str, settings: checks.Settings) -> report.Result:
    """The result of a process of its own, also if that is killed, crashes or does not end."""
    line = [sys.executable, "-m", "benchmarks", "gpu_check", "--only", name, "--work", str(settings.work)]
    line += ["--device", settings.device, "--ranks", str(settings.ranks), *(["--tiny"] if settings.tiny else [])]
    log_path, limit = settings.work / f"{name}.log", CHECKS[name].limit_s
    with log_path.open("w") as log:
        child = subprocess.Popen(line, stdout=log, stderr=log, start_new_session=True)
        try:
            code = child.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # and the run that it has started
            child.wait()
            return report.Result(f"failed: not finished after {limit} s", log=report.tail(log_path))
    if code != 0:
        return report.Result(f"failed: its process ended with exit code {code}", log=report.tail(log_path))
    return report.Result(**json.loads((settings.work / f"{name}.json").read_text()))
