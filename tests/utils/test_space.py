"""A full disk: writes wait for space, the newest checkpoint stays, and an end that is asked for comes at once."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
from torch import nn, optim
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from tip_exp.learner.checkpoint import CheckpointError, Checkpoints
from tip_exp.learner.distributed import Ranks
from tip_exp.records.folder import RunFolder
from tip_exp.records.writer import RunLogger
from tip_exp.utils import space, termination
from tip_exp.utils.io import read_rows
from tip_exp.utils.space import when_there_is_space
from tip_exp.utils.termination import Terminated


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(space, "RETRY_S", 0.05)
    yield
    termination._Request.received = False


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("this user may not mount a file system")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def fill(disk: Path) -> Path:
    ballast = disk / "ballast"
    with pytest.raises(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1000))
    return ballast


def failing(times: int, error: Exception, result: Any = "written") -> Callable[..., Any]:
    calls: list[None] = []

    def write(*_: Any) -> Any:
        calls.append(None)
        if len(calls) <= times:
            raise error
        return result() if callable(result) else result

    return write


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), OSError(errno.EDQUOT, "quota"), ValueError("No space left on device (os)")]
)
def test_a_write_is_tried_again_and_said_once(error: Exception, capfd: Any) -> None:
    assert when_there_is_space(failing(3, error), Path("rows")) == "written"
    said = capfd.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in said] == ["no space left for rows", "rows is written; the run goes on"]


def test_another_error_or_a_disk_that_stays_full_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="File too large"):
        when_there_is_space(failing(9, OSError(errno.EFBIG, "File too large")), Path("rows"))
    monkeypatch.setattr(space, "LONGEST_S", 0.2)
    with pytest.raises(OSError, match=r"no space left for .* min; free some, and the same command resumes the run"):
        when_there_is_space(failing(10**6, OSError(errno.ENOSPC, "full")), Path("rows"))


def test_an_end_that_is_asked_for_comes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space, "RETRY_S", 600)
    Timer(0.1, termination.request).start()
    with pytest.raises(Terminated, match="no space left for rows"):
        when_there_is_space(failing(10**6, OSError(errno.ENOSPC, "full")), Path("rows"))


def test_rows_are_whole_after_a_full_disk(small_disk: Path) -> None:
    folder = RunFolder(small_disk)
    with RunLogger(folder, None, rows=None) as logger:
        logger.log(0, {"x": 0.0})
        ballast = fill(small_disk)
        Timer(0.3, ballast.unlink).start()
        logger.log(1, {f"metric {i}": float(i) for i in range(2000)})
        logger.log(2, {"x": 2.0})
    assert [row["step"] for row in read_rows(folder.metrics)] == [0, 1, 2]


def saved(checkpoints: Checkpoints, step: int) -> None:
    module = nn.Linear(64, 64)  # 16 KiB
    checkpoints.save(step, module, optim.AdamW(module.parameters()), "hf")


def newest(folder: Path) -> int:
    checkpoint = Checkpoints(folder, Ranks()).newest()
    return 0 if checkpoint is None else checkpoint.step


def test_a_checkpoint_is_written_once_there_is_space(small_disk: Path) -> None:
    folder = small_disk / "checkpoint"
    checkpoints = Checkpoints(folder, Ranks())
    saved(checkpoints, 1)
    checkpoints.wait()
    ballast = fill(small_disk)
    saved(checkpoints, 2)
    Timer(0.5, ballast.unlink).start()
    checkpoints.wait()
    assert newest(folder) == 2 and sorted(p.name for p in folder.iterdir()) == ["step_00001", "step_00002"]


def test_a_full_disk_keeps_the_checkpoint_before_when_the_run_is_ended(small_disk: Path) -> None:
    folder = small_disk / "checkpoint"
    checkpoints = Checkpoints(folder, Ranks())
    saved(checkpoints, 1)
    checkpoints.wait()
    fill(small_disk)
    saved(checkpoints, 2)
    termination.request()
    with pytest.raises(Terminated):
        checkpoints.wait()
    assert newest(folder) == 1 and [p.name for p in folder.iterdir()] == ["step_00001"]


@pytest.mark.parametrize("stays_full", [True, False])
def test_where_nothing_can_be_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stays_full: bool) -> None:
    write_data, faults = FileSystemWriter.write_data, iter([True] * (10**6 if stays_full else 3))

    def full(*arguments: Any) -> Any:
        if next(faults, False):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_data(*arguments)

    checkpoints = Checkpoints(tmp_path, Ranks())
    saved(checkpoints, 1)
    checkpoints.wait()
    monkeypatch.setattr(FileSystemWriter, "write_data", full)
    monkeypatch.setattr(space, "LONGEST_S", 0.3)
    saved(checkpoints, 2)
    if stays_full:
        with pytest.raises(CheckpointError, match=r"checkpoint of step 2 could not be written .*free some"):
            checkpoints.wait()
    checkpoints.wait()
    assert newest(tmp_path) == (1 if stays_full else 2)


def test_a_finished_run_keeps_its_last_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, Ranks())
    for step in (1, 2):
        saved(checkpoints, step)
    checkpoints.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["step_00002"]
