"""Launchers and workers that are forked from this process, which has loaded torch, so that a run takes a second."""

from __future__ import annotations

import importlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import RLock
from types import SimpleNamespace
from typing import Any, ClassVar

from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
from tqdm import tqdm

from tip_exp.launch import cli, launch, lock, torchrun, worker  # noqa: F401  (loaded once, for all processes)
from tip_exp.utils import termination
from tip_exp.utils.errors import INTERRUPTED, ConfigError, RunFailedError, exit_code, format_error

tqdm.set_lock(RLock())  # a lock of each process: its own is shared after a fork, and a killed process would keep it
tqdm.monitor_interval = 0  # no thread, which might hold that lock at a fork
Fault = Callable[[], None]  # what is wrong in the processes of a run; called in each before it starts


class Forked:
    """What launch.py and torch.distributed.run use of subprocess.Popen, for `python -m MODULE …`."""

    fault: ClassVar[Any] = None  # a function of the worker, as a static method

    def __init__(self, args: Any, env: dict[str, str], **options: Any) -> None:
        self.returncode: int | None = None
        self.pid = fork(lambda: self._work(list(args), env, options))

    def _work(self, command: list[str], env: dict[str, str], options: dict[str, Any]) -> int:
        if options.get("start_new_session"):
            os.setsid()
        elif options.get("process_group") is not None:
            os.setpgid(0, options["process_group"])
        for number, file in enumerate((options.get("stdout"), options.get("stderr")), 1):
            if file is not None:
                os.dup2(file.fileno(), number)
        let_go_of_guard()
        os.environ.clear()
        os.environ.update(env)
        sys.argv = command[command.index("-m") + 1 :]
        if (fault := self.fault) is not None:
            fault()
        importlib.import_module(sys.argv[0]).main()
        return 0

    def poll(self) -> int | None:
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # taken by a call that a signal interrupted
                self.returncode = 0
                return 0
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float = float("inf")) -> int:
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("forked", timeout)
            time.sleep(0.005)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def fork(body: Callable[[], int]) -> int:
    """Run `body` in a child with default signals; its exit code is what `body` returns."""
    sys.stdout.flush()
    sys.stderr.flush()
    signals = *termination.SIGNALS, signal.SIGINT
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # Python drops what a handler raises in a fork's callbacks
    if pid := os.fork():
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return pid
    code = 1
    try:
        for number in signals:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        code = body()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except KeyboardInterrupt:  # before the handlers of the program are set
        code = INTERRUPTED
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def let_go_of_guard() -> None:
    """Close what another thread held of `lock.py` at the fork, which would lock it for this process; exec does so."""
    guard = str(lock.LOCAL / "guard")
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # that of listdir itself
            if os.readlink(f"/proc/self/fd/{number}") == guard:
                os.close(int(number))


class Launched:
    """`tip-exp` in a process group of its own, with its output in a file."""

    def __init__(self, body: Callable[[], None], output: Path, fault: Fault | None = None) -> None:
        self.output, self.code = output, None
        self.pid = fork(lambda: self._launch(body, fault))

    def _launch(self, body: Callable[[], None], fault: Fault | None) -> int:
        os.setsid()
        handle = os.open(self.output, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        Forked.fault = staticmethod(fault) if fault else None
        popen = SimpleNamespace(Popen=Forked, TimeoutExpired=subprocess.TimeoutExpired)
        launch.subprocess = popen  # pyright: ignore[reportAttributeAccessIssue]
        subprocess_handler.Popen = Forked  # pyright: ignore[reportAttributeAccessIssue, reportPrivateImportUsage]
        termination.handle()
        try:
            body()
        except KeyboardInterrupt as stop:
            return termination.code_of(stop)
        except (ConfigError, RunFailedError, OSError) as error:
            print(format_error(error), file=sys.stderr)
            return exit_code(error)
        return 0

    def wait(self, seconds: float = 300, *, cpu_s: float = float("inf")) -> int | None:
        """The exit code; None if it runs for longer, or once its processes have used `cpu_s` of processor time."""
        end = time.monotonic() + seconds
        while self.code is None and time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
            if cpu_s < float("inf"):
                if cpu_seconds(self.pid) >= cpu_s:
                    break
                time.sleep(0.04)  # that takes a few milliseconds of this process
            time.sleep(0.005)
        return self.code

    def text(self) -> str:
        """The output; a new line also where a progress bar moves a terminal's cursor."""
        return re.sub(r"\r|\x1b\[\d*[A-Z]", "\n", self.output.read_text(errors="replace"))


def cpu_seconds(pid: int) -> float:
    """Processor time of a process and of those below it, with the children that have ended."""
    ticks = 0
    for process in [pid, *(below for level in descendants(pid) for below in level)]:
        with suppress(OSError):  # user and system, of itself and of children: fields 14 to 17 of proc_pid_stat(5)
            ticks += sum(map(int, Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def descendants(pid: int) -> list[list[int]]:
    """Processes below `pid`: its children, their children, …"""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    levels: list[list[int]] = []
    above = [pid]
    while above := sorted(child for child, parent in parents.items() if parent in above):
        levels.append(above)
    return levels


def send(pids: list[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
