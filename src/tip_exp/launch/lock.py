"""Lock files that name the processes that hold them. They need no flock, which Lustre and some NFS mounts lack.

A lock is created with O_EXCL and holds while any process in it lives, as known from its host, pid and start time. Only
on that host can a lock be recognized as stale, or in the SLURM job that made it, once SLURM has started the job again.
On another host the error names the file to remove.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from tip_exp.utils.errors import RunFailedError
from tip_exp.utils.io import write_atomic
from tip_exp.utils.paths import private_folder

LOCAL = Path(tempfile.gettempdir()) / f"tip_exp_{os.getuid()}"  # on a disk of this machine


class HeldError(RunFailedError):
    """Another process writes to the run's folder."""


@dataclass(frozen=True, slots=True)
class _Lock:
    host: str
    boot: str  # a reboot ends every process
    since: str
    processes: list[list[str]]  # pid and start time; the one that locked first
    job: str = ""  # SLURM_JOB_ID
    restarts: int = 0  # of the job until then

    def with_processes(self, processes: list[list[str]]) -> str:
        """The content of the file with these processes."""
        return json.dumps(asdict(self) | {"processes": processes}) + "\n"

    @property
    def is_of_ended_job(self) -> bool:
        """Whether SLURM has requeued the holder's job, which is this one: that ends all its processes, on any host."""
        job, restarts = _slurm_job()
        return job != "" and job == self.job and restarts > self.restarts

    def living(self) -> list[str]:
        """Pids of the processes that still run."""
        if self.boot != _boot_id():
            return []
        return [pid for pid, start in self.processes if _start_time(pid) in (start, "unknown")]


@contextmanager
def lock_or_holder(path: Path) -> Iterator[str]:
    """Lock `path` for this process; yields "" on success, else who holds it and what to do.

    On exit the file is removed, unless a process that joined it still runs: that one keeps the lock.
    """
    refused = _acquire(path)
    try:
        yield refused
    finally:
        if not refused:
            _release(path)


def holder(path: Path) -> str:
    """Who holds the lock and what to do about it; "" if it is free, or if its processes have ended."""
    try:
        lock = _read(path)
    except FileNotFoundError:
        return ""
    except (ValueError, TypeError):  # its creator has not written it yet, or was killed there
        return f"another process; wait for it, or, if none runs, remove {path}"
    if lock.is_of_ended_job:
        return ""
    if lock.host != platform.node():
        pid = lock.processes[0][0]
        return (
            f"process {pid} on {lock.host} since {lock.since}; wait for it, or, if it no longer runs there, "
            f"remove {path}"
        )
    living = lock.living()
    return f"process {living[0]} on {lock.host} since {lock.since}; wait for it, or stop it" if living else ""


def held_elsewhere(path: Path) -> bool:
    """Whether a process of another host holds the lock: this host cannot tell whether it still runs."""
    with suppress(FileNotFoundError, ValueError, TypeError):
        lock = _read(path)
        return lock.host != platform.node() and not lock.is_of_ended_job
    return False


@contextmanager
def joined(path: Path) -> Iterator[None]:
    """Add this process to a lock that its parent holds, so that the lock outlives the parent."""
    with _one_at_a_time():
        lock = _read(path)
        write_atomic(path, lock.with_processes([*lock.processes, _this_process()]))
    try:
        yield
    finally:
        _release(path)


def check_held(path: Path) -> None:
    """Raise RunFailedError unless the lock at `path` still names this process."""
    with suppress(FileNotFoundError, ValueError, TypeError):
        if _this_process() in _read(path).processes:
            return
    raise RunFailedError(
        f"{path} no longer names this process ({os.getpid()}): the run's folder was moved or removed, or another "
        "launch holds it. This process stops without writing to it"
    )


def _acquire(path: Path) -> str:
    with _one_at_a_time():
        if path.exists():
            if refused := holder(path):
                return refused
            path.unlink(missing_ok=True)
        try:
            file = path.open("x", encoding="utf-8")
        except FileExistsError:  # by another host, since the line above
            return holder(path)
        since = datetime.now().isoformat(timespec="seconds")
        try:
            with file:
                lock = _Lock(platform.node(), _boot_id(), since, [], *_slurm_job())
                file.write(lock.with_processes([_this_process()]))
        except OSError:  # an empty lock would say that another process holds it
            path.unlink(missing_ok=True)
            raise
    return ""


def _release(path: Path) -> None:
    """Remove this process from the lock file. On a full disk its entry stays, but no longer counts once it ends."""
    with _one_at_a_time(), suppress(OSError, ValueError, TypeError):
        lock = _read(path)
        if _this_process() not in lock.processes:  # removed by hand, and locked by another since
            return
        left = [process for process in lock.processes if process[0] in lock.living() and process != _this_process()]
        if left:
            write_atomic(path, lock.with_processes(left))
        else:
            path.unlink()


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Serialize the changes that this machine makes to locks: two processes must not both replace a dead one's lock."""
    with (private_folder(LOCAL) / "guard").open("a") as guard:
        with suppress(OSError):  # a temporary folder without flock
            fcntl.flock(guard, fcntl.LOCK_EX)
        yield


def _read(path: Path) -> _Lock:
    return _Lock(**json.loads(path.read_text(encoding="utf-8")))


def _this_process() -> list[str]:
    return [str(os.getpid()), _start_time(str(os.getpid()))]


def _start_time(pid: str) -> str:
    """Clock ticks from boot to the start of a process; "" if it does not run, "unknown" if /proc hides it."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # the name may hold spaces
    except OSError:
        try:
            os.kill(int(pid), 0)
        except PermissionError:  # another user's, with hidepid
            return "unknown"
        except ProcessLookupError:
            pass
        return ""
    return "" if state in "ZX" else rest[18]  # field 22 of proc_pid_stat(5)


def _slurm_job() -> tuple[str, int]:
    return os.environ.get("SLURM_JOB_ID", ""), int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
