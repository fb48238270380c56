"""What a run tells: rows survive kills, later rows go on a resume, W&B hears the same numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tip_exp.config.schema import RunConfig
from tip_exp.records.folder import RunFolder
from tip_exp.records.wandb import SAMPLE_COLUMNS
from tip_exp.records.writer import RunLogger, keep_rows_upto, make_listeners
from tip_exp.utils.io import append_rows, read_rows


def test_a_torn_last_line_is_not_a_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_rows(path, [{"step": 0, "x": 1.5}, {"step": 1, "x": 2.5}])
    with path.open("a") as file:
        file.write('{"step": 2, "x"')
    assert [row["step"] for row in read_rows(path)] == [0, 1]
    keep_rows_upto(path, 1)
    append_rows(path, [{"step": 2, "x": 3.5}])
    assert [row["step"] for row in read_rows(path)] == [0, 1, 2]


def test_text_with_odd_line_ends_stays_one_row(tmp_path: Path) -> None:
    path = tmp_path / "eval.jsonl"
    odd = "a\u2028b\x85c\r\nd \\boxed{5} 中文"
    append_rows(path, [{"step": 0, "text": odd}])
    assert read_rows(path) == [{"step": 0, "text": odd}]


def test_resuming_drops_what_came_after_the_checkpoint_and_starting_anew_drops_all(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with RunLogger(folder, [], resume_at=None) as logger:
        for step in range(4):
            logger.log(step, {"x": float(step)})
            logger.eval_rows(step, "student", "b", [{"text": "t"}])
    with RunLogger(folder, [], resume_at=2):
        assert [row["step"] for row in read_rows(folder.metrics)] == [0, 1, 2]
        assert [row["step"] for row in read_rows(folder.eval_rows)] == [0, 1, 2]
    with RunLogger(folder, [], resume_at=None):
        assert read_rows(folder.metrics) == []


def test_listeners_hear_each_row_once_and_are_told_of_a_crash(tmp_path: Path) -> None:
    class Listener:
        def __init__(self) -> None:
            self.heard: list = []

        def log(self, step: int, metrics: dict) -> None:
            self.heard.append((step, metrics))

        def samples(self, step: int, rows: list[dict]) -> None:
            self.heard.append((step, rows))

        def finish(self, summary: dict) -> None:
            self.heard.append(("finish", summary))

        def abort(self) -> None:
            self.heard.append("abort")

    good, bad = Listener(), Listener()
    with RunLogger(RunFolder(tmp_path), [good], resume_at=None) as logger:
        logger.log(0, {"x": 1.0})
        logger.finish({"final": 2.0})
    assert good.heard == [(0, {"x": 1.0}), ("finish", {"final": 2.0})]
    with pytest.raises(RuntimeError), RunLogger(RunFolder(tmp_path), [bad], resume_at=None):
        raise RuntimeError("a crash")
    assert bad.heard == ["abort"]


def test_wandb_offline_holds_what_metrics_jsonl_holds(tmp_path: Path, tiny_config: RunConfig) -> None:
    """Read back by W&B's own tool: every number of every row, config, group, tags, samples, peaks, id for a resume."""
    folder = RunFolder(tmp_path)
    config = tiny_config.model_copy(update={"sweep": "demo"})
    sample = {"prompt": "1+1?", "answer": "2", "finish": "stop", "tokens": ["2", "!"], "kept": [True, False]}
    sample |= {"entropy": [0.25, 0.75], "reverse_kl": [0.5, 4.0]}
    with RunLogger(folder, make_listeners(config, folder), resume_at=None) as logger:
        for step in range(3):
            if step == 2:
                logger.samples(step, [sample])
            logger.log(step, {"train/loss": 0.5 / (step + 1), "eval/word_sums/mean@4": 0.25 * step})
        logger.finish({"name": "x", "memory": {"memory/process_peak_gib": 0.5}, "outcomes": {"word_sums": {}}})
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    wandb = str(Path(sys.executable).parent / "wandb")
    told = subprocess.run([wandb, "leet", "inspect", "--json", str(run)], capture_output=True, text=True, timeout=60)
    records = [json.loads(line) for line in told.stdout.splitlines()]
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    expected = [{key: value for key, value in row.items() if key != "step"} for row in read_rows(folder.metrics)]
    assert len(expected) == 3
    assert [
        {key: row[key] for key in row if not key.startswith("_") and not key.startswith("samples")} for row in history
    ] == expected
    assert [row["_step"] for row in history] == [row["step"] for row in read_rows(folder.metrics)]
    (table,) = run.glob("files/media/table/*.json")
    found = json.loads(table.read_text())
    assert found["columns"] == list(SAMPLE_COLUMNS)
    assert found["data"] == [[2, "1+1?", "2", "2!", "stop", 2, 1, 0.5, "!"]]
    assert (tmp_path / "wandb_id").read_text().strip() in run.name
    for part in ("demo", "soft_or", "word_sums", "tiny", "memory/process_peak_gib", "retention"):
        assert part in told.stdout, part
    assert '"outcomes"' not in told.stdout


def test_off_is_no_listener(tmp_path: Path, tiny_config: RunConfig) -> None:
    silent = tiny_config.model_copy(update={"logger": tiny_config.logger.model_copy(update={"wandb": "off"})})
    assert make_listeners(silent, RunFolder(tmp_path)) == []
