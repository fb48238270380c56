"""Whole runs with vLLM: they learn, stay on-policy and resume; no process outlives them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.helpers import save_random

from tip_exp.records.folder import RunFolder, numbered_checkpoints
from tip_exp.utils.io import read_rows
from tip_exp.utils.paths import PACKAGE

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.slow,
]
# Imported by every process at its start: kills the run as it has published its first checkpoint.
KILL_AT_CHECKPOINT = """
import os, pathlib, signal

rename = pathlib.Path.rename

def rename_and_kill(self, target):
    renamed = rename(self, target)
    if renamed.name.startswith("step_"):
        os.kill(os.getpid(), signal.SIGKILL)
    return renamed

pathlib.Path.rename = rename_and_kill
"""
SMOKE = ["experiment=smoke", "logger=files", "rollout=vllm"]


def reset_sigint() -> None:
    """Children of a background job ignore SIGINT; undo that, so that the tests can interrupt them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(folder: Path, *overrides: str, path: str = str(PACKAGE.parent)) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tip_exp", f"hydra.run.dir={folder}", *SMOKE, *overrides],
        env=os.environ | {"PYTHONPATH": path},
        cwd=folder.parent,  # the teacher's evaluation is in its outputs/
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a separate process group: SIGINT reaches all of it, as Ctrl-C in a terminal does
        preexec_fn=reset_sigint,
    )


def finish(folder: Path, *overrides: str) -> str:
    """Run to the end; returns what it printed."""
    process = start(folder, *overrides)
    try:
        output, _ = process.communicate(timeout=600)
    finally:
        kill_all(process.pid)
    assert process.returncode == 0, output
    return output


def wait_for(condition: Callable[[], bool], seconds: float = 400.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no success within {seconds} s"
        time.sleep(0.1)


def members(group: int) -> list[int]:
    """Living processes of a session."""
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, fields = stat.read_text().split(" ", 1)
        except OSError:  # the process ended meanwhile
            continue
        state, _, _, session = fields.rsplit(")", 1)[1].split()[:4]
        if int(session) == group and state != "Z":
            pids.append(int(pid))
    return pids


def kill_all(group: int) -> None:
    for pid in members(group):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def sampled_tokens(folder: Path) -> list[list[str]]:
    return [row["tokens"] for row in read_rows(RunFolder(folder).samples)]


def test_the_default_run_learns_as_with_transformers_and_stays_on_policy(tmp_path: Path) -> None:
    """Five seeds of `rollout=hf` end at 64.4 ± 2.0 % mean@4 (standard error; results/README.md, Table 6)."""
    folder = RunFolder(tmp_path / "run")
    line = [sys.executable, "-m", "tip_exp", f"hydra.run.dir={folder.root}", "rollout=vllm", "logger=files"]
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    assert "rollouts by vllm" in done.stdout and "rollout.backend=vllm" in done.stdout
    rows = read_rows(folder.metrics)
    assert 0.30 < rows[0]["eval/word_sums/mean@4"] < 0.43 and rows[0]["teacher/word_sums/greedy"] > 0.98
    assert 0.644 - 4 * 0.02 < rows[-1]["eval/word_sums/mean@4"] < 0.644 + 4 * 0.02
    assert len(rows) == 41 and all(0 < row["rollout/logprob_mismatch_max"] < 1e-3 for row in rows[1:])
    result = json.loads(folder.result.read_text())
    assert result["rollout"]["name"] == "vllm" and result["rollout"]["dtype"] == "float32"
    assert result["rollout"]["version"].split(".")[1].isdigit()


def test_every_rank_of_a_run_has_its_engine(tmp_path: Path) -> None:
    """By `tip-exp` itself: ranks but the first show no progress, and the teacher is evaluated by two ranks as well."""
    short = ["learner.num_steps=2", "learner.warmup_steps=0", "eval.every=0", "eval.greedy=false", "eval.samples=1"]
    finish(tmp_path / "one", *short)
    finish(tmp_path / "two", *short, "ranks=2")
    rows = [read_rows(RunFolder(tmp_path / name).metrics) for name in ("one", "two")]
    for key in ("rollout/response_len", "train/loss"):
        assert rows[1][1][key] == pytest.approx(rows[0][1][key], rel=1e-4), key


def test_a_resumed_run_samples_what_an_uninterrupted_one_does(tmp_path: Path) -> None:
    keep = ["learner.checkpoint_every=3", "learner.num_steps=8", "eval.every=1", "eval.greedy=false", "eval.samples=1"]
    finish(tmp_path / "whole", *keep)
    (tmp_path / "sitecustomize.py").write_text(KILL_AT_CHECKPOINT)
    folder = RunFolder(tmp_path / "broken")
    process = start(folder.root, *keep, path=os.pathsep.join([str(tmp_path), str(PACKAGE.parent)]))
    output, _ = process.communicate(timeout=600)
    assert "killed by SIGKILL" in output, output
    assert list(numbered_checkpoints(folder.checkpoints)) == [3] and not folder.result.exists()
    finish(tmp_path / "broken", *keep)
    assert sampled_tokens(tmp_path / "broken") == sampled_tokens(tmp_path / "whole")
    losses = [
        [row.get("train/loss") for row in read_rows(RunFolder(tmp_path / n).metrics)] for n in ("whole", "broken")
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("how", ["interrupted", "killed"])
def test_no_process_is_left_behind(tmp_path: Path, how: str) -> None:
    overrides = ["learner.num_steps=5000", "eval.teacher=false", "learner.checkpoint_every=1"]
    process, folder = start(tmp_path / "run", *overrides), RunFolder(tmp_path / "run")
    try:
        wait_for(lambda: bool(numbered_checkpoints(folder.checkpoints)))  # what the interrupted run says depends on it
        assert len(members(process.pid)) >= 2  # launcher and run
        if how == "interrupted":
            os.killpg(process.pid, signal.SIGINT)
        else:
            os.kill(process.pid, signal.SIGKILL)  # the launcher; the run ends with it
        output, _ = process.communicate(timeout=200)
        wait_for(lambda: not members(process.pid), seconds=60)
    finally:
        kill_all(process.pid)
    if how == "interrupted":
        assert process.returncode == 130 and "the same command resumes" in output, output


@pytest.mark.parametrize("family", ["Qwen3Moe", "Olmo3"])
def test_other_families_are_sampled_as_the_learner_computes_them(tmp_path: Path, family: str) -> None:
    """Experts, which vLLM lays out anew, and a model for which it takes transformers' class, which the learner has too.

    In steps of training, and in an evaluation, which compares some responses first.
    """
    folder = save_random(family, tmp_path / "model")
    options = ["learner.num_steps=2", "learner.warmup_steps=0", "eval.teacher=false", "eval.greedy=false"]
    finish(tmp_path / "train", f"pair.student.path={folder}", *options)
    finish(tmp_path / "eval", f"pair.student.path={folder}", *options, "mode=eval")
    rows = read_rows(RunFolder(tmp_path / "train").metrics)
    assert len(rows) == 3 and all(0 < row["rollout/logprob_mismatch_max"] < 1e-4 for row in rows[1:])
