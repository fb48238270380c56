"""The process of a run prints one message, whatever its disk and its signals do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tip_exp.records.folder import RunFolder, last_error
from tip_exp.utils import termination

START = """
import os, sys
from unittest.mock import MagicMock
sys.modules["transformers"] = sys.modules["tip_exp.run"] = MagicMock()
sys.argv[2] = str(os.getppid())
from tip_exp.launch import worker
from tip_exp.utils.termination import Terminated
class Panic(BaseException): ...
def fail(error):
    raise error
{change}
worker.main()
"""


def work(folder: RunFolder, *locks: Path, change: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", START.format(change=change), str(folder.root), "parent", *map(str, locks)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run whose configuration cannot be read, so that its process ends with an error."""
    folder = RunFolder(tmp_path / "run")
    folder.root.mkdir()
    folder.config.write_text("{a: [")
    return folder


def test_a_log_on_a_full_disk_leaves_one_message(folder: RunFolder) -> None:
    folder.log.symlink_to("/dev/full")
    done = work(folder)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and "is damaged" in done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr


def test_a_lock_that_is_gone_leaves_one_message(folder: RunFolder) -> None:
    done = work(folder, folder.lock)
    assert done.returncode == 1
    assert done.stderr == f"error: [Errno 2] No such file or directory: '{folder.lock}'\n"


def test_an_error_that_is_no_exception_leaves_one_message(folder: RunFolder) -> None:
    """As PyTorch's CheckpointException and a panic of Rust code."""
    done = work(folder, change="worker._run = lambda _: fail(Panic('index out of bounds'))")
    assert done.returncode == 1
    assert done.stderr == f"error: index out of bounds (traceback in {folder.log})\n"
    assert "Panic: index out of bounds" in folder.log.read_text()
    assert last_error(folder) == "index out of bounds"
    work(folder, change="worker._run = lambda _: fail(KeyboardInterrupt())")
    assert last_error(folder) == "", "the process after it was interrupted"


@pytest.mark.parametrize(
    ("during", "stop", "code"),
    [("logging.basicConfig", "KeyboardInterrupt()", 130), ("format_error", "Terminated('SIGTERM')", 143)],
)
def test_a_signal_before_the_run_or_while_an_error_is_reported_prints_nothing(
    folder: RunFolder, during: str, stop: str, code: int
) -> None:
    done = work(folder, change=f"worker.{during} = lambda *_, **__: fail({stop})")
    assert (done.returncode, done.stderr) == (code, "")


INTERRUPT_WHILE_LOADING = """
import os, signal, sys

class Interrupt:
    def find_spec(name, *_):
        if name == at:
            os.killpg(0, signal.SIGINT)

module, _, at = os.environ["INTERRUPT_AT"].partition(" ")
if f"tip_exp.launch.{module}" in sys.orig_argv:
    sys.meta_path.insert(0, Interrupt)
    Interrupt.find_spec("")
"""


@pytest.mark.parametrize("at", ["worker", "worker pydantic", "torchrun", "torchrun torch"])
def test_an_interrupt_while_a_process_loads_prints_no_traceback(tmp_path: Path, at: str) -> None:
    """From a terminal, at the start of the process or at an import."""
    (tmp_path / "sitecustomize.py").write_text(INTERRUPT_WHILE_LOADING)
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    ranks = "ranks=2" if at.startswith("torchrun") else "ranks=1"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tip_exp",
            ranks,
            "device=cpu",
            "experiment=smoke",
            "logger=files",
            "eval.teacher=false",
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths, "INTERRUPT_AT": at},
        capture_output=True,
        text=True,
        timeout=100,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (done.returncode, done.stderr) == (130, "")


INTERRUPT_BESIDE_A_SIGNAL = """
import os, signal
from tip_exp.launch.worker import end_at_first_interrupt
from tip_exp.utils import termination

numbers = {signal.SIGINT, signal.SIGTERM}
signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
signal.signal(signal.SIGINT, signal.default_int_handler)
end_at_first_interrupt()
termination.handle()
signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
for number in numbers:
    os.kill(os.getpid(), number)
try:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)  # both arrive before a handler runs
    signal.getsignal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_an_interrupt_beside_a_signal_prints_nothing() -> None:
    """A terminal interrupts launcher and worker, and the launcher terminates the worker at the same moment."""
    command = [sys.executable, "-c", INTERRUPT_BESIDE_A_SIGNAL]  # with one thread, which alone receives the signals
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("interrupted\n", "")


INTERRUPT_IN_A_FINALIZER = """
import os, signal
from tip_exp.launch.worker import end_at_first_interrupt
from tip_exp.utils import termination

class Freed:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        signal.getsignal(signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
termination.handle()
end_at_first_interrupt()
Freed()
print(termination.is_requested())
"""


def test_an_interrupt_that_python_drops_is_a_request_to_end() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPT_IN_A_FINALIZER], capture_output=True, text=True, check=True)
    assert "Exception ignored" in done.stderr, "the interrupt was raised in a finalizer"
    assert done.stdout == "True\n"


def test_a_handler_of_another_program_runs_although_the_child_has_ended() -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, _: received.append(number))
    try:
        child = subprocess.Popen(["true"])
        with termination.saves_before_handlers(child):
            child.wait()
            signal.raise_signal(signal.SIGUSR2)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert received == [signal.SIGUSR2]
