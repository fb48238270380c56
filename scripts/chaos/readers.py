"""Many processes that read run folders, as tip-report does, while two write them."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

from omegaconf import OmegaConf

from scripts.chaos.forked import fork
from tip_exp.config.schema import RunConfig
from tip_exp.records.folder import RunFolder
from tip_exp.records.reader import read_all
from tip_exp.records.result import write_result
from tip_exp.records.writer import RunLogger
from tip_exp.report.run_files import read_files
from tip_exp.utils.io import write_atomic


def readers_beside_writers(root: Path, config: RunConfig, readers: int, reads: int) -> list[str]:
    """What a reader saw that no writer wrote as a whole; [] if there is nothing of it."""
    root.mkdir(parents=True, exist_ok=True)
    stop, faults = root.parent / "stop", root.parent / "faults.txt"
    writers = [_process(lambda n=n: _write(RunFolder(root / f"run{n}"), config, stop, n), faults) for n in range(2)]
    while len(read_all([root])) < 2:
        time.sleep(0.01)
    children = [_process(lambda: _read(root, reads), faults) for _ in range(readers)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    stop.touch()
    codes += [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in writers]
    written = faults.read_text().splitlines() if faults.exists() else []
    return written + [f"exit codes {codes}"] * any(codes)


def _process(body: Callable[[], None], faults: Path) -> int:
    def caught() -> int:
        try:
            body()
        except Exception as error:
            with faults.open("a") as file:
                file.write(f"{type(error).__name__}: {error}\n".replace("\n", " ") + "\n")
        return 0

    return fork(caught)


def _write(folder: RunFolder, config: RunConfig, stop: Path, seed: int) -> None:
    """A run that starts, logs, ends and starts again."""
    draw, text = random.Random(seed), OmegaConf.to_yaml(OmegaConf.create(config.model_dump()))
    folder.root.mkdir()
    while not stop.exists():
        folder.result.unlink(missing_ok=True)
        write_atomic(folder.config, text)
        with RunLogger(folder, None, rows=None) as logger:
            for step in range(draw.randint(1, 30)):
                scores = [{"protocol": "sampled", "problem_id": f"p{i}", "right": 1.0} for i in range(2)]
                logger.eval_rows(step, "student", "word_sums", scores)
                tokens = ["x" * draw.randint(1, 3000), "\n"]
                logger.samples(step, [{"tokens": tokens, "kept": [True, False], "entropy": [0.1, 0.2]}])
                logger.log(step, {"eval/word_sums/mean@1": 1.0, "train/loss": draw.random()})
            write_result(config, folder, {}, {}, "a CPU")


def _read(root: Path, reads: int) -> None:
    for _ in range(reads):
        records = read_all([root])
        assert len(records) == 2, f"{len(records)} runs instead of 2"
        damaged = [record.damage for record in records if record.damage]
        whole = [record for record in records if not record.damage]
        runs, unread = read_files(whole, {record.folder: record.config["name"] for record in whole})
        assert not damaged and not unread, json.dumps([damaged, unread])
        for run in runs:
            steps = [row["step"] for row in run.metrics]
            assert steps == list(range(len(steps))), steps
