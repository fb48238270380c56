"""Readers of run folders beside writers: every read is whole. The campaign's kinds and its tables."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from pathlib import Path

import pytest
from tqdm import tqdm

from scripts.chaos.campaign import EQUAL, SKIPPED, summary
from scripts.chaos.disturb import CYCLE, KINDS
from scripts.chaos.forked import Launched, cpu_seconds, fork, let_go_of_guard
from scripts.chaos.readers import readers_beside_writers
from tip_exp.config.schema import RunConfig
from tip_exp.launch import lock


def test_readers_beside_writers_see_whole_runs(tmp_path: Path, tiny_config: RunConfig) -> None:
    assert readers_beside_writers(tmp_path / "runs", tiny_config, readers=6, reads=5) == []


def test_a_torn_read_is_noticed(tmp_path: Path, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the rename of whole files, readers see parts. These last long enough for one of 160 reads to meet one."""

    def in_place(path: Path, text: str) -> None:
        path.write_text(text[: len(text) // 2])
        time.sleep(0.02)
        path.write_text(text)

    monkeypatch.setattr("tip_exp.records.result.write_atomic", in_place)
    monkeypatch.setattr("scripts.chaos.readers.write_atomic", in_place)
    assert readers_beside_writers(tmp_path / "runs", tiny_config, readers=4, reads=40)


def test_the_first_cases_have_each_kind_once() -> None:
    assert CYCLE[: len(KINDS)] == KINDS and all(CYCLE.count(kind) == kind.share for kind in KINDS)


def test_signals_are_counted_by_what_was_sent() -> None:
    """3 kills at random moments, one of them as a file was damaged; 2 before a write; a skipped kind sends nothing."""
    done = {
        KINDS[0].name: ["SIGKILL to group", "SIGKILL to worker"],
        KINDS[1].name: ["SIGKILL before write 3", "SIGKILL before write 41"],
        KINDS[2].name: ["SIGTERM to group"],
        "file removed": ["SIGKILL to group", "removed: lock, unfinished", "remedy: remove the lock"],
        "full disk": [],
    }
    records = [
        {"case": case, "kind": kind, "outcome": EQUAL if sent else SKIPPED, "done": sent, "cpu_s": 2.0, "revision": "a"}
        for case, (kind, sent) in enumerate(done.items())
    ]
    records[0]["outcome"] = "other numbers"
    lines = summary(records, "command").splitlines()
    assert "3 SIGKILLs at random moments and 2 before a write, of all kinds of disturbance:" in lines
    assert lines[lines.index("| signal, once for each moment | sent |") + 2 :] == [
        "| SIGKILL before write | 2 |",
        "| SIGKILL to group | 2 |",
        "| SIGKILL to worker | 1 |",
        "| SIGTERM to group | 1 |",
    ]
    assert f"| {KINDS[0].name} | 1 | 0 | 0 | 1 |" in lines
    assert "| full disk (skipped: no mount) | 0 | 0 | 0 | 0 |" in lines


def test_a_moment_is_measured_in_processor_time(tmp_path: Path) -> None:
    """A process that waits does not come nearer to its end."""
    launched = Launched(lambda: time.sleep(60), tmp_path / "output.txt")
    assert launched.wait(0.3, cpu_s=0.5) is None and cpu_seconds(launched.pid) < 0.5
    os.kill(launched.pid, signal.SIGKILL)
    assert launched.wait(20, cpu_s=0.5) == -signal.SIGKILL

    def work() -> None:
        while True:
            sum(range(10_000))

    launched = Launched(work, tmp_path / "output.txt")
    assert launched.wait(60, cpu_s=0.1) is None and cpu_seconds(launched.pid) >= 0.1
    os.kill(launched.pid, signal.SIGKILL)
    assert launched.wait(20) == -signal.SIGKILL


def test_a_killed_process_keeps_no_lock_of_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forked processes would share tqdm's semaphore, and what a thread of their parent has locked at the fork."""
    held = Launched(lambda: tqdm.get_lock().acquire() and os.kill(os.getpid(), signal.SIGKILL), tmp_path / "output.txt")
    assert held.wait(20) == -signal.SIGKILL
    after = Launched(lambda: tqdm.get_lock().acquire() and None, tmp_path / "output.txt")
    assert after.wait(20) == 0
    monkeypatch.setattr(lock, "LOCAL", tmp_path)
    with (tmp_path / "guard").open("a") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        child = fork(lambda: let_go_of_guard() or (tmp_path / "closed").touch() or time.sleep(60) or 0)
    try:
        while not (tmp_path / "closed").exists():
            time.sleep(0.01)
        with (tmp_path / "guard").open("a") as guard:
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_notice_beside_a_progress_bar_is_a_line_of_its_own(tmp_path: Path) -> None:
    launched = Launched(lambda: os.write(1, b"\r 1/4\r\x1b[AW&B: no route\n") and None, tmp_path / "output.txt")
    assert launched.wait() == 0 and "W&B: no route" in launched.text().splitlines()
