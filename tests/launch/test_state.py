"""Finished is a whole result.json of this config and the rows in its folder; SIGTERM ends a run with a checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.synthetic_runs import append_rows

from tip_exp.config.schema import RunConfig
from tip_exp.launch.launch import State, check_folder, launch, state_of
from tip_exp.launch.lock import holder
from tip_exp.records.folder import RunFolder
from tip_exp.records.result import write_result
from tip_exp.utils.errors import ConfigError, RunFailedError

WriteConfig = Callable[[RunConfig, Path], None]


@pytest.fixture
def folder(tmp_path: Path, tiny_config: RunConfig, write_config: WriteConfig) -> RunFolder:
    """A finished run."""
    folder = RunFolder(tmp_path / "run")
    write_config(tiny_config, folder.root)
    append_rows(folder.metrics, [{"step": step} for step in range(3)])
    write_result(tiny_config, folder, {}, {}, "a CPU")
    return folder


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"digest": "012345678901"}'])
def test_a_result_that_is_not_whole_or_of_another_config_is_not_the_end(
    folder: RunFolder, tiny_config: RunConfig, content: str
) -> None:
    assert state_of(tiny_config, folder) is State.DONE
    folder.result.write_text(content)
    assert state_of(tiny_config, folder) is State.UNFINISHED


def test_a_result_of_other_rows_is_damaged(folder: RunFolder, tiny_config: RunConfig) -> None:
    folder.metrics.write_bytes(folder.metrics.read_bytes()[:-1])
    before = folder.result.read_bytes()
    assert state_of(tiny_config, folder) is State.DAMAGED
    with pytest.raises(RunFailedError, match=r"metrics.jsonl has 35 bytes instead of 36. Restore the file from a copy"):
        launch(tiny_config, folder)
    assert folder.result.read_bytes() == before and folder.metrics.stat().st_size == 35


@pytest.mark.parametrize("name", ["config.yaml", "notes.txt", "runs"])
def test_a_folder_of_something_else_is_refused_and_left_as_it_is(
    tmp_path: Path, tiny_config: RunConfig, name: str
) -> None:
    (tmp_path / name).mkdir() if name == "runs" else (tmp_path / name).write_text("mine: 1")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=rf"holds files that do not belong to a run, such as {name}; choose"):
        launch(tiny_config, RunFolder(tmp_path))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "names", [[], [".hydra", ".config.yaml.1", "lock", "worker.log", "worker.1.log", "torchrun.log"]]
)
def test_a_new_folder_is_accepted(tmp_path: Path, names: list[str]) -> None:
    check_folder(RunFolder(tmp_path / "new"))
    for name in names:
        (tmp_path / name).write_text("")
    check_folder(RunFolder(tmp_path))


@pytest.mark.parametrize("text", ["", "a: [", "\0" * 100, "learner: {}"])
def test_no_message_advises_to_remove_checkpoints(folder: RunFolder, tiny_config: RunConfig, text: str) -> None:
    folder.result.unlink()
    (folder.checkpoints / "step_00005").mkdir(parents=True)
    folder.config.write_text(text)
    with pytest.raises(ConfigError, match=r"its config.yaml cannot be read") as error:
        launch(tiny_config, folder)
    assert "remove" not in str(error.value) and len(str(error.value)) < 600


# Imported by every process at its start: replaces a run by one that ends at a step boundary when it is asked to.
STUB = """
import os, signal, sys, time, types
from unittest.mock import MagicMock

def run(config, folder):
    from tip_exp.utils.termination import Terminated, defer, is_requested
    rank = int(os.environ.get("RANK", "0"))
    if config.name == "early":
        (folder.root / f"started{rank}").touch()
        time.sleep(100)
    defer()
    (folder.root / f"started{rank}").touch()
    while not is_requested():
        time.sleep(0.01)
    time.sleep(1)
    (folder.root / f"saved{rank}").touch()
    (folder.checkpoints / "step_00001").mkdir(parents=True, exist_ok=True)
    if config.name != "finishes":
        raise Terminated

