"""The teacher's evaluation: a run of its own, once for all runs that evaluate it alike; their numbers stay the same."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tip_exp import inputs
from tip_exp.config.parse import digest, load
from tip_exp.config.schema import RunConfig
from tip_exp.estimate.memory import RankMemory
from tip_exp.launch import teacher
from tip_exp.launch.lock import HeldError
from tip_exp.launch.reuse import changed_models
from tip_exp.launch.teacher import teacher_config
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


def test_a_result_older_than_its_model_is_stale(compose_run: Compose, student: Path, tmp_path: Path) -> None:
    config, folder = teacher_config(compose_run(f"pair.teacher.path={student}")), RunFolder(tmp_path / "run")
    folder.root.mkdir()
    assert not changed_models(config, folder)
    folder.result.write_text("{}")
    assert not changed_models(config, folder)
    newer = folder.result.stat().st_mtime + 10
    os.utime(student / "model.safetensors", (newer, newer))
    assert changed_models(config, folder) == [f"pair.{role}.path={student}" for role in ("teacher", "student")]


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


def test_an_evaluation_of_the_student_alone_reads_no_weights_of_the_teacher(
    tmp_path: Path, compose_run: Compose
) -> None:
    teacher = shutil.copytree(resolve_model("package:tiny/teacher"), tmp_path / "teacher")
    (teacher / "model.safetensors").unlink()
    evaluation = [*SMALL, "mode=eval", "eval.teacher=false"]
    alone = compose_run(*evaluation, "eval.sequence_kl=false", f"pair.teacher.path={teacher}")
    starts: list[dict[str, float]] = []
    for name, config in {"alone": alone, "both": compose_run(*evaluation)}.items():
        folder = RunFolder(tmp_path / name)
        folder.root.mkdir()
        run_eval(config, folder)
        starts.append(json.loads(folder.result.read_text())["start"])
    assert starts[0] == {name: value for name, value in starts[1].items() if name in starts[0]} != {}
    assert not any("teacher" in part for phase in RankMemory(alone, 80).phases().values() for part in phase.device)


@pytest.fixture
def waits(compose_run: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Wait for a teacher; `polled` gets its folder, or the run's, at each poll: a second of a clock of its own."""
    config, clock = compose_run(*SMALL, "nodes=2", "ranks=2", "learner.replicas=4"), [1000.0]

    def wait(polled: Callable[[RunFolder], object], *, is_first: bool = True) -> None:
        source, run = RunFolder(tmp_path / digest(teacher_config(config))), RunFolder(tmp_path / "run")

        def sleep(_: float) -> None:
            clock[0] += 1
            polled(source if is_first else run)
            for path in source.root.glob("*"):
                if path.stat().st_mtime > 1e6:  # written just now, by the clock of this machine
                    os.utime(path, (clock[0], clock[0]))

        monkeypatch.setattr(teacher.time, "sleep", sleep)
        monkeypatch.setattr(teacher.time, "time", lambda: clock[0])
        monkeypatch.setattr(teacher.time, "monotonic", lambda: clock[0])
        source.root.mkdir()
        run.root.mkdir()
        if is_first:
            teacher.evaluate_teacher(config, run, held, None)
        else:
            teacher.wait_for_node_0(config, run, None)

    def held(config: RunConfig, folder: RunFolder) -> str:
        assert (config.nodes, config.learner.replicas) == (1, 1)
        raise HeldError(f"{folder.root} is held by process 7; …, remove {folder.lock}")

    monkeypatch.setattr(teacher, "TEACHERS", tmp_path)
    monkeypatch.setattr(teacher, "STALE_AFTER_S", 10)
    monkeypatch.setattr(teacher, "RENDEZVOUS_TIMEOUT_S", 10)
    return wait


@pytest.mark.parametrize(("host", "last_write"), [("another", 0), ("another", 30), ("this", 0)])
def test_a_wait_for_a_teacher_on_another_host_ends_if_nothing_is_written(
    host: str, last_write: int, waits: Callable[..., None]
) -> None:
    """A job that was killed on another host leaves a lock, which tells this host nothing."""
    polls: list[int] = []

    def polled(source: RunFolder) -> None:
        polls.append(len(polls))
        if len(polls) <= last_write:
            source.log.write_text("goes on\n")
        name = platform.node() if host == "this" else "another"
        lock = {"host": name, "boot": "", "since": "", "processes": [["7", "1"]]}
        source.lock.write_text(json.dumps(lock))
        os.utime(source.lock, (0, 0))
        if len(polls) == 100:
            source.result.write_text('{"digest": "x"}')

    if host == "this":
        waits(polled)
        assert len(polls) == 100
    else:
        with pytest.raises(RunFailedError, match=r"nothing was written .* remove .*lock"):
            waits(polled)
        assert len(polls) == last_write + 11


def test_other_nodes_wait_for_the_evaluation_of_node_0(waits: Callable[..., None]) -> None:
    polls: list[int] = []

    def polled(run: RunFolder) -> None:
        polls.append(len(polls))
        if len(polls) == 5:
            run.lock.touch()
        if len(polls) == 50:
            run.lock.unlink()

    with pytest.raises(RunFailedError, match="node 0, which evaluates the teacher, has ended"):
        waits(polled, is_first=False)
    assert len(polls) == 49 + 11


def test_vllm_needs_the_launcher_for_the_teacher(
    tmp_path: Path, compose_run: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "choose", lambda *_: Backend("vllm", "", "", "float32"))
    with pytest.raises(ConfigError, match=r"eval\.teacher=true with vLLM needs a second engine, .* with tip-exp"):
        run_eval(compose_run(*SMALL, "mode=eval"), RunFolder(tmp_path))
