"""The evaluation of a teacher: a run of its own (mode=teacher), which all runs that evaluate it alike share."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from threading import Event

from tip_exp.config.parse import digest
from tip_exp.config.schema import RunConfig
from tip_exp.launch.lock import HeldError, held_elsewhere
from tip_exp.launch.reuse import changed_models, local_path, newest_change, read_result
from tip_exp.records.folder import RunFolder
from tip_exp.utils.errors import RunFailedError, say
from tip_exp.utils.paths import OUTPUTS

TEACHERS = OUTPUTS / "teachers"
POLL_S = 0.2
RENDEZVOUS_TIMEOUT_S = 600  # that nodes wait for each other, as in torch.distributed.run
STALE_AFTER_S = 6 * 3600  # then an evaluation on another host has ended, which its lock does not show


def evaluate_teacher(
    config: RunConfig, folder: RunFolder, launch: Callable[[RunConfig, RunFolder], str], stop: Event | None
) -> None:
    """Finish the evaluation of the run's teacher and link `folder` to it; `stop`: of a run in the background.

    Waits while another run does it; GPUs are locked only while this run does.
    """
    teacher = teacher_config(config)
    source = RunFolder(TEACHERS / digest(teacher))
    if changed_models(teacher, source, ("teacher",)):
        source.result.unlink(missing_ok=True)
    waits_since = 0.0
    while read_result(source) is None:
        try:
            launch(teacher, source)
            break
        except HeldError as error:
            if not waits_since and stop is None:
                say(f"{config.name} waits for the evaluation of its teacher by another run ({source.root})")
            waits_since = waits_since or time.time()
            time.sleep(POLL_S)
            if stop is not None and stop.is_set():
                raise
            silent = time.time() - max(waits_since, newest_change(source.root)) > STALE_AFTER_S
            if silent and held_elsewhere(source.lock):
                waits = f"{config.name} waits for the evaluation of its teacher"
                hours = f"nothing was written for {STALE_AFTER_S // 3600} hours"
                raise RunFailedError(f"{waits}, but {hours}: {error}") from None
    link = folder.teacher.with_name(f"teacher.{os.getpid()}")
    link.symlink_to(os.path.relpath(source.root.resolve(), folder.root.resolve()))
    link.replace(folder.teacher)


def wait_for_node_0(config: RunConfig, folder: RunFolder, stop: Event | None) -> None:
    """Wait until node 0 has evaluated the teacher.

    Raises RunFailedError if node 0 has not held the run's lock for RENDEZVOUS_TIMEOUT_S.
    """
    teacher = teacher_config(config)
    source, seen = RunFolder(TEACHERS / digest(teacher)), time.monotonic()
    while read_result(source) is None or changed_models(teacher, source, ("teacher",)):
        time.sleep(POLL_S)
        if folder.lock.exists():
            seen = time.monotonic()
        if time.monotonic() - seen > RENDEZVOUS_TIMEOUT_S or (stop is not None and stop.is_set()):
            raise RunFailedError(f"{config.name}: node 0, which evaluates the teacher, has ended or was not started")


def teacher_config(config: RunConfig) -> RunConfig:
    """The evaluation of the run's teacher: equal digests for all runs that evaluate it alike.

    Prompts are rendered and responses decoded by the student's tokenizer, as in the run. If both tokenizers have the
    same files, the teacher's path replaces the student's, so that all such students share one evaluation. One node
    does it.
    """
    pair, name = config.pair, f"teacher.{config.pair.label}.{config.eval.label}"
    student = {"lora": None, "per_seed": False}
    if _tokenizer_files(pair.student.path) == (files := _tokenizer_files(pair.teacher.path)) and files:
        student |= {"path": pair.teacher.path, "revision": pair.teacher.revision}
    pair = pair.model_copy(update={"student": pair.student.model_copy(update=student)})
    changes = {"mode": "teacher", "name": name, "sweep": None, "pair": pair, "nodes": 1}
    changes["learner"] = config.learner.model_copy(update={"replicas": 1})
    return config.untracked().model_copy(update=changes)


def _tokenizer_files(model: str) -> dict[str, bytes]:
    """Contents of the files that make the tokenizer of a local model; {} for one of the hub."""
    patterns = ("*token*", "*vocab*", "merges*", "chat_template*")
    return {path.name: path.read_bytes() for pattern in patterns for path in local_path(model).glob(pattern)}
