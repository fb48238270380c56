"""The process of a run prints one message, whatever its disk and its signals do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tip_exp.records.folder import RunFolder

START = """
import os, sys
from unittest.mock import MagicMock
sys.modules["transformers"] = sys.modules["tip_exp.run"] = MagicMock()
sys.argv[2] = str(os.getppid())
from tip_exp.launch.worker import main
main()
"""


def work(folder: RunFolder, *locks: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", START, str(folder.root), "parent", *map(str, locks)]
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
