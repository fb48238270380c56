"""After a power loss at any moment a run resumes from its newest checkpoint, or is finished, with the right rows.

A small run is recorded: at every fsync, rename and removal the test notes the files as a process sees them, and what is
surely on the disk: contents at their last fsync, names at the last fsync of their folder. From each note it builds
the folders that a crash can leave, and asks what the next launch would do with them.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tip_exp.build import TrainingParts
from tip_exp.config.schema import RunConfig
from tip_exp.launch.launch import State, state_of
from tip_exp.learner.checkpoint import Checkpoints
from tip_exp.learner.distributed import ALONE
from tip_exp.records.folder import RunFolder, numbered_checkpoints
from tip_exp.records.writer import RunLogger, missing_rows
from tip_exp.run import run, run_eval
from tip_exp.utils.io import write_atomic

Files = dict[str, bytes]
SMALL = ["logger=files", "learner.num_steps=4", "learner.warmup_steps=0", "learner.prompts_per_step=2"]
SMALL += ["learner.checkpoint_every=1", "eval.every=2", "eval.teacher=false", "eval.samples=1", "eval.greedy=false"]
SMALL += ["eval.benchmarks.word_sums.num_problems=2", "logger.rollouts_per_eval=1", "data.max_response_tokens=8"]


class Recorder:
    """What the disk of `root` holds at every operation that orders writes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.notes: list[tuple[str, dict[str, Files], int]] = []  # operation, crash -> files, newest published step
        self._contents: dict[int, bytes] = {}  # inode -> content at its last fsync
        self._names: dict[str, dict[str, int]] = {}  # folder -> name -> inode, at the folder's last fsync
        self._open: list[Any] = []  # keeps inodes from being used again
        self._lock = threading.RLock()

    @contextmanager
    def recording(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        with monkeypatch.context() as patched:
            for module, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (os, "unlink"), (shutil, "rmtree")):
                patched.setattr(module, name, self._noting(name, getattr(module, name)))
            yield
        for file in self._open:
            file.close()

    def _noting(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def noting(target: Any, *arguments: Any, **options: Any) -> Any:
            with self._lock:
                path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else os.fspath(target)
                is_ours = not options.get("dir_fd") and Path(path).is_relative_to(self.root)
                if is_ours:
                    self._note(f"before {name} {path}")
                result = operation(target, *arguments, **options)
                if is_ours and name == "fsync":
                    self._synced(Path(path))
                return result

        return noting

    def _synced(self, path: Path) -> None:
        if path.is_dir():
            self._names[str(path)] = {entry.name: self._inode(entry) for entry in path.iterdir()}
        else:
            self._contents[self._inode(path)] = path.read_bytes()

    def _inode(self, path: Path) -> int:
        if path.is_file():
            self._open.append(path.open("rb"))
        return path.stat().st_ino

    def _note(self, operation: str) -> None:
        seen = {str(path.relative_to(self.root)): path for path in self.root.rglob("*") if path.is_file()}
        contents = {name: path.read_bytes() for name, path in seen.items()}
        synced = {name: self._contents.get(path.stat().st_ino, b"") for name, path in seen.items()}
        torn = {name: content[: (len(content) + len(synced[name])) // 2] for name, content in contents.items()}
        crashes = {"killed": contents, "unsynced data lost": synced, "unsynced data torn": torn}
        crashes["unsynced names lost"] = self._durable(self.root, self.root)
        steps = [
            int(Path(name).name[5:]) for name in self._names.get(str(self.root / "checkpoint"), {}) if "step" in name
        ]
        self.notes.append((operation, crashes, max(steps, default=0)))

    def _durable(self, folder: Path, synced_as: Path) -> Files:
        """Files whose names were synced, in folders whose names were, with the synced contents.

        `synced_as`: a checkpoint's folder is synced under its temporary name, then renamed.
        """
        files: Files = {}
        for name, inode in self._names.get(str(synced_as), {}).items():
            path = folder / name
            if inode in self._contents:
                files[str(path.relative_to(self.root))] = self._contents[inode]
            files |= self._durable(path, path.with_name(name.replace("step_", ".writing_")))
        return files


@pytest.fixture(scope="module")
def config(compose_run: Callable[..., RunConfig]) -> RunConfig:
    return compose_run(*SMALL)


def test_every_prefix_of_the_writes_resumes_or_is_finished(
    tmp_path: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch, write_config: Callable[[RunConfig, Path], None]
) -> None:
    folder = RunFolder(tmp_path / "run")
    write_config(config, folder.root)
    text, recorder = folder.config.read_text(), Recorder(folder.root)
    save = TrainingParts.save

    def save_and_wait(parts: TrainingParts, step: int) -> None:
        """Else the order of the two threads' writes would differ from one test to the next."""
        save(parts, step)
        parts.checkpoints.wait()

    monkeypatch.setattr(TrainingParts, "save", save_and_wait)
    with recorder.recording(monkeypatch):
        run(config, folder)
    rows = {path.name: path.read_bytes() for path in folder.rows}
    result = json.loads(folder.result.read_text())
    assert len(recorder.notes) > 60
    checked: set[int] = set()
    seen: set[Any] = set()
    for number, (operation, crashes, published) in enumerate(recorder.notes):
        for crash, files in crashes.items():
            key = hash(tuple(sorted((name, hash(content)) for name, content in files.items())))
            if key in checked:
                continue
            checked.add(key)
            crashed = RunFolder(tmp_path / "crashed")
            shutil.rmtree(crashed.root, ignore_errors=True)
            for name, content in (files | {"config.yaml": text.encode()}).items():
                (crashed.root / name).parent.mkdir(parents=True, exist_ok=True)
                (crashed.root / name).write_bytes(content)
            seen.add(check(crashed, config, rows, result, published, f"{crash}, {number}: {operation}"))
    assert seen >= {0, 1, 2, 3, 4}
    assert state_of(config, folder) is State.DONE


def test_an_evaluation_alone_has_its_rows_on_the_disk_before_its_result(
    tmp_path: Path, compose_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, recorder = RunFolder(tmp_path / "run"), Recorder(tmp_path / "run")
    folder.root.mkdir()
    with recorder.recording(monkeypatch):
        run_eval(compose_run(*SMALL, "mode=eval"), folder)
    recorder._note("end")
    durable = recorder.notes[-1][1]["unsynced names lost"]
    assert {path.name: durable.get(path.name) for path in folder.rows} == {
        path.name: path.read_bytes() for path in folder.rows
    }


def test_a_file_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, recorder = tmp_path / "run" / "file", Recorder(tmp_path / "run")
    path.parent.mkdir()
    with recorder.recording(monkeypatch):
        write_atomic(path, "old")
        write_atomic(path, "new")
        recorder._note("end")
    held = [[files.get("file") for files in crashes.values()] for _, crashes, _ in recorder.notes]
    assert {content for contents in held for content in contents} <= {None, b"old", b"new"}
    assert held[-1] == [b"new"] * 4


def check(
    folder: RunFolder, config: RunConfig, rows: Files, result: dict[str, Any], published: int, crash: str
) -> int | str:
    """What the next launch would do: "done", or the step from which it resumes with exactly the rows up to there."""
    state = state_of(config, folder)
    if state is State.DONE:
        assert json.loads(folder.result.read_text()) == result, crash
        assert {path.name: path.read_bytes() for path in folder.rows} == rows, crash
        return "done"
    assert state in (State.TO_DO, State.UNFINISHED), crash
    newest = Checkpoints(folder.checkpoints, ALONE).newest(partial(missing_rows, folder))
    step = newest.step if newest else 0
    assert step >= published, crash
    with RunLogger(folder, None, rows=newest.rows if newest else None):
        for path in folder.rows:
            expected = [line for line in rows[path.name].splitlines(True) if json.loads(line)["step"] <= step]
            assert path.read_bytes() == (b"".join(expected) if newest else b""), crash
    assert set(numbered_checkpoints(folder.checkpoints)) <= set(range(5)), crash
    return step