sys.modules["tip_exp.run"] = types.SimpleNamespace(run=run, run_eval=None)
sys.modules["transformers"] = MagicMock()
"""


def start(tmp_path: Path, name: str, *overrides: str, code: str = "") -> subprocess.Popen[str]:
    """`tip-exp name=NAME …` with STUB, in a process group of its own as a scheduler starts it."""
    (tmp_path / "sitecustomize.py").write_text(STUB)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    smoke = ["experiment=smoke", "device=cpu", "logger=files", "eval.teacher=false"]
    line = [f"hydra.run.dir={tmp_path}/${{name}}", f"hydra.sweep.dir={tmp_path}", *smoke, f"name={name}", *overrides]
    command = ["-c", code] if code else ["-m", "tip_exp"]
    return subprocess.Popen(
        [sys.executable, *command, *line],
        cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 200
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("whom", "number"),
    [("group", signal.SIGTERM), ("launcher", signal.SIGTERM), ("worker", signal.SIGTERM), ("group", signal.SIGUSR2)],
)
def test_sigterm_waits_for_the_checkpoint_and_is_one_line(tmp_path: Path, whom: str, number: signal.Signals) -> None:
    process, folder = start(tmp_path, "waits"), RunFolder(tmp_path / "waits")
    wait_for(folder.root / "started0")
    if whom == "worker":
        launcher, worker = (int(pid) for pid, _ in json.loads(folder.lock.read_text())["processes"])
        assert launcher == process.pid
        os.kill(worker, number)
    else:
        send = os.killpg if whom == "group" else os.kill
        for _ in range(2):  # a second signal does not end what the first has started
            send(process.pid, number)
            time.sleep(0.2)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 143 and out.splitlines()[-1].endswith("; writes waits")
    assert err == f"\nterminated; the same command resumes from the last checkpoint in {folder.checkpoints}\n"
    assert (folder.root / "saved0").exists() and not holder(folder.lock)


def test_sigterm_before_the_first_step_ends_at_once_and_after_the_last_one_nothing(tmp_path: Path) -> None:
    for name, code in (("early", 143), ("finishes", 143)):
        process = start(tmp_path, name)
        wait_for(tmp_path / name / "started0")
        process.terminate()
        _, err = process.communicate(timeout=100)
        assert process.returncode == code and "Traceback" not in err
        assert (tmp_path / name / "saved0").exists() == (name == "finishes")


@pytest.mark.parametrize("whom", ["group", "launcher"])
def test_sigterm_reaches_all_ranks(tmp_path: Path, whom: str) -> None:
    process, folder = start(tmp_path, "waits", "ranks=2"), RunFolder(tmp_path / "waits")
    for rank in (0, 1):
        wait_for(folder.root / f"started{rank}")
    (os.killpg if whom == "group" else os.kill)(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 143
    assert err == f"\nterminated; the same command resumes from the last checkpoint in {folder.checkpoints}\n"
    assert all((folder.root / f"saved{rank}").exists() for rank in (0, 1)) and not holder(folder.lock)


def test_sigterm_ends_a_sweep_after_the_checkpoints_of_its_runs(tmp_path: Path) -> None:
    process = start(tmp_path, "a,b,c", "hydra.sweep.subdir=${name}", "hydra.sweeper.jobs=2", "-m")
    for name in "ab":
        wait_for(tmp_path / name / "started0")
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 143 and err == "\nterminated; the same command resumes the sweep\n"
    for name in "ab":
        assert (tmp_path / name / "saved0").exists()
        assert "terminated; the same command resumes" in RunFolder(tmp_path / name).log.read_text()
    assert not (tmp_path / "c").exists()


AS_SUBMITIT = """
import signal, sys
from tip_exp.launch import cli
from tip_exp.utils import termination

def requeue(number, frame):
    from pathlib import Path
    print("saved" if list(Path.cwd().glob("*/saved0")) else "not saved", flush=True)
    sys.exit(255)

termination.handle = lambda: signal.signal(signal.SIGUSR2, requeue)
sys.argv = ["tip-exp", *sys.argv[1:]]
cli.main()
"""


def test_a_requeue_by_submitit_comes_after_the_checkpoint(tmp_path: Path) -> None:
    """SLURM kills a job within seconds of the request to queue it again, which submitit makes in its handler."""
    process = start(tmp_path, "waits", code=AS_SUBMITIT)
    wait_for(tmp_path / "waits" / "started0")
    process.send_signal(signal.SIGUSR2)
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 255 and out.splitlines()[-1] == "saved"
    assert not holder(tmp_path / "waits" / "lock")
