"""Locks: two launches at once, processes that have ended, other hosts, and file systems without flock."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tip_exp.launch import lock
from tip_exp.launch.lock import check_held, held_elsewhere, holder, joined, lock_or_holder
from tip_exp.utils.errors import RunFailedError


@pytest.fixture(autouse=True, params=["flock", "ENOSYS"])
def local(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything also holds where flock is not implemented, as on Lustre."""
    monkeypatch.setattr(lock, "LOCAL", tmp_path / "local")

    def not_implemented(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    if request.param == "ENOSYS":
        monkeypatch.setattr(fcntl, "flock", not_implemented)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "100"]) as process:
        yield process
        process.kill()


def start_time(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def write(path: Path, processes: list[list[str]], **changes: str) -> None:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    values: dict[str, Any] = {"host": platform.node(), "boot": boot, "since": "2026-01-01T00:00:00"}
    path.write_text(json.dumps(values | changes | {"processes": processes}))


def test_a_lock_is_refused_with_its_holder_and_gone_after_use(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with lock_or_holder(path) as first, lock_or_holder(path) as second:
        assert first == "" and path.exists()
        assert second.startswith(f"process {os.getpid()} on {platform.node()} since 20")
        assert second.endswith("; wait for it, or stop it")
        assert holder(path) == second
    assert not path.exists() and holder(path) == ""


def test_the_lock_of_a_process_that_has_ended_is_taken(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    path, pid = tmp_path / "lock", str(sleeper.pid)
    started = start_time(sleeper.pid)
    write(path, [[pid, started]])
    assert holder(path).startswith(f"process {pid} on ")
    with lock_or_holder(path) as refused:
        assert refused == holder(path)
    assert path.exists()  # it belongs to the other process
    stale = {
        "another process has the pid": ([[pid, str(int(started) - 1)]], {}),
        "the machine was restarted": ([[pid, started]], {"boot": "x"}),
    }
    for processes, changes in stale.values():
        write(path, processes, **changes)
        assert holder(path) == ""
        with lock_or_holder(path) as refused:
            assert refused == "" and holder(path).startswith(f"process {os.getpid()} on ")
    write(path, [[pid, started]])
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    assert Path(f"/proc/{pid}").exists()  # not yet waited for: its parent has not read its exit code
    assert holder(path) == ""


def test_a_job_that_slurm_requeued_takes_its_own_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lock"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with lock_or_holder(path):
        written = json.loads(path.read_text()) | {"host": "gpu07", "boot": "x"}
    for job, restarts, taken in (("7", "0", False), ("8", "1", False), ("7", "1", True)):
        path.write_text(json.dumps(written))
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        assert held_elsewhere(path) != taken
        with lock_or_holder(path) as refused:
            assert (refused == "") == taken, refused


def test_another_host_is_never_judged(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    write(path, [["1", "5"]], host="gpu07", boot="x")
    with lock_or_holder(path) as refused:
        assert refused == (
            f"process 1 on gpu07 since 2026-01-01T00:00:00; wait for it, or, if it no longer runs there, remove {path}"
        )
    assert path.exists()
    path.write_text("")  # created, not yet written
    assert holder(path) == f"another process; wait for it, or, if none runs, remove {path}"


def test_a_child_that_joined_keeps_the_lock(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    path, this = tmp_path / "lock", [str(os.getpid()), start_time(os.getpid())]
    child = [str(sleeper.pid), start_time(sleeper.pid)]
    with lock_or_holder(path):
        write(path, [this, child])  # as when the child has joined
        assert holder(path).startswith(f"process {os.getpid()} on ")
    assert holder(path).startswith(f"process {sleeper.pid} on ")  # the launcher has left
    with joined(path):
        assert json.loads(path.read_text())["processes"] == [child, this]
    assert json.loads(path.read_text())["processes"] == [child]
    with joined(path):
        sleeper.kill()
        sleeper.wait()
    assert not path.exists()  # the last process removes the file


def test_a_full_disk_leaves_a_lock_that_the_next_launch_takes(
    tmp_path: Path, sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not an empty file, which would say that another process holds it; and the end of a process raises no error."""
    path = tmp_path / "lock"

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(lock._Lock, "with_processes", full)
        with pytest.raises(OSError, match="No space left"), lock_or_holder(path):
            pass
    assert holder(path) == "" and not path.exists()
    write(path, [[str(sleeper.pid), start_time(sleeper.pid)]])
    with monkeypatch.context() as patch, joined(path):
        patch.setattr(lock, "write_atomic", full)
    sleeper.kill()
    sleeper.wait()
    assert str(os.getpid()) in path.read_text()
    write(path, [["999999", "1"]])
    assert holder(path) == ""


def test_a_process_notices_that_its_lock_is_gone(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    """The folder is moved, removed, or locked by another launch."""
    folder = tmp_path / "run"
    folder.mkdir()
    with lock_or_holder(folder / "lock"):
        check_held(folder / "lock")
        folder.rename(tmp_path / "moved")
        with pytest.raises(RunFailedError, match=r"run/lock no longer names this process .* moved or removed, or"):
            check_held(folder / "lock")
        folder.mkdir()
        for content in ("", "{}"):
            (folder / "lock").write_text(content)
            with pytest.raises(RunFailedError):
                check_held(folder / "lock")
        write(folder / "lock", [[str(sleeper.pid), start_time(sleeper.pid)]])
        with pytest.raises(RunFailedError):
            check_held(folder / "lock")
    assert (folder / "lock").exists()  # it belongs to the other process


RACE = """
import sys, time
from pathlib import Path
from tip_exp.launch import lock
lock.LOCAL = Path(sys.argv[1]) / "local"
path = Path(sys.argv[1]) / "lock"
path.with_name(f"ready{sys.argv[2]}").touch()
while not path.with_name("go").exists():
    time.sleep(0.001)
start = path.with_name("go").stat().st_mtime
for turn in range(40):
    time.sleep(max(0.0, start + 0.01 * turn - time.time()))
    with lock.lock_or_holder(path) as refused:
        if not refused:
            (path.with_name("inside")).open("x").close()  # fails if another process is inside
            time.sleep(0.002)
            path.with_name("inside").unlink()
            if turn % 2:
                path.write_text(path.read_text().replace(lock._boot_id(), "x"))  # leave a stale lock
"""


def test_many_processes_at_once(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Also when the lock they find is stale: one of them replaces it, and none removes the new lock."""
    if "ENOSYS" in request.node.name:
        pytest.skip("the processes have flock")
    line = [sys.executable, "-c", RACE, str(tmp_path)]
    processes = [subprocess.Popen([*line, str(i)], stderr=subprocess.PIPE, text=True) for i in range(4)]
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("ready*"))) < len(processes) and time.monotonic() < deadline:
        time.sleep(0.01)
    (tmp_path / "go").touch()
    for process in processes:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
