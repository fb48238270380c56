"""The teacher's evaluation: a run of its own, once for all runs that evaluate it alike; their numbers stay the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tip_exp import build
from tip_exp.config.parse import digest, load
from tip_exp.config.schema import RunConfig
from tip_exp.launch import launch
from tip_exp.launch.launch import HeldError
from tip_exp.launch.reuse import remove_stale, teacher_config
from tip_exp.records.folder import RunFolder
from tip_exp.records.reader import read_runs
from tip_exp.rollout.backends import Backend
from tip_exp.run import run_eval
from tip_exp.utils.errors import ConfigError, RunFailedError
from tip_exp.utils.io import read_rows
from tip_exp.utils.paths import resolve_model

Compose = Callable[..., RunConfig]
SMALL = ["experiment=smoke", "logger=files", "eval.benchmarks.word_sums.num_problems=6", "num_threads=1"]


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """A copy of the embedded student."""
    return Path(shutil.copytree(resolve_model("package:tiny/student"), tmp_path / "student"))


@pytest.mark.parametrize(
    "override",
    [
        "selector=q3", "selector.retention=0.2", "seed=3", "sweep=mine", "name=mine", "learner.lr=1e-3",
        "data.label=mine", "rollout.temperature=0.7", "eval.every=3", "eval.sequence_kl=false",
        "pair.student.dtype=bfloat16", "pair.student.path={student}", "mode=eval",
        "num_threads=2", "rollout.vllm.sleep_level=0", "rollout.vllm.gpu_memory_utilization=0.5",
    ],
)  # fmt: skip
def test_runs_share_an_evaluation_that_does_not_depend_on_what_tells_them_apart(
    compose_run: Compose, student: Path, override: str
) -> None:
    config = compose_run(override.format(student=student))
    assert digest(teacher_config(config)) == digest(teacher_config(compose_run()))


@pytest.mark.parametrize(
    "override",
    [
        "pair.teacher.path={student}", "pair.teacher.dtype=bfloat16", "pair.chat.system=Hi", "pair.attention=eager",
        "eval.samples=3", "eval.seed=1", "eval.max_tokens=71", "eval.benchmarks.word_sums.num_problems=9",
        "rollout.batch_size=7", "device=cpu",
    ],
)  # fmt: skip
def test_another_evaluation_has_another_digest(compose_run: Compose, student: Path, override: str) -> None:
    unpacked = "learner.packing=false"  # eager attention needs it; the teacher's evaluation does not depend on it
    config = compose_run(override.format(student=student), unpacked)
    assert digest(teacher_config(config)) != digest(teacher_config(compose_run()))


def test_another_chat_template_of_the_student_is_another_evaluation(compose_run: Compose, student: Path) -> None:
    (student / "chat_template.jinja").write_text("{{ messages[0].content }}")
    config = compose_run(f"pair.student.path={student}")
    assert digest(teacher_config(config)) != digest(teacher_config(compose_run()))


def test_a_result_older_than_its_model_is_dropped(compose_run: Compose, student: Path, tmp_path: Path) -> None:
    config, folder = teacher_config(compose_run(f"pair.teacher.path={student}")), RunFolder(tmp_path / "run")
    folder.root.mkdir()
    remove_stale(config, folder)
    folder.result.write_text("{}")
    remove_stale(config, folder)
    assert folder.result.exists()
    newer = folder.result.stat().st_mtime + 10
    os.utime(student / "model.safetensors", (newer, newer))
    remove_stale(config, folder)
    assert not folder.result.exists()


def graded(folder: RunFolder, model: str) -> list[dict[str, Any]]:
    return [row for row in read_rows(folder.eval_rows) if row["model"] == model]


def test_two_runs_at_a_time_evaluate_their_teacher_once_with_the_numbers_of_one_process(
    tmp_path: Path, compose_run: Compose
) -> None:
    """The second run waits for the first one's evaluation; the reference evaluates the teacher in this process."""
    steps = ["learner.num_steps=1", "learner.warmup_steps=0", "learner.prompts_per_step=4"]
    runs = 'hydra.sweeper.runs=["selector=full seed=1","selector=q3 selector.retention=0.2 seed=2"]'
    line = [sys.executable, "-m", "tip_exp", "-m", *SMALL, *steps, runs, "hydra.sweeper.jobs=2", "sweep=two"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (teacher,) = (RunFolder(path) for path in (tmp_path / "outputs" / "teachers").iterdir())
    assert teacher.log.read_text().count("step     0   teacher/word_sums/mean@2") == 1
    assert json.loads(teacher.result.read_text())["digest"] == teacher.root.name == digest(load(teacher.config))

    reference = RunFolder(tmp_path / "reference")
    reference.root.mkdir()
    run_eval(compose_run(*SMALL, "mode=eval"), reference)
    expected = json.loads(reference.result.read_text())["teacher"]
    records = read_runs([tmp_path / "outputs"])  # the evaluation of the teacher is no arm of a table
    assert len(records) == 2 and {record.config["mode"] for record in records} == {"train"}
    for record in records:
        folder = RunFolder(Path(record.folder))
        assert record.result is not None and record.result["teacher"] == expected and expected["word_sums/greedy"] > 0.9
        assert graded(folder, "teacher") == graded(reference, "teacher") and len(graded(folder, "student")) == 2 * 6 * 3
        assert record.result["start"] == json.loads(reference.result.read_text())["start"]


def test_a_wait_for_a_teacher_ends_if_nothing_is_written(
    tmp_path: Path, compose_run: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that was killed on another host leaves a lock, which tells this host nothing."""

    def held(*_: Any) -> None:
        raise HeldError("outputs/teachers/x is held by process 7 on n2; …, remove outputs/teachers/x/lock")

    monkeypatch.setattr(launch, "TEACHERS", tmp_path)
    monkeypatch.setattr(launch, "launch", held)
    monkeypatch.setattr(launch, "SILENT_S", 0)
    config = compose_run(*SMALL)
    with pytest.raises(RunFailedError, match=r"nothing was written .* remove outputs/teachers/x/lock"):
        launch._evaluate_teacher(config, RunFolder(tmp_path / "run"), None, is_first=True)


def test_one_node_evaluates_the_teacher_and_the_others_wait(
    tmp_path: Path, compose_run: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose_run(*SMALL, "nodes=2", "ranks=2")
    assert teacher_config(config).nodes == 1
    results = iter([None, None, {"digest": "x"}])
    monkeypatch.setattr(launch, "TEACHERS", tmp_path)
    monkeypatch.setattr(launch, "read_result", lambda _: next(results))
    monkeypatch.setattr(launch, "launch", None)  # not called
    launch._evaluate_teacher(config, RunFolder(tmp_path / "run"), None, is_first=False)
    assert next(results, "all read") == "all read" and not (tmp_path / "run").exists()


def test_vllm_needs_the_launcher_for_the_teacher(
    tmp_path: Path, compose_run: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "choose", lambda *_: Backend("vllm", "", "", "float32"))
    with pytest.raises(ConfigError, match=r"eval\.teacher=true with vLLM needs a second engine, .* with tip-exp"):
        run_eval(compose_run(*SMALL, "mode=eval"), RunFolder(tmp_path))
